"""Checkpoints: whole or not there, loaded at any number of ranks, refused with one sentence."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import sys
import zlib
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from halfbyte import nn as hnn
from halfbyte import optim
from halfbyte.distributed import (
    CheckpointError,
    _manifest,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store wants POSIX")

WIDTH = 256
PACKED = "model.0.base.weight"


def warm_up() -> None:
    """Import, before ranks are forked, what each of them would else take 5 s of a core for."""
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp  # noqa: F401


if pathlib.Path(sys.argv[0]).name == "ranks.py":
    warm_up()


class Layer(nn.Module):
    """A quantized layer with an adapter. A's optimizer states are whole rows of blocks; a row of B
    is shorter than a block."""

    def __init__(self, base: nn.Module, rank: int = 16) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(WIDTH, rank, bias=False)
        self.b = nn.Linear(rank, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        low = self.a(F.dropout(x, 0.1, self.training))
        return torch.tanh(self.base(x) + self.b(low))


def make(seed: int = 0, rank: int = 16, **settings: Any) -> nn.Sequential:
    """Two 4-bit layers, one of LLM.int8() and a head, each with weights that ``seed`` decides."""
    torch.manual_seed(seed)
    options = {"quant_type": "nf4", "compress_statistics": True, "bias": False, **settings}
    int8 = hnn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False, bias=False)
    bases = [hnn.Linear4bit(WIDTH, WIDTH, **options) for _ in range(2)]
    return nn.Sequential(*(Layer(base, rank) for base in (*bases, int8)), nn.Linear(WIDTH, 3)).cpu()


def shard(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int = 0) -> float:
    """One step on data that depends on step and rank. Uses the random state of torch and Python."""
    data = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))
    loss = model(data).square().mean() * random.uniform(0.9, 1.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def contents(model: nn.Module) -> dict[str, bytes]:
    """The bytes of all tensors of the whole model, by name, on every rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {
        name: value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in whole.items()
    }


def digest(model: nn.Module) -> dict[str, int]:
    return {name: zlib.crc32(value) for name, value in contents(model).items()}


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """CRC-32 of the whole optimizer states of those parameters whose rows are whole blocks."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    states: Any = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    found = {}
    for name in ("0.a.weight", "2.a.weight", "3.weight"):
        inner = states[name]["__bnb_optimizer_quant_state__"]
        for key in ("state1", "state2", "absmax1", "absmax2"):
            if key in inner:
                data = inner[key].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                found[f"{name} {key}"] = zlib.crc32(data)
    return found


def differs(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


# ---- one process


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint of two steps."""
    model = make()
    optimizer = adam(model)
    for step in range(2):
        train(model, optimizer, step)
    folder = tmp_path_factory.mktemp("saved")
    return save_checkpoint(folder, model, optimizer, step=2, extra={"epoch": 0.5})


