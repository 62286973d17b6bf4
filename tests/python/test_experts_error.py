"""Grouped products of routed tokens and experts, against float64 over random routings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import int8_reference as ref
import numpy as np
import pytest
import reference
import torch
from halfbyte import functional as F
from torch import Tensor

ops = torch.ops.halfbyte

# tokens, experts per token, experts, in_features, out_features
ALIGNED = [(1, 2, 4, 64, 32), (9, 2, 8, 128, 96), (40, 1, 3, 64, 70), (70, 3, 5, 192, 64)]
RAGGED = [(5, 2, 3, 33, 7), (17, 4, 8, 70, 1), (3, 1, 2, 1, 5), (33, 2, 6, 65, 35)]
ROUTINGS = ["random", "one expert", "some empty", "none", "some without"]
BLOCKSIZES = [32, 64, 256, 4096]

EXTRA = 8
"""Roundings of a term beyond its sum: decoding, both levels of scales, the product, the bias."""


@dataclass
class Experts:
    """A 4-bit weight of several experts, and the float64 values that it stands for."""

    shape: list[int]
    packed: Tensor
    absmax: Tensor
    state: tuple
    blocksize: int
    quant_type: str
    weight: np.ndarray  # [experts, out, in]
    size: np.ndarray  # the same with the magnitudes that are rounded on the way

    def forward(self, a: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
        """The op."""
        weight = (self.packed, self.absmax, self.blocksize, self.quant_type, self.shape)
        return ops.experts_matmul_4bit(a, *weight, ids, bias, *self.state)

    def grad_input(self, grad: Tensor, ids: Tensor, shared: bool) -> Tensor:
        """Its gradient."""
        weight = (self.packed, self.absmax, self.blocksize, self.quant_type, self.shape)
        return ops.experts_matmul_4bit_grad_input(grad, *weight, ids, shared, *self.state)


@lru_cache(maxsize=64)
def four_bit(
    seed: int,
    shape: tuple[int, int, int],
    quant_type: str,
    blocksize: int,
    nested: bool,
) -> Experts:
    """Random experts, each padded with zeros to whole blocks and quantized on its own."""
    experts, outer, inner = shape
    rng = ref.generator(29, seed)
    w = ref.matrix(rng, "heavy", (experts, outer * inner)) * np.float32(0.1)
    length = -(-w.shape[1] // blocksize) * blocksize
    padded = torch.zeros(experts, length)
    padded[:, : w.shape[1]] = torch.from_numpy(w)
    packed, absmax = reference.encode_4bit(padded, blocksize, quant_type)
    state: tuple = (None, None, None, None, 256)
    scales, size = absmax.double().numpy(), absmax.double().numpy()
    if nested:
        offset = absmax.mean()
        codes, inner_state = F.quantize_blockwise(absmax - offset, blocksize=256)
        state = (None, inner_state.absmax, inner_state.code, offset, 256)
        spread = inner_state.absmax.double().repeat_interleave(256)[: codes.numel()]
        parts = (inner_state.code.double()[codes.long()] * spread).numpy()
        scales, size = parts + float(offset), np.abs(parts) + abs(float(offset))
        absmax = codes
    nibbles = torch.stack((packed >> 4, packed & 15), 1).reshape(-1).long()
    table = reference.CODES[quant_type].double()[nibbles].numpy().reshape(-1, blocksize)
    cut = [
        (table * s[:, None]).reshape(experts, length)[:, : w.shape[1]].reshape(shape)
        for s in (scales, size)
    ]
    # What op and definition share with numerics.md, first of all: each expert lies where it says.
    assert packed.numel() == experts * length // 2
    return Experts(
        [experts, outer, inner],
        packed.reshape(-1, 1),
        absmax,
        state,
        blocksize,
        quant_type,
        cut[0],
        np.abs(cut[1]),
    )


def route(rng: np.random.Generator, kind: str, tokens: int, k: int, experts: int) -> Tensor:
    """Expert ids int64 ``[tokens, k]``; a token may name an expert twice."""
    ids = rng.integers(0, experts, (tokens, k))
    if kind == "one expert":
        ids[:] = experts - 1
    elif kind == "some empty":
        ids = rng.integers(0, max(1, experts // 2), (tokens, k)) * 2 % experts
    elif kind == "none":
        ids[:] = experts
    elif kind == "some without":
        ids[rng.random((tokens, k)) < 0.4] = experts
    return torch.from_numpy(ids)


def spread(a: np.ndarray, k: int) -> np.ndarray:
    """One row for each of a token's experts: ``[tokens, k, in]``."""
    return np.repeat(a[:, None, :], k, axis=1) if a.ndim == 2 else a


