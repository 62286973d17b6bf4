"""SGD with momentum, with 8-bit and 32-bit states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .optimizer import Optimizer1State, refuse_no_momentum

__all__ = ["SGD", "SGD8bit", "SGD32bit"]


class SGD(Optimizer1State):
    """Stochastic gradient descent with momentum.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate.
        momentum: decay rate of the running sum of gradients, not 0.
        dampening, nesterov: have no effect.
        weight_decay: times the parameter, added to the gradient.
        optim_bits: 8 or 32 bits of state.
        args: an object with ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in
            place of these arguments.
        min_8bit_size: parameters of fewer elements have 32-bit states.
        rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"``, or ``"kahan"``, which
            keeps what rounding cuts off; see :class:`~.optimizer.Optimizer8bit`.
        seed: of stochastic rounding.

    Raises:
        NotImplementedError: for a momentum of 0.
        ValueError: for hyperparameters outside their range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_no_momentum("SGD", momentum)
        super().__init__(
            "momentum",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            rounding=rounding,
            seed=seed,
        )


class SGD8bit(Optimizer1State):
    """:class:`SGD` with 8-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`SGD`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_no_momentum("SGD8bit", momentum)
        super().__init__(
            "momentum",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            8,
            args,
            min_8bit_size,
            rounding=rounding,
            seed=seed,
        )


class SGD32bit(Optimizer1State):
    """:class:`SGD` with 32-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`SGD`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_no_momentum("SGD32bit", momentum)
        super().__init__(
            "momentum",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            32,
            args,
            min_8bit_size,
            rounding=rounding,
            seed=seed,
        )
