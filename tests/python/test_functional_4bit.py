"""functional: 4-bit codes, scales, layouts, buffers, products."""

from __future__ import annotations

import itertools
import warnings

import pytest
import reference as ref
import torch
from halfbyte import functional as F
from halfbyte import matmul_4bit


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("shape", ref.SHAPES, ids=str)
def test_quantize_gives_the_bytes_of_the_definition(shape, dtype):
    x = ref.samples(shape, dtype)
    for blocksize, quant_type in itertools.product(ref.BLOCKSIZES, ref.TYPES):
        packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        want, absmax = ref.encode_4bit(x, blocksize, quant_type)
        assert packed.shape == ((x.numel() + 1) // 2, 1)
        assert packed.dtype == torch.uint8
        assert torch.equal(packed.reshape(-1), want)
        assert torch.equal(state.absmax, absmax)
        assert (state.shape, state.dtype, state.blocksize) == (x.shape, dtype, blocksize)
        assert (state.quant_type, state.nested) == (quant_type, False)
        assert torch.equal(state.code, ref.CODES[quant_type])


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("shape", ref.SHAPES, ids=str)
def test_dequantize_gives_the_shape_and_values_of_the_definition(shape, dtype):
    x = ref.samples(shape, dtype)
    for blocksize, quant_type in itertools.product((32, 64, 4096), ref.TYPES):
        packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        want = ref.decode_4bit(
            packed.reshape(-1), state.absmax, blocksize, ref.CODES[quant_type], shape, dtype
        )
        got = F.dequantize_4bit(packed, state)
        assert got.shape == x.shape
        assert got.dtype == dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("storage", ref.STORAGES, ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (5, 5), (7,), (1,), (3, 5, 7), (0, 4)], ids=str)
