"""Storage for optimizer states on the CPU that may be larger than memory: tensors over temporary
files. For states on GPUs see :mod:`._managed`.

The files have no name from the moment they are made, so nothing is left behind whatever ends the
process. The system writes their pages out when memory is short and reads them again when a step
needs them. Where they are made, in this order:

1. the folder that the environment variable ``HALFBYTE_PAGED_DIR`` names,
2. the folder given to :func:`set_paged_dir`,
3. ``/var/tmp`` where it is writable (``/tmp`` is often memory itself),
4. ``tempfile.gettempdir()``.

A forked child sees the states of its parent as they were or are, and what it writes to them stays
its own, as with any other memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

VARIABLE = "HALFBYTE_PAGED_DIR"

MIN_ELEMENTS = 100_000
"""Smaller states stay in ordinary memory, as upstream's do."""

_ARENA_BYTES = 256 << 20
"""Several tensors share a file and its descriptors. Its space is only taken as they come."""

_MADV_REMOVE = getattr(mmap, "MADV_REMOVE", None)
_MADV_WILLNEED = getattr(mmap, "MADV_WILLNEED", None)
_MAP_FIXED = 0x10
_ZEROS = 1 << 20

_folder: str | None = None


def set_paged_dir(folder: str | os.PathLike[str] | None) -> None:
    """Where the next paged states go; None goes back to the default. States that exist stay.

    The environment variable ``HALFBYTE_PAGED_DIR`` overrules it.

    Raises:
        NotADirectoryError: when there is no such folder.
    """
    global _folder
    if folder is not None:
        folder = os.path.abspath(os.fspath(folder))
        if not os.path.isdir(folder):
            raise NotADirectoryError(
                errno.ENOTDIR, "paged optimizer states need an existing folder, got", folder
            )
    _folder = folder


def paged_dir() -> str:
    """The folder that the next paged states go to."""
    chosen = os.environ.get(VARIABLE) or _folder
    if chosen:
        return chosen
    usual = "/var/tmp"
    return usual if os.path.isdir(usual) and os.access(usual, os.W_OK) else tempfile.gettempdir()


def _failure(error: OSError, nbytes: int, folder: str) -> OSError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "Make room there, or choose" if full else "Choose"
    return OSError(
        error.errno,
        f"cannot reserve {nbytes:,} bytes ({nbytes / 2**30:.2f} GiB) of paged optimizer state in "
        f"{folder!r}: {error.strerror or error}. {advice} "
        f"another folder with the environment variable {VARIABLE} or set_paged_dir()",
    )


def _page_aligned(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


class _Arena:
    """A file and its mapping, from which tensors are cut one after the other.

    It lives as long as its tensors: each of their finalizers holds it.
    """

    def __init__(self, folder: str, nbytes: int) -> None:
        self.folder = folder
        self.size = nbytes
        self.used = 0
        self.live = 0
        # Open for as long as the arena: the mapping's own descriptor is out of reach.
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        try:
            os.truncate(self.file.fileno(), nbytes)
            self.map = mmap.mmap(self.file.fileno(), nbytes)
        except BaseException:
            self.file.close()
            raise
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.ours = True

    def allocate(self, nbytes: int) -> memoryview:
        """Zeros. The space is taken from the disk now: later it could only fail with a SIGBUS."""
        start, length = self.used, _page_aligned(nbytes)
        try:
            self._reserve(start, length)
        except OSError:
            self._give_back(start, length)
            raise
        self.used += length
        self.live += 1
        view = memoryview(self.map)[start : start + nbytes]
        weakref.finalize(view, self._release, start, length).atexit = False
        return view

    def _reserve(self, start: int, length: int) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self.file.fileno(), start, length)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
        os.lseek(self.file.fileno(), start, os.SEEK_SET)
        zeros = bytes(min(_ZEROS, length))
        while length:
            length -= os.write(self.file.fileno(), zeros[:length])

    def _give_back(self, start: int, length: int) -> None:
        if _MADV_REMOVE is not None:
            # On a file system without holes the space returns with the whole file.
            with contextlib.suppress(OSError):
                self.map.madvise(_MADV_REMOVE, start, length)

    def _release(self, start: int, length: int) -> None:
        """Called when the last tensor over this range is gone."""
        self.live -= 1
        if self.ours:
            self._give_back(start, length)
        if self.live == 0:
            _forget(self)
            self.used = self.size  # nothing more is cut from it
            self.file.close()

    def part_from_parent(self) -> None:
        """In a forked child: what is written from now on stays in this process."""
        self.ours = False
        self.used = self.size
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
        ]
        got = libc.mmap(
            self.address,
            self.size,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_PRIVATE | _MAP_FIXED,
            self.file.fileno(),
            0,
        )
        if got != self.address:
            code = ctypes.get_errno()
            raise OSError(
                code,
                f"cannot separate the paged optimizer states of process {os.getpid()} from those "
                f"of its parent: {os.strerror(code)}. Do not step the optimizer here",
            )


