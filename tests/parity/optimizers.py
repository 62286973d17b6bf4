"""What both sides do with an optimizer: the oracle with upstream's, the tests with ours.

Every function takes the ``optim`` package to use, so that both run the very same procedure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]

WRAPPER = "__bnb_optimizer_quant_state__"
BASES = ("MockArgs", "Optimizer8bit", "Optimizer1State", "Optimizer2State")

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "matrix": ((41, 107), torch.float32),  # 8 bits, the last block short
    "bias": ((33,), torch.float32),  # too small for 8 bits
    "bf16": ((65, 64), torch.bfloat16),
    "fp16": ((4097,), torch.float16),  # one element in the last block
}
GROUPS = (("matrix", "bias"), ("bf16", "fp16"))


@dataclass(frozen=True)
class Kind:
    """A class with its arguments, and how many bits its large states have."""

    cls: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    bits: int = 32


_EMA = {"lr": 2e-3, "alpha": 5.0, "t_alpha": 40, "t_beta3": 40, "weight_decay": 0.01}
_SGD = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-3}
KINDS: dict[str, Kind] = {
    "adam": Kind("Adam", {"lr": 2e-3, "weight_decay": 0.01}),
    "adamw32": Kind("AdamW32bit", {"lr": 2e-3, "betas": (0.8, 0.99), "eps": 1e-6}),
    "paged-adamw": Kind("PagedAdamW", {"lr": 2e-3}),
    "ademamix": Kind("AdEMAMix", {"lr": 2e-3, "alpha": 2.0}),
    "ademamix-scheduled": Kind("AdEMAMix", _EMA),
    "sgd": Kind("SGD", _SGD),
    "lars": Kind("LARS", {**_SGD, "lr": 0.1}),
    "lamb": Kind("LAMB", {"lr": 2e-3, "max_unorm": 0.5, "weight_decay": 0.01}),
    "lion": Kind("Lion", {"lr": 1e-3, "weight_decay": 0.1}),
    "rmsprop": Kind("RMSprop", {"lr": 1e-3, "alpha": 0.9, "weight_decay": 1e-3}),
    "adagrad": Kind("Adagrad", {"lr": 1e-2, "weight_decay": 1e-3}),
    "adam8": Kind("Adam8bit", {"lr": 2e-3, "weight_decay": 0.01}, 8),
    "adam-optim-bits": Kind("Adam", {"lr": 2e-3, "optim_bits": 8, "min_8bit_size": 4300}, 8),
    "paged-adamw8": Kind("PagedAdamW8bit", {"lr": 2e-3}, 8),
    "ademamix8": Kind("AdEMAMix8bit", _EMA, 8),
    "sgd8": Kind("SGD8bit", _SGD, 8),
    "lars8": Kind("LARS8bit", {**_SGD, "lr": 0.1}, 8),
    "lamb8": Kind("LAMB8bit", {"lr": 2e-3}, 8),
    "lion8": Kind("Lion8bit", {"lr": 1e-3, "weight_decay": 0.1}, 8),
    "rmsprop8": Kind("RMSprop8bit", {"lr": 1e-3, "alpha": 0.9}, 8),
    "adagrad8": Kind("Adagrad8bit", {"lr": 1e-2}, 8),
}


def problem(seed: int, index: int, steps: int, *, wide: bool = False) -> Tensors:
    """Parameters ``p/<name>`` and gradients ``g/<name>`` (``[steps, *shape]``) of one case.

    Gradients drift, differ in size by element, and some are 0. Unless ``wide``, the others are
    within a factor of 1,000 of each other: second moments of smaller ones become 0 in 8 bits
    upstream.
    """
    rng = np.random.default_rng([seed, index])
    made: Tensors = {}
    for name, (shape, dtype) in SHAPES.items():
        scale = rng.standard_normal(shape)
        scale = np.exp(scale if wide else 0.5 * scale.clip(-3, 3))
        noise = rng.standard_normal((steps, *shape)) + 0.3 * rng.standard_normal(shape)
        if not wide:
            noise = np.sign(noise) * np.abs(noise).clip(0.1, 4.0)
        noise[rng.random(noise.shape) < 0.01] = 0
        made[f"p/{name}"] = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
        made[f"g/{name}"] = torch.from_numpy(0.01 * noise * scale).to(dtype)
    return made


def build(
    optim: Any, kind: Kind, tensors: Tensors
) -> tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
    """An optimizer over two groups of new parameters, the second with half the learning rate."""
    params = {
        name: torch.nn.Parameter(tensors[f"p/{name}"].clone()) for group in GROUPS for name in group
    }
    groups: list[dict[str, Any]] = [{"params": [params[n] for n in group]} for group in GROUPS]
    groups[1]["lr"] = kind.kwargs["lr"] / 2
    return getattr(optim, kind.cls)(groups, **kind.kwargs), params


def run(
    optimizer: torch.optim.Optimizer,
    params: dict[str, torch.nn.Parameter],
    tensors: Tensors,
    steps: range,
) -> None:
    """Steps with the gradients of a case."""
    for step in steps:
        for name, p in params.items():
            p.grad = tensors[f"g/{name}"][step].clone()
        optimizer.step()


def snapshot(
    optimizer: torch.optim.Optimizer, params: dict[str, torch.nn.Parameter]
) -> tuple[Tensors, dict[str, Any]]:
    """Parameters and the state dict, flattened: ``p/<name>``, ``s/<name>/<key>``, and facts."""
    state = optimizer.state_dict()
    out: Tensors = {f"p/{name}": p.detach().clone() for name, p in params.items()}
    facts: dict[str, Any] = {"wrapped": {}, "plain": {}, "steps": {}}
    for index, name in enumerate(params):
        entry = state["state"][index]
        facts["wrapped"][name] = sorted(entry.get(WRAPPER, {}))
        facts["plain"][name] = sorted(set(entry) - {WRAPPER})
        facts["steps"][name] = entry["step"]
        facts["steps type"] = type(entry["step"]).__name__
        for key, value in entry.get(WRAPPER, {}).items():
            out[f"s/{name}/{key}"] = value.detach().clone()
    facts["groups"] = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    return out, facts


def train(
    optim: Any,
    kind: Kind,
    tensors: Tensors,
    *,
    first: int,
    last: int,
    begin: int = 0,
    load: str | Path | None = None,
    save: str | Path | None = None,
) -> tuple[Tensors, dict[str, Any]]:
    """Train from step ``begin`` to ``first``, save, go on to ``last``.

    ``load`` names a file with a state dict to begin from; ``tensors`` then holds the parameters
    of that time. Answers ``middle/...`` (at ``first``) and ``final/...`` (at ``last``).
    """
    optimizer, params = build(optim, kind, tensors)
    if load is not None:
        optimizer.load_state_dict(torch.load(load, weights_only=True))
    run(optimizer, params, tensors, range(begin, first))
    facts: dict[str, Any] = {}
    middle, facts["middle"] = snapshot(optimizer, params)
    if save is not None:
        torch.save(optimizer.state_dict(), save)
    run(optimizer, params, tensors, range(first, last))
    final, facts["final"] = snapshot(optimizer, params)
    out = {f"middle/{k}": v for k, v in middle.items()} | {
        f"final/{k}": v for k, v in final.items()
    }
    return out, facts


def unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as versions before the wrapper key wrote it."""
    flat = {}
    for index, entry in state["state"].items():
        flat[index] = {k: v for k, v in entry.items() if k != WRAPPER} | entry.get(WRAPPER, {})
    return {"state": flat, "param_groups": state["param_groups"]}


