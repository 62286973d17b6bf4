"""The ops of layers of experts: schemas, values, tracing, gradients, errors."""

from __future__ import annotations

import itertools

import pytest
import reference as ref
import torch
from halfbyte import _ops, _ops_experts
from halfbyte import functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

ops = torch.ops.halfbyte
find = _ops.find
NAMES = list(_ops_experts.SCHEMAS)
E, N, K = 4, 24, 40
PLAIN = (None, None, None, None, 256)


def quantize_4bit(w, blocksize=64, quant_type="nf4", nested=False):
    """Packed bytes, and the arguments before and after ``expert_ids``, of ``[experts, ...]``."""
    experts, n, k = w.shape
    padded = -(-(n * k) // blocksize) * blocksize
    flat = torch.nn.functional.pad(w.reshape(experts, n * k), (0, padded - n * k))
    packed, s = F.quantize_4bit(
        flat, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    state = PLAIN
    if nested:
        state = (None, s.state2.absmax, s.state2.code, s.offset, 256)
    dense = F.dequantize_4bit(packed, s)[:, : n * k].reshape(experts, n, k)
    return (packed, s.absmax, blocksize, quant_type, [experts, n, k]), state, dense


def quantize_8bit(w):
    codes, stats, _ = F.int8_vectorwise_quant(w)
    scales = stats.reshape(w.shape[:2])
    return (codes, scales), F.int8_vectorwise_dequant(codes, stats)


def product(a, dense, ids, bias=None):
    """In float64, row by row."""
    experts, n, _ = dense.shape
    y = torch.zeros(*ids.shape, n, dtype=torch.float64)
    for t, s in itertools.product(*map(range, ids.shape)):
        e = int(ids[t, s])
        if e < experts:
            row = a[t] if a.dim() == 2 else a[t, s]
            y[t, s] = dense[e].double() @ row.double()
            if bias is not None:
                y[t, s] += bias[e].double()
    return y


def product_grad(g, dense, ids, shared):
    experts, _, k = dense.shape
    x = torch.zeros(*ids.shape, k, dtype=torch.float64)
    for t, s in itertools.product(*map(range, ids.shape)):
        e = int(ids[t, s])
        if e < experts:
            x[t, s] = g[t, s].double() @ dense[e].double()
    return x.sum(1) if shared else x


W = ref.samples((E, N, K))
Q4, STATE4, DENSE4 = quantize_4bit(W)
NESTED4, NESTED_STATE, NESTED_DENSE = quantize_4bit(W, 32, "fp4", nested=True)
Q8, DENSE8 = quantize_8bit(W)
IDS = torch.tensor([[0, 2], [2, 1], [3, 4], [0, 0], [4, 4]])  # 4 is none
A = ref.samples((5, K), seed=1)
A3 = ref.samples((5, 2, K), seed=2)
G = ref.samples((5, 2, N), seed=3)
BIAS = ref.samples((E, N), seed=4)


def cases(grad: bool = False) -> dict[str, list[tuple]]:
    """Arguments for every op."""
    a, a3, g, bias = (t.clone().requires_grad_(grad) for t in (A, A3, G, BIAS))
    return {
        "experts_matmul_4bit": [
            (a, *Q4, IDS, bias, *STATE4),
            (a3, *NESTED4, IDS, None, *NESTED_STATE),
        ],
        "experts_matmul_4bit_grad_input": [
            (g, *Q4, IDS, True, *STATE4),
            (g, *NESTED4, IDS, False, *NESTED_STATE),
        ],
        "experts_matmul_8bit": [(a, *Q8, IDS, bias, 2.0), (a3, *Q8, IDS, None, 0.0)],
        "experts_matmul_8bit_grad_input": [(g, *Q8, IDS, True), (g, *Q8, IDS, False)],
    }


def test_every_op_has_a_kernel_and_a_fake():
    assert set(cases()) == set(_ops_experts.SCHEMAS) == set(_ops_experts.FAKES)
    for name, key in itertools.product(NAMES, ("CPU", "CUDA", "XPU")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"halfbyte::{name}", key), (name, key)


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, grad, case):
    torch.library.opcheck(find(name), cases(grad)[name][case])


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_fakes_say_what_kernels_do(name, case):
    arguments = cases()[name][case]
    real = find(name)(*arguments)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    with mode:
        fake = find(name)(*fakes)
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


UNITS = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def close(got, want, bound):
    """Within a rounding of the dtype and the float32 sums of terms that add up to ``bound``."""
    assert got.shape == want.shape
    error = (got.double() - want).abs()
    sums = 4e-6 + ref.weight_rounding(got.dtype)
    assert (error <= UNITS[got.dtype] * want.abs() + sums * bound).all(), error.max()


def routes(kind, tokens, slots, experts):
    generator = torch.Generator().manual_seed(tokens * 7 + slots)
    if kind == "one":
        return torch.full((tokens, slots), experts - 1)
    if kind == "none":
        return torch.full((tokens, slots), experts)
    return torch.randint(0, experts + 1, (tokens, slots), generator=generator)


@pytest.mark.parametrize("kind", ["random", "one", "none"])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "slots", "shape"),
    [
        (1, 2, (8, 32, 64)),
        (70, 2, (3, 33, 70)),
        (5, 1, (2, 1, 7)),
        (0, 2, (2, 4, 8)),
        (4, 4, (1, 5, 1)),
    ],
    ids=str,
)
def test_products_and_gradients(tokens, slots, shape, dtype, kind):
    experts, n, k = shape
    w = ref.samples(shape, seed=5)
    ids = routes(kind, tokens, slots, experts)
    bias = ref.samples((experts, n), dtype, 6)
    g = ref.samples((tokens, slots, n), dtype, 7)
    for blocksize, nested in ((32, False), (64, True), (4096, False)):
        weight, state, dense = quantize_4bit(w, blocksize, "nf4", nested)
        for a in (ref.samples((tokens, k), dtype, 8), ref.samples((tokens, slots, k), dtype, 9)):
            y = ops.experts_matmul_4bit(a, *weight, ids, bias, *state)
            assert y.dtype == dtype
            bound = product(a.abs(), dense.abs(), ids, bias.abs())
            close(y, product(a, dense, ids, bias), bound)
            shared = a.dim() == 2
            x = ops.experts_matmul_4bit_grad_input(g, *weight, ids, shared, *state)
            bound = product_grad(g.abs(), dense.abs(), ids, shared)
            close(x, product_grad(g, dense, ids, shared), bound)
    (codes, scales), dense = quantize_8bit(w)
    for a in (ref.samples((tokens, k), dtype, 8), ref.samples((tokens, slots, k), dtype, 9)):
        for threshold in (0.0, 1.5):
            y = ops.experts_matmul_8bit(a, codes, scales, ids, bias, threshold)
            want = torch.zeros_like(y)
            rows = a[:, None].expand(-1, slots, -1) if a.dim() == 2 else a
            for e in range(experts):
                there = ids == e
                want[there] = ops.int8_linear(rows[there], codes[e], scales[e], bias[e], threshold)
            assert torch.equal(y, want)
        x = ops.experts_matmul_8bit_grad_input(g, codes, scales, ids, a.dim() == 2)
        bound = product_grad(g.abs(), dense.abs(), ids, a.dim() == 2)
        close(x, product_grad(g, dense, ids, a.dim() == 2), bound)


