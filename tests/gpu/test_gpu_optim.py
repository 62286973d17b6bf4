"""Optimizers on the CUDA device: steps, state dicts between devices, paged states."""

from __future__ import annotations

import io

import optim_cases as cases
import pytest
import torch
from comparison import CLOSE, moved, tensors
from halfbyte import functional as F
from halfbyte import optim
from halfbyte._load import native
from torch import nn

SHAPES = [(64, 80), (7, 3), (300, 33)]
NORMS = ("LAMB", "LARS")  # their norms are sums, whose order a device chooses


def trained(name: str, device: str, steps: range = range(3), dtype=torch.float32, **more):
    params = [nn.Parameter(p.detach().to(device)) for p in cases.parameters(*SHAPES, dtype=dtype)]
    made = cases.make(name, params, **more)
    train(made, params, steps)
    return made, params


def train(optimizer, params, steps: range) -> None:
    for step in steps:
        grads = cases.parameters(*SHAPES, dtype=params[0].dtype, seed=100 + step)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.detach().to(p.device)
        optimizer.step()


def assert_same_run(name: str, got: list[nn.Parameter], want: list[nn.Parameter]) -> None:
    for a, b in zip(got, want, strict=True):
        if any(norm in name for norm in NORMS):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=CLOSE[a.dtype])
        else:
            assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("name", cases.NAMES)
def test_steps_are_those_of_the_cpu(name):
    made, got = trained(name, "cuda")
    other, want = trained(name, "cpu")
    assert_same_run(name, got, want)
    for p, q in zip(got, want, strict=True):
        for key, value in other.state[q].items():
            if isinstance(value, torch.Tensor) and not any(norm in name for norm in NORMS):
                assert torch.equal(made.state[p][key].cpu(), value), key


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix32bit"])
def test_bfloat16_parameters(name):
    _, got = trained(name, "cuda", dtype=torch.bfloat16)
    _, want = trained(name, "cpu", dtype=torch.bfloat16)
    assert_same_run(name, got, want)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
def test_rounding_of_bfloat16(name, rounding):
    more = {"rounding": rounding}
    _, got = trained(name, "cuda", dtype=torch.bfloat16, **more)
    _, want = trained(name, "cpu", dtype=torch.bfloat16, **more)
    assert_same_run(name, got, want)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "PagedAdamW8bit"])
def test_state_dicts_cross_devices(name, source, target):
    made, params = trained(name, source)
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    twins = [nn.Parameter(p.detach().to(target)) for p in params]
    again = cases.make(name, twins)
    again.load_state_dict(torch.load(buffer, weights_only=True, map_location=target))
    train(made, params, range(3, 5))
    train(again, twins, range(3, 5))
    assert_same_run(name, twins, params)
    for p in twins:
        for tensor in tensors(again.state[p]):
            assert tensor.device.type == target or "Paged" in name


def test_parameters_on_several_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    params = cases.parameters(*SHAPES)
    devices = ["cpu", "cuda:1", "cuda:0"]
    mixed = [nn.Parameter(p.detach().to(d)) for p, d in zip(params, devices, strict=True)]
    optimizer = optim.AdamW8bit(mixed, lr=1e-2)
    train(optimizer, mixed, range(3))
    _, want = trained("AdamW8bit", "cpu")
    assert_same_run("AdamW8bit", mixed, want)
    for p, device in zip(mixed, devices, strict=True):
        assert {t.device for t in tensors(optimizer.state[p])} == {torch.device(device)}


def test_overrides():
    params = [nn.Parameter(p.detach().cuda()) for p in cases.parameters((64, 80), (64, 80))]
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    manager.register_parameters(params)
    manager.override_config(params[0], "optim_bits", 32)
    optimizer = optim.AdamW(params, optim_bits=8)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[params[0]]["state1"].dtype == torch.float32
    assert optimizer.state[params[1]]["state1"].dtype == torch.uint8
    manager.initialize()


def test_paged_memory():
    a = F.get_paged(3, 70_000, device=torch.device("cuda", 0))
    assert a.is_cuda
    assert a.is_paged
    assert a.shape == (3, 70_000)
    assert not a.any()
    F.fill(a, 7)
    F.prefetch_tensor(a)
    F.prefetch_tensor(a, to_cpu=True)
    torch.cuda.synchronize()
    assert (a == 7).all()
    b = a.clone()
    assert torch.equal(b, a)


