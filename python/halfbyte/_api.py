"""What the package exports, under whichever name it was imported."""

from __future__ import annotations

import os

from . import autograd, functional, integrations, nn, optim, utils
from .autograd._functions import MatmulLtState, matmul, matmul_4bit
from .nn import modules
from .optim import adam

features: set[str] = {"multi_backend"}
"""Capabilities that clients ask for by name."""

supported_torch_devices: set[str] = (
    {"cpu"}
    if os.environ.get("HALFBYTE_BACKEND", "").strip().lower() == "cpu"
    else {"cpu", "cuda", "xpu"}
)
"""Device types (``torch.device.type``) that there are kernels for; ``"cuda"`` is ROCm too. What of
it this machine has, ``python -m halfbyte`` says. ``HALFBYTE_BACKEND=cpu`` leaves the CPU."""

__all__ = [
    "MatmulLtState",
    "adam",
    "autograd",
    "features",
    "functional",
    "integrations",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "optim",
    "supported_torch_devices",
    "utils",
]

if __package__ == "bitsandbytes":  # what Transformers imports
    integrations.transformers.watch()
