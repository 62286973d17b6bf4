"""Small helpers that clients use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """Packs a JSON-able dictionary into a uint8 tensor ``[bytes]``, so that it can be saved as one.

    Raises:
        TypeError: when a value is not JSON-able.
    """
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """The inverse of :func:`pack_dict_to_tensor`.

    Raises:
        ValueError: when the bytes are not a JSON object.
    """
    raw = bytes(tensor_data.detach().to("cpu", torch.uint8).flatten().tolist())
    unpacked = json.loads(raw.decode("utf-8"))
    if not isinstance(unpacked, dict):
        raise ValueError(f"expected a packed dictionary, got {type(unpacked).__name__}")
    return unpacked


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[..., nn.Module],
    skip_modules: Iterable[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Replaces every ``torch.nn.Linear`` of ``model`` in place.

    Args:
        model: walked recursively.
        linear_replacement: called with ``(in_features, out_features, bias)``.
        skip_modules: names (last component) of modules to leave alone.
        copy_weights: share the old weight and bias with the new layer.
        post_processing_function: the name of a method of the old layers, called with the layer.

    Returns:
        ``model``.
    """
    skip = tuple(skip_modules)
    for name, child in list(model.named_children()):
        if len(list(child.children())) > 0:
            replace_linear(child, linear_replacement, skip, copy_weights, post_processing_function)
        if isinstance(child, nn.Linear) and name not in skip:
            new = linear_replacement(child.in_features, child.out_features, child.bias is not None)
            if copy_weights:
                new.weight = child.weight
                new.bias = child.bias
            setattr(model, name, new)
            if post_processing_function is not None:
                function = getattr(child, post_processing_function, None)
                if function is not None:
                    function(child)
    return model


__all__ = ["pack_dict_to_tensor", "replace_linear", "unpack_tensor_to_dict"]
