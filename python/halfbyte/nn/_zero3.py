"""Quantized layers refuse DeepSpeed's ZeRO stage 3.

ZeRO-3 takes the data out of every parameter (``param.data`` becomes empty, the pieces lie in
``param.ds_tensor``) and gathers it around each use. It knows nothing of scales: a weight made under
``deepspeed.zero.Init()`` is empty when it is quantized, checkpoints hold codes without their
scales, and an engine in another dtype than the storage breaks the codes. Stages 1 and 2 leave
parameters alone.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_INSTEAD = (
    "Shard quantized weights with FSDP2 (torch.distributed.fsdp.fully_shard), or use ZeRO stage 1 "
    "or 2, which leave parameters whole"
)
_INIT = "deepspeed.runtime.zero.partition_parameters"


def check(weight: Any, owner: nn.Module | None = None) -> None:
    """RuntimeError if ZeRO-3 manages ``weight``, a parameter of the layer ``owner``."""
    if not hasattr(weight, "ds_id"):  # torch.compile can trace this, unlike a look into __dict__
        return
    where = "A quantized weight" if owner is None else f"The weight of {owner}"
    shape = list(getattr(weight, "ds_shape", weight.shape))
    raise RuntimeError(
        f"{where} (DeepSpeed's parameter {weight.ds_id}, shape {shape}) is partitioned "
        f"by ZeRO stage 3, which does not keep codes and scales together. {_INSTEAD}"
    )


def check_construction(layer: nn.Module) -> None:
    """RuntimeError within ``deepspeed.zero.Init()``, which partitions what is constructed."""
    module = sys.modules.get(_INIT)
    if module is not None and getattr(module, "zero_init_context", False):
        raise RuntimeError(
            f"{layer} was constructed within deepspeed.zero.Init(), which partitions its weight "
            f"before it can be quantized. {_INSTEAD}"
        )
