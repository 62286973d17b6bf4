"""LAMB, with 8-bit and 32-bit states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .optimizer import Optimizer2State, refuse_amsgrad

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]


class LAMB(Optimizer2State):
    """LAMB (arXiv 1904.00962): Adam whose updates are bounded by the parameter's norm.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate.
        bias_correction, amsgrad, adam_w_mode: have no effect: moments are corrected for their
            start, and weight decay is decoupled.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: parameters shrink by ``lr * weight_decay`` a step.
        optim_bits: 8 or 32 bits of state.
        args: an object with ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in
            place of these arguments.
        min_8bit_size: parameters of fewer elements have 32-bit states.
        max_unorm: largest norm of an update (before ``lr``) as a fraction of the parameter's norm.
            8-bit states know no update norm.
        rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"``, or ``"kahan"``, which
            keeps what rounding cuts off; see :class:`~.optimizer.Optimizer8bit`.
        seed: of stochastic rounding.

    Raises:
        ValueError: for hyperparameters outside their range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            rounding=rounding,
            seed=seed,
        )


class LAMB8bit(Optimizer2State):
    """:class:`LAMB` with 8-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`LAMB`.

    Raises:
        ValueError: for ``amsgrad``, and for a ``max_unorm`` other than 1: 8-bit states know
            no update norm.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_amsgrad("LAMB8bit", amsgrad)
        if max_unorm != 1.0:
            raise ValueError(
                "LAMB8bit does not bound updates: max_unorm must keep its default 1.0, "
                f"got {max_unorm}"
            )
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            8,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            rounding=rounding,
            seed=seed,
        )


class LAMB32bit(Optimizer2State):
    """:class:`LAMB` with 32-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`LAMB`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            32,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            rounding=rounding,
            seed=seed,
        )