def test_the_layout_of_a_tensor_quantized_at_once():
    packed, _ = F.quantize_4bit(W.reshape(E, -1), blocksize=64, quant_type="nf4")
    at_once = F.quantize_4bit(W, blocksize=64, quant_type="nf4")[0]
    assert N * K % 64 == 0
    assert torch.equal(packed, at_once)
    assert torch.equal(packed, Q4[0])
    for storage in (torch.bfloat16, torch.float32):  # the same bytes
        viewed = packed.flatten().view(storage)
        y = ops.experts_matmul_4bit(A, viewed, *Q4[1:], IDS, None, *PLAIN)
        assert torch.equal(y, ops.experts_matmul_4bit(A, *Q4, IDS, None, *PLAIN))


@pytest.mark.parametrize("name", NAMES)
def test_any_layout(name):
    for arguments in cases()[name]:
        expected = find(name)(*arguments)
        for i, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor) or argument.dim() < 2 or not argument.numel():
                continue
            if argument.size(-1) == 1:
                continue
            turned = argument.transpose(0, -1).contiguous().transpose(0, -1)
            assert not turned.is_contiguous()
            got = find(name)(*arguments[:i], turned, *arguments[i + 1 :])
            assert torch.equal(got, expected), i


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_dtype", [None, *ref.FLOATS], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients(bits, shared, bias_dtype):
    a = (A if shared else A3).to(torch.bfloat16).requires_grad_()
    bias = None if bias_dtype is None else BIAS.clone().to(bias_dtype).requires_grad_()
    g = G.to(torch.bfloat16)
    if bits == 4:
        y = ops.experts_matmul_4bit(a, *Q4, IDS, bias, *STATE4)
        want = ops.experts_matmul_4bit_grad_input(g, *Q4, IDS, shared, *STATE4)
    else:
        y = ops.experts_matmul_8bit(a, *Q8, IDS, bias, 2.0)
        want = ops.experts_matmul_8bit_grad_input(g, *Q8, IDS, shared)
    y.backward(g)
    assert torch.equal(a.grad, want)
    if bias is None:
        return
    assert bias.grad.dtype == bias_dtype
    rows = [g[IDS.eq(e)].double() for e in range(E)]
    sums, bound = (torch.stack([r.sum(0) for r in x]) for x in (rows, [r.abs() for r in rows]))
    close(bias.grad, sums, bound)


