"""What all optimizers share: states, steps, checkpoints, and settings per parameter.

An optimizer's ``step()`` collects its parameters into one call of a native op for each set of them
that shares hyperparameters, precision and step number. The update rules are there, in Rust.
"""

from __future__ import annotations

import math
import numbers
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from inspect import unwrap
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional as F
from .._load import native
from .._ops import failure, ops, step_group
from . import _bounds, _managed, _paged, _sharded
from ._coding import BLOCKSIZE as _BLOCKSIZE
from ._sharded import local as _local

__all__ = ["GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ROUNDINGS = ("nearest", "stochastic", "kahan")
_HAS_UPDATE_NORM = frozenset({"adam", "lamb", "momentum", "lars", "rmsprop"})
"""Rules that ``max_unorm`` applies to."""
_PAGED_BYTES = 512 << 20
"""Of paged states that are asked for ahead of one call on a GPU."""


class MockArgs:
    """The settings of an optimizer that are not per group, as attributes.

    Args:
        initial_data: a mapping of names to values.
    """

    optim_bits: int
    min_8bit_size: int
    max_unorm: float
    skip_zeros: bool

    def __init__(self, initial_data: Mapping[str, Any]) -> None:
        for name, value in initial_data.items():
            setattr(self, name, value)


class GlobalOptimManager:
    """Per-parameter settings that optimizers of this package look up, one registry per process.

    Use it through :meth:`get_instance`. An embedding that must keep 32-bit optimizer states while
    everything else has 8-bit ones is the usual case::

        manager = GlobalOptimManager.get_instance()
        manager.register_module_override(model.embed, "weight", {"optim_bits": 32})

    Attributes:
        pid2config: settings by ``id(parameter)``; an entry leaves with its parameter.
        index2config: settings by ``(group, position)``, as of :meth:`register_parameters`.
        module_weight_config_triple: ``(module, parameter name, settings)``, resolved by the
            optimizer when it is used, so that parameters replaced in between (``.to``, FSDP) are
            still found.
        optimizer: the optimizer in use, or None.
        uses_config_override: whether any parameter has settings of its own.
    """

    _instance: GlobalOptimManager | None = None

    pid2config: dict[int, dict[str, Any]]
    index2config: dict[tuple[int, int], dict[str, Any]]
    module_weight_config_triple: list[tuple[torch.nn.Module, str, dict[str, Any]]]
    optimizer: Any
    uses_config_override: bool

    def __init__(self) -> None:
        raise RuntimeError(
            "GlobalOptimManager is one per process: call GlobalOptimManager.get_instance()"
        )

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The registry, made on the first call."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget everything."""
        self.pid2config = {}
        self.index2config = {}
        self.module_weight_config_triple = []
        self.optimizer = None
        self.uses_config_override = False
        self._guards: dict[int, weakref.ref[torch.Tensor]] = {}

    def register_parameters(
        self, params: Iterable[torch.Tensor] | Iterable[Mapping[str, Any]]
    ) -> None:
        """Note where in an optimizer's parameter groups the overridden parameters stand.

        params: parameters or parameter groups, as given to the optimizer. An optimizer that holds
        copies of the parameters (a sharded one) can then look settings up by position.
        """
        groups: list[Any] = list(params)
        if groups and not isinstance(groups[0], Mapping):
            groups = [{"params": groups}]
        for group_index, group in enumerate(groups):
            members = group["params"]
            members = [members] if isinstance(members, torch.Tensor) else members
            for index, parameter in enumerate(members):
                config = self.pid2config.get(id(parameter))
                if config is not None:
                    self.index2config[(group_index, index)] = config

    def override_config(
        self,
        parameters: torch.Tensor | Iterable[torch.Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Set ``key`` to ``value``, or all of ``key_value_dict``, for one or several parameters.

        Later calls add to earlier ones. ValueError when neither or both are given.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError(
                "override_config takes either key and value or key_value_dict, "
                f"got {'neither' if key is None else 'both'}"
            )
        settings = dict(key_value_dict) if key_value_dict is not None else {str(key): value}
        self.uses_config_override = True
        if isinstance(parameters, torch.Tensor):
            parameters = [parameters]
        for parameter in parameters:
            self.pid2config.setdefault(id(parameter), {}).update(settings)
            self._guard(parameter)

    def register_module_override(
        self, module: torch.nn.Module, param_name: str, config: dict[str, Any]
    ) -> None:
        """Give ``config`` to whatever ``module.<param_name>`` is when the optimizer needs it."""
        self.module_weight_config_triple.append((module, param_name, config))

    def _guard(self, parameter: torch.Tensor) -> None:
        """Drop the settings when ``parameter`` dies: its id may be given to another tensor."""
        pid = id(parameter)
        if pid in self._guards:
            return
        configs, guards = self.pid2config, self._guards

        def forget(_: object) -> None:
            configs.pop(pid, None)
            guards.pop(pid, None)

        guards[pid] = weakref.ref(parameter, forget)


class _Hyper(NamedTuple):
    """What the parameters of one call share."""

    beta1: float
    beta2: float
    beta3: float
    alpha: float
    t_alpha: int | None
    t_beta3: int | None
    eps: float
    weight_decay: float
    lr: float
    max_unorm: float
    skip_zeros: bool
    rounding: str
    seed: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Hyper:
        betas = config["betas"]
        rounding, seed = config.get("rounding", "nearest"), config.get("seed", 0)
        if rounding != "nearest":
            _check_rounding(rounding, seed)
        return cls(
            float(betas[0]),
            float(betas[1]),
            float(betas[2]) if len(betas) > 2 else 0.0,
            float(config.get("alpha") or 0.0),
            config.get("t_alpha"),
            config.get("t_beta3"),
            float(config["eps"]),
            float(config["weight_decay"]),
            float(config["lr"]),
            float(config.get("max_unorm") or 0.0),
            bool(config.get("skip_zeros")),
            rounding,
            seed,
        )

    def scheduled(self, step: int) -> tuple[float, float]:
        """``alpha`` and ``beta3`` of AdEMAMix at a step (from 1), warmed up over ``t_alpha`` and
        ``t_beta3`` steps: alpha linearly, beta3 so that its half-life grows linearly from that of
        beta1 (arXiv 2409.03137, section 3)."""
        alpha, beta3 = self.alpha, self.beta3
        if self.t_alpha and step < self.t_alpha:
            alpha *= step / self.t_alpha
        if self.t_beta3 and step < self.t_beta3 and beta3 > 0.0:
            done = step / self.t_beta3
            slow = math.log(beta3)
            if self.beta1 > 0.0:
                fast = math.log(self.beta1)
                beta3 = min(math.exp(fast * slow / ((1 - done) * slow + done * fast)), beta3)
            else:
                beta3 = min(math.exp(slow / done), beta3)
        return alpha, beta3


def _is_backed(tensor: Tensor) -> bool:
    """Whether a tensor is in paged memory."""
    return _paged.is_file_backed(tensor) or _managed.is_managed(tensor)


class _Batch:
    """The tensors of one call."""

    __slots__ = ("grads", "params", "places", "ratios", "states", "streams", "wholes")

    def __init__(self) -> None:
        self.places: set[int] = set()
        self.grads: list[Tensor] = []
        self.params: list[Tensor] = []
        """This process's parts of ``wholes``."""
        self.wholes: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.streams: list[int] = []
        self.ratios: list[float] = []
        """By which updates are multiplied, where the norms of whole parameters say so."""

    def part(self, start: int, stop: int) -> _Batch:
        """The tensors from position ``start`` to before ``stop``."""
        if (start, stop) == (0, len(self.params)):
            return self
        part = _Batch()
        for name in ("grads", "params", "wholes", "states", "streams", "ratios"):
            setattr(part, name, getattr(self, name)[start:stop])
        return part


def _coded(config: Mapping[str, Any], p: Tensor) -> bool:
    """Whether the states of ``p`` are 8-bit."""
    return config["optim_bits"] == 8 and _sharded.whole_numel(p) >= config["min_8bit_size"]


def _sparse(what: str, grad: Tensor) -> RuntimeError:
    return RuntimeError(
        f"{what} takes dense gradients, got one of layout {grad.layout}: make the embedding with "
        "sparse=False, or give its parameter to torch.optim.SparseAdam"
    )


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError unless it has the outer form of an optimizer's state dict."""
    for key, kind, name in (("state", Mapping, "dictionary"), ("param_groups", list, "list")):
        if key not in state_dict:
            raise ValueError(f"the optimizer's state dict has no key {key!r}")
        value = state_dict[key]
        if not isinstance(value, kind):
            got = type(value).__name__
            raise ValueError(f"{key!r} of the optimizer's state dict must be a {name}, got {got}")
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise ValueError(f"param_groups[{index}] must be a dictionary with a list 'params'")
    for key, value in state_dict["state"].items():
        if isinstance(value, Tensor):
            raise ValueError(f"state[{key!r}] must be a dictionary, got a tensor")


def _is_count(step: Any) -> bool:
    """Whether it is a whole number that a step can have."""
    if not isinstance(step, numbers.Real) or not math.isfinite(step):
        return False
    number = float(step)
    return number.is_integer() and 0 <= number < 2**63


def _check_rounding(rounding: Any, seed: Any) -> None:
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding must be 'nearest', 'stochastic' or 'kahan', got {rounding!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits, got {seed}")


def _check_common(lr: Any, eps: float, weight_decay: float, betas: Iterable[float]) -> None:
    if not lr >= 0.0:
        raise ValueError(f"lr must not be negative, got {lr}")
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative, got {eps}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{index}] must be at least 0 and less than 1, got {beta}")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")


class Optimizer8bit(torch.optim.Optimizer):
    """Base of all optimizers here: everything but the update rule.

    A subclass of its own kind gives :meth:`init_state` and :meth:`update_step`; ``step()`` calls
    them for each parameter with a gradient. Gradients that are None are skipped.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim.Optimizer``.
        defaults: hyperparameters of groups that do not set them.
        optim_bits: 8 makes the 8-bit codes ready.
        is_paged: keep states of 100,000 elements or more in files (:mod:`._paged`), on GPUs in
            memory that is shared with the host (:mod:`._managed`).
        rounding: how new values of bfloat16 parameters are rounded; others round to nearest.
            ``"nearest"``: updates below half a unit in the last place vanish.
            ``"stochastic"``: up or down at random, right on average.
            ``"kahan"``: what rounding cuts off is kept (2 more bytes a parameter) and added later.
        seed: of stochastic rounding, any 64-bit integer. The bits depend on it, the step, the
            position of the parameter in the optimizer, and the element; not on threads.

    Attributes:
        state: per parameter ``step`` (int), ``state1`` and for rules with two states ``state2``
            (float32 or uint8 of the parameter's shape; AdEMAMix's ``state1`` is ``[2, *shape]``);
            with 8 bits ``qmap1``, ``qmap2`` (float32 ``[256]``) and ``absmax1``, ``absmax2``
            (float32 ``[blocks of 256]``); ``unorm_vec`` (float32 ``[1]``) with ``max_unorm``;
            ``compensation`` (bfloat16) with ``rounding="kahan"``.
    """

    _FSDP_WRAPPED_QUANT_STATE_KEY = "__bnb_optimizer_quant_state__"

    args: Any
    optimizer_name: str

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        optim_bits: int = 32,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        _check_rounding(rounding, seed)
        if rounding != "nearest":
            # Only then, so that checkpoints are otherwise the same as upstream's.
            defaults = {**defaults, "rounding": rounding, "seed": seed}
        super().__init__(params, defaults)
        self.initialized = False
        self._begun = False  # stepped or loaded
        self.name2qmap: dict[str, Tensor] = {}
        self.is_paged = is_paged
        self.non_castable_tensor_keys = {
            "qmap1",
            "qmap2",
            "max1",
            "max2",
            "new_max1",
            "new_max2",
            "state1",
            "state2",
            "gnorm_vec",
            "absmax1",
            "absmax2",
            "unorm_vec",
            "compensation",
            "decoded1",
            "decoded2",
        }
        self._find_managers()
        if optim_bits == 8:
            self.fill_qmap()

    def _find_managers(self) -> None:
        self.mng = GlobalOptimManager.get_instance()
        self.page_mng = F.GlobalPageManager.get_instance()
        self._modules_seen = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``, at any time."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_rounding(group.get("rounding", "nearest"), group.get("seed", 0))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.initialized = False

    def fill_qmap(self) -> None:
        """Makes the two 8-bit codes: ``name2qmap["dynamic"]`` and ``["udynamic"]``."""
        self.name2qmap["dynamic"] = F.create_dynamic_map(signed=True)
        self.name2qmap["udynamic"] = F.create_dynamic_map(signed=False)

    def _code_on(self, name: str, device: torch.device) -> Tensor:
        """The code ``name2qmap[name]`` on a device: one tensor for all parameters there."""
        if name not in self.name2qmap:
            self.fill_qmap()
        code = self.name2qmap[name]
        if code.device == device:
            return code
        copies = self.__dict__.setdefault("_code_copies", {})
        known, copy = copies.get((name, device), (None, None))
        if known is not code:
            copy = code.to(device)
            copies[name, device] = code, copy
        return copy

    def _shared_code(self, value: Tensor, device: torch.device, others: list[Tensor]) -> Tensor:
        """A code equal to ``value`` on a device: ours if it is one of them, else one of ``others``,
        to which it is added. Parameters that share a code's tensor share a call."""
        if not self.name2qmap:
            self.fill_qmap()
        host = value.detach().cpu()
        for name, known in self.name2qmap.items():
            if torch.equal(known.cpu(), host):
                return self._code_on(name, device)
        for known in others:
            if known.device == device and torch.equal(known.cpu(), host):
                return known
        others.append(value.detach().to(device, copy=True))
        return others[-1]

    # ---- settings --------------------------------------------------------------------------------

    def check_overrides(self) -> None:
        """Looks up which of the parameters ``register_module_override`` was called for."""
        triples = self.mng.module_weight_config_triple
        self._modules_seen = len(triples)
        if not triples:
            return
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        for module, name, config in triples:
            parameter = getattr(module, name, None)
            if isinstance(parameter, Tensor) and id(parameter) in mine:
                self.mng.override_config(parameter, key_value_dict=config)

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """The settings of parameter ``pindex`` of group ``gindex``: the group's, then overrides."""
        config = self._group_config(group)
        by_position = self.mng.index2config.get((gindex, pindex))
        if by_position is not None:
            config.update(by_position)
        by_id = self.mng.pid2config.get(id(self.param_groups[gindex]["params"][pindex]))
        if by_id is not None:
            config.update(by_id)
        return config

    def _group_config(self, group: dict[str, Any]) -> dict[str, Any]:
        args = self.args
        return {
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "lr": group["lr"],
            "alpha": group.get("alpha", 0.0),
            "t_alpha": group.get("t_alpha"),
            "t_beta3": group.get("t_beta3"),
            "optim_bits": args.optim_bits,
            "min_8bit_size": getattr(args, "min_8bit_size", 4096),
            "max_unorm": getattr(args, "max_unorm", 0.0),
            "skip_zeros": getattr(args, "skip_zeros", False),
            "rounding": group.get("rounding", "nearest"),
            "seed": group.get("seed", 0),
        }

    # ---- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for a sparse gradient.
            ValueError: for a parameter or gradient that is not float32, float16 or bfloat16.
            NotImplementedError: for a device that there are no kernels for.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized or (
            len(self.mng.module_weight_config_triple) != self._modules_seen
        ):
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        if self.__dict__.pop("_awaits_states", False):
            for state in self.state.values():
                state.pop(self._FSDP_WRAPPED_QUANT_STATE_KEY, None)
        if not getattr(self, "_begun", True) and self._is_trial():
            self._make_states()
        elif self._updates_together():
            self._step_together()
        else:
            self._step_one_by_one()
        return loss

    def _is_trial(self) -> bool:
        """Whether this step, the first, can change nothing: that is how
        torch.distributed.checkpoint has an optimizer make its states."""
        self._begun = True
        if not self._owns_state_layout() or torch.compiler.is_compiling():
            return False
        if any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None or p.requires_grad]
        zero = all(
            g is not None and g.layout is torch.strided and not _local(g).any() for g in grads
        )
        return _sharded.agreed(zero and not self.state, params)

    def _make_states(self) -> None:
        """Those of every parameter that has a gradient, of no step yet.

        Until they are loaded or stepped they have the inner key of a state dict, too: in a
        flattened one torch.distributed.checkpoint looks for the keys that it finds here.
        """
        self._awaits_states = True
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is not None:
                    self.init_state(group, p, gindex, pindex)
                    self.state[p][self._FSDP_WRAPPED_QUANT_STATE_KEY] = {}

    def _updates_together(self) -> bool:
        """False where somebody has put an update of their own."""
        return False

    def _step_together(self) -> None:
        raise NotImplementedError

    def _step_one_by_one(self) -> None:
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if len(self.state[p]) == 0:
                    self.init_state(group, p, gindex, pindex)
                self.prefetch_state(p)
                self.update_step(group, p, gindex, pindex)

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Fills ``self.state[p]`` before the first update. Subclasses give it."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state")

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Updates ``p`` and its state from ``p.grad``. Subclasses give it."""
        raise NotImplementedError(f"{type(self).__name__} must define update_step")

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of the shape of ``p``; paged if the optimizer is and ``p`` is large."""
        return self._zeros(p, tuple(p.shape), dtype)

    def _get_state_double_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros ``[2, *p.shape]``, likewise."""
        return self._zeros(p, (2, *p.shape), dtype)

    def _zeros(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self._pages(p):
            zeros = torch.zeros(shape, dtype=dtype, device=p.device)
            if zeros.device.type == "cpu" and not torch.compiler.is_compiling():
                # Nothing of it is in memory yet: the first step will touch it.
                native.prefer_huge_pages(zeros.data_ptr(), zeros.nbytes)
            return zeros
        return self._paged_zeros(shape, dtype, p.device)

    def _paged_zeros(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Paged zeros; ordinary ones, with a warning, on a GPU that cannot share its pages."""
        try:
            buffer = F.get_paged(*shape, dtype=dtype, device=device)
        except NotImplementedError as error:
            if device.type not in _managed.KINDS:
                raise
            warnings.warn(
                f"{type(self).__name__} keeps its states on {device} instead of in paged memory: "
                f"{error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return torch.zeros(tuple(shape), dtype=dtype, device=device)
        self.page_mng.paged_tensors.append(buffer)
        return buffer

    def _paged_copy(self, value: Tensor, device: torch.device) -> Tensor:
        return self._paged_zeros(value.shape, value.dtype, device).copy_(value.detach())

    def _pages(self, p: Tensor) -> bool:
        return self.is_paged and p.numel() >= _paged.MIN_ELEMENTS

    def prefetch_state(self, p: Tensor) -> None:
        """Asks for the paged states of ``p`` ahead of their use."""
        if not self.is_paged:
            return
        state = self.state[p]
        for key in ("state1", "state2"):
            tensor = state.get(key)
            if getattr(tensor, "is_paged", False):
                F.prefetch_tensor(tensor)

    def to_gpu(self) -> None:
        """Moves states to where their parameters have been moved since."""
        codes: list[Tensor] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    continue
                device, state = p.device, self.state[p]
                for key, value in state.items():
                    if not isinstance(value, Tensor) or value.device == device:
                        continue
                    if getattr(value, "is_paged", False):
                        state[key] = self._paged_copy(value, device)
                    elif key in ("qmap1", "qmap2"):
                        state[key] = self._shared_code(value, device, codes)
                    else:
                        state[key] = value.to(device)

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The states and settings, by position of the parameters.

        The tensors of each parameter's state stand under a key of their own,
        ``__bnb_optimizer_quant_state__``: FSDP gathers what it takes for shards of the parameter,
        and leaves a nested dictionary alone. Those of sharded parameters do not depend on the
        number of processes, see :mod:`._sharded`; all processes must call. Hooks see the result in
        this form.
        """
        hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = OrderedDict()
        try:
            packed = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        if self._owns_state_layout():
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            for key, p in enumerate(params):
                if _sharded.is_sharded(p) and "state1" in packed["state"].get(key, ()):
                    packed["state"][key] = _sharded.exported(p, packed["state"][key])
        packed["state"] = {key: self._wrapped(value) for key, value in packed["state"].items()}
        for hook in hooks.values():
            result = hook(self, packed)
            if result is not None:
                packed = result
        return packed

    def _wrapped(self, state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        outside, inside = {}, {}
        for key, value in state.items():
            if key == self._FSDP_WRAPPED_QUANT_STATE_KEY:
                continue  # of states that have just been made
            if key in self.non_castable_tensor_keys:
                # Without the mark of a paged tensor, which means nothing in a file.
                inside[key] = value.detach() if getattr(value, "is_paged", False) else value
            else:
                outside[key] = value
        if inside:
            outside[self._FSDP_WRAPPED_QUANT_STATE_KEY] = inside
        return outside

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Takes over states and settings, of this package or of upstream.

        Every parameter goes on in the precision of its loaded state, whatever ``optim_bits`` is
        (with FSDP1, whose form does not tell, in that of ``optim_bits``).
        Nothing of ``state_dict`` is shared afterwards, and nothing changes when it does not fit.

        Of a sharded parameter it takes what :meth:`state_dict` gives, on any number of processes,
        tensors of the whole parameter, and tensors of this process's part. All processes must call.

        Args:
            state_dict: what :meth:`state_dict` returned, or the older form without its inner key.
            move_to_device: move states to the devices of their parameters.

        Raises:
            ValueError: when the states do not fit the parameters.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dictionary, got {type(state_dict).__name__}")
        loaded: Any = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, loaded)
            if result is not None:
                loaded = result
        _check_form(loaded)
        saved_groups = deepcopy(loaded["param_groups"])
        owners = self._match(saved_groups)
        unwrapped = {key: self._unwrapped(value) for key, value in loaded["state"].items()}
        if self._owns_state_layout():
            for key, value in unwrapped.items():
                if key in owners and isinstance(value, dict) and value:
                    where, p = f"state[{key}]", owners[key]
                    value = _sharded.localized(where, p, value, self._wanted(p))
                    self._check_state(where, p, value)
                    unwrapped[key] = value

        codes: list[Tensor] = []
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, value in unwrapped.items():
            if key in owners and isinstance(value, dict):
                p = owners[key]
                state[p] = {
                    name: self._adopted(_local(p), name, item, move_to_device, codes)
                    for name, item in value.items()
                }
            else:
                state[owners.get(key, key)] = deepcopy(value)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            for key, value in group.items():
                # Whatever an upstream checkpoint does not know stays as it is.
                saved.setdefault(key, value)
            saved["params"] = group["params"]
        self.__setstate__({"state": state, "param_groups": saved_groups})
        self._begun = True
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _match(self, saved_groups: list[dict[str, Any]]) -> dict[Any, Tensor]:
        """Parameters by the keys they have in a state dict."""
        groups = self.param_groups
        if len(groups) != len(saved_groups):
            raise ValueError(
                f"the state dict has {len(saved_groups)} parameter groups, "
                f"the optimizer has {len(groups)}"
            )
        for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    f"group {index} of the state dict has {len(saved['params'])} parameters, "
                    f"the optimizer's has {len(group['params'])}"
                )
            _check_rounding(saved.get("rounding", "nearest"), saved.get("seed", 0))
        keys = chain.from_iterable(saved["params"] for saved in saved_groups)
        params = chain.from_iterable(group["params"] for group in groups)
        return dict(zip(keys, params, strict=True))

    def _unwrapped(self, state: Any) -> Any:
        key = self._FSDP_WRAPPED_QUANT_STATE_KEY
        if not isinstance(state, dict) or key not in state:
            return state
        # Flattened state dicts come back with an empty dictionary for what is under the inner key.
        outside = {
            k: v for k, v in state.items() if k != key and not (isinstance(v, dict) and not v)
        }
        return {**outside, **state[key]}

    def _owns_state_layout(self) -> bool:
        """Whether states are what this package makes them, so that they can be checked."""
        return False

    def _check_state(self, where: str, p: Tensor, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _wanted(self, p: Tensor) -> _sharded.Wanted:
        """What states :meth:`init_state` would make for ``p``."""
        raise NotImplementedError

    def _adopted(
        self, p: Tensor, name: str, value: Any, move_to_device: bool, codes: list[Tensor]
    ) -> Any:
        """A copy of a loaded value, where the optimizer wants it. ``codes``: the qmaps so far."""
        if name == "step":
            return int(value)
        if not isinstance(value, Tensor):
            return deepcopy(value)
        device = p.device if move_to_device else value.device
        if name not in self.non_castable_tensor_keys:
            dtype = p.dtype if value.is_floating_point() and p.is_floating_point() else value.dtype
            return value.detach().to(device, dtype, copy=True)
        if name in ("qmap1", "qmap2"):
            return self._shared_code(value, device, codes)
        if name in ("state1", "state2") and self._pages(p):
            return self._paged_copy(value, device)
        copy = torch.empty(value.shape, dtype=value.dtype, device=device)
        return copy.copy_(value.detach())

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        for name in (
            "args",
            "optimizer_name",
            "initialized",
            "name2qmap",
            "is_paged",
            "non_castable_tensor_keys",
        ):
            if name in self.__dict__:
                kept[name] = self.__dict__[name]
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "mng" not in self.__dict__:  # a copy, or from a pickle
            self._find_managers()
            self._page_again()

    def _page_again(self) -> None:
        """Copies of paged tensors are in ordinary memory: puts them into paged memory."""
        for state in self.state.values():
            for key, value in state.items() if isinstance(state, dict) else ():
                if getattr(value, "is_paged", False) and not _is_backed(value):
                    state[key] = self._paged_copy(value, value.device)


class _StateOptimizer(Optimizer8bit):
    """What rules with one and with two states share."""

    _states: int
    _coded_states: tuple[str, ...] = ("1", "2")
    """Numbers of the states that can be 8-bit."""

    def _settle(
        self,
        optimizer_name: str,
        optim_bits: int,
        args: Any,
        min_8bit_size: int,
        max_unorm: Any,
        skip_zeros: Any,
    ) -> None:
        if type(max_unorm) is int and max_unorm == 100 and skip_zeros is True:
            # percentile_clipping=100, block_wise=True, which had these positions once: both off.
            max_unorm, skip_zeros = 0.0, False
        if args is None:
            args = MockArgs(
                {
                    "optim_bits": optim_bits,
                    "min_8bit_size": min_8bit_size,
                    "max_unorm": max_unorm,
                    "skip_zeros": skip_zeros,
                }
            )
        self.args = args
        self.optimizer_name = optimizer_name

    def _stacked(self) -> bool:
        """Whether ``state1`` holds two moments."""
        return self.optimizer_name == "ademamix"

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Zeroed states for ``p``: 8-bit if the settings and the size of ``p`` say so.

        Raises:
            NotImplementedError: for ``optim_bits`` other than 8 and 32.
            ValueError: for a parameter that is not float32, float16 or bfloat16.
        """
        config = self.get_config(gindex, pindex, group)
        bits = config["optim_bits"]
        if bits not in (8, 32):
            raise NotImplementedError(f"optim_bits must be 8 or 32, got {bits}")
        if p.dtype not in _FLOATS:
            raise ValueError(
                f"{type(self).__name__} takes float32, float16 and bfloat16 parameters, got "
                f"{p.dtype} for parameter {pindex} of group {gindex}"
            )
        dtype = torch.uint8 if _coded(config, p) else torch.float32
        part = _local(p)
        # Put in its place when it is whole: a disk may be full in between.
        state: dict[str, Any] = {"step": 0}
        if self._stacked():
            state["state1"] = self._get_state_double_buffer(part, dtype=dtype)
        else:
            state["state1"] = self.get_state_buffer(part, dtype=dtype)
        if dtype is torch.uint8:
            state["qmap1"] = self._code("dynamic", part)
        if self._states == 2:
            state["state2"] = self.get_state_buffer(part, dtype=dtype)
            if dtype is torch.uint8:
                state["qmap2"] = self._code("udynamic", part)
        if dtype is torch.uint8:
            for key, shape in self._scales(part).items():
                state[key] = torch.zeros(shape, dtype=torch.float32, device=part.device)
        if config["max_unorm"] > 0.0 and not self._stacked():
            _bounds.update_norm(part, state)
        if config.get("rounding") == "kahan" and p.dtype is torch.bfloat16:
            self._compensation(part, state)
        self.state[p].update(state)

    def _wanted(self, p: Tensor) -> _sharded.Wanted:
        def coded() -> tuple[str, ...]:
            for gindex, group in enumerate(self.param_groups):
                for pindex, q in enumerate(group["params"]):
                    if q is p:
                        coded = _coded(self.get_config(gindex, pindex, group), p)
                        return self._coded_states if coded else ()
            return ()

        def qmap(number: str) -> Tensor:
            return self._code("dynamic" if number == "1" else "udynamic", _local(p))

        return _sharded.Wanted(coded, self._stacked(), qmap)

    def _code(self, name: str, p: Tensor) -> Tensor:
        return self._code_on(name, p.device)

    def _scales(self, p: Tensor) -> dict[str, tuple[int, ...]]:
        """Shapes of the 8-bit states' scales."""
        blocks = -(-p.numel() // _BLOCKSIZE)
        shapes: dict[str, tuple[int, ...]] = {
            "absmax1": (2, blocks) if self._stacked() else (blocks,)
        }
        if self._states == 2:
            shapes["absmax2"] = (blocks,)
        return shapes

    @staticmethod
    def _compensation(p: Tensor, state: dict[str, Any]) -> Tensor:
        if "compensation" not in state:
            state["compensation"] = torch.zeros(p.shape, dtype=torch.bfloat16, device=p.device)
        return state["compensation"]

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """One update of ``p`` alone, in place whatever its layout."""
        if p.grad is None:
            return
        if p.grad.layout is not torch.strided:
            raise _sparse(type(self).__name__, p.grad)
        hyper = _Hyper.of(self.get_config(gindex, pindex, group))
        batch = _Batch()
        batch.params.append(_local(p))
        batch.wholes.append(p)
        batch.grads.append(_local(p.grad))
        batch.states.append(self.state[p])
        batch.streams.append(sum(len(g["params"]) for g in self.param_groups[:gindex]) + pindex)
        if hyper.max_unorm > 0.0 and _sharded.is_sharded(p):
            if _sharded.is_flat(p):
                raise RuntimeError(
                    f"{type(self).__name__} cannot bound the update of one parameter of FSDP1 "
                    "alone: call step()"
                )
            if self.optimizer_name in _HAS_UPDATE_NORM:
                self._bound_parts([(hyper, batch)], [p])
        self._update(hyper, batch)

    def _updates_together(self) -> bool:
        return (
            type(self).update_step is _StateOptimizer.update_step
            and type(self).prefetch_state is Optimizer8bit.prefetch_state
            and "update_step" not in self.__dict__
        )

    def _step_together(self) -> None:
        # Paged states of the CPU get no hints here. With 1 GiB of them under a limit of 750 MiB
        # (2026-11-21), a step took 2.7 s like this, 2.8 s with MADV_SEQUENTIAL, 4.6 s with the next
        # parameter prefetched, 3.8 s with the last one also evicted: the kernel sees that pages are
        # read in order.
        batches: dict[_Hyper, dict[Hashable, _Batch]] = {}
        mng = self.mng
        by_id, by_position = mng.pid2config, mng.index2config
        own_config = type(self).get_config is not Optimizer8bit.get_config
        overrides = bool(by_id or by_position or own_config)
        states, strided = self.state, torch.strided
        compiling = torch.compiler.is_compiling()
        first = 0
        for gindex, group in enumerate(self.param_groups):
            common: tuple[_Hyper, dict[Hashable, _Batch]] | None = None
            for pindex, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout is not strided:
                    raise _sparse(type(self).__name__, grad)
                state = states[p]
                if "state1" not in state:
                    self.init_state(group, p, gindex, pindex)
                if overrides and (own_config or id(p) in by_id or (gindex, pindex) in by_position):
                    hyper = _Hyper.of(self.get_config(gindex, pindex, group))
                    kinds = batches.setdefault(hyper, {})
                else:
                    if common is None:
                        hyper = _Hyper.of(self._group_config(group))
                        common = hyper, batches.setdefault(hyper, {})
                    hyper, kinds = common
                # What must be alike within a call, apart from the hyperparameters.
                codes = id(state.get("qmap1")), id(state.get("qmap2"))
                kind: Hashable = (state["step"], p.device, codes)
                if hyper.rounding != "nearest":
                    kind = (kind, p.dtype)
                whole = p
                if type(p) is not torch.nn.Parameter:
                    p, grad = _local(p), _local(grad)
                place = 0 if compiling else p.data_ptr()
                batch = kinds.get(kind)
                while batch is not None and place in batch.places:
                    # The same memory again (tied weights): updated once more, afterwards.
                    kind = (kind,)
                    batch = kinds.get(kind)
                if batch is None:
                    batch = kinds[kind] = _Batch()
                if place:
                    batch.places.add(place)
                batch.params.append(p)
                batch.wholes.append(whole)
                batch.grads.append(grad)
                batch.states.append(state)
                batch.streams.append(first + pindex)
            first += len(group["params"])
        if self.optimizer_name in _HAS_UPDATE_NORM and (
            overrides or getattr(self.args, "max_unorm", None)
        ):
            flat = [(hyper, b) for hyper, kinds in batches.items() for b in kinds.values()]
            self._bound_parts(flat, self._bounded_parts())
        for hyper, kinds in batches.items():
            for batch in kinds.values():
                for part in self._fetched(batch):
                    self._update(hyper, part)

    def _fetched(self, batch: _Batch) -> Iterator[_Batch]:
        """The batch; with paged states on a GPU in parts, whose pages are fetched as they come."""
        if not self.is_paged or batch.params[0].device.type == "cpu":
            yield batch
            return
        start, nbytes = 0, 0
        for index, state in enumerate(batch.states):
            paged = [s for s in state.values() if getattr(s, "is_paged", False)]
            wanted = sum(s.nbytes for s in paged)
            if index > start and nbytes + wanted > _PAGED_BYTES:
                yield batch.part(start, index)
                start, nbytes = index, 0
            nbytes += wanted
            for tensor in paged:
                F.prefetch_tensor(tensor)
        yield batch.part(start, len(batch.states))

    def _bounded_parts(self) -> list[Tensor]:
        """The sharded parameters whose updates are bounded by a norm."""
        return [
            p
            for gindex, group in enumerate(self.param_groups)
            for pindex, p in enumerate(group["params"])
            if _sharded.is_sharded(p)
            and (self.get_config(gindex, pindex, group).get("max_unorm") or 0.0) > 0.0
        ]

    def _bound_parts(self, batches: list[tuple[_Hyper, _Batch]], members: list[Tensor]) -> None:
        """Bounds the updates of sharded parameters by the norms of the whole parameters."""
        if not members:
            return
        bounded = [
            (hyper, batch)
            for hyper, batch in batches
            if hyper.max_unorm > 0.0 and "absmax1" not in batch.states[0]
        ]
        hypers = {id(batch): hyper for hyper, batch in bounded}

        def trial(batch: _Batch, index: int) -> Tensor:
            one, state = _Batch(), batch.states[index]
            p = batch.params[index].detach()
            copies = {k: v.clone() for k, v in state.items() if k in ("state1", "state2")}
            if "compensation" in state:
                copies["compensation"] = state["compensation"].clone()
            copies["unorm_vec"] = torch.zeros((1,), dtype=torch.float32, device=p.device)
            one.params.append(p.clone())
            one.wholes.append(one.params[0])
            one.grads.append(batch.grads[index])
            one.states.append(copies | {"step": state["step"]})
            one.streams.append(0)
            self._update(hypers[id(batch)]._replace(lr=0.0), one)
            return copies["unorm_vec"]

        _bounds.set_ratios([(hyper.max_unorm, batch) for hyper, batch in bounded], members, trial)

    def _update(self, hyper: _Hyper, batch: _Batch) -> None:
        """The native call, for parameters that may share one."""
        params, states = batch.params, batch.states
        step = states[0]["step"] + 1
        alpha, beta3 = hyper.scheduled(step)
        compensation, streams = self._rounding(hyper, batch)
        state1 = [s["state1"] for s in states]
        state2 = [s["state2"] for s in states] if self._states == 2 else []
        rates = (hyper.beta1, hyper.beta2, beta3, alpha, hyper.eps, hyper.weight_decay, step)
        rest = (hyper.lr, 1.0, hyper.skip_zeros, streams, hyper.seed)
        name, first = self.optimizer_name, states[0]
        coded = "absmax1" in first, "absmax2" in first
        # Counted first: an interrupt arrives when the native call has returned.
        for state in states:
            state["step"] = step
        try:
            if any(coded):
                step_group(
                    ops.optimizer_update_8bit_blockwise.group,
                    name,
                    batch.grads,
                    params,
                    state1,
                    state2,
                    [s["absmax1"] for s in states] if coded[0] else [],
                    [s["absmax2"] for s in states] if coded[1] else [],
                    compensation,
                    first["qmap1"] if coded[0] else self._code("dynamic", params[0]),
                    first["qmap2"] if coded[1] else None,
                    *rates,
                    *rest,
                )
            else:
                norms: list[Tensor] = []
                max_unorm = hyper.max_unorm if name in _HAS_UPDATE_NORM else 0.0
                if batch.ratios:
                    self._update_bounded(hyper, batch, state2, compensation, rates, streams)
                    return
                if max_unorm > 0.0:
                    norms = [_bounds.update_norm(p, s) for p, s in zip(params, states, strict=True)]
                step_group(
                    ops.optimizer_update_32bit.group,
                    name,
                    batch.grads,
                    params,
                    state1,
                    state2,
                    norms,
                    compensation,
                    max_unorm,
                    *rates,
                    *rest,
                )
        except Exception as error:
            for state in states:  # nothing has been changed
                state["step"] = step - 1
            raise failure(error) from None

    def _update_bounded(
        self,
        hyper: _Hyper,
        batch: _Batch,
        state2: list[Tensor],
        compensation: list[Tensor],
        rates: tuple[Any, ...],
        streams: list[int],
    ) -> None:
        """The native call for each parameter alone, by its own ratio."""
        name, (*rates_only, weight_decay, step) = self.optimizer_name, rates
        for i, (p, ratio) in enumerate(zip(batch.params, batch.ratios, strict=True)):
            lr, decay = _bounds.scaled(hyper.lr, weight_decay, ratio, name in ("adam", "lamb"))
            alone = slice(i, i + 1)
            step_group(
                ops.optimizer_update_32bit.group,
                name,
                batch.grads[alone],
                [p],
                [batch.states[i]["state1"]],
                state2[alone],
                [],
                compensation[alone],
                0.0,
                *rates_only,
                decay,
                step,
                lr,
                1.0,
                hyper.skip_zeros,
                streams[alone],
                hyper.seed,
            )

    def _rounding(self, hyper: _Hyper, batch: _Batch) -> tuple[list[Tensor], list[int]]:
        """Compensations and streams of parameters of one dtype, as the native ops take them."""
        params = batch.params
        if params[0].dtype is not torch.bfloat16 or hyper.rounding == "nearest":
            return [], []
        if hyper.rounding == "stochastic":
            # Parts of a parameter are not rounded alike; of its copies every part is.
            return [], [
                stream + (_sharded.shard_index(p) << 20) if _sharded.is_sharded(p) else stream
                for stream, p in zip(batch.streams, batch.wholes, strict=True)
            ]
        pairs = zip(params, batch.states, strict=True)
        return [self._compensation(p, state) for p, state in pairs], []

    def _owns_state_layout(self) -> bool:
        # Somebody else's step may keep states of other shapes (GaLore's are of the projection).
        kind = type(self)
        return (
            kind.update_step is _StateOptimizer.update_step
            and kind.init_state is _StateOptimizer.init_state
            and unwrap(kind.step) is unwrap(Optimizer8bit.step)
        )

    def _check_state(self, where: str, p: Tensor, state: dict[str, Any]) -> None:
        """Raises ValueError unless a loaded state is one of ``p``. ``where``: its name."""

        def tensor(key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
            value = state.get(key)
            place = f"{where}[{key!r}]"
            if not isinstance(value, Tensor):
                got = "nothing" if value is None else type(value).__name__
                raise ValueError(f"{place} must be a tensor, got {got}")
            if value.dtype not in dtypes:
                wanted = " or ".join(str(dtype) for dtype in dtypes)
                raise ValueError(f"{place} must be {wanted}, got {value.dtype}")
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{place} must have shape {list(shape)} for a parameter of shape "
                    f"{list(p.shape)}, got {list(value.shape)}"
                )
            return value

        if "state1" not in state:
            got = ", ".join(map(str, state))
            raise ValueError(
                f"{where} must hold state1 and what goes with it, got {got}: is it another "
                f"optimizer's? {type(self).__name__} cannot go on from that"
            )
        step: Any = state.get("step")
        if isinstance(step, Tensor) and step.numel() == 1:
            step = step.item()
        if not _is_count(step):
            raise ValueError(f"{where}['step'] must be an integer from 0 on, got {step!r}")
        p = _local(p)
        shape = tuple(p.shape)
        first = (2, *shape) if self._stacked() else shape
        dtype = tensor("state1", (torch.float32, torch.uint8), first).dtype
        if dtype is torch.uint8 and "max1" in state and "absmax1" not in state:
            raise ValueError(
                f"{where} is of an 8-bit optimizer without blocks (it has 'max1'), which upstream "
                "no longer has either: only blockwise states can be loaded"
            )
        if self._states == 2:
            tensor("state2", (dtype,), shape)
        if dtype is torch.uint8:
            for key, scales in self._scales(p).items():
                tensor(key, (torch.float32,), scales)
            for key in ("qmap1", "qmap2")[: self._states]:
                tensor(key, (torch.float32,), (256,))
        if "unorm_vec" in state:
            tensor("unorm_vec", (torch.float32,), (1,))
        if "compensation" in state:
            tensor("compensation", (torch.bfloat16,), shape)


class Optimizer2State(_StateOptimizer):
    """Base of optimizers with two states: Adam, AdamW, LAMB, AdEMAMix, and others' variations.

    Args:
        optimizer_name: the rule: ``"adam"``, ``"lamb"`` or ``"ademamix"``.
        params: parameters, named parameters or groups.
        lr: the learning rate.
        betas: decay rates of the moments, two or (AdEMAMix) three; also as ``"(0.9, 0.999)"``.
        eps: added to the root of the second moment.
        weight_decay: decoupled: parameters shrink by ``lr * weight_decay``.
        optim_bits: 8 or 32 bits of state.
        args: an object with the attributes of :class:`MockArgs`, in place of ``optim_bits``,
            ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``.
        min_8bit_size: parameters of fewer elements have 32-bit states.
        max_unorm: largest norm of an update as a fraction of the parameter's norm; 0 for any.
        skip_zeros: leave elements alone whose gradient is exactly zero.
        is_paged: keep large states in paged memory.
        alpha, t_alpha, t_beta3: weight of AdEMAMix's slow moment, and warm-ups in steps.
        rounding, seed: see :class:`Optimizer8bit`.

    Raises:
        ValueError: for hyperparameters outside their range.
    """

    _states = 2

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        if isinstance(betas, str):
            betas = [float(part) for part in betas.strip(" ()[]").split(",")]
        _check_common(lr, eps, weight_decay, betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
        }
        super().__init__(params, defaults, optim_bits, is_paged, rounding=rounding, seed=seed)
        self._settle(optimizer_name, optim_bits, args, min_8bit_size, max_unorm, skip_zeros)


class Optimizer1State(_StateOptimizer):
    """Base of optimizers with one state: SGD, LARS, RMSprop, Adagrad, Lion.

    Args:
        optimizer_name: the rule: ``"momentum"``, ``"lars"``, ``"rmsprop"``, ``"adagrad"`` or
            ``"lion"``.
        betas: what the rule decays by. Only Lion uses the second.
        eps: added to the root of the second moment (RMSprop, Adagrad).
        weight_decay: decoupled for Lion, else added to the gradient.
        params, lr, optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged: as for
            :class:`Optimizer2State`.
        rounding, seed: see :class:`Optimizer8bit`.

    Raises:
        ValueError: for hyperparameters outside their range.
    """

    _states = 1

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        _check_common(lr, eps, weight_decay, betas)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, optim_bits, is_paged, rounding=rounding, seed=seed)
        self._settle(optimizer_name, optim_bits, args, min_8bit_size, max_unorm, skip_zeros)


def refuse_amsgrad(name: str, amsgrad: bool) -> None:
    """Raises ValueError if it is asked for."""
    if amsgrad:
        raise ValueError(f"{name} has no AMSGrad form: amsgrad must be False")


def refuse_optim_bits(name: str, optim_bits: int, default: int) -> None:
    """Raises ValueError unless it has its default: the name of the class says the bits."""
    if optim_bits != default:
        raise ValueError(
            f"{name} has 8-bit states: optim_bits must keep its default {default}, got {optim_bits}"
        )


def refuse_no_momentum(name: str, momentum: float) -> None:
    """Raises NotImplementedError for a momentum of 0."""
    if momentum == 0:
        raise NotImplementedError(f"{name} needs momentum: momentum must not be 0")
