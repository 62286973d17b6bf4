"""Parameters of which this process has a part: FSDP2's DTensors and FSDP1's flat parameters.

An optimizer works on parts: states are those of the part, and blocks of 256 elements are counted
from its first element. In a state dict they have a form that does not depend on the number of
processes, so that it can be saved by some and loaded by others:

========================================  ======================================================
parameter and states                      in the state dict
========================================  ======================================================
DTensor, float32                          ``state1``, ``state2``: DTensors as the parameter's
DTensor, 8-bit, rows of whole blocks      likewise, uint8; ``absmax1``, ``absmax2``: DTensors
                                          ``[blocks]``, in the order of the whole parameter
DTensor, 8-bit, other rows                ``decoded1``, ``decoded2``: float32 DTensors
of FSDP1, any                             ``values1``, ``values1_slow`` (of AdEMAMix),
                                          ``values2``, ``values_rest`` (``compensation``):
                                          float32, flat, not under the inner key;
                                          ``step`` as a tensor; no ``unorm_vec``
========================================  ======================================================

A decoded block has its scale as its largest magnitude: the codes at both ends of the map stand for
the scale itself, though the signed map has no -1. So encoding the same elements again gives the
same codes and the same scale. An element of other blocks is off by at most half a gap between codes
at the scale of its new block (a whole gap where it had the lowest code of the signed map). A block
whose scale is below 2**-125 may hold one value by several codes: then the values stay.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .._dtensor import is_dtensor
from ._coding import BLOCKSIZE, decode, encode

_SLOW, _REST = "values1_slow", "values_rest"

# ---- parts of parameters -------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor (DTensor); any other tensor as it is."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def is_flat(p: Tensor) -> bool:
    """Whether FSDP1 has flattened it: into a flat parameter, or as part of one."""
    return getattr(p, "_fsdp_flattened", False) is True


def is_sharded(p: Tensor) -> bool:
    """Whether this process may have a part of it only."""
    return is_dtensor(p) or is_flat(p)


class _Owner(NamedTuple):
    """Where a parameter of FSDP1 is."""

    handle: weakref.ref[Any]
    place: int | None
    """In the flat parameter; None for that itself."""


_owners: Any = WeakIdKeyDictionary()


def _owner(p: Tensor) -> tuple[Any, int | None] | None:
    """FSDP1's handle that holds a parameter, and its place there. Nothing leads from a parameter to
    its handle, so all objects are looked through, once for all parameters."""
    found = _owners.get(p)
    if found is None or found.handle() is None:
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        for handle in gc.get_objects():
            if type(handle) is not FlatParamHandle:
                continue
            flat = handle.flat_param
            _owners[flat] = _Owner(weakref.ref(handle), None)
            for index, member in enumerate(getattr(flat, "_params", None) or ()):
                _owners[member] = _Owner(weakref.ref(handle), index)
        found = _owners.get(p)
    handle = None if found is None else found.handle()
    return None if handle is None else (handle, found.place)


def whole_numel(p: Tensor) -> int:
    """Elements of the whole parameter, of which this process may have a part."""
    if not is_flat(p):
        return p.numel()  # of a DTensor: of all of it
    owner = _owner(p)
    if owner is None:
        return p.numel()
    handle, index = owner
    if index is None:
        return int(handle.flat_param._unpadded_unsharded_size.numel())
    return int(handle.flat_param._numels[index])


def shard_index(p: Tensor) -> int:
    """Which of the parameter's parts this process has; the same for copies of a part."""
    if is_dtensor(p):
        dtensor: Any = p
        coordinate = dtensor.device_mesh.get_coordinate() or [0] * dtensor.device_mesh.ndim
        index = 0
        sizes = dtensor.device_mesh.shape
        for size, place, placement in zip(sizes, coordinate, dtensor.placements, strict=True):
            index = index if placement.is_replicate() else index * size + place
        return index
    owner = _owner(p) if is_flat(p) else None
    return int(owner[0].rank) if owner is not None and owner[0].uses_sharded_strategy else 0


def _moved(placement: Any, lead: int) -> Any:
    """A placement with ``lead`` more dimensions in front."""
    from torch.distributed.tensor import Shard

    if not lead or placement.is_replicate():
        return placement
    if type(placement) is Shard:
        return Shard(placement.dim + lead)
    return type(placement)(placement.dim + lead, split_factor=placement.split_factor)


def _as_dtensor(
    part: Tensor, mesh: Any, placements: Sequence[Any], shape: tuple[int, ...]
) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    if part.device.type == mesh.device_type or part.device.type == "meta":
        whole: Tensor = DTensor.from_local(
            part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
        return whole
    # Offloaded to the CPU: from_local would move it to the accelerator.
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), stride, part.dtype)
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta)
    offloaded: Tensor = DTensor(part, spec, requires_grad=False)
    return offloaded


