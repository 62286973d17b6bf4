"""Loads a checkpoint into a sharded model: every rank reads its part of the files.

No rank ever holds more of the model than its shards, and a layer's part of what is being worked on:

* Packed weights (4-bit, int8) are copied: the bytes of the rank's codes, and its scales.
* A float weight for a quantized layer is quantized while loading. A rank reads the values that its
  codes and its scales cover, rounded to blocks, and quantizes those. Double quantization needs the
  mean of all scales and blocks of 256 of them: the float32 scales of one layer are gathered for
  that. The bytes are those of quantizing the whole weight in one process.
* Other tensors are copied by rows (or as their placements say), in the dtype the model has.

Everything is checked, on all ranks, before anything is read.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._dtensor import is_dtensor
from ..nn import _sharded
from ..nn._sharded import Whole4bit, Whole8bit
from ..nn.modules import Params4bit, _FourBitWeight
from . import _initialize, _parts
from ._parts import Part, Place
from ._prepare import FLOAT_DTYPE, Model, Rename, packed_layers, plain_name, prepare
from ._ranks import Ranks
from ._reader import ModelFiles, scales_name

__all__ = ["Loaded", "load", "load_sharded"]

ADAPTERS = ("*lora_*",)
"""What a checkpoint of a model need not hold, as patterns of names."""


class Loaded(NamedTuple):
    """What :func:`load` has done.

    Attributes:
        initialized: names of parameters and buffers that the checkpoint does not hold.
        unexpected: names in the checkpoint that the model has no place for.
        bytes_read: how many bytes this rank has copied out of the files.
    """

    initialized: list[str]
    unexpected: list[str]
    bytes_read: int


def load(
    model: nn.Module,
    files: ModelFiles | str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    rename: Rename = plain_name,
    may_lack: Sequence[str] = ADAPTERS,
    initialize: Callable[[nn.Module], Any] | None = None,
    group: Any = None,
) -> Loaded:
    """Fill a model that :func:`.prepare` and ``fully_shard`` have seen. All ranks call it.

    What is on the meta device is made first, as shards. Quantized weights, other parameters and
    persistent buffers come from the checkpoint; what that need not hold (non-persistent buffers
    such as rotary frequencies, adapters) is initialized if it was on the meta device, and left
    alone otherwise. Tied weights stay tied. A model that is not sharded works as well.

    Args:
        model: changed.
        files: the checkpoint, or its folder or file; every rank must see it.
        device: where to put what is on the meta device; by default where the device mesh of the
            shards is, or the CPU. With FSDP2's CPU offload it is ``"cpu"``.
        rename: from the name of a parameter in the model to its name in the checkpoint.
        may_lack: patterns (``fnmatch``) of names that the checkpoint need not hold.
        initialize: called with each module that directly owns something on the meta device that the
            checkpoint does not hold; these are plain whole tensors at that time, filled with NaN.
            By default PEFT's adapters, Transformers' ``_init_weights`` or ``reset_parameters()``
            is used. All ranks draw the same numbers, whatever their number.
        group: the ranks that load together; the default group.

    Raises:
        ValueError: a tensor is missing, has another shape, dtype or quantization than the model, or
            a file is broken. The same on all ranks; nothing has been read then.
        FileNotFoundError: the checkpoint, or a file of it, is not there.
        RuntimeError: something cannot be initialized, or reading failed: the model must not be used
            then.
    """
    ranks = Ranks(group)
    checked: list[tuple[ModelFiles, _Plan]] = []

    def check() -> int:
        source = files if isinstance(files, ModelFiles) else ModelFiles(files)
        checked.append((source, _Plan(model, source, rename, may_lack)))
        return source.fingerprint()

    prints = ranks.together(check)
    for other, found in enumerate(prints):
        if found != prints[0]:
            raise ValueError(
                f"rank {other} does not see the same model as rank 0: names of tensors, or sizes "
                "of files, differ"
            )
    source, plan = checked[0]
    before = source.bytes_read

    def fill() -> None:
        with torch.no_grad():
            _materialize(model, torch.device(device) if device is not None else _device(model))
            _initialize.run(model, plan.lacking, initialize, ranks)
            for name, path, attribute in plan.plain:
                owner = model.get_submodule(path)
                _copy(getattr(owner, attribute), source.tensor(name), source)
            for name, path in plan.packed:
                _load_packed(model.get_submodule(path), source, name)

    ranks.together(fill)
    return Loaded(
        [f"{path}.{attribute}".lstrip(".") for path, attribute, _ in plan.lacking],
        plan.unexpected,
        source.bytes_read - before,
    )


def load_sharded(
    model: Model,
    files: ModelFiles | str | os.PathLike[str],
    shard: Callable[[Model], Any],
    *,
    dtype: torch.dtype | None = None,
    rename: Rename = plain_name,
    **options: Any,
) -> Model:
    """:func:`.prepare`, ``shard(model)`` and :func:`load` in one call.

    Args:
        model: on the meta device.
        files: the checkpoint, or its folder or file.
        shard: adds adapters, if any, and calls ``fully_shard`` on the layers and the model.
        dtype, rename: as for :func:`.prepare`.
        options: the others of :func:`load`.

    Returns:
        ``model``, on its device.
    """
    ranks = Ranks(options.get("group"))

    def packed() -> None:
        prepare(model, files, dtype=dtype, rename=rename)

    ranks.together(packed)
    shard(model)
    load(model, files, rename=rename, **options)
    return model


# ---- what there is to do -------------------------------------------------------------------------


class _Plan:
    """What to load from where, checked.

    Attributes:
        plain: name in the checkpoint, path of the module and attribute of tensors to copy.
        packed: name in the checkpoint and path of the layer of quantized weights.
        lacking: path, attribute and whether it is on the meta device, of what the checkpoint does
            not hold.
        unexpected: names that have no place.
    """

    def __init__(
        self, model: nn.Module, files: ModelFiles, rename: Rename, may_lack: Sequence[str]
    ) -> None:
        self.plain: list[tuple[str, str, str]] = []
        self.packed: list[tuple[str, str]] = []
        self.lacking: list[tuple[str, str, bool]] = []
        used: set[str] = set()
        missing: list[str] = []
        layers = dict(packed_layers(model))
        tied = _tied(model)
        done: set[int] = set()
        for path, module in model.named_modules():
            buffers = {
                name: tensor
                for name, tensor in module._buffers.items()
                if tensor is not None and name not in module._non_persistent_buffers_set
            }
            for attribute, tensor in (*module._parameters.items(), *buffers.items()):
                if tensor is None or id(tensor) in done:
                    continue
                done.add(id(tensor))
                places = tied.get(id(tensor), [(path, attribute)])
                names = [rename(_join(*place)) for place in places]
                held = [name for name in names if name in files]
                if path in layers and attribute == "weight":
                    if held:
                        self.packed.append((held[0], path))
                        used |= _check_packed(module, files, held[0])
                    else:
                        missing.append(names[0])
                elif held:
                    used.update(held)
                    self.plain.append((held[0], path, attribute))
                    _check_plain(module, tensor, files, held[0])
                elif any(fnmatch.fnmatch(names[0], pattern) for pattern in may_lack):
                    self.lacking.append((path, attribute, tensor.device.type == "meta"))
                else:
                    missing.append(names[0])
            for attribute in module._non_persistent_buffers_set:
                buffer = module._buffers.get(attribute)
                if buffer is not None and buffer.device.type == "meta":
                    self.lacking.append((path, attribute, True))
        if missing:
            listed = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            raise ValueError(f"{files.path} lacks {len(missing)} tensors of the model: {listed}")
        self.unexpected = [name for name in files if name not in used]


def _join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def _tied(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Where each parameter that has several places is, by its id."""
    places: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((path, attribute))
    return {key: found for key, found in places.items() if len(found) > 1}


