"""Quantized layers under FSDP2: real processes, gloo."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import pytest
import ranks
import torch
from halfbyte.nn import Embedding4bit, Experts4bit, Linear4bit, Linear8bitLt
from torch import nn

STORAGES = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}


class Lora(nn.Module):
    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def build(kind: str, storage: torch.dtype, nested: bool) -> nn.Sequential:
    """Layers of sizes that no number of ranks divides, and of sizes that 2 and 4 do."""
    torch.manual_seed(0)
    sizes = [(64, 192), (192, 7), (7, 64)]
    if kind == "int8":
        layers = [
            Linear8bitLt(i, o, bias=False, has_fp16_weights=False, threshold=6.0) for i, o in sizes
        ]
    else:
        config = {"quant_type": kind, "quant_storage": storage, "compress_statistics": nested}
        layers = [Linear4bit(i, o, bias=False, **config) for i, o in sizes]
    return nn.Sequential(*(Lora(layer) for layer in layers)).to("cpu")


def loss(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    value = model(x).float().square().mean()
    value.backward()
    return value.detach()


def same_bytes(found: torch.Tensor, want: torch.Tensor) -> bool:
    found = found.full_tensor() if hasattr(found, "full_tensor") else found
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, want))
    return found.dtype == want.dtype and found.shape == want.shape and torch.equal(a, b)


def shard(model: nn.Module, **options: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model:
        fully_shard(block, **options)
    fully_shard(model, **options)


def check_case(kind: str, storage: str, nested: bool, mixed: torch.dtype | None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    name = f"{kind} {storage} {nested} {mixed}"
    model = build(kind, STORAGES[storage], nested)
    plain = copy.deepcopy(model)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=mixed))
    if mixed is not None:
        for block in plain:
            block.down.to(mixed), block.up.to(mixed)
    want = loss(plain, mixed or torch.float32)
    for _ in range(2):  # the second pass meets weights that were sharded in between
        model.zero_grad()
        assert torch.equal(loss(model), want), name
    for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad.full_tensor(), b.grad.float(), msg=f"{name} {key}")
    saved, expected = model.state_dict(), plain.state_dict()
    assert list(saved) == list(expected), name
    for key, value in expected.items():
        sharded = hasattr(saved[key], "full_tensor")
        if key.endswith(("base.weight", "absmax", "SCB")):
            assert sharded, f"{name}: {key} is not sharded"
        if "base" in key:
            assert same_bytes(saved[key], value), f"{name}: {key}"


def layers_compute_what_whole_ones_do(rank: int, world: int) -> int:
    cases = [
        *itertools.product(("nf4", "fp4"), STORAGES, (True, False), (None, torch.bfloat16)),
        *itertools.product(("int8",), ("uint8",), (True,), (None, torch.bfloat16)),
    ]
    for case in cases:
        check_case(*case)
    return len(cases)


def sharding_options(rank: int, world: int) -> str:
    """Offload, kept weights, checkpointing, two-dimensional meshes, tied layers, moves."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "parts"))
    for options in (
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"reshard_after_forward": False},
        {"mesh": mesh},
    ):
        model = build("nf4", torch.bfloat16, True)
        want = loss(copy.deepcopy(model))
        shard(model, **options)
        for _ in range(2):
            assert torch.equal(loss(model), want), options
    model = build("nf4", torch.uint8, True)
    plain = copy.deepcopy(model)
    want = loss(plain)
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Lora))
    shard(model)
    assert torch.equal(loss(model), want), "activation checkpointing"
    assert torch.equal(loss(model), want), "activation checkpointing"
    model = build("nf4", torch.float32, True)
    shard(model)
    loss(model)
    for move in (nn.Module.cpu, nn.Module.half, nn.Module.float, lambda m: m.to(torch.bfloat16)):
        move(model)
        for key, value in plain.state_dict().items():
            if "base.weight" in key and not key.endswith("base.weight"):
                assert same_bytes(model.state_dict()[key], value), f"{move}: {key}"
    model.float()
    assert model[0].base.weight.dtype == torch.float32
    codes = model.state_dict()["0.base.weight"].full_tensor().view(torch.uint8)
    assert torch.equal(codes.flatten(), plain.state_dict()["0.base.weight"].flatten())
    with pytest.raises(RuntimeError, match="sharded by FSDP2 and not gathered"):
        model[1].base(torch.ones(1, 192))
    twin = copy.deepcopy(model[0].base.weight._local_tensor)
    assert torch.equal(twin.scales[0], model[0].base.weight._local_tensor.scales[0])
    assert twin.data_ptr() != model[0].base.weight._local_tensor.data_ptr()
    assert "DTensor" in repr(model[0].base.weight)
    for layer in (Linear4bit(64, 64), Linear8bitLt(64, 64, has_fp16_weights=False)):
        late = nn.Sequential(layer)
        shard(late)
        with pytest.raises(RuntimeError, match="sharded as a float one"):
            late(torch.ones(1, 64))
    # once a quantized weight is in its place, the layer computes again
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    fully_shard(nn.Sequential(layer))
    ready = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")
    layer.weight = copy.deepcopy(ready.weight)
    assert torch.equal(layer(torch.ones(1, 64)), ready(torch.ones(1, 64)))
    return "done"


