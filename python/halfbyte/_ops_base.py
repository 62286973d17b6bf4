"""What the modules of ops share: the namespace, checks of fakes, tensors kept for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = __name__.partition(".")[0]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

WEIGHT = "Tensor absmax, int blocksize, str quant_type, int[] shape"
"""A 4-bit weight's arguments after its packed codes."""
STATE = "Tensor? code, Tensor? absmax2, Tensor? code2, Tensor? offset, int blocksize2"
"""What else the state of a 4-bit weight may say; the last five arguments of an op."""


def same_device(*tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one device."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        listed = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"all tensors must be on the same device, got {listed}")


def check_float(what: str, dtype: torch.dtype) -> torch.dtype:
    """``dtype``; ValueError unless kernels compute with it."""
    if dtype not in FLOATS:
        raise ValueError(f"{what} must be float32, float16 or bfloat16, got {dtype}")
    return dtype


def check_dtype(what: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError unless the tensor has that dtype."""
    if tensor.dtype != dtype:
        raise TypeError(f"{what} must be {dtype}, got {tensor.dtype}")


def expect_shape(what: str, tensor: Tensor, shape: Sequence[Any]) -> None:
    """Raises ValueError unless the tensor has that shape."""

    def message() -> str:
        return f"{what} must have shape {list(shape)}, got {list(tensor.shape)}"

    if tensor.dim() != len(shape):
        raise ValueError(message())
    for got, size in zip(tensor.shape, shape, strict=True):
        torch._check_value(got == size, message)


def check_bias(bias: Tensor | None, shape: Sequence[Any]) -> None:
    """Raises unless the bias, if there is one, has that shape and holds floating-point numbers."""
    if bias is None:
        return
    if not bias.is_floating_point():
        raise TypeError(f"bias must be of a floating-point dtype, got {bias.dtype}")
    expect_shape("bias", bias, shape)


def expect(what: str, tensor: Tensor, numel: Any, *dtypes: torch.dtype) -> None:
    """ValueError unless the tensor has so many elements of one of the dtypes."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{what} must be {names}, got {tensor.dtype}")
    torch._check_value(
        tensor.numel() == numel,
        lambda: f"{what} must hold {numel} elements, got {tensor.numel()}",
    )


def product(A: Tensor, shape: Sequence[int], inner: int, outer: int) -> Tensor:
    """The result ``[..., shape[outer]]`` of ``A`` ``[..., shape[inner]]`` times a weight.

    Times the weight itself instead of its transpose (``inner`` is 0), ``A`` is a gradient.
    """
    what = "A" if inner else "grad_output"
    if len(shape) != 2:
        raise ValueError(f"the weight's shape must be [out_features, in_features], got {shape}")
    if A.dim() == 0:
        raise ValueError(f"{what} must have at least one dimension, got none")
    if A.shape[-1] != shape[inner]:
        raise ValueError(
            f"the last dimension of {what} must be {shape[inner]}, "
            f"got {what} of shape {list(A.shape)}"
        )
    check_float(what, A.dtype)
    return A.new_empty((*A.shape[:-1], shape[outer]))


def bias_grad(grad: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of the bias ``[out_features]`` for a gradient ``[..., out_features]``.

    The sum is rounded once, to ``dtype`` (that of ``grad`` when None).
    """
    if grad.dim() == 1:
        return grad if dtype is None else grad.to(dtype)
    return grad.flatten(0, -2).sum(0, dtype=dtype)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keeps tensors for backward.

    Autograd refuses to save what was made under ``torch.inference_mode()``: that is kept aside.
    """
    ctx.aside = [None if t is None or not t.is_inference() else t for t in tensors]
    ctx.save_for_backward(
        *[t if a is None else None for t, a in zip(tensors, ctx.aside, strict=True)]
    )


def saved(ctx: Any) -> list[Any]:
    """What :func:`save` kept. RuntimeError when a tensor was changed in place since."""
    return [t if a is None else a for t, a in zip(ctx.saved_tensors, ctx.aside, strict=True)]


def find(name: str) -> Any:
    """The op ``name`` (with its overload, if it is not the default one) of this package."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")
