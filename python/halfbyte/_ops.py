"""The ops: schemas, shapes for tracing, gradients. Their kernels are registered from Rust: the same
ones for the CPU, CUDA (as which torch knows ROCm too) and XPU.

They live under ``torch.ops.<name of this package>``. Those of LLM.int8() are in
:mod:`._ops_int8`, those of layers of experts in :mod:`._ops_experts`. The schemas of
``quantize_4bit``, ``dequantize_4bit[.out]``, ``quantize_blockwise``,
``dequantize_blockwise[.out]``, ``gemv_4bit[.out]``, ``gemm_4bit``, ``optimizer_update_32bit`` and
``optimizer_update_8bit_blockwise`` are upstream's; the others are ours:

``quantize_4bit.nested``, ``quantize_absmax``
    Double quantization, with the weight or of scales alone.
``dequantize_4bit.state[_out]``
    Everything a :class:`~.functional.QuantState` can say in one call. ``code`` replaces the
    standard table; ``absmax2``, ``code2`` and ``offset`` are given when ``absmax`` is quantized.
``matmul_4bit[.out]``, ``matmul_4bit_grad_input``
    The product with a weight in that form, and its gradient.
``optimizer_update_32bit.group``, ``optimizer_update_8bit_blockwise.group``
    An optimizer's step for many parameters that share their hyperparameters. ``state2`` and
    ``absmax2`` are empty for rules with one state; ``unorm_vec`` (float32 ``[1]`` each, they take
    the norms of the updates) is empty unless ``max_unorm`` is positive. bfloat16 parameters are
    rounded to nearest, or at random with one of ``streams`` each, or they are the sum of
    themselves and their ``compensation``. Of ``"schedule_free_adamw"`` ``state1`` is float32
    beside an 8-bit ``state2`` too, and ``absmax1`` is empty.

The argument lists must equal those in ``crates/halfbyte-torch/src/{ops,products,optim}.rs``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops_experts, _ops_int8
from ._load import native
from ._ops_base import (
    FLOATS,
    NAMESPACE,
    STATE,
    WEIGHT,
    bias_grad,
    check_float,
    expect,
    find,
    product,
    same_device,
    save,
    saved,
)

_RATES = "float beta1, float beta2, float beta3, float alpha, float eps"
_REST = "float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros"

_SCHEMAS = {
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage)"
    " -> (Tensor, Tensor)",
    "quantize_4bit.out": "(Tensor A, int blocksize, str quant_type, Tensor(a!) out,"
    " Tensor(b!) absmax) -> ()",
    "quantize_4bit.nested": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage,"
    " int blocksize2) -> (Tensor, Tensor, Tensor, Tensor)",
    "dequantize_4bit": f"(Tensor A, {WEIGHT}, ScalarType dtype) -> Tensor",
    "dequantize_4bit.out": f"(Tensor A, {WEIGHT}, ScalarType dtype, Tensor(a!) out) -> ()",
    "dequantize_4bit.state": f"(Tensor A, {WEIGHT}, ScalarType dtype, {STATE}) -> Tensor",
    "dequantize_4bit.state_out": f"(Tensor A, {WEIGHT}, {STATE}, Tensor(a!) out) -> ()",
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "quantize_blockwise.out": "(Tensor A, Tensor code, int blocksize, Tensor(a!) out,"
    " Tensor(b!) absmax) -> ()",
    "dequantize_blockwise": "(Tensor A, Tensor absmax, Tensor code, int blocksize,"
    " ScalarType dtype) -> Tensor",
    "dequantize_blockwise.out": "(Tensor A, Tensor absmax, Tensor code, int blocksize,"
    " ScalarType dtype, Tensor(a!) out) -> ()",
    "quantize_absmax": "(Tensor absmax, int blocksize) -> (Tensor, Tensor, Tensor)",
    "gemv_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize)"
    " -> Tensor",
    "gemv_4bit.out": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code,"
    " int blocksize, Tensor(a!) out) -> ()",
    "gemm_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type,"
    " Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None,"
    " Tensor? absmax_offset=None) -> Tensor",
    "matmul_4bit": f"(Tensor A, Tensor packed, {WEIGHT}, Tensor? bias, {STATE}) -> Tensor",
    "matmul_4bit.out": f"(Tensor A, Tensor packed, {WEIGHT}, Tensor? bias, {STATE},"
    " Tensor(a!) out) -> ()",
    "matmul_4bit_grad_input": f"(Tensor grad_output, Tensor packed, {WEIGHT}, {STATE}) -> Tensor",
    "optimizer_update_32bit": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p,"
    " Tensor(a2!) state1, Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm,"
    f" float param_norm, {_RATES}, {_REST}=False) -> ()",
    "optimizer_update_32bit.group": "(str optimizer_name, Tensor[] g, Tensor(a!)[] p,"
    " Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] unorm_vec,"
    f" Tensor(e!)[] compensation, float max_unorm, {_RATES}, {_REST}, int[] streams, int seed)"
    " -> ()",
    "optimizer_update_8bit_blockwise": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p,"
    f" Tensor(a2!) state1, Tensor(a3!)? state2, {_RATES}, int step, float lr, Tensor(a4!) qmap1,"
    " Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay,"
    " float gnorm_scale, bool skip_zeros=False) -> ()",
    "optimizer_update_8bit_blockwise.group": "(str optimizer_name, Tensor[] g, Tensor(a!)[] p,"
    " Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] absmax1, Tensor(e!)[] absmax2,"
    f" Tensor(f!)[] compensation, Tensor qmap1, Tensor? qmap2, {_RATES}, {_REST}, int[] streams,"
    " int seed) -> ()",
    **_ops_int8.SCHEMAS,
    **_ops_experts.SCHEMAS,
}


def failure(error: Exception) -> Exception:
    """The exception to raise for one that an op raised.

    The dispatcher only knows RuntimeError; the extension remembers what it meant. Arguments of a
    wrong Python type never reach it and become a TypeError.
    """
    meant = native.take_error()
    if meant is not None and str(meant) in str(error):  # else it was of an op called directly
        return meant
    if isinstance(error, NotImplementedError) and "'Sparse" in str(error):
        return NotImplementedError("the ops work on dense tensors, got a sparse one")
    if isinstance(error, NotImplementedError) and "backend" in str(error):
        reason = str(error).partition(". ")[0]
        return NotImplementedError(f"there are kernels for the CPU, CUDA and XPU only: {reason}")
    if type(error) is RuntimeError and "Expected a value of type" in str(error):
        return TypeError(str(error).partition("\n")[0])
    return error


# ---- shapes and dtypes, for meta tensors, FakeTensor, torch.compile and torch.export ------------


def _blocks(numel: int, blocksize: int) -> int:
    native.check_blocksize(int(blocksize))
    return -(-numel // int(blocksize))


def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    native.check_quant_type(quant_type)
    check_float("A", A.dtype)
    units = -(-((A.numel() + 1) // 2) // quant_storage.itemsize)
    packed = A.new_empty((units, 1), dtype=quant_storage)
    return packed, A.new_empty((_blocks(A.numel(), blocksize),), dtype=torch.float32)


def _quantize_4bit_out(
    A: Tensor, blocksize: int, quant_type: str, out: Tensor, absmax: Tensor
) -> None:
    same_device(A, out, absmax)
    _quantize_4bit(A, blocksize, quant_type, out.dtype)


def _quantize_4bit_nested(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, blocksize2: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, absmax = _quantize_4bit(A, blocksize, quant_type, quant_storage)
    return packed, *_quantize_absmax(absmax, blocksize2)


def _quantize_absmax(absmax: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    return (
        absmax.new_empty((n,), dtype=torch.uint8),
        absmax.new_empty((_blocks(n, blocksize),), dtype=torch.float32),
        absmax.new_empty((), dtype=torch.float32),
    )


def _dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    code: Tensor | None = None,
    absmax2: Tensor | None = None,
    code2: Tensor | None = None,
    offset: Tensor | None = None,
    blocksize2: int = 256,
) -> Tensor:
    same_device(A, absmax, code, absmax2, code2, offset)
    native.check_quant_type(quant_type)
    native.check_blocksize(int(blocksize))
    return A.new_empty(tuple(shape), dtype=check_float("dtype", dtype))


def _dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    same_device(A, absmax, out)


def _dequantize_4bit_state_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    code: Tensor | None,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize2: int,
    out: Tensor,
) -> None:
    same_device(A, absmax, code, absmax2, code2, offset, out)


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    same_device(A, code)
    check_float("A", A.dtype)
    return (
        A.new_empty(A.shape, dtype=torch.uint8),
        A.new_empty((_blocks(A.numel(), blocksize),), dtype=torch.float32),
    )


def _quantize_blockwise_out(
    A: Tensor, code: Tensor, blocksize: int, out: Tensor, absmax: Tensor
) -> None:
    same_device(A, code, out, absmax)


def _dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    same_device(A, absmax, code)
    native.check_blocksize(int(blocksize))
    return A.new_empty(A.shape, dtype=check_float("dtype", dtype))


def _dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    same_device(A, absmax, code, out)


def _gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    same_device(A, B, absmax, code)
    return product(A, shapeB, 1, 0)


def _gemv_4bit_out(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out: Tensor,
) -> None:
    same_device(A, B, absmax, code, out)


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    same_device(A, B, absmax, bias, absmax_8bit, absmax_code, absmax_offset)
    native.check_quant_type(quant_type)
    return product(A, shapeB, 1, 0)


def _matmul_4bit(
    A: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: Tensor | None,
    *state: Any,
) -> Tensor:
    same_device(A, packed, absmax, bias, *state[:4])
    native.check_quant_type(quant_type)
    return product(A, shape, 1, 0)


def _matmul_4bit_out(
    A: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: Tensor | None,
    *state_and_out: Any,
) -> None:
    *state, _, out = state_and_out
    same_device(A, packed, absmax, bias, *state, out)


def _matmul_4bit_grad_input(
    grad_output: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    *state: Any,
) -> Tensor:
    same_device(grad_output, packed, absmax, *state[:4])
    native.check_quant_type(quant_type)
    return product(grad_output, shape, 0, 1)


def _optimizer_update(
    g: Sequence[Tensor],
    p: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    state_dtype: torch.dtype,
    *others: Sequence[Tensor],
) -> None:
    """Cheap checks; the kernel has all of them."""
    lengths = {len(g), len(state1)} | {len(column) for column in (state2, *others) if column}
    if lengths - {len(p)}:
        raise ValueError(
            f"every list must hold {len(p)} tensors as p does, or none where the rule has none, "
            f"got {sorted(lengths)}"
        )
    for index, (parameter, gradient, state) in enumerate(zip(p, g, state1, strict=True)):
        rest = [column[index] for column in (state2, *others) if column]
        same_device(parameter, gradient, state, *rest)
        expect(f"parameter {index}", parameter, parameter.numel(), *FLOATS)
        expect(f"g of parameter {index}", gradient, parameter.numel(), *FLOATS)
        if state.dtype != state_dtype:
            raise ValueError(
                f"state1 of parameter {index} must be {state_dtype}, got {state.dtype}"
            )


def _state_dtype(optimizer_name: str) -> torch.dtype:
    """Of the first state, where the others have 8 bits."""
    return torch.float32 if optimizer_name == "schedule_free_adamw" else torch.uint8


def _optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    *_: Any,
) -> None:
    same_device(g, p, state1, state2, unorm_vec)
    _optimizer_update([g], [p], [state1], [], torch.float32)


def _optimizer_update_32bit_group(
    optimizer_name: str,
    g: Sequence[Tensor],
    p: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    unorm_vec: Sequence[Tensor],
    compensation: Sequence[Tensor],
    *_: Any,
) -> None:
    _optimizer_update(g, p, state1, state2, torch.float32, unorm_vec, compensation)


def _optimizer_update_8bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    *_: Any,
) -> None:
    same_device(g, p, state1, state2, qmap1, qmap2, absmax1, absmax2)
    _optimizer_update([g], [p], [state1], [], _state_dtype(optimizer_name))


def _optimizer_update_8bit_group(
    optimizer_name: str,
    g: Sequence[Tensor],
    p: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    compensation: Sequence[Tensor],
    qmap1: Tensor,
    qmap2: Tensor | None,
    *_: Any,
) -> None:
    same_device(*p[:1], qmap1, qmap2)
    dtype = _state_dtype(optimizer_name)
    _optimizer_update(g, p, state1, state2, dtype, absmax1, absmax2, compensation)


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize_4bit": _quantize_4bit,
    "quantize_4bit.out": _quantize_4bit_out,
    "quantize_4bit.nested": _quantize_4bit_nested,
    "dequantize_4bit": _dequantize_4bit,
    "dequantize_4bit.out": _dequantize_4bit_out,
    "dequantize_4bit.state": _dequantize_4bit,
    "dequantize_4bit.state_out": _dequantize_4bit_state_out,
    "quantize_blockwise": _quantize_blockwise,
    "quantize_blockwise.out": _quantize_blockwise_out,
    "dequantize_blockwise": _dequantize_blockwise,
    "dequantize_blockwise.out": _dequantize_blockwise_out,
    "quantize_absmax": _quantize_absmax,
    "gemv_4bit": _gemv_4bit,
    "gemv_4bit.out": _gemv_4bit_out,
    "gemm_4bit": _gemm_4bit,
    "matmul_4bit": _matmul_4bit,
    "matmul_4bit.out": _matmul_4bit_out,
    "matmul_4bit_grad_input": _matmul_4bit_grad_input,
    "optimizer_update_32bit": _optimizer_update_32bit,
    "optimizer_update_32bit.group": _optimizer_update_32bit_group,
    "optimizer_update_8bit_blockwise": _optimizer_update_8bit,
    "optimizer_update_8bit_blockwise.group": _optimizer_update_8bit_group,
    **_ops_int8.FAKES,
    **_ops_experts.FAKES,
}


# ---- gradients: of the activations and the bias; the quantized weight is a constant --------------


def save_weight(ctx: Any, weight: tuple[Any, ...], bias_index: int | None) -> None:
    """Keeps the weight (packed, absmax, blocksize, quant_type, shape, state...) for backward."""
    packed, absmax, *scalars, code, absmax2, code2, offset, blocksize2 = weight
    save(ctx, packed, absmax, code, absmax2, code2, offset)
    ctx.scalars = scalars
    ctx.blocksize2 = blocksize2
    ctx.bias_index = bias_index


def saved_weight(ctx: Any) -> tuple[Any, ...]:
    """What :func:`save_weight` kept. RuntimeError when a tensor was changed in place since."""
    packed, absmax, *state = saved(ctx)
    return (packed, absmax, *ctx.scalars, *state, ctx.blocksize2)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[0]:
        grads[0] = find("matmul_4bit_grad_input")(grad, *saved_weight(ctx))
    if ctx.bias_index is not None and ctx.needs_input_grad[ctx.bias_index]:
        grads[ctx.bias_index] = bias_grad(grad)
    return tuple(grads)


def _setup_matmul_4bit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, _, code, absmax2, code2, offset, blocksize2 = inputs
    save_weight(ctx, (*weight, code, absmax2, code2, offset, blocksize2), 6)


def _setup_gemm_4bit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, shape, absmax, blocksize, quant_type, _, first, code2, offset = inputs
    if first is not None:
        weight = (packed, first, blocksize, quant_type, shape, None, absmax, code2, offset, 256)
    else:
        weight = (packed, absmax, blocksize, quant_type, shape, None, None, None, None, 256)
    save_weight(ctx, weight, 6)


def _setup_gemv_4bit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, shape, absmax, code, blocksize = inputs
    # The table is given, so the name of the type does not matter.
    save_weight(ctx, (packed, absmax, blocksize, "nf4", shape, code, None, None, None, 256), None)


def _setup_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_weight(ctx, inputs[1:], None)


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[0]:
        packed, absmax, blocksize, quant_type, shape, *state = saved_weight(ctx)
        grads[0] = find("matmul_4bit")(
            grad, packed, absmax, blocksize, quant_type, shape, None, *state
        )
    return tuple(grads)


_GRADIENTS = {
    "gemm_4bit": (_backward, _setup_gemm_4bit),
    "gemv_4bit": (_backward, _setup_gemv_4bit),
    "matmul_4bit": (_backward, _setup_matmul_4bit),
    "matmul_4bit_grad_input": (_backward_grad_input, _setup_grad_input),
    **_ops_int8.GRADIENTS,
    **_ops_experts.GRADIENTS,
}


def _count_writes(library: torch.library.Library, name: str) -> None:
    """Makes autograd notice that an op writes to some of its arguments."""
    op = find(name)
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None]

    def kernel(keyset: Any, *args: Any) -> None:
        changed: list[Tensor] = []
        for i in written:
            argument = args[i]
            if isinstance(argument, Tensor):
                changed.append(argument)
            elif argument is not None:
                changed.extend(argument)
        torch.autograd.graph.increment_version(changed)
        op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    library.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


_VERSIONS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def step_group(op: Any, name: str, g: list[Tensor], p: list[Tensor], *arguments: Any) -> None:
    """Calls an ``optimizer_update_*.group`` op, faster than by itself.

    Of what it changes only the parameters are marked as changed: the gradient of nothing needs the
    states. For 200 parameters with 8-bit Adam that saves 0.1 of 0.5 ms (2-core Xeon, 2026-11).
    """
    if not p:
        return  # the dispatcher would not know which kernel to call
    if torch.compiler.is_compiling():
        op(name, g, p, *arguments)
        return
    with torch._C._ExcludeDispatchKeyGuard(_VERSIONS):
        op(name, g, p, *arguments)
    torch.autograd.graph.increment_version(p)


_KEPT: list[torch.library.Library] = []
"""What is registered through these goes when they do."""


def _register() -> None:
    """Defines everything under this package's namespace, once per process."""
    if native.is_registered(NAMESPACE):
        return
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _KEPT.append(library)
    for name, schema in _SCHEMAS.items():
        op = f"{NAMESPACE}::{name}"
        torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(op, _FAKES[name])
        if "!" in schema:
            _count_writes(library, name)
    for name, (backward, setup) in _GRADIENTS.items():
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup)
    native.register(NAMESPACE)


_register()
ops = getattr(torch.ops, NAMESPACE)

__all__ = [
    "NAMESPACE",
    "bias_grad",
    "failure",
    "ops",
    "save_weight",
    "saved_weight",
    "step_group",
]
