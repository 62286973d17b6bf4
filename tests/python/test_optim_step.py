"""A step: which parameters share a call, and everything a training loop may do around it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import optim_cases as cases
import pytest
import torch
from halfbyte import optim
from reference import DEVICE
from torch import Tensor, nn


def test_one_call_for_all_that_is_alike():
    params = cases.parameters(*[(40, 3)] * 50, *[(64, 80)] * 50)
    made = cases.make("AdamW8bit", params)
    for step in range(2):
        cases.set_grads(params, step)
        with cases.Calls() as calls:
            made.step()
        assert sorted(calls.seen) == [("32bit", 50), ("8bit_blockwise", 50)]


def test_groups_share_a_call_when_they_share_their_settings():
    params = cases.parameters(*[(5,)] * 6)
    made = cases.make("Lion", [{"params": params[:2]}, {"params": params[2:4]}])
    made.add_param_group({"params": params[4:], "lr": 0.5})
    cases.set_grads(params, 0)
    with cases.Calls() as calls:
        made.step()
    assert calls.seen == [("32bit", 4), ("32bit", 2)]


def test_calls_by_step_number():
    params = cases.parameters(*[(5,)] * 3)
    made = cases.make("Adam", params)
    cases.set_grads(params[:2], 0)
    made.step()
    assert params[2] not in made.state
    cases.set_grads(params, 1)
    with cases.Calls() as calls:
        made.step()
    assert sorted(calls.seen) == [("32bit", 1), ("32bit", 2)]
    assert [made.state[p]["step"] for p in params] == [2, 2, 1]


@pytest.mark.parametrize("name", cases.NAMES)
def test_together_is_the_same_as_alone(name):
    shapes = [(64, 80), (7,), (3, 5000), (4095,), (4096,), (4097,)]
    a, b = cases.parameters(*shapes), cases.parameters(*shapes)
    together = cases.make(name, a)
    alone = [cases.make(name, [p]) for p in b]
    for step in range(3):
        cases.set_grads(a, step)
        cases.set_grads(b, step)
        together.step()
        for optimizer in alone:
            optimizer.step()
    assert cases.equal(a, b)


def test_update_step_alone_is_the_same():
    a, b = cases.parameters((64, 80), (7,)), cases.parameters((64, 80), (7,))
    first, second = cases.make("AdEMAMix8bit", a), cases.make("AdEMAMix8bit", b)
    for step in range(3):
        cases.set_grads(a, step)
        cases.set_grads(b, step)
        first.step()
        group = second.param_groups[0]
        for index, p in enumerate(b):
            if not second.state[p]:
                second.init_state(group, p, 0, index)
            second.update_step(group, p, 0, index)
    assert cases.equal(a, b)


def test_gradients_of_none_are_skipped():
    params = cases.parameters((5,), (6,))
    old = params[0].detach().clone()
    made = cases.make("AdamW", params)
    made.step()
    assert not made.state
    cases.set_grads(params[1:], 0)
    made.step()
    assert torch.equal(params[0], old)
    assert list(made.state) == [params[1]]


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(10, 4, sparse=True)
    made = cases.make("Adam", embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"dense gradients.*torch\.optim\.SparseAdam"):
        made.step()
    with pytest.raises(RuntimeError, match=r"torch\.sparse_coo"):
        made.update_step(made.param_groups[0], embedding.weight, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    p.grad = torch.ones(3, dtype=dtype)
    made = cases.make("Adam", [p])
    with pytest.raises(ValueError, match=f"float32, float16 and bfloat16 parameters, got {dtype}"):
        made.step()
    assert torch.equal(p, torch.ones(3, dtype=dtype))


def test_a_gradient_of_another_dtype_is_refused_before_anything_changes():
    good, bad = cases.parameters((5,), (6,))
    made = cases.make("Adam", [good, bad])
    good.grad = torch.ones(5)
    bad.grad = torch.ones(6)
    made.step()
    old = good.detach().clone()
    bad.grad = None
    bad.data = bad.data.double()
    bad.grad = torch.ones(6, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        made.step()
    assert torch.equal(good, old)
    assert made.state[good]["step"] == 1


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion", "AdEMAMix8bit"])
def test_layouts_are_kept_and_do_not_matter(name):
    contiguous = cases.parameters((70, 80))
    base = contiguous[0].detach().t().contiguous()
    strided = [nn.Parameter(base.t())]
    wide = torch.zeros(70, 160)
    wide[:, ::2] = contiguous[0].detach()
    sliced = [nn.Parameter(wide[:, ::2])]
    places = [p.data_ptr() for p in (strided[0], sliced[0])]
    for params in (contiguous, strided, sliced):
        made = cases.make(name, params)
        for step in range(3):
            cases.set_grads(params, step)
            if params is not contiguous:
                params[0].grad = params[0].grad.t().contiguous().t()
            made.step()
        assert made.state[params[0]]["state1"].is_contiguous()
    assert torch.equal(contiguous[0], strided[0])
    assert torch.equal(contiguous[0], sliced[0])
    assert torch.equal(base.t(), contiguous[0])  # what shares the memory sees the update
    assert torch.equal(wide[:, ::2], contiguous[0])
    assert not wide[:, 1::2].any()
    assert [p.data_ptr() for p in (strided[0], sliced[0])] == places
    assert strided[0].stride() == (1, 70)


def test_expanded_gradient():
    a, b = cases.parameters((64, 80)), cases.parameters((64, 80))
    first, second = cases.make("AdamW8bit", a), cases.make("AdamW8bit", b)
    a[0].sum().backward()
    b[0].grad = torch.ones(64, 80)
    first.step()
    second.step()
    assert cases.equal(a, b)


def test_tied_parameters():
    first, second = nn.Linear(80, 80, bias=False), nn.Linear(80, 80, bias=False)
    second.weight = first.weight
    made = cases.make("AdamW8bit", first.parameters())
    x = torch.ones(2, 80)
    second(first(x)).sum().backward()
    made.step()
    assert second.weight is first.weight
    assert torch.equal(second(x), first(x))


@pytest.mark.parametrize("pair", [("bfloat16", "float32"), ("float32", "float16")])
def test_gradients_of_another_dtype(pair):
    """As FSDP and gradient accumulation in float32 give them."""
    p_dtype, g_dtype = (getattr(torch, name) for name in pair)
    params = cases.parameters((64, 80), dtype=p_dtype)
    old = params[0].detach().clone()
    made = cases.make("AdamW8bit", params)
    params[0].grad_dtype = None
    params[0].grad = torch.ones(64, 80, dtype=g_dtype)
    made.step()
    assert params[0].dtype == p_dtype
    moved = (old - params[0].detach()).float()
    assert moved.mean().item() == pytest.approx(1e-2, rel=0.1)


def test_learning_rate_as_a_tensor():
    a, b = cases.parameters((64, 80)), cases.parameters((64, 80))
    cases.train(cases.make("Adam", a, lr=torch.tensor(0.25)), a, range(2))
    cases.train(cases.make("Adam", b, lr=0.25), b, range(2))
    assert cases.equal(a, b)


def test_schedulers():
    params = cases.parameters((5,))
    made = cases.make("SGD", params, lr=1.0, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5**step)
    total = 0.0
    old = params[0].detach().clone()
    speed = 0.0
    for step in range(4):
        params[0].grad = torch.ones(5)
        made.step()
        scheduler.step()
        speed = 0.5 * speed + 1.0
        total += 0.5**step * speed
    torch.testing.assert_close(params[0].detach(), old - total)


def test_betas_and_decay_may_change_between_steps():
    a, b = cases.parameters((5,)), cases.parameters((5,))
    first, second = cases.make("AdamW", a), cases.make("AdamW", b, betas=(0.5, 0.6))
    first.param_groups[0]["betas"] = (0.5, 0.6)
    first.param_groups[0]["weight_decay"] = second.param_groups[0]["weight_decay"] = 0.3
    cases.train(first, a, range(3))
    cases.train(second, b, range(3))
    assert cases.equal(a, b)


def test_one_cycle_turns_the_betas():
    params = cases.parameters((5,))
    made = cases.make("AdamW", params)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(made, max_lr=0.1, total_steps=10)
    before = made.param_groups[0]["betas"][0]
    for step in range(3):
        cases.train(made, params, range(step, step + 1))
        scheduler.step()
    assert made.param_groups[0]["betas"][0] != before


def test_add_param_group():
    a, b = cases.parameters((64, 80), (70, 80)), cases.parameters((64, 80), (70, 80))
    grown = cases.make("AdamW8bit", a[:1])
    cases.train(grown, a[:1], range(2))
    grown.add_param_group({"params": a[1:], "lr": 0.5})
    apart = [cases.make("AdamW8bit", b[:1]), cases.make("AdamW8bit", b[1:], lr=0.5)]
    cases.train(apart[0], b[:1], range(2))
    for step in range(2, 4):
        cases.set_grads(a, step)
        cases.set_grads(b, step)
        grown.step()
        for optimizer in apart:
            optimizer.step()
    assert cases.equal(a, b)
    with pytest.raises(ValueError, match="rounding must be"):
        grown.add_param_group({"params": cases.parameters((3,)), "rounding": "down"})
    assert len(grown.param_groups) == 2


def test_closure():
    layer = nn.Linear(4, 1)
    made = cases.make("Adam", layer.parameters())
    x, losses = torch.ones(8, 4), []

    def closure():
        made.zero_grad()
        assert torch.is_grad_enabled()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    for _ in range(30):
        losses.append(made.step(closure).item())
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_accumulate():
    a, b = cases.parameters((64, 80)), cases.parameters((64, 80))
    first, second = cases.make("AdamW8bit", a), cases.make("AdamW8bit", b)
    for factor in (1.0, 2.0):
        (factor * a[0]).sum().backward()
    (3.0 * b[0]).sum().backward()
    first.step()
    second.step()
    assert cases.equal(a, b)


def test_grad_scaler():
    a, b = cases.parameters((64, 80)), cases.parameters((64, 80))
    first, second = cases.make("AdamW8bit", a), cases.make("AdamW8bit", b)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for value in (1.0, float("inf"), 2.0):
        first.zero_grad()
        scaler.scale((value * a[0]).sum()).backward()
        scaler.step(first)
        scaler.update()
    for value in (1.0, 2.0):  # the infinite one was skipped
        b[0].grad = torch.full((64, 80), value)
        second.step()
    assert cases.equal(a, b)
    assert first.state[a[0]]["step"] == 2


def test_hooks_around_a_step():
    params = cases.parameters((5,))
    made, seen = cases.make("Adam", params), []
    made.register_step_pre_hook(lambda *_: seen.append("before"))
    made.register_step_post_hook(lambda *_: seen.append("after"))
    cases.train(made, params, range(1))
    assert seen == ["before", "after"]


def test_an_optimizer_per_parameter_inside_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 1))
    per_parameter = {p: cases.make("AdamW8bit", [p], lr=1e-3) for p in model.parameters()}

    def hook(p):
        per_parameter[p].step()
        per_parameter[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    x, losses = torch.randn(4, 64), []
    for _ in range(20):
        loss = model(x).square().mean()
        losses.append(loss.item())
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


def copies(made):
    yield copy.deepcopy(made)
    yield pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdEMAMix8bit", "LARS", "PagedLion"])
def test_copies_go_on_the_same(name):
    params = cases.parameters((300, 400), (5,))
    made = cases.make(name, params)
    cases.train(made, params, range(2))
    twins = list(copies(made))
    cases.train(made, params, range(2, 4))
    for twin in twins:
        others = twin.param_groups[0]["params"]
        assert not cases.equal(params, others)
        cases.train(twin, others, range(2, 4))
        assert cases.equal(params, others)
        assert twin.args.optim_bits == made.args.optim_bits
        for p, other in zip(params, others, strict=True):
            for key, value in made.state[p].items():
                if not key.startswith("qmap") and isinstance(value, torch.Tensor):
                    assert value.data_ptr() != twin.state[other][key].data_ptr(), key


def test_a_copy_before_the_first_step():
    params = cases.parameters((64, 80))
    for twin in copies(cases.make("PagedAdamW8bit", params)):
        others = twin.param_groups[0]["params"]
        cases.train(twin, others, range(1))
        assert twin.state[others[0]]["state1"].dtype == torch.uint8


def test_parameters_without_elements():
    params = cases.parameters((0,), (3, 0), (5,))
    for name in ("AdamW8bit", "PagedAdEMAMix", "LAMB", "SGD8bit"):
        made = cases.make(name, params, **({"min_8bit_size": 0} if "8bit" in name else {}))
        cases.train(made, params, range(2))
        assert [made.state[p]["step"] for p in params] == [2, 2, 2]


def test_named_parameters():
    layer = nn.Linear(4, 3)
    made = cases.make("AdamW", layer.named_parameters())
    assert made.param_groups[0]["param_names"] == ["weight", "bias"]
    cases.train(made, list(layer.parameters()), range(1))
    assert made.state[layer.weight]["step"] == 1


def test_versions_count():
    """Autograd notices that a parameter it needs was changed by the step."""
    p, x = nn.Parameter(torch.ones(5)), torch.ones(5, requires_grad=True)
    made = cases.make("Adam", [p])
    loss = (p * x).sum()
    p.grad = torch.ones(5)
    made.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_failed_step_changes_no_step_number():
    params = cases.parameters((5,), (6,))
    made = cases.make("Adam", params)
    cases.train(made, params, range(1))
    made.state[params[1]]["state2"] = torch.zeros(7)
    old = [p.detach().clone() for p in params]
    cases.set_grads(params, 1)
    with pytest.raises(ValueError, match="state2"):
        made.step()
    assert [made.state[p]["step"] for p in params] == [1, 1]
    assert all(torch.equal(p, o) for p, o in zip(params, old, strict=True))


def test_the_default_device_and_dtype_do_not_matter():
    params = cases.parameters((64, 80), (5,))
    made = cases.make("LAMB8bit", params)
    cases.set_grads(params, 0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            made.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for p in params:
        tensors = [v for v in made.state[p].values() if isinstance(v, torch.Tensor)]
        assert {t.device.type for t in tensors} == {DEVICE.type}
        assert {t.dtype for t in tensors} <= {torch.float32, torch.uint8}


@pytest.mark.parametrize(
    "name", ["AdEMAMix", "AdEMAMix8bit", "AdEMAMix32bit", "PagedAdEMAMix32bit"]
)
def test_warm_ups_of_ademamix(name):
    """The rule's alpha and beta3 at each step are those of arXiv 2409.03137."""
    a, b = cases.parameters((64, 80)), cases.parameters((64, 80))
    betas, alpha, steps = (0.9, 0.99, 0.999), 5.0, 8
    warm = cases.make(name, a, betas=betas, alpha=alpha, t_alpha=5, t_beta3=6)
    plain = cases.make(name, b, betas=betas, alpha=alpha, t_alpha=None, t_beta3=None)

    def half_life(beta):
        return torch.log(torch.tensor(0.5, dtype=torch.float64)) / torch.log(
            torch.tensor(beta, dtype=torch.float64)
        )

    for step in range(steps):
        t = step + 1
        life = half_life(betas[0]) + (half_life(betas[2]) - half_life(betas[0])) * min(t / 6, 1)
        group = plain.param_groups[0]
        group["betas"] = (*betas[:2], float(0.5 ** (1 / life)))
        group["alpha"] = alpha * min(t / 5, 1)
        for params, made in ((a, warm), (b, plain)):
            cases.set_grads(params, step)
            made.step()
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)


def test_tied_weights_are_updated_once_for_each_time_they_are_given() -> None:
    def run(make: Callable[[list[Any]], torch.optim.Optimizer]) -> Tensor:
        torch.manual_seed(0)
        first, second = torch.nn.Parameter(torch.randn(64, 100)), torch.nn.Parameter(torch.empty(0))
        second.data = first.data
        optimizer = make([first, second])
        for _ in range(3):
            first.grad, second.grad = torch.randn(64, 100), torch.randn(64, 100)
            optimizer.step()
        return first.detach()

    expected = run(lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False))
    got = run(lambda params: optim.AdamW32bit(params, lr=0.1))
    torch.testing.assert_close(got, expected)
    eight = run(lambda params: optim.AdamW8bit(params, lr=0.1))
    torch.testing.assert_close(eight, expected, atol=0.05, rtol=0.0)

    p = torch.nn.Parameter(torch.randn(5000))
    start = p.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = optim.Lion8bit([p, p], lr=0.5)
    p.grad = torch.ones(5000)
    twice.step()
    torch.testing.assert_close(p.detach(), start - 1.0)


def test_a_compiled_first_step_makes_states() -> None:
    params = [torch.nn.Parameter(torch.randn(n)) for n in (30_000, 100)]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    torch._dynamo.reset()
    optimizer, reference = optim.AdamW8bit(params), optim.AdamW8bit(plain)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        step()
        reference.step()
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p]["step"] == 2
