"""halfbyte under the name ``bitsandbytes``.

The submodules of this package are made from the very same source files as halfbyte's, but under
the names ``bitsandbytes.*``, with their ops under ``torch.ops.bitsandbytes``: this package's path
is halfbyte's folder. ``import halfbyte`` does not import this package, nor the other way round;
both work in one process and share one copy of the native code.
"""

from importlib.util import find_spec

_halfbyte = find_spec("halfbyte")  # locates it without running it
if _halfbyte is None or not _halfbyte.submodule_search_locations:
    raise ImportError(
        "bitsandbytes here is halfbyte's drop-in, and the distribution halfbyte is not installed: "
        "pip install halfbyte, or pip install --force-reinstall bitsandbytes==0.50.2 for upstream"
    )
__path__ = list(_halfbyte.submodule_search_locations)

from ._api import *  # noqa: E402, F403
from ._api import __all__ as _exports  # noqa: E402

__version__ = "0.50.2+halfbyte.0.1.0"

__all__ = ["__version__", *_exports]
