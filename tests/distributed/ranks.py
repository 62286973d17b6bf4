"""Runs a function on several ranks, each a process of its own, joined by gloo.

A host process imports what the function needs once and forks the ranks, so that a run of four ranks
costs one import of torch, not four.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

FOLDER = pathlib.Path(__file__).parent
GRACE = 10.0
"""Seconds that the other ranks get to end by themselves when one has failed."""


def run(
    function: Callable[..., Any], world: int, *, timeout: float = 300.0, **arguments: Any
) -> list[Any]:
    """Calls ``function(rank, world, **arguments)`` on every rank and returns what each returned.

    The function must be at the top level of a module of this folder; arguments and results must be
    JSON. The default process group (gloo, CPU) is there when it is called. AssertionError with all
    that the ranks have printed when one of them fails or ``timeout`` seconds pass.
    """
    with tempfile.TemporaryDirectory(prefix="halfbyte-ranks-") as folder:
        command = [sys.executable, __file__, function.__module__.rpartition(".")[2]]
        command += [function.__name__, str(world), folder, json.dumps(arguments)]
        environment = {**os.environ, "PYTHONPATH": str(FOLDER), "PYTHONUNBUFFERED": "1"}
        host = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said = host.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            os.killpg(host.pid, signal.SIGKILL)
            said = host.communicate()[0]
            raise AssertionError(f"the ranks were not done after {timeout} s:\n{said}") from None
        assert host.returncode == 0, said
        return [
            json.loads((pathlib.Path(folder) / f"result-{rank}").read_text())
            for rank in range(world)
        ]


def _rank(rank: int, world: int, folder: str, function: Any, arguments: dict[str, Any]) -> int:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    try:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        result = function(rank, world, **arguments)
        (pathlib.Path(folder) / f"result-{rank}").write_text(json.dumps(result))
        dist.barrier()
    except BaseException:
        sys.stdout.write(f"---- rank {rank}\n{traceback.format_exc()}")
        return 1
    return 0


# What nearly every rank will import: once here is cheaper than once in each.
_COMMON = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)


def _host(module: str, name: str, world: int, folder: str, arguments: dict[str, Any]) -> int:
    for common in _COMMON:
        importlib.import_module(common)
    function = getattr(importlib.import_module(module), name)
    children: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = _rank(rank, world, folder, function, arguments)
            sys.stdout.flush()
            # Gloo's threads may still hold tensors at exit, and abort (pytorch#179291).
            os._exit(code)
        children[pid] = rank
    failed, deadline = 0, float("inf")
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > deadline:
                for child in children:
                    os.kill(child, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.01)
            continue
        rank = children.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            print(f"rank {rank} ended with {code}")
            failed, deadline = 1, time.monotonic() + GRACE
    return failed


if __name__ == "__main__":
    _module, _name, _world, _folder, _arguments = sys.argv[1:]
    sys.exit(_host(_module, _name, int(_world), _folder, json.loads(_arguments)))
