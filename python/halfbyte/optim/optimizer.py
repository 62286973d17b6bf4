"""Which parameters an optimizer must treat differently from the rest."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["GlobalOptimManager"]


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
        uses_config_override: whether any optimizer has taken a setting from here.
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
