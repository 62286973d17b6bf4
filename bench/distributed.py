"""Sharded training: curves over ranks, and bytes on the wire between two hosts.

    python bench/distributed.py curves           50 steps on 1, 2 and 4 ranks, every setting
    python bench/distributed.py curves --draw    the figure from the last record, no runs
    python bench/distributed.py hosts            two network namespaces as two hosts (Linux, root)

``curves``: examples/fsdp_qlora.py with the same windows of text on every number of ranks, float32
to compute in. The base model comes from a checkpoint in NF4 with double quantization; what the
ranks gather of it is compared with the file. ``hosts``: the same example on two hosts that a cable
joins, and layers without anything else, whose traffic is read from the counters of the interface.

Records go to bench/record/<machine>/, the figure to docs/figures/distributed_curves.svg. The exit
status is 1 when a figure misses what the guide claims.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT / "tests" / "distributed")]

from run import commit, load, machine, number, say, slug, table  # noqa: E402

EXAMPLE = ROOT / "examples" / "fsdp_qlora.py"
FIGURE = ROOT / "docs" / "figures" / "distributed_curves.svg"
WORLDS = (1, 2, 4)
TOLERANCE = 1e-3
"""Largest relative difference of two losses: gradients are summed in another order, and a state may
then fall on the neighbouring 8-bit code."""
TOLERANCE_32 = 1e-5
"""The same for 32-bit states: the order of sums alone."""
OPTIMIZERS = ("AdamW8bit", "PagedAdamW8bit")
CASES = [
    *(
        [f, s, o, "32"]
        for f, s, o in itertools.product("12", ("bf16", "fp32", "uint8"), OPTIMIZERS)
    ),
    # 32-bit states, which have no blocks; adapters [512, 9], of which a quarter is 4.5 blocks.
    ["2", "uint8", "AdamW", "32"],
    ["2", "uint8", "AdamW8bit", "9"],
]
LAYERS, WIDTH = 4, 1024
ROUNDS = 20


def label(case: list[str]) -> str:
    """A case in words."""
    fsdp, storage, optimizer, rank = case
    return f"FSDP{fsdp}, {storage}, {optimizer}, rank {rank}"


def allowed(case: list[str]) -> float:
    """The tolerance of a case."""
    return TOLERANCE if "8bit" in case[2] else TOLERANCE_32


# ------------------------------------------------------------------------- curves


def run_curves(steps: int) -> dict[str, Any]:
    """Every case on every number of ranks."""
    import ranks
    import test_curves

    shape = ["--steps", str(steps), "--batch", "8", "--window", "64"]
    results: dict[str, Any] = {"steps": steps, "cases": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        storages = sorted({case[1] for case in CASES})
        folders = {storage: str(test_curves.quantize(folder, storage)) for storage in storages}
        entries = [{"case": case, "by_ranks": {}} for case in CASES]
        for world in WORLDS:
            done = ranks.run(
                test_curves.curves,
                world,
                cases=CASES,
                folders=folders,
                shape=shape,
                timeout=3600,
            )
            for entry, result in zip(entries, done[0], strict=True):
                del result["peak"]  # of the process, which ran the cases before as well
                entry["by_ranks"][str(world)] = result
                say(f"{world} ranks, {label(entry['case'])}: loss {result['losses'][-1]:.5f}")
    for entry in entries:
        one = entry["by_ranks"]["1"]["losses"]
        for result in entry["by_ranks"].values():
            pairs = zip(result["losses"], one, strict=True)
            result["deviations"] = [abs(a - b) / b for a, b in pairs]
        results["cases"].append(entry)
    return results


def curves_report(results: dict[str, Any]) -> tuple[str, bool]:
    """A Markdown table, and whether every claim holds."""
    rows, held = [], True
    for entry in results["cases"]:
        case, by_ranks = entry["case"], entry["by_ranks"]
        worst = {world: max(by_ranks[world]["deviations"]) for world in by_ranks}
        wrong = sum(len(result["wrong"]) for result in by_ranks.values())
        held &= wrong == 0 and max(worst.values()) <= allowed(case)
        deviations = [f"{worst[str(world)]:.1e}" for world in WORLDS[1:]]
        last = f"{by_ranks['1']['losses'][-1]:.4f}"
        rows.append([label(case), last, *deviations, f"{allowed(case):.0e}", str(wrong)])
    header = ["setting", "last loss", "2 ranks", "4 ranks", "allowed", "tensors not the file's"]
    return table(header, rows), held


def draw(results: dict[str, Any], path: Path) -> None:
    """Losses over steps, and how far two and four ranks are from one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "halfbyte", "svg.fonttype": "none", "font.size": 9})
    canvas, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    colors = {"1": "0.2", "2": "#4c72b0", "4": "#c44e52"}
    steps = range(1, results["steps"] + 1)
    shown = [entry for entry in results["cases"] if allowed(entry["case"]) == TOLERANCE]
    for world in map(str, WORLDS):
        style = {"1": "-", "2": "--", "4": ":"}[world]
        name = "1 rank" if world == "1" else f"{world} ranks"
        for index, entry in enumerate(shown):
            result = entry["by_ranks"][world]
            named = {"label": name} if index == 0 else {}
            left.plot(steps, result["losses"], style, color=colors[world], linewidth=1, **named)
            if world != "1":
                floor = [max(value, 1e-9) for value in result["deviations"]]
                right.plot(steps, floor, color=colors[world], linewidth=0.8, **named)
    right.axhline(TOLERANCE, color="0.6", linewidth=0.8, linestyle="--")
    left.set(xlabel="step", ylabel="loss, nats per token", title="NF4 + double quant, LoRA")
    right.set(xlabel="step", yscale="log", title="relative difference from 1 rank")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, metadata={"Date": None})
    plt.close(canvas)


