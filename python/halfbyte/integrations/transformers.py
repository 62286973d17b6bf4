"""The experts of Transformers' mixture models (MoE) in 4 or 8 bits.

Transformers keeps the experts of a layer as two 3-D parameters, ``gate_up_proj`` (or ``up_proj``)
and ``down_proj``, which its bitsandbytes quantizers leave as they are: they only know linear
layers. With this integration ``from_pretrained(..., quantization_config=BitsAndBytesConfig(
load_in_4bit=True))`` (or ``load_in_8bit``) quantizes them too, one tensor at a time while loading,
runs them through one grouped product each, and saves, reloads and dequantizes them.

It is active as soon as Transformers uses this package as ``bitsandbytes``. What it changes in
Transformers are six methods of the two quantizer classes, each of which still does what it did.
:func:`disable` takes that back; with ``HALFBYTE_QUANTIZE_EXPERTS=0`` in the environment it never
happens. Experts named in ``llm_int8_skip_modules`` stay as they are.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._ops import NAMESPACE
from ..functional import QuantState, dequantize_4bit
from ..nn import _packed, experts
from ..nn.modules import Params4bit

__all__ = ["disable", "enable", "enabled", "expert_parameters", "experts_forward", "watch"]

SWITCH = "HALFBYTE_QUANTIZE_EXPERTS"
"""Environment variable: 0 keeps :func:`watch` from enabling anything."""

IMPLEMENTATION = f"{NAMESPACE}_experts"
"""Name of :func:`experts_forward` among Transformers' implementations of experts."""

_AWAITED = "transformers.quantizers.auto"
_QUANTIZERS = {
    4: ("transformers.quantizers.quantizer_bnb_4bit", "Bnb4BitHfQuantizer"),
    8: ("transformers.quantizers.quantizer_bnb_8bit", "Bnb8BitHfQuantizer"),
}
_ORIGINALS = "_methods_without_experts"
_PLAN = "_quantized_experts"

# ---- on and off ----------------------------------------------------------------------------------