@pytest.fixture
def copied(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it, to be broken."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / saved.name))


def rewrite(path: pathlib.Path, change: Any) -> None:
    """Change the manifest of a checkpoint as if it had been saved so."""
    manifest = json.loads((path / _manifest.MANIFEST).read_text())["manifest"]
    change(manifest)
    _manifest.write(path, manifest)


def place(path: pathlib.Path, tensor: str) -> tuple[pathlib.Path, int, int]:
    """File, start and length of a tensor's piece."""
    files = verify_checkpoint(path, checksums=False)["files"]
    for name, record in files.items():
        for piece in record["pieces"]:
            if piece[0] == tensor:
                return path / name, piece[1], piece[2]
    raise AssertionError(f"{tensor} is in no file of {path}")


def refused(path: pathlib.Path, model: nn.Module | None = None, **settings: Any) -> str:
    """The sentence with which loading ``path`` fails; model and optimizer must stay as they are."""
    model = make(seed=7, **settings) if model is None else model
    optimizer = adam(model)
    before = contents(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, model, optimizer)
    assert differs(contents(model), before) == []
    assert not optimizer.state
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_training_goes_on_bit_for_bit(tmp_path):
    model = make()
    optimizer = adam(model)
    random.seed(3)
    losses = [train(model, optimizer, step) for step in range(6)]
    expected = contents(model)

    model = make()
    optimizer = adam(model)
    random.seed(3)
    for step in range(3):
        assert train(model, optimizer, step) == losses[step]
    path = save_checkpoint(tmp_path, model, optimizer, step=3, extra={"rate": 0.1})
    assert path == tmp_path / "step-00000003"
    assert verify_checkpoint(path)["step"] == 3

    other = make(seed=5)  # another model: everything has to come from the checkpoint
    optimizer = adam(other)
    random.seed(99)
    found = load_checkpoint(tmp_path, other, optimizer)
    assert found == (3, {"rate": 0.1}, path)
    assert [train(other, optimizer, step) for step in range(3, 6)] == losses[3:]
    assert differs(contents(other), expected) == []


def test_before_the_first_step(tmp_path):
    model = make()
    optimizer = adam(model)
    save_checkpoint(tmp_path, model, optimizer, step=0)
    assert not optimizer.state
    expected = [train(model, optimizer, step) for step in range(2)]
    other = make(seed=5)
    optimizer = adam(other)
    train(other, optimizer, 9)
    assert load_checkpoint(tmp_path, other, optimizer).step == 0
    assert not optimizer.state
    assert [train(other, optimizer, step) for step in range(2)] == expected


def test_adapter_only(tmp_path):
    model = make()
    optimizer = adam(model)
    train(model, optimizer, 0)
    path = save_checkpoint(tmp_path, model, optimizer, step=1, trainable_only=True)
    names = {piece[0] for f in verify_checkpoint(path)["files"].values() for piece in f["pieces"]}
    kept = {name for name in names if name.startswith("model.")}
    assert kept == {f"model.{i}.{x}.weight" for i in range(3) for x in "ab"} | {
        "model.3.weight",
        "model.3.bias",
    }
    whole = save_checkpoint(tmp_path / "whole", model, optimizer, step=1)
    size = [sum(f.stat().st_size for f in p.iterdir()) for p in (path, whole)]
    assert size[0] < size[1]

    expected = train(model, optimizer, 1)
    other = make()  # the same base
    second = adam(other)
    load_checkpoint(path, other, second)
    assert train(other, second, 1) == expected
    assert differs(contents(other), contents(model)) == []
    text = refused(path, quant_type="fp4")
    assert "0.base.weight was saved as nf4" in text


def test_missing_file(copied):
    file, _, _ = place(copied, PACKED)
    file.unlink()
    text = refused(copied)
    assert text.startswith(f"{file} is missing: it holds ")
    assert "more tensors" in text
    with pytest.warns(UserWarning, match="passed over step-00000002: .* is missing"):
        assert latest_checkpoint(copied.parent) is None


def test_truncated_file(copied):
    file, start, length = place(copied, PACKED)
    whole = file.stat().st_size
    os.truncate(file, start + length // 2)
    expected = f"{file} is truncated: it has {start + length // 2} of {whole} bytes, cut off within"
    assert refused(copied) == f"{expected} {PACKED}"


def test_flipped_byte(copied):
    for tensor in (PACKED, f"{PACKED}.absmax", "optimizer.state.1.a.weight.step"):
        file, start, length = place(copied, tensor)
        data = bytearray(file.read_bytes())
        data[start + length // 2] ^= 0x10
        file.write_bytes(data)
        assert refused(copied) == (
            f"{file} is damaged: bytes {start} to {start + length}, which hold {tensor}, "
            "have another checksum than when they were saved"
        )
        data[start + length // 2] ^= 0x10
        file.write_bytes(data)
    verify_checkpoint(copied)


@pytest.mark.parametrize("name", [".metadata", "random-00000.pt"])
def test_other_files(copied, name):
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    assert refused(copied).startswith(f"{copied / name} is damaged: ")
    (copied / name).unlink()
    assert refused(copied).startswith(f"{copied / name} is missing: ")


def test_manifest(copied):
    path = copied / _manifest.MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"step": 2', '"step": 3'))
    assert refused(copied) == (f"{path} is damaged: it has another checksum than when it was saved")
    path.write_text(text[: len(text) // 2])
    assert refused(copied).startswith(f"{path} cannot be read: ")
    path.write_text(text)
    rewrite(copied, lambda manifest: manifest.update(format=2))
    assert refused(copied) == f"{path} has format 2, this halfbyte reads format 1"
    path.unlink()
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(FileNotFoundError):
        load_checkpoint(copied.parent, make())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_type": "fp4"}, "fp4 of shape [256, 256] in blocks of 64"),
        ({"blocksize": 128}, "nf4 of shape [256, 256] in blocks of 128"),
        ({"compress_statistics": False}, "scales as float32, stored as uint8"),
        ({"quant_storage": torch.bfloat16}, "stored as bfloat16"),
    ],
)
def test_quantized_in_another_way(saved, settings, words):
    if "blocksize" in settings:
        torch.manual_seed(7)
        model = make(seed=7)
        for layer in model[:2]:
            weight = torch.randn(WIDTH, WIDTH)
            layer.base.weight = hnn.Params4bit(weight, quant_type="nf4", **settings).cpu()
        text = refused(saved, model)
    else:
        text = refused(saved, **settings)
    file, _, _ = place(saved, PACKED)
    assert text.startswith(
        f"{file}: 0.base.weight was saved as nf4 of shape [256, 256] in blocks of 64, scales "
        "quantized in blocks of 256, stored as uint8; the model has "
    )
    assert words in text.partition("the model has ")[2]


def test_not_quantized(saved):
    model = make(seed=7)
    model[0].base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    text = refused(saved, model)
    assert text.endswith("the model has a weight that is not quantized")
    assert "0.base.weight was saved as nf4" in text


def test_other_tensors(saved):
    file, _, _ = place(saved, "model.0.a.weight")
    assert refused(saved, rank=8) == (
        f"{file}: model 0.a.weight was saved as torch.float32 of shape [16, 256], "
        "torch.float32 of shape [8, 256] is wanted"
    )
    model = make(seed=7)
    model[0].a.to(torch.float16)
    assert refused(saved, model).endswith("torch.float16 of shape [16, 256] is wanted")
    model = make(seed=7)
    model[1].c = nn.Linear(2, 2)
    assert refused(saved, model) == (f"{saved / '.metadata'}: the checkpoint lacks model 1.c.bias")
    model = make(seed=7)
    del model[2].b
    file, _, _ = place(saved, "model.2.b.weight")
    assert refused(saved, model) == (
        f"{file}: the checkpoint has model 2.b.weight, which is not there to load"
    )


def test_other_optimizer(saved, tmp_path):
    model = make(seed=7)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = contents(model)
    with pytest.raises(CheckpointError, match=r"halfbyte|distcp|metadata") as caught:
        load_checkpoint(saved, model, optimizer)
    assert "optimizer state.0." in str(caught.value)
    assert differs(contents(model), before) == []
    assert not optimizer.state
    path = save_checkpoint(tmp_path, model, step=1)
    with pytest.raises(CheckpointError, match="was saved without an optimizer"):
        load_checkpoint(path, model, optimizer)
    assert load_checkpoint(saved, model).step == 2  # the model alone


# ---- several ranks


def several(rank: int, world: int, folder: str, load: list[str]) -> dict[str, Any]:
    """Saves, loads what others have saved, and what is broken; see the test."""
    import torch.distributed as dist

    base = pathlib.Path(folder)
    model = shard(make())
    optimizer = adam(model)
    for step in range(2):
        train(model, optimizer, step, rank)
    path = save_checkpoint(base / f"world-{world}", model, optimizer, step=2, extra={"w": world})
    saved = {**digest(model), **moments(model, optimizer)}
    losses = [train(model, optimizer, step, rank) for step in (2, 3)]

    loaded = {}
    for name in load:
        other = shard(make(seed=7))
        second = adam(other)
        assert load_checkpoint(base / name, other, second).step == 2
        loaded[name] = {**digest(other), **moments(other, second)}
    other = shard(make(seed=7))
    second = adam(other)
    load_checkpoint(path, other, second)
    resumed = [train(other, second, step, rank) for step in (2, 3)]

    refusals: dict[str, Any] = {}
    broken = base / f"broken-{world}"
    for kind in ("missing", "truncated", "flipped", "fp4"):
        if rank == 0:
            shutil.copytree(path, broken)
            file, start, length = place(broken, f"{PACKED}.absmax")
            if kind == "missing":
                (broken / f"__{world - 1}_0.distcp").unlink()
            elif kind == "truncated":
                os.truncate(file, start + 1)
            elif kind == "flipped":
                data = bytearray(file.read_bytes())
                data[start + length // 2] ^= 1
                file.write_bytes(data)
        dist.barrier()
        target = shard(make(seed=7, quant_type="fp4" if kind == "fp4" else "nf4"))
        second = adam(target)
        before = digest(target)
        try:
            load_checkpoint(broken, target, second)
        except CheckpointError as error:
            unchanged = differs(digest(target), before) == [] and not second.state
            refusals[kind] = [str(error), unchanged]
        dist.barrier()
        if rank == 0:
            shutil.rmtree(broken)
    return {
        "saved": saved,
        "loaded": loaded,
        "losses": losses,
        "resumed": resumed,
        "digests": [digest(model), digest(other)],
        "refusals": refusals,
    }


def test_any_number_of_ranks(tmp_path):
    model = make()
    optimizer = adam(model)
    for step in range(2):
        train(model, optimizer, step)
    save_checkpoint(tmp_path / "world-1", model, optimizer, step=2)
    saved = {"world-1": {**digest(model), **moments(model, optimizer)}}
    loads = ["world-1"]
    for world in (4, 2):
        results = ranks.run(several, world, folder=str(tmp_path), load=loads)
        assert len({json.dumps(result["refusals"]) for result in results}) == 1
        for rank, result in enumerate(results):
            assert result["resumed"] == result["losses"], (world, rank)
            assert differs(*result["digests"]) == [], (world, rank)
            for name in loads:
                assert differs(result["loaded"][name], saved[name]) == [], (world, rank, name)
        refusals = results[0]["refusals"]
        assert all(unchanged for _, unchanged in refusals.values())
        texts = {kind: text for kind, (text, _) in refusals.items()}
        folder = tmp_path / f"broken-{world}"
        last = folder / f"__{world - 1}_0.distcp"
        assert texts["missing"].startswith(f"{last} is missing: it holds model.")
        assert "cut off within model.0.base.weight.absmax" in texts["truncated"]
        assert "which hold model.0.base.weight.absmax, have another" in texts["flipped"]
        assert "0.base.weight was saved as nf4 of shape [256, 256] in blocks" in texts["fp4"]
        saved[f"world-{world}"] = results[0]["saved"]
        loads.append(f"world-{world}")
    for name in loads:
        other = make(seed=7)
        second = adam(other)
        assert load_checkpoint(tmp_path / name, other, second).step == 2
        assert differs({**digest(other), **moments(other, second)}, saved[name]) == []
