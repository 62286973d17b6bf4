"""LLM.int8() from its definition, in numpy: float32 step by step, and float64 with error bounds.

Nothing here calls halfbyte. Matrices are row-major: ``a`` ``[m, k]``, ``w`` ``[n, k]``, ``y``
``[m, n]``. The bounds are derived in docs/int8_error.md; names follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

INV_127 = np.float32(1) / np.float32(127)
INV_127_SQUARED = np.float32(1 / 127**2)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
THRESHOLDS = [0.0, 0.5, 2.0, 3.0, 6.0, 20.0, 1e30, float("inf")]

U32 = 2.0**-24
"""Unit roundoff of float32."""

ROUNDOFF = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of the last rounding; a float32 result is not rounded once more."""

UNDERFLOW = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
"""What one rounding may lose below the smallest normal number."""

CODE_SLACK = 1 + 2.0**-14
"""``a * (127 / r)`` is rounded twice: it misses by 2^-23 of at most 127, which is 2^-15 of half a
step."""


def values(tensor: Tensor) -> np.ndarray:
    """The exact values of a float tensor, in float64."""
    return tensor.detach().double().numpy()


def array32(tensor: Tensor) -> np.ndarray:
    """The exact values of a float16, bfloat16 or float32 tensor, in float32."""
    return tensor.detach().float().numpy()


# --- the definition, in float32 ---


@dataclass
class Rows:
    """A matrix quantized by rows: codes int8 ``[m, k]``, stats float32 ``[m]``, columns int64."""

    codes: np.ndarray
    stats: np.ndarray
    outliers: np.ndarray


def scales(stats: np.ndarray) -> np.ndarray:
    """``127 / r``; 0 for 0, and the largest float32 where it overflows."""
    with np.errstate(all="ignore"):
        scale = np.where(stats == 0, np.float32(0), np.float32(127) / stats)
    return np.where(np.isinf(scale), np.finfo(np.float32).max, scale).astype(np.float32)


def encode(a: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The nearest codes of ``a * scale``, ties to even, NaN to 0."""
    with np.errstate(all="ignore"):
        scaled = np.rint(a * scale)
    return np.where(np.isnan(scaled), 0, np.clip(scaled, -127, 127)).astype(np.int8)


def largest(magnitudes: np.ndarray, axis: int) -> np.ndarray:
    """The maximum along an axis, NaN if there is one, 0 of nothing."""
    return np.max(magnitudes, axis=axis, initial=np.float32(0)).astype(np.float32)


def quantize(
    a: np.ndarray,
    threshold: float = 0.0,
    scaling: Callable[[np.ndarray], np.ndarray] = scales,
) -> Rows:
    """``int8_vectorwise_quant`` of float32 values."""
    magnitudes = np.abs(a)
    high = magnitudes >= np.float32(threshold) if threshold > 0 else np.zeros(a.shape, bool)
    stats = largest(np.where(high, np.float32(0), magnitudes), 1)
    outliers = np.flatnonzero(high.any(0))
    codes = encode(a, scaling(stats)[:, None])
    codes[:, outliers] = 0
    return Rows(codes, stats, outliers)


def quantize_both(a: np.ndarray, threshold: float = 0.0) -> tuple[Rows, Rows]:
    """``int8_double_quant``: by rows and by columns (the latter's stats are ``[k]``)."""
    rows = quantize(a, threshold)
    high = np.abs(a) >= np.float32(threshold) if threshold > 0 else np.zeros(a.shape, bool)
    stats = largest(np.where(high, np.float32(0), np.abs(a)), 0)
    codes = encode(a, scales(stats)[None, :])
    codes[:, rows.outliers] = 0
    return rows, Rows(codes, stats, rows.outliers)


def dequantize(codes: np.ndarray, stats: np.ndarray) -> np.ndarray:
    """``int8_vectorwise_dequant`` in float32: two roundings."""
    return (codes.astype(np.float32) * stats[:, None]) * INV_127


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of float32 with one rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd there (to the
    neighbour with an odd last bit, unless it is exact), after which rounding to float32 sees on
    which side of every float32 midpoint the exact sum lies: 53 bits are more than 24 + 2.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = np.broadcast_to(c.astype(np.float64), product.shape)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)  # the exact rounding error of the sum
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & even, odd, total).astype(np.float32)


