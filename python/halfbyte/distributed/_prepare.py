"""A model on the meta device gets the packed weights that a checkpoint has, still without data.

Sharding cuts what a layer holds, so that a layer must hold packed codes (of their packed shape)
before ``fully_shard`` sees it. Which layers those are, and how they are quantized, the checkpoint
says; see :mod:`._loading` for what comes after.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..functional import QuantState
from ..nn import _packed, _sharded
from ..nn._eight_bit import _EightBitWeight
from ..nn.modules import Linear4bit, Linear8bitLt, _FourBitWeight
from ._reader import ModelFiles

__all__ = ["plain_name", "prepare"]

FLOAT_DTYPE = "_quantized_from"
"""Attribute of a prepared int8 layer: what a float weight is cast to before it is quantized."""

Model = TypeVar("Model", bound=nn.Module)
Rename = Callable[[str], str]

# What wrappers put into the names of parameters: torch's, and PEFT's.
_WRAPPERS = re.compile(
    r"^base_model\.model\.|(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod"
    r"|base_layer|original_module|modules_to_save\.[^.]+)\."
)


def plain_name(name: str) -> str:
    """The name of a parameter without what PEFT, torch.compile, activation checkpointing and FSDP1
    have put into it: the one that checkpoints of the model have."""
    return _WRAPPERS.sub("", name)


def prepare(
    model: Model,
    files: ModelFiles | str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rename: Rename = plain_name,
) -> Model:
    """Give the layers of ``model`` that a checkpoint has quantized packed weights on the meta
    device, and those that are to be quantized while loading as well.

    * ``nn.Linear`` layers whose weight is packed in the checkpoint are replaced by
      :class:`~..nn.Linear4bit` or :class:`~..nn.Linear8bitLt`; for what files do not say
      (compute dtype, threshold) ``config.json`` counts.
    * Layers of this package get the quantization (type, block size, double quantization) that the
      checkpoint has; they keep their ``quant_storage``.
    * Where the checkpoint holds a float weight for a layer of this package, that layer's own
      settings count.

    To be called before ``fully_shard``, and before adapters are added. Layers that are not on the
    meta device stay as they are.

    Args:
        model: on the meta device; changed.
        files: the checkpoint, or its folder or file.
        dtype: what a float weight is cast to before it is quantized, and to which it is decoded;
            that of the checkpoint by default.
        rename: from the name of a parameter in the model to its name in the checkpoint.

    Returns:
        ``model``.

    Raises:
        ValueError: a weight of the checkpoint has another shape than the layer, or belongs to a
            kind of layer that cannot hold it; or the checkpoint is broken.
        FileNotFoundError: the checkpoint, or a file of it, is not there.
    """
    files = files if isinstance(files, ModelFiles) else ModelFiles(files)
    config = _quantization_config(files)
    bits = set()
    for path, module in list(model.named_modules()):
        name = rename(f"{path}.weight" if path else "weight")
        weight = module._parameters.get("weight")
        if weight is None or weight.device.type != "meta" or name not in files:
            continue
        four, eight = files.holds_4bit(name), files.holds_8bit(name)
        if (four or eight) and type(module) is nn.Linear:
            module = _replace(model, path, module, files, name, config)
        if isinstance(module, _FourBitWeight):
            _prepare_4bit(module, files, name, dtype)
        elif isinstance(module, _EightBitWeight):
            _prepare_8bit(module, files, name, dtype)
        elif four or (eight and weight.dtype != torch.int8):
            raise ValueError(
                f"{files.file(name)}: {name} is quantized, but the model has a "
                f"{type(module).__module__}.{type(module).__name__} there, which is none of "
                f"{nn.Linear.__module__}.Linear and the layers of "
                f"{_FourBitWeight.__module__.rpartition('.')[0]}"
            )
        if isinstance(module, Linear4bit | Linear8bitLt):
            bits.add(4 if isinstance(module, Linear4bit) else 8)
    if hasattr(model, "config"):  # a Transformers model: PEFT asks it which layers to expect
        for number in bits:
            setattr(model, f"is_loaded_in_{number}bit", True)
    return model


def _quantization_config(files: ModelFiles) -> dict[str, Any]:
    """``quantization_config`` of the ``config.json`` beside the checkpoint, or nothing."""
    folder = files.path if files.path.is_dir() else files.path.parent
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    section = found.get("quantization_config") if isinstance(found, dict) else None
    return section if isinstance(section, dict) else {}


def _replace(
    model: nn.Module,
    path: str,
    old: nn.Linear,
    files: ModelFiles,
    name: str,
    config: dict[str, Any],
) -> nn.Module:
    """Put the layer that the checkpoint has in place of ``old``."""
    new: Linear4bit | Linear8bitLt
    inputs, outputs = old.in_features, old.out_features
    if files.holds_4bit(name):
        packed, state = files.weight(name)
        named = config.get("bnb_4bit_compute_dtype")
        compute = getattr(torch, named) if isinstance(named, str) else None
        new = Linear4bit(
            inputs,
            outputs,
            bias=False,
            compute_dtype=compute,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=packed.dtype,
            device="meta",
        )
    else:
        threshold = float(config.get("llm_int8_threshold", 6.0 if config else 0.0))
        new = Linear8bitLt(
            inputs,
            outputs,
            bias=False,
            has_fp16_weights=False,
            threshold=threshold,
            device="meta",
        )
    new.bias = old.bias
    new.train(old.training)
    if not path:
        raise ValueError(
            f"{files.file(name)}: {name} is quantized, so the model must not be a bare "
            "torch.nn.Linear, which cannot be replaced in itself"
        )
    model.set_submodule(path, new)
    return new


def _prepare_4bit(
    module: _FourBitWeight, files: ModelFiles, name: str, dtype: torch.dtype | None
) -> None:
    """Give a 4-bit layer on the meta device its packed weight, without data."""
    weight, shape = module.weight, tuple(module._logical_shape())
    if _sharded.shard_of(weight) is not None or module._known_state() is not None:
        return
    if files.holds_4bit(name):
        _, state = files.weight(name)
        held, dtype = tuple(state.shape), state.dtype  # what it was quantized from
        settings = (
            state.blocksize,
            state.quant_type,
            state.state2.blocksize if state.nested else None,
        )
    else:
        held, dtype = tuple(files.shape(name)), dtype or files.dtype(name)
        settings = (
            weight.blocksize,
            weight.quant_type,
            256 if weight.compress_statistics else None,
        )
    if held != shape:
        raise ValueError(
            f"{files.file(name)}: {name} is a weight of shape {list(held)}, the model has "
            f"{list(shape)}"
        )
    storage = module.quant_storage
    packed = torch.empty(_packed.packed_units(shape, storage), 1, dtype=storage, device="meta")
    module._take(packed, _meta_state(shape, dtype, *settings), storage, replace=True)


def _meta_state(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
    nested_blocksize: int | None,
) -> QuantState:
    """The state of a quantized weight, without data."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    blocks = -(-math.prod(shape) // blocksize)
    offset, state2, kind = None, None, torch.float32
    if nested_blocksize is not None:
        kind = torch.uint8
        state2 = QuantState(
            empty(-(-blocks // nested_blocksize)),
            code=empty(256),
            blocksize=nested_blocksize,
            dtype=torch.float32,
        )
        offset = torch.zeros((), device="cpu")  # state dicts ask for its value
    return QuantState(
        empty(blocks, dtype=kind),
        torch.Size(shape),
        empty(16),
        blocksize,
        quant_type,
        dtype,
        offset,
        state2,
    )


def _prepare_8bit(
    module: _EightBitWeight, files: ModelFiles, name: str, dtype: torch.dtype | None
) -> None:
    """Give an int8 layer on the meta device its codes and scales, without data."""
    weight = module.weight
    if weight.dtype == torch.int8 and module._scales() is not None:
        return
    if getattr(weight, "has_fp16_weights", False):
        return
    if files.shape(name) != weight.shape:
        raise ValueError(
            f"{files.file(name)}: {name} is a weight of shape {list(files.shape(name))}, the model "
            f"has {list(weight.shape)}"
        )
    codes = torch.empty(weight.shape, dtype=torch.int8, device="meta")
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device="meta")
    module._load_codes(codes, scales, replace=True)
    module.__dict__[FLOAT_DTYPE] = dtype


def packed_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of ``model`` that hold a quantized weight, sharded or not, with their paths."""
    for path, module in model.named_modules():
        if module._parameters.get("weight") is None:
            continue
        if isinstance(module, _FourBitWeight):
            if _sharded.shard_of(module.weight) is not None or module._known_state() is not None:
                yield path, module
        elif isinstance(module, _EightBitWeight) and module.weight.dtype == torch.int8:
            yield path, module
