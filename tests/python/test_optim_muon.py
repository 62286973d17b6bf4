"""Muon8bit: the formulas in float64, torch's Muon beside it, its groups, checkpoints, shards."""

from __future__ import annotations

import copy
import inspect
import io
import math
import os
import sys

import numpy as np
import optim_cases as cases
import optim_reference as reference
import pytest
import torch
from halfbyte import optim
from halfbyte.optim.optimizer import Optimizer8bit
from torch import nn

KEY = "__bnb_optimizer_quant_state__"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(64, 80), (80, 64), (70, 70), (7, 3)]
WORLD = 2


@pytest.fixture
def one_thread():
    """Many steps of little work are no faster with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def orthogonalized(u, steps=5, eps=1e-7):
    """The iteration in float64, as the formula has it."""
    a, b, c = COEFFICIENTS
    x = u / max(np.linalg.norm(u), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def ratio(shape, kind):
    rows, columns = shape
    return {
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "spectral_unclamped": math.sqrt(rows / columns),
    }.get(kind, math.sqrt(max(1, rows / columns)))


def momentum_of(state):
    """The stored momentum in float64."""
    if state["state1"].dtype == torch.float32:
        return state["state1"].double().numpy()
    codes = state["state1"].numpy()
    flat = reference.decode(codes.reshape(-1), state["absmax1"].numpy(), reference.SIGNED)
    return flat.reshape(codes.shape)


# ---- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_in_float64(dtype, nesterov, adjust):
    params = cases.parameters(*SHAPES, dtype=dtype)
    more = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust}
    made = optim.Muon8bit(params, ns_dtype=torch.float32, **more)
    for step in range(3):
        cases.set_grads(params, step)
        before = [p.detach().double().numpy() for p in params]
        old = [momentum_of(made.state[p]) if step else np.zeros(p.shape) for p in params]
        made.step()
        for p, start, m in zip(params, before, old, strict=True):
            g = p.grad.double().numpy()
            m = 0.95 * m + 0.05 * g
            u = 0.95 * m + 0.05 * g if nesterov else m
            want = start * (1 - 0.02 * 0.1) - 0.02 * ratio(p.shape, adjust) * orthogonalized(u)
            eps = torch.finfo(dtype).eps
            bound = 1e-5 if dtype == torch.float32 else 0.51 * eps * np.abs(want) + 1e-5
            assert (np.abs(p.detach().double().numpy() - want) <= bound).all()
            state = made.state[p]
            if p.numel() < 4096:
                np.testing.assert_allclose(state["state1"].numpy(), m, rtol=1e-5, atol=1e-7)
                continue
            absmax = reference.scales(m.reshape(-1))
            np.testing.assert_allclose(state["absmax1"].numpy(), absmax, rtol=1e-6)
            low, high = reference.admissible(
                m.reshape(-1), 1e-6 * np.abs(m.reshape(-1)), absmax, reference.SIGNED
            )
            codes = state["state1"].reshape(-1).numpy()
            assert ((low <= codes) & (codes <= high)).all()
            assert state["step"] == step + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_iterations_in_the_dtype_of_the_parameter(dtype):
    """Orthogonal as far as five iterations go, and no further off than that dtype explains."""
    (p,) = cases.parameters((64, 256), dtype=dtype)
    old = p.detach().double()
    made = optim.Muon8bit([p], lr=1.0, weight_decay=0.0)
    cases.set_grads([p], 0)
    made.step()
    moved = old - p.detach().double()
    singular = torch.linalg.svdvals(moved)
    assert 0.6 < singular.min() <= singular.max() < 1.3
    want = torch.from_numpy(orthogonalized(p.grad.double().numpy()))
    assert (moved - want).norm() < 30 * torch.finfo(dtype).eps * want.norm()
    if dtype == torch.float32:
        (q,) = cases.parameters((64, 256))
        rounded = optim.Muon8bit([q], lr=1.0, weight_decay=0.0, ns_dtype=torch.bfloat16)
        cases.set_grads([q], 0)
        rounded.step()
        assert (q.detach().double() - p.detach().double()).norm() > 1e-3 * want.norm()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "more", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.9}]
)
def test_a_thousand_steps_beside_torch(more):
    shapes = [(64, 80), (96, 48)]
    starts = cases.parameters(*shapes)
    more = {"lr": 0.02, "ns_dtype": torch.bfloat16, **more}
    theirs, ours, exact = (copy.deepcopy(starts) for _ in range(3))
    torchs = {k: v for k, v in more.items() if k != "ns_dtype"}
    optimizers = [
        (torch.optim.Muon(theirs, **torchs), theirs),
        (optim.Muon8bit(ours, **more), ours),
        (optim.Muon8bit(exact, min_8bit_size=10**9, **more), exact),
    ]
    for step in range(1000):
        cases.set_grads(starts, step)
        for made, params in optimizers:
            for p, start in zip(params, starts, strict=True):
                p.grad = start.grad + 0.3 * start.detach()
            made.step()
    for p, q, r, start in zip(theirs, ours, exact, starts, strict=True):
        gone = (p - start).norm()
        assert (r - p).norm() < 0.005 * gone
        assert (q - p).norm() < 0.03 * gone


def test_convolutions_are_flattened():
    a, b = cases.parameters((32, 16, 3, 3)), cases.parameters((32, 144))
    b[0].data.copy_(a[0].detach().view(32, 144))
    one = optim.Muon8bit([{"params": a, "use_muon": True}], lr=0.02)
    two = optim.Muon8bit(b, lr=0.02)
    for step in range(3):
        cases.set_grads(a, step)
        b[0].grad = a[0].grad.view(32, 144)
        one.step()
        two.step()
    assert torch.equal(a[0].view(32, 144), b[0])
    assert one.state[a[0]]["state1"].shape == (32, 16, 3, 3)


def test_other_layouts_and_dtypes_of_gradients():
    a, b = cases.parameters((96, 64)), cases.parameters((96, 64))
    strided = nn.Parameter(a[0].detach().t().contiguous().t())
    assert not strided.is_contiguous()
    one, two = optim.Muon8bit([strided], lr=0.02), optim.Muon8bit(b, lr=0.02)
    for step in range(3):
        cases.set_grads(b, step)
        strided.grad = b[0].grad.t().contiguous().t()
        one.step()
        two.step()
    assert cases.equal([strided], b)
    (p,) = cases.parameters((96, 64), dtype=torch.bfloat16)
    made = optim.Muon8bit([p])
    p.grad = torch.zeros_like(p)
    p.grad[0, 0] = 1.0
    made.step()
    assert p.isfinite().all()
    assert made.state[p]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("nesterov", [True, False])
def test_bad_gradients(bits, nesterov):
    params = cases.parameters((64, 80))
    size = 4096 if bits == 8 else 10**9
    made = optim.Muon8bit(params, lr=0.02, min_8bit_size=size, nesterov=nesterov)
    cases.train(made, params, range(2))
    p, state = params[0], made.state[params[0]]
    old = p.detach().clone()
    cases.set_grads(params, 2)
    p.grad[0, 0], p.grad[5, 5] = float("nan"), float("-inf")
    made.step()
    assert torch.equal(p, old)
    momentum = momentum_of(state)
    assert np.isfinite(momentum).all()
    assert momentum[0, 0] == momentum[5, 5] == 0
    assert (momentum != 0).mean() > 0.9
    assert state["step"] == 3
    cases.train(made, params, range(3, 4))
    assert p.isfinite().all()
    assert not torch.equal(p, old)


def test_gradients_of_zero_and_no_learning_rate():
    params = cases.parameters((64, 80))
    old = params[0].detach().clone()
    made = optim.Muon8bit(params, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        params[0].grad = torch.zeros(64, 80)
        made.step()
    assert torch.equal(params[0], old)
    made.param_groups[0]["lr"] = 0.0
    made.param_groups[0]["weight_decay"] = 0.1
    cases.train(made, params, range(2))
    assert torch.equal(params[0], old)
    assert made.state[params[0]]["step"] == 5


def test_small_updates_of_bfloat16():
    """They vanish to nearest, and do not with stochastic and with compensated rounding."""
    gone = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        (p,) = cases.parameters((64, 80), dtype=torch.bfloat16)
        wide = p.detach().double()
        (q,) = cases.parameters((64, 80))
        q.data.copy_(wide)
        more = {"lr": 2e-3, "weight_decay": 0.0, "ns_dtype": torch.float32}
        made = optim.Muon8bit([p], rounding=rounding, seed=3, **more)
        exact = optim.Muon8bit([q], **more)
        for step in range(100):
            cases.set_grads([q], step % 2)
            p.grad = q.grad.to(torch.bfloat16)
            made.step()
            exact.step()
        gone[rounding] = ((p - q).norm() / (q - wide).norm()).item()
        assert ("compensation" in made.state[p]) == (rounding == "kahan")
    assert gone["nearest"] > 2 * gone["stochastic"]
    assert gone["kahan"] < 0.5 * gone["stochastic"]


# ---- groups --------------------------------------------------------------------------------------


def test_class():
    assert issubclass(optim.Muon8bit, Optimizer8bit)
    assert optim.Muon8bit.__module__ == "halfbyte.optim.muon"
    theirs = inspect.signature(torch.optim.Muon).parameters.values()
    ours = inspect.signature(optim.Muon8bit).parameters
    assert list(ours)[: len(theirs)] == [p.name for p in theirs]
    for p in theirs:
        assert ours[p.name].default == p.default


def model_groups():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(80, 64), nn.Linear(64, 70, bias=False))


def test_a_group_becomes_two():
    model = model_groups()
    made = optim.Muon8bit(
        list(model.named_parameters()),
        lr=0.02,
        adamw_lr=3e-4,
        adamw_betas=(0.8, 0.95),
        adamw_weight_decay=0.0,
    )
    first, second = made.param_groups
    assert first["param_names"] == ["1.weight", "2.weight"]
    assert second["param_names"] == ["0.weight", "0.bias", "1.bias"]
    assert [p.dim() for p in first["params"]] == [2, 2]
    assert [p.dim() for p in second["params"]] == [3, 1, 1]
    assert (first["use_muon"], first["lr"], first["eps"]) == (True, 0.02, 1e-7)
    assert first["weight_decay"] == 0.1
    assert (second["use_muon"], second["lr"], second["eps"]) == (False, 3e-4, 1e-8)
    assert (second["betas"], second["weight_decay"]) == ((0.8, 0.95), 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5)
    assert scheduler.get_last_lr() == [0.01, 1.5e-4]


def test_groups_that_say_what_they_are():
    embed, matrix, bias, conv = cases.parameters((100, 64), (64, 80), (64,), (8, 8, 3, 3))
    made = optim.Muon8bit(
        [
            {"params": [matrix], "use_muon": True, "lr": 0.03},
            {"params": [embed], "use_muon": False, "lr": 1e-3, "betas": (0.7, 0.9), "eps": 1e-10},
            {"params": [bias, conv], "weight_decay": 0.0},
        ],
        lr=0.02,
        adamw_lr=3e-4,
    )
    got = [
        tuple(g.get(k) for k in ("use_muon", "lr", "betas", "eps", "weight_decay"))
        for g in made.param_groups
    ]
    assert got == [
        (True, 0.03, None, 1e-7, 0.1),
        (False, 1e-3, (0.7, 0.9), 1e-10, 0.1),
        (False, 3e-4, (0.9, 0.999), 1e-8, 0.0),
    ]
    made.add_param_group({"params": cases.parameters((3, 4), (5,)), "adamw_lr": 1e-4, "lr": 0.1})
    assert [g["lr"] for g in made.param_groups[3:]] == [0.1, 1e-4]
    with pytest.raises(ValueError, match=r"at least 2 dimensions, got one of shape \[9\]"):
        made.add_param_group({"params": cases.parameters((9,)), "use_muon": True})
    assert len(made.param_groups) == 5


def test_the_rest_is_adamw8bit():
    a, b = cases.parameters((64, 80), (5000,), (7,)), cases.parameters((64, 80), (5000,), (7,))
    made = optim.Muon8bit(
        [{"params": a[:1], "use_muon": False}, {"params": a[1:]}], lr=1e-2, weight_decay=0.01
    )
    plain = optim.AdamW8bit(b, lr=1e-2)
    cases.train(made, a, range(5))
    cases.train(plain, b, range(5))
    assert cases.equal(a, b)
    for p, q in zip(a, b, strict=True):
        assert made.state[p].keys() == plain.state[q].keys()


def test_one_call_for_the_rest():
    params = cases.parameters((64, 80), *[(5000,)] * 4)
    made = optim.Muon8bit(params)
    cases.set_grads(params, 0)
    with cases.Calls() as calls:
        made.step()
    assert ("8bit_blockwise", 4) in calls.seen
    assert ("32bit", 1) in calls.seen
    assert len(calls.seen) == 2


def test_states():
    large, small, bias = cases.parameters((64, 80), (7, 3), (5000,))
    made = optim.Muon8bit([large, small, bias])
    cases.train(made, [large, small, bias], range(2))
    floats = torch.float32
    got = {k: (v.dtype, tuple(v.shape)) for k, v in made.state[large].items() if k != "step"}
    assert got == {
        "state1": (torch.uint8, (64, 80)),
        "qmap1": (floats, (256,)),
        "absmax1": (floats, (20,)),
    }
    assert made.state[small].keys() == {"step", "state1"}
    assert made.state[small]["state1"].dtype == floats
    assert made.state[bias].keys() == {
        *("step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
    }


def test_overrides_and_pages():
    manager = optim.GlobalOptimManager.get_instance()
    a, b = cases.parameters((400, 300), (64, 80)), cases.parameters((400, 300), (64, 80))
    manager.override_config(a[1], key_value_dict={"optim_bits": 32, "lr": 0.001})
    made = optim.Muon8bit(a, lr=0.02, is_paged=True)
    plain = optim.Muon8bit([{"params": b[:1]}, {"params": b[1:], "lr": 0.001}], lr=0.02)
    cases.train(made, a, range(1))
    cases.train(plain, b, range(1))
    assert cases.equal(a, b)  # of the first step the encoding takes nothing
    assert made.state[a[1]]["state1"].dtype == torch.float32
    assert cases.in_pages(made.state[a[0]]["state1"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and less than 1, got 1.0"),
        ({"weight_decay": -1}, "weight_decay must not be negative, got -1"),
        ({"eps": -1}, "eps must not be negative, got -1"),
        ({"ns_steps": 100}, "ns_steps must be an integer from 0 to 99, got 100"),
        ({"ns_coefficients": (1, 2)}, "ns_coefficients must be three numbers, got 2"),
        ({"adjust_lr_fn": "none"}, "'spectral_unclamped', got 'none'"),
        ({"ns_dtype": torch.float64}, "ns_dtype must be None, .* got torch.float64"),
        ({"adamw_lr": -2.0}, "lr must not be negative, got -2.0"),
        ({"adamw_betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"rounding": "up"}, "rounding must be"),
    ],
)
def test_refusals(more, says):
    with pytest.raises(ValueError, match=says):
        optim.Muon8bit(cases.parameters((64, 80)), **more)


# ---- checkpoints ---------------------------------------------------------------------------------


def saved(optimizer):
    """The state dict after a trip through a file."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "nearest"),
        (torch.float16, "nearest"),
        *((torch.bfloat16, rounding) for rounding in ("nearest", "stochastic", "kahan")),
    ],
)
def test_resume(dtype, rounding):
    more = {"lr": 0.02, "rounding": rounding, "seed": 5, "ns_dtype": torch.float32}
    params = cases.parameters(*SHAPES, (5000,), (7,), dtype=dtype)
    made = optim.Muon8bit(params, **more)
    cases.train(made, params, range(3))
    twins = copy.deepcopy(params)
    second = optim.Muon8bit(twins, **more)
    state = saved(made)
    assert set(state["state"][0]) == {"step", KEY}
    inside = {"state1", "qmap1", "absmax1"} | ({"compensation"} if rounding == "kahan" else set())
    assert set(state["state"][0][KEY]) == inside
    second.load_state_dict(state)
    third = copy.deepcopy(made)
    triplets = [p for group in third.param_groups for p in group["params"]]
    for optimizer, its in ((made, params), (second, twins), (third, triplets)):
        cases.train(optimizer, its, range(3, 6))
    assert cases.equal(params, twins)
    assert cases.equal(params, triplets)
    for p, q in zip(params, twins, strict=True):
        for key, value in made.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.state[q][key]))