def test_only_what_needs_a_gradient_gets_one():
    bias = BIAS.clone().requires_grad_()
    y = ops.experts_matmul_4bit(A, *Q4, IDS, bias, *STATE4)
    y.sum().backward()
    counts = torch.stack([IDS.eq(e).sum() for e in range(E)])
    assert torch.equal(bias.grad, counts[:, None].expand(E, N).float())
    assert not ops.experts_matmul_8bit(A, *Q8, IDS, None, 0.0).requires_grad


@pytest.mark.parametrize("shared", [True, False])
def test_second_derivatives(shared):
    a = (A if shared else A3).clone().requires_grad_()
    g = G.clone().requires_grad_()
    y = ops.experts_matmul_4bit(a, *Q4, IDS, None, *STATE4)
    (first,) = torch.autograd.grad(y, a, g, create_graph=True)
    first.square().sum().backward()
    want = product(2 * product_grad(G, DENSE4, IDS, shared), DENSE4, IDS)
    torch.testing.assert_close(g.grad.double(), want, rtol=1e-4, atol=1e-3)
    g.grad = None
    y = ops.experts_matmul_8bit(a, *Q8, IDS, None, 0.0)
    (first,) = torch.autograd.grad(y, a, g, create_graph=True)
    first.square().sum().backward()
    want = product(2 * product_grad(G, DENSE8, IDS, shared), DENSE8, IDS)
    torch.testing.assert_close(g.grad.double(), want, rtol=1e-4, atol=1e-3)


