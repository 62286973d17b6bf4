"""Products of routed tokens with the weights of many experts, in one call, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import failure, ops

# Not from ._functions: functional, which that module needs, re-exports this one.
from ..functional import _NOT_NESTED, QuantState, _nested

_below_autograd = torch._C._AutoDispatchBelowAutograd  # see ._functions


def experts_matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    expert_ids: Tensor,
    bias: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """``result[t, j] = A[t] · dequantize(B[e])^T + bias[e]`` with ``e = expert_ids[t, j]``.

    Accumulated in float32, in the dtype of ``A``. Differentiable in ``A`` and ``bias``. Only the
    experts that a token goes to are read, and none of them is ever stored dequantized.

    Args:
        A: ``[tokens, in_features]`` (a token's row goes to all its experts) or
            ``[tokens, k, in_features]`` (a row for each), floating; float64 is computed in float32.
        B: the packed weight of all experts, each with blocks of its own.
        quant_state: its state.
        expert_ids: int64 ``[tokens, k]``. The number of experts itself means "none": that row of
            the result is zero.
        bias: ``[experts, out_features]``.
        shape: ``[experts, out_features, in_features]``; the state's when None. To be given where
            an expert does not divide into whole blocks and is stored zero-padded.

    Returns:
        ``[tokens, k, out_features]``.

    Raises:
        ValueError: when the parts do not fit each other, or for an id out of range.
    """
    if quant_state is None:
        raise ValueError("quant_state is required")
    if A.dtype == torch.float64:
        narrow = experts_matmul_4bit(A.float(), B, quant_state, expert_ids, bias, shape)
        return narrow.to(A.dtype)
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    s = quant_state
    shape = list(s.shape if shape is None else shape)
    if len(shape) != 3:
        raise ValueError(f"shape must be [experts, out_features, in_features], got {shape}")
    weight = (B, s.absmax, s.blocksize, s.quant_type, shape)
    state = (s._table(), *(_nested(s) if s.nested else _NOT_NESTED))
    try:
        if _differentiable(A, bias):
            return ops.experts_matmul_4bit.default(A, *weight, expert_ids, bias, *state)
        with _below_autograd():
            return ops.experts_matmul_4bit.default(A, *weight, expert_ids, bias, *state)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


def experts_matmul_8bit(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    expert_ids: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """As :func:`experts_matmul_4bit` with the weights and the product of LLM.int8().

    Args:
        A: as there.
        CB: int8 ``[experts, out_features, in_features]``.
        SCB: float32 ``[experts, out_features]``, the largest magnitude of each row.
        expert_ids, bias: as there.
        threshold: columns of ``A`` that hold a magnitude of at least this are multiplied in the
            precision of ``A``; none when 0.

    Returns:
        ``[tokens, k, out_features]``.

    Raises:
        ValueError: when the parts do not fit each other, or for an id out of range.
    """
    if A.dtype == torch.float64:
        return experts_matmul_8bit(A.float(), CB, SCB, expert_ids, bias, threshold).to(A.dtype)
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    try:
        if _differentiable(A, bias):
            return ops.experts_matmul_8bit.default(A, CB, SCB, expert_ids, bias, threshold)
        with _below_autograd():
            return ops.experts_matmul_8bit.default(A, CB, SCB, expert_ids, bias, threshold)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


def _differentiable(A: Tensor, bias: Tensor | None) -> bool:
    """Whether the op has to go through autograd (or a tracer has to see all of it)."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and (
        A.requires_grad or (bias is not None and bias.requires_grad)
    )


__all__ = ["experts_matmul_4bit", "experts_matmul_8bit"]
