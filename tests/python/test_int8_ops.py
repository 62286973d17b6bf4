"""The ops of LLM.int8(): schemas, values by definition, tracing, gradients, errors."""

from __future__ import annotations

import inspect
import itertools

import pytest
import reference as ref
import torch
from halfbyte import _ops, _ops_int8
from halfbyte import functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

ops = torch.ops.halfbyte
find = _ops.find
NAMES = list(_ops_int8.SCHEMAS)
DYNAMIC = ["int8_vectorwise_quant", "int8_double_quant", "int8_linear.outliers"]
"""Ops of which a result's size depends on the data."""

# As upstream bitsandbytes 0.50.2 has them under torch.ops.bitsandbytes.
UPSTREAM = """
int8_double_quant(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)
int8_linear_matmul(Tensor A, Tensor B) -> Tensor
int8_linear_matmul.out(Tensor A, Tensor B, Tensor($0! -> ) out) -> ()
int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None) -> (Tensor, Tensor?)
int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor
int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor
int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor
int8_vectorwise_quant(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)
""".strip().splitlines()  # noqa: E501

INV_127 = torch.tensor(1 / 127, dtype=torch.float32)
INV_127_SQUARED = torch.tensor(1 / 127**2, dtype=torch.float32)


@pytest.mark.parametrize("line", UPSTREAM, ids=lambda line: line.partition("(")[0])
def test_schemas_are_upstreams(line):
    got = str(find(line.partition("(")[0])._schema).removeprefix("halfbyte::")
    assert got.replace("Tensor(a!)", "Tensor($0! -> )") == line


def activations(shape, dtype=torch.float32, seed=0, outliers=()):
    a = ref.samples(shape, dtype, seed)
    for column, value in outliers:
        a[..., -1, column] = value
    return a


W = ref.samples((64, 96))
CB, SCB, _ = ops.int8_vectorwise_quant(W)
A = activations((5, 96), seed=1, outliers=((7, 30.0), (90, -8.0)))
CA, SCA, COLS = ops.int8_vectorwise_quant(A, 6.0)
ACC = ops.int8_linear_matmul(CA, CB)
BIAS = ref.samples((64,), seed=2)
DENSE = ops.int8_vectorwise_dequant(CB, SCB)


def cases(grad: bool = False) -> dict[str, tuple]:
    """Arguments for every op."""
    a, bias = A.clone().requires_grad_(grad), BIAS.clone().requires_grad_(grad)
    g = torch.ones(5, 64).requires_grad_(grad)
    return {
        "int8_vectorwise_quant": (A, 6.0),
        "int8_vectorwise_dequant": (CB, SCB),
        "int8_vectorwise_dequant.dtype": (CB, SCB, torch.bfloat16),
        "int8_double_quant": (A, 6.0),
        "int8_linear_matmul": (CA, CB),
        "int8_linear_matmul.out": (CA, CB, torch.empty(5, 64, dtype=torch.int32)),
        "int8_mm_dequant": (ACC, SCA, SCB, torch.bfloat16, bias),
        "int8_scaled_mm": (CA, CB, SCA, SCB, bias, torch.float32),
        "int8_mixed_scaled_mm": (a, CA, CB, SCA, SCB, COLS, bias),
        "int8_linear": (a, CB, SCB, bias, 6.0),
        "int8_linear.outliers": (a, CB, SCB, bias, 6.0),
        "int8_linear.listed": (a, CB, SCB, bias, 6.0),
        "int8_linear_grad_input": (g, CB, SCB),
    }


def test_every_op_has_a_kernel_and_a_fake():
    assert set(cases()) == set(_ops_int8.SCHEMAS) == set(_ops_int8.FAKES)
    for name in NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"halfbyte::{name}", "CPU"), name


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, grad):
    torch.library.opcheck(find(name), cases(grad)[name])


@pytest.mark.parametrize("name", ["int8_vectorwise_quant", "int8_double_quant"])
def test_opcheck_without_a_threshold(name):
    torch.library.opcheck(find(name), (A,))


