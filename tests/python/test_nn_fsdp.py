"""Sharded training: two processes on the CPU, 4-bit layers under FSDP and FSDP2.

The workers run in processes of their own (this file as a script), because torch allows one process
group a process.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from halfbyte.nn import Linear4bit
from torch import nn

WORLD = 2


class Lora(nn.Module):
    def __init__(self, base: Linear4bit, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    config = {"bias": False, "quant_type": "nf4", "quant_storage": torch.float32}
    return nn.Sequential(*(Lora(Linear4bit(64, 64, **config)) for _ in range(2))).to("cpu")


def loss(model: nn.Module) -> torch.Tensor:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    value = model(x).square().mean()
    value.backward()
    return value.detach()


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    for kind in ("fsdp2", "fsdp", "fsdp-orig"):
        print(f"rank {rank}: {kind}", flush=True)
        train(kind)
    dist.destroy_process_group()
    sys.stdout.flush()
    # Gloo's threads may still hold tensors when the interpreter ends, and abort (pytorch#179291).
    os._exit(0)


def train(kind: str) -> None:
    model = build()
    plain = copy.deepcopy(model)
    want = loss(plain)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Linear4bit, nn.Linear}),
            use_orig_params=kind == "fsdp-orig",
            device_id=torch.device("cpu"),
        )
    for _ in range(2):  # the second pass meets weights that were sharded again in between
        model.zero_grad()
        assert torch.equal(loss(model), want), "the sharded model computes something else"
    if kind == "fsdp2":
        for (name, sharded), whole in zip(
            model.named_parameters(), plain.parameters(), strict=True
        ):
            if whole.grad is not None:
                torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, msg=name)
        saved = model.state_dict()
        assert list(saved) == list(plain.state_dict())
        for name, value in plain.state_dict().items():
            found = saved[name]
            found = found.full_tensor() if hasattr(found, "full_tensor") else found
            # bytes, not values: float32 storage holds NaN patterns
            as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, value)]
            assert torch.equal(*as_bytes), name


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_sharded_layers_compute_what_whole_ones_do(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * WORLD, "\n".join(said)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
