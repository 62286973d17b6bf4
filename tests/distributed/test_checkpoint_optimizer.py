"""Optimizers in checkpoints: parameters without a state, gradients that are there, groups."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import ranks
import torch
from halfbyte import nn as hnn
from halfbyte import optim
from halfbyte.distributed import CheckpointError, load_checkpoint, save_checkpoint
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store wants POSIX")

WIDTH = 256
OPTIMIZERS: dict[str, Any] = {
    "AdamW8bit": lambda p: optim.AdamW8bit(p, lr=1e-2),
    "PagedAdamW": lambda p: optim.PagedAdamW(p, lr=1e-2),
    "Lion8bit": lambda p: optim.Lion8bit(p, lr=1e-2),
    "AdEMAMix8bit": lambda p: optim.AdEMAMix8bit(p, lr=1e-2),
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


class Model(nn.Module):
    """A quantized layer, one that is always used, and one that is used from some step on."""

    def __init__(self, seed: int = 0, storage: torch.dtype = torch.uint8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        options = {"quant_type": "nf4", "quant_storage": storage}
        self.base = hnn.Linear4bit(WIDTH, WIDTH, bias=False, **options)
        self.base.requires_grad_(False)
        self.used = nn.Linear(WIDTH, WIDTH)
        self.late = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, late: bool) -> Tensor:
        x = self.used(self.base(x))
        return self.late(x) if late else x


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """From step 3 on the late layer is used."""
    losses = []
    for step in steps:
        data = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = model(data, late=step >= 3).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def wrapped(engine: str, seed: int = 0) -> nn.Module:
    model = Model(seed, torch.float32 if engine == "fsdp1" else torch.uint8).to("cpu")
    if engine == "fsdp1":
        from torch.distributed import fsdp

        policy = fsdp.wrap.ModuleWrapPolicy({nn.Linear, hnn.Linear4bit})
        return fsdp.FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
        )
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in (model.base, model.used, model.late):
            fully_shard(layer)
        return fully_shard(model)
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return model


def resumed(engine: str, name: str, folder: Any) -> dict[str, Any]:
    """Losses of a run from step 2, and from step 4, beside those after a restart there.

    The restart is into a fresh optimizer, one with gradients, and one that has stepped.
    """
    make = OPTIMIZERS[name]
    model = wrapped(engine)
    optimizer = make(trainable(model))
    train(model, optimizer, range(2))
    save_checkpoint(folder, model, optimizer, step=2)
    expected = {2: train(model, optimizer, range(2, 4))}
    save_checkpoint(folder, model, optimizer, step=4)
    expected[4] = train(model, optimizer, range(4, 6))
    found: dict[str, Any] = {}
    for step in (2, 4):
        path = f"{folder}/step-0000000{step}"
        for before in ("fresh", "gradients", "stepped", "all stepped"):
            other = wrapped(engine, seed=7)
            second = make(trainable(other))
            if before == "gradients":
                other(torch.ones(2, WIDTH), late=False).mean().backward()
                gradients = [p.grad for p in trainable(other)]
            elif before != "fresh":
                train(other, second, range(3) if before == "stepped" else range(3, 5))
            load_checkpoint(path, other, second)
            if before == "gradients":
                assert all(p.grad is g for p, g in zip(trainable(other), gradients, strict=True))
                second.zero_grad()
            if engine != "fsdp1":  # whose ranks have parts of flat parameters, some without any
                states = [p in second.state for p in trainable(other)]
                assert states == ([True, True, False, False] if step == 2 else [True] * 4), before
            losses = train(other, second, range(step, step + 2))
            found[f"{step} {before}"] = losses == expected[step]
    return found


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_parameter_that_got_no_gradient(tmp_path, name):
    found = resumed("none", name, tmp_path)
    assert len(found) == 8
    assert [case for case, same in found.items() if not same] == []


def on_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    found = {}
    engines = {"fsdp2": ("AdamW8bit", "torch"), "fsdp1": ("AdamW8bit",), "ddp": ("AdamW8bit",)}
    for engine, names in engines.items():
        for name in names:
            for case, same in resumed(engine, name, f"{folder}/{engine}-{name}").items():
                found[f"{engine} {name} {case}"] = same
    return found


def test_a_parameter_that_got_no_gradient_on_ranks(tmp_path):
    for result in ranks.run(on_ranks, 2, folder=str(tmp_path)):
        assert len(result) == 32
        assert [case for case, same in result.items() if not same] == []


def test_an_optimizer_that_was_refused_is_as_before(tmp_path):
    """Also its groups, in which schedule-free optimizers count."""
    model = Model().to("cpu")
    optimizer = optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path, model, optimizer, step=2)
    for make in (optim.AdamWScheduleFree, optim.AdamW8bit, optim.Lion8bit):
        other = Model(seed=7).to("cpu")
        second = make(trainable(other), lr=1e-2)
        if hasattr(second, "train"):
            second.train()
        other(torch.ones(2, WIDTH), late=False).mean().backward()
        groups = copy.deepcopy([{**g, "params": None} for g in second.param_groups])
        gradients = [p.grad for p in trainable(other)]
        with pytest.raises(CheckpointError, match=r"optimizer (state|param_groups)"):
            load_checkpoint(tmp_path, other, second)
        assert not second.state
        assert [{**g, "params": None} for g in second.param_groups] == groups
        assert all(p.grad is g for p, g in zip(trainable(other), gradients, strict=True))


def test_groups(tmp_path):
    def grouped(model: Model, *names: list[str]) -> torch.optim.Optimizer:
        rates = [{"params": [], "lr": 10.0 ** -(2 + i)} for i in range(len(names))]
        for group, layers in zip(rates, names, strict=True):
            group["params"] = [p for name in layers for p in getattr(model, name).parameters()]
        return optim.AdamW8bit(rates)

    model = Model().to("cpu")
    optimizer = grouped(model, ["used"], ["late"])
    train(model, optimizer, range(4))
    path = save_checkpoint(tmp_path, model, optimizer, step=4)
    expected = train(model, optimizer, range(4, 6))

    other = Model(seed=7).to("cpu")
    swapped = grouped(other, ["late"], ["used"])
    load_checkpoint(path, other, swapped)
    assert [group["lr"] for group in swapped.param_groups] == [1e-3, 1e-2]
    assert train(other, swapped, range(4, 6)) == expected

    start = f"{path / 'halfbyte.json'}: "
    cases = {
        "late.bias was saved in another group than used.bias; this optimizer has 1 parameter group "
        "instead of 2 and has it in the same group as used.bias": [["used", "late"]],
        "the optimizer that was saved had late.bias, this one not": [["used"]],
    }
    for text, names in cases.items():
        second = grouped(other, *names)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, other, second)
        assert str(caught.value) == start + text
        assert not second.state
    path = save_checkpoint(tmp_path / "one", other, swapped, step=4)
    second = optim.AdamW8bit(grouped(other, ["used"]).param_groups)
    train(other, second, range(2))
    path = save_checkpoint(tmp_path / "less", other, second, step=4)
    with pytest.raises(CheckpointError, match=r"that was saved did not have late\.bias"):
        load_checkpoint(path, other, grouped(other, ["used"], ["late"]))


@pytest.mark.parametrize("saved_with", [False, True])
@pytest.mark.parametrize("made", ["never", "before", "after"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, optim.AdamW8bit])
def test_a_schedule_may_be_made_before_or_after_loading(tmp_path, kind, saved_with, made):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    model = torch.nn.Linear(8, 8)
    optimizer = kind(model.parameters(), lr=0.1)
    steps = schedule(optimizer) if saved_with else None
    for _ in range(3):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        if steps is not None:
            steps.step()
    extra = {"schedule": steps.state_dict()} if steps is not None else None
    save_checkpoint(tmp_path, model, optimizer, step=3, extra=extra)

    other = torch.nn.Linear(8, 8)
    again = kind(other.parameters(), lr=0.1)
    steps = schedule(again) if made == "before" else None
    found = load_checkpoint(tmp_path, other, again)
    assert again.param_groups[0]["lr"] == (0.05 if saved_with else 0.1)
    if made == "after":
        steps = schedule(again)
    assert torch.equal(other.weight, model.weight)
    if steps is not None and saved_with:
        steps.load_state_dict(found.extra["schedule"])
        again.step()
        steps.step()
        assert again.param_groups[0]["lr"] == 0.025
