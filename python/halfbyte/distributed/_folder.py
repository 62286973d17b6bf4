"""The life of a checkpoint folder: begun as ``.partial``, renamed when whole, removed when old.

One of an abandoned branch of the run is renamed to ``.abandoned``, which only its path loads.

Only one process, rank 0, calls what changes something here.
"""

from __future__ import annotations

import contextlib
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


def is_one(path: Path) -> bool:
    """Whether ``path`` is a folder with the name of a checkpoint, and not a folder of some."""
    return path.is_dir() and _NAME.fullmatch(path.name) is not None and not steps(path)


def is_whole(path: Path) -> bool:
    """Whether all files of a checkpoint are there, in their sizes."""
    try:
        _manifest.check_sizes(path)
    except CheckpointError:
        return False
    return True


def check_free(path: Path, *, overwrite: bool) -> None:
    """FileExistsError if ``path`` is a whole checkpoint that must not be replaced, or a file."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is there already, and is a file")
    if not overwrite and is_whole(path):
        raise FileExistsError(f"{path} is there already; overwrite=True replaces it")


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the highest step in ``folder``, or None.

    One whose manifest cannot be read, or that has a file missing or of another size than the
    manifest says, is passed over with a warning that names the file. Checksums are not computed;
    :func:`load_checkpoint` does that.
    """
    for path in reversed(steps(Path(folder))):
        try:
            _manifest.check_sizes(path)
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
    if path.parent.exists() and not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is a file; checkpoints need a folder")
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


def publish(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Give the finished folder its name. From then on the checkpoint exists.

    Later checkpoints, and a broken one of the same step, are set aside before.

    Raises:
        FileExistsError: a whole one of the same step has appeared, and ``overwrite`` is False.
    """
    check_free(path, overwrite=overwrite)
    _let_go(partial)
    (partial / _LOCK).unlink(missing_ok=True)
    replaced = _aside(path) if is_whole(path) else None
    _abandon(path, None if replaced else path)
    if replaced is not None:
        os.rename(path, replaced)
    try:
        os.rename(partial, path)
    except OSError:
        # Another job was faster: a rename does not replace a folder that has files.
        check_free(path, overwrite=False)
        if replaced is not None:
            os.rename(replaced, path)
        raise
    _manifest.sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _abandon(new: Path, broken: Path | None) -> None:
    """Set aside the checkpoints of later steps than ``new``, the last first, and ``broken``."""
    beside = steps(new.parent)
    number = _step(new)
    later = [path for path in beside if _step(path) > number]
    names = []
    for path in [*reversed(later), *(path for path in beside if path == broken)]:
        aside = _aside(path, "abandoned")
        with contextlib.suppress(FileNotFoundError):  # another job was faster
            os.rename(path, aside)
            names.append(aside.name)
    if names:
        warnings.warn(
            f"saving {new.name}: set aside what is of a later step, or of this one and broken, so "
            f"that no restart takes it: {', '.join(names)}",
            stacklevel=2,
        )


def thin(new: Path, keep: int) -> None:
    """Remove what is older than the last ``keep`` whole checkpoints, of which ``new`` is one."""
    beside = [path for path in steps(new.parent) if _step(path) <= _step(new)]
    whole = [path for path in beside if path == new or is_whole(path)]
    if len(whole) < keep:
        return
    for path in beside[: beside.index(whole[-keep])]:
        aside = _aside(path)
        with contextlib.suppress(FileNotFoundError):  # another job was faster
            os.rename(path, aside)  # so that a kill leaves no half of it under its name
            shutil.rmtree(aside, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _aside(path: Path, end: str = "partial") -> Path:
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}.{end}")


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
