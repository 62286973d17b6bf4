"""Quantization as functions: 4-bit (NF4, FP4), 8-bit blockwise and int8, and what describes it.

Every function takes tensors of any layout (transposed, sliced, expanded). Blocks run over the
flattened tensor; the last one may be short. Arithmetic is float32, rounded once to the output
dtype. Errors are ``ValueError`` (a value that does not fit), ``TypeError`` (a wrong type or dtype)
and ``RuntimeError`` (anything that is not the caller's fault).
"""

from __future__ import annotations

import ctypes as ct
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from ._load import native
from ._ops import failure, ops
from .cextension import lib
from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

_quantize_4bit = ops.quantize_4bit.default
_quantize_4bit_out = ops.quantize_4bit.out
_quantize_4bit_nested = ops.quantize_4bit.nested
_dequantize_4bit = ops.dequantize_4bit.default
_dequantize_4bit_state = ops.dequantize_4bit.state
_dequantize_4bit_out = ops.dequantize_4bit.state_out
_quantize_blockwise = ops.quantize_blockwise.default
_quantize_blockwise_out = ops.quantize_blockwise.out
_dequantize_blockwise = ops.dequantize_blockwise.default
_dequantize_blockwise_out = ops.dequantize_blockwise.out
_quantize_absmax = ops.quantize_absmax.default
_matmul_4bit = ops.matmul_4bit.default
_matmul_4bit_out = ops.matmul_4bit.out
_optimizer_update_32bit = ops.optimizer_update_32bit.default
_optimizer_update_8bit_blockwise = ops.optimizer_update_8bit_blockwise.default

_NESTED_BLOCKSIZE = 256
"""Block size of double quantization in every checkpoint."""
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What ``native.check_blocksize`` accepts."""
_UNKNOWN_NORM = -1.0
"""Makes ``optimizer_update_32bit`` compute the parameter's norm itself, if it needs it."""
_NOT_NESTED = (None, None, None, _NESTED_BLOCKSIZE)
"""absmax2, code2, offset, blocksize2 of a state without double quantization."""

# ---- codes ---------------------------------------------------------------------------------------

name2qmap: dict[str, Tensor] = {}
"""8-bit codes by name, on the CPU: ``"dynamic"`` is the default of :func:`quantize_blockwise`."""


