"""How much memory a rank needs to fine-tune a model, and how many bytes it sends.

``plan(...)`` computes it, ``python -m halfbyte plan`` prints it. The formulas are in
:mod:`._plan_moments`, which adds up what the modules :mod:`._plan_memory` and
:mod:`._plan_activations` compute.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ._plan_memory import check_targets, hold
from ._plan_model import Model, read_model
from ._plan_moments import Moment, Wire, moments, on_host, total_of, wire_of
from ._plan_setting import Setting, parse_bytes, parse_dtype, parse_optimizer

__all__ = ["Moment", "Plan", "Row", "Wire", "plan"]

MIB = 1 << 20
GIB = 1 << 30
_MOST_RANKS = 4096


class Row(NamedTuple):
    """A kind of memory.

    name: what it is. size: the most there ever is of it. at_peak: how much of it there is when
    memory is at its peak; the sum over rows is the plan's total.
    """

    name: str
    size: int
    at_peak: int


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found: bytes a rank.

    Attributes:
        model: of which model.
        setting: trained how.
        memory: bytes that a device has; None when it was not said.
        moments: the moments of a step, see the top of ``_plan_moments.py``.
        host: bytes in the host's memory (or, for paged states, in files) for each rank.
        wire: traffic.
        trained: elements that are trained.
    """

    model: Model
    setting: Setting
    memory: int | None
    moments: tuple[Moment, ...]
    host: dict[str, int]
    wire: Wire
    trained: int

    @property
    def peak(self) -> Moment:
        """The moment at which most memory is needed."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> int:
        """Bytes that a rank needs."""
        return self.peak.total

    @property
    def rows(self) -> tuple[Row, ...]:
        """The kinds of memory, the same ones for every plan."""
        at_peak = self.peak.parts
        return tuple(
            Row(name, max(moment.parts[name] for moment in self.moments), at_peak[name])
            for name in at_peak
        )

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the device's memory; None when that was not said."""
        return None if self.memory is None else self.total <= self.memory

    def change(self, **fields: Any) -> Plan:
        """The plan with other fields of its :class:`~._plan_setting.Setting`."""
        return _plan(self.model, dataclasses.replace(self.setting, **fields), self.memory)

    def largest(self, field: str, most: int = 1 << 20) -> int:
        """The largest ``batch`` or ``seq`` that fits, all else as it is; 0 when not even 1 does."""
        return _largest(lambda value: bool(self.change(**{field: value}).fits), most)

    def ranks_needed(self) -> int | None:
        """The fewest ranks with which it fits, all else as it is; None when no number does."""
        if self.setting.strategy == "single" or not self.setting.sharded:
            return self.setting.ranks if self.fits else None
        ranks = 1
        while ranks <= _MOST_RANKS and not self.change(ranks=ranks).fits:
            ranks *= 2
        if ranks > _MOST_RANKS:
            return None
        low = ranks // 2 + 1
        return next(n for n in range(max(low, 1), ranks + 1) if self.change(ranks=n).fits)

    def remedies(self) -> list[tuple[str, Plan]]:
        """Single changes of the setting that need less memory, the most effective first."""
        tried = [(text, self.change(**fields)) for text, fields in _remedies(self)]
        better = [(text, changed) for text, changed in tried if changed.total < self.total]
        return sorted(better, key=lambda pair: pair[1].total)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it; sizes in bytes."""
        setting = {
            field.name: _plain(getattr(self.setting, field.name))
            for field in dataclasses.fields(self.setting)
        }
        found: dict[str, Any] = {
            "model": self.model.name,
            "parameters": self.model.numel,
            "trained": self.trained,
            "setting": setting,
            "rows": [row._asdict() for row in self.rows],
            "moments": {moment.name: moment.total for moment in self.moments},
            "peak": self.peak.name,
            "total": self.total,
            "host": dict(self.host),
            "wire": {**self.wire._asdict(), "total": self.wire.total},
            "exact_activations": self.model.modelled,
        }
        if self.memory is not None:
            found["memory"] = self.memory
            found["fits"] = self.fits
            found["largest_batch"] = self.largest("batch")
            found["largest_seq"] = self.largest("seq")
            found["ranks_needed"] = self.ranks_needed()
        return found

    def __str__(self) -> str:
        from ._plan_text import text

        return text(self)


def plan(
    model: str | os.PathLike[str] | Mapping[str, Any] | Model,
    *,
    ranks: int = 1,
    gpu_mem: str | float | None = None,
    strategy: str | None = None,
    quant: str | None = None,
    double_quant: bool | None = None,
    blocksize: int | None = None,
    quant_storage: str | torch.dtype | None = None,
    dtype: str | torch.dtype | None = None,
    mixed_precision: bool = True,
    lora_rank: int = 16,
    lora_targets: str | tuple[str, ...] = "all-linear",
    train_dtype: str | torch.dtype | None = None,
    full: bool = False,
    optim: str = "adamw8bit",
    batch: int = 1,
    seq: int = 2048,
    accumulation: int = 1,
    checkpointing: bool = True,
    attention: str = "sdpa",
    offload: bool = False,
    reshard: bool = True,
    wrap: str = "layer",
    device: str = "cuda",
    overhead: str | float | None = None,
) -> Plan:
    """How much memory each of ``ranks`` needs to fine-tune ``model``.

    Args:
        model: a Hugging Face folder, a ``config.json`` or its contents, or the name of a public
            architecture (see ``PRESETS`` in ``_plan_model.py``: ``llama-70b``, ...).
        ranks: processes, a device each.
        gpu_mem: what a device has, such as ``24G`` (GiB), or bytes, 1 MiB or more.
        strategy: "fsdp2", "fsdp1", "ddp" or "single"; fsdp2 for several ranks, else single.
        quant: of the linear weights in decoder layers: "nf4", "fp4", "int8" or "none". That of the
            checkpoint when it is quantized, else nf4, and none with ``full``.
        double_quant, blocksize: of 4-bit weights; True and 64.
        quant_storage: dtype under which packed bytes lie; uint8 (FSDP1: ``dtype``).
        dtype: of what is not quantized, and to compute in; bf16.
        mixed_precision: compute with trained parameters in ``dtype`` (FSDP2's
            ``MixedPrecisionPolicy``, autocast); else in their own, as PEFT does by itself.
        lora_rank: of every adapter.
        lora_targets: "all-linear", "attention", or names of linear layers, or ends of them, such as
            ``("q_proj", "mlp.up_proj")`` or ``"q_proj,mlp.up_proj"``.
        train_dtype: of trained parameters and their gradients; fp32 for adapters as PEFT makes them
            (FSDP1: ``dtype``), ``dtype`` with ``full``.
        full: train everything instead of adapters.
        optim: such as "adamw8bit", "paged_adamw8bit", "lion32bit", or "adamw" for torch's.
        batch, seq: sequences of a rank's micro-batch, and their length.
        accumulation: micro-batches of a step.
        checkpointing: activation checkpointing of every layer.
        attention: "sdpa" (or flash attention) or "eager".
        offload: parameters, gradients and states in the host's memory (FSDP).
        reshard: FSDP2's ``reshard_after_forward``.
        wrap: "layer" gathers a decoder layer at a time, "model" all at once.
        device: "cuda" or "cpu".
        overhead: what the framework takes, an assumption; 1 GiB on cuda (context, libraries,
            buffers of nccl), 0 on the CPU.

    Raises:
        FileNotFoundError, ImportError: see :func:`~._plan_model.read_model`.
        ValueError: a setting that there is not, or that contradicts another; a LoRA target that no
            linear layer of the model has.
    """
    known = model if isinstance(model, Model) else read_model(model)
    had = known.quantized
    compute = parse_dtype(dtype or known.dtype or "bf16")
    strategy = strategy or ("fsdp2" if ranks > 1 else "single")
    if quant is None:
        quant = "none" if full else (had.kind if had else "nf4")
    if had and quant != had.kind:
        raise ValueError(f"{known.name} is quantized already, as {had.kind}; quant says {quant!r}")
    flat = strategy == "fsdp1"
    if train_dtype is None:
        train_dtype = compute if full or flat else torch.float32
    if quant_storage is None:
        quant_storage = compute if flat else (had.storage if had else torch.uint8)
    if blocksize is None:
        blocksize = had.blocksize if had and had.blocksize else 64
    if overhead is None:
        overhead = GIB if device == "cuda" else 0
    setting = Setting(
        ranks=ranks,
        strategy=strategy,
        quant=quant,
        double_quant=double_quant if double_quant is not None else had is None or had.nested,
        blocksize=blocksize,
        quant_storage=parse_dtype(quant_storage),
        dtype=compute,
        mixed_precision=mixed_precision,
        lora_rank=lora_rank,
        lora_targets=_targets(lora_targets),
        train_dtype=parse_dtype(train_dtype),
        full=full,
        optim=parse_optimizer(optim),
        batch=batch,
        seq=seq,
        accumulation=accumulation,
        checkpointing=checkpointing,
        attention=attention,
        offload=offload,
        reshard=reshard,
        wrap=wrap,
        device=device,
        overhead=parse_bytes(overhead),
    )
    return _plan(known, setting, None if gpu_mem is None else _memory(gpu_mem))


def _memory(gpu_mem: str | float) -> int:
    found = parse_bytes(gpu_mem)
    if found < MIB:
        raise ValueError(
            f"gpu_mem {gpu_mem!r} means {found} bytes, less than any device has; is {gpu_mem}G "
            "meant, which is GiB?"
        )
    return found


def _targets(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if targets in ("all-linear", "attention"):
        return targets
    if isinstance(targets, str):
        targets = tuple(target.strip() for target in targets.split(","))
    return tuple(targets)


# ---- the sum -------------------------------------------------------------------------------------


def _plan(model: Model, s: Setting, memory: int | None) -> Plan:
    units = hold(model, s)
    root = units[None]
    layers = [held for layer, held in units.items() if layer is not None]
    if not layers:
        raise ValueError(
            f"{model.name}: no parameter is named after a numbered layer (layers.0, h.0, "
            "blocks.0), so it is no decoder that a plan could be made of"
        )
    if not s.full:
        check_targets(model, s)
    everything = total_of([root, *layers])
    return Plan(
        model=model,
        setting=s,
        memory=memory,
        moments=tuple(moments(model, s, root, layers, everything)),
        host=on_host(s, everything),
        wire=wire_of(model, s, root, layers),
        trained=everything.trained,
    )


# ---- what to change ------------------------------------------------------------------------------


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that ``fits``; whatever fits, less does as well."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _remedies(found: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    s = found.setting
    if not s.checkpointing:
        yield "with activation checkpointing", {"checkpointing": True}
    if s.attention == "eager":
        yield "with sdpa attention", {"attention": "sdpa"}
    if s.sharded and not s.offload and s.device == "cuda":
        yield "with CPU offload", {"offload": True}
    if s.sharded and not s.reshard:
        yield "with reshard_after_forward", {"reshard": True}
    if s.packs and not s.double_quant:
        yield "with double quantization", {"double_quant": True}
    if s.quant == "int8" and not found.model.quantized:
        yield "with NF4", {"quant": "nf4"}
    if not s.full and s.quant == "none":
        yield "with NF4 and double quantization", {"quant": "nf4", "double_quant": True}
    if s.optim.bits != 8 or not s.optim.paged:
        yield "with paged_adamw8bit", {"optim": parse_optimizer("paged_adamw8bit")}
    if s.strategy == "ddp":
        yield "with FSDP2", {"strategy": "fsdp2"}
    if s.seq > 1:
        yield f"with sequences of {s.seq // 2}", {"seq": s.seq // 2}
    if s.batch > 1:
        yield f"with micro-batches of {s.batch // 2}", {"batch": s.batch // 2}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.name if hasattr(value, "bits") else value
