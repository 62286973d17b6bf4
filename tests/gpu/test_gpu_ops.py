"""Every op on the CUDA device, against the same op on the CPU."""

from __future__ import annotations

from typing import Any

import comparison
import pytest
import reference as ref
import test_experts_ops
import test_int8_ops
import test_ops
import test_ops_optim
import torch
from comparison import assert_alike, layouts, moved
from halfbyte import _ops, matmul_4bit
from halfbyte import functional as F

find = _ops.find

# Results that follow from one rounding at a time: equal in every byte (numerics.md). The others
# are sums, whose order a device chooses.
EXACT = ("quantize_", "dequantize_", "int8_vectorwise_", "int8_double_quant", "int8_linear_matmul")


def exact(name: str) -> bool:
    return name.startswith(EXACT) or (
        name.startswith("optimizer_") and not any(rule in name for rule in ("lamb", "lars"))
    )


def trimmed(op: Any) -> Any:
    """Of a list only the entries that count."""

    def call(*arguments: Any) -> list[torch.Tensor]:
        out, listed, count = op(*arguments)
        return [out, listed[: int(count)], count]

    call.of = op  # type: ignore[attr-defined]
    return call


def cases() -> dict[str, tuple[Any, tuple[Any, ...], bool]]:
    """The op, its arguments, and whether the results are exact."""
    made: dict[str, tuple[Any, tuple[Any, ...], bool]] = {}
    for name, given in (test_ops.cases() | test_int8_ops.cases()).items():
        op = trimmed(find(name)) if name.endswith(".listed") else find(name)
        made[name] = (op, given, exact(name))
    for name, listed in test_experts_ops.cases().items():
        for index, given in enumerate(listed):
            made[f"{name} {index}"] = (find(name), given, False)
    for name in test_ops_optim.cases():
        op, given = test_ops_optim.arguments(name)
        made[f"optimizer {name}"] = (op, given, exact(f"optimizer_{name}"))
    return made


CASES = cases()


def both(op: Any, given: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """The results, and the arguments afterwards, on the CUDA device and on the CPU."""
    out = []
    for device in ("cuda", "cpu"):
        arguments = moved(given, device)
        out.append([op(*arguments), arguments])
    return out[0], out[1]


@pytest.mark.parametrize("name", _ops._SCHEMAS)
def test_every_op_has_a_cuda_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"halfbyte::{name}", "CUDA")


@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_the_cpu(case):
    op, given, is_exact = CASES[case]
    got, want = both(op, given)
    assert_alike(got, want, exact=is_exact)


@pytest.mark.parametrize("case", CASES)
def test_any_layout(case):
    op, given, is_exact = CASES[case]
    _, want = both(op, given)
    for index, argument in enumerate(given):
        if not isinstance(argument, torch.Tensor) or argument.numel() == 0:
            continue
        for laid_out in layouts(moved(argument)):
            arguments = (*moved(given[:index]), laid_out, *moved(given[index + 1 :]))
            assert_alike([op(*arguments), list(arguments)], want, exact=is_exact)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("quant_type", ref.TYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_4_bit_codes(quant_type, blocksize, dtype, nested):
    for shape in [(64, 96), (5, 5), (1,), (1000,), (2, 4097), (0,), ()]:
        x = ref.samples(shape, dtype)
        states = []
        for a in (x.cuda(), x):
            packed, state = F.quantize_4bit(
                a, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
            )
            rest = [state.state2.absmax, state.state2.code, state.offset] if nested else []
            dense = F.dequantize_4bit(packed, state)
            states.append([packed, state.absmax, state.code, *rest, dense])
        assert_alike(*states, exact=True)


@pytest.mark.parametrize("storage", ref.STORAGES, ids=str)
def test_storages(storage):
    x = ref.samples((33, 31))
    got, want = (F.quantize_4bit(a, quant_storage=storage) for a in (x.cuda(), x))
    assert_alike(got[0], want[0], exact=True)
    assert_alike(F.dequantize_4bit(*got), F.dequantize_4bit(*want), exact=True)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_unusual_values(dtype):
    x = ref.samples((8, 64), dtype)
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), float("-inf")
    x[3], x[4] = 0, -0.0
    x[5] *= 1e-7 if dtype is torch.float16 else 1e-39
    for op, given in (
        ("quantize_4bit", (x, 64, "nf4", torch.uint8)),
        ("quantize_4bit", (x, 64, "fp4", torch.uint8)),
        ("quantize_blockwise", (x, F.create_dynamic_map(), 64)),
        ("int8_vectorwise_quant", (x, 0.0)),
        ("int8_vectorwise_quant", (x, 2.0)),
    ):
        got, want = both(find(op), given)
        assert_alike(got, want, exact=True)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1000,), (3, 5, 7), (1,), (0,), (257, 3)], ids=str)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_8_bit_codes(shape, dtype, blocksize):
    x = ref.samples(shape, dtype)
    code = F.create_dynamic_map()
    got, want = both(find("quantize_blockwise"), (x, code, blocksize))
    assert_alike(got, want, exact=True)
    codes, absmax = want[0]
    got, want = both(find("dequantize_blockwise"), (codes, absmax, code, blocksize, dtype))
    assert_alike(got, want, exact=True)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 9), (40,), (0,)], ids=str)
