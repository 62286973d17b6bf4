"""The C library handle that clients of upstream look at.

Ops are reached through ``torch.ops``. Some clients go below them: they take functions from
``functional.lib`` and call them through ctypes with the addresses of tensors on a GPU. Those they
take are in the extension module: ``cdequantize_blockwise_fp32``, ``cdequantize_blockwise_{fp16,
bf16,fp32}[_nf4|_fp4]`` and ``cgemm_4bit_inference_naive_{fp16,bf16,fp32}``. The device is torch's
current one, the stream is the argument (None is the default stream), and what the arguments do not
allow is raised as a RuntimeError; outputs are left alone then.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Callable
from typing import Any

from ._load import native

_INT, _POINTER = ct.c_int32, ct.c_void_p
_DEQUANTIZE = [_POINTER] * 4 + [_INT, _INT, _POINTER]
"""code, codes, absmax, out, blocksize, n, stream."""
_GEMM = [_INT] * 3 + [_POINTER] * 5 + [_INT] * 4 + [_POINTER]
"""m, n, k, A, B, absmax, code, out, lda, ldb, ldc, blocksize, stream."""
_FLOATS = ("fp16", "bf16", "fp32")

_SYMBOLS: dict[str, list[Any]] = {
    **{f"cdequantize_blockwise_{t}{q}": _DEQUANTIZE for t in _FLOATS for q in ("", "_nf4", "_fp4")},
    **{f"cgemm_4bit_inference_naive_{t}": _GEMM for t in _FLOATS},
}


class BNBNativeLibrary:
    """Stands for upstream's native library."""

    _library: ct.CDLL | None = None

    @property
    def compiled_with_cuda(self) -> bool:
        """Whether a CUDA or ROCm device can be used. Asking opens the driver, not before."""
        return native.gpu_error("cuda", 0) is None or native.gpu_error("rocm", 0) is None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        function = self._symbol(name) if name in _SYMBOLS else _missing(name)
        # Kept, so that a `.restype` set on it stays.
        setattr(self, name, function)
        return function

    def _symbol(self, name: str) -> Callable[..., Any]:
        if self._library is None:
            self._library = ct.CDLL(native.__file__)
        function: Any = getattr(self._library, name)
        function.argtypes = _SYMBOLS[name]
        function.restype = None
        function.errcheck = _check
        return function

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def _check(result: Any, function: Any, arguments: Any) -> Any:
    """Raises what a symbol, which is C, could not."""
    error = native.take_symbol_error()
    if error is not None:
        raise RuntimeError(error)
    return result


def _missing(name: str) -> Callable[..., Any]:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"the native symbol {name!r} is not here: expected one of {', '.join(sorted(_SYMBOLS))}"
        )

    missing.__name__ = name
    return missing


lib = BNBNativeLibrary()

__all__ = ["BNBNativeLibrary", "lib"]