@pytest.mark.parametrize("name", NAMES)
def test_fakes_say_what_kernels_do(name):
    arguments = cases()[name]
    real = find(name)(*arguments)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    with mode:
        fake = find(name)(*fakes)
    reals = real if isinstance(real, tuple) else (real,)
    fakes = fake if isinstance(fake, tuple) else (fake,)
    assert len(reals) == len(fakes)
    for i, (r, f) in enumerate(zip(reals, fakes, strict=True)):
        if r is None or f is None:
            assert r is f
            continue
        assert (r.dtype, r.dim()) == (f.dtype, f.dim())
        if name in DYNAMIC and i == len(reals) - 1:
            assert isinstance(f.shape[0], torch.SymInt)
        elif isinstance(f.shape[-1], int):
            assert (r.shape, r.stride()) == (f.shape, f.stride())


# ---- codes and statistics ------------------------------------------------------------------------


def quantize(a, threshold=0.0):
    """The definition of numerics.md, by rows of ``[rows, columns]``."""
    a = a.float()
    outlier = (a.abs() >= threshold) & (threshold > 0)
    inside = torch.where(outlier, 0.0, a.abs())
    r = inside.amax(1) if a.shape[1] else torch.zeros(a.shape[0])
    scale = (torch.tensor(127.0) / r).clamp(max=torch.finfo(torch.float32).max)
    q = (a * torch.where(r == 0, 0.0, scale)[:, None]).round().clamp(-127, 127)
    columns = outlier.any(0)
    q = torch.where(columns | q.isnan(), 0.0, q)
    return q.to(torch.int8), r, columns.nonzero().flatten(), outlier


SHAPES = [(5, 96), (64, 64), (1, 7), (3, 1), (2, 3, 33), (1, 1), (7,), (0, 8), (8, 0), (2, 0, 4)]


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), 0.5, 2.0, 6.0, float("inf")])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vectorwise_quant_by_definition(shape, dtype, threshold):
    a = ref.samples(shape, dtype, seed=sum(shape)) * 3
    before = a.clone()
    codes, stats, columns = F.int8_vectorwise_quant(a, threshold)
    assert torch.equal(a, before)
    rows = a.numel() // shape[-1] if shape[-1] else int(torch.tensor(shape[:-1]).prod())
    q, r, c, _ = quantize(a.reshape(rows, shape[-1]), max(threshold, 0.0))
    assert (codes.dtype, codes.shape) == (torch.int8, a.shape)
    assert (stats.dtype, stats.shape) == (torch.float32, (rows,))
    assert torch.equal(codes.reshape(q.shape), q)
    assert torch.equal(stats, r)
    if threshold > 0:
        assert columns.dtype == torch.int64
        assert torch.equal(columns, c)
    else:
        assert columns is None


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_double_quant_by_definition(dtype, threshold):
    a = activations((33, 70), dtype, 3, ((4, 60.0), (69, -7.0)))
    row_codes, col_codes, row_stats, col_stats, columns = F.int8_double_quant(
        a, threshold=threshold
    )
    q, r, c, outlier = quantize(a, threshold)
    assert torch.equal(row_codes, q)
    assert torch.equal(row_stats, r)
    by_column, s, _, _ = quantize(a.float().masked_fill(outlier, 0.0).t().contiguous())
    assert torch.equal(col_stats, s)
    expected = by_column.t().contiguous()
    if threshold > 0:
        expected[:, c] = 0
        assert torch.equal(columns, c)
    else:
        assert columns is None
    assert torch.equal(col_codes, expected)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_unusual_values(dtype):
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([[1.0, nan, -2], [0, 0, 0], [1, -inf, 2], [-1, 0.5, 0.25]], dtype=dtype)
    codes, stats, _ = F.int8_vectorwise_quant(a)
    assert stats[0].isnan()
    assert stats[1:].tolist() == [0.0, inf, 1.0]
    assert codes.tolist() == [[0] * 3, [0] * 3, [0] * 3, [-127, 64, 32]]
    codes, stats, columns = F.int8_vectorwise_quant(a, 6.0)
    assert columns.tolist() == [1]
    assert stats[0].isnan()
    assert stats[1:].tolist() == [0.0, 2.0, 1.0]
    assert codes.tolist() == [[0] * 3, [0] * 3, [64, 0, 127], [-127, 0, 32]]
    # A threshold too small for float32 still makes everything but zeros an outlier.
    _, stats, columns = F.int8_vectorwise_quant(a[3:], 1e-60)
    assert columns.tolist() == [0, 1, 2]
    assert stats.tolist() == [0.0]


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequant_by_definition(shape, dtype):
    codes = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(1)).char()
    rows = int(torch.tensor(shape[:-1]).prod())
    stats = ref.samples((rows,), seed=4)
    exact = codes.float() * stats.reshape(*shape[:-1], 1) * INV_127
    assert torch.equal(F.int8_vectorwise_dequant(codes, stats), exact)
    assert torch.equal(ops.int8_vectorwise_dequant(codes, stats, dtype), exact.to(dtype))


