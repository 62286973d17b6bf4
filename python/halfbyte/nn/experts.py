"""Experts of a mixture (MoE) with quantized weights: all of a layer in one tensor, one call for
all routed tokens.

:class:`Experts4bit` and :class:`Experts8bit` are layers. :func:`replace_experts_4bit` and
:func:`replace_experts_8bit` quantize a 3-D parameter of somebody else's module in place: reading it
gives the decoded weight, and :func:`experts_matmul` multiplies without decoding.

On disk a 4-bit weight is the same family of tensors as any other (``<name>``, ``<name>.absmax``,
...; see :mod:`._packed`), of shape ``[experts, out, in]``. Each expert has blocks of its own. Where
``out * in`` does not divide by the block size each expert is zero-padded to whole blocks, and the
family's shape is ``[experts, padded length]``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as P

from .._load import native
from ..autograd._experts import experts_matmul_4bit, experts_matmul_8bit
from ..autograd._matmul_8bit import dequantize_weight, quantize_weight
from ..functional import QuantState, dequantize_4bit, quantize_4bit
from . import _zero3
from . import parametrize as _parametrize
from .modules import Params4bit, _FourBitWeight, _recover

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Experts4bit",
    "Experts4bitParametrization",
    "Experts8bit",
    "Experts8bitParametrization",
    "dequantize_parameters",
    "experts_matmul",
    "quantize_experts_4bit",
    "quantize_experts_8bit",
    "replace_experts_4bit",
    "replace_experts_8bit",
]

# ---- weights as functions ------------------------------------------------------------------------


def _stored_shape(shape: Sequence[int], blocksize: int) -> tuple[int, ...]:
    """How a 4-bit weight ``[experts, out, in]`` lies in memory: so, or ``[experts, padded]``."""
    experts, *rest = shape
    size = math.prod(rest)
    if size % blocksize == 0:
        return tuple(shape)
    return experts, -(-size // blocksize) * blocksize


def _pad(weight: Tensor, blocksize: int) -> Tensor:
    """``weight`` ``[experts, out, in]`` in the shape of :func:`_stored_shape`."""
    stored = _stored_shape(weight.shape, blocksize)
    if len(stored) == 3:
        return weight.contiguous()
    flat = weight.flatten(1)
    return nn.functional.pad(flat, (0, stored[1] - flat.shape[1]))


def _unpad(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`_pad`."""
    if weight.dim() == 3:
        return weight
    return weight[:, : math.prod(shape[1:])].reshape(tuple(shape))


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 3:
        raise ValueError(
            "the weight of experts must have shape [experts, out_features, in_features], "
            f"got {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise TypeError(f"the weight of experts must be floating-point, got {weight.dtype}")


def quantize_experts_4bit(
    weight: Tensor,
    blocksize: int | None = None,
    compress_statistics: bool = True,
    quant_type: str = "nf4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantizes the weights of all experts of a layer.

    Args:
        weight: ``[experts, out_features, in_features]``, float32, float16 or bfloat16.
        blocksize: values that share a scale, 64 when None.
        compress_statistics: quantize the scales, too.
        quant_type: "nf4" or "fp4".
        quant_storage: dtype under which the packed bytes are kept.

    Returns:
        The packed codes and their state, as of :func:`~..functional.quantize_4bit`; the state's
        shape is that of ``weight``, or ``[experts, padded length]`` (see this module).

    Raises:
        ValueError: for another number of dimensions, block size or type. TypeError: for a weight
            that is not floating-point.
    """
    _check_weight(weight)
    blocksize = 64 if blocksize is None else blocksize
    native.check_blocksize(blocksize)
    return quantize_4bit(
        _pad(weight.detach(), blocksize),
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
        quant_storage=quant_storage,
    )


def quantize_experts_8bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes the weights of all experts of a layer to int8, a scale for each row.

    Args:
        weight: ``[experts, out_features, in_features]``, floating; float64 is rounded to float32.

    Returns:
        The codes, int8 of the shape of ``weight``, and the largest magnitude of each row, float32
        ``[experts, out_features]``.

    Raises:
        ValueError, TypeError: as :func:`quantize_experts_4bit`.
    """
    _check_weight(weight)
    return quantize_weight(weight)


def _dequantize_8bit(codes: Tensor, stats: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_weight(codes, stats, dtype)


# ---- layers --------------------------------------------------------------------------------------


class _Experts(nn.Module):
    """What the layers share: sizes, the bias, how they look."""

    bias: nn.Parameter | None

    def _size(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool,
        compute_dtype: torch.dtype | None,
        device: Any,
    ) -> None:
        if min(num_experts, in_features, out_features) < 1:
            raise ValueError(
                "num_experts, in_features and out_features must be positive, got "
                f"{num_experts}, {in_features} and {out_features}"
            )
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        # As torch.nn.Linear draws them.
        self._bound = 1 / math.sqrt(in_features)
        if bias:
            drawn = torch.empty(num_experts, out_features, device=device)
            self.bias = nn.Parameter(drawn.uniform_(-self._bound, self._bound))
        else:
            self.register_parameter("bias", None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(num_experts, out_features, in_features)``, the shape of the decoded weight."""
        return self.num_experts, self.out_features, self.in_features

    def _draw(self, device: Any) -> Tensor:
        return torch.empty(self.shape, device=device).uniform_(-self._bound, self._bound)

    def _check_input(self, x: Tensor) -> torch.dtype:
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes a floating-point input, got {x.dtype}")
        if x.dim() not in (2, 3) or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"{type(self).__name__} takes inputs of shape [tokens, {self.in_features}] or "
                f"[tokens, k, {self.in_features}], got {list(x.shape)}"
            )
        return self.compute_dtype or x.dtype

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class Experts4bit(_FourBitWeight, _Experts):
    """The linear layers of many experts, stored in 4 bits, applied to the tokens routed to them.

    As with ``Linear4bit`` the weight is packed by the first move to a device. It is decoded inside
    the product, only for experts that have tokens, and gets no gradient; inputs and bias do.

    Args:
        num_experts: how many.
        in_features: last dimension of the input.
        out_features: last dimension of the output.
        bias: whether each expert adds a bias.
        compute_dtype: dtype to compute in; None takes every input as it comes. Sums are float32 in
            any case, and the result has the dtype of the input.
        compress_statistics: quantize the scales, too.
        quant_type: "nf4" or "fp4".
        quant_storage: dtype under which the packed bytes are kept.
        blocksize: values that share a scale.
        device: where to make the float weight; this does not quantize it.

    Raises:
        ValueError: for sizes that are not positive, or a block size or type that does not exist.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        blocksize: int = 64,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        native.check_blocksize(blocksize)
        self._size(num_experts, in_features, out_features, bias, compute_dtype, device)
        self.weight = nn.Parameter(_pad(self._draw(device), blocksize), requires_grad=False)
        self._hold(
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            blocksize=blocksize,
        )

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        blocksize: int = 64,
    ) -> Self:
        """A layer with ``weight`` ``[experts, out_features, in_features]``, quantized, and
        ``bias`` ``[experts, out_features]``, as it is."""
        _check_weight(weight)
        experts, out_features, in_features = weight.shape
        self = cls(
            experts,
            in_features,
            out_features,
            bias is not None,
            compute_dtype,
            compress_statistics,
            quant_type,
            quant_storage,
            blocksize,
            device="meta",
        )
        _take_bias(self, bias)
        old = self.weight.__dict__
        self.weight = Params4bit(_pad(weight.detach(), blocksize), requires_grad=False, **old)
        self.weight = self.weight.to(weight.device)
        return self

    def _logical_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _stored_shape(self.shape, self._blocksize())

    def _blocksize(self) -> int:
        """Of the weight, also where a wrapper has put a plain one in its place."""
        found = getattr(self.weight, "blocksize", None)
        if found is None and self.quant_state is not None:
            found = self.quant_state.blocksize
        return 64 if found is None else int(found)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        incoming = state_dict.get(key)
        if (
            isinstance(incoming, Tensor)
            and incoming.is_floating_point()
            and incoming.shape == self.shape
        ):
            state_dict = {**state_dict, key: _pad(incoming, self._blocksize())}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """The product of each token with each of its experts.

        Args:
            x: ``[tokens, in_features]``, or ``[tokens, k, in_features]`` with a row for each
                expert of a token; floating.
            expert_ids: int64 ``[tokens, k]``; ``num_experts`` means "none" and gives a zero row.

        Returns:
            ``[tokens, k, out_features]`` in the dtype of ``x``.

        Raises:
            RuntimeError: the layer is not quantized, or the last dimension of ``x`` is wrong.
            ValueError: an id is out of range. TypeError: ``x`` is not floating-point.
        """
        packed, state = _recover(self)  # type: ignore[arg-type]
        dtype = self._check_input(x)
        y = experts_matmul_4bit(x.to(dtype), packed, state, expert_ids, self.bias, self.shape)
        return y.to(x.dtype)

    def dequantize(self) -> Tensor:
        """The decoded weight, ``[experts, out_features, in_features]``, in the dtype that was
        quantized. RuntimeError when the layer is not quantized."""
        packed, state = _recover(self)  # type: ignore[arg-type]
        return _unpad(dequantize_4bit(packed, state), self.shape)

    def extra_repr(self) -> str:
        weight = self._parameters.get("weight")
        if not isinstance(weight, Params4bit):
            return super().extra_repr()
        nested = ", compress_statistics=True" if weight.compress_statistics else ""
        return f"{super().extra_repr()}, quant_type={weight.quant_type}{nested}"


class Experts8bit(_Experts):
    """The linear layers of many experts in LLM.int8(), applied to the tokens routed to them.

    The weight is int8 from the start, a scale for each row; it gets no gradient, inputs and bias
    do. Activations are quantized row by row inside the product.

    Args:
        num_experts: how many.
        in_features: last dimension of the input.
        out_features: last dimension of the output.
        bias: whether each expert adds a bias.
        threshold: input columns that hold a magnitude of at least this are multiplied in the
            precision of the input; none when 0.
        compute_dtype: dtype to compute in; None takes every input as it comes.
        device: where to make the weight.

    Attributes:
        weight: int8 ``[num_experts, out_features, in_features]``.
        SCB: the largest magnitude of each row, float32 ``[num_experts, out_features]``. Casting
            the layer leaves it alone.

    Raises:
        ValueError: for sizes that are not positive.
    """

    SCB: Tensor

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        threshold: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        self._size(num_experts, in_features, out_features, bias, compute_dtype, device)
        self.threshold = threshold
        _zero3.check_construction(self)
        codes = torch.empty(self.shape, dtype=torch.int8, device=device)
        stats = torch.empty(self.shape[:2], dtype=torch.float32, device=device)
        if codes.device.type != "meta":
            codes, stats = quantize_experts_8bit(self._draw(device))
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("SCB", stats)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        threshold: float = 0.0,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer with ``weight`` ``[experts, out_features, in_features]``, quantized, and
        ``bias`` ``[experts, out_features]``, as it is."""
        _check_weight(weight)
        experts, out_features, in_features = weight.shape
        self = cls(
            experts,
            in_features,
            out_features,
            bias is not None,
            threshold,
            compute_dtype,
            device="meta",
        )
        _take_bias(self, bias)
        codes, self.SCB = quantize_experts_8bit(weight)
        self.weight = nn.Parameter(codes, requires_grad=False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        stats = self.SCB
        super()._apply(fn, recurse)
        if self.SCB.dtype != stats.dtype:
            self.SCB = stats.to(self.SCB.device)
        return self

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
        key, scale = prefix + "weight", prefix + "SCB"
        family = _read_8bit(state_dict, key, scale, self.shape, error_msgs)
        if family is None and not {key, scale}.isdisjoint(state_dict):
            # Reported; the layer keeps what it has.
            family = {key: self.weight.detach(), scale: self.SCB}
        super()._load_from_state_dict(
            {**state_dict, **(family or {})},
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def forward(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """As :meth:`Experts4bit.forward`."""
        dtype = self._check_input(x)
        y = experts_matmul_8bit(
            x.to(dtype), self.weight, self.SCB, expert_ids, self.bias, self.threshold
        )
        return y.to(x.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight, ``[experts, out_features, in_features]``, in ``dtype``."""
        return _dequantize_8bit(self.weight.detach(), self.SCB, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"


def _take_bias(layer: _Experts, bias: Tensor | None) -> None:
    if bias is None:
        return
    expected = (layer.num_experts, layer.out_features)
    if bias.shape != expected:
        raise ValueError(f"bias must have shape {list(expected)}, got {list(bias.shape)}")
    layer.bias = nn.Parameter(bias.detach().clone())


def _read_8bit(
    state_dict: dict[str, Any],
    key: str,
    scale: str,
    shape: Sequence[int],
    errors: list[str],
) -> dict[str, Tensor] | None:
    """The codes and scales under ``key`` and ``scale``, checked; a float weight is quantized.

    None when there are none, or when they will not do, which is then said in ``errors``.
    """
    codes, stats = state_dict.get(key), state_dict.get(scale)
    if codes is None and stats is None:
        return None
    if isinstance(codes, Tensor) and codes.is_floating_point() and stats is None:
        if tuple(codes.shape) == tuple(shape):
            codes, stats = quantize_experts_8bit(codes)
            return {key: codes, scale: stats}
        expected, got = f"a weight of shape {list(shape)}", f"{list(codes.shape)}"
    elif not isinstance(codes, Tensor) or not isinstance(stats, Tensor):
        lacks = scale if isinstance(codes, Tensor) else key
        errors.append(
            f"{key}: an int8 weight loads only with its scales, and the state dict lacks {lacks}"
        )
        return None
    elif codes.dtype != torch.int8 or tuple(codes.shape) != tuple(shape):
        expected = f"an int8 weight of shape {list(shape)}"
        got = f"{codes.dtype} of shape {list(codes.shape)}"
    elif stats.dtype != torch.float32 or tuple(stats.shape) != tuple(shape[:2]):
        key, expected = scale, f"float32 scales of shape {list(shape[:2])}"
        got = f"{stats.dtype} of shape {list(stats.shape)}"
    else:
        return {key: codes, scale: stats}
    errors.append(f"size mismatch for {key}: the module takes {expected}, the state dict has {got}")
    return None


# ---- parameters of other modules -----------------------------------------------------------------


class Experts4bitParametrization(_parametrize.Bnb4bitParametrization):
    """Decodes the packed weight of experts when it is read.

    Args:
        quant_state: how to read it.
        shape: ``[experts, out_features, in_features]``.
        transposed: the parameter is ``[experts, in_features, out_features]``; packed it is the
            other way round in any case.
        compute_dtype: as of :class:`Experts4bit`.
        dtype: of the decoded weight; the state's when None.
    """

    def __init__(
        self,
        quant_state: QuantState,
        shape: Sequence[int],
        transposed: bool = False,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(quant_state)
        self.shape = tuple(shape)
        self.transposed = transposed
        self.compute_dtype = compute_dtype
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """``quantized_param``: the packed codes; gives the parameter as it was."""
        weight = _unpad(super().forward(quantized_param), self.shape)
        weight = weight if self.dtype is None else weight.to(self.dtype)
        return weight.transpose(1, 2) if self.transposed else weight

    def matmul(self, packed: Tensor, x: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
        """The grouped product; see :func:`experts_matmul`."""
        dtype = self.compute_dtype or x.dtype
        packed = packed.data if type(packed.data) is Tensor else packed
        y = experts_matmul_4bit(x.to(dtype), packed, self.quant_state, ids, bias, self.shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, quant_type={self.quant_state.quant_type}"


class Experts8bitParametrization(nn.Module):
    """Decodes the int8 weight of experts when it is read.

    Args:
        stats: the largest magnitude of each row, float32 ``[experts, out_features]``.
        dtype: of the decoded weight.
        threshold: as of :class:`Experts8bit`.
        transposed: as of :class:`Experts4bitParametrization`.
    """

    def __init__(
        self,
        stats: Tensor,
        dtype: torch.dtype,
        threshold: float = 0.0,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.SCB = stats  # not a buffer: those are cast with the module, and get keys of their own
        self.dtype = dtype
        self.threshold = threshold
        self.transposed = transposed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.SCB = self.SCB.to(fn(self.SCB).device)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        """``codes``: int8 ``[experts, out_features, in_features]``; gives the parameter as it
        was."""
        weight = _dequantize_8bit(codes, self.SCB, self.dtype)
        return weight.transpose(1, 2) if self.transposed else weight

    def matmul(self, codes: Tensor, x: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
        """The grouped product; see :func:`experts_matmul`."""
        return experts_matmul_8bit(x, codes, self.SCB, ids, bias, self.threshold)

    def extra_repr(self) -> str:
        return f"rows={list(self.SCB.shape)}, threshold={self.threshold}"


def replace_experts_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = True,
    quant_type: str = "nf4",
    blocksize: int | None = None,
    quant_storage: torch.dtype = torch.uint8,
    transposed: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Quantize the experts ``module.<param_name>`` and decode them whenever they are read.

    As :func:`~.parametrize.replace_parameter_4bit`, of which it writes the state dict, for a
    parameter that :func:`experts_matmul` can multiply without decoding it.

    Args:
        module: the module that owns the parameter; its class changes to a parametrized one.
        param_name: the parameter, ``[experts, out_features, in_features]``; or a
            :class:`~.modules.Params4bit` that :func:`quantize_experts_4bit` made of it.
        compress_statistics, quant_type, blocksize, quant_storage: as of
            :func:`quantize_experts_4bit`; ignored for a parameter that is packed already.
        transposed: the parameter is ``[experts, in_features, out_features]``.
        compute_dtype: as of :class:`Experts4bit`.

    Raises:
        AttributeError: there is no such attribute. TypeError: it is not a floating parameter.
        ValueError: it has not three dimensions, or a setting does not exist.
    """
    original = _parametrize._parameter(module, param_name)
    weight = original.data.transpose(1, 2) if transposed and original.dim() == 3 else original.data
    packed, state = quantize_experts_4bit(
        weight, blocksize, compress_statistics, quant_type, quant_storage
    )
    _replace_4bit(module, param_name, packed, state, weight.shape, transposed, compute_dtype)


def _replace_4bit(
    module: nn.Module,
    name: str,
    packed: Tensor,
    state: QuantState,
    shape: Sequence[int],
    transposed: bool,
    compute_dtype: torch.dtype | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Make ``packed`` the parameter ``name`` of ``module``, decoded when read."""
    # A Params4bit, so that nothing casts the bytes where they are stored as a float dtype.
    parameter = Params4bit(packed.data, requires_grad=False)
    parameter._describe(state, packed.dtype)
    parameter.__dict__["_is_hf_initialized"] = True
    setattr(module, name, parameter)
    parametrization = Experts4bitParametrization(state, shape, transposed, compute_dtype, dtype)
    P.register_parametrization(module, name, parametrization, unsafe=True)
    module.register_state_dict_post_hook(partial(_parametrize._save, param_name=name))
    module.register_load_state_dict_pre_hook(partial(_load_4bit, param_name=name))
    module.register_load_state_dict_post_hook(partial(_keep_state, param_name=name))
    _cache_reads(module)


def _cache_reads(module: nn.Module) -> None:
    if _parametrize._open_cache not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_parametrize._open_cache)
        module.register_forward_hook(_parametrize._close_cache, always_call=True)


def _load_4bit(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any, param_name: str
) -> None:
    """As ``_parametrize._load``; a float weight is brought into the shape in which it is packed
    first."""
    parametrization = _packed_of(module, param_name)
    if parametrization is None:
        return  # dequantized since
    incoming = state_dict.get(prefix + param_name)
    if isinstance(incoming, Tensor) and incoming.is_floating_point() and incoming.dim() == 3:
        if parametrization.transposed:
            incoming = incoming.transpose(1, 2)
        if incoming.shape == parametrization.shape:
            incoming = _pad(incoming, parametrization.quant_state.blocksize)
        state_dict[prefix + param_name] = incoming
    _parametrize._load(module, state_dict, prefix, *args, param_name=param_name)


def _keep_state(module: nn.Module, incompatible_keys: Any, *, param_name: str) -> None:
    """Give the parameter the state that has been loaded."""
    parametrization = _packed_of(module, param_name)
    if parametrization is None:
        return
    parameter = module.parametrizations[param_name].original  # type: ignore[index, union-attr]
    if isinstance(parameter, Params4bit):
        parameter._describe(parametrization.quant_state, parameter.dtype)


def replace_experts_8bit(
    module: nn.Module, param_name: str, threshold: float = 0.0, transposed: bool = False
) -> None:
    """As :func:`replace_experts_4bit`, to int8 with a scale for each row.

    The state dict holds ``<param_name>`` (int8) and ``<param_name>.SCB`` (float32), and loads
    them, or a float weight. ``threshold`` is that of :class:`Experts8bit`.
    """
    original = _parametrize._parameter(module, param_name)
    weight = original.data.transpose(1, 2) if transposed and original.dim() == 3 else original.data
    codes, stats = quantize_experts_8bit(weight)
    _replace_8bit(module, param_name, codes, stats, weight.dtype, threshold, transposed)


def _replace_8bit(
    module: nn.Module,
    name: str,
    codes: Tensor,
    stats: Tensor,
    dtype: torch.dtype,
    threshold: float,
    transposed: bool,
) -> None:
    """Make ``codes`` the parameter ``name`` of ``module``, decoded when read."""
    parameter = nn.Parameter(codes.data, requires_grad=False)
    parameter.__dict__["_is_hf_initialized"] = True
    setattr(module, name, parameter)
    parametrization = Experts8bitParametrization(stats, dtype, threshold, transposed)
    P.register_parametrization(module, name, parametrization, unsafe=True)
    module.register_state_dict_post_hook(partial(_save_8bit, param_name=name))
    module.register_load_state_dict_pre_hook(partial(_load_8bit, param_name=name))
    _cache_reads(module)


def _save_8bit(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str,
) -> None:
    inner = f"{prefix}parametrizations.{param_name}.original"
    parametrization = _packed_of(module, param_name)
    if inner in state_dict and parametrization is not None:
        state_dict[prefix + param_name] = state_dict.pop(inner)
        state_dict[f"{prefix}{param_name}.SCB"] = parametrization.SCB


def _load_8bit(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    param_name: str,
) -> None:
    key, scale = prefix + param_name, f"{prefix}{param_name}.SCB"
    inner = f"{prefix}parametrizations.{param_name}.original"
    parametrization = _packed_of(module, param_name)
    if parametrization is None or (inner in state_dict and key not in state_dict):
        return
    original = module.parametrizations[param_name].original  # type: ignore[index, union-attr]
    incoming = state_dict.get(key)
    if isinstance(incoming, Tensor) and incoming.is_floating_point() and parametrization.transposed:
        state_dict[key] = incoming.transpose(1, 2) if incoming.dim() == 3 else incoming
    family = _read_8bit(state_dict, key, scale, tuple(original.shape), error_msgs)
    if family is None and key not in state_dict and scale not in state_dict:
        missing_keys.append(key)
    state_dict.pop(key, None)
    state_dict.pop(scale, None)
    if family is None:
        state_dict[inner] = original.detach()
        return
    state_dict[inner] = family[key]
    parametrization.SCB = family[scale].to(original.device, copy=True)


def _packed_of(module: nn.Module, name: str) -> Any:
    """The parametrization of ours under which ``name`` lies, or None."""
    found = getattr(module, "parametrizations", {})
    first = found[name][0] if name in found else None
    ours = (Experts4bitParametrization, Experts8bitParametrization)
    return first if isinstance(first, ours) else None


def experts_matmul(
    module: nn.Module,
    param_name: str,
    x: Tensor,
    expert_ids: Tensor,
    bias: Tensor | None = None,
) -> Tensor | None:
    """The product of routed tokens with the quantized experts ``module.<param_name>``.

    Args:
        module: one of which :func:`replace_experts_4bit` or :func:`replace_experts_8bit` has
            quantized the parameter.
        param_name: the parameter.
        x, expert_ids, bias: as of :func:`~..functional.experts_matmul_4bit`.

    Returns:
        ``[tokens, k, out_features]``; None when the parameter is not quantized, or when another
        parametrization (such as PEFT's) changes it after it is decoded, so that it has to be read.
    """
    if not _is_grouped(module, param_name):
        return None
    stack: Any = module.parametrizations[param_name]  # type: ignore[index]
    with _brought_in(stack, param_name), _brought_in(stack[0]):
        return stack[0].matmul(stack.original, x, expert_ids, bias)


@contextlib.contextmanager
def _brought_in(module: Any, param_name: str = "") -> Iterator[None]:
    """Lets an offloading hook of accelerate bring in what belongs to ``module``. Such hooks wrap
    ``forward``, which a grouped product does not call."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    weights = getattr(hook, "weights_map", None)
    if param_name and hasattr(weights, "prefix"):
        hook.weights_map = _SavedNames(weights, param_name)
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


class _SavedNames:
    """The offloaded tensors of a parametrized parameter, which accelerate looks up under their
    place in the module and has under their names in the state dict."""

    def __init__(self, weights: Any, param_name: str) -> None:
        self._weights = weights
        self._inner = f"parametrizations.{param_name}."
        self._name = param_name

    def __getitem__(self, key: str) -> Tensor:
        try:
            return self._weights[key]
        except KeyError:
            if key != "original":
                raise
            before, _, _ = self._weights.prefix.rpartition(self._inner)
            return self._weights.dataset[before + self._name]


def _is_grouped(module: nn.Module, name: str) -> bool:
    """Whether :func:`experts_matmul` can multiply with the parameter."""
    if _packed_of(module, name) is None:
        return False
    return len(module.parametrizations[name]) == 1  # type: ignore[index]


def dequantize_parameters(module: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Turn the quantized experts of ``module`` back into plain parameters; gives their names.

    dtype: of the parameters; what they were quantized from when None.
    """
    stacks = getattr(module, "parametrizations", {})
    names = [name for name in stacks if _packed_of(module, name) is not None]
    decoded = {name: getattr(module, name).to(dtype).contiguous() for name in names}
    for name in names:
        del stacks[name]
    if names and not stacks:
        # Not torch's way, which takes the property off the class that copies of the module share.
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    for name, weight in decoded.items():
        if stacks:
            delattr(type(module), name)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return names
