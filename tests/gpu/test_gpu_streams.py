"""How the ops behave as guests of PyTorch on the device: streams, graphs, devices, no waiting."""

from __future__ import annotations

import re

import emulated
import pytest
import torch
from comparison import moved, same
from halfbyte import _ops, matmul_4bit, nn, optim
from halfbyte import functional as F
from test_gpu_ops import CASES

find = _ops.find

# The number of outliers is the size of a result, which the host must know.
WAITING = ("int8_vectorwise_quant", "int8_double_quant", "int8_linear.outliers")


def launches(lines: list[str]) -> list[dict[str, str]]:
    """The kernel launches of the emulated driver's log: name, stream and device."""
    pattern = re.compile(
        r"cuLaunchKernel (?P<name>\S+) stream=(?P<stream>\S+) device=(?P<device>\d+)"
    )
    return [match.groupdict() for line in lines if (match := pattern.match(line))]


def address(stream: str) -> int:
    return 0 if stream == "(nil)" else int(stream, 16)


@pytest.fixture
def weight() -> tuple[torch.Tensor, F.QuantState]:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    return F.quantize_4bit(x.cuda(), quant_type="nf4", compress_statistics=True)


@pytest.mark.emulator
@pytest.mark.parametrize("case", CASES)
def test_ops_run_on_the_current_stream(case, calls):
    op, given, _ = CASES[case]
    arguments = moved(given)
    stream = torch.cuda.Stream()
    calls()
    with torch.cuda.stream(stream):
        op(*arguments)
    seen = launches(calls())
    assert seen
    assert {address(launch["stream"]) for launch in seen} <= {stream.cuda_stream}


@pytest.mark.emulator
@pytest.mark.parametrize("case", CASES)
def test_ops_run_on_the_device_of_their_tensors(case, calls):
    op, given, _ = CASES[case]
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    arguments = moved(given, "cuda:1")
    calls()
    op(*arguments)
    assert {launch["device"] for launch in launches(calls())} == {"1"}
    assert torch.cuda.current_device() == 0


@pytest.mark.emulator
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(WAITING)])
def test_ops_neither_wait_nor_allocate(case, calls):
    """Outputs and scratch are PyTorch's tensors; the host is never waited for."""
    op, given, _ = CASES[case]
    op = getattr(op, "of", op)  # without what the case does to the results
    op(*moved(given))  # loads the module
    arguments = moved(given)
    before = emulated.waits()
    calls()
    op(*arguments)
    assert emulated.waits() == before
    others = [line for line in calls() if not line.startswith(("cuLaunchKernel", "cuMemset"))]
    assert others == []


