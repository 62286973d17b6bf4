"""Random inputs of every shape, dtype and habit that quantization meets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")


def _rows_of_blocks(rng: np.random.Generator, block: int) -> tuple[int, ...]:
    """Columns that the block size divides."""
    return int(rng.integers(1, 5)), block * int(rng.integers(1, 4))


def _ragged(rng: np.random.Generator, block: int) -> tuple[int, ...]:
    """A matrix whose blocks straddle rows: 64 x 96 with block 64 and its relatives."""
    columns = block + block // 2 + int(rng.integers(0, 2))
    return int(rng.integers(2, 7)), columns


def _odd_vector(rng: np.random.Generator, block: int) -> tuple[int, ...]:
    """A 1-D tensor of odd size over several blocks."""
    return (2 * int(rng.integers(block // 2, 2 * block)) + 1,)


def _cube(rng: np.random.Generator, block: int) -> tuple[int, ...]:
    """Three dimensions that nothing divides."""
    del block
    return tuple(int(n) for n in rng.choice([3, 5, 7, 11, 13, 17, 19], 3))


def _short(rng: np.random.Generator, block: int) -> tuple[int, ...]:
    """Fewer elements than one block."""
    return (int(rng.integers(1, block)),)


SHAPES: dict[str, Callable[[np.random.Generator, int], tuple[int, ...]]] = {
    "aligned": _rows_of_blocks,
    "ragged": _ragged,
    "odd": _odd_vector,
    "cube": _cube,
    "short": _short,
}


def _normal(rng: np.random.Generator, n: int) -> np.ndarray:
    """What weights look like."""
    return rng.standard_normal(n) * 0.02


def _heavy(rng: np.random.Generator, n: int) -> np.ndarray:
    """Outliers that leave most of a block near zero."""
    return np.clip(rng.standard_t(2, n), -3e4, 3e4)


def _grid(rng: np.random.Generator, n: int) -> np.ndarray:
    """Multiples of 1/24: values that land on FP4's midpoints."""
    return rng.integers(-24, 25, n) / 24.0


def _zeros(rng: np.random.Generator, n: int) -> np.ndarray:
    """Mostly zeros of both signs, whole blocks of them included."""
    x = np.where(rng.random(n) < 0.5, 0.0, -0.0)
    x[: n // 3] = rng.standard_normal(n // 3) * (rng.random(n // 3) < 0.1)
    return x


def _wide(rng: np.random.Generator, n: int) -> np.ndarray:
    """Magnitudes over nine decades, all within float16."""
    return rng.choice([-1.0, 1.0], n) * 10.0 ** rng.uniform(-6, 3, n)


CONTENTS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": _normal,
    "heavy": _heavy,
    "grid": _grid,
    "zeros": _zeros,
    "wide": _wide,
}


def deal(*groups: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every combination of the groups with every shape, the contents dealt round in turn."""
    out = []
    for turn, combination in enumerate(product(*groups)):
        for place, shape in enumerate(SHAPES):
            content = list(CONTENTS)[(turn + place) % len(CONTENTS)]
            out.append((*combination, shape, content))
    return out


def make(seed: int, index: int, block: int, shape: str, content: str, dtype: str) -> torch.Tensor:
    """The input of one case, the same for the same seed and index."""
    rng = np.random.default_rng([seed, index])
    size = SHAPES[shape](rng, block)
    values = CONTENTS[content](rng, int(np.prod(size))).astype(np.float32)
    return torch.from_numpy(values).reshape(size).to(DTYPES[dtype])