def _code(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def create_dynamic_map(
    signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8
) -> Tensor:
    """The dynamic-tree code: 256 ascending float32 values in [-1, 1].

    Args:
        signed: for weights and first moments; unsigned ([0, 1]) for second moments.
        max_exponent_bits: the number of decades, each with twice the fractions of the one below.
        total_bits: ``2 ** total_bits`` values are distinct, zeros fill up the rest.

    Raises:
        ValueError: when the bits do not make a code.
    """
    return _code(native.dynamic_map(signed, max_exponent_bits, total_bits))


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced float32 values: 256, with zeros in the middle of codes of fewer bits.

    Args:
        signed: from -1 to 1; unsigned from 0 to 1.
        total_bits: ``2 ** total_bits`` values, less the ones that make room for one exact zero.
        add_zero: keep an exact zero.

    Raises:
        ValueError: when ``total_bits`` does not fit 256 values.
    """
    return _code(native.linear_map(signed, total_bits, add_zero))


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution: 256 ascending float32 values, 15 or 16 distinct.

    Args:
        offset: the largest quantile taken.
        use_extra_value: one more value on the positive side (as NF4 has).

    Raises:
        ValueError: when ``offset`` is not a probability, or one half.
    """
    return _code(native.normal_map(offset, use_extra_value))


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> Tensor:
    """A small floating-point format: 256 ascending float32 values scaled to [-1, 1].

    Args:
        signed: spend one bit on the sign.
        exponent_bits, precision_bits: with the sign they must make up ``total_bits``.
        total_bits: at most 8.

    Raises:
        AssertionError: when the bits do not add up.
    """
    if exponent_bits + precision_bits + int(signed) != total_bits:
        raise AssertionError(
            f"exponent_bits, precision_bits and the sign must make up total_bits, got "
            f"{exponent_bits} + {precision_bits} + {int(signed)} for {total_bits}"
        )
    return _code(native.fp8_map(signed, exponent_bits, precision_bits, total_bits))


_CODE4 = {name: native.code4(name) for name in ("nf4", "fp4")}

# AbnormalFloat for blocks of 64 (arXiv 2306.06965), in the order of upstream.
_AF4 = [
    1.0, 0.7242486476898193, 0.5549623370170593, 0.4256388247013092,
    0.3167566657066345, 0.2196127474308014, 0.12934483587741852, 0.0427316389977932,
    0.0, -0.049348119646310806, -0.14982478320598602, -0.25607553124427795,
    -0.37369510531425476, -0.5124374032020569, -0.6944100856781006, -1.0,
]  # fmt: skip


def get_4bit_type(
    typename: str, device: torch.device | str | None = None, blocksize: int = 64
) -> Tensor:
    """The values of a 4-bit type by index, float32 ``[16]`` in [-1, 1].

    Args:
        typename: ``"nf4"``, ``"fp4"``, or ``"af4"`` (of which only the values are known here).
        device: where to put them; the CPU by default.
        blocksize: ``"af4"`` exists for 64 only.

    Raises:
        NotImplementedError: for another type.
    """
    values = _CODE4.get(typename)
    if values is None:
        if typename != "af4" or blocksize != 64:
            raise NotImplementedError(
                f"typename must be 'nf4', 'fp4', or 'af4' with blocksize 64, "
                f"got {typename!r} with blocksize {blocksize}"
            )
        values = _AF4
    return torch.tensor(values, dtype=torch.float32, device=device or "cpu")


def _is_plain(like: Tensor) -> bool:
    """False for fake tensors and other subclasses: they do not mix with tensors that were made
    outside of their mode."""
    return type(like) is Tensor or type(like) is torch.nn.Parameter


def _table4(quant_type: str, like: Tensor) -> Tensor:
    """:func:`get_4bit_type` on the device of ``like``, there without a copy from the host but for
    the first time: that waits for a GPU, and cannot be captured in a graph."""
    device = like.device
    if device.type == "cpu" or not _is_plain(like) or torch.compiler.is_compiling():
        return get_4bit_type(quant_type, device=device)
    kept = _tables4.get((quant_type, device))
    if kept is None:
        with torch.inference_mode(False):
            kept = _tables4[quant_type, device] = get_4bit_type(quant_type, device=device)
    return kept.clone()


_tables4: dict[tuple[str, torch.device], Tensor] = {}


def _dynamic_code(like: Tensor) -> Tensor:
    """The default 8-bit code on the device of ``like``."""
    if not _is_plain(like):
        return torch.tensor(_DYNAMIC, dtype=torch.float32, device=like.device)
    code = name2qmap["dynamic"]
    device = like.device
    if code.device == device:
        return code
    # A copy a device: making one waits for the device, and cannot be captured in a graph.
    kept = _dynamic_codes.get(device)
    if kept is None or kept[0] is not code:
        with torch.inference_mode(False):
            kept = _dynamic_codes[device] = code, code.to(device)
    return kept[1]


_dynamic_codes: dict[torch.device, tuple[Tensor, Tensor]] = {}
"""By device: the code of :data:`name2qmap` that was copied, and the copy."""
_DYNAMIC = native.dynamic_map(True, 7, 8)
name2qmap["dynamic"] = _code(_DYNAMIC)

# ---- the state -----------------------------------------------------------------------------------


class QuantState:
    """What is needed to read quantized data: scales, code, shape.

    All attributes may be reassigned; the next call honours them.

    Attributes:
        absmax: the scales, one per block: float32, or uint8 indices into ``state2`` when nested.
        shape: shape of the tensor that was quantized (4-bit only).
        code: values by index: float32 ``[16]`` (4-bit) or ``[256]`` (8-bit).
        dtype: dtype that was quantized, and to which it is restored.
        blocksize: elements per block.
        quant_type: ``"nf4"``, ``"fp4"``, or None for 8-bit.
        nested: whether ``absmax`` is quantized itself (double quantization).
        offset: the mean taken off the scales before quantizing them, float32 ``[]``.
        state2: the state of ``absmax``.
    """

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys: ClassVar[list[str]] = [f"bitsandbytes__{x}" for x in valid_quant_types]
    valid_qs_keys: ClassVar[list[str]] = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]

    def __init__(
        self,
        absmax: Tensor,
        shape: Any = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax: Any = absmax
        self.shape: Any = shape
        self.code: Any = code
        self.dtype: Any = dtype
        self.blocksize: Any = blocksize
        self.quant_type: Any = quant_type
        self.offset: Any = offset
        self.state2: Any = state2
        self.nested: bool = state2 is not None
        if _is_standard(code, quant_type):
            self._standard = code

    # The code, if it is known to hold the values of `quant_type`: the ops then need no table. An
    # assigned code is another object, and gets passed.
    _standard: Any = None

    def _table(self) -> Tensor | None:
        """The code, unless it is the one that the ops use anyhow."""
        code = self.code
        return None if code is self._standard else code

    def _take_code(self, other: QuantState) -> QuantState:
        """The code of another state, with what is known of it: on a GPU, finding that out again
        would wait for the device. Returns this state."""
        self.code, self._standard = other.code, other._standard
        return self

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint walks to what as_dict(packed=True) calls by this name.
        if name == f"bitsandbytes__{self.__dict__.get('quant_type')}":
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _as_list(self) -> list[Any]:
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type]

    def __getitem__(self, idx: Any) -> Any:
        """The state as the list it once was: absmax, shape, dtype, blocksize, nested, quant_type.

        The fifth is None or ``[offset, state2]``.
        """
        return self._as_list()[idx]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._as_list())

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> QuantState:
        """Reads what :meth:`as_dict` wrote, packed or not. ``qs_dict`` is left as it is.

        Args:
            qs_dict: keys may carry a prefix that ends in a dot (``weight.absmax``).
            device: where the tensors go.

        Raises:
            ValueError: when the dictionary is not one state, or a part of it is missing or does
                not fit the others. Values of tensors are not looked at.
        """
        packed = [
            key
            for key, value in qs_dict.items()
            if "quant_state" in key and isinstance(value, Tensor)
        ]
        if not packed and "quant_type" not in qs_dict:
            raise ValueError("Expected packed or unpacked quant_state items, found neither")
        if packed and (len(packed) != 1 or packed[0].split(".")[-1] not in cls.valid_qs_type_keys):
            raise ValueError(
                "There should be exactly one `quant_state` item with ending from "
                f"{cls.valid_qs_type_keys}.\nDetected {packed}."
            )
        found = {key.rpartition(".")[2]: part for key, part in qs_dict.items() if key not in packed}
        if packed:
            try:
                found.update(unpack_tensor_to_dict(qs_dict[packed[0]]))
            except (ValueError, RecursionError, NotImplementedError) as error:
                raise ValueError(f"{packed[0]} must hold JSON, but: {error}") from error
        read = _StateReader(found)

        quant_type = read.quant_type(may_be_none=not packed)
        blockwise = quant_type is None
        shape = read.shape(may_be_none=blockwise)
        blocksize = read.blocksize("blocksize")
        blocks = None if shape is None else -(-math.prod(shape) // blocksize)
        nested = any(key.startswith("nested_") for key in found)
        absmax = read.tensor("absmax", blocks, torch.uint8 if nested else None)

        offset, state2 = None, None
        if nested:
            blocksize2 = read.blocksize("nested_blocksize")
            blocks2 = -(-absmax.numel() // blocksize2)
            state2 = cls(
                absmax=read.tensor("nested_absmax", blocks2).to(device),
                blocksize=blocksize2,
                code=read.tensor("nested_quant_map", 256).to(device),
                dtype=read.dtype("nested_dtype", ("float32",)),
            )
            mean = read.number("nested_offset")
            offset = torch.tensor(mean, dtype=torch.float32, device=device)
        code = read.tensor("quant_map", None if blockwise else 16)
        if blockwise and not 1 <= code.numel() <= 256:
            raise ValueError(f"quant_map must have 1 to 256 entries, got {code.numel()}")
        state = cls(
            quant_type=quant_type,
            absmax=absmax.to(device),
            blocksize=blocksize,
            dtype=read.dtype("dtype", ("float32", "float16", "bfloat16")),
            shape=shape,
            offset=offset,
            state2=state2,
        )
        # Looked at where it is, which usually is the CPU.
        standard = _is_standard(code, quant_type)
        state.code = code.to(device)
        state._standard = state.code if standard else None
        return state

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a dictionary.

        Args:
            packed: with tensors only, as checkpoints hold them: what is not a tensor becomes JSON
                in a uint8 tensor under ``quant_state.bitsandbytes__<quant_type>``.
        """
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested:
            state |= {
                "nested_absmax": self.state2.absmax,
                # Clones: safetensors refuses tensors that share memory.
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return state
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        tensors[f"quant_state.bitsandbytes__{self.quant_type}"] = pack_dict_to_tensor(rest)
        return tensors

    def to(self, device: torch.device | str) -> None:
        """Moves all tensors to ``device``, in place."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            code = self.code.to(device)
            if self.code is self._standard:
                self._standard = code
            self.code = code
        if self.nested:
            self.offset = self.offset.to(device)
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False

        def same(a: Any, b: Any) -> bool:
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                return a.dtype == b.dtype and torch.equal(a, b.to(a.device))
            return a is None and b is None

        return (
            self.quant_type == other.quant_type
            and self.blocksize == other.blocksize
            and self.dtype == other.dtype
            and (self.shape is None) == (other.shape is None)
            and (self.shape is None or tuple(self.shape) == tuple(other.shape))
            and self.nested == other.nested
            and same(self.absmax, other.absmax)
            and same(self.code, other.code)
            and (not self.nested or same(self.offset, other.offset))
            and (not self.nested or self.state2 == other.state2)
        )

    __hash__ = None  # type: ignore[assignment]


class _StateReader:
    """Reads the parts of a state's dictionary; one that does not fit is a ValueError."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found

    def _part(self, key: str) -> Any:
        try:
            return self.found[key]
        except KeyError:
            raise ValueError(
                f"a quantization state must hold {key!r}, got {sorted(self.found)}"
            ) from None

    def quant_type(self, may_be_none: bool) -> str | None:
        value = self._part("quant_type")
        if value is None and may_be_none:
            return None
        if not isinstance(value, str):
            raise ValueError(f'quant_type must be "nf4" or "fp4", got {value!r}')
        native.check_quant_type(value)
        return value

    def blocksize(self, key: str) -> int:
        value = self._part(key)
        if not _is_int(value) or value not in _BLOCKSIZES:
            listed = ", ".join(map(str, _BLOCKSIZES))
            raise ValueError(f"{key} must be one of {listed}, got {value!r}")
        return value

    def shape(self, may_be_none: bool) -> torch.Size | None:
        value = self._part("shape")
        if value is None and may_be_none:
            return None
        if not isinstance(value, list | tuple) or not all(
            _is_int(size) and 0 <= size < 2**63 for size in value
        ):
            raise ValueError(f"shape must be a list of non-negative integers, got {value!r}")
        return torch.Size(value)

    def dtype(self, key: str, allowed: tuple[str, ...]) -> torch.dtype:
        value = self._part(key)
        name = str(value).removeprefix("torch.")
        if name not in allowed:
            raise ValueError(f"{key} must be {' or '.join(allowed)}, got {value!r}")
        return getattr(torch, name)

    def number(self, key: str) -> float:
        value = self._part(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} must be a number, got {value!r}")
        # The comparison is exact for integers of any size, and false for NaN.
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{key} must be a finite float32 number, got {value!r}")
        return float(value)

    def tensor(self, key: str, numel: int | None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of ``numel`` entries, if that is known, and of ``dtype`` or else floating."""
        value = self._part(key)
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} must be a tensor, got {type(value).__name__}")
        if value.dtype != dtype if dtype is not None else not value.is_floating_point():
            wanted = "of a floating-point dtype" if dtype is None else str(dtype)
            raise ValueError(f"{key} must be {wanted}, got {value.dtype}")
        if numel is not None and value.numel() != numel:
            raise ValueError(f"{key} must have {numel} entries, got {value.numel()}")
        return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_standard(code: Any, quant_type: str | None) -> bool:
    """Whether a code holds the values of ``quant_type``. Of one on a GPU this waits for it, once
    for each state that is made of parts, unless a graph is being captured."""
    if torch.compiler.is_compiling() or type(code) is not Tensor or quant_type is None:
        return False
    if code.is_meta or (code.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return code.tolist() == _CODE4.get(quant_type)


def _nested(state: QuantState) -> tuple[Tensor, Tensor, Tensor, int]:
    """absmax2, code2, offset, blocksize2 of a double-quantized state."""
    second = state.state2
    if second is None or state.offset is None:
        raise ValueError("a nested quantization state needs offset and state2, got one or none")
    code = second.code
    return (
        second.absmax,
        _dynamic_code(state.absmax) if code is None else code,
        state.offset,
        second.blocksize,
    )


# ---- 4-bit ---------------------------------------------------------------------------------------


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantizes ``A`` to 4 bits an element, with a scale per block.

    NaN and infinity are not looked for: the scale of their block becomes NaN or infinity.

    Args:
        A: float32, float16 or bfloat16, of any shape.
        absmax: float32 ``[blocks]`` to write the scales into (uint8 with
            ``compress_statistics``).
        out: ``[bytes / itemsize, 1]`` of dtype ``quant_storage`` to write the codes into.
        blocksize: 32, 64 (default), 128, 256, 512, 1024, 2048 or 4096 elements.
        compress_statistics: quantize the scales too, to 8 bits in blocks of 256.
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the bytes are stored as.

    Returns:
        The packed codes, two a byte, ``[ceil(ceil(n / 2) / itemsize), 1]``, and the state.

    Raises:
        ValueError: for another dtype, block size, type, or buffers that do not fit.
    """
    if blocksize is None:
        blocksize = 64
    if A.requires_grad:
        A = A.detach()
    offset, state2 = None, None
    try:
        if out is None and absmax is None:
            if not compress_statistics:
                packed, scales = _quantize_4bit(A, blocksize, quant_type, quant_storage)
            else:
                packed, scales, absmax2, offset = _quantize_4bit_nested(
                    A, blocksize, quant_type, quant_storage, _NESTED_BLOCKSIZE
                )
                state2 = _second_state(absmax2, _NESTED_BLOCKSIZE)
        else:
            native.check_blocksize(blocksize)
            units = -(-((A.numel() + 1) // 2) // quant_storage.itemsize)
            packed = _buffer("out", out, (units, 1), quant_storage, A)
            blocks = (-(-A.numel() // blocksize),)
            first = None if compress_statistics else absmax
            scales = _buffer("absmax", first, blocks, torch.float32, A)
            _quantize_4bit_out(A, blocksize, quant_type, packed, scales)
            if compress_statistics:
                scales, absmax2, offset = _quantize_absmax(scales, _NESTED_BLOCKSIZE)
                state2 = _second_state(absmax2, _NESTED_BLOCKSIZE)
                if absmax is not None:
                    scales = _buffer("absmax", absmax, blocks, torch.uint8, A).copy_(scales)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None
    code = _table4(quant_type, A)
    state = QuantState(scales, A.shape, None, blocksize, quant_type, A.dtype, offset, state2)
    state.code = state._standard = code
    return packed, state


def _second_state(absmax2: Tensor, blocksize: int) -> QuantState:
    code = _dynamic_code(absmax2)
    return QuantState(absmax=absmax2, code=code, blocksize=blocksize, dtype=torch.float32)


def _buffer(
    name: str, given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> Tensor:
    """The caller's buffer, checked, or a fresh one."""
    if given is None:
        return like.new_empty(shape, dtype=dtype)
    if tuple(given.shape) != shape or given.dtype != dtype or given.device != like.device:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)} on {like.device}, "
            f"got {given.dtype} of shape {list(given.shape)} on {given.device}"
        )
    return given


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="fp4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="nf4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The inverse of :func:`quantize_4bit`: exactly the shape that was quantized.

    Args:
        A: the packed codes, in any storage dtype. When it is transposed, ``[1, n]``, so is the
            result.
        quant_state: what :func:`quantize_4bit` returned. Without it, ``absmax`` and ``out`` are
            needed, and ``blocksize`` (64) and ``quant_type`` count.
        absmax: float32 ``[blocks]``; only without ``quant_state``.
        out: written and returned; its dtype decides, its shape must be the state's.

    Raises:
        ValueError: when the parts do not fit each other.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError(
                "dequantize_4bit requires both absmax and out when quant_state is not provided"
            )
        blocksize = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    s = quant_state
    try:
        if out is None:
            code = s.code
            if code is s._standard and not s.nested:
                result = _dequantize_4bit(A, s.absmax, s.blocksize, s.quant_type, s.shape, s.dtype)
            else:
                nested = _nested(s) if s.nested else _NOT_NESTED
                result = _dequantize_4bit_state(
                    A, s.absmax, s.blocksize, s.quant_type, s.shape, s.dtype, code, *nested
                )
        else:
            shape = out.shape if s.shape is None else s.shape
            nested = _nested(s) if s.nested else _NOT_NESTED
            _dequantize_4bit_out(
                A, s.absmax, s.blocksize, s.quant_type, shape, s._table(), *nested, out
            )
            result = out
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None
    if A.size(-1) != 1 and A.dim() == 2 and A.size(0) == 1:
        return result.t()
    return result


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with ``quant_type="fp4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with ``quant_type="nf4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """``A · dequantize(B)^T`` without a gradient; any number of rows.

    Args:
        A: ``[..., in_features]``, float32, float16 or bfloat16.
        B: the packed weight, or its transpose.
        out: ``[..., out_features]``, written and returned.
        transposed_A, transposed_B: ignored.
        state: the weight's, of shape ``[out_features, in_features]``.

    Raises:
        ValueError: without a state, or when the parts do not fit each other.
    """
    if state is None:
        raise ValueError("gemv_4bit requires the state from quantize_4bit, got None")
    s = state
    nested = _nested(s) if s.nested else _NOT_NESTED
    weight = (s.absmax, s.blocksize, s.quant_type, s.shape, None, s._table(), *nested)
    try:
        with torch.no_grad():
            if out is None:
                return _matmul_4bit(A, B, *weight)
            _matmul_4bit_out(A, B, *weight, out)
            return out
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


