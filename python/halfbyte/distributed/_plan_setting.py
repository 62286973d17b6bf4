"""How a model is to be trained: what the memory plan is asked about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["Optimizer", "Setting", "parse_bytes", "parse_dtype", "parse_optimizer"]

STRATEGIES = ("fsdp2", "fsdp1", "ddp", "single")
QUANTS = ("nf4", "fp4", "int8", "none")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "uint8": torch.uint8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power

# States of one element in each rule, and how many of them are kept in 8 bits.
_STATES = {
    "adam": 2,
    "adamw": 2,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 1,
    "lars": 1,
    "lamb": 2,
    "ademamix": 3,
}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """``bf16``, ``fp16``, ``fp32`` or ``uint8`` (or the long names); ValueError for others."""
    if isinstance(name, torch.dtype):
        return name
    try:
        return _DTYPES[name.lower().removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"expected one of {', '.join(_DTYPES)}, got {name!r}") from None


def parse_bytes(text: str | float) -> int:
    """``24G`` and ``24GiB`` are 24 * 1024^3 bytes, ``24GB`` are 24 * 1000^3, a number is bytes.

    ValueError for anything else.
    """
    if isinstance(text, (int, float)):
        return int(text)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found.group(2).upper()) if found else None
    if found is None or unit is None:
        raise ValueError(f"expected a size such as 24G (or GiB), 24GB, or bytes, got {text!r}")
    return int(float(found.group(1)) * unit)


class Optimizer(NamedTuple):
    """An optimizer, by what it keeps.

    states: a parameter. bits: of each state; 0 for torch's own, whose states have the parameter's
    dtype. paged: large states lie in files (halfbyte's paged optimizers).
    """

    name: str
    states: int
    bits: int
    paged: bool


def parse_optimizer(name: str) -> Optimizer:
    """``adamw8bit``, ``paged_adamw8bit``, ``lion32bit``, ... are this package's; ``adamw`` and
    ``sgd`` alone (or with ``torch``) are torch's. Underscores and ``bnb`` do not count, so that the
    Transformers names work. ValueError for others.
    """
    plain = name.lower().replace("_", "").replace("-", "").replace("bnb", "")
    found = re.fullmatch(r"(paged)?([a-z]+?)(8bit|32bit|torch|)(?:fused)?", plain)
    rule = found.group(2) if found else ""
    if found is None or rule not in _STATES:
        known = ", ".join(f"{rule}8bit" for rule in _STATES)
        raise ValueError(
            f"expected an optimizer such as {known}, with 32bit instead, with paged_ in front, or "
            f"adamw and sgd for torch's; got {name!r}"
        )
    bits = {"8bit": 8, "32bit": 32}.get(found.group(3), 32 if found.group(1) else 0)
    states = _STATES[rule]
    if bits == 0:
        if rule not in ("adam", "adamw", "sgd", "adagrad"):
            bits = 32  # torch has no such rule of its own, or one with other states
        states = 0 if rule == "sgd" else states
    return Optimizer(name, states, bits, bool(found.group(1)))


@dataclass(frozen=True)
class Setting:
    """How the model is trained; see :func:`~._plan.plan` for what each field means."""

    ranks: int = 1
    strategy: str = "fsdp2"
    quant: str = "nf4"
    double_quant: bool = True
    blocksize: int = 64
    quant_storage: torch.dtype = torch.uint8
    dtype: torch.dtype = torch.bfloat16
    mixed_precision: bool = True
    lora_rank: int = 16
    lora_targets: str | tuple[str, ...] = "all-linear"
    train_dtype: torch.dtype = torch.float32
    full: bool = False
    optim: Optimizer = parse_optimizer("adamw8bit")  # noqa: RUF009 (a NamedTuple)
    batch: int = 1
    seq: int = 2048
    accumulation: int = 1
    checkpointing: bool = True
    attention: str = "sdpa"
    offload: bool = False
    reshard: bool = True
    wrap: str = "layer"
    device: str = "cuda"
    overhead: int = 1 << 30

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, allowed in (
            ("strategy", STRATEGIES),
            ("quant", QUANTS),
            ("attention", ("sdpa", "eager")),
            ("wrap", ("layer", "model")),
            ("device", ("cuda", "cpu")),
            ("blocksize", BLOCKSIZES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}"
                )
        for name in ("ranks", "batch", "seq", "accumulation", "lora_rank"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.overhead < 0:
            raise ValueError(f"overhead must be 0 or more bytes, got {self.overhead}")
        if self.strategy == "single" and self.ranks != 1:
            raise ValueError(f"strategy single means one rank, got ranks {self.ranks}")
        if self.full and self.quant != "none":
            raise ValueError(
                f"quantized weights are not trained: full needs quant none, got {self.quant}"
            )
        if self.offload and not self.sharded:
            raise ValueError(f"offload needs strategy fsdp2 or fsdp1, got {self.strategy}")
        if not self.dtype.is_floating_point or not self.train_dtype.is_floating_point:
            raise ValueError("dtype and train_dtype must be floating-point types")
        if self.strategy == "fsdp1" and self.packs and not self.quant_storage.is_floating_point:
            raise ValueError(
                "FSDP1 flattens floating-point parameters only: quant_storage must be bf16, fp16 "
                f"or fp32, got {self.quant_storage}"
            )

    @property
    def sharded(self) -> bool:
        """Whether the parameters are cut over the ranks."""
        return self.strategy in ("fsdp2", "fsdp1")

    @property
    def packs(self) -> bool:
        """Whether the weights of linear layers are packed to 4 bits."""
        return self.quant in ("nf4", "fp4")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch of a rank."""
        return self.batch * self.seq

    @property
    def adapter_dtype(self) -> torch.dtype:
        """In which dtype the products with adapters are computed."""
        return self.dtype if self.mixed_precision else self.train_dtype