def placed(p: Any, part: Tensor, lead: int = 0) -> Tensor:
    """A DTensor that lies as ``p`` does, of which this process has ``part``.

    ``lead``: how many dimensions ``part`` has in front of the parameter's.
    """
    placements = [_moved(placement, lead) for placement in p.placements]
    return _as_dtensor(part.detach(), p.device_mesh, placements, (*part.shape[:lead], *p.shape))


def gathered(p: Any, part: Tensor, lead: int = 0) -> Tensor:
    """The whole of such a tensor, contiguous, sharing nothing with ``part``."""
    # What is offloaded to the CPU travels between accelerators.
    dtensor: Any = placed(p, part.to(p.device_mesh.device_type), lead)
    whole: Tensor = dtensor.full_tensor().to(part.device)
    return whole.clone() if whole.data_ptr() == part.data_ptr() else whole.contiguous()


def part_of(p: Any, whole: Tensor, lead: int = 0) -> Tensor:
    """This process's part of a tensor that is to lie as the sharded ``p`` does."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    replicated = DTensor.from_local(whole.detach(), p.device_mesh, everywhere, run_check=False)
    placements = [_moved(placement, lead) for placement in p.placements]
    part: Tensor = replicated.redistribute(placements=placements).to_local()
    return part.to(whole.device)


def summed(p: Tensor, values: Tensor) -> Tensor:
    """``values`` added over the processes that have the other parts of ``p``."""
    if is_dtensor(p):
        from torch.distributed.tensor import DTensor, Partial

        dtensor: Any = p
        placements = [pl if pl.is_replicate() else Partial() for pl in dtensor.placements]
        total: Tensor = DTensor.from_local(
            values, dtensor.device_mesh, placements, run_check=False
        ).full_tensor()
        return total.to(values.device)
    owner = _owner(p) if is_flat(p) else None
    if owner is not None and owner[0].uses_sharded_strategy:
        torch.distributed.all_reduce(values, group=owner[0].process_group)
    return values


def companions(p: Tensor) -> Any:
    """Equal for parameters whose parts are on the same processes: :func:`summed` may be called once
    for all of them."""
    if is_dtensor(p):
        dtensor: Any = p
        return dtensor.device_mesh, tuple(pl.is_replicate() for pl in dtensor.placements)
    owner = _owner(p) if is_flat(p) else None
    return None if owner is None else id(owner[0].process_group)


def agreed(true: bool, params: Iterable[Tensor]) -> bool:
    """Whether it is true on all processes that have parts of the parameters. All must ask."""
    firsts: dict[Any, Tensor] = {}
    for p in params:
        if is_sharded(p):
            firsts.setdefault(companions(p), p)
    for p in firsts.values():
        device = local(p).device
        if is_dtensor(p):
            device = torch.device(p.device_mesh.device_type)  # type: ignore[attr-defined]
        against = torch.tensor([0.0 if true else 1.0], device=device)
        true = float(summed(p, against)) == 0.0
    return true


# ---- into a state dict ---------------------------------------------------------------------------


def rows_are_blocks(p: Any) -> bool:
    """Whether every row of a DTensor (its elements at one index of dimension 0) is a whole number
    of blocks, and rows are what is sharded: its blocks are then those of the whole tensor."""
    from torch.distributed.tensor import Shard

    if p.dim() == 0:
        return False
    sharded = [placement for placement in p.placements if not placement.is_replicate()]
    if len(sharded) > 1 or any(type(s) is not Shard or s.dim != 0 for s in sharded):
        return False
    return prod(p.shape[1:]) % BLOCKSIZE == 0


def _per_row(p: Any) -> int:
    return prod(p.shape[1:]) // BLOCKSIZE


def _scales_lie_alike(p: Any) -> bool:
    """Whether every process has the scales of its own rows when ``[blocks]`` is sharded."""
    rows, k = p.shape[0], _per_row(p)
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if not placement.is_replicate():
            return -(-rows // size) * k == -(-rows * k // size)
    return True


def _placed_scales(p: Any, absmax: Tensor) -> Tensor:
    """Scales of this process's rows as part of a DTensor ``[blocks]`` or ``[n, blocks]``.

    Where the ranks do not have as many rows each, they exchange them: all ranks must call.
    """
    lead, k = absmax.dim() - 1, _per_row(p)
    shape = (*absmax.shape[:lead], p.shape[0] * k)
    placements = [_moved(placement, lead) for placement in p.placements]
    if not _scales_lie_alike(p):
        rows = absmax.unflatten(-1, (-1, k))
        whole = gathered(_Like(p, (p.shape[0], k)), rows, lead).flatten(lead)
        absmax = part_of(p, whole, lead)
    return _as_dtensor(absmax.detach(), p.device_mesh, placements, shape)


class _Like(NamedTuple):
    """Another shape, placed as a DTensor is."""

    p: Any
    shape: tuple[int, ...]

    @property
    def device_mesh(self) -> Any:
        return self.p.device_mesh

    @property
    def placements(self) -> Any:
        return self.p.placements


def exported(p: Tensor, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The states of a sharded parameter as a state dict holds them; see the module."""
    return _exported_flat(p, state) if is_flat(p) else _exported_dtensor(p, state)


