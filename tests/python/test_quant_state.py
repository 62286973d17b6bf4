"""QuantState: constructor, indexing, dictionaries, moving, equality, pickling."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import reference as ref
import torch
from halfbyte import functional
from halfbyte.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from halfbyte.utils import pack_dict_to_tensor, unpack_tensor_to_dict
from reference import DEVICE


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
    loaded = QuantState.from_dict(saved, device=DEVICE)
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
        '"nested_blocksize": 256, "nested_dtype": "float32", '
        f'"nested_offset": {state.offset.item()!r}}}'
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
        (broken(dtype="floaty"), "dtype must be float32 or .* got 'floaty'"),
        (broken(dtype="load"), "dtype must be float32 or .* got 'load'"),
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
        QuantState.from_dict(saved, device=DEVICE)


def broken_plain(**changes):
    saved = make(nested=False)[1].as_dict()
    saved.update(changes)
    return saved


BLOCKS = "must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({key: value}, rf"^{key} {BLOCKS} {value!r}$")
            for key in ("blocksize", "nested_blocksize")
            for value in (True, 64.0, "64", None, 0, -64, 63, 8192, 10**30)
        ],
        *[({"quant_type": v}, r"^quant_type must be .*got") for v in (3, "xx", "", ["nf4"])],
        *[({"dtype": v}, "^dtype must be float32 or .*got") for v in (None, "float", "float64", 3)],
        *[({"nested_dtype": v}, "^nested_dtype must be float32, got") for v in (None, "float16")],
        *[
            ({"shape": v}, "^shape must be a list of non-negative integers, got")
            for v in (None, "no", 3, [64.0, 96], [-64, -96], [True, 6144], ["64", 96], [10**30, 0])
        ],
        ({"shape": [64, 97]}, "^absmax must have 97 entries, got 96"),
        ({"quant_map": torch.ones(15)}, "^quant_map must have 16 entries, got 15"),
        ({"quant_map": torch.ones(256)}, "^quant_map must have 16 entries, got 256"),
        ({"quant_map": torch.ones(16).int()}, "^quant_map must be of a floating.*torch.int32"),
        ({"quant_map": None}, "^quant_map must be a tensor, got NoneType"),
        ({"absmax": [1.0] * 96}, "^absmax must be a tensor, got list"),
        ({"absmax": torch.ones(96)}, "^absmax must be torch.uint8, got torch.float32"),
        ({"absmax": torch.ones(95).byte()}, "^absmax must have 96 entries, got 95"),
        ({"nested_absmax": ...}, "must hold 'nested_absmax'"),
        ({"nested_absmax": torch.ones(2)}, "^nested_absmax must have 1 entries, got 2"),
        ({"nested_absmax": torch.ones(1).int()}, "^nested_absmax must be of a floating"),
        ({"nested_quant_map": ...}, "must hold 'nested_quant_map'"),
        ({"nested_quant_map": torch.ones(16)}, "^nested_quant_map must have 256 entries, got 16"),
        ({"nested_quant_map": torch.ones(256).byte()}, "^nested_quant_map must be of a floating"),
        *[
            ({"nested_offset": v}, "^nested_offset must be a number, got")
            for v in (None, "1", True, [1.0])
        ],
        *[
            ({"nested_offset": v}, "^nested_offset must be a finite float32 number, got")
            for v in (float("nan"), float("inf"), 1e39, -(10**400))
        ],
    ],
)
def test_parts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        QuantState.from_dict(broken(**changes), device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"absmax": torch.ones(96).byte()}, "^absmax must be of a floating.*torch.uint8"),
        ({"absmax": torch.ones(96).int()}, "^absmax must be of a floating.*torch.int32"),
        ({"absmax": torch.ones(97)}, "^absmax must have 96 entries, got 97"),
        ({"nested_offset": 1.0}, "absmax must be torch.uint8"),
        ({"nested_offset": 1.0, "absmax": torch.ones(96).byte()}, "must hold 'nested_blocksize'"),
        ({"nested_quant_map": torch.ones(256)}, "absmax must be torch.uint8"),
    ],
)
def test_plain_states_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        QuantState.from_dict(broken_plain(**changes), device=DEVICE)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000, b"1" * 5000])
def test_damaged_json_names_its_tensor(text):
    saved = {f"weight.{k}": v for k, v in make()[1].as_dict(packed=True).items()}
    saved[f"weight.{JSON}"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"^weight\.{JSON} must hold JSON"):
        QuantState.from_dict(saved, device=DEVICE)


@pytest.mark.parametrize("nested", [False, True])
def test_states_of_8_bits_round_trip(nested):
    codes, state = quantize_blockwise(ref.samples((10, 100)), blocksize=64, nested=nested)
    loaded = QuantState.from_dict(state.as_dict(), device=DEVICE)
    assert loaded == state
    assert torch.equal(dequantize_blockwise(codes, loaded), dequantize_blockwise(codes, state))
    for size in (0, 257):
        with pytest.raises(ValueError, match="quant_map must have 1 to 256 entries"):
            QuantState.from_dict({**state.as_dict(), "quant_map": torch.ones(size)}, DEVICE)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(0, 64), (1,), (3, 5)])
def test_small_states_round_trip(nested, shape):
    _, state = quantize_4bit(torch.ones(shape), compress_statistics=nested)
    for packed in (False, True):
        assert QuantState.from_dict(state.as_dict(packed=packed), device=DEVICE) == state


def test_tensors_on_meta_are_read():
    saved = make()[1].as_dict(packed=True)
    saved = {k: v if k == JSON else v.to("meta") for k, v in saved.items()}
    state = QuantState.from_dict(saved, device="meta")
    assert state.nested
    assert state.absmax.device.type == state.offset.device.type == "meta"


def test_the_default_dtype_does_not_matter():
    saved = make()[1].as_dict()
    torch.set_default_dtype(torch.float64)
    try:
        assert QuantState.from_dict(saved, device=DEVICE).offset.dtype == torch.float32
        for make_map in (
            functional.create_dynamic_map,
            functional.create_linear_map,
            functional.create_normal_map,
            functional.create_fp8_map,
        ):
            assert make_map().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


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
    state.to(DEVICE)
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
    assert (
        bytes(packed.tolist()).decode().startswith('{"a": 1, "b": [1, 2.5, null], "c": "\\u00e9"')
    )
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
