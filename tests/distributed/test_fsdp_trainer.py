"""Transformers' ``Trainer`` with accelerate's FSDP trains, saves and resumes on two ranks.

The model is rustdoc-llama in 4 bits with adapters, loaded by ``BitsAndBytesConfig``; the optimizers
are those of ``optim=``.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
import ranks
import torch
import torch._dynamo
import torch.distributed.fsdp
import trainer_run

WORLD, STEPS = 2, 4
# Bytes of all packed weights: 4 layers of projections, half a byte a value.
PACKED = 4 * (192 * 192 * 2 + 192 * 96 * 2 + 3 * 192 * 512) // 2

CASES: dict[str, dict[str, Any]] = {
    "FSDP1": {"version": 1, "storage": "float32", "optim": "paged_adamw_8bit"},
    # PEFT hands adapters float32 inputs, which FSDP1 does not cast below the root: autocast does.
    "FSDP1, autocast": {
        "version": 1,
        "storage": "bfloat16",
        "optim": "adamw_bnb_8bit",
        "bf16": True,
        "use_orig_params": False,
    },
    "FSDP2": {"version": 2, "storage": "bfloat16", "optim": "adamw_bnb_8bit"},
    "FSDP2, full state dict": {
        "version": 2,
        "storage": "bfloat16",
        "optim": "paged_adamw_8bit",
        "state_dict": "FULL_STATE_DICT",
    },
    "DDP": {"version": None, "storage": "bfloat16", "optim": "adamw_bnb_8bit"},
}
# Not FSDP1: PEFT (0.21) saves an empty adapter there, of float models as well.
RESUMED = ("FSDP2", "FSDP2, full state dict")


def work(rank: int, world: int, folder: str) -> dict[str, Any]:
    from accelerate.state import AcceleratorState, GradientState

    warnings.simplefilter("ignore")
    found = {}
    for name, settings in CASES.items():
        for resume in (False, True) if name in RESUMED else (False,):
            found[f"{name}, resumed" if resume else name] = trainer_run.train(
                str(pathlib.Path(folder) / name), resume=resume, steps=STEPS, **settings
            )
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            torch.distributed.barrier()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run(work, WORLD, folder=str(tmp_path_factory.mktemp("trainer")))


@pytest.mark.parametrize("name", CASES)
def test_trains(results, name):
    first, second = (rank[name] for rank in results)
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) == STEPS
    assert first["losses"][-1] < first["losses"][0]
    assert first["optimizer"] == "bitsandbytes.AdamW"
    assert "torch.uint8" in first["bits"]
    wrapped, kind = first["kind"]
    if name == "DDP":
        assert kind == "DistributedType.MULTI_CPU"
        assert [first["base"], second["base"]] == [PACKED, PACKED]
        return
    assert kind == "DistributedType.FSDP"
    assert (wrapped == "FullyShardedDataParallel") == name.startswith("FSDP1")
    if CASES[name].get("use_orig_params", True):
        assert first["base"] + second["base"] == PACKED, "packed weights are not sharded"
        assert max(first["base"], second["base"]) < 0.75 * PACKED


@pytest.mark.parametrize("name", RESUMED)
def test_resumes_as_if_never_stopped(results, name):
    whole, resumed = results[0][name], results[0][f"{name}, resumed"]
    assert resumed["losses"] == whole["losses"]
    assert resumed["norms"] == whole["norms"]
    assert resumed["bits"] == whole["bits"]


def test_shards_compute_what_copies_do(results):
    """FSDP2 against DDP, in the same precision: gradients differ in the order of sums at most."""
    shards, copies = results[0]["FSDP2"], results[0]["DDP"]
    assert shards["losses"] == pytest.approx(copies["losses"], rel=1e-4)
    assert shards["norms"] == pytest.approx(copies["norms"], rel=1e-4)


def test_torchrun(results, tmp_path):
    settings = CASES["FSDP2"] | {"steps": 2}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(WORLD), trainer_run.__file__, str(tmp_path)]
    run = subprocess.run(
        [*command, json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for rank in range(WORLD):
        found = json.loads((tmp_path / f"result-{rank}").read_text())
        assert found["losses"] == results[rank]["FSDP2"]["losses"][:2]
        assert found["kind"] == results[rank]["FSDP2"]["kind"]
