"""The GPU benchmark: halfbyte against upstream bitsandbytes on one card, alternating A B A B.

    make bench-gpu                                     everything
    .venv/bin/python bench/gpu.py --rows matmul --pairs 9
    .venv/bin/python bench/gpu.py --peers halfbyte     without upstream

Each peer is a process in a virtual environment of its own. A call is timed with CUDA events over a
batch that is long enough, on inputs that together exceed the L2 cache; a row is measured in pairs,
upstream first, and the median of the pairs' ratios is its figure. Beside it stand the targets and
what bounds the row: the card's own copy bandwidth, or the dense bf16 product of the same shape,
measured in the same process. The record goes to bench/record/<card>/.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = {"upstream": (".venv-upstream", "bitsandbytes"), "halfbyte": (".venv", "halfbyte")}
PAIRS = 7
BATCH_S = 0.02
SMALLEST_SIDE = 64

Step = Callable[[], Any]


class Worker:
    """One package on the card: JSON lines in, JSON lines out."""

    def __init__(self, package: str, side: int) -> None:
        """Import torch, then the package."""
        import torch

        self.torch = torch
        self.side = side
        self.device = torch.device("cuda")
        self.module = importlib.import_module(package)
        self.functional = importlib.import_module(f"{package}.functional")
        self.nn = importlib.import_module(f"{package}.nn")
        self.optim = importlib.import_module(f"{package}.optim")
        torch.manual_seed(0)

    # --- what is measured: each gives a step, and the bytes or the product that bound it ----------

    def _normal(self, *shape: int, dtype: str = "bfloat16") -> Any:
        return self.torch.randn(*shape).mul_(0.02).to(getattr(self.torch, dtype)).to(self.device)

    def _turns(self, make: Callable[[], Any], nbytes: int) -> Callable[[], Any]:
        """Enough inputs that the next one is never in the L2 cache (of 50 to 130 MB)."""
        count = max(1, min(64, -(-(256 << 20) // max(1, nbytes)) if self.side > 1024 else 1))
        turn = itertools.cycle([make() for _ in range(count)])
        return lambda: next(turn)

    def quantize_4bit(self) -> tuple[Step, int]:
        n = self.side * self.side
        x = self._turns(lambda: self._normal(self.side, self.side), 2 * n)
        f = self.functional.quantize_4bit
        return lambda: f(x(), blocksize=64, quant_type="nf4"), 2 * n + n // 2 + n // 16

    def quantize_4bit_nested(self) -> tuple[Step, int]:
        n = self.side * self.side
        x = self._turns(lambda: self._normal(self.side, self.side), 2 * n)
        f = self.functional.quantize_4bit
        step = lambda: f(x(), blocksize=64, quant_type="nf4", compress_statistics=True)  # noqa: E731
        return step, 2 * n + n // 2 + n // 64

    def dequantize_4bit(self) -> tuple[Step, int]:
        n = self.side * self.side
        f = self.functional
        q = self._turns(lambda: f.quantize_4bit(self._normal(self.side, self.side)), n // 2)
        return lambda: f.dequantize_4bit(*q()), 2 * n + n // 2 + n // 16

    def quantize_blockwise(self) -> tuple[Step, int]:
        n = self.side * self.side
        x = self._turns(lambda: self._normal(self.side, self.side, dtype="float32"), 4 * n)
        f = self.functional.quantize_blockwise
        return lambda: f(x(), blocksize=256), 5 * n + n // 64

    def dequantize_blockwise(self) -> tuple[Step, int]:
        n = self.side * self.side
        f = self.functional
        make = lambda: f.quantize_blockwise(  # noqa: E731
            self._normal(self.side, self.side, dtype="float32"), blocksize=256
        )
        q = self._turns(make, n)
        return lambda: f.dequantize_blockwise(*q()), 5 * n + n // 64

    def matmul(self, rows: int) -> tuple[Step, int]:
        layer = self._turns(self._layer4, self.side * self.side // 2)
        x = self._normal(rows, self.side)
        packed = self.side * self.side * 9 // 16
        torch = self.torch

        def step() -> Any:
            with torch.no_grad():
                return layer()(x)

        return step, packed + 4 * rows * self.side

    def _layer4(self) -> Any:
        layer = self.nn.Linear4bit(
            self.side,
            self.side,
            bias=False,
            compute_dtype=self.torch.bfloat16,
            compress_statistics=False,
            quant_type="nf4",
        )
        layer.weight.data = self._normal(self.side, self.side).cpu()
        return layer.to(self.device)

    def matmul_backward(self, rows: int) -> tuple[Step, int]:
        layer = self._layer4()
        x = self._normal(rows, self.side).requires_grad_()
        y = layer(x)
        g = self._normal(rows, self.side)
        torch = self.torch
        return lambda: torch.autograd.grad(y, x, g, retain_graph=True), 0

    def dense(self, rows: int) -> tuple[Step, int]:
        """The bf16 product of the same shape on a dense weight: a bound, not a peer."""
        n = self.side * self.side
        weight = self._turns(lambda: self._normal(self.side, self.side), 2 * n)
        x = self._normal(rows, self.side)
        torch = self.torch
        return lambda: torch.nn.functional.linear(x, weight()), 2 * n

    def linear8bit(self, rows: int) -> tuple[Step, int]:
        layer = self.nn.Linear8bitLt(
            self.side, self.side, bias=False, has_fp16_weights=False, threshold=6.0
        )
        layer.weight.data = self._normal(self.side, self.side, dtype="float16").cpu()
        layer = layer.to(self.device)
        x = self._normal(rows, self.side, dtype="float16") * 50
        x[:, :4] *= 20
        torch = self.torch

        def step() -> Any:
            with torch.no_grad():
                return layer(x)

        return step, self.side * self.side

    def adamw8bit(self, parameters: int) -> tuple[Step, int]:
        elements = max(4096, self.side * self.side // parameters)
        torch = self.torch
        params = [
            torch.nn.Parameter(self._normal(elements, dtype="float32")) for _ in range(parameters)
        ]
        for p in params:
            p.grad = torch.randn(elements).mul_(1e-3).to(self.device)
        optimizer = self.optim.AdamW8bit(params, lr=1e-4)
        optimizer.step()
        # Reads gradient, parameter, two codes; writes parameter and codes.
        return optimizer.step, parameters * elements * (4 + 8 + 4)

    def copy(self) -> tuple[Step, int]:
        """The card's copy bandwidth: a bound."""
        n = max(1 << 20, self.side * self.side * 4)
        a = self.torch.empty(n, dtype=self.torch.uint8, device=self.device).zero_()
        b = self.torch.empty_like(a)
        return lambda: b.copy_(a), 2 * n

    # --- timing ---------------------------------------------------------------------------------

    def measure(self, row: str) -> dict[str, Any]:
        """Median seconds of a call on the device, and of the host until it returns."""
        name, _, argument = row.partition(":")
        step, nbytes = getattr(self, name)(*([int(argument)] if argument else []))
        torch = self.torch
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        calls = max(3, min(1000, int(BATCH_S / max(1e-6, time.perf_counter() - begin))))
        device, host = [], []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            host.append((time.perf_counter() - begin) / calls)
            end.record()
            torch.cuda.synchronize()
            device.append(start.elapsed_time(end) / 1e3 / calls)
        return {
            "seconds": statistics.median(device),
            "host_seconds": statistics.median(host),
            "bytes": nbytes,
        }

    def overhead(self) -> dict[str, Any]:
        """Host seconds of the smallest op, and of torch's own smallest one."""
        torch, f = self.torch, self.functional
        packed, state = f.quantize_4bit(self._normal(1, 64))
        out = torch.empty(1, 64, dtype=torch.bfloat16, device=self.device)

        def seconds(step: Step) -> float:
            samples = []
            for _ in range(20):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(100):
                    step()
                samples.append((time.perf_counter() - begin) / 100)
            return statistics.median(samples)

        return {
            "dequantize_4bit": seconds(lambda: f.dequantize_4bit(packed, state)),
            "torch_add": seconds(lambda: torch.add(out, out)),
        }

    def serve(self) -> None:
        """Answer until the parent closes the pipe."""
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if request["command"] == "measure":
                    answer = self.measure(request["row"])
                elif request["command"] == "overhead":
                    answer = self.overhead()
                else:
                    answer = {
                        "card": self.torch.cuda.get_device_name(),
                        "capability": self.torch.cuda.get_device_capability(),
                        "torch": self.torch.__version__,
                        "version": self.module.__version__,
                    }
            except Exception as error:  # a row that fails is recorded as such
                answer = {"error": f"{type(error).__name__}: {error}"}
            self.torch.cuda.empty_cache()
            print(json.dumps(answer), flush=True)


