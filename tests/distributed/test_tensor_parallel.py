"""Tensor-parallel layers on real ranks: what they compute together is what the whole layer does."""

from __future__ import annotations

import itertools
from typing import Any

import ranks
import torch
import torch.distributed as dist
from halfbyte.distributed._tensor_parallel import shard_linear
from halfbyte.nn import Linear4bit, Linear8bitLt

HIDDEN, INNER = 256, 1024


def linear(kind: str, inputs: int, outputs: int, nested: bool = True) -> Any:
    if kind == "int8":
        layer: Any = Linear8bitLt(inputs, outputs, has_fp16_weights=False)
    else:
        layer = Linear4bit(inputs, outputs, quant_type=kind, compress_statistics=nested)
    return layer.to("cpu").eval()


def decoded(layer: Any) -> torch.Tensor:
    from halfbyte.functional import dequantize_4bit, int8_vectorwise_dequant

    weight = layer.weight
    if isinstance(layer, Linear8bitLt):
        return int8_vectorwise_dequant(weight.data, weight.SCB)
    return dequantize_4bit(weight.data, weight.quant_state)


def mlp_and_attention(rank: int, world: int) -> list[tuple[str, str, float]]:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: halves[rank // 2], 4: None}
    errors = []
    for kind, nested, parts in (
        *itertools.product(("nf4", "fp4"), (True, False), (2, 4)),
        ("int8", False, 2),
        ("int8", False, 4),
    ):
        group, mine = groups[parts], rank % parts
        torch.manual_seed(0)
        x = torch.randn(5, HIDDEN)

        # Megatron's pair: rows of the first matrix, columns of the second, one sum.
        up, down = linear(kind, HIDDEN, INNER, nested), linear(kind, INNER, HIDDEN, nested)
        rows, columns = shard_linear(up, mine, parts, dim=0), shard_linear(down, mine, parts, dim=1)
        assert torch.equal(decoded(rows), decoded(up).chunk(parts)[mine])
        assert torch.equal(decoded(columns), decoded(down).chunk(parts, 1)[mine])
        y = columns(torch.relu(rows(x)))
        dist.all_reduce(y, group=group)
        want = down(torch.relu(up(x)))
        errors.append((kind, "pair", distance(y, want)))

        # A fused projection: each rank has its heads of queries, keys and values.
        fused = linear(kind, HIDDEN, 3 * HIDDEN, nested)
        local = shard_linear(fused, mine, parts, dim=0, sections=(HIDDEN,) * 3)
        gathered = []
        for piece in local(x).chunk(3, -1):
            pieces = [torch.empty(piece.shape) for _ in range(parts)]
            dist.all_gather(pieces, piece.contiguous(), group=group)
            gathered.append(torch.cat(pieces, -1))
        errors.append((kind, "fused", distance(torch.cat(gathered, -1), fused(x))))
    return errors


def distance(found: torch.Tensor, want: torch.Tensor) -> float:
    return ((found - want).abs().max() / want.abs().max()).item()


def test_parts_add_up() -> None:
    for errors in ranks.run(mlp_and_attention, 4):
        assert len(errors) == 20
        for kind, what, error in errors:
            # int8: every rank rounds its own part of the inner activations, to 1/254 of its
            # largest. Otherwise only the order of sums differs.
            bound = 1e-2 if (kind, what) == ("int8", "pair") else 1e-5
            assert error < bound, (kind, what, error)
