"""Shared by the tests of the Python layer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

torch.manual_seed(0)


@pytest.fixture
def python() -> Callable[..., str]:
    """Runs code in a process of its own, and returns what it printed."""

    def run(code: str, *options: str, check: bool = True, timeout: float = 240) -> str:
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-4000:]}"
            return done.stdout
        return f"{done.returncode}\n{done.stdout}{done.stderr}"

    return run
