"""The ops of LLM.int8(): schemas, shapes for tracing, gradients.

The schemas of ``int8_vectorwise_quant``, ``int8_vectorwise_dequant``, ``int8_double_quant``,
``int8_linear_matmul[.out]``, ``int8_mm_dequant``, ``int8_scaled_mm`` and ``int8_mixed_scaled_mm``
are upstream's; the others are ours:

``int8_vectorwise_dequant.dtype``
    To another dtype than float32, rounded once.
``int8_linear[.outliers|.listed]``
    A whole layer: quantizes ``A`` ``[..., in_features]`` by rows, multiplies by ``CB``
    ``[out_features, in_features]`` under ``SCB``, adds outlier columns and bias. ``.outliers``
    also returns these columns, int64 and ascending, of which the number depends on the data.
    On a GPU that, and the columns of ``int8_vectorwise_quant`` and ``int8_double_quant`` with a
    threshold, must wait for the device; ``int8_linear`` does not. Nor does ``.listed``, which
    returns them as int32 ``[in_features]``, of which the first ones count, and int32 ``[1]``, how
    many these are.
``int8_linear_grad_input``
    ``grad_output`` · the dequantized weight.

Activations are float32, float16 or bfloat16 with any leading dimensions, and every leading index
is a row with a statistic of its own. A ``threshold`` that is not above zero means no outliers;
``outlier_cols`` is None then. A ``bias`` may have another floating-point dtype than the result.

The argument lists must equal those in ``crates/halfbyte-torch/src/{int8,int8_products}.rs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops_base import (
    bias_grad,
    check_bias,
    check_dtype,
    check_float,
    expect_shape,
    find,
    product,
    same_device,
    save,
    saved,
)

SCHEMAS = {
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant": "(Tensor A, Tensor stats) -> Tensor",
    "int8_vectorwise_dequant.dtype": "(Tensor A, Tensor stats, ScalarType dtype) -> Tensor",
    "int8_double_quant": "(Tensor A, float threshold=0.)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out": "(Tensor A, Tensor B, Tensor(a!) out) -> ()",
    "int8_mm_dequant": "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None,"
    " Tensor? bias=None) -> Tensor",
    "int8_scaled_mm": "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats,"
    " Tensor? bias=None, ScalarType? dtype=None) -> Tensor",
    "int8_mixed_scaled_mm": "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB,"
    " Tensor? outlier_cols=None, Tensor? bias=None) -> (Tensor, Tensor?)",
    "int8_linear": "(Tensor A, Tensor CB, Tensor SCB, Tensor? bias, float threshold) -> Tensor",
    "int8_linear.outliers": "(Tensor A, Tensor CB, Tensor SCB, Tensor? bias, float threshold)"
    " -> (Tensor, Tensor)",
    "int8_linear.listed": "(Tensor A, Tensor CB, Tensor SCB, Tensor? bias, float threshold)"
    " -> (Tensor, Tensor, Tensor)",
    "int8_linear_grad_input": "(Tensor grad_output, Tensor CB, Tensor SCB) -> Tensor",
}


# ---- shapes and dtypes ---------------------------------------------------------------------------


def _stats(what: str, tensor: Tensor, numel: Any) -> None:
    check_dtype(what, tensor, torch.float32)
    torch._check_value(
        tensor.numel() == numel,
        lambda: f"{what} must hold {numel} float32 values, got {tensor.numel()}",
    )


def _rows(what: str, tensor: Tensor) -> Any:
    """The number of rows of a tensor ``[..., columns]``."""
    if tensor.dim() == 0:
        raise ValueError(f"{what} must have at least one dimension, got none")
    rows: Any = 1
    for size in tensor.shape[:-1]:
        rows = rows * size
    return rows


def _int8_product(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    check_dtype("A", A, torch.int8)
    check_dtype("B", B, torch.int8)
    if B.dim() != 2:
        raise ValueError(
            f"B must have two dimensions, [out_features, in_features], got {list(B.shape)}"
        )
    _rows("A", A)
    torch._check_value(
        A.shape[-1] == B.shape[1],
        lambda: f"the last dimension of A must be {B.shape[1]}, got A of shape {list(A.shape)}",
    )
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype)


def _columns(A: Tensor) -> Tensor:
    """As many columns as the data will say."""
    return A.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _int8_vectorwise_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    check_float("A", A.dtype)
    return (
        A.new_empty(A.shape, dtype=torch.int8),
        A.new_empty((_rows("A", A),), dtype=torch.float32),
        _columns(A) if threshold > 0.0 else None,
    )


def _int8_vectorwise_dequant(
    A: Tensor, stats: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    same_device(A, stats)
    check_dtype("A", A, torch.int8)
    _stats("stats", stats, _rows("A", A))
    return A.new_empty(A.shape, dtype=check_float("dtype", dtype))


def _int8_double_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    codes, row_stats, outlier_cols = _int8_vectorwise_quant(A, threshold)
    col_stats = A.new_empty((A.shape[-1],), dtype=torch.float32)
    return codes, torch.empty_like(codes), row_stats, col_stats, outlier_cols


def _int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    same_device(A, B)
    return _int8_product(A, B, torch.int32)


def _int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    same_device(A, B, out)
    check_dtype("out", out, torch.int32)
    expect_shape("out", out, _int8_product(A, B, torch.int32).shape)


def _int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    same_device(A, row_stats, col_stats, bias)
    check_dtype("A", A, torch.int32)
    _stats("row_stats", row_stats, _rows("A", A))
    _stats("col_stats", col_stats, A.shape[-1])
    check_bias(bias, (A.shape[-1],))
    return A.new_empty(A.shape, dtype=check_float("dtype", dtype or torch.float16))


def _int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    same_device(A, B, row_stats, col_stats, bias)
    out = _int8_product(A, B, check_float("dtype", dtype or torch.float16))
    _stats("row_stats", row_stats, _rows("A", A))
    _stats("col_stats", col_stats, B.shape[0])
    check_bias(bias, (B.shape[0],))
    return out


def _int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    same_device(A, outlier_cols)
    expect_shape("CA", CA, A.shape)
    out = _int8_scaled_mm(CA, CB, SCA, SCB, bias, check_float("A", A.dtype))
    if outlier_cols is None:
        return out, A.new_empty((0,))
    check_dtype("outlier_cols", outlier_cols, torch.int64)
    return out, A.new_empty((_rows("A", A), outlier_cols.numel()))


def _int8_linear(
    A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    same_device(A, CB, SCB, bias)
    check_dtype("CB", CB, torch.int8)
    out = product(A, CB.shape, 1, 0)
    _stats("SCB", SCB, CB.shape[0])
    check_bias(bias, (CB.shape[0],))
    return out


def _int8_linear_outliers(
    A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    return _int8_linear(A, CB, SCB, bias, threshold), _columns(A)


def _int8_linear_listed(
    A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = _int8_linear(A, CB, SCB, bias, threshold)
    return out, A.new_empty(A.shape[-1:], dtype=torch.int32), A.new_empty(1, dtype=torch.int32)


def _int8_linear_grad_input(grad_output: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    same_device(grad_output, CB, SCB)
    check_dtype("CB", CB, torch.int8)
    _stats("SCB", SCB, CB.shape[0])
    return product(grad_output, CB.shape, 0, 1)


FAKES: dict[str, Callable[..., Any]] = {
    "int8_vectorwise_quant": _int8_vectorwise_quant,
    "int8_vectorwise_dequant": _int8_vectorwise_dequant,
    "int8_vectorwise_dequant.dtype": _int8_vectorwise_dequant,
    "int8_double_quant": _int8_double_quant,
    "int8_linear_matmul": _int8_linear_matmul,
    "int8_linear_matmul.out": _int8_linear_matmul_out,
    "int8_mm_dequant": _int8_mm_dequant,
    "int8_scaled_mm": _int8_scaled_mm,
    "int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
    "int8_linear": _int8_linear,
    "int8_linear.outliers": _int8_linear_outliers,
    "int8_linear.listed": _int8_linear_listed,
    "int8_linear_grad_input": _int8_linear_grad_input,
}


# ---- gradients: as if nothing had been rounded; the weight is a constant -------------------------


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, CB, SCB, bias, _ = inputs
    save(ctx, CB, SCB)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_linear(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_A, grad_bias = None, None
    if ctx.needs_input_grad[0]:
        grad_A = find("int8_linear_grad_input")(grad, *saved(ctx))
    if ctx.needs_input_grad[3]:
        grad_bias = bias_grad(grad, ctx.bias_dtype)
    return grad_A, None, None, grad_bias, None


def _setup_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    save(ctx, *inputs[1:])


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Rare enough that the weight may be dequantized for it."""
    if not ctx.needs_input_grad[0]:
        return None, None, None
    weight = find("int8_vectorwise_dequant.dtype")(*saved(ctx), grad.dtype)
    return F.linear(grad, weight), None, None


