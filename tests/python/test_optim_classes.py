"""The optimizer classes: names, arguments, refusals, and what subclasses in the wild rely on."""

from __future__ import annotations

import inspect

import optim_cases as cases
import pytest
import torch
from halfbyte import optim
from halfbyte.optim.optimizer import MockArgs, Optimizer1State, Optimizer2State, Optimizer8bit
from torch import nn


def one() -> list[nn.Parameter]:
    return cases.parameters((64, 80))


@pytest.mark.parametrize("name", cases.NAMES)
def test_class(name):
    kind = getattr(optim, name)
    base = Optimizer2State if cases.states(name) == 2 else Optimizer1State
    assert issubclass(kind, base)
    assert issubclass(kind, Optimizer8bit)
    assert issubclass(kind, torch.optim.Optimizer)
    family = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    assert kind.__module__ == f"halfbyte.optim.{family.lower()}"
    assert kind.__name__ == name
    extra = list(inspect.signature(kind).parameters.values())[-2:]
    assert [(p.name, p.kind.name, p.default) for p in extra] == [
        ("rounding", "KEYWORD_ONLY", "nearest"),
        ("seed", "KEYWORD_ONLY", 0),
    ]
    assert "rounding" in kind.__doc__
    assert "seed" in kind.__doc__


@pytest.mark.parametrize("name", cases.NAMES)
def test_attributes(name):
    made = cases.make(name, one())
    bits = 8 if name.endswith("8bit") else 32
    assert made.args.optim_bits == bits
    assert made.args.min_8bit_size == 4096
    assert made.args.skip_zeros is False
    assert made.args.max_unorm == {"LAMB": 1.0, "LARS": 0.02}.get(name[:4], 0.0)
    assert made.is_paged is name.startswith("Paged")
    assert made.initialized is False
    assert made.mng is optim.GlobalOptimManager.get_instance()
    assert made.page_mng is not None
    assert set(made.name2qmap) == ({"dynamic", "udynamic"} if bits == 8 else set())
    assert {"state1", "state2", "absmax1", "qmap2", "compensation"} < made.non_castable_tensor_keys
    assert made._FSDP_WRAPPED_QUANT_STATE_KEY == "__bnb_optimizer_quant_state__"
    want = {"params", "lr", "betas", "eps", "weight_decay"}
    if cases.states(name) == 2:
        want |= {"alpha", "t_alpha", "t_beta3"}
    assert set(made.param_groups[0]) == want


@pytest.mark.parametrize("name", cases.NAMES)
def test_states(name):
    large, small = cases.parameters((64, 80), (10, 3))
    made = cases.make(name, [large, small])
    cases.train(made, [large, small], range(2))
    bits = 8 if name.endswith("8bit") else 32
    stacked = (2,) if "AdEMAMix" in name else ()
    for p, eight in ((large, bits == 8), (small, False)):
        state = made.state[p]
        dtype = torch.uint8 if eight else torch.float32
        want = {"state1": (dtype, (*stacked, *p.shape))}
        if cases.states(name) == 2:
            want["state2"] = (dtype, tuple(p.shape))
        if eight:
            for i in range(1, cases.states(name) + 1):
                want[f"qmap{i}"] = (torch.float32, (256,))
                want[f"absmax{i}"] = (torch.float32, (*(stacked if i == 1 else ()), 20))
            assert state["qmap1"] is cases.shared_code(made, "dynamic")
        if "LAMB" in name or "LARS" in name:
            want["unorm_vec"] = (torch.float32, (1,))
        step = state["step"]
        assert type(step) is int
        assert step == 2
        got = {k: (v.dtype, tuple(v.shape)) for k, v in state.items() if k != "step"}
        assert got == want
        assert all(v.is_contiguous() for k, v in state.items() if k != "step")


