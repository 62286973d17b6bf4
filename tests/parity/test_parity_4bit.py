"""quantize_4bit and dequantize_4bit: the same bytes, scales and values as upstream."""

from __future__ import annotations

import halfbyte.functional as F
import numpy as np
import pytest
import torch
from cases import BLOCKS, DTYPES, QUANT_TYPES, deal, make
from compare import (
    assert_follows_rule,
    assert_same_absmax,
    assert_same_bits,
    assert_same_codes,
    assert_same_values,
    bits,
)
from oracle_client import Batch, Reply

STORAGES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


ENCODE = deal(QUANT_TYPES, DTYPES, BLOCKS)
DECODE = [(q, d, b) for q in QUANT_TYPES for d in DTYPES for b in BLOCKS]
STORED = [(q, s) for q in QUANT_TYPES for s in STORAGES]


def _id(value: object) -> str:
    """A readable test id."""
    return f"b{value}" if isinstance(value, int) else str(value)


def _name(kind: str, *parts: object) -> str:
    """The name of a job."""
    return f"{kind}-" + "-".join(map(str, parts))


def _input(seed: int, case: tuple[str, str, int, str, str]) -> torch.Tensor:
    """The input of one encode case."""
    _, dtype, block, shape, content = case
    return make(seed, ENCODE.index(case), block, shape, content, dtype)