def test_storage_is_the_same_bytes_zero_padded(shape, storage):
    x = ref.samples(shape)
    plain, state = F.quantize_4bit(x, quant_type="nf4")
    packed, other = F.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
    units = -(-plain.numel() // storage.itemsize)
    assert packed.shape == (units, 1)
    assert packed.dtype == storage
    expected = torch.zeros(units * storage.itemsize, dtype=torch.uint8)
    expected[: plain.numel()] = plain.reshape(-1)
    assert torch.equal(ref.raw(packed), expected)
    assert torch.equal(F.dequantize_4bit(packed, other), F.dequantize_4bit(plain, state))


@pytest.mark.parametrize("quant_type", ref.TYPES)
@pytest.mark.parametrize("shape", [(64, 96), (129, 33), (257, 300), (7,), (0,)], ids=str)
def test_double_quantization(shape, quant_type):
    x = ref.samples(shape)
    plain_packed, plain = F.quantize_4bit(x, quant_type=quant_type)
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
    assert torch.equal(packed, plain_packed)
    assert state.nested
    assert state.absmax.dtype == torch.uint8
    assert state.offset.shape == ()
    mean = plain.absmax.double().mean().float() if plain.absmax.numel() else torch.zeros(())
    assert torch.equal(state.offset, mean)
    second = state.state2
    assert (second.blocksize, second.dtype, second.nested) == (256, torch.float32, False)
    assert torch.equal(second.code, ref.dynamic_code())
    codes, absmax2 = ref.encode_8bit(plain.absmax - mean, 256, second.code)
    assert torch.equal(state.absmax, codes)
    assert torch.equal(second.absmax, absmax2)
    scales = ref.decode_8bit(codes, absmax2, 256, second.code, torch.float32) + mean
    want = ref.decode_4bit(
        packed.reshape(-1), scales, 64, ref.CODES[quant_type], shape, torch.float32
    )
    assert torch.equal(F.dequantize_4bit(packed, state), want)


def test_aliases_name_the_type():
    x = ref.samples((64, 96))
    for quant_type, quantize, dequantize in (
        ("nf4", F.quantize_nf4, F.dequantize_nf4),
        ("fp4", F.quantize_fp4, F.dequantize_fp4),
    ):
        packed, state = quantize(x, compress_statistics=True, quant_storage=torch.bfloat16)
        want, wanted = F.quantize_4bit(
            x,
            quant_type=quant_type,
            compress_statistics=True,
            quant_storage=torch.bfloat16,
        )
        assert torch.equal(ref.raw(packed), ref.raw(want))
        assert state == wanted
        assert torch.equal(dequantize(packed, state), F.dequantize_4bit(want, wanted))
    assert F.quantize_4bit(x)[1].quant_type == "fp4"


def test_ties_and_zeros_go_where_numerics_says():
    borders = ((ref.NF4[:-1] + ref.NF4[1:]) * 0.5).tolist()
    packed, _ = F.quantize_4bit(torch.tensor([1.0, *borders]), quant_type="nf4")
    codes = torch.stack((packed >> 4, packed & 15), -1).reshape(-1)
    assert codes.tolist() == [15, *range(15)]
    packed, _ = F.quantize_4bit(torch.tensor([1.0, -1e-9, 0.0, -5 / 12]), quant_type="fp4")
    assert torch.stack((packed >> 4, packed & 15), -1).reshape(-1).tolist() == [3, 8, 0, 12]
    packed, state = F.quantize_4bit(torch.zeros(3), quant_type="nf4")
    assert packed.reshape(-1).tolist() == [0x77, 0x77]
    assert state.absmax.tolist() == [0.0]


def test_non_finite_input_is_carried_by_the_scale():
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(130)
        x[70] = bad
        packed, state = F.quantize_4bit(x, quant_type="nf4")
        assert packed.numel() == 65
        assert torch.equal(state.absmax[[0, 2]], torch.ones(2))
        assert not torch.isfinite(state.absmax[1])
        F.dequantize_4bit(packed, state)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in memory orders that are not contiguous."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] * 2, dtype=x.dtype)
    wide[..., ::2] = x
    offset = torch.zeros(x.numel() + 3, dtype=x.dtype)
    offset[3:] = x.reshape(-1)
    return {
        "transposed": x.t().contiguous().t(),
        "strided": wide[..., ::2],
        "offset": offset[3:].reshape(x.shape),
        "expanded": x[:1].expand(x.shape),
    }


@pytest.mark.parametrize("name", ["transposed", "strided", "offset", "expanded"])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_any_memory_layout_is_read_rightly(name, dtype):
    x = layouts(ref.samples((48, 66), dtype))[name]
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    want, wanted = F.quantize_4bit(x.contiguous(), quant_type="nf4")
    assert torch.equal(packed, want)
    assert state == wanted
    q8, state8 = F.quantize_blockwise(x, blocksize=64)
    assert torch.equal(q8, F.quantize_blockwise(x.contiguous(), blocksize=64)[0])
    decoded = F.dequantize_blockwise(q8, state8)

    def strided(t: torch.Tensor) -> torch.Tensor:
        return torch.stack((t, t), -1)[..., 0]

    state.absmax, state.code = strided(state.absmax), strided(state.code)
    dense = F.dequantize_4bit(want, wanted)
    assert torch.equal(F.dequantize_4bit(strided(packed), state), dense)
    state8.absmax, state8.code = strided(state8.absmax), strided(state8.code)
    assert torch.equal(F.dequantize_blockwise(strided(q8), state8), decoded)
    a = strided(ref.samples((3, 66), dtype))
    assert torch.equal(
        matmul_4bit(a, strided(packed), state), matmul_4bit(a.contiguous(), want, wanted)
    )


def test_misaligned_memory_is_read_rightly():
    raw = bytearray(4 * 64 + 1)
    x = torch.frombuffer(raw, dtype=torch.float32, offset=1, count=64)
    x.copy_(ref.samples((64,)))
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    assert torch.equal(packed, F.quantize_4bit(x.clone(), quant_type="nf4")[0])
    out = torch.frombuffer(bytearray(4 * 64 + 1), dtype=torch.float32, offset=1, count=64)
    F.dequantize_4bit(packed, state, out=out)
    assert torch.equal(out, F.dequantize_4bit(packed, state))


def test_transposed_packed_gives_the_transposed_weight():
    x = ref.samples((64, 96))
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    dense = F.dequantize_4bit(packed, state)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), dense.t())
    # One storage element is its own transpose.
    tiny, state = F.quantize_4bit(torch.tensor([[1.0], [0.5]]), quant_type="nf4")
    assert F.dequantize_4bit(tiny, state).shape == (2, 1)


