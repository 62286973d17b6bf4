"""8-bit parameters and the layers of LLM.int8() that hold them.

An :class:`Int8Params` is born with the float weight and is quantized by its first move to a device.
From then on ``data`` are int8 codes, and ``SCB`` is the scale of each row. A layer keeps ``SCB`` as
well, so that wrappers which replace the parameter by a plain tensor do not lose it.

In a state dict a quantized weight is three tensors beside each other:

=================  ==============================  ================================================
``weight``         int8 ``[rows, columns]``        the codes
``SCB``            float32 ``[rows]``              the largest magnitude of each row
``weight_format``  uint8 scalar                    0: row-major, the only layout there is
=================  ==============================  ================================================

The public classes have their home in :mod:`.modules`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dtensor import is_dtensor
from ..autograd._matmul_8bit import (
    MatmulLtState,
    dequantize_weight,
    matmul,
    quantize_weight,
    traced_product,
)
from . import _sharded, _zero3

if TYPE_CHECKING:
    from typing_extensions import Self

_FORMATS = ("row", "col32", "col_turing", "col_ampere")


class Int8Params(nn.Parameter):
    """A parameter stored in 8 bits, with a scale for each row.

    Until the first move to a device (``.to(device)``, ``.cpu()``, ``.cuda()``; the meta device does
    not count) it is the float weight. That move quantizes it in place, from the precision it has:
    ``data`` becomes int8 of the same shape, ``CB`` the same tensor once more, and ``SCB`` (float32
    ``[rows]``) the largest magnitude of each row. An element is ``code * SCB[row] / 127``. Codes
    have no gradient, so ``requires_grad`` becomes False. With ``has_fp16_weights`` it stays a float
    weight, which each product quantizes for itself.

    Requests for another dtype concern the float weight only; codes stay int8.

    Every entry of ``__dict__`` is a keyword of the constructor, so ``type(p)(data, **p.__dict__)``
    makes a parameter of the same kind; keywords it does not know are dropped.

    Args:
        data: the float weight, or int8 codes; None takes ``CB``.
        requires_grad: of a float weight.
        has_fp16_weights: keep the float weight.
        CB: the codes, where ``data`` is None.
        SCB: the scales of int8 ``data``. Those of a float weight are made when it is quantized.
    """

    # Defaults for instances made by Tensor._make_subclass, which get their attributes by hand.
    CB: Tensor | None = None
    SCB: Tensor | None = None
    has_fp16_weights: bool = False

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Self:
        if data is None:
            data = torch.empty(0) if CB is None else CB
        self = _make(cls, data, requires_grad)
        self.has_fp16_weights = has_fp16_weights
        quantized = data.dtype == torch.int8
        # Codes and scales given along with a float weight are those of an older weight: clients
        # merge by Int8Params(new weight, **old.__dict__).
        self.CB = self.data if quantized else None
        self.SCB = SCB if quantized else None
        return self

    def _is_quantized(self) -> bool:
        return self.dtype == torch.int8

    def _like(self, data: Tensor) -> Self:
        """``data`` as a parameter with this one's attributes."""
        other = _make(type(self), data, self.requires_grad)
        other.__dict__.update(self.__dict__)
        if data.dtype == torch.int8:
            other.CB = other.data
        return other

    def _quantize(self, device: torch.device | str | int) -> Self:
        """Quantize the float weight on ``device``, in place."""
        _zero3.check(self)
        codes, scales = quantize_weight(self.data.to(device))
        self._take(codes, scales)
        return self

    def _take(self, codes: Tensor, scales: Tensor) -> None:
        """Become the quantized weight ``codes``, ``scales``."""
        self.requires_grad_(False)
        self.grad = None
        self.data = codes
        self.CB = self.data
        self.SCB = scales

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move, and on the first move quantize; see the class.

        Takes what ``Tensor.to`` takes. A dtype changes a float weight when no device is given, or
        when it stays a float weight; codes have none and stay as they are.
        """
        clone = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        raw = self.data
        if not self._is_quantized():
            if self.has_fp16_weights or device is None or device.type == "meta":
                options = {} if memory_format is None else {"memory_format": memory_format}
                moved = raw.to(device, dtype, non_blocking, copy=clone, **options)
                return self if moved is raw else self._like(moved)
            return (self._like(raw.clone()) if clone else self)._quantize(device)

        scales = self.SCB
        moved = raw if device is None else raw.to(device, non_blocking=non_blocking)
        if clone and moved is raw:
            moved = raw.clone()
            scales = None if scales is None else scales.clone()
        if scales is not None and scales.device.type != "meta" and device is not None:
            scales = scales.to(moved.device, non_blocking=non_blocking)
        if moved is raw:
            self.SCB = scales
            return self
        other = self._like(moved)
        other.SCB = scales
        return other

    def cpu(self) -> Self:  # type: ignore[override]
        """``.to("cpu")``: quantizes a float weight."""
        return self.to("cpu")

    def cuda(  # type: ignore[override]
        self, device: int | torch.device | str | None = None, non_blocking: bool = False
    ) -> Self:
        """``.to("cuda")``: quantizes a float weight."""
        return self.to(_device("cuda", device), non_blocking=non_blocking)

    def xpu(  # type: ignore[override]
        self, device: int | torch.device | str | None = None, non_blocking: bool = False
    ) -> Self:
        """``.to("xpu")``: quantizes a float weight."""
        return self.to(_device("xpu", device), non_blocking=non_blocking)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """What ``nn.Module._apply(fn)`` should make of this parameter: the same object where
        possible."""
        with torch.no_grad():
            result = fn(self)
            grad = None if self.grad is None or self._is_quantized() else fn(self.grad)
        if result is self:
            if self._is_quantized():
                self.SCB = _follow(self.SCB, self)  # into shared memory, for one
            return self
        if self._is_quantized() and result.dtype != torch.int8:
            result = self.to(result.device)  # fn would convert codes: let it move them only
        scales = result.SCB if isinstance(result, Int8Params) else _follow(self.SCB, result)
        from torch._subclasses.fake_tensor import FakeTensor

        target = self
        if torch._has_compatible_shallow_copy_type(self, result) and not isinstance(
            result, FakeTensor
        ):
            self.grad = None
            self.data = result
        else:
            target = self._like(result)
        if result.dtype == torch.int8:
            target.CB, target.SCB = target.data, scales
        target.grad = grad
        return target

    def __copy__(self) -> Self:
        """Another parameter over the same data and scales."""
        return self._like(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with data and scales of its own."""
        if id(self) in memo:
            return memo[id(self)]
        data = self.data.clone(memory_format=torch.preserve_format)
        other = _make(type(self), data, self.requires_grad)
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self._attributes(), memo))
        other.CB = other.data if data.dtype == torch.int8 else None
        return other

    def _attributes(self) -> dict[str, Any]:
        """Those that ``data`` does not imply."""
        return {name: value for name, value in self.__dict__.items() if name != "CB"}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles codes and attributes; ``CB`` comes from the codes again."""
        return _rebuild_int8params, (
            type(self),
            self.data,
            self.requires_grad,
            self._attributes(),
        )


def _make(cls: Any, data: Tensor, requires_grad: bool) -> Any:
    """``data`` as a parameter of class ``cls``; codes cannot require a gradient."""
    able = data.is_floating_point() or data.is_complex()
    return Tensor._make_subclass(cls, data, requires_grad and able)


def _follow(scales: Tensor | None, codes: Tensor) -> Tensor | None:
    """``scales`` where ``codes`` have gone. What comes from the meta device is not initialized."""
    if scales is not None and scales.device != codes.device:
        if scales.device.type == "meta":
            return torch.empty_like(scales, device=codes.device)
        scales = scales.to(codes.device)
    if scales is not None and codes.device.type == "cpu" and codes.is_shared():
        scales.share_memory_()
    return scales


def _device(kind: str, device: int | torch.device | str | None) -> torch.device:
    """What ``Tensor.cuda(device)`` and its kin mean by their argument."""
    if device is None:
        return torch.device(kind)
    return torch.device(kind, device) if isinstance(device, int) else torch.device(device)


def _rebuild_int8params(
    cls: type[Int8Params], data: Tensor, requires_grad: bool, attributes: dict[str, Any]
) -> Int8Params:
    """The inverse of :meth:`Int8Params.__reduce_ex__`."""
    self = _make(cls, data, requires_grad)
    self.__dict__.update(attributes)
    self.CB = self.data if data.dtype == torch.int8 else None
    return self


class _Entry(NamedTuple):
    """A quantized weight read from a state dict."""

    codes: Tensor
    scales: Tensor


def _read(
    state_dict: dict[str, Any], prefix: str, shape: tuple[int, ...], missing: list[str]
) -> _Entry | str:
    """The quantized weight under ``prefix``, or what is wrong with it. ``missing`` takes the keys
    that are not there."""
    weight, scales = prefix + "weight", prefix + "SCB"
    lacks = [key for key in (weight, scales) if key not in state_dict]
    if lacks:
        missing.extend(lacks)
        return (
            f"{weight}: an 8-bit weight loads only as a whole, and the state dict lacks "
            + ", ".join(lacks)
        )
    for key in (weight, scales):
        if not isinstance(state_dict[key], Tensor):
            return f"{key}: expected a tensor, got {type(state_dict[key]).__name__}"
    entry = _Entry(state_dict[weight], state_dict[scales])
    if entry.codes.dtype != torch.int8:
        return f"{weight}: with {scales} beside it, it must be torch.int8, got {entry.codes.dtype}"
    if not entry.scales.is_floating_point():
        return f"{scales}: must be floating-point, got {entry.scales.dtype}"
    if tuple(entry.codes.shape) != shape:
        return (
            f"size mismatch for {weight}: the state dict holds an 8-bit weight of shape "
            f"{list(entry.codes.shape)}, the module has {list(shape)}"
        )
    if tuple(entry.scales.shape) != shape[:1]:
        return (
            f"size mismatch for {scales}: a weight of {shape[0]} rows has as many scales, the "
            f"state dict holds {list(entry.scales.shape)}"
        )
    return entry


def _check_format(state_dict: dict[str, Any], prefix: str) -> str | None:
    """What is wrong with the layout that the state dict names, if anything is."""
    key = prefix + "weight_format"
    found = state_dict.get(key, 0)
    if isinstance(found, Tensor):
        if found.device.type == "meta":
            return None
        found = found.tolist()
    if found in (0, "row"):
        return None
    name = f" ({_FORMATS[found]})" if isinstance(found, int) and 0 < found < len(_FORMATS) else ""
    return f"{key}: the only layout there is for 8-bit weights is 0 (row), got {found!r}{name}"


class _EightBitWeight(nn.Module):
    """What Linear8bitLt and Embedding8bit share: an int8 ``weight`` that survives moves, copies and
    state dicts."""

    weight: Any  # Int8Params, but for what wrappers put in its place

    def _keep(self, codes: Tensor | None, scales: Tensor | None) -> None:
        """Keep the scales of the weight (None: it is not quantized) beside it."""
        self.__dict__["_kept_scales"] = scales

    def _kept(self) -> Tensor | None:
        """What :meth:`_keep` kept."""
        return self.__dict__.get("_kept_scales")

    def _sync(self) -> None:
        """Keep the scales that the weight has now."""
        weight = self._parameters.get("weight")
        if weight is None:
            return
        if weight.dtype != torch.int8 or is_dtensor(weight):
            self._keep(None, None)
        else:
            scales = getattr(weight, "SCB", None)
            if scales is not None:
                self._keep(weight.data, scales)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor):
            self._enter(value)
        super().__setattr__(name, value)
        if name == "weight" and "_eight_bit" in self.__dict__:
            self._sync()

    def _enter(self, weight: Any) -> None:
        """Note that FSDP2 is about to put the sharded or the gathered weight in place."""

        def known() -> tuple[Any, Any] | None:
            scales = self._scales() if weight.dtype == torch.int8 else None
            return None if scales is None else (_sharded.Whole8bit(weight.shape[0]), [scales])

        shard = _sharded.entering(self, weight, known)
        if shard is None:
            return
        if not isinstance(weight, Int8Params):
            weight.__class__ = Int8Params  # FSDP's own object, which it will keep
            weight.CB = weight.data
        weight.SCB = shard.gathered

    def _hold(self, has_fp16_weights: bool) -> None:
        """Make the float weight that the base class has initialized an Int8Params."""
        if not has_fp16_weights:
            _zero3.check_construction(self)
        self._eight_bit = True
        self.weight = Int8Params(
            self.weight.data, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights
        )

    def _scales(self) -> Tensor | None:
        """The scales of the quantized weight: its own, or the kept ones where a wrapper has lost
        those."""
        scales = getattr(self.weight, "SCB", None)
        return self._kept() if scales is None else scales

    @property
    def SCB(self) -> Tensor:
        """The scales, float32 ``[rows]``, under the name they have on disk
        (torch.distributed.checkpoint walks attributes along the keys of a state dict)."""
        scales = self._scales()
        if scales is None:
            raise AttributeError("SCB")
        return scales

    @SCB.setter
    def SCB(self, value: Tensor | None) -> None:
        self.weight.SCB = value
        self._sync()

    @property
    def weight_format(self) -> Tensor:
        """The layout of the codes as it is saved, uint8 0: row-major."""
        return torch.zeros((), dtype=torch.uint8)

    def _recover(self) -> tuple[Tensor, Tensor]:
        """The codes, as a plain tensor, and their scales.

        RuntimeError when the weight was never quantized or its scales are lost.
        """
        weight = self.weight
        _zero3.check(weight, self)
        refusal = _sharded.refusal(self, weight)
        if refusal is not None:
            raise RuntimeError(refusal)
        if weight.dtype != torch.int8:
            raise RuntimeError(
                f"{type(self).__name__} is not quantized yet: its weight is {weight.dtype} of "
                f"shape {list(weight.shape)} on {weight.device}. Move the layer to a device, with "
                ".to(device), .cpu() or .cuda(), or load a quantized state dict, before using it"
            )
        scales = self._scales()
        if scales is None or (scales.device.type == "meta" and weight.device.type != "meta"):
            raise RuntimeError(
                f"{type(self).__name__} has int8 codes of shape {list(weight.shape)} on "
                f"{weight.device} but not their scales: weight.SCB is "
                + ("None" if scales is None else "on the meta device")
            )
        # Tracers know the weight itself only; eager kernels are faster to call with a plain tensor.
        codes = weight if torch.compiler.is_compiling() else weight.data
        if scales.device != codes.device and codes.device.type != "meta":
            scales = scales.to(codes.device)
            if isinstance(weight, Int8Params):
                weight.SCB = scales
        return codes, scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight: Any = self._parameters.get("weight")
        sharded = _sharded.shard_of(weight) is not None
        if not sharded and not isinstance(weight, Int8Params):
            super()._apply(fn, recurse)
            if weight is not None and weight.dtype == torch.int8:
                self._keep(self.weight.data, _follow(self._kept(), self.weight.data))
            return self
        # nn.Module would turn the parameter into a plain one wherever it cannot swap its data (from
        # and to the meta device), so it does not get to see it.
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        if sharded:
            self.weight = _sharded.moved(weight, fn)
            return self
        if weight._is_quantized() and weight.SCB is None:
            weight.SCB = self._kept()
        self._parameters["weight"] = weight._apply(fn)
        self._sync()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._sync()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        weight = self._parameters.get("weight")
        if not getattr(weight, "has_fp16_weights", False):
            _zero3.check(weight, self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if weight is None or weight.dtype != torch.int8:
            return
        scales = self._scales()
        if scales is not None:
            destination[prefix + "SCB"] = scales if keep_vars else scales.detach()
            destination[prefix + "weight_format"] = self.weight_format

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As ``nn.Module.named_buffers``; see :func:`._sharded.beside`."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            yield from _sharded.beside(self, prefix)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        own = (key, prefix + "SCB", prefix + "weight_format")
        rest = {name: value for name, value in state_dict.items() if name not in own}
        missing: list[str] = []
        arguments = (prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)

        weight: Any = self._parameters.get("weight")
        incoming: Any = state_dict.get(key)
        is_float = isinstance(incoming, Tensor) and incoming.is_floating_point()
        quantized = weight is not None and weight.dtype == torch.int8
        is_entry = own[1] in state_dict or (
            isinstance(incoming, Tensor) and incoming.dtype == torch.int8
        )
        if is_entry and quantized and key not in state_dict:
            # What torch.distributed.checkpoint leaves of frozen parameters when it is to leave them
            # out. This layer has codes and scales of its own, and keeps both; the key is missing.
            is_entry = False
        if weight is None or not (is_entry or (quantized and is_float)):
            if key in state_dict:
                rest[key] = incoming
            super()._load_from_state_dict(rest, *arguments)
            if isinstance(weight, Int8Params) and not isinstance(self.weight, Int8Params):
                self.weight = weight._like(self.weight.data)  # assign=True made it a plain one
            missing_keys.extend(missing)
            if quantized and key in missing:
                missing_keys.append(own[1])
            return

        # Everything is checked before anything is changed.
        shape = tuple(weight.shape)
        errors: list[str | None] = []
        entry: _Entry | str | None = None
        if is_entry:
            errors.append(_check_format(state_dict, prefix))
            entry = _read(state_dict, prefix, shape, missing_keys)
            errors.append(entry if isinstance(entry, str) else None)
        elif incoming.shape != weight.shape:
            errors.append(
                f"size mismatch for {key}: the state dict holds a weight of shape "
                f"{list(incoming.shape)}, the module has {list(shape)}"
            )
        found = [error for error in errors if error is not None]
        if found:
            error_msgs.extend(found)
            return
        before = len(error_msgs)
        super()._load_from_state_dict(rest, *arguments)
        missing_keys.extend(name for name in missing if name != key)
        if len(error_msgs) > before:
            return

        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        if weight.device.type == "meta" and not assign:
            warnings.warn(
                f"for {key}: copying a state dict into a layer on the meta device does nothing; "
                "pass assign=True to take the state dict's tensors, or call to_empty() first",
                stacklevel=2,
            )
            return
        device = incoming.device if assign else weight.device
        with torch.no_grad():
            if isinstance(entry, _Entry):
                self._load_quantized(entry, device, assign)
            else:
                if is_dtensor(incoming):
                    incoming = incoming.full_tensor()
                self._load_codes(*quantize_weight(incoming.detach().to(device)), replace=assign)

    def _load_quantized(self, entry: _Entry, device: torch.device, assign: bool) -> None:
        """Load codes and scales; into a layer that keeps its float weight, decoded."""
        weight = self.weight
        if getattr(weight, "has_fp16_weights", False) and weight.dtype != torch.int8:
            decoded = dequantize_weight(entry.codes, entry.scales.float(), weight.dtype)
            if assign:
                self.weight = weight._like(decoded.to(device))
            else:
                weight.copy_(decoded)
            return
        codes = entry.codes.detach().to(device, copy=not assign)
        scales = entry.scales.detach().to(device, torch.float32, copy=not assign)
        self._load_codes(codes.contiguous(), scales.contiguous(), replace=assign)

    def _load_codes(self, codes: Tensor, scales: Tensor, replace: bool) -> None:
        """Make ``codes`` and ``scales`` this layer's weight; keep the parameter object unless
        ``replace``."""
        weight = self.weight
        if _sharded.shard_of(weight) is not None:
            self.weight = _sharded.put_8bit(weight, codes, scales)
        elif replace or not isinstance(weight, Int8Params):
            others = {} if not isinstance(weight, Int8Params) else weight._attributes()
            self.weight = Int8Params(codes, **(others | {"requires_grad": False, "SCB": scales}))
        else:
            weight._take(codes, scales)
        self._sync()


class Linear8bitLt(_EightBitWeight, nn.Linear):
    """A linear layer computed by LLM.int8(): int8 activations times an int8 weight.

    Each row of the input and each row of the weight has a scale; the product is exact in int32.
    With ``threshold`` above 0, columns of the input that hold a magnitude from it on take part in
    the input's own precision instead, against the decoded weight.

    The first move to a device quantizes the weight, which has no gradient from then on; inputs and
    bias do. With ``has_fp16_weights`` it stays a float parameter that can be trained, and is
    quantized for the products: anew for each while training and wherever its gradient is recorded,
    else when it has changed. Between two such products of which no gradient is recorded, writes
    through ``weight.data`` and steps of torch's fused optimizers leave no trace: call
    ``state.reset_grads()`` after them.

    ``state`` has the threshold, the quantized weight (``CB``, ``SCB``) and the outlier columns of
    the last input (``idx``); see :class:`~..autograd._functions.MatmulLtState`.

    Args:
        input_features: last dimension of the input.
        output_features: last dimension of the output.
        bias: whether to add a bias; it keeps its own dtype.
        has_fp16_weights: keep the float weight.
        threshold: magnitude from which an activation makes its column an outlier; 0 for none.
        index: kept as ``index`` for clients.
        device: where to make the float weight; this does not quantize it.
    """

    state: MatmulLtState

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.index = index
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        if threshold > 0.0 and not has_fp16_weights:
            self.state.use_pool = True
        self._hold(has_fp16_weights)

    def _keep(self, codes: Tensor | None, scales: Tensor | None) -> None:
        if codes is None:
            self.state.reset_grads()
        else:
            self.state.CB, self.state.SCB = codes, scales

    def _kept(self) -> Tensor | None:
        return self.state.SCB

    def init_8bit_state(self) -> None:
        """Hand the quantized weight to ``state``. Clients call it; forward does it by itself."""
        self._sync()

    def __getstate__(self) -> dict[str, Any]:
        # The codes are saved with the weight: once more with the state would be twice.
        state = copy.copy(self.state)
        scales = state.SCB
        state.reset_grads()
        weight = self._parameters.get("weight")
        if weight is not None and weight.dtype == torch.int8:
            state.SCB = scales
        return {**self.__dict__, "state": state}

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[..., input_features]``, floating; gives ``[..., output_features]`` in its
        dtype.

        Raises RuntimeError when the layer is to be quantized and is not, or when the last dimension
        is wrong; TypeError when ``x`` is not floating-point.
        """
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes a floating-point input, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"{type(self).__name__} takes inputs of shape [..., {self.in_features}], "
                f"got {list(x.shape)}"
            )
        weight, state = self.weight, self.state
        tracing = torch.compiler.is_compiling()
        if not tracing:
            if "_is_replica" in self.__dict__:
                state = copy.copy(state)  # DataParallel runs replicas with one state at once
            state.is_training = self.training
        if weight.dtype != torch.int8 and state.has_fp16_weights:
            return matmul(x, weight, bias=self.bias, state=state)
        codes, scales = self._recover()
        if tracing:
            return traced_product(x, codes, codes, scales, self.bias, float(state.threshold))
        state.CB, state.SCB = codes, scales
        return matmul(x, codes, bias=self.bias, state=state)

    def extra_repr(self) -> str:
        state = self.state
        return (
            f"{super().extra_repr()}, threshold={state.threshold}, "
            f"has_fp16_weights={state.has_fp16_weights}"
        )


