"""Packed weights for tensor parallelism: the slice of one rank, cut out of the packed bytes.

A slice decodes to exactly the values that the whole weight has there, because codes and scales are
copied, never computed again. A 4-bit weight is cut at the boundaries of its blocks only.

With double quantization the scales have blocks of their own (256 scales each). A slice whose parts
do not begin at such blocks gets smaller ones where that fits (128, 64 or 32 scales, the scales of
the scales being repeated), and float32 scales where not even that does: up to 0.141, or 0.5 bits a
value at block 64 instead of 0.127.

The whole weight may be mapped from a file (:class:`.ModelFiles`): only the slice is read then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..functional import QuantState
from ..nn import _packed
from ..nn.modules import Linear4bit, Linear8bitLt

__all__ = ["shard_columns", "shard_linear", "shard_rows", "take_slices"]

_SMALLEST_NESTED = 32
"""The smallest block of scales that kernels know."""

_Scales = TypeVar("_Scales", QuantState, Tensor)
_Ranges = Sequence[tuple[int, int]]


# ---- what callers say ----------------------------------------------------------------------------


def shard_rows(
    weight: Tensor,
    scales: _Scales,
    rank: int,
    world: int,
    *,
    sections: Sequence[int] | None = None,
    name: str = "weight",
) -> tuple[Tensor, _Scales]:
    """The rows (output features) of one rank: what a column-parallel layer holds.

    Args:
        weight: packed 4-bit codes of a weight ``[out, in]`` or ``[experts, out, in]``, any storage
            dtype; or int8 codes of that shape. In memory or mapped from a file.
        scales: the 4-bit weight's state; or the scales of the int8 rows, float32, the shape of the
            codes without its last dimension.
        rank, world: which of how many equal parts.
        sections: for a fused weight, the rows of each of its parts (queries, keys and values; gate
            and up): each is cut for itself, and the rank's pieces lie behind each other.
        name: what to call the weight in errors.

    Returns:
        Codes of ``[..., out / world, in]`` and their state or scales, in memory of their own. The
        storage dtype stays.

    Raises:
        ValueError: rows or sections do not divide by ``world``, the parts do not begin at blocks,
            or codes and scales do not fit each other.
    """
    shape = _shape(weight, scales, name)
    ranges = _split(shape, len(shape) - 2, scales, rank, world, sections, name)
    return take_slices(weight, scales, ranges, dim=-2, name=name)


def shard_columns(
    weight: Tensor,
    scales: _Scales,
    rank: int,
    world: int,
    *,
    sections: Sequence[int] | None = None,
    name: str = "weight",
) -> tuple[Tensor, _Scales]:
    """The columns (input features) of one rank: what a row-parallel layer holds.

    Arguments and errors are those of :func:`shard_rows`. Every row of the slice must consist of
    whole blocks: ``in`` and ``in / world`` divide by the block size. The scales of int8 rows stay
    whole.

    Returns:
        Codes of ``[..., out, in / world]`` and their state or scales, in memory of their own.
    """
    shape = _shape(weight, scales, name)
    ranges = _split(shape, len(shape) - 1, scales, rank, world, sections, name)
    return take_slices(weight, scales, ranges, dim=-1, name=name)


def take_slices(
    weight: Tensor, scales: _Scales, ranges: _Ranges, dim: int = -2, *, name: str = "weight"
) -> tuple[Tensor, _Scales]:
    """Ranges of rows, columns or experts of a packed weight, behind each other.

    For what :func:`shard_rows` and :func:`shard_columns` cannot say: keys and values that several
    ranks share, padded vocabularies, a rank's experts (``dim=0`` of a 3-D weight).

    Args:
        weight, scales, name: as in :func:`shard_rows`.
        ranges: ``(start, stop)`` along ``dim``, in any order.
        dim: -2 rows, -1 columns, 0 whole experts.

    Returns:
        The codes of what is taken, and their state or scales, in memory of their own.

    Raises:
        ValueError: a range is outside the weight or does not begin and end at blocks, or codes and
            scales do not fit each other.
    """
    shape: tuple[int, ...] = _shape(weight, scales, name)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"{name}: dim must be a dimension of {list(shape)}, got {dim}")
    dim %= len(shape)
    for start, stop in ranges:
        if not 0 <= start <= stop <= shape[dim]:
            raise ValueError(
                f"{name}: a range of {_what(shape, dim)} must lie in 0 to {shape[dim]}, "
                f"got {start} to {stop}"
            )
    ranges = _joined(ranges)
    size = sum(stop - start for start, stop in ranges)
    result = (*shape[:dim], size, *shape[dim + 1 :])
    if isinstance(scales, QuantState):
        plan = _plan(shape, dim, ranges, scales.blocksize)
        _check_blocks(plan, shape, dim, scales.blocksize, name)
        return _take_4bit(weight, scales, plan, result)
    codes = torch.cat([weight.narrow(dim, a, b - a) for a, b in ranges], dim)
    if dim == len(shape) - 1:
        return codes, scales.clone()
    return codes, torch.cat([scales.narrow(dim, a, b - a) for a, b in ranges], dim)


def shard_linear(
    layer: nn.Module,
    rank: int,
    world: int,
    dim: int,
    *,
    sections: Sequence[int] | None = None,
    name: str = "weight",
) -> Linear4bit | Linear8bitLt:
    """One rank's part of a quantized layer, as a layer of its own.

    The results of a layer cut by rows are parts of the whole result. Those of one cut by columns,
    each for its part of the input, add up to it; the bias goes to rank 0, so that it is added
    once. With int8 weights cut by columns each rank rounds its own part of the input.

    Args:
        layer: a quantized :class:`~..nn.Linear4bit` or :class:`~..nn.Linear8bitLt`; left as it is.
        rank, world, sections, name: as in :func:`shard_rows`.
        dim: 0 for rows (output features), 1 for columns (input features).

    Raises:
        ValueError: as :func:`shard_rows`, or for another ``dim``.
        TypeError: for another kind of layer.
        RuntimeError: the layer is not quantized.
    """
    if dim not in (0, 1):
        raise ValueError(f"dim must be 0 (rows) or 1 (columns), got {dim}")
    if not isinstance(layer, Linear4bit | Linear8bitLt):
        raise TypeError(
            f"shard_linear takes a Linear4bit or a Linear8bitLt, got {type(layer).__name__}"
        )
    weight, scales = _parts(layer)
    cut = shard_rows if dim == 0 else shard_columns
    codes, local = cut(weight, scales, rank, world, sections=sections, name=name)
    shape = [layer.out_features, layer.in_features]
    shape[dim] //= world

    new = _empty_like(layer, shape[1], shape[0])
    if isinstance(new, Linear4bit):
        new._take(codes, local, codes.dtype, replace=True)
    else:
        new._load_codes(codes, local, replace=True)
    bias: nn.Parameter | None = layer.bias
    if bias is not None and (dim == 0 or rank == 0):
        rows = [(0, layer.out_features)]
        if dim == 0:
            rows = _parallel(layer.out_features, rank, world, sections)
        local_bias = torch.cat([bias.detach()[a:b] for a, b in rows])
        new.bias = nn.Parameter(local_bias, requires_grad=bias.requires_grad)
    return new.train(layer.training)


def _parts(layer: Linear4bit | Linear8bitLt) -> tuple[Tensor, Any]:
    """Codes and scales of a quantized layer."""
    if isinstance(layer, Linear8bitLt):
        return layer._recover()
    from ..nn.modules import _recover

    return _recover(layer)


def _empty_like(
    layer: Linear4bit | Linear8bitLt, inputs: int, outputs: int
) -> Linear4bit | Linear8bitLt:
    """A layer with the settings of ``layer``, without a bias and on the meta device."""
    if isinstance(layer, Linear8bitLt):
        state = layer.state
        return Linear8bitLt(
            inputs,
            outputs,
            bias=False,
            has_fp16_weights=False,
            threshold=state.threshold,
            index=layer.index,
            device="meta",
        )
    weight = layer.weight
    new = Linear4bit(
        inputs,
        outputs,
        bias=False,
        compute_dtype=layer.compute_dtype,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        device="meta",
    )
    new.compute_type_is_set = layer.compute_type_is_set
    return new


# ---- ranges --------------------------------------------------------------------------------------


def _shape(weight: Tensor, scales: Any, name: str) -> tuple[int, ...]:
    """The shape that the weight decodes to, once codes and scales are known to fit each other."""
    if isinstance(scales, QuantState):
        shape = tuple(scales.shape)
        values = math.prod(shape)
        if not _packed.holds(weight, shape):
            raise ValueError(
                f"{name}: a packed weight of shape {list(shape)} takes "
                f"{_packed.packed_units(shape, weight.dtype)} elements of {weight.dtype}, "
                f"got {weight.numel()}"
            )
        if scales.absmax.numel() != -(-values // scales.blocksize):
            raise ValueError(
                f"{name}: {values} values in blocks of {scales.blocksize} have "
                f"{-(-values // scales.blocksize)} scales, got {scales.absmax.numel()}"
            )
        if scales.nested:
            inner = -(-scales.absmax.numel() // scales.state2.blocksize)
            if scales.state2.absmax.numel() != inner or scales.offset is None:
                raise ValueError(
                    f"{name}: {scales.absmax.numel()} scales in blocks of "
                    f"{scales.state2.blocksize} have {inner} scales and an offset, got "
                    f"{scales.state2.absmax.numel()} and {scales.offset}"
                )
    else:
        shape = tuple(weight.shape)
        if not isinstance(scales, Tensor):
            raise TypeError(
                f"{name}: scales must be a QuantState or a tensor, got {type(scales).__name__}"
            )
        if weight.dtype != torch.int8 or tuple(scales.shape) != shape[:-1]:
            raise ValueError(
                f"{name}: without a QuantState it must be int8 with a scale for each row, got "
                f"{weight.dtype} of shape {list(shape)} and scales of shape {list(scales.shape)}"
            )
    if len(shape) < 2:
        raise ValueError(f"{name}: only weights of two or three dimensions are cut, got {shape}")
    return shape


def _parallel(
    size: int, rank: int, world: int, sections: Sequence[int] | None
) -> list[tuple[int, int]]:
    """The ranges of ``rank`` when each section of a dimension of ``size`` is cut into ``world``."""
    ranges, start = [], 0
    for section in (size,) if sections is None else sections:
        part = section // world
        ranges.append((start + rank * part, start + (rank + 1) * part))
        start += section
    return ranges


def _split(
    shape: tuple[int, ...],
    dim: int,
    scales: Any,
    rank: int,
    world: int,
    sections: Sequence[int] | None,
    name: str,
) -> list[tuple[int, int]]:
    """:func:`_parallel`, checked: the parts of all ranks are equal and begin at blocks."""
    size, what = shape[dim], _what(shape, dim)
    for number in (rank, world, *(sections or ())):
        if not isinstance(number, int):
            raise TypeError(f"{name}: rank, world and sections must be integers, got {number!r}")
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"{name}: rank must be one of 0 to world - 1, got {rank} of {world}")
    parts = [size] if sections is None else list(sections)
    if not parts or sum(parts) != size or min(parts) < 0:
        raise ValueError(f"{name}: the sections must make up its {size} {what}, got {parts}")

    def missed(ranks: int) -> int | None:
        """A boundary between parts that is not one of blocks, if any."""
        if not isinstance(scales, QuantState):
            return None
        every = (_joined(_parallel(size, r, ranks, parts)) for r in range(ranks))
        found = (_plan(shape, dim, ranges, scales.blocksize).missed for ranges in every)
        return next((boundary for boundary in found if boundary is not None), None)

    divides = not any(part % world for part in parts)
    if not divides or missed(world) is not None:
        divisors = range(1, min(math.gcd(*parts), 1024) + 1)
        fit = [n for n in divisors if not any(p % n for p in parts) and missed(n) is None]
        reason = f"{size if len(parts) == 1 else parts} does not divide by it"
        if divides:
            reason = f"value {missed(world)} is inside a block of {scales.blocksize}"
        raise ValueError(
            f"{name}: the {what} of a weight of shape {list(shape)} cannot be cut into {world} "
            f"parts: {reason}; numbers of ranks that would do: {', '.join(map(str, fit))}"
        )
    return _parallel(size, rank, world, parts)


def _what(shape: Sequence[int], dim: int) -> str:
    return {1: "columns", 2: "rows"}.get(len(shape) - dim, "experts")


def _joined(ranges: _Ranges) -> list[tuple[int, int]]:
    """``ranges`` without empty ones (but one, if there is nothing else) and with those joined that
    follow each other."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif stop > start:
            joined.append((start, stop))
    return joined or [(0, 0)]


