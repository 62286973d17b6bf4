"""A rank that dies is named by the others, and training goes on from the last whole checkpoint.

All ranks are forked by one host process, so that the imports are paid for once.
"""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from halfbyte.distributed import (
    DeadRankError,
    _checkpoint,
    _faults,
    _folder,
    _manifest,
    _peer,
    _state,
    _words,
    watch,
)
from test_checkpoint import adam, digest, make, shard, train, warm_up

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, signals")

STEPS = 6


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- what ranks do


def session(
    rank: int, world: int, folder: str, doomed: int = -1, how: str = "", after: float = 0.0
) -> dict[str, Any]:
    """Trains from the last checkpoint to the end, saving every two steps.

    Rank ``doomed`` is killed in the middle of step 3 (``how="step"``) or in the save after it.
    """
    with watch(interval=0.2) as watcher:
        model = shard(make(seed=9))  # all that matters comes from the checkpoint
        optimizer = adam(model)
        found = _checkpoint.load_checkpoint(folder, model, optimizer, required=False)
        if found is None:
            model = shard(make())
            optimizer = adam(model)
            torch.manual_seed(rank)
            random.seed(rank)
        first = 0 if found is None else found.step
        losses = {}
        for step in range(first, STEPS):
            watcher.step(step)
            if rank == doomed and how == "step" and step == 3:
                model[1].register_full_backward_hook(lambda *_: die())
            losses[step] = train(model, optimizer, step, rank)
            if step % 2 == 1:
                if rank == doomed and step == 3:
                    arm(how, after)
                _checkpoint.save_checkpoint(
                    folder, model, optimizer, step=step + 1, extra=losses, keep=2
                )
        if rank == doomed and how == "timer":
            time.sleep(60.0)  # it may have been fast
    return {"first": first, "losses": losses, "digest": digest(model)}


MOMENTS: dict[str, Any] = {
    "random_state": _state,  # the tensors are written
    "write": _manifest,  # all but the manifest
    "publish": _folder,  # all but the name
}