def _exported_dtensor(p: Tensor, state: Mapping[Any, Any]) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    whole_blocks = rows_are_blocks(p)
    for key, value in state.items():
        if key in ("state1", "state2"):
            lead = value.dim() - p.dim()
            number = key[-1]
            if value.dtype is torch.uint8 and not whole_blocks:
                value = decode(value, state[f"absmax{number}"], state[f"qmap{number}"], lead)
                key = f"decoded{number}"
            out[key] = placed(p, value, lead)
        elif key in ("absmax1", "absmax2"):
            if whole_blocks:
                out[key] = _placed_scales(p, value)
        elif key == "compensation":
            out[key] = placed(p, value)
        elif key in ("qmap1", "qmap2"):
            # Many parameters share it, and what loads a checkpoint writes into it.
            out[key] = value.detach().clone()
        else:
            out[key] = value
    return out


def _exported_flat(p: Tensor, state: Mapping[Any, Any]) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for key, value in state.items():
        if key in ("state1", "state2"):
            lead, number = value.dim() - p.dim(), key[-1]
            if value.dtype is torch.uint8:
                value = decode(value, state[f"absmax{number}"], state[f"qmap{number}"], lead)
            value = value.detach()
            if lead:
                out["values1"], out[_SLOW] = value[0], value[1]
            else:
                out[f"values{number}"] = value
        elif key == "compensation":
            out[_REST] = value.float()  # FSDP1 wants one dtype for all states of a parameter
        elif key == "step":
            out[key] = torch.tensor(value)  # what loads from rank 0 takes every state for a tensor
        elif not isinstance(value, Tensor) or value.dim() == 0:
            out[key] = value
    return out


# ---- and out of one ------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """What states the optimizer would make for a parameter."""

    coded: Callable[[], tuple[str, ...]]
    """Numbers of those that are 8-bit, by the settings and the size of the whole parameter."""
    stacked: bool
    """Whether ``state1`` holds two moments."""
    qmap: Callable[[str], Tensor]
    """The 8-bit map of a state, by its number."""


def localized(where: str, p: Tensor, state: Mapping[Any, Any], wanted: Wanted) -> dict[Any, Any]:
    """A loaded state as one of this process's part of ``p``.

    Takes every form that :func:`exported` makes, whole tensors as of an optimizer that is not
    sharded, and tensors of the part. What fits nothing is left as it is, to be refused by the
    optimizer's own check. ``where``: its name.

    Raises:
        ValueError: for a DTensor of another shape than the parameter's, or for a parameter that is
            no DTensor; for values without a dtype that they could be.
    """
    out = dict(state)
    for key, value in state.items():
        if is_dtensor(value) and not is_dtensor(p):
            raise ValueError(
                f"{where}[{key!r}] is a DTensor, but the parameter is not sharded: gather the "
                "state dict first (full_tensor(), or StateDictOptions(full_state_dict=True))"
            )
    _from_values(where, p, out, wanted)
    for number in ("1", "2"):
        lead = int(wanted.stacked and number == "1")
        key, scales, qmap = f"state{number}", f"absmax{number}", f"qmap{number}"
        if f"decoded{number}" in out:
            values = _floats(where, f"decoded{number}", out.pop(f"decoded{number}"))
            values = _part(where, f"decoded{number}", p, values, lead)
            _encode_into(out, number, values, wanted)
        elif is_dtensor(p) and isinstance(out.get(key), Tensor):
            value = out[key]
            blocks = _whole_blocks(p, value, out.get(scales), out.get(qmap), lead)
            if blocks is None:
                out[key] = _part(where, key, p, value, lead)
                if is_dtensor(out.get(scales)):
                    out[scales] = _scales_part(where, scales, p, out[scales], lead)
            elif rows_are_blocks(p):
                rows = out[scales].unflatten(-1, (-1, _per_row(p)))
                out[key] = part_of(p, value, lead)
                out[scales] = part_of(p, rows, lead).flatten(lead)
            else:
                _encode_into(out, number, part_of(p, blocks(), lead), wanted)
    if isinstance(out.get("compensation"), Tensor) and is_dtensor(p):
        out["compensation"] = _part(where, "compensation", p, out["compensation"], 0)
    for key in ("qmap1", "qmap2", "unorm_vec"):
        if is_dtensor(out.get(key)):
            out[key] = out[key].full_tensor()
    return out