@pytest.mark.emulator
def test_one_launch_steps_many_parameters(calls):
    params = [torch.nn.Parameter(torch.ones(300 + i, device="cuda")) for i in range(50)]
    optimizer = optim.AdamW8bit(params, min_8bit_size=1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    calls()
    optimizer.step()
    assert len(launches(calls())) == 1


def test_memory_may_be_freed_while_the_stream_runs(weight):
    """Results do not depend on temporaries that PyTorch's allocator gave away again."""
    packed, state = weight
    stream = torch.cuda.Stream()
    want = matmul_4bit(torch.ones(40, 96, device="cuda"), packed, state)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            a = torch.ones(96, 40, device="cuda").t()  # a copy is made of this layout
            got = matmul_4bit(a, packed, state)
            del a
            torch.full((40, 96), float("nan"), device="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(got, want)


GRAPHS = {
    "quantize": "F.quantize_4bit(x, compress_statistics=True)[0]",
    "dequantize": "F.dequantize_4bit(packed, state).mul_(x[0, 0])",
    "blockwise": "F.dequantize_blockwise(*F.quantize_blockwise(x))",
    "matmul": "halfbyte.matmul_4bit(x, packed, state, bias=bias)",
    "matmul of one row": "halfbyte.matmul_4bit(x[:1], packed, state)",
    "int8": "torch.ops.halfbyte.int8_linear(x, codes, scales, bias, 0.0)",
    "int8 with outliers": "torch.ops.halfbyte.int8_linear(x, codes, scales, bias, 1.5)",
    "int8 with a list": "torch.ops.halfbyte.int8_linear.listed(x, codes, scales, bias, 1.5)[2]",
}


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs(case, cuda_worker):
    """Captured once, replayed with other values in the same memory."""
    code = f"""
import halfbyte
from halfbyte import functional as F
g = torch.Generator().manual_seed(0)
w = torch.randn(64, 96, generator=g).cuda()
x, bias = torch.randn(40, 96, generator=g).cuda(), torch.randn(64, generator=g).cuda()
packed, state = F.quantize_4bit(w, compress_statistics=True)
codes, scales, _ = F.int8_vectorwise_quant(w)
def run():
    return {GRAPHS[case]}
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side), torch.no_grad():
    run()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph), torch.no_grad():
    y = run()
for seed in (1, 2):
    x.copy_(torch.randn(40, 96, generator=torch.Generator().manual_seed(seed)))
    graph.replay()
    torch.cuda.synchronize()
    want = run()
    assert y.shape == want.shape and y.dtype == want.dtype
    assert torch.equal(y, want), (y, want)
print("equal")
"""
    assert cuda_worker(code) == "equal\n"


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Lion8bit"])
def test_optimizer_steps_in_a_graph(name, cuda_worker):
    """The ops take the step's numbers by value: a replay repeats the captured step's."""
    code = f"""
from halfbyte import optim
def made():
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5000, generator=g).cuda())
    p.grad = torch.randn(5000, generator=g).cuda()
    o = optim.{name}([p], lr=1e-2)
    o.step()
    return p, o
p, o = made()
twin, other = made()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    o.step()
assert torch.equal(p, twin)
graph.replay()
other.step()
torch.cuda.synchronize()
assert torch.equal(p, twin)
print("equal")
"""
    assert cuda_worker(code) == "equal\n"


def test_a_layer_trains_in_a_graph(cuda_worker):
    code = """
from halfbyte import nn as hb
torch.manual_seed(0)
layer = hb.Linear4bit(96, 64, quant_type="nf4").cuda()
x = torch.randn(20, 96).cuda().requires_grad_()
def run():
    x.grad = None
    y = layer(x)
    y.square().sum().backward()
    return y
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    run()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
x.grad = None
with torch.cuda.graph(graph):
    y = layer(x)
    y.square().sum().backward()
captured = x.grad
with torch.no_grad():
    x.copy_(torch.randn(20, 96))
graph.replay()
torch.cuda.synchronize()
got = captured.clone()
want = run()
torch.testing.assert_close(y, want)
torch.testing.assert_close(got, x.grad)
print("equal")
"""
    assert cuda_worker(code) == "equal\n"


def test_backward_threads_have_the_device(weight):
    """Autograd calls the ops from a thread of its own, on the stream of the forward pass."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    packed, state = weight
    state = state.to("cuda:1") or state
    a = torch.ones(3, 96, device="cuda:1", requires_grad=True)
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream):
        y = matmul_4bit(a, packed.to("cuda:1"), state)
        y.sum().backward()
    stream.synchronize()
    dense = F.dequantize_4bit(packed.to("cuda:1"), state)
    torch.testing.assert_close(a.grad, dense.sum(0).expand(3, 96), rtol=1e-4, atol=1e-4)


# ---- processes -----------------------------------------------------------------------------------


def test_import_loads_no_cuda(python):
    code = (
        "import halfbyte, os\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('libcuda_emulated' in maps or 'libcuda.so' in maps)"
    )
    assert python(code) == "False\n"


def test_a_fork_may_use_the_cpu_and_is_refused_the_device(cuda_python):
    code = """
import os, sys
from halfbyte import functional as F
F.quantize_4bit(torch.ones(64, device='cuda'))
pid = os.fork()
if pid == 0:
    packed, state = F.quantize_4bit(torch.ones(64))
    print(F.dequantize_4bit(packed, state).sum().item())
    try:
        F.quantize_4bit(torch.ones(64, device='cuda'))
    except RuntimeError as error:
        print('forked subprocess' in str(error))
    sys.stdout.flush()
    os._exit(0)
os.waitpid(pid, 0)
"""
    assert cuda_python(code) == "64.0\nTrue\n"


BROKEN = {
    "missing": {"HALFBYTE_CUDA_DRIVER": "/nonexistent/libcuda.so.1"},
    "not a library": {"HALFBYTE_CUDA_DRIVER": "/etc/passwd"},
    "old": {"HALFBYTE_EMULATOR_DRIVER": "9000"},
    "failing": {"HALFBYTE_EMULATOR_FAIL": "cuInit=999"},
}


@pytest.mark.emulator
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_driver_is_explained_and_the_cpu_works(case, cuda_python):
    code = """
from halfbyte import functional as F
packed, state = F.quantize_4bit(torch.ones(64))
print(F.dequantize_4bit(packed, state).sum().item())
try:
    F.quantize_4bit(torch.ones(64, device='cuda'))
except Exception as error:
    print(type(error).__name__, error)
"""
    total, refusal = cuda_python(code, **BROKEN[case]).split("\n", 1)
    assert total == "64.0"
    assert re.match(r"(RuntimeError|NotImplementedError) .*(driver|CUDA|cuInit)", refusal), refusal


def test_the_backend_can_be_chosen(cuda_python):
    code = """
from halfbyte import functional as F
print(F.dequantize_4bit(*F.quantize_4bit(torch.ones(64))).sum().item())
try:
    F.quantize_4bit(torch.ones(64, device='cuda'))
except Exception as error:
    print(error)
"""
    total, refusal = cuda_python(code, HALFBYTE_BACKEND="cpu").split("\n", 1)
    assert total == "64.0"
    assert "HALFBYTE_BACKEND" in refusal


@pytest.mark.emulator
def test_asking_for_a_device_makes_no_context(cuda_python, tmp_path):
    """It would take hundreds of megabytes of the first device in every rank that asks."""
    log = tmp_path / "driver.log"
    log.touch()
    code = f"""
from halfbyte import functional as F
from halfbyte._load import native
print(F.lib.compiled_with_cuda, native.gpu_error("cuda", 0))
print("Retain" in open({str(log)!r}).read())
F.quantize_4bit(torch.ones(64, device="cuda"))
print("Retain" in open({str(log)!r}).read())
"""
    assert cuda_python(code, HALFBYTE_EMULATOR_LOG=str(log)) == "True None\nFalse\nTrue\n"


def test_out_of_memory_is_pytorchs_exception(cuda_worker):
    code = """
from halfbyte import functional as F
a = torch.zeros(1 << 23, 1, dtype=torch.int8, device="cuda")
try:
    F.int8_linear_matmul(a, a)  # 256 TiB
except torch.OutOfMemoryError as error:
    print("CUDA out of memory." in str(error), F.int8_linear_matmul(a[:2], a[:3]).shape)
"""
    assert cuda_worker(code) == "True torch.Size([2, 3])\n"


def test_the_command_explains_the_device(cuda_python):
    code = (
        "import runpy, sys; sys.argv = ['halfbyte']\n"
        "runpy.run_module('halfbyte', run_name='__main__')"
    )
    out = cuda_python(code)
    assert re.search(r"(?i)cuda", out)
    assert torch.cuda.get_device_name(0).split()[0] in out


# ---- what clients call by pointer ----------------------------------------------------------------


def test_library_functions_as_unsloth_calls_them(weight):
    """`functional.lib`: pointers, sizes and a stream; argument order in clients.md."""
    from ctypes import c_int, c_int32

    packed, state = weight
    lib, ptr = F.lib, F.get_ptr
    stream = F._get_tensor_stream(packed) if hasattr(F, "_get_tensor_stream") else None
    n = state.absmax.numel()
    scales = torch.empty(n, device="cuda")
    decode_scales = lib.cdequantize_blockwise_fp32
    decode_scales.restype = None
    decode_scales(
        ptr(state.state2.code), ptr(state.absmax), ptr(state.state2.absmax), ptr(scales),
        c_int(state.state2.blocksize), c_int(n), stream,
    )  # fmt: skip
    scales += state.offset
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        out = torch.empty(64, 96, dtype=dtype, device="cuda")
        getattr(lib, f"cdequantize_blockwise_{name}_nf4")(
            ptr(None), ptr(packed), ptr(scales), ptr(out), c_int(64), c_int(64 * 96), stream
        )
        state.dtype = dtype
        assert same(out, F.dequantize_4bit(packed, state).cpu())
        a = torch.randn(1, 96, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        y = torch.empty(1, 64, dtype=dtype, device="cuda")
        getattr(lib, f"cgemm_4bit_inference_naive_{name}")(
            c_int32(64), c_int32(1), c_int32(96), ptr(a), ptr(packed), ptr(scales),
            ptr(state.code), ptr(y), c_int32(64), c_int32(48), c_int32(64), c_int32(64), stream,
        )  # fmt: skip
        torch.testing.assert_close(y, matmul_4bit(a, packed, state), rtol=2e-2, atol=2e-2)


def test_the_library_says_that_it_has_a_device():
    from halfbyte.cextension import lib

    assert lib.compiled_with_cuda is True


def test_layers_of_two_devices_do_not_meet():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    layer = nn.Linear4bit(96, 64, quant_type="nf4").to("cuda:1")
    with pytest.raises((RuntimeError, ValueError), match="must be on cuda:0 as A is"):
        layer(torch.ones(2, 96, device="cuda:0"))
