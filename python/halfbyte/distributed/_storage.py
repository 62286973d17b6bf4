"""Reading and writing through torch.distributed.checkpoint, with errors that name rank and file."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._manifest import CheckpointError


@contextlib.contextmanager
def writing(path: Path, rank: int) -> Iterator[None]:
    """Turn an error of the file system, however wrapped, into one that names ``path``.

    torch's zip writer, for example, tells of a full disk as "unexpected pos".
    """
    try:
        yield
    except Exception as error:
        cause = _of_the_system(error)
        if cause is None:
            raise
        raise CheckpointError(
            f"rank {rank} could not write {path}: {cause.strerror or cause}"
        ) from error


def _of_the_system(error: BaseException | None) -> OSError | None:
    """The OSError that ``error`` comes of; None if there is none."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def writer(partial: Path, rank: int) -> Any:
    """torch's writer of one file a rank, which waits until each is on the disk."""
    from torch.distributed.checkpoint import FileSystemWriter

    class Writer(FileSystemWriter):
        # What these raise is pickled and loses its cause, so it is put in words here.
        def write_data(self, plan: Any, planner: Any) -> Any:
            with writing(partial / f"__{rank}_0.distcp", rank):
                return super().write_data(plan, planner)

        def finish(self, metadata: Any, results: Any) -> None:
            with writing(partial / ".metadata", rank):
                super().finish(metadata, results)

    return Writer(partial, sync_files=True)


@contextlib.contextmanager
def one_sentence(path: Path, verb: str) -> Iterator[None]:
    """Turn what torch raises on all ranks when one has failed into a CheckpointError."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():  # that there is no process group, and that pickles are read
            warnings.filterwarnings("ignore", message="torch.distributed is")
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        text = str(cause)
        if not isinstance(cause, CheckpointError):
            text = f"rank {rank} could not {verb} {path}: {type(cause).__name__}: {cause}"
        raise CheckpointError(text) from cause
