"""Names the rank that has died, in place of "Connection closed by peer" or a wait of 30 minutes.

Each rank has a line about itself: in memory that the ranks on its host read (``_words.py``), and in
the store of the default process group (over a connection of its own) for those elsewhere. A peer in
the same process namespace is dead when its process is gone, which is certain and seen at once; its
last line tells whether it had ended its work. A peer elsewhere counts as dead when its line has not
changed for ``timeout`` seconds, or when somebody beside it has reported it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from ._peer import ENDED, FAILED, LOST, RUNNING, DeadRankError, Peer, birth, namespace
from ._words import Words

_PREFIX = "halfbyte/watch"
_CONNECTION = ("gloo", "nccl", "connection", "peer", "timed out", "broken pipe", "process group")
_BRIEF = 0.05  # seconds between two writes of this rank's line, at least
_current: Watcher | None = None
_count = 0


class Watcher:
    """What :func:`watch` gives; see there.

    One thread talks to the store, which may never answer again. The other decides: it looks at
    processes and at the clock, waits for SIGTERM and ends this process where that is due.
    """

    def __init__(self, timeout: float, interval: float, grace: float | None) -> None:
        self._timeout, self._interval, self._grace = timeout, interval, grace
        self._rank = 0
        self._line: dict[str, Any] = {"state": RUNNING, "step": None}
        self._words: Words | None = None
        self._telling = threading.Lock()
        self._peers: list[Peer] = []
        self._keeper: int | None = None
        self._store: Any = None
        self._store_lost = ""
        self._answered = time.monotonic()
        self._published = threading.Event()
        self._io_wake = threading.Event()
        self._stop = False
        self._verdict: DeadRankError | None = None
        self._since = 0.0
        self._known = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._wake: socket.socket | None = None
        self._bell: socket.socket | None = None
        self._handles_signal = False

    def step(self, number: int) -> None:
        """Say that this rank begins step ``number``. Costs microseconds; call it every step."""
        self._tell(step=int(number), doing=None)  # not None after a save that raised

    # The main thread's side.
    def __enter__(self) -> Watcher:
        global _current, _count
        import torch.distributed as dist

        if _current is not None:
            raise RuntimeError("this process watches its ranks already: one watch() at a time")
        _count += 1
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._begin()
        _current = self
        return self

    def _begin(self) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        self._rank, world = dist.get_rank(), dist.get_world_size()
        self._interval *= max(1.0, world / 64)  # each rank reads all lines
        self._store = dist.PrefixStore(f"{_PREFIX}/{_count}", _get_default_store().clone())
        self._keeper = _keeper(self._store)
        self._words = Words.create()
        self._tell()
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "birth": birth(os.getpid()),
            "namespace": namespace(),
            "words": None if self._words is None else self._words.fd,
        }
        self._store.set(f"line/{self._rank}", json.dumps(self._line))
        self._store.set(f"rank/{self._rank}", json.dumps(facts))
        self._peers = [
            Peer(other, json.loads(self._store.get(f"rank/{other}")))  # waits for its entry
            for other in range(world)
            if other != self._rank
        ]
        if any(peer.rank == self._keeper and peer.words is not None for peer in self._peers):
            self._tell(knows=True)
        self._wake, self._bell = socket.socketpair()
        self._wake.setblocking(False)
        self._bell.setblocking(False)
        self._take_signal()
        for work in (self._talk, self._decide):
            thread = threading.Thread(target=work, name="halfbyte-watch", daemon=True)
            thread.start()
            self._threads.append(thread)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _current
        try:
            if self._threads:
                self._leave(error)
        finally:
            _current = None

    def _leave(self, error: BaseException | None) -> None:
        if isinstance(error, SystemExit) and not error.code:
            error = None
        verdict = None
        if error is None:
            self._change(state=ENDED)
        else:
            if _is_connection(error):
                self._change(state=LOST)  # no cause for the others
                verdict = self._wait(self._suspicion() + 2 * self._interval)
            if self._verdict is not None or self._somebody_is_gone():
                self._change(state=LOST)  # what is raised here comes of that
            else:
                self._change(state=FAILED, text=f"{type(error).__name__}: {error}"[:500])
        if self._keeper == self._rank:
            self._outstay(self._timeout if error is None else 2 * self._interval + 1)
        self._stop = True
        self._io_wake.set()
        self._ring()
        for thread in self._threads:
            thread.join(timeout=2.0)
        self._leave_signal()
        for end in (self._wake, self._bell):
            assert end is not None
            end.close()
        if verdict is not None:
            raise verdict from error

    def _tell(self, **entries: Any) -> None:
        """Change this rank's line: for its host at once, for others soon.

        state: see :mod:`._peer`. step, doing: where it is. text: the exception of a rank that
        failed. dead: the rank that it has seen to be gone, and the words for that. knows: it needs
        the keeper's store no more to learn of the keeper's end.
        """
        with self._telling:
            self._line.update(entries)
            if self._words is not None:
                self._words.say(json.dumps(self._line))
        self._io_wake.set()

    def _change(self, **entries: Any) -> None:
        """Change this rank's line, and wait a moment until it is in the store."""
        self._published.clear()
        self._tell(**entries)
        self._ring()
        if not self._store_lost:
            self._published.wait(2.0)

    def _wait(self, seconds: float) -> DeadRankError | None:
        with self._known:
            self._known.wait_for(lambda: self._verdict is not None, seconds)
        return self._verdict

    def _somebody_is_gone(self) -> bool:
        for peer in self._peers:
            peer.look()
        return any(peer.gone and peer.state == RUNNING for peer in self._peers)

    def _outstay(self, seconds: float) -> None:
        """The store ends with this rank: let the others read its last line first."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._store_lost:
            if all(p.gone or p.state != RUNNING or p.line.get("knows") for p in self._peers):
                return
            time.sleep(_BRIEF)

    def _ring(self, number: int = 0) -> None:
        with contextlib.suppress(OSError):  # full: the thread wakes anyhow
            assert self._bell is not None
            self._bell.send(bytes([number]))

    def _urgent(self) -> bool:
        """Whether to read the lines of the others now and often."""
        if self._line["state"] != RUNNING or self._verdict is not None:
            return True
        return any(peer.gone and not peer.last_word for peer in self._peers)

    # The thread that talks to the store.
    def _talk(self) -> None:
        due, beat, written = 0.0, 0, ""
        while True:
            self._io_wake.clear()
            stop = self._stop
            now = time.monotonic()
            if now >= due:
                beat += 1
            with self._telling:
                text = json.dumps({**self._line, "beat": beat})
            try:
                if text != written:
                    self._store.set(f"line/{self._rank}", text)
                    written = text
                self._published.set()
                if now >= due or self._urgent():
                    due = now + self._interval
                    for peer in self._peers:
                        if peer.words is None:
                            peer.read(self._store)
                self._answered = time.monotonic()
            except RuntimeError as error:
                self._store_lost = (str(error) or type(error).__name__).splitlines()[0]
                self._published.set()
                return
            if stop:
                return
            time.sleep(_BRIEF)
            self._io_wake.wait(_BRIEF if self._urgent() else max(0.0, due - time.monotonic()))

    # The thread that decides.
    def _decide(self) -> None:
        assert self._wake is not None
        while not self._stop:
            self._look()
            now = time.monotonic()
            late = self._grace is not None and now - self._since > self._grace
            if self._verdict is not None and self._line["state"] == RUNNING and late:
                self._say(f"still waiting for it {self._grace:g} s later; this rank ends now")
                os._exit(1)
            wait = _BRIEF if self._urgent() and self._verdict is None else self._interval
            if not select.select([self._wake], [], [], wait)[0]:
                continue
            with contextlib.suppress(BlockingIOError):
                ours = signal.getsignal(signal.SIGTERM) is _on_sigterm
                if signal.SIGTERM in self._wake.recv(4096) and ours:
                    self._terminated()

    def _look(self) -> None:
        """Find the rank that is the cause of an end, if there is one."""
        for peer in self._peers:
            peer.look()
        if self._verdict is not None:
            return
        ended = any(peer.rank == self._keeper and peer.state != RUNNING for peer in self._peers)
        if ended and not self._line.get("knows"):
            self._tell(knows=True)
        verdict = self._judge()
        if verdict is None:
            if self._urgent():
                self._io_wake.set()
            return
        seen = any(peer.gone and peer.rank == verdict.rank for peer in self._peers)
        self._tell(knows=True, dead=[verdict.rank, str(verdict)] if seen else None)
        if self._line["state"] in (RUNNING, LOST):
            self._say(str(verdict))
        with self._known:
            self._verdict, self._since = verdict, time.monotonic()
            self._known.notify_all()

    def _suspicion(self) -> float:
        """Seconds of silence after which a rank elsewhere is dead.

        Few if a collective has just failed here: then one of the others must be.
        """
        if self._line["state"] == LOST:
            return min(self._timeout, max(5.0, 3 * self._interval))
        return self._timeout

    def _judge(self) -> DeadRankError | None:
        working = [peer for peer in self._peers if peer.state not in (ENDED, LOST)]
        for peer in working:
            if peer.state == FAILED:
                return peer.error(f"failed {peer.where(sure=True)}: {peer.line.get('text')}")
        for peer in working:
            if peer.gone and (peer.last_word or self._store_lost):
                return peer.error(
                    f"died {peer.where()}: its process is gone without a word "
                    "(killed, out of memory or crashed)"
                )
        by_rank = {peer.rank: peer for peer in self._peers}
        for peer in self._peers:
            number, text = peer.line.get("dead") or (None, "")
            if number in by_rank:
                dead = by_rank[number]
                return DeadRankError(text, dead.rank, dead.host, dead.pid, dead.step)
        now, limit = time.monotonic(), self._suspicion()
        lost = self._store_lost
        if not lost and now - self._answered > limit + self._interval:
            lost = f"no answer for {now - self._answered:.0f} s"
        for peer in working:
            if lost:
                if peer.rank == self._keeper and not peer.here:
                    return peer.error(
                        f"cannot be reached any more, {peer.where()}; it keeps the store of "
                        f"the job ({lost})"
                    )
            elif not peer.here and now - peer.changed > limit:
                return peer.error(
                    f"has given no sign of life for {now - peer.changed:.0f} s, {peer.where()}"
                )
        for peer in self._peers:
            if self._line["state"] == LOST and peer.state == ENDED:
                return peer.error(f"had ended its work {peer.where(sure=True)}, this rank had not")
        return None

    def _say(self, text: str) -> None:
        sys.stderr.write(f"halfbyte: rank {self._rank}: {text}\n")
        sys.stderr.flush()

    def _terminated(self) -> None:
        """SIGTERM: a launcher ends the ranks that are left. Say first who died."""
        self._tell(state=LOST)
        deadline = time.monotonic() + 2.0
        while self._verdict is None and time.monotonic() < deadline:
            self._look()
            time.sleep(_BRIEF)
        os._exit(128 + signal.SIGTERM)

    # SIGTERM. Python runs handlers in the main thread only, which may hang in a collective; but
    # the number of the signal is written into a socket at once, and the thread reads it there.
    def _take_signal(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        assert self._bell is not None
        other = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        if other != -1:
            signal.set_wakeup_fd(other)
            return
        signal.signal(signal.SIGTERM, _on_sigterm)
        self._handles_signal = True

    def _leave_signal(self) -> None:
        if not self._handles_signal:
            return
        self._handles_signal = False
        if signal.getsignal(signal.SIGTERM) is _on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)


def _on_sigterm(number: int, frame: Any) -> None:
    """Wake the thread of the watcher, which ends the process; it may have been woken already."""
    if _current is not None:
        _current._ring(number)


class _Held(threading.local):
    """The signals that a thread had blocked when it began to fork."""

    mask: set[Any] | None = None


_held = _Held()


def _before_fork() -> None:
    """Hold back SIGTERM: until :func:`_forked` the child would report its own to this rank."""
    if _current is not None and _current._handles_signal:
        _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    mask, _held.mask = _held.mask, None
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _forked() -> None:
    """In a forked child: it is not a rank, and SIGTERM is to end it as usual."""
    global _current
    watcher, _current = _current, None
    if watcher is not None:
        watcher._words, watcher._telling = None, threading.Lock()
        if watcher._handles_signal:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forked)


def _keeper(store: Any) -> int | None:
    """The rank whose process holds the data of ``store``; None if no rank does."""
    import torch.distributed as dist

    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return 0 if isinstance(store, dist.TCPStore) and not agent else None


def _is_connection(error: BaseException) -> bool:
    """Whether ``error`` may come of a peer that has gone."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    # CheckpointException of torch is no Exception, and its module takes a second to import.
    about = isinstance(error, RuntimeError) or type(error).__name__ == "CheckpointException"
    return about and any(word in str(error).lower() for word in _CONNECTION)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what this rank is doing, for the case that it dies meanwhile."""
    watcher = _current
    if watcher is None:
        yield
        return
    watcher._tell(doing=what)
    yield
    watcher._tell(doing=None)


def watch(*, timeout: float = 60.0, interval: float = 1.0, grace: float | None = 30.0) -> Watcher:
    """Name the rank that dies while the ``with`` block of this runs::

        with halfbyte.distributed.watch() as watcher:
            for step, batch in enumerate(batches):
                watcher.step(step)
                ...

    All ranks of the default process group enter it, after ``init_process_group``. Without a group,
    or with one rank, it does nothing.

    When another rank has died or raised, this rank prints a line to stderr as soon as it is known,
    and the exception with which a collective fails here (gloo: "Connection closed by peer") becomes
    a :class:`DeadRankError` with the rank, its host, pid, step and, if it raised, its exception.
    The step of a killed rank is the last that it was heard of in. For ranks on its host that is
    the step it died in; elsewhere it may have got further, by 50 ms, or by ``interval`` if it kept
    the job's store.
    SIGTERM, with which torchrun ends the other ranks, is answered after that line has been
    printed, unless the program has a handler of its own.

    A rank that is only slow is never taken for dead by ranks in the same container or on the same
    host. Elsewhere it is if its thread, which needs the interpreter lock for a moment, has written
    nothing for ``timeout`` seconds.

    Args:
        timeout: seconds without a sign of life after which a rank on another host counts as dead.
        interval: seconds between two signs of life. From 64 ranks on it grows with their number.
        grace: seconds that this rank may go on after another one has died. If it has not left the
            block then, a collective hangs (nccl does not notice): the process prints that and ends
            with exit code 1. None waits for ever.

    Raises:
        ValueError: a time is not above zero.
    """
    for name, value in (("timeout", timeout), ("interval", interval), ("grace", grace)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above zero, got {value}")
    return Watcher(timeout, interval, grace)
