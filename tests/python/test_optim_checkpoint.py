"""state_dict and load_state_dict: the form on disk, resuming, and what is refused."""

from __future__ import annotations

import copy
import io

import optim_cases as cases
import pytest
import torch
from halfbyte import optim
from torch import nn

KEY = "__bnb_optimizer_quant_state__"
SHAPES = [(64, 80), (7, 3), (300, 400)]


def saved(optimizer) -> dict:
    """The state dict after a trip through a file."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def trained(name: str, dtype: torch.dtype = torch.float32, shapes=SHAPES, **more):
    params = cases.parameters(*shapes, dtype=dtype)
    made = cases.make(name, params, **more)
    cases.train(made, params, range(2))
    return made, params


@pytest.mark.parametrize("name", cases.NAMES)
def test_layout(name):
    made, _ = trained(name)
    out = saved(made)
    assert list(out) == ["state", "param_groups"]
    assert list(out["state"]) == [0, 1, 2]
    eight = name.endswith("8bit")
    for index, state in out["state"].items():
        assert set(state) == {"step", KEY}
        assert type(state["step"]) is int
        want = {f"state{i}" for i in range(1, cases.states(name) + 1)}
        if eight and index != 1:
            want |= {f"{k}{i}" for k in ("qmap", "absmax") for i in range(1, len(want) + 1)}
        if "LAMB" in name or "LARS" in name:
            want.add("unorm_vec")
        assert set(state[KEY]) == want
        for value in state[KEY].values():
            assert type(value) is torch.Tensor
            assert not vars(value)
    (group,) = out["param_groups"]
    assert group["params"] == [0, 1, 2]
    assert "rounding" not in group
    assert "seed" not in group
    assert made.state[made.param_groups[0]["params"][0]].keys() >= {"step", "state1"}


def resumed(name: str, dtype: torch.dtype, **more) -> None:
    made, params = trained(name, dtype, **more)
    twins = copies(params)
    second = cases.make(name, twins, **more)
    second.load_state_dict(saved(made))
    cases.train(made, params, range(2, 5))
    cases.train(second, twins, range(2, 5))
    assert cases.equal(params, twins)
    for p, twin in zip(params, twins, strict=True):
        a, b = made.state[p], second.state[twin]
        assert list(a) == list(b) or set(a) == set(b)
        for key, value in a.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, b[key]), key
                assert value.dtype == b[key].dtype
                assert getattr(value, "is_paged", False) == getattr(b[key], "is_paged", False)
                assert cases.in_pages(value) == cases.in_pages(b[key])
            else:
                assert value == b[key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", cases.NAMES)
def test_resume(name, dtype):
    resumed(name, dtype)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion", "PagedAdEMAMix8bit"])
def test_resume_with_rounding(name, rounding):
    resumed(name, torch.bfloat16, rounding=rounding, seed=7)


CHILD = """
import hashlib, sys
sys.path.insert(0, {folder!r})
import torch
import optim_cases as cases
torch.set_num_threads(1)
saved = torch.load({file!r}, weights_only=True, map_location="cpu")
for (name, dtype), (params, state) in saved.items():
    params = [torch.nn.Parameter(p) for p in params]
    more = {{"rounding": "stochastic"}} if dtype == "bfloat16" else {{}}
    made = cases.make(name, params, **more)
    made.load_state_dict(state)
    cases.train(made, params, range(2, 4))
    digest = hashlib.sha256()
    for p in params:
        digest.update(p.detach().view(torch.uint8).numpy().tobytes())
        for key, value in sorted(made.state[p].items()):
            if isinstance(value, torch.Tensor):
                digest.update(value.view(torch.uint8).numpy().tobytes())
    print(name, dtype, digest.hexdigest())