def layouts(t):
    """The same matrix, laid out in other ways."""
    rows, columns = t.shape
    yield t.t().contiguous().t()
    wide = torch.zeros(rows, 2 * columns, dtype=t.dtype)
    wide[:, ::2] = t
    yield wide[:, ::2]
    apart = torch.zeros(rows + 1, columns + 3, dtype=t.dtype)
    apart[1:, 1:-2] = t
    yield apart[1:, 1:-2]


@pytest.mark.parametrize("name", NAMES)
def test_any_layout(name):
    arguments = cases()[name]
    expected = find(name)(*arguments)
    if name.endswith(".out"):
        expected = arguments[-1]
    for i, argument in enumerate(arguments):
        if not isinstance(argument, torch.Tensor) or argument.dim() != 2:
            continue
        for laid_out in layouts(argument):
            given = (*arguments[:i], laid_out, *arguments[i + 1 :])
            got = find(name)(*given)
            if name.endswith(".out"):
                got = given[-1]
            for x, y in zip(
                *(t if type(t) is tuple else (t,) for t in (got, expected)), strict=True
            ):
                assert torch.equal(x, y)
                assert x.is_contiguous() or name.endswith(".out")


# ---- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (1, 1), (33, 7), (3, 1000), (0, 8), (8, 0)])
def test_matmul_is_exact(lead, n, k):
    generator = torch.Generator().manual_seed(n + k)
    a = torch.randint(-128, 128, (*lead, k), generator=generator).char()
    b = torch.randint(-128, 128, (n, k), generator=generator).char()
    exact = a.long() @ b.long().t()
    got = F.int8_linear_matmul(a, b)
    assert (got.dtype, got.shape) == (torch.int32, exact.shape)
    assert torch.equal(got.long(), exact)
    out = torch.empty(*lead, 2 * n, dtype=torch.int32)[..., ::2]
    assert F.int8_linear_matmul(a, b, out=out) is out
    assert torch.equal(out, got)


def test_longest_sums():
    for value in (-128, 127):
        a = torch.full((1, 131_071), value, dtype=torch.int8)
        b = torch.full((2, 131_071), -128, dtype=torch.int8)
        assert F.int8_linear_matmul(a, b).tolist() == [[131_071 * value * -128] * 2]
    a, b = (torch.zeros(1, 131_072, dtype=torch.int8) for _ in range(2))
    with pytest.raises(ValueError, match=r"at most 131071 elements .* got 131072"):
        F.int8_linear_matmul(a, b)


def scaled(acc, r, c, bias=None):
    y = acc.float() * (r.reshape(*acc.shape[:-1], 1) * INV_127_SQUARED) * c
    return y if bias is None else y + bias.float()


