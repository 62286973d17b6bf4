"""The stand-in for a GPU itself: PyTorch's CUDA tensors on the emulated runtime."""

from __future__ import annotations

import emulated
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.emulator


def test_devices_are_what_was_asked_for():
    assert [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())] == [
        (8, 0),
        (9, 0),
    ]
    assert torch.cuda.is_available()


def test_device_memory_is_new_and_ours():
    x = torch.empty(1000, device="cuda:1")
    assert x.isnan().all()
    assert emulated.runtime().halfbyte_emulated_device_of(x.data_ptr()) == 1
    assert emulated.alias(x).data_ptr() == x.data_ptr()


def test_kernels_of_pytorch_run_on_the_cpu_and_give_cuda_tensors():
    x = torch.randn(64, 32)
    y = (x.cuda() @ x.cuda().t()).softmax(-1)
    assert y.device == torch.device("cuda", 0)
    torch.testing.assert_close(y.cpu(), (x @ x.t()).softmax(-1))
    assert x.bfloat16().cuda().softmax(-1, dtype=torch.float32).dtype == torch.float32


def test_gradients_and_optimizers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 1))
    twin = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 1)).cuda()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(8, 32)
    for net, data in ((model, x), (twin, x.cuda())):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(3):
            net(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu())


def test_in_place_and_out():
    x = torch.arange(6.0, device="cuda").reshape(2, 3)
    assert x.t().mul_(2).data_ptr() == x.data_ptr()
    assert x.tolist() == [[0, 2, 4], [6, 8, 10]]
    out = torch.empty(0, device="cuda")
    assert torch.add(x, 1, out=out) is out
    assert out.tolist() == [[1, 3, 5], [7, 9, 11]]
    assert torch.sum(x, 0, out=out).shape == (3,)


def test_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(3, device="cuda") + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"cuda:0 and cuda:1|cuda:1 and cuda:0"):
        torch.ones(3, device="cuda:1") + torch.ones(3, device="cuda:0")
    assert (torch.ones(3, device="cuda") + torch.tensor(1.0)).tolist() == [2, 2, 2]


def test_random_numbers_follow_the_seed():
    draws = [torch.randn(4, device="cuda", generator=torch.Generator("cuda").manual_seed(s))
             for s in (1, 1, 2)]  # fmt: skip
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    generator = torch.Generator("cuda").manual_seed(1)
    first, second = (torch.randn(4, device="cuda", generator=generator) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("offset", [400, -5000], ids=["behind", "before"])
def test_memory_ends_where_it_ends(cuda_python, offset):
    """100 floats: 400 bytes. Without the caching allocator the next byte is a guard page's."""
    code = (
        "import ctypes; x = torch.zeros(100, device='cuda')\n"
        f"ctypes.c_char.from_address(x.data_ptr() + {offset}).value"
    )
    out = cuda_python(code, check=False, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert out.startswith("-11\n"), out


def test_bytes_beside_an_allocation_are_looked_at(cuda_python):
    code = (
        "import ctypes; x = torch.zeros(99, device='cuda'); print(x.data_ptr() % 16)\n"
        "ctypes.c_char.from_address(x.data_ptr() + 396).value = 1; sys.stdout.flush(); del x"
    )
    out = cuda_python(code, check=False, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert out.startswith("-6\n0\n"), out
    assert "byte 396 of an allocation of 396 bytes was written" in out


def test_a_kernel_that_was_not_replaced_is_named(cuda_python):
    code = (
        "del emulated._library\n"
        "emulated._library = None\n"
        "import gc; gc.collect()\n"
        "try:\n    torch.ones(3, device='cuda') + 1\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    assert "cannot run PyTorch's own kernels" in cuda_python(code)


def test_graphs_record_and_repeat(cuda_worker):
    code = """
x = torch.arange(4.0, device='cuda')
total = torch.zeros(4, device='cuda')
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x * 2 + 1
    total.add_(y)
print(total.tolist())
graph.replay()
x.fill_(10)
graph.replay()
print(y.tolist(), total.tolist())
"""
    lines = cuda_worker(code).splitlines()
    assert lines == [
        "[0.0, 0.0, 0.0, 0.0]",
        "[21.0, 21.0, 21.0, 21.0] [22.0, 24.0, 26.0, 28.0]",
    ]


def test_a_capture_refuses_to_wait(cuda_worker):
    code = """
x = torch.ones(4, device='cuda')
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
except RuntimeError as error:
    print(error)
print((x + 1).tolist())
"""
    out = cuda_worker(code)
    assert "capture" in out
    assert out.endswith("[2.0, 2.0, 2.0, 2.0]\n")