"""


def test_resume_in_another_process_is_bit_identical(python, tmp_path):
    import hashlib
    import os

    files, want = {}, []
    for name in cases.NAMES:
        for dtype in ("float32", "bfloat16"):
            more = {"rounding": "stochastic"} if dtype == "bfloat16" else {}
            shapes = [(64, 80), (7, 3), (251, 400)]
            made, params = trained(name, getattr(torch, dtype), shapes, **more)
            files[(name, dtype)] = copy.deepcopy(
                ([p.detach() for p in params], saved(made)),
            )
            cases.train(made, params, range(2, 4))
            digest = hashlib.sha256()
            for p in params:
                digest.update(p.detach().view(torch.uint8).numpy().tobytes())
                for _, value in sorted(made.state[p].items()):
                    if isinstance(value, torch.Tensor):
                        digest.update(value.view(torch.uint8).numpy().tobytes())
            want.append(f"{name} {dtype} {digest.hexdigest()}")
    file = tmp_path / "saved.pt"
    torch.save(files, file)
    got = python(CHILD.format(folder=os.path.dirname(__file__), file=str(file)))
    assert got.splitlines() == want


def test_bfloat16_parameters_do_not_narrow_their_states():
    made, params = trained("AdamW8bit", torch.bfloat16)
    second = cases.make("AdamW8bit", copies(params))
    second.load_state_dict(saved(made))
    for p in second.param_groups[0]["params"]:
        for key, value in second.state[p].items():
            if key != "step":
                assert value.dtype in (torch.float32, torch.uint8), key


def test_codes_are_shared():
    made, params = trained("AdamW8bit")
    second = cases.make("AdamW8bit", copies(params))
    second.load_state_dict(saved(made))
    first, _, last = (second.state[p] for p in second.param_groups[0]["params"])
    for key in ("qmap1", "qmap2"):
        assert first[key] is last[key]
    assert first["qmap1"] is cases.shared_code(second, "dynamic")
    cases.set_grads(second.param_groups[0]["params"], 0)
    with cases.Calls() as calls:
        second.step()
    assert sorted(calls.seen) == [("32bit", 1), ("8bit_blockwise", 2)]


def test_foreign_codes_are_kept():
    made, params = trained("AdamW8bit")
    file = saved(made)
    for index in (0, 2):
        file["state"][index][KEY]["qmap1"] = torch.linspace(-1, 1, 256)
    second = cases.make("AdamW8bit", copies(params))
    second.load_state_dict(file)
    first, _, last = (second.state[p] for p in second.param_groups[0]["params"])
    assert first["qmap1"] is last["qmap1"]
    assert torch.equal(first["qmap1"], torch.linspace(-1, 1, 256))


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "LAMB", "PagedAdamW"])
def test_older_form_without_the_inner_key(name):
    made, params = trained(name)
    file = saved(made)
    for index, state in file["state"].items():
        file["state"][index] = {"step": state["step"], **state[KEY]}
    a, b = copies(params), copies(params)
    old, new = cases.make(name, a), cases.make(name, b)
    old.load_state_dict(file)
    new.load_state_dict(saved(made))
    cases.train(old, a, range(2, 4))
    cases.train(new, b, range(2, 4))
    assert cases.equal(a, b)


def test_nothing_is_shared_with_the_callers_state_dict():
    for name in ("AdamW8bit", "PagedAdEMAMix"):
        made, params = trained(name)
        file = made.state_dict()
        before = copy.deepcopy(file)
        second = cases.make(name, copies(params))
        second.load_state_dict(file)
        assert set(file["state"][0]) == {"step", KEY}  # as it was
        file["param_groups"][0]["betas"] = (0.1, 0.1)
        cases.train(second, second.param_groups[0]["params"], range(2, 4))
        for index, state in before["state"].items():
            for key, value in state[KEY].items():
                assert torch.equal(value, file["state"][index][KEY][key]), key
        assert second.param_groups[0]["betas"] != (0.1, 0.1)
        for p, q in zip(params, second.param_groups[0]["params"], strict=True):
            for key in ("state1", "state2"):
                assert made.state[p][key].data_ptr() != second.state[q][key].data_ptr()


@pytest.mark.parametrize(("first", "second"), [("AdamW8bit", "AdamW"), ("AdamW", "AdamW8bit")])
def test_the_loaded_state_says_the_bits(first, second):
    made, params = trained(first)
    twins = copies(params)
    other = cases.make(second, twins)
    other.load_state_dict(saved(made))
    cases.train(made, params, range(2, 4))
    cases.train(other, twins, range(2, 4))
    assert cases.equal(params, twins)
    assert other.state[twins[0]]["state1"].dtype == made.state[params[0]]["state1"].dtype


def test_paged_and_not_exchange_checkpoints():
    for first, second in (("PagedAdamW8bit", "AdamW8bit"), ("AdamW8bit", "PagedAdamW8bit")):
        made, params = trained(first)
        twins = copies(params)
        other = cases.make(second, twins)
        other.load_state_dict(saved(made))
        assert cases.in_pages(other.state[twins[2]]["state1"]) is ("Paged" in second)
        assert not cases.in_pages(other.state[twins[0]]["state1"])
        cases.train(made, params, range(2, 4))
        cases.train(other, twins, range(2, 4))
        assert cases.equal(params, twins)


def test_settings_come_with_the_checkpoint():
    made, params = trained("AdamW8bit", betas=(0.5, 0.6), weight_decay=0.5)
    other = cases.make("AdamW8bit", copies(params))
    other.load_state_dict(saved(made))
    group = other.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.5)
    assert group["params"][0] is not params[0]


def test_settings_that_a_checkpoint_lacks_stay():
    made, params = trained("AdamW8bit", torch.bfloat16)
    file = saved(made)
    del file["param_groups"][0]["t_alpha"]
    other = cases.make("AdamW8bit", copies(params), rounding="kahan", seed=3)
    other.load_state_dict(file)
    group = other.param_groups[0]
    assert (group["rounding"], group["seed"], group["t_alpha"]) == ("kahan", 3, None)
    cases.train(other, group["params"], range(2, 3))
    assert other.state[group["params"][0]]["compensation"].dtype == torch.bfloat16


def test_rounding_comes_with_the_checkpoint():
    made, params = trained("AdamW8bit", torch.bfloat16, rounding="kahan", seed=5)
    file = saved(made)
    assert file["param_groups"][0]["rounding"] == "kahan"
    assert file["param_groups"][0]["seed"] == 5
    assert file["state"][0][KEY]["compensation"].dtype == torch.bfloat16
    other = cases.make("AdamW8bit", copies(params))
    other.load_state_dict(file)
    assert other.param_groups[0]["rounding"] == "kahan"


def test_parameters_without_a_state_yet():
    params = cases.parameters(*SHAPES)
    made = cases.make("AdamW8bit", params)
    cases.train(made, params[:1], range(1))
    file = saved(made)
    assert list(file["state"]) == [0]
    other = cases.make("AdamW8bit", copies(params))
    other.load_state_dict(file)
    twins = other.param_groups[0]["params"]
    cases.train(other, twins, range(1, 2))
    assert [other.state[p]["step"] for p in twins] == [2, 1, 1]
    fresh = cases.make("AdamW8bit", copies(params))
    fresh.load_state_dict(saved(cases.make("AdamW8bit", params)))
    assert not fresh.state


def test_loading_over_states_that_exist():
    made, params = trained("AdamW8bit")
    file = saved(made)
    then = copies(params)
    cases.train(made, params, range(10, 13))
    with torch.no_grad():
        for p, old in zip(params, then, strict=True):
            p.copy_(old)
    made.load_state_dict(file)
    other = cases.make("AdamW8bit", then)
    other.load_state_dict(file)
    cases.train(made, params, range(2, 4))
    cases.train(other, then, range(2, 4))
    assert cases.equal(params, then)


def test_step_as_a_tensor():
    """Tools that gather states make tensors of numbers."""
    made, params = trained("AdamW8bit")
    file = saved(made)
    file["state"][0]["step"] = torch.tensor(2.0)
    other = cases.make("AdamW8bit", copies(params))
    other.load_state_dict(file)
    step = other.state[other.param_groups[0]["params"][0]]["step"]
    assert type(step) is int
    assert step == 2


def test_strange_entries_are_kept():
    made, params = trained("AdamW8bit")
    made.state[params[0]]["note"] = {"a": [1, 2]}
    made.state[params[0]]["average"] = torch.ones(3)
    made.state["global"] = {"x": 1}
    other = cases.make("AdamW8bit", copies(params))
    other.load_state_dict(saved(made))
    state = other.state[other.param_groups[0]["params"][0]]
    assert state["note"] == {"a": [1, 2]}
    assert torch.equal(state["average"], torch.ones(3))
    assert other.state["global"] == {"x": 1}


def edit(index: int, key: str, value) -> object:
    def apply(file):
        state = file["state"][index]
        place = state if key == "step" else state[KEY]
        if value is None:
            del place[key]
        else:
            place[key] = value(place[key])

    return apply


def dropped_group(file):
    file["param_groups"] = []


def shorter_group(file):
    file["param_groups"][0]["params"] = [0, 1]


def without_state(file):
    del file["state"]


def without_blocks(file):
    state = file["state"][0][KEY]
    for key in ("absmax1", "absmax2"):
        del state[key]
    state["max1"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dropped_group, "has 0 parameter groups, the optimizer has 1"),
        (shorter_group, "group 0 of the state dict has 2 parameters, the optimizer's has 3"),
        (without_state, "no key 'state'"),
        (without_blocks, r"state\[0\] is of an 8-bit optimizer without blocks"),
        (edit(0, "state1", lambda t: t[:-1]), r"state\[0\]\['state1'\] must have shape \[64, 80\]"),
        (edit(2, "state2", lambda t: t.flatten()), r"state\[2\]\['state2'\] must have shape"),
        (edit(1, "state1", lambda t: t.double()), r"state\[1\]\['state1'\].*got torch.float64"),
        (edit(0, "state2", lambda t: t.float()), r"\['state2'\] must be torch.uint8, got"),
        (edit(0, "absmax1", lambda t: t[:-1]), r"\['absmax1'\] must have shape \[20\].*got \[19\]"),
        (edit(0, "absmax2", lambda t: t.half()), r"\['absmax2'\] must be torch.float32"),
        (edit(0, "absmax2", None), r"state\[0\]\['absmax2'\] must be a tensor, got nothing"),
        (edit(0, "qmap1", lambda t: t[:16]), r"\['qmap1'\] must have shape \[256\]"),
        (edit(0, "qmap2", lambda t: "x"), r"\['qmap2'\] must be a tensor, got str"),
        (edit(1, "state2", None), r"state\[1\]\['state2'\] must be a tensor, got nothing"),
        (
            edit(0, "step", lambda s: -1),
            r"state\[0\]\['step'\] must be an integer from 0 on, got -1",
        ),
        (
            edit(0, "step", lambda s: "2"),
            r"state\[0\]\['step'\] must be an integer from 0 on, got '2'",
        ),
        (edit(0, "step", None), r"state\[0\]\['step'\] must be an integer from 0 on, got None"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, says):
    made, params = trained("AdamW8bit")
    file = saved(made)
    change(file)
    twins = copies(params)
    other = cases.make("AdamW8bit", twins, lr=0.5)
    cases.train(other, twins, range(5, 6))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(file)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert after["state"][index]["step"] == state["step"]
        for key, value in state[KEY].items():
            assert torch.equal(after["state"][index][KEY][key], value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("state1", torch.zeros(64, 80, dtype=torch.uint8), r"shape \[2, 64, 80\]"),
        ("absmax1", torch.zeros(20), r"shape \[2, 20\]"),
    ],
)
def test_ademamix_states_are_stacked(key, value, says):
    made, params = trained("AdEMAMix8bit")
    file = saved(made)
    file["state"][0][KEY][key] = value
    with pytest.raises(ValueError, match=says):
        cases.make("AdEMAMix8bit", copies(params)).load_state_dict(file)


def test_compensation_is_checked():
    made, params = trained("Lion", torch.bfloat16, rounding="kahan")
    file = saved(made)
    file["state"][0][KEY]["compensation"] = torch.zeros(64, 80)
    with pytest.raises(ValueError, match=r"\['compensation'\] must be torch.bfloat16"):
        cases.make("Lion", copies(params)).load_state_dict(file)


def test_hooks():
    made, params = trained("AdamW8bit")
    seen = []
    made.register_state_dict_pre_hook(lambda optimizer: seen.append("save"))

    def on_disk(optimizer, file):
        seen.append(set(file["state"][0]))
        return {**file, "mine": 1}

    made.register_state_dict_post_hook(on_disk)
    file = made.state_dict()
    assert file["mine"] == 1
    assert seen == ["save", {"step", KEY}]
    other = cases.make("AdamW8bit", copies(params))

    def rename(optimizer, file):
        seen.append(file.pop("mine"))
        return {"state": {}, "param_groups": file["param_groups"]}

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(lambda optimizer: seen.append(len(optimizer.state)))
    other.load_state_dict(file)
    assert seen[2:] == [1, 0]
    assert file["mine"] == 1
    assert made.state_dict()["mine"] == 1  # hooks stay


def test_deepcopied_state_dict_of_an_optimizer_in_use():
    """The state dict is of the moment for whoever copies it, and live for whoever does not."""
    made, params = trained("Lion")
    live = made.state_dict()
    frozen = copy.deepcopy(live)
    cases.train(made, params, range(2, 3))
    state = made.state[params[0]]["state1"]
    assert live["state"][0][KEY]["state1"].data_ptr() == state.data_ptr()
    assert not torch.equal(frozen["state"][0][KEY]["state1"], state)


@pytest.mark.parametrize("step", [2.0, torch.tensor(2.0)])
def test_whole_steps_of_any_type_become_integers(step):
    params = cases.parameters((64, 80))
    made = cases.make("AdamW8bit", params)
    cases.set_grads(params, 0)
    made.step()
    saved = made.state_dict()
    saved["state"][0]["step"] = step
    made.load_state_dict(saved)
    assert type(made.state[params[0]]["step"]) is int
    made.step()
    assert made.state[params[0]]["step"] == 3


@pytest.mark.parametrize("step", [float("inf"), float("nan"), -1, 2**70, 1.5, "2", None])
def test_steps_that_are_none_are_refused(step):
    params = cases.parameters((64, 80))
    made = cases.make("AdamW8bit", params)
    cases.set_grads(params, 0)
    made.step()
    saved = made.state_dict()
    saved["state"][0]["step"] = step
    with pytest.raises(ValueError, match=r"state\[0\]\['step'\] must be an integer from 0 on"):
        made.load_state_dict(saved)
    assert made.state[params[0]]["step"] == 1


def test_another_optimizers_state_dict_is_named_as_such():
    params = cases.parameters((64, 80))
    other = torch.optim.AdamW(params)
    cases.set_grads(params, 0)
    other.step()
    with pytest.raises(ValueError, match="exp_avg, exp_avg_sq: is it another optimizer's"):
        cases.make("AdamW8bit", params).load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "bad",
    [
        {"state": None, "param_groups": []},
        {"state": {}, "param_groups": {}},
        {"state": {}, "param_groups": [{"lr": 1.0}]},
        {"state": {0: torch.zeros(3)}, "param_groups": [{"params": [0]}]},
        {"param_groups": []},
    ],
)
def test_what_is_no_state_dict_is_refused(bad):
    with pytest.raises(ValueError, match=r"must be a|has no key"):
        cases.make("AdamW8bit", cases.parameters((3,))).load_state_dict(bad)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "AdEMAMix8bit", "Lion8bit", "Muon8bit"])
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint_state_dicts_load_into_a_fresh_optimizer(name, flat):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 16))
    optimizer = getattr(optim, name)(model.parameters(), lr=1e-3)

    def step(model, optimizer):
        model(torch.ones(2, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step(model, optimizer)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    twin = copy.deepcopy(model)
    fresh = getattr(optim, name)(twin.parameters(), lr=1e-3)
    set_optimizer_state_dict(twin, fresh, saved, options=options)
    step(model, optimizer)
    step(twin, fresh)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert list(optimizer.state[p]) == list(fresh.state[q])
    # states that have just been made are no others than those of a first step
    third = getattr(optim, name)(twin.parameters(), lr=1e-3)
    get_optimizer_state_dict(twin, third, options=options)
    step(twin, third)
    for q in twin.parameters():
        assert list(third.state[q]) == list(fresh.state[q])
