"""Optimizer settings per parameter. The optimizers themselves are not part of this version."""

from .optimizer import GlobalOptimManager

__all__ = ["GlobalOptimManager"]


def __getattr__(name: str) -> object:
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}: the optimizers are not in this version of "
        "halfbyte, which holds GlobalOptimManager only"
    )