# ---- 8-bit ---------------------------------------------------------------------------------------


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantizes ``A`` to 8 bits an element: the nearest of up to 256 values, a scale per block.

    Args:
        A: float32, float16 or bfloat16, of any shape.
        code: ascending values in [-1, 1], ``[1..256]``; the signed dynamic map by default.
        absmax: float32 ``[blocks]`` to write the scales into (uint8 when ``nested``).
        out: uint8 of the shape of ``A`` to write the indices into.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096 (default) elements.
        nested: quantize the scales too, with the same block size.

    Returns:
        The indices, uint8 of the shape of ``A``, and the state.

    Raises:
        ValueError: for another dtype or block size, a code that does not ascend (on a GPU that is
            not looked at), or buffers that do not fit.
    """
    if A.requires_grad:
        A = A.detach()
    if code is None:
        code = _dynamic_code(A)
    offset, state2 = None, None
    try:
        if out is None and absmax is None:
            out, scales = _quantize_blockwise(A, code, blocksize)
        else:
            native.check_blocksize(blocksize)
            out = _buffer("out", out, tuple(A.shape), torch.uint8, A)
            blocks = (-(-A.numel() // blocksize),)
            scales = _buffer("absmax", None if nested else absmax, blocks, torch.float32, A)
            _quantize_blockwise_out(A, code, blocksize, out, scales)
        if nested:
            scales, absmax2, offset = _quantize_absmax(scales, blocksize)
            state2 = _second_state(absmax2, blocksize)
            if absmax is not None:
                scales = _buffer("absmax", absmax, blocks, torch.uint8, A).copy_(scales)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None
    state = QuantState(
        absmax=scales, code=code, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2
    )
    return out, state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The inverse of :func:`quantize_blockwise`.

    Args:
        A: uint8 indices.
        quant_state: what :func:`quantize_blockwise` returned. Without it ``absmax`` is needed, and
            ``code`` (the signed dynamic map) and ``blocksize`` count; the result is float32.
        absmax: float32 ``[blocks]``; only without ``quant_state``.
        out: written and returned; its dtype decides, its shape must be that of ``A``.
        nested: ignored, the state knows.

    Raises:
        ValueError: when the parts do not fit each other.
    """
    if A.dtype != torch.uint8:
        raise ValueError(f"A must be uint8, got {A.dtype}")
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise requires either quant_state or absmax")
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    s = quant_state
    scales = s.absmax
    if s.nested:
        _nested(s)
        scales = dequantize_blockwise(scales, s.state2) + s.offset
    values = _dynamic_code(A) if s.code is None else s.code
    try:
        if out is None:
            return _dequantize_blockwise(A, scales, values, s.blocksize, s.dtype)
        if out.shape != A.shape:
            raise ValueError(f"out must have shape {list(A.shape)}, got {list(out.shape)}")
        _dequantize_blockwise_out(A, scales, values, s.blocksize, out.dtype, out)
        return out
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