def test_caller_buffers_are_written_and_returned():
    x = ref.samples((64, 96))
    want, wanted = F.quantize_4bit(x, quant_type="nf4", blocksize=128)
    out, absmax = torch.empty_like(want), torch.empty_like(wanted.absmax)
    packed, state = F.quantize_4bit(x, absmax=absmax, out=out, blocksize=128, quant_type="nf4")
    assert packed is out
    assert state.absmax is absmax
    assert torch.equal(out, want)
    assert state == wanted

    half = torch.empty(1536, 1, dtype=torch.bfloat16)
    packed, _ = F.quantize_4bit(
        x, out=half, blocksize=128, quant_type="nf4", quant_storage=torch.bfloat16
    )
    assert packed is half
    assert torch.equal(ref.raw(half), want.reshape(-1))

    spread = torch.zeros(3072, 2, dtype=torch.uint8)[:, :1]
    F.quantize_4bit(x, out=spread, blocksize=128, quant_type="nf4")
    assert torch.equal(spread, want)

    codes = torch.empty(48, dtype=torch.uint8)
    _, state = F.quantize_4bit(
        x, absmax=codes, blocksize=128, quant_type="nf4", compress_statistics=True
    )
    assert state.absmax is codes
    assert state == F.quantize_4bit(x, None, None, 128, True, "nf4")[1]

    for dtype in ref.FLOATS:
        out = torch.empty(64, 96, dtype=dtype)
        got = F.dequantize_4bit(want, wanted, out=out)
        assert got is out
        assert torch.equal(
            out,
            ref.decode_4bit(want.reshape(-1), wanted.absmax, 128, ref.NF4, (64, 96), dtype),
        )
    transposed = torch.empty(96, 64).t()
    F.dequantize_4bit(want, wanted, out=transposed)
    assert torch.equal(transposed, F.dequantize_4bit(want, wanted))

    out = torch.empty(64, 96)
    F.dequantize_4bit(want, absmax=wanted.absmax, out=out, blocksize=128, quant_type="nf4")
    assert torch.equal(out, F.dequantize_4bit(want, wanted))
    fp4, state = F.quantize_4bit(x)
    F.dequantize_4bit(fp4, absmax=state.absmax, out=out)
    assert torch.equal(out, F.dequantize_4bit(fp4, state))


def test_a_changed_state_is_honoured_by_the_next_call():
    x = ref.samples((64, 96))
    packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    dense = F.dequantize_4bit(packed, state)
    # As vLLM does: unnest by hand.
    state.absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.offset, state.state2 = False, None, None
    assert torch.equal(F.dequantize_4bit(packed, state), dense)
    state.absmax = state.absmax * 2
    assert torch.equal(F.dequantize_4bit(packed, state), dense * 2)
    state.dtype = torch.bfloat16
    assert torch.equal(F.dequantize_4bit(packed, state), (dense * 2).bfloat16())
    state.shape = (96, 64)
    assert F.dequantize_4bit(packed, state).shape == (96, 64)
    state.code = -state.code
    assert torch.equal(F.dequantize_4bit(packed, state), -(dense * 2).bfloat16().reshape(96, 64))
    a = ref.samples((2, 64))
    want = a @ F.dequantize_4bit(packed, state).float().t()
    torch.testing.assert_close(matmul_4bit(a, packed, state), want, atol=0.5, rtol=0.02)
    state.code = None
    assert torch.equal(F.dequantize_4bit(packed, state), (dense * 2).bfloat16().reshape(96, 64))


@pytest.mark.parametrize("shape", [(64,), (64, 96), (3, 5, 7)], ids=str)
def test_autograd_does_not_see_quantization(shape):
    x = ref.samples(shape).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        q8, state8 = F.quantize_blockwise(x, blocksize=64)
        dense = F.dequantize_4bit(packed, state)
    assert not packed.requires_grad
    assert not state.absmax.requires_grad
    assert not state8.absmax.requires_grad
    assert not q8.requires_grad
    assert not dense.requires_grad


# ---- products ------------------------------------------------------------------------------------

ROWS = [(96,), (1, 96), (3, 96), (2, 3, 96), (0, 96), (17, 96), (1, 1, 1, 96)]
# Of the largest result: sums in float32, rounded once.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
        assert error <= TOLERANCE[got.dtype]


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_matmul(rows, dtype, nested):
    for quant_type, storage in itertools.product(ref.TYPES, (torch.uint8, torch.bfloat16)):
        weight, state = F.quantize_4bit(
            ref.samples((65, 96)),
            quant_type=quant_type,
            compress_statistics=nested,
            quant_storage=storage,
        )
        dense = F.dequantize_4bit(weight, state).double()
        a, bias = ref.samples(rows, dtype, 1), ref.samples((65,), dtype, 2)
        close(matmul_4bit(a, weight, state), a.double() @ dense.t())
        close(matmul_4bit(a, weight.t(), state, bias=bias), a.double() @ dense.t() + bias.double())
        out = torch.empty(*rows[:-1], 65, dtype=dtype)
        assert matmul_4bit(a, weight, state, out=out) is out
        assert torch.equal(out, matmul_4bit(a, weight, state))
        assert torch.equal(F.gemv_4bit(a, weight.t(), state=state), out)
        assert F.gemv_4bit(a, weight, state=state, out=torch.zeros_like(out)).equal(out)