def _whole(module: Any) -> Whole4bit | Whole8bit:
    """What all ranks know of a quantized layer's weight."""
    shard = _sharded.shard_of(module.weight)
    if shard is not None:
        return shard.whole
    if isinstance(module, _FourBitWeight):
        state = module._known_state()
        assert state is not None
        return Whole4bit(state)
    return Whole8bit(module.weight.shape[0])


def _check_packed(module: Any, files: ModelFiles, name: str) -> set[str]:
    """Raise ValueError unless the checkpoint has a weight for the quantized layer; the names that
    make it up."""
    where = f"{files.file(name)}: {name}"
    four = isinstance(module, _FourBitWeight)
    shape: Any = tuple(module._logical_shape()) if four else tuple(module.weight.shape)
    whole: Any = _whole(module)
    if files.holds_4bit(name) or files.holds_8bit(name):
        if files.holds_4bit(name) != four:
            held = "4-bit" if files.holds_4bit(name) else "8-bit"
            raise ValueError(f"{where} is {held}, the model has a {type(module).__name__} there")
        _, scales = files.weight(name)
        if four:
            wrong = whole.differs(scales)
            if wrong is None and scales.nested:
                mine, other = whole._state.state2.blocksize, scales.state2.blocksize
                if mine != other:
                    wrong = f"blocks of {mine} scales are expected, got {other}"
            if wrong is not None:
                raise ValueError(f"{where}: {wrong}")
        found = tuple(scales.shape) if four else tuple(files.shape(name))
        names = {name, scales_name(name), scales_name(name).replace("SCB", "weight_format")}
        if four:
            names = set(files.family(name))
    else:
        found, names = tuple(files.shape(name)), {name}
        if not files.dtype(name).is_floating_point:
            raise ValueError(
                f"{where} must be floating-point to be quantized, got {files.dtype(name)}"
            )
    if found != shape:
        raise ValueError(f"{where} is a weight of shape {list(found)}, the model has {list(shape)}")
    return names