def enable() -> bool:
    """Quantize the experts of every model that Transformers loads in 4 or 8 bits from now on.

    Returns:
        True; False with a Transformers before 5, where experts are linear layers anyhow.

    Raises:
        ImportError: Transformers is not installed.
        RuntimeError: its quantizers lack something that this needs; nothing has been changed then.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers is not installed")
    if importlib.util.find_spec("transformers.core_model_loading") is None:
        return False
    classes = {bits: _quantizer(bits) for bits in _QUANTIZERS}
    for bits, cls in classes.items():
        missing = [name for name in _METHODS if not callable(getattr(cls, name, None))]
        if missing:
            raise RuntimeError(f"{cls.__name__} has no method {', '.join(missing)} ({bits} bits)")
    for bits, cls in classes.items():
        if _ORIGINALS in cls.__dict__:
            continue  # enabled already, perhaps under this package's other name
        setattr(cls, _ORIGINALS, {name: cls.__dict__.get(name) for name in _METHODS})
        for name, wrap in _METHODS.items():
            original = getattr(cls, name)
            setattr(cls, name, functools.wraps(original)(wrap(original, bits)))
    return True


def disable() -> None:
    """Undo :func:`enable`. Models that are loaded stay as they are, and keep working."""
    for module, name in _QUANTIZERS.values():
        cls = getattr(sys.modules.get(module), name, None)
        if cls is None or _ORIGINALS not in cls.__dict__:
            continue
        for method, original in cls.__dict__[_ORIGINALS].items():
            if original is None:
                delattr(cls, method)
            else:
                setattr(cls, method, original)
        delattr(cls, _ORIGINALS)


def enabled() -> bool:
    """Whether models loaded now get quantized experts."""
    module, name = _QUANTIZERS[4]
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and _ORIGINALS in cls.__dict__


def watch() -> None:
    """:func:`enable` now if Transformers' quantizers are loaded, else as soon as they are.

    Does not import Transformers. Does nothing when ``HALFBYTE_QUANTIZE_EXPERTS`` is 0.
    """
    if os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "off", "no"):
        return
    if _AWAITED in sys.modules:
        _enable_quietly()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _enable_quietly() -> None:
    try:
        enable()
    except Exception as error:  # a Transformers that we do not know must still load models
        _warn(f"experts of mixture models stay unquantized: {error}")


def _quantizer(bits: int) -> type:
    module, name = _QUANTIZERS[bits]
    cls = getattr(importlib.import_module(module), name, None)
    if cls is None:
        raise RuntimeError(f"{module} has no {name}")
    return cls


def _warn(message: str) -> None:
    warnings.warn(f"{NAMESPACE}: {message}", UserWarning, stacklevel=3)


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing; calls :func:`enable` after the one module it waits for has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_enable(module: Any) -> None:
                run(module)
                _enable_quietly()

            spec.loader.exec_module = run_and_enable  # type: ignore[method-assign]
        return spec


# ---- which parameters ----------------------------------------------------------------------------


class _Target(NamedTuple):
    """A parameter of experts that is to be quantized."""

    shape: tuple[int, int, int]  # [experts, out, in]
    dtype: torch.dtype
    transposed: bool  # the parameter is [experts, in, out]

    def oriented(self, value: Tensor) -> Tensor:
        """``value``, as it lies in the checkpoint, as ``[experts, out, in]``."""
        return value.transpose(1, 2) if self.transposed else value


def _names(module: nn.Module) -> tuple[str, ...]:
    """The weights of a module that Transformers runs through its interface for experts."""
    marks = ("has_gate", "has_bias", "is_transposed", "config", "_apply_gate")
    if not all(hasattr(module, mark) for mark in marks):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return names if all(_is_stack(module._parameters.get(name)) for name in names) else ()


def _is_stack(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() == 3 and parameter.is_floating_point()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _find(quantizer: Any, model: nn.Module) -> dict[str, _Target]:
    from transformers.quantizers.quantizers_utils import should_convert_module

    if getattr(quantizer.quantization_config, "llm_int8_has_fp16_weight", False) and _is_8bit(
        quantizer
    ):
        return {}
    skip = getattr(quantizer, "modules_to_not_convert", None)
    found = {}
    for path, module in model.named_modules():
        for name in _names(module):
            full = _join(path, name)
            if should_convert_module(path, skip) and should_convert_module(full, skip):
                parameter: Any = module._parameters[name]
                transposed = bool(module.is_transposed)
                number, a, b = parameter.shape
                shape = (number, b, a) if transposed else (number, a, b)
                found[full] = _Target(shape, parameter.dtype, transposed)
    return found


def _is_8bit(quantizer: Any) -> bool:
    return bool(getattr(quantizer.quantization_config, "load_in_8bit", False))


def _plan(quantizer: Any) -> dict[str, _Target]:
    return getattr(quantizer, _PLAN, {})


def _owner(model: nn.Module, full: str) -> tuple[nn.Module, str]:
    path, _, name = full.rpartition(".")
    return model.get_submodule(path), name


def expert_parameters(model: nn.Module) -> list[str]:
    """The full names of the quantized experts of ``model``.

    PEFT wants them so in ``LoraConfig(target_parameters=...)``: it matches the ends of names only
    for parameters that are not parametrized.
    """
    return [
        _join(path, name)
        for path, module in model.named_modules()
        for name in getattr(module, "parametrizations", {})
        if experts._packed_of(module, name) is not None
    ]


# ---- operations on tensors while loading ---------------------------------------------------------


def _quantized(
    quantizer: Any, target: _Target, value: Tensor, nested: bool | None = None
) -> nn.Parameter:
    """``value``, as it lies in the checkpoint, as a quantized parameter.

    nested: whether to quantize the scales as well; None asks the configuration.
    """
    weight = target.oriented(value)
    if tuple(weight.shape) != target.shape:
        raise ValueError(
            f"the experts must have shape {list(target.shape)}, the checkpoint holds "
            f"{list(weight.shape)}"
        )
    if _is_8bit(quantizer):
        codes, stats = experts.quantize_experts_8bit(weight)
        return _int8(codes, stats)
    config = quantizer.quantization_config
    packed, state = experts.quantize_experts_4bit(
        weight,
        None,
        config.bnb_4bit_use_double_quant if nested is None else nested,
        config.bnb_4bit_quant_type,
        config.bnb_4bit_quant_storage,
    )
    state.dtype = target.dtype
    return _params4bit(packed, state)


def _params4bit(packed: Tensor, state: QuantState) -> Params4bit:
    parameter = Params4bit(packed, requires_grad=False)
    parameter._describe(state, packed.dtype)
    return parameter


def _int8(codes: Tensor, stats: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(codes, requires_grad=False)
    parameter.__dict__["SCB"] = stats
    return parameter


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


class _Op:
    """What Transformers asks of an operation on tensors of a checkpoint."""

    supports_many_to_many = False

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> _Op:
        return self  # Transformers copies the operations for each tensor

    @property
    def reverse_op(self) -> _Op:
        return _Identity(self.hf_quantizer)

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError


class _Identity(_Op):
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


class _Quantize(_Op):
    """Quantizes experts; leaves anything else to ``otherwise``."""

    def __init__(self, hf_quantizer: Any, otherwise: Any = None) -> None:
        super().__init__(hf_quantizer)
        self.otherwise = otherwise

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        plan = _plan(self.hf_quantizer)
        result, rest = {}, {}
        for name, value in input_dict.items():
            # Named in full, or, among the operations of a converter, by the converter's pattern.
            target = plan.get(name)
            if target is None and len(input_dict) == 1 and full_layer_name is not None:
                target = plan.get(full_layer_name)
            if target is None or not _first(value).is_floating_point():
                rest[name] = value
            else:
                result[name] = _quantized(self.hf_quantizer, target, _first(value))
        if rest and self.otherwise is not None:
            rest = self.otherwise.convert(rest, full_layer_name=full_layer_name, **kwargs)
        return {**result, **rest}


class _Deserialize(_Op):
    """Puts quantized experts together again; quantizes those that a checkpoint holds as they were.

    Args:
        hf_quantizer: whose checkpoint it is.
        key: the name of the parameter as the converter's target has it.
        suffixes: what stands after it in the checkpoint, by pattern.
    """

    def __init__(self, hf_quantizer: Any, key: str, suffixes: Mapping[str, str]) -> None:
        super().__init__(hf_quantizer)
        self.key = key
        self.suffixes = suffixes

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        target = _plan(self.hf_quantizer).get(full_layer_name or "")
        found = {self.suffixes[pattern]: _first(value) for pattern, value in input_dict.items()}
        value = found.pop("", None)
        if value is None:
            raise ValueError(f"the checkpoint holds {sorted(found)} without the weight itself")
        if target is None:
            return {self.key: value}
        if not found and value.is_floating_point() and value.dim() == 3:
            return {self.key: _quantized(self.hf_quantizer, target, value)}
        read = self._read_8bit if _is_8bit(self.hf_quantizer) else self._read_4bit
        return {self.key: read(target, value, found)}

    def _read_4bit(self, target: _Target, packed: Tensor, stats: dict[str, Tensor]) -> nn.Parameter:
        parts = {name.removeprefix("."): tensor for name, tensor in stats.items()}
        state = QuantState.from_dict(parts, packed.device)
        expected = experts._stored_shape(target.shape, state.blocksize)
        if tuple(state.shape) != expected or not _packed.holds(packed, expected):
            raise ValueError(
                f"the experts must have shape {list(expected)}, the checkpoint holds "
                f"{list(state.shape)} in {packed.numel()} elements of {packed.dtype}"
            )
        return _params4bit(packed, state)

    def _read_8bit(self, target: _Target, codes: Tensor, stats: dict[str, Tensor]) -> nn.Parameter:
        scales = stats.get(".SCB")
        if scales is None or codes.dtype != torch.int8 or tuple(codes.shape) != target.shape:
            raise ValueError(
                f"the experts must be int8 of shape {list(target.shape)} with .SCB beside them, "
                f"the checkpoint holds {codes.dtype} of shape {list(codes.shape)} and "
                f"{sorted(stats)}"
            )
        return _int8(codes, scales)


class _Merge(_Op):
    """Makes one tensor of the experts that a checkpoint holds one by one, and quantizes it.

    They may be quantized one by one: until Transformers 5 they were linear layers. Such are decoded
    to float32 and quantized again, by the same blocks and with plain scales, which gives the same
    values where an expert's matrices divide into whole blocks.

    Args:
        hf_quantizer: whose checkpoint it is.
        conversion: Transformers' converter, which knows how they are merged.
        parts: source pattern of ``conversion`` and what stands in for its end, by pattern.
    """

    def __init__(
        self, hf_quantizer: Any, conversion: Any, parts: Mapping[str, tuple[str, str]]
    ) -> None:
        super().__init__(hf_quantizer)
        self.sources = list(conversion.source_patterns)
        self.operations = conversion.operations
        self.parts = parts

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        found: dict[str, dict[str, list[Tensor]]] = {}
        for pattern in list(input_dict):
            source, name = self.parts[pattern]
            found.setdefault(source, {})[name] = input_dict.pop(pattern)
        quantized = any(len(lists) > 1 for lists in found.values())
        collected: dict[str, Any] = {
            source: self._decoded(source, lists) if len(lists) > 1 else lists["weight"]
            for source, lists in found.items()
        }
        found.clear()
        kwargs |= {"full_layer_name": full_layer_name, "source_patterns": self.sources}
        for operation in self.operations:
            collected = operation.convert(collected, **kwargs)
        target = _plan(self.hf_quantizer).get(full_layer_name or "")
        if target is None or len(collected) != 1:
            return collected
        ((key, value),) = collected.items()
        nested = False if quantized else None
        return {key: _quantized(self.hf_quantizer, target, _first(value), nested)}

    def _decoded(self, source: str, lists: dict[str, list[Tensor]]) -> list[Tensor]:
        counts = {len(tensors) for tensors in lists.values()}
        if len(counts) != 1 or "weight" not in lists:
            raise ValueError(
                f"each expert of {source} must have the same tensors, the checkpoint holds "
                + ", ".join(f"{len(tensors)} x {name}" for name, tensors in lists.items())
            )
        experts_ = [
            dict(zip(lists, parts, strict=True)) for parts in zip(*lists.values(), strict=True)
        ]
        return [self._decode(parts) for parts in experts_]

    def _decode(self, parts: dict[str, Tensor]) -> Tensor:
        codes = parts.pop("weight")
        if _is_8bit(self.hf_quantizer):
            return experts._dequantize_8bit(codes[None], parts["SCB"][None], torch.float32)[0]
        state = QuantState.from_dict(parts, codes.device)
        out = torch.empty(tuple(state.shape), device=codes.device)
        return dequantize_4bit(codes, state, out=out)


def _reading(quantizer: Any, conversion: Any, bits: int) -> Any:
    """Transformers' converter of a stack of experts, made to quantize what it merges."""
    sources = list(conversion.source_patterns)
    if not all(source.endswith(".weight") for source in sources):
        conversion.operations = [*conversion.operations, _Quantize(quantizer)]
        return conversion
    beside = [s.removeprefix(".") for s in _SUFFIXES[4][1:]] if bits == 4 else []
    names = ["weight", *("weight." + name for name in beside)]
    names += ["SCB", "weight_format"] if bits == 8 else []
    parts = {
        source.removesuffix("weight") + name: (source, name) for source in sources for name in names
    }
    targets = list(conversion.target_patterns)
    return conversion.copy(list(parts), targets, operations=[_Merge(quantizer, conversion, parts)])


