"""What the tests of the optimizers share: the classes, and small training runs."""

from __future__ import annotations

from typing import Any

import torch
from halfbyte import optim
from halfbyte.optim import _managed, _paged
from reference import DEVICE
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

FAMILIES = ["Adam", "AdamW", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS"]
PAGED = ["Adam", "AdamW", "AdEMAMix", "Lion"]
NAMES = [f"{family}{bits}" for family in FAMILIES for bits in ("", "8bit", "32bit")]
NAMES += [f"Paged{family}{bits}" for family in PAGED for bits in ("", "8bit", "32bit")]
TWO_STATES = ("Adam", "AdEMAMix", "LAMB")


def arguments(name: str) -> dict[str, Any]:
    """The arguments a class cannot do without, and some that matter."""
    out: dict[str, Any] = {"lr": 1e-2}
    if "SGD" in name or "LARS" in name:
        out["momentum"] = 0.9
    if "AdEMAMix" in name:
        out |= {"t_alpha": 5, "t_beta3": 5}
    return out


def make(name: str, params: Any, **more: Any) -> optim.optimizer.Optimizer8bit:
    return getattr(optim, name)(params, **arguments(name) | more)


def states(name: str) -> int:
    return 2 if any(part in name for part in TWO_STATES) else 1


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    """Gradients that depend on the step and the position only."""
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def in_pages(tensor: torch.Tensor) -> bool:
    """Whether a tensor is where its device pages: in a file on the CPU, else in managed memory."""
    on_cpu = tensor.device.type == "cpu"
    return _paged.is_file_backed(tensor) if on_cpu else _managed.is_managed(tensor)


def shared_code(made: optim.optimizer.Optimizer8bit, name: str) -> torch.Tensor:
    """The one tensor of a code for all 8-bit states on the device of the tests."""
    return made.name2qmap[name] if DEVICE.type == "cpu" else made._code_on(name, DEVICE)


def equal(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Calls(TorchDispatchMode):
    """Notes the optimizer ops that are called, and with how many parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2]
        if name.startswith("optimizer_update"):
            self.seen.append((name.removeprefix("optimizer_update_"), len(args[2])))
        return func(*args, **(kwargs or {}))
