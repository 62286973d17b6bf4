"""Schedule-free AdamW, with an 8-bit or a 32-bit second moment.

Schedule-free learning (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682) replaces the
decay of the learning rate by an average over the steps: there is no schedule, so nobody has to know
in advance when training ends. Names, arguments and group keys are those of the reference package
``schedulefree``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._coding import BLOCKSIZE as _BLOCKSIZE
from ._sharded import local as _local
from .optimizer import _check_common, _StateOptimizer

__all__ = ["AdamWScheduleFree", "AdamWScheduleFree8bit"]

_PIECE = 1 << 18
"""Elements that :meth:`AdamWScheduleFree.train` and ``eval`` have in float64 at a time."""


class _Schedule(NamedTuple):
    """What a group's next step has of its own."""

    k: int
    scheduled_lr: float
    lr_max: float
    weight_sum: float
    average: float
    """The weight of the new point in the average, ``c`` in the formulas."""

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> _Schedule:
        k, warmup_steps = group["k"], group["warmup_steps"]
        warm = (k + 1) / warmup_steps if k < warmup_steps else 1.0
        lr = float(group["lr"]) * warm
        lr_max = max(lr, group["lr_max"])
        weight = (k + 1) ** group["r"] * lr_max ** group["weight_lr_power"]
        weight_sum = group["weight_sum"] + weight
        return cls(k, lr, lr_max, weight_sum, weight / weight_sum if weight_sum else 0.0)