# ---- signatures ----------------------------------------------------------------------------------


def classes(optim: Any) -> dict[str, type]:
    """Every public optimizer class, and the base classes."""
    found = {
        name: value
        for name, value in vars(optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    return found | {name: getattr(optim.optimizer, name) for name in BASES}


def signatures(optim: Any) -> dict[str, list[list[str]]]:
    """Name, kind and default of every argument of every class."""
    return {
        name: [
            [argument.name, argument.kind.name, repr(argument.default)]
            for argument in inspect.signature(cls).parameters.values()
        ]
        for name, cls in sorted(classes(optim).items())
    }


# ---- refusals ------------------------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "lr": {"lr": -1.0},
    "eps": {"eps": -1e-8},
    "beta1": {"betas": (1.0, 0.9, 0.9)},
    "beta2": {"betas": (0.9, -0.1, 0.9)},
    "betas as a string": {"betas": "(0.9, 0.99, 0.999)"},
    "weight_decay": {"weight_decay": -0.1},
    "amsgrad": {"amsgrad": True},
    "8 bits": {"optim_bits": 8},
    "16 bits": {"optim_bits": 16},
    "momentum 0": {"momentum": 0},
    "negative momentum": {"momentum": -0.5},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.1},
    "nesterov and dampening": {"nesterov": True, "dampening": 0.1},
    "alpha 0": {"alpha": 0},
    "centered": {"centered": True},
    "lr_decay": {"lr_decay": 0.1},
    "initial_accumulator_value": {"initial_accumulator_value": 0.1},
    "bias_correction": {"bias_correction": False},
    "adam_w_mode": {"adam_w_mode": False},
    "max_unorm": {"max_unorm": 0.5},
    "no max_unorm": {"max_unorm": 0.0},
    "args": {"args": None},
    "no parameters": {"params": []},
    "a tensor for parameters": {"params": torch.ones(3)},
    "numbers for parameters": {"params": [1.0]},
    "unknown argument": {"nonsense": 1},
}


def _outcome(call: Callable[[], object]) -> str:
    """The name of the exception that a call raises, or "accepted"."""
    try:
        call()
    except Exception as error:  # any type: it is the answer
        return type(error).__name__
    return "accepted"


def outcomes(optim: Any) -> dict[str, str]:
    """What becomes of good and bad arguments to every class, a step included."""

    def construct(cls: type, arguments: dict[str, Any]) -> None:
        needed = inspect.signature(cls).parameters
        given = {"params": [torch.nn.Parameter(torch.ones(8))]} | arguments
        if "lr" in needed:
            given.setdefault("lr", 0.01)
        if "momentum" in needed and "RMS" not in cls.__name__:
            given.setdefault("momentum", 0.9)
        optimizer = cls(**given)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()

    answers = {}
    for name, cls in sorted(classes(optim).items()):
        if name in BASES:
            continue
        known = inspect.signature(cls).parameters
        for what, arguments in BAD.items():
            if set(arguments) <= set(known) or what == "unknown argument":
                answers[f"{name}: {what}"] = _outcome(
                    lambda c=cls, a=arguments: construct(c, a)  # type: ignore[misc]
                )
    return answers | _loading(optim)


def _loading(optim: Any) -> dict[str, str]:
    """What becomes of state dicts that do not fit, and of a manager that is made by hand."""

    def fresh(*sizes: int) -> Any:
        groups = [{"params": [torch.nn.Parameter(torch.ones(8)) for _ in range(n)]} for n in sizes]
        return optim.Adam(groups)

    return {
        "load more groups": _outcome(lambda: fresh(1).load_state_dict(fresh(1, 1).state_dict())),
        "load fewer": _outcome(lambda: fresh(2).load_state_dict(fresh(1).state_dict())),
        "load the same": _outcome(lambda: fresh(2).load_state_dict(fresh(2).state_dict())),
        "a manager by hand": _outcome(optim.GlobalOptimManager),
    }
