"""Loads the Rust extension, once per process, whatever name this package was imported under.

The sources of this package also serve as the package ``bitsandbytes`` (the drop-in). Both share one
extension module, which keeps its canonical name, so that a second import finds the first one.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import TYPE_CHECKING

import torch

_CANONICAL = "halfbyte._native"

if TYPE_CHECKING:
    from . import _native as native
else:
    native = sys.modules.get(_CANONICAL)
    if native is None:
        _folder = os.path.dirname(os.path.abspath(__file__))
        _spec = PathFinder.find_spec(_CANONICAL, [_folder])
        if _spec is None:
            raise ImportError(
                f"the compiled extension _native is missing in {_folder}: install the package "
                "(pip install .) instead of importing its sources"
            )
        native = module_from_spec(_spec)
        sys.modules[_CANONICAL] = native
        try:
            _spec.loader.exec_module(native)
            # Looks up functions in the libtorch of this process; says so if it is too old.
            _torch = os.path.dirname(os.path.abspath(torch.__file__))
            native.bind(torch.__version__, os.path.join(_torch, "lib"))
            # Where PyPI's packages of NVRTC are, for kernels that have to be compiled.
            for _folder in ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"):
                native.add_library_folder(os.path.join(os.path.dirname(_torch), _folder))
        except BaseException:
            del sys.modules[_CANONICAL]
            raise
    sys.modules[f"{__package__}._native"] = native

__all__ = ["native"]
