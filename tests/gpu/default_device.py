"""Lets tests that were written for the CPU compute on the CUDA device.

What a test creates without naming a device is created on the CPU, so that random numbers are the
same, and moved; what asks for an array of numpy gets one of a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

CONSTRUCTORS = _device_constructors() - {torch.from_file, torch.load}
FROM_NUMPY = torch.from_numpy
ARRAYS = {torch.Tensor.numpy, torch.Tensor.__array__}


class DefaultDevice(TorchFunctionMode):
    """Works while `active`, in the thread that entered it."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.active = False
        self.device = torch.device(device)

    def __enter__(self) -> DefaultDevice:
        torch.from_numpy = self.from_numpy  # it asks no mode
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.from_numpy = FROM_NUMPY
        super().__exit__(*exception)

    def from_numpy(self, array: Any) -> torch.Tensor:
        made = FROM_NUMPY(array)
        return made.to(self.device) if self.active else made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in CONSTRUCTORS and kwargs.get("device") is None and kwargs.get("out") is None:
            made = func(*args, **kwargs)
            dense = type(made) is torch.Tensor and made.layout is torch.strided
            if dense and made.device.type == "cpu":
                moved = made.detach().to(self.device)
                return moved.requires_grad_(made.requires_grad)
            return made
        if func in ARRAYS and args[0].is_cuda:
            return func(args[0].cpu(), *args[1:], **kwargs)
        return func(*args, **kwargs)
