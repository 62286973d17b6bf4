"""What "equal" means between halfbyte and upstream."""

from __future__ import annotations

import numpy as np
import torch
from rule import ABSMAX_FLOOR, Rule, encode_fp4, pack, unpack

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, as integers of its item size."""
    return tensor.detach().contiguous().view(_INTEGER[tensor.element_size()])


def assert_same_bits(mine: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal dtype, shape and bits."""
    assert mine.dtype == theirs.dtype, f"{what}: {mine.dtype} is not upstream's {theirs.dtype}"
    assert mine.shape == theirs.shape, f"{what}: {mine.shape} is not upstream's {theirs.shape}"
    different = int((bits(mine) != bits(theirs)).sum())
    assert different == 0, f"{what}: {different} of {mine.numel()} values differ in their bits"


def assert_same_values(mine: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal dtype, shape and values: the sign of a zero may differ."""
    assert mine.dtype == theirs.dtype, f"{what}: {mine.dtype} is not upstream's {theirs.dtype}"
    assert mine.shape == theirs.shape, f"{what}: {mine.shape} is not upstream's {theirs.shape}"
    different = int((mine != theirs).sum())
    assert different == 0, f"{what}: {different} of {mine.numel()} values differ"


def assert_same_absmax(mine: torch.Tensor, theirs: torch.Tensor, count: int, block: int) -> None:
    """Equal scales; upstream alone raises that of a short last block to the floor."""
    expected = mine.clone()
    if count % block and float(theirs[-1]) == float(ABSMAX_FLOOR):
        assert float(mine[-1]) <= float(ABSMAX_FLOOR), "absmax of the short last block"
        expected[-1] = theirs[-1]
    assert_same_bits(expected, theirs, "absmax")


def assert_follows_rule(
    packed: torch.Tensor, x: torch.Tensor, block: int, quant_type: str, code: torch.Tensor
) -> None:
    """Packed bytes are exactly those of the project's rule."""
    table = code.numpy()
    _, scaled = Rule.scale(x.float().numpy(), block)
    if quant_type == "nf4":
        expected = pack(Rule(table).encode(scaled), 7)
    else:
        expected = pack(encode_fp4(scaled, table), 0)
    actual = packed.numpy().ravel()
    assert actual.size == expected.size, f"{actual.size} packed bytes, expected {expected.size}"
    wrong = np.flatnonzero(actual != expected.ravel())
    assert wrong.size == 0, (
        f"{wrong.size} of {actual.size} packed bytes differ from the rule, the first at byte "
        f"{wrong[0]}: {actual[wrong[0]]:#04x} instead of {expected.ravel()[wrong[0]]:#04x}"
    )


def assert_same_codes(
    mine: torch.Tensor,
    theirs: torch.Tensor,
    x: torch.Tensor,
    block: int,
    quant_type: str,
    code: torch.Tensor,
) -> None:
    """Equal packed bytes; FP4 may differ in the zero it picks and at exact negative midpoints."""
    assert mine.dtype == theirs.dtype, f"packed {mine.dtype} is not upstream's {theirs.dtype}"
    assert mine.shape == theirs.shape, f"packed {mine.shape} is not upstream's {theirs.shape}"
    if quant_type == "nf4":
        assert_same_bits(mine, theirs, "packed")
        return
    table = code.numpy()
    a, b = (unpack(t.numpy(), x.numel()) for t in (mine, theirs))
    _, scaled = Rule.scale(x.float().numpy(), block)
    ascending = np.unique(table)
    mid = ((ascending[1:] + ascending[:-1]) * np.float32(0.5)).astype(np.float32)
    zeros = (a % 8 == 0) & (b % 8 == 0)
    ties = np.isin(scaled, mid[mid < 0]) & (np.abs(table[b]) > np.abs(table[a]))
    wrong = np.flatnonzero((a != b) & ~zeros & ~ties)
    assert wrong.size == 0, (
        f"{wrong.size} of {a.size} FP4 codes differ, the first at {wrong[0]}: {a[wrong[0]]} for "
        f"{scaled[wrong[0]]!r} where upstream has {b[wrong[0]]}"
    )
