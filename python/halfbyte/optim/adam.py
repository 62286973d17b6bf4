"""Adam, with 8-bit and 32-bit states, paged and not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .optimizer import Optimizer2State, refuse_amsgrad, refuse_optim_bits

__all__ = ["Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit"]


class Adam(Optimizer2State):
    """Adam (arXiv 1412.6980), with decoupled weight decay as in :class:`~.adamw.AdamW`: the two
    differ in their default only.

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
        weight_decay: float = 0,
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


class Adam8bit(Optimizer2State):
    """:class:`Adam` with 8-bit states: a quarter of the memory.

    ``rounding``, ``seed`` and the rest: see :class:`Adam`. ``optim_bits`` must keep its
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
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_amsgrad("Adam8bit", amsgrad)
        refuse_optim_bits("Adam8bit", optim_bits, 32)
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


class Adam32bit(Optimizer2State):
    """:class:`Adam` with 32-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`Adam`. ``optim_bits`` has no effect.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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


class PagedAdam(Optimizer2State):
    """:class:`Adam` with its states in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`Adam`. ``is_paged`` has no effect.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )


class PagedAdam8bit(Optimizer2State):
    """:class:`Adam` with 8-bit states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`Adam`. ``optim_bits`` must keep its
    default, which has no effect; nor has ``is_paged``.

    Raises:
        ValueError: for ``amsgrad``, another ``optim_bits``, or hyperparameters outside their range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_amsgrad("PagedAdam8bit", amsgrad)
        refuse_optim_bits("PagedAdam8bit", optim_bits, 32)
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


class PagedAdam32bit(Optimizer2State):
    """:class:`Adam` with 32-bit states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`Adam`. ``optim_bits`` and
    ``is_paged`` have no effect.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )
