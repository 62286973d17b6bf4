"""Values for what a checkpoint does not hold: adapters, and buffers that are not saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._dtensor import is_dtensor

__all__ = ["run"]


def run(
    model: nn.Module,
    lacking: Sequence[tuple[str, str, bool]],
    initialize: Callable[[nn.Module], Any] | None,
    ranks: Any,
) -> None:
    """Initialize what was on the meta device and has been made since.

    The functions that do it see plain whole tensors; sharded ones get their part afterwards. Every
    rank starts from the same random state, which is put back.

    Args:
        model: what ``lacking`` belongs to.
        lacking: path of a module, attribute, and whether it was on the meta device.
        initialize: see :func:`._loading.load`.
        ranks: who takes part (:class:`~._ranks.Ranks`).

    Raises:
        RuntimeError: something is left without values.
    """
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, attribute, was_meta in lacking:
        if was_meta:
            home = path if initialize is not None else _adapted(model, path)
            owners.setdefault(home, []).append((model.get_submodule(path), attribute))
    if not owners:
        return
    seed = ranks.first(lambda: int(torch.randint(2**62, ()).item()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, slots in owners.items():
            _fill(model, path, slots, initialize)


def _adapted(model: nn.Module, path: str) -> str:
    """The path of the PEFT layer that ``path`` is a part of; else ``path``."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        above = ".".join(parts[:length])
        if hasattr(model.get_submodule(above), "reset_lora_parameters"):
            return above
    return path


def _fill(
    model: nn.Module,
    path: str,
    slots: Sequence[tuple[nn.Module, str]],
    initialize: Callable[[nn.Module], Any] | None,
) -> None:
    """Initialize ``slots``, which lie in the module at ``path``."""
    targets = [getattr(owner, attribute) for owner, attribute in slots]
    for (owner, attribute), target in zip(slots, targets, strict=True):
        _store(owner, attribute, _unset(target))
    try:
        _default(model, path) if initialize is None else initialize(model.get_submodule(path))
        found = [getattr(owner, attribute).detach() for owner, attribute in slots]
    finally:
        for (owner, attribute), target in zip(slots, targets, strict=True):
            _store(owner, attribute, target)
    for (_, attribute), target, values in zip(slots, targets, found, strict=True):
        if values.shape != target.shape or torch.equal(_bits(values), _bits(_unset(target))):
            raise RuntimeError(
                f"the checkpoint does not hold {path}.{attribute}, and nothing here knows how to "
                "initialize it: pass load(..., initialize=...), or keep it off the meta device"
            )
        if is_dtensor(target):
            from torch.distributed.tensor import distribute_tensor

            like: Any = target
            whole = distribute_tensor(
                values.to(like.device), like.device_mesh, like.placements, src_data_rank=None
            )
            like._local_tensor.copy_(whole._local_tensor)
        else:
            target.copy_(values)


def _store(owner: nn.Module, attribute: str, value: Tensor) -> None:
    """Put ``value`` where the parameter or buffer ``attribute`` is, past every hook."""
    if attribute in owner._buffers:
        owner._buffers[attribute] = value
    elif isinstance(value, nn.Parameter):
        owner._parameters[attribute] = value
    else:
        owner._parameters[attribute] = nn.Parameter(value, value.is_floating_point())


def _unset(like: Tensor) -> Tensor:
    """A whole plain tensor on the CPU for ``like``, of values that no initialization gives."""
    value = float("nan") if like.is_floating_point() else -123 if like.dtype != torch.bool else 0
    return torch.full(like.shape, value, dtype=like.dtype, device="cpu")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _default(model: nn.Module, path: str) -> None:
    """What PEFT, Transformers or torch would do to the module at ``path``."""
    module: Any = model.get_submodule(path)
    if hasattr(module, "reset_lora_parameters"):
        for adapter in (*module.lora_A, *module.lora_embedding_A):
            module.reset_lora_parameters(adapter, True)
        return
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        above: Any = model.get_submodule(".".join(parts[:length]))
        if hasattr(above, "_init_weights"):
            above._init_weights(module)
            return
    for name in ("reset_parameters", "reset_buffers"):
        if hasattr(module, name):
            getattr(module, name)()
