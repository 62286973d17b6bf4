"""Shared by the tests of the CUDA back end; tests/conftest.py says where they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated
import pytest
import torch

torch.manual_seed(0)

HERE = str(Path(__file__).parent)
# The tables of cases of the tests on the CPU.
sys.path.append(str(Path(__file__).parent.parent / "python"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "emulator: asks the emulated driver or runtime what it saw")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if emulated.is_emulated():
        return
    mark = pytest.mark.skip(reason="asks the emulated driver or runtime what it saw")
    for item in items:
        if "emulator" in item.keywords:
            item.add_marker(mark)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the emulated driver was asked since the last call of this, a line each."""
    path = tmp_path / "driver.log"
    path.touch()
    monkeypatch.setenv("HALFBYTE_EMULATOR_LOG", str(path))

    def read() -> list[str]:
        lines = path.read_text().splitlines()
        path.write_text("")
        return lines

    return read


START = f"import sys; sys.path.insert(0, {HERE!r})\nimport torch\n" + (
    "import emulated; emulated.install()\n" if emulated.is_emulated() else ""
)

# The caching allocator is on, as graphs need it.
CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "0"}


@pytest.fixture
def cuda_python(python: Callable[..., str]) -> Callable[..., str]:
    """Runs code in a process of its own with CUDA (`torch` is imported); returns what it printed.

    Keywords are environment variables.
    """

    def run(code: str, *, check: bool = True, **variables: str) -> str:
        return python(START + code, check=check, env=os.environ | CACHING | variables)

    return run


# Runs the code of each line of its input, and answers with a line of JSON.
_WORKER = """
import contextlib, io, json, traceback
for line in sys.stdin:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(json.loads(line), {"torch": torch})
        answer = [True, out.getvalue()]
    except BaseException:
        answer = [False, traceback.format_exc()]
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="session")
def cuda_worker() -> Iterator[Callable[[str], str]]:
    """As `cuda_python`, in one process for all tests: for code that leaves no trace in it."""
    with subprocess.Popen(
        [sys.executable, "-c", START + _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | CACHING,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(code: str) -> str:
            stdin.write(json.dumps(code) + "\n")
            stdin.flush()
            line = stdout.readline()
            assert line, f"the worker ended with status {process.wait()}"
            good, text = json.loads(line)
            assert good, text
            return str(text)

        yield run
        stdin.close()