def memory_is_sharded(rank: int, world: int) -> list[int]:
    """Codes and scales that a rank keeps while nothing is gathered."""
    torch.manual_seed(0)
    model = nn.Sequential(Linear4bit(1024, 1024, bias=False, quant_type="nf4")).to("cpu")
    layer = model[0]
    whole = weakref.ref(layer.weight.quant_state.absmax)
    shard(model)
    assert whole() is None, "a rank keeps the scales of the whole weight"
    model(torch.ones(1, 1024))
    layer.reshard()
    local = layer.weight._local_tensor
    gathered = local.gathered
    assert gathered.absmax.untyped_storage().size() == 0 or world == 1
    assert type(layer.quant_state.absmax).__name__ == "DTensor"
    return [local.untyped_storage().nbytes(), *(s.untyped_storage().nbytes() for s in local.scales)]


def other_layers(rank: int, world: int) -> str:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    table = Embedding4bit(37, 64, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    index = torch.tensor([0, 36, 5])
    want = table(index)
    fully_shard(table)
    assert torch.equal(table(index), want)
    assert torch.equal(table(index), want)
    experts = Experts4bit(3, 32, 48).to("cpu")
    x, ids = torch.randn(5, 32), torch.randint(0, 3, (5, 2))
    want = experts(x, ids)
    fully_shard(experts)
    assert torch.equal(experts(x, ids), want)
    assert torch.equal(experts(x, ids), want)
    assert hasattr(experts.state_dict()["weight.absmax"], "full_tensor")
    whole = Linear8bitLt(64, 32, has_fp16_weights=True, threshold=6.0)
    sharded = copy.deepcopy(whole)
    fully_shard(sharded)
    x = torch.randn(4, 64)
    assert torch.equal(sharded(x), whole(x))
    return "done"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_layers_compute_what_whole_ones_do(world: int) -> None:
    assert ranks.run(layers_compute_what_whole_ones_do, world) == [26] * world


@pytest.mark.parametrize("world", [2, 4])
def test_sharding_options(world: int) -> None:
    assert ranks.run(sharding_options, world) == ["done"] * world


def test_memory_is_sharded() -> None:
    whole = [1024 * 512, 16384, 64 * 4]
    for world in (2, 4):
        parts = [size // world for size in whole]
        assert ranks.run(memory_is_sharded, world) == [parts] * world


@pytest.mark.parametrize("world", [2, 4])
def test_other_layers(world: int) -> None:
    assert ranks.run(other_layers, world) == ["done"] * world
