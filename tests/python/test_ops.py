"""The ops: schemas, tracing, gradients, memory."""

from __future__ import annotations

import itertools

import pytest
import reference as ref
import torch
from halfbyte import _ops, matmul_4bit
from halfbyte import functional as F
from halfbyte.autograd import _functions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

ops = torch.ops.halfbyte
NAMES = [name for name in _ops._SCHEMAS if not name.startswith(("optimizer_", "int8_", "experts_"))]

# As upstream bitsandbytes 0.50.2 has them under torch.ops.bitsandbytes.
UPSTREAM = """
dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor
dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, Tensor($0! -> ) out) -> ()
dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor
dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor($0! -> ) out) -> ()
gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor
gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor
gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor($0! -> ) out) -> ()
quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)
quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)
""".strip().splitlines()  # noqa: E501


def schema(name: str) -> str:
    op, _, overload = name.partition(".")
    return str(getattr(getattr(ops, op), overload or "default")._schema)


@pytest.mark.parametrize("line", UPSTREAM, ids=lambda line: line.partition("(")[0])
def test_schemas_are_upstreams(line):
    got = schema(line.partition("(")[0]).removeprefix("halfbyte::")
    assert got.replace("Tensor(a!)", "Tensor($0! -> )") == line.replace(
        "Tensor(a!)", "Tensor($0! -> )"
    )


def test_every_op_has_a_kernel_on_the_cpu_and_a_fake():
    for name in _ops._SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"halfbyte::{name}", "CPU"), name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"halfbyte::{name}", "Meta"), name
    assert set(_ops._SCHEMAS) == set(_ops._FAKES)


X = ref.samples((64, 96))
PACKED, STATE = F.quantize_4bit(X, quant_type="nf4")
NESTED_PACKED, NESTED = F.quantize_4bit(X, quant_type="fp4", compress_statistics=True)
Q8, STATE8 = F.quantize_blockwise(X, blocksize=256)
A = ref.samples((3, 96), seed=1)
PLAIN = (None, None, None, None, 256)
REST = (NESTED.code, NESTED.state2.absmax, NESTED.state2.code, NESTED.offset, 256)


def weight(state=STATE):
    return state.absmax, 64, state.quant_type, [64, 96]


def cases(grad: bool = False) -> dict[str, tuple]:
    """Arguments for every op of NAMES."""
    a, bias = A.clone().requires_grad_(grad), torch.ones(64).requires_grad_(grad)
    g = torch.ones(3, 64).requires_grad_(grad)
    f32, u8 = torch.float32, torch.uint8
    return {
        "quantize_4bit": (X, 64, "nf4", u8),
        "quantize_4bit.out": (X, 64, "nf4", torch.empty_like(PACKED), torch.empty(96)),
        "quantize_4bit.nested": (X, 64, "fp4", torch.int16, 256),
        "dequantize_4bit": (PACKED, *weight(), torch.bfloat16),
        "dequantize_4bit.out": (PACKED, *weight(), f32, torch.empty(64, 96)),
        "dequantize_4bit.state": (NESTED_PACKED, *weight(NESTED), torch.float16, *REST),
        "dequantize_4bit.state_out": (
            *(NESTED_PACKED, *weight(NESTED), *REST),
            torch.empty(64, 96),
        ),
        "quantize_blockwise": (X, STATE8.code, 256),
        "quantize_blockwise.out": (X, STATE8.code, 256, torch.empty_like(Q8), torch.empty(24)),
        "dequantize_blockwise": (Q8, STATE8.absmax, STATE8.code, 256, torch.float16),
        "dequantize_blockwise.out": (
            *(Q8, STATE8.absmax, STATE8.code, 256, f32),
            torch.empty(64, 96),
        ),
        "quantize_absmax": (STATE.absmax, 64),
        "gemv_4bit": (a, PACKED, [64, 96], STATE.absmax, STATE.code, 64),
        "gemv_4bit.out": (
            *(A, PACKED, [64, 96], STATE.absmax, STATE.code, 64),
            torch.empty(3, 64),
        ),
        "gemm_4bit": (
            *(a, NESTED_PACKED, [64, 96], NESTED.state2.absmax, 64, "fp4", bias),
            *(NESTED.absmax, NESTED.state2.code, NESTED.offset),
        ),
        "matmul_4bit": (a, PACKED, *weight(), bias, *PLAIN),
        "matmul_4bit.out": (A, PACKED, *weight(), None, *PLAIN, torch.empty(3, 64)),
        "matmul_4bit_grad_input": (g, NESTED_PACKED, *weight(NESTED), *REST),
    }


