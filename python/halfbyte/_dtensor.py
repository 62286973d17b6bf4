"""What a DTensor is, for those who do not want to import them: that takes most of a second."""

from typing import Any


def is_dtensor(x: Any) -> bool:
    """Whether it is a ``torch.distributed.tensor.DTensor``."""
    return hasattr(x, "placements") and hasattr(x, "to_local")
