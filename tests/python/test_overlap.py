"""Outputs that lie over inputs or over each other are refused before a kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from halfbyte import functional as F
from halfbyte import matmul_4bit


def _bias_under_out() -> None:
    packed, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    memory = torch.zeros(24)
    matmul_4bit(torch.randn(3, 64), packed, state, bias=memory[:8], out=memory.view(3, 8))


def _scales_under_out() -> None:
    packed, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    memory = torch.zeros(24)
    memory[:8] = state.absmax
    state.absmax = memory[:8]
    matmul_4bit(torch.randn(3, 64), packed, state, out=memory.view(3, 8))


def _code_under_out() -> None:
    q, state = F.quantize_blockwise(torch.randn(64, 64))
    memory = torch.zeros(4096)
    memory[:256] = state.code
    F.dequantize_blockwise(q, absmax=state.absmax, code=memory[:256], out=memory.view(64, 64))


def _absmax_under_packed() -> None:
    memory = torch.zeros(256, dtype=torch.uint8)
    absmax = memory[:32].view(torch.float32)
    F.quantize_4bit(torch.randn(8, 64), out=memory.view(256, 1), absmax=absmax)


def _absmax_under_codes() -> None:
    memory = torch.zeros(512, dtype=torch.uint8)
    absmax = memory[:4].view(torch.float32)
    F.quantize_blockwise(torch.randn(8, 64), out=memory.view(8, 64), absmax=absmax)


@pytest.mark.parametrize(
    "call",
    [
        _bias_under_out,
        _scales_under_out,
        _code_under_out,
        _absmax_under_packed,
        _absmax_under_codes,
    ],
)
def test_overlap_is_refused(call: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match="must not overlap"):
        call()


def test_integer_scales_need_double_quantization() -> None:
    packed, state = F.quantize_4bit(torch.randn(8, 64), compress_statistics=True)
    state.nested = False
    with pytest.raises((TypeError, ValueError), match="absmax must be float32"):
        F.dequantize_4bit(packed, state)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's memory maps")
def test_an_empty_output_gives_no_advice_about_other_memory() -> None:
    def advised() -> int:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
        return sum(" hg" in line for line in lines if line.startswith("VmFlags"))

    packed, state = F.quantize_4bit(torch.randn(64, 64))
    before = advised()
    out = matmul_4bit(torch.empty(0, 2**46, 64), packed, state)
    assert out.shape == (0, 2**46, 64)
    assert advised() <= before + 1