def test_4_bit_products_and_gradients(rows, nested, dtype):
    for n, k in [(64, 96), (33, 130)]:
        w = ref.samples((n, k))
        bias = ref.samples((n,), dtype, 3)
        results = []
        for device in ("cuda", "cpu"):
            packed, state = F.quantize_4bit(w.to(device), compress_statistics=nested)
            a = ref.samples((*rows, k), dtype, 1).to(device).requires_grad_()
            y = matmul_4bit(a, packed, state, bias=bias.to(device))
            y.backward(ref.samples((*rows, n), dtype, 2).to(device))
            results.append([y, a.grad])
        assert_alike(*results, exact=False)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 20)], ids=str)
def test_int8_products_and_gradients(rows, threshold, dtype):
    w = ref.samples((40, 96))
    results = []
    for device in ("cuda", "cpu"):
        codes, scales, _ = F.int8_vectorwise_quant(w.to(device))
        a = ref.samples((*rows, 96), dtype, 1)
        a[..., 7] = 20
        a = a.to(device).requires_grad_()
        y = find("int8_linear")(a, codes, scales, None, threshold)
        y.backward(ref.samples((*rows, 40), dtype, 2).to(device))
        results.append([y, a.grad])
    assert_alike(*results, exact=False)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", test_ops_optim.NAMES)
def test_optimizer_groups(name, bits):
    """Every rule over parameters of many sizes at once, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for device in ("cuda", "cpu"):
            sizes = test_ops_optim.SIZES
            p = [ref.samples(s, dtype, 7 + i).to(device) for i, s in enumerate(sizes)]
            g = [ref.samples(s, dtype, 70 + i).to(device) for i, s in enumerate(sizes)]
            states = [moved(test_ops_optim.states(name, s, bits), device) for s in sizes]
            with _codes_on(device):
                test_ops_optim.group(name, bits, g, p, states)
            results.append([p, states])
        assert_alike(*results, exact=exact(f"optimizer_{name}"))


class _codes_on:
    """Puts the codes that `test_ops_optim.group` passes on a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.codes = test_ops_optim.Q1, test_ops_optim.Q2
        test_ops_optim.Q1, test_ops_optim.Q2 = (code.to(self.device) for code in self.codes)

    def __exit__(self, *_: object) -> None:
        test_ops_optim.Q1, test_ops_optim.Q2 = self.codes


def test_more_elements_than_one_grid_of_blocks():
    x = ref.samples((70_001,))
    got, want = both(find("quantize_4bit"), (x, 32, "nf4", torch.uint8))
    assert_alike(got, want, exact=True)


# ---- what is refused -----------------------------------------------------------------------------

X = ref.samples((64, 96))


def _weight(device: torch.device) -> tuple[Any, Any]:
    return F.quantize_4bit(X.to(device))


REFUSED = {
    "blocksize": lambda d: F.quantize_4bit(X.to(d), blocksize=48),
    "quant_type": lambda d: F.quantize_4bit(X.to(d), quant_type="nf5"),
    "double": lambda d: F.quantize_4bit(X.to(d).double()),
    "integers": lambda d: F.int8_vectorwise_quant(X.to(d).long()),
    "few codes": lambda d: find("dequantize_4bit")(
        _weight(d)[0][:5], _weight(d)[1].absmax, 64, "nf4", [64, 96], torch.float32
    ),
    "few scales": lambda d: find("dequantize_4bit")(
        _weight(d)[0], _weight(d)[1].absmax[:5], 64, "nf4", [64, 96], torch.float32
    ),
    "columns": lambda d: matmul_4bit(torch.ones(3, 95, device=d), *_weight(d)),
    "bias": lambda d: matmul_4bit(
        torch.ones(3, 96, device=d), *_weight(d), bias=torch.ones(63, device=d)
    ),
    "out": lambda d: F.dequantize_4bit(*_weight(d), out=torch.empty(5, device=d)),
    "int32 columns": lambda d: F.int8_linear_matmul(
        torch.zeros(2, 5, dtype=torch.int8, device=d), torch.zeros(3, 4, dtype=torch.int8, device=d)
    ),
    "code": lambda d: F.quantize_blockwise(X.to(d), code=torch.ones(300, device=d)),
    "states": lambda d: F.optimizer_update_32bit(
        "adam", X.to(d), X.to(d).clone(), X.to(d)[:3].clone(), 0.9, 1e-8, 1, 1e-3, X.to(d).clone()
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_as_on_the_cpu(case):
    kind, text = comparison.failure(REFUSED[case], "cpu")
    assert comparison.failure(REFUSED[case], "cuda") == (kind, text)


def test_tensors_of_two_devices_are_refused():
    packed, state = _weight(torch.device("cuda"))
    message = r"must be on (the CPU|cuda:0) (like|as)|same device"
    for call in (
        lambda: matmul_4bit(torch.ones(3, 96), packed, state),
        lambda: find("dequantize_4bit")(
            packed, state.absmax.cpu(), 64, "nf4", [64, 96], torch.float32
        ),
        lambda: find("quantize_4bit.out")(X.cuda(), 64, "nf4", packed.cpu(), state.absmax),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()


def test_overlap_is_refused():
    packed, state = _weight(torch.device("cuda"))
    memory = torch.zeros(64 * 96, device="cuda")
    view = memory.view(torch.uint8)[: packed.numel()].view(packed.shape).copy_(packed)
    with pytest.raises((RuntimeError, ValueError), match="overlap"):
        F.dequantize_4bit(view, state, out=memory.view(64, 96))


def test_cases_cover_every_op():
    covered = {getattr(op, "of", op) for op, _, _ in CASES.values()}
    assert covered == {find(name) for name in _ops._SCHEMAS}
