"""The ops of layers of experts: schemas, shapes for tracing, gradients. All of them are ours.

``experts_matmul_4bit``, ``experts_matmul_8bit``
    Each row of ``A`` times the quantized weight of its expert, plus that expert's row of ``bias``
    ``[experts, out_features]``; the result is ``[tokens, slots, out_features]`` in the dtype of
    ``A``.
``experts_matmul_4bit_grad_input``, ``experts_matmul_8bit_grad_input``
    ``grad_output`` ``[tokens, slots, out_features]`` times the dequantized weights:
    ``[tokens, slots, in_features]``, or with ``shared`` ``[tokens, in_features]``, summed over
    slots.

``A`` is ``[tokens, in_features]``, where all slots of a token read one row, or
``[tokens, slots, in_features]``. ``expert_ids`` is int64 ``[tokens, slots]``; a number equal to
that of experts names none, and its row of the result is zero.

A 4-bit weight is ``shape`` = ``[experts, out_features, in_features]``. Every expert has its own
blocks, and is padded with zeros to whole blocks; where ``out_features * in_features`` is a multiple
of ``blocksize``, that is the layout of the whole tensor quantized at once. An 8-bit weight is
``CB``, int8 of that shape, and ``SCB``, float32 ``[experts, out_features]``.

On GPUs an op is one grouped product: nothing waits for the routes, and it can be captured in a CUDA
graph. So an id out of range, which the CPU refuses, makes its row NaN there.

The argument lists must equal those in ``crates/halfbyte-torch/src/experts.rs``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._load import native
from ._ops_base import (
    STATE,
    WEIGHT,
    check_bias,
    check_dtype,
    check_float,
    expect_shape,
    find,
    same_device,
    save,
    saved,
)

SCHEMAS = {
    "experts_matmul_4bit": f"(Tensor A, Tensor packed, {WEIGHT}, Tensor expert_ids, Tensor? bias,"
    f" {STATE}) -> Tensor",
    "experts_matmul_4bit_grad_input": f"(Tensor grad_output, Tensor packed, {WEIGHT},"
    f" Tensor expert_ids, bool shared, {STATE}) -> Tensor",
    "experts_matmul_8bit": "(Tensor A, Tensor CB, Tensor SCB, Tensor expert_ids, Tensor? bias,"
    " float threshold) -> Tensor",
    "experts_matmul_8bit_grad_input": "(Tensor grad_output, Tensor CB, Tensor SCB,"
    " Tensor expert_ids, bool shared) -> Tensor",
}


# ---- shapes and dtypes ---------------------------------------------------------------------------


def _sizes(shape: Sequence[Any]) -> Sequence[Any]:
    if len(shape) != 3:
        raise ValueError(
            f"the weight's shape must be [experts, out_features, in_features], got {list(shape)}"
        )
    return shape


def _routes(expert_ids: Tensor) -> Sequence[Any]:
    check_dtype("expert_ids", expert_ids, torch.int64)
    if expert_ids.dim() != 2:
        raise ValueError(
            "expert_ids must have two dimensions, [tokens, slots], got shape "
            f"{list(expert_ids.shape)}"
        )
    return expert_ids.shape


def _forward(A: Tensor, shape: Sequence[Any], expert_ids: Tensor, bias: Tensor | None) -> Tensor:
    experts, out_features, in_features = _sizes(shape)
    tokens, slots = _routes(expert_ids)
    check_float("A", A.dtype)
    one = A.dim() == 2
    expect_shape("A", A, (tokens, in_features) if one else (tokens, slots, in_features))
    check_bias(bias, (experts, out_features))
    return A.new_empty((tokens, slots, out_features))


def _grad_input(
    grad_output: Tensor, shape: Sequence[Any], expert_ids: Tensor, shared: bool
) -> Tensor:
    _, out_features, in_features = _sizes(shape)
    tokens, slots = _routes(expert_ids)
    check_float("grad_output", grad_output.dtype)
    expect_shape("grad_output", grad_output, (tokens, slots, out_features))
    return grad_output.new_empty((tokens, in_features) if shared else (tokens, slots, in_features))


def _experts_matmul_4bit(
    A: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    expert_ids: Tensor,
    bias: Tensor | None,
    *state: Any,
) -> Tensor:
    same_device(A, packed, absmax, expert_ids, bias, *state[:4])
    native.check_quant_type(quant_type)
    native.check_blocksize(int(blocksize))
    return _forward(A, shape, expert_ids, bias)


def _experts_matmul_4bit_grad_input(
    grad_output: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    expert_ids: Tensor,
    shared: bool,
    *state: Any,
) -> Tensor:
    same_device(grad_output, packed, absmax, expert_ids, *state[:4])
    native.check_quant_type(quant_type)
    native.check_blocksize(int(blocksize))
    return _grad_input(grad_output, shape, expert_ids, shared)


def _weight_8bit(CB: Tensor, SCB: Tensor) -> Sequence[Any]:
    check_dtype("CB", CB, torch.int8)
    check_dtype("SCB", SCB, torch.float32)
    shape = _sizes(CB.shape)
    expect_shape("SCB", SCB, shape[:2])
    return shape


def _experts_matmul_8bit(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    expert_ids: Tensor,
    bias: Tensor | None,
    threshold: float,
) -> Tensor:
    same_device(A, CB, SCB, expert_ids, bias)
    return _forward(A, _weight_8bit(CB, SCB), expert_ids, bias)


def _experts_matmul_8bit_grad_input(
    grad_output: Tensor, CB: Tensor, SCB: Tensor, expert_ids: Tensor, shared: bool
) -> Tensor:
    same_device(grad_output, CB, SCB, expert_ids)
    return _grad_input(grad_output, _weight_8bit(CB, SCB), expert_ids, shared)


FAKES: dict[str, Callable[..., Any]] = {
    "experts_matmul_4bit": _experts_matmul_4bit,
    "experts_matmul_4bit_grad_input": _experts_matmul_4bit_grad_input,
    "experts_matmul_8bit": _experts_matmul_8bit,
    "experts_matmul_8bit_grad_input": _experts_matmul_8bit_grad_input,
}


# ---- gradients: of the activations and the bias; the weight and the routes are constants ---------


def _bias_grad(grad: Tensor, expert_ids: Tensor, experts: Any, dtype: torch.dtype) -> Tensor:
    """``[experts, out_features]``: the sum of each expert's rows, in float32, rounded once."""
    rows = grad.flatten(0, 1).float()
    sums = rows.new_zeros(
        (experts + 1, rows.shape[1])
    )  # the last one is of those without an expert
    ids = expert_ids.flatten()
    # GPUs do not refuse an id out of range: it names no expert.
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
    return sums.index_add(0, ids, rows)[:experts].to(dtype)