# ------------------------------------------------------------------------- two hosts


def work() -> None:
    """A rank of ``layers``: gathers layers forward and backward, and reads the interface."""
    import torch
    import torch.distributed as dist
    from halfbyte.nn import Linear4bit
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from two_hosts import TwoHosts

    counter = Path(f"/sys/class/net/{TwoHosts.interface}/statistics/tx_bytes")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found: dict[str, int] = {}
    for kind, storage in (("fsdp2", "uint8"), ("fsdp2", "bfloat16"), ("fsdp1", "bfloat16")):
        torch.manual_seed(0)
        config = {"bias": False, "quant_type": "nf4", "quant_storage": getattr(torch, storage)}
        layers = [Linear4bit(WIDTH, WIDTH, **config) for _ in range(LAYERS)]
        model: Any = torch.nn.Sequential(*layers).to("cpu")
        if kind == "fsdp1":
            policy = ModuleWrapPolicy({Linear4bit})
            model = FullyShardedDataParallel(
                model, auto_wrap_policy=policy, device_id=torch.device("cpu")
            )
        else:
            for layer in model:
                fully_shard(layer, reshard_after_forward=True)
            fully_shard(model)
        x = torch.randn(1, WIDTH, requires_grad=True)
        for round_ in range(ROUNDS + 1):
            if round_ == 1:  # the first one sets things up
                dist.barrier()
                before = int(counter.read_text())
            model(x).sum().backward()
        dist.barrier()
        found[f"{kind}-{storage}"] = int(counter.read_text()) - before
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def example_arguments(folder: Path, steps: int) -> list[str | Path]:
    """The command line of the example in these measurements."""
    shape = ["--steps", str(steps), "--save-every", "0", "--batch", "4", "--window", "64"]
    shape += ["--dtype", "fp32", "--storage", "uint8"]
    return [EXAMPLE, *shape, "--out", folder, "--json", folder / "log.json"]


def run_example(hosts: Any, ranks: int, steps: int) -> dict[str, Any]:
    """The example on two hosts; its log, and what the first host sent over the cable."""
    with tempfile.TemporaryDirectory() as name:
        before = hosts.sent()
        hosts.torchrun(example_arguments(Path(name), steps), ranks=ranks)
        sent = [now - then for now, then in zip(hosts.sent(), before, strict=True)]
        return {**json.loads((Path(name) / "log.json").read_text()), "sent": sent}


