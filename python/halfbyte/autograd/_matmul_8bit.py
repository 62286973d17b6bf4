"""The product of LLM.int8() and its gradients.

Activations are quantized by rows, the weight by rows of its own, the int32 product is exact;
columns of the activations that hold outliers take part in their own precision. The rule stands in
docs/int8.md. Everything public here has its home in :mod:`._functions`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from .._ops import failure, ops
from .._ops_base import bias_grad, save, saved
from ..functional import _buffer

_quant = ops.int8_vectorwise_quant.default
_dequant = ops.int8_vectorwise_dequant.dtype
_linear = ops.int8_linear.default
_linear_outliers = ops.int8_linear.outliers
_linear_listed = ops.int8_linear.listed
_grad_input = ops.int8_linear_grad_input.default

_FUSED = (torch.bfloat16, torch.float32, torch.float16)

# As for the 4-bit product: formulas that the ops have for torch.compile are skipped in eager mode.
_below_autograd = torch._C._AutoDispatchBelowAutograd


class GlobalOutlierPooler:
    """Collects outlier columns over the layers of a model; one for the process.

    Nothing in this package feeds it: clients do, with :meth:`add_outliers`.
    """

    _instance: GlobalOutlierPooler | None = None

    outliers: set[int]
    model_dim: int | None

    def __init__(self) -> None:
        raise RuntimeError("there is one pooler for the process: call get_instance()")

    def initialize(self) -> None:
        """Forget everything."""
        self.outliers = set()
        self.model_dim = None

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        """The pooler of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Add the columns ``outlier_idx`` (integers ``[n]``) of an input with ``feature_dim``
        columns. The first call sets the model's width; inputs of another width are left out."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        """The columns so far, int64 ``[n]``, ascending."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