_SUFFIXES = {
    4: (
        "",
        *("." + name for name in (*_packed.PLAIN_KEYS, *_packed.NESTED_KEYS)),
        *(".quant_state." + name for name in QuantState.valid_qs_type_keys),
    ),
    8: ("", ".SCB"),
}


def _converters(quantizer: Any, bits: int) -> list[Any]:
    """How quantized experts are read: one converter for each ``<module>.<parameter>``."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    keys = sorted({".".join(full.split(".")[-2:]) for full in _plan(quantizer)})
    made = []
    for key in keys:
        # Ends where the key ends, and starts at the start of a name.
        suffixes = {rf"(?<!\w){re.escape(key + s)}$": s for s in _SUFFIXES[bits]}
        op = _Deserialize(quantizer, key, suffixes)
        made.append(loading.WeightConverter(list(suffixes), key, [op]))
    return made


# ---- the quantizers' methods, wrapped ------------------------------------------------------------


def _before(original: Callable[..., Any], bits: int) -> Callable[..., Any]:
    def _process_model_before_weight_loading(
        self: Any, model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        pre_quantized = self.pre_quantized
        if bits == 8 and self.quantization_config.llm_int8_has_fp16_weight:
            self.pre_quantized = False  # such a checkpoint holds float weights, no codes
        try:
            result = original(self, model, *args, **kwargs)
        finally:
            self.pre_quantized = pre_quantized
        try:
            setattr(self, _PLAN, _find(self, model))
        except Exception as error:
            setattr(self, _PLAN, {})
            _warn(f"experts of {type(model).__name__} stay unquantized: {error!r}")
        return result

    return _process_model_before_weight_loading


def _after(original: Callable[..., Any], bits: int) -> Callable[..., Any]:
    def _process_model_after_weight_loading(
        self: Any, model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for full, target in _plan(self).items():
            _finish(self, model, full, target)
        if _plan(self):
            _select(model)
        _keep_on_save(model, _plan(self))
        _report(self, model)
        return original(self, model, *args, **kwargs)

    return _process_model_after_weight_loading


def _needs(original: Callable[..., Any], bits: int) -> Callable[..., Any]:
    def param_needs_quantization(self: Any, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in _plan(self) or original(self, model, param_name, **kwargs)

    return param_needs_quantization


def _quantize_ops(original: Callable[..., Any], bits: int) -> Callable[..., Any]:
    def get_quantize_ops(self: Any) -> Any:
        op = original(self)
        return _Quantize(self, op) if _plan(self) else op

    return get_quantize_ops


def _conversions(original: Callable[..., Any], bits: int) -> Callable[..., Any]:
    def update_weight_conversions(self: Any, weight_conversions: Any, model: Any) -> Any:
        conversions = original(self, weight_conversions, model)
        plan = _plan(self)
        if not plan or not self.pre_quantized:
            return conversions
        # A checkpoint may hold them merged or one by one, quantized or not.
        conversions = [_reading(self, c, bits) if _makes(c, plan) else c for c in conversions]
        return [*_converters(self, bits), *conversions]

    return update_weight_conversions


def _dequantize(original: Callable[..., Any], bits: int) -> Callable[..., Any]:
    def _dequantize(self: Any, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained leaves a string in config.dtype.
        to = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        restored = False
        for module in model.modules():
            if experts.dequantize_parameters(module, to):
                _deselect(module)
                restored = True
        if restored:
            _cut_on_save(model, _plan(self))
            setattr(self, _PLAN, {})
        return original(self, model, dtype=to)

    return _dequantize


_METHODS: dict[str, Callable[[Callable[..., Any], int], Callable[..., Any]]] = {
    "_process_model_before_weight_loading": _before,
    "_process_model_after_weight_loading": _after,
    "param_needs_quantization": _needs,
    "get_quantize_ops": _quantize_ops,
    "update_weight_conversions": _conversions,
    "_dequantize": _dequantize,
}

# ---- after loading -------------------------------------------------------------------------------


def _finish(quantizer: Any, model: nn.Module, full: str, target: _Target) -> None:
    """Make the loaded parameter decode when read, and let the grouped product find it."""
    module, name = _owner(model, full)
    parameter = module._parameters.get(name)
    if parameter is None or parameter.device.type == "meta":
        return
    if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
        # The checkpoint had none, or some converter of its own made it.
        parameter = _quantized(quantizer, target, parameter.data)
    config = quantizer.quantization_config
    if isinstance(parameter, Params4bit):
        state = parameter.quant_state
        assert state is not None
        experts._replace_4bit(
            module,
            name,
            parameter,
            state,
            target.shape,
            target.transposed,
            _compute_dtype(config.bnb_4bit_compute_dtype),
            target.dtype,
        )
    else:
        experts._replace_8bit(
            module,
            name,
            parameter,
            parameter.__dict__["SCB"],
            target.dtype,
            config.llm_int8_threshold,
            target.transposed,
        )
    if _help_peft not in module._forward_hooks.values():
        module.register_forward_hook(_help_peft, always_call=True)
    stack: Any = module.parametrizations[name]  # type: ignore[index]
    stack.register_forward_hook(_refuse_merges)


def _compute_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Sums are float32 anyhow, so that asking for it changes nothing but the memory taken."""
    return None if dtype is torch.float32 else dtype


