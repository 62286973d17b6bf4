"""DistributedDataParallel over quantized layers, on real ranks.

DDP copies rank 0's parameters to the others, integer ones as well, and averages gradients. It is
compared with one process that averages the gradients of the same batches.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import ranks
import torch
import torch._dynamo
import torch.distributed as dist
from halfbyte.nn import Linear4bit, Linear8bitLt
from halfbyte.optim import AdamW8bit, PagedAdamW8bit
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WIDTH = 96
WORLDS = (2, 4)


class Lora(nn.Module):
    """An adapter of 6144 trainable values: enough for 8-bit states."""

    def __init__(self, base: Any, rank: int = 32) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(WIDTH, rank, bias=False)
        self.up = nn.Linear(rank, WIDTH, bias=False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.base(x) + self.up(self.down(x))


def build(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    make = {
        "nf4": partial(Linear4bit, quant_type="nf4"),
        "nf4 in bfloat16": partial(Linear4bit, quant_type="nf4", quant_storage=torch.bfloat16),
        "fp4 plain": partial(Linear4bit, compress_statistics=False),
        "int8": partial(Linear8bitLt, has_fp16_weights=False, threshold=3.0),
        "int8 trained": Linear8bitLt,
    }[kind]
    return nn.Sequential(*(Lora(make(WIDTH, WIDTH, bias=False)) for _ in range(3))).to("cpu")


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def mean_gradients(model: nn.Module, world: int, step: int, parts: int) -> None:
    """What DDP should leave in ``.grad``, in one process."""
    total: dict[int, Tensor] = {}
    for rank in range(world):
        model.zero_grad()
        for part in range(parts):
            model(batch(rank, parts * step + part)).square().mean().backward()
        for index, p in enumerate(trainable(model)):
            if p.grad is not None:
                share = p.grad / world
                total[index] = share if index not in total else total[index] + share
    for index, p in enumerate(trainable(model)):
        p.grad = total.get(index)


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def trains(
    kind: str, optimizer: Any = AdamW8bit, parts: int = 1, unused: bool = False, **options: Any
) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = build(kind)
    if unused:
        whole[1] = nn.Identity()
        whole.register_module("unused", Lora(copy.deepcopy(whole[0].base)))
        whole.forward = partial(_without_last, whole)  # type: ignore[method-assign]
    model = copy.deepcopy(whole)
    if unused:
        model.forward = partial(_without_last, model)  # type: ignore[method-assign]
    start = {name: raw(p).clone() for name, p in whole.named_parameters()}
    ddp = DistributedDataParallel(model, find_unused_parameters=unused, **options)
    ours, theirs = (optimizer(trainable(m), lr=1e-2) for m in (ddp, whole))
    for step in range(3):
        mean_gradients(whole, world, step, parts)
        ddp.zero_grad()
        for part in range(parts):
            x = batch(rank, parts * step + part)
            if part + 1 < parts:
                with ddp.no_sync():
                    ddp(x).square().mean().backward()
            else:
                ddp(x).square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            if q.grad is None:
                assert p.grad is None, name
            elif world == 2:
                assert torch.equal(p.grad, q.grad), name
            else:  # gloo adds in another order
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)
                p.grad.copy_(q.grad)
        ours.step()
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(raw(p), raw(q[1])), name
        if not p.requires_grad:
            assert torch.equal(raw(p), start[name]), name
    for (name, tensor), want in zip(
        model.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        if "seen" not in name:  # counted once more for each rank in the whole model
            assert torch.equal(raw(tensor), raw(want)), name


def _without_last(model: nn.Module, x: Tensor) -> Tensor:
    return model[2](model[0](x))  # type: ignore[index]


def copies(kind: str) -> None:
    """DDP copies the codes and buffers of rank 0. Scales are neither: each rank must have them."""
    rank = dist.get_rank()
    first, model = build(kind), build(kind)
    for layer in model:
        with torch.no_grad():
            layer.base.weight.data.view(torch.uint8).bitwise_xor_(rank)
            layer.seen.fill_(rank)
    ddp = DistributedDataParallel(model)
    for (name, found), want in zip(ddp.module.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(raw(found), raw(want)), name
    assert all(float(layer.seen) == 0 for layer in model)
    x = batch(0, 0)
    assert torch.equal(ddp(x), first(x))


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for kind in ("nf4", "nf4 in bfloat16", "fp4 plain", "int8", "int8 trained"):
        found[kind] = partial(trains, kind)
    for kind in ("nf4", "int8"):
        found[f"{kind}, accumulating"] = partial(trains, kind, parts=3)
        found[f"{kind}, unused"] = partial(trains, kind, unused=True)
        found[f"{kind}, static graph"] = partial(trains, kind, static_graph=True)
        found[f"{kind}, views"] = partial(trains, kind, gradient_as_bucket_view=True)
        found[f"{kind}, paged"] = partial(trains, kind, PagedAdamW8bit)
        found[f"{kind}, copies"] = partial(copies, kind)
    found["nf4 in bfloat16, copies"] = partial(copies, "nf4 in bfloat16")
    return found


def work(rank: int, world: int) -> dict[str, str]:
    warnings.simplefilter("ignore")
    results = {}
    for name, run in cases().items():
        try:
            run()
            results[name] = "ok"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, str]]]:
    return {world: ranks.run(work, world) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", cases())
def test_case(results, world, name):
    assert [rank[name] for rank in results[world]] == ["ok"] * world