@pytest.mark.parametrize("bias_dtype", [None, *ref.FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [None, *ref.FLOATS], ids=str)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
def test_scaled_products_by_definition(lead, dtype, bias_dtype):
    a = ref.samples((*lead, 96), seed=5)
    ca, sca, _ = ops.int8_vectorwise_quant(a)
    acc = ops.int8_linear_matmul(ca, CB)
    bias = None if bias_dtype is None else BIAS.to(bias_dtype)
    out = dtype or torch.float16
    got = ops.int8_mm_dequant(acc, sca, SCB, dtype, bias)
    assert got.dtype == out
    assert torch.equal(got, scaled(acc, sca, SCB, bias).to(out))
    # The fused op takes the bias in the result's dtype.
    bias = None if bias is None else bias.to(out)
    got = ops.int8_scaled_mm(ca, CB, sca, SCB, bias, dtype)
    assert got.dtype == out
    assert torch.equal(got, scaled(acc, sca, SCB, bias).to(out))


def test_mm_dequant_into_a_buffer():
    exact = scaled(ACC, SCA, SCB, BIAS)
    assert torch.equal(F.int8_mm_dequant(ACC, SCA, SCB, bias=BIAS), exact.half())
    for dtype in (*ref.FLOATS, torch.float64):
        out = torch.empty(5, 64, dtype=dtype)
        assert F.int8_mm_dequant(ACC, SCA, SCB, out, BIAS) is out
        assert torch.equal(out, (exact.half() if dtype == torch.float64 else exact).to(dtype))


def mixed(a, cols, bias=None):
    """In float64, but for the int8 product."""
    ca, sca, _ = quantize(a, 6.0)[:3]
    y = scaled(ca.long() @ CB.long().t(), sca, SCB).double()
    y = y + a[:, cols].double() @ DENSE[:, cols].double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_mixed_product(dtype, bias):
    a, b = A.to(dtype), BIAS.to(dtype) if bias else None
    ca, sca, cols = ops.int8_vectorwise_quant(a, 6.0)
    y, sub = ops.int8_mixed_scaled_mm(a, ca, CB, sca, SCB, cols, b)
    assert torch.equal(sub, a[:, cols])
    want = mixed(a, cols, b)
    half_unit = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    # Three roundings of the scaled sum, one of each outlier's sum, one of the bias's.
    parts = want.abs() + a[:, cols].double().abs() @ DENSE[:, cols].double().abs().t() + 1
    assert ((y.double() - want).abs() <= half_unit * want.abs() + 4e-7 * parts).all()
    # In any order of the columns, which the gathered part keeps.
    again, flipped = ops.int8_mixed_scaled_mm(a, ca, CB, sca, SCB, cols.flip(0), b)
    assert torch.equal(again, y)
    assert torch.equal(flipped, sub.flip(1))


def test_mixed_product_without_outliers():
    ca, sca, _ = ops.int8_vectorwise_quant(A[:3])
    plain = ops.int8_scaled_mm(ca, CB, sca, SCB, BIAS, torch.float32)
    y, sub = ops.int8_mixed_scaled_mm(A[:3], ca, CB, sca, SCB, None, BIAS)
    assert torch.equal(y, plain)
    assert (sub.shape, sub.dtype) == ((0,), A.dtype)
    y, sub = ops.int8_mixed_scaled_mm(A[:3], ca, CB, sca, SCB, COLS[:0], BIAS)
    assert torch.equal(y, plain)
    assert (sub.shape, sub.dtype) == ((3, 0), A.dtype)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 6.0, 100.0])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (3, 0)], ids=str)
