"""What other libraries need to make full use of this package. Nothing here imports them."""

from . import transformers

__all__ = ["transformers"]
