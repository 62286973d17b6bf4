"""Params4bit: when it packs, what survives, and that packed bytes are never converted."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from halfbyte.functional import QuantState, dequantize_4bit, quantize_4bit
from halfbyte.nn import Params4bit
from reference import DEVICE
from torch import nn

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
FLOAT_STORAGES = STORAGES[1:]


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(*shape: int, **config) -> Params4bit:
    config.setdefault("quant_type", "nf4")
    return Params4bit(weight(*shape), **config).to(DEVICE)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    flat = tensor.detach().as_subclass(torch.Tensor).contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def assert_same(got: Params4bit, want: Params4bit) -> None:
    """Same class, bytes, attributes and meaning."""
    assert type(got) is type(want)
    assert got.dtype == want.dtype
    assert raw(got) == raw(want)
    assert got.bnb_quantized
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        assert getattr(got, name) == getattr(want, name), name
    assert torch.equal(
        dequantize_4bit(got.data, got.quant_state), dequantize_4bit(want.data, want.quant_state)
    )


# --- Construction ------------------------------------------------------------------------------


def test_attributes_before_quantization():
    p = Params4bit(weight(8, 64))
    assert p.__dict__ == {
        "blocksize": 64,
        "compress_statistics": True,
        "quant_type": "fp4",
        "quant_state": None,
        "quant_storage": torch.uint8,
        "bnb_quantized": False,
        "module": None,
    }
    assert not p.requires_grad
    assert p.shape == (8, 64)
    assert isinstance(p, nn.Parameter)


def test_no_data():
    assert Params4bit().shape == (0,)


def test_unknown_keywords_are_dropped():
    p = Params4bit(weight(8, 64), _is_hf_initialized=True, anything=3)
    assert "anything" not in p.__dict__


def test_every_attribute_is_a_constructor_keyword():
    old = packed(8, 64, blocksize=32, compress_statistics=False)
    old._is_hf_initialized = True
    again = type(old)(old.data, requires_grad=False, **old.__dict__).to(DEVICE)
    assert_same(again, old)
    # the form transformers uses to quantize: attributes of an unquantized parameter on meta
    meta = Params4bit(weight(8, 64).to("meta"), blocksize=32, quant_type="nf4")
    meta._is_hf_initialized = True
    new = Params4bit(weight(8, 64), requires_grad=False, **meta.__dict__).to(DEVICE)
    assert new.bnb_quantized
    assert (new.blocksize, new.quant_type) == (32, "nf4")


def test_float_weight_with_the_attributes_of_a_packed_one_is_packed_again():
    """PEFT's RandLora and PVeRA merge so; bnb_quantized=True then does not mean the new data."""
    old = packed(8, 64)
    merged = weight(8, 64, seed=1)
    new = Params4bit(merged, requires_grad=False, **old.__dict__)
    assert not new.bnb_quantized
    new = new.to(DEVICE)
    expected = Params4bit(merged, quant_type="nf4").to(DEVICE)
    assert_same(new, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_packs_what_quantize_4bit_packs(dtype, quant_type, compress_statistics, storage):
    w = weight(16, 96, dtype=dtype)
    p = Params4bit(
        w.clone(),
        quant_type=quant_type,
        compress_statistics=compress_statistics,
        quant_storage=storage,
        blocksize=128,
    ).to(DEVICE)
    want, state = quantize_4bit(
        w,
        blocksize=128,
        quant_type=quant_type,
        compress_statistics=compress_statistics,
        quant_storage=storage,
    )
    assert p.dtype == storage
    assert p.shape == (16 * 96 // 2 // storage.itemsize, 1)
    assert raw(p) == raw(want)
    assert torch.equal(p.quant_state.absmax, state.absmax)
    assert p.quant_state.dtype == dtype
    assert p.quant_state.nested == compress_statistics
    assert p.element_size() == storage.itemsize


# --- When it packs -----------------------------------------------------------------------------


@pytest.mark.parametrize("move", [lambda p: p.to(DEVICE), lambda p: p.cpu()])
def test_first_move_packs_in_place(move):
    p = Params4bit(weight(8, 64))
    q = move(p)
    assert q is p
    assert p.bnb_quantized
    assert p.dtype == torch.uint8
    assert p.shape == (256, 1)


def test_meta_does_not_pack():
    p = Params4bit(weight(8, 64), blocksize=32)
    q = p.to("meta")
    assert type(q) is Params4bit
    assert q.device.type == "meta"
    assert q.blocksize == 32
    assert not q.bnb_quantized
    assert q.shape == (8, 64)


def test_dtype_alone_does_not_pack():
    q = Params4bit(weight(8, 64), quant_type="nf4").to(torch.bfloat16)
    assert type(q) is Params4bit
    assert q.dtype == torch.bfloat16
    assert not q.bnb_quantized
    q = q.to(DEVICE)
    assert q.quant_state.dtype == torch.bfloat16


def test_device_and_dtype_pack_from_full_precision():
    p = Params4bit(weight(8, 64)).to(DEVICE, torch.bfloat16)
    assert p.quant_state.dtype == torch.float32
    assert raw(p) == raw(Params4bit(weight(8, 64)).to(DEVICE))


def test_to_another_tensor():
    p = Params4bit(weight(8, 64)).to(torch.zeros(1))
    assert p.bnb_quantized


def test_to_meta_when_packed_keeps_the_state():
    p = packed(8, 64)
    absmax = p.quant_state.absmax
    q = p.to("meta")
    assert type(q) is Params4bit
    assert q.device.type == "meta"
    assert q.quant_state.absmax is absmax
    assert absmax.device.type == DEVICE.type


def test_from_meta_is_torchs_error():
    with pytest.raises(NotImplementedError, match="meta"):
        Params4bit(weight(8, 64).to("meta")).to(DEVICE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("build", [lambda: Params4bit(weight(8, 64)), lambda: packed(8, 64)])
def test_cuda_without_cuda_is_torchs_error(build):
    p = build()
    with pytest.raises((RuntimeError, AssertionError)) as torch_error:
        torch.zeros(1).cuda()
    for move in (lambda q: q.cuda(), lambda q: q.cuda(0), lambda q: q.to("cuda")):
        with pytest.raises(torch_error.type) as error:
            move(type(p)(p.data, **p.__dict__))
        assert str(error.value) == str(torch_error.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_integers_cannot_be_packed(dtype):
    with pytest.raises((ValueError, TypeError), match=str(dtype).removeprefix("torch.")):
        Params4bit(torch.zeros(8, 64, dtype=dtype)).to(DEVICE)


def test_bad_blocksize():
    with pytest.raises(ValueError, match="48"):
        Params4bit(weight(8, 64), blocksize=48).to(DEVICE)


def test_requires_grad_is_refused_with_a_sentence():
    with pytest.raises(RuntimeError, match="requires_grad_"):
        Params4bit(weight(8, 64), requires_grad=True).to(DEVICE)


def test_moves_take_the_state_along():
    p = packed(8, 64)
    seen = []
    p.quant_state.to = seen.append  # axolotl replaces it, too
    p.to(DEVICE)
    assert seen == [DEVICE]


def test_to_the_same_device_is_the_same_parameter():
    p = packed(8, 64)
    assert p.to(DEVICE) is p
    other = p.to(DEVICE, copy=True)
    assert other is not p
    assert other.data_ptr() != p.data_ptr()
    assert_same(other, p)


# --- Packed bytes are not numbers --------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "cast",
    [
        lambda p: p.half(),
        lambda p: p.float(),
        lambda p: p.bfloat16(),
        lambda p: p.double(),
        lambda p: p.to(torch.float16),
        lambda p: p.to(torch.bfloat16),
        lambda p: p.to(DEVICE, torch.float32),
        lambda p: p.to(torch.zeros(1, dtype=torch.float64)),
        lambda p: p.type(torch.float16),
    ],
    ids=["half", "float", "bfloat16", "double", "to16", "tobf16", "todev", "tolike", "type"],
)
def test_casts_leave_packed_bytes_alone(storage, cast):
    p = packed(8, 64, quant_storage=storage)
    want = raw(p)
    q = cast(p)
    assert type(q) is Params4bit
    assert q.dtype == storage
    assert raw(q) == want
    assert q.quant_state is p.quant_state


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda p: p.half(), torch.float16),
        (lambda p: p.bfloat16(), torch.bfloat16),
        (lambda p: p.double(), torch.float64),
    ],
)
def test_casts_convert_unpacked_weights(cast, dtype):
    q = cast(Params4bit(weight(8, 64)))
    assert type(q) is Params4bit
    assert q.dtype == dtype