def arm(how: str, after: float) -> None:
    """Make the next save of this process its last act."""
    if how == "timer":
        threading.Timer(after, die).start()
    elif how == "files":  # in the middle of torch's own writing
        from torch.distributed.checkpoint import filesystem

        real, count = filesystem._write_item, [0]

        def write_item(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == 5:
                die()
            return real(*arguments)

        filesystem._write_item = write_item
    elif how == "rename":  # after it

        def publish(*arguments: Any, **settings: Any) -> None:
            real_publish(*arguments, **settings)
            die()

        real_publish, _folder.publish = _folder.publish, publish
    else:
        setattr(MOMENTS[how], how, lambda *_, **__: die())


def reduce(rank: int, world: int, how: str, doomed: int, place: str = "here", **times: Any) -> str:
    """Twenty steps of an all-reduce; in step 7 something happens to rank ``doomed``.

    place: "here"; "closed": nobody can look into the memory of others; "elsewhere": as if each
    rank were on a machine of its own.
    """
    import torch.distributed as dist

    if place == "elsewhere":
        _peer.namespace = _faults.namespace = lambda: f"machine {os.getpid()}"
    if place == "closed":
        _peer.Words = _Closed
    values = torch.ones(1000)
    with watch(interval=0.2, **times) as watcher:
        assert signal.getsignal(signal.SIGTERM) is _faults._on_sigterm
        for step in range(20):
            watcher.step(step)
            dist.all_reduce(values)
            if step == 19 and how == "left alone" and rank != doomed:
                stop(3.0)  # the other ends meanwhile, and the store with it
                time.sleep(0.5)
            if step != 7:
                continue
            if rank == doomed:
                if place != "here":
                    time.sleep(2.0)  # until its line is in the store, on a busy machine too
                misfortune(how)
            elif how == "deaf":
                time.sleep(60.0)  # as in a collective that never returns
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return "done"


def stop(seconds: float) -> None:
    """Stop this process with all its threads, for so long."""
    parent = os.getpid()
    if os.fork() == 0:
        os.kill(parent, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(parent, signal.SIGCONT)
        os._exit(0)
    time.sleep(0.1)  # in which it is stopped


class _Closed(_words.Words):
    @classmethod
    def of(cls, pid: int, fd: int) -> None:
        return None


def misfortune(how: str) -> None:
    if how in ("kill", "deaf"):
        die()
    elif how == "raise":
        raise ValueError("a bad batch")
    elif how == "slow":
        time.sleep(2.0)
    elif how == "stopped":
        stop(2.0)
    elif how == "fork":  # a child is no rank: it ends by SIGTERM, which does not concern its parent
        child = os.fork()
        if child == 0:
            time.sleep(60.0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.3)  # for the thread that answers SIGTERM


# ---- who runs them


class Outcome:
    """What became of a run: by rank, exit codes, what was printed and what was returned."""

    def __init__(self, codes: list[int], said: list[str], results: list[Any], late: float) -> None:
        self.codes, self.said, self.results = codes, said, results
        self.late = late
        """Seconds from the first end to the last."""

    def __str__(self) -> str:
        said = (f"---- rank {rank}\n{text}" for rank, text in enumerate(self.said))
        return f"{self.codes} {self.results} {self.late}\n" + "".join(said)


def _rank(rank: int, world: int, store: str, folder: pathlib.Path, call: dict[str, Any]) -> int:
    import torch.distributed as dist

    with (folder / f"said-{rank}").open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        result = globals()[call["function"]](rank, world, **call["arguments"])
        (folder / f"result-{rank}").write_text(json.dumps(result))
        # A rank that is still in the last collective is not to lose this one's end of it.
        while call["arguments"].get("how") != "left alone" and not (folder / "over").exists():
            time.sleep(0.02)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(call: dict[str, Any], place: pathlib.Path) -> list[Any]:
    """Carries out one run; what :class:`Outcome` is made of."""
    place.mkdir()
    store = f"file://{place}/store"
    if call["tcp"]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            store = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    world, children, ends, codes = call["world"], {}, [], {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = _rank(rank, world, store, place, call)
            sys.stdout.flush()
            os._exit(code)  # gloo's threads may abort at exit (pytorch#179291)
        children[pid] = rank
    results = [place / f"result-{rank}" for rank in range(world)]
    deadline = time.monotonic() + 60
    while children:
        if any(codes.values()) or all(path.exists() for path in results):
            (place / "over").touch()
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
            ends.append(time.monotonic())
        elif time.monotonic() > deadline:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return [
        [codes[rank] for rank in range(world)],
        [(place / f"said-{rank}").read_text() for rank in range(world)],
        [json.loads(path.read_text()) if path.exists() else None for path in results],
        ends[-1] - ends[0],
    ]


def _host(folder: str, calls: list[dict[str, Any]], at_once: bool) -> None:
    """Carries out one run after another, or all at once; each leaves ``folder/outcome-<n>``."""
    warm_up()
    helpers = []
    for number, one in enumerate(calls):
        pid = os.fork() if at_once else 0
        if pid == 0:
            outcome = _run(one, pathlib.Path(folder) / str(number))
            (pathlib.Path(folder) / f"outcome-{number}").write_text(json.dumps(outcome))
            if at_once:
                os._exit(0)
        else:
            helpers.append(pid)
    for pid in helpers:
        os.waitpid(pid, 0)


def call(function: Callable[..., Any], world: int, *, tcp: bool = False, **arguments: Any) -> Any:
    """A run for :func:`carry_out`: ``function(rank, world, **arguments)`` on every rank."""
    name = function.__name__
    return {"function": name, "world": world, "tcp": tcp, "arguments": arguments}


def carry_out(calls: list[Any], *, at_once: bool = False) -> list[Outcome]:
    here = str(pathlib.Path(__file__).parent)
    with tempfile.TemporaryDirectory(prefix="halfbyte-faults-") as folder:
        code = (
            "import json, sys, test_faults; test_faults._host(sys.argv[1], *json.load(sys.stdin))"
        )
        host = subprocess.run(
            [sys.executable, "-c", code, folder],
            input=json.dumps([calls, at_once]),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": here},
            timeout=500,
        )
        assert host.returncode == 0, host.stdout + host.stderr
        paths = [pathlib.Path(folder) / f"outcome-{number}" for number in range(len(calls))]
        return [Outcome(*json.loads(path.read_text())) for path in paths]


# ---- the tests


def named(outcome: Outcome, doomed: int, words: str) -> None:
    """All other ranks have ended soon with an error that names the rank."""
    for rank, (code, said) in enumerate(zip(outcome.codes, outcome.said, strict=True)):
        if rank == doomed:
            continue
        assert code == 1, (rank, code, said)
        expected = rf"DeadRankError: rank {doomed} \(host \S+, pid \d+\) {words}"
        assert re.search(expected, said), (rank, said)
    assert outcome.late < 30, outcome.late


def test_restart(tmp_path):
    """Kills at many moments; then the losses and weights are those of a run without one."""
    kills: list[tuple[int, str, int, float]] = [(2, "step", 1, 0.0), (4, "step", 2, 0.0)]
    kills += [(2, "files", 1, 0.0), (2, "random_state", 1, 0.0)]
    kills += [(2, how, 0, 0.0) for how in ("write", "publish", "rename")]
    kills += [(4, "files", 0, 0.0), (2, "timer", 1, random.uniform(0.0, 0.2))]
    kills += [(4, "timer", 3, random.uniform(0.0, 0.3))]
    calls = [call(session, world, folder=str(tmp_path / f"whole-{world}")) for world in (2, 4)]
    for number, (world, how, doomed, after) in enumerate(kills):
        folder = str(tmp_path / str(number))
        calls.append(call(session, world, folder=folder, doomed=doomed, how=how, after=after))
        calls.append(call(session, world, folder=folder))
    outcomes = carry_out(calls)
    whole = {2: outcomes[0], 4: outcomes[1]}
    for world, outcome in whole.items():
        assert outcome.codes == [0] * world, str(outcome)
        assert len(outcome.results[0]["losses"]) == STEPS
    for number, (world, how, doomed, after) in enumerate(kills):
        killed, resumed = outcomes[2 + 2 * number : 4 + 2 * number]
        case = (world, how, doomed, after)
        assert killed.codes[doomed] == -signal.SIGKILL, (case, str(killed))
        words = "died in step 3"
        if how not in ("step", "timer"):
            words += ", while saving step-00000004"
        if how != "timer":
            named(killed, doomed, words + ": its process is gone")
        assert resumed.codes == [0] * world, (case, str(resumed))
        for result, expected in zip(resumed.results, whole[world].results, strict=True):
            first = result["first"]
            possible = {"rename": (4,), "timer": (2, 4, 6)}
            assert first in possible.get(how, (2,)), (case, first)
            steps = [str(step) for step in range(first, STEPS)]
            assert result["losses"] == {step: expected["losses"][step] for step in steps}, case
            assert result["digest"] == expected["digest"], case
        left = sorted(path.name for path in (tmp_path / str(number)).iterdir())
        assert left == ["step-00000004", "step-00000006"], case


def test_naming():
    """The one rank is named that is the cause, and no rank that is only slow."""
    here, later = "died in step 7: its", "died in step 7 or a little later: its"
    cases = {
        "kill": (call(reduce, 3, how="kill", doomed=2), here),
        "first": (call(reduce, 3, how="kill", doomed=0), here),
        "store": (call(reduce, 3, tcp=True, how="kill", doomed=0), here),
        "closed": (call(reduce, 3, how="kill", doomed=2, place="closed"), later),
        "store closed": (call(reduce, 3, tcp=True, how="kill", doomed=0, place="closed"), later),
        "raise": (call(reduce, 3, how="raise", doomed=1), "failed in step 7: ValueError: a bad"),
        "store raises": (
            call(reduce, 3, tcp=True, how="raise", doomed=0),
            "failed in step 7: ValueError: a bad batch",
        ),
        "elsewhere": (
            call(reduce, 3, how="kill", doomed=1, place="elsewhere", timeout=20.0),
            r"has given no sign of life for \d+ s, in step 7 or a little later",
        ),
        "store elsewhere": (
            call(reduce, 3, tcp=True, how="kill", doomed=0, place="elsewhere", timeout=20.0),
            "cannot be reached any more, in step 7 or a little later; it keeps the store",
        ),
    }
    calls = [case for case, _ in cases.values()]
    for tcp in (False, True):
        calls.append(call(reduce, 2, tcp=tcp, how="slow", doomed=1, timeout=1.0))
        calls.append(call(reduce, 2, tcp=tcp, how="stopped", doomed=0, timeout=1.0))
        calls.append(call(reduce, 2, tcp=tcp, how="left alone", doomed=0, timeout=1.0))
    calls.append(call(reduce, 2, how="fork", doomed=0))
    calls.append(call(reduce, 3, how="deaf", doomed=1, grace=1.5))
    outcomes = carry_out(calls, at_once=True)
    for (case, words), outcome in zip(cases.values(), outcomes, strict=False):
        named(outcome, case["arguments"]["doomed"], words)
    for outcome in outcomes[len(cases) : -1]:
        assert outcome.results == ["done"] * 2, str(outcome)
        assert "halfbyte: rank" not in "".join(outcome.said), str(outcome)
    hanging = outcomes[-1]
    for rank in (0, 2):
        assert hanging.codes[rank] == 1
        assert re.search(rf"halfbyte: rank {rank}: rank 1 \(.*died in step 7", hanging.said[rank])
        assert "still waiting for it 1.5 s later; this rank ends now" in hanging.said[rank]


SCRIPT = """
import os, signal, sys, time
early = []
os.register_at_fork(after_in_child=lambda: early and os.kill(os.getpid(), signal.SIGTERM))
import torch.distributed as dist, torch
from halfbyte.distributed import watch
dist.init_process_group("gloo")
with watch() as watcher:
    early.append(True)  # a child is ended before any other hook of fork has run in it
    child = os.fork()
    if child == 0:
        time.sleep(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.3)  # for the thread that answers SIGTERM
    early.clear()
    for step in range(1000):
        watcher.step(step)
        if step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 0 and step == 3:
            time.sleep(60)  # deaf: it is torchrun that ends this rank
        dist.all_reduce(torch.ones(1))
"""


def test_torchrun(tmp_path):
    """Its agent ends the other rank by SIGTERM, says first who died; that of a child is its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.search(
        r"halfbyte: rank 0: rank 1 \(host \S+, pid \d+\) died in step 3: its",
        done.stderr,
    ), done.stderr


def test_alone_and_arguments():
    with watch() as watcher:
        watcher.step(1)
        with pytest.raises(RuntimeError, match="one watch"), watch():
            pass
    for name in ("timeout", "interval", "grace"):
        with pytest.raises(ValueError, match=f"{name} must be above zero, got 0"):
            watch(**{name: 0})
    error = pickle.loads(pickle.dumps(DeadRankError("text", 1, "host", 2, 3)))
    assert (str(error), error.rank, error.host, error.pid, error.step) == ("text", 1, "host", 2, 3)


def test_a_pid_is_not_taken_for_another_process():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = {"host": "h", "pid": child.pid, "namespace": _peer.namespace()}
    peer = _peer.Peer(1, {**facts, "birth": _peer.birth(child.pid)})
    other = _peer.Peer(1, {**facts, "birth": "1"})  # what had the number before
    for each in (peer, other):
        each.look()
    assert (peer.gone, other.gone) == (False, True)
    child.kill()
    deadline = time.monotonic() + 10
    while not peer.gone and time.monotonic() < deadline:
        peer.look()  # a zombie, which nobody has waited for
    assert peer.gone
    child.wait()


def test_words_outlive_their_process():
    """Also those of a process that is killed while it writes: the message before that."""
    code = (
        "import sys; from halfbyte.distributed import _words; words = _words.Words.create()\n"
        "print(words.fd, flush=True)\n"
        "for line in sys.stdin: words.say(line); print(flush=True)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    words = _words.Words.of(child.pid, int(child.stdout.readline()))
    assert words is not None
    assert words.heard() is None
    for text in ("one\n", "two ü\n", "three\n"):
        child.stdin.write(text)
        child.stdin.flush()
        child.stdout.readline()
        assert words.heard() == text
    child.kill()
    child.wait()
    assert words.heard() == "three\n"
    child.stdin.close()
    child.stdout.close()
    assert _words.Words.of(child.pid, 3) is None

    # Read while it is written: a whole message, or none.
    code = (
        "from halfbyte.distributed import _words; words = _words.Words.create()\n"
        "words.say('0'); print(words.fd, flush=True); n = 0\n"
        "while True: n += 1; words.say(str(n % 10) * (n % 5000 + 1))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    words = _words.Words.of(child.pid, int(child.stdout.readline()))
    assert words is not None
    heard = [words.heard() for _ in range(20_000)]
    child.kill()
    child.wait()
    child.stdout.close()
    heard.append(words.heard())
    assert heard[-1] is not None
    seen = {text for text in heard if text is not None}
    assert len(seen) > 10
    assert all(len(set(text)) == 1 for text in seen)

    ours = _words.Words.create()
    assert ours is not None
    ours.say("one")
    ours.say("two")
    with pytest.raises(ValueError, match=r"at most 26\d+ bytes, got 300000"):
        ours.say("x" * 300000)
    assert ours.heard() == "two"
    ours._memory[_words._HEAD.size : _words._HEAD.size + 1] = b"T"  # as half of "TWO"
    assert ours.heard() == "one"
    with tempfile.TemporaryFile() as other:  # not such memory
        assert _words.Words.of(os.getpid(), other.fileno()) is None