@pytest.mark.parametrize(
    ("name", "more", "error", "says"),
    [
        ("Adam", {"lr": -1.0}, ValueError, "lr must not be negative, got -1.0"),
        ("Adam", {"eps": -1.0}, ValueError, "eps must not be negative"),
        ("Adam", {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be .* got 1.0"),
        ("Adam", {"weight_decay": -1}, ValueError, "weight_decay must not be negative"),
        ("Lion", {"lr": float("nan")}, ValueError, "lr must not be negative, got nan"),
        ("Lion", {"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\]"),
        ("Adam8bit", {"amsgrad": True}, ValueError, "Adam8bit has no AMSGrad"),
        ("AdamW8bit", {"amsgrad": True}, ValueError, "AdamW8bit has no AMSGrad"),
        ("PagedAdam8bit", {"optim_bits": 8}, ValueError, "keep its default 32, got 8"),
        ("PagedAdamW8bit", {"amsgrad": True}, ValueError, "AMSGrad"),
        ("Adagrad8bit", {"optim_bits": 32}, ValueError, "keep its default 8, got 32"),
        ("Adagrad", {"lr_decay": 0.1}, ValueError, "lr_decay must be 0, got 0.1"),
        ("Adagrad32bit", {"initial_accumulator_value": 1}, ValueError, "starts from 0"),
        ("LAMB8bit", {"amsgrad": True}, ValueError, "AMSGrad"),
        ("LAMB8bit", {"max_unorm": 0.5}, ValueError, "default 1.0, got 0.5"),
        ("SGD", {"momentum": 0}, NotImplementedError, "SGD needs momentum"),
        ("SGD8bit", {"momentum": 0}, NotImplementedError, "SGD8bit needs momentum"),
        ("LARS32bit", {"momentum": 0}, NotImplementedError, "LARS32bit needs momentum"),
        ("RMSprop", {"alpha": 0}, NotImplementedError, "alpha must not be 0"),
        ("RMSprop8bit", {"centered": True}, NotImplementedError, "centered must be False"),
        ("AdEMAMix", {"betas": (0.9, 0.99)}, ValueError, "three betas"),
        ("Adam", {"rounding": "up"}, ValueError, "'nearest', 'stochastic' or 'kahan', got 'up'"),
        ("Adam", {"seed": 1.5}, TypeError, "seed must be an integer, got float"),
        ("Adam", {"seed": 2**63}, ValueError, "64 bits"),
    ],
)
def test_refusals(name, more, error, says):
    with pytest.raises(error, match=says):
        cases.make(name, one(), **more)


def test_optim_bits_is_checked_when_states_are_made():
    params = one()
    made = cases.make("Adam", params, optim_bits=16)
    cases.set_grads(params, 0)
    with pytest.raises(NotImplementedError, match="optim_bits must be 8 or 32, got 16"):
        made.step()


def test_optim_bits_8_is_the_8bit_class():
    for family in cases.FAMILIES:
        a, b = one(), one()
        cases.train(cases.make(family, a, optim_bits=8), a, range(3))
        cases.train(cases.make(f"{family}8bit", b), b, range(3))
        assert cases.equal(a, b), family


def test_adam_and_adamw_are_one_rule():
    a, b = one(), one()
    cases.train(cases.make("Adam8bit", a, weight_decay=0.1), a, range(3))
    cases.train(cases.make("AdamW8bit", b, weight_decay=0.1), b, range(3))
    assert cases.equal(a, b)


def test_betas_as_a_string():
    a, b = one(), one()
    cases.train(cases.make("AdamW", a, betas="(0.8, 0.99)"), a, range(3))
    cases.train(cases.make("AdamW", b, betas=(0.8, 0.99)), b, range(3))
    assert cases.equal(a, b)
    made = cases.make("AdEMAMix", one(), betas="(0.8, 0.99, 0.999)")
    assert made.param_groups[0]["betas"] == [0.8, 0.99, 0.999]


def test_settings_come_from_args():
    class Args:
        optim_bits = 8
        min_8bit_size = 100
        skip_zeros = True
        max_unorm = 0.5

    params = cases.parameters((10, 12))
    made = cases.make("Adam", params, args=Args, optim_bits=32)
    assert made.args is Args
    cases.train(made, params, range(1))
    state = made.state[params[0]]
    assert state["state1"].dtype == torch.uint8
    assert state["unorm_vec"].shape == (1,)
    assert made.get_config(0, 0, made.param_groups[0])["skip_zeros"] is True
    assert vars(MockArgs({"optim_bits": 8, "other": 3})) == {"optim_bits": 8, "other": 3}


def test_base_classes_want_an_update():
    params = one()
    made = Optimizer8bit(params, {"lr": 1e-3}, 8)
    assert set(made.name2qmap) == {"dynamic", "udynamic"}
    cases.set_grads(params, 0)
    with pytest.raises(NotImplementedError, match="Optimizer8bit must define init_state"):
        made.step()
    with pytest.raises(NotImplementedError, match="Optimizer8bit must define update_step"):
        made.update_step(made.param_groups[0], params[0], 0, 0)


def test_a_rule_of_somebody_else_on_the_base_class():
    class Half(Optimizer8bit):
        def init_state(self, group, p, gindex, pindex):
            self.state[p]["mean"] = self.get_state_buffer(p)

        def update_step(self, group, p, gindex, pindex):
            self.state[p]["mean"].add_(p.grad)
            p.sub_(p.grad, alpha=group["lr"])

    params = cases.parameters((3, 4), (5,))
    before = [p.detach().clone() for p in params]
    made = Half(params, {"lr": 0.5})
    cases.train(made, params, range(1))
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * p.grad)
        assert torch.equal(made.state[p]["mean"], p.grad)


def test_methods_that_subclasses_override_are_called():
    class Watched(optim.AdamW8bit):
        def __init__(self, *args, **kwargs):
            self.seen = []
            super().__init__(*args, **kwargs)

        def init_state(self, group, p, gindex, pindex):
            self.seen.append(("init", gindex, pindex))
            super().init_state(group, p, gindex, pindex)

        def update_step(self, group, p, gindex, pindex):
            self.seen.append(("update", gindex, pindex))
            super().update_step(group, p, gindex, pindex)

    a, b = cases.parameters((64, 80), (5,)), cases.parameters((64, 80), (5,))
    made = Watched([{"params": a[:1]}, {"params": a[1:]}])
    cases.train(made, a, range(2))
    cases.train(optim.AdamW8bit(b), b, range(2))
    first = [("init", 0, 0), ("update", 0, 0), ("init", 1, 0), ("update", 1, 0)]
    assert made.seen == [*first, ("update", 0, 0), ("update", 1, 0)]
    assert cases.equal(a, b)


def test_config_of_a_subclass_is_used():
    class Doubled(optim.Adam):
        def get_config(self, gindex, pindex, group):
            config = super().get_config(gindex, pindex, group)
            return config | {"lr": 2 * config["lr"]}

    a, b = one(), one()
    cases.train(Doubled(a, lr=1e-2), a, range(2))
    cases.train(optim.Adam(b, lr=2e-2), b, range(2))
    assert cases.equal(a, b)


class GaLore(Optimizer2State):
    """As galore_torch's AdamW8bit goes about it: the parameter is another, smaller tensor while it
    is updated, and two arguments stand where they once had other names."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, rank=4):
        self.rank = rank
        percentile_clipping, block_wise = 100, True
        super().__init__(
            *("adam", params, lr, betas, eps, weight_decay, 8, None, 256),
            *(percentile_clipping, block_wise),
            is_paged=False,
        )

    @torch.no_grad()
    def step(self, closure=None):
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                state = self.state[p]
                if "step" not in state:
                    state["step"] = 0
                if "projector" not in state:
                    state["projector"] = {"basis": torch.linalg.qr(p.grad[:, : self.rank])[0]}
                basis = state["projector"]["basis"]
                small = basis.T @ p.grad
                saved = p.data.clone()
                p.data = torch.zeros_like(small)
                p.grad = small
                if "state1" not in state:
                    self.init_state(group, p, gindex, pindex)
                self.prefetch_state(p)
                self.update_step(group, p, gindex, pindex)
                p.data = saved.add_(basis @ p.data)


def test_galore():
    (p,) = cases.parameters((64, 300))
    old = p.detach().clone()
    made = GaLore([p], lr=1e-2)
    assert made.args.max_unorm == 0.0
    assert made.args.skip_zeros is False
    cases.train(made, [p], range(3))
    state = made.state[p]
    assert state["step"] == 3
    assert state["state1"].shape == (4, 300)
    assert state["state1"].dtype == torch.uint8
    assert state["absmax1"].shape == (5,)
    assert p.shape == (64, 300)
    assert torch.linalg.matrix_rank(p.detach() - old) <= 4
    assert (p.detach() - old).abs().max() > 1e-3

    # What was never given to these classes must still survive a checkpoint.
    (again,) = cases.parameters((64, 300))
    again.data.copy_(p.data)
    other = GaLore([again], lr=1e-2)
    other.load_state_dict(made.state_dict())
    cases.train(made, [p], range(3, 5))
    cases.train(other, [again], range(3, 5))
    assert torch.equal(p, again)


def test_real_values_are_not_taken_for_the_old_arguments():
    made = Optimizer2State("adam", one(), 1e-3, (0.9, 0.999), 1e-8, 0, 8, None, 4096, 100.0, True)
    assert made.args.max_unorm == 100.0
    assert made.args.skip_zeros is True


def test_pytorch_lars():
    (p,) = cases.parameters((8, 9))
    old, made = p.detach().clone(), optim.PytorchLARS([p], lr=0.1, momentum=0.9, max_unorm=0.02)
    cases.set_grads([p], 0)
    grad = p.grad.clone()
    assert made.step(lambda: 3.0) == 3.0
    scale = 0.02 * old.norm() / grad.norm()
    torch.testing.assert_close(p.detach(), old - 0.1 * scale * grad)
    cases.set_grads([p], 1)
    before, total = p.detach().clone(), 0.9 * grad + p.grad
    made.step()
    scale = 0.02 * before.norm() / total.norm()
    torch.testing.assert_close(p.detach(), before - 0.1 * scale * total)
    with pytest.raises(ValueError, match="nesterov needs a positive momentum"):
        optim.PytorchLARS([p], nesterov=True)
    with pytest.raises(ValueError, match="momentum must not be negative, got -1"):
        optim.PytorchLARS([p], momentum=-1)


def test_lars_is_its_reference():
    a, b = one(), one()
    cases.train(optim.LARS(a, 0.1, momentum=0.9, weight_decay=0.01), a, range(5))
    cases.train(optim.PytorchLARS(b, 0.1, momentum=0.9, weight_decay=0.01), b, range(5))
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)
