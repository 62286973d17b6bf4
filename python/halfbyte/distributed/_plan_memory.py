"""What a rank holds of a model and its optimizer, unit by unit. Bytes throughout.

A *unit* is what FSDP gathers at once: a decoder layer, or what is outside of them (the root:
embedding, last norm, output layer). With ``W`` ranks and ``ceil`` for rounding up, a weight of
``n`` elements costs

==================  ==============================================  ==============================
                    the whole of it                                 this rank, sharded
==================  ==============================================  ==============================
4-bit codes         ``u = ceil(ceil(n / 2) / s)`` units of ``s``     ``ceil(u / W) * s``
                    bytes (``s``: size of quant_storage)
its scales          ``b = ceil(n / blocksize)``: ``4 b``, or nested  FSDP2: each of the two tensors
                    ``b + 4 ceil(b / 256)``                         cut alike; FSDP1: the whole
int8 codes          ``n``                                           ``ceil(rows / W) * columns``
its scales          ``4 rows``                                      FSDP2: ``4 ceil(rows / W)``
a float tensor      ``n * size``                                    ``ceil(rows / W) * columns *
                                                                    size``
LoRA on [o, i]      ``A [r, i]`` and ``B [o, r]``, floats            as floats
gradients           as the trained floats                           as the trained floats
8-bit state         ``n + 4 ceil(n / 256)``; ``4 n`` for tensors of  of the local part; the choice
                    fewer than 4,096 elements                       goes by the whole tensor's size
==================  ==============================================  ==============================

DDP and one device hold the whole of everything. FSDP1 cuts flattened tensors, ``ceil(n / W)``
elements of each, adapters apart from the rest (as PEFT's wrapping policy has it). Of what is short
of a whole part, rank 0 is reported, which has the most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..nn import _packed
from ._plan_model import Model, Weight
from ._plan_setting import Setting

__all__ = ["Held", "adapters", "check_targets", "hold"]

MIN_8BIT = 4096
"""Tensors of fewer elements have 32-bit states (``min_8bit_size`` of the optimizers)."""

PAGED = 100_000
"""Local parts of this many elements or more have their paged states in files."""

_NESTED_BLOCK = 256
_STATE_BLOCK = 256
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj")


def _up(length: int, parts: int) -> int:
    return -(-length // parts)


@dataclass
class Held:
    """What a rank holds of one unit.

    Attributes:
        codes, scales, floats, adapters: the unit's parameters. ``floats`` are those that are not
            quantized.
        gradients: those of the trained parameters, where they are kept.
        state: the optimizer's, in memory. paged: the part of it in files.
        packed: bytes of codes and scales that an all-gather of the unit makes.
        gathered: bytes of all parameters that it makes.
        scattered: bytes of trained gradients before they are reduced over the ranks.
        trained: elements that are trained, of the whole unit.
        largest: elements of the largest trained tensor of this rank.
    """

    codes: int = 0
    scales: int = 0
    floats: int = 0
    adapters: int = 0
    gradients: int = 0
    state: int = 0
    paged: int = 0
    packed: int = 0
    gathered: int = 0
    scattered: int = 0
    trained: int = 0
    largest: int = 0


def adapters(weight: Weight, s: Setting) -> tuple[Weight, ...]:
    """The LoRA matrices on ``weight``, ``[rank, in]`` and ``[out, rank]``; none if it has none."""
    if s.full or not weight.linear or len(weight.shape) != 2 or not targeted(weight.name, s):
        return ()
    rows, columns = weight.shape
    name = weight.name.removesuffix(".weight")
    return (
        Weight(f"{name}.lora_A.weight", (s.lora_rank, columns), weight.layer, False),
        Weight(f"{name}.lora_B.weight", (rows, s.lora_rank), weight.layer, False),
    )


def targeted(name: str, s: Setting) -> bool:
    """Whether the linear weight ``name`` gets an adapter."""
    if s.lora_targets == "all-linear":
        return True
    return any(_meant(name, target) for target in _names(s.lora_targets))


def check_targets(model: Model, s: Setting) -> None:
    """ValueError if an adapter is wanted on a linear layer that there is not."""
    layers = [w.name for w in model.weights if w.linear and len(w.shape) == 2]
    unknown = [
        target
        for target in _names(s.lora_targets)
        if not any(_meant(name, target) for name in layers)
    ]
    if s.lora_targets == "attention":  # names of several architectures: one of them is enough
        unknown = ["attention"] if len(unknown) == len(_ATTENTION) else []
    elif s.lora_targets == "all-linear":
        unknown = [] if layers else ["all-linear"]
    if unknown:
        last = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in layers})
        raise ValueError(
            f"lora_targets has {unknown[0]!r}, but {model.name} has no such linear layer in its "
            f"decoder layers; it has {', '.join(last) or 'none'}"
        )


def _names(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    if targets == "all-linear":
        return ()
    return _ATTENTION if targets == "attention" else tuple(targets) or ("",)


def _meant(name: str, target: str) -> bool:
    """Whether ``target`` is the end of the name of the layer that has the weight ``name``."""
    return f".{name.removesuffix('.weight')}".endswith(f".{target}") and bool(target)


def hold(model: Model, s: Setting) -> dict[int | None, Held]:
    """What a rank holds of each unit: of rank 0, whose parts are the longest."""
    alike: dict[tuple[tuple[int, ...], ...], Held] = {}
    found: dict[int | None, Held] = {}
    for layer, weights in model.units.items():
        # 80 equal layers are counted once.
        shapes = tuple((*weight.shape, int(weight.linear)) for weight in weights)
        key = (*shapes, (-1 if layer is None else 0,))
        if key not in alike:
            alike[key] = _unit(weights, s)
        found[layer] = alike[key]
    return found


def _unit(weights: tuple[Weight, ...], s: Setting) -> Held:
    held = Held()
    for weight in weights:
        if weight.linear and s.quant != "none":
            _quantized(held, weight, s)
        else:
            held.floats += _float(held, weight, s, trained=s.full)
        for adapter in adapters(weight, s):
            held.adapters += _float(held, adapter, s, trained=True)
    return held


def _quantized(held: Held, weight: Weight, s: Setting) -> None:
    """A packed weight: its codes, as rows of some width, and its tensors of scales."""
    if s.packs:
        storage = s.quant_storage
        rows, width = _packed.packed_units(weight.shape, storage), storage.itemsize
        blocks = _up(weight.numel, s.blocksize)
        scales = [(blocks, 4)]
        if s.double_quant:
            scales = [(blocks, 1), (_up(blocks, _NESTED_BLOCK), 4)]
    else:
        rows, width = math.prod(weight.shape[:-1]), weight.shape[-1]
        scales = [(rows, 4)]
    parts = s.ranks if s.sharded else 1
    held.codes += _up(rows, parts) * width
    gathered = _up(rows, parts) * parts * width
    for length, size in scales:
        if s.strategy == "fsdp1":
            held.scales += length * size
            continue
        held.scales += _up(length, parts) * size
        if parts > 1:  # one rank uses its scales where they are
            gathered += _up(length, parts) * parts * size
    held.packed += gathered
    held.gathered += gathered


def _float(held: Held, weight: Weight, s: Setting, *, trained: bool) -> int:
    """A float tensor: bytes of this rank's part. Counts its gradient and state if it is trained."""
    dtype = s.train_dtype if trained else s.dtype
    rows = weight.numel if s.strategy == "fsdp1" or not weight.shape else weight.shape[0]
    parts = s.ranks if s.sharded else 1
    local = _up(rows, parts) * (weight.numel // rows)
    compute = s.dtype if s.mixed_precision else dtype
    held.gathered += local * parts * compute.itemsize
    if trained:
        held.gradients += local * dtype.itemsize
        held.scattered += local * parts * dtype.itemsize
        held.trained += weight.numel
        held.largest = max(held.largest, local)
        _state(held, weight.numel, local, dtype, s)
    return local * dtype.itemsize


def _state(held: Held, whole: int, local: int, dtype: torch.dtype, s: Setting) -> None:
    """The optimizer's state of a trained tensor of which this rank has ``local`` elements."""
    optimizer = s.optim
    if optimizer.bits == 8 and whole >= MIN_8BIT:
        codes, scales = local, 4 * _up(local, _STATE_BLOCK)
    else:
        size = dtype.itemsize if optimizer.bits == 0 else 4
        codes, scales = size * local, 0
    if optimizer.paged and local >= PAGED:
        held.paged += optimizer.states * codes
    else:
        held.state += optimizer.states * codes
    held.state += optimizer.states * scales
