"""What must not happen: a crash, a leak, a deadlock, another thread's error."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
import reference as ref
import torch
from halfbyte import functional as F
from halfbyte import matmul_4bit

PACKED, STATE = F.quantize_4bit(ref.samples((64, 96)), quant_type="nf4", compress_statistics=True)


def test_errors_of_many_threads_stay_apart():
    wrong: list[str] = []

    def work(number: int) -> None:
        for i in range(300):
            n = 100 * number + i % 50
            try:
                F.dequantize_4bit(PACKED[:n], STATE)
            except ValueError as error:
                if not str(error).endswith(f"got {n}"):
                    wrong.append(f"{n}: {error}")
            else:
                wrong.append(f"{n}: no error")
            if F.dequantize_4bit(PACKED, STATE).shape != (64, 96):
                wrong.append("shape")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_results_of_many_threads_are_right():
    inputs = [ref.samples((513, 257), seed=seed) for seed in range(6)]
    want = [F.quantize_4bit(x, quant_type="nf4")[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(F.quantize_4bit(inputs[i], quant_type="nf4")[0], want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_works(python):
    # In a process of its own: the parent has used several threads, the child must start new ones.
    out = python("""
import os, signal, sys, torch
from halfbyte import functional as F, matmul_4bit
torch.set_num_threads(3)
x = torch.randn(1024, 1030)
packed, state = F.quantize_4bit(x, quant_type="nf4")
a = torch.randn(3, 1030)
y = matmul_4bit(a, packed, state)
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            again, s = F.quantize_4bit(x, quant_type="nf4")
            ok = bytes(again.numpy()) == bytes(packed.numpy())
            ok = ok and bytes(matmul_4bit(a, again, s).numpy()) == bytes(y.numpy())
            try:
                F.dequantize_4bit(packed[:3], state)
                ok = False
            except ValueError:
                pass
            os._exit(0 if ok else 7)
        except BaseException:
            os._exit(8)
    children.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
again = F.quantize_4bit(x, quant_type="nf4")[0]
assert torch.equal(again, packed)
""")
    assert out.strip() == "[0, 0, 0]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_calls_leak_nothing(python):
    python("""
import torch
from halfbyte import functional as F, matmul_4bit
torch.set_num_threads(1)
x = torch.randn(16, 64)
packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
plain, plain_state = F.quantize_4bit(x, quant_type="fp4", quant_storage=torch.bfloat16)
q, state8 = F.quantize_blockwise(x, blocksize=64)
a = torch.randn(2, 64, requires_grad=True)
strided = torch.randn(64, 16).t()
out = torch.empty(16, 64)
bias = torch.ones(16)

def calls():
    F.quantize_4bit(strided, quant_type="nf4", compress_statistics=True)
    F.dequantize_4bit(packed, state)
    F.dequantize_4bit(plain, plain_state, out=out)
    F.quantize_blockwise(x, blocksize=64, nested=True)
    F.dequantize_blockwise(q, state8)
    matmul_4bit(a, packed, state, bias=bias).sum().backward()
    torch.ops.halfbyte.gemm_4bit(x, plain, [16, 64], plain_state.absmax, 64, "fp4", bias)
    for bad in (lambda: F.dequantize_4bit(packed[:3], state),
                lambda: F.quantize_4bit(x, blocksize=33),
                lambda: matmul_4bit(x[:, :3], packed, state, bias=bias)):
        try:
            bad()
        except ValueError:
            pass
        else:
            raise AssertionError

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

for _ in range(1000):
    calls()
before = resident()
for _ in range(10_000):
    calls()
grown = resident() - before
# 10,000 calls that lost the smallest tensor handle each would lose more.
assert grown < 1_000_000, grown
""")


GARBAGE = """
import random, torch, faulthandler, warnings
faulthandler.enable()
warnings.simplefilter("ignore")
import halfbyte
from halfbyte import functional as F, _ops, matmul_4bit

rng = random.Random({seed})
torch.manual_seed({seed})
dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int64,
          torch.float64, torch.bool, torch.complex64]

def size():
    return rng.choice([0, 1, 2, 3, 7, 16, 31, 32, 33, 64, 96, 255, 256, 257])

