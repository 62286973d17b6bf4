"""Small helpers that clients use."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._outliers import LayerOutliers, OutlierReport, ThresholdPoint, find_outliers

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
"""What ``weight_format`` in a state dict of ``Linear8bitLt`` means. Only 0 is written today."""

INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {
    number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()
}


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


def find_outlier_dims(
    weight: Tensor,
    reduction_dim: int = 0,
    zscore: float = 4.0,
    topk: int | None = None,
    rdm: bool = False,
) -> Tensor:
    """Where the standard deviations of a matrix stand out among themselves.

    Args:
        weight: ``[rows, columns]``, any float dtype.
        reduction_dim: what to take standard deviations over: 0 finds columns, 1 rows.
        zscore: how many of their standard deviations above their mean counts.
        topk: this many of the largest instead, largest first, whatever their z-score.
        rdm: ``topk`` random columns instead (a baseline to compare with).

    Returns:
        int64 indices.

    Raises:
        ValueError: when ``rdm`` is set without ``topk``.
    """
    if rdm:
        if topk is None:
            raise ValueError("rdm=True draws topk columns at random: topk must be given")
        return torch.randint(weight.shape[1], (topk,), device=weight.device)
    deviations = weight.std(reduction_dim)
    if topk is not None:
        return deviations.topk(topk).indices
    scores = (deviations - deviations.mean()) / deviations.std()
    return (scores > zscore).nonzero().flatten()


class OutlierTracer:
    """Outlier columns of a model's linear layers, found in one forward pass; one for each process.

    ``OutlierTracer.get_instance().initialize(model)`` hooks every ``nn.Linear``. The first layer
    that runs is judged by its input (columns that stand out at a z-score of 3 or hold a magnitude
    above 6), every other by its weight (:func:`find_outlier_dims`). The hooks leave when a layer
    runs for the second time. :func:`find_outliers` tells more, of every layer's input.
    """

    _instance: OutlierTracer | None = None

    hvalues: list[int]
    outliers: list[Tensor]
    hvalue2outlier_idx: dict[int, Tensor]
    hooks: list[Any]

    def __init__(self) -> None:
        raise RuntimeError("OutlierTracer is one for each process: call get_instance() instead")

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        """The tracer of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance

    def initialize(self, model: nn.Module) -> None:
        """Forgets what was found and hooks the linear layers of ``model``."""
        for hook in getattr(self, "hooks", ()):
            hook.remove()
        self.last_w = None
        self.current_outlier_dims = None
        self.hvalues = []
        self.outliers = []
        self.hvalue2outlier_idx = {}
        self.initialized = True
        self.hooks = [
            module.register_forward_pre_hook(outlier_hook)
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ]

    def is_initialized(self) -> bool:
        """Whether :meth:`initialize` was called."""
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: Tensor) -> int:
        """What a weight is known by: the address of its storage."""
        return weight.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """int64 ``[outliers]``: columns found for the layer of this weight, None if there are none
        (yet)."""
        if not self.is_initialized():
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))


def outlier_hook(module: nn.Module, input: tuple[Tensor, ...]) -> None:
    """The forward pre-hook of :class:`OutlierTracer`, for ``nn.Linear``."""
    if not isinstance(module, nn.Linear):
        raise TypeError(f"outlier_hook is for nn.Linear, got {type(module).__name__}")
    tracer = OutlierTracer.get_instance()
    key = tracer.get_hvalue(module.weight)
    if key in tracer.hvalue2outlier_idx:
        for hook in tracer.hooks:
            hook.remove()
        return
    columns = find_outlier_dims(module.weight.detach())
    tracer.hvalues.append(key)
    tracer.outliers.append(columns)
    if len(tracer.outliers) == 1:
        x = input[0].detach().reshape(-1, input[0].shape[-1])
        large = (x.abs() > 6).any(0).nonzero().flatten()
        columns = torch.cat([find_outlier_dims(x, zscore=3), large]).unique()
    tracer.hvalue2outlier_idx[key] = columns


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Runs a command (split as a shell would, but without one), whatever its exit status.

    Returns:
        its standard output and standard error as text, stripped.
    """
    done = subprocess.run(shlex.split(command_string), capture_output=True, check=False)
    return done.stdout.decode("utf-8").strip(), done.stderr.decode("utf-8").strip()


def sync_gpu(t: Tensor) -> None:
    """Waits for the device of ``t``; does nothing on the CPU."""
    if t.device.type == "cuda":
        torch.cuda.synchronize()
    elif t.device.type == "xpu":
        torch.xpu.synchronize()


__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LayerOutliers",
    "OutlierReport",
    "OutlierTracer",
    "ThresholdPoint",
    "execute_and_return",
    "find_outlier_dims",
    "find_outliers",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]