_lock = threading.RLock()
_current: _Arena | None = None
_arenas: weakref.WeakSet[_Arena] = weakref.WeakSet()


def _forget(arena: _Arena) -> None:
    """An arena without tensors goes, rather than wait for the next one."""
    global _current
    if _current is arena:
        _current = None


def _allocate(nbytes: int) -> memoryview:
    global _current
    length = _page_aligned(nbytes)
    with _lock:
        folder = paged_dir()
        try:
            arena = _current
            if arena is None or arena.size - arena.used < length or arena.folder != folder:
                # Growing with what there is keeps the number of open files small.
                total = sum(a.used for a in _arenas)
                wanted = max(length, _ARENA_BYTES, _page_aligned(total // 4))
                try:
                    arena = _Arena(folder, wanted)
                except OSError as error:
                    if error.errno != errno.EFBIG or wanted == length:
                        raise
                    arena = _Arena(folder, length)
                _arenas.add(arena)
                _current = arena
            return arena.allocate(nbytes)
        except OSError as error:
            raise _failure(error, nbytes, folder) from None


def _after_fork() -> None:
    global _current, _lock
    _lock = threading.RLock()
    _current = None
    for arena in list(_arenas):
        if arena.live:
            arena.part_from_parent()


if hasattr(os, "register_at_fork") and sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor of zeros in a file, with ``is_paged`` and ``page_deviceid`` set.

    The space goes back to the disk when the last tensor that shares it is gone.

    Raises:
        OSError: when the disk or its quota cannot hold it, or the folder cannot be used.
    """
    count = prod(shape)
    if count == 0:
        out = torch.zeros(tuple(shape), dtype=dtype, device="cpu")
    else:
        view = _allocate(count * dtype.itemsize)
        out = torch.frombuffer(view, dtype=dtype, count=count).view(tuple(shape))
    return mark(out)


def mark(tensor: Tensor) -> Tensor:
    """Sets the attributes by which clients know a paged tensor. Returns the tensor."""
    tensor.is_paged = True  # type: ignore[attr-defined]
    tensor.page_deviceid = tensor.device.index  # type: ignore[attr-defined]
    return tensor


def _find(tensor: Tensor) -> tuple[_Arena, int] | None:
    """The arena that holds a tensor, and the offset of its first byte there."""
    pointer = tensor.data_ptr()
    for arena in list(_arenas):
        offset = pointer - arena.address
        if 0 <= offset < arena.size:
            return arena, offset
    return None


def is_file_backed(tensor: Tensor) -> bool:
    """Whether a tensor's elements are in such a file."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and _find(tensor) is not None


def prefetch(tensor: Tensor) -> None:
    """Asks the system to read a tensor's pages ahead of their use. Tensors elsewhere: nothing."""
    found = _find(tensor)
    if found is None or _MADV_WILLNEED is None:
        return
    arena, offset = found
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    arena.map.madvise(_MADV_WILLNEED, start, offset - start + tensor.nbytes)


class TensorList:
    """A list of tensors that does not keep them alive."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[Tensor]] = []
        self._alive_once = 0

    def append(self, tensor: Tensor) -> None:
        """Adds a tensor at the end; it leaves by itself when it dies."""
        if len(self._references) > 2 * self._alive_once + 100:
            self._references = [r for r in self._references if r() is not None]
            self._alive_once = len(self._references)
        self._references.append(weakref.ref(tensor))

    def _alive(self) -> list[Tensor]:
        return [tensor for r in self._references if (tensor := r()) is not None]

    def __len__(self) -> int:
        return len(self._alive())

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._alive())

    def __getitem__(self, index: int) -> Tensor:
        return self._alive()[index]


__all__ = [
    "TensorList",
    "is_file_backed",
    "mark",
    "paged_dir",
    "prefetch",
    "set_paged_dir",
    "zeros",
]