class _Plan(NamedTuple):
    """A flattened weight as ``outer`` equal parts, and what is taken of each of them."""

    outer: int
    size: int  # values of a part
    ranges: list[tuple[int, int]]  # values within a part
    missed: int | None  # a boundary that is not one of blocks, in values from the start, if any


def _plan(shape: tuple[int, ...], dim: int, ranges: _Ranges, blocksize: int) -> _Plan:
    """How to take ``ranges`` along ``dim``."""
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    size = shape[dim] * inner
    if list(ranges) == [(0, shape[dim])]:  # all of it, however its blocks lie
        whole = outer * size
        return _Plan(1, whole, [(0, whole)], None)
    flat = [(start * inner, stop * inner) for start, stop in ranges]
    missed = None
    if outer > 1 and size % blocksize:
        missed = size
    for position, (start, stop) in enumerate(flat):
        if start % blocksize:
            missed = start
        # A short last block can only be the last one of the result, too.
        ends_whole = outer == 1 and stop == size and position == len(flat) - 1
        if stop % blocksize and not ends_whole:
            missed = stop
    return _Plan(outer, size, flat, missed)


def _check_blocks(plan: _Plan, shape: tuple[int, ...], dim: int, blocksize: int, name: str) -> None:
    if plan.missed is None:
        return
    what, inner = _what(shape, dim), math.prod(shape[dim + 1 :])
    step = blocksize // math.gcd(blocksize, inner)
    if plan.outer > 1 and plan.size % blocksize:
        would = f"only all {shape[dim]} {what} would do, since {plan.size} is not whole blocks"
    else:
        would = f"ranges that begin and end at multiples of {step} {what} would do"
    raise ValueError(
        f"{name}: the {what} asked for of a weight of shape {list(shape)} have a boundary at value "
        f"{plan.missed}, inside a block of {blocksize}; {would}"
    )


