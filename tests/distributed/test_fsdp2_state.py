"""State dicts of quantized layers under FSDP2: every way in and out; distributed checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import torch
from test_fsdp2 import STORAGES, build, loss, same_bytes, shard
from torch import nn

KINDS = (("nf4", "bf16", True), ("fp4", "uint8", False), ("int8", "uint8", True))


def make(kind: str, storage: str, nested: bool) -> nn.Sequential:
    return build(kind, STORAGES[storage], nested)


def blank(model: nn.Module) -> nn.Module:
    """The same layers with other contents."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() > 0 and not (tensor.dtype == torch.uint8 and tensor.dim() == 1):
                tensor.zero_()
    return model


def expect(model: nn.Module, plain: nn.Module, note: object) -> None:
    found = model.state_dict()
    for key, value in plain.state_dict().items():
        assert same_bytes(found[key], value), f"{note}: {key}"
    assert torch.equal(loss(model), loss(copy.deepcopy(plain))), note


def base(model: nn.Module) -> dict[str, torch.Tensor]:
    """What torch itself does not shard: plain tensors may be loaded."""
    return {key: value for key, value in model.state_dict().items() if "base" in key}


def in_and_out(rank: int, world: int) -> str:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.tensor import distribute_tensor

    for case in KINDS:
        plain = make(*case)
        whole = plain.state_dict()
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)

        model = make(*case)
        shard(model)
        saved = get_model_state_dict(model, options=full)
        if rank == 0:
            assert list(saved) == list(whole), case
            for key, value in whole.items():
                assert same_bytes(saved[key], value), f"{case}: {key}"
        sharded = get_model_state_dict(model)

        for how in ("sharded", "plain", "set", "broadcast", "meta"):
            model = blank(plain)
            if how == "meta":
                model.to("meta")
            shard(model)
            if how == "sharded":
                model.load_state_dict(sharded)
            elif how == "plain":
                # torch itself takes only DTensors for the parameters it shards
                model.load_state_dict({**sharded, **base(plain)})
            elif how == "set":
                set_model_state_dict(model, sharded)
            elif how == "meta":
                model.load_state_dict(sharded, assign=True)
            else:
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                set_model_state_dict(model, whole if rank == 0 else {}, options=options)
            expect(model, plain, (case, how))

        # adapters only: torch leaves the scales of frozen weights in
        adapters = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
        assert "0.base.weight" not in adapters
        set_model_state_dict(model, adapters, options=StateDictOptions(strict=False))
        expect(model, plain, (case, "adapters"))

        # floats that are quantized on the way in, whole and as DTensors
        adapters = {key: value for key, value in sharded.items() if "base" not in key}
        floats = {
            f"{index}.base.weight": torch.randn(block.base.out_features, block.base.in_features)
            for index, block in enumerate(plain)
        }
        twin = copy.deepcopy(plain)
        twin.load_state_dict(floats, strict=False)
        mesh = model[0].base.weight.device_mesh
        for given in (floats, {k: distribute_tensor(v, mesh) for k, v in floats.items()}):
            model.load_state_dict({**adapters, **given}, strict=False)
            expect(model, twin, (case, "floats"))

        # after training has begun, into the memory that FSDP gathers from
        model = blank(plain)
        shard(model)
        loss(model)
        model.load_state_dict(sharded)
        expect(model, plain, (case, "late"))
    return "done"


def complaints(rank: int, world: int) -> list[str]:
    said = []
    model = make("nf4", "bf16", True)
    shard(model)
    good = model.state_dict()
    rest = {key: value for key, value in good.items() if "base" not in key}
    for change in (
        {**rest, **base(make("fp4", "bf16", True))},
        {**rest, **base(make("nf4", "bf16", False))},
        {k: v for k, v in good.items() if k != "1.base.weight.absmax"},
        {**good, "0.base.weight": torch.zeros(3, 1, dtype=torch.bfloat16)},
    ):
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(change)
        said.append(str(error.value))
    expect(model, make("nf4", "bf16", True), "nothing has changed")
    return said


def checkpoints_reshard(rank: int, world: int, folder: str) -> int:
    """The first 1, 2 and 4 ranks save and load, each what each has saved; and one without FSDP."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import DeviceMesh

    sizes = [size for size in (1, 2, 4) if size <= world]
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    ways = [(1, False), *((size, True) for size in sizes)]

    def models(size: int, sharded: bool) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        for case in KINDS:
            plain = make(*case)
            model = copy.deepcopy(plain)
            if sharded:
                shard(model, mesh=DeviceMesh.from_group(groups[size], "cpu"))
            yield case[0], plain, model

    loaded = 0
    for size, sharded in ways:
        if rank < size:
            for name, _, model in models(size, sharded):
                place = str(Path(folder) / f"{size}-{sharded}-{name}")
                state = get_model_state_dict(model)
                dcp.save(state, checkpoint_id=place, process_group=groups[size])
    dist.barrier()
    for size, sharded in ways:
        if rank < size:
            for by, how in ways:
                for name, plain, model in models(size, sharded):
                    state = get_model_state_dict(model)
                    for key, value in state.items():
                        if key.endswith(("weight", "absmax", "SCB")):
                            getattr(value, "_local_tensor", value).zero_()
                    place = str(Path(folder) / f"{by}-{how}-{name}")
                    dcp.load(state, checkpoint_id=place, process_group=groups[size])
                    set_model_state_dict(model, state)
                    expect(model, plain, f"{name} saved by {by} ({how}), loaded by {size}")
                    loaded += 1
    return loaded


@pytest.mark.parametrize("world", [2, 4])
def test_in_and_out(world: int) -> None:
    assert ranks.run(in_and_out, world) == ["done"] * world


def test_complaints() -> None:
    first, second = ranks.run(complaints, 2)
    assert first == second
    quant_type, nested, missing, size = first
    assert "quant_type must stay 'nf4' while the layer is sharded, got 'fp4'" in quant_type
    assert "nested must stay True while the layer is sharded, got False" in nested
    assert "the state dict lacks 1.base.weight.absmax" in missing
    assert "size mismatch for 0.base.weight" in size


def test_checkpoints_reshard(tmp_path: Path) -> None:
    each = 4 * len(KINDS)
    found = ranks.run(checkpoints_reshard, 4, folder=str(tmp_path))
    assert found == [3 * each + each, 2 * each, each, each]
