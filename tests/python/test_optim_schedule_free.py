"""Schedule-free AdamW: the formulas in float64, its modes, checkpoints, and what it learns."""

from __future__ import annotations

import inspect
import io
import itertools

import numpy as np
import optim_cases as cases
import pytest
import torch
from halfbyte import optim
from halfbyte.optim.optimizer import Optimizer8bit
from torch import nn

KEY = "__bnb_optimizer_quant_state__"
BOTH = [optim.AdamWScheduleFree, optim.AdamWScheduleFree8bit]
SHAPES = [(64, 80), (7, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def one_thread():
    """Many steps of little work are no faster with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Reference:
    """The paper's x, y, z for one parameter, in float64; x as the average that it is."""

    def __init__(
        self, p, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=0, r=0.0
    ):
        self.x = self.y = self.z = p.detach().double().numpy()
        self.v = np.zeros_like(self.x)
        self.k, self.total, self.top = 0, 0.0, 0.0
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.warmup, self.r = warmup_steps, r

    def step(self, g):
        g = g.double().numpy()
        beta1, beta2 = self.betas
        self.k += 1
        lr = self.lr * min(1.0, self.k / self.warmup if self.warmup else 1.0)
        self.top = max(self.top, lr)
        weight = self.k**self.r * self.top**2
        self.total += weight
        self.v = beta2 * self.v + (1 - beta2) * g * g
        u = g / (np.sqrt(self.v / (1 - beta2**self.k)) + self.eps) + self.decay * self.y
        self.z = self.z - lr * u
        average = weight / self.total if self.total else 0.0
        self.x = self.x + average * (self.z - self.x)
        self.y = (1 - beta1) * self.z + beta1 * self.x


def gradient(p0, index, step):
    generator = torch.Generator().manual_seed(10_000 * index + step)
    noise = torch.randn(p0.shape, generator=generator)
    return 0.3 * p0.float() + noise * (1 + 0.5 * torch.sin(3 * p0.float()))


def follow(kind, steps, dtype=torch.float32, shapes=SHAPES, between=None, rounding=None, **more):
    """The optimizer, its parameters and their references after some steps."""
    params = cases.parameters(*shapes, dtype=dtype)
    starts = [p.detach().clone() for p in params]
    made = kind(params, **more, **({"rounding": rounding} if rounding else {}))
    references = [Reference(p, **more) for p in params]
    made.train()
    for step in range(steps):
        for index, (p, start, reference) in enumerate(zip(params, starts, references, strict=True)):
            p.grad = gradient(start, index, step).to(dtype)
            reference.step(p.grad)
        made.step()
        if between is not None:
            between(made, step)
    return made, params, starts, references


def error(p, start, expected):
    """Relative to how far the parameter has gone."""
    got, first = p.detach().double().numpy(), start.double().numpy()
    return np.linalg.norm(got - expected) / np.linalg.norm(expected - first)


# ---- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 50},
        {"lr": 2e-3, "betas": (0.95, 0.99), "r": 1.0, "eps": 1e-4},
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_thousand_steps(more):
    def there_and_back(made, step):
        if step % 100 == 50:
            made.eval()
            made.train()

    bounds = {optim.AdamWScheduleFree: 5e-6, optim.AdamWScheduleFree8bit: 0.05}
    for kind, bound in bounds.items():
        made, params, starts, references = follow(kind, 1000, between=there_and_back, **more)
        for index, (p, start, ref) in enumerate(zip(params, starts, references, strict=True)):
            limit = bound if index == 0 else 5e-6  # the second one has 32 bits always
            assert error(p, start, ref.y) < limit, (kind, index)
            assert error(made.state[p]["state1"], start, ref.z) < limit
        made.eval()
        for index, (p, start, ref) in enumerate(zip(params, starts, references, strict=True)):
            assert error(p, start, ref.x) < (bound if index == 0 else 5e-6)


@pytest.mark.usefixtures("one_thread")
def test_bfloat16():
    """Updates that vanish in y come back with stochastic and with compensated rounding."""
    errors = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        made, (p,), (start,), (reference,) = follow(
            optim.AdamWScheduleFree8bit,
            1000,
            torch.bfloat16,
            [(64, 80)],
            rounding=rounding,
            lr=2e-3,
        )
        assert made.state[p]["state1"].dtype == torch.float32
        made.eval()
        errors[rounding] = error(p, start, reference.x)
    assert errors["nearest"] > 2 * errors["stochastic"]
    assert errors["nearest"] > 3 * errors["kahan"]
    assert errors["kahan"] < 0.05


@pytest.mark.parametrize("kind", BOTH)
def test_x_is_the_average_of_z(kind):
    seen = []

    def note(made, step):
        seen.append(made.state[made.param_groups[0]["params"][0]]["state1"].double())

    more = {"lr": 1e-2, "warmup_steps": 10, "r": 0.5}
    made, (p,), _, _ = follow(kind, 40, shapes=[(64, 80)], between=note, **more)
    lrs = [1e-2 * min(1, (k + 1) / 10) for k in range(40)]
    weights = torch.tensor([(k + 1) ** 0.5 * lr**2 for k, lr in enumerate(lrs)]).double()
    mean = (torch.stack(seen) * weights.view(-1, 1, 1)).sum(0) / weights.sum()
    made.eval()
    torch.testing.assert_close(p.detach().double(), mean, rtol=0, atol=2e-6)
    group = made.param_groups[0]
    assert group["k"] == 40
    assert group["scheduled_lr"] == 1e-2
    assert group["lr_max"] == 1e-2
    assert group["weight_sum"] == pytest.approx(weights.sum().item())


def test_a_learning_rate_of_zero_changes_nothing():
    made, (p, _), (start, _), _ = follow(optim.AdamWScheduleFree8bit, 3, lr=0.0)
    assert torch.equal(p, start)
    made.eval()
    assert torch.equal(p, start)
    assert made.param_groups[0]["weight_sum"] == 0.0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", BOTH)
def test_elements_without_gradient_never_move(kind):
    params = cases.parameters((64, 80))
    old, made = params[0].detach().clone(), kind(params, lr=0.1)
    made.train()
    for step in range(200):
        cases.set_grads(params, step)
        params[0].grad[:, ::2] = 0
        made.step()
    for change in (made.eval, made.train):
        change()
        assert torch.equal(params[0][:, ::2], old[:, ::2])
        assert not torch.isclose(params[0][:, 1::2], old[:, 1::2]).any()


def test_elements_with_bad_gradients_stay():
    params = cases.parameters((64, 80))
    made = optim.AdamWScheduleFree8bit(params, lr=0.1)
    made.train()
    cases.train(made, params, range(3))
    p, state = params[0], made.state[params[0]]
    cases.set_grads(params, 3)
    p.grad[0, 0], p.grad[5, 5] = float("nan"), float("inf")
    y, z = p.detach().clone(), state["state1"].clone()
    made.step()
    stayed, moved = (p == y), (state["state1"] == z)
    assert stayed[0, 0] and stayed[5, 5] and moved[0, 0] and moved[5, 5]  # noqa: PT018
    assert stayed.sum() < 100
    assert p.isfinite().all()


def test_strided_parameters_and_late_gradients():
    a, b = cases.parameters((80, 64), (5000,)), cases.parameters((80, 64), (5000,))
    strided = nn.Parameter(a[0].detach().clone().t().contiguous().t())
    assert not strided.is_contiguous()
    one = optim.AdamWScheduleFree8bit([strided, a[1]], lr=1e-2)
    two = optim.AdamWScheduleFree8bit(b, lr=1e-2)
    for made, params in ((one, [strided, a[1]]), (two, b)):
        made.train()
        for step in range(4):
            cases.set_grads(params, step)
            if step < 2:
                params[1].grad = None
            made.step()
        made.eval()
    assert cases.equal([strided, a[1]], b)
    assert two.state[b[1]]["step"] == 2
    assert two.param_groups[0]["k"] == 4


# ---- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_steps_want_train_mode(kind):
    params = cases.parameters((64, 80))
    made = kind(params, lr=1e-2)
    cases.set_grads(params, 0)
    old = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=rf"{kind.__name__} must be in train mode to step, got"):
        made.step()
    made.train()
    made.step()
    made.eval()
    group = dict(made.param_groups[0])
    average = params[0].detach().clone()
    assert not torch.equal(average, old)
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) before training"):
        made.step(lambda: 0.0)
    assert made.param_groups[0] == group
    assert torch.equal(params[0], average)
    made.train()
    assert made.step(lambda: 3.0) == 3.0
    assert group["k"] == 1
    assert made.param_groups[0]["k"] == 2


