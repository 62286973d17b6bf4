"""AdamW, with 8-bit and 32-bit states, paged and not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .optimizer import Optimizer2State, refuse_amsgrad, refuse_optim_bits

__all__ = ["AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]


class AdamW(Optimizer2State):
    """AdamW: Adam with decoupled weight decay (arXiv 1711.05101).

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled: parameters shrink by ``lr * weight_decay`` a step.
        amsgrad: has no effect.
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
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            rounding=rounding,
            seed=seed,
        )


class AdamW8bit(Optimizer2State):
    """:class:`AdamW` with 8-bit states: a quarter of the memory.

    ``rounding``, ``seed`` and the rest: see :class:`AdamW`. ``optim_bits`` must keep its
    default, which has no effect.

    Raises:
        ValueError: for ``amsgrad``, another ``optim_bits``, or hyperparameters outside their range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_amsgrad("AdamW8bit", amsgrad)
        refuse_optim_bits("AdamW8bit", optim_bits, 32)
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            8,
            args,
            min_8bit_size,
            is_paged=is_paged,
            rounding=rounding,
            seed=seed,
        )


class AdamW32bit(Optimizer2State):
    """:class:`AdamW` with 32-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`AdamW`. ``optim_bits`` has no effect.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            32,
            args,
            min_8bit_size,
            is_paged=is_paged,
            rounding=rounding,
            seed=seed,
        )


class PagedAdamW(Optimizer2State):
    """:class:`AdamW` with its states in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`AdamW`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )


class PagedAdamW8bit(Optimizer2State):
    """:class:`AdamW` with 8-bit states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`AdamW`. ``optim_bits`` must keep its
    default, which has no effect.

    Raises:
        ValueError: for ``amsgrad``, another ``optim_bits``, or hyperparameters outside their range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_amsgrad("PagedAdamW8bit", amsgrad)
        refuse_optim_bits("PagedAdamW8bit", optim_bits, 32)
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            8,
            args,
            min_8bit_size,
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )


class PagedAdamW32bit(Optimizer2State):
    """:class:`AdamW` with 32-bit states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`AdamW`. ``optim_bits`` has no effect.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            32,
            args,
            min_8bit_size,
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )
