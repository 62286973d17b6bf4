"""Shared by the tests of the Python layer."""

from __future__ import annotations

import torch

torch.manual_seed(0)