# ---- optimizer steps -----------------------------------------------------------------------------


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step of an optimizer with float32 states, in place.

    Args:
        optimizer_name: ``"adam"``, ``"lamb"`` (the same), ``"momentum"``, ``"lars"`` (the same),
            ``"rmsprop"``, ``"adagrad"``, ``"lion"``, ``"ademamix"`` or ``"schedule_free_adamw"``
            (whose ``state1`` starts as a copy of ``p``).
        g: the gradient, of the shape of ``p``; float32, float16 or bfloat16, like ``p`` or not.
        p: the parameter, of any layout; changed.
        state1: float32, of the shape of ``p`` (``[2, *p.shape]`` for ``"ademamix"``); changed.
        beta1, beta2, beta3: decay rates of the moments.
        eps: added to the root of the second moment.
        step: the number of this step, from 1.
        lr: learning rate.
        state2: float32 like ``p``, for ``"adam"``, ``"lamb"``, ``"ademamix"`` and
            ``"schedule_free_adamw"``; changed.
        alpha: weight of the slow moment of ``"ademamix"``, of this step's average of
            ``"schedule_free_adamw"``.
        weight_decay: added to the gradient by ``"momentum"``, ``"lars"``, ``"rmsprop"`` and
            ``"adagrad"``, decoupled for the others.
        gnorm_scale: gradients are multiplied by it.
        unorm_vec: float32 ``[1]``, takes the norm of the update when ``max_unorm`` is positive.
        max_unorm: when positive, the update is scaled down to at most this multiple of the norm of
            ``p`` (for ``"adam"``, ``"lamb"``, ``"momentum"``, ``"lars"`` and ``"rmsprop"``).
        skip_zeros: leave parameter and states alone where the gradient is zero.

    Raises:
        ValueError: for an unknown name, a step below 1, or tensors that do not fit each other or
            overlap. Nothing has been changed then.
        TypeError: for states of another dtype.
    """
    try:
        _optimizer_update_32bit(
            *(optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, _UNKNOWN_NORM),
            *(beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros),
        )
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One step of an optimizer with 8-bit states in blocks of 256, in place.

    Where a gradient or a new state is NaN or infinite the parameter stays and its states become
    zero.

    Args:
        optimizer_name, g, p, beta1, beta2, beta3, alpha, eps, step, lr, weight_decay,
            gnorm_scale, skip_zeros: as in :func:`optimizer_update_32bit`.
        state1: uint8 indices into ``qmap1``, of the shape of ``p`` (``[2, *p.shape]`` for
            ``"ademamix"``); changed. Of ``"schedule_free_adamw"`` float32, without a scale.
        state2: uint8 indices into ``qmap2`` like ``p``, for rules with a second state; changed.
        qmap1: ascending float32 ``[256]`` from -1 to 1 (``create_dynamic_map(signed=True)``).
        qmap2: from 0 to 1 (``create_dynamic_map(signed=False)``), with ``state2``.
        absmax1: float32 ``[blocks]`` (``[2, blocks]`` for ``"ademamix"``), the scales of
            ``state1``; changed.
        absmax2: float32 ``[blocks]``, with ``state2``; changed.

    Raises:
        ValueError: for an unknown name, a step below 1, a code that does not ascend, or tensors
            that do not fit each other or overlap. Nothing has been changed then.
        TypeError: for states of another dtype.
    """
    try:
        _optimizer_update_8bit_blockwise(
            *(optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr),
            *(qmap1, qmap2, absmax1, absmax2, weight_decay, gnorm_scale, skip_zeros),
        )
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