def test_failed_steps_do_not_count():
    params = cases.parameters((64, 80))
    made = optim.AdamWScheduleFree(params)
    made.train()
    params[0].grad = torch.zeros(64, 80).to_sparse()
    with pytest.raises(RuntimeError, match="AdamWScheduleFree takes dense gradients"):
        made.step()
    assert made.param_groups[0]["k"] == 0
    assert made.param_groups[0]["weight_sum"] == 0.0


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.98])
def test_there_and_back(dtype, rounding, beta1):
    made, params, _, _ = follow(
        optim.AdamWScheduleFree8bit,
        20,
        dtype,
        [(600, 501), (7, 3)],
        rounding=rounding,
        lr=1e-2,
        betas=(beta1, 0.99),
    )

    def values(p):
        rest = made.state[p].get("compensation")
        return p.detach().double() + (0 if rest is None else rest.double())

    before = [p.detach().clone() for p in params]
    exact = [values(p) for p in params]
    made.train()  # already
    assert cases.equal(before, params)
    made.eval()
    averages = [p.detach().clone() for p in params]
    eps = torch.finfo(dtype).eps
    for p, y, x in zip(params, exact, averages, strict=True):
        want = y + (1 - 1 / beta1) * (made.state[p]["state1"].double() - y)
        torch.testing.assert_close(x.double(), want, rtol=0.501 * eps, atol=1e-7)
        assert (x.double() - y).abs().max() > 1e-3
    made.eval()
    assert cases.equal(averages, params)
    made.train()
    for p, y, wide, x in zip(params, before, exact, averages, strict=True):
        if rounding == "kahan" and dtype == torch.bfloat16:
            torch.testing.assert_close(values(p), wide, rtol=2**-16, atol=2**-16)
            continue
        (mantissa, exponent), other = torch.frexp(y.float()), torch.frexp(x.float()).exponent
        same = (other <= exponent) & (mantissa.abs() != 0.5)
        assert same.float().mean() > 0.8
        assert torch.equal(p[same], y[same])
        assert ((p - y).abs() <= eps * torch.maximum(x.abs(), y.abs())).all()


