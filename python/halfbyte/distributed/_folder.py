"""The life of a checkpoint folder: begun as ``.partial``, renamed when whole, removed when old.

Only one process, rank 0, calls what changes something here.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

from . import _manifest
from ._manifest import CheckpointError

_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = re.compile(r"step-\d{8,}\.[0-9a-f]+\.partial")
_LOCK = "writing.lock"
_YOUNG, _OLD = 3600.0, 86400.0  # seconds, see _abandoned
_locks: dict[Path, Any] = {}


def final(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, by step, whether whole or not."""
    if not folder.is_dir():
        return []
    found = {
        int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found)]


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the highest step in ``folder``, or None.

    One whose manifest cannot be read, or that has a file missing or of another size than the
    manifest says, is passed over with a warning that names the file. Checksums are not computed;
    :func:`load_checkpoint` does that.
    """
    for path in reversed(steps(Path(folder))):
        try:
            for name, record in _manifest.read(path)["files"].items():
                _manifest.check_size(path, name, record)
        except CheckpointError as error:
            warnings.warn(f"passed over {path.name}: {error}", stacklevel=2)
        else:
            return path
    return None


def verify_checkpoint(path: str | os.PathLike[str], *, checksums: bool = True) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, and return the manifest.

    Needs no model and no process group. checksums: read all bytes (about 1 GB/s a core), not only
    the sizes.

    Raises:
        CheckpointError: the first thing that is wrong, with its file and tensor.
    """
    path = Path(path)
    manifest = _manifest.read(path)
    _manifest.check_files(path, manifest["files"], checksums=checksums)
    return manifest


def begin(path: Path) -> Path:
    """Make the folder to write the checkpoint ``path`` in; remove what dead jobs have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.iterdir():
        if _PARTIAL.fullmatch(other.name) and _abandoned(other):
            shutil.rmtree(other, ignore_errors=True)
    partial = _aside(path)
    partial.mkdir()
    # Locked for as long as this process lives and writes. Not flock: forked children, data loader
    # workers for example, would inherit that and keep it.
    stream = (partial / _LOCK).open("w")
    _lock(stream)
    _locks[partial] = stream
    return partial


def give_up(partial: Path) -> None:
    """Remove a folder that will not become a checkpoint."""
    _let_go(partial)
    shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, path: Path) -> None:
    """Give the finished folder its name. From then on the checkpoint exists."""
    _let_go(partial)
    (partial / _LOCK).unlink(missing_ok=True)
    replaced = None
    if path.exists():
        replaced = _aside(path)
        os.rename(path, replaced)
    os.rename(partial, path)
    _manifest.sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def thin(new: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints beside ``new``, which always stays."""
    old = [path for path in steps(new.parent) if path != new]
    for path in old[: max(0, len(old) + 1 - keep)]:
        aside = _aside(path)
        os.rename(path, aside)  # so that a kill leaves no half of it under its name
        shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}.partial")


def _lock(stream: Any) -> bool | None:
    """Take the lock of a file: True, False if another process has it, None without locks."""
    try:
        import fcntl

        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return None
    return True


def _let_go(partial: Path) -> None:
    stream = _locks.pop(partial, None)
    if stream is not None:
        stream.close()


def _abandoned(partial: Path) -> bool:
    """Whether the job that wrote in ``partial`` has ended.

    It has if its lock can be had: the kernel drops the lock of a process that dies. A folder
    without a lock file is just being made, renamed or removed, unless it has not changed for an
    hour. Where the file system has no locks, a day without a change decides.
    """
    if partial in _locks:  # this very process: it would be given its own lock again
        return False
    try:
        idle = time.time() - max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
        if not (partial / _LOCK).exists():
            return idle > _YOUNG
        with (partial / _LOCK).open("r+") as stream:
            free = _lock(stream)
    except OSError:  # it changed just now
        return False
    return idle > _OLD if free is None else free
