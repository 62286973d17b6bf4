"""Layers of experts, and experts of other modules, with 4-bit and 8-bit weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from halfbyte.functional import (
    dequantize_4bit,
    experts_matmul_4bit,
    experts_matmul_8bit,
    quantize_4bit,
)
from halfbyte.nn import Experts4bit, Experts8bit, Params4bit
from halfbyte.nn.experts import (
    dequantize_parameters,
    experts_matmul,
    quantize_experts_4bit,
    quantize_experts_8bit,
    replace_experts_4bit,
    replace_experts_8bit,
)
from halfbyte.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from reference import DEVICE
from torch import nn
from torch.nn.utils import parametrize as P

WHOLE, RAGGED = (4, 24, 64), (3, 5, 7)  # blocks of 64: whole experts, and padded ones
SHAPES = [WHOLE, RAGGED, (1, 1, 1), (5, 3, 70), (2, 33, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def weight(shape=WHOLE, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape).to(dtype)


def route(shape, tokens=9, k=2, none=True, seed=1):
    """Ids of all experts and, with ``none``, some that say "no expert"."""
    torch.manual_seed(seed)
    return torch.randint(0, shape[0] + int(none), (tokens, k))


def product(x, decoded, ids, bias=None):
    """The definition, in float64, one row at a time."""
    experts, out, _ = decoded.shape
    result = torch.zeros(*ids.shape, out, dtype=torch.float64)
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            if e < experts:
                row = x[t] if x.dim() == 2 else x[t, j]
                result[t, j] = decoded[e].double() @ row.double()
                if bias is not None:
                    result[t, j] += bias[e].double()
    return result


def close(got, expected, dtype=torch.float32):
    scale = expected.abs().max().item() if expected.numel() else 0.0
    tolerance = 4 * ROUNDING[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * scale)


def raw(tensor):
    return tensor.detach().as_subclass(torch.Tensor).contiguous().reshape(-1).view(torch.uint8)


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(raw(a[key]), raw(b[key])) for key in a)


# ---- 4-bit layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_forward_is_the_product_with_the_decoded_weight(shape, nested, quant_type):
    layer = Experts4bit.from_float(
        weight(shape), compress_statistics=nested, quant_type=quant_type, blocksize=64
    )
    decoded = layer.dequantize()
    assert decoded.shape == shape
    assert decoded.dtype == torch.float32
    ids = route(shape)
    for x in (torch.randn(9, shape[2]), torch.randn(9, 2, shape[2])):
        got = layer(x, ids)
        assert got.shape == (9, 2, shape[1])
        close(got, product(x, decoded, ids))
        assert (got[ids == shape[0]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_bias(dtype):
    bias = torch.randn(4, 24)
    layer = Experts4bit.from_float(weight(dtype=dtype), bias)
    assert layer.dequantize().dtype == dtype
    ids = route(WHOLE, none=False)
    x = torch.randn(9, 64).to(dtype)
    got = layer(x, ids)
    assert got.dtype == dtype
    decoded = dequantize_4bit(layer.weight.data, layer.quant_state, out=torch.empty(WHOLE))
    close(got, product(x, decoded, ids, bias.to(dtype)), dtype)


def test_error_of_quantization_is_that_of_the_format():
    original = weight((2, 64, 64))
    error = (Experts4bit.from_float(original).dequantize() - original).square().mean().sqrt()
    assert error < 0.1  # of values with a deviation of one; NF4 at blocks of 64 has 0.092


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "row each"])
@pytest.mark.parametrize("shape", [WHOLE, RAGGED], ids=str)
def test_gradients_are_those_of_the_decoded_weight(shape, shared):
    layer = Experts4bit.from_float(weight(shape), torch.randn(shape[:2]))
    ids = route(shape)
    x = torch.randn((9, shape[2]) if shared else (9, 2, shape[2]))
    upstream = torch.randn(9, 2, shape[1])
    mine = x.clone().requires_grad_()
    layer(mine, ids).backward(upstream)
    rows = x.unsqueeze(1).expand(9, 2, shape[2]) if shared else x
    rows, theirs = rows.double(), x.double().requires_grad_()
    rows = theirs.unsqueeze(1).expand(9, 2, shape[2]) if shared else theirs
    zero = torch.zeros(1, *shape[1:], dtype=torch.float64)
    table = torch.cat([layer.dequantize().double(), zero])
    bias = layer.bias.detach().double().requires_grad_()
    padded = torch.cat([bias, torch.zeros(1, shape[1], dtype=torch.float64)])
    result = torch.einsum("tki,tkoi->tko", rows, table[ids]) + padded[ids]
    result.backward(upstream.double())
    close(mine.grad, theirs.grad)
    close(layer.bias.grad, bias.grad)
    assert layer.weight.grad is None


def test_no_tokens_and_one_expert_for_all():
    layer = Experts4bit.from_float(weight())
    empty = layer(torch.randn(0, 64), torch.empty(0, 2, dtype=torch.int64))
    assert empty.shape == (0, 2, 24)
    x, ids = torch.randn(40, 64), torch.full((40, 1), 2)
    close(layer(x, ids), product(x, layer.dequantize(), ids))
    assert (layer(x, torch.full((40, 3), 4)) == 0).all()


def test_strided_inputs():
    layer = Experts4bit.from_float(weight())
    ids = route(WHOLE)
    x = torch.randn(64, 9).t()
    assert torch.equal(layer(x, ids), layer(x.contiguous(), ids))
    x = torch.randn(9, 64).unsqueeze(1).expand(9, 2, 64)
    assert torch.equal(layer(x, ids), layer(x.contiguous(), ids))
    ids = route(WHOLE, k=4)[:, ::2]
    assert torch.equal(layer(x, ids), layer(x, ids.contiguous()))


def test_compute_dtype():
    layer = Experts4bit.from_float(weight(), compute_dtype=torch.bfloat16)
    x, ids = torch.randn(9, 64), route(WHOLE)
    plain = Experts4bit.from_float(weight())
    assert torch.equal(layer(x, ids), plain(x.bfloat16(), ids).float())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_whole_experts_are_stored_as_upstream_stores_a_3d_tensor(nested):
    original = weight()
    packed, state = quantize_4bit(original, quant_type="nf4", compress_statistics=nested)
    layer = Experts4bit.from_float(original, compress_statistics=nested)
    assert torch.equal(layer.weight.data, packed)
    assert layer.weight.quant_state == state
    assert tuple(layer.quant_state.shape) == WHOLE

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(original)

    module = Module()
    replace_parameter_4bit(module, "weight", compress_statistics=nested)
    assert same_state(module.state_dict(), layer.state_dict())


def test_ragged_experts_are_padded_each():
    original = weight(RAGGED)
    packed, state = quantize_experts_4bit(original, compress_statistics=False)
    assert tuple(state.shape) == (3, 64)
    assert state.absmax.shape == (3,)
    assert torch.equal(state.absmax, original.flatten(1).abs().amax(1))
    flat = dequantize_4bit(packed, state)
    assert (flat[:, 35:] == 0).all()
    one, one_state = quantize_4bit(original[1], quant_type="nf4", compress_statistics=False)
    assert torch.equal(flat[1, :35], dequantize_4bit(one, one_state).flatten())


def test_quantizes_on_the_first_move_to_a_device():
    torch.manual_seed(3)
    layer = Experts4bit(*(4, 64, 24), bias=True)
    assert layer.weight.shape == WHOLE
    assert layer.weight.abs().max() <= 1 / 8
    with pytest.raises(RuntimeError, match="Experts4bit is not quantized yet"):
        layer(torch.randn(9, 64), route(WHOLE))
    assert "weight.absmax" not in layer.state_dict()
    before = layer.weight.data.clone()
    nn.Sequential(layer).to(DEVICE)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.bnb_quantized
    again = Experts4bit.from_float(before, layer.bias.detach())
    assert same_state(layer.state_dict(), again.state_dict())
    layer.to(DEVICE).to(torch.float16)
    assert torch.equal(layer.weight.data, again.weight.data)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_storage_dtypes_hold_the_same_bytes(storage):
    plain = Experts4bit.from_float(weight())
    layer = Experts4bit.from_float(weight(), quant_storage=storage)
    assert layer.weight.dtype == storage
    x, ids = torch.randn(9, 64), route(WHOLE)
    assert torch.equal(layer(x, ids), plain(x, ids))
    layer.half().bfloat16().float()
    assert layer.weight.dtype == storage
    assert torch.equal(layer(x, ids), plain(x, ids))


@pytest.mark.parametrize("shape", [WHOLE, RAGGED], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_state_dict_both_ways(shape, nested):
    def make():
        return Experts4bit(shape[0], shape[2], shape[1], bias=True, compress_statistics=nested)

    source = Experts4bit.from_float(
        weight(shape), torch.randn(shape[:2]), compress_statistics=nested
    )
    saved = source.state_dict()
    expected = {
        "weight",
        "bias",
        "weight.absmax",
        "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    }
    nested_keys = {"weight.nested_absmax", "weight.nested_quant_map"}
    assert saved.keys() == (expected | nested_keys if nested else expected)
    with torch.device("meta"):
        on_meta = make()
    for target, options in ((make(), {}), (make().to(DEVICE), {}), (on_meta, {"assign": True})):
        loaded = target.load_state_dict(copy.deepcopy(saved), **options)
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
        assert same_state(target.state_dict(), saved)
        assert torch.equal(target.dequantize(), source.dequantize())


@pytest.mark.parametrize("shape", [WHOLE, RAGGED], ids=str)
def test_a_float_weight_is_quantized_when_loaded_into_a_quantized_layer(shape):
    original = weight(shape)
    layer = Experts4bit(shape[0], shape[2], shape[1]).to(DEVICE)
    layer.load_state_dict({"weight": original})
    assert same_state(layer.state_dict(), Experts4bit.from_float(original).state_dict())
    unquantized = Experts4bit(shape[0], shape[2], shape[1])
    unquantized.load_state_dict({"weight": original})
    assert same_state(unquantized.to(DEVICE).state_dict(), layer.state_dict())


def test_loading_what_does_not_fit_changes_nothing():
    layer = Experts4bit.from_float(weight())
    before = copy.deepcopy(layer.state_dict())
    other = Experts4bit.from_float(weight((4, 24, 128))).state_dict()
    with pytest.raises(RuntimeError, match=r"shape \[4, 24, 128\], the module has \[4, 24, 64\]"):
        layer.load_state_dict(other)
    lacking = {k: v for k, v in before.items() if k != "weight.absmax"}
    with pytest.raises(RuntimeError, match=r"the state dict lacks weight\.absmax"):
        layer.load_state_dict(lacking)
    assert same_state(layer.state_dict(), before)


@pytest.mark.parametrize("kind", [Experts4bit, Experts8bit])
def test_copies_are_independent(kind):
    layer = kind.from_float(weight(), torch.randn(4, 24))
    x, ids = torch.randn(9, 64), route(WHOLE)
    expected = layer(x, ids)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ]
    for other in others:
        assert torch.equal(other(x, ids), expected)
        other.weight.data.zero_()
    assert torch.equal(layer(x, ids), expected)


@pytest.mark.parametrize("kind", [Experts4bit, Experts8bit])
def test_compiles_without_a_break(kind):
    layer = kind.from_float(weight(), torch.randn(4, 24))
    x, ids = torch.randn(9, 64), route(WHOLE)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, ids), layer(x, ids))
    grads = []
    for run in (layer, compiled):
        mine = x.clone().requires_grad_()
        run(mine, ids).square().sum().backward()
        grads.append((mine.grad, layer.bias.grad.clone()))
        layer.bias.grad = None
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])


def test_looks():
    assert repr(Experts4bit(4, 64, 24)) == (
        "Experts4bit(num_experts=4, in_features=64, out_features=24, bias=False, quant_type=nf4, "
        "compress_statistics=True)"
    )
    assert repr(Experts8bit(4, 64, 24, bias=True, threshold=6.0)) == (
        "Experts8bit(num_experts=4, in_features=64, out_features=24, bias=True, threshold=6.0)"
    )


@pytest.mark.parametrize("kind", [Experts4bit, Experts8bit])
def test_errors(kind):
    with pytest.raises(ValueError, match="must be positive, got 0, 64 and 24"):
        kind(0, 64, 24)
    with pytest.raises(ValueError, match=r"\[experts, out_features, in_features\], got \[4, 64\]"):
        kind.from_float(torch.randn(4, 64))
    with pytest.raises(TypeError, match=r"floating-point, got torch\.int32"):
        kind.from_float(torch.ones(2, 3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"bias must have shape \[4, 24\], got \[24\]"):
        kind.from_float(weight(), torch.randn(24))
    layer = kind.from_float(weight())
    x, ids = torch.randn(9, 64), route(WHOLE)
    with pytest.raises(RuntimeError, match=r"\[tokens, 64\].*got \[9, 63\]"):
        layer(torch.randn(9, 63), ids)
    with pytest.raises(TypeError, match=r"floating-point input, got torch\.int64"):
        layer(ids, ids)
    for bad in (-1, 5):
        wrong = ids.clone()
        wrong[3, 1] = bad
        with pytest.raises(ValueError, match=str(bad)):
            layer(x, wrong)
    with pytest.raises((TypeError, ValueError), match="int64"):
        layer(x, ids.int())
    with pytest.raises(ValueError, match="expert_ids"):
        layer(x, ids[:, 0])
    with pytest.raises(ValueError, match=r"8, 2|\[8|8 "):
        layer(x, ids[:8])


def test_settings_that_do_not_exist():
    with pytest.raises(ValueError, match="48"):
        Experts4bit(4, 64, 24, blocksize=48)
    with pytest.raises(ValueError, match="quant_type must be one of"):
        Experts4bit(4, 64, 24, quant_type="int4")


def test_functions_say_what_is_missing():
    packed, state = quantize_4bit(weight()[0], quant_type="nf4")
    with pytest.raises(ValueError, match=r"shape must be \[experts, out_features, in_features\]"):
        experts_matmul_4bit(torch.randn(9, 64), packed, state, route(WHOLE))
    with pytest.raises(ValueError, match="quant_state is required"):
        experts_matmul_4bit(torch.randn(9, 64), packed, None, route(WHOLE))


# ---- 8-bit layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_8bit_forward_is_near_the_product_with_the_decoded_weight(dtype, threshold):
    bias = torch.randn(4, 24)
    layer = Experts8bit.from_float(weight(dtype=dtype), bias, threshold)
    assert layer.weight.dtype == torch.int8
    assert layer.SCB.shape == (4, 24)
    decoded, ids = layer.dequantize(), route(WHOLE)
    assert (decoded - weight(dtype=dtype).float()).abs().max() <= layer.SCB.max() / 254 * 1.01
    for shape in ((9, 64), (9, 2, 64)):
        x = torch.randn(shape).to(dtype)
        if threshold:
            x[..., 5] *= 40
        got, expected = layer(x, ids), product(x, decoded, ids, bias.to(dtype))
        assert got.dtype == dtype
        assert (got.double() - expected).norm() < 0.02 * expected.norm()
        assert (got[ids == 4] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_double_precision_is_computed_in_single(bits):
    layer = (Experts4bit if bits == 4 else Experts8bit).from_float(
        weight(), bias=torch.randn(WHOLE[:2])
    )
    ids, x = route(WHOLE), torch.randn(9, WHOLE[2], dtype=torch.float64, requires_grad=True)
    want = layer(x.detach().float(), ids)
    got = layer(x, ids)
    assert got.dtype == torch.float64
    assert torch.equal(got, want.double())
    got.sum().backward()
    assert x.grad.dtype == torch.float64
    assert x.grad.abs().sum() > 0
    assert torch.equal(layer.double()(x, ids), got)


def test_8bit_quantizes_double_precision():
    for got, want in zip(
        quantize_experts_8bit(weight().double()), quantize_experts_8bit(weight()), strict=True
    ):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"quantize_4bit: A must be float32, .* got float64"):
        quantize_experts_4bit(weight().double())


def test_8bit_outliers_are_what_the_threshold_is_for():
    plain, mixed = (Experts8bit.from_float(weight(), threshold=t) for t in (0.0, 6.0))
    x, ids = torch.randn(9, 64), route(WHOLE, none=False)
    x[:, 5] *= 500
    weightless = weight()
    weightless[:, :, 5] *= 1e-3  # what the large column says must not hide what the others do
    plain, mixed = (Experts8bit.from_float(weightless, threshold=t) for t in (0.0, 6.0))
    expected = product(x, mixed.dequantize(), ids)
    errors = [(layer(x, ids) - expected).norm() / expected.norm() for layer in (plain, mixed)]
    assert errors[1] < 0.01 < errors[0]


def test_8bit_gradients_are_those_of_the_decoded_weight():
    layer = Experts8bit.from_float(weight(), torch.randn(4, 24))
    ids, upstream = route(WHOLE), torch.randn(9, 2, 24)
    x = torch.randn(9, 64, requires_grad=True)
    layer(x, ids).backward(upstream)
    table = torch.cat([layer.dequantize().double(), torch.zeros(1, 24, 64)])
    close(x.grad, torch.einsum("tko,tkoi->ti", upstream.double(), table[ids]))
    bias = torch.zeros(5, 24, dtype=torch.float64)
    bias.index_add_(0, ids.flatten(), upstream.double().flatten(0, 1))
    close(layer.bias.grad, bias[:4])


def test_8bit_state_dict_both_ways():
    source = Experts8bit.from_float(weight())
    saved = source.state_dict()
    assert {k: v.dtype for k, v in saved.items()} == {"weight": torch.int8, "SCB": torch.float32}
    target = Experts8bit(4, 64, 24)
    target.load_state_dict(saved)
    assert same_state(target.state_dict(), saved)
    target = Experts8bit(4, 64, 24)
    target.load_state_dict({"weight": weight()})
    assert same_state(target.state_dict(), saved)
    with torch.device("meta"):
        target = Experts8bit(4, 64, 24)
    assert target.weight.is_meta
    target.load_state_dict(saved, assign=True)
    assert torch.equal(target.dequantize(), source.dequantize())


def test_8bit_loading_what_does_not_fit_changes_nothing():
    layer = Experts8bit.from_float(weight())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="the state dict lacks SCB"):
        layer.load_state_dict({"weight": before["weight"] * 0}, strict=False)
    for shape in ((4, 24, 32), (4, 12, 64)):
        with pytest.raises(RuntimeError, match=rf"int8 weight of shape \[4, 24, 64\].*{shape[1]}"):
            layer.load_state_dict(Experts8bit.from_float(weight(shape)).state_dict())
    with pytest.raises(RuntimeError, match=r"float32 scales of shape \[4, 24\]"):
        layer.load_state_dict({**before, "SCB": before["SCB"].half()})
    assert same_state(layer.state_dict(), before)


def test_8bit_scales_survive_casts():
    layer = Experts8bit.from_float(weight(), torch.randn(4, 24))
    x, ids = torch.randn(9, 64), route(WHOLE)
    scales = layer.SCB.clone()
    layer.half().bfloat16().double().float()
    assert layer.bias.dtype == torch.float32
    assert layer.SCB.dtype == torch.float32
    assert torch.equal(layer.SCB, scales)
    assert layer(x, ids).dtype == torch.float32


# ---- experts of other modules --------------------------------------------------------------------


class Module(nn.Module):
    """Experts as other libraries keep them."""

    def __init__(self, shape=WHOLE, seed=0):
        super().__init__()
        self.proj = nn.Parameter(weight(shape, seed=seed))
        self.other = nn.Parameter(torch.ones(3))

    def forward(self, x, ids):
        return torch.einsum("ti,tkoi->tko", x, self.proj[ids])


REPLACE = {"4bit": replace_experts_4bit, "8bit": replace_experts_8bit}
LAYER = {"4bit": Experts4bit, "8bit": Experts8bit}


@pytest.mark.parametrize("bits", REPLACE)
@pytest.mark.parametrize("shape", [WHOLE, RAGGED], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_replaced_experts_decode_when_read_and_multiply_packed(bits, shape, transposed):
    module = Module((shape[0], shape[2], shape[1]) if transposed else shape)
    original = module.proj.data.transpose(1, 2) if transposed else module.proj.data
    REPLACE[bits](module, "proj", transposed=transposed)
    layer = LAYER[bits].from_float(original)
    read = module.proj.transpose(1, 2) if transposed else module.proj
    assert torch.equal(read, layer.dequantize())
    x, ids = torch.randn(9, shape[2]), route(shape)
    bias = torch.randn(shape[:2])
    assert torch.equal(experts_matmul(module, "proj", x, ids), layer(x, ids))
    layer.bias = nn.Parameter(bias)
    assert torch.equal(experts_matmul(module, "proj", x, ids, bias), layer(x, ids))
    assert experts_matmul(module, "other", x, ids) is None
    assert [p.requires_grad for p in module.parameters()].count(True) == 1


@pytest.mark.parametrize("bits", REPLACE)
@pytest.mark.parametrize("shape", [WHOLE, RAGGED], ids=str)
def test_replaced_experts_save_and_load(bits, shape):
    source, target = Module(shape), Module(shape, seed=5)
    for module in (source, target):
        REPLACE[bits](module, "proj")
    saved = source.state_dict()
    assert not any("parametrizations" in key for key in saved)
    suffixes = {key.removeprefix("proj") for key in saved} - {"other"}
    if bits == "4bit":
        assert suffixes == {
            "",
            ".absmax",
            ".quant_map",
            ".nested_absmax",
            ".nested_quant_map",
            ".quant_state.bitsandbytes__nf4",
        }
    else:
        assert suffixes == {"", ".SCB"}
    assert not torch.equal(target.proj, source.proj)
    target.load_state_dict(saved)
    assert torch.equal(target.proj, source.proj)
    assert same_state(target.state_dict(), saved)
    # A float weight is quantized like the old one.
    target = Module(shape, seed=5)
    REPLACE[bits](target, "proj")
    target.load_state_dict(Module(shape).state_dict())
    assert same_state(target.state_dict(), saved)
    with pytest.raises(RuntimeError, match="proj"):
        target.load_state_dict({"other": saved["other"]})
    broken = {**saved, "proj": saved["proj"][:1]}
    with pytest.raises(RuntimeError, match="size mismatch for proj"):
        target.load_state_dict(broken)
    assert same_state(target.state_dict(), saved)


def test_replaced_experts_are_read_by_the_plain_parametrization():
    module = Module()
    replace_experts_4bit(module, "proj", compress_statistics=False)
    saved = module.state_dict()
    other = Module()
    other.proj = nn.Parameter(saved["proj"], requires_grad=False)
    stats = {k: v for k, v in saved.items() if k.startswith("proj.")}
    replace_parameter_4bit_prequantized(other, "proj", stats, DEVICE)
    assert torch.equal(other.proj, module.proj)


@pytest.mark.parametrize("bits", REPLACE)
def test_replaced_experts_become_plain_again(bits):
    module = Module()
    REPLACE[bits](module, "proj")
    twin = copy.deepcopy(module)
    decoded = module.proj.clone()
    assert dequantize_parameters(module, torch.bfloat16) == ["proj"]
    assert type(module) is Module
    assert isinstance(module.proj, nn.Parameter)
    assert torch.equal(module.proj, decoded.bfloat16())
    assert module.state_dict().keys() == {"proj", "other"}
    module.load_state_dict(Module(seed=7).state_dict())
    assert dequantize_parameters(module) == []
    assert torch.equal(twin.proj, decoded)  # a copy shares the class
    x, ids = torch.randn(9, 64), route(WHOLE, none=False)
    assert experts_matmul(module, "proj", x, ids) is None
    close(experts_matmul(twin, "proj", x, ids), product(x, decoded, ids), torch.bfloat16)


def test_another_parametrization_makes_the_packed_weight_unfit():
    class Twice(nn.Module):
        def forward(self, value):
            return 2 * value

    module = Module()
    replace_experts_4bit(module, "proj")
    x, ids = torch.randn(9, 64), route(WHOLE, none=False)
    plain = module.proj.clone()
    P.register_parametrization(module, "proj", Twice())
    assert experts_matmul(module, "proj", x, ids) is None
    assert torch.equal(module.proj, 2 * plain)
    assert torch.equal(module(x, ids), torch.einsum("ti,tkoi->tko", x, (2 * plain)[ids]))


@pytest.mark.parametrize("bits", REPLACE)
def test_casting_a_module_leaves_codes_and_scales_alone(bits):
    options = {"quant_storage": torch.bfloat16} if bits == "4bit" else {}
    module = Module()
    REPLACE[bits](module, "proj", **options)
    before = {k: v for k, v in copy.deepcopy(module.state_dict()).items() if k != "other"}
    module.half().float().double().bfloat16()
    after = {k: v for k, v in module.state_dict().items() if k != "other"}
    assert same_state(after, before)
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    original = module.parametrizations["proj"].original
    assert isinstance(original, Params4bit) is (bits == "4bit")


def test_replacing_what_is_not_a_stack_of_matrices():
    for replace in REPLACE.values():
        module = Module()
        with pytest.raises(ValueError, match=r"got \[3\]"):
            replace(module, "other")
        with pytest.raises(AttributeError, match="Module has no parameter 'missing'"):
            replace(module, "missing")
        assert type(module) is Module


def test_quantizing_rows_of_zeros():
    codes, stats = quantize_experts_8bit(torch.zeros(2, 3, 4))
    assert (codes == 0).all()
    assert (stats == 0).all()
    y = experts_matmul_8bit(torch.randn(5, 4), codes, stats, torch.zeros(5, 1, dtype=torch.int64))
    assert (y == 0).all()
