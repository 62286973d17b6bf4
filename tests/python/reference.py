"""The definitions of numerics.md, written again in plain PyTorch: what the tests compare to."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = torch.empty(0).device
"""Where the tests compute; see tests/conftest.py."""


def weight_rounding(dtype: torch.dtype) -> float:
    """How far a product may be off for each unit of the terms' magnitudes: a GPU's tensor cores
    take the decoded weight in the dtype of the input, the CPU takes it as float32."""
    if DEVICE.type == "cpu":
        return 0.0
    return {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]


# fmt: off
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])
_FP4_MAGNITUDES = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12
# fmt: on
FP4 = torch.cat((_FP4_MAGNITUDES, -_FP4_MAGNITUDES))
CODES = {"nf4": NF4, "fp4": FP4}

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
TYPES = ["nf4", "fp4"]
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float64]
SHAPES = [
    (64, 96),  # columns that do not divide by 64
    (64, 64),
    (5, 5),
    (3, 5, 7),
    (1, 7),
    (7,),
    (1,),
    (64,),
    (1000,),
    (129, 33),
    (2, 4097),
    (0,),
    (0, 64),
    (64, 0),
    (),
]


def blocked(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The values scaled to [-1, 1], flat, and the scales."""
    flat = x.detach().float().reshape(-1)
    padded = torch.zeros(-(-flat.numel() // blocksize) * blocksize)
    padded[: flat.numel()] = flat
    rows = padded.reshape(-1, blocksize)
    absmax = rows.abs().amax(1) if rows.numel() else torch.zeros(0)
    scaled = torch.where(absmax[:, None] == 0, torch.zeros(()), rows * (1 / absmax)[:, None])
    return scaled.reshape(-1)[: flat.numel()].clamp(-1, 1), absmax


def nearest(y: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest value of an ascending code; a midpoint goes to the lower one."""
    # searchsorted(right=False) counts the borders strictly below y.
    return torch.searchsorted((code[:-1] + code[1:]) * 0.5, y.contiguous()).to(torch.uint8)


def encode_4bit(x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """The packed bytes, flat, without storage padding, and the scales."""
    y, absmax = blocked(x, blocksize)
    if quant_type == "nf4":
        q, zero = nearest(y, NF4), 7
    else:
        ascending, order = _FP4_MAGNITUDES.sort()
        q, zero = order[nearest(y.abs(), ascending).long()] + 8 * (y < 0), 0
    if q.numel() % 2:
        q = torch.cat((q, torch.tensor([zero])))
    q = q.to(torch.uint8).reshape(-1, 2)
    return q[:, 0] * 16 + q[:, 1], absmax


def decode_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, code: Tensor, shape: tuple[int, ...], dtype
) -> Tensor:
    n = torch.Size(shape).numel()
    codes = torch.stack((packed >> 4, packed & 15), 1).reshape(-1)[:n].long()
    scales = absmax.repeat_interleave(blocksize)[:n]
    return (code[codes] * scales).to(dtype).reshape(shape)


def encode_8bit(x: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
    y, absmax = blocked(x, blocksize)
    return nearest(y, code).reshape(x.shape), absmax


def decode_8bit(q: Tensor, absmax: Tensor, blocksize: int, code: Tensor, dtype) -> Tensor:
    scales = absmax.repeat_interleave(blocksize)[: q.numel()].reshape(q.shape)
    return (code[q.long()] * scales).to(dtype)


def dynamic_code() -> Tensor:
    """The signed dynamic map from its definition."""
    values = [0.0, 1.0]
    for i in range(7):
        border = torch.linspace(0.1, 1, 2**i + 1)
        means = (border[:-1] + border[1:]) / 2 * 10.0 ** (i - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def samples(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)