def tensor():
    dtype = rng.choice(dtypes[:4]) if rng.random() < 0.8 else rng.choice(dtypes)
    shape = [size() for _ in range(rng.randint(0, 3))]
    t = (torch.randn(shape) * 10).to(dtype)
    kind = rng.randint(0, 9)
    if kind == 0 and t.dim():
        t = t.transpose(0, -1)
    elif kind == 1 and t.dim():
        t = t[..., ::2]
    elif kind == 2:
        t = t.expand(2, *t.shape)
    elif kind == 3:
        t.untyped_storage().resize_(rng.choice([0, 1, t.untyped_storage().nbytes() // 2]))
    elif kind == 4 and rng.random() < 0.3:
        t = t.to("meta")
    elif kind == 5 and rng.random() < 0.3:
        t = t.to_sparse() if dtype.is_floating_point else t
    return t

def integer():
    return rng.choice([0, 1, -1, 32, 64, 64, 64, 256, 256, 4096, 48, 2**31, 2**63 - 1, -2**63])

def string():
    return rng.choice(["nf4", "fp4", "nf4", "fp4", "adam", "lion", "", "x" * 100, "nf\\0", "é"])

def shape():
    values = [0, 1, 2, 32, 64, 96, 257, -1, 2**31, 2**62, 2**63 - 1]
    n = rng.choice([0, 1, 2, 2, 2, 3, 9])
    return [rng.choice(values[:7] if rng.random() < 0.7 else values) for _ in range(n)]

def argument(kind):
    if rng.random() < 0.02:
        # Not tensor(): torch prints what it does not take, and crashes over freed memory.
        return rng.choice([None, "x", 3, 2.5, [], object(), torch.ones(3)])
    if kind == "Tensor":
        return tensor()
    if kind == "Optional[Tensor]":
        return None if rng.random() < 0.5 else tensor()
    if kind == "int":
        # ScalarType is an int to the schema as well.
        return integer()
    if kind == "str":
        return string()
    if kind == "List[int]":
        return shape()
    if kind == "List[Tensor]":
        return [tensor() for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    if kind == "float":
        return rng.choice([0.0, 0.9, 0.999, 1.0, -1.0, 1e-8, 1e300, float("inf"), float("nan")])
    if kind == "bool":
        return rng.random() < 0.5
    raise AssertionError(kind)

def step():
    # Arguments of an optimizer's step that would do, but for up to two of them.
    names = ["adam", "lamb", "momentum", "lars", "rmsprop", "adagrad", "lion", "ademamix"]
    name = rng.choice(names)
    op = rng.choice(["optimizer_update_32bit", "optimizer_update_8bit_blockwise"])
    many, parts = rng.random() < 0.7, 2 if name == "ademamix" else 1
    sizes = [size() for _ in range(rng.randint(1, 4) if many else 1)]
    two, eight = name in ("adam", "lamb", "ademamix"), "8bit" in op
    def state(parts, n):
        return torch.randint(0, 256, (parts, n)).byte() if eight else torch.rand(parts, n)
    given = {{
        "optimizer_name": name,
        "p": [torch.randn(n).to(rng.choice(dtypes[:3])) for n in sizes],
        "g": [torch.randn(n).to(rng.choice(dtypes[:3])) for n in sizes],
        "state1": [state(parts, n) for n in sizes],
        "state2": [state(1, n) for n in sizes] if two else [],
        "absmax1": [torch.rand(parts, -(-n // 256)) for n in sizes],
        "absmax2": [torch.rand(-(-n // 256)) for n in sizes] if two else [],
        "unorm_vec": [torch.rand(1) for n in sizes],
        "compensation": [], "step": rng.randint(1, 9),
        "streams": rng.choice([[], list(range(len(sizes)))]),
        "qmap1": F.create_dynamic_map(True), "qmap2": F.create_dynamic_map(False),
    }}
    op = getattr(getattr(_ops.ops, op), "group" if many else "default")
    spoiled = rng.sample(range(len(op._schema.arguments)), rng.choice([0, 0, 1, 2]))
    args = []
    for i, a in enumerate(op._schema.arguments):
        kind = str(a.type)
        value = given.get(a.name)
        if i in spoiled or value is None:
            value = argument(kind)
            if kind == "List[Tensor]" and rng.random() < 0.7:
                value = (given[a.name] + [tensor()])[-max(1, len(given[a.name])):]
        elif isinstance(value, list) and "List" not in kind:
            value = value[0] if value else None
        args.append(value)
    return op, args

fine = 0
expected = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, OverflowError,
            AttributeError)  # the last for None instead of a tensor, by fakes
names = list(_ops._SCHEMAS)
steps = 0
for trial in range({trials}):
    if trial % 3 == 1:
        op, args = step()
        try:
            op(*args)
            steps += 1
        except expected:
            pass
        continue
    if trial % 3:
        name = rng.choice(names)
        packet, _, overload = name.partition(".")
        op = getattr(getattr(_ops.ops, packet), overload or "default")
        args = []
        for a in op._schema.arguments:
            if a.name in ("dtype", "quant_storage"):
                args.append(rng.choice(dtypes))
            else:
                args.append(argument(str(a.type)))
        call = lambda: op(*args)
    else:
        x = tensor()
        try:
            packed, state = F.quantize_4bit(
                x, blocksize=rng.choice([32, 64, 128]), quant_type=rng.choice(["nf4", "fp4"]),
                compress_statistics=rng.random() < 0.5, quant_storage=rng.choice(dtypes[:7]))
        except expected:
            continue
        for _ in range(rng.randint(0, 2)):
            name = rng.choice(["absmax", "shape", "code", "dtype", "blocksize", "offset"])
            value = {{"absmax": tensor, "shape": shape, "code": tensor, "offset": tensor,
                     "dtype": lambda: rng.choice(dtypes), "blocksize": integer}}[name]()
            setattr(state, name, value)
            if state.state2 is not None and rng.random() < 0.3:
                state.state2.absmax = tensor()
        if rng.random() < 0.2:
            packed = tensor()
        out = tensor() if rng.random() < 0.3 else None
        if rng.random() < 0.5:
            call = lambda: F.dequantize_4bit(packed, state, out=out)
        else:
            call = lambda: matmul_4bit(tensor(), packed, state, out=out)
    try:
        call()
        fine += 1
    except expected:
        pass
print(fine, steps)
"""


@pytest.mark.parametrize("seed", range(2))
def test_garbage_never_crashes(python, seed):
    out = python(GARBAGE.format(seed=seed, trials=1500))
    fine, steps = map(int, out.split())
    assert fine > 20  # some of it is not garbage
    assert steps > 100


def test_a_keyboard_interrupt_is_not_lost():
    # Ops run without the GIL and leave signals alone.
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)

    def work() -> None:
        while True:
            matmul_4bit(torch.ones(1, 96), PACKED, STATE)

    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGALRM, previous)
