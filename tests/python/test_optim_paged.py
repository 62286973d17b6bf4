"""Paged states: where they live, what they leave behind, and what a full disk does."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time

import optim_cases as cases
import pytest
import torch
from halfbyte import functional as F
from halfbyte import optim
from halfbyte.optim import _paged

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that paged states go to, and that is still empty afterwards."""
    monkeypatch.setenv("HALFBYTE_PAGED_DIR", str(tmp_path))
    yield tmp_path
    assert os.listdir(tmp_path) == []


def blocks(tensor: torch.Tensor) -> int:
    """Bytes on the disk of the file that holds a tensor."""
    arena, _ = _paged._find(tensor)
    return os.fstat(arena.file.fileno()).st_blocks * 512


def test_contents(folder):
    a = F.get_paged(3, 70000, device="cpu")
    b = F.get_paged(5, dtype=torch.uint8, device="cpu")
    assert a.is_paged
    assert b.is_paged
    assert a.page_deviceid is None
    assert (a.shape, a.dtype, a.is_contiguous()) == ((3, 70000), torch.float32, True)
    assert not a.any()
    assert not b.any()
    values = torch.arange(210000.0, device="cpu")
    a.copy_(values.view(3, -1))
    F.fill(b, 7)
    F.prefetch_tensor(a)
    F.prefetch_tensor(a, to_cpu=True)
    assert torch.equal(a.flatten(), values)
    assert b.tolist() == [7] * 5
    assert _paged.is_file_backed(a)
    assert _paged.is_file_backed(b)
    assert not _paged.is_file_backed(torch.zeros(5))
    assert a.data_ptr() % 4096 == 0
    assert b.data_ptr() % 4096 == 0
    assert os.listdir(folder) == []
    assert F.get_paged(0, 3, device="cpu").shape == (0, 3)


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match="CUDA and XPU devices, got device 'meta'"):
        F.get_paged(3, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"CUDA|cuda"):
            F.get_paged(3)
    with pytest.raises(AssertionError, match="only paged tensors"):
        F.prefetch_tensor(torch.zeros(3))


def test_space_is_given_back(folder):
    first = F.get_paged(1 << 20, device="cpu")
    second = F.get_paged(1 << 20, device="cpu")
    first.fill_(1)
    second.fill_(2)
    assert blocks(second) >= 8 << 20
    view = first[10:20]
    del first
    gc.collect()
    assert blocks(second) >= 8 << 20  # a view holds it
    assert view.tolist() == [1.0] * 10
    del view
    gc.collect()
    assert 4 << 20 <= blocks(second) < 5 << 20
    assert second.sum() == 2 << 20
    arenas = len(_paged._arenas)
    del second
    gc.collect()
    assert len(_paged._arenas) == arenas - 1


def test_few_files_for_many_tensors(folder):
    before = len(os.listdir("/proc/self/fd"))
    tensors = [F.get_paged(100_000, device="cpu") for _ in range(200)]
    assert len(os.listdir("/proc/self/fd")) - before <= 4
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    assert [t[-1].item() for t in tensors] == list(range(200))


def test_a_tensor_larger_than_an_arena(folder, monkeypatch):
    monkeypatch.setattr(_paged, "_ARENA_BYTES", 1 << 20)
    tensors = [F.get_paged(1 << 19, device="cpu") for _ in range(3)]
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    assert [t.sum().item() for t in tensors] == [0, 1 << 19, 2 << 19]


def test_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("HALFBYTE_PAGED_DIR", raising=False)
    usual = optim.paged_dir()
    assert os.path.isdir(usual)
    optim.set_paged_dir(tmp_path)
    try:
        assert optim.paged_dir() == str(tmp_path)
        tensor = F.get_paged(10, device="cpu")
        assert os.readlink(f"/proc/self/fd/{_paged._find(tensor)[0].file.fileno()}").startswith(
            str(tmp_path)
        )
        monkeypatch.setenv("HALFBYTE_PAGED_DIR", "/var/tmp")
        assert optim.paged_dir() == "/var/tmp"
    finally:
        optim.set_paged_dir(None)
    monkeypatch.delenv("HALFBYTE_PAGED_DIR")
    assert optim.paged_dir() == usual
    with pytest.raises(NotADirectoryError, match="existing folder"):
        optim.set_paged_dir(tmp_path / "none")


def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_PAGED_DIR", str(tmp_path / "none"))
    params = cases.parameters((300, 400))
    made = cases.make("PagedAdamW8bit", params)
    cases.set_grads(params, 0)
    with pytest.raises(FileNotFoundError, match=r"120,000 bytes .*none.*HALFBYTE_PAGED_DIR"):
        made.step()


def test_a_full_disk(folder, monkeypatch):
    held = F.get_paged(100_000, device="cpu").fill_(1)

    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    params = cases.parameters((300, 400))
    made = cases.make("PagedLion", params)
    cases.set_grads(params, 0)
    with pytest.raises(OSError, match=r"480,000 bytes .*No space left.*Make room") as caught:
        made.step()
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    monkeypatch.setenv("HALFBYTE_PAGED_DIR", str(folder))
    cases.train(made, params, range(1))  # and goes on when there is room
    assert held.sum() == 100_000


def test_file_systems_that_cannot_reserve(folder, monkeypatch):
    def unsupported(fd, offset, length):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    a, b = F.get_paged(600_000, device="cpu"), F.get_paged(10, device="cpu")
    assert blocks(b) >= 2_400_000
    assert not a.any()
    a.fill_(1)
    assert not b.any()


