"""The experts of a mixture (MoE) in 4 bits: one layer's MLP, as a loop over experts and grouped.

Both ways multiply with the same packed bytes and route the same tokens. The loop is what one writes
with ``dequantize_4bit`` alone, expert by expert; the grouped way needs ``experts_matmul_4bit``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

BLOCK = 64


class Experts:
    """The quantized weights of a layer's experts, and the routing of a batch.

    Args:
        functional: the peer's ``functional`` module.
        tokens: rows of the batch.
        experts: number of experts.
        top_k: experts of a token.
        hidden: width of a row.
        intermediate: width inside the MLP; the first weight makes twice that, gate and up.
    """

    def __init__(
        self, functional: Any, tokens: int, experts: int, top_k: int, hidden: int, intermediate: int
    ) -> None:
        """Draw and quantize, seeded; one expert at a time, for upstream's sake."""
        self.functional = functional
        self.count = experts
        draw = torch.Generator().manual_seed(0)
        scores = torch.randn(tokens, experts, generator=draw).softmax(-1)
        scores, self.ids = scores.topk(top_k)
        self.scores = (scores / scores.sum(-1, keepdim=True)).to(torch.bfloat16)
        self.input = torch.randn(tokens, hidden, generator=draw).to(torch.bfloat16)
        self.gradient = torch.randn(tokens, hidden, generator=draw).to(torch.bfloat16)
        self.gate_up = self._quantized(draw, 2 * intermediate, hidden)
        self.down = self._quantized(draw, hidden, intermediate)

    def _quantized(self, draw: torch.Generator, rows: int, columns: int) -> list[Any]:
        """Packed bytes and state of each expert's weight ``[rows, columns]``."""
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        return [
            self.functional.quantize_4bit(
                weight.normal_(0.0, 0.02, generator=draw), blocksize=BLOCK, quant_type="nf4"
            )
            for _ in range(self.count)
        ]

    def group(self) -> None:
        """Put the experts' bytes into one tensor, for :meth:`grouped`; ends :meth:`loop`."""
        self.gate_up = [self._joined(self.gate_up)]
        self.down = [self._joined(self.down)]

    def _joined(self, parts: list[Any]) -> Any:
        """One packed weight ``[experts, rows, columns]``: whole blocks lie one after another."""
        state = parts[0][1]
        if state.shape.numel() % BLOCK:
            raise ValueError(f"an expert must have whole blocks of {BLOCK}, got {state.shape}")
        state.absmax = torch.cat([each.absmax for _, each in parts])
        state.shape = torch.Size((len(parts), *state.shape))
        return torch.cat([packed for packed, _ in parts]), state

    def loop(self, x: Tensor) -> Tensor:
        """Expert by expert: decode its weights, multiply its tokens, add to their rows.

        Args:
            x: ``[tokens, hidden]``, bfloat16.

        Returns:
            ``[tokens, hidden]``, bfloat16.
        """
        decode = self.functional.dequantize_4bit
        out = torch.zeros_like(x)
        for expert in self.ids.unique().tolist():
            token, place = torch.where(self.ids == expert)
            gate, up = linear(x[token], decode(*self.gate_up[expert])).chunk(2, dim=-1)
            y = linear(silu(gate) * up, decode(*self.down[expert]))
            out.index_add_(0, token, y * self.scores[token, place, None])
        return out

    def grouped(self, x: Tensor) -> Tensor:
        """All experts in one product up and one down; arguments and result as :meth:`loop`."""
        matmul = self.functional.experts_matmul_4bit
        gate, up = matmul(x, *self.gate_up[0], self.ids).chunk(2, dim=-1)
        y = matmul(silu(gate) * up, *self.down[0], self.ids)
        return (y * self.scores.unsqueeze(-1)).sum(dim=1)
