"""Muon with 8-bit momentum, and 8-bit AdamW for what is not a matrix.

Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) takes the momentum of a matrix and
moves the matrix by the nearest semi-orthogonal one, so that all directions are learned at the same
pace. A few steps of a polynomial iteration, of matrix products only, are near enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .._ops import failure, ops, step_group
from . import _sharded
from ._coding import BLOCKSIZE as _BLOCKSIZE
from .optimizer import (
    _FLOATS,
    _Batch,
    _check_common,
    _Hyper,
    _StateOptimizer,
)

__all__ = ["Muon8bit"]

_ADJUSTMENTS = (None, "original", "match_rms_adamw", "spectral_unclamped")


class Muon8bit(_StateOptimizer):
    """Muon with 8-bit momentum for matrices, AdamW with 8-bit moments for all else.

    For a matrix ``p`` of ``rows x columns`` with gradient ``g``::

        m = momentum m + (1 - momentum) g
        u = momentum m + (1 - momentum) g        if nesterov, else m
        x = u / max(|u|, eps)                    Frobenius norm
        x = a x + (b x x' + c (x x')^2) x        ns_steps times, (a, b, c) = ns_coefficients
        p = p (1 - lr weight_decay) - lr adjustment x

    with an adjustment to the matrix's shape: ``sqrt(max(1, rows / columns))`` (``"original"``, or
    None), ``0.2 sqrt(max(rows, columns))`` (``"match_rms_adamw"``: updates as large as AdamW's, so
    its learning rate and weight decay fit; arXiv 2502.16982), or ``sqrt(rows / columns)``
    (``"spectral_unclamped"``). Names, defaults and formulas up to here are those of
    ``torch.optim.Muon``. It iterates in bfloat16 always; here it is done **in the dtype of the
    parameter**, unless ``ns_dtype`` says otherwise. ``m`` is encoded after it has been used: what
    the encoding loses is missing from the next step on.

    Which parameters are matrices: a group may say so with ``use_muon``, as in Keller Jordan's
    ``MuonWithAuxAdam``. With True, all its parameters get Muon; those of more than 2 dimensions
    (convolutions) as matrices ``[p.shape[0], -1]``. With False, all get AdamW, and the group's
    ``lr``, ``betas``, ``eps`` and ``weight_decay`` are AdamW's. Where it does not, 2-dimensional
    parameters get Muon and others AdamW, with the ``adamw_*`` settings (of the group or else of the
    optimizer); a group of both kinds becomes two, the first for Muon. Embeddings and output heads
    are 2-dimensional too, but should be given to AdamW::

        Muon8bit([
            {"params": model.blocks.parameters()},
            {"params": [*model.embed.parameters(), *model.head.parameters()],
             "use_muon": False, "lr": 3e-4},
        ], lr=0.02, adamw_lr=3e-4)

    Memory: 1 + 4/256 bytes of state a parameter for Muon (``torch.optim.Muon``: 4 for float32),
    2 + 8/256 for AdamW. During a step, for the largest matrix alone: its momentum in float32, and
    the iteration's two buffers and two square ones of the shorter side (at most 4 more of its size)
    in ``ns_dtype``.

    Sharded parameters (FSDP2's DTensor): every rank gathers the matrix, iterates, and takes its
    part; all ranks must step together, as they do. FSDP1's parameters are flat, and refused unless
    their group says ``use_muon=False``.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate; of AdamW too, unless ``adamw_lr`` is given.
        weight_decay: decoupled: parameters shrink by ``lr * weight_decay`` a step.
        momentum: decay rate of the momentum, less than 1.
        nesterov: look a step ahead.
        ns_coefficients: three coefficients of the polynomial.
        eps: least norm to divide by.
        ns_steps: iterations, 0 to 99.
        adjust_lr_fn: see above.
        adamw_lr, adamw_weight_decay: of AdamW; None for the same as Muon's. Schedulers change the
            ``lr`` of each group, AdamW's among them.
        adamw_betas, adamw_eps: of AdamW.
        ns_dtype: of the matrix products: None for the parameter's, or float32, bfloat16, float16.
        min_8bit_size: parameters of fewer elements have 32-bit states.
        is_paged: keep states of 100,000 elements or more in paged memory, see
            :class:`~.optimizer.Optimizer8bit`.
        rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"``, or ``"kahan"``, which
            keeps what rounding cuts off; see :class:`~.optimizer.Optimizer8bit`.
        seed: of stochastic rounding.

    Raises:
        ValueError: for hyperparameters outside their range, or a group for Muon with parameters of
            less than 2 dimensions.

    A matrix whose update is not finite (a NaN or infinity in the gradient) stays as it is in that
    step, and the momentum of the elements in question becomes zero.

    Attributes:
        state: per matrix ``step`` (int), ``state1`` (float32 or uint8 of the parameter's shape);
            with 8 bits ``qmap1`` (float32 ``[256]``) and ``absmax1`` (float32 ``[blocks of 256]``);
            ``compensation`` with ``rounding="kahan"``. Per other parameter those of AdamW8bit.
    """

    _states = 2  # of AdamW; matrices have one: _one_state

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        ns_dtype: torch.dtype | None = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        _check_muon(defaults)
        _check_common(
            lr if adamw_lr is None else adamw_lr,
            adamw_eps,
            weight_decay if adamw_weight_decay is None else adamw_weight_decay,
            adamw_betas,
        )
        super().__init__(params, defaults, 8, is_paged, rounding=rounding, seed=seed)
        self._settle("adam", 8, None, min_8bit_size, 0.0, False)

    # ---- groups ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``, for one kind of parameters or both.

        Raises:
            ValueError: as the class.
        """
        said = set(param_group) if isinstance(param_group, dict) else set()
        super().add_param_group(param_group)
        self.param_groups.extend(self._by_kind(self.param_groups.pop(), said))

    @staticmethod
    def _by_kind(group: dict[str, Any], said: set[str]) -> list[dict[str, Any]]:
        """The group as one or two of a kind each. ``said``: the keys that were given."""
        use_muon = group.pop("use_muon", None)
        adamw = {key: group.pop(f"adamw_{key}") for key in ("lr", "betas", "eps", "weight_decay")}
        if use_muon is False:
            adamw = {key: group[key] if key in said else value for key, value in adamw.items()}
        matrices = [p.dim() == 2 if use_muon is None else bool(use_muon) for p in group["params"]]
        made = []
        for muon in sorted(set(matrices), reverse=True) or [use_muon is not False]:
            part = {**group, "use_muon": muon}
            for key in ("params", "param_names"):
                if key in group:
                    part[key] = [x for x, m in zip(group[key], matrices, strict=True) if m is muon]
            if muon or use_muon is None:
                for p in part["params"]:
                    if _sharded.is_flat(p):
                        raise ValueError(
                            "Muon8bit needs matrices, which FSDP1 flattens: shard the model with "
                            "fully_shard (FSDP2), or give these parameters to a group with "
                            "use_muon=False"
                        )
            if muon:
                for p in part["params"]:
                    if p.dim() < 2:
                        raise ValueError(
                            "parameters of a group with use_muon=True must have at least 2 "
                            f"dimensions, got one of shape {list(p.shape)}"
                        )
                _check_muon(part)
            else:
                part.update({key: value for key, value in adamw.items() if value is not None})
                _check_common(part["lr"], part["eps"], part["weight_decay"], part["betas"])
            made.append(part)
        return made

    def _group_config(self, group: dict[str, Any]) -> dict[str, Any]:
        if group["use_muon"]:
            group = {**group, "betas": (group["momentum"], 0.0)}
        return super()._group_config(group)

    def _owner(self, stream: int) -> tuple[dict[str, Any], Tensor]:
        """The group and the parameter at a position in the optimizer."""
        for group in self.param_groups:
            if stream < len(group["params"]):
                return group, group["params"][stream]
            stream -= len(group["params"])
        raise IndexError(f"the optimizer has no parameter {stream}")

    # ---- a step ----------------------------------------------------------------------------------

    @contextmanager
    def _one_state(self, alone: bool) -> Iterator[None]:
        """The base class sees the states of a matrix, if ``alone``, else those of AdamW."""
        if alone:
            self._states = 1
        try:
            yield
        finally:
            self.__dict__.pop("_states", None)

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Zeroed states for ``p``: 8-bit if the settings and the size of ``p`` say so.

        Raises:
            NotImplementedError: for ``optim_bits`` other than 8 and 32.
            ValueError: for a parameter that is not float32, float16 or bfloat16.
        """
        with self._one_state(group["use_muon"]):
            super().init_state(group, p, gindex, pindex)

    def _update(self, hyper: _Hyper, batch: _Batch) -> None:
        rest = _Batch()
        for part, p, grad, state, stream in zip(
            batch.params, batch.wholes, batch.grads, batch.states, batch.streams, strict=True
        ):
            if "state2" not in state:
                group, _ = self._owner(stream)
                self._update_matrix(hyper, group, (p, part), grad, state, stream)
                continue
            rest.params.append(part)
            rest.wholes.append(p)
            rest.grads.append(grad)
            rest.states.append(state)
            rest.streams.append(stream)
        if rest.params:
            super()._update(hyper, rest)

    def _update_matrix(
        self,
        hyper: _Hyper,
        group: dict[str, Any],
        where: tuple[Tensor, Tensor],
        grad: Tensor,
        state: dict[str, Any],
        stream: int,
    ) -> None:
        p, part = where
        steps, dtype = group["ns_steps"], group["ns_dtype"] or p.dtype
        u = _momentum(grad, state, hyper.beta1, group["nesterov"])
        x = u if part is p else _sharded.gathered(p, u)
        norm = torch.linalg.vector_norm(x)
        rows = p.shape[0]
        x = x.view(rows, p.numel() // rows if rows else 0)
        ratio = _adjustment(x.shape, group["adjust_lr_fn"])
        if norm.isfinite() and ratio * hyper.lr > 0.0:
            x.div_(norm.clamp_(min=hyper.eps))
            x = x.to(dtype)
            spare = torch.empty_like(x) if steps else torch.zeros_like(x)
            x, spare = _orthogonalized(x, spare, group["ns_coefficients"], steps)
            x = x.view(p.shape)
            if part is not p:
                x, spare = _sharded.part_of(p, x), u
            elif dtype is not torch.float32:
                spare = u
            self._move(hyper, where, x, spare.view(part.shape), ratio, state, stream)
        state["step"] += 1

    def _move(
        self,
        hyper: _Hyper,
        where: tuple[Tensor, Tensor],
        x: Tensor,
        scratch: Tensor,
        ratio: float,
        state: dict[str, Any],
        stream: int,
    ) -> None:
        """``p = p (1 - lr weight_decay) - lr ratio x``, as momentum that has no memory.

        Its native rule knows every rounding of ``p`` and is one pass. ``scratch``: float32, finite,
        overwritten.
        """
        whole, p = where
        alone = _Batch()
        alone.params, alone.wholes = [p], [whole]
        alone.states, alone.streams = [state], [stream]
        compensation, streams = self._rounding(hyper, alone)
        try:
            step_group(
                ops.optimizer_update_32bit.group,
                "momentum",
                [x],
                [p],
                [scratch],
                [],
                [],
                compensation,
                0.0,
                *(0.0, 0.0, 0.0, 0.0, 0.0),
                hyper.weight_decay / ratio,
                state["step"] + 1,
                hyper.lr * ratio,
                1.0,
                False,
                streams,
                hyper.seed,
            )
        except (RuntimeError, NotImplementedError) as error:
            raise failure(error) from None

    # ---- checkpoints -----------------------------------------------------------------------------

    def _owns_state_layout(self) -> bool:
        kind = type(self)
        return (
            kind.update_step is _StateOptimizer.update_step
            and kind.init_state is Muon8bit.init_state
        )

    def _check_state(self, where: str, p: Tensor, state: dict[str, Any]) -> None:
        muon = any(p is q for g in self.param_groups if g["use_muon"] for q in g["params"])
        if muon and "state2" in state:
            raise ValueError(
                f"{where} must be the state of a matrix, which has no 'state2', got one of AdamW: "
                "the parameter is in a group with use_muon=True"
            )
        with self._one_state(muon):
            super()._check_state(where, p, state)


def _momentum(grad: Tensor, state: dict[str, Any], momentum: float, nesterov: bool) -> Tensor:
    """Updates the momentum, and returns what to orthogonalize: float32, the caller's own.

    Not finite where the gradient is not; the momentum is zero there.
    """
    stored = state["state1"]
    coded = stored.dtype is torch.uint8
    m = stored
    if coded:
        code, absmax = state["qmap1"], state["absmax1"]
        m = F.dequantize_blockwise(stored, absmax=absmax, code=code, blocksize=_BLOCKSIZE)
    m.mul_(momentum).add_(grad, alpha=1 - momentum)
    finite = bool(torch.linalg.vector_norm(m).isfinite())
    if not finite:
        m.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    if coded:
        F.quantize_blockwise(m, code=code, absmax=absmax, out=stored, blocksize=_BLOCKSIZE)
    else:
        m = m.clone()
    if nesterov:
        m.mul_(momentum).add_(grad, alpha=1 - momentum)
    return m if finite else m.fill_(math.nan)


def _orthogonalized(
    x: Tensor, spare: Tensor, coefficients: Sequence[float], steps: int
) -> tuple[Tensor, Tensor]:
    """Newton-Schulz iterations of a matrix of norm 1: singular values go to about 1.

    ``x``, ``spare``: of one shape and dtype, both overwritten; returned with the result first. The
    product with its transpose is taken from the shorter side.
    """
    a, b, c = coefficients
    wide, side = x.shape[0] <= x.shape[1], min(x.shape)
    gram = x.new_empty(side, side)
    polynomial = torch.empty_like(gram)
    for _ in range(steps):
        torch.mm(*((x, x.t()) if wide else (x.t(), x)), out=gram)
        torch.addmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        left, right = (polynomial, x) if wide else (x, polynomial)
        torch.addmm(x, left, right, beta=a, out=spare)
        x, spare = spare, x
    return x, spare


def _adjustment(shape: torch.Size, kind: str | None) -> float:
    """What the learning rate is multiplied by for a matrix of that shape."""
    rows, columns = max(shape[0], 1), max(shape[1], 1)
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if kind == "spectral_unclamped":
        return math.sqrt(rows / columns)
    return math.sqrt(max(1.0, rows / columns))


def _check_muon(group: dict[str, Any]) -> None:
    """Raises ValueError for settings of Muon outside their range."""
    _check_common(group["lr"], group["eps"], group["weight_decay"], ())
    momentum, steps = group["momentum"], group["ns_steps"]
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps < 100:
        raise ValueError(f"ns_steps must be an integer from 0 to 99, got {steps!r}")
    if len(group["ns_coefficients"]) != 3:
        raise ValueError(
            f"ns_coefficients must be three numbers, got {len(group['ns_coefficients'])}"
        )
    if group["adjust_lr_fn"] not in _ADJUSTMENTS:
        raise ValueError(
            "adjust_lr_fn must be None, 'original', 'match_rms_adamw' or 'spectral_unclamped', "
            f"got {group['adjust_lr_fn']!r}"
        )
    if group["ns_dtype"] not in (None, *_FLOATS):
        raise ValueError(
            "ns_dtype must be None, torch.float32, torch.float16 or torch.bfloat16, "
            f"got {group['ns_dtype']}"
        )