@pytest.mark.parametrize("shape", [(7, 100), (1, 1), (5, 31), (64, 1), (1, 64), (3, 4099)], ids=str)
def test_matmul_with_odd_weights(shape):
    weight, state = F.quantize_4bit(ref.samples(shape), quant_type="nf4")
    dense = F.dequantize_4bit(weight, state).double()
    for n in (1, 2, 5, 33):
        a = ref.samples((n, shape[1]), seed=n)
        close(matmul_4bit(a, weight, state), a.double() @ dense.t())


def test_matmul_with_empty_weights():
    weight, state = F.quantize_4bit(torch.empty(0, 8))
    assert matmul_4bit(torch.ones(3, 8), weight, state).shape == (3, 0)
    weight, state = F.quantize_4bit(torch.empty(8, 0))
    assert torch.equal(matmul_4bit(torch.ones(3, 0), weight, state), torch.zeros(3, 8))


def test_matmul_in_float64_and_with_a_bias_of_another_dtype():
    weight, state = F.quantize_4bit(ref.samples((65, 96)), quant_type="nf4")
    dense = F.dequantize_4bit(weight, state)
    a, bias = ref.samples((3, 96)).double(), ref.samples((65,), seed=1)
    want = a @ dense.double().t() + bias
    assert matmul_4bit(a, weight, state, bias=bias).dtype == torch.float64
    torch.testing.assert_close(matmul_4bit(a, weight.t(), state, bias=bias), want)
    got = matmul_4bit(a.bfloat16(), weight, state, bias=bias)
    close(got, a.bfloat16().double() @ dense.double().t() + bias.bfloat16())


