"""Optimizer settings per parameter. The optimizers themselves are not part of this version."""

from .optimizer import GlobalOptimManager

__all__ = ["GlobalOptimManager"]
