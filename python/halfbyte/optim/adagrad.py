"""Adagrad, with 8-bit and 32-bit states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .optimizer import Optimizer1State, refuse_optim_bits

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]


def _refuse(name: str, lr_decay: float, initial_accumulator_value: float) -> None:
    if initial_accumulator_value != 0.0:
        raise ValueError(
            f"{name} starts from 0: initial_accumulator_value must be 0, "
            f"got {initial_accumulator_value}"
        )
    if lr_decay != 0.0:
        raise ValueError(
            f"{name} does not decay its learning rate (use a scheduler): lr_decay must be 0, "
            f"got {lr_decay}"
        )


class Adagrad(Optimizer1State):
    """Adagrad: the gradient over the root of the sum of its squares.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate.
        lr_decay, initial_accumulator_value: must be 0.
        weight_decay: times the parameter, added to the gradient.
        eps: added to the root.
        optim_bits: 8 or 32 bits of state.
        args: an object with ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in
            place of these arguments.
        min_8bit_size: parameters of fewer elements have 32-bit states.
        rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"``, or ``"kahan"``, which
            keeps what rounding cuts off; see :class:`~.optimizer.Optimizer8bit`.
        seed: of stochastic rounding.

    Raises:
        ValueError: for hyperparameters outside their range, and what must be 0.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        _refuse("Adagrad", lr_decay, initial_accumulator_value)
        super().__init__(
            "adagrad",
            params,
            lr,
            (0.0, 0.0),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            rounding=rounding,
            seed=seed,
        )


class Adagrad8bit(Optimizer1State):
    """:class:`Adagrad` with 8-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`Adagrad`. ``optim_bits`` must keep its default.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        _refuse("Adagrad8bit", lr_decay, initial_accumulator_value)
        refuse_optim_bits("Adagrad8bit", optim_bits, 8)
        super().__init__(
            "adagrad",
            params,
            lr,
            (0.0, 0.0),
            eps,
            weight_decay,
            8,
            args,
            min_8bit_size,
            rounding=rounding,
            seed=seed,
        )


class Adagrad32bit(Optimizer1State):
    """:class:`Adagrad` with 32-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`Adagrad`. ``optim_bits`` has no effect.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        _refuse("Adagrad32bit", lr_decay, initial_accumulator_value)
        super().__init__(
            "adagrad",
            params,
            lr,
            (0.0, 0.0),
            eps,
            weight_decay,
            32,
            args,
            min_8bit_size,
            rounding=rounding,
            seed=seed,
        )
