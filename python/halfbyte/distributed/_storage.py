"""Reading and writing through torch.distributed.checkpoint, with errors that name rank and file."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._manifest import CheckpointError


@contextlib.contextmanager
def _one_sentence(path: Path, verb: str) -> Iterator[None]:
    """Turn what torch raises on all ranks when one has failed into a CheckpointError."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():  # that there is no process group, and that pickles are read
            warnings.filterwarnings("ignore", message="torch.distributed is")
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise CheckpointError(
            f"rank {rank} could not {verb} {path}: {type(cause).__name__}: {cause}"
        ) from cause
