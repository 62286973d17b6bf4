"""What a checkpoint is made of: the states of model, optimizer and random generators."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._ranks import Ranks

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def bare(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile, so that names are those of the plain model."""
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def model_state(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer)


@contextlib.contextmanager
def room(ranks: Ranks, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let torch make a state for each parameter that lacks one, to load into.

    It makes them, with a step that changes nothing, only for an optimizer that has no state at all
    and no gradient; so what is there is set aside. The gradients come back at the end, and all
    else does if the block raises.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    before, begun = optimizer.state, getattr(optimizer, "_begun", None)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    lacking = any(
        ranks.together(lambda: any(p.requires_grad and p not in before for p in parameters))
    )
    for parameter in parameters:
        parameter.grad = None
    if lacking:
        optimizer.state = defaultdict(dict)
        if begun is not None:  # ours: it knows such a step by its being the first
            optimizer._begun = False  # type: ignore[attr-defined]
    try:
        yield
    except BaseException:
        if lacking:
            optimizer.state = before
            for group, entries in zip(optimizer.param_groups, groups, strict=True):
                group.update(entries)
            if begun is not None:
                optimizer._begun = begun  # type: ignore[attr-defined]
        raise
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def groups_of(state: dict[str, Any]) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer's state dict."""
    return [list(group["params"]) for group in state["param_groups"]]


def trainable(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Those entries of ``state`` that are parameters which require a gradient."""
    names: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        flat = getattr(parameter, "_fqns", None)  # an FSDP1 flat parameter
        before = name.rpartition(".")[0]
        names |= {f"{before}.{n}" if before else n for n in flat} if flat else {name}
    return {key: value for key, value in state.items() if key in names}


def random_name(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def random_state() -> dict[str, Any]:
    """The random state of this process, in types that torch.load(weights_only=True) takes."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(kind), torch.from_numpy(keys.astype("int64")), *map(float, rest))
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "numpy" in state and "numpy" in sys.modules:
        kind, keys, position, has_gauss, gauss = state["numpy"]
        words = keys.numpy().astype("uint32")
        sys.modules["numpy"].random.set_state((kind, words, int(position), int(has_gauss), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