def test_linear_is_its_parts(lead, dtype, threshold):
    a = ref.samples((*lead, 96), dtype, 6) * 2
    bias = BIAS.double()  # any floating-point dtype
    ca, sca, cols = ops.int8_vectorwise_quant(a, threshold)
    want, _ = ops.int8_mixed_scaled_mm(a, ca, CB, sca, SCB, cols, bias)
    got = ops.int8_linear(a, CB, SCB, bias, threshold)
    assert (got.shape, got.dtype) == ((*lead, 64), dtype)
    assert torch.equal(got, want)
    got, found = ops.int8_linear.outliers(a, CB, SCB, bias, threshold)
    assert torch.equal(got, want)
    assert found.dtype == torch.int64
    assert found.tolist() == ([] if cols is None else cols.tolist())
    got, listed, count = ops.int8_linear.listed(a, CB, SCB, bias, threshold)
    assert torch.equal(got, want)
    assert (listed.dtype, listed.shape) == (torch.int32, (96,))
    assert (count.dtype, count.tolist()) == (torch.int32, [found.numel()])
    assert listed[: found.numel()].tolist() == found.tolist()


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,)], ids=str)
def test_grad_input(lead, dtype):
    g = ref.samples((*lead, 64), dtype, 7)
    got = ops.int8_linear_grad_input(g, CB, SCB)
    want = g.double() @ DENSE.double()
    assert (got.shape, got.dtype) == ((*lead, 96), dtype)
    unit = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    bound = g.double().abs() @ DENSE.double().abs()
    sums = 2e-6 + ref.weight_rounding(dtype)
    assert ((got.double() - want).abs() <= unit * want.abs() + sums * bound).all()


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8_linear", "int8_linear.outliers", "int8_linear.listed"])
@pytest.mark.parametrize("bias_dtype", [None, *ref.FLOATS], ids=str)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
def test_gradients_of_input_and_bias(name, lead, bias_dtype):
    a = ref.samples((*lead, 96), torch.bfloat16, 8).requires_grad_()
    bias = None if bias_dtype is None else BIAS.clone().to(bias_dtype).requires_grad_()
    g = ref.samples((*lead, 64), torch.bfloat16, 9)
    y = find(name)(a, CB, SCB, bias, 6.0)
    if name != "int8_linear":
        y, *columns = y
        assert not any(tensor.requires_grad for tensor in columns)
    y.backward(g)
    assert torch.equal(a.grad, ops.int8_linear_grad_input(g, CB, SCB))
    if bias is not None:
        assert bias.grad.dtype == bias_dtype
        want = g.double().reshape(-1, 64).sum(0)
        torch.testing.assert_close(bias.grad.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias_dtype", ref.FLOATS, ids=str)
def test_gradient_of_the_bias_of_products_of_codes(bias_dtype):
    bias = BIAS.clone().to(bias_dtype).requires_grad_()
    for product in (
        lambda: ops.int8_mm_dequant(ACC, SCA, SCB, torch.float32, bias),
        lambda: F.int8_mm_dequant(ACC, SCA, SCB, bias=bias).float(),
        lambda: ops.int8_scaled_mm(CA, CB, SCA, SCB, bias, torch.float32),
        lambda: ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, None, bias)[0],
    ):
        bias.grad = None
        y = product()
        y.square().sum().backward()
        assert bias.grad.dtype == bias_dtype
        torch.testing.assert_close(bias.grad.float(), 2 * y.detach().sum(0), rtol=1e-2, atol=1e-1)
    assert not ops.int8_scaled_mm(CA, CB, SCA, SCB, bias.detach()).requires_grad


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("columns", [[3, 40], [], None], ids=str)
def test_gradient_of_the_outlier_part(dtype, columns):
    """``A`` takes part in its outlier columns; the others are the codes, which have none."""
    a = A.to(dtype).reshape(5, 1, 96).requires_grad_()
    codes, stats = ops.int8_vectorwise_quant(a.detach())[:2]
    listed = None if columns is None else torch.tensor(columns, dtype=torch.int64)
    y, sub = ops.int8_mixed_scaled_mm(a, codes, CB, stats, SCB, listed)
    if columns is None:
        (got,) = torch.autograd.grad(y, a, torch.ones_like(y), allow_unused=True)
        assert got is None or not got.any()
        return
    g, g_sub = torch.ones_like(y), torch.full_like(sub, 2)
    (got,) = torch.autograd.grad([y, sub], a, [g, g_sub], retain_graph=True)
    want = torch.zeros(5, 1, 96)
    want[..., columns] = DENSE.sum(0)[columns] + 2
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
    (got,) = torch.autograd.grad(sub, a, g_sub)
    want[..., columns] = 2
    assert torch.equal(got.float(), want)


def test_gradient_of_an_expanded_gradient():
    a = A.clone().requires_grad_()
    ops.int8_linear(a, CB, SCB, None, 6.0).sum().backward()  # stride 0
    torch.testing.assert_close(a.grad, DENSE.sum(0).expand(5, -1))


def test_only_what_needs_a_gradient_gets_one():
    bias = BIAS.clone().requires_grad_()
    ops.int8_linear(A, CB, SCB, bias, 6.0).sum().backward()
    assert torch.equal(bias.grad, torch.full((64,), 5.0))
    assert not ops.int8_linear(A, CB, SCB, None, 6.0).requires_grad
    with torch.no_grad():
        assert not ops.int8_linear(A, CB, SCB, bias, 6.0).requires_grad


def test_second_derivatives():
    a, g = A.clone().requires_grad_(), torch.ones(5, 64, requires_grad=True)
    y = ops.int8_linear(a, CB, SCB, None, 0.0)
    (first,) = torch.autograd.grad(y, a, g, create_graph=True)
    first.square().sum().backward()
    torch.testing.assert_close(g.grad, 2 * (g.detach() @ DENSE) @ DENSE.t(), rtol=1e-4, atol=1e-3)