@dataclass
class MatmulLtState:
    """What :func:`matmul` knows about a weight beside the weight itself.

    ``CB`` (int8 ``[out_features, in_features]``) and ``SCB`` (float32 ``[out_features]``) are the
    quantized weight; ``threshold`` is the magnitude from which an activation makes its column an
    outlier, 0 for none; ``idx`` (int64) has the outlier columns of the last product made with a
    threshold (not in compiled graphs). On a GPU products do not wait for these columns: who reads
    ``idx`` does. The other fields are there for clients that set them.
    """

    force_no_igemmlt: bool = False

    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None

    SBt: Tensor | None = None
    CBt: Tensor | None = None

    subB: Tensor | None = None

    outlier_pool: GlobalOutlierPooler | None = None
    idx: Tensor | None = None

    # Without annotations, these are no arguments of the constructor; nor are they upstream.
    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    use_pool = False

    _deprecated_fields: ClassVar[frozenset[str]] = frozenset(
        {"CxB", "CxBt", "formatB", "_tile_indices"}
    )
    # Which float weight CB was made from, () for one not to be used again; None when a client has
    # set CB.
    _made_from: Any = field(default=None, init=False, repr=False, compare=False)

    def __getattr__(self, name: str) -> Any:
        if name in MatmulLtState._deprecated_fields:
            return _deprecated(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def CxB(self) -> None:
        """Deprecated; always None. Setting it to None lets go of ``CB``: it once was the form of
        the weight that products used, and offloading hooks free the weight that way."""
        return _deprecated("CxB")

    @CxB.setter
    def CxB(self, value: None) -> None:
        if value is None:
            self.CB = None

    def reset_grads(self) -> None:
        """Forget the quantized weight, so that it is taken from the weight again."""
        self.CB = None
        self.SB = None
        self.SCB = None
        self.SBt = None
        self.CBt = None
        self._made_from = None


def _idx(self: MatmulLtState) -> Tensor | None:
    found = self.__dict__.get("_idx")
    if isinstance(found, list):
        columns, count = found
        return columns[: int(count)].long()
    return found


def _set_idx(self: MatmulLtState, value: Any) -> None:
    self.__dict__["_idx"] = value


# A field of the dataclass, so that the constructor takes it, of which the value may be a list on a
# device with the number of its columns.
MatmulLtState.idx = property(_idx, _set_idx)  # type: ignore[assignment]


def _deprecated(name: str) -> None:
    warnings.warn(
        f"MatmulLtState.{name} is deprecated and always None", FutureWarning, stacklevel=3
    )


class _Origin:
    """Which float weight codes were made from, and in which state of it.

    Seen: another tensor, even one in the memory of a tensor that is gone; writes to the tensor or a
    view of it; other data assigned to ``weight.data``, whatever its address. Not seen: what leaves
    no trace in any of these, as writes through ``weight.data`` and torch's fused optimizers do.
    """

    __slots__ = ("_facts", "_storage", "_tensor")

    def __init__(self, weight: Tensor) -> None:
        # While these are held, no other tensor and no other storage can have the same address.
        self._tensor = weakref.ref(weight)
        self._storage = StorageWeakRef(weight.untyped_storage())
        self._facts = _facts(weight)

    def is_still(self, weight: Tensor) -> bool:
        """Whether ``weight`` is that weight, unchanged."""
        return (
            self._tensor() is weight
            and self._facts == _facts(weight)
            and self._storage.cdata == weight.untyped_storage()._cdata
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[()]:
        return ()  # a copied state is that of a copied weight

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ()


def _facts(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride()


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` (floating, ``[..., in_features]``) as int8 codes of its shape and float32 scales
    ``[...]``, the largest magnitude of each row.

    Raises TypeError for a weight that is not floating-point, ValueError for fewer than two
    dimensions.
    """
    if not weight.is_floating_point():
        raise TypeError(f"a weight to quantize must be floating-point, got {weight.dtype}")
    if weight.dim() < 2:
        raise ValueError(
            "a weight to quantize must have shape [out_features, in_features], "
            f"got {list(weight.shape)}"
        )
    wide = weight.detach()
    if wide.dtype not in _FUSED:
        wide = wide.float()
    try:
        codes, scales, _ = _quant(wide, 0.0)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None
    return codes.view(weight.shape), scales.view(weight.shape[:-1])


def dequantize_weight(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes`` (int8 ``[..., in_features]``) times ``scales`` (float32 ``[...]``) over 127, in
    ``dtype``."""
    shape, inner = codes.shape, codes.size(-1)
    narrow = dtype if dtype in _FUSED else torch.float32
    try:
        decoded = _dequant(codes.reshape(scales.numel(), inner), scales.reshape(-1), narrow)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None
    return decoded.view(shape).to(dtype)


def _quantized(B: Tensor, state: MatmulLtState, trained: bool = False) -> tuple[Tensor, Tensor]:
    """The quantized weight of a product with ``B``: the state's, or made from ``B`` and kept there.

    A float weight is quantized again when it has changed. While training, and with ``trained`` (the
    product is recorded for a gradient of ``B``), it is in each forward, and what is made there is
    not used again: torch's fused optimizers and writes through ``.data`` change it without a trace.
    """
    CB, SCB = state.CB, state.SCB
    if not B.is_floating_point():
        if CB is None:
            CB = B.data
        if SCB is None:
            SCB = getattr(B, "SCB", None)
        if SCB is None:
            raise ValueError(
                f"the weight is quantized ({B.dtype} of shape {list(B.shape)}) but its scales are "
                "missing: neither state.SCB nor B.SCB is set"
            )
        return CB, SCB
    changing = state.has_fp16_weights and state.is_training
    if CB is not None and SCB is not None:
        origin = state._made_from
        if origin is None:
            if not changing:
                return CB, SCB
        elif origin and not (changing or trained) and origin.is_still(B):
            return CB, SCB
    CB, SCB = quantize_weight(B)
    state.reset_grads()
    state.CB, state.SCB = CB, SCB
    # Tensors made under inference_mode() do not count writes.
    state._made_from = () if changing or trained or B.is_inference() else _Origin(B)
    return CB, SCB


def _run(A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, state: MatmulLtState) -> Tensor:
    """The product below autograd. Tells ``state`` the outlier columns when there is a threshold.

    On a GPU only the device knows how many there are: the state gets the list as it is there.
    """
    threshold = float(state.threshold)
    with _below_autograd():
        if threshold <= 0.0:
            return _linear(A, CB, SCB, bias, threshold)
        if A.device.type == "cpu":
            result, state.idx = _linear_outliers(A, CB, SCB, bias, threshold)
        else:
            result, *found = _linear_listed(A, CB, SCB, bias, threshold)
            state.__dict__["_idx"] = found
        return result


def _rows(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _weight_grad(grad: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad^T · A``, in at least the weight's precision, as ``dtype``."""
    wide = torch.promote_types(torch.promote_types(grad.dtype, A.dtype), dtype)
    with torch.autocast(grad.device.type, enabled=False):
        return torch.mm(_rows(grad).to(wide).t(), _rows(A).to(wide)).to(dtype)


def _run_decoded(
    A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, state: MatmulLtState
) -> Tensor:
    """The product of float activations with the decoded weight."""
    weight = dequantize_weight(CB, SCB, A.dtype)
    return F.linear(A, weight, None if bias is None else bias.to(A.dtype))


def _forward(
    ctx: Any,
    product: Callable[[Tensor, Tensor, Tensor, Tensor | None, MatmulLtState], Tensor],
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    bias: Tensor | None,
    state: MatmulLtState | None,
) -> Tensor:
    """A product, and what :meth:`MatMul8bitLt.backward` needs of it."""
    state = MatmulLtState() if state is None else state
    needs_A, needs_B, *_ = ctx.needs_input_grad
    CB, SCB = _quantized(B, state, needs_B)
    result = product(A, CB, SCB, bias, state)
    save(ctx, *((CB, SCB) if needs_A else (None, None)), A if needs_B else None)
    ctx.dtypes = B.dtype, None if bias is None else bias.dtype
    if out is None:
        return result
    out.copy_(result)
    ctx.mark_dirty(out)
    return out


class MatMul8bitLt(torch.autograd.Function):
    """``A · W^T + bias`` with int8 activations and weight, see :func:`matmul`.

    Gradients: of ``A`` through the dequantized weight (which is never stored), of a float ``B`` as
    ``grad^T · A`` in its dtype, of ``bias`` as a sum in its dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        return _forward(ctx, _run, A, B, out, bias, state)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        needs_A, needs_B, _, needs_bias, _ = ctx.needs_input_grad
        CB, SCB, A = saved(ctx)
        dtype, bias_dtype = ctx.dtypes
        return (
            _grad_input(grad_output, CB, SCB) if needs_A else None,
            _weight_grad(grad_output, A, dtype) if needs_B else None,
            None,
            bias_grad(grad_output, bias_dtype) if needs_bias else None,
            None,
        )


class MatMul8bitFp(torch.autograd.Function):
    """``A · dequantize(W)^T + bias``: the product with the int8 weight and float activations.

    The forward pass decodes the whole weight; gradients are those of :class:`MatMul8bitLt`.
    :func:`matmul` does not use it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        return _forward(ctx, _run_decoded, A, B, out, bias, state)

    backward = MatMul8bitLt.backward


class _Product(torch.autograd.Function):
    """The product and the gradients of :class:`MatMul8bitLt`, free of state: for torch.compile with
    a float weight (``B``, else None)."""

    @staticmethod
    def forward(
        A: Tensor, B: Tensor | None, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        return _linear(A, CB, SCB, bias, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        A, B, CB, SCB, bias, _ = inputs
        ctx.save_for_backward(A, CB, SCB)
        ctx.dtypes = None if B is None else B.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs_A, needs_B, _, _, needs_bias, _ = ctx.needs_input_grad
        A, CB, SCB = ctx.saved_tensors
        dtype, bias_dtype = ctx.dtypes
        return (
            _grad_input(grad, CB, SCB) if needs_A else None,
            _weight_grad(grad, A, dtype) if needs_B else None,
            None,
            None,
            bias_grad(grad, bias_dtype) if needs_bias else None,
            None,
        )


class _Transformed(_Product):
    """The same for functorch: batched over one call for each sample, with a tangent. torch.compile
    takes neither."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Product.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *inputs[2:4])

    @staticmethod
    def jvp(ctx: Any, dA: Any, dB: Any, dCB: None, dSCB: None, dbias: Any, _: None) -> Tensor:
        A, CB, SCB = ctx.saved_tensors
        return _tangent(A, dA, dB, dbias, lambda: (CB, SCB))


def _tangent(
    A: Tensor,
    dA: Tensor | None,
    dB: Tensor | None,
    dbias: Tensor | None,
    weight: Callable[[], tuple[Tensor, Tensor]],
) -> Tensor:
    """What the product changes by, in the dtype of ``A``; one of the three is not None."""
    parts = []
    if dA is not None:
        parts.append(F.linear(dA, dequantize_weight(*weight(), dA.dtype)))
    if dB is not None:
        parts.append(F.linear(A, dB.to(A.dtype)))
    if dbias is not None:
        parts.append(dbias.to(A.dtype).expand(*A.shape[:-1], dbias.size(0)))
    tangent = parts[0]
    for part in parts[1:]:
        tangent = tangent + part
    return tangent


def _traced(A: Tensor) -> bool:
    """Whether no data are to be looked at, nor state to be changed."""
    return (
        torch.compiler.is_compiling()
        or A.is_meta
        or torch._C._are_functorch_transforms_active()
        or (type(A) is not Tensor and _is_fake(A))
    )


def _is_fake(A: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(A, FakeTensor)


def traced_product(
    A: Tensor, B: Tensor, CB: Tensor | None, SCB: Tensor | None, bias: Tensor | None, t: float
) -> Tensor:
    """The product out of ops alone: a tracer sees no state change. ``CB`` and ``SCB`` are given for
    a weight that stays quantized."""
    if CB is None or SCB is None:
        CB, SCB = quantize_weight(B)
    weight = B if B.is_floating_point() else None
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(A, weight, CB, SCB, bias, t)
    if B.requires_grad:
        return _Product.apply(A, weight, CB, SCB, bias, t)
    return _linear(A, CB, SCB, bias, t)


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``A · W^T + bias`` by LLM.int8(), in the dtype of ``A``.

    The quantized weight is ``state.CB`` and ``state.SCB`` if they are set; otherwise it is made
    from ``B`` and kept there. It is made again when ``B`` is another tensor or has changed, and in
    each forward when ``state.has_fp16_weights`` and ``state.is_training`` are set or the gradient
    of ``B`` is recorded. Between other calls, writes through ``B.data`` and steps of torch's fused
    optimizers leave no trace: call ``state.reset_grads()`` after them.

    Differentiable in ``A``, ``bias`` and a float ``B``.

    Args:
        A: ``[..., in_features]``, floating; float64 is computed in float32.
        B: ``[out_features, in_features]``, floating or int8. A quantized weight may come without a
            state when it has its scales with it, as ``Int8Params`` does.
        out: ``[..., out_features]`` of the dtype of ``A``, written and returned.
        state: takes the quantized weight, and the outlier columns as ``state.idx``; a fresh one
            when None.
        threshold: replaces ``state.threshold`` when positive.
        bias: ``[out_features]``, floating.

    Raises:
        TypeError: ``A`` or a weight to quantize is not a floating-point tensor.
        ValueError: shapes do not fit each other, or the scales of an int8 weight are missing.
    """
    if state is None:
        state = MatmulLtState()
    if threshold > 0.0:
        state.threshold = threshold
    if not isinstance(A, Tensor):
        raise TypeError(f"A must be a floating-point tensor, got {type(A).__name__}")
    if A.dtype not in _FUSED:
        if not A.is_floating_point():
            raise TypeError(f"A must be a floating-point tensor, got {A.dtype}")
        result = matmul(A.float(), B, None, state, 0.0, bias).to(A.dtype)
        return result if out is None else _into(out, result)
    if A.dim() == 0:
        raise ValueError("A must have at least one dimension, got none")
    if _traced(A):
        fixed = not state.has_fp16_weights or not B.is_floating_point()
        CB, SCB = (state.CB, state.SCB) if fixed else (None, None)
        if not B.is_floating_point() and (CB is None or SCB is None):
            CB, SCB = _quantized(B, state)
        result = traced_product(A, B, CB, SCB, bias, float(state.threshold))
        return result if out is None else _into(out, result)
    if forward_ad._current_level >= 0:
        dual = _dual(A, B, bias, state)
        if dual is not None:
            return dual if out is None else _into(out, dual)
    try:
        if out is not None:
            _buffer("out", out, (*A.shape[:-1], B.size(0)), A.dtype, A)
        if torch.is_grad_enabled() and (
            A.requires_grad or B.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return MatMul8bitLt.apply(A, B, out, bias, state)
        CB, SCB = _quantized(B, state)
        result = _run(A, CB, SCB, bias, state)
        return result if out is None else out.copy_(result)
    except (RuntimeError, NotImplementedError) as error:
        raise failure(error) from None


def _into(out: Tensor, result: Tensor) -> Tensor:
    return _buffer("out", out, tuple(result.shape), result.dtype, result).copy_(result)


def _dual(A: Tensor, B: Tensor, bias: Tensor | None, state: MatmulLtState) -> Tensor | None:
    """The product and its tangent in forward-mode AD; None when nothing has a tangent."""
    A, dA = forward_ad.unpack_dual(A)
    B, dB = forward_ad.unpack_dual(B)
    bias, dbias = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    if dA is None and dB is None and dbias is None:
        return None
    result = matmul(A, B, None, state, 0.0, bias)
    tangent = _tangent(A, dA, dB, dbias, lambda: _quantized(B, state))
    return forward_ad.make_dual(result, tangent)


_HOME = __name__.rpartition(".")[0] + "._functions"
for _public in (GlobalOutlierPooler, MatmulLtState, MatMul8bitFp, MatMul8bitLt, matmul):
    _public.__module__ = _HOME

__all__ = ["GlobalOutlierPooler", "MatMul8bitFp", "MatMul8bitLt", "MatmulLtState", "matmul"]
