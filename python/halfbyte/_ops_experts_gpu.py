"""Layers of experts on GPUs: the ops of :mod:`._ops_experts`, composed of products for each expert.

There is no grouped kernel for GPUs yet. Rows are sorted by their experts, each expert that a row
goes to is one product with its part of the weight, and the results go back to where their rows
were. **Each call waits for the device once**, because the host must know how many rows each expert
has: it cannot be captured in a CUDA graph.

A gradient of rows that slots share is the sum of products that were each rounded to its dtype; the
CPU rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops_base import find
from ._ops_experts import FAKES


def _routed(expert_ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert with rows, and their positions in the flattened ``expert_ids``, ascending.

    Raises ValueError for an id out of range.
    """
    ids = expert_ids.flatten()
    if ids.numel() == 0:
        return
    order = ids.argsort(stable=True)
    bounds = torch.arange(experts + 1, device=ids.device)
    # One transfer: the first row of each expert, and the smallest and largest id.
    begins = torch.searchsorted(ids[order], bounds)
    *starts, smallest, largest = torch.cat([begins, ids.min()[None], ids.max()[None]]).tolist()
    if smallest < 0 or largest > experts:
        first = int(((ids < 0) | (ids > experts)).nonzero()[0])
        token, slot = divmod(first, expert_ids.size(1))
        raise ValueError(
            f"expert_ids must lie in 0..={experts} ({experts} means no expert), got "
            f"{int(ids[first])} for token {token}, slot {slot}"
        )
    for expert in range(experts):
        if starts[expert] < starts[expert + 1]:
            yield expert, order[starts[expert] : starts[expert + 1]]