def test_type_without_argument():
    assert Params4bit(weight(2, 2)).type() == torch.zeros(()).type()


def test_a_float_weight_put_back_into_a_packed_parameter_is_packed_again():
    p = packed(8, 64)
    new = weight(8, 64, seed=1)
    p.data = new
    assert p.half().dtype == torch.float16
    p = p.to(DEVICE)
    assert raw(p) == raw(Params4bit(new, quant_type="nf4").to(DEVICE))


# --- Prequantized ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.q_proj.weight."])
@pytest.mark.parametrize("compress_statistics", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_from_prequantized(prefix, compress_statistics, storage):
    p = packed(8, 96, compress_statistics=compress_statistics, quant_storage=storage)
    stats = {prefix + k: v for k, v in p.quant_state.as_dict(packed=True).items()}
    before = dict(stats)
    q = Params4bit.from_prequantized(p.data, stats, requires_grad=False, device=DEVICE)
    assert_same(q, p)
    assert q.module is None
    assert q.quant_storage == storage
    assert stats == before
    assert set(q.__dict__) == set(p.__dict__)


def test_from_prequantized_tells_its_module():
    p = packed(8, 64)
    owner = nn.Module()
    q = Params4bit.from_prequantized(
        data=p.data,
        quantized_stats=p.quant_state.as_dict(packed=True),
        device=DEVICE,
        module=owner,
        further=1,
    )
    assert q.module is owner
    assert owner.quant_state is q.quant_state


def test_from_prequantized_where_it_is():
    p = packed(8, 64)
    q = Params4bit.from_prequantized(p.data, p.quant_state.as_dict(packed=True))
    assert q.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("rows", [255, 257])
def test_from_prequantized_with_a_wrong_length(rows):
    p = packed(8, 64)
    data = torch.zeros(rows, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"takes 256 elements of torch.uint8, got {rows}"):
        Params4bit.from_prequantized(data, p.quant_state.as_dict(packed=True), device=DEVICE)


def test_from_prequantized_without_statistics():
    with pytest.raises(ValueError, match="neither"):
        Params4bit.from_prequantized(torch.zeros(4, 1, dtype=torch.uint8), {}, device=DEVICE)


def test_made_by_hand():
    """unsloth: Tensor._make_subclass and whichever attributes it remembers."""
    p = packed(8, 64)
    q = torch.Tensor._make_subclass(Params4bit, p.data)
    q.quant_state = p.quant_state
    assert q.to(DEVICE) is q  # not packed a second time
    assert raw(q.float()) == raw(p)
    assert q.module is None
    assert copy.deepcopy(q).quant_state is not None


# --- Survival ----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("compress_statistics", [False, True])
@pytest.mark.parametrize(
    "trip",
    [
        copy.deepcopy,
        copy.copy,
        lambda p: pickle.loads(pickle.dumps(p)),
        lambda p: _torch_save(p, True),
        lambda p: _torch_save(p, False),
    ],
    ids=["deepcopy", "copy", "pickle", "save", "save-unsafe"],
)
def test_round_trips(trip, storage, compress_statistics):
    p = packed(8, 96, quant_storage=storage, compress_statistics=compress_statistics)
    q = trip(p)
    assert q is not p
    assert_same(q, p)
    assert q.quant_state == p.quant_state


def _torch_save(p: Params4bit, weights_only: bool) -> Params4bit:
    buffer = io.BytesIO()
    torch.save(p, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def test_deepcopy_is_independent_and_copy_is_not():
    p = packed(8, 64)
    deep, shallow = copy.deepcopy(p), copy.copy(p)
    assert deep.data_ptr() != p.data_ptr()
    assert deep.quant_state is not p.quant_state
    assert deep.quant_state.absmax.data_ptr() != p.quant_state.absmax.data_ptr()
    assert shallow.data_ptr() == p.data_ptr()
    assert shallow.quant_state is p.quant_state
    memo: dict = {}
    assert copy.deepcopy(p, memo) is copy.deepcopy(p, memo)


def test_deepcopy_of_an_owner_owns_its_copy():
    owner = nn.Module()
    owner.w = Params4bit(weight(8, 64), module=owner).to(DEVICE)
    twin = copy.deepcopy(owner)
    assert twin.w.module is twin
    assert copy.deepcopy(owner.w).module is owner


def test_unpacked_round_trips():
    p = Params4bit(weight(8, 64), blocksize=32, quant_type="nf4")
    for q in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert type(q) is Params4bit
        assert torch.equal(q, p)
        assert (q.blocksize, q.bnb_quantized) == (32, False)


@pytest.mark.parametrize("cut", [torch.chunk, torch.Tensor.chunk])
def test_chunk(cut):
    p = packed(8, 64)
    pieces = cut(p, 2)
    assert isinstance(pieces, tuple)
    assert [type(piece) for piece in pieces] == [Params4bit, Params4bit]
    assert all(piece.quant_state is p.quant_state for piece in pieces)
    assert pieces[0].data_ptr() == p.data_ptr()
    assert raw(pieces[0]) + raw(pieces[1]) == raw(p)


@pytest.mark.parametrize("cut", [torch.split, torch.Tensor.split])
def test_split(cut):
    p = packed(8, 64)
    pieces = cut(p, 100)
    assert [piece.shape[0] for piece in pieces] == [100, 100, 56]
    assert all(type(piece) is Params4bit and piece.bnb_quantized for piece in pieces)


def test_cat_of_the_pieces_is_the_whole():
    p = packed(8, 64)
    q = torch.cat(torch.chunk(p, 4))
    assert_same(q, p)
    assert q.quant_state is p.quant_state


def test_cat_of_strangers_is_a_tensor():
    q = torch.cat([packed(8, 64), packed(8, 64)])
    assert type(q) is torch.Tensor
    assert type(torch.cat([packed(8, 64), torch.zeros(1, 1, dtype=torch.uint8)])) is torch.Tensor


@pytest.mark.parametrize(
    "view",
    [
        lambda p: p.detach(),
        lambda p: p.data,
        lambda p: p.t(),
        lambda p: p.view(-1),
        lambda p: p[:4],
        lambda p: p.clone(),
        lambda p: p + 1,
        torch.empty_like,
    ],
)
def test_everything_else_gives_plain_tensors(view):
    assert type(view(packed(8, 64))) is torch.Tensor


def test_survives_the_loss_of_torch_function(monkeypatch):
    """unsloth deletes it."""
    assert "__torch_function__" in Params4bit.__dict__
    monkeypatch.delattr(Params4bit, "__torch_function__")
    p = packed(8, 64)
    assert_same(copy.deepcopy(p), p)
    assert p.to(torch.float16) is p
    assert type(torch.chunk(p, 2)[0]) is torch.Tensor
    assert_same(pickle.loads(pickle.dumps(p)), p)


def test_share_memory():
    p = packed(8, 64)
    want = raw(p)
    assert p.share_memory_() is p
    assert p.is_shared()
    assert raw(p) == want


def test_checkpoint_attributes():
    nested, plain = packed(16, 64), packed(16, 64, compress_statistics=False)
    state = nested.quant_state
    assert nested.absmax is state.absmax
    assert nested.code is state.code
    assert nested.quant_map is state.code
    assert nested.offset is state.offset
    assert nested.nested_offset is state.offset
    assert nested.state2 is state.state2
    assert nested.nested_absmax is state.state2.absmax
    assert nested.nested_quant_map is state.state2.code
    assert nested.nested_blocksize == 256
    assert nested.nested_dtype == torch.float32
    assert plain.absmax is plain.quant_state.absmax
    assert plain.offset is None
    assert plain.state2 is None
    for name in ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype"):
        assert not hasattr(plain, name)
    for name in ("absmax", "code", "quant_map", "offset", "state2", "nested_offset"):
        assert not hasattr(Params4bit(weight(2, 2)), name)


def test_repr():
    assert "Params4bit" in repr(packed(2, 2))


@pytest.mark.parametrize("shape", [(1, 1), (1,), (3,), (5, 7), (3, 5, 7), (0, 4), (64, 1)])
@pytest.mark.parametrize("storage", STORAGES)
def test_odd_shapes_keep_their_meaning(shape, storage):
    p = packed(*shape, quant_storage=storage)
    assert p.bnb_quantized
    assert p.quant_state.shape == shape
    q = type(p)(p.data, **p.__dict__)
    assert q.bnb_quantized
    assert q.to(DEVICE) is q
    assert dequantize_4bit(q.data, q.quant_state).shape == shape


def test_quant_state_is_importable_from_modules():
    from halfbyte.nn import modules

    assert modules.QuantState is QuantState