class AdamWScheduleFree(_StateOptimizer):
    """AdamW without a schedule of the learning rate.

    Gradients are taken at ``y``, steps are taken by ``z``, and ``x``, their average, is the model
    that is evaluated. With ``t = k + 1`` steps, ``lr_t`` the learning rate after warm-up, and
    ``g`` the gradient at ``y``::

        v   = beta2 v + (1 - beta2) g^2
        u   = g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay y
        c   = w_t / (w_1 + ... + w_t),    w_t = t^r max(lr_1, ..., lr_t)^weight_lr_power
        y   = y + c (z - y) - lr_t (1 - beta1 (1 - c)) u
        z   = z - lr_t u
        x   = y + (1 - 1 / beta1) (z - y)

    (the second ``z`` is the new one). There is no first moment: ``beta1`` interpolates between
    ``z`` and ``x``. Parameters hold ``y`` in train mode and ``x`` in eval mode; :meth:`train` and
    :meth:`eval` take them from one to the other. **Call** ``optimizer.train()`` **before training
    and** ``optimizer.eval()`` **before evaluating or saving the model**, beside the model's own
    ``train()`` and ``eval()``. A new optimizer is in eval mode. Layers with running statistics
    (BatchNorm) have those of ``y``: let some batches through the model in eval mode of the
    optimizer to correct them.

    Memory: ``z`` is float32 whatever the parameter is, 4 bytes a parameter, and ``v`` another 4
    (:class:`AdamWScheduleFree8bit`: 1 and 4 per block of 256).

    bfloat16 parameters: late updates of ``y`` are small, and to the nearest they are rounded away,
    while ``z`` goes on. Use ``rounding="stochastic"`` or ``"kahan"`` (what that keeps takes part
    in the change of modes).

    Going to eval mode and back gives the same ``y`` in every dtype, because both ways are computed
    in float64 and rounded once, to within ``beta1 / 2 < 1 / 2`` of a unit in the last place. Where
    units differ (``x`` has a larger exponent than ``y``, or ``y`` is a power of two) it may be the
    next number.

    Args:
        params: parameters, named parameters or groups.
        lr: the learning rate, some 1 to 10 times that of AdamW with a schedule.
        betas: the interpolation (greater than 0), and the decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of ``y``, times the learning rate.
        warmup_steps: steps over which the learning rate grows linearly.
        r: power of the step in the weights of the average.
        weight_lr_power: power of the learning rate in them; 0 for none.
        foreach: has no effect: all parameters go into one call of a native op anyway.
        optim_bits: 8 or 32 bits for the second moment.
        min_8bit_size: parameters of fewer elements have 32-bit states.
        is_paged: keep states of 100,000 elements or more in paged memory, see
            :class:`~.optimizer.Optimizer8bit`.
        rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"``, or ``"kahan"``, which
            keeps what rounding cuts off; see :class:`~.optimizer.Optimizer8bit`. In :meth:`train`
            and :meth:`eval`, ``"stochastic"`` rounds to nearest.
        seed: of stochastic rounding.

    Raises:
        ValueError: for hyperparameters outside their range.

    Groups hold, beside the arguments, ``k`` (steps done), ``train_mode``, ``scheduled_lr`` (of the
    last step), ``lr_max`` and ``weight_sum``. A parameter's own step (its first one may come later)
    corrects the bias of its ``v``; the reference uses ``k + 1``. Learning rates of single
    parameters (:class:`~.optimizer.GlobalOptimManager`) are not warmed up.

    Attributes:
        state: per parameter ``step`` (int), ``state1`` (``z``: float32, of the parameter's shape)
            and ``state2`` (``v``: float32, or uint8 with ``qmap2``, float32 ``[256]``, and
            ``absmax2``, float32 ``[blocks of 256]``); ``compensation`` with ``rounding="kahan"``.
    """

    _states = 2
    _coded_states = ("2",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        _check_common(lr, eps, weight_decay, betas)
        if not betas[0] > 0.0:
            raise ValueError(f"betas[0] must be greater than 0 to leave train mode, got {betas[0]}")
        if not warmup_steps >= 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "r": r,
            "k": 0,
            "warmup_steps": warmup_steps,
            "train_mode": False,
            "weight_sum": 0.0,
            "lr_max": -1.0,
            "scheduled_lr": 0.0,
            "weight_lr_power": weight_lr_power,
            "weight_decay": weight_decay,
            "foreach": foreach,
        }
        super().__init__(params, defaults, optim_bits, is_paged, rounding=rounding, seed=seed)
        self._settle("schedule_free_adamw", optim_bits, None, min_8bit_size, 0.0, False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``. The group is in the mode of the others:
        new parameters are ``x``, ``y`` and ``z`` at once."""
        if self.param_groups and isinstance(param_group, dict):
            param_group.setdefault("train_mode", self.param_groups[0]["train_mode"])
        super().add_param_group(param_group)

    # ---- modes -----------------------------------------------------------------------------------

    @torch.no_grad()
    def eval(self) -> None:
        """Makes parameters the averages ``x``, to evaluate or to save; nothing if they are."""
        self._change_mode(False)

    @torch.no_grad()
    def train(self) -> None:
        """Makes parameters the points ``y`` where gradients are taken; nothing if they are."""
        self._change_mode(True)

    def _change_mode(self, train: bool) -> None:
        for gindex, group in enumerate(self.param_groups):
            if group["train_mode"] == train:
                continue
            for pindex, p in enumerate(group["params"]):
                state = self.state.get(p)
                if state and "state1" in state:
                    beta1 = float(self.get_config(gindex, pindex, group)["betas"][0])
                    _move(_local(p), state, 1 - beta1 if train else 1 - 1 / beta1)
            group["train_mode"] = train

    # ---- a step ----------------------------------------------------------------------------------

    def _group_config(self, group: dict[str, Any]) -> dict[str, Any]:
        schedule = _Schedule.of(group)
        config = super()._group_config(group)
        return config | {"lr": schedule.scheduled_lr, "alpha": schedule.average}

    def _step_together(self) -> None:
        self._refuse_eval_mode()
        super()._step_together()
        self._count()

    def _step_one_by_one(self) -> None:
        self._refuse_eval_mode()
        super()._step_one_by_one()
        self._count()

    def _refuse_eval_mode(self) -> None:
        """Raises RuntimeError where parameters may not be ``y``."""
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__} must be in train mode to step, got eval mode: call "
                "optimizer.train() before training, optimizer.eval() before evaluating or saving"
            )

    def _count(self) -> None:
        for group in self.param_groups:
            schedule = _Schedule.of(group)
            group["scheduled_lr"] = schedule.scheduled_lr
            group["lr_max"] = schedule.lr_max
            group["weight_sum"] = schedule.weight_sum
            group["k"] = schedule.k + 1

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """``z`` as a copy of ``p``, and a second moment of zeros: 8-bit if the settings and the
        size of ``p`` say so.

        Raises:
            NotImplementedError: for ``optim_bits`` other than 8 and 32.
            ValueError: for a parameter that is not float32, float16 or bfloat16.
        """
        super().init_state(group, p, gindex, pindex)
        state, part = self.state[p], _local(p)
        if state["state2"].dtype is torch.uint8:
            try:
                z = self.get_state_buffer(part, dtype=torch.float32)
            except BaseException:  # a disk may be full
                del self.state[p]
                raise
            del state["qmap1"], state["absmax1"]
            state["state1"] = z
        state["state1"].copy_(part)

    # ---- checkpoints -----------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Takes over states, settings and the mode; also those of the package ``schedulefree``.

        The model must be loaded in the same mode: its parameters are ``y`` if the optimizer was in
        train mode when both were saved, else ``x``. States of ``schedulefree`` become 32-bit ones.
        Otherwise see :meth:`~.optimizer.Optimizer8bit.load_state_dict`.

        Raises:
            ValueError: when the states do not fit the parameters.
        """
        super().load_state_dict(_from_reference(state_dict), move_to_device)

    def _owns_state_layout(self) -> bool:
        kind = type(self)
        return (
            kind.update_step is _StateOptimizer.update_step
            and kind.init_state is AdamWScheduleFree.init_state
        )

    def _check_state(self, where: str, p: Tensor, state: dict[str, Any]) -> None:
        part = _local(p)
        shape, floats = tuple(part.shape), torch.float32
        second = state.get("state2")
        _expect(f"{where}['state1']", state.get("state1"), floats, shape)
        if isinstance(second, Tensor) and second.dtype is torch.uint8:
            blocks = -(-part.numel() // _BLOCKSIZE)
            _expect(f"{where}['state2']", second, torch.uint8, shape)
            _expect(f"{where}['absmax2']", state.get("absmax2"), floats, (blocks,))
            _expect(f"{where}['qmap2']", state.get("qmap2"), floats, (256,))
            state = {**state, "state2": state["state1"]}
        super()._check_state(where, p, state)


class AdamWScheduleFree8bit(AdamWScheduleFree):
    """:class:`AdamWScheduleFree` with an 8-bit second moment: 5.02 bytes of state a parameter in
    place of 8.

    ``z`` stays float32: it is a point like the parameters themselves, not a moment. ``rounding``,
    ``seed`` and the rest: see :class:`AdamWScheduleFree`. Where a gradient is NaN or infinite the
    parameter and ``z`` stay, and the second moment becomes zero.

    Raises:
        ValueError: for hyperparameters outside their range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            warmup_steps,
            r,
            weight_lr_power,
            foreach,
            optim_bits=8,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            rounding=rounding,
            seed=seed,
        )


def _move(p: Tensor, state: Mapping[str, Any], weight: float) -> None:
    """``p = p + weight (z - p)``, rounded once, with what Kahan summation has cut off of ``p``."""
    p, z, rest = p.detach(), state["state1"].to(p.device), state.get("compensation")
    pieces: list[tuple[Tensor, Tensor, Tensor | None]] = [(p, z, rest)]
    if p.is_contiguous():
        parts = p.view(-1).split(_PIECE)
        rests = [None] * len(parts) if rest is None else rest.view(-1).split(_PIECE)
        pieces = list(zip(parts, z.view(-1).split(_PIECE), rests, strict=True))
    for point, target, cut_off in pieces:
        value = point.double()
        if cut_off is not None:
            value += cut_off
        value.lerp_(target.double(), weight)
        point.copy_(value)
        if cut_off is not None:
            cut_off.copy_(value.sub_(point))


def _expect(what: str, value: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless it is a tensor of that dtype and shape."""
    if not isinstance(value, Tensor):
        got = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{what} must be a tensor, got {got}")
    if value.dtype is not dtype:
        raise ValueError(f"{what} must be {dtype}, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} must have shape {list(shape)}, got {list(value.shape)}")


def _from_reference(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict of the package ``schedulefree`` in this package's form; others as they are."""
    form = isinstance(state_dict, Mapping)
    states = state_dict.get("state") if form else None
    groups = state_dict.get("param_groups") if form else None
    if not isinstance(states, Mapping) or not isinstance(groups, list):
        return state_dict
    steps = {
        key: group["k"]
        for group in groups
        if isinstance(group, Mapping) and "k" in group
        for key in group.get("params", ())
    }
    converted = {
        key: {
            "step": steps[key],
            "state1": state["z"].float(),
            "state2": state["exp_avg_sq"].float(),
        }
        for key, state in states.items()
        if key in steps and isinstance(state, Mapping) and {"z", "exp_avg_sq"} <= state.keys()
    }
    return {**state_dict, "state": {**states, **converted}} if converted else state_dict
