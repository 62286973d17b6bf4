"""examples/fsdp_qlora.py as its users launch it: torchrun, accelerate, two hosts, and resumed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import two_hosts  # noqa: E402

EXAMPLE = ROOT / "examples" / "fsdp_qlora.py"
SHAPE = ["--steps", "4", "--save-every", "2", "--batch", "2", "--window", "64", "--dtype", "fp32"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def launch(*command: str | Path) -> str:
    """What a launcher and its ranks print."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def arguments(folder: Path, *more: str) -> list[str | Path]:
    return [EXAMPLE, *SHAPE, "--out", folder, "--json", folder / "log.json", *more]


def log(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "log.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks under FSDP2, weights in uint8."""
    folder = tmp_path_factory.mktemp("run")
    said = launch(*TORCHRUN, "2", *arguments(folder, "--storage", "uint8"))
    assert "step    3  loss" in said
    assert "rank 1:" in said
    return folder


def test_trains_and_counts(run):
    found = log(run)
    assert len(found["losses"]) == 4
    # Packed weights and scales take 4.127 bits a parameter; adapters, embedding and norms are
    # float32. Units are gathered twice, but for the root, which stays.
    packed = 4 * (2 * 192 * 192 + 2 * 192 * 96 + 3 * 192 * 512)
    adapters = 32 * 4 * (2 * (192 + 192) + 2 * (192 + 96) + 3 * (192 + 512))
    units = packed * 4.127 / 8 + 4 * (adapters + 4 * 2 * 192)
    root = 4 * (4096 * 192 + 192)
    assert found["gathered"] == pytest.approx([units + root / 2] * 2, rel=2e-3)
    assert found["reduced"] == [4 * adapters // 2] * 2


def test_adapter_is_peft_s(run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "rustdoc-llama")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(model, run / "adapter")
        after = adapted(input_ids=ids).logits
    trained = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(trained) == 28
    assert all(p.abs().max() > 0 for p in trained)
    assert not torch.allclose(before, after, atol=1e-3)


def test_resumes_where_it_was(run, tmp_path):
    shutil.copytree(
        run / "checkpoints" / "step-00000002", tmp_path / "checkpoints" / "step-00000002"
    )
    launch(*TORCHRUN, "2", *arguments(tmp_path, "--storage", "uint8", "--resume"))
    again = log(tmp_path)
    assert again["first"] == 2
    assert again["losses"] == log(run)["losses"][2:]


def test_accelerate(run, tmp_path):
    config = EXAMPLE.with_suffix(".yaml")
    command = ["-m", "accelerate.commands.launch", "--config_file", config]
    launch(*command, *arguments(tmp_path, "--storage", "fp32", "--accelerate"))
    found, torchrun = log(tmp_path), log(run)
    assert found["losses"][0] == torchrun["losses"][0]
    assert found["gathered"] == torchrun["gathered"], "accelerate has not sharded the same"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(two_hosts.missing() is not None, reason=str(two_hosts.missing()))
def test_two_hosts(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with two_hosts.TwoHosts() as hosts:
        hosts.torchrun(arguments(tmp_path, "--storage", "uint8"))
        sent = hosts.sent()
        names = hosts.names
    assert log(tmp_path)["losses"] == log(run)["losses"]
    # Gloo scatters by reducing everything everywhere: twice the bytes of a ring.
    counted = 4 * (log(run)["gathered"][0] + 2 * log(run)["reduced"][0])
    assert all(counted < bytes_ < 1.3 * counted for bytes_ in sent), (counted, sent)
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert not any(name in listed.stdout for name in names), "the hosts were not cleaned up"


def test_says_how_to_launch_it(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    monkeypatch.delenv("RANK", raising=False)
    example = importlib.import_module(EXAMPLE.stem)
    with pytest.raises(SystemExit, match="launch this with torchrun or accelerate"):
        example.main()
