"""The memory plan as text, and its command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from ._plan import Plan, plan
from ._plan_model import PRESETS
from ._plan_setting import QUANTS, STRATEGIES, Setting

__all__ = ["main", "text"]


def _size(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"


def text(found: Plan) -> str:
    """What ``str(plan)`` gives."""
    return "\n".join(_lines(found))


def _lines(found: Plan) -> Iterator[str]:
    s = found.setting
    model = found.model
    yield f"{model.name}: {model.numel / 1e9:.2f} billion parameters, {_trained(found)}"
    yield _how(s)
    yield ""
    yield f"{'memory of a rank':<26}{'at the peak':>14}{'at most':>14}"
    for row in found.rows:
        if row.size:
            yield f"  {row.name:<24}{_size(row.at_peak):>14}{_size(row.size):>14}"
    yield f"  {'total':<24}{_size(found.total):>14}   ({found.peak.name})"
    others = [f"{m.name} {_size(m.total)}" for m in found.moments if m.name != found.peak.name]
    yield f"  other moments: {', '.join(others)}"
    for name, size in found.host.items():
        yield f"  on the host: {name} {_size(size)}"
    if not model.modelled:
        yield "  activations are an estimate: the formulas are those of Llama's layers"
    yield ""
    yield from _traffic(found)
    if found.memory is not None:
        yield ""
        yield from _verdict(found)


def _trained(found: Plan) -> str:
    share = 100 * found.trained / found.model.numel
    return f"{found.trained / 1e6:.1f} million trained ({share:.2f} %)"


def _how(s: Setting) -> str:
    quant = {"none": "not quantized", "int8": "int8"}.get(s.quant, s.quant.upper())
    if s.packs:
        quant += f" in blocks of {s.blocksize}" + (", scales quantized" if s.double_quant else "")
    train = "everything" if s.full else f"LoRA of rank {s.lora_rank} ({_targets(s)})"
    parts = [
        f"{s.ranks} x {s.strategy}" + (" with CPU offload" if s.offload else ""),
        quant,
        f"{train} with {s.optim.name}",
        f"{s.batch} x {s.seq} tokens",
        "checkpointing" if s.checkpointing else "no checkpointing",
    ]
    return "; ".join(parts)


def _targets(s: Setting) -> str:
    return s.lora_targets if isinstance(s.lora_targets, str) else ", ".join(s.lora_targets)


def _traffic(found: Plan) -> Iterator[str]:
    wire = found.wire
    if not wire.total:
        yield "on the wire: nothing"
        return
    yield f"on the wire, received by a rank in a micro-batch: {_size(wire.total)}"
    if wire.packed:
        yield (
            f"  {'packed weights, scales':<24}{_size(wire.packed):>14}"
            f"   ({wire.bits:.3f} bits a parameter)"
        )
    if wire.floats:
        yield f"  {'other parameters':<24}{_size(wire.floats):>14}"
    yield f"  {'gradients':<24}{_size(wire.gradients):>14}"


def _verdict(found: Plan) -> Iterator[str]:
    memory = found.memory
    assert memory is not None
    if found.fits:
        yield f"fits: {_size(memory - found.total)} of {_size(memory)} are left"
    else:
        yield f"does not fit: {_size(found.total - memory)} more than the {_size(memory)} there are"
    batch, seq, ranks = found.largest("batch"), found.largest("seq"), found.ranks_needed()
    s = found.setting
    yield f"  largest micro-batch of {s.seq} tokens: {batch or 'none'}"
    yield f"  longest sequence in micro-batches of {s.batch}: {seq or 'none'}"
    if found.fits:
        return
    if s.sharded:
        yield f"  ranks needed: {ranks or 'no number is enough'}"
    for text_, changed in found.remedies():
        verdict = "fits" if changed.fits else "does not fit"
        yield f"  {text_}: {_size(changed.total)}, {verdict}"


# ---- command line --------------------------------------------------------------------------------


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="How much memory each rank needs to fine-tune a model, and what fits.",
        epilog="Sizes: 24G and 24GiB are 24 * 1024^3 bytes, 24GB are 24 * 1000^3.",
    )
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    presets = ", ".join(PRESETS)
    add("--model", required=True, help=f"a folder, a config.json, or one of {presets}")
    add("--ranks", type=int, default=1, help="devices (default: %(default)s)")
    add("--gpu-mem", help="memory of a device, such as 24G")
    add("--strategy", choices=STRATEGIES, help="default: fsdp2 for several ranks, else single")
    add("--quant", choices=QUANTS, help="default: the checkpoint's, else nf4")
    add("--double-quant", action=flag, default=None, help="quantize the scales (default)")
    add("--blocksize", type=int, help="default: 64")
    add("--quant-storage", help="dtype of packed bytes (default: uint8; fsdp1: --dtype)")
    add("--dtype", help="of what is not quantized (default: the checkpoint's, else bf16)")
    add("--mixed-precision", action=flag, default=True, help="compute with adapters in --dtype")
    add("--lora-rank", type=int, default=16, help="default: %(default)s")
    add("--lora-targets", default="all-linear", help="all-linear, attention, or names: q_proj,...")
    add("--train-dtype", "--lora-dtype", help="of trained parameters (default: fp32 adapters)")
    add("--full", action="store_true", help="train everything")
    add("--optim", default="adamw8bit", help="adamw8bit, paged_adamw8bit, lion32bit, adamw ...")
    add("--batch", type=int, default=1, help="micro-batch of a rank (default: %(default)s)")
    add("--seq", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    add("--accumulation", type=int, default=1, help="micro-batches of a step (%(default)s)")
    add("--checkpointing", action=flag, default=True, help="activation checkpointing (default)")
    add("--attention", choices=("sdpa", "eager"), default="sdpa", help="default: %(default)s")
    add("--offload", choices=("cpu",), help="parameters, gradients and states on the host")
    add("--reshard-after-forward", action=flag, default=True, help="FSDP2 (default)")
    add("--wrap", choices=("layer", "model"), default="layer", help="what FSDP gathers at once")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--overhead", help="what the framework takes, assumed (default: 1G on cuda, 0 on cpu)")
    add("--json", action="store_true", help="print JSON, sizes in bytes")
    return parser


def main(argv: Sequence[str], prog: str = "python -m halfbyte plan") -> int:
    """``plan`` on the command line: prints the plan.

    Returns:
        the exit status: 0; 1, and one sentence on standard error, when it cannot be computed; 3
        when it does not fit into ``--gpu-mem``.
    """
    options = vars(_parser(prog).parse_args(argv))
    as_json = options.pop("json")
    options["offload"] = options["offload"] == "cpu"
    options["reshard"] = options.pop("reshard_after_forward")
    try:
        found = plan(options.pop("model"), **options)
    except (ImportError, OSError, ValueError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found.as_dict(), indent=2) if as_json else found)
    return 3 if found.fits is False else 0
