"""Where the tests run: on the CPU, on a GPU, or on an emulated one.

`--device cpu` (the default) is what `make test` does for `tests/python` and the other folders.
`--device emulated`, the default for `tests/gpu`, starts pytest again in a process whose CUDA
runtime and driver are those of crates/halfbyte-gpu-emulator. `--device cuda` takes the machine's
GPU. HALFBYTE_TEST_DEVICE says the same.
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
    if asked is None and any(inside) and not all(inside):
        raise pytest.UsageError("tests/gpu runs on another device: give --device, or run it alone")
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


# The files of tests/python whose tests compute on the device when one is asked for: those that
# name no device. All others compute on the CPU, with any --device.
ON_DEVICE = {
    "test_experts_ops.py",
    "test_functional_4bit.py",
    "test_functional_8bit.py",
    "test_int8_ops.py",
    "test_ops.py",
    "test_ops_optim.py",
}


def _on_device(path: Path) -> bool:
    return _within(path, "python") and path.name in ON_DEVICE


def _switch(config: pytest.Config, path: Path) -> None:
    if _MODE in config.stash:
        config.stash[_MODE].active = _on_device(path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _MODE not in config.stash:
        return
    reasons = NOT_ON_DEVICE | (NOT_EMULATED if STARTED in os.environ else {})
    for item in items:
        for part, reason in reasons.items():
            if _on_device(item.path) and part in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))


# Tests in those files that are skipped then, by a part of their names, and why.
NOT_ON_DEVICE = {
    "[devices]": "expects the name of the CPU",
    "-meta]": "expects the name of the CPU",
    "test_float64_checks_out": "expects the name of the CPU",
    "bytes_do_not_depend_on_threads": "of the CPU's threads",
    "test_codes_are_checked": "a device's codes are not read by the host",
    "test_bad_input[descending code]": "a device's codes are not read by the host",
    "test_bad_input[nan code]": "a device's codes are not read by the host",
    "outlier_cols must hold columns of A": "a device's columns are not read by the host",
    "0 to 95, got -1": "a device's columns are not read by the host",
    "test_default_code_is_the_signed_dynamic_map": "of a map on the CPU",
}
NOT_EMULATED = {
    "[sparse]": "holds a sparse tensor",
    "functions_name_no_parameter": "holds a sparse tensor",
    "inductor": "PyTorch's compiler looks for a GPU",
}


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