def test_modes_of_groups():
    a, b, c = cases.parameters((64, 80), (64, 80), (64, 80))
    made = optim.AdamWScheduleFree8bit([{"params": [a]}, {"params": [b], "lr": 1e-3}], lr=1e-2)
    assert [g["train_mode"] for g in made.param_groups] == [False, False]
    made.train()
    made.add_param_group({"params": [c]})
    assert [g["train_mode"] for g in made.param_groups] == [True] * 3
    cases.train(made, [a, b, c], range(3))
    y = [p.detach().clone() for p in (a, b, c)]
    made.eval()
    assert not any(torch.equal(p, old) for p, old in zip((a, b, c), y, strict=True))
    made.add_param_group({"params": cases.parameters((5,))})
    assert [g["train_mode"] for g in made.param_groups] == [False] * 4
    assert [g["k"] for g in made.param_groups] == [3, 3, 3, 0]
    made.train()
    made.param_groups[2]["train_mode"] = False
    with pytest.raises(RuntimeError, match="train mode"):
        made.step()


def test_the_interpolation_of_single_parameters():
    manager = optim.GlobalOptimManager.get_instance()
    a, b = cases.parameters((64, 80)), cases.parameters((64, 80))
    manager.override_config(a, key_value_dict={"betas": (0.8, 0.99), "optim_bits": 32})
    one, two = optim.AdamWScheduleFree8bit(a), optim.AdamWScheduleFree(b, betas=(0.8, 0.99))
    for made, params in ((one, a), (two, b)):
        made.train()
        cases.train(made, params, range(3))
        made.eval()
    assert one.state[a[0]]["state2"].dtype == torch.float32
    assert cases.equal(a, b)


