"""A worker that measures one package: JSON lines in, JSON lines out.

The same code serves both peers, since their API is the same; ``--package`` names what to import.
With ``--package torch`` the optimizer rows are PyTorch's own fused AdamW, and there are no others.
The parent process (``run.py``) starts one worker per peer and decides who measures when.

    {"command": "hello"}                                  versions and threads
    {"command": "measure", "row": "...", "threads": 2}    median seconds of one call
    {"command": "scale", "row": "...", "elements": n, "threads": 1}
    {"command": "limits"}                                 what the machine can do at best
    {"command": "memory", "row": "..."}                   peak bytes beyond the outputs
    {"command": "state", "row": "..."}                    bytes of optimizer state
    {"command": "quit"}
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from definitions import (
    BLOCK,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    OPTIMIZERS,
    SIDE,
    THREADS,
    TOP_K,
)

Step = Callable[[], Any]
THRESHOLD = 6.0
MIN_SAMPLES = 5
MAX_SAMPLES = 200
WARMUP_S = 0.15
SAMPLES_S = 0.6
SHORTEST_SAMPLE_S = 5e-4


class Worker:
    """One imported package and the steps it can be asked to take."""

    def __init__(self, package: str) -> None:
        """Import torch, then the package."""
        import torch

        self.torch = torch
        self.package = package
        self.module = importlib.import_module(package)
        self.optim = importlib.import_module(f"{package}.optim")
        if package != "torch":
            self.functional = importlib.import_module(f"{package}.functional")
            self.nn = importlib.import_module(f"{package}.nn")
        torch.set_num_threads(THREADS)
        self.steps: dict[str, Step] = {}

    # --- inputs ---------------------------------------------------------------------------

    def _normal(self, *shape: int, dtype: Any, width: float = 0.02) -> Any:
        """Weights as they are: normal, a few hundredths wide; made in pieces, in place."""
        generator = self.torch.Generator().manual_seed(0)
        out = self.torch.empty(shape, dtype=dtype)
        for piece in out.view(-1).split(1 << 22):
            piece.normal_(0.0, width, generator=generator)
        return out

    def _activations(self, rows: int, outliers: bool) -> Any:
        """Standard normal in bfloat16; with outliers, four columns of magnitude 20 to 60."""
        torch = self.torch
        x = self._normal(rows, SIDE, dtype=torch.bfloat16, width=1.0)
        if outliers:
            generator = torch.Generator().manual_seed(1)
            columns = torch.randperm(SIDE, generator=generator)[:4]
            size = torch.empty(rows, 4).uniform_(20, 60, generator=generator)
            sign = torch.empty(rows, 4).uniform_(-1, 1, generator=generator).sign()
            x[:, columns] = (size * sign).to(x.dtype)
        return x

    def _layer(self) -> Any:
        """A quantized Linear4bit in bfloat16."""
        torch = self.torch
        layer = self.nn.Linear4bit(
            SIDE,
            SIDE,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=False,
            quant_type="nf4",
        )
        layer.weight.data = self._normal(SIDE, SIDE, dtype=torch.bfloat16)
        return layer.to("cpu")

    def _layer_8bit(self) -> Any:
        """A quantized Linear8bitLt, its weight taken from bfloat16."""
        layer = self.nn.Linear8bitLt(
            SIDE, SIDE, bias=False, has_fp16_weights=False, threshold=THRESHOLD
        )
        layer.weight.data = self._normal(SIDE, SIDE, dtype=self.torch.bfloat16)
        return layer.to("cpu")

    def _experts(self, row: str, *sizes: int) -> Step:
        """A layer's experts, grouped where the package can and the row's name allows it."""
        from moe import Experts

        experts = Experts(self.functional, *sizes)
        if hasattr(self.functional, "experts_matmul_4bit") and not row.endswith("_loop"):
            experts.group()
            run = experts.grouped
        else:
            run = experts.loop
        if "_train_" in row:
            return self._train(run, experts.input, experts.gradient)
        return self._infer(run, experts.input)

    def _optimizer(self, row: str, elements: int) -> Any:
        """An optimizer with gradients that has taken a step, so that its states exist."""
        torch = self.torch
        name, _, form = row.partition("_")
        count = 1
        if form == "200":
            count, elements = 200, 1 << 14
        elif form == "256mb":
            elements = 1 << 26
        shape = (elements // SIDE, SIDE) if elements >= SIDE else (elements,)
        parameters = []
        for _ in range(count):
            parameter = torch.nn.Parameter(self._normal(*shape, dtype=torch.float32))
            parameter.grad = self._normal(*shape, dtype=torch.float32)
            parameters.append(parameter)
        if self.package == "torch":
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        else:
            optimizer = getattr(self.optim, OPTIMIZERS[name])(parameters, lr=1e-4)
        optimizer.step()
        return optimizer

    # --- steps ----------------------------------------------------------------------------

    def _train(self, run: Callable[[Any], Any], x: Any, gradient: Any) -> Step:
        """Forward and backward; the result is the gradient of the input."""
        x.requires_grad_()

        def train() -> Any:
            x.grad = None
            run(x).backward(gradient)
            return x.grad

        return train

    def _infer(self, run: Callable[[Any], Any], x: Any) -> Step:
        """Forward, without gradients."""

        def infer() -> Any:
            with self.torch.no_grad():
                return run(x)

        return infer

    def step(self, row: str, elements: int = SIDE * SIDE) -> Step:
        """The call to time for a row; inputs are built once, outside of it."""
        if row.split("_")[0] in OPTIMIZERS:
            return self._optimizer(row, elements).step
        torch, F = self.torch, self.functional
        shape = (elements // SIDE, SIDE) if elements >= SIDE else (1, elements)
        if row in ("quantize_4bit", "quantize_4bit_nested"):
            weight = self._normal(*shape, dtype=torch.bfloat16)
            nested = row.endswith("nested")
            return lambda: F.quantize_4bit(
                weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=nested
            )
        if row == "dequantize_4bit":
            weight = self._normal(*shape, dtype=torch.bfloat16)
            pieces = [
                F.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
                for piece in weight.split(max(1, (1 << 24) // SIDE))
            ]
            packed = torch.cat([packed for packed, _ in pieces])
            state = pieces[0][1]
            state.absmax = torch.cat([state.absmax for _, state in pieces])
            state.shape = torch.Size(shape)
            return lambda: F.dequantize_4bit(packed, state)
        if row == "quantize_blockwise":
            weight = self._normal(*shape, dtype=torch.float32)
            return lambda: F.quantize_blockwise(weight)
        if row == "dequantize_blockwise":
            codes, state8 = F.quantize_blockwise(self._normal(*shape, dtype=torch.float32))
            return lambda: F.dequantize_blockwise(codes, state8)
        if row.startswith("linear4bit_"):
            rows = int(row.rsplit("_", 1)[1])
            x = self._normal(rows, SIDE, dtype=torch.bfloat16)
            if "_train_" in row:
                gradient = self._normal(rows, SIDE, dtype=torch.bfloat16)
                return self._train(self._layer().train(), x, gradient)
            return self._infer(self._layer().eval(), x)
        if row.startswith("linear8bitlt_"):
            rows = int(row.removesuffix("_plain").rsplit("_", 1)[1])
            x = self._activations(rows, outliers=not row.endswith("_plain"))
            if "_train_" in row:
                gradient = self._normal(rows, SIDE, dtype=torch.bfloat16)
                return self._train(self._layer_8bit().train(), x, gradient)
            return self._infer(self._layer_8bit().eval(), x)
        if row in ("int8_vectorwise_quant", "int8_vectorwise_quant_6"):
            threshold = THRESHOLD if row.endswith("_6") else 0.0
            x = self._activations(SIDE, outliers=threshold > 0)
            return lambda: F.int8_vectorwise_quant(x, threshold)
        if row == "int8_vectorwise_dequant":
            x = self._normal(SIDE, SIDE, dtype=torch.bfloat16)
            codes, stats, _ = F.int8_vectorwise_quant(x)
            return lambda: F.int8_vectorwise_dequant(codes, stats)
        if row.startswith("experts4bit_"):
            tokens = int(row.removesuffix("_loop").rsplit("_", 1)[1])
            return self._experts(row, tokens, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE)
        if row in ("tiny_op", "tiny_functional"):
            packed, state = F.quantize_4bit(
                torch.linspace(-1, 1, 64).reshape(1, 64), blocksize=BLOCK, quant_type="nf4"
            )
            if row == "tiny_functional":
                return lambda: F.dequantize_4bit(packed, state)
            op = getattr(torch.ops, self.package).dequantize_4bit
            absmax = state.absmax
            return lambda: op(packed, absmax, BLOCK, "nf4", [1, 64], torch.float32)
        raise ValueError(f"no step is defined for the row {row}")

    # --- measuring ------------------------------------------------------------------------

    def measure(self, step: Step) -> dict[str, Any]:
        """Median seconds of a call, after a warm-up."""
        clock = time.perf_counter
        started = clock()
        calls = 0
        while calls < 2 or clock() - started < WARMUP_S:
            step()
            calls += 1
        each = (clock() - started) / calls
        inner = max(1, int(SHORTEST_SAMPLE_S / each))
        samples: list[float] = []
        gc.collect()
        gc.disable()
        try:
            started = clock()
            while len(samples) < MIN_SAMPLES or (
                clock() - started < SAMPLES_S and len(samples) < MAX_SAMPLES
            ):
                begin = clock()
                for _ in range(inner):
                    step()
                samples.append((clock() - begin) / inner)
        finally:
            gc.enable()
        return {
            "median_s": statistics.median(samples),
            "best_s": min(samples),
            "samples": len(samples),
            "calls_per_sample": inner,
        }

    def limits(self) -> dict[str, float]:
        """Best of several: memory read, copy, first touch and update, fp32 and int8 GEMM."""
        torch = self.torch
        size = 256 << 20
        source = torch.ones(size // 4, dtype=torch.float32)
        target = torch.empty_like(source).zero_()
        n = 2048
        a, b = torch.randn(n, n), torch.randn(n, n)
        product = torch.empty(n, n)
        a8, b8 = (torch.randint(-127, 128, (n, n), dtype=torch.int8) for _ in range(2))
        product8 = torch.empty(n, n, dtype=torch.int32)
        fresh = 32 << 20

        def best(step: Step, repeats: int) -> float:
            step()
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                step()
                times.append(time.perf_counter() - begin)
            return min(times)

        return {
            "read_bytes_per_s": size / best(lambda: source.sum(), 10),
            "copy_bytes_per_s": 2 * size / best(lambda: target.copy_(source), 10),
            "fresh_bytes_per_s": fresh
            / best(lambda: torch.empty(fresh // 4, dtype=torch.float32).fill_(1.0), 20),
            "update_bytes_per_s": 3 * size / best(lambda: target.add_(source), 10),
            "gemm_flop_per_s": 2 * n**3 / best(lambda: torch.mm(a, b, out=product), 10),
            "int8_op_per_s": 2 * n**3 / best(lambda: torch._int_mm(a8, b8, out=product8), 10),
        }

    def memory(self, row: str) -> dict[str, int]:
        """Peak resident bytes of one call beyond what it returns."""
        torch = self.torch
        if row.split("_")[0] in OPTIMIZERS:
            return self._optimizer_memory(row)
        small = self.functional
        for dtype in (torch.bfloat16, torch.float32):  # start threads and libraries first
            packed, state = small.quantize_4bit(
                torch.randn(64, 256, dtype=dtype), quant_type="nf4", compress_statistics=True
            )
            small.dequantize_4bit(packed, state)
            codes, state8 = small.quantize_blockwise(torch.randn(64, 256, dtype=dtype))
            small.dequantize_blockwise(codes, state8)
        torch.mm(torch.randn(64, 64), torch.randn(64, 64))
        tiny = self.nn.Linear4bit(256, 64, bias=False, compute_dtype=torch.bfloat16).to("cpu")
        x = torch.randn(8, 256, dtype=torch.bfloat16, requires_grad=True)
        y = tiny(x)
        y.backward(torch.ones_like(y))  # with a gradient: torch imports sympy for that, once
        for columns in (None, 3):
            x = torch.randn(8, 256, dtype=torch.bfloat16)
            if columns is not None:
                x[:, columns] = 40.0
            codes, stats, _ = small.int8_vectorwise_quant(x, THRESHOLD)
            small.int8_vectorwise_dequant(codes, stats)
            tiny = self.nn.Linear8bitLt(
                256, 64, bias=False, has_fp16_weights=False, threshold=THRESHOLD
            ).to("cpu")
            self._infer(tiny.eval(), x)()
            self._train(tiny.train(), x, torch.ones(8, 64, dtype=torch.bfloat16))()
        if row.startswith("experts4bit_"):
            self._experts(row, 64, EXPERTS, TOP_K, 256, 256)()
        step = self.step(row)
        before = _settle()
        result = step()
        peak = _status("VmHWM")
        outputs = _tensor_bytes(result)
        return {"extra_bytes": max(0, peak - before - outputs), "output_bytes": outputs}

    def _optimizer_memory(self, row: str) -> dict[str, int]:
        """Peak resident bytes of one step beyond parameters, gradients and states."""
        # Threads and libraries first, with enough work that no thread is left out.
        self._optimizer(row.split("_")[0], 1 << 20).step()
        optimizer = self._optimizer(row, SIDE * SIDE)
        before = _settle()
        optimizer.step()
        peak = _status("VmHWM")
        return {"extra_bytes": max(0, peak - before), "output_bytes": 0}

    def state(self, row: str) -> dict[str, Any]:
        """Bytes of optimizer state, of the tensors that several parameters share only once."""
        optimizer = self._optimizer(row, 1 << 20)
        parameters = sum(p.numel() for p in optimizer.param_groups[0]["params"])
        tensors = {}
        for state in optimizer.state.values():
            for key, value in state.items():
                if hasattr(value, "data_ptr"):
                    tensors[key, value.data_ptr()] = value.numel() * value.element_size()
        codes = sum(size for (key, _), size in tensors.items() if key.startswith("qmap"))
        total = sum(tensors.values()) - codes
        return {"parameters": parameters, "state_bytes": total, "code_bytes": codes}

    # --- the protocol ---------------------------------------------------------------------

    def hello(self) -> dict[str, Any]:
        """Who this is."""
        torch = self.torch
        facts = {
            "package": self.package,
            "version": str(getattr(self.module, "__version__", "unknown")),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
        isa = os.environ.get("HALFBYTE_ISA")
        if isa:
            facts["HALFBYTE_ISA"] = isa
        return facts

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        command = request["command"]
        if command == "hello":
            return self.hello()
        if command == "limits":
            return self.limits()
        if command == "memory":
            return self.memory(request["row"])
        if command == "state":
            return self.state(request["row"])
        self.torch.set_num_threads(request.get("threads", THREADS))
        if command == "measure":
            row = request["row"]
            if row not in self.steps:
                self.steps = {row: self.step(row)}  # one row's inputs at a time
            return self.measure(self.steps[row])
        if command == "scale":
            self.steps = {}
            return self.measure(self.step(request["row"], request["elements"]))
        raise ValueError(f"unknown command {command}")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _settle() -> int:
    """Give back what was freed, reset the high-water mark, and return the resident bytes."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _tensor_bytes(value: Any) -> int:
    """Bytes of every tensor in a result, quantization states included."""
    if hasattr(value, "element_size"):
        return int(value.numel() * value.element_size())
    if isinstance(value, (tuple, list)):
        return sum(map(_tensor_bytes, value))
    if hasattr(value, "absmax"):
        return _tensor_bytes(value.absmax) + _tensor_bytes(getattr(value, "state2", None))
    return 0


