"""Where the tests run: on the CPU, on a GPU, or on an emulated one.

`--device cpu` (the default) is what `make test` does for `tests/python` and the other folders.
`--device emulated`, the default for `tests/gpu`, starts pytest again in a process whose CUDA
runtime and driver are those of crates/halfbyte-gpu-emulator. `--device cuda` takes the machine's
GPU. HALFBYTE_TEST_DEVICE says the same. With either, tests/python computes on the device, but for
what tests/gpu/on_device.py lists; the other folders name their devices themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DEVICES = ("cpu", "cuda", "emulated")
STARTED = "HALFBYTE_EMULATED_RUNTIME"
"""Set in the process that runs on the emulated runtime: the file of that runtime."""
_MODE = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=DEVICES, help="where the tests compute (default: cpu)")


def _within(path: Path, folder: str) -> bool:
    """Whether a path lies in a folder of the tests."""
    return (ROOT / "tests" / folder).resolve() in (path.resolve(), *path.resolve().parents)


def _device(config: pytest.Config) -> str:
    """The device asked for, or what the folders stand for."""
    asked = config.getoption("--device") or os.environ.get("HALFBYTE_TEST_DEVICE")
    paths = [Path(config.invocation_params.dir, arg.split("::")[0]) for arg in config.args]
    inside = [_within(path, "gpu") for path in paths]
    if asked == "cpu" and any(inside):
        raise pytest.UsageError("tests/gpu compares a CUDA device to the CPU: not with cpu alone")
    if any(inside) and not all(inside):
        raise pytest.UsageError(
            "tests/gpu makes the tables of tests/python on the CPU, as modules of the same names: "
            "run it in a process of its own"
        )
    return str(asked or ("emulated" if any(inside) else "cpu"))


def environment() -> dict[str, str]:
    """The environment of a process on the emulated runtime, with devices of sm_80 and sm_90."""
    folder = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"), "emulator").absolute()
    runtime, driver = folder / "libcudart_emulated.so", folder / "libcuda_emulated.so"
    if not (runtime.is_file() and driver.is_file()):
        raise pytest.UsageError(
            f"no emulator in {folder}: build it with `cargo build -p halfbyte-gpu-emulator`"
        )
    return os.environ | {
        STARTED: str(runtime),
        "LD_PRELOAD": str(runtime),
        "HALFBYTE_CUDA_DRIVER": str(driver),
        "HALFBYTE_NVRTC": str(driver),  # it is a compiler, too, of kernels that it has anyway
        "HALFBYTE_CACHE_DIR": "",
        "HALFBYTE_EMULATOR_DEVICES": "80,90",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
        # Every tensor is an allocation of its own, and ends at a guard page.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if _device(config) != "emulated" or STARTED in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    return subprocess.run(
        command, env=environment(), cwd=config.invocation_params.dir, check=False
    ).returncode


def pytest_configure(config: pytest.Config) -> None:
    if _device(config) == "cpu" or (_device(config) == "emulated" and STARTED not in os.environ):
        return
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    if STARTED in os.environ:
        import emulated

        emulated.install()
    from default_device import DefaultDevice

    mode = config.stash[_MODE] = DefaultDevice("cuda")
    mode.__enter__()  # for the process


def _on_device(path: Path) -> bool:
    return _within(path, "python")


def _switch(config: pytest.Config, path: Path) -> None:
    if _MODE in config.stash:
        config.stash[_MODE].active = _on_device(path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what tests/gpu/on_device.py lists; an entry that names no test is an error."""
    if _MODE not in config.stash:
        return
    import on_device

    emulated = STARTED in os.environ
    moved = [item for item in items if _on_device(item.path)]
    unused = on_device.entries({item.path.name for item in moved}, emulated)
    for item in moved:
        for entry, reason in on_device.reasons(item.path.name, item.name, emulated):
            unused.discard(entry)
            item.add_marker(pytest.mark.skip(reason=reason))
    if unused and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(
            f"tests/gpu/on_device.py names no test: {', '.join(sorted(unused))}"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> None:
    _switch(collector.config, collector.path)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    _switch(item.config, item.path)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device of PyTorch that the tests compute on: cpu or cuda."""
    return "cpu" if _device(request.config) == "cpu" else "cuda"


@pytest.fixture
def python() -> Callable[..., str]:
    """Runs code in a process of its own, and returns what it printed."""

    def run(
        code: str,
        *options: str,
        check: bool = True,
        timeout: float = 240,
        env: dict[str, str] | None = None,
    ) -> str:
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=env,
        )
        if check:
            assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-4000:]}"
            return done.stdout
        return f"{done.returncode}\n{done.stdout}{done.stderr}"

    return run
