"""The benchmark's own parts: its definitions, the work it times, and the tables it prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from halfbyte import functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "bench"))

import definitions
import engine
import moe
import run

LIMITS = dict.fromkeys((*run.LIMITS.values(), "copy_bytes_per_s"), 1e9)


@pytest.fixture
def worker():
    threads = torch.get_num_threads()
    yield engine.Worker("halfbyte")
    torch.set_num_threads(threads)


def test_names_are_unique_and_memory_rows_have_a_row():
    names = [row.name for row in definitions.ROWS]
    assert len(set(names)) == len(names)
    for row in (*definitions.MEMORY_ROWS, *definitions.SCALING_ROWS):
        assert {row.name, getattr(row, "beside", "")} & set(names), row.name


def test_only_planted_columns_reach_the_threshold(worker):
    x = worker._activations(64, outliers=True).abs()
    columns = (x >= engine.THRESHOLD).any(dim=0)
    assert columns.sum() == 4
    assert x[:, columns].min() >= 20
    assert x[:, columns].max() <= 60
    assert worker._activations(64, outliers=False).abs().max() < engine.THRESHOLD


@pytest.mark.parametrize("tokens", [1, 37])
def test_loop_and_grouped_experts_compute_the_same(tokens):
    experts = moe.Experts(F, tokens, 4, 2, 128, 192)
    up, down = (
        [F.dequantize_4bit(*part).double() for part in parts]
        for parts in (experts.gate_up, experts.down)
    )
    results = []
    for way in ("loop", "grouped"):
        if way == "grouped":
            experts.group()
        x = experts.input.clone().requires_grad_()
        y = getattr(experts, way)(x)
        y.backward(experts.gradient)
        results.append((y.detach(), x.grad))

    x = experts.input.double().requires_grad_()
    rows = []
    for token in range(tokens):
        row = torch.zeros(128, dtype=torch.float64)
        for place, expert in enumerate(experts.ids[token].tolist()):
            gate, value = (up[expert] @ x[token]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * value
            row = row + experts.scores[token, place].double() * (down[expert] @ hidden)
        rows.append(row)
    y = torch.stack(rows)
    y.backward(experts.gradient.double())
    for value, gradient in results:
        for got, exact in ((value, y.detach()), (gradient, x.grad)):
            error = (got.double() - exact).norm() / exact.norm()
            assert error < 0.01, f"relative error {error:.4f}"


def test_experts_with_broken_blocks_are_not_grouped():
    experts = moe.Experts(F, 4, 2, 1, 24, 5)
    with pytest.raises(ValueError, match="whole blocks of 64"):
        experts.group()


def test_limits_add_up():
    bound = definitions.ROW_BY_NAME["linear8bitlt_train_256"].bound
    operations = 2.0 * 256 * 4096 * 4096
    limits = {**LIMITS, "int8_op_per_s": 2e9}
    assert run.bound_seconds(bound, limits) == pytest.approx(operations * 1.5 / 1e9)
    assert run.bound_note(bound) == "8.6 GOP of int8, then 8.6 GFLOP"


def test_report_names_the_third_side_and_its_ratio():
    times = {"a_median_s": 0.2, "b_median_s": 0.1, "ratio": 0.5, "errors": {}}
    beside = {"c_median_s": 0.4, "c_ratio": 0.25}
    rows = []
    for name in ("linear8bitlt_128_plain", "experts4bit_256", "adam8bit"):
        extra = {} if name.startswith("linear") else beside
        result = {"row": name, **times, **extra}
        rows.append({**result, **run.verdicts(definitions.ROW_BY_NAME[name], result)})
    record = {
        "peers": {
            "a": {"label": "upstream"},
            "b": {"label": "halfbyte"},
            "loop": {"label": "halfbyte, loop"},
            "torch": {"label": "torch fused AdamW"},
        },
        "rows": rows,
        "limits": LIMITS,
        "states": [],
        "scaling": [],
        "memory": [
            {"row": "linear8bitlt_128", "allowed_mb": 3.0, "a_extra_mb": 8.0, "b_extra_mb": 1.0},
            {"row": "experts4bit_256", "allowed_mb": 18.0, "b_extra_mb": 9.0, "c_extra_mb": 234.0},
        ],
    }
    text = run.report(record)
    line = next(x for x in text.splitlines() if x.startswith("| MLP of 8 NF4 experts"))
    assert [x.strip() for x in line.split("|")][2:] == (
        ["200 ms", "100 ms", "0.500", "≤ 0.500", "met", "–", "–", "–", "400 ms", "0.250", ""]
    )
    assert "halfbyte, loop | halfbyte / loop |" in text
    assert "torch fused AdamW | halfbyte / torch |" in text
    assert "| 8 NF4 experts, 256 tokens | – | 9.00 | 234 | 18.0 | – |" in text
    assert "int8 GEMM 1 GOP/s" in text
