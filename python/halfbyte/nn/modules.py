"""4-bit parameters and the layers that hold them; the home of the 8-bit ones (``_eight_bit.py``).

A :class:`Params4bit` is born with the float weight and packs it on its first move to a device. From
then on it holds bytes: nothing here ever casts them, re-packs them or loses the
:class:`~..functional.QuantState` that gives them meaning. Wrappers that do lose it (FSDP,
functional calls, replicas) are met by :func:`fix_4bit_weight_quant_state_from_module`, which every
forward begins with.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dtensor import is_dtensor
from ..autograd._functions import matmul_4bit
from ..functional import QuantState, dequantize_4bit, quantize_4bit
from ..optim import GlobalOptimManager
from . import _fsdp1, _packed, _sharded, _zero3
from ._eight_bit import Embedding8bit, Int8Params, Linear8bitLt, OutlierAwareLinear, _device

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "QuantState",
    "StableEmbedding",
    "fix_4bit_weight_quant_state_from_module",
]

_PACKAGE = __name__.partition(".")[0]
_DEFAULT_BLOCKSIZE = 64

# Functions whose pieces keep belonging to the same quantized weight, and those that put them
# together.
_CUTS = frozenset({torch.chunk, torch.split, Tensor.chunk, Tensor.split})
_JOINS = frozenset({torch.cat, torch.concat, torch.concatenate})


class Params4bit(nn.Parameter):
    """A parameter stored in 4 bits.

    Until the first move to a device (``.to(device)``, ``.cpu()``, ``.cuda()``; the meta device does
    not count) it is the float weight. That move quantizes it in place: ``data`` becomes the packed
    codes, ``[units, 1]`` of dtype ``quant_storage``, and ``quant_state`` says how to read them.
    Later moves take ``quant_state`` along. Requests for another dtype concern the float weight
    only; packed bytes have none and stay as they are.

    Every entry of ``__dict__`` is a keyword of the constructor, so ``type(p)(data, **p.__dict__)``
    makes a parameter of the same kind; keywords it does not know are dropped.

    Args:
        data: the float weight, or packed codes (then with ``quant_state`` and
            ``bnb_quantized=True``).
        requires_grad: packed codes have no gradient; leave it False.
        quant_state: how to read ``data`` when it is packed.
        blocksize: values that share a scale, one of 32, 64, ... 4096; 64 when None.
        compress_statistics: quantize the scales, too (0.127 instead of 0.5 bits a value at block
            64).
        quant_type: "nf4" or "fp4".
        quant_storage: dtype under which the packed bytes are kept.
        module: the layer that owns the parameter; it is handed ``quant_state`` as well.
        bnb_quantized: whether ``data`` is packed.
    """

    # Defaults for instances made by Tensor._make_subclass, which get their attributes by hand.
    quant_state: QuantState | None = None
    blocksize: int = _DEFAULT_BLOCKSIZE
    compress_statistics: bool = True
    quant_type: str = "fp4"
    quant_storage: torch.dtype = torch.uint8
    module: Any = None  # nn.Module | None
    bnb_quantized: bool = False

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Self:
        if data is None:
            data = torch.empty(0)
        self = Tensor._make_subclass(cls, data, requires_grad)
        self.blocksize = _DEFAULT_BLOCKSIZE if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        if bnb_quantized and quant_state is not None and _is_logical(self, quant_state):
            # PEFT merges by Params4bit(new float weight, **old.__dict__): that one is to be packed
            # again.
            self.bnb_quantized = False
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int | None = None,
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Self:
        """A parameter from a packed weight and the statistics that a checkpoint holds beside it.

        Args:
            data: the packed codes, any shape, any of the storage dtypes.
            quantized_stats: ``absmax``, ``quant_map``, ... with or without a prefix such as
                ``layer.weight.``; left as it is.
            requires_grad: as in the constructor.
            device: where to put it; None means the current CUDA device if there is one, else where
                ``data`` is.
            module: the layer that shall own it.

        Raises:
            ValueError: the statistics are incomplete, or ``data`` has another length than they say.
        """
        if device is None:
            device = torch.device("cuda") if torch.cuda.is_available() else data.device
        moved = data.to(device)
        state = QuantState.from_dict(dict(quantized_stats), moved.device)
        if not _packed.holds(data, state.shape):
            raise ValueError(
                f"a packed weight of shape {list(state.shape)} takes "
                f"{_packed.packed_units(state.shape, data.dtype)} elements of {data.dtype}, "
                f"got {data.numel()} (shape {list(data.shape)})"
            )
        self = Tensor._make_subclass(cls, moved, requires_grad)
        self.module = module
        self._describe(state, data.dtype)
        return self

    def _describe(self, state: QuantState, storage: torch.dtype) -> None:
        """Take over what a packed weight's ``state`` says, and tell the owning layer."""
        self.quant_state = state
        self.blocksize = state.blocksize
        self.compress_statistics = state.nested
        self.quant_type = state.quant_type
        self.quant_storage = storage
        self.bnb_quantized = True
        self._tell_module()

    def _tell_module(self) -> None:
        """Leave the state with the owning layer, which gives it back if the parameter is lost."""
        if self.module is not None:
            self.module.quant_state = self.quant_state
            if hasattr(self.module, "quant_storage"):
                self.module.quant_storage = self.quant_storage

    def _like(self, data: Tensor) -> Self:
        """``data`` as a parameter with this one's attributes."""
        other = Tensor._make_subclass(type(self), data, self.requires_grad)
        other.__dict__.update(self.__dict__)
        return other

    def _is_packed(self) -> bool:
        """Whether ``data`` holds packed codes; decided by what it looks like where flags may
        lie."""
        state = self.quant_state
        if state is None or state.shape is None:
            return self.bnb_quantized
        if _is_logical(self, state):
            return False
        return (
            self.bnb_quantized or not self.is_floating_point() or _packed.holds(self, state.shape)
        )

    def _quantize(self, device: torch.device | str | int) -> Self:
        """Pack the float weight on ``device``, in place."""
        _zero3.check(self, self.module)
        weight = self.data.to(device)
        if self.requires_grad and not self.quant_storage.is_floating_point:
            raise RuntimeError(
                f"a 4-bit weight stored as {self.quant_storage} cannot require a gradient: "
                "call requires_grad_(False) on it before quantizing it"
            )
        packed, state = quantize_4bit(
            weight.contiguous(),
            blocksize=self.blocksize,
            compress_statistics=bool(self.compress_statistics),
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        self._tell_module()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move, and on the first move quantize; see the class.

        Takes what ``Tensor.to`` takes. A dtype changes an unpacked weight when no device is given;
        with a device the weight is packed from the precision it has.
        """
        clone = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        raw = self.data
        if not self._is_packed():
            if device is None or device.type == "meta":
                options = {} if memory_format is None else {"memory_format": memory_format}
                moved = raw.to(device, dtype, non_blocking, copy=clone, **options)
                return self if moved is raw else self._like(moved)
            return (self._like(raw.clone()) if clone else self)._quantize(device)

        moved = raw if device is None else raw.to(device, non_blocking=non_blocking)
        if clone and moved is raw:
            moved = raw.clone()
        if self.quant_state is not None and device is not None and device.type != "meta":
            # In place, and through the state's own method: parameters that share the state share
            # its move, and wrappers that must keep it from moving replace that method.
            self.quant_state.to(moved.device)
        return self if moved is raw else self._like(moved)

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

    # nn.Module.half() and its kin call these on every floating parameter, also on packed bytes that
    # are stored as bfloat16. Tensor's own would convert them to numbers that mean nothing.
    def half(self) -> Self:
        """``.to(torch.float16)``: packed bytes stay as they are."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """``.to(torch.bfloat16)``: packed bytes stay as they are."""
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        """``.to(torch.float32)``: packed bytes stay as they are."""
        return self.to(torch.float32)

    def double(self) -> Self:
        """``.to(torch.float64)``: packed bytes stay as they are."""
        return self.to(torch.float64)

    def type(self, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Tensor.type``: packed bytes stay as they are."""
        if dtype is None:
            return super().type()
        return self if self._is_packed() else super().type(dtype, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """What ``nn.Module._apply(fn)`` should make of this parameter: the same object where
        possible."""
        with torch.no_grad():
            result = fn(self)
        if result is self:
            return self
        if self._is_packed() and result.dtype != self.dtype:
            result = self.to(result.device)  # fn would convert packed bytes: let it move them only
        if isinstance(result, Params4bit):
            self.__dict__.update(result.__dict__)
        from torch._subclasses.fake_tensor import FakeTensor

        if torch._has_compatible_shallow_copy_type(self, result) and not isinstance(
            result, FakeTensor
        ):
            self.data = result
            return self
        return self._like(result)

    def __copy__(self) -> Self:
        """Another parameter over the same bytes and the same state."""
        return self._like(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with bytes and state of its own. Its ``module`` is the copied layer, when that is
        being copied as well, and the same layer otherwise."""
        if id(self) in memo:
            return memo[id(self)]
        other = Tensor._make_subclass(
            type(self), self.data.clone(memory_format=torch.preserve_format), self.requires_grad
        )
        memo[id(self)] = other
        module = self.module
        attributes = {k: v for k, v in self.__dict__.items() if k != "module"}
        other.__dict__.update(copy.deepcopy(attributes, memo))
        other.module = memo.get(id(module), module)
        return other

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles bytes and attributes, but not the owning layer: that one ties itself again."""
        attributes = {k: v for k, v in self.__dict__.items() if k != "module"}
        return _rebuild_params4bit, (type(self), self.data, self.requires_grad, attributes)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Plain tensors come out of every function, but cutting and joining keep class and
        state."""
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in _CUTS:
            whole = args[0] if args else None
            if isinstance(whole, Params4bit) and not whole.requires_grad:
                return type(result)(whole._like(piece) for piece in result)
        elif func in _JOINS and isinstance(result, Tensor):
            pieces = args[0] if args else (kwargs or {}).get("tensors", ())
            first = pieces[0] if len(pieces) else None
            if isinstance(first, Params4bit) and all(
                isinstance(piece, Params4bit) and piece.quant_state is first.quant_state
                for piece in pieces
            ):
                return first._like(result)
        return result

    # torch.distributed.checkpoint walks attributes along the keys of a state dict:
    # `layer.weight.absmax` and the like must lead to something.
    def _state(self, name: str) -> QuantState:
        if self.quant_state is None:
            raise AttributeError(f"{type(self).__name__} has no {name}: it is not quantized yet")
        return self.quant_state

    def _nested(self, name: str) -> QuantState:
        nested = self._state(name).state2
        if nested is None:
            raise AttributeError(
                f"{type(self).__name__} has no {name}: its scales are not quantized"
            )
        return nested

    @property
    def absmax(self) -> Tensor:
        """The scales, or their codes when nested."""
        return self._state("absmax").absmax

    @property
    def code(self) -> Tensor:
        """The values of the sixteen codes."""
        return self._state("code").code

    @property
    def quant_map(self) -> Tensor:
        """The values of the sixteen codes, under the name they have on disk."""
        return self._state("quant_map").code

    @property
    def offset(self) -> Tensor | None:
        """The mean of the scales when nested."""
        return self._state("offset").offset

    @property
    def state2(self) -> QuantState | None:
        """How the scales are quantized when nested."""
        return self._state("state2").state2

    @property
    def nested_absmax(self) -> Tensor:
        """The scales of the scales."""
        return self._nested("nested_absmax").absmax

    @property
    def nested_blocksize(self) -> int:
        """How many scales share a scale."""
        return self._nested("nested_blocksize").blocksize

    @property
    def nested_quant_map(self) -> Tensor:
        """The values of the 256 codes of the scales."""
        return self._nested("nested_quant_map").code

    @property
    def nested_dtype(self) -> torch.dtype:
        """The dtype of the scales before they were quantized."""
        return self._nested("nested_dtype").dtype

    @property
    def nested_offset(self) -> Tensor | None:
        """The mean of the scales, under the name it has on disk."""
        return self._state("nested_offset").offset


def _is_logical(data: Tensor, state: QuantState) -> bool:
    """Whether ``data`` is the float weight that ``state`` describes, rather than its packed
    codes."""
    return (
        state.shape is not None
        and data.is_floating_point()
        and tuple(data.shape) == tuple(state.shape)
        and not _packed.holds(data, state.shape)
    )


def _rebuild_params4bit(
    cls: type[Params4bit], data: Tensor, requires_grad: bool, attributes: dict[str, Any]
) -> Params4bit:
    """The inverse of :meth:`Params4bit.__reduce_ex__`."""
    self = Tensor._make_subclass(cls, data, requires_grad)
    self.__dict__.update(attributes, module=None)
    return self


# So that torch.load(weights_only=True), the default, reads a saved parameter.
torch.serialization.add_safe_globals([Params4bit, QuantState, _rebuild_params4bit])


def _recover(module: Linear4bit | Embedding4bit) -> tuple[Tensor, QuantState]:
    """The packed codes of ``module`` and their state, put back together if they have been parted.

    The codes come as a plain tensor: each use of a Params4bit passes through its
    ``__torch_function__``, which costs about as much as the product of one short row.
    RuntimeError when the weight was never quantized, or is not what the module's state describes.
    """
    weight: Tensor = module.weight
    _zero3.check(weight, module)
    state: QuantState | None = getattr(weight, "quant_state", None)
    if state is None or not isinstance(weight, Params4bit):
        state = module.quant_state if state is None else state
        weight = _reunite(module, weight, state)
        assert state is not None
    elif module.quant_state is not state:
        module.quant_state = state
        module.quant_storage = weight.dtype
    packed = weight.data
    if type(packed) is not Tensor:
        packed = (
            weight  # a stand-in of some tracer (torch.export), which knows the weight itself only
        )
    if state.absmax.device != packed.device and packed.device.type != "meta":
        if getattr(module, "_is_replica", False):
            # Of DataParallel: the state belongs to the replicas on all devices, which run at once.
            state = copy.copy(state)
            state.state2 = copy.copy(state.state2)
        state.to(packed.device)
    return packed, state


def _reunite(
    module: Linear4bit | Embedding4bit, weight: Tensor, state: QuantState | None
) -> Tensor:
    """Check that ``weight`` is what ``state`` describes and make it carry it, as a Params4bit."""
    refusal = _sharded.refusal(module, weight)
    if refusal is not None:
        raise RuntimeError(refusal)
    if (
        state is None
        or _is_logical(weight, state)
        or (isinstance(weight, Params4bit) and not weight.bnb_quantized)
    ):
        raise RuntimeError(
            f"{type(module).__name__} is not quantized yet: its weight is {weight.dtype} of shape "
            f"{list(weight.shape)} on {weight.device}. Move the layer to a device, with "
            ".to(device), .cpu() or .cuda(), or load a quantized state dict, before using it"
        )
    storage = module.quant_storage
    if weight.dtype != storage or not _packed.holds(weight, state.shape):
        raise RuntimeError(
            f"{type(module).__name__} kept the quantization state of a weight of shape "
            f"{list(state.shape)}, which takes {_packed.packed_units(state.shape, storage)} "
            f"elements of {storage}, but its weight is now {weight.dtype} of shape "
            f"{list(weight.shape)}: packed bytes must not be cast, resized or left sharded. (Mixed "
            "precision of FSDP1 casts every parameter: give the layer quant_storage=param_dtype)"
        )
    if isinstance(weight, Params4bit):
        weight.quant_state = state
        return weight
    raw = weight.data
    if type(raw) is not Tensor:
        return weight  # a stand-in of some tracer (torch.export), which must stay what it is
    if _fsdp1.is_view(weight):
        source = _fsdp1.cast_from(weight)
        if source is not None:
            raise RuntimeError(
                f"{type(module).__name__} of shape {list(state.shape)}: FSDP1 keeps its packed "
                f"bytes as {source} and casts them to {storage} for each pass, which changes some "
                "of them. Do not upcast the flat parameter (accelerate does so with "
                "mixed_precision): wrap quantized layers apart from trainable parameters"
            )
        return weight
    return _wrap(module, raw, state)


def _wrap(module: Linear4bit | Embedding4bit, packed: Tensor, state: QuantState) -> Params4bit:
    """``packed`` as a Params4bit with ``state``, which becomes the weight of ``module``."""
    found = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        module=module,
        bnb_quantized=True,
    )
    # Only where the layer keeps its weight plainly: not over a torch parametrization.
    if "weight" in module._parameters or "weight" in module.__dict__:
        module.weight = found
    return found


def fix_4bit_weight_quant_state_from_module(module: Linear4bit | Embedding4bit) -> None:
    """Give ``module.weight`` its quantization state back if a wrapper has lost it.

    FSDP, functional calls and replicas hand a layer plain tensors in place of its parameter. The
    layer keeps the state as well (``module.quant_state``); this wraps what is there as Params4bit
    again.

    Raises:
        RuntimeError: the layer was never quantized, or its weight is not (any more) the packed
            weight that the state describes.
    """
    packed, state = _recover(module)
    if not isinstance(module.weight, Params4bit) and type(packed) is Tensor:
        _wrap(module, packed, state)


def _check_quant_type(quant_type: str) -> None:
    if quant_type not in QuantState.valid_quant_types:
        raise ValueError(
            f"quant_type must be one of {', '.join(map(repr, QuantState.valid_quant_types))}, "
            f"got {quant_type!r}"
        )


class _FourBitWeight(nn.Module):
    """What Linear4bit and Embedding4bit share: a packed ``weight`` that survives moves and state
    dicts."""

    weight: Any  # Params4bit, but for what wrappers put in its place
    quant_state: QuantState | None
    quant_storage: torch.dtype

    def _logical_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def _hold(self, **config: Any) -> None:
        """Make the float weight that the base class has initialized a Params4bit."""
        _check_quant_type(config["quant_type"])
        _zero3.check_construction(self)
        self.quant_state = None
        self.quant_storage = config["quant_storage"]
        self.weight = Params4bit(self.weight.data, requires_grad=False, module=self, **config)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor):
            self._enter(value)
            if self.__dict__.get("quant_state") is not None and _fsdp1.is_view(value):
                _fsdp1.label(value, self.quant_state)  # type: ignore[arg-type]
        super().__setattr__(name, value)

    def _enter(self, weight: Any) -> None:
        """Note that FSDP2 is about to put the sharded or the gathered weight in place."""

        def known() -> tuple[Any, Any] | None:
            state = self._known_state()
            if state is None or not _packed.holds(weight, state.shape):
                return None
            whole = _sharded.Whole4bit(state)
            return whole, whole.scales(state)

        shard = _sharded.entering(self, weight, known)
        if _sharded.shard_of(weight) is not None:
            self.quant_state = weight.quant_state
        if shard is None:
            return
        if not isinstance(weight, Params4bit):
            weight.__class__ = Params4bit  # FSDP's own object, which it will keep
        if weight.quant_state is not shard.gathered:
            weight._describe(shard.gathered, weight.dtype)
        self.quant_state = shard.gathered

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight: Any = self._parameters.get("weight")
        sharded = _sharded.shard_of(weight) is not None
        if not sharded and not isinstance(weight, Params4bit):
            return super()._apply(fn, recurse)
        # nn.Module would turn the parameter into a plain one wherever it cannot swap its data (from
        # and to the meta device), so it does not get to see it.
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        if sharded:
            self.weight = _sharded.moved(weight, fn)
        else:
            self._parameters["weight"] = weight._apply(fn)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight = self._parameters.get("weight")
        if isinstance(weight, Params4bit):
            weight.module = self

    def _known_state(self) -> QuantState | None:
        """The state of the weight, or None if it is not packed."""
        weight = self._parameters.get("weight")
        if weight is None:
            return None
        state = getattr(weight, "quant_state", None)
        if state is None:
            state = self.quant_state
        if state is None or _is_logical(weight, state) or not _packed.holds(weight, state.shape):
            return None
        return state

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        _zero3.check(self.__dict__["_parameters"].get("weight"), self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self._known_state()
        if state is None and _fsdp1.is_view(self.__dict__.get("weight")):
            state = self.quant_state  # beside FSDP1's flat parameter, which holds the codes
        if state is not None:
            for name, tensor in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{name}"] = tensor if keep_vars else tensor.detach()

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
        packed = bool(_packed.members(state_dict, key))
        quantized = self._known_state() is not None
        view = self.__dict__.get("weight")
        beside_flat = packed and key not in state_dict and _fsdp1.is_view(view)
        if beside_flat:
            state_dict = {**state_dict, key: view}  # the codes come with FSDP1's flat parameter
        elif packed and quantized and key not in state_dict:
            # What torch.distributed.checkpoint leaves of frozen parameters when it is to leave them
            # out. This layer has codes and scales of its own, and keeps both; the key is missing.
            packed = False
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(key + ".")}
        if not beside_flat and (
            self._parameters.get("weight") is None
            or not (packed or (quantized and key in state_dict))
        ):
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            return

        rest = {k: v for k, v in state_dict.items() if k != key and not k.startswith(key + ".")}
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys.extend(name for name in missing if name != key)

        weight = self.weight
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        incoming = state_dict.get(key)
        on_meta = weight.device.type == "meta" and not assign
        device = incoming.device if assign and isinstance(incoming, Tensor) else weight.device
        shape = self._logical_shape()
        if (
            not packed
            and isinstance(incoming, Tensor)
            and incoming.is_floating_point()
            and tuple(incoming.shape) == shape
        ):
            self._load_float(incoming, device)
            return
        report = _packed.Report(missing_keys, unexpected_keys, error_msgs)
        stats_device = torch.device("cpu") if on_meta else device
        family = _packed.read(
            state_dict,
            key,
            shape,
            stats_device,
            report,
            quant_type=getattr(weight, "quant_type", "nf4"),
            share=assign,
        )
        if family is None:
            return
        if beside_flat:
            self.quant_state = family.state
            _fsdp1.label(weight, family.state)
            return
        if on_meta:
            warnings.warn(
                f"for {key}: copying a state dict into a layer on the meta device does nothing; "
                "pass assign=True to take the state dict's tensors, or call to_empty() first",
                stacklevel=2,
            )
            return
        if _sharded.shard_of(weight) is not None:
            self._put(key, family.packed, family.state, error_msgs)
            return
        if assign:
            storage, data = family.packed.dtype, family.packed
        else:
            storage = self.quant_storage
            data = _packed.restore(family.packed, storage, shape).to(device, copy=True)
        self._take(data, family.state, storage, replace=assign)

    def _load_float(self, incoming: Tensor, device: torch.device) -> None:
        """Load a float weight into a quantized layer: quantize it the way the layer is."""
        weight = self.weight
        state = self._known_state()
        assert state is not None
        if is_dtensor(incoming):
            incoming = incoming.full_tensor()  # type: ignore[attr-defined]
        packed, new = quantize_4bit(
            incoming.detach().to(device).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.dtype,
        )
        if _sharded.shard_of(weight) is not None:
            self.weight = _sharded.put_4bit(weight, packed, new)
            return
        self._take(packed, new, weight.dtype, replace=False)

    def _put(self, key: str, packed: Tensor, state: QuantState, error_msgs: list[str]) -> None:
        """Load a weight into a sharded layer: every rank takes its part."""
        wrong = self.weight._local_tensor.whole.differs(state)
        if wrong is not None:
            error_msgs.append(f"{key}: {wrong}")
            return
        self.weight = _sharded.put_4bit(self.weight, packed.detach(), state)

    def _take(self, data: Tensor, state: QuantState, storage: torch.dtype, replace: bool) -> None:
        """Make ``data`` and ``state`` this layer's weight; keep the parameter object unless
        ``replace``."""
        weight = self.weight
        if not replace and weight.dtype == data.dtype and weight.shape == data.shape:
            # In place: the weight may be a view into what FSDP1 has flattened.
            with torch.no_grad():
                weight.data.view(torch.uint8).copy_(data.view(torch.uint8))
            if not isinstance(weight, Params4bit):
                weight = _wrap(self, weight.data, state)  # type: ignore[arg-type]
            weight.module = self
        elif replace or not isinstance(weight, Params4bit):
            weight = Params4bit(data, module=self)
            self.weight = weight
        else:
            if not data.is_floating_point():
                weight.requires_grad_(False)
            weight.data = data
            weight.module = self
        weight._describe(state, storage)


class Linear4bit(_FourBitWeight, nn.Linear):
    """A linear layer whose weight is stored in 4 bits: ``y = x @ dequantize(weight).T + bias``.

    The weight is packed by the first move to a device. It is decoded inside the product, never as a
    whole, and gets no gradient; inputs and bias do.

    Args:
        input_features: last dimension of the input.
        output_features: last dimension of the output.
        bias: whether to add a bias; it keeps its own dtype and is cast for each product.
        compute_dtype: dtype to compute in; None takes float32 or bfloat16 from the first input, and
            every other input as it comes. Sums are float32 in any case, and the result has the
            dtype of the input.
        compress_statistics: quantize the scales, too.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype under which the packed bytes are kept (for FSDP, that of its other
            weights).
        device: where to make the float weight; this does not quantize it.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self._hold(
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None

    def _logical_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def set_compute_type(self, x: Tensor) -> None:
        """Compute in float32 or bfloat16 from now on if that is the dtype of ``x``."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[..., input_features]``, floating; gives ``[..., output_features]`` in its
        dtype.

        Raises RuntimeError when the layer is not quantized or the last dimension is wrong.
        """
        packed, state = _recover(self)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes a floating-point input, got {x.dtype}")
        if x.dim() == 0 or (x.shape[-1] != self.in_features and x.shape[-1] != state.shape[-1]):
            raise RuntimeError(
                f"{type(self).__name__} takes inputs of shape [..., {self.in_features}], "
                f"got {list(x.shape)}"
            )
        dtype = self.compute_dtype or x.dtype
        return matmul_4bit(x.to(dtype), packed, quant_state=state, bias=self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        weight = self._parameters.get("weight")
        if not isinstance(weight, Params4bit):
            return super().extra_repr()
        nested = ", compress_statistics=True" if weight.compress_statistics else ""
        return f"{super().extra_repr()}, quant_type={weight.quant_type}{nested}"


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="fp4"``."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "fp4",
            quant_storage,
            device,
        )


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="nf4"``, the code for normally distributed weights."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "nf4",
            quant_storage,
            device,
        )


class Embedding4bit(_FourBitWeight, nn.Embedding):
    """An embedding whose table is stored in 4 bits. The table gets no gradient.

    Where the rows begin at blocks (``embedding_dim`` divides by the block size) only the rows asked
    for are decoded; otherwise the whole table is decoded at each call.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: length of a row, any.
        dtype: dtype of the float table and of the result; the default dtype when None.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype under which the packed bytes are kept.
        device: where to make the float table; this does not quantize it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._hold(compress_statistics=False, quant_type=quant_type, quant_storage=quant_storage)

    def _logical_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """``input``: integer indices of any shape; gives ``[*input.shape, embedding_dim]``.

        Raises IndexError for an index outside the table, RuntimeError when the layer is not
        quantized.
        """
        packed, state = _recover(self)
        if self.embedding_dim % state.blocksize == 0:
            rows = self._decode_rows(packed, state, input)
        else:
            rows = F.embedding(input, dequantize_4bit(packed, state))
        return rows.to(self.dtype)

    def _decode_rows(self, packed: Tensor, state: QuantState, index: Tensor) -> Tensor:
        """Decode the rows at ``index``; each has whole bytes and whole blocks of its own."""
        dim = self.embedding_dim
        blocks = dim // state.blocksize
        size = _packed.packed_bytes(state.shape)
        table = packed.reshape(-1).view(torch.uint8)[:size].view(self.num_embeddings, dim // 2)
        codes = F.embedding(index, table)
        scales = F.embedding(index, state.absmax.view(self.num_embeddings, blocks))
        if state.nested:
            nested = state.state2
            position = index.unsqueeze(-1) * blocks + torch.arange(blocks, device=index.device)
            scales = nested.code[scales.int()] * nested.absmax[position // nested.blocksize]
            scales = scales + state.offset
        rows = QuantState(
            absmax=scales.reshape(-1),
            shape=torch.Size((index.numel(), dim)),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )._take_code(state)
        return dequantize_4bit(codes.reshape(-1, 1), rows).view(*index.shape, dim)


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="fp4"``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` with ``quant_type="nf4"``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class _StableInit(nn.Embedding):
    """What Embedding and StableEmbedding share: Xavier rows and 32-bit optimizer states."""

    def _keep_32bit_states(self) -> None:
        GlobalOptimManager.get_instance().register_module_override(
            self, "weight", {"optim_bits": 32}
        )

    def reset_parameters(self) -> None:
        """Draw the table from the Xavier uniform distribution; the padding row is zero."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(_StableInit):
    """A float embedding followed by a layer norm, for training with 8-bit optimizers.

    Large and rare gradients make embeddings the weak point of 8-bit states: the rows start from the
    Xavier uniform distribution, the norm bounds what they become, and optimizers of this package
    keep 32-bit states for the table. The result has the table's dtype.

    Arguments are those of ``torch.nn.Embedding``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)
        self._keep_32bit_states()

    def forward(self, input: Tensor) -> Tensor:
        """``input``: integer indices of any shape; gives ``[*input.shape, embedding_dim]``."""
        rows = super().forward(input).to(self.norm.weight.dtype)
        return self.norm(rows).to(self.weight.dtype)


class Embedding(_StableInit):
    """A float embedding with Xavier rows and 32-bit optimizer states; :class:`StableEmbedding`
    without its norm. Arguments are those of ``torch.nn.Embedding``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
        )
        self._keep_32bit_states()
