"""Another rank as a watcher knows it: which process it is, and what it has last said."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from ._words import Words

RUNNING, ENDED, FAILED, LOST = "running", "ended", "failed", "lost"
"""States of a rank. LOST: its collective has failed, which another rank is the cause of."""


class DeadRankError(RuntimeError):
    """Another rank has ended, so this one cannot go on.

    Attributes:
        rank: its number in the default group.
        host: the name of its machine.
        pid: its process.
        step: the last step that it was heard of in, or None. On this host that is the step it was
            in. Elsewhere it may have got a little further before it died: its last words are up to
            50 ms old, or as old as the watcher's ``interval`` if it took the job's store with it.
    """

    def __init__(self, text: str, rank: int, host: str, pid: int, step: int | None) -> None:
        super().__init__(text)
        self.rank, self.host, self.pid, self.step = rank, host, pid, step

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.rank, self.host, self.pid, self.step)


def birth(pid: int) -> str | None:
    """When the process ``pid`` began, in the kernel's ticks; None if it has ended.

    Tells a process from a later one with the same number. "" where the system cannot say.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (FileNotFoundError, ProcessLookupError):
        if os.path.exists("/proc/self/stat"):
            return None
    except (OSError, IndexError):
        pass
    if os.name == "nt":
        return ""  # where os.kill(pid, 0) is no question
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def namespace() -> str:
    """Two processes with the same text see each other's pids."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as stream:
            return stream.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


class Peer:
    """What is known of another rank."""

    def __init__(self, rank: int, facts: dict[str, Any]) -> None:
        self.rank = rank
        self.host: str = facts["host"]
        self.pid: int = facts["pid"]
        self.birth: str = facts["birth"]
        self.here = facts["namespace"] == namespace()
        self.words: Words | None = None
        """Where it says what it does, if this process can look into that one."""
        if self.here and facts.get("words") is not None:
            words = Words.of(self.pid, facts["words"])
            if words is not None and birth(self.pid) == self.birth:
                self.words = words
        self.line: dict[str, Any] = {}
        self.changed = time.monotonic()
        self.gone = False
        self.last_word = False
        """Its line has been read after its process was seen to be gone."""

    def look(self) -> None:
        """See whether its process is there, and what it says if that can be seen too."""
        if self.last_word:
            return
        if self.here and not self.gone:
            now = birth(self.pid)
            self.gone = now is None or (now != self.birth and now != "")
        if self.words is not None:
            gone, text = self.gone, self.words.heard()
            self._take(text, gone)

    def read(self, store: Any) -> None:
        """Take its line from the store. RuntimeError if that is lost."""
        gone = self.gone
        self._take(store.get(f"line/{self.rank}"), gone)

    def _take(self, text: str | bytes | None, gone: bool) -> None:
        """``text``: None if there was none to be read, so the one before stays."""
        line = self.line if text is None else json.loads(text)
        if line != self.line:
            self.line, self.changed = line, time.monotonic()
        self.last_word = gone

    @property
    def state(self) -> str:
        return self.line.get("state", RUNNING)

    @property
    def step(self) -> int | None:
        return self.line.get("step")

    def where(self, *, sure: bool = False) -> str:
        """In which step it is, as far as is known. sure: it has said so itself, at its end."""
        sure = sure or self.words is not None
        text = "before its first step"
        if self.step is not None:
            text = f"in step {self.step}"
        if not sure:
            text += " or a little later"
        doing = self.line.get("doing")
        return f"{text}, while {doing}" if doing else text

    def error(self, what: str) -> DeadRankError:
        text = f"rank {self.rank} (host {self.host}, pid {self.pid}) {what}"
        return DeadRankError(text, self.rank, self.host, self.pid, self.step)