# ---- classes and states --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_class(kind):
    assert issubclass(kind, Optimizer8bit)
    assert kind.__module__ == "halfbyte.optim.schedule_free"
    assert list(inspect.signature(kind).parameters)[:9] == [
        *("params", "lr", "betas", "eps", "weight_decay", "warmup_steps", "r"),
        *("weight_lr_power", "foreach"),
    ]  # as the reference package has them
    made = kind(cases.parameters((64, 80)))
    assert made.defaults == {
        "lr": 0.0025,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "r": 0.0,
        "k": 0,
        "warmup_steps": 0,
        "train_mode": False,
        "weight_sum": 0.0,
        "lr_max": -1.0,
        "scheduled_lr": 0.0,
        "weight_lr_power": 2.0,
        "foreach": None,
    }
    assert made.args.optim_bits == (8 if kind is optim.AdamWScheduleFree8bit else 32)


def test_states():
    params = cases.parameters((64, 80), (10, 3), dtype=torch.bfloat16)
    made = optim.AdamWScheduleFree8bit(params, rounding="kahan")
    made.train()
    cases.train(made, params, range(2))
    got = [
        {k: (v.dtype, tuple(v.shape)) for k, v in made.state[p].items() if k != "step"}
        for p in params
    ]
    floats = torch.float32
    assert got == [
        {
            "state1": (floats, (64, 80)),
            "state2": (torch.uint8, (64, 80)),
            "qmap2": (floats, (256,)),
            "absmax2": (floats, (20,)),
            "compensation": (torch.bfloat16, (64, 80)),
        },
        {
            "state1": (floats, (10, 3)),
            "state2": (floats, (10, 3)),
            "compensation": (torch.bfloat16, (10, 3)),
        },
    ]
    state = made.state[params[0]]
    spent = sum(state[k].nbytes for k in ("state1", "state2", "absmax2"))
    assert spent == 5 * 64 * 80 + 4 * 20


def test_paged():
    a, b = cases.parameters((400, 300), (64, 80)), cases.parameters((400, 300), (64, 80))
    made = optim.AdamWScheduleFree8bit(a, is_paged=True)
    plain = optim.AdamWScheduleFree8bit(b)
    for optimizer, params in ((made, a), (plain, b)):
        optimizer.train()
        cases.train(optimizer, params, range(3))
        optimizer.eval()
    assert cases.equal(a, b)
    for key in ("state1", "state2"):
        assert cases.in_pages(made.state[a[0]][key])
        assert not cases.in_pages(made.state[a[1]][key])
    again = optim.AdamWScheduleFree8bit(a, is_paged=True)
    again.load_state_dict(made.state_dict())
    assert cases.in_pages(again.state[a[0]]["state1"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"betas": (0.0, 0.999)}, r"betas\[0\] must be greater than 0 to leave train mode, got 0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be .* got 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"rounding": "up"}, "rounding must be"),
    ],
)
def test_refusals(more, says):
    for kind in BOTH:
        with pytest.raises(ValueError, match=says):
            kind(cases.parameters((64, 80)), **more)


# ---- checkpoints ---------------------------------------------------------------------------------


