"""``python -m <package>`` says what is installed, what it runs on, and if it works.

Exits with 0 when the self-test passes and what ``HALFBYTE_BACKEND`` asks for can be used, else
with 1.

``python -m <package> outliers --model DIR --text FILE`` runs a causal language model on a text and
prints what :func:`~.utils.find_outliers` found.

``python -m <package> plan --model DIR --ranks N --gpu-mem 24G`` computes how much memory each rank
needs to fine-tune a model; see ``--help`` and :func:`~.distributed.plan`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import functional as F
from . import optim
from ._load import native
from .autograd._functions import matmul, matmul_4bit
from .utils import find_outliers


def _section(title: str) -> None:
    print(f"\n{title}")


def _line(name: str, value: object) -> None:
    print(f"  {name:<22}{value}")


def _back_ends() -> None:
    """What was looked for on this machine, found and refused, and whether torch can use it."""
    for name, usable, text in native.gpu_report():
        first, *rest = text.splitlines()
        title, _, verdict = first.partition(": ")
        if usable and name != "cpu" and _device(name) is None:
            verdict += f", but PyTorch {torch.__version__} has no {title} device"
        _line(title, verdict)
        for line in rest:
            _line("", line.strip())


def _device(back_end: str) -> str | None:
    """What torch calls the first device of a back end that has kernels; None when it has none."""
    if back_end == "cpu":
        return "cpu"
    kind = "xpu" if back_end == "xpu" else "cuda"
    torch_kind = getattr(torch, kind, None)
    if torch_kind is None or not torch_kind.is_available():
        return None
    if kind == "cuda" and (torch.version.hip is not None) != (back_end == "rocm"):
        return None
    for index in range(torch_kind.device_count()):
        if native.gpu_error(back_end, index) is None:
            return f"{kind}:{index}" if index else kind
    return None


def _is_met(asked: str) -> bool:
    """Whether what ``HALFBYTE_BACKEND`` asks for, if anything, can be used."""
    return not asked or any(usable for name, usable, _ in native.gpu_report() if name == asked)


def _round_trip(device: str, quant_type: str, nested: bool, bound: float) -> str:
    """Quantizes, decodes and multiplies a weight whose shape is no multiple of anything."""
    weight = torch.linspace(-3, 3, 65 * 97).sin().reshape(65, 97)
    packed, state = F.quantize_4bit(
        weight.to(device), quant_type=quant_type, compress_statistics=nested
    )
    decoded = F.dequantize_4bit(packed, state)
    error = (decoded.cpu() - weight).abs().max().item()
    if not error < bound:
        raise AssertionError(f"decoded values are off by {error:.3g}, expected less than {bound}")
    x = torch.linspace(-1, 1, 5 * 97).reshape(5, 97).to(device).requires_grad_()
    y = matmul_4bit(x, packed, state)
    y.sum().backward()
    assert x.grad is not None
    host = decoded.cpu()
    expected = x.detach().cpu() @ host.t()
    torch.testing.assert_close(y.detach().cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.cpu(), host.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    return f"largest error {error:.3f}"


def _blockwise(device: str) -> str:
    values = torch.linspace(-3, 3, 6001).sin()
    packed, state = F.quantize_blockwise(values.to(device), blocksize=256)
    error = (F.dequantize_blockwise(packed, state).cpu() - values).abs().max().item()
    if not error < 0.02:
        raise AssertionError(f"decoded values are off by {error:.3g}, expected less than 0.02")
    return f"largest error {error:.4f}"


def _int8(device: str) -> str:
    """LLM.int8() with an outlier column, beside the float product."""
    x = torch.linspace(-1, 1, 9 * 100).cos().reshape(9, 100)
    x[:, 7] = 20.0
    weight = torch.linspace(-3, 3, 33 * 100).sin().reshape(33, 100)
    y = matmul(x.to(device), weight.to(device), threshold=6.0).cpu()
    error = (y - x @ weight.t()).abs().max().item()
    if not error < 0.2:
        raise AssertionError(f"the product is off by {error:.3g}, expected less than 0.2")
    return f"largest error {error:.4f}"


def _optimizer(device: str) -> str:
    """8-bit AdamW on a quadratic: after 100 steps of 0.01 little is left of a distance of 0.5."""
    weight = torch.nn.Parameter(torch.full((4097,), 0.5, device=device))
    optimizer = optim.AdamW8bit([weight], lr=0.01, weight_decay=0.0)
    for _ in range(100):
        weight.grad = weight.detach().clone()
        optimizer.step()
    left = weight.abs().max().item()
    if not left < 0.1:
        raise AssertionError(f"{left:.3g} is left of a distance of 0.5, expected less than 0.1")
    return f"{left:.3f} left of 0.500"


_TESTS: list[tuple[str, Callable[[str], str]]] = [
    ("NF4", lambda device: _round_trip(device, "nf4", False, 0.16)),
    ("NF4, nested", lambda device: _round_trip(device, "nf4", True, 0.18)),
    ("FP4", lambda device: _round_trip(device, "fp4", False, 0.18)),
    ("8-bit blockwise", _blockwise),
    ("LLM.int8()", _int8),
    ("AdamW, 8-bit states", _optimizer),
]


def _self_test() -> tuple[int, int]:
    """Runs every check on every device that can be used: how many failed, and of how many."""
    usable = [_device(name) for name, usable, _ in native.gpu_report() if usable]
    failed, count = 0, 0
    for device in sorted({device for device in usable if device}):
        _section(f"Self-test, {device}")
        for name, test in _TESTS:
            count += 1
            try:
                _line(name, f"ok, {test(device)}")
            except Exception as error:  # whatever goes wrong is the finding
                failed += 1
                _line(name, f"FAILED: {type(error).__name__}: {error}")
    return failed, count


def outliers(argv: Sequence[str]) -> int:
    """``outliers``: prints the table of :func:`~.utils.find_outliers` for a model and a text.

    Returns:
        the exit status: 1, and one sentence on standard error, when something is missing.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__} outliers",
        description="Which columns of a causal language model's activations are outliers, and "
        "which llm_int8_threshold to take.",
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="text that is like your data")
    parser.add_argument("--threshold", type=float, default=6.0, help="default: %(default)s")
    parser.add_argument("--cost", type=float, default=0.1, help="see find_outliers; %(default)s")
    parser.add_argument("--tokens", type=int, default=8192, help="how many (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens in a row (%(default)s)")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--figure", type=Path, help="write the figure here (.svg; else matplotlib)")
    options = parser.parse_args(argv)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        print(f"outliers: Transformers is needed, and does not import: {error}", file=sys.stderr)
        return 1
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if not options.model.is_dir():
            raise ValueError(f"--model {options.model}: expected a folder, found none")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
        text = options.text.read_text(encoding="utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False)[: options.tokens]
        limit = getattr(model.config, "max_position_embeddings", options.window)
        window = min(options.window, limit, len(ids))
        if window < 1:
            raise ValueError(f"--text {options.text}: expected at least one token, got none")
        rows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
        found = find_outliers(
            model,
            [{"input_ids": part.to(model.device)} for part in rows.split(4)],
            options.threshold,
            cost=options.cost,
        )
        if options.json:
            found.to_json(options.json, full=True)
        if options.figure and options.figure.suffix == ".svg":
            found.save_svg(options.figure)
        elif options.figure:
            found.plot(options.figure)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"outliers: {str(error).strip().partition(chr(10))[0]}", file=sys.stderr)
        return 1
    print(found)
    return 0


def plan(argv: Sequence[str]) -> int:
    """``plan``: prints how much memory a rank needs; see :func:`~.distributed._plan_text.main`."""
    from .distributed._plan_text import main

    return main(argv, prog=f"python -m {__package__} plan")


def main(argv: Sequence[str] = ()) -> int:
    """Prints the report and returns the exit status."""
    if argv:
        if argv[0] == "outliers":
            return outliers(argv[1:])
        if argv[0] == "plan":
            return plan(argv[1:])
        print(
            "expected no argument, or outliers or plan and its options, got " + repr(argv[0]),
            file=sys.stderr,
        )
        return 2
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
    _back_ends()
    failed, count = _self_test()
    asked = os.environ.get("HALFBYTE_BACKEND", "").strip().lower()
    met = _is_met(asked)
    if failed:
        print(f"\n{failed} of {count} checks failed")
    elif not met:
        print(f"\nHALFBYTE_BACKEND={asked} asks for what cannot be used here, see above.")
    else:
        print("\nEverything works.")
    return 0 if met and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
