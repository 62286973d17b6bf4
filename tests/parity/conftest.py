"""The parity tests compare halfbyte with upstream bitsandbytes, bit for bit."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import oracle_client  # noqa: E402

SEED = int(os.environ.get(oracle_client.SEED_VARIABLE) or secrets.randbelow(2**31))


def pytest_report_header() -> str:
    """Print the seed: the cases are random, and this is how to get the same ones again."""
    return f"parity: {oracle_client.SEED_VARIABLE}={SEED}, oracle {oracle_client.upstream_python()}"


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of every random number of this run."""
    return SEED


@pytest.fixture(scope="session")
def upstream() -> None:
    """Fail, never skip, when the environment of upstream is missing."""
    problem = oracle_client.missing()
    if problem:
        pytest.fail(problem, pytrace=False)
