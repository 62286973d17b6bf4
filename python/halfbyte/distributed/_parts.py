"""A rank's part of a quantized weight, read from a checkpoint or quantized from what it holds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from .._ops import ops
from ..autograd._matmul_8bit import quantize_weight
from ..functional import QuantState
from ..nn import _packed
from ..nn._sharded import Whole4bit, Whole8bit, part
from ._reader import ModelFiles

__all__ = ["Part", "Place", "quantize_4bit", "read_4bit", "read_8bit"]


class Place(NamedTuple):
    """Which part of how many, the process group of those that have the others (None for a whole
    weight), and where communication takes place."""

    world: int
    rank: int
    group: Any
    device: torch.device


class Part(NamedTuple):
    """Codes (1-D; int8: rows) and scales (each 1-D) of one rank, and what all ranks know."""

    codes: Tensor
    scales: list[Tensor]
    whole: Any  # Whole4bit or Whole8bit


def read_4bit(files: ModelFiles, name: str, storage: torch.dtype, place: Place) -> Part:
    """The part of the packed weight ``name``; its bytes as dtype ``storage``."""
    packed, state = files.weight(name)
    start, stop = part(_packed.packed_units(state.shape, storage), place.world, place.rank)
    size = storage.itemsize
    codes = torch.zeros((stop - start) * size, dtype=torch.uint8)
    mine = files.copy(packed.reshape(-1).view(torch.uint8)[start * size : stop * size])
    codes[: mine.numel()] = mine[: codes.numel()]

    state2 = state.state2
    if state.nested:
        code = state2.code.clone()
        state2 = QuantState(None, code=code, blocksize=state2.blocksize, dtype=state2.dtype)  # type: ignore[arg-type]
    whole = _whole(state, state.code.clone(), state.offset, state2)
    scales = []
    for scale, length in zip(Whole4bit.scales(state), whole.lengths, strict=True):
        first, last = part(length, place.world, place.rank)
        mine = files.copy(scale.reshape(-1)[first:last])
        scales.append(mine if mine.dtype == torch.uint8 else mine.float())
    return Part(codes.view(storage), scales, whole)


def quantize_4bit(
    files: ModelFiles, name: str, known: QuantState, storage: torch.dtype, place: Place
) -> Part:
    """The part of the float weight ``name`` when it is quantized as ``known`` says, from the dtype
    that it names: the bytes that quantizing all of it would give. All ranks of the group call it.

    Every block that the rank's codes or scales need is quantized here; some at the edges by a
    neighbour as well.
    """
    values, block = math.prod(known.shape), known.blocksize
    blocks, unit = -(-values // block), 2 * storage.itemsize
    units = part(_packed.packed_units(known.shape, storage), place.world, place.rank)
    scales = part(blocks, place.world, place.rank)
    needed = [(units[0] * unit, units[1] * unit), (scales[0] * block, scales[1] * block)]
    needed = [(a, min(b, values)) for a, b in needed if a < min(b, values)]
    first = min((a for a, _ in needed), default=0) // block * block
    last = min(-(-max((b for _, b in needed), default=0) // block) * block, values)

    flat = files.read_slice(name, first, last).to(known.dtype)
    packed, state = functional.quantize_4bit(flat, blocksize=block, quant_type=known.quant_type)
    del flat
    codes = torch.zeros((units[1] - units[0]) * storage.itemsize, dtype=torch.uint8)
    if codes.numel():
        start = (units[0] * unit - first) // 2
        mine = packed.reshape(-1)[start : start + codes.numel()]
        codes[: mine.numel()] = mine
    start = scales[0] - first // block
    absmax = state.absmax[start : start + scales[1] - scales[0]].clone()
    parts, offset, state2 = [absmax], None, None
    if known.nested:
        every = _gather(absmax, blocks, place)
        inner = known.state2.blocksize
        eight, absmax2, offset = ops.quantize_absmax.default(every, inner)
        first, last = part(absmax2.numel(), place.world, place.rank)
        parts = [eight[scales[0] : scales[1]].clone(), absmax2[first:last].clone()]
        code = functional.create_dynamic_map()
        state2 = QuantState(None, code=code, blocksize=inner, dtype=torch.float32)  # type: ignore[arg-type]
    return Part(codes.view(storage), parts, _whole(known, state.code, offset, state2))


def read_8bit(files: ModelFiles, name: str, dtype: torch.dtype | None, place: Place) -> Part:
    """The rows of the int8 weight ``name``, or of the float weight, which are quantized (from
    ``dtype``, if that is given)."""
    rows = files.shape(name)[0]
    start, stop = part(rows, place.world, place.rank)
    if files.holds_8bit(name):
        codes, scales = files.weight(name)
        mine = files.copy(codes[start:stop]), files.copy(scales[start:stop]).float()
    else:
        mine = quantize_weight(files.read_rows(name, start, stop).to(dtype))
    return Part(mine[0], [mine[1]], Whole8bit(rows))


def _whole(
    like: QuantState, code: Tensor, offset: Tensor | None, state2: QuantState | None
) -> Whole4bit:
    """What all ranks know of a weight that is quantized as ``like``."""
    return Whole4bit(
        QuantState(
            None,  # type: ignore[arg-type]
            shape=like.shape,
            code=code,
            blocksize=like.blocksize,
            quant_type=like.quant_type,
            dtype=like.dtype,
            offset=offset,
            state2=state2,
        )
    )


def _gather(mine: Tensor, length: int, place: Place) -> Tensor:
    """The parts of all ranks behind each other, ``[length]``."""
    if place.group is None:
        return mine
    import torch.distributed as dist

    size = -(-length // place.world)
    padded = torch.zeros(size, dtype=mine.dtype, device=place.device)
    padded[: mine.numel()] = mine
    every = torch.empty(size * place.world, dtype=mine.dtype, device=place.device)
    dist.all_gather_into_tensor(every, padded, group=place.group)
    return every[:length].to(mine.device)
