"""Whether model and optimizer fit a checkpoint, and room for what was saved in another form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _manifest
from ._manifest import CheckpointError
from ._state import groups_of


def check(path: Path, manifest: dict[str, Any], metadata: Any, state: Any, root: str) -> None:
    """CheckpointError unless the checkpoint has what ``state`` has, in the same shapes."""
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    planner = DefaultLoadPlanner()  # which gives everything the name that it has in the files
    planner.set_up_planner(state, metadata, False)
    wanted, saved = planner.state_dict, metadata.state_dict_metadata
    for name in sorted({*wanted, *(name for name in saved if name.startswith(root + "."))}):
        where, what = path / _manifest.home(manifest, name), f"{root} {name.partition('.')[2]}"
        if name not in saved:
            raise CheckpointError(f"{path / '.metadata'}: the checkpoint lacks {what}")
        if name not in wanted:
            raise CheckpointError(f"{where}: the checkpoint has {what}, which is not there to load")
        there, here = saved[name], wanted[name]
        if isinstance(there, TensorStorageMetadata) != isinstance(here, Tensor):
            kinds = ("a tensor", "a value") if isinstance(here, Tensor) else ("a value", "a tensor")
            raise CheckpointError(f"{where}: {what} is {kinds[1]}, {kinds[0]} is wanted")
        if not isinstance(here, Tensor):
            continue
        old = (list(there.size), there.properties.dtype)
        new = (list(here.size()), here.dtype)
        if old != new:
            raise CheckpointError(
                f"{where}: {what} was saved as {old[1]} of shape {old[0]}, "
                f"{new[1]} of shape {new[0]} is wanted"
            )


def fit_optimizer(
    path: Path, manifest: dict[str, Any], metadata: Any, state: dict[str, Any]
) -> None:
    """Make ``state``, an optimizer's with a state for every parameter, what can be loaded.

    A parameter that had no state when it was saved, since no gradient had reached it, loses its.

    Raises:
        CheckpointError: the checkpoint's optimizer is another one.
    """
    _check_groups(path, manifest, groups_of(state))
    saved = {key[2] for key in metadata.planner_data.values() if key[:2] == ("optimizer", "state")}
    for parameter in set(state["state"]) - saved:
        del state["state"][parameter]
    _fit_forms(state["state"], metadata)
    _fit_schedules(state["param_groups"], metadata)
    check(path, manifest, metadata, {"optimizer": state}, "optimizer")


def _fit_schedules(groups: list[dict[str, Any]], metadata: Any) -> None:
    """Learning rate schedules put ``initial_lr`` into groups, before or after loading."""
    places = metadata.planner_data.values()
    saved = {key[2] for key in places if key[1:2] == ("param_groups",) and "initial_lr" in key}
    for index, group in enumerate(groups):
        if index in saved:
            group.setdefault("initial_lr", group["lr"])
        else:
            group.pop("initial_lr", None)


def _check_groups(path: Path, manifest: dict[str, Any], groups: list[list[str]]) -> None:
    """CheckpointError unless the same parameters form groups, in any order."""
    saved: list[list[str]] = manifest["groups"]
    file = path / _manifest.MANIFEST
    there = {name: group for group in saved for name in group}
    here = {name: group for group in groups for name in group}
    for name in sorted({*there, *here}):
        if name not in there:
            raise CheckpointError(f"{file}: the optimizer that was saved did not have {name}")
        if name not in here:
            raise CheckpointError(f"{file}: the optimizer that was saved had {name}, this one not")
        if set(there[name]) != set(here[name]):
            odd = min(set(there[name]) ^ set(here[name]))
            apart, together = ("another group than", "the same group as")
            if odd in there[name]:
                apart, together = together, apart
            raise CheckpointError(
                f"{file}: {name} was saved in {apart} {odd}; this optimizer has "
                f"{len(groups)} parameter group{'s' * (len(groups) > 1)} instead of {len(saved)} "
                f"and has it in {together} {odd}"
            )


def fit_texts(state: dict[str, Any], metadata: Any) -> None:
    """Make room for the JSON of each 4-bit weight; its length depends on the numbers in it."""
    for key, value in state.items():
        saved = metadata.state_dict_metadata.get(f"model.{key}")
        if _manifest.is_text(key) and saved is not None and value.shape != saved.size:
            state[key] = value.new_empty(tuple(saved.size))


def _fit_forms(states: dict[str, Any], metadata: Any) -> None:
    """Make room for optimizer states as they were saved, where that is in another form.

    8-bit states are codes or, of sharded parameters whose rows are no whole blocks, values; FSDP1
    has a form of its own. Our optimizers load each of them, as whole tensors, for any parameter.
    States of another precision are left alone, to be refused.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    saved: dict[str, list[str]] = {}
    for name, path in metadata.planner_data.items():
        if path[:2] == ("optimizer", "state") and len(path) > 3:
            saved.setdefault(path[2], []).append(name)
    for parameter, state in states.items():
        here = {"/".join(path) for path in _paths(state)}
        names = saved.get(parameter, [])
        there = {"/".join(metadata.planner_data[name][3:]) for name in names}
        if here == there or _coded(here) is None or _coded(there) not in (_coded(here), "any"):
            continue
        state.clear()
        for name in names:
            entry, value = metadata.state_dict_metadata[name], None
            if isinstance(entry, TensorStorageMetadata):
                value = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
            inner, path = state, metadata.planner_data[name][3:]
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = value


def _paths(state: dict[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _paths(value, *above, key)
        else:
            yield (*above, key)


def _coded(names: set[str]) -> str | None:
    """Which precision the states of a parameter have, by their names; None if not one of ours."""
    last = {name.rpartition("/")[2] for name in names}
    if last & {"values1", "values2"}:
        return "any"
    if last & {"absmax1", "absmax2", "decoded1", "decoded2"}:
        return "8-bit"
    return None