class Embedding8bit(_EightBitWeight, nn.Embedding):
    """An embedding whose table is stored in 8 bits, with a scale for each row.

    The first move to a device quantizes the table, which gets no gradient. Only the rows asked for
    are decoded.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: length of a row.
        device: where to make the float table; this does not quantize it.
        dtype: dtype of the float table and of the result; the default dtype when None.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._hold(has_fp16_weights=False)

    def forward(self, input: Tensor) -> Tensor:
        """``input``: integer indices of any shape; gives ``[*input.shape, embedding_dim]``.

        Raises IndexError for an index outside the table, RuntimeError when the layer is not
        quantized.
        """
        codes, scales = self._recover()
        rows = F.embedding(input, codes)
        stats = F.embedding(input, scales.unsqueeze(-1)).squeeze(-1)
        return dequantize_weight(rows, stats, self.dtype)


class OutlierAwareLinear(nn.Linear):
    """A linear layer to be subclassed, whose weight is replaced at the first call by what
    :meth:`quantize_weight` makes of it, given the outlier columns that ``OutlierTracer`` has found
    for it.

    Args:
        input_features: last dimension of the input.
        output_features: last dimension of the output.
        bias: whether to add a bias.
        device: where to make the weight.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Any = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Any) -> Tensor:
        """The product, for a subclass to define. ``x``: ``[..., input_features]``; gives
        ``[..., output_features]``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define forward_with_outliers(self, x, outlier_idx)"
        )

    def quantize_weight(self, w: Tensor, outlier_idx: Any) -> Tensor:
        """The weight to compute with, for a subclass to define; same shape as ``w``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define quantize_weight(self, w, outlier_idx)"
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[..., input_features]``; gives ``[..., output_features]``."""
        if self.outlier_dim is None:
            from ..utils import OutlierTracer

            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                warnings.warn(
                    "OutlierAwareLinear: call OutlierTracer.get_instance().initialize(model) "
                    "before using the layer, so that its outlier columns are known",
                    stacklevel=2,
                )
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            with torch.no_grad():
                self.weight.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)


_HOME = __name__.rpartition(".")[0] + ".modules"
for _public in (Int8Params, Linear8bitLt, Embedding8bit, OutlierAwareLinear):
    _public.__module__ = _HOME

# So that torch.load(weights_only=True), the default, reads a saved parameter.
torch.serialization.add_safe_globals([Int8Params, _rebuild_int8params])

__all__ = ["Embedding8bit", "Int8Params", "Linear8bitLt", "OutlierAwareLinear"]
