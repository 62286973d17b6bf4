"""A memory limit for one process and its children: a control group of its own, version 1 or 2.

    with MemoryLimit(1 << 30) as limit:
        subprocess.run(command, preexec_fn=limit.enter)
        print(limit.peak(), limit.kills())

The group is made below the caller's own (version 2: below the nearest one that hands the memory
controller down), so that limits that hold already go on to hold. It counts what its processes
allocate after they have entered, the pages of files that they map included.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class Unavailable(Exception):
    """Why there can be no such group here, in a sentence."""


def _membership() -> tuple[str | None, str | None]:
    """The caller's group in the memory controller of version 1, and in version 2."""
    first = second = None
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        raise Unavailable("this system has no control groups (/proc/self/cgroup)") from None
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            first = path
        elif number == "0":
            second = path
    return first, second


def _below(mount: Path, path: str) -> Path:
    """The folder of a group; inside a container the mount may begin further down."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


def _parent() -> tuple[Path, int]:
    """The folder in which to make the group, and the version."""
    first, second = _membership()
    if first is not None and (ROOT / "memory" / "memory.limit_in_bytes").exists():
        return _below(ROOT / "memory", first), 1
    for mount in (ROOT, ROOT / "unified"):
        if second is None or not (mount / "cgroup.controllers").exists():
            continue
        folder = _below(mount, second)
        while True:
            control = folder / "cgroup.subtree_control"
            if control.exists() and "memory" in control.read_text().split():
                return folder, 2
            if folder == mount:
                break
            folder = folder.parent
        raise Unavailable("no control group above this process hands the memory controller down")
    raise Unavailable("no memory controller is mounted below /sys/fs/cgroup")


class MemoryLimit:
    """A group with a limit, from ``with`` on. Raises :class:`Unavailable` where that fails."""

    def __init__(self, nbytes: int) -> None:
        """nbytes: what its processes may hold in memory, pages of files included; no swap."""
        self.nbytes = nbytes
        self.folder = Path()
        self.version = 0

    def __enter__(self) -> MemoryLimit:
        parent, self.version = _parent()
        self.folder = parent / f"halfbyte-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self.folder.mkdir()
        except OSError as error:
            raise Unavailable(f"cannot make a control group: {error}") from None
        try:
            self._write("memory.limit_in_bytes", "memory.max", self.nbytes)
            # Without swap there is no such file, or no such limit.
            with contextlib.suppress(OSError):
                swap = self.nbytes if self.version == 1 else 0
                self._write("memory.memsw.limit_in_bytes", "memory.swap.max", swap)
            self.peak()  # which some kernels do not keep
            # A group that cannot be entered is of no use: a shell tries.
            done = subprocess.run(
                ["sh", "-c", 'echo $$ > "$0"', str(self.folder / "cgroup.procs")],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise Unavailable(f"cannot enter a control group: {done.stderr.strip()}")
        except (OSError, Unavailable) as error:
            self.__exit__()
            if isinstance(error, Unavailable):
                raise
            raise Unavailable(f"cannot set a memory limit: {error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        for _attempt in range(100):  # the pages of a process that has just ended
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.05)

    def _write(self, first: str, second: str, value: int) -> None:
        (self.folder / (first if self.version == 1 else second)).write_text(str(value))

    def _read(self, first: str, second: str) -> int:
        return int((self.folder / (first if self.version == 1 else second)).read_text())

    def enter(self) -> None:
        """Moves the calling process in: for ``preexec_fn``, or in a child."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """The most bytes held so far."""
        return self._read("memory.max_usage_in_bytes", "memory.peak")

    def kills(self) -> int:
        """How many processes the limit has killed."""
        return self._field(
            "memory.oom_control" if self.version == 1 else "memory.events", "oom_kill"
        )

    def _field(self, file: str, name: str) -> int:
        lines = (self.folder / file).read_text().splitlines()
        return int(dict(line.split() for line in lines)[name])
