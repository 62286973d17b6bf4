"""Run the benchmark: halfbyte against upstream bitsandbytes, in one run, alternating A B A B.

    .venv/bin/python bench/run.py                 everything (about half an hour on 2 cores)
    .venv/bin/python bench/run.py --quick         fewer pairs, no memory and scaling tables
    .venv/bin/python bench/run.py --rows linear4bit_1 tiny_op --pairs 15
    .venv/bin/python bench/run.py --optimizers    the optimizers' tables, complete

Each peer is a process of its own in a virtual environment of its own. A row is measured in pairs,
the peer first, then halfbyte; the median of the per-pair ratios is the figure. What the machine can
do at best (memory read, first touch of new memory, fp32 GEMM) is measured in the same run, and each
row says which fraction of that it reaches. The raw record goes to bench/record/<machine>/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from definitions import (  # noqa: E402
    EXPERTS_ROWS,
    MEMORY_ROWS,
    OPTIMIZER_ROWS,
    OPTIMIZERS,
    PAIRS,
    ROW_BY_NAME,
    ROWS,
    SCALING_ROWS,
    SCALING_SIZES,
    THREADS,
    Beside,
    Bound,
    Row,
)

QUICK_PAIRS = 3
QUICK_SIZES = tuple(1 << bits for bits in (16, 20, 24))


class Peer:
    """One side of the comparison: an environment, a package and a running worker."""

    def __init__(self, label: str, python: Path, package: str, distributions: list[str]) -> None:
        """Remember how to start it; nothing runs yet."""
        self.label = label
        self.python = python
        self.package = package
        self.distributions = distributions
        self.process: subprocess.Popen[str] | None = None

    def command(self, *arguments: str) -> list[str]:
        """The command line of a worker."""
        return [str(self.python), str(HERE / "engine.py"), "--package", self.package, *arguments]

    def environment(self) -> dict[str, str]:
        """The parent's environment without what would leak from one peer into the other."""
        drop = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        kept = {key: value for key, value in os.environ.items() if key not in drop}
        return {**kept, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}

    def start(self) -> dict[str, Any]:
        """Start the worker and return what it says about itself."""
        self.process = subprocess.Popen(
            self.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment(),
        )
        return self.ask(command="hello")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        process = self.process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError(f"the worker of {self.label} is not running")
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            problem = subprocess.run(
                self.command("--import-time"),
                capture_output=True,
                text=True,
                env=self.environment(),
                check=False,
            ).stderr.strip()
            detail = problem.splitlines()[-1] if problem else "its import works"
            raise RuntimeError(f"the worker of {self.label} ended with code {code}: {detail}")
        return json.loads(line)

    def stop(self) -> None:
        """End the worker."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(timeout=60)
            self.process = None

    def once(self, *arguments: str) -> dict[str, Any]:
        """Ask a fresh process one question."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            env=self.environment(),
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{self.label}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout)

    def fresh(self, **request: Any) -> dict[str, Any]:
        """Ask a fresh worker one command."""
        other = Peer(self.label, self.python, self.package, self.distributions)
        other.start()
        try:
            return other.ask(**request)
        finally:
            other.stop()


def peers(names: tuple[str, str]) -> tuple[Peer, Peer]:
    """The two sides by name, with one sentence when an environment is missing."""
    ours = Path(os.environ.get("HALFBYTE_PYTHON", ROOT / ".venv" / "bin" / "python"))
    theirs = Path(
        os.environ.get("HALFBYTE_UPSTREAM_PYTHON", ROOT / ".venv-upstream" / "bin" / "python")
    )
    out = []
    for name in names:
        if name == "upstream":
            if not theirs.exists():
                raise SystemExit(f"upstream is not installed at {theirs}: run `make upstream-env`")
            out.append(Peer("upstream", theirs, "bitsandbytes", ["bitsandbytes"]))
        else:
            if not ours.exists():
                raise SystemExit(f"halfbyte is not installed at {ours}: run `make install`")
            out.append(Peer("halfbyte", ours, "halfbyte", ["halfbyte", "bitsandbytes"]))
    return out[0], out[1]


def beside(kind: Beside, b: Peer) -> Peer:
    """Who else takes a turn, in the environment of the second side."""
    if kind == "torch":
        return Peer("torch fused AdamW", b.python, "torch", [])
    return Peer(f"{b.label}, loop", b.python, b.package, [])


def asked(row: str, side: str) -> str:
    """What a row is called when it is asked of a side."""
    return f"{row}_loop" if side == "c" and row in EXPERTS_ROWS else row


