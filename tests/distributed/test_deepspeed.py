"""DeepSpeed: quantized layers refuse ZeRO stage 3.

DeepSpeed compiles C++ when it starts, so it is not among the test requirements. What it does to a
parameter is done here by hand; attributes and values are those of DeepSpeed 0.19.8. With the real
one, on two ranks and the CPU (2026-11-21): a 4-bit base with adapters trained by our AdamW,
AdamW8bit and PagedAdamW8bit under ZeRO-1 and ZeRO-2 gave the losses of one process, bit for bit in
float32; and Linear4bit was refused under ZeRO-3, within ``Init()`` and by an engine. (DeepSpeed
itself does not take integer parameters in ZeRO-3.)
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from halfbyte.nn import (
    Embedding4bit,
    Embedding8bit,
    Experts4bit,
    Experts8bit,
    Linear4bit,
    Linear8bitLt,
    Params4bit,
)
from torch import Tensor, nn

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear4bit": lambda: Linear4bit(64, 32, quant_type="nf4"),
    "Linear4bit in bfloat16": lambda: Linear4bit(64, 32, quant_storage=torch.bfloat16),
    "Embedding4bit": lambda: Embedding4bit(32, 64),
    "Experts4bit": lambda: Experts4bit(2, 64, 32),
    "Linear8bitLt": lambda: Linear8bitLt(64, 32, has_fp16_weights=False),
    "Embedding8bit": lambda: Embedding8bit(32, 64),
}
SENTENCE = r"ZeRO stage 3.*Shard quantized weights with FSDP2.*or use ZeRO stage 1 or 2"


class Status(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


def partition(parameter: Any, gathered: bool = False, ranks: int = 2) -> None:
    """What ``_convert_to_deepspeed_param`` and ``partition`` do to a parameter."""
    data = parameter.data
    parameter.ds_id = 7
    parameter.ds_shape, parameter.ds_numel = data.shape, data.numel()
    parameter.ds_persist = False
    parameter.ds_status = Status.AVAILABLE if gathered else Status.NOT_AVAILABLE
    parameter.ds_tensor = data.reshape(-1)[: -(-data.numel() // ranks)].clone()
    if not gathered:
        parameter.data = torch.empty(0, dtype=data.dtype)


def run(layer: nn.Module) -> Tensor:
    if isinstance(layer, Experts4bit):
        return layer(torch.ones(1, 64), torch.zeros(1, 1, dtype=torch.int64))
    if isinstance(layer, nn.Embedding):
        return layer(torch.tensor([1]))
    return layer(torch.ones(1, 64))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_partitioned_weight_is_refused(kind, gathered):
    layer = LAYERS[kind]().to("cpu")
    before = run(layer)
    partition(layer.weight, gathered)
    with pytest.raises(RuntimeError, match=SENTENCE) as error:
        run(layer)
    with pytest.raises(RuntimeError, match=SENTENCE):
        layer.state_dict()
    assert f"The weight of {type(layer).__name__}(" in str(error.value)
    assert "parameter 7" in str(error.value)
    assert before.isfinite().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_an_empty_weight_is_not_quantized(kind):
    layer = LAYERS[kind]()
    partition(layer.weight)
    with pytest.raises(RuntimeError, match=SENTENCE):
        layer.to("cpu")
    assert layer.weight.dtype == torch.float32, "it was quantized"
    assert layer.weight.ds_shape[-1] % 32 == 0


def test_a_lone_parameter_is_refused():
    parameter = Params4bit(torch.randn(8, 64))
    partition(parameter)
    with pytest.raises(RuntimeError, match=r"A quantized weight .DeepSpeed's parameter 7"):
        parameter.to("cpu")


@pytest.mark.parametrize("kind", [*LAYERS, "Experts8bit"])
def test_construction_within_zero_init_is_refused(kind, monkeypatch):
    module: Any = types.ModuleType("deepspeed.runtime.zero.partition_parameters")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.zero_init_context = 0  # imported, and not in use
    make = LAYERS.get(kind, lambda: Experts8bit(2, 64, 32))
    make()
    module.zero_init_context = 1
    with pytest.raises(RuntimeError, match=r"within deepspeed\.zero\.Init\(\)"):
        make()


@pytest.mark.parametrize("kind", LAYERS)
def test_without_zero3_nothing_is_refused(kind):
    """ZeRO-1 and ZeRO-2 mark parameters as well, and leave them whole."""
    layer = LAYERS[kind]().to("cpu")
    before = run(layer)
    layer.weight.param_name_in_engine = "base.weight"
    assert torch.equal(run(layer), before)