def test_changes_between_forward_and_backward_are_noticed():
    for i in range(2):
        weight = [CB.clone(), SCB.clone()]
        y = ops.int8_linear(A.clone().requires_grad_(), *weight, None, 0.0)
        weight[i].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_weights_quantized_in_inference_mode_train():
    with torch.inference_mode():
        cb, scb, _ = F.int8_vectorwise_quant(W)
        y = ops.int8_linear(A * 1, cb, scb, None, 6.0)
        assert y.is_inference()
    a = A.clone().requires_grad_()
    z = ops.int8_linear(a, cb, scb, None, 6.0)
    assert torch.equal(z, y)
    z.sum().backward()
    torch.testing.assert_close(a.grad, DENSE.sum(0).expand(5, -1))


# ---- torch.compile and torch.export --------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward(backend, dynamic):
    torch._dynamo.reset()

    def step(a, bias):
        return torch.relu(ops.int8_linear(a * 2, CB, SCB, bias, 6.0))

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (3, 5):
        results = []
        for function in (step, compiled):
            a = ref.samples((n, 96), seed=n).requires_grad_()
            bias = BIAS.clone().requires_grad_()
            y = function(a, bias)
            y.sum().backward()
            results.append((y.detach(), a.grad, bias.grad))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced)


def test_compiled_outlier_columns():
    torch._dynamo.reset()

    def parts(a):
        ca, sca, cols = F.int8_vectorwise_quant(a, 6.0)
        return (*ops.int8_mixed_scaled_mm(a, ca, CB, sca, SCB, cols), cols)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(parts, fullgraph=True, backend="aot_eager")
        for a in (A, A.clamp(-1, 1)):
            for want, got in zip(parts(a), compiled(a), strict=True):
                assert torch.equal(want, got)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, a):
            return ops.int8_linear(a, CB, SCB, BIAS, 6.0) + 1

    rows = torch.export.Dim("rows", min=2, max=100)
    exported = torch.export.export(Module(), (A,), dynamic_shapes=({0: rows},))
    assert "halfbyte.int8_linear" in str(exported.graph)
    for n in (3, 7):
        a = ref.samples((n, 96), seed=n)
        assert torch.equal(exported.module()(a), Module()(a))


# ---- functions -----------------------------------------------------------------------------------

