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

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 2048, 3584
EXPERT_WEIGHT = 3 * HIDDEN * INTERMEDIATE  # gate, up and down

Kind = Literal["op", "import", "size"]
Limit = Literal["read", "fresh", "update", "gemm", "int8"]
Beside = Literal["torch", "loop"]


@dataclass(frozen=True)
class Bound:
    """The work that nothing can avoid, and the machine limit it runs into."""

    limit: Limit
    amount: float
    """Bytes for ``read`` (resident memory), ``fresh`` (newly allocated) and ``update`` (read and
    written in place, both counted), else operations: of fp32 for ``gemm``, of integers for
    ``int8``."""

    note: str
    then: Bound | None = None
    """Work that comes after it, with a limit of its own."""


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

    beside: Beside | None = None
    """Who else takes a turn: PyTorch's own fused AdamW, or our package without the grouping."""

    ratio: float | None = None
    """The target where it is a quotient and no time was written down."""

    @property
    def ratio_target(self) -> float | None:
        """The largest quotient of ours by the peer's that meets the target."""
        if self.target_ms is None or self.peer_ms is None:
            return self.ratio
        return self.target_ms / self.peer_ms


def _read(megabytes: float, what: str) -> Bound:
    """Bound by reading memory."""
    return Bound("read", megabytes * 1e6, f"read {megabytes:.0f} MB: {what}")


def _fresh(megabytes: float, what: str) -> Bound:
    """Bound by writing memory that was just allocated."""
    return Bound("fresh", megabytes * 1e6, f"write {megabytes:.0f} MB of new memory: {what}")


def _update(bytes_per_parameter: int, parameters: int) -> Bound:
    """Bound by reading and writing parameters, gradients and states once."""
    amount = float(bytes_per_parameter * parameters)
    note = f"{bytes_per_parameter} bytes a parameter: {amount / 1e6:.0f} MB read and written"
    return Bound("update", amount, note)


def _fma(rows: int, products: int = 1) -> Bound:
    """Bound by multiply-adds."""
    operations = 2.0 * rows * WEIGHT * products
    return Bound("gemm", operations, f"{operations / 1e9:.1f} GFLOP")


def _int8(rows: int, then: Bound | None = None) -> Bound:
    """Bound by products of int8."""
    operations = 2.0 * rows * WEIGHT
    return Bound("int8", operations, f"{operations / 1e9:.1f} GOP of int8", then)


def _experts(tokens: int, products: int = 1) -> Bound:
    """Bound by the multiply-adds of the routed rows."""
    operations = 2.0 * tokens * TOP_K * EXPERT_WEIGHT * products
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
    # The peer's figures in the targets were taken without outliers, which cost it more than us.
    Row(
        "linear8bitlt_1",
        "Linear8bitLt bf16, threshold 6, 4 outlier columns, 1 row",
        0.48,
        bound=_read(WEIGHT / 1e6, "the codes"),
    ),
    Row(
        "linear8bitlt_128",
        "Linear8bitLt bf16, threshold 6, 4 outlier columns, 128 rows",
        3.8,
        bound=_int8(128),
    ),
    Row(
        "linear8bitlt_512",
        "Linear8bitLt bf16, threshold 6, 4 outlier columns, 512 rows",
        14.0,
        bound=_int8(512),
    ),
    Row(
        "linear8bitlt_1_plain",
        "Linear8bitLt bf16, threshold 6, no outliers, 1 row",
        0.48,
        0.60,
        _read(WEIGHT / 1e6, "the codes"),
    ),
    Row(
        "linear8bitlt_128_plain",
        "Linear8bitLt bf16, threshold 6, no outliers, 128 rows",
        3.8,
        6.4,
        _int8(128),
    ),
    Row(
        "linear8bitlt_512_plain",
        "Linear8bitLt bf16, threshold 6, no outliers, 512 rows",
        14.0,
        21.5,
        _int8(512),
    ),
    Row(
        "linear8bitlt_train_256",
        "Linear8bitLt bf16 forward + backward, 4 outlier columns, 256 rows",
        bound=_int8(256, _fma(256)),
    ),
    Row(
        "int8_vectorwise_quant",
        "int8_vectorwise_quant, bf16 in",
        bound=_read(WEIGHT * 2 / 1e6, "the activations"),
    ),
    Row(
        "int8_vectorwise_quant_6",
        "int8_vectorwise_quant, bf16 in, threshold 6, 4 outlier columns",
        bound=_read(WEIGHT * 2 / 1e6, "the activations"),
    ),
    Row(
        "int8_vectorwise_dequant",
        "int8_vectorwise_dequant to fp32",
        bound=_fresh(WEIGHT * 4 / 1e6, "the weight"),
    ),
    Row(
        "experts4bit_1",
        "MLP of 8 NF4 experts, top-2, bf16, 1 token",
        bound=_read(TOP_K * EXPERT_WEIGHT * (0.5 + 4 / BLOCK) / 1e6, "two experts, packed"),
        beside="loop",
    ),
    Row(
        "experts4bit_256",
        "MLP of 8 NF4 experts, top-2, bf16, 256 tokens",
        bound=_experts(256),
        beside="loop",
        ratio=0.5,
    ),
    Row(
        "experts4bit_train_256",
        "the same, forward + backward, 256 tokens",
        bound=_experts(256, 2),
        beside="loop",
        ratio=0.5,
    ),
    Row("tiny_op", "one tiny op: dequantize_4bit of 64 values", 0.004, 0.012),
    Row("tiny_functional", "the same through functional.dequantize_4bit"),
    Row(
        "adam8bit",
        "Adam8bit step, 16.8 M fp32 parameters",
        11.0,
        222.0,
        _update(16, WEIGHT),
        beside="torch",
    ),
    Row(
        "ademamix8bit",
        "AdEMAMix8bit step, 16.8 M fp32 parameters",
        16.0,
        480.0,
        _update(18, WEIGHT),
    ),
    Row(
        "adamw8bit_200",
        "AdamW8bit step, 200 fp32 parameters of 16 K",
        4.0,
        57.0,
        _update(16, 200 << 14),
        beside="torch",
    ),
    Row(
        "adamw32bit",
        "AdamW32bit step, 16.8 M fp32 parameters",
        8.0,
        87.0,
        _update(28, WEIGHT),
        beside="torch",
    ),
    Row("import", "import, beyond torch's own", 200.0, 6500.0, kind="import"),
    Row("size", "installed size", kind="size", unit="MB", target=12.0),
)