RUN = """
import sys, time
sys.path.insert(0, {here!r})
import optim_cases as cases
params = cases.parameters((300, 400), (700, 500), seed={seed})
made = cases.make("PagedAdamW8bit", params)
cases.train(made, params, range(3))
print([round(p.double().sum().item(), 6) for p in params], flush=True)
time.sleep(600)
"""


def test_two_processes_at_once_and_nothing_left_when_they_are_killed(folder):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RUN.format(here=HERE, seed=seed)],
            env=os.environ | {"HALFBYTE_PAGED_DIR": str(folder)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    try:
        for seed, child in zip((1, 2), children, strict=True):
            params = cases.parameters((300, 400), (700, 500), seed=seed)
            cases.train(cases.make("AdamW8bit", params), params, range(3))
            want = str([round(p.double().sum().item(), 6) for p in params])
            assert child.stdout.readline().strip() == want
            fds = f"/proc/{child.pid}/fd"
            assert any(str(folder) in os.readlink(f"{fds}/{fd}") for fd in os.listdir(fds))
        assert os.listdir(folder) == []  # the files have no name while they are in use
    finally:
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
    assert os.listdir(folder) == []


FORK_AND_FULL = """
import os, resource, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
import optim_cases as cases
from halfbyte import functional as F
params = cases.parameters((300, 400))
made = cases.make("PagedAdamW8bit", params)
cases.train(made, params, range(2))
state = made.state[params[0]]["state1"]
before = state.clone()
child = os.fork()
if child == 0:
    ok = torch.equal(state, before)
    cases.train(made, params, range(2, 4))
    ok &= not torch.equal(state, before)
    del state
    made.state.clear()  # must not empty the parent's file
    mine = F.get_paged(200_000, device="cpu").fill_(1)
    ok &= mine.sum().item() == 200_000
    os._exit(0 if ok else 1)
status = os.waitpid(child, 0)[1]
print(status, torch.equal(state, before))
cases.train(made, params, range(2, 4))
print(params[0].double().sum().item())

del made, state
resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20))
small = F.get_paged(1 << 20, device="cpu").fill_(3)
params = cases.parameters((2000, 1000))
made = cases.make("PagedAdamW", params)
cases.set_grads(params, 0)
try:
    made.step()
except OSError as error:
    print(type(error).__name__, error.errno, error)
print(small.sum().item())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on POSIX systems only")
def test_forked_children_and_limits_on_files(python, folder):
    """A child neither disturbs its parent nor empties its file; a limit is an error, no signal."""
    out = python(FORK_AND_FULL.format(here=HERE)).splitlines()
    assert out[0] == "0 True"
    params = cases.parameters((300, 400))
    cases.train(cases.make("AdamW8bit", params), params, range(4))
    assert float(out[1]) == params[0].double().sum().item()
    assert out[2].startswith(f"OSError {errno.EFBIG} ")
    assert "cannot reserve 8,000,000 bytes (0.01 GiB)" in out[2]
    assert str(folder) in out[2]
    assert "HALFBYTE_PAGED_DIR or set_paged_dir()" in out[2]
    assert out[3] == str(float(3 << 20))


@pytest.mark.parametrize("family", cases.PAGED)
@pytest.mark.parametrize("bits", ["", "8bit", "32bit"])
def test_paged_is_the_same_as_not(folder, family, bits):
    shapes = [(300, 400), (64, 80), (1000, 333)]
    a, b = cases.parameters(*shapes), cases.parameters(*shapes)
    paged = cases.make(f"Paged{family}{bits}", a)
    cases.train(paged, a, range(3))
    cases.train(cases.make(f"{family}{bits}", b), b, range(3))
    assert cases.equal(a, b)
    for p in a:
        for key in ("state1", "state2"):
            if key in paged.state[p]:
                large = p.numel() >= 100_000
                assert getattr(paged.state[p][key], "is_paged", False) is large
                assert cases.in_pages(paged.state[p][key]) is large
        paged.prefetch_state(p)


def test_is_paged_as_an_argument(folder):
    params = cases.parameters((300, 400))
    made = cases.make("Adam", params, is_paged=True)
    cases.train(made, params, range(1))
    assert cases.in_pages(made.state[params[0]]["state1"])


def test_states_die_with_their_optimizer(folder):
    params = cases.parameters((300, 400))
    made = cases.make("PagedAdamW8bit", params)
    manager = F.GlobalPageManager.get_instance()
    before = len(manager.paged_tensors)
    cases.train(made, params, range(1))
    assert len(manager.paged_tensors) == before + 2
    assert manager.paged_tensors[before].is_paged
    manager.prefetch_all()
    del made
    gc.collect()
    assert len(manager.paged_tensors) == before


def test_page_manager():
    manager = F.GlobalPageManager.get_instance()
    assert F.GlobalPageManager.get_instance() is manager
    with pytest.raises(RuntimeError, match=r"get_instance\(\)"):
        F.GlobalPageManager()


def test_pages_may_leave_memory(folder):
    """What the system does when memory is short, here asked for: contents come back."""
    import mmap

    params, plain = cases.parameters((1000, 1000)), cases.parameters((1000, 1000))
    made, other = cases.make("PagedAdamW", params), cases.make("AdamW", plain)
    for step in range(3):
        for optimizer, members in ((made, params), (other, plain)):
            cases.train(optimizer, members, range(step, step + 1))
        for arena in list(_paged._arenas):
            arena.map.flush()
            arena.map.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(arena.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert cases.equal(params, plain)


def test_nothing_slow_in_the_allocator(folder):
    start = time.perf_counter()
    tensors = [F.get_paged(1000, device="cpu") for _ in range(1000)]
    assert time.perf_counter() - start < 5
    assert len(tensors) == 1000