def first_use(python: Path, package: str) -> float:
    """Seconds of the first op of a fresh process with an empty cache, CUDA itself being warm."""
    program = (
        "import time, torch, importlib\n"
        f"f = importlib.import_module('{package}.functional')\n"
        "x = torch.zeros(64, 64, dtype=torch.bfloat16, device='cuda'); torch.cuda.synchronize()\n"
        "begin = time.perf_counter(); f.quantize_4bit(x); torch.cuda.synchronize()\n"
        "print(time.perf_counter() - begin)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HALFBYTE_CACHE_DIR": folder, "CUDA_CACHE_DISABLE": "1"}
        done = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, env=environment, check=True
        )
    return float(done.stdout.split()[-1])


# row: (what bounds it, the design's target against that bound, the target against upstream)
Bound = tuple[str, float | None, float | None]
ROWS: dict[str, Bound] = {
    "quantize_4bit": ("copy", 0.85, None),
    "quantize_4bit_nested": ("copy", None, None),
    "dequantize_4bit": ("copy", 0.85, None),
    "quantize_blockwise": ("copy", 0.85, None),
    "dequantize_blockwise": ("copy", 0.85, None),
    **{f"matmul:{rows}": ("copy", 0.70, 1.3) for rows in (1, 2, 4)},
    **{f"matmul:{rows}": ("dense", None, 1.3) for rows in (16, 32, 64)},
    **{f"matmul:{rows}": ("dense", 0.85, None) for rows in (512, 2048)},
    **{f"matmul_backward:{rows}": ("dense", 0.85, None) for rows in (64, 512, 2048)},
    **{f"linear8bit:{rows}": ("dense", None, 1.5) for rows in (1, 16, 128, 512, 2048)},
    "adamw8bit:200": ("copy", 0.80, 3.0),
    "adamw8bit:1": ("copy", 0.80, None),
}