# ---- cutting -------------------------------------------------------------------------------------


def _pieces(flat: Tensor, plan: _Plan, unit: int) -> Tensor:
    """What the plan takes of ``flat``, which holds an element for every ``unit`` values."""
    table = flat.view(plan.outer, -(-plan.size // unit))
    return torch.cat(
        [table[:, start // unit : -(-stop // unit)] for start, stop in plan.ranges], 1
    ).reshape(-1)


def _take_4bit(
    packed: Tensor, state: QuantState, plan: _Plan, shape: tuple[int, ...]
) -> tuple[Tensor, QuantState]:
    """Codes and state of what the plan takes; it begins and ends at blocks."""
    raw = packed.detach().reshape(-1).view(torch.uint8)
    raw = raw[: _packed.packed_bytes(state.shape)]
    codes = _packed.restore(_pieces(raw, plan, 2), packed.dtype, shape)
    offset, state2 = None, None
    absmax = _pieces(state.absmax.reshape(-1), plan, state.blocksize)
    if state.nested:
        blocksize = _nested_blocksize(plan, state)
        if blocksize is None:
            absmax = _decode_scales(absmax, plan, state)
        else:
            second = state.state2
            blocks = -(-state.absmax.numel() // blocksize)
            repeated = second.absmax.repeat_interleave(second.blocksize // blocksize)[:blocks]
            state2 = QuantState(
                absmax=_pieces(repeated, plan, state.blocksize * blocksize),
                code=second.code.clone(),
                blocksize=blocksize,
                dtype=second.dtype,
            )
            offset = state.offset.clone()
    taken = QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=state.code.clone(),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=offset,
        state2=state2,
    )
    return codes, taken


def _nested_blocksize(plan: _Plan, state: QuantState) -> int | None:
    """The largest block of scales at which everything taken begins and ends, or None."""
    size = state.state2.blocksize
    while size >= _SMALLEST_NESTED:
        shape = (plan.outer, plan.size)
        if _plan(shape, 1, plan.ranges, size * state.blocksize).missed is None:
            return size
        size //= 2
    return None


def _decode_scales(codes: Tensor, plan: _Plan, state: QuantState) -> Tensor:
    """The float32 scales of what the plan takes, of which ``codes`` are the 8-bit codes."""
    second = state.state2
    blocks = torch.arange(state.absmax.numel(), device=codes.device)
    position = _pieces(blocks, plan, state.blocksize) // second.blocksize
    return second.code[codes.int()] * second.absmax[position] + state.offset