def _experts_of(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        stacks = getattr(module, "parametrizations", {})
        if any(experts._packed_of(module, name) is not None for name in stacks):
            yield module


def _select(model: nn.Module) -> None:
    """Run quantized experts through :func:`experts_forward`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    quantized: list[Any] = list(_experts_of(model))
    for module in quantized:  # all of them first: layers share their configuration
        if module.config._experts_implementation != IMPLEMENTATION:
            module._dense_implementation = module.config._experts_implementation
    for module in quantized:
        module.config._experts_implementation_internal = IMPLEMENTATION


def _deselect(module: nn.Module) -> None:
    before = module.__dict__.pop("_dense_implementation", None)
    if before is not None:
        module.config._experts_implementation_internal = before  # type: ignore[union-attr]


def _makes(conversion: Any, plan: Mapping[str, _Target]) -> bool:
    """Whether a converter's result is one of the parameters of ``plan``."""
    if not hasattr(conversion, "operations"):
        return False
    targets = conversion.target_patterns
    return any(full.endswith(target) for target in targets for full in plan)


def _keep_on_save(model: Any, plan: Mapping[str, _Target]) -> None:
    """Have quantized experts saved as they are, instead of cut into the checkpoint's old pieces."""
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [c for c in conversions if not (_makes(c, plan) or _reads_quantized(c))]
    if len(kept) != len(conversions):
        model._weight_conversions = kept


def _cut_on_save(model: Any, plan: Mapping[str, _Target]) -> None:
    """Have dequantized experts saved as the checkpoints of this architecture have them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        known = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [*(c for c in known if _makes(c, plan)), *conversions]


def _reads_quantized(conversion: Any) -> bool:
    """Whether a converter only puts a quantized weight together: on saving there is nothing to
    undo. (Transformers 5.23 raises NotImplementedError there.)"""
    names = {type(op).__name__ for op in getattr(conversion, "operations", ())}
    return bool(names & {"Bnb4bitDeserialize", "Bnb8bitDeserialize", "_Deserialize"})


_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def _report(quantizer: Any, model: nn.Module) -> None:
    """Name the stacks of matrices that stay unquantized, in one warning."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    if getattr(quantizer.quantization_config, "llm_int8_has_fp16_weight", False) and _is_8bit(
        quantizer
    ):
        return
    skip = getattr(quantizer.quantization_config, "llm_int8_skip_modules", None)
    left: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            continue
        parameters: dict[str, Any] = module._parameters
        for name, parameter in parameters.items():
            if not _is_stack(parameter) or min(parameter.shape) == 1:
                continue
            full = _join(path, name)
            if should_convert_module(path, skip) and should_convert_module(full, skip):
                left[full] = parameter.numel() * parameter.element_size()
    if left:
        _warn(_sentence(type(model).__name__, left))