def test_changes_between_forward_and_backward_are_noticed():
    for i in range(2):
        for name, weight, state in (
            ("experts_matmul_4bit", list(Q4), STATE4),
            ("experts_matmul_8bit", list(Q8), (0.0,)),
        ):
            weight[i], ids = weight[i].clone(), IDS.clone()
            y = find(name)(A.clone().requires_grad_(), *weight, ids, None, *state)
            weight[i].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_weights_quantized_in_inference_mode_train():
    with torch.inference_mode():
        weight, state, dense = quantize_4bit(W, 32, nested=True)
    a = A.clone().requires_grad_()
    ops.experts_matmul_4bit(a, *weight, IDS, None, *state).sum().backward()
    want = product_grad(torch.ones(5, 2, N), dense, IDS, True)
    torch.testing.assert_close(a.grad.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward(backend, dynamic):
    torch._dynamo.reset()

    def step(a, ids, bias):
        y = ops.experts_matmul_4bit(a * 2, *Q4, ids, bias, *STATE4)
        return torch.relu(y) + ops.experts_matmul_8bit(a, *Q8, ids, bias, 1.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (3, 5):
        results = []
        for function in (step, compiled):
            a = A[:n].clone().requires_grad_()
            bias = BIAS.clone().requires_grad_()
            y = function(a, IDS[:n], bias)
            y.sum().backward()
            results.append((y.detach(), a.grad, bias.grad))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced)


# ---- errors --------------------------------------------------------------------------------------


def matmul(a=A, packed=Q4[0], absmax=Q4[1], shape=Q4[4], ids=IDS, bias=None):
    return ops.experts_matmul_4bit(a, packed, absmax, 64, "nf4", shape, ids, bias, *PLAIN)


ERRORS = [
    (
        lambda: matmul(ids=IDS + 1),
        r"expert_ids must lie in 0\.\.=4 \(4 means no expert\), got 5 for",
    ),
    (lambda: matmul(ids=IDS - 1), r"got -1 for token 0, slot 0"),
    (lambda: matmul(ids=IDS.int()), "expert_ids must be int64, got int32"),
    (lambda: matmul(ids=IDS[0]), r"expert_ids must have two dimensions, \[tokens, slots\]"),
    (lambda: matmul(a=A[:3]), r"A must have shape \[5, 40\] or \[5, 2, 40\].*got \[3, 40\]"),
    (lambda: matmul(a=A[:, :3]), r"A must have shape \[5, 40\] or \[5, 2, 40\].*got \[5, 3\]"),
    (lambda: matmul(a=A.double()), "A must be float32, float16 or bfloat16, got float64"),
    (lambda: matmul(shape=[N, K]), r"shape must be \[experts, out_features, in_features\]"),
    (lambda: matmul(shape=[-1, N, K]), "shape must be a tensor's shape"),
    (lambda: matmul(shape=[2**40, 0, 0]), "with at most 1048576 experts"),
    (lambda: matmul(packed=Q4[0][:-8]), "packed must hold 1920 bytes"),
    (lambda: matmul(absmax=Q4[1][:-1]), "absmax must hold 60 float32 scales, got 59"),
    (lambda: matmul(bias=BIAS[0]), r"bias must have shape \[4, 24\], got \[24\]"),
    (lambda: matmul(bias=BIAS.int()), "bias must be of a floating-point dtype, got int32"),
    (
        lambda: ops.experts_matmul_4bit_grad_input(G[:2], *Q4, IDS, True, *PLAIN),
        r"grad_output must have shape \[5, 2, 24\], got \[2, 2, 24\]",
    ),
    (lambda: ops.experts_matmul_8bit(A, W, Q8[1], IDS, None, 0.0), "CB must be int8, got float32"),
    (
        lambda: ops.experts_matmul_8bit(A, Q8[0], Q8[1][:2], IDS, None, 0.0),
        r"SCB must have shape \[4, 24\], got \[2, 24\]",
    ),
    (
        lambda: ops.experts_matmul_8bit(A, Q8[0][0], Q8[1], IDS, None, 0.0),
        r"the shape of CB must be \[experts, out_features, in_features\]",
    ),
    (
        lambda: ops.experts_matmul_8bit_grad_input(G, *Q8, IDS[:, :1], True),
        r"grad_output must have shape \[5, 1, 24\], got \[5, 2, 24\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("name", NAMES)
def test_fakes_refuse_what_kernels_refuse(name):
    """Each tensor but packed bytes and scales in turn, shorter or of another dtype."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for arguments in cases()[name]:
        for i, argument in enumerate(arguments):
            kept = "4bit" in name and argument is not None and i in (1, 2)
            if not isinstance(argument, torch.Tensor) or kept or i > 8:
                continue
            for other in (argument.to(torch.complex64), argument[:-1]):
                given = (*arguments[:i], other, *arguments[i + 1 :])
                fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given]
                outcomes = []
                for values in (given, fakes):
                    try:
                        with mode if values is fakes else torch.no_grad():
                            find(name)(*values)
                        outcomes.append("fine")
                    except (RuntimeError, ValueError, TypeError):
                        outcomes.append("refused")
                assert outcomes == ["refused", "refused"], (i, other.dtype, other.shape)


def test_bytes_do_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    w, ids = ref.samples((4, 96, 130)), torch.randint(0, 5, (90, 3), generator=generator)
    weight, state, _ = quantize_4bit(w, nested=True)
    eight, _ = quantize_8bit(w)
    a, g = ref.samples((90, 130), seed=1), ref.samples((90, 3, 96), seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (
                    ops.experts_matmul_4bit(a, *weight, ids, None, *state),
                    ops.experts_matmul_4bit_grad_input(g, *weight, ids, True, *state),
                    ops.experts_matmul_4bit_grad_input(g, *weight, ids, False, *state),
                    ops.experts_matmul_8bit(a, *eight, ids, None, 2.0),
                    ops.experts_matmul_8bit_grad_input(g, *eight, ids, True),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for want, got in zip(results[0], other, strict=True):
            assert torch.equal(want, got)
