"""What 4-bit layers do about FSDP1 (``torch.distributed.fsdp.FullyShardedDataParallel``).

FSDP1 flattens parameters into one and puts views of it, plain tensors, where the parameters were:
for each pass, and with ``use_orig_params=False`` for good. It knows the views again by their
identity, so a layer leaves them where they are and finds its quantization state by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import QuantState


def is_view(weight: Any) -> bool:
    """Whether ``weight`` is a plain tensor in the place of a parameter."""
    return type(weight) is Tensor and not isinstance(weight, nn.Parameter)


def label(view: Tensor, state: QuantState) -> None:
    """Let ``view``, in the place of a packed weight, have the attributes of the parameter.

    torch.distributed.checkpoint walks attributes along the keys of a state dict, such as
    ``layer.weight.absmax``.
    """
    found: dict[str, Any] = {
        "quant_state": state,
        "absmax": state.absmax,
        "quant_map": state.code,
    }
    if state.state2 is not None:
        found["nested_absmax"] = state.state2.absmax
        found["nested_quant_map"] = state.state2.code
    view.__dict__.update(found)


def cast_from(view: Tensor) -> torch.dtype | None:
    """The dtype from which FSDP1 has cast the packed bytes in ``view``; None where it has not.

    Casts for mixed precision go from the shard that FSDP1 keeps to the dtype of the pass. The
    result can have the right dtype and other bytes: float32 to bfloat16 changes NaN patterns.
    """
    shard = getattr(view._base, "_local_shard", None)
    if shard is None or shard.dtype == view.dtype:
        return None
    return shard.dtype