def test_states_that_do_not_fit():
    a = cases.parameters((64, 80))
    adamw = optim.AdamW8bit(a)
    cases.train(adamw, a, range(1))
    made = optim.Muon8bit(a)
    with pytest.raises(ValueError, match="has no 'state2', got one of AdamW"):
        made.load_state_dict(adamw.state_dict())
    muon = optim.Muon8bit(a)
    cases.train(muon, a, range(1))
    state = muon.state_dict()
    state["state"][0][KEY] = {**state["state"][0][KEY], "absmax1": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"'absmax1'\] must have shape \[20\]"):
        made.load_state_dict(state)
    assert not made.state
    other = optim.Muon8bit([{"params": a, "use_muon": False}])
    with pytest.raises(ValueError, match=r"'state2'\] must be a tensor, got nothing"):
        other.load_state_dict(muon.state_dict())


# ---- what it learns ------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(dtype):
    """Classes of noisy points; no worse than torch's Muon with AdamW."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 64, generator=generator)
    labels = torch.randint(10, (640,), generator=generator)
    points = (centres[labels] + 1.5 * torch.randn(640, 64, generator=generator)).to(dtype)

    def trained(make):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(dtype)
        optimizers = make(model)
        for step in range(60):
            batch = slice(step % 4 * 96, step % 4 * 96 + 96)
            model.zero_grad()
            nn.functional.cross_entropy(model(points[batch]).float(), labels[batch]).backward()
            for optimizer in optimizers:
                optimizer.step()
        with torch.no_grad():
            out = model(points[384:]).float()
        assert (out.argmax(1) == labels[384:]).float().mean() > 0.8
        return nn.functional.cross_entropy(out, labels[384:]).item()

    def ours(model):
        return [optim.Muon8bit(model.parameters(), lr=0.01, adamw_lr=3e-3)]

    def theirs(model):
        parts = [
            [p for p in model.parameters() if (p.dim() == 2) is matrix] for matrix in (True, False)
        ]
        return [torch.optim.Muon(parts[0], lr=0.01), torch.optim.AdamW(parts[1], lr=3e-3)]

    slack = 1.1 if dtype == torch.float32 else 1.4  # the rest is in bfloat16 too
    assert trained(ours) < slack * trained(theirs)


# ---- shards --------------------------------------------------------------------------------------


def worker(rank: int, store: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (WORLD,))
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    for nesterov in (True, False):
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 1))
        sharded = copy.deepcopy(whole)
        fully_shard(sharded, mesh=mesh)
        optimizers = [
            optim.Muon8bit(model.parameters(), lr=0.01, nesterov=nesterov)
            for model in (whole, sharded)
        ]
        for step in range(4):
            for model, optimizer in zip((whole, sharded), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                if step == 2 and (model is whole or rank == 1):
                    # A part of one rank spoils the step of all.
                    grad = model[0].weight.grad
                    (grad if model is whole else grad.to_local())[-1, 0] = float("nan")
                optimizer.step()
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-4, atol=1e-5)
            assert p.isfinite().all()
            assert optimizers[1].state[q]["state1"].shape == q.to_local().shape
        assert optimizers[1].state[sharded[0].weight]["state1"].dtype == torch.uint8
        sys.stdout.write(f"rank {rank}: {nesterov}\n")
        sys.stdout.flush()
    dist.destroy_process_group()
    sys.stdout.flush()
    # Gloo's threads may still hold tensors when the interpreter ends, and abort (pytorch#179291).
    os._exit(0)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store wants a POSIX path")
def test_fully_sharded(python, tmp_path):
    out = python(
        f"import sys; sys.path.insert(0, {__file__.rpartition('/')[0]!r})\n"
        "import torch.multiprocessing as mp\n"
        "import test_optim_muon as t\n"
        f"mp.start_processes(t.worker, ({str(tmp_path / 'store')!r},), t.WORLD, "
        "start_method='fork')"
    )
    assert sorted(out.splitlines()) == sorted(
        f"rank {rank}: {nesterov}" for rank in range(WORLD) for nesterov in (True, False)
    )