class Peer:
    """A worker process."""

    def __init__(self, label: str, side: int) -> None:
        """Start it and hear what it is."""
        environment, package = PEERS[label]
        self.label = label
        self.python = ROOT / environment / "bin/python"
        if not self.python.exists():
            raise SystemExit(f"{label}: expected {self.python}; `make upstream-env` makes it")
        command = [self.python, __file__, "--worker", package, "--side", str(side)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.ask(command="hello")

    def ask(self, **request: Any) -> dict[str, Any]:
        """One question, one answer."""
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        if pipe_in is None or pipe_out is None:
            raise RuntimeError(f"the worker of {self.label} has no pipes")
        pipe_in.write(json.dumps(request) + "\n")
        pipe_in.flush()
        line = pipe_out.readline()
        if not line:
            raise SystemExit(f"the worker of {self.label} ended with {self.process.wait()}")
        return json.loads(line)


def fraction_of_bound(row: str, ours: dict[str, Any], bounds: dict[str, dict[str, Any]]) -> float:
    """How near a row comes to what bounds it; 1 is there."""
    bound = ROWS[row][0]
    if bound == "copy":
        speed = bounds["copy"]["bytes"] / bounds["copy"]["seconds"]
        return ours["bytes"] / speed / ours["seconds"]
    dense = bounds[f"dense:{row.partition(':')[2]}"]
    return dense["seconds"] / ours["seconds"]


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="*", default=[""], help="rows that begin with one of these")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="default: %(default)s")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--side", type=int, default=8192, help="of the weights; %(default)s")
    parser.add_argument("--out", type=Path, help="the record; else bench/record/<card>/<date>.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side < SMALLEST_SIDE or options.side % SMALLEST_SIDE:
        parser.error(f"--side must be a multiple of {SMALLEST_SIDE}, got {options.side}")
    if options.worker:
        Worker(options.worker, options.side).serve()
        return 0

    peers = [Peer(label, options.side) for label in options.peers]
    about = {peer.label: peer.about for peer in peers}
    for label, facts in about.items():
        if "error" in facts:
            raise SystemExit(f"{label}: expected a CUDA device, got {facts['error']}")
    card = next(iter(about.values()))["card"]
    print(f"{card}, weights {options.side} x {options.side}, {options.pairs} pairs")

    rows = [row for row in ROWS if any(row.startswith(prefix) for prefix in options.rows)]
    bounded = {f"dense:{row.partition(':')[2]}" for row in rows if ROWS[row][0] == "dense"}
    bounds = {name: peers[-1].ask(command="measure", row=name) for name in ["copy", *bounded]}
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "peers": about,
        "side": options.side,
        "pairs": options.pairs,
        "bounds": bounds,
        "rows": {},
    }
    print(f"{'row':<24}{'us':>10}{'upstream us':>13}{'faster':>8}{'of bound':>10}  targets")
    for row in rows:
        pairs = [
            {peer.label: peer.ask(command="measure", row=row) for peer in peers}
            for _ in range(options.pairs)
        ]
        record["rows"][row] = pairs
        failed = [(k, v["error"]) for pair in pairs for k, v in pair.items() if "error" in v]
        if failed:
            print(f"{row:<24}{failed[0][0]}: {failed[0][1]}")
            continue
        median = {
            label: statistics.median(pair[label]["seconds"] for pair in pairs) for label in about
        }
        ours = {**pairs[0][peers[-1].label], "seconds": median[peers[-1].label]}
        near = fraction_of_bound(row, ours, bounds)
        line = f"{row:<24}{ours['seconds'] * 1e6:>10.1f}"
        faster = None
        if "upstream" in median and "halfbyte" in median:
            faster = statistics.median(
                pair["upstream"]["seconds"] / pair["halfbyte"]["seconds"] for pair in pairs
            )
            line += f"{median['upstream'] * 1e6:>13.1f}{faster:>8.2f}"
        else:
            line += f"{'':>21}"
        _, of_bound, over_peer = ROWS[row]
        targets = [f"{of_bound:.0%} of {ROWS[row][0]}"] if of_bound else []
        targets += [f"{over_peer}x upstream"] if over_peer else []
        print(f"{line}{near:>10.1%}  {', '.join(targets)}")
    record["overhead"] = {peer.label: peer.ask(command="overhead") for peer in peers}
    record["first_use"] = {
        label: first_use(ROOT / PEERS[label][0] / "bin/python", PEERS[label][1]) for label in about
    }
    for label in about:
        small = record["overhead"][label]
        if "error" in small:
            print(f"{label}: {small['error']}")
            continue
        print(
            f"{label}: {small['dequantize_4bit'] * 1e6:.1f} us a small op (torch.add "
            f"{small['torch_add'] * 1e6:.1f}), first use {record['first_use'][label] * 1e3:.0f} ms"
        )
    folder = "".join(c if c.isalnum() else "-" for c in card.lower()).strip("-")
    stamp = record["date"].replace(":", "").replace("+0000", "")
    out = options.out or HERE / "record" / folder / f"{stamp}-gpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
