"""The decoded form of 8-bit states in checkpoints of sharded parameters."""

from __future__ import annotations

import pytest
import torch
from halfbyte.optim import _coding
from optim_shards import make, numbers, read
from torch import nn


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "RMSprop8bit", "Lion8bit"])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-18, 1e-21])
def test_decoding_and_encoding_gives_the_same_codes(name, scale):
    generator = torch.Generator().manual_seed(3)
    p = nn.Parameter(torch.randn(200_123, generator=generator))
    made = make(name, [p])
    for step in range(6):
        grad = torch.randn(p.shape, generator=generator).pow(3)
        grad *= torch.rand(p.shape, generator=generator) < 0.3 + 0.1 * step
        grad[5000:6000] = 0.0
        grad[7000:7003] = torch.tensor([float("nan"), float("inf"), 0.0])
        p.grad = grad * scale
        made.step()
    state = made.state[p]
    for number in numbers(state):
        codes, absmax, code = (state[f"{key}{number}"] for key in ("state", "absmax", "qmap"))
        lead = codes.dim() - 1
        held = _coding.decode(codes, absmax, code, lead)
        again, scales = _coding.encode(held, code, number == "2", lead)
        assert torch.equal(scales, absmax)
        # A block whose scale has no reciprocal may hold one value by several codes.
        normal = (absmax > 2.0**-125).repeat_interleave(256, -1)[..., : p.numel()]
        assert torch.equal(again[normal], codes[normal])
        assert torch.equal(
            read({**state, f"state{number}": again}, number, p), read(state, number, p)
        )
        if scale == 1.0:
            assert bool(normal.any())
            lowest = (codes == 0) & (code[0] < 0.0)
            assert bool(
                (held[lowest] == -absmax.repeat_interleave(256, -1)[..., : p.numel()][lowest]).all()
            )
            assert bool(lowest.any()) == bool((held < 0.0).any())
