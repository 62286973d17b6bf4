"""The C library handle that clients of upstream look at.

There is no C library here: kernels are reached through ``torch.ops``. ``lib`` answers the
questions that clients ask of it, and hands out functions that say what is missing when called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class BNBNativeLibrary:
    """Stands for the native library: ``compiled_with_cuda`` is False in this version."""

    compiled_with_cuda = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"the native symbol {name!r} belongs to a GPU back end, "
                "and this version runs on the CPU only"
            )

        missing.__name__ = name
        # Kept, so that a `.restype` set on it stays.
        setattr(self, name, missing)
        return missing

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


lib = BNBNativeLibrary()

__all__ = ["BNBNativeLibrary", "lib"]
