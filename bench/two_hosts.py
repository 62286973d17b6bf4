"""Two hosts on one machine: two network namespaces, joined by a virtual Ethernet cable (veth).

    from two_hosts import TwoHosts

    with TwoHosts() as hosts:
        hosts.torchrun(["examples/fsdp_qlora.py"], ranks=2)
        hosts.sent()

Each host has an interface, an address and counters of its own; nothing but the cable joins them.
Linux, the ``ip`` command (iproute2) and root are needed: :func:`missing` says which is not there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29_400


def ip(*arguments: str) -> str:
    """Runs ``ip``; RuntimeError with what it said when it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def missing() -> str | None:
    """Why two hosts cannot be made here, as a sentence; None where they can."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces need Linux, this is {sys.platform}"
    if shutil.which("ip") is None:
        return "the ip command is not installed (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"hb-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except RuntimeError as error:
        return f"network namespaces are not permitted here: {error}"
    try:
        ip("-n", name, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
    except RuntimeError as error:
        return f"virtual Ethernet is not permitted here: {error}"
    finally:
        ip("netns", "del", name)
    return None


def remove_stale() -> None:
    """Removes namespaces of processes that are gone and could not clean up (SIGKILL)."""
    for line in ip("netns", "list").splitlines():
        found = re.fullmatch(r"hb-(\d+)-[ab]", line.partition(" ")[0])
        if found and not Path("/proc", found[1]).exists():
            subprocess.run(["ip", "netns", "del", found[0]], capture_output=True, check=False)


class TwoHosts:
    """Two namespaces for as long as the ``with`` block lasts.

    Attributes:
        names: of the namespaces; a process enters one by ``ip netns exec NAME COMMAND``.
    """

    interface = "veth"
    """Name of the cable's end in either host."""

    def __init__(self) -> None:
        self.names = tuple(f"hb-{os.getpid()}-{host}" for host in "ab")
        self._processes: list[subprocess.Popen[str]] = []
        self._before: Any = None

    def __enter__(self) -> TwoHosts:
        remove_stale()
        if threading.current_thread() is threading.main_thread():
            # Ended by a signal, the block is left as by an exception.
            self._before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            for name in self.names:
                ip("netns", "add", name)
            a, b = self.names
            ends = [self.interface, "netns", a, "type", "veth"]
            ip("link", "add", *ends, "peer", "name", self.interface, "netns", b)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", self.interface)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", self.interface, "up")
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean()

    def _clean(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
        for process in self._processes:
            if process.poll() is None:
                process.terminate()  # torchrun passes it on to its ranks
        for process in self._processes:
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in self.names:  # the cable goes with them
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def sent(self) -> list[int]:
        """Bytes that each host has sent over the cable so far, headers included."""
        counted = []
        for name in self.names:
            path = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
            counted.append(int(ip("netns", "exec", name, "cat", path)))
        return counted

    def torchrun(self, command: list[str | Path], *, ranks: int = 1, timeout: float = 300.0) -> str:
        """Runs a script by torchrun on both hosts, with so many ranks on each.

        Returns what the first host printed. RuntimeError with what both printed when one of them
        fails or ``timeout`` seconds pass.
        """
        started = []
        for host, name in enumerate(self.names):
            launch = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
            launch += ["--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", str(ranks)]
            launch += ["--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
            process = subprocess.Popen(
                [*launch, *map(str, command)],
                env={**os.environ, "GLOO_SOCKET_IFNAME": self.interface},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            started.append(process)
        self._processes += started
        deadline = time.monotonic() + timeout
        said = []
        for process in started:
            try:
                said.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                for late in started:
                    late.terminate()
                said.append(f"not done after {timeout} s\n{process.communicate()[0]}")
        if any(process.returncode for process in started):
            raise RuntimeError("\n".join(f"host {n}:\n{text}" for n, text in enumerate(said)))
        return said[0]