def routed(a: np.ndarray, ids: Tensor, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """``result[t, j] = a[t, j] · weight[ids[t, j]]ᵀ + bias[ids[t, j]]`` in float64."""
    out = np.zeros((*ids.shape, weight.shape[1]))
    for e in range(len(weight)):
        mine = ids.numpy() == e
        out[mine] = a[mine] @ weight[e].T + (0 if bias is None else bias[e])
    return out


def forward_bound(
    a: Tensor, ids: Tensor, experts: Experts, bias: Tensor | None, dtype: torch.dtype
) -> ref.Bounded:
    """The float64 result and the bound of float32 sums in any order."""
    rows = spread(ref.values(a), ids.shape[1])
    offset = None if bias is None else ref.values(bias)
    exact = routed(rows, ids, experts.weight, offset)
    size = routed(np.abs(rows), ids, experts.size, None if offset is None else np.abs(offset))
    return ref.after_rounding(exact, ref.gamma(rows.shape[2] + EXTRA) * size, dtype)


def grad_bound(
    grad: Tensor, ids: Tensor, weight: np.ndarray, size: np.ndarray, shared: bool
) -> ref.Bounded:
    """The same of the gradient, summed over a token's experts when they share one row."""
    g = ref.values(grad)
    turned, turned_size = weight.transpose(0, 2, 1), size.transpose(0, 2, 1)
    exact = routed(g, ids, turned, None)
    sums = routed(np.abs(g), ids, turned_size, None)
    if shared:
        exact, sums = exact.sum(1), sums.sum(1)
    roundings = g.shape[2] + EXTRA + (ids.shape[1] if shared else 0)
    return ref.after_rounding(exact, ref.gamma(roundings) * sums, grad.dtype)


def activations(
    rng: np.random.Generator, tokens: int, k: int, width: int, dtype: torch.dtype, shared: bool
) -> Tensor:
    """``[tokens, width]`` for one row a token, else ``[tokens, k, width]``."""
    rows = ref.matrix(rng, "planted", (tokens if shared else tokens * k, width))
    flat = ref.rounded(rows, dtype)
    return flat if shared else flat.reshape(tokens, k, width)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ref.FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_forward_is_within_the_bound(quant_type, dtype, routing):
    for number, (tokens, k, experts, inner, outer) in enumerate(ALIGNED + RAGGED):
        rng = ref.generator(30, number)
        for nested in (False, True):
            blocksize = BLOCKSIZES[(number + nested) % len(BLOCKSIZES)]
            w = four_bit(number, (experts, outer, inner), quant_type, blocksize, nested)
            ids = route(rng, routing, tokens, k, experts)
            noise = ref.matrix(rng, "gaussian", (experts, outer))
            for shared, bias in [(True, None), (False, ref.rounded(noise, dtype))]:
                a = activations(rng, tokens, k, inner, dtype, shared)
                y = w.forward(a, ids, bias)
                assert y.shape == (tokens, k, outer)
                assert y.dtype == dtype
                bound = forward_bound(a, ids, w, bias, dtype)
                what = f"{tokens, k, experts, inner, outer} block {blocksize}, nested {nested}"
                assert bound.worst(y) <= 1, what
                assert not y[ids == experts].any(), f"{what}: a row without an expert"


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ref.FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_gradient_is_within_the_bound(quant_type, dtype, routing):
    for number, (tokens, k, experts, inner, outer) in enumerate(ALIGNED + RAGGED):
        rng = ref.generator(31, number)
        for shared in (False, True):
            blocksize = BLOCKSIZES[(number + shared) % len(BLOCKSIZES)]
            w = four_bit(number, (experts, outer, inner), quant_type, blocksize, bool(number % 2))
            ids = route(rng, routing, tokens, k, experts)
            grad = activations(rng, tokens, k, outer, dtype, False)
            got = w.grad_input(grad, ids, shared)
            assert got.shape == ((tokens, inner) if shared else (tokens, k, inner))
            bound = grad_bound(grad, ids, w.weight, w.size, shared)
            what = f"{tokens, k, experts, inner, outer}, shared {shared}"
            assert bound.worst(got) <= 1, what


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_autograd_of_4bit(dtype, shared):
    rng = ref.generator(32)
    tokens, k, experts, inner, outer = 21, 2, 5, 96, 40
    w = four_bit(0, (experts, outer, inner), "nf4", 64, True)
    ids = route(rng, "some without", tokens, k, experts)
    a = activations(rng, tokens, k, inner, dtype, shared).requires_grad_()
    bias = ref.rounded(ref.matrix(rng, "gaussian", (experts, outer)), dtype).requires_grad_()
    grad = activations(rng, tokens, k, outer, dtype, False)
    w.forward(a, ids, bias).backward(grad)
    assert grad_bound(grad, ids, w.weight, w.size, shared).worst(a.grad) <= 1
    _check_bias_grad(bias.grad, grad, ids, experts)


def _check_bias_grad(got: Tensor, grad: Tensor, ids: Tensor, experts: int) -> None:
    """Each expert's bias gets the sum of its rows' gradients."""
    g = ref.values(grad).reshape(-1, grad.shape[2])
    member = np.stack([ids.numpy().reshape(-1) == e for e in range(experts)]).astype(float)
    limit = ref.gamma(len(g)) * (member @ np.abs(g))
    bound = ref.after_rounding(member @ g, limit, got.dtype)
    assert got.shape == (experts, grad.shape[2])
    assert bound.worst(got) <= 1


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_wrong_expert_or_row_fails(quant_type):
    """Testing the tests: results of slightly wrong routings are beyond the bound."""
    rng = ref.generator(33)
    tokens, k, experts, inner, outer = 30, 2, 4, 64, 48
    w = four_bit(0, (experts, outer, inner), quant_type, 64, False)
    ids = route(rng, "some without", tokens, k, experts)
    a = activations(rng, tokens, k, inner, torch.float32, False)
    bias = ref.rounded(ref.matrix(rng, "gaussian", (experts, outer)), torch.float32)
    rows, offset = ref.values(a), ref.values(bias)
    bound = forward_bound(a, ids, w, bias, torch.float32)
    assert bound.worst(routed(rows, ids, w.weight, offset)) <= 1
    one_off = ids.clone()
    one_off[-1, -1] = (one_off[-1, -1] + 1) % experts
    wrong = {
        "one expert": routed(rows, one_off, w.weight, offset),
        "slots swapped": routed(rows, ids.flip(1), w.weight, offset),
        "rows shifted": routed(np.roll(rows, 1, axis=0), ids, w.weight, offset),
        "no bias": routed(rows, ids, w.weight, None),
        "scale": routed(rows, ids, w.weight * 1.0001, offset),
        "blocks of the flat tensor": routed(
            rows, ids, np.roll(w.weight.reshape(-1), 32).reshape(w.weight.shape), offset
        ),
    }
    for name, y in wrong.items():
        assert bound.worst(y) > 1, name


@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_the_order_of_tokens_changes_no_bit(dtype):
    rng = ref.generator(34)
    tokens, k, experts, inner, outer = 50, 2, 4, 128, 64
    w = four_bit(0, (experts, outer, inner), "nf4", 64, False)
    ids = route(rng, "random", tokens, k, experts)
    a = activations(rng, tokens, k, inner, dtype, True)
    order = torch.from_numpy(rng.permutation(tokens))
    y = w.forward(a, ids, None)
    assert torch.equal(w.forward(a[order], ids[order], None), y[order])
    assert torch.equal(w.forward(a, ids.flip(1), None), y.flip(1))
    grad = activations(rng, tokens, k, outer, dtype, False)
    back = w.grad_input(grad, ids, True)
    assert torch.equal(w.grad_input(grad[order], ids[order], True), back[order])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    rng = ref.generator(35)
    w = four_bit(0, (6, 96, 128), "nf4", 64, True)
    ids = route(rng, "random", 70, 3, 6)
    a = activations(rng, 70, 3, 128, torch.bfloat16, True)
    grad = activations(rng, 70, 3, 96, torch.bfloat16, False)
    before = torch.get_num_threads()
    expected = w.forward(a, ids, None), w.grad_input(grad, ids, True)
    try:
        torch.set_num_threads(threads)
        got = w.forward(a, ids, None), w.grad_input(grad, ids, True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("bad", [-1, 4])
def test_an_id_out_of_range_is_refused(bad):
    w = four_bit(0, (3, 8, 32), "nf4", 32, False)
    ids = torch.tensor([[0, 1], [bad, 2]])
    with pytest.raises((ValueError, RuntimeError, IndexError), match=str(bad)):
        w.forward(torch.zeros(2, 32), ids, None)


# --- 8 bits ---


@dataclass
class Experts8:
    """An int8 weight of several experts and its float64 values."""

    codes: Tensor
    stats: Tensor
    floats: np.ndarray  # what was quantized
    weight: np.ndarray  # what the codes stand for


def eight_bit(rng: np.random.Generator, shape: tuple[int, int, int], kind: str) -> Experts8:
    """Random experts, quantized row by row."""
    experts, outer, inner = shape
    w = ref.matrix(rng, kind, (experts * outer, inner)) * np.float32(0.1)
    rows = ref.quantize(w)
    decoded = rows.codes * rows.stats.astype(np.float64)[:, None] / 127
    return Experts8(
        torch.from_numpy(rows.codes).reshape(shape),
        torch.from_numpy(rows.stats).reshape(experts, outer),
        w.astype(np.float64).reshape(shape),
        decoded.reshape(shape),
    )


def rows_of_experts(
    a: Tensor, ids: Tensor, experts: int
) -> list[tuple[int, np.ndarray, np.ndarray, Tensor]]:
    """Each expert with its tokens, slots and rows of activations."""
    k = ids.shape[1]
    each = a[:, None, :].expand(-1, k, -1) if a.dim() == 2 else a
    found = []
    for e in range(experts):
        t, j = np.nonzero(ids.numpy() == e)
        found.append((e, t, j, each[t, j]))
    return found


THRESHOLDS = [0.0, 2.0, 6.0, float("inf")]


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_8bit_forward_is_within_the_bound(dtype, threshold):
    for number, (tokens, k, experts, inner, outer) in enumerate(ALIGNED + RAGGED):
        rng = ref.generator(40, number)
        w = eight_bit(rng, (experts, outer, inner), ["gaussian", "heavy"][number % 2])
        ids = route(rng, ROUTINGS[number % len(ROUTINGS)], tokens, k, experts)
        noise = ref.matrix(rng, "gaussian", (experts, outer))
        for shared, bias in [(True, None), (False, ref.rounded(noise, dtype))]:
            a = activations(rng, tokens, k, inner, dtype, shared)
            y = ops.experts_matmul_8bit(a, w.codes, w.stats, ids, bias, threshold)
            assert y.shape == (tokens, k, outer)
            assert y.dtype == dtype
            for e, t, j, rows in rows_of_experts(a, ids, experts):
                offset = None if bias is None else ref.values(bias[e])
                part = ref.linear_bound(ref.values(rows), w.floats[e], offset, threshold, dtype)
                assert part.worst(y[t, j]) <= 1, f"{(tokens, k, experts, inner, outer)} expert {e}"
            assert not y[ids == experts].any()


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_8bit_equals_the_product_of_each_expert(dtype, threshold):
    """Outlier columns are those of the rows that one expert gets."""
    rng = ref.generator(41)
    tokens, k, experts, inner, outer = 60, 2, 5, 130, 48
    w = eight_bit(rng, (experts, outer, inner), "heavy")
    ids = route(rng, "some without", tokens, k, experts)
    bias = ref.rounded(ref.matrix(rng, "gaussian", (experts, outer)), dtype)
    a = activations(rng, tokens, k, inner, dtype, True)
    y = ops.experts_matmul_8bit(a, w.codes, w.stats, ids, bias, threshold)
    for e, t, j, rows in rows_of_experts(a, ids, experts):
        alone = ops.int8_linear(rows, w.codes[e], w.stats[e], bias[e], threshold)
        assert torch.equal(y[t, j], alone), f"expert {e}"


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_8bit_gradient_is_within_the_bound(dtype, routing):
    for number, (tokens, k, experts, inner, outer) in enumerate(ALIGNED + RAGGED):
        rng = ref.generator(42, number)
        w = eight_bit(rng, (experts, outer, inner), "heavy")
        ids = route(rng, routing, tokens, k, experts)
        grad = activations(rng, tokens, k, outer, dtype, False)
        for shared in (False, True):
            got = ops.experts_matmul_8bit_grad_input(grad, w.codes, w.stats, ids, shared)
            bound = grad_bound(grad, ids, w.weight, np.abs(w.weight), shared)
            assert bound.worst(got) <= 1, f"{(tokens, k, experts, inner, outer)}, shared {shared}"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_autograd_of_8bit(dtype, shared):
    rng = ref.generator(43)
    tokens, k, experts, inner, outer = 21, 2, 5, 96, 40
    w = eight_bit(rng, (experts, outer, inner), "gaussian")
    ids = route(rng, "some without", tokens, k, experts)
    a = activations(rng, tokens, k, inner, dtype, shared).requires_grad_()
    bias = ref.rounded(ref.matrix(rng, "gaussian", (experts, outer)), dtype).requires_grad_()
    grad = activations(rng, tokens, k, outer, dtype, False)
    ops.experts_matmul_8bit(a, w.codes, w.stats, ids, bias, 6.0).backward(grad)
    assert grad_bound(grad, ids, w.weight, np.abs(w.weight), shared).worst(a.grad) <= 1
    _check_bias_grad(bias.grad, grad, ids, experts)