ROW_BY_NAME = {row.name: row for row in ROWS}

OPTIMIZERS = {
    "adam8bit": "Adam8bit",
    "ademamix8bit": "AdEMAMix8bit",
    "adamw8bit": "AdamW8bit",
    "adamw32bit": "AdamW32bit",
}
"""The class that a row's name begins with. ``_200``: that many parameters; ``_256mb``: one."""

OPTIMIZER_ROWS = tuple(row.name for row in ROWS if row.name.split("_")[0] in OPTIMIZERS)
EXPERTS_ROWS = tuple(row.name for row in ROWS if row.beside == "loop")


@dataclass(frozen=True)
class MemoryRow:
    """A row of the table of peak memory beyond the outputs."""

    name: str
    title: str
    allowed_mb: float
    """Scratch that the targets allow: O(threads) and no copy of the weight."""

    beside: str = ""
    """The row of the main table that it is measured with, where that has another name."""


# What PyTorch takes for the activations of the experts' MLP at 256 tokens: measured with products
# that do nothing but allocate their results (torch 2.15, 2026-11-21).
ACTIVATIONS_MB = 16.8
ACTIVATIONS_TRAIN_MB = 26.2

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
    MemoryRow("linear8bitlt_1", "Linear8bitLt bf16, 1 row", THREADS + 1.0),
    MemoryRow("linear8bitlt_128", "Linear8bitLt bf16, 128 rows", THREADS + 1.0 + 128 * SIDE / 1e6),
    MemoryRow(
        "linear8bitlt_train_256",
        "Linear8bitLt forward + backward, 256 rows",
        THREADS + 1.0 + 256 * SIDE * 3 / 1e6,  # the codes, the result
    ),
    MemoryRow("int8_vectorwise_quant", "int8_vectorwise_quant, bf16 in", 2.0),
    MemoryRow("int8_vectorwise_quant_6", "int8_vectorwise_quant, threshold 6", 2.0),
    MemoryRow("int8_vectorwise_dequant", "int8_vectorwise_dequant to fp32", 2.0),
    MemoryRow("experts4bit_256", "8 NF4 experts, 256 tokens", THREADS + 1.0 + ACTIVATIONS_MB),
    MemoryRow(
        "experts4bit_train_256",
        "the same, forward + backward",
        THREADS + 1.0 + ACTIVATIONS_TRAIN_MB,
    ),
    MemoryRow(
        "adamw8bit_256mb", "AdamW8bit step, one fp32 parameter of 268 MB", 2.0, "adamw8bit_200"
    ),
    MemoryRow("adam8bit", "Adam8bit step, 16.8 M", 2.0),
    MemoryRow("ademamix8bit", "AdEMAMix8bit step, 16.8 M", 2.0),
    MemoryRow("adamw8bit_200", "AdamW8bit step, 200 parameters of 16 K", 2.0),
    MemoryRow("adamw32bit", "AdamW32bit step, 16.8 M", 2.0),
)


@dataclass(frozen=True)
class ScalingRow:
    """An operation timed over sizes and thread counts."""

    name: str
    title: str
    peer_largest: int = 1 << 26
    """Larger sizes are measured for us alone: to quantize, the peer needs some 30 bytes an element;
    its 8-bit optimizers need some 20 beside the 10 that everybody does."""


SCALING_ROWS: tuple[ScalingRow, ...] = (
    ScalingRow("quantize_4bit", "quantize_4bit nf4, bf16 in, block 64"),
    ScalingRow("dequantize_4bit", "dequantize_4bit nf4 to bf16"),
    ScalingRow("adam8bit", "Adam8bit step, fp32 parameters", 1 << 28),
)
SCALING_SIZES = tuple(1 << bits for bits in (16, 18, 20, 22, 24, 26, 28))
