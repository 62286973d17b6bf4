"""State dicts of 4-bit layers: what is saved, and that everything that is saved loads."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from halfbyte.functional import dequantize_4bit, quantize_4bit
from halfbyte.nn import EmbeddingNF4, Linear4bit, Params4bit
from halfbyte.utils import pack_dict_to_tensor, unpack_tensor_to_dict
from reference import DEVICE
from torch import nn

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
PLAIN = ["weight.absmax", "weight.quant_map"]
NESTED = [*PLAIN, "weight.nested_absmax", "weight.nested_quant_map"]


def linear(seed: int = 0, n_in: int = 96, n_out: int = 64, **config) -> Linear4bit:
    """A layer that is not quantized yet."""
    config.setdefault("quant_type", "nf4")
    torch.manual_seed(seed)
    return Linear4bit(n_in, n_out, **config)


def quantized(seed: int = 0, **config) -> Linear4bit:
    return linear(seed, **config).to(DEVICE)


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().as_subclass(torch.Tensor).contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def assert_same_dict(got: dict, want: dict) -> None:
    assert list(got) == list(want)
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert got[key].shape == value.shape, key
        assert raw(got[key]) == raw(value), key


# --- Saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_keys(kind, nested, bias):
    module = quantized(quant_type=kind, compress_statistics=nested, bias=bias)
    want = ["weight", *(["bias"] if bias else []), *(NESTED if nested else PLAIN)]
    want.append(f"weight.quant_state.bitsandbytes__{kind}")
    saved = module.state_dict()
    assert list(saved) == want
    assert all(type(value) is torch.Tensor for value in saved.values())
    assert saved["weight"].shape == (64 * 96 // 2, 1)
    assert saved["weight.absmax"].dtype == (torch.uint8 if nested else torch.float32)
    assert saved["weight.quant_map"].shape == (16,)
    facts = json.loads(bytes(saved[want[-1]].tolist()))
    keys = ["quant_type", "blocksize", "dtype", "shape"]
    if nested:
        keys += ["nested_blocksize", "nested_dtype", "nested_offset"]
        assert saved["weight.nested_quant_map"].shape == (256,)
    assert list(facts) == keys
    assert facts["shape"] == [64, 96]
    assert facts["quant_type"] == kind
    assert facts["dtype"] == "float32"


def test_unquantized_layers_save_their_float_weight():
    assert list(linear().state_dict()) == ["weight", "bias"]


def test_prefixes_and_keep_vars():
    model = nn.Sequential(quantized())
    saved = model.state_dict(prefix="model.", keep_vars=True)
    assert "model.0.weight.quant_state.bitsandbytes__nf4" in saved
    assert saved["model.0.weight"] is model[0].weight


# --- Round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(96, 64), (97, 5), (100, 7), (1, 1)])
@pytest.mark.parametrize("ready", [False, True], ids=["into-unquantized", "into-quantized"])
def test_round_trip_is_bitwise(storage, nested, kind, shape, ready):
    config = {
        "n_in": shape[0],
        "n_out": shape[1],
        "quant_storage": storage,
        "compress_statistics": nested,
        "quant_type": kind,
    }
    source = quantized(0, **config)
    target = quantized(1, **config) if ready else linear(1, **config)
    result = target.load_state_dict(source.state_dict(), strict=True)
    assert result == ([], [])
    assert_same_dict(target.state_dict(), source.state_dict())
    assert type(target.weight) is Params4bit
    assert target.weight.module is target
    assert target.weight.bnb_quantized
    assert target.quant_state is target.weight.quant_state
    x = torch.randn(3, shape[0])
    assert torch.equal(target(x), source(x))


def test_a_layer_of_another_configuration_takes_the_checkpoints():
    source = quantized(0, quant_type="nf4", compress_statistics=True)
    target = linear(1, quant_type="fp4", compress_statistics=False)
    target.load_state_dict(source.state_dict())
    assert target.weight.quant_type == "nf4"
    assert target.weight.compress_statistics is True
    x = torch.randn(3, 96)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("theirs", STORAGES)
@pytest.mark.parametrize("ours", STORAGES)
@pytest.mark.parametrize("shape", [(96, 64), (97, 5), (1, 3)])
def test_other_storage_is_the_same_bytes(theirs, ours, shape):
    source = quantized(0, n_in=shape[0], n_out=shape[1], quant_storage=theirs)
    target = linear(1, n_in=shape[0], n_out=shape[1], quant_storage=ours)
    target.load_state_dict(source.state_dict())
    assert target.weight.dtype == ours
    assert target.weight.quant_storage == ours
    size = (shape[0] * shape[1] + 1) // 2
    assert raw(target.weight)[:size] == raw(source.weight)[:size]
    x = torch.randn(3, shape[0])
    assert torch.equal(target(x), source(x))


def test_loading_into_a_weight_that_wants_gradients():
    """model.requires_grad_(True) before the load: packed integers cannot have one."""
    target = linear(1).requires_grad_(True)
    target.load_state_dict(quantized().state_dict())
    assert not target.weight.requires_grad
    assert target.bias.requires_grad


def test_the_parameter_object_stays():
    for target in (linear(1), quantized(1)):
        before = target.weight
        target.load_state_dict(quantized().state_dict())
        assert target.weight is before


def test_loaded_tensors_are_independent_of_the_state_dict():
    saved = quantized().state_dict()
    target = linear(1)
    target.load_state_dict(saved)
    want = {k: raw(v) for k, v in target.state_dict().items()}
    for value in saved.values():
        value.zero_()
    assert {k: raw(v) for k, v in target.state_dict().items()} == want


def test_assign_takes_the_tensors_of_the_state_dict():
    saved = quantized(quant_storage=torch.bfloat16).state_dict()
    with torch.device("meta"):
        target = linear(1)
    target.load_state_dict(saved, assign=True)
    assert type(target.weight) is Params4bit
    assert target.weight.dtype == torch.bfloat16
    assert target.quant_storage == torch.bfloat16
    assert target.weight.data_ptr() == saved["weight"].data_ptr()
    assert target.bias.device.type == DEVICE.type
    x = torch.randn(2, 96)
    assert torch.equal(target(x), quantized(quant_storage=torch.bfloat16)(x))


def test_loading_into_meta_without_assign_warns_and_does_nothing():
    with torch.device("meta"):
        target = linear(1)
    with pytest.warns(UserWarning, match=r"for weight: .*assign=True"):
        target.load_state_dict(quantized().state_dict())
    assert target.weight.device.type == "meta"
    assert target.quant_state is None


def test_files():
    source = nn.Sequential(quantized(), nn.ReLU(), quantized(2, n_in=64, n_out=8))
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    target = nn.Sequential(linear(5), nn.ReLU(), linear(6, n_in=64, n_out=8))
    target.load_state_dict(saved)
    x = torch.randn(2, 96)
    assert torch.equal(target(x), source(x))


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = quantized()
    safetensors.save_file(source.state_dict(), tmp_path / "layer.safetensors")
    target = linear(1)
    target.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert_same_dict(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("nested", [False, True])
def test_safetensors_of_two_layers(tmp_path, nested):
    """safetensors refuses tensors that share memory, such as a code kept once for all layers."""
    safetensors = pytest.importorskip("safetensors.torch")
    source = nn.Sequential(
        quantized(0, compress_statistics=nested), quantized(1, compress_statistics=nested)
    )
    safetensors.save_file(source.state_dict(), tmp_path / "model.safetensors")
    target = nn.Sequential(linear(2), linear(3))
    target.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    safetensors.save_file(target.state_dict(), tmp_path / "again.safetensors")
    assert_same_dict(dict(target.state_dict()), dict(source.state_dict()))


def test_loaded_layers_still_save_copy_and_move():
    target = linear(1)
    target.load_state_dict(quantized().state_dict())
    twin = copy.deepcopy(target).half().to(DEVICE)
    assert raw(twin.weight) == raw(target.weight)


# --- Float state dicts -------------------------------------------------------------------------


def test_float_into_unquantized():
    source, target = linear(0), linear(1)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight)
    assert raw(target.to(DEVICE).weight) == raw(source.to(DEVICE).weight)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [False, True])
def test_float_into_quantized_is_quantized_the_same_way(storage, nested):
    config = {"quant_storage": storage, "compress_statistics": nested}
    source, target = linear(0, **config), quantized(1, **config)
    target.load_state_dict(source.state_dict())
    assert_same_dict(target.state_dict(), quantized(0, **config).state_dict())


# --- Errors ------------------------------------------------------------------------------------


def base(layer):
    return {key: value for key, value in layer.state_dict().items() if key != "bias"}


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("name", [*NESTED, "weight.quant_state.bitsandbytes__nf4", "weight"])
def test_a_missing_key_is_named(ready, name):
    saved = quantized().state_dict()
    del saved[name]
    target = quantized(1) if ready else linear(1)
    before = raw(target.weight)
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"\. '):
        target.load_state_dict(saved)
    assert raw(target.weight) == before
    if ready and name == "weight":
        # What torch.distributed.checkpoint saves without frozen parameters: scales without codes.
        result = target.load_state_dict(saved, strict=False)
        assert result.missing_keys == ["weight"]
        assert_same_dict(base(target), base(quantized(1)))
        return
    with pytest.raises(RuntimeError, match=f"loads only as a whole.*{name}"):
        target.load_state_dict(saved, strict=False)


def test_packed_codes_alone_are_not_loaded():
    """Upstream copies them and keeps the scales of another weight."""
    target = quantized(1)
    before = raw(target.weight)
    with pytest.raises(RuntimeError, match=r"weight\.absmax"):
        target.load_state_dict({"weight": quantized().weight.data, "bias": torch.zeros(64)})
    assert raw(target.weight) == before


def test_a_missing_weight_is_missing():
    target = quantized(1)
    bias = {"bias": torch.zeros(64)}
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        target.load_state_dict(bias)
    assert target.load_state_dict(bias, strict=False).missing_keys == ["weight"]
    assert torch.equal(target.bias, torch.zeros(64))


def test_a_missing_bias_is_missing():
    saved = quantized().state_dict()
    del saved["bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        linear(1).load_state_dict(saved)
    target = linear(1)
    assert target.load_state_dict(saved, strict=False).missing_keys == ["bias"]
    assert target.weight.bnb_quantized


@pytest.mark.parametrize(
    "name", ["weight.strange", "weights", "weight.absmax.more", "other.weight"]
)
def test_an_unexpected_key_is_named(name):
    saved = quantized().state_dict()
    saved[name] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{name}"\.'):
        linear(1).load_state_dict(saved)
    assert linear(1).load_state_dict(saved, strict=False).unexpected_keys == [name]


def test_statistics_for_a_layer_that_is_float_only():
    """A float weight with statistics beside it is neither one nor the other."""
    saved = quantized().state_dict()
    saved["weight"] = torch.randn(64, 96)
    with pytest.raises(RuntimeError, match=r"takes \d+ elements of torch.float32"):
        linear(1).load_state_dict(saved)


@pytest.mark.parametrize("ready", [False, True])
def test_wrong_shape(ready):
    target = linear(1, n_in=64, n_out=96)
    target = target.to(DEVICE) if ready else target
    with pytest.raises(RuntimeError, match=r"shape \[64, 96\], the module has \[96, 64\]"):
        target.load_state_dict({k: v for k, v in quantized().state_dict().items() if k != "bias"})


@pytest.mark.parametrize("rows", [0, 10, 3071, 3073])
def test_wrong_length(rows):
    saved = quantized().state_dict()
    saved["weight"] = torch.zeros(rows, 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"takes 3072 elements of torch\.uint8"):
        linear(1).load_state_dict(saved)


def test_wrong_number_of_scales():
    saved = quantized(compress_statistics=False).state_dict()
    saved["weight.absmax"] = saved["weight.absmax"][:-1]
    with pytest.raises(RuntimeError, match="absmax must have 96 entries, got 95"):
        linear(1).load_state_dict(saved)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"quant_type": "nf4"}', b"\xff\xfe", b'{"shape": "no"}']
)
def test_broken_json(text):
    saved = quantized().state_dict()
    saved["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="weight"):
        linear(1).load_state_dict(saved)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"blocksize": "64"}, "blocksize must be one of"),
        ({"nested_blocksize": True}, "nested_blocksize must be one of"),
        ({"nested_offset": None}, "nested_offset must be a number, got None"),
    ],
)
def test_json_that_does_not_fit(entry, message):
    saved = quantized().state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    saved[key] = pack_dict_to_tensor({**unpack_tensor_to_dict(saved[key]), **entry})
    with pytest.raises(RuntimeError, match=f"weight: its quantization state.*{message}"):
        linear(1).load_state_dict(saved)


def test_a_plain_family_with_the_json_of_a_nested_one():
    saved = quantized(compress_statistics=False).state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    saved[key] = quantized().state_dict()[key]
    with pytest.raises(RuntimeError, match=r"absmax must be torch\.uint8, got torch\.float32"):
        linear(1).load_state_dict(saved)


def test_two_states():
    saved = quantized().state_dict()
    saved["weight.quant_state.bitsandbytes__fp4"] = saved["weight.quant_state.bitsandbytes__nf4"]
    with pytest.raises(RuntimeError, match="weight: its quantization state cannot be read"):
        linear(1).load_state_dict(saved)


def test_not_a_tensor():
    saved = quantized().state_dict()
    saved["weight.absmax"] = 3
    with pytest.raises(RuntimeError, match=r"weight\.absmax: expected a tensor, got int"):
        linear(1).load_state_dict(saved)


def test_errors_carry_the_prefix():
    model = nn.Sequential(nn.ReLU(), linear(1))
    saved = {f"1.{k}": v for k, v in quantized().state_dict().items()}
    del saved["1.weight.absmax"]
    with pytest.raises(RuntimeError, match=r'"1\.weight\.absmax"'):
        model.load_state_dict(saved)


def test_a_failed_load_leaves_the_layer_usable():
    target = quantized(1)
    x = torch.randn(2, 96)
    want = target(x)
    saved = {k: v for k, v in quantized().state_dict().items() if k != "bias"}
    saved["weight"] = saved["weight"][:5]
    with pytest.raises(RuntimeError):
        target.load_state_dict(saved, strict=False)
    assert torch.equal(target(x), want)


# --- Embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dim", [64, 33])
def test_embeddings_save_and_load(storage, dim):
    torch.manual_seed(0)
    source = EmbeddingNF4(10, dim, quant_storage=storage).to(DEVICE)
    saved = source.state_dict()
    assert list(saved) == ["weight", *PLAIN, "weight.quant_state.bitsandbytes__nf4"]
    index = torch.tensor([[0, 9], [3, 3]])
    for target in (
        EmbeddingNF4(10, dim, quant_storage=storage),
        EmbeddingNF4(10, dim, quant_storage=storage).to(DEVICE),
    ):
        target.load_state_dict(saved)
        assert_same_dict(target.state_dict(), saved)
        assert torch.equal(target(index), source(index))


def test_embeddings_load_float_tables():
    torch.manual_seed(0)
    table = torch.randn(10, 64)
    target = EmbeddingNF4(10, 64).to(DEVICE)
    target.load_state_dict({"weight": table})
    packed, state = quantize_4bit(table, quant_type="nf4")
    assert raw(target.weight) == raw(packed)
    assert torch.equal(target(torch.arange(10)), dequantize_4bit(packed, state))


def test_embedding_of_another_size():
    saved = EmbeddingNF4(10, 64).to(DEVICE).state_dict()
    with pytest.raises(RuntimeError, match=r"shape \[10, 64\], the module has \[11, 64\]"):
        EmbeddingNF4(11, 64).load_state_dict(saved)


# --- torch.distributed.checkpoint walks attributes along the keys ------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_distributed_checkpoint_state_dict(nested, storage):
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    config = {"compress_statistics": nested, "quant_storage": storage}
    source = nn.Sequential(quantized(0, **config), nn.ReLU())
    saved = dcp.get_model_state_dict(source)
    assert_same_dict(dict(saved), dict(source.state_dict()))
    target = nn.Sequential(quantized(1, **config), nn.ReLU())
    dcp.set_model_state_dict(target, saved)
    assert_same_dict(dict(target.state_dict()), dict(source.state_dict()))