def _setup_4bit(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    A, packed, absmax, blocksize, quant_type, shape, expert_ids, bias, *state = inputs
    *tensors, ctx.blocksize2 = state
    save(ctx, packed, absmax, expert_ids, *tensors)
    ctx.scalars = (blocksize, quant_type, shape)
    ctx.shared = A.dim() == 2
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_4bit(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    packed, absmax, expert_ids, *state = saved(ctx)
    weight = (packed, absmax, *ctx.scalars, expert_ids)
    if ctx.needs_input_grad[0]:
        op = find("experts_matmul_4bit_grad_input")
        grads[0] = op(grad, *weight, ctx.shared, *state, ctx.blocksize2)
    if ctx.needs_input_grad[7]:
        grads[7] = _bias_grad(grad, expert_ids, ctx.scalars[2][0], ctx.bias_dtype)
    return tuple(grads)


def _setup_4bit_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, packed, absmax, blocksize, quant_type, shape, expert_ids, _, *state = inputs
    *tensors, ctx.blocksize2 = state
    save(ctx, packed, absmax, expert_ids, *tensors)
    ctx.scalars = (blocksize, quant_type, shape)


def _backward_4bit_grad_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[0]:
        packed, absmax, expert_ids, *state = saved(ctx)
        weight = (packed, absmax, *ctx.scalars, expert_ids)
        grads[0] = find("experts_matmul_4bit")(grad, *weight, None, *state, ctx.blocksize2)
    return tuple(grads)


def _setup_8bit(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    A, CB, SCB, expert_ids, bias, _ = inputs
    save(ctx, CB, SCB, expert_ids)
    ctx.shared = A.dim() == 2
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_8bit(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    CB, SCB, expert_ids = saved(ctx)
    grad_A, grad_bias = None, None
    if ctx.needs_input_grad[0]:
        op = find("experts_matmul_8bit_grad_input")
        grad_A = op(grad, CB, SCB, expert_ids, ctx.shared)
    if ctx.needs_input_grad[4]:
        grad_bias = _bias_grad(grad, expert_ids, CB.shape[0], ctx.bias_dtype)
    return grad_A, None, None, None, grad_bias, None


def _setup_8bit_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    save(ctx, *inputs[1:4])


def _backward_8bit_grad_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Rare enough that all experts' weights are dequantized, and multiply all rows."""
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[0]:
        CB, SCB, expert_ids = saved(ctx)
        weight = find("int8_vectorwise_dequant.dtype")(CB, SCB, grad.dtype)
        rows = grad if grad.dim() == 3 else grad.unsqueeze(1)
        total = grad.new_zeros((*expert_ids.shape, CB.shape[1]))
        for expert in range(CB.shape[0]):
            routed = (expert_ids == expert).unsqueeze(-1)
            total = torch.where(routed, F.linear(rows, weight[expert]), total)
        grads[0] = total
    return tuple(grads)


GRADIENTS = {
    "experts_matmul_4bit": (_backward_4bit, _setup_4bit),
    "experts_matmul_4bit_grad_input": (_backward_4bit_grad_input, _setup_4bit_grad_input),
    "experts_matmul_8bit": (_backward_8bit, _setup_8bit),
    "experts_matmul_8bit_grad_input": (_backward_8bit_grad_input, _setup_8bit_grad_input),
}