SIGNATURES = {
    "int8_double_quant": "(A: 'Tensor', col_stats: 'Tensor | None' = None, "
    "row_stats: 'Tensor | None' = None, out_col: 'Tensor | None' = None, "
    "out_row: 'Tensor | None' = None, threshold: 'float' = 0.0)",
    "int8_linear_matmul": "(A: 'Tensor', B: 'Tensor', out: 'Tensor | None' = None, "
    "dtype: 'torch.dtype' = torch.int32)",
    "int8_mm_dequant": "(A: 'Tensor', row_stats: 'Tensor', col_stats: 'Tensor', "
    "out: 'Tensor | None' = None, bias: 'Tensor | None' = None)",
    "int8_vectorwise_dequant": "(A: 'Tensor', stats: 'Tensor')",
    "int8_vectorwise_quant": "(A: 'Tensor', threshold: 'float' = 0.0)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_are_where_clients_look(name):
    function = getattr(F, name)
    assert function.__module__ == "halfbyte.functional"
    assert name in F.__all__
    assert str(inspect.signature(function)).partition(" -> ")[0] == SIGNATURES[name]


F32 = torch.ones(5, 96)
I8 = torch.ones(5, 96, dtype=torch.int8)
ERRORS = [
    (
        lambda: F.int8_vectorwise_quant(I8),
        ValueError,
        "A must be float32, float16 or bfloat16, .*int8",
    ),
    (lambda: F.int8_vectorwise_quant(F32.double()), ValueError, "A must be float32.*got float64"),
    (
        lambda: F.int8_vectorwise_quant(torch.tensor(1.0)),
        ValueError,
        "A must have at least one dim",
    ),
    (lambda: F.int8_vectorwise_dequant(F32, SCA), TypeError, "A must be int8, got float32"),
    (
        lambda: F.int8_vectorwise_dequant(I8, SCB),
        ValueError,
        "stats must hold 5 float32 values, one for each row of A, got 64",
    ),
    (
        lambda: F.int8_vectorwise_dequant(I8, SCA.half()),
        TypeError,
        "stats must be float32, got float16",
    ),
    (
        lambda: ops.int8_vectorwise_dequant(I8, SCA, torch.int32),
        RuntimeError,
        "dtype must be float32, float16 or bfloat16, got int32",
    ),
    (lambda: F.int8_double_quant(F32, row_stats=SCA), ValueError, "row_stats must be None"),
    (lambda: F.int8_double_quant(I8), ValueError, "A must be float32.*got int8"),
    (lambda: F.int8_linear_matmul(F32, CB), TypeError, "A must be int8, got float32"),
    (lambda: F.int8_linear_matmul(I8, W), TypeError, "B must be int8, got float32"),
    (
        lambda: F.int8_linear_matmul(I8, CB, dtype=torch.int8),
        TypeError,
        "dtype must be torch.int32",
    ),
    (
        lambda: F.int8_linear_matmul(I8[:, :7], CB),
        ValueError,
        r"last dimension of A must be 96.*shape \[5, 7\]",
    ),
    (lambda: F.int8_linear_matmul(I8, CB[0]), ValueError, r"B must have two dimensions.*\[96\]"),
    (
        lambda: F.int8_linear_matmul(I8, CB, out=torch.empty(64, 5, dtype=torch.int32)),
        ValueError,
        r"out must have shape \[5, 64\], got \[64, 5\]",
    ),
    (lambda: F.int8_linear_matmul(I8, CB, out=torch.empty(5, 64)), TypeError, "out must be int32"),
    (
        lambda: F.int8_linear_matmul(
            I8, CB, out=torch.empty(1, 64, dtype=torch.int32).expand(5, 64)
        ),
        ValueError,
        "out must have a place of its own",
    ),
    (lambda: F.int8_mm_dequant(CA, SCA, SCB), TypeError, "A must be int32, got int8"),
    (lambda: F.int8_mm_dequant(ACC, SCB, SCB), ValueError, "row_stats must hold 5 .* got 64"),
    (lambda: F.int8_mm_dequant(ACC, SCA, SCA), ValueError, "col_stats must hold 64 .* got 5"),
    (lambda: F.int8_mm_dequant(ACC, SCA.double(), SCB), TypeError, "row_stats must be float32"),
    (
        lambda: F.int8_mm_dequant(ACC, SCA, SCB, bias=BIAS[:5]),
        ValueError,
        r"bias must have shape \[64\], got \[5\]",
    ),
    (
        lambda: F.int8_mm_dequant(ACC, SCA, SCB, bias=BIAS.long()),
        TypeError,
        "bias must be of a floating-point dtype, got int64",
    ),
    (
        lambda: F.int8_mm_dequant(ACC, SCA, SCB, out=torch.empty(64)),
        ValueError,
        r"out must have shape \[5, 64\], got \[64\]",
    ),
    (
        lambda: ops.int8_mixed_scaled_mm(A, CA[:3], CB, SCA, SCB),
        RuntimeError,
        r"CA must have the shape of A, \[5, 96\], got \[3, 96\]",
    ),
    (
        lambda: ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, torch.tensor([3, 96])),
        RuntimeError,
        "outlier_cols must hold columns of A, 0 to 95, got 96",
    ),
    (
        lambda: ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, torch.tensor([-1])),
        RuntimeError,
        "0 to 95, got -1",
    ),
    (
        lambda: ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, torch.tensor([1.0])),
        RuntimeError,
        "outlier_cols must be int64, got float32",
    ),
    (lambda: ops.int8_linear(A, W, SCB, None, 0.0), RuntimeError, "CB must be int8, got float32"),
    (lambda: ops.int8_linear(A.double(), CB, SCB, None, 0.0), RuntimeError, "A must be float32"),
    (lambda: ops.int8_linear(A, CB, SCB[:3], None, 0.0), RuntimeError, "SCB must hold 64 .* got 3"),
    (
        lambda: ops.int8_linear(A, CB[0], SCB, None, 0.0),
        RuntimeError,
        "CB must have two dimensions",
    ),
    (
        lambda: ops.int8_linear(A, CB, SCB, BIAS[:, None], 0.0),
        RuntimeError,
        r"bias must have shape \[64\], got \[64, 1\]",
    ),
    (
        lambda: ops.int8_linear(A[:, :5], CB, SCB, None, 0.0),
        RuntimeError,
        r"last dimension of A must be 96",
    ),
    (
        lambda: ops.int8_linear_grad_input(A, CB, SCB),
        RuntimeError,
        r"last dimension of grad_output must be 64, got grad_output of shape \[5, 96\]",
    ),
    (
        lambda: F.int8_vectorwise_quant(A.to(torch.complex64)),
        TypeError,
        "A: tensors of complex64 are not supported",
    ),
    (
        lambda: F.int8_vectorwise_quant(A.to(torch.float8_e4m3fn)),
        TypeError,
        "A: tensors of float8_e4m3fn are not supported",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind


def test_an_op_called_directly_leaves_no_error_for_the_next_failure():
    with pytest.raises(RuntimeError, match="got float64"):
        ops.int8_linear(A.double(), CB, SCB, None, 0.0)
    with pytest.raises(TypeError, match="Expected a value of type 'Tensor' for argument 'A'"):
        F.int8_vectorwise_quant("x")
    with pytest.raises(RuntimeError, match="got float64"):
        ops.int8_linear(A.double(), CB, SCB, None, 0.0)
    assert type(_ops.failure(RuntimeError("of somebody else"))) is RuntimeError


def test_output_over_an_input():
    memory = torch.zeros(64 * 96, dtype=torch.int8)
    out = memory[: 5 * 64 * 4].view(torch.int32).view(5, 64)
    with pytest.raises(ValueError, match="out must not overlap B"):
        F.int8_linear_matmul(I8, memory.view(64, 96), out=out)


def test_out_is_marked_as_changed():
    out = torch.empty(5, 64, dtype=torch.int32)
    assert ops.int8_linear_matmul.out(CA, CB, out) is None
    assert out._version == 1


@pytest.mark.parametrize("name", NAMES)
def test_fakes_refuse_what_kernels_refuse(name):
    """Each tensor in turn with one element less, or of another dtype."""
    arguments = cases()[name]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for i, argument in enumerate(arguments):
        if not isinstance(argument, torch.Tensor):
            continue
        others = [argument.to(torch.complex64), argument[:-1]]
        for other in others:
            given = (*arguments[:i], other, *arguments[i + 1 :])
            outcomes = []
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given]
            for values in (given, fakes):
                try:
                    with mode if values is fakes else torch.no_grad():
                        find(name)(*values)
                    outcomes.append("fine")
                except (RuntimeError, ValueError, TypeError):
                    outcomes.append("refused")
            assert outcomes[0] == outcomes[1], (i, other.dtype, other.shape)


