"""The same call on the CPU and on the CUDA device, and how alike the results must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda")

# Of sums whose order a device chooses: relative to the largest magnitude of the result.
CLOSE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-9}


def moved(value: Any, device: torch.device | str = CUDA) -> Any:
    """Copies of all tensors in `value` on `device`, with their strides and `requires_grad`."""

    def move(tensor: Tensor) -> Tensor:
        copy = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
        )
        return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, move, value)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def same(got: Tensor, want: Tensor) -> bool:
    """Whether a CUDA tensor holds the bytes, the dtype and the shape of a CPU tensor."""
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (got, want))
    return got.is_cuda and got.dtype == want.dtype and got.shape == want.shape and torch.equal(a, b)


def assert_alike(got: Any, want: Any, *, exact: bool) -> None:
    """Compares results of the CUDA device to those of the CPU: every byte, or closely."""
    left, right = tensors(got), tensors(want)
    assert len(left) == len(right)
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.is_cuda, f"result {index} is on {a.device}"
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"result {index}"
        if exact or not b.is_floating_point():
            assert same(a, b), f"result {index} differs: {a.cpu()} and {b}"
        elif b.numel():
            largest = max(1e-30, float(b.detach().abs().nan_to_num(0, 0, 0).max()))
            torch.testing.assert_close(
                a.detach().cpu(), b.detach(), rtol=0, atol=CLOSE[b.dtype] * largest, equal_nan=True
            )


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same values in other places: transposed, with gaps, beside other data, unaligned."""
    device = tensor.device
    if tensor.dim() == 2:
        yield tensor.t().contiguous().t()
        rows, columns = tensor.shape
        wide = torch.zeros(rows, 2 * columns, dtype=tensor.dtype, device=device)
        wide[:, ::2] = tensor
        yield wide[:, ::2]
        apart = torch.zeros(rows + 1, columns + 3, dtype=tensor.dtype, device=device)
        apart[1:, 1:-2] = tensor
        yield apart[1:, 1:-2]
    if tensor.dim() >= 1:
        shifted = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=device)
        shifted[1:] = tensor.flatten()
        yield shifted[1:].view(tensor.shape)


def failure(call: Callable[[torch.device], object], device: str) -> tuple[type, str]:
    """The class and the text of the exception that `call` raises on a device."""
    try:
        call(torch.device(device))
    except (ValueError, TypeError, RuntimeError) as error:
        return type(error), str(error)
    raise AssertionError(f"the call succeeds on {device}")
