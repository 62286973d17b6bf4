"""What is measured: one entry per row of the targets, read by the workers and by the report.

Nothing here imports torch or a peer. ``target_ms`` and ``peer_ms`` are the figures that the targets
were written with (2-core x86-64 with AVX-512, 2 threads, idle); their quotient is the ratio that
has to be met on any machine. ``bound`` says what the hardware would need at best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SIDE = 4096
WEIGHT = SIDE * SIDE
BLOCK = 64
THREADS = 2
PAIRS = 7

Kind = Literal["op", "import", "size"]
Limit = Literal["read", "fresh", "gemm"]


@dataclass(frozen=True)
class Bound:
    """The work that nothing can avoid, and the machine limit it runs into."""

    limit: Limit
    amount: float
    """Bytes for ``read`` (resident memory) and ``fresh`` (newly allocated), else operations."""

    note: str


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    title: str
    target_ms: float | None = None
    peer_ms: float | None = None
    bound: Bound | None = None
    kind: Kind = "op"
    unit: str = "ms"
    target: float | None = None
    """The target in ``unit`` where that is not milliseconds."""

    @property
    def ratio_target(self) -> float | None:
        """The largest quotient of ours by the peer's that meets the target."""
        if self.target_ms is None or self.peer_ms is None:
            return None
        return self.target_ms / self.peer_ms


def _read(megabytes: float, what: str) -> Bound:
    """Bound by reading memory."""
    return Bound("read", megabytes * 1e6, f"read {megabytes:.0f} MB: {what}")


def _fresh(megabytes: float, what: str) -> Bound:
    """Bound by writing memory that was just allocated."""
    return Bound("fresh", megabytes * 1e6, f"write {megabytes:.0f} MB of new memory: {what}")


def _fma(rows: int, products: int = 1) -> Bound:
    """Bound by multiply-adds."""
    operations = 2.0 * rows * WEIGHT * products
    return Bound("gemm", operations, f"{operations / 1e9:.1f} GFLOP")


PACKED_MB = WEIGHT / 2e6 + WEIGHT / BLOCK * 4 / 1e6

ROWS: tuple[Row, ...] = (
    Row(
        "quantize_4bit",
        "quantize_4bit nf4, bf16 in, block 64",
        6.0,
        314.0,
        _read(WEIGHT * 2 / 1e6, "the weight"),
    ),
    Row(
        "quantize_4bit_nested",
        "quantize_4bit nf4 + double quant",
        7.0,
        371.0,
        _read(WEIGHT * 2 / 1e6, "the weight"),
    ),
    Row(
        "dequantize_4bit",
        "dequantize_4bit nf4 to bf16",
        3.0,
        8.1,
        _fresh(WEIGHT * 2 / 1e6, "the weight"),
    ),
    Row(
        "quantize_blockwise",
        "quantize_blockwise 8-bit, fp32 in",
        6.0,
        56.0,
        _read(WEIGHT * 4 / 1e6, "the weight"),
    ),
    Row(
        "dequantize_blockwise",
        "dequantize_blockwise 8-bit, fp32 out",
        6.0,
        98.0,
        _fresh(WEIGHT * 4 / 1e6, "the weight"),
    ),
    Row("linear4bit_1", "Linear4bit bf16, 1 row", 0.30, 0.46, _read(PACKED_MB, "packed weight")),
    Row("linear4bit_16", "Linear4bit bf16, 16 rows", 2.0, 3.5, _fma(16)),
    Row("linear4bit_128", "Linear4bit bf16, 128 rows", 14.0, 26.7, _fma(128)),
    Row("linear4bit_512", "Linear4bit bf16, 512 rows", 54.0, 108.0, _fma(512)),
    Row(
        "linear4bit_train_256",
        "Linear4bit bf16 forward + backward, 256 rows",
        58.0,
        107.0,
        _fma(256, 2),
    ),
    Row("tiny_op", "one tiny op: dequantize_4bit of 64 values", 0.004, 0.012),
    Row("tiny_functional", "the same through functional.dequantize_4bit"),
    Row("import", "import, beyond torch's own", 200.0, 6500.0, kind="import"),
    Row("size", "installed size", kind="size", unit="MB", target=12.0),
)

ROW_BY_NAME = {row.name: row for row in ROWS}


@dataclass(frozen=True)
class MemoryRow:
    """A row of the table of peak memory beyond the outputs."""

    name: str
    title: str
    allowed_mb: float
    """Scratch that the targets allow: O(threads) and no copy of the weight."""


MEMORY_ROWS: tuple[MemoryRow, ...] = (
    MemoryRow("quantize_4bit", "quantize_4bit nf4, bf16 in", 2.0),
    MemoryRow("quantize_4bit_nested", "quantize_4bit nf4 + double quant", 2.0),
    MemoryRow("dequantize_4bit", "dequantize_4bit nf4 to bf16", 2.0),
    MemoryRow("quantize_blockwise", "quantize_blockwise, fp32 in", 2.0),
    MemoryRow("dequantize_blockwise", "dequantize_blockwise, fp32 out", 2.0),
    MemoryRow("linear4bit_1", "Linear4bit bf16, 1 row", 1.0 * THREADS + 1.0),
    MemoryRow("linear4bit_16", "Linear4bit bf16, 16 rows", 1.0 * THREADS + 1.0),
    MemoryRow("linear4bit_128", "Linear4bit bf16, 128 rows", 1.0 * THREADS + 1.0),
    MemoryRow("linear4bit_train_256", "Linear4bit forward + backward, 256 rows", THREADS + 5.0),
)


@dataclass(frozen=True)
class ScalingRow:
    """An operation timed over sizes and thread counts."""

    name: str
    title: str


SCALING_ROWS: tuple[ScalingRow, ...] = (
    ScalingRow("quantize_4bit", "quantize_4bit nf4, bf16 in, block 64"),
    ScalingRow("dequantize_4bit", "dequantize_4bit nf4 to bf16"),
)
SCALING_SIZES = tuple(1 << bits for bits in (16, 18, 20, 22, 24, 26, 28))
PEER_LARGEST = 1 << 26
"""The peer needs some 30 bytes an element to quantize: larger sizes are measured for us alone."""