def test_a_weight_of_the_legacy_orientation_warns_and_works():
    weight, state = F.quantize_4bit(ref.samples((96, 64)), quant_type="nf4")
    dense = F.dequantize_4bit(weight, state)
    a = ref.samples((3, 96)).requires_grad_()
    with pytest.warns(DeprecationWarning, match="out_features, in_features"):
        y = matmul_4bit(a, weight, state, bias=torch.ones(64))
    torch.testing.assert_close(y, a @ dense + 1, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(a.grad, dense.sum(1).expand(3, -1), rtol=1e-4, atol=1e-4)


# ---- bad input -----------------------------------------------------------------------------------


def weight_and_state(**changes):
    packed, state = F.quantize_4bit(
        ref.samples((64, 96)), quant_type="nf4", compress_statistics=True
    )
    for name, value in changes.items():
        owner, _, attribute = name.rpartition("__")
        setattr(state.state2 if owner else state, attribute, value)
    return packed, state


X = torch.ones(64, 96)
BYTES = torch.zeros(3072, 1, dtype=torch.uint8)

BAD = [
    # what, call, exception, a part of the message
    ("blocksize 48", lambda: F.quantize_4bit(X, blocksize=48), ValueError, "got 48"),
    ("blocksize 0", lambda: F.quantize_4bit(X, blocksize=0), ValueError, "got 0"),
    ("blocksize -64", lambda: F.quantize_4bit(X, blocksize=-64), ValueError, "got -64"),
    ("blocksize 8192", lambda: F.quantize_4bit(X, blocksize=8192), ValueError, "4096, got 8192"),
    ("blocksize '64'", lambda: F.quantize_4bit(X, blocksize="64"), TypeError, "blocksize"),
    ("type", lambda: F.quantize_4bit(X, quant_type="af4"), ValueError, 'got "af4"'),
    ("type int", lambda: F.quantize_4bit(X, quant_type=4), TypeError, "quant_type"),
    ("float64", lambda: F.quantize_4bit(X.double()), ValueError, "A must be float32.*float64"),
    ("int32", lambda: F.quantize_4bit(X.int()), ValueError, "A must be float32.*int32"),
    ("complex", lambda: F.quantize_4bit(X.cfloat()), TypeError, "not supported"),
    ("storage", lambda: F.quantize_4bit(X, quant_storage=torch.bool), ValueError, "got bool"),
    ("storage c", lambda: F.quantize_4bit(X, quant_storage=torch.cfloat), ValueError, "must be"),
    ("storage s", lambda: F.quantize_4bit(X, quant_storage="uint8"), TypeError, "quant_storage"),
    ("sparse", lambda: F.quantize_4bit(X.to_sparse()), NotImplementedError, "dense"),
    ("out shape", lambda: F.quantize_4bit(X, out=BYTES[:7]), ValueError, r"out must be .*3072, 1"),
    ("out dtype", lambda: F.quantize_4bit(X, out=BYTES.float()), ValueError, "got torch.float32"),
    ("absmax shape", lambda: F.quantize_4bit(X, absmax=X), ValueError, r"shape \[96\]"),
    ("no scales", lambda: F.dequantize_4bit(BYTES), ValueError, "requires both absmax and out"),
    (
        "no out",
        lambda: F.dequantize_4bit(BYTES, absmax=torch.ones(96)),
        ValueError,
        "requires both absmax and out",
    ),
    (
        "no state, blocksize",
        lambda: F.dequantize_4bit(BYTES, absmax=torch.ones(96), out=X.clone(), blocksize=48),
        ValueError,
        "got 48",
    ),
    (
        "short packed",
        lambda: F.dequantize_4bit(BYTES[:100], weight_and_state()[1]),
        ValueError,
        "packed must hold 3072 bytes for 6144 elements, got 100",
    ),
    (
        "long packed",
        lambda: F.dequantize_4bit(torch.cat((BYTES, BYTES)), weight_and_state()[1]),
        ValueError,
        "got 6144",
    ),
    (
        "short absmax",
        lambda: F.dequantize_4bit(*weight_and_state(absmax=torch.ones(5).byte())),
        ValueError,
        "absmax must hold 96 8-bit scales, got 5",
    ),
    (
        "plain absmax in a nested state",
        lambda: F.dequantize_4bit(*weight_and_state(absmax=torch.ones(96))),
        TypeError,
        "absmax must be uint8, got float32",
    ),
    (
        "short absmax2",
        lambda: F.dequantize_4bit(*weight_and_state(state2__absmax=torch.ones(0))),
        ValueError,
        "absmax2 must hold 1",
    ),
    (
        "short code2",
        lambda: F.dequantize_4bit(*weight_and_state(state2__code=torch.ones(16))),
        ValueError,
        "code2 must hold 256 values, got 16",
    ),
    (
        "bad blocksize2",
        lambda: F.dequantize_4bit(*weight_and_state(state2__blocksize=7)),
        ValueError,
        "got 7",
    ),
    (
        "offset",
        lambda: F.dequantize_4bit(*weight_and_state(offset=torch.ones(2))),
        ValueError,
        "offset must hold one value, got 2",
    ),
    (
        "nested without state2",
        lambda: F.dequantize_4bit(*weight_and_state(state2=None)),
        ValueError,
        "needs offset and state2",
    ),
    (
        "code",
        lambda: F.dequantize_4bit(*weight_and_state(code=torch.ones(15))),
        ValueError,
        "code must hold 16 values, got 15",
    ),
    (
        "shape product",
        lambda: F.dequantize_4bit(*weight_and_state(shape=(64, 97))),
        ValueError,
        "packed must hold 3104 bytes",
    ),
    (
        "negative shape",
        lambda: F.dequantize_4bit(*weight_and_state(shape=(-64, -96))),
        ValueError,
        r"got \[-64, -96\]",
    ),
    (
        "overflowing shape",
        lambda: F.dequantize_4bit(*weight_and_state(shape=(2**62, 2**62))),
        ValueError,
        "shape must be",
    ),
    (
        "overflow to zero",
        lambda: F.dequantize_4bit(*weight_and_state(shape=(2**32, 2**32))),
        ValueError,
        "shape must be",
    ),
    (
        "shape None",
        lambda: F.dequantize_4bit(*weight_and_state(shape=None)),
        TypeError,
        "shape",
    ),
    (
        "state dtype",
        lambda: F.dequantize_4bit(*weight_and_state(dtype=torch.int32)),
        ValueError,
        "dtype must be float32, float16 or bfloat16, got int32",
    ),
    (
        "state blocksize",
        lambda: F.dequantize_4bit(*weight_and_state(blocksize=48)),
        ValueError,
        "got 48",
    ),
    (
        "out of another shape",
        lambda: F.dequantize_4bit(*weight_and_state(), out=torch.empty(96, 64)),
        ValueError,
        r"out must have shape \[64, 96\], got \[96, 64\]",
    ),
    (
        "out of int",
        lambda: F.dequantize_4bit(*weight_and_state(), out=torch.empty(64, 96).int()),
        ValueError,
        "got int32",
    ),
    ("no tensor", lambda: F.dequantize_4bit("A", weight_and_state()[1]), TypeError, "'A'"),
    ("matmul None", lambda: matmul_4bit(X, BYTES, None), ValueError, "quant_state is required"),
    (
        "matmul columns",
        lambda: matmul_4bit(torch.ones(3, 95), *weight_and_state()),
        ValueError,
        r"last dimension of A must be 96.*got A of shape \[3, 95\]",
    ),
    (
        "matmul 0-d",
        lambda: matmul_4bit(torch.ones(()), *weight_and_state()),
        ValueError,
        "at least one dimension",
    ),
    (
        "matmul int",
        lambda: matmul_4bit(torch.ones(3, 96).int(), *weight_and_state()),
        TypeError,
        "floating-point",
    ),
    (
        "matmul 3-D weight",
        lambda: matmul_4bit(torch.ones(3, 96), *weight_and_state(shape=(8, 8, 96))),
        ValueError,
        r"must be \[out_features, in_features\]",
    ),
    (
        "matmul bias",
        lambda: matmul_4bit(torch.ones(3, 96), *weight_and_state(), bias=torch.ones(3)),
        ValueError,
        "bias must hold 64 elements, got 3",
    ),
    (
        "matmul out",
        lambda: matmul_4bit(torch.ones(3, 96), *weight_and_state(), out=torch.ones(3, 3)),
        ValueError,
        r"out must have shape \[3, 64\]",
    ),
    (
        "matmul out dtype",
        lambda: matmul_4bit(
            torch.ones(3, 96), *weight_and_state(), out=torch.ones(3, 64).bfloat16()
        ),
        TypeError,
        "out must be float32, got bfloat16",
    ),
    ("gemv", lambda: F.gemv_4bit(X, BYTES), ValueError, "requires the state"),
]


@pytest.mark.parametrize(("what", "call", "exception", "message"), BAD, ids=[b[0] for b in BAD])
def test_bad_input(what, call, exception, message):
    with pytest.raises(exception, match=message) as caught:
        call()
    assert type(caught.value) is exception


def test_memory_that_is_gone_is_an_error():
    packed, state = weight_and_state()
    packed.untyped_storage().resize_(0)  # as FSDP frees a shard
    with pytest.raises(ValueError, match="storage holds 0"):
        F.dequantize_4bit(packed, state)
    x = torch.ones(64, 96)
    x.untyped_storage().resize_(100)
    y = torch.ones(64, 96).t()
    y.untyped_storage().resize_(100)
    for broken in (x, y):
        with pytest.raises(ValueError, match="storage holds 100"):
            F.quantize_4bit(broken)


def test_overlapping_buffers_are_refused():
    buffer = torch.zeros(64 * 96)
    packed, state = F.quantize_4bit(ref.samples((64, 96)), quant_type="nf4")
    view = buffer.view(torch.uint8)[: packed.numel()].view_as(packed).copy_(packed)
    with pytest.raises(ValueError, match="out must not overlap packed"):
        F.dequantize_4bit(view, state, out=buffer.view(64, 96))


def test_devices_do_not_mix():
    packed, state = weight_and_state()
    state.to("meta")
    with pytest.raises((ValueError, RuntimeError), match="same device"):
        F.dequantize_4bit(packed, state)
    packed, state = F.quantize_4bit(torch.empty(64, 96, device="meta"), quant_type="nf4")
    assert packed.device.type == "meta"
    assert packed.shape == (3072, 1)
    assert state.absmax.shape == (96,)
    assert F.dequantize_4bit(packed, state).shape == (64, 96)
    assert matmul_4bit(torch.empty(3, 96, device="meta"), packed, state).shape == (3, 64)
    with pytest.raises((ValueError, RuntimeError), match="same device"):
        matmul_4bit(torch.ones(3, 96), packed, state)
