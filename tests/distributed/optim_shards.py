"""What the tests of optimizers on shards have in common: a model, gradients, and readings."""

from __future__ import annotations

import functools
from typing import Any

import torch
from halfbyte import functional as F
from halfbyte import optim
from halfbyte.optim import _sharded
from torch import Tensor, nn

SHAPES = {
    "rows": (8, 512),  # 8-bit, rows of whole blocks
    "uneven": (5, 1024),  # so too, but not as many rows on every rank
    "fine": (256, 16),  # parts of whole blocks, though rows are none
    "ragged": (67, 80),  # neither
    "long": (4099,),
    "few": (3, 70),  # 32-bit; of 4 ranks one has nothing
}
ALIGNED = ("rows", "uneven", "fine", "few")
"""Blocks hold the same elements for 1, 2 and 4 ranks."""


def model(names: Any = tuple(SHAPES), dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module of parameters alone."""
    out = nn.Module()
    generator = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        start = torch.randn(shape, generator=generator).to(dtype)
        if name in names:
            out.register_parameter(name, nn.Parameter(start))
    return out


@functools.cache
def mesh(world: int) -> Any:
    """The first ranks. All ranks must call for it, in the same order."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", list(range(world)))


def sharded(world: int, *arguments: Any) -> nn.Module:
    """The same under FSDP2."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model(*arguments), mesh=mesh(world))


def make(name: str, params: Any, **more: Any) -> Any:
    """An optimizer by its class's name, ready to train."""
    more = {"lr": 1e-2, **more}
    if "SGD" in name or "LARS" in name:
        more["momentum"] = 0.9
    if "AdEMAMix" in name:
        more |= {"t_alpha": 5, "t_beta3": 5}
    made = getattr(optim, name)(params, **more)
    if "ScheduleFree" in name:
        made.train()
    return made


def gradient(name: str, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of magnitudes that differ, so that scales do from block to block."""
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    shape = SHAPES[name]
    sizes = torch.rand(shape, generator=generator).square()
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def train(net: nn.Module, optimizer: Any, steps: Any) -> None:
    """Steps with gradients that every rank computes whole, so that no reduction rounds them."""
    for step in steps:
        for name, p in net.named_parameters():
            grad = gradient(name, step, p.dtype)
            if _sharded.is_dtensor(p):
                grad = _sharded.placed(p, _sharded.part_of(p, grad))
            p.grad = grad
        optimizer.step()


def whole(p: Any) -> Tensor:
    """All of a parameter."""
    return (p.full_tensor() if _sharded.is_dtensor(p) else p).detach()


def assert_same(a: nn.Module, b: nn.Module, names: Any, what: str) -> None:
    """Whether parameters are equal to the bit."""
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    for name in names:
        x, y = whole(mine[name]), whole(other[name])
        assert torch.equal(x, y), f"{what}: {name}: off by {(x - y).abs().max()}"


def read(state: dict[str, Any], number: str, p: Any) -> Tensor:
    """A state of this rank's part as an update reads it: float32."""
    held: Tensor = state[f"state{number}"]
    if held.dtype is not torch.uint8:
        return held
    code, scales = state[f"qmap{number}"], state[f"absmax{number}"]
    stacked = held.dim() > p.dim()
    parts = [
        F.dequantize_blockwise(q.contiguous(), absmax=s.contiguous(), code=code, blocksize=256)
        for q, s in (zip(held, scales, strict=True) if stacked else [(held, scales)])
    ]
    return torch.stack(parts) if stacked else parts[0]


def numbers(state: dict[str, Any]) -> list[str]:
    """Which states there are."""
    return [number for number in "12" if f"state{number}" in state]


def half_gaps(x: Tensor, state: dict[str, Any], number: str, stacked: bool) -> Tensor:
    """By how much encoding may change each of ``x`` (this rank's part): half the distance of the
    codes around it at the scale of its block, and a second moment up to the first code above 0."""
    code, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
    if stacked:
        halves = [
            half_gaps(a, {**state, f"absmax{number}": s}, number, False)
            for a, s in zip(x, absmax, strict=True)
        ]
        return torch.stack(halves)
    scale = absmax.repeat_interleave(256)[: x.numel()].view(x.shape)
    unit = (x / scale.clamp(min=1e-37)).clamp(-1.0, 1.0).contiguous()
    above = torch.searchsorted(code, unit).clamp(1, 255)
    gap = (code[above] - code[above - 1]) / 2
    gap[unit < code[0]] = 1.0 + code[0]  # the signed map has no -1
    if number == "2":
        gap[unit < code[1]] = code[1]
    return gap * scale * (1 + 1e-5)


def copy_into(net: nn.Module, source: nn.Module) -> None:
    """Values of the parameters of one, sharded or not, into another."""
    with torch.no_grad():
        for p, q in zip(net.parameters(), source.parameters(), strict=True):
            value = whole(q)
            _sharded.local(p).copy_(_sharded.part_of(p, value) if _sharded.is_dtensor(p) else value)


def raw(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def assert_equal_states(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Whether two states hold the same, to the bit."""
    assert set(a) == set(b)
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), f"{key}: {differences(value, b[key])}"
        else:
            assert value == b[key], key


def differences(a: Tensor, b: Tensor) -> str:
    """The first places where two tensors differ."""
    if a.shape != b.shape:
        return f"{list(a.shape)} and {list(b.shape)}"
    at = (a != b).flatten().nonzero().flatten()
    shown = [(int(i), a.flatten()[i].item(), b.flatten()[i].item()) for i in at[:5]]
    return f"{len(at)} of {a.numel()}: {shown}"
