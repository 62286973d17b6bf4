"""halfbyte: 4-bit and 8-bit quantization for PyTorch, with every kernel in Rust.

The same sources serve as the package ``bitsandbytes`` (the drop-in distribution of that name).
"""

from ._api import *  # noqa: F403
from ._api import __all__ as _exports
from ._load import native as _native

__version__: str = _native.version()

__all__ = ["__version__", *_exports]