@pytest.mark.emulator
def test_paged_states_are_managed_memory(calls):
    """Of a parameter that is large enough to be paged."""
    p = nn.Parameter(torch.ones(100_001, device="cuda"))
    optimizer = optim.PagedAdamW8bit([p], lr=0.1)
    p.grad = torch.ones_like(p)
    calls()
    optimizer.step()
    assert any(line.startswith("cuMemAllocManaged") for line in calls())
    assert optimizer.state[p]["state1"].is_cuda
    assert optimizer.state[p]["state1"].is_paged
    optimizer.step()
    assert not any(line.startswith("cuMemAlloc") for line in calls())
    assert (p < 1).all()


def test_a_gpu_without_managed_memory_pages_nothing(monkeypatch):
    """Windows and WSL: states are ordinary tensors, and a warning says so."""

    def refuse(*_: object) -> None:
        raise NotImplementedError("CUDA cannot share pages")

    def stepped(make) -> torch.Tensor:
        p = nn.Parameter(torch.ones(100_001, device="cuda"))
        p.grad = torch.linspace(-1, 1, p.numel(), device="cuda")
        optimizer = make([p], lr=0.1)
        optimizer.step()
        again = make([p], lr=0.1)
        again.load_state_dict(optimizer.state_dict())
        assert not any(getattr(s, "is_paged", False) for s in again.state[p].values())
        again.step()
        return p.detach()

    want = stepped(optim.AdamW8bit)
    monkeypatch.setattr(native, "managed_zeros", refuse)
    with pytest.warns(RuntimeWarning, match="cuda:0 instead of in paged memory: CUDA cannot"):
        got = stepped(optim.PagedAdamW8bit)
    assert torch.equal(got, want)


@pytest.mark.emulator
@pytest.mark.parametrize("code", [1, 101, 801])
def test_a_refused_prefetch_is_no_error(cuda_python, code):
    """Virtual GPUs and sandboxes move pages only when they are touched."""
    run = """
from halfbyte import functional as F, optim
p = torch.nn.Parameter(torch.ones(100_001, device="cuda"))
p.grad = torch.ones_like(p)
optimizer = optim.PagedAdamW8bit([p], lr=0.1)
optimizer.step()
optimizer.step()
assert optimizer.state[p]["state1"].is_paged
F.prefetch_tensor(optimizer.state[p]["state1"], to_cpu=True)
print(bool((p < 1).all()))
"""
    assert cuda_python(run, HALFBYTE_EMULATOR_FAIL=f"cuMemPrefetchAsync={code}") == "True\n"


@pytest.mark.emulator
def test_nothing_is_prefetched_in_a_graph(cuda_python, tmp_path):
    """A graph cannot hold the driver's prefetch, which would end the capture."""
    log = tmp_path / "driver.log"
    code = f"""
from halfbyte import optim
from halfbyte._load import native
log = open({str(log)!r})
p = torch.nn.Parameter(torch.ones(100_001, device="cuda"))
p.grad = torch.ones_like(p)
optimizer = optim.PagedLion8bit([p], lr=0.1)
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    optimizer.step()
torch.cuda.synchronize()
print("cuMemPrefetchAsync" in log.read())
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    optimizer.step()
print("cuMemPrefetchAsync" in log.read())
before = p.detach().clone()
graph.replay()
torch.cuda.synchronize()
print(bool((p < before).all()))
"""
    log.touch()
    assert cuda_python(code, HALFBYTE_EMULATOR_LOG=str(log)) == "True\nFalse\nTrue\n"


def test_gradients_of_inf_and_nan_leave_an_element_alone():
    p = nn.Parameter(torch.ones(4096, device="cuda"))
    optimizer = optim.Adam8bit([p], lr=0.1)
    p.grad = torch.ones_like(p)
    p.grad[3], p.grad[5] = float("nan"), float("inf")
    optimizer.step()
    assert p[3] == p[5] == 1
    assert p.isfinite().all()
    assert moved(p.detach(), "cpu")[0] < 1
