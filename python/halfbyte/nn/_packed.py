"""Packed 4-bit weights: how many bytes they take, and how they lie in a state dict.

On disk a weight named ``w`` is a family of tensors (see ``QuantState.as_dict(packed=True)``):

=================================  ==============  ==============================================
``w``                              quant_storage   the packed codes, ``[units, 1]``
``w.absmax``                       f32 or uint8    a scale a block, or its 8-bit code when nested
``w.quant_map``                    f32 ``[16]``    the values of the sixteen codes
``w.nested_absmax``                f32             only nested: the scales of the scales
``w.nested_quant_map``             f32 ``[256]``   only nested: the values of their codes
``w.quant_state.bitsandbytes__*``  uint8           JSON: type, block size, dtype, shape, offset
=================================  ==============  ==============================================

:func:`read` takes such a family out of a state dict and checks it; ``Linear4bit``,
``Embedding4bit`` and the parametrization of fused experts all load through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..functional import QuantState

#: What a plain family holds beside the packed codes and the JSON, and what a nested one adds.
PLAIN_KEYS = ("absmax", "quant_map")
NESTED_KEYS = ("nested_absmax", "nested_quant_map")


def packed_bytes(shape: Iterable[int]) -> int:
    """Bytes that a weight of ``shape`` takes: two codes a byte, an odd last one padded."""
    return (math.prod(shape) + 1) // 2


def packed_units(shape: Iterable[int], storage: torch.dtype) -> int:
    """Elements of dtype ``storage`` that a weight of ``shape`` takes, the last one zero-padded."""
    return -(-packed_bytes(shape) // storage.itemsize)


def holds(packed: torch.Tensor, shape: Iterable[int]) -> bool:
    """Whether ``packed`` has exactly the length of a packed weight of ``shape``."""
    return packed.numel() == packed_units(shape, packed.dtype)


def restore(packed: torch.Tensor, storage: torch.dtype, shape: Iterable[int]) -> torch.Tensor:
    """The same packed bytes seen as dtype ``storage``, ``[units, 1]``.

    Never converts a value. Copies only when ``packed`` is strided or the padding changes.
    """
    if packed.dtype == storage:
        return packed.reshape(-1, 1)
    raw = packed.reshape(-1).view(torch.uint8)
    units = packed_units(shape, storage)
    size = units * storage.itemsize
    if raw.numel() < size:
        raw = torch.cat((raw, raw.new_zeros(size - raw.numel())))
    return raw[:size].view(storage).reshape(units, 1)


class Family(NamedTuple):
    """A 4-bit weight read from a state dict."""

    packed: torch.Tensor
    state: QuantState


class Report(NamedTuple):
    """Where ``nn.Module.load_state_dict`` wants complaints to go.

    It drops the first two with ``strict=False``; errors are raised in any case.
    """

    missing: list[str]
    unexpected: list[str]
    errors: list[str]

    def incomplete(self, key: str, names: Sequence[str]) -> None:
        """The family under ``key`` lacks ``names``, so none of it can be used.

        An error even with ``strict=False``: leaving out what is missing would leave codes without
        their scales.
        """
        full = [f"{key}.{name}" if name else key for name in names]
        self.missing.extend(full)
        self.errors.append(
            f"{key}: a packed 4-bit weight loads only as a whole, and the state dict lacks "
            + ", ".join(full)
        )


def members(state_dict: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The entries below ``key``, by the rest of their names."""
    start = key + "."
    return {
        name[len(start) :]: value for name, value in state_dict.items() if name.startswith(start)
    }


def read(
    state_dict: Mapping[str, Any],
    key: str,
    shape: Sequence[int],
    device: torch.device,
    report: Report,
    *,
    quant_type: str = "nf4",
    share: bool = False,
) -> Family | None:
    """Read and check the family under ``key``; complain through ``report`` and return None if it
    will not do.

    shape: what the weight must unpack to. device: where its statistics shall live (the packed codes
    stay where they are). quant_type: named in the complaint when no family is there at all. share:
    let the state use the state dict's own tensors, as ``load_state_dict(assign=True)`` asks.
    """
    stats = members(state_dict, key)
    names = ["quant_state." + name for name in QuantState.valid_qs_type_keys]
    absmax = stats.get("absmax")
    nested = any(name in stats for name in NESTED_KEYS) or (
        isinstance(absmax, torch.Tensor) and absmax.dtype == torch.uint8
    )
    needed = PLAIN_KEYS + NESTED_KEYS if nested else PLAIN_KEYS

    known = {*PLAIN_KEYS, *NESTED_KEYS, *names}
    report.unexpected.extend(f"{key}.{name}" for name in stats if name not in known)
    if key not in state_dict and not stats:
        report.missing.append(key)
        return None
    lacks = [] if key in state_dict else [""]
    lacks += [name for name in needed if name not in stats]
    if not any(name in stats for name in names):
        lacks.append("quant_state.bitsandbytes__" + quant_type)
    if lacks:
        report.incomplete(key, lacks)
        return None

    wanted = {name: stats[name] for name in (*needed, *names) if name in stats}
    for name, value in {"": state_dict[key], **wanted}.items():
        if not isinstance(value, torch.Tensor):
            where = f"{key}.{name}" if name else key
            report.errors.append(f"{where}: expected a tensor, got {type(value).__name__}")
            return None
    if not share:
        wanted = {name: value.clone() for name, value in wanted.items()}
    try:
        state = QuantState.from_dict(wanted, device)
        found = tuple(state.shape)
    except (
        Exception
    ) as error:  # whatever a broken file makes of it, load_state_dict reports it with its key
        report.errors.append(f"{key}: its quantization state cannot be read: {error}")
        return None

    packed = state_dict[key]
    values = math.prod(found)
    blocks = -(-values // state.blocksize)
    if found != tuple(shape):
        report.errors.append(
            f"size mismatch for {key}: the state dict holds a packed weight of shape "
            f"{list(found)}, the module has {list(shape)}"
        )
    elif not holds(packed, found):
        report.errors.append(
            f"size mismatch for {key}: a packed weight of shape {list(found)} takes "
            f"{packed_units(found, packed.dtype)} elements of {packed.dtype}, "
            f"the state dict holds {list(packed.shape)}"
        )
    elif state.absmax.numel() != blocks:
        report.errors.append(
            f"size mismatch for {key}.absmax: {values} values in blocks of {state.blocksize} have "
            f"{blocks} scales, the state dict holds {state.absmax.numel()}"
        )
    else:
        return Family(packed, state)
    return None