def _setup_bias(at: int) -> Callable[..., None]:
    """Of a product of which argument ``at`` is the bias: all that backward has to know."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.bias_dtype = None if inputs[at] is None else inputs[at].dtype
        ctx.at, ctx.arguments = at, len(inputs)

    return setup


def _backward_bias(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Codes have no gradient, and statistics are constants, as a weight's are."""
    grads: list[Any] = [None] * ctx.arguments
    if any(ctx.needs_input_grad[ctx.at :]):  # the dispatcher drops trailing defaults
        grads[ctx.at] = bias_grad(grad, ctx.bias_dtype)
    return tuple(grads)


def _setup_mixed(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    A, _, CB, _, SCB, outlier_cols, bias = inputs
    save(ctx, CB, SCB, outlier_cols)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.shape, ctx.dtype = A.shape, A.dtype


def _backward_mixed(ctx: Any, grad: Tensor | None, grad_sub: Tensor | None) -> tuple[Any, ...]:
    """``A`` itself takes part in its outlier columns only: the rest are the codes in ``CA``."""
    CB, SCB, columns = saved(ctx)
    grad_A, grad_bias = None, None
    if ctx.needs_input_grad[0] and columns is not None:
        grad_A = torch.zeros(ctx.shape, dtype=ctx.dtype, device=CB.device)
        if grad is not None:
            part = find("int8_linear_grad_input")(grad, CB.index_select(1, columns), SCB)
            grad_A = grad_A.index_add(-1, columns, part)
        if grad_sub is not None:
            part = grad_sub.reshape(*ctx.shape[:-1], columns.numel())
            grad_A = grad_A.index_add(-1, columns, part.to(ctx.dtype))
    if any(ctx.needs_input_grad[6:]) and grad is not None:
        grad_bias = bias_grad(grad, ctx.bias_dtype)
    return grad_A, None, None, None, None, None, grad_bias


GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "int8_mm_dequant": (_backward_bias, _setup_bias(4)),
    "int8_scaled_mm": (_backward_bias, _setup_bias(4)),
    "int8_mixed_scaled_mm": (_backward_mixed, _setup_mixed),
    "int8_linear": (_backward_linear, _setup_linear),
    "int8_linear.outliers": (_backward_linear, _setup_linear),
    "int8_linear.listed": (_backward_linear, _setup_linear),
    "int8_linear_grad_input": (_backward_grad_input, _setup_grad_input),
}
