"""Double quantization: the offset may differ in its last bit, and nothing else may."""

from __future__ import annotations

import halfbyte.functional as F
import numpy as np
import pytest
import torch
from cases import DTYPES, QUANT_TYPES, deal, make
from compare import assert_same_bits, assert_same_codes, assert_same_values
from oracle_client import Batch, Reply
from rule import ABSMAX_FLOOR, NESTED_BLOCK, Rule

CASES = deal(QUANT_TYPES, DTYPES, (32, 64, 128, 1024))
Case = tuple[str, str, int, str, str]


def _input(seed: int, case: Case) -> torch.Tensor:
    """The input of one case."""
    _, dtype, block, shape, content = case
    return make(seed, 30_000 + CASES.index(case), block, shape, content, dtype)


@pytest.fixture(scope="module")
def answers(
    upstream: None, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reply]:
    """Upstream's answers to every case of this file, from one run."""
    batch = Batch(tmp_path_factory.mktemp("oracle"))
    for case in CASES:
        batch.add(
            "-".join(map(str, case)),
            "quantize_4bit",
            {"x": _input(seed, case)},
            quant_type=case[0],
            blocksize=case[2],
            nested=True,
        )
    return batch.run()


def _rule_scales(
    plain: torch.Tensor, offset: torch.Tensor, code: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """What the rule makes of the scales for a given offset: codes and their absmax."""
    nested, scaled = Rule.scale(plain.numpy() - offset.numpy(), NESTED_BLOCK)
    return Rule(code.numpy()).encode(scaled), nested


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_quantize_nested(answers: dict[str, Reply], seed: int, case: Case) -> None:
    """Codes of the scales, their absmax and map; with an offset one bit off, by the rule."""
    quant_type, _, block, _, _ = case
    x = _input(seed, case)
    theirs = answers["-".join(map(str, case))]
    packed, state = F.quantize_4bit(
        x, quant_type=quant_type, blocksize=block, compress_statistics=True
    )
    plain, plain_state = F.quantize_4bit(x, quant_type=quant_type, blocksize=block)
    assert_same_bits(packed, plain, "packed bytes with and without double quantization")
    assert_same_codes(packed, theirs["packed"], x, block, quant_type, theirs["code"])
    assert state.nested
    assert state.absmax.dtype == torch.uint8
    assert (state.state2.blocksize, state.state2.dtype) == (NESTED_BLOCK, torch.float32)
    assert_same_bits(state.state2.code, theirs["nested_code"], "nested code")

    mean = np.float32(plain_state.absmax.double().mean().item())
    offset = np.float32(state.offset.item())
    assert abs(float(offset) - float(mean)) <= float(np.spacing(abs(mean))), "offset"
    codes, nested = _rule_scales(plain_state.absmax, state.offset, state.state2.code)
    assert np.array_equal(state.absmax.numpy(), codes), "codes of the scales follow the rule"
    assert np.array_equal(state.state2.absmax.numpy(), nested), "absmax of the scales"
    if float(offset) == theirs["offset"].item():
        assert_same_bits(state.absmax, theirs["absmax"], "codes of the scales")
    else:
        # The last bit, or (all scales zero but a short last one) upstream's floor under that scale.
        distance = abs(float(offset) - theirs["offset"].item())
        allowed = max(2 * float(np.spacing(abs(offset))), float(ABSMAX_FLOOR))
        assert distance <= allowed, "offset against upstream"
    scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    expected = F.dequantize_4bit(
        packed,
        F.QuantState(scales, x.shape, state.code, block, quant_type, x.dtype),
    )
    assert_same_bits(F.dequantize_4bit(packed, state), expected, "decoded through the scales")


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_dequantize_nested(answers: dict[str, Reply], seed: int, case: Case) -> None:
    """Upstream's own nested state decodes to upstream's values."""
    quant_type, _, block, _, _ = case
    x = _input(seed, case)
    theirs = answers["-".join(map(str, case))]
    state = F.QuantState(
        absmax=theirs["absmax"],
        shape=x.shape,
        code=theirs["code"],
        blocksize=block,
        quant_type=quant_type,
        dtype=x.dtype,
        offset=theirs["offset"],
        state2=F.QuantState(
            absmax=theirs["nested_absmax"],
            code=theirs["nested_code"],
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        ),
    )
    decoded = F.dequantize_4bit(theirs["packed"], state)
    compare = assert_same_bits if quant_type == "nf4" else assert_same_values
    compare(decoded, theirs["decoded"].reshape(x.shape), "decoded")
