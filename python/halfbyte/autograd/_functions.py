"""The product with a 4-bit weight and its gradient; the home of the 8-bit one
(``_matmul_8bit.py``)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .._ops import bias_grad, failure, ops, save_weight, saved_weight
from ..functional import _NOT_NESTED, QuantState, _buffer, _nested, dequantize_4bit
from ._matmul_8bit import GlobalOutlierPooler, MatMul8bitFp, MatMul8bitLt, MatmulLtState, matmul

_matmul_4bit = ops.matmul_4bit.default
_matmul_4bit_out = ops.matmul_4bit.out
_grad_input = ops.matmul_4bit_grad_input.default

_FUSED = (torch.bfloat16, torch.float32, torch.float16)

# The ops have autograd formulas, for torch.compile and direct callers. In eager mode they cost 5 us
# a call even when there is nothing to differentiate, so they are skipped where that is known
# (measured on a shared 2-core x86-64, 2026-11-21).
_below_autograd = torch._C._AutoDispatchBelowAutograd


def _weight(B: Tensor, s: QuantState) -> tuple[Any, ...]:
    """The weight as the ops take it: packed, absmax, blocksize, quant_type, shape, and the rest."""
    nested = _nested(s) if s.nested else _NOT_NESTED
    return B, s.absmax, s.blocksize, s.quant_type, s.shape, s._table(), *nested


class MatMul4Bit(torch.autograd.Function):
    """``A · dequantize(B)^T + bias``, with gradients for ``A`` and ``bias``.

    The dequantized weight exists neither in the forward nor in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        if quant_state is None:
            raise ValueError("quant_state is required")
        weight = _weight(B, quant_state)
        save_weight(ctx, weight, None)
        arguments = (A, *weight[:5], bias, *weight[5:])
        with _below_autograd():
            if out is None:
                return _matmul_4bit(*arguments)
            _matmul_4bit_out(*arguments, out)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        needs_A, _, _, needs_bias, _ = ctx.needs_input_grad
        grad_A, grad_b = None, None
        if needs_A:
            grad_A = _grad_input(grad_output, *saved_weight(ctx))
        if needs_bias:
            grad_b = bias_grad(grad_output)
        return grad_A, None, None, grad_b, None


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A · dequantize(B)^T + bias``, accumulated in float32, in the dtype of ``A``.

    Differentiable in ``A`` and ``bias``. The dequantized weight is never stored, except for
    float64 ``A``, which the fused kernels do not know.

    Args:
        A: ``[..., in_features]``.
        B: the packed weight of :func:`~..functional.quantize_4bit`, or its transpose.
        quant_state: its state, whose ``shape`` is ``[out_features, in_features]``.
        out: ``[..., out_features]`` of the dtype of ``A``, written and returned.
        bias: ``[out_features]``.

    Raises:
        ValueError: without a state, or when the shapes do not fit each other.
    """
    if quant_state is None:
        raise ValueError("quant_state is required")
    if A.dtype not in _FUSED:
        return _unfused(A, B, quant_state, out, bias)
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    if A.dim() == 0:
        raise ValueError("A must have at least one dimension, got none")
    if bias is not None and bias.dim() != 1:  # its length is checked with the product
        raise _bias_error(bias, quant_state.shape[0])
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        dual = _dual(A, B, quant_state, out, bias)
        if dual is not None:
            return dual
    shape = quant_state.shape
    try:
        if len(shape) == 2 and A.size(-1) != shape[1] and A.size(-1) == shape[0]:
            return _matmul_transposed(A, B, quant_state, out, bias)
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled() and (
                A.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return MatMul4Bit.apply(A, B, out, bias, quant_state)
            if out is None:
                with _below_autograd():
                    return _run(A, B, quant_state, None, bias)
        return _run(A, B, quant_state, out, bias)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


def _run(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None, bias: Tensor | None
) -> Tensor:
    packed, absmax, blocksize, quant_type, shape, *state = _weight(B, quant_state)
    if out is None:
        return _matmul_4bit(A, packed, absmax, blocksize, quant_type, shape, bias, *state)
    _matmul_4bit_out(A, packed, absmax, blocksize, quant_type, shape, bias, *state, out)
    return out


def _unfused(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None, bias: Tensor | None
) -> Tensor:
    if not A.is_floating_point():
        raise TypeError(f"A must be a floating-point tensor, got {A.dtype}")
    packed = B.t() if B.dim() == 2 and B.size(0) == 1 else B
    weight = torch.empty(quant_state.shape, dtype=torch.float32, device=packed.device)
    weight = dequantize_4bit(packed, quant_state, out=weight).to(A.dtype)
    if A.dim() == 0 or A.size(-1) != weight.size(-1):
        raise ValueError(
            f"the last dimension of A must be {weight.size(-1)}, got A of shape {list(A.shape)}"
        )
    out_features = weight.size(0)
    if bias is not None:
        if bias.shape != (out_features,):
            raise _bias_error(bias, out_features)
        bias = bias.to(A.dtype)
    if out is not None:
        _buffer("out", out, (*A.shape[:-1], out_features), A.dtype, A)
    result = F.linear(A, weight, bias)
    return result if out is None else out.copy_(result)


def _bias_error(bias: Tensor, out_features: int) -> ValueError:
    return ValueError(f"bias must have shape [{out_features}], got {list(bias.shape)}")


def _dual(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """The product and its tangent in forward-mode AD; None when nothing has a tangent."""
    A, dA = forward_ad.unpack_dual(A)
    bias, dbias = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    if dA is None and dbias is None:
        return None
    if out is not None:
        raise ValueError("out cannot be given for inputs with forward-mode tangents")
    result = matmul_4bit(A, B, quant_state, bias=bias)
    tangent = torch.zeros_like(result) if dA is None else matmul_4bit(dA, B, quant_state)
    return forward_ad.make_dual(result, tangent if dbias is None else tangent + dbias)


def _matmul_transposed(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None, bias: Tensor | None
) -> Tensor:
    """A weight that was quantized as ``[in_features, out_features]``, as very old clients did."""
    warnings.warn(
        f"matmul_4bit: the weight was quantized as [in_features, out_features] "
        f"{list(quant_state.shape)}; quantize it as [out_features, in_features]",
        DeprecationWarning,
        stacklevel=3,
    )
    result = _grad_input(A, *_weight(B, quant_state))
    if bias is not None:
        if bias.size(0) != result.size(-1):
            raise _bias_error(bias, result.size(-1))
        result = result + bias
    return result if out is None else out.copy_(result)


__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]