def _sentence(model: str, left: Mapping[str, int]) -> str:
    groups: dict[str, int] = {}
    for full in left:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", full)
        groups[pattern] = groups.get(pattern, 0) + 1
    listed = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in sorted(groups.items()))
    return (
        f"{len(left)} 3-D weights of {model} ({sum(left.values()):,} bytes) stay unquantized, "
        f"since they are not experts of a form known here: {listed}. Name them in "
        "llm_int8_skip_modules to say that this is meant"
    )


# ---- running -------------------------------------------------------------------------------------


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of one layer, as Transformers' interface for experts wants it: one grouped
    product up, the activation, one grouped product down, the weighted sum.

    Args:
        self: the module of the experts.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: int64 ``[tokens, k]``; the number of experts itself means "none".
        top_k_weights: ``[tokens, k]``.

    Returns:
        ``[tokens, hidden]`` in the dtype of ``hidden_states``. Where a projection is not quantized,
        or PEFT adapts it, what Transformers' own implementation makes of the decoded weights.
    """
    up = "gate_up_proj" if self.has_gate else "up_proj"
    grouped = experts._is_grouped(self, up) and experts._is_grouped(self, "down_proj")
    if not grouped:
        return _dense_forward(self)(self, hidden_states, top_k_index, top_k_weights)
    biased = self.has_bias
    rows = experts.experts_matmul(
        self, up, hidden_states, top_k_index, getattr(self, f"{up}_bias") if biased else None
    )
    assert rows is not None
    tokens, k = top_k_index.shape
    rows = rows.flatten(0, 1)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = rows.view(tokens, k, rows.shape[-1])
    down = experts.experts_matmul(
        self, "down_proj", rows, top_k_index, self.down_proj_bias if biased else None
    )
    assert down is not None
    if getattr(self, "has_post_expert_norm", False):
        down = self.post_expert_norm(down)
    return (down * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


def _dense_forward(module: Any) -> Callable[..., Tensor]:
    """What ran this module before it was quantized, or would have."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = getattr(module, "_dense_implementation", None)
    function = ALL_EXPERTS_FUNCTIONS.get(before) if before is not None else None
    return type(module).forward.__wrapped__ if function is None else function