def _floats(where: str, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}[{key!r}] must be a float32 tensor, got {got}")
    return value


def _from_values(where: str, p: Tensor, out: dict[Any, Any], wanted: Wanted) -> None:
    """Replaces FSDP1's form by states."""
    present = [key for key in ("values1", _SLOW, "values2", _REST) if key in out]
    for key in present:
        value = out[key]
        shape = tuple(local(p).shape)
        _floats(where, key, value)
        if tuple(value.shape) not in (shape, tuple(p.shape)):
            raise ValueError(
                f"{where}[{key!r}] must have shape {list(p.shape)}, got {list(value.shape)}"
            )
        out[key] = _part(where, key, p, value.detach(), 0).float() if is_dtensor(p) else value
    if not present:
        return
    values = {"1": out.pop("values1", None), "2": out.pop("values2", None)}
    slow, rest = out.pop(_SLOW, None), out.pop(_REST, None)
    if wanted.stacked:
        if values["1"] is None or slow is None:
            raise ValueError(f"{where} must have both 'values1' and {_SLOW!r}, got {present}")
        values["1"] = torch.stack([values["1"], slow])
    coded = wanted.coded()
    for number, value in values.items():
        if value is None:
            continue
        if number in coded:
            _encode_into(out, number, value, wanted)
        else:
            out[f"state{number}"] = value.detach().float()
    if rest is not None:
        out["compensation"] = rest.detach().to(torch.bfloat16)


def _encode_into(out: dict[Any, Any], number: str, values: Tensor, wanted: Wanted) -> None:
    qmap = out.get(f"qmap{number}")
    if qmap is None:
        qmap = out[f"qmap{number}"] = wanted.qmap(number)
    elif is_dtensor(qmap):
        qmap = qmap.full_tensor()
    lead = int(wanted.stacked and number == "1")
    codes, absmax = encode(values, qmap.to(values.device), number == "2", lead)
    out[f"state{number}"], out[f"absmax{number}"] = codes, absmax


def _part(where: str, key: str, p: Any, value: Any, lead: int) -> Any:
    """This process's part of a loaded tensor of ``p``'s shape; what is none, as it is."""
    if not isinstance(value, Tensor) or not is_dtensor(p):
        return value
    shape = tuple(value.shape[lead:])
    if not is_dtensor(value):
        if shape != tuple(p.shape) or shape == tuple(local(p).shape):
            return value
        return part_of(p, value, lead)
    if shape != tuple(p.shape):
        raise ValueError(
            f"{where}[{key!r}] must have shape {[*value.shape[:lead], *p.shape]} for a parameter "
            f"of shape {list(p.shape)}, got {list(value.shape)}"
        )
    return _moved_to(value, p, [_moved(placement, lead) for placement in p.placements])


def _moved_to(value: Any, p: Any, placements: list[Any]) -> Tensor:
    """The part of a DTensor that this process would have of one placed so."""
    if value.device_mesh != p.device_mesh:
        return local(
            _replicated(value.full_tensor(), p.device_mesh).redistribute(placements=placements)
        )
    if list(value.placements) != placements:
        value = value.redistribute(placements=placements)
    return local(value)


def _replicated(whole: Tensor, mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _scales_part(where: str, key: str, p: Any, scales: Any, lead: int) -> Tensor:
    """The scales of this process's rows, of a DTensor ``[blocks]``. All ranks must call."""
    k = _per_row(p)
    blocks = p.shape[0] * k if p.dim() else 0
    if not rows_are_blocks(p) or scales.shape[-1] != blocks or scales.dim() != lead + 1:
        raise ValueError(
            f"{where}[{key!r}] must be scales of whole rows of a parameter of shape "
            f"{list(p.shape)}, got a DTensor of shape {list(scales.shape)}"
        )
    if _scales_lie_alike(p):
        return _moved_to(scales, p, [_moved(placement, lead) for placement in p.placements])
    return part_of(p, scales.full_tensor().unflatten(-1, (-1, k)), lead).flatten(lead)


def _whole_blocks(p: Any, value: Any, scales: Any, qmap: Any, lead: int) -> Any:
    """What decodes the 8-bit state of a whole parameter, or None if it is none."""
    if is_dtensor(value) or value.dtype is not torch.uint8 or is_dtensor(scales):
        return None
    shape = tuple(value.shape[lead:])
    if shape != tuple(p.shape) or shape == tuple(local(p).shape):
        return None
    blocks = (*value.shape[:lead], -(-p.numel() // BLOCKSIZE))
    if not isinstance(scales, Tensor) or tuple(scales.shape) != blocks:
        return None
    if not isinstance(qmap, Tensor) or qmap.shape != (256,):
        return None
    return lambda: decode(value, scales, local(qmap), lead)
