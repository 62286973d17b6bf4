"""Slices of packed weights for tensor parallelism, in one process."""

from __future__ import annotations

import itertools
import pathlib

import pytest
import torch
from halfbyte.distributed._reader import ModelFiles
from halfbyte.distributed._tensor_parallel import (
    shard_columns,
    shard_linear,
    shard_rows,
    take_slices,
)
from halfbyte.functional import (
    QuantState,
    dequantize_4bit,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_4bit,
)
from halfbyte.nn import Embedding4bit, Linear4bit, Linear8bitLt
from reference import DEVICE

STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


def packed(*shape: int, seed: int = 0, **options: object):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    codes, state = quantize_4bit(weight, **options)  # type: ignore[arg-type]
    return codes, state, dequantize_4bit(codes, state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_slices_decode_to_slices(quant_type: str, nested: bool) -> None:
    shapes = ((64, 256), (96, 64 * 36), (384, 1024), (8, 12, 128), (128, 4096))
    for shape, storage in itertools.product(shapes, STORAGES):
        codes, state, whole = packed(
            *shape, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
        )
        for world in (1, 2, 4):
            for rank in range(world):
                for cut, dim in ((shard_rows, -2), (shard_columns, -1)):
                    if shape[dim] // world % 64 and dim == -1:
                        continue
                    local, described = cut(codes, state, rank, world)
                    want = whole.chunk(world, dim)[rank]
                    assert tuple(described.shape) == tuple(want.shape)
                    assert local.dtype == storage
                    assert local.shape[1:] == (1,)
                    assert torch.equal(dequantize_4bit(local, described), want), (shape, world, dim)


def test_nested_scales_keep_the_largest_blocks_that_fit() -> None:
    # 4096 columns are 64 blocks: two ranks take 32 of each row, four take 16.
    codes, state, _ = packed(64, 4096, quant_type="nf4", compress_statistics=True)
    assert shard_rows(codes, state, 0, 2)[1].state2.blocksize == 256
    assert shard_columns(codes, state, 1, 2)[1].state2.blocksize == 32
    decoded = shard_columns(codes, state, 1, 4)[1]
    assert not decoded.nested
    assert decoded.absmax.dtype == torch.float32
    assert decoded.offset is None
    assert state.nested  # the whole one is left as it is
    assert state.state2.blocksize == 256


def test_the_end_of_an_odd_weight() -> None:
    for nested, storage in itertools.product((False, True), STORAGES):
        codes, state, whole = packed(
            129, 65, quant_type="nf4", compress_statistics=nested, quant_storage=storage
        )
        local, described = take_slices(codes, state, [(64, 129)])
        assert torch.equal(dequantize_4bit(local, described), whole[64:])
        local, described = shard_rows(codes, state, 0, 1)
        assert torch.equal(local.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(dequantize_4bit(local, described), whole)
    empty = take_slices(codes, state, [(64, 64)])
    assert dequantize_4bit(*empty).shape == (0, 65)


def test_fused_weights_are_cut_section_by_section() -> None:
    codes, state, whole = packed(96, 128, quant_type="nf4", compress_statistics=True)
    sections = (64, 16, 16)
    for rank in range(2):
        local, described = shard_rows(codes, state, rank, 2, sections=sections)
        parts = [section.chunk(2)[rank] for section in whole.split(sections)]
        assert torch.equal(dequantize_4bit(local, described), torch.cat(parts))
    with pytest.raises(ValueError, match=r"sections must make up its 96 rows, got \[64, 16\]"):
        shard_rows(codes, state, 0, 2, sections=(64, 16))


def test_ranges_in_any_order_and_experts() -> None:
    codes, state, whole = packed(6, 32, 64, quant_type="fp4", compress_statistics=True)
    local, described = take_slices(codes, state, [(4, 6), (0, 1)], dim=0)
    assert torch.equal(dequantize_4bit(local, described), whole[[4, 5, 0]])
    local, described = take_slices(codes, state, [(8, 10), (8, 10)])
    assert torch.equal(dequantize_4bit(local, described), whole[:, [8, 9, 8, 9]])


def test_off_a_boundary() -> None:
    codes, state, _ = packed(64, 96, quant_type="nf4")
    with pytest.raises(ValueError, match="inside a block of 64") as error:
        shard_columns(codes, state, 0, 2, name="layers.3.down_proj.weight")
    assert str(error.value) == (
        "layers.3.down_proj.weight: the columns of a weight of shape [64, 96] cannot be cut into 2 "
        "parts: value 48 is inside a block of 64; numbers of ranks that would do: 1"
    )
    with pytest.raises(
        ValueError, match=r"64 does not divide by it; .* would do: 1, 2, 4, 8, 16, 3"
    ):
        shard_rows(codes, state, 0, 3)
    with pytest.raises(ValueError, match=r"boundary at value 288, .*multiples of 2 rows would do"):
        take_slices(codes, state, [(1, 3)])
    with pytest.raises(ValueError, match=r"only all 96 columns would do, since 96 is not whole"):
        take_slices(codes, state, [(0, 64)], dim=-1)
    with pytest.raises(ValueError, match="a range of rows must lie in 0 to 64, got 60 to 65"):
        take_slices(codes, state, [(60, 65)])
    with pytest.raises(ValueError, match="rank must be one of 0 to world - 1, got 2 of 2"):
        shard_rows(codes, state, 2, 2)
    with pytest.raises(ValueError, match=r"takes 3072 elements of torch.uint8, got 3071"):
        shard_rows(codes[:-1], state, 0, 2)
    with pytest.raises(ValueError, match="dim must be a dimension of"):
        take_slices(codes, state, [(0, 2)], dim=2)


def test_int8() -> None:
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    codes, scales, _ = int8_vectorwise_quant(weight.half())
    for rank in range(4):
        local, stats = shard_rows(codes, scales, rank, 4)
        assert torch.equal(local, codes.chunk(4)[rank])
        assert torch.equal(stats, scales.chunk(4)[rank])
        local, stats = shard_columns(codes, scales, rank, 4)
        assert torch.equal(local, codes.chunk(4, 1)[rank])
        assert local.is_contiguous()
        assert torch.equal(stats, scales)
        assert stats.data_ptr() != scales.data_ptr()
    with pytest.raises(ValueError, match="48 does not divide by it"):
        shard_rows(codes, scales, 0, 5)
    with pytest.raises(ValueError, match="int8 with a scale for each row"):
        shard_rows(codes, scales[:-1], 0, 2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "int8":
        layer = Linear8bitLt(256, 64, has_fp16_weights=False, threshold=6.0).to(DEVICE)
    else:
        layer = Linear4bit(256, 64, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE)
    layer.eval()
    layer.bias.requires_grad_(False)
    x = torch.randn(3, 256)
    want = layer(x)
    rows = [shard_linear(layer, rank, 2, dim=0) for rank in range(2)]
    assert [(p.in_features, p.out_features, p.training) for p in rows] == [(256, 32, False)] * 2
    torch.testing.assert_close(torch.cat([part(x) for part in rows], 1), want)
    columns = [shard_linear(layer, rank, 2, dim=1) for rank in range(2)]
    assert [part.bias is None for part in columns] == [False, True]
    total = sum(part(half) for part, half in zip(columns, x.chunk(2, 1), strict=True))
    # Each rank of an int8 layer rounds its own half of the input: 1/254 of its largest magnitude.
    tolerance = {"atol": 0.05, "rtol": 0.0} if kind == "int8" else {}
    torch.testing.assert_close(total, want, **tolerance)
    assert not columns[0].bias.requires_grad
    for key, value in columns[0].state_dict().items():
        assert key in layer.state_dict()
        assert value.device.type == DEVICE.type


def test_what_does_not_fit_is_named() -> None:
    codes, state, _ = packed(64, 4096, quant_type="nf4", compress_statistics=True)
    for arguments in ((0.5, 2, None), (0, 2, [32.0, 32.0])):
        with pytest.raises(TypeError, match="rank, world and sections must be integers, got"):
            shard_rows(codes, state, *arguments[:2], sections=arguments[2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sections must make up its 64 rows, got \[\]"):
        shard_rows(codes, state, 0, 2, sections=[])
    with pytest.raises(TypeError, match="scales must be a QuantState or a tensor, got NoneType"):
        shard_rows(codes, None, 0, 2)  # type: ignore[type-var]
    state.state2.absmax = state.state2.absmax[:-1]
    with pytest.raises(ValueError, match="4096 scales in blocks of 256 have 16 scales and an off"):
        shard_rows(codes, state, 0, 2)


def test_layers_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match=r"dim must be 0 \(rows\) or 1 \(columns\), got -1"):
        shard_linear(Linear4bit(64, 64), 0, 1, dim=-1)
    with pytest.raises(RuntimeError, match="not quantized yet"):
        shard_linear(Linear4bit(64, 64), 0, 1, dim=0)
    with pytest.raises(TypeError, match="takes a Linear4bit or a Linear8bitLt, got Embedding4bit"):
        shard_linear(Embedding4bit(64, 64), 0, 1, dim=0)


def resident(file: pathlib.Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    total, inside = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(":")[0].isidentifier():
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_only_the_slice_is_read_from_a_file(tmp_path: pathlib.Path, kind: str) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    rows, columns = 4096, 16384 if kind == "nf4" else 8192
    codes = torch.randint(0, 256, (rows * columns // (2 if kind == "nf4" else 1),)).byte()
    if kind == "int8":
        whole = codes.view(torch.int8).view(rows, columns), torch.rand(rows)
        tensors = {"weight": whole[0], "SCB": whole[1]}
    else:
        scales = torch.rand(rows * columns // 64)
        table = get_4bit_type("nf4")
        state = QuantState(scales, (rows, columns), table, 64, "nf4", torch.float32)
        whole = codes.view(-1, 1), state
        tensors = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        tensors["weight"] = whole[0]
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)

    mapped = ModelFiles(tmp_path).weight("weight")
    before = resident(file)
    local = shard_rows(*mapped, 3, 8)
    read = resident(file) - before
    # The kernel maps up to 2 MiB around what is touched, at either end of each tensor.
    asked = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 8
    assert asked <= read < asked + (8 << 20), f"{asked} bytes are asked for, {read} were read"
    want = shard_rows(*whole, 3, 8)
    assert torch.equal(local[0], want[0])
    first, second = (c[1] if kind == "int8" else c[1].absmax for c in (local, want))
    assert torch.equal(first, second)
    local, want = shard_columns(*mapped, 1, 2), shard_columns(*whole, 1, 2)
    assert torch.equal(local[0], want[0])