def import_seconds(package: str) -> float:
    """Seconds to import a package once torch is there."""
    import torch  # noqa: F401

    begin = time.perf_counter()
    importlib.import_module(package)
    return time.perf_counter() - begin


def installed_bytes(distributions: list[str]) -> dict[str, int]:
    """Bytes on disk of each distribution's own files, byte code left out."""
    sizes = {}
    native = False
    for name in distributions:
        files = importlib.metadata.distribution(name).files or []
        paths = [Path(str(f.locate())) for f in files if "__pycache__" not in f.parts]
        native |= any(path.suffix in (".so", ".pyd", ".dylib") for path in paths)
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file())
    if not native:
        raise SystemExit(
            f"{distributions[0]} is installed in development mode, its size says nothing: "
            "run `make install`"
        )
    return sizes


def main() -> int:
    """Serve the parent, or answer one question and leave."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", required=True, help="what to import: halfbyte, bitsandbytes")
    parser.add_argument("--import-time", action="store_true", help="print the import time and end")
    parser.add_argument("--size", nargs="+", metavar="DISTRIBUTION", help="print sizes and end")
    options = parser.parse_args()

    # Libraries print what they like: standard output is kept for the protocol.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if options.size:
        print(json.dumps(installed_bytes(options.size)), file=protocol)
        return 0
    if options.import_time:
        print(json.dumps({"seconds": import_seconds(options.package)}), file=protocol)
        return 0
    worker = Worker(options.package)
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "quit":
            break
        try:
            reply = worker.answer(request)
        except Exception as error:  # the parent decides what a failed row means
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=protocol)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
