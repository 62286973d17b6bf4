"""RMSprop, with 8-bit and 32-bit states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .optimizer import Optimizer1State

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]


def _refuse(name: str, alpha: float, centered: bool) -> None:
    if alpha == 0:
        raise NotImplementedError(f"{name} needs a mean square: alpha must not be 0")
    if centered:
        raise NotImplementedError(f"{name} has no centered form: centered must be False")


class RMSprop(Optimizer1State):
    """RMSprop: the gradient over the root of its running mean square.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate.
        alpha: decay rate of the mean square, not 0.
        eps: added to its root.
        weight_decay: times the parameter, added to the gradient.
        momentum: has no effect.
        centered: not supported.
        optim_bits: 8 or 32 bits of state.
        args: an object with ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in
            place of these arguments.
        min_8bit_size: parameters of fewer elements have 32-bit states.
        rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"``, or ``"kahan"``, which
            keeps what rounding cuts off; see :class:`~.optimizer.Optimizer8bit`.
        seed: of stochastic rounding.

    Raises:
        NotImplementedError: for ``alpha=0`` and for ``centered=True``.
        ValueError: for hyperparameters outside their range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        _refuse("RMSprop", alpha, centered)
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, momentum),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            rounding=rounding,
            seed=seed,
        )


class RMSprop8bit(Optimizer1State):
    """:class:`RMSprop` with 8-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`RMSprop`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        _refuse("RMSprop8bit", alpha, centered)
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, momentum),
            eps,
            weight_decay,
            8,
            args,
            min_8bit_size,
            rounding=rounding,
            seed=seed,
        )


class RMSprop32bit(Optimizer1State):
    """:class:`RMSprop` with 32-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`RMSprop`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        _refuse("RMSprop32bit", alpha, centered)
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, momentum),
            eps,
            weight_decay,
            32,
            args,
            min_8bit_size,
            rounding=rounding,
            seed=seed,
        )
