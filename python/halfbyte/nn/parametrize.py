"""4-bit storage for parameters that are not the weight of a linear layer, such as fused experts.

:func:`replace_parameter_4bit` packs any parameter of any module. Reading the attribute then gives
the decoded weight, in its shape, decoded once for each forward of the module however often it is
read. The state dict holds the same family of tensors that ``Linear4bit`` saves, and loads it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as P

from ..functional import QuantState, dequantize_4bit, quantize_4bit
from . import _packed

__all__ = [
    "Bnb4bitParametrization",
    "replace_parameter_4bit",
    "replace_parameter_4bit_prequantized",
]


class Bnb4bitParametrization(nn.Module):
    """Decodes a packed parameter; to be registered with ``torch.nn.utils.parametrize``.

    quant_state: how to read the parameter.
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """``quantized_param``: the packed codes; gives the weight in its own shape and dtype."""
        state = self.quant_state
        if state.absmax.device != quantized_param.device and quantized_param.device.type != "meta":
            state.to(quantized_param.device)
        return dequantize_4bit(quantized_param, state)

    def extra_repr(self) -> str:
        state = self.quant_state
        return f"shape={list(state.shape)}, quant_type={state.quant_type}"


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize ``module.<param_name>`` and decode it whenever it is read.

    Args:
        module: the module that owns the parameter; its class changes to a parametrized one.
        param_name: the parameter, floating, of any shape; blocks run over its flattened values.
        compress_statistics: quantize the scales, too.
        quant_type: "nf4" or "fp4".
        blocksize: values that share a scale, 64 when None.

    Raises:
        AttributeError: there is no such attribute. TypeError: it is not a parameter.
        ValueError: blocksize or quant_type is not one of those that exist.
    """
    original = _parameter(module, param_name)
    packed, state = quantize_4bit(
        original.data.contiguous(),
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device | str
) -> None:
    """As :func:`replace_parameter_4bit`, for a parameter that holds packed codes already.

    qs_dict: the statistics beside it in the checkpoint, with or without a prefix. device: where
    they shall live.

    Raises:
        AttributeError, TypeError: as there.
        ValueError: the statistics are incomplete, or describe a parameter of another length.
    """
    original = _parameter(module, param_name)
    state = QuantState.from_dict(dict(qs_dict), torch.device(device))
    if not _packed.holds(original, state.shape):
        raise ValueError(
            f"a packed weight of shape {list(state.shape)} takes "
            f"{_packed.packed_units(state.shape, original.dtype)} elements of {original.dtype}, "
            f"{param_name!r} holds {list(original.shape)}"
        )
    original.requires_grad_(False)
    _parametrize(module, param_name, state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r}")
    parameter = getattr(module, name)
    if name not in module._parameters or parameter is None:
        raise TypeError(
            f"{name!r} of {type(module).__name__} must be a torch.nn.Parameter, "
            f"got {type(parameter).__name__}"
        )
    return parameter


def _parametrize(module: nn.Module, name: str, state: QuantState) -> None:
    # unsafe: the parametrization changes shape and dtype, which P checks for otherwise.
    P.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    module.register_state_dict_post_hook(partial(_save, param_name=name))
    module.register_load_state_dict_pre_hook(partial(_load, param_name=name))
    if _open_cache not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_open_cache)
        module.register_forward_hook(_close_cache, always_call=True)


# --- Decode once a forward
# -------------------------------------------------------------------------

_caches = threading.local()


def _open_cache(module: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    cache: AbstractContextManager[Any] = P.cached()
    cache.__enter__()
    if not hasattr(_caches, "open"):
        _caches.open = []
    _caches.open.append((module, cache))


def _close_cache(module: nn.Module, inputs: Any, output: Any) -> None:
    """Also called when forward raised; then perhaps for a module whose cache was never opened."""
    opened = getattr(_caches, "open", [])
    if opened and opened[-1][0] is module:
        opened.pop()[1].__exit__(None, None, None)


# --- State dict
# ------------------------------------------------------------------------------------


def _parametrization(module: nn.Module, name: str) -> Bnb4bitParametrization:
    return module.parametrizations[name][0]  # type: ignore[index, return-value]


def _save(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str,
) -> None:
    """Name the packed parameter as if it were not parametrized, with its statistics beside it."""
    key = prefix + param_name
    inner = f"{prefix}parametrizations.{param_name}.original"
    if inner not in state_dict:
        return
    state_dict[key] = state_dict.pop(inner)
    for name, tensor in (
        _parametrization(module, param_name).quant_state.as_dict(packed=True).items()
    ):
        state_dict[f"{key}.{name}"] = tensor


def _load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    param_name: str,
) -> None:
    """The inverse of :func:`_save`; a float weight of the right shape is quantized like the old
    one."""
    key = prefix + param_name
    inner = f"{prefix}parametrizations.{param_name}.original"
    parametrization = _parametrization(module, param_name)
    state = parametrization.quant_state
    original = module.parametrizations[param_name].original  # type: ignore[index, union-attr]
    device = original.device
    incoming = state_dict.get(key)
    stats = _packed.members(state_dict, key)
    if inner in state_dict and incoming is None and not stats:
        return  # already in torch's own form

    def forget() -> None:
        state_dict.pop(key, None)
        for name in stats:
            state_dict.pop(f"{key}.{name}", None)

    if (
        not stats
        and isinstance(incoming, Tensor)
        and incoming.is_floating_point()
        and tuple(incoming.shape) == tuple(state.shape)
    ):
        packed, new = quantize_4bit(
            incoming.detach().to(device).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=original.dtype,
        )
    else:
        report = _packed.Report(missing_keys, unexpected_keys, error_msgs)
        family = _packed.read(
            state_dict, key, state.shape, device, report, quant_type=state.quant_type
        )
        forget()
        if family is None:
            state_dict[inner] = original.detach()  # reported already, under the name users know
            return
        packed, new = _packed.restore(family.packed, original.dtype, state.shape), family.state
    forget()
    state_dict[inner] = packed
    parametrization.quant_state = new