# ------------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """What matters about the machine, and nothing that names its owner."""
    facts: dict[str, Any] = {"system": platform.system(), "kernel": platform.release()}
    try:
        text = subprocess.run(
            ["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        text = ""
    fields = dict(re.findall(r"^([^:\n]+):\s*(.*)$", text, flags=re.MULTILINE))
    wanted = ("Architecture", "Model name", "CPU(s)", "Thread(s) per core", "Core(s) per socket")
    wanted += ("CPU family", "Model", "Stepping", "Hypervisor vendor")
    wanted += ("L1d cache", "L1i cache", "L2 cache", "L3 cache")
    facts["cpu"] = {key: fields[key] for key in wanted if key in fields}
    flags = set(fields.get("Flags", "").split())
    named = r"avx|avx2|fma|f16c|bmi2|avx512\w*|avx_vnni|amx\w*|asimd\w*|sve\w*|i8mm|bf16"
    facts["cpu"]["flags"] = sorted(flag for flag in flags if re.fullmatch(named, flag))
    memory = Path("/proc/meminfo")
    if memory.exists():
        facts["memory_kib"] = int(memory.read_text().split()[1])
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists():
        facts["transparent_hugepage"] = pages.read_text().strip()
    return facts


def slug(facts: dict[str, Any]) -> str:
    """A folder name for the machine."""
    cpu = facts["cpu"]
    name = re.sub(r"\(R\)|\(TM\)|processor|cpu|@.*", "", cpu.get("Model name", "cpu"), flags=re.I)
    if name.strip().lower() in ("intel xeon", "amd epyc", "cpu"):  # a hypervisor hides the rest
        name += f" family {cpu.get('CPU family', '')} model {cpu.get('Model', '')}"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{name}-{cpu.get('CPU(s)', os.cpu_count())}c"


def commit() -> dict[str, Any]:
    """The commit measured, and whether the tree had changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    return {"commit": git("rev-parse", "HEAD") or None, "dirty": bool(git("status", "--porcelain"))}


def load() -> list[float]:
    """Load averages, so that a record made on a busy machine shows it."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


# ------------------------------------------------------------------------- measuring


def say(text: str) -> None:
    """Progress goes to standard error; the tables go to standard output."""
    print(text, file=sys.stderr, flush=True)


def measure_pairs(row: Row, a: Peer, b: Peer, pairs: int, c: Peer | None) -> dict[str, Any]:
    """Alternate A B A B and keep every median; with a third side, A B C A B C."""
    samples: dict[str, list[float]] = {"a": [], "b": []}
    sides = [("a", a), ("b", b)]
    if c is not None:
        samples["c"] = []
        sides.append(("c", c))
    errors: dict[str, str] = {}
    if row.kind == "import":
        for peer in (a, b):  # warm the file cache for both
            peer.once("--import-time")
    for _ in range(pairs):
        for side, peer in sides:
            if side in errors:
                continue
            if row.kind == "import":
                samples[side].append(peer.once("--import-time")["seconds"])
                continue
            answer = peer.ask(command="measure", row=asked(row.name, side), threads=THREADS)
            if "error" in answer:
                errors[side] = answer["error"]
            else:
                samples[side].append(answer["median_s"])
    out: dict[str, Any] = {f"{side}_s": times for side, times in samples.items()}
    out["errors"] = errors
    for side, times in samples.items():
        if times:
            out[f"{side}_median_s"] = statistics.median(times)
    if samples.get("c") and samples["b"]:
        against = [y / x for x, y in zip(samples["c"], samples["b"], strict=False)]
        out["c_ratios"] = against
        out["c_ratio"] = statistics.median(against)
    ratios = [y / x for x, y in zip(samples["a"], samples["b"], strict=False)]
    if ratios:
        out["ratios"] = ratios
        out["ratio"] = statistics.median(ratios)
    return out


def measure_size(a: Peer, b: Peer) -> dict[str, Any]:
    """Installed bytes of both sides."""
    out: dict[str, Any] = {"errors": {}}
    for side, peer in (("a", a), ("b", b)):
        try:
            sizes = peer.once("--size", *peer.distributions)
        except RuntimeError as error:
            out["errors"][side] = str(error)
            continue
        out[f"{side}_bytes"] = sum(sizes.values())
        out[f"{side}_distributions"] = sizes
    if "a_bytes" in out and "b_bytes" in out:
        out["ratio"] = out["b_bytes"] / out["a_bytes"]
    return out


def best_limits(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """The better of two measurements of each limit."""
    return {key: max(first[key], second[key]) for key in first}


LIMITS = {
    "read": "read_bytes_per_s",
    "fresh": "fresh_bytes_per_s",
    "update": "update_bytes_per_s",
    "gemm": "gemm_flop_per_s",
    "int8": "int8_op_per_s",
}


def bound_seconds(bound: Bound | None, limits: dict[str, float]) -> float:
    """The time that unavoidable work takes at the machine's limits."""
    if bound is None:
        return 0.0
    return bound.amount / limits[LIMITS[bound.limit]] + bound_seconds(bound.then, limits)


def bound_note(bound: Bound) -> str:
    """Unavoidable work in words."""
    return bound.note if bound.then is None else f"{bound.note}, then {bound_note(bound.then)}"


def verdicts(row: Row, result: dict[str, Any]) -> dict[str, bool | None]:
    """Whether the ratio and the absolute target are met."""
    ratio, absolute = None, None
    if row.ratio_target is not None and "ratio" in result:
        ratio = result["ratio"] <= row.ratio_target
    if row.target_ms is not None and "b_median_s" in result:
        absolute = result["b_median_s"] * 1e3 <= row.target_ms
    if row.kind == "size" and row.target is not None and "b_bytes" in result:
        absolute = result["b_bytes"] / 1e6 <= row.target
    return {"ratio_met": ratio, "absolute_met": absolute}


def measure_scaling(
    a: Peer, b: Peer, names: set[str], sizes: tuple[int, ...], pairs: int
) -> list[dict[str, Any]]:
    """Time per element over sizes, with one thread and with two."""
    out = []
    for row in SCALING_ROWS:
        if row.name not in names:
            continue
        for elements in sizes:
            entry: dict[str, Any] = {"row": row.name, "elements": elements}
            for side, peer in (("a", a), ("b", b)):
                if peer.label == "upstream" and elements > row.peer_largest:
                    continue
                for threads in (1, THREADS):
                    times = []
                    for _ in range(pairs if elements <= 1 << 24 else 1):
                        answer = peer.ask(
                            command="scale", row=row.name, elements=elements, threads=threads
                        )
                        if "error" in answer:
                            entry.setdefault("errors", {})[side] = answer["error"]
                            break
                        times.append(answer["median_s"])
                    if times:
                        entry[f"{side}_{threads}t_s"] = statistics.median(times)
            out.append(entry)
            say(f"  {row.name} {elements:,} elements")
    return out


def measure_states(b: Peer, names: set[str]) -> list[dict[str, Any]]:
    """Bytes of state a parameter."""
    out = []
    for name in OPTIMIZER_ROWS:
        if name in names:
            out.append({"row": name, **b.ask(command="state", row=name)})
    return out


def measure_memory(a: Peer, b: Peer, loop: Peer | None, names: set[str]) -> list[dict[str, Any]]:
    """Peak memory beyond the outputs, each in a fresh process."""
    out = []
    for row in MEMORY_ROWS:
        if not names & {row.name, row.beside}:
            continue
        entry: dict[str, Any] = {"row": row.name, "allowed_mb": row.allowed_mb}
        sides = [("a", a), ("b", b)]
        if loop is not None and row.name in EXPERTS_ROWS:
            sides.append(("c", loop))
        for side, peer in sides:
            answer = peer.fresh(command="memory", row=asked(row.name, side))
            if "error" in answer:
                entry.setdefault("errors", {})[side] = answer["error"]
            else:
                entry[f"{side}_extra_mb"] = answer["extra_bytes"] / 1e6
                entry["output_mb"] = answer["output_bytes"] / 1e6
        if "b_extra_mb" in entry:
            entry["met"] = entry["b_extra_mb"] <= row.allowed_mb
        out.append(entry)
        say(f"  memory of {row.name}")
    return out


# ------------------------------------------------------------------------- the report


def number(value: float | None) -> str:
    """Three significant digits, no exponent."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(value):e}".split("e")[1]))
    return f"{value:.{min(digits, 6)}f}"


def word(met: bool | None) -> str:
    """A verdict in a word."""
    return "–" if met is None else "met" if met else "missed"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main_table(results: list[dict[str, Any]], a: str, b: str, c: tuple[str, str] | None) -> str:
    """Times, ratios and verdicts; beside them the third side ``c``, its label and short name."""
    rows = []
    for result in results:
        row = ROW_BY_NAME[result["row"]]
        if row.kind == "size":
            times = [result.get(f"{side}_bytes") for side in "ab"]
            shown = [number(value / 1e6 if value is not None else None) for value in times]
            target = f"≤ {number(row.target)} {row.unit}"
        else:
            medians = [result.get(f"{side}_median_s") for side in "ab"]
            shown = [number(value * 1e3 if value is not None else None) for value in medians]
            target = "–" if row.target_ms is None else f"≤ {number(row.target_ms)} ms"
        ratio = "–"
        if "ratio" in result:
            ratio = number(result["ratio"])
            if result.get("ratios"):
                low, high = min(result["ratios"]), max(result["ratios"])
                ratio += f" ({number(low)}–{number(high)})"
        wanted = row.ratio_target
        fraction = result.get("fraction_of_limit")
        rows.append(
            [
                row.title,
                f"{shown[0]} {row.unit}" if shown[0] != "–" else "failed",
                f"{shown[1]} {row.unit}" if shown[1] != "–" else "failed",
                ratio,
                "–" if wanted is None else f"≤ {number(wanted)}",
                word(result["ratio_met"]),
                target,
                word(result["absolute_met"]),
                "–" if fraction is None else f"{fraction * 100:.0f} %",
            ]
        )
        if c is not None:
            beside_s, against = result.get("c_median_s"), result.get("c_ratio")
            rows[-1].append("–" if beside_s is None else f"{number(beside_s * 1e3)} ms")
            rows[-1].append(number(against))
    header = ["work", a, b, f"{b} / {a}", "ratio target", "", "target", "", "of the limit"]
    if c is not None:
        header += [c[0], f"{b} / {c[1]}"]
    return table(header, rows)


def memory_table(entries: list[dict[str, Any]], a: str, b: str, loop: dict[str, Any] | None) -> str:
    """Peak memory, with a column for the loop where it took part."""
    titles = {row.name: row.title for row in MEMORY_ROWS}
    rows = []
    for entry in entries:
        extra = [number(entry.get(f"{side}_extra_mb")) for side in "abc"]
        shown = extra if loop is not None else extra[:2]
        allowed = [number(entry["allowed_mb"]), word(entry.get("met"))]
        rows.append([titles[entry["row"]], *shown, *allowed])
    sides = [a, b] if loop is None else [a, b, loop["label"]]
    return table(["work", *(f"{side}, MB" for side in sides), "allowed, MB", ""], rows)


def report(record: dict[str, Any]) -> str:
    """The tables of a record."""
    a, b = record["peers"]["a"]["label"], record["peers"]["b"]["label"]
    parts = []
    apart = {"loop": EXPERTS_ROWS, "torch": OPTIMIZER_ROWS}
    groups: dict[str | None, list[dict[str, Any]]] = {None: [], "loop": [], "torch": []}
    for result in record["rows"]:
        kind = next((kind for kind, names in apart.items() if result["row"] in names), None)
        groups[kind].append(result)
    for kind, results in groups.items():
        if results:
            c = (record["peers"][kind]["label"], kind) if kind in record["peers"] else None
            parts.append(main_table(results, a, b, c))
    limits = record["limits"]
    parts.append(
        "Limits of the machine in this run: "
        f"read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"first touch of new memory {limits['fresh_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"update in place (a += b) {limits['update_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"fp32 GEMM {limits['gemm_flop_per_s'] / 1e9:.0f} GFLOP/s, "
        f"int8 GEMM {limits['int8_op_per_s'] / 1e9:.0f} GOP/s."
    )
    if record["states"]:
        parts.append("Bytes of optimizer state a parameter:")
        rows = []
        for entry in record["states"]:
            each = entry["state_bytes"] / entry["parameters"]
            kind = OPTIMIZERS[entry["row"].split("_")[0]]
            whole = 12 if kind.startswith("AdEMAMix") else 8
            rows.append([kind, f"{each:.5f}", str(whole), f"{1 - each / whole:.0%}"])
        parts.append(table(["optimizer", "bytes", "in float32", "saved"], rows))
    if record["memory"]:
        parts.append("Peak memory beyond the outputs:")
        parts.append(memory_table(record["memory"], a, b, record["peers"].get("loop")))
    if record["scaling"]:
        parts.append("Time per element, nanoseconds, with one thread and with two:")
        rows = []
        for entry in record["scaling"]:
            cells = [entry["row"], f"{entry['elements'] / 1024:,.0f} Ki"]
            for side in "ab":
                one, two = (entry.get(f"{side}_{t}t_s") for t in (1, THREADS))
                for value in (one, two):
                    cells.append(number(value / entry["elements"] * 1e9 if value else None))
                cells.append(f"{one / two:.2f}x" if one and two else "–")
            rows.append(cells)
        columns = [f"{x} {t}" for x in (a, b) for t in ("1 thread", f"{THREADS} threads", "gain")]
        parts.append(table(["work", "elements", *columns], rows))
    return "\n\n".join(parts)


def main() -> int:
    """Measure what was asked for, write the record, print the tables."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="rows: " + ", ".join(ROW_BY_NAME)
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows; no other tables")
    parser.add_argument("--pairs", type=int, help=f"pairs a row (default {PAIRS})")
    parser.add_argument("--optimizers", action="store_true", help="the optimizers' tables alone")
    parser.add_argument("--quick", action="store_true", help="few pairs, the main table alone")
    parser.add_argument(
        "--memory", action="store_true", help="with --rows or --quick: their memory"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="with --rows or --quick: their scaling"
    )
    parser.add_argument("--a", choices=("upstream", "halfbyte"), default="upstream")
    parser.add_argument("--b", choices=("upstream", "halfbyte"), default="halfbyte")
    parser.add_argument("--machine", help="name of the folder below bench/record")
    parser.add_argument("--out", type=Path, help="write the record here instead")
    parser.add_argument("--no-record", action="store_true", help="print the tables only")
    options = parser.parse_args()
    unknown = [name for name in options.rows or [] if name not in ROW_BY_NAME]
    if unknown:
        parser.error(f"unknown row {unknown[0]}; the rows are {', '.join(ROW_BY_NAME)}")
    if options.optimizers:
        options.rows = options.rows or list(OPTIMIZER_ROWS)
        options.memory = options.scaling = True
    wanted = [row for row in ROWS if not options.rows or row.name in options.rows]
    names = {row.name for row in wanted}
    pairs = options.pairs or (QUICK_PAIRS if options.quick else PAIRS)
    if pairs < 1:
        parser.error(f"--pairs must be at least 1, got {pairs}")
    everything = not options.rows and not options.quick
    row_set = "rows" if options.rows else "quick" if options.quick else "full"
    if options.optimizers:
        row_set = "optimizers"

    facts = machine()
    a, b = peers((options.a, options.b))
    kinds = sorted({row.beside for row in wanted if row.beside is not None})
    third = {kind: beside(kind, b) for kind in kinds}
    started = datetime.datetime.now(datetime.timezone.utc)
    record: dict[str, Any] = {
        "format": 2,
        "date": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "row_set": row_set,
        "pairs": pairs,
        "threads": THREADS,
        "source": commit(),
        "machine": facts,
        "load_before": load(),
        "peers": {},
        "rows": [],
        "states": [],
        "memory": [],
        "scaling": [],
    }
    try:
        for side, peer in (("a", a), ("b", b)):
            say(f"starting {peer.label}")
            record["peers"][side] = {"label": peer.label, **peer.start()}
        for kind, peer in third.items():
            record["peers"][kind] = {"label": peer.label, **peer.start()}
        first = a.ask(command="limits")
        for row in wanted:
            result = measure_size(a, b) if row.kind == "size" else None
            if result is None:
                c = third[row.beside] if row.beside is not None else None
                result = measure_pairs(row, a, b, pairs, c)
            record["rows"].append({"row": row.name, **result, **verdicts(row, result)})
            detail = f"ratio {result['ratio']:.3f}" if "ratio" in result else str(result["errors"])
            say(f"{row.name}: {detail}")
        if everything or options.scaling:
            sizes = QUICK_SIZES if options.quick else SCALING_SIZES
            record["scaling"] = measure_scaling(a, b, names, sizes, 3)
        record["states"] = measure_states(b, names)
        record["limits"] = best_limits(first, a.ask(command="limits"))
    finally:
        for peer in (a, b, *third.values()):
            peer.stop()
    if everything or options.memory:
        record["memory"] = measure_memory(a, b, third.get("loop"), names)
    for result in record["rows"]:
        row = ROW_BY_NAME[result["row"]]
        if row.bound is not None and result.get("b_median_s"):
            bound = bound_seconds(row.bound, record["limits"])
            result["bound"] = bound_note(row.bound)
            result["fraction_of_limit"] = bound / result["b_median_s"]
    record["load_after"] = load()
    print(report(record))
    if not options.no_record:
        name = f"{started.strftime('%Y-%m-%d')}-{row_set}.json"
        path = options.out or HERE / "record" / (options.machine or slug(facts)) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        try:
            shown = path.resolve().relative_to(ROOT)
        except ValueError:
            shown = path
        say(f"record written to {shown}")
    failed = [result["row"] for result in record["rows"] if result.get("errors")]
    if failed:
        say(f"these rows failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