def _check_plain(module: nn.Module, tensor: Tensor, files: ModelFiles, name: str) -> None:
    where = f"{files.file(name)}: {name}"
    shape, dtype = files.shape(name), files.dtype(name)
    if files.holds_4bit(name) or isinstance(tensor, Params4bit):
        raise ValueError(
            f"{where} is for a {type(module).__name__} that prepare() has not seen: call it before "
            "fully_shard()"
        )
    if shape != tensor.shape:
        raise ValueError(f"{where} has shape {list(shape)}, the model has {list(tensor.shape)}")
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
        raise ValueError(f"{where} is {dtype}, the model has {tensor.dtype}")


# ---- making and filling --------------------------------------------------------------------------


def _device(model: nn.Module) -> torch.device:
    """Where the shards of ``model`` belong; the CPU if there are none."""
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh.device_type != "cpu":
            return torch.device(mesh.device_type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Make what is on the meta device, uninitialized. Tied parameters stay one object."""
    tied = [
        [(model.get_submodule(path), attribute) for path, attribute in places]
        for places in _tied(model).values()
    ]
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with what it was made for, so that ids stay taken

    def make(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return tensor
        if id(tensor) not in made:
            made[id(tensor)] = tensor, torch.empty_like(tensor, device=device)
        return made[id(tensor)][1]

    model._apply(make)
    for (module, attribute), *others in tied:
        for other, name in others:
            setattr(other, name, getattr(module, attribute))


def _copy(target: Tensor, source: Tensor, files: ModelFiles) -> None:
    """Copy this rank's part of ``source``, a mapped tensor, into ``target``."""
    local = target
    if is_dtensor(target):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        like: Any = target
        local = like._local_tensor
        if local.numel() == 0:
            return
        sizes, starts = compute_local_shape_and_global_offset(
            target.shape, like.device_mesh, like.placements
        )
        for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            source = source.narrow(dim, start, size)
    files.bytes_read += source.numel() * source.element_size()
    local.copy_(source)


def _load_packed(module: Any, files: ModelFiles, name: str) -> None:
    """Give a quantized layer its weight, or this rank's part of it."""
    weight = module.weight
    shard = _sharded.shard_of(weight)
    world, rank = (1, 0) if shard is None else _sharded.place(weight)
    group = None
    if world > 1:
        index = next(i for i, p in enumerate(weight.placements) if p.is_shard())
        group = weight.device_mesh.get_group(index)
    place = Place(world, rank, group, weight.device)
    made: Part
    if isinstance(module, _FourBitWeight):
        if files.holds_4bit(name):
            made = _parts.read_4bit(files, name, weight.dtype, place)
        else:
            known = _whole(module)._state  # type: ignore[union-attr]
            made = _parts.quantize_4bit(files, name, known, weight.dtype, place)
    else:
        made = _parts.read_8bit(files, name, module.__dict__.get(FLOAT_DTYPE), place)
    device = weight.device
    if shard is not None:
        scales = [scale.to(device) for scale in made.scales]
        module.weight = _sharded.put(weight, made.codes.to(device), made.whole, scales)
    elif isinstance(made.whole, Whole4bit):
        state = made.whole.state(made.scales)
        state.to(device)
        module._take(made.codes.view(-1, 1).to(device), state, weight.dtype, replace=False)
    else:
        codes = made.codes.view(weight.shape).to(device)
        module._load_codes(codes, made.scales[0].to(device), replace=False)
