"""The moments of a training step and what a rank holds at each; the bytes that it receives.

What is held of the model is in :mod:`._plan_memory`, activations are in :mod:`._plan_activations`.
Here they are added up for six moments. Parameters and optimizer states are there at each:

=======================  ===========================================================================
forward, first layer     the root unit gathered, and still in the buffer it came in; the first layer
                         in its buffer
the loss                 the root gathered, and the last layer, which the backward pass fetches
                         first; what all layers have stored; buffers over the vocabulary
backward, last layer     the root and two layers gathered (this one, and in its buffer the one that
                         comes next); all that is stored; the layer's own activations; gradients of
                         the output layer
backward, first layers   the same two layers and one layer's activations; gradients of all others
backward, end            all gradients; those of the root not yet reduced, and in a buffer
optimizer step           all gradients, nothing gathered, no activations
=======================  ===========================================================================

FSDP2 gathers into a buffer, then copies each parameter out of it. The buffer of one unit goes when
the next unit has been gathered. It reduces gradients a unit at a time: the gradients of a layer, as
they come, and the previous layer's in the buffer of the reduction exist at once. Those of the root
wait for the end; the embedding's, unless it is the output layer as well, come only then. FSDP1
gathers in place. DDP keeps its gradients twice, once in buckets. gloo (device cpu) copies what it
gathers. With gradient accumulation all gradients are there at every moment; without ``reshard`` all
layers stay gathered from the forward to the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from ._plan_activations import activations
from ._plan_memory import Held
from ._plan_model import Model
from ._plan_setting import Setting

__all__ = ["Moment", "Wire", "moments", "on_host", "total_of", "wire_of"]


class Moment(NamedTuple):
    """A moment of a step and the bytes of each kind of memory then."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


class Wire(NamedTuple):
    """Bytes that a rank receives in a micro-batch (forward and backward); it sends as many.

    packed: codes and scales of quantized weights, gathered. floats: other parameters, gathered.
    gradients: reduced. bits: of ``packed`` in one all-gather of the whole model, a quantized
    parameter: what the code takes, before the share ``(W - 1) / W`` that has to travel.
    """

    packed: int
    floats: int
    gradients: int
    bits: float

    @property
    def total(self) -> int:
        """All of it."""
        return self.packed + self.floats + self.gradients


def total_of(units: list[Held]) -> Held:
    """All units together."""
    total = Held()
    for field in dataclasses.fields(Held):
        values = [getattr(unit, field.name) for unit in units]
        setattr(total, field.name, max(values) if field.name == "largest" else sum(values))
    return total


def on_host(s: Setting, held: Held) -> dict[str, int]:
    """What lies in the host's memory, or in files, for this rank."""
    found = {"paged optimizer states (files)": held.paged}
    if s.offload:
        found["offloaded parameters"] = held.codes + held.scales + held.floats + held.adapters
        found["offloaded gradients"] = held.gradients
        found["offloaded optimizer states"] = held.state
    return {name: size for name, size in found.items() if size}


def moments(
    model: Model, s: Setting, root: Held, layers: list[Held], held: Held
) -> Iterator[Moment]:
    """The moments; see the top of this file."""
    acts = activations(model, s)
    count = len(layers)
    stored = count * acts.stored + acts.last + acts.inputs
    largest = max(layers, key=lambda unit: unit.gathered)
    gathered = _gathered(s, root, layers, largest)
    reducing = _reducing(s, largest)
    accumulated = held.gradients if s.accumulation > 1 else 0
    again = acts.layer if s.checkpointing else acts.layer - acts.stored
    casts = held.trained * s.dtype.itemsize if _autocasts(s) else 0
    # The root's gradients are reduced at the end; until then they are whole.
    of_root = root.scattered if s.sharded else root.gradients
    early = of_root - _embedding(model, s)
    whole = max(of_root - root.gradients, 0)
    whole_early = max(early - root.gradients, 0)
    buckets = held.gradients if s.strategy == "ddp" else 0
    kept = casts + buckets
    left = 2 if gathered.fetched else 1

    def moment(
        name: str,
        gradients: int = 0,
        gathered: int = 0,
        stored: int = 0,
        layer: int = 0,
        loss: int = 0,
        buffers: int = 0,
    ) -> Moment:
        on_device = 0 if s.offload else 1
        return Moment(
            name,
            {
                "quantized weights": on_device * held.codes,
                "their scales": on_device * held.scales,
                "weights not quantized": on_device * held.floats,
                "adapters": on_device * held.adapters,
                "optimizer states": on_device * held.state,
                "gradients": on_device * max(gradients, accumulated),
                "gathered parameters": gathered,
                "activations, stored": stored,
                "activations, one layer": layer,
                "logits and loss": loss,
                "buffers": buffers,
                "framework (assumed)": s.overhead,
            },
        )

    working = kept + whole_early + reducing + _decoded(model, s)
    yield moment(
        "forward, first layer", gathered=gathered.at_start, stored=acts.inputs, buffers=kept
    )
    yield moment("the loss", stored=stored, loss=acts.loss, gathered=gathered.at_loss, buffers=kept)
    yield moment(
        "backward, last layer",
        gradients=min(early, root.gradients),
        stored=stored,
        layer=max(again, 0 if s.checkpointing else acts.last_peak),
        gathered=gathered.at_last,
        buffers=working,
    )
    yield moment(
        "backward, first layers",
        gradients=held.gradients - left * layers[0].gradients - max(root.gradients - early, 0),
        stored=acts.stored + acts.inputs,
        layer=again,
        gathered=gathered.at_first,
        buffers=working,
    )
    yield moment(
        "backward, end",
        gradients=held.gradients,
        gathered=root.gathered if s.sharded else 0,
        buffers=kept + whole + _reducing(s, root) // 2,
    )
    yield moment("optimizer step", gradients=held.gradients, buffers=buckets + _stepping(s, held))


