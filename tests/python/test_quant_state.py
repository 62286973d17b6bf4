"""QuantState: constructor, indexing, dictionaries, moving, equality, pickling."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import reference as ref
import torch
from halfbyte.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from halfbyte.utils import pack_dict_to_tensor, unpack_tensor_to_dict


def make(nested: bool = True, quant_type: str = "nf4", dtype=torch.bfloat16):
    return quantize_4bit(
        ref.samples((64, 96), dtype), quant_type=quant_type, compress_statistics=nested
    )


def test_the_constructor_takes_upstreams_arguments():
    absmax = torch.ones(1)
    state = QuantState(absmax)
    assert state.absmax is absmax
    assert [state.shape, state.code, state.dtype, state.blocksize, state.quant_type] == [None] * 5
    assert (state.offset, state.state2, state.nested) == (None, None, False)
    second = QuantState(absmax, code=torch.ones(256), blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=absmax,
        shape=(1, 2),
        code=torch.ones(16),
        blocksize=64,
        quant_type="fp4",
        dtype=torch.float16,
        offset=torch.ones(()),
        state2=second,
    )
    assert state.nested
    assert state.state2 is second
    with pytest.raises(TypeError, match="absmax"):
        QuantState()


def test_it_reads_as_the_list_it_once_was():
    _, state = make()
    assert state[0] is state.absmax
    assert state[1] == torch.Size([64, 96])
    assert state[2] is torch.bfloat16
    assert state[3] == 64
    assert state[4][0] is state.offset
    assert state[4][1] is state.state2
    assert state[5] == state[-1] == "nf4"
    absmax, *_, quant_type = state
    assert absmax is state.absmax
    assert quant_type == "nf4"
    assert state[1:3] == [torch.Size([64, 96]), torch.bfloat16]
    with pytest.raises(IndexError):
        _ = state[6]
    with pytest.raises(TypeError):
        _ = state["absmax"]
    assert make(nested=False)[1][4] is None


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ref.TYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.mlp.weight."])
def test_dictionaries_round_trip(nested, quant_type, packed, prefix):
    weight, state = make(nested, quant_type)
    saved = {prefix + key: value for key, value in state.as_dict(packed=packed).items()}
    if prefix and not packed:
        # Only what checkpoints hold has prefixes.
        return
    before = dict(saved)
    loaded = QuantState.from_dict(saved, device="cpu")
    assert list(saved) == list(before)
    assert loaded == state
    assert loaded.shape == torch.Size([64, 96])
    assert torch.equal(dequantize_4bit(weight, loaded), dequantize_4bit(weight, state))


def test_dictionaries_have_upstreams_keys_in_its_order():
    _, state = make()
    plain = ["quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"]
    nested = [f"nested_{key}" for key in ("absmax", "blocksize", "quant_map", "dtype", "offset")]
    assert list(state.as_dict()) == plain + nested
    assert state.as_dict()["dtype"] == "bfloat16"
    assert state.as_dict()["shape"] == (64, 96)
    packed = state.as_dict(packed=True)
    assert list(packed) == [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
    ]
    assert all(isinstance(value, torch.Tensor) for value in packed.values())
    text = bytes(packed["quant_state.bitsandbytes__nf4"].tolist()).decode()
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 96], '
        f'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {state.offset.item()!r}}}'
    )
    assert list(make(nested=False)[1].as_dict(packed=True)) == [
        "absmax",
        "quant_map",
        "quant_state.bitsandbytes__nf4",
    ]
    _, blockwise = quantize_blockwise(ref.samples((10,)))
    assert list(blockwise.as_dict(packed=True)) == plain


def test_class_attributes_that_clients_read():
    assert QuantState.valid_quant_types == ("fp4", "nf4")
    assert QuantState.valid_qs_type_keys == ["bitsandbytes__fp4", "bitsandbytes__nf4"]
    assert set(make()[1].as_dict()) <= set(QuantState.valid_qs_keys)


def broken(**changes):
    saved = make()[1].as_dict()
    saved.update(changes)
    return {key: value for key, value in saved.items() if value is not ...}


JSON = "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "found neither"),
        ({"absmax": torch.ones(1)}, "found neither"),
        (broken(absmax=...), "must hold 'absmax'"),
        (broken(quant_map=...), "must hold 'quant_map'"),
        (broken(nested_offset=...), "must hold 'nested_offset'"),
        (broken(dtype="floaty"), "dtype must name a dtype, got 'floaty'"),
        (broken(dtype="load"), "dtype must name a dtype, got 'load'"),
        ({JSON: torch.ones(3).byte()}, "must hold JSON"),
        ({JSON: torch.full((3,), 255).byte()}, "must hold JSON"),
        ({JSON: pack_dict_to_tensor({"a": 1})}, "must hold 'quant_map'|must hold"),
        ({JSON: pack_dict_to_tensor([1])}, "packed dictionary, got list"),
        ({"quant_state.bitsandbytes__xx": torch.ones(1).byte()}, "exactly one"),
        (
            {JSON: torch.ones(1).byte(), "quant_state.bitsandbytes__fp4": torch.ones(1).byte()},
            "exactly one",
        ),
    ],
)
def test_broken_dictionaries(saved, message):
    with pytest.raises(ValueError, match=message):
        QuantState.from_dict(saved, device="cpu")


def test_to_moves_in_place():
    for nested in (False, True):
        _, state = make(nested)
        assert state.to("meta") is None
        tensors = [state.absmax, state.code]
        if nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    weight, state = make()
    dense = dequantize_4bit(weight, state)
    state.to(torch.device("cpu"))
    assert torch.equal(dequantize_4bit(weight, state), dense)


def test_equality():
    _, state = make()
    same, plain = make()[1], make(nested=False)[1]
    assert state == same
    assert state == copy.deepcopy(state)
    assert state != plain
    assert plain != state
    assert state != None  # noqa: E711
    assert state != "state"
    with pytest.raises(TypeError, match="unhashable"):
        hash(state)
    for change in (
        {"quant_type": "fp4"},
        {"blocksize": 128},
        {"dtype": torch.float16},
        {"shape": (96, 64)},
        {"shape": None},
        {"absmax": state.absmax + 1},
        {"code": state.code * 2},
        {"offset": state.offset + 1},
    ):
        other = copy.copy(state)
        for name, value in change.items():
            setattr(other, name, value)
        assert state != other, change


def test_copies_and_pickles():
    weight, state = make()
    dense = dequantize_4bit(weight, state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    for other in (
        copy.copy(state),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        torch.load(buffer, weights_only=False),
    ):
        assert other == state
        assert torch.equal(dequantize_4bit(weight, other), dense)


def test_a_state_set_up_without_the_constructor():
    weight, state = make(nested=False)
    bare = QuantState.__new__(QuantState)
    for name in (
        "absmax shape code dtype blocksize quant_type offset state2 nested".split()  # noqa: SIM905
    ):
        setattr(bare, name, getattr(state, name))
    assert torch.equal(dequantize_4bit(weight, bare), dequantize_4bit(weight, state))


def test_dictionaries_in_tensors():
    source = {"a": 1, "b": [1, 2.5, None], "c": "é", "d": {"e": True}}
    packed = pack_dict_to_tensor(source)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()).decode().startswith('{"a": 1, "b": [1, 2.5, null], "c": "\\u00e9"')
    assert unpack_tensor_to_dict(packed) == source
    with pytest.raises(TypeError):
        pack_dict_to_tensor({"a": object()})


def test_the_packed_rest_is_an_attribute_too():
    _, state = make()
    packed = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]
    assert torch.equal(state.bitsandbytes__nf4, packed)
    for name in ("bitsandbytes__fp4", "foo"):
        with pytest.raises(AttributeError, match=f"'QuantState' object has no attribute '{name}'"):
            getattr(state, name)
