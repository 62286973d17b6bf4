"""Diagnostics: ``python -m <package>`` says what is installed, what it runs on, and if it works.

Exits with 0 when the self-test passes, else with 1.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable

import torch

from . import functional as F
from . import optim
from ._load import native
from .autograd._functions import matmul_4bit


def _section(title: str) -> None:
    print(f"\n{title}")


def _line(name: str, value: object) -> None:
    print(f"  {name:<22}{value}")


def _back_ends() -> list[tuple[str, str]]:
    """What other devices this machine has, and that this version does not use them."""

    def state(found: bool, what: str) -> str:
        return f"{what}, not used: GPU back ends are not in this version" if found else "not found"

    cuda = torch.cuda.is_available()
    hip = torch.version.hip is not None
    xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
    mps = torch.backends.mps.is_available()
    return [
        ("CPU", "in use"),
        ("CUDA", state(cuda and not hip, torch.cuda.get_device_name() if cuda else "")),
        ("ROCm", state(cuda and hip, torch.cuda.get_device_name() if cuda else "")),
        ("XPU", state(xpu, "an Intel GPU")),
        ("MPS", state(mps, "an Apple GPU")),
    ]


def _round_trip(quant_type: str, nested: bool, bound: float) -> str:
    """Quantizes, decodes and multiplies a weight whose shape is no multiple of anything."""
    weight = torch.linspace(-3, 3, 65 * 97).sin().reshape(65, 97)
    packed, state = F.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    decoded = F.dequantize_4bit(packed, state)
    error = (decoded - weight).abs().max().item()
    if not error < bound:
        raise AssertionError(f"decoded values are off by {error:.3g}, expected less than {bound}")
    x = torch.linspace(-1, 1, 5 * 97).reshape(5, 97).requires_grad_()
    y = matmul_4bit(x, packed, state)
    y.sum().backward()
    torch.testing.assert_close(y, x @ decoded.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, decoded.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    return f"largest error {error:.3f}"


def _blockwise() -> str:
    values = torch.linspace(-3, 3, 6001).sin()
    packed, state = F.quantize_blockwise(values, blocksize=256)
    error = (F.dequantize_blockwise(packed, state) - values).abs().max().item()
    if not error < 0.02:
        raise AssertionError(f"decoded values are off by {error:.3g}, expected less than 0.02")
    return f"largest error {error:.4f}"


def _optimizer() -> str:
    """8-bit AdamW on a quadratic: after 100 steps of 0.01 little is left of a distance of 0.5."""
    weight = torch.nn.Parameter(torch.full((4097,), 0.5))
    optimizer = optim.AdamW8bit([weight], lr=0.01, weight_decay=0.0)
    for _ in range(100):
        weight.grad = weight.detach().clone()
        optimizer.step()
    left = weight.abs().max().item()
    if not left < 0.1:
        raise AssertionError(f"{left:.3g} is left of a distance of 0.5, expected less than 0.1")
    return f"{left:.3f} left of 0.500"


_TESTS: list[tuple[str, Callable[[], str]]] = [
    ("NF4", lambda: _round_trip("nf4", False, 0.16)),
    ("NF4, nested", lambda: _round_trip("nf4", True, 0.18)),
    ("FP4", lambda: _round_trip("fp4", False, 0.18)),
    ("8-bit blockwise", _blockwise),
    ("AdamW, 8-bit states", _optimizer),
]


def main() -> int:
    """Prints the report and returns the exit status."""
    package = importlib.import_module(__package__ or "halfbyte")
    print(f"{package.__name__} {package.__version__}")
    if package.__version__ != native.version():
        _line("native code", f"halfbyte {native.version()}")

    _section("Environment")
    _line("system", f"{platform.system()} {platform.machine()}")
    _line("Python", platform.python_version())
    _line("PyTorch", torch.__version__)
    _line("instruction set", f"{native.isa()} (available: {', '.join(native.available_isas())})")
    _line("threads", torch.get_num_threads())

    _section("Back ends")
    for name, state in _back_ends():
        _line(name, state)

    _section("Self-test")
    failed = 0
    for name, test in _TESTS:
        try:
            _line(name, f"ok, {test()}")
        except Exception as error:  # whatever goes wrong is the finding
            failed += 1
            _line(name, f"FAILED: {type(error).__name__}: {error}")
    print(f"\n{failed} of {len(_TESTS)} checks failed" if failed else "\nEverything works.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
