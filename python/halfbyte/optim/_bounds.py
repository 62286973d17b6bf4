"""Bounds by norms (LAMB, LARS, ``max_unorm``) where this process has parts of parameters.

The native op takes both norms from the tensors it is given. For parts they are taken beforehand,
from a step on copies, and added over the processes; the step itself is then one without a bound,
with another learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _sharded

Trial = Callable[[Any, int], Tensor]
"""Takes a batch and a place in it; the norm of the update, and changes nothing."""


def set_ratios(batches: Iterable[tuple[float, Any]], members: list[Tensor], trial: Trial) -> None:
    """Sets ``ratios`` and every ``unorm_vec`` of batches that hold parts of parameters.

    Args:
        batches: with the ``max_unorm`` of each.
        members: the sharded parameters that may have a bound, the same ones in the same order on
            all processes, those without a gradient included.
        trial: gives norms of updates.
    """
    squares: dict[int, Tensor] = {}
    bounded = []
    for max_unorm, batch in batches:
        if any(_sharded.is_sharded(p) for p in batch.wholes):
            bounded.append((max_unorm, batch))
            for index, p in enumerate(batch.wholes):
                norms = [float(trial(batch, index)), _norm(batch, index)]
                squares[id(p)] = torch.tensor(norms, dtype=torch.float64).square_()
    together: dict[Any, list[Tensor]] = {}
    for p in members:
        together.setdefault(_sharded.companions(p), []).append(p)
    for parts in together.values():
        nothing = torch.zeros(2, dtype=torch.float64)
        mine = torch.stack([squares.get(id(p), nothing) for p in parts])
        total = _sharded.summed(parts[0], mine.to(_sharded.local(parts[0]).device))
        squares.update(zip(map(id, parts), total.cpu(), strict=True))
    for max_unorm, batch in bounded:
        for p, part, state in zip(batch.wholes, batch.params, batch.states, strict=True):
            update, whole = map(math.sqrt, squares[id(p)].tolist())
            bound = max_unorm * whole
            batch.ratios.append(bound / update if update > bound else 1.0)
            update_norm(part, state).fill_(update)


def update_norm(p: Tensor, state: dict[str, Any]) -> Tensor:
    """``unorm_vec`` of a state of ``p``, made if a loaded one has none: float32 ``[1]``."""
    if "unorm_vec" not in state:
        state["unorm_vec"] = torch.zeros((1,), dtype=torch.float32, device=p.device)
    norm: Tensor = state["unorm_vec"]
    return norm


def _norm(batch: Any, index: int) -> float:
    """Of the part of a parameter, with what Kahan summation has cut off of it."""
    part, rest = batch.params[index].detach(), batch.states[index].get("compensation")
    part = part if rest is None else part.float() + rest
    return float(torch.linalg.vector_norm(part, dtype=torch.float64))


def scaled(lr: float, weight_decay: float, ratio: float, decoupled: bool) -> tuple[float, float]:
    """The learning rate and weight decay of a step whose update is multiplied by ``ratio``."""
    if decoupled and ratio != 1.0:
        # Only a parameter of norm 0 has ratio 0: there is nothing to decay.
        weight_decay = weight_decay / ratio if ratio > 0.0 else 0.0
    return lr * ratio, weight_decay
