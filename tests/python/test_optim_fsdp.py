"""FSDP2: parameters and gradients are DTensors, states belong to each rank's part."""

from __future__ import annotations

import copy
import os
import sys

import pytest
import torch
from torch import nn

WORLD = 2
NAMES = ("AdamW8bit", "AdEMAMix8bit", "Lion", "LARS")


def worker(rank: int, store: str) -> None:
    import torch.distributed as dist
    from halfbyte import optim
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (WORLD,))
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))

    def train(model, optimizer):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for name in NAMES:
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 3))
        sharded = copy.deepcopy(whole)
        fully_shard(sharded[0], mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        more = {"momentum": 0.9, "max_unorm": 0.0} if name == "LARS" else {}
        make = getattr(optim, name)
        a = make(whole.parameters(), lr=1e-3, **more)
        b = make(sharded.parameters(), lr=1e-3, **more)
        for step in range(4):
            train(whole, a)
            train(sharded, b)
            if step == 1:  # what torch.distributed.checkpoint saves and restores
                saved = get_optimizer_state_dict(sharded, b)
                b = make(sharded.parameters(), lr=1e-3, **more)
                set_optimizer_state_dict(sharded, b, saved)
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-5, atol=1e-6)
            state = b.state[q]
            assert state["state1"].shape[-q.dim() :] == q.to_local().shape
            assert state["step"] == 4
        first = next(iter(sharded.parameters()))
        assert b.state[first]["state1"].dtype == (torch.uint8 if "8bit" in name else torch.float32)
        sys.stdout.write(f"rank {rank}: {name}\n")  # in one piece, beside the other rank's
        sys.stdout.flush()
    dist.destroy_process_group()
    sys.stdout.flush()
    # Gloo's threads may still hold tensors when the interpreter ends, and abort (pytorch#179291).
    os._exit(0)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store wants a POSIX path")
def test_fully_sharded(python, tmp_path):
    out = python(
        f"import sys; sys.path.insert(0, {__file__.rpartition('/')[0]!r})\n"
        "import torch.multiprocessing as mp\n"
        "import test_optim_fsdp as t\n"
        f"mp.start_processes(t.worker, ({str(tmp_path / 'store')!r},), t.WORLD, "
        "start_method='fork')"
    )
    assert sorted(out.splitlines()) == sorted(
        f"rank {rank}: {name}" for rank in range(WORLD) for name in NAMES
    )
