"""The ops on torch's threads: any number of them, from any thread, and in forked children."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import reference as ref
import torch
from halfbyte import functional as F
from halfbyte import matmul_4bit, optim

W = ref.samples((1024, 1031))
A = ref.samples((3, 1031), seed=1)
PACKED, STATE = F.quantize_4bit(W, quant_type="nf4", compress_statistics=True)


@pytest.fixture(scope="module")
def torch_cpu() -> ctypes.CDLL:
    """libtorch, whose functions are called without the GIL."""
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    paths = [Path(torch.__file__).parent / "lib" / name for name in names]
    return ctypes.CDLL(str(next(path for path in paths if path.exists())))


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results() -> list[torch.Tensor]:
    """What ops of every kind make of the same input; each has work for many threads."""
    packed, state = F.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    codes, state8 = F.quantize_blockwise(W, blocksize=64)
    parameter = torch.nn.Parameter(W.clone())
    parameter.grad = W.square()
    optimizer = optim.AdamW8bit([parameter])
    optimizer.step()
    return [
        packed,
        state.absmax,
        F.dequantize_4bit(packed, state),
        codes,
        F.dequantize_blockwise(codes, state8),
        matmul_4bit(A, packed, state),
        parameter.detach(),
        optimizer.state[parameter]["state1"],
    ]


def differing(want: list[torch.Tensor], got: list[torch.Tensor]) -> list[int]:
    assert len(want) == len(got)
    return [i for i, (w, g) in enumerate(zip(want, got, strict=True)) if not torch.equal(w, g)]


@pytest.mark.usefixtures("torch_threads")
def test_results_do_not_depend_on_the_number_of_threads():
    torch.set_num_threads(1)
    want = results()
    for threads in (2, 3, 4, 16):  # 16: more than there are cores
        torch.set_num_threads(threads)
        for _ in range(2):
            assert differing(want, results()) == []


@pytest.mark.usefixtures("torch_threads")
def test_python_threads_at_once():
    torch.set_num_threads(2)
    want = results()
    wrong: list[str] = []

    def work(threads: int) -> None:
        torch.set_num_threads(threads)  # holds for this thread
        try:
            for _ in range(10):
                wrong.extend(f"{threads}: {i}" for i in differing(want, results()))
        except Exception as error:
            wrong.append(f"{threads}: {error!r}")

    running = [threading.Thread(target=work, args=(threads,)) for threads in (1, 2, 3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert wrong == []


def test_ops_inside_a_parallel_region_of_torch(torch_cpu):
    # As when a C++ extension calls an op from at::parallel_for: the op does all its work itself.
    want = F.dequantize_4bit(PACKED, STATE)
    wrong: list[str] = []
    ranges: list[tuple[int, int]] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def body(begin: int, end: int, _context: int | None) -> None:
        try:
            ranges.append((begin, end))
            for _ in range(begin, end):
                if not torch.equal(F.dequantize_4bit(PACKED, STATE), want):
                    wrong.append(f"{begin}..{end}")
        except Exception as error:
            wrong.append(repr(error))

    assert torch_cpu.torch_parallel_for(*map(ctypes.c_int64, (0, 8, 1)), body, None) == 0
    assert wrong == []
    assert sum(end - begin for begin, end in ranges) == 8


def test_an_op_leaves_no_trace_in_the_calling_thread(torch_cpu):
    index = ctypes.c_uint32(7)
    with torch.no_grad():
        F.dequantize_4bit(PACKED, STATE)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch_cpu.torch_get_thread_idx(ctypes.byref(index)) == 0
    assert index.value == 0
    # torch still runs in parallel: the region that the op was in has been left.
    ranges: list[tuple[int, int]] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def body(begin: int, end: int, _context: int | None) -> None:
        ranges.append((begin, end))

    torch_cpu.torch_parallel_for(*map(ctypes.c_int64, (0, 64, 1)), body, None)
    assert len(ranges) == min(64, torch.get_num_threads())


def test_gradients_on_a_thread_of_its_own():
    a = A.clone().requires_grad_()
    matmul_4bit(a, PACKED, STATE).sum().backward()
    again = A.clone().requires_grad_()
    loss = matmul_4bit(again, PACKED, STATE).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert again.grad is not None
    assert torch.equal(again.grad, a.grad)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_whose_threads_do_the_work(python):
    # One call, before which nothing ran in parallel (hence no zeros); then one in a child.
    out = python("""
import os, time, torch
from halfbyte import _ops
torch.set_num_threads(3)
packed, absmax = torch.empty(1 << 19, dtype=torch.uint8), torch.empty(1 << 14)

def threads():
    tasks = [f"/proc/self/task/{task}/comm" for task in os.listdir("/proc/self/task")]
    return [open(task).read().strip() for task in tasks]

def started(of_ours):
    before = threads()
    torch.ops.halfbyte.dequantize_4bit(packed, absmax, 64, "nf4", [1 << 20], torch.float32)
    # A thread names itself when it first runs, which may be after the call.
    deadline = time.monotonic() + 60
    while True:
        after = threads()
        named = sum(name.startswith("halfbyte-") for name in after)
        if named >= of_ours or time.monotonic() > deadline:
            return len(after) - len(before), named
        time.sleep(0.01)

print(*started(0), flush=True)
pid = os.fork()
if pid == 0:
    print(*started(2), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
""")
    assert out.splitlines() == ["2 0", "2 2"]


FORK = """
import os, signal, sys, torch
torch.set_num_threads(3)
x = torch.randn(1024, 1024)
{before}

def digest():
    from halfbyte import functional as F, matmul_4bit
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    y = matmul_4bit(x[:3], packed, state)
    return bytes(packed.numpy()) + bytes(F.dequantize_4bit(packed, state).numpy()), bytes(y.numpy())

def child(depth):
    signal.alarm(60)
    try:
        mine = digest()
        if depth:
            pid = os.fork()
            if pid == 0:
                child(depth - 1)
            assert os.waitpid(pid, 0)[1] == 0
            assert digest() == mine
        os.write(writer, str(hash(mine)).encode() + b"\\n")
        os._exit(0)
    except BaseException:
        os._exit(8)

reader, writer = os.pipe()
statuses = []
for depth in (0, 1):
    pid = os.fork()
    if pid == 0:
        child(depth)
    statuses.append(os.waitpid(pid, 0)[1])
os.close(writer)
assert statuses == [0, 0], statuses
got = os.read(reader, 10_000).split()
assert len(got) == 3, got
assert set(got) == {{str(hash(digest())).encode()}}
assert digest() == digest()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "before",
    [
        "import halfbyte",
        "import halfbyte; (x @ x).sum()",
        "from halfbyte import functional; functional.quantize_4bit(x, quant_type='nf4')",
        pytest.param(
            "(x @ x).exp().sum()",
            marks=pytest.mark.skipif(
                sys.platform != "linux", reason="only Linux tells of the fork"
            ),
        ),
    ],
    ids=["imported", "torch-used-threads", "ops-used-threads", "imported-in-the-child"],
)
def test_a_forked_child_does_not_wait_for_threads_of_its_parent(python, before):
    # PYTHONHASHSEED does not matter: children inherit the seed of their parent.
    python(FORK.format(before=before), timeout=200)
