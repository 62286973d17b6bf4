"""Storage for optimizer states that may be larger than a GPU's memory: tensors on the GPU whose
pages it shares with the host.

The driver moves pages to whoever touches them (CUDA's and ROCm's managed memory, shared memory on
XPU), and back to the host when the GPU's memory is short. Steps ask for the pages they need ahead
of their use. The tensors are of the GPU like any other: only their memory does not come from
torch's allocator, and does not count in ``torch.cuda.memory_allocated()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .._load import native

KINDS = ("cuda", "xpu")
"""Device types that have such memory."""


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if device.type == "cuda" else torch.xpu.current_device()


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of zeros on a GPU, with ``is_paged`` and ``page_deviceid`` set.

    Raises:
        NotImplementedError: for a device that is no GPU with kernels, or one that cannot share
            pages with the host while it computes (under Windows and WSL).
        RuntimeError: when the GPU cannot be used, or the system has no memory for it.
    """
    from ._paged import mark

    if device.type not in KINDS:
        raise NotImplementedError(
            f"paged tensors live on the CPU, CUDA and XPU devices, got device {str(device)!r}"
        )
    nbytes = prod(shape) * dtype.itemsize
    if nbytes == 0:
        return mark(torch.zeros(tuple(shape), dtype=dtype, device=device))
    capsule = native.managed_zeros(nbytes, device.type, _index(device))
    return mark(from_dlpack(capsule).view(dtype).view(tuple(shape)))


def is_managed(tensor: Tensor) -> bool:
    """Whether a tensor's elements are in such memory."""
    return tensor.device.type in KINDS and native.is_managed(tensor.data_ptr())


def prefetch(tensor: Tensor, to_cpu: bool = False) -> None:
    """Asks for the pages of a tensor's storage to be moved to its GPU, or to the host, in the order
    of the current stream. Tensors elsewhere: nothing."""
    if tensor.numel() > 0 and tensor.device.type in KINDS:
        device = tensor.device
        native.prefetch_managed(tensor.data_ptr(), device.type, _index(device), to_cpu)


__all__ = ["KINDS", "is_managed", "prefetch", "zeros"]
