"""Layers of 4-bit experts on the CUDA device: one grouped product, of which nothing waits."""

from __future__ import annotations

import emulated
import pytest
import torch
from comparison import assert_alike, moved
from halfbyte import functional as F
from halfbyte.nn import Experts4bit

EXPERTS, TOKENS, SLOTS, IN, OUT = 6, 40, 2, 96, 34
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(features: int = IN, *, bias: bool = True, **arguments) -> Experts4bit:
    weight = torch.randn(EXPERTS, OUT, features, generator=seeded()) / 10
    own = torch.randn(EXPERTS, OUT, generator=seeded(1)) if bias else None
    return Experts4bit.from_float(weight, own, **arguments)


def routes(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Expert 2 gets no row; some slots have no expert."""
    ids = torch.randint(0, EXPERTS + 1, (tokens, SLOTS), generator=seeded(seed))
    return torch.where(ids == 2, EXPERTS, ids)


def both_ways(module: Experts4bit, x: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor | None]:
    """The result, and the gradients of the input and the bias."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x, ids)
    weights = torch.linspace(-1, 1, y.numel(), device="cpu").view(y.shape).to(y)
    y.backward(weights)
    return [y.detach(), x.grad, None if module.bias is None else module.bias.grad]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
def test_forward_and_backward(dtype, each, tokens):
    nested = tokens != 5
    here = layer(compress_statistics=nested)
    there = layer(compress_statistics=nested).cuda()
    shape = (tokens, SLOTS, IN) if each else (tokens, IN)
    x, ids = torch.randn(shape, generator=seeded(2)).to(dtype), routes(tokens)
    got = both_ways(there, x.cuda(), ids.cuda())
    assert_alike(got, both_ways(here, x, ids), exact=False)
    assert got[0][ids.cuda() == EXPERTS].eq(0).all()


@pytest.mark.parametrize("features", [33, 50])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_experts_that_are_filled_up_to_blocks(features, quant_type):
    arguments = {"bias": False, "quant_type": quant_type, "blocksize": 128}
    here, there = layer(features, **arguments), layer(features, **arguments).cuda()
    x, ids = torch.randn(TOKENS, features, generator=seeded(2)), routes()
    assert_alike(both_ways(there, x.cuda(), ids.cuda()), both_ways(here, x, ids), exact=False)


def test_a_gradient_of_shared_rows_is_rounded_once():
    """Products of a token's slots that cancel leave what float32 holds of them."""
    weight = torch.randn(2, 32, 64, generator=seeded())
    weight[1] = -weight[0]
    module = Experts4bit.from_float(weight, compress_statistics=False).cuda()
    g = torch.randn(20, 2, 32, generator=seeded(1)).bfloat16()
    g[:, 1] = g[:, 0]
    ids = torch.tensor([[0, 1]]).expand(20, 2)
    x = torch.zeros(20, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    module(x, ids.cuda()).backward(g.cuda())
    apart = module.dequantize().bfloat16().float()  # as tensor cores take it
    exact = torch.einsum("tso,soi->ti", g.cuda().float(), apart)
    size = torch.einsum("tso,soi->ti", g.cuda().float().abs(), apart.abs())
    # Rounded one by one, the two would leave up to 2^-9 of the largest of them.
    assert (x.grad.float() - exact).abs().le(2**-8 * exact.abs() + 2**-16 * size + 1e-6).all()


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
@pytest.mark.parametrize("tokens", [2, TOKENS, 400])
def test_nothing_waits_for_the_routes(tokens, calls):
    """Outputs and scratch are PyTorch's tensors; the launches are those of one grouped product."""
    packed, state = F.quantize_4bit(
        torch.randn(EXPERTS, OUT, IN, generator=seeded()).cuda(), compress_statistics=True
    )
    second = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    weight = (packed, state.absmax, 64, "fp4", [EXPERTS, OUT, IN])
    forward = torch.ops.halfbyte.experts_matmul_4bit
    backward = torch.ops.halfbyte.experts_matmul_4bit_grad_input
    x, g = torch.randn(tokens, IN).cuda(), torch.randn(tokens, SLOTS, OUT).cuda()
    ids = routes(tokens).cuda()
    both = (
        lambda: forward(x, *weight, ids, None, None, *second),
        lambda: backward(g, *weight, ids, True, None, *second),
    )
    for op in both:
        op()  # loads the modules
    sort = 1 if tokens * SLOTS <= 512 else 3
    for op, launches in zip(both, (sort + 1, sort + 2), strict=True):
        before = emulated.waits()
        calls()
        op()
        assert emulated.waits() == before
        seen = calls()
        assert all(line.startswith("cuLaunchKernel") for line in seen), seen
        assert len(seen) == launches, seen


@pytest.mark.parametrize("made", ["Experts4bit, {}", "Experts8bit, {'threshold': 3.0}"])
@pytest.mark.parametrize("tokens", [8, 300])
def test_a_graph_follows_the_routes(tokens, made, cuda_worker):
    """Forward and backward, captured once, replayed with other routes in the same memory."""
    code = f"""
from halfbyte.nn import Experts4bit, Experts8bit
def seeded(seed):
    return torch.Generator().manual_seed(seed)
kind, options = {made}
module = kind.from_float(torch.randn(6, 34, 96, generator=seeded(0)) / 10, **options).cuda()
g = torch.randn({tokens}, 2, 34, generator=seeded(1)).cuda()
def fresh(seed):
    ids = torch.randint(0, 7, ({tokens}, 2), generator=seeded(seed))
    return torch.randn({tokens}, 96, generator=seeded(seed)), ids
def run(x, ids):
    y = module(x, ids)
    y.backward(g)
    return y
start, ids = (t.cuda() for t in fresh(2))
x = start.requires_grad_()
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    run(x, ids)
torch.cuda.current_stream().wait_stream(side)
x.grad = None
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = run(x, ids)
for seed in (3, 4):
    other, other_ids = fresh(seed)
    with torch.no_grad():
        x.copy_(other)
    ids.copy_(other_ids)
    x.grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    twin = other.cuda().requires_grad_()
    want = run(twin, other_ids.cuda())
    assert torch.equal(y, want)
    assert torch.equal(x.grad, twin.grad)
print("equal")
"""
    assert cuda_worker(code) == "equal\n"


def test_the_bits_of_a_row_do_not_depend_on_other_rows():
    module = layer().cuda()
    x, ids = torch.randn(TOKENS, IN, generator=seeded(2)).cuda(), routes().cuda()
    want = module(x, ids)
    alone = torch.full_like(ids, EXPERTS)
    alone[7] = ids[7]
    assert torch.equal(module(x, alone)[7], want[7])


def test_another_layout_of_the_routes():
    module = layer().cuda()
    x, ids = moved(torch.randn(TOKENS, IN, generator=seeded(2))), routes().cuda()
    assert torch.equal(module(x, ids.t().contiguous().t()), module(x, ids))