def _random_packed(seed: int, case: tuple[str, str, int]) -> dict[str, torch.Tensor]:
    """Random bytes and scales, for shapes whose rows straddle blocks."""
    rng = np.random.default_rng([seed, 10_000 + DECODE.index(case)])
    block = case[2]
    shape = (int(rng.integers(1, 6)), block + 2 * int(rng.integers(1, block)))
    count = shape[0] * shape[1]
    packed = rng.integers(0, 256, (count + 1) // 2, dtype=np.uint8).reshape(-1, 1)
    absmax = np.abs(rng.standard_normal(-(-count // block))).astype(np.float32)
    return {
        "packed": torch.from_numpy(packed),
        "absmax": torch.from_numpy(absmax),
        "shape": torch.tensor(shape),
    }


def _stored_input(seed: int, case: tuple[str, str]) -> torch.Tensor:
    """A weight whose packed bytes divide by every item size."""
    rng = np.random.default_rng([seed, 20_000 + STORED.index(case)])
    return torch.from_numpy(rng.standard_normal((24, 96)).astype(np.float32)).bfloat16()


@pytest.fixture(scope="module")
def answers(
    upstream: None, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reply]:
    """Upstream's answers to every case of this file, from one run."""
    batch = Batch(tmp_path_factory.mktemp("oracle"))
    for quant_type in QUANT_TYPES:
        code = {"function": "get_4bit_type", "arguments": {"typename": quant_type, "device": "cpu"}}
        batch.add(f"code-{quant_type}", "maps", {}, **code)
    for case in ENCODE:
        batch.add(
            _name("encode", *case),
            "quantize_4bit",
            {"x": _input(seed, case)},
            quant_type=case[0],
            blocksize=case[2],
        )
    for decode in DECODE:
        tensors = _random_packed(seed, decode)
        shape = tensors.pop("shape").tolist()
        dtype = str(DTYPES[decode[1]]).removeprefix("torch.")
        batch.add(
            _name("decode", *decode),
            "dequantize_4bit",
            tensors,
            quant_type=decode[0],
            blocksize=decode[2],
            dtype=dtype,
            shape=shape,
        )
    for stored in STORED:
        batch.add(
            _name("stored", *stored),
            "quantize_4bit",
            {"x": _stored_input(seed, stored)},
            quant_type=stored[0],
            blocksize=64,
            quant_storage=stored[1],
        )
    return batch.run()


def test_there_are_at_least_200_cases() -> None:
    """The promise of the project."""
    assert len(ENCODE) >= 200


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_code(answers: dict[str, Reply], quant_type: str) -> None:
    """The 16 values; upstream's FP4 index 8 is +0.0, ours -0.0."""
    mine = F.get_4bit_type(quant_type, device="cpu")
    compare = assert_same_bits if quant_type == "nf4" else assert_same_values
    compare(mine, answers[f"code-{quant_type}"]["code"], "code")


@pytest.mark.parametrize("case", ENCODE, ids=lambda c: "-".join(map(_id, c)))
def test_quantize(
    answers: dict[str, Reply], seed: int, case: tuple[str, str, int, str, str]
) -> None:
    """Packed bytes and scales, and both against the rule."""
    quant_type, _, block, _, _ = case
    x = _input(seed, case)
    theirs = answers[_name("encode", *case)]
    packed, state = F.quantize_4bit(x, quant_type=quant_type, blocksize=block)
    assert_same_absmax(state.absmax, theirs["absmax"], x.numel(), block)
    code = answers[f"code-{quant_type}"]["code"]
    assert_same_codes(packed, theirs["packed"], x, block, quant_type, code)
    assert_follows_rule(packed, x, block, quant_type, code)
    assert tuple(state.shape) == tuple(x.shape)
    assert state.dtype == x.dtype
    assert (state.blocksize, state.quant_type) == (block, quant_type)


@pytest.mark.parametrize("case", ENCODE, ids=lambda c: "-".join(map(_id, c)))
def test_dequantize(
    answers: dict[str, Reply], seed: int, case: tuple[str, str, int, str, str]
) -> None:
    """Upstream's own bytes decode to upstream's values, in the quantized shape."""
    quant_type, _, block, _, _ = case
    x = _input(seed, case)
    theirs = answers[_name("encode", *case)]
    state = F.QuantState(
        absmax=theirs["absmax"],
        shape=x.shape,
        code=theirs["code"],
        blocksize=block,
        quant_type=quant_type,
        dtype=x.dtype,
    )
    decoded = F.dequantize_4bit(theirs["packed"], state)
    compare = assert_same_bits if quant_type == "nf4" else assert_same_values
    compare(decoded, theirs["decoded"].reshape(x.shape), "decoded")


@pytest.mark.parametrize("case", DECODE, ids=lambda c: "-".join(map(_id, c)))
def test_dequantize_any_bytes(
    answers: dict[str, Reply], seed: int, case: tuple[str, str, int]
) -> None:
    """Every byte decodes alike in each dtype, whichever blocks straddle rows."""
    quant_type, dtype, block = case
    tensors = _random_packed(seed, case)
    state = F.QuantState(
        absmax=tensors["absmax"],
        shape=torch.Size(tensors["shape"].tolist()),
        code=F.get_4bit_type(quant_type, device="cpu"),
        blocksize=block,
        quant_type=quant_type,
        dtype=DTYPES[dtype],
    )
    decoded = F.dequantize_4bit(tensors["packed"], state)
    compare = assert_same_bits if quant_type == "nf4" else assert_same_values
    compare(decoded, answers[_name("decode", *case)]["decoded"], "decoded")


@pytest.mark.parametrize("case", STORED, ids=lambda c: "-".join(c))
def test_quant_storage(answers: dict[str, Reply], seed: int, case: tuple[str, str]) -> None:
    """The same bytes under another dtype."""
    quant_type, storage = case
    x = _stored_input(seed, case)
    dtype = getattr(torch, storage)
    packed, state = F.quantize_4bit(x, quant_type=quant_type, blocksize=64, quant_storage=dtype)
    theirs = answers[_name("stored", *case)]
    assert packed.dtype == theirs["packed"].dtype
    assert packed.shape == theirs["packed"].shape
    plain, _ = F.quantize_4bit(x, quant_type=quant_type, blocksize=64)
    assert torch.equal(bits(packed).view(torch.uint8).ravel(), plain.ravel())
    if quant_type == "nf4":
        assert_same_bits(packed, theirs["packed"], "packed")
    assert_same_values(F.dequantize_4bit(packed, state), F.dequantize_4bit(plain, state), "decoded")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bytes_for_any_thread_count(threads: int) -> None:
    """Threads change the time and nothing else."""
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((300, 1000)).astype(np.float32))
    before = torch.get_num_threads()
    expected = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    try:
        torch.set_num_threads(threads)
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(packed, expected[0], "packed")
    assert_same_bits(state.absmax, expected[1].absmax, "absmax")
    assert_same_bits(state.offset, expected[1].offset, "offset")
