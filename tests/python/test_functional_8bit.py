"""functional: 8-bit blockwise codes, maps, and the small helpers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import reference as ref
import torch
from halfbyte import functional as F
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("shape", ref.SHAPES, ids=str)
def test_round_trip_is_that_of_the_definition(shape, dtype):
    x = ref.samples(shape, dtype)
    for blocksize in (*ref.BLOCKSIZES, None):
        keywords = {} if blocksize is None else {"blocksize": blocksize}
        q, state = F.quantize_blockwise(x, **keywords)
        blocksize = blocksize or 4096
        want, absmax = ref.encode_8bit(x, blocksize, state.code)
        assert q.dtype == torch.uint8
        assert torch.equal(q, want)
        assert torch.equal(state.absmax, absmax)
        assert (state.shape, state.quant_type, state.dtype) == (None, None, dtype)
        assert (state.blocksize, state.nested) == (blocksize, False)
        decoded = F.dequantize_blockwise(q, state)
        assert decoded.dtype == dtype
        assert torch.equal(decoded, ref.decode_8bit(want, absmax, blocksize, state.code, dtype))


def test_default_code_is_the_signed_dynamic_map():
    q, state = F.quantize_blockwise(ref.samples((300,)))
    assert torch.equal(state.code, ref.dynamic_code())
    assert torch.equal(F.name2qmap["dynamic"], ref.dynamic_code())
    got = F.dequantize_blockwise(q, absmax=state.absmax)
    assert got.dtype == torch.float32
    assert torch.equal(got, F.dequantize_blockwise(q, state))


CUSTOM = {
    "linear": torch.linspace(-1, 1, 256),
    "16 values": ref.NF4,
    "one value": torch.tensor([0.5]),
    "bfloat16": torch.linspace(-1, 1, 128).bfloat16(),
    "below one": torch.linspace(-0.5, 0.5, 200),
    "float64": torch.linspace(-1, 1, 256).double(),
}


@pytest.mark.parametrize("name", list(CUSTOM))
def test_any_ascending_code(name):
    code = CUSTOM[name]
    x = ref.samples((129, 33))
    q, state = F.quantize_blockwise(x, code=code, blocksize=256)
    assert state.code is code
    want, absmax = ref.encode_8bit(x, 256, code.float())
    assert torch.equal(q, want)
    decoded = F.dequantize_blockwise(q, state)
    assert torch.equal(decoded, ref.decode_8bit(want, absmax, 256, code.float(), torch.float32))


@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_nested_scales_use_the_same_block_size(blocksize):
    x = ref.samples((129, 330))
    plain_q, plain = F.quantize_blockwise(x, blocksize=blocksize)
    q, state = F.quantize_blockwise(x, blocksize=blocksize, nested=True)
    assert torch.equal(q, plain_q)
    assert state.nested
    assert state.state2.blocksize == blocksize
    assert torch.equal(state.offset, plain.absmax.double().mean().float())
    codes, absmax2 = ref.encode_8bit(plain.absmax - state.offset, blocksize, ref.dynamic_code())
    assert torch.equal(state.absmax, codes)
    assert torch.equal(state.state2.absmax, absmax2)
    scales = ref.decode_8bit(codes, absmax2, blocksize, ref.dynamic_code(), torch.float32)
    want = ref.decode_8bit(q, scales + state.offset, blocksize, state.code, torch.float32)
    assert torch.equal(F.dequantize_blockwise(q, state), want)


def test_caller_buffers_are_written_and_returned():
    x = ref.samples((64, 96))
    want, wanted = F.quantize_blockwise(x, blocksize=64)
    out, absmax = torch.empty_like(want), torch.empty_like(wanted.absmax)
    q, state = F.quantize_blockwise(x, out=out, absmax=absmax, blocksize=64)
    assert q is out
    assert state.absmax is absmax
    assert torch.equal(out, want)
    assert state == wanted
    strided = torch.zeros(96, 64, dtype=torch.uint8).t()
    F.quantize_blockwise(x, out=strided, blocksize=64)
    assert torch.equal(strided, want)
    codes = torch.empty(96, dtype=torch.uint8)
    _, state = F.quantize_blockwise(x, absmax=codes, blocksize=64, nested=True)
    assert state.absmax is codes
    assert state == F.quantize_blockwise(x, blocksize=64, nested=True)[1]
    for dtype in ref.FLOATS:
        out = torch.empty(64, 96, dtype=dtype)
        assert F.dequantize_blockwise(want, wanted, out=out) is out
        exact = ref.decode_8bit(want, wanted.absmax, 64, wanted.code, dtype)
        assert torch.equal(out, exact)


X = torch.ones(64, 96)
Q = X.byte()
ONES = torch.ones(2)
BAD = [
    ("blocksize 0", lambda: F.quantize_blockwise(X, blocksize=0), ValueError, "got 0"),
    ("blocksize 100", lambda: F.quantize_blockwise(X, blocksize=100), ValueError, "got 100"),
    ("blocksize -1", lambda: F.quantize_blockwise(X, blocksize=-1), ValueError, "got -1"),
    ("float64", lambda: F.quantize_blockwise(X.double()), ValueError, "A must be.*got float64"),
    ("int8", lambda: F.quantize_blockwise(X.char()), ValueError, "got int8"),
    (
        "descending code",
        lambda: F.quantize_blockwise(X, code=torch.tensor([1.0, 0.5])),
        ValueError,
        "ascending order, but entry 1 is 0.5 after 1",
    ),
    (
        "nan code",
        lambda: F.quantize_blockwise(X, code=torch.full((256,), float("nan"))),
        ValueError,
        "finite values",
    ),
    (
        "long code",
        lambda: F.quantize_blockwise(X, code=torch.linspace(0, 1, 257)),
        ValueError,
        "1 to 256 values, got 257",
    ),
    (
        "empty code",
        lambda: F.quantize_blockwise(X, code=torch.empty(0)),
        ValueError,
        "1 to 256 values, got 0",
    ),
    ("out shape", lambda: F.quantize_blockwise(X, out=Q[:3]), ValueError, r"shape \[64, 96\]"),
    ("out dtype", lambda: F.quantize_blockwise(X, out=X.clone()), ValueError, "out must be"),
    ("absmax", lambda: F.quantize_blockwise(X, absmax=X), ValueError, r"absmax must be .* \[2\]"),
    ("nothing", lambda: F.dequantize_blockwise(Q), ValueError, "quant_state or absmax"),
    ("A float", lambda: F.dequantize_blockwise(X, absmax=ONES), ValueError, "A must be uint8"),
    ("A int8", lambda: F.dequantize_blockwise(X.char(), absmax=ONES), ValueError, "torch.int8"),
    (
        "short absmax",
        lambda: F.dequantize_blockwise(Q, absmax=torch.ones(1)),
        ValueError,
        "absmax must hold 2 float32 scales, got 1",
    ),
    (
        "blocksize",
        lambda: F.dequantize_blockwise(Q, absmax=ONES, blocksize=7),
        ValueError,
        "got 7",
    ),
    (
        "out",
        lambda: F.dequantize_blockwise(Q, absmax=ONES, out=X[:3]),
        ValueError,
        r"out must have shape \[64, 96\], got \[3, 96\]",
    ),
    (
        "out int",
        lambda: F.dequantize_blockwise(Q, absmax=ONES, out=X.int()),
        ValueError,
        "got int32",
    ),
    ("type xx", lambda: F.get_4bit_type("xx"), NotImplementedError, "'xx'"),
    ("devices", lambda: F.is_on_gpu([X, X.to("meta")]), RuntimeError, "cpu, meta"),
]


@pytest.mark.parametrize(("what", "call", "exception", "message"), BAD, ids=[b[0] for b in BAD])
def test_bad_input(what, call, exception, message):
    with pytest.raises(exception, match=message) as caught:
        call()
    assert type(caught.value) is exception


# ---- codes ---------------------------------------------------------------------------------------


def test_4bit_types():
    golden = load_file(GOLDEN / "codes.safetensors")
    for name in ("nf4", "fp4", "af4"):
        code = F.get_4bit_type(name)
        assert code.dtype == torch.float32
        assert torch.equal(code, golden[f"codes/{name}/code"])
    assert F.get_4bit_type("nf4", device="meta").device.type == "meta"


def golden_maps():
    for name in load_file(GOLDEN / "codes.safetensors"):
        kind = name.split("/")[1].partition("-")[0]
        if kind in ("dynamic", "linear", "normal", "fp8"):
            yield name.split("/")[1]


def make_map(name: str) -> torch.Tensor:
    """Reads a golden name such as ``fp8-signed-e4m3-b8`` or ``linear-signed-b5-no-zero``."""
    kind, *rest = name.split("-")
    options = dict.fromkeys(rest, True)
    numbers = {part[0]: int(part[1:]) for part in rest if part[0] in "eb" and part[1:].isdigit()}
    signed = "unsigned" not in options
    if kind == "dynamic":
        return F.create_dynamic_map(signed, numbers.get("e", 7), numbers.get("b", 8))
    if kind == "linear":
        return F.create_linear_map(signed, numbers["b"], add_zero="zero" not in options)
    if kind == "normal":
        offset = 0.99 if "0.99" in options else 0.9677083
        return F.create_normal_map(offset, use_extra_value="extra" not in options)
    e, m = (int(digit) for digit in rest[1][1:].split("m"))
    return F.create_fp8_map(signed, e, m, numbers["b"])


@pytest.mark.parametrize("name", list(golden_maps()))
def test_maps_equal_the_golden_ones_bit_for_bit(name):
    golden = load_file(GOLDEN / "codes.safetensors")[f"codes/{name}/code"]
    assert torch.equal(make_map(name).view(torch.int32), golden.view(torch.int32))


def test_maps_refuse_bits_that_do_not_fit():
    with pytest.raises(AssertionError, match="5 \\+ 5 \\+ 1 for 8"):
        F.create_fp8_map(True, 5, 5, 8)
    for call in (
        lambda: F.create_dynamic_map(True, 7, 9),
        lambda: F.create_dynamic_map(False, 99, 8),
        lambda: F.create_linear_map(True, 9),
        lambda: F.create_linear_map(True, 0),
        lambda: F.create_normal_map(0.5),
        lambda: F.create_normal_map(1.5),
        lambda: F.create_fp8_map(True, 4, 4, 9),
    ):
        with pytest.raises(ValueError, match="must"):
            call()


# ---- helpers -------------------------------------------------------------------------------------


def test_pointers_and_devices():
    x = torch.ones(3)
    assert F.get_ptr(None) is None
    pointer = F.get_ptr(x)
    assert isinstance(pointer, ctypes.c_void_p)
    assert pointer.value == x.data_ptr()
    assert F.is_on_gpu([x, None, x]) is True
    assert F.is_on_gpu([]) is True


def test_the_library_handle():
    assert isinstance(F.lib.compiled_with_cuda, bool)
    symbol = F.lib.cdequantize_blockwise_fp32
    symbol.restype = None
    assert F.lib.cdequantize_blockwise_fp32 is symbol
    assert F.lib["cgemm_4bit_inference_naive_fp16"].__name__ == "cgemm_4bit_inference_naive_fp16"
    with pytest.raises(RuntimeError, match=r"cdequantize_blockwise_fp32: .*48"):
        symbol(None, None, None, None, 48, 2, None)
    with pytest.raises(RuntimeError, match="code must hold 256 elements, got a null pointer"):
        symbol(None, None, None, None, 64, 2, None)
    with pytest.raises(TypeError):
        symbol(1, 2)
    with pytest.raises(RuntimeError, match="'cadam32bit_grad_fp32' is not here: expected one of"):
        F.lib.cadam32bit_grad_fp32(1)
    with pytest.raises(AttributeError):
        _ = F.lib.__wrapped__
