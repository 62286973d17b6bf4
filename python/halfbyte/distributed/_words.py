"""What a rank last said, in memory that the ranks on its host can read after its death.

The store of a job may end with the rank that keeps it, and answers when it gets to run. Here nobody
has to answer: a rank writes into a ``memfd``, others map it through ``/proc/<pid>/fd`` when the
watch begins, and the pages live as long as one of them does. Linux only.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
import zlib

_HEAD = struct.Struct("<8sIIQ")  # magic, bytes of text, CRC-32 of text, number of the message
_MAGIC = b"hbwords1"
_SLOT = 1 << 18  # of which only the pages that were written take memory


class Words:
    """The last message of a process; older ones are lost."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory, self._number = memory, 0
        self.fd = -1
        """Under which number others find the memory in ``/proc/<pid>/fd``."""

    @classmethod
    def create(cls) -> Words | None:
        """For this process to write. None where the system has no such memory."""
        if not hasattr(os, "memfd_create"):
            return None
        try:
            fd = os.memfd_create("halfbyte-watch", os.MFD_CLOEXEC)
        except OSError:
            return None
        try:
            os.ftruncate(fd, 2 * _SLOT)
            words = cls(mmap.mmap(fd, 2 * _SLOT))
        except OSError:
            os.close(fd)
            return None
        words.fd = fd
        weakref.finalize(words, os.close, fd)
        return words

    @classmethod
    def of(cls, pid: int, fd: int) -> Words | None:
        """Those of another process, to read. None if it cannot be looked into."""
        try:
            with open(f"/proc/{pid}/fd/{fd}", "rb") as stream:
                return cls(mmap.mmap(stream.fileno(), 2 * _SLOT, prot=mmap.PROT_READ))
        except (OSError, ValueError):  # ValueError: another file, shorter than that
            return None

    def say(self, text: str) -> None:
        """Replace the message, up to 256 KiB. One thread at a time.

        Messages take two places in turn, so that one is whole at any moment, also if this process
        is killed in the middle of the other.
        """
        data = text.encode()
        if _HEAD.size + len(data) > _SLOT:
            raise ValueError(f"a message has at most {_SLOT - _HEAD.size} bytes, got {len(data)}")
        self._number += 1
        start = self._number % 2 * _SLOT
        data = _HEAD.pack(_MAGIC, len(data), zlib.crc32(data), self._number) + data
        self._memory[start : start + len(data)] = data

    def heard(self) -> str | None:
        """The last whole message. None before the first, and when messages come faster than this
        can read them: while the process lives, that is."""
        last, number = None, 0
        for start in (0, _SLOT):
            magic, size, crc, n = _HEAD.unpack_from(self._memory, start)
            if magic != _MAGIC or n <= number or size > _SLOT - _HEAD.size:
                continue
            data = self._memory[start + _HEAD.size : start + _HEAD.size + size]
            if zlib.crc32(data) == crc:
                last, number = data.decode(), n
        return last