def find(name: str):
    op, _, overload = name.partition(".")
    return getattr(getattr(ops, op), overload or "default")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, grad):
    torch.library.opcheck(find(name), cases(grad)[name])


@pytest.mark.parametrize("name", NAMES)
def test_fakes_say_what_kernels_do(name):
    arguments = cases()[name]
    real = find(name)(*arguments)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    with mode:
        fake = find(name)(*fakes)
    reals = real if isinstance(real, tuple) else (real,)
    fakes = fake if isinstance(fake, tuple) else (fake,)
    assert len(reals) == len(fakes)
    for r, f in zip(reals, fakes, strict=True):
        if r is None or f is None:
            assert r is f
            continue
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_gemm_and_gemv_are_the_product():
    dense = F.dequantize_4bit(NESTED_PACKED, NESTED)
    torch.testing.assert_close(ops.gemm_4bit(*cases()["gemm_4bit"]), A @ dense.t() + 1)
    dense = F.dequantize_4bit(PACKED, STATE)
    torch.testing.assert_close(ops.gemv_4bit(*cases()["gemv_4bit"]), A @ dense.t())


def test_out_arguments_are_marked_as_changed():
    for name in NAMES:
        if "out" not in name.partition(".")[2]:
            continue
        arguments = cases()[name]
        before = [a._version if isinstance(a, torch.Tensor) else 0 for a in arguments]
        assert find(name)(*arguments) is None
        changed = [
            argument.name
            for argument, version, value in zip(
                find(name)._schema.arguments, before, arguments, strict=True
            )
            if isinstance(value, torch.Tensor) and value._version != version
        ]
        written = [a.name for a in find(name)._schema.arguments if a.alias_info is not None]
        assert changed == written, name


def test_errors_of_ops_called_directly_are_runtime_errors():
    for call in (
        lambda: ops.dequantize_4bit(PACKED[:5], *weight(), torch.float32),
        lambda: ops.quantize_4bit(X, 48, "nf4", torch.uint8),
        lambda: ops.quantize_4bit(X, 64, "nf5", torch.uint8),
        lambda: ops.matmul_4bit(A, PACKED, *weight(), torch.ones(64).half(), *PLAIN),
        lambda: ops.matmul_4bit(A, PACKED, *weight(), None, None, REST[1], None, None, 256),
        lambda: ops.dequantize_4bit(PACKED, STATE.absmax, 64, "nf4", [-1, 6], torch.float32),
    ):
        with pytest.raises(RuntimeError, match=r"^\w+_4bit: "):
            call()
    # What is remembered of them does not leak into a later error of another kind.
    with pytest.raises(ValueError, match="got 48"):
        F.quantize_4bit(X, blocksize=48)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [(96,), (1, 96), (5, 96), (2, 3, 96), (0, 96)], ids=str)
def test_gradients_of_input_and_bias(rows, nested, dtype):
    packed, state = (NESTED_PACKED, NESTED) if nested else (PACKED, STATE)
    dense = F.dequantize_4bit(packed, state).double()
    a = ref.samples(rows, dtype).requires_grad_()
    bias = ref.samples((64,), dtype, 3).requires_grad_()
    g = ref.samples((*rows[:-1], 64), dtype, 4)
    y = matmul_4bit(a, packed, state, bias=bias)
    y.backward(g)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for got, want in (
        (y, a.detach().double() @ dense.t() + bias.detach().double()),
        (a.grad, g.double() @ dense),
        (bias.grad, g.double().reshape(-1, 64).sum(0)),
    ):
        assert got.shape == want.shape
        torch.testing.assert_close(
            got.double(),
            want,
            rtol=tolerance,
            atol=tolerance * max([1.0, *want.abs().flatten().tolist()]),
        )


def test_gradient_of_an_expanded_gradient():
    a = A.clone().requires_grad_()
    matmul_4bit(a, PACKED, STATE).sum().backward()  # stride 0
    torch.testing.assert_close(a.grad, F.dequantize_4bit(PACKED, STATE).sum(0).expand(3, -1))


def test_only_what_needs_a_gradient_gets_one():
    bias = torch.ones(64, requires_grad=True)
    y = matmul_4bit(A, PACKED, STATE, bias=bias)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((64,), 3.0))
    assert not matmul_4bit(A, PACKED, STATE).requires_grad
    with torch.no_grad():
        assert not matmul_4bit(A.clone().requires_grad_(), PACKED, STATE).requires_grad
    with torch.inference_mode():
        y = matmul_4bit(A, PACKED, STATE, bias=bias)
        assert y.is_inference()
        assert torch.equal(matmul_4bit(A * 1, PACKED, STATE, bias=bias), y)