def _rows(A: Tensor, positions: Tensor, slots: int) -> Tensor:
    """The rows at those positions: of a token for all its slots, or one for each."""
    if A.dim() == 2:
        return A.index_select(0, positions // slots)
    return A.flatten(0, 1).index_select(0, positions)


def _multiplied(
    A: Tensor,
    expert_ids: Tensor,
    experts: int,
    features: int,
    product: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """``[tokens, slots, features]``: each row's product; zero for rows without an expert."""
    tokens, slots = expert_ids.shape
    out = A.new_zeros((tokens * slots, features))
    for expert, positions in _routed(expert_ids, experts):
        out.index_copy_(0, positions, product(expert, _rows(A, positions, slots)))
    return out.view(tokens, slots, features)


def _summed(grad: Tensor, shared: bool) -> Tensor:
    """Over slots, in float32, when they share a row."""
    return grad.sum(1, dtype=torch.float32).to(grad.dtype) if shared else grad


class _Weight4:
    """The parts of a 4-bit weight that belong to one expert."""

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        state: Sequence[Any],
    ) -> None:
        self.experts, self.out_features, self.in_features = shape
        numel = self.out_features * self.in_features
        self.blocks = -(-numel // blocksize)
        # Bytes: an expert may begin inside an element of the storage dtype.
        self.bytes = packed.contiguous().view(-1).view(torch.uint8)
        self.padded = self.blocks * blocksize // 2
        self.needed = -(-numel // 2)
        self.absmax, self.blocksize, self.quant_type = absmax.flatten(), blocksize, quant_type
        self.code, self.absmax2, self.code2, self.offset, self.blocksize2 = state
        expected = self.experts * self.padded
        storage = packed.element_size()
        if not expected <= self.bytes.numel() < expected + storage:
            raise ValueError(
                f"packed must hold {expected} bytes for {2 * expected} elements, "
                f"got {self.bytes.numel()}"
            )
        scales = self.experts * self.blocks
        self._expect("absmax", self.absmax, scales)
        nested = [t is not None for t in (self.absmax2, self.code2, self.offset)]
        if any(nested) and not all(nested):
            raise ValueError(
                "double-quantized scales need all of absmax2, code2 and offset, or none"
            )
        if self.absmax2 is not None:
            self._expect("absmax2", self.absmax2, -(-scales // self.blocksize2))
            self._expect("code2", self.code2, 256)
            self._expect("offset", self.offset, 1)

    @staticmethod
    def _expect(what: str, tensor: Tensor, length: int) -> None:
        if tensor.numel() != length:
            unit = "float32 scales" if what.startswith("absmax") else "values"
            raise ValueError(f"{what} must hold {length} {unit}, got {tensor.numel()}")

    def of(self, expert: int) -> tuple[Any, ...]:
        """packed, absmax, blocksize, quant_type, shape, and the state, as the ops list them."""
        start = expert * self.padded
        packed = self.bytes[start : start + self.needed]
        first = expert * self.blocks
        absmax = self.absmax[first : first + self.blocks]
        if self.absmax2 is not None:
            absmax = self._decoded(first)
        shape = [self.out_features, self.in_features]
        state = (self.code, None, None, None, self.blocksize2)
        return packed, absmax, self.blocksize, self.quant_type, shape, state

    def _decoded(self, first: int) -> Tensor:
        """Double-quantized scales: those of one expert need not begin a block of their own."""
        begin = first // self.blocksize2 * self.blocksize2
        end = min(first + self.blocks, self.absmax.numel())
        scales = find("dequantize_blockwise")(
            self.absmax[begin:end],
            self.absmax2[begin // self.blocksize2 : math.ceil(end / self.blocksize2)],
            self.code2,
            self.blocksize2,
            torch.float32,
        )
        return scales[first - begin :] + self.offset


def _experts_matmul_4bit(
    A: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    expert_ids: Tensor,
    bias: Tensor | None,
    *state: Any,
) -> Tensor:
    weight = _Weight4(packed, absmax, blocksize, quant_type, shape, state)
    matmul = find("matmul_4bit")

    def product(expert: int, rows: Tensor) -> Tensor:
        *part, rest = weight.of(expert)
        return matmul(rows, *part, None if bias is None else bias[expert].to(A.dtype), *rest)

    return _multiplied(A, expert_ids, weight.experts, weight.out_features, product)


def _experts_matmul_4bit_grad_input(
    grad_output: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    expert_ids: Tensor,
    shared: bool,
    *state: Any,
) -> Tensor:
    weight = _Weight4(packed, absmax, blocksize, quant_type, shape, state)
    matmul = find("matmul_4bit_grad_input")

    def product(expert: int, rows: Tensor) -> Tensor:
        *part, rest = weight.of(expert)
        return matmul(rows, *part, *rest)

    grads = _multiplied(grad_output, expert_ids, weight.experts, weight.in_features, product)
    return _summed(grads, shared)


def _experts_matmul_8bit(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    expert_ids: Tensor,
    bias: Tensor | None,
    threshold: float,
) -> Tensor:
    linear = find("int8_linear")

    def product(expert: int, rows: Tensor) -> Tensor:
        own_bias = None if bias is None else bias[expert]
        return linear(rows, CB[expert], SCB[expert], own_bias, threshold)

    return _multiplied(A, expert_ids, CB.size(0), CB.size(1), product)


def _experts_matmul_8bit_grad_input(
    grad_output: Tensor, CB: Tensor, SCB: Tensor, expert_ids: Tensor, shared: bool
) -> Tensor:
    linear = find("int8_linear_grad_input")

    def product(expert: int, rows: Tensor) -> Tensor:
        return linear(rows, CB[expert], SCB[expert])

    grads = _multiplied(grad_output, expert_ids, CB.size(0), CB.size(2), product)
    return _summed(grads, shared)


def _checked(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel behind the checks that tracing makes: of devices, dtypes and shapes."""

    def checked(*arguments: Any) -> Tensor:
        FAKES[name](*arguments)  # its result, fresh memory, is let go of at once
        return kernel(*arguments)

    return checked


KERNELS: dict[str, Callable[..., Any]] = {
    kernel.__name__[1:]: _checked(kernel.__name__[1:], kernel)
    for kernel in (
        _experts_matmul_4bit,
        _experts_matmul_4bit_grad_input,
        _experts_matmul_8bit,
        _experts_matmul_8bit_grad_input,
    )
}
KEYS = ("CUDA", "XPU")
"""Dispatch keys to register them under."""