def run_alone(world: int, steps: int) -> dict[str, Any]:
    """The example on one host."""
    import subprocess

    with tempfile.TemporaryDirectory() as name:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
        launch += ["--master-port", "29511"]
        command = [*launch, *map(str, example_arguments(Path(name), steps))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        if done.returncode:
            raise RuntimeError(f"the example on one host failed:\n{done.stdout}{done.stderr}")
        return json.loads((Path(name) / "log.json").read_text())


def run_hosts() -> dict[str, Any]:
    """Traffic of layers, and the example: its losses and its traffic."""
    from two_hosts import TwoHosts

    parameters = LAYERS * WIDTH * WIDTH
    blocks = WIDTH * WIDTH // 64
    theory = {
        "fsdp2": 8 * (WIDTH * WIDTH / 2 + blocks + blocks / 256 * 4) / (WIDTH * WIDTH),
        "fsdp1": 4.0,
    }
    results: dict[str, Any] = {"layers": [], "example": []}
    with TwoHosts() as hosts:
        said = hosts.torchrun([HERE / "distributed.py", "work"])
        for name, sent in json.loads(said.strip().splitlines()[-1]).items():
            # Two gathers a round; of two ranks each sends half of what is gathered.
            bits = 8 * sent / (2 * ROUNDS * parameters * 0.5)
            expected = theory[name.partition("-")[0]]
            results["layers"].append({"setting": name, "bits": bits, "theory": expected})
            say(f"{name}: {bits:.4f} bits a parameter and gather, in theory {expected:.4f}")
        for ranks in (1, 2):
            short, long = (run_example(hosts, ranks, steps) for steps in (3, 8))
            alone = run_alone(2 * ranks, 8)
            # Gloo scatters by reducing everything everywhere: twice the bytes of a ring.
            counted = long["gathered"][0] + 2 * long["reduced"][0]
            entry = {
                "ranks": 2 * ranks,
                "sent_a_step": (long["sent"][0] - short["sent"][0]) / 5,
                "counted_a_step": counted,
                "gathered": long["gathered"][0],
                "reduced": long["reduced"][0],
                "losses": long["losses"],
                "losses_alone": alone["losses"],
            }
            results["example"].append(entry)
            say(f"{2 * ranks} ranks: {entry['sent_a_step']:,.0f} bytes sent, {counted:,} counted")
    return results


def hosts_report(results: dict[str, Any]) -> tuple[str, bool]:
    """Markdown tables, and whether every claim holds."""
    held = True
    rows = []
    for entry in results["layers"]:
        excess = entry["bits"] / entry["theory"] - 1
        held &= 0 <= excess <= 0.02
        cells = [entry["setting"], f"{entry['theory']:.3f}", f"{entry['bits']:.3f}"]
        rows.append([*cells, f"{excess:.1%}"])
    header = ["layers alone", "bits a parameter, theory", "on the wire", "headers and the rest"]
    first = table(header, rows)
    rows = []
    for entry in results["example"]:
        excess = entry["sent_a_step"] / entry["counted_a_step"] - 1
        same = entry["losses"] == entry["losses_alone"]
        held &= 0 <= excess <= 0.05 and same
        sizes = [number(entry[key] / 1e6) for key in ("counted_a_step", "sent_a_step")]
        cells = [str(entry["ranks"]), *(f"{size} MB" for size in sizes), f"{excess:.1%}"]
        rows.append([*cells, "yes" if same else "no"])
    header = ["example, ranks", "counted a step", "on the wire", "more", "losses of one host"]
    return first + "\n\n" + table(header, rows), held


# ------------------------------------------------------------------------- records


def main() -> int:
    """Measure or draw, write the record, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("curves", "hosts", "work"))
    parser.add_argument("--steps", type=int, default=50, help="of the curves")
    parser.add_argument("--draw", action="store_true", help="from the last record, no runs")
    parser.add_argument("--no-record", action="store_true", help="print the tables only")
    options = parser.parse_args()
    if options.what == "work":
        work()
        return 0
    facts = machine()
    records = HERE / "record" / slug(facts)
    kind = f"distributed-{options.what}"
    if options.draw:
        paths = sorted(records.glob(f"*-{kind}.json"))
        if not paths:
            parser.error(f"no record of {options.what} in {records.relative_to(ROOT)}")
        record = json.loads(paths[-1].read_text())
    else:
        if options.what == "hosts":
            from two_hosts import missing

            reason = missing()
            if reason is not None:
                parser.error(reason)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        started = datetime.datetime.now(datetime.timezone.utc)
        record = {
            "format": 1,
            "date": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "source": commit(),
            "machine": facts,
            "load_before": load(),
            "results": run_curves(options.steps) if options.what == "curves" else run_hosts(),
        }
        if not options.no_record:
            records.mkdir(parents=True, exist_ok=True)
            path = records / f"{started.strftime('%Y-%m-%d')}-{kind}.json"
            path.write_text(json.dumps(record, indent=1) + "\n")
            say(f"record written to {path.relative_to(ROOT)}")
    report = curves_report if options.what == "curves" else hosts_report
    text, held = report(record["results"])
    print(text)
    if options.what == "curves" and not options.no_record:
        draw(record["results"], FIGURE)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