# ---- paged tensors -------------------------------------------------------------------------------


class GlobalPageManager:
    """The paged tensors of this process; get it with :meth:`get_instance`.

    Attributes:
        paged_tensors: in the order they were made. It does not keep them alive.
    """

    _instance: GlobalPageManager | None = None

    paged_tensors: Any

    def __init__(self) -> None:
        raise RuntimeError(
            "GlobalPageManager is one per process: call GlobalPageManager.get_instance()"
        )

    @classmethod
    def get_instance(cls) -> GlobalPageManager:
        """The manager, made on the first call."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget everything."""
        from .optim._paged import TensorList

        self.paged_tensors = TensorList()

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """:func:`prefetch_tensor` on all of them; the first made are asked for last, so that they
        are the last to leave memory again."""
        for tensor in reversed(list(self.paged_tensors)):
            prefetch_tensor(tensor, to_cpu)


FIRST_CUDA_DEVICE = torch.device("cuda", index=0)


def get_paged(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = FIRST_CUDA_DEVICE,
) -> Tensor:
    """A contiguous tensor of zeros that need not fit the device's memory, with ``is_paged`` set.

    Args:
        shape: its shape.
        dtype: its dtype.
        device: a CUDA or XPU device, which shares the tensor's pages with the host, or the CPU,
            where it lives in a temporary file without a name (see ``optim.set_paged_dir`` for the
            folder).

    Raises:
        NotImplementedError: for another device, and a GPU that cannot share pages (under Windows
            and WSL).
        RuntimeError: when the GPU cannot be used, or the system has no memory for it.
        OSError: when the disk cannot hold it.
    """
    from .optim import _managed, _paged

    device = torch.device(device)
    if device.type == "cpu":
        return _paged.zeros(shape, dtype)
    return _managed.zeros(shape, dtype, device)


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Asks the system to bring a paged tensor into its device's memory, without waiting for it.

    The pages of a tensor on a GPU move in the order of its current stream: to the GPU, or with
    ``to_cpu`` to the host. ``to_cpu`` makes no difference for tensors on the CPU.

    Raises:
        AssertionError: when ``A`` is not paged.
    """
    from .optim import _managed, _paged

    if not getattr(A, "is_paged", False):
        raise AssertionError("only paged tensors can be prefetched (those from get_paged)")
    if A.device.type == "cpu":
        _paged.prefetch(A)
    else:
        _managed.prefetch(A, to_cpu)


def fill(
    A: Tensor, value: float, device: torch.device | str | None = None, prefetch: bool = True
) -> None:
    """Sets all elements of ``A``. ``device`` and ``prefetch`` are ignored."""
    with torch.no_grad():
        A.fill_(value)


# ---- for clients that go below this module -------------------------------------------------------


def get_ptr(A: Tensor | None) -> ct.c_void_p | None:
    """The address of a tensor's first element, for ctypes."""
    return None if A is None else ct.c_void_p(A.data_ptr())


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """True when the tensors (None is skipped) can be used in one call: all on one device.

    The name is historic. The CPU counts as a device.

    Raises:
        RuntimeError: when they are on several.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        listed = ", ".join(sorted(str(device) for device in devices))
        raise RuntimeError(f"all tensors must be on the same device, got {listed}")
    return True


# Last, for it builds on what stands above.
from .autograd._experts import experts_matmul_4bit, experts_matmul_8bit  # noqa: E402

__all__ = [
    "GlobalPageManager",
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "experts_matmul_4bit",
    "experts_matmul_8bit",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "lib",
    "name2qmap",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]