def test_second_derivatives():
    a = A.clone().requires_grad_()
    g = torch.ones(3, 64, requires_grad=True)
    (first,) = torch.autograd.grad(matmul_4bit(a, PACKED, STATE), a, g, create_graph=True)
    first.square().sum().backward()
    dense = F.dequantize_4bit(PACKED, STATE)
    torch.testing.assert_close(g.grad, 2 * (g.detach() @ dense) @ dense.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["matmul_4bit", "gemm_4bit", "gemv_4bit"])
def test_ops_called_directly_differentiate(name):
    arguments = cases(grad=True)[name]
    find(name)(*arguments).sum().backward()
    packed, state = (NESTED_PACKED, NESTED) if name == "gemm_4bit" else (PACKED, STATE)
    dense = F.dequantize_4bit(packed, state)
    torch.testing.assert_close(arguments[0].grad, dense.sum(0).expand(3, -1))
    if name != "gemv_4bit":
        assert torch.equal(arguments[6].grad, torch.full((64,), 3.0))


def test_out_in_training():
    a = A.clone().requires_grad_()
    out = torch.empty(3, 64)
    y = matmul_4bit(a, PACKED, STATE, out=out)
    assert y.data_ptr() == out.data_ptr()
    y.sum().backward()
    assert a.grad is not None


# ---- torch.compile and torch.export --------------------------------------------------------------


def step(a, packed, state, bias):
    y = matmul_4bit(a * 2, packed, state, bias=bias)
    return torch.relu(y) + F.dequantize_4bit(packed, state).sum()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for packed, state in ((PACKED, STATE), (NESTED_PACKED, NESTED)):
        for n in (3, 5):
            results = []
            for function in (step, compiled):
                a = ref.samples((n, 96), seed=n).requires_grad_()
                bias = torch.ones(64, requires_grad=True)
                y = function(a, packed, state, bias)
                y.sum().backward()
                results.append((y.detach(), a.grad, bias.grad))
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(eager, traced)


def test_compiled_quantization():
    torch._dynamo.reset()

    def both(x):
        packed, state = F.quantize_4bit(x + 1, quant_type="nf4", compress_statistics=True)
        q, state8 = F.quantize_blockwise(x, blocksize=64)
        return packed, F.dequantize_4bit(packed, state), F.dequantize_blockwise(q, state8)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for want, got in zip(both(X), compiled(X), strict=True):
        assert torch.equal(want, got)


def test_compiled_code_with_buffers():
    torch._dynamo.reset()

    def into(packed, out):
        out = out.clone()
        F.dequantize_4bit(packed, STATE, out=out)
        return out + 1

    compiled = torch.compile(into, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(PACKED, torch.empty(64, 96)), into(PACKED, torch.empty(64, 96)))


def test_compiled_errors_keep_their_sentence():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda packed: F.dequantize_4bit(packed, STATE), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="packed must hold 3072 bytes"):
        compiled(PACKED[:7])


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.packed = torch.nn.Parameter(PACKED.clone(), requires_grad=False)

    def forward(self, a):
        return matmul_4bit(a, self.packed, STATE) + 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    module = Module()
    rows = torch.export.Dim("rows", min=2, max=100)
    exported = torch.export.export(module, (A,), dynamic_shapes=({0: rows},), strict=strict)
    assert "halfbyte.matmul_4bit" in str(exported.graph)
    for n in (3, 7):
        a = ref.samples((n, 96), seed=n)
        torch.testing.assert_close(exported.module()(a), module(a))


def test_fake_tensors_through_functional():
    with FakeTensorMode():
        x = torch.empty(64, 96)
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        assert packed.shape == (3072, 1)
        assert F.dequantize_4bit(packed, state).shape == (64, 96)
        assert matmul_4bit(torch.empty(2, 3, 96), packed, state).shape == (2, 3, 64)
        q, state = F.quantize_blockwise(x)
        assert F.dequantize_blockwise(q, state).shape == (64, 96)
    # Nothing fake is left behind.
    assert type(F.name2qmap["dynamic"]) is torch.Tensor
    F.quantize_blockwise(X)


# ---- the same bytes for any number of threads ----------------------------------------------------


