"""LLM.int8() as functions: rows of int8 codes with one float32 statistic each. Part of functional.

A statistic ``r`` is the largest magnitude of its row, and a code ``q`` stands for ``q * r / 127``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import failure, ops
from ._ops_base import FLOATS

_int8_vectorwise_quant = ops.int8_vectorwise_quant.default
_int8_vectorwise_dequant = ops.int8_vectorwise_dequant.default
_int8_double_quant = ops.int8_double_quant.default
_int8_linear_matmul = ops.int8_linear_matmul.default
_int8_linear_matmul_out = ops.int8_linear_matmul.out
_int8_mm_dequant = ops.int8_mm_dequant.default


def int8_linear_matmul(
    A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32
) -> Tensor:
    """``A · B^T`` of int8 matrices, exactly.

    Args:
        A: int8 ``[..., k]``; ``k`` at most 131,071, beyond which an int32 sum can overflow.
        B: int8 ``[n, k]``.
        out: int32 ``[..., n]``, written and returned.
        dtype: only int32.

    Returns:
        int32 ``[..., n]``.

    Raises:
        TypeError: for another dtype.
        ValueError: when the shapes do not fit each other, or rows are too long.
    """
    if dtype != torch.int32:
        raise TypeError(f"dtype must be torch.int32, got {dtype}")
    try:
        if out is None:
            return _int8_linear_matmul(A, B)
        _int8_linear_matmul_out(A, B, out)
        return out
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A * row_stats * col_stats / 127^2 + bias`` in float32, rounded once.

    Args:
        A: int32 ``[..., n]``, what :func:`int8_linear_matmul` returned.
        row_stats: float32, one for each row of ``A``.
        col_stats: float32 ``[n]``.
        out: of the shape of ``A``, written and returned. Its dtype is computed when it is float32,
            float16 or bfloat16; others get the float16 result.
        bias: ``[n]``, of a floating-point dtype.

    Returns:
        float16, of the shape of ``A``, or ``out``.

    Raises:
        TypeError: for another dtype.
        ValueError: when the shapes do not fit each other.
    """
    dtype = torch.float16 if out is None or out.dtype not in FLOATS else out.dtype
    try:
        result = _int8_mm_dequant(A, row_stats, col_stats, dtype, bias)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None
    if out is None:
        return result
    if out.shape != result.shape:
        raise ValueError(f"out must have shape {list(result.shape)}, got {list(out.shape)}")
    return out.copy_(result)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantizes ``A`` twice: by rows, as :func:`int8_vectorwise_quant` does, and by columns.

    Args:
        A: float32, float16 or bfloat16 ``[..., k]``.
        col_stats, row_stats, out_col, out_row: only None.
        threshold: magnitude from which on an element is an outlier; 0 for none.

    Returns:
        Codes by rows and codes by columns, int8 of the shape of ``A``; float32 statistics
        ``[rows]`` and ``[k]``; and the outlier columns, int64 and ascending, or None without a
        threshold.

    Raises:
        ValueError: for another dtype, or when buffers are given.
    """
    given = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    for name, buffer in given.items():
        if buffer is not None:
            raise ValueError(f"{name} must be None: int8_double_quant allocates its results")
    try:
        return _int8_double_quant(A, threshold)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """``A * stats / 127``, row by row.

    Args:
        A: int8 ``[..., k]``.
        stats: float32, one for each row of ``A``.

    Returns:
        float32, of the shape of ``A``.

    Raises:
        TypeError: for another dtype.
        ValueError: when the shapes do not fit each other.
    """
    try:
        return _int8_vectorwise_dequant(A, stats)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


def int8_vectorwise_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantizes every row of ``A`` to int8 under its own largest magnitude.

    With a threshold, elements of that magnitude or more have no part in the statistics, and the
    codes of their columns are 0 in every row. ``A`` is only read.

    Args:
        A: float32, float16 or bfloat16 ``[..., k]``. Infinity and NaN without a threshold make
            their row's statistic infinite or NaN, and its codes 0.
        threshold: 0 for none.

    Returns:
        int8 codes of the shape of ``A``, float32 statistics ``[rows]``, and the outlier columns,
        int64 and ascending, or None without a threshold.

    Raises:
        ValueError: for another dtype.
    """
    try:
        return _int8_vectorwise_quant(A, threshold)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


__all__ = [
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
]

for _name in __all__:  # of the module that clients know
    globals()[_name].__module__ = f"{__package__}.functional"