def int_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a · bᵀ`` of int8 matrices, exact, in int64."""
    # Products of at most 2^14 over at most 2^17 columns: below 2^53, so float64 is exact too.
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int64)


def epilogue(acc: np.ndarray, row_stats: np.ndarray, col_stats: np.ndarray) -> np.ndarray:
    """``(acc * (r / 127²)) * c`` in float32."""
    return (acc.astype(np.float32) * (row_stats[:, None] * INV_127_SQUARED)) * col_stats[None, :]


def linear32(
    a: np.ndarray, rows: Rows, codes: np.ndarray, scb: np.ndarray, bias: np.ndarray | None = None
) -> np.ndarray:
    """The int8 product with its outliers and bias, before the one rounding to the result's type."""
    y = epilogue(int_product(rows.codes, codes), rows.stats, scb)
    for column in rows.outliers:
        weight = dequantize(codes[:, [column]], scb)
        y = fma(np.broadcast_to(a[:, [column]], y.shape), np.broadcast_to(weight.T, y.shape), y)
    if bias is not None:
        y = y + bias[None, :]
    return y


def rounded(y: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Float32 values rounded once, to nearest even."""
    return torch.tensor(np.ascontiguousarray(y, np.float32)).to(dtype)


# --- the product in float64, and how far the result may be from it ---


@dataclass
class Bounded:
    """A float64 result and the largest error that the theory allows, element by element."""

    exact: np.ndarray
    limit: np.ndarray

    def ratio(self, y: Tensor | np.ndarray) -> np.ndarray:
        """Error over limit; above 1 is a violation, and so is what is not finite."""
        got = values(y) if isinstance(y, Tensor) else y
        error = np.abs(got.reshape(self.exact.shape) - self.exact)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(error == 0, 0.0, error / self.limit)
        return np.where(np.isfinite(got.reshape(self.exact.shape)), ratio, np.inf)

    def worst(self, y: Tensor | np.ndarray) -> float:
        """The largest ratio."""
        return float(self.ratio(y).max(initial=0.0))


def gamma(roundings: int | np.ndarray) -> np.ndarray:
    """The relative error of so many float32 roundings."""
    nu = np.asarray(roundings) * U32
    return nu / (1 - nu)


def after_rounding(exact: np.ndarray, limit: np.ndarray, dtype: torch.dtype) -> Bounded:
    """The limit once the float32 result has been rounded to ``dtype``."""
    size = np.abs(exact) + limit
    return Bounded(exact, limit + ROUNDOFF[dtype] * size + UNDERFLOW[dtype])


def outlier_mask(a: np.ndarray, threshold: float) -> np.ndarray:
    """Which columns are outliers, bool ``[k]``."""
    if not threshold > 0:
        return np.zeros(a.shape[1], bool)
    return (np.abs(a) >= threshold).any(0)


def row_scales(a: np.ndarray, threshold: float) -> np.ndarray:
    """The largest magnitude below the threshold in each row, float64 ``[m]``."""
    magnitudes = np.abs(a)
    if threshold > 0:
        magnitudes = np.where(magnitudes >= threshold, 0, magnitudes)
    return magnitudes.max(axis=1, initial=0.0)


def linear_bound(
    a: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    threshold: float,
    dtype: torch.dtype,
) -> Bounded:
    """The float product ``a · wᵀ + bias`` and the bound of the int8 one against it.

    ``a`` and ``w`` are the float64 values of what was quantized.
    """
    out = outlier_mask(a, threshold)
    half_a = row_scales(a, threshold)[:, None] / 254 * CODE_SLACK
    half_w = row_scales(w, 0.0)[None, :] / 254 * CODE_SLACK
    inside, beyond = a[:, ~out], a[:, out]
    sum_w = np.abs(w[:, ~out]).sum(1)[None, :]
    sum_a = np.abs(a).sum(1)[:, None]
    quantization = half_a * sum_w + half_w * sum_a + (~out).sum() * half_a * half_w

    offset = np.zeros(w.shape[0]) if bias is None else bias
    in_int8 = inside @ w[:, ~out].T
    exact = in_int8 + beyond @ w[:, out].T + offset[None, :]
    moved = np.abs(beyond) @ np.abs(w[:, out]).T + np.abs(beyond).sum(1)[:, None] * half_w
    size = np.abs(in_int8) + quantization + moved + np.abs(offset)[None, :]
    return after_rounding(exact, quantization + gamma(int(out.sum()) + 6) * size, dtype)


def stored_bound(
    a: np.ndarray,
    rows: Rows,
    codes: np.ndarray,
    scb: np.ndarray,
    bias: np.ndarray | None,
    dtype: torch.dtype,
) -> Bounded:
    """The product of the codes themselves in float64, and the bound of float32 arithmetic alone."""
    weight = codes.astype(np.float64) * scb.astype(np.float64)[:, None] / 127
    decoded = rows.codes.astype(np.float64) * rows.stats.astype(np.float64)[:, None] / 127
    offset = np.zeros(codes.shape[0]) if bias is None else bias
    in_int8 = decoded @ weight.T
    beyond, heavy = a[:, rows.outliers].astype(np.float64), weight[:, rows.outliers]
    exact = in_int8 + beyond @ heavy.T + offset[None, :]
    size = np.abs(in_int8) + np.abs(beyond) @ np.abs(heavy).T + np.abs(offset)[None, :]
    return after_rounding(exact, gamma(len(rows.outliers) + 6) * size, dtype)


def product_bound(a: np.ndarray, w: np.ndarray, extra: int, dtype: torch.dtype) -> Bounded:
    """``a · wᵀ`` and the bound of a float32 sum in any order, whose terms hold ``extra`` roundings.

    ``w`` holds the float64 values that the codes stand for.
    """
    exact = a @ w.T
    limit = gamma(a.shape[1] + extra) * (np.abs(a) @ np.abs(w).T)
    return after_rounding(exact, limit, dtype)


def expected_square(a: np.ndarray, w: np.ndarray, threshold: float) -> np.ndarray:
    """The mean square error ``[m, n]`` if rounding errors were uniform and independent."""
    out = outlier_mask(a, threshold)
    var_a = (row_scales(a, threshold)[:, None] / 127) ** 2 / 12
    var_w = (row_scales(w, 0.0)[None, :] / 127) ** 2 / 12
    sum_w = (w[:, ~out] ** 2).sum(1)[None, :]
    sum_a = (a**2).sum(1)[:, None]
    return var_a * sum_w + var_w * sum_a + (~out).sum() * var_a * var_w


def relative(y: Tensor | np.ndarray, exact: np.ndarray) -> float:
    """``‖y - exact‖ / ‖exact‖``, Frobenius norms in float64."""
    got = values(y) if isinstance(y, Tensor) else y
    return float(np.linalg.norm(got.reshape(exact.shape) - exact) / np.linalg.norm(exact))


# --- inputs ---


def generator(*seed: int) -> np.random.Generator:
    """Random numbers of one test."""
    return np.random.default_rng([8, *seed])


def matrix(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Float32 values: ``gaussian``, ``heavy`` (Student's t, 2 degrees), ``planted`` outliers."""
    if kind == "heavy":
        x = np.clip(rng.standard_t(2, shape), -80, 80)
    else:
        x = rng.standard_normal(shape)
    if kind == "planted" and shape[1]:
        columns = rng.choice(shape[1], min(3, shape[1]), replace=False)
        x[:, columns] += (
            rng.choice([-1.0, 1.0], len(columns)) * np.array([8, 25, 60])[: len(columns)]
        )
    return x.astype(np.float32)