def test_bytes_do_not_depend_on_threads():
    x = ref.samples((700, 1030))
    a = ref.samples((9, 1030), seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
            q, state8 = F.quantize_blockwise(x, blocksize=64)
            y = matmul_4bit(a, packed, state)
            results.append(
                (
                    packed,
                    *(state.absmax, state.offset, state.state2.absmax),
                    *(q, state8.absmax),
                    F.dequantize_4bit(packed, state),
                    F.dequantize_blockwise(q, state8),
                    y,
                )
            )
            assert _ops.native.num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for i, (want, got) in enumerate(itertools.zip_longest(results[0], other)):
            if i < 8:
                assert torch.equal(want, got)
            else:
                torch.testing.assert_close(want, got, rtol=1e-5, atol=1e-4)
    assert torch.equal(results[0][-1], results[3][-1])


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["packed", "absmax", "code"])
def test_changes_between_forward_and_backward_are_noticed(nested, name):
    packed, state = F.quantize_4bit(ref.samples((64, 96)), compress_statistics=nested)
    state.code = state.code.clone()  # another object: it is passed along
    A = torch.ones(2, 96, requires_grad=True)
    y = matmul_4bit(A, packed, state)
    {"packed": packed, "absmax": state.absmax, "code": state.code}[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("nested", [False, True])
def test_weights_quantized_in_inference_mode_train(nested):
    with torch.inference_mode():
        packed, state = F.quantize_4bit(ref.samples((64, 96)), compress_statistics=nested)
    dense = F.dequantize_4bit(packed, state).clone()
    parts = _functions._weight(packed, state)
    for product in (
        lambda a: matmul_4bit(a, packed, state),
        lambda a: ops.matmul_4bit(a, *parts[:5], None, *parts[5:]),
    ):
        A = torch.ones(2, 96, requires_grad=True)
        product(A).sum().backward()
        assert error(A.grad, dense.sum(0).expand(2, 96)) < 1e-5


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,)])
def test_no_output_features_have_gradients(lead):
    packed, state = F.quantize_4bit(torch.empty(0, 64))
    A = torch.ones(*lead, 64, requires_grad=True)
    bias = torch.empty(0, requires_grad=True)
    y = matmul_4bit(A, packed, state, bias=bias)
    assert y.shape == (*lead, 0)
    y.sum().backward()
    assert torch.equal(A.grad, torch.zeros(*lead, 64))
    assert bias.grad.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1, 64), (64, 1), (63,), (1,)])
@pytest.mark.parametrize("grad", [False, True])
def test_the_shape_of_the_bias_is_checked(dtype, shape, grad):
    A = torch.ones(2, 96, dtype=dtype, requires_grad=grad)
    with pytest.raises(ValueError, match=r"bias must (have shape \[64\]|hold 64 elements), got"):
        matmul_4bit(A, PACKED, STATE, bias=torch.ones(shape))


def test_float64_products_decode_to_float32():
    packed, state = F.quantize_4bit(ref.samples((64, 96), torch.bfloat16))
    exact = F.dequantize_4bit(packed, state, out=torch.empty(64, 96))
    A = ref.samples((3, 96)).double()
    assert torch.equal(matmul_4bit(A, packed, state), A @ exact.double().t())


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(3, 64),
        torch.empty(1, 64, dtype=torch.float64),
        torch.empty(3, 3, 64, dtype=torch.float64),
        torch.empty(3, 64, dtype=torch.float64, device="meta"),
    ],
)
def test_float64_checks_out(out):
    A = ref.samples((3, 96)).double()
    with pytest.raises(ValueError, match=r"out must be torch.float64 of shape \[3, 64\] on cpu"):
        matmul_4bit(A, PACKED, STATE, out=out)
    out = torch.empty(3, 64, dtype=torch.float64)
    assert matmul_4bit(A, PACKED, STATE, out=out) is out
    assert torch.equal(out, matmul_4bit(A, PACKED, STATE))


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_tangents(grad):
    dense = F.dequantize_4bit(PACKED, STATE).float()
    A, dA = ref.samples((3, 96), seed=5), ref.samples((3, 96), seed=6)
    bias, dbias = ref.samples((64,), seed=7), ref.samples((64,), seed=8)
    A.requires_grad_(grad)
    with forward_ad.dual_level():
        dual, dual_bias = forward_ad.make_dual(A, dA), forward_ad.make_dual(bias, dbias)
        for a, b, want in (
            (dual, bias, dA @ dense.t()),
            (A, dual_bias, dbias.expand(3, 64)),
            (dual, dual_bias, dA @ dense.t() + dbias),
        ):
            y, dy = forward_ad.unpack_dual(matmul_4bit(a, PACKED, STATE, bias=b))
            assert error(y.detach(), (A @ dense.t() + bias).detach()) < 1e-5
            assert error(dy, want) < 1e-5
        with pytest.raises(ValueError, match="out cannot be given"):
            matmul_4bit(dual, PACKED, STATE, out=torch.empty(3, 64))
        assert forward_ad.unpack_dual(matmul_4bit(A, PACKED, STATE)).tangent is None
    _, dy = torch.func.jvp(lambda a: matmul_4bit(a, PACKED, STATE), (A.detach(),), (dA,))
    assert error(dy, dA @ dense.t()) < 1e-5
