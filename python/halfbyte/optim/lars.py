"""LARS, with 8-bit and 32-bit states, and in PyTorch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .optimizer import Optimizer1State, refuse_no_momentum

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]


class LARS(Optimizer1State):
    """LARS (arXiv 1708.03888): momentum whose updates are bounded by the parameter's norm.

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
        max_unorm: largest norm of an update (before ``lr``) as a fraction of the parameter's norm.
            8-bit states know no update norm.
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
        max_unorm: float = 0.02,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_no_momentum("LARS", momentum)
        super().__init__(
            "lars",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            rounding=rounding,
            seed=seed,
        )


class LARS8bit(Optimizer1State):
    """:class:`LARS` with 8-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`LARS`.
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
        max_unorm: float = 0.02,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_no_momentum("LARS8bit", momentum)
        super().__init__(
            "lars",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            8,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            rounding=rounding,
            seed=seed,
        )


class LARS32bit(Optimizer1State):
    """:class:`LARS` with 32-bit states.

    ``rounding``, ``seed`` and the rest: see :class:`LARS`.
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
        max_unorm: float = 0.02,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        refuse_no_momentum("LARS32bit", momentum)
        super().__init__(
            "lars",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            32,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            rounding=rounding,
            seed=seed,
        )


class PytorchLARS(torch.optim.Optimizer):
    """LARS in PyTorch's own operations, on any device: a reference for :class:`LARS`.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate.
        momentum: decay rate of the running sum of gradients; 0 for none.
        dampening: how much of each new gradient is left out of that sum.
        weight_decay: times the parameter, added to the gradient.
        nesterov: look one step ahead.
        max_unorm: largest norm of an update as a fraction of the parameter's norm; 0 for any.

    Raises:
        ValueError: for hyperparameters outside their range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0.0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                "nesterov needs a positive momentum and no dampening, "
                f"got momentum {momentum} and dampening {dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "max_unorm": max_unorm,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. ``closure`` computes the loss anew, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p)
        return loss

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        assert p.grad is not None
        update = p.grad
        if group["weight_decay"] != 0:
            update = update.add(p, alpha=group["weight_decay"])
        momentum = group["momentum"]
        if momentum != 0:
            state = self.state[p]
            total = state.get("momentum_buffer")
            if total is None:
                total = state["momentum_buffer"] = update.clone()
            else:
                total.mul_(momentum).add_(update, alpha=1 - group["dampening"])
            update = update.add(total, alpha=momentum) if group["nesterov"] else total
        scale = 1.0
        if group["max_unorm"] > 0.0:
            bound = group["max_unorm"] * float(torch.linalg.vector_norm(p, dtype=torch.float32))
            norm = float(torch.linalg.vector_norm(update, dtype=torch.float32))
            if norm > bound:
                scale = bound / norm
        p.add_(update, alpha=-float(group["lr"]) * scale)
