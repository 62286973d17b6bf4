"""Layers of 8-bit experts on the CUDA device: one grouped product, of which nothing waits."""

from __future__ import annotations

import emulated
import pytest
import torch
from comparison import assert_alike
from halfbyte.nn import Experts8bit

EXPERTS, TOKENS, SLOTS, IN, OUT = 6, 40, 2, 96, 34
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(threshold: float = 6.0) -> Experts8bit:
    weight = torch.randn(EXPERTS, OUT, IN, generator=seeded()) / 10
    bias = torch.randn(EXPERTS, OUT, generator=seeded(1))
    return Experts8bit.from_float(weight, bias, threshold=threshold)


def routes(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Expert 2 gets no row; some slots have no expert."""
    ids = torch.randint(0, EXPERTS + 1, (tokens, SLOTS), generator=seeded(seed))
    return torch.where(ids == 2, EXPERTS, ids)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every fifth token has an outlier, in a column of its own."""
    x = torch.randn(*shape, generator=seeded(2))
    for token in range(0, shape[0], 5):
        x[token, ..., token % IN] = 40.0
    return x.to(dtype)


def both_ways(
    module: Experts8bit, x: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result, and the gradients of the input and the bias."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x, ids)
    weights = torch.linspace(-1, 1, y.numel(), device="cpu").view(y.shape).to(y)
    y.backward(weights)
    return y.detach(), [x.grad, module.bias.grad]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("tokens", "threshold"), [(1, 6.0), (5, 0.0), (TOKENS, 6.0)])
def test_forward_and_backward(dtype, each, tokens, threshold):
    here, there = layer(threshold), layer(threshold).cuda()
    shape = (tokens, SLOTS, IN) if each else (tokens, IN)
    x, ids = activations(*shape, dtype=dtype), routes(tokens)
    got, grads = both_ways(there, x.cuda(), ids.cuda())
    want, own_grads = both_ways(here, x, ids)
    assert_alike([got], [want], exact=True)
    assert_alike(grads, own_grads, exact=False)
    assert got[ids.cuda() == EXPERTS].eq(0).all()


@pytest.mark.parametrize("tokens", [3, 300])
def test_ids_out_of_range_make_their_rows_nan(tokens):
    module = layer().cuda()
    x = torch.randn(tokens, IN, generator=seeded(2)).cuda().requires_grad_()
    good = routes(tokens).cuda()
    bad = good.clone()
    bad[1, 0], bad[2, 1] = -1, EXPERTS + 1
    want, got = module(x, good), module(x, bad)
    assert got[1, 0].isnan().all()
    assert got[2, 1].isnan().all()
    rest = torch.ones_like(good, dtype=torch.bool)
    rest[1, 0] = rest[2, 1] = False
    assert torch.equal(got[rest], want[rest])
    got[rest].sum().backward()
    assert x.grad[1:3].isnan().all()
    assert not x.grad[3:].isnan().any()
    assert not x.grad[0].isnan().any()


@pytest.mark.emulator
@pytest.mark.parametrize(("threshold", "own"), [(6.0, 4), (0.0, 2)])
@pytest.mark.parametrize("tokens", [2, TOKENS, 400])
def test_nothing_waits_for_the_routes(tokens, threshold, own, calls):
    """Outputs and scratch are PyTorch's tensors; the launches are those of one grouped product."""
    module = layer(threshold).cuda()
    x, g = torch.randn(tokens, IN).cuda(), torch.randn(tokens, SLOTS, OUT).cuda()
    ids = routes(tokens).cuda()
    codes, scales = module.weight.data, module.SCB
    both = (
        lambda: torch.ops.halfbyte.experts_matmul_8bit(x, codes, scales, ids, None, threshold),
        lambda: torch.ops.halfbyte.experts_matmul_8bit_grad_input(g, codes, scales, ids, True),
    )
    for op in both:
        op()  # loads the modules
    sort = 1 if tokens * SLOTS <= 512 else 3
    for op, launches in zip(both, (sort + own, sort + 2), strict=True):
        before = emulated.waits()
        calls()
        op()
        assert emulated.waits() == before
        seen = calls()
        assert all(line.startswith("cuLaunchKernel") for line in seen), seen
        assert len(seen) == launches, seen
