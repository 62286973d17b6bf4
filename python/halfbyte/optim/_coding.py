"""8-bit states as float32 values, and back to the same codes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

BLOCKSIZE = 256
"""Elements per scale of an 8-bit state."""


def _ends(qmap: Tensor) -> Tensor:
    """The map by which a block's largest magnitude decodes to its scale."""
    table = qmap.detach().clone()
    if table[0] < 0.0:
        table[0] = -1.0
    table[-1] = 1.0
    return table


def decode(codes: Tensor, absmax: Tensor, qmap: Tensor, lead: int = 0) -> Tensor:
    """The values of an 8-bit state, float32 of the shape of ``codes``.

    ``absmax``: float32 ``[blocks]``, with ``lead`` ``[n, blocks]`` for codes ``[n, ...]``.
    """
    if lead:
        pairs = zip(codes, absmax, strict=True)
        return torch.stack([decode(part, scales, qmap) for part, scales in pairs])
    return F.dequantize_blockwise(
        codes.contiguous(), absmax=absmax.contiguous(), code=_ends(qmap), blocksize=BLOCKSIZE
    )


def encode(values: Tensor, qmap: Tensor, second: bool, lead: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and scales of values, as an optimizer step would encode them.

    ``second``: a second moment, which never gets the code of zero unless it is.
    """
    if lead:
        parts = [encode(part, qmap, second) for part in values]
        return torch.stack([q for q, _ in parts]), torch.stack([s for _, s in parts])
    values = values.float().contiguous()
    codes, state = F.quantize_blockwise(values, code=qmap, blocksize=BLOCKSIZE)
    if second:
        smallest = min(int((qmap <= 0.0).sum()), 255)
        codes[(values > 0.0) & (codes < smallest)] = smallest
    return codes, state.absmax
