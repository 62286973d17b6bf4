"""A folder of checkpoints: what is kept, removed and set aside, and what a save refuses."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy
import pytest
import ranks
import torch
from halfbyte.distributed import (
    CheckpointError,
    _folder,
    _manifest,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from torch import nn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store wants POSIX")


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_keep_and_same_step(tmp_path):
    model = nn.Linear(4, 4)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, model, step=step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    with pytest.raises(FileExistsError, match=r"step-00000003 is there already; overwrite=True"):
        save_checkpoint(tmp_path, model, step=3)
    with torch.no_grad():
        model.weight.fill_(5.0)
    save_checkpoint(tmp_path, model, step=3, overwrite=True, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    other = nn.Linear(4, 4)
    load_checkpoint(tmp_path, other)
    assert torch.equal(other.weight, model.weight)


def test_arguments(tmp_path):
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="step must be 0 or more, got -1"):
        save_checkpoint(tmp_path, model, step=-1)
    with pytest.raises(ValueError, match="keep must be 1 or more, or None, got 0"):
        save_checkpoint(tmp_path, model, step=1, keep=0)
    with pytest.raises(ValueError, match=r"keep must be a whole number, 1 or more, or None"):
        save_checkpoint(tmp_path, model, step=1, keep="2")
    for step in (1.5, "3"):
        with pytest.raises(ValueError, match=f"a whole number, 0 or more, got {step!r}"):
            save_checkpoint(tmp_path, model, step=step)
    with pytest.raises(ValueError, match="JSON can hold"):
        save_checkpoint(tmp_path, model, step=1, extra={"x": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []
    for number in (torch.tensor(3), numpy.int64(3)):
        path = save_checkpoint(tmp_path / "3", model, step=number, overwrite=True)
        assert path.name == "step-00000003"
        assert load_checkpoint(path, model).step == 3
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match="file is a file; checkpoints need a folder"):
        save_checkpoint(file, model, step=1)
    file.rename(tmp_path / "step-00000001")
    with pytest.raises(FileExistsError, match="step-00000001 is there already, and is a file"):
        save_checkpoint(tmp_path, model, step=1, overwrite=True)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        load_checkpoint(tmp_path / "nothing", model)
    assert load_checkpoint(tmp_path / "nothing", model, required=False) is None
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_what_dead_jobs_leave_is_removed_and_what_live_ones_write_is_not(tmp_path):
    dead = tmp_path / "step-00000001.0123456789ab.partial"
    live = tmp_path / "step-00000001.0123456789ac.partial"
    young = tmp_path / "step-00000001.0123456789ad.partial"
    old = tmp_path / "step-00000001.0123456789ae.partial"
    for path in (dead, live, young, old):
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(b"half")
    for path in (dead, live):
        (path / "writing.lock").touch()
    for path in (old, old / "__0_0.distcp"):
        os.utime(path, (time.time() - 7200,) * 2)
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(live / "writing.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        save_checkpoint(tmp_path, nn.Linear(4, 4), step=2)
        left = {path.name for path in tmp_path.iterdir()}
        other.stdin.close()
    assert left == {live.name, young.name, "step-00000002"}
    assert latest_checkpoint(tmp_path).name == "step-00000002"
    with pytest.raises(CheckpointError, match="was never finished"):
        load_checkpoint(live, nn.Linear(4, 4))


def test_a_failing_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_manifest, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(CheckpointError, match=r"rank 0 could not write .*halfbyte\.json: full"):
        save_checkpoint(tmp_path, nn.Linear(4, 4), step=2)
    assert list(tmp_path.iterdir()) == []


# ---- what extra may be


def test_keys_that_are_no_text(tmp_path):
    """What JSON makes of them is what the checksum is of."""
    model = nn.Linear(4, 4)
    cases: list[Any] = [{2: 1, 10: 1}, {1: 1, "b": 2}, {None: 1, "a": 2}, {1.5: 2, 10.25: 3}]
    for step, extra in enumerate([*cases, {True: {10: (1, 2), 9: 3}}]):
        path = save_checkpoint(tmp_path, model, step=step, extra=extra)
        found = load_checkpoint(path, model)
        assert found is not None
        assert found.extra == json.loads(json.dumps(extra))
    with pytest.raises(ValueError, match=r"two keys of a dictionary are the same text: \['1'\]"):
        save_checkpoint(tmp_path, model, step=9, extra={1: "a", "1": "b"})


def test_the_state_of_a_schedule(tmp_path):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 10])
    save_checkpoint(tmp_path, model, step=1, extra=schedule.state_dict())
    found = load_checkpoint(tmp_path, model)
    assert found is not None
    assert found.extra["milestones"] == {"2": 1, "10": 1}


# ---- keep


def test_keep_counts_whole_checkpoints(tmp_path):
    model = nn.Linear(4, 4)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, model, step=step)
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}" / "__0_0.distcp").unlink()
    save_checkpoint(tmp_path, model, step=4, keep=2)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    save_checkpoint(tmp_path, model, step=5, keep=2)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (4, 5)]


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_an_abandoned_branch_is_set_aside(tmp_path, keep):
    """No restart goes on from what is later than the last save."""
    model = nn.Linear(4, 4)
    for step in (1, 2, 4, 5):
        save_checkpoint(tmp_path, model, step=step)
    load_checkpoint(tmp_path / "step-00000002", model)
    with pytest.warns(UserWarning, match=r"saving step-00000003: set aside .*00005\.\w+\.a"):
        save_checkpoint(tmp_path, model, step=3, keep=keep)
    assert latest_checkpoint(tmp_path).name == "step-00000003"
    aside = [name for name in names(tmp_path) if name.endswith(".abandoned")]
    assert [name.partition(".")[0] for name in aside] == ["step-00000004", "step-00000005"]
    assert len(names(tmp_path)) == len(aside) + (keep or 3)
    assert load_checkpoint(tmp_path / aside[1], model).step == 5  # it is still there, by its path
    save_checkpoint(tmp_path, model, step=4)  # and its step is free
    assert latest_checkpoint(tmp_path).name == "step-00000004"


def test_a_broken_checkpoint_does_not_stop_the_run(tmp_path):
    model = nn.Linear(4, 4)
    for step in (1, 2):
        save_checkpoint(tmp_path, model, step=step)
    (tmp_path / "step-00000002" / "__0_0.distcp").unlink()
    with pytest.warns(UserWarning, match="passed over step-00000002"):
        assert load_checkpoint(tmp_path, model).step == 1
    with pytest.warns(UserWarning, match="saving step-00000002: set aside"):
        save_checkpoint(tmp_path, model, step=2)
    assert verify_checkpoint(latest_checkpoint(tmp_path))["step"] == 2


def test_a_folder_without_manifest_is_named(tmp_path):
    model = nn.Linear(4, 4)
    path = save_checkpoint(tmp_path, model, step=1)
    (path / _manifest.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000001/halfbyte\.json is missing"):
        load_checkpoint(path, model)


# ---- two jobs on one folder


def test_another_job_is_faster(tmp_path, monkeypatch):
    """What it has saved meanwhile is not replaced, and what it has removed is no error."""
    model = nn.Linear(4, 4)
    real = _manifest.write

    def write(*arguments: Any) -> None:
        monkeypatch.setattr(_manifest, "write", real)
        save_checkpoint(tmp_path, model, step=2, extra="the other")
        real(*arguments)

    monkeypatch.setattr(_manifest, "write", write)
    with pytest.raises(FileExistsError, match="step-00000002 is there already; overwrite=True"):
        save_checkpoint(tmp_path, model, step=2)
    assert names(tmp_path) == ["step-00000002"]
    assert load_checkpoint(tmp_path, model).extra == "the other"

    def both(path: pathlib.Path) -> list[pathlib.Path]:
        return [path / "step-00000001", *steps(path)]

    steps = _folder.steps
    monkeypatch.setattr(_folder, "steps", both)
    monkeypatch.setattr(_folder, "is_whole", lambda path: path.name != "step-00000003")
    save_checkpoint(tmp_path, model, step=3, keep=1)
    assert names(tmp_path) == ["step-00000003"]


# ---- a disk that fails


def limited(size: int, work: Any) -> str:
    """The sentence with which ``work`` fails when no file may have more than ``size`` bytes."""
    import resource  # POSIX

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        work()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    raise AssertionError("it was saved")


def test_what_could_not_be_written_is_named(tmp_path):
    large, small = nn.Linear(256, 256), nn.Linear(2, 2)
    for model, size, file in ((large, 100_000, "__0_0.distcp"), (small, 6000, "random-00000.pt")):
        text = limited(size, lambda model=model: save_checkpoint(tmp_path, model, step=1))
        start = f"rank 0 could not write {tmp_path / 'step-00000001.'}"
        assert text.startswith(start), text
        assert text.endswith(f".partial/{file}: File too large"), text
    assert names(tmp_path) == []


def on_ranks(rank: int, world: int, folder: str) -> str:
    model = nn.Linear(256, 256)
    with pytest.raises(ValueError, match="step must be the same on all ranks: rank 0 has 3, r"):
        save_checkpoint(folder, model, step=3 + rank)
    optimizer = None if rank else torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"optimizer must be .* rank 0 has one, rank 1 has none"):
        save_checkpoint(folder, model, optimizer, step=3)
    size = 100_000 if rank == 0 else 1 << 30  # of plain tensors rank 0 writes what is there
    return limited(size, lambda: save_checkpoint(folder, model, step=1))


def test_what_a_rank_could_not_write_is_named_by_all(tmp_path):
    texts = ranks.run(on_ranks, 2, folder=str(tmp_path))
    assert texts[0] == texts[1]
    assert texts[0].startswith("rank 0 could not write ")
    assert texts[0].endswith("__0_0.distcp: File too large")
    assert names(tmp_path) == []