# ---- memory and threads --------------------------------------------------------------------------


def test_results_are_freed(python):
    python("""
import torch
from halfbyte._ops import ops

a = torch.randn(8, 32)
a[0, 3] = 20
w, s, _ = ops.int8_vectorwise_quant(torch.randn(16, 32))
bias = torch.zeros(16)

def calls():
    q, r, columns = ops.int8_vectorwise_quant(a, 6.0)
    ops.int8_mixed_scaled_mm(a, q, w, r, s, columns, bias)
    ops.int8_mixed_scaled_mm(a, q, w, r, s, None, bias)
    ops.int8_double_quant(a, 6.0)
    ops.int8_linear.outliers(a, w, s, bias, 6.0)
    ops.int8_mm_dequant(ops.int8_linear_matmul(q, w), r, s, torch.float32, bias)
    try:
        ops.int8_scaled_mm(q, w, r, r, bias, torch.float32)
    except RuntimeError:
        pass

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

for _ in range(1000):
    calls()
before = resident()
for _ in range(10_000):
    calls()
grown = resident() - before
assert grown < 1_000_000, grown
""")


def test_bytes_do_not_depend_on_threads():
    x, w = (
        activations((70, 1030), seed=10, outliers=((3, 20.0), (1029, 7.0))),
        ref.samples((200, 1030)),
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cb, scb, _ = F.int8_vectorwise_quant(w)
            y, columns = ops.int8_linear.outliers(x, cb, scb, None, 6.0)
            results.append((cb, scb, *F.int8_double_quant(x, threshold=6.0), y, columns))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for want, got in itertools.zip_longest(results[0], other):
            assert torch.equal(want, got)
