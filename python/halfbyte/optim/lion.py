"""Lion, with 8-bit and 32-bit states, paged and not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .optimizer import Optimizer1State

__all__ = ["Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"]


class Lion(Optimizer1State):
    """Lion (arXiv 2302.06675): the sign of an interpolation between momentum and gradient.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, about a tenth of Adam's.
        betas: of the interpolation, and of the momentum.
        weight_decay: decoupled: parameters shrink by ``lr * weight_decay`` a step.
        optim_bits: 8 or 32 bits of state.
        args: an object with ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, in
            place of these arguments.
        min_8bit_size: parameters of fewer elements have 32-bit states.
        is_paged: keep states of 100,000 elements or more in paged memory, see
            :class:`~.optimizer.Optimizer8bit`.
        rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"``, or ``"kahan"``, which
            keeps what rounding cuts off; see :class:`~.optimizer.Optimizer8bit`.
        seed: of stochastic rounding.

    Raises:
        ValueError: for hyperparameters outside their range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            rounding=rounding,
            seed=seed,
        )


class Lion8bit(Optimizer1State):
    """:class:`Lion` with 8-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`Lion`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            8,
            args,
            min_8bit_size,
            is_paged=is_paged,
            rounding=rounding,
            seed=seed,
        )


class Lion32bit(Optimizer1State):
    """:class:`Lion` with 32-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`Lion`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            32,
            args,
            min_8bit_size,
            is_paged=is_paged,
            rounding=rounding,
            seed=seed,
        )


class PagedLion(Optimizer1State):
    """:class:`Lion` with states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`Lion`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )


class PagedLion8bit(Optimizer1State):
    """:class:`Lion` with 8-bit states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`Lion`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            8,
            args,
            min_8bit_size,
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )


class PagedLion32bit(Optimizer1State):
    """:class:`Lion` with 32-bit states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`Lion`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            32,
            args,
            min_8bit_size,
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )
