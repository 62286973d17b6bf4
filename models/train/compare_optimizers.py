"""Training curves: 8-bit beside 32-bit AdamW, and what rounding does to bfloat16 parameters.

    make curves                                          both figures from new runs
    python compare_optimizers.py curves --only adamw8bit upstream-adamw8bit
    python compare_optimizers.py rounding --draw         the figure from the last record, no runs

``curves``: the architecture of ../rustdoc-llama from random weights, float32, on the text of this
repository; every run has the same weights, batches and learning rates, and differs in nothing but
the optimizer. ``rounding``: ../rustdoc-llama itself, fine-tuned at a learning rate so small that
most updates are less than half a unit in the last place of a bfloat16 parameter.

Each run is a process of its own with one thread, as many at a time as there are cores. The record
goes to bench/record/<machine>/, the figure to docs/figures/. The exit status is 1 when a claim
made with the figure does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent.parent
ROOT = MODELS.parent
RECORDS = ROOT / "bench" / "record"
FIGURES = ROOT / "docs" / "figures"
sys.path.insert(0, str(ROOT / "bench"))

CONTEXT = 128
BATCH = 16
EVALUATE_EVERY = 40
SMOOTH = 20
MARGIN = 0.01
"""How far the 8-bit optimizer's final losses may be from those of 32-bit AdamW, relatively."""


@dataclass(frozen=True)
class Run:
    """One line of a figure."""

    label: str
    color: str
    package: str
    """What the optimizer is imported from: torch, halfbyte, or bitsandbytes (upstream's)."""

    optimizer: str
    dtype: str = "float32"
    dashes: str = "-"
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A set of runs that are drawn together."""

    title: str
    pretrained: bool
    steps: int
    lr: float
    weight_decay: float
    reference: str
    runs: dict[str, Run]


def _rounded(label: str, color: str, how: str, dashes: str = "-") -> Run:
    return Run(label, color, "halfbyte", "AdamW32bit", "bfloat16", dashes, {"rounding": how})


EXPERIMENTS: dict[str, Figure] = {
    "curves": Figure(
        "rustdoc-llama from random weights (2.4 M parameters)",
        pretrained=False,
        steps=400,
        lr=2e-3,
        weight_decay=0.01,
        reference="torch-adamw",
        runs={
            "torch-adamw": Run("torch AdamW (fused), 32-bit", "black", "torch", "AdamW", arguments={"fused": True}),
            "adamw32bit": Run("halfbyte AdamW32bit", "tab:blue", "halfbyte", "AdamW32bit"),
            "adamw8bit": Run("halfbyte AdamW8bit", "tab:red", "halfbyte", "AdamW8bit"),
            "paged-adamw8bit": Run("halfbyte PagedAdamW8bit", "tab:orange", "halfbyte", "PagedAdamW8bit", dashes=":"),
            "upstream-adamw8bit": Run("bitsandbytes AdamW8bit", "tab:green", "bitsandbytes", "AdamW8bit", dashes="--"),
        },
    ),
    "rounding": Figure(
        "rustdoc-llama fine-tuned, AdamW32bit",
        pretrained=True,
        steps=200,
        lr=2e-5,
        weight_decay=0.0,
        reference="float32",
        runs={
            "float32": Run("float32 parameters", "black", "halfbyte", "AdamW32bit"),
            "nearest": _rounded("bfloat16, to nearest", "tab:red", "nearest"),
            "stochastic": _rounded("bfloat16, stochastic", "tab:blue", "stochastic"),
            "kahan": _rounded("bfloat16, Kahan", "tab:green", "kahan", "--"),
        },
    ),
}


# ------------------------------------------------------------------------------- one run


def text_of(*paths: Path) -> str:
    """The files' texts, joined."""
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


def digest(tensors: Any) -> str:
    """A hash of tensors, bit for bit."""
    import torch

    out = hashlib.sha256()
    for tensor in tensors:
        out.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()[:16]


