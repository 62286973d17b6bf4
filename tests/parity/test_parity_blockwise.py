"""Blockwise 8-bit quantization and the maps it can use."""

from __future__ import annotations

from typing import Any

import halfbyte.functional as F
import numpy as np
import pytest
import torch
from cases import DTYPES, deal, make
from compare import assert_same_absmax, assert_same_bits
from oracle_client import Batch, Reply
from rule import ABSMAX_FLOOR, Rule

MAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("create_dynamic_map", {}),
    "dynamic-unsigned": ("create_dynamic_map", {"signed": False}),
    "dynamic-e3": ("create_dynamic_map", {"max_exponent_bits": 3}),
    "dynamic-e5-b6": ("create_dynamic_map", {"max_exponent_bits": 5, "total_bits": 6}),
    "linear": ("create_linear_map", {}),
    "linear-unsigned": ("create_linear_map", {"signed": False}),
    "linear-b5": ("create_linear_map", {"total_bits": 5}),
    "linear-b4-no-zero": ("create_linear_map", {"total_bits": 4, "add_zero": False}),
    "normal": ("create_normal_map", {}),
    "normal-even": ("create_normal_map", {"use_extra_value": False}),
    "fp8-e5m2": ("create_fp8_map", {}),
    "fp8-e4m3": ("create_fp8_map", {"exponent_bits": 4, "precision_bits": 3}),
    "fp8-unsigned": (
        "create_fp8_map",
        {"signed": False, "exponent_bits": 5, "precision_bits": 3},
    ),
    "fp4-e2m1": ("create_fp8_map", {"exponent_bits": 2, "precision_bits": 1, "total_bits": 4}),
}
CODES = ("dynamic", "dynamic-unsigned", "linear", "fp8-e4m3")
CASES = deal(CODES, DTYPES, (64, 256, 4096))
Case = tuple[str, str, int, str, str]


def _input(seed: int, case: Case) -> torch.Tensor:
    """The input of one case."""
    _, dtype, block, shape, content = case
    return make(seed, 40_000 + CASES.index(case), block, shape, content, dtype)


def _code(name: str) -> torch.Tensor:
    """A map made by halfbyte."""
    function, arguments = MAPS[name]
    return getattr(F, function)(**arguments)


@pytest.fixture(scope="module")
def maps(upstream: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reply]:
    """Upstream's maps."""
    batch = Batch(tmp_path_factory.mktemp("oracle"))
    for name, (function, arguments) in MAPS.items():
        batch.add(name, "maps", {}, function=function, arguments=arguments)
    return batch.run()


@pytest.fixture(scope="module")
def answers(
    maps: dict[str, Reply], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reply]:
    """Upstream's answers to every case of this file, from one run."""
    batch = Batch(tmp_path_factory.mktemp("oracle"))
    for case in CASES:
        tensors = {"x": _input(seed, case), "code": maps[case[0]]["code"]}
        name = "-".join(map(str, case))
        batch.add(name, "quantize_blockwise", tensors, blocksize=case[2])
    return batch.run()


@pytest.mark.parametrize("name", MAPS)
def test_map(maps: dict[str, Reply], name: str) -> None:
    """The same 256 values, in the same order."""
    assert_same_bits(_code(name), maps[name]["code"], name)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_quantize(answers: dict[str, Reply], maps: dict[str, Reply], seed: int, case: Case) -> None:
    """Exact nearest codes and equal scales."""
    x = _input(seed, case)
    theirs = answers["-".join(map(str, case))]
    code = maps[case[0]]["code"]
    codes, state = F.quantize_blockwise(x, code=code, blocksize=case[2])
    assert_same_absmax(state.absmax, theirs["absmax"], x.numel(), case[2])
    expected = theirs["codes"].numpy().copy().ravel()
    # Upstream divides in a short last block where everybody else multiplies by the reciprocal:
    # there, what division gives may stand for what the rule gives.
    tail = slice(x.numel() - x.numel() % case[2], x.numel())
    if tail.start < tail.stop:
        flat = x.float().numpy().ravel()
        divided = flat[tail] / max(np.abs(flat[tail]).max(), ABSMAX_FLOOR)
        encode = Rule(code.numpy()).encode
        by_division = encode(np.clip(divided, np.float32(-1), np.float32(1)))
        by_rule = encode(Rule.scale(flat[tail], case[2])[1])
        expected[tail] = np.where(expected[tail] == by_division, by_rule, expected[tail])
    assert_same_bits(codes.flatten(), torch.from_numpy(expected), "codes")
    assert (state.blocksize, state.dtype) == (case[2], x.dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_dequantize(
    answers: dict[str, Reply], maps: dict[str, Reply], seed: int, case: Case
) -> None:
    """Upstream's own codes decode to upstream's values."""
    x = _input(seed, case)
    theirs = answers["-".join(map(str, case))]
    state = F.QuantState(
        absmax=theirs["absmax"], code=maps[case[0]]["code"], blocksize=case[2], dtype=x.dtype
    )
    assert_same_bits(F.dequantize_blockwise(theirs["codes"], state), theirs["decoded"], "decoded")


def test_default_code_is_the_signed_dynamic_map(maps: dict[str, Reply]) -> None:
    """No code given: the signed dynamic map and block 4096."""
    _, state = F.quantize_blockwise(torch.linspace(-1, 1, 100))
    assert_same_bits(state.code, maps["dynamic"]["code"], "default code")
    assert state.blocksize == 4096
