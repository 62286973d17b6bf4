"""What the package exports, under whichever name it was imported."""

from __future__ import annotations

from . import autograd, functional, nn, optim, utils
from .autograd._functions import matmul_4bit
from .optim import adam

features: set[str] = {"multi_backend"}
"""Capabilities that clients ask for by name."""

supported_torch_devices: set[str] = {"cpu"}
"""Device types (``torch.device.type``) that there are kernels for."""

__all__ = [
    "adam",
    "autograd",
    "features",
    "functional",
    "matmul_4bit",
    "nn",
    "optim",
    "supported_torch_devices",
    "utils",
]