class _Gathered(NamedTuple):
    """Bytes of gathered parameters, and of the buffers they come in, at the moments of a step."""

    at_start: int
    at_loss: int
    at_last: int
    at_first: int
    fetched: int


def _gathered(s: Setting, root: Held, layers: list[Held], largest: Held) -> _Gathered:
    if not s.sharded:
        return _Gathered(0, 0, 0, 0, 0)
    everything = root.gathered + sum(unit.gathered for unit in layers)
    # A single rank has nothing to gather: it copies.
    buffered = s.strategy == "fsdp2" and s.ranks > 1
    if s.wrap == "model":
        return _Gathered((1 + buffered) * everything, everything, everything, everything, 0)
    fetched = largest.gathered if s.ranks > 1 else 0
    copied = fetched if s.device == "cpu" else 0
    start = (1 + buffered) * root.gathered + max(layers[0].gathered, fetched) + copied
    if not s.reshard:
        start = max(start, everything)
        return _Gathered(start, everything, everything, root.gathered + layers[0].gathered, 0)
    last = root.gathered + largest.gathered + fetched
    return _Gathered(start, root.gathered + fetched, last, last, fetched)


def _embedding(model: Model, s: Setting) -> int:
    """The gradient of an embedding that is not tied to the output layer: it comes last."""
    tables = [w for w in model.units[None] if w.shape == (model.vocab, model.hidden)]
    return tables[0].numel * s.train_dtype.itemsize if s.full and len(tables) > 1 else 0


def _reducing(s: Setting, unit: Held) -> int:
    """Gradients of a unit on their way to being reduced over the ranks: as they come, and in the
    buffer of the reduction."""
    return 2 * unit.scattered if s.sharded else 0


def _autocasts(s: Setting) -> bool:
    """Whether autocast keeps copies of the trained parameters in the dtype of the model."""
    return s.mixed_precision and not s.sharded and s.train_dtype != s.dtype


def _decoded(model: Model, s: Setting) -> int:
    """The largest quantized weight, decoded: what kernels on a GPU may do before they multiply. On
    the CPU it never exists."""
    if s.device == "cpu" or s.quant == "none":
        return 0
    return max((w.numel for w in model.weights if w.linear), default=0) * s.dtype.itemsize


def _stepping(s: Setting, held: Held) -> int:
    """Temporary tensors of the optimizer: this package's has none; torch's for-loop has two of the
    largest tensor, its foreach form (on a GPU) one of all."""
    if s.optim.bits or not s.optim.states:
        return 0
    if s.device == "cpu" or s.offload:
        return 0 if s.offload else 2 * held.largest * s.train_dtype.itemsize
    return held.gradients


def wire_of(model: Model, s: Setting, root: Held, layers: list[Held]) -> Wire:
    """What a rank receives: every gathered byte that it does not hold, once in the forward pass and
    once in the backward pass (the root: once), and its share of the gradients."""
    numel = sum(weight.numel for weight in model.weights if weight.linear)
    packed = root.packed + sum(unit.packed for unit in layers)
    bits = packed * 8 / numel if s.quant != "none" and s.sharded and numel else 0.0
    share = (s.ranks - 1) / s.ranks
    scattered = sum(unit.scattered for unit in (root, *layers))
    if s.strategy == "ddp":
        return Wire(0, 0, int(2 * share * scattered), bits)
    if not s.sharded:
        return Wire(0, 0, 0, bits)
    times = 2 if s.reshard and s.wrap == "layer" else 1
    floats = sum(unit.gathered - unit.packed for unit in layers) * times
    floats += root.gathered - root.packed
    return Wire(
        int(share * (times * sum(unit.packed for unit in layers) + root.packed)),
        int(share * floats),
        int(share * scattered),
        bits,
    )