def _help_peft(module: nn.Module, inputs: Any, output: Any) -> None:
    """Let PEFT take its LoRA off again after each forward.

    PEFT adapts a parameter by a parametrization that lasts as long as a forward. From one that is
    parametrized otherwise too, PEFT 0.21 takes off only ``_LoraParameterProxy`` and leaves
    ``_LoraFactorsProxy`` behind, so that it would add up. It is changed into the former here.
    """
    if torch.compiler.is_compiling():
        return
    layer = sys.modules.get("peft.tuners.lora.layer")
    known = getattr(layer, "_LoraParameterProxy", None)
    if known is None:
        return
    for stack in getattr(module, "parametrizations", {}).values():
        if type(stack[-1]).__name__ == "_LoraFactorsProxy" and not isinstance(stack[-1], known):
            stack[len(stack) - 1] = known(None)


def _refuse_merges(stack: nn.Module, inputs: Any, output: Any) -> None:
    """Let PEFT's merging of adapters into quantized experts raise instead of losing them.

    It adds to what reading the parameter gives, which is decoded for that reader alone. A wrapper
    reads its parameter when it is made, so this runs before any merge.
    """
    if torch.compiler.is_compiling():
        return
    layer = sys.modules.get("peft.tuners.lora.layer")
    wrapper: Any = getattr(layer, "ParamWrapper", None)
    if wrapper is None or hasattr(wrapper.merge, "_refuses_quantized_experts"):
        return
    original = wrapper.merge

    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        if experts._packed_of(self.get_base_layer(), self.parameter_name) is not None:
            raise NotImplementedError(
                f"cannot merge an adapter into the quantized experts {self.parameter_name}: keep "
                "the adapter, or take it off with unload()"
            )
        return original(self, *args, **kwargs)

    merge._refuses_quantized_experts = True  # type: ignore[attr-defined]
    wrapper.merge = merge