def train(figure: Figure, run: Run, steps: int) -> dict[str, Any]:
    """The losses of one run. Everything but the optimizer comes from fixed seeds.

    Returns loss (nats per token) of every step, held-out loss by step, and facts of the optimizer.
    """
    import torch
    import transformers
    from torch.nn import functional
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = MODELS / "rustdoc-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    dtype = getattr(torch, run.dtype)
    chapters = sorted((MODELS / "heldout").glob("*.txt"))
    tune = MODELS / "finetune"
    if figure.pretrained:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        ids = tokens(text_of(tune / "train.txt"))
    else:
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).to(dtype)
        ids = tokens(text_of(tune / "train.txt", *chapters))
    unseen = tokens(text_of(tune / "heldout.txt")).unfold(0, CONTEXT + 1, CONTEXT)
    model.train()

    parameters = list(model.parameters())
    module = importlib.import_module("torch.optim" if run.package == "torch" else f"{run.package}.optim")
    optimizer = getattr(module, run.optimizer)(
        parameters,
        lr=figure.lr,
        betas=(0.9, 0.99),
        weight_decay=figure.weight_decay,
        **run.arguments,
    )

    def loss_of(windows: torch.Tensor) -> torch.Tensor:
        logits = model(windows[:, :-1]).logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def unseen_loss() -> float:
        parts = unseen.split(BATCH)
        return sum(loss_of(part).item() * len(part) for part in parts) / len(unseen)

    start = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(1)
    losses: list[float] = []
    heldout = {0: unseen_loss()}
    seconds = []
    for step in range(steps):
        warm, left = (step + 1) / (0.05 * steps), (steps - step) / (0.9 * steps)
        share = min(1.0, warm, left) if not figure.pretrained else 1.0
        for group in optimizer.param_groups:
            group["lr"] = figure.lr * share
        chosen = torch.randint(len(ids) - CONTEXT, (BATCH,), generator=generator)
        loss = loss_of(torch.stack([ids[i : i + CONTEXT + 1] for i in chosen.tolist()]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            heldout[step + 1] = unseen_loss()
    if run.package == "halfbyte":
        states = [v for state in optimizer.state.values() for k, v in sorted(state.items())]
        states = [v for v in states if isinstance(v, torch.Tensor)]
    else:
        states = []
    changed = sum((p != q).sum().item() for p, q in zip(parameters, start, strict=True))
    return {
        "loss": [round(value, 5) for value in losses],
        "heldout": {str(step): round(value, 5) for step, value in heldout.items()},
        "step_ms": round(sorted(seconds)[len(seconds) // 2] * 1e3, 3),
        "parameters": sum(p.numel() for p in parameters),
        "changed": changed,
        "weights": digest(parameters),
        "states": digest(states) if states else None,
        "paged_bytes": sum(v.nbytes for v in states if getattr(v, "is_paged", False)),
        "versions": {
            name: str(getattr(importlib.import_module(name), "__version__", "unknown"))
            for name in sorted({"torch", "transformers", run.package})
        },
    }


def interpreter(package: str) -> Path:
    """The Python that has a package: bitsandbytes is upstream's, in an environment of its own."""
    if package == "bitsandbytes":
        default = ROOT / ".venv-upstream" / "bin" / "python"
        return Path(os.environ.get("HALFBYTE_UPSTREAM_PYTHON", default))
    return Path(sys.executable)


def start(name: str, key: str, steps: int) -> dict[str, Any]:
    """A run in a process of its own."""
    run = EXPERIMENTS[name].runs[key]
    python = interpreter(run.package)
    if not python.exists():
        raise SystemExit(f"upstream is not installed at {python}: run `make upstream-env`")
    began = time.monotonic()
    command = [str(python), __file__, name, "--worker", key, "--steps", str(steps)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        raise SystemExit(f"the run {key} ended with code {done.returncode}: {last}")
    result = json.loads(done.stdout.splitlines()[-1])
    say(f"{run.label}: {time.monotonic() - began:.0f} s, held-out {final_heldout(result):.4f}")
    return result


# ------------------------------------------------------------------------- record and figure


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def final_heldout(result: dict[str, Any]) -> float:
    """The held-out loss after the last step."""
    return result["heldout"][max(result["heldout"], key=int)]


def final_loss(result: dict[str, Any]) -> float:
    """The mean training loss of the last tenth of the steps."""
    tail = result["loss"][-max(1, len(result["loss"]) // 10) :]
    return sum(tail) / len(tail)


def smooth(losses: list[float]) -> list[float]:
    """The mean of the last SMOOTH steps, at every step."""
    out = []
    for end in range(1, len(losses) + 1):
        window = losses[max(0, end - SMOOTH) : end]
        out.append(sum(window) / len(window))
    return out


def claims(name: str, results: dict[str, Any]) -> list[tuple[str, bool]]:
    """What the figure is there to show, and whether it does. Only what the runs at hand decide."""
    out = []
    if name == "curves":
        if {"adamw8bit", "torch-adamw"} <= results.keys():
            for what, value in (("training", final_loss), ("held-out", final_heldout)):
                ratio = value(results["adamw8bit"]) / value(results["torch-adamw"]) - 1
                text = f"final {what} loss of AdamW8bit within 1 % of 32-bit AdamW: {ratio:+.2%}"
                out.append((text, abs(ratio) <= MARGIN))
        if {"adamw8bit", "paged-adamw8bit"} <= results.keys():
            a, b = results["adamw8bit"], results["paged-adamw8bit"]
            same = all(a[key] == b[key] for key in ("loss", "weights", "states"))
            size = b["paged_bytes"]
            text = f"PagedAdamW8bit bit-identical to AdamW8bit ({size:,} bytes of state in a file)"
            out.append((text, same and size > 0))
    elif {"float32", "nearest", "stochastic", "kahan"} <= results.keys():
        gains = {key: result["heldout"]["0"] - final_heldout(result) for key, result in results.items()}
        whole = gains["float32"]
        text = f"to nearest, {gains['nearest'] / whole:.0%} of the float32 gain is left"
        out.append((text, gains["nearest"] < 0.5 * whole))
        for key in ("stochastic", "kahan"):
            text = f"with {key} rounding, {gains[key] / whole:.0%} of it"
            out.append((text, gains[key] > 0.9 * whole))
    return out


def report(name: str, record: dict[str, Any]) -> bool:
    """Print the table and the claims; whether all of them hold."""
    figure, results = EXPERIMENTS[name], record["runs"]
    base = results.get(figure.reference)
    print("| run | last tenth, training | held-out | against the reference | step, ms | changed |")
    print("| --- | --- | --- | --- | --- | --- |")
    for key, result in results.items():
        against = "–"
        if base is not None:
            parts = (value(result) / value(base) - 1 for value in (final_loss, final_heldout))
            against = " / ".join(f"{part:+.2%}" for part in parts)
        print(
            f"| {figure.runs[key].label} | {final_loss(result):.4f} | {final_heldout(result):.4f} "
            f"| {against} | {result['step_ms']} | {result['changed'] / result['parameters']:.1%} |"
        )
    print()
    met = True
    for text, holds in claims(name, results):
        print(f"{text}: {'met' if holds else 'missed'}")
        met &= holds
    return met


def draw(name: str, record: dict[str, Any], path: Path) -> None:
    """The figure, from the record alone; the same bytes for the same record."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "halfbyte", "svg.fonttype": "none", "font.size": 9})
    figure, results = EXPERIMENTS[name], record["runs"]
    canvas, (upper, lower) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2), layout="constrained")
    every = 4
    base = results.get(figure.reference)
    for key, run in figure.runs.items():
        if key not in results:
            continue
        line = smooth(results[key]["loss"])
        at = list(range(SMOOTH, len(line) + 1, every))
        style: dict[str, Any] = {"color": run.color, "linestyle": run.dashes, "linewidth": 1.4}
        upper.plot(at, [line[i - 1] for i in at], label=run.label, **style)
        if name == "rounding":
            points = sorted((int(step), loss) for step, loss in results[key]["heldout"].items())
            lower.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
        elif base is not None:
            other = smooth(base["loss"])
            lower.plot(at, [100 * (line[i - 1] / other[i - 1] - 1) for i in at], **style)
    upper.set(ylabel=f"training loss, nats per token\n(mean of {SMOOTH} steps)")
    upper.set_title(f"{figure.title}, learning rate {record['lr']:g}")
    upper.legend()
    if name == "rounding":
        lower.set(ylabel="held-out loss, nats per token")
    else:
        upper.set_yscale("log")
        upper.set_yticks([3, 4, 5, 6, 8], labels=["3", "4", "5", "6", "8"])
        upper.minorticks_off()
        lower.axhspan(-100 * MARGIN, 100 * MARGIN, color="0.92")
        lower.set(ylim=(-3, 3), ylabel="difference from\ntorch AdamW, %")
    lower.set(xlabel="step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, metadata={"Date": None})
    plt.close(canvas)


def shown(path: Path) -> str:
    """A path as seen from the repository."""
    try:
        return str(path.resolve().relative_to(ROOT))
    except ValueError:
        return str(path)


def main() -> int:
    """Run, record, draw, and say whether the claims hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=tuple(EXPERIMENTS))
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs; others are kept")
    parser.add_argument("--draw", action="store_true", help="only draw, from the newest record")
    parser.add_argument("--steps", type=int, help="another number of steps, for a quick look")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--record", type=Path, help="read and write this record instead")
    parser.add_argument("--figure", type=Path, help="write the figure here instead (.svg, .png)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    figure = EXPERIMENTS[options.name]
    steps = options.steps or figure.steps
    if steps < 2:
        parser.error(f"--steps must be at least 2, got {steps}")
    if options.worker:
        print(json.dumps(train(figure, figure.runs[options.worker], steps)))
        return 0
    for key in options.only or ():
        if key not in figure.runs:
            parser.error(f"unknown run {key}; the runs are {', '.join(figure.runs)}")

    from run import commit, load, machine, slug

    facts = machine()
    now = datetime.datetime.now(datetime.timezone.utc)
    path = options.record
    if path is None and not options.draw:
        path = RECORDS / slug(facts) / f"{now:%Y-%m-%d}-{options.name}.json"
    elif path is None:
        found = list(RECORDS.glob(f"*/*-{options.name}.json"))
        if not found:
            parser.error(f"there is no record of {options.name} below {shown(RECORDS)}")
        path = max(found, key=lambda p: p.name)
    if options.draw:
        record = json.loads(path.read_text())
    else:
        before = load()
        chosen = options.only or list(figure.runs)
        kept: dict[str, Any] = {}
        if options.only and path.exists():
            old = json.loads(path.read_text())
            if old["steps"] == steps and old["lr"] == figure.lr:
                kept = old["runs"]
        with ThreadPoolExecutor(max(1, options.jobs)) as pool:
            new = list(pool.map(lambda key: start(options.name, key, steps), chosen))
        made = {**kept, **dict(zip(chosen, new, strict=True))}
        record = {
            "format": 1,
            "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
            "source": commit(),
            "machine": facts,
            "load_before": before,
            "load_after": load(),
            "steps": steps,
            "lr": figure.lr,
            "tokens_per_step": BATCH * CONTEXT,
            "runs": {key: made[key] for key in figure.runs if key in made},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(compact(json.dumps(record, indent=1)) + "\n")
        say(f"record written to {shown(path)}")
    met = report(options.name, record)
    target = options.figure or FIGURES / f"{options.name}.svg"
    draw(options.name, record, target)
    say(f"figure written to {shown(target)}")
    return 0 if met else 1


def compact(text: str) -> str:
    """JSON with every list of numbers on one line."""
    return re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


if __name__ == "__main__":
    raise SystemExit(main())
