"""What GPUs run for layers of experts, on CPU tensors: composed of ops that the CPU has too."""

from __future__ import annotations

import halfbyte.functional as F
import pytest
import torch
from halfbyte import _ops_experts_gpu as gpu
from halfbyte._ops import ops

EXPERTS, TOKENS, SLOTS = 5, 11, 3


def routes(seed: int = 0) -> torch.Tensor:
    """Expert 2 gets no row; some slots have no expert."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, EXPERTS + 1, (TOKENS, SLOTS), generator=generator)
    return torch.where(ids == 2, EXPERTS, ids)


def inputs(each: bool, features: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (TOKENS, SLOTS, features) if each else (TOKENS, features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def weight4(n: int, k: int, nested: bool, storage: torch.dtype, blocksize: int = 64):
    """Every expert with blocks of its own, padded with zeros to whole ones."""
    numel = n * k
    blocks = -(-numel // blocksize)
    flat = torch.zeros(EXPERTS, blocks * blocksize)
    flat[:, :numel] = torch.randn(EXPERTS, numel, generator=torch.Generator().manual_seed(2))
    packed, state = F.quantize_4bit(
        flat,
        quant_type="nf4",
        blocksize=blocksize,
        compress_statistics=nested,
        quant_storage=storage,
    )
    nested_state = (None, None, None, 256)
    if nested:
        second = state.state2
        nested_state = (second.absmax, second.code, state.offset, second.blocksize)
    return (packed, state.absmax, blocksize, "nf4", [EXPERTS, n, k]), (None, *nested_state)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (7, 33)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_4bit(each, nested, n, k, storage):
    weight, state = weight4(n, k, nested, storage)
    ids, bias = routes(), torch.randn(EXPERTS, n)
    x = inputs(each, k, torch.float32)
    expected = ops.experts_matmul_4bit.default(x, *weight, ids, bias, *state)
    got = gpu.KERNELS["experts_matmul_4bit"](x, *weight, ids, bias, *state)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert got[ids == EXPERTS].eq(0).all()

    grad = inputs(True, n, torch.float32)
    for shared in (False, True):
        expected = ops.experts_matmul_4bit_grad_input.default(grad, *weight, ids, shared, *state)
        got = gpu.KERNELS["experts_matmul_4bit_grad_input"](grad, *weight, ids, shared, *state)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_8bit(each, threshold):
    n, k = 16, 40
    codes, scales, _ = ops.int8_vectorwise_quant.default(
        torch.randn(EXPERTS * n, k, generator=torch.Generator().manual_seed(3)), 0.0
    )
    CB, SCB = codes.view(EXPERTS, n, k), scales.view(EXPERTS, n)
    ids, bias = routes(1), torch.randn(EXPERTS, n)
    x = inputs(each, k, torch.bfloat16)
    expected = ops.experts_matmul_8bit.default(x, CB, SCB, ids, bias, threshold)
    got = gpu.KERNELS["experts_matmul_8bit"](x, CB, SCB, ids, bias, threshold)
    assert torch.equal(got, expected)

    grad = inputs(True, n, torch.float32)
    for shared in (False, True):
        expected = ops.experts_matmul_8bit_grad_input.default(grad, CB, SCB, ids, shared)
        got = gpu.KERNELS["experts_matmul_8bit_grad_input"](grad, CB, SCB, ids, shared)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("worst", "got"), [(-1, -1), (EXPERTS + 1, EXPERTS + 1)])
def test_ids_out_of_range(worst, got):
    weight, state = weight4(8, 64, False, torch.uint8)
    ids = routes()
    ids[3, 1] = worst
    with pytest.raises(ValueError, match=rf"means no expert\), got {got} for token 3, slot 1"):
        gpu.KERNELS["experts_matmul_4bit"](
            inputs(False, 64, torch.float32), *weight, ids, None, *state
        )


def test_no_rows():
    weight, state = weight4(8, 64, True, torch.uint8)
    ids = torch.empty((0, 2), dtype=torch.int64)
    out = gpu.KERNELS["experts_matmul_4bit"](torch.empty(0, 64), *weight, ids, None, *state)
    assert out.shape == (0, 2, 8)


def test_every_expert_op_has_kernels_for_gpus():
    for name in gpu.KERNELS:
        for key in ("CPU", *gpu.KEYS):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"halfbyte::{name}", key), name


def test_every_op_has_kernels_for_every_device():
    names = [
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("halfbyte::")
    ]
    assert len(names) > 30
    for name in names:
        for key in ("CPU", "CUDA", "XPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