def saved(*parts):
    """State dicts after a trip through a file."""
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        *itertools.product(DTYPES, ["nearest"]),
        (torch.bfloat16, "kahan"),
        (torch.bfloat16, "stochastic"),
    ],
)
@pytest.mark.parametrize("kind", BOTH)
def test_resume(kind, dtype, rounding, mode):
    def new():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(80, 64), nn.Linear(64, 3)).to(dtype)
        more = {"warmup_steps": 5, "weight_decay": 0.1, "rounding": rounding, "seed": 7}
        return model, kind(model.parameters(), lr=1e-2, **more)

    model, made = new()
    made.train()
    cases.train(made, list(model.parameters()), range(3))
    getattr(made, mode)()
    twin, second = new()
    first_state, second_state = saved(model, made)
    twin.load_state_dict(first_state)
    second.load_state_dict(second_state)
    assert second.param_groups[0]["train_mode"] is (mode == "train")
    for m, o in ((model, made), (twin, second)):
        o.train()
        cases.train(o, list(m.parameters()), range(3, 10))
        assert o.param_groups[0]["k"] == 10
    for change in (lambda o: None, lambda o: o.eval()):
        change(made)
        change(second)
        assert cases.equal(list(model.parameters()), list(twin.parameters()))
    a, b = saved(made, second)
    assert a["param_groups"] == b["param_groups"]
    for index, state in a["state"].items():
        assert set(state) == {"step", KEY}
        assert state[KEY].keys() == b["state"][index][KEY].keys()
        for key, value in state[KEY].items():
            assert torch.equal(value, b["state"][index][KEY][key])


def test_states_of_the_reference_package():
    made, params, _, _ = follow(optim.AdamWScheduleFree, 5, lr=1e-2)
    theirs = made.state_dict()
    theirs["state"] = {
        key: {"z": state[KEY]["state1"], "exp_avg_sq": state[KEY]["state2"]}
        for key, state in theirs["state"].items()
    }
    theirs["param_groups"][0]["foreach"] = True
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = optim.AdamWScheduleFree8bit(twins)
    other.load_state_dict(theirs)
    assert other.state[twins[0]]["step"] == 5
    assert other.state[twins[0]]["state2"].dtype == torch.float32
    cases.train(made, params, range(5, 8))
    cases.train(other, twins, range(5, 8))
    assert cases.equal(params, twins)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state1": None}, r"state\[0\]\['state1'\] must be a tensor, got nothing"),
        (
            {"state1": torch.zeros(64, 80, dtype=torch.uint8)},
            "must be torch.float32, got torch.uint8",
        ),
        ({"state1": torch.zeros(8)}, r"must have shape \[64, 80\], got \[8\]"),
        ({"state2": torch.zeros(8, dtype=torch.uint8)}, r"'state2'\] must have shape \[64, 80\]"),
        ({"state2": None}, r"'state2'\] must be a tensor, got nothing"),
        ({"absmax2": torch.zeros(3)}, r"'absmax2'\] must have shape \[20\], got \[3\]"),
        ({"qmap2": None}, r"'qmap2'\] must be a tensor, got nothing"),
        ({"step": -1}, r"\['step'\] must .*, got -1"),
    ],
)
def test_states_that_do_not_fit(change, says):
    made, params, _, _ = follow(optim.AdamWScheduleFree8bit, 2, lr=1e-2)
    state = made.state_dict()
    inside = {**state["state"][0][KEY], "step": 2, **change}
    state["state"][0] = {k: v for k, v in inside.items() if v is not None}
    other = optim.AdamWScheduleFree8bit(params)
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(state)
    assert not other.state


# ---- what it learns ------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_it_learns():
    """Classes of noisy points: in eval mode better than its y, and 8 bits as good as 32."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 64, generator=generator)
    labels = torch.randint(10, (512,), generator=generator)
    points = centres[labels] + 1.5 * torch.randn(512, 64, generator=generator)
    losses = {}
    for kind in BOTH:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        made = kind(model.parameters(), lr=3e-3, warmup_steps=10)
        made.train()
        for step in range(150):
            batch = slice(step % 4 * 96, step % 4 * 96 + 96)
            made.zero_grad()
            nn.functional.cross_entropy(model(points[batch]), labels[batch]).backward()
            made.step()
        made.eval()
        with torch.no_grad():
            out = model(points[384:])
            losses[kind] = nn.functional.cross_entropy(out, labels[384:]).item()
            assert (out.argmax(1) == labels[384:]).float().mean() > 0.8
    a, b = losses.values()
    assert abs(a - b) < 0.02 * a
