"""AdEMAMix, with 8-bit and 32-bit states, paged and not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .optimizer import Optimizer2State

__all__ = [
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
]


def _three(betas: Any) -> Any:
    count = betas.count(",") + 1 if isinstance(betas, str) else len(betas)
    if count != 3:
        raise ValueError(f"AdEMAMix takes three betas, got {betas!r}")
    return betas


class AdEMAMix(Optimizer2State):
    """AdEMAMix (arXiv 2409.03137): AdamW with a second, slow moment added to the first.

    ``state1`` stacks the two: ``[2, *shape]``.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate.
        betas: decay rates of the fast first moment, the second moment, and the slow first moment.
        alpha: weight of the slow moment.
        t_alpha, t_beta3: over how many steps ``alpha`` and the slow moment's decay rate warm up;
            None for no warm-up. Usually the number of steps of the training.
        eps: added to the root of the second moment.
        weight_decay: decoupled: parameters shrink by ``lr * weight_decay`` a step.
        optim_bits: 8 or 32 bits of state.
        min_8bit_size: parameters of fewer elements have 32-bit states.
        is_paged: keep states of 100,000 elements or more in paged memory, see
            :class:`~.optimizer.Optimizer8bit`.
        rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"``, or ``"kahan"``, which
            keeps what rounding cuts off; see :class:`~.optimizer.Optimizer8bit`.
        seed: of stochastic rounding.

    Raises:
        ValueError: for hyperparameters outside their range, or other than three betas.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        betas = _three(betas)
        super().__init__(
            "ademamix",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            None,
            min_8bit_size,
            is_paged=is_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            rounding=rounding,
            seed=seed,
        )


class AdEMAMix8bit(AdEMAMix):
    """:class:`AdEMAMix` with 8-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`AdEMAMix`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            optim_bits=8,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            rounding=rounding,
            seed=seed,
        )


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """:class:`AdEMAMix` with 8-bit states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`AdEMAMix`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            min_8bit_size=min_8bit_size,
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )


class PagedAdEMAMix(AdEMAMix):
    """:class:`AdEMAMix` with states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`AdEMAMix`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )


class AdEMAMix32bit(AdEMAMix):
    """:class:`AdEMAMix` with 32-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`AdEMAMix`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            optim_bits=32,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            rounding=rounding,
            seed=seed,
        )


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """:class:`AdEMAMix` with 32-bit states, in files when they are large (:mod:`._paged`).

    ``rounding``, ``seed`` and the rest: see :class:`AdEMAMix`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            min_8bit_size=min_8bit_size,
            is_paged=True,
            rounding=rounding,
            seed=seed,
        )
