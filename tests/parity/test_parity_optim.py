"""Optimizers: the same gradients on both sides, and state dicts that cross both ways.

With 32-bit states both sides compute in float32 and differ by its roundings. With 8-bit states
upstream's portable encode finds the nearest code as ours does, so codes may differ only where a
value lies within float32 rounding of a border. Upstream's native CPU encode, which a user runs,
rounds through a table: there the comparison is statistical.

Two rules are ours. Upstream multiplies by a decay that is rounded to float32 (1 - 1e-6 becomes
1 - 9.5e-7), ours is exact. And with us a positive second moment never has the code of 0, which the
next update would divide by: the gradients here do not differ enough for that.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import optimizers
import pytest
import torch
from compare import assert_same_bits
from halfbyte import optim
from optimizers import KINDS, SHAPES, Kind, Tensors
from oracle_client import Batch, Reply

STEPS = {32: (25, 50), 8: (10, 20)}
"""Steps until the state is saved, and in all."""

EIGHT = [name for name, kind in KINDS.items() if kind.bits == 8]
Side = dict[str, tuple[Tensors, dict[str, Any]]]


def _problem(seed: int, name: str, *, wide: bool = False) -> Tensors:
    """Parameters and gradients of one kind."""
    steps = STEPS[KINDS[name].bits][1]
    return optimizers.problem(seed, list(KINDS).index(name), steps, wide=wide)


def _add(batch: Batch, name: str, tensors: Tensors, **options: Any) -> None:
    """A job that trains one kind."""
    first, last = STEPS[KINDS[name].bits]
    batch.add(name, "optim_train", tensors, kind=name, first=first, last=last, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the state dicts of both sides lie."""
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def ours(seed: int, folder: Path) -> Side:
    """Every kind trained here, its state saved half-way."""
    made = {}
    for name, kind in KINDS.items():
        first, last = STEPS[kind.bits]
        made[name] = optimizers.train(
            optim,
            kind,
            _problem(seed, name),
            first=first,
            last=last,
            save=folder / f"{name}-ours.pt",
        )
    return made


@pytest.fixture(scope="module")
def theirs(upstream: None, seed: int, folder: Path) -> dict[str, Reply]:
    """Every kind trained by upstream through its portable kernels, its state saved half-way."""
    batch = Batch(folder / "train")
    for name in KINDS:
        _add(batch, name, _problem(seed, name), save=str(folder / f"{name}-theirs.pt"))
    batch.add("facts", "optim_facts", {})
    return batch.run()


@pytest.fixture(scope="module")
def continued(upstream: None, ours: Side, seed: int, folder: Path) -> dict[str, Reply]:
    """Every kind continued by upstream from our state dict."""
    batch = Batch(folder / "continue")
    for name, (made, _) in ours.items():
        tensors = _problem(seed, name)
        tensors |= {f"p/{n}": made[f"middle/p/{n}"] for n in SHAPES}
        begin = STEPS[KINDS[name].bits][0]
        _add(batch, name, tensors, begin=begin, load=str(folder / f"{name}-ours.pt"))
    return batch.run()


@pytest.fixture(scope="module")
def native(upstream: None, seed: int, folder: Path) -> dict[str, Reply]:
    """The 8-bit kinds trained by upstream as a user runs it."""
    batch = Batch(folder / "native", portable=False)
    for name in EIGHT:
        _add(batch, name, _problem(seed, name, wide=True))
    return batch.run()


# ---- names, arguments, refusals ------------------------------------------------------------------


def test_signatures(theirs: dict[str, Reply]) -> None:
    """Every class has upstream's arguments, in order; more only by keyword, at the end."""
    mine, want = optimizers.signatures(optim), theirs["facts"].facts["signatures"]
    assert set(want) <= set(mine), "classes"
    for name, arguments in want.items():
        assert mine[name][: len(arguments)] == arguments, name
        for argument, kind, default in mine[name][len(arguments) :]:
            assert kind == "KEYWORD_ONLY", f"{name}: {argument}"
            assert default != "<class 'inspect._empty'>", f"{name}: {argument} needs a default"


def test_refusals(theirs: dict[str, Reply]) -> None:
    """The same arguments are refused, with the same type of exception."""
    want = theirs["facts"].facts["outcomes"]
    assert len(want) > 300
    assert {"accepted", "ValueError", "NotImplementedError", "TypeError"} <= set(want.values())
    # What crashes upstream by accident works here.
    mended = {
        "AdEMAMix32bit: nothing": "RuntimeError",
        "AdEMAMix32bit: alpha 0": "RuntimeError",
        "AdEMAMix32bit: betas as a string": "RuntimeError",
        "PagedAdEMAMix32bit: nothing": "RuntimeError",
        "PagedAdEMAMix32bit: alpha 0": "RuntimeError",
        "PagedAdEMAMix32bit: betas as a string": "RuntimeError",
        "PytorchLARS: momentum 0": "UnboundLocalError",
    }
    for what, crash in mended.items():
        assert want[what] == crash, f"upstream has changed: {what}"
        want[what] = "accepted"
    mine = {what: outcome for what, outcome in optimizers.outcomes(optim).items() if what in want}
    assert mine == want


# ---- the same gradients --------------------------------------------------------------------------


def _rounding(p: torch.Tensor) -> torch.Tensor:
    """The distance from each value to the next of its type."""
    info = torch.finfo(p.dtype)
    exponent = torch.floor(torch.log2(p.double().abs().clamp_min(info.tiny)))
    return info.eps * 2.0**exponent


def _apart(a: Tensors, b: Tensors, name: str) -> float:
    """Mean distance between a parameter of both sides."""
    return float((a[f"final/p/{name}"].double() - b[f"final/p/{name}"].double()).abs().mean())


def _decay_error(kind: Kind) -> float:
    """How far upstream's factor of decoupled decay is from 1 - lr * weight_decay."""
    if any(rule in kind.cls for rule in ("SGD", "LARS", "RMSprop", "Adagrad")):
        return 0.0
    default = inspect.signature(getattr(optim, kind.cls)).parameters["weight_decay"].default
    exact = 1 - kind.kwargs["lr"] * kind.kwargs.get("weight_decay", default)
    return abs(float(torch.tensor(exact, dtype=torch.float32)) - exact)


def _compare_exact(kind: Kind, mine: Tensors, theirs: Tensors, what: str) -> None:
    """Parameters and states that differ by roundings of float32 only, codes by few borders."""
    steps = STEPS[kind.bits][1]
    # In roundings of float32, at most.
    decay = steps * _decay_error(kind) * 2 / torch.finfo(torch.float32).eps
    for name in SHAPES:
        assert mine[f"{what}/p/{name}"].dtype == theirs[f"{what}/p/{name}"].dtype
        a, b = (side[f"{what}/p/{name}"].double() for side in (mine, theirs))
        if mine[f"{what}/p/{name}"].dtype == torch.float32:
            # Measured, seed 3, without decay: mean 0.11 roundings after 50 steps, largest 5.
            apart = (a - b).abs() / _rounding(b.abs().clamp_min(float(b.abs().mean())).float())
            close = apart <= steps + decay
            mean = float(apart[close].mean())
            assert mean <= 1 + decay, f"{name}: mean {mean} roundings"
        else:
            # The same float32 value, rounded once: another neighbour only at a tie.
            apart = (a - b).abs() / _rounding(theirs[f"{what}/p/{name}"])
            close = apart <= 1
        outside = float((~close).double().mean())
        assert outside <= 2e-3, f"{name}: {outside} far, up to {float(apart.max())} roundings"
        states = {k.removeprefix(f"{what}/s/{name}/") for k in theirs if f"{what}/s/{name}/" in k}
        for key in states:
            x, y = (side[f"{what}/s/{name}/{key}"] for side in (mine, theirs))
            assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{name} {key}"
            if x.dtype == torch.uint8:
                off = (x.int() - y.int()).abs()
                assert float((off > 0).double().mean()) <= 5e-4, f"{name} {key}: codes"
                assert int(off.max()) <= 2, f"{name} {key}: {int(off.max())} codes apart"
            elif key.startswith("qmap"):
                assert_same_bits(x, y, key)
            else:
                scale = float(y.abs().max())
                torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6 * scale, msg=f"{name} {key}")


@pytest.mark.parametrize("name", KINDS)
def test_training(ours: Side, theirs: dict[str, Reply], name: str) -> None:
    """The same parameters and states as upstream's after the same gradients."""
    kind = KINDS[name]
    (mine, facts), reply = ours[name], theirs[name]
    _compare_exact(kind, mine, reply.tensors, "middle")
    _compare_exact(kind, mine, reply.tensors, "final")
    assert facts["final"] == reply.facts["final"], "keys, step numbers and groups"
    assert facts["middle"] == reply.facts["middle"], "keys, step numbers and groups"


# Upstream's native CPU encode looks values up in a table of 65,536 equal cells, too coarse near 0,
# where most of a second moment lies: a third of its codes are then off, mostly by one. Measured as
# the mean distance between the parameters over the distance gone, seed 1: up to 0.0015 where the
# state is a momentum, up to 0.055 where it is a second moment (bfloat16 parameters; float32 0.025).


@pytest.mark.parametrize("name", EIGHT)
def test_training_native(native: dict[str, Reply], seed: int, name: str) -> None:
    """As a user runs upstream: codes are near, and the parameters go the same way."""
    mine, theirs = _wide(KINDS[name], name, seed), native[name].tensors
    start = {f"final/{key}": value for key, value in _problem(seed, name, wide=True).items()}
    momentum = any(rule in name for rule in ("sgd", "lars", "lion"))
    for param in SHAPES:
        apart = _apart(mine, theirs, param) / _apart(start, mine, param)
        assert apart <= (0.005 if momentum else 0.1), f"{param}: {apart} of the distance gone"
        for key in ("state1", "state2"):
            x, y = (side.get(f"final/s/{param}/{key}") for side in (mine, theirs))
            if x is not None and y is not None and x.dtype == torch.uint8:
                off = (x.int() - y.int()).abs().double()
                fraction, mean = float((off > 0).double().mean()), float(off.mean())
                assert fraction <= (0.15 if momentum else 0.5), f"{param} {key}: {fraction}"
                assert mean <= (0.3 if momentum else 1.0), f"{param} {key}: {mean} codes"


@pytest.mark.parametrize("name", ["adam8", "paged-adamw8", "ademamix8", "rmsprop8", "adagrad8"])
def test_nearer_to_32_bits_than_native(native: dict[str, Reply], seed: int, name: str) -> None:
    """The exact encode keeps the parameters nearer to those of 32-bit states than upstream's."""
    kind = KINDS[name]
    want = _wide(replace(kind, cls=kind.cls.replace("8bit", "32bit")), name, seed)
    mine = _wide(kind, name, seed)
    for param in ("matrix", "fp16"):
        ours, theirs = (_apart(side, want, param) for side in (mine, native[name].tensors))
        assert 0 < ours < theirs, f"{param}: {ours} from the 32-bit run, upstream {theirs}"


def _wide(kind: Kind, name: str, seed: int) -> Tensors:
    """What ours makes of a kind's gradients of very different sizes."""
    first, last = STEPS[8]
    tensors = _problem(seed, name, wide=True)
    return optimizers.train(optim, kind, tensors, first=first, last=last)[0]


# ---- state dicts cross ---------------------------------------------------------------------------


def _describe(value: Any) -> Any:
    """Keys, types, dtypes and shapes of a state dict, without the numbers of its tensors."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape))
    if isinstance(value, dict):
        return {k: _describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [_describe(v) for v in value])
    return (type(value).__name__, value)


@pytest.mark.parametrize("name", KINDS)
def test_state_dicts_are_alike(
    ours: Side, theirs: dict[str, Reply], folder: Path, name: str
) -> None:
    """The same keys, types, dtypes and shapes, and param_groups with the same values."""
    mine, want = (
        torch.load(folder / f"{name}-{side}.pt", weights_only=True) for side in ("ours", "theirs")
    )
    assert _describe(mine) == _describe(want)
    assert [list(group) for group in mine["param_groups"]] == [
        list(group) for group in want["param_groups"]
    ], "order of the groups' keys"


@pytest.mark.parametrize("form", ["wrapped", "unwrapped"])
@pytest.mark.parametrize("name", KINDS)
def test_from_upstream(
    theirs: dict[str, Reply], seed: int, folder: Path, tmp_path: Path, name: str, form: str
) -> None:
    """Upstream's state dict, of today and of older versions, is read whole and trained on."""
    kind, reply = KINDS[name], theirs[name]
    begin, last = STEPS[kind.bits]
    tensors = _problem(seed, name)
    tensors |= {f"p/{n}": reply[f"middle/p/{n}"] for n in SHAPES}
    path = folder / f"{name}-theirs.pt"
    if form == "unwrapped":
        old = optimizers.unwrapped(torch.load(path, weights_only=True))
        assert optimizers.WRAPPER not in old["state"][0]
        path = tmp_path / "old.pt"
        torch.save(old, path)
    mine, facts = optimizers.train(
        optim, kind, tensors, begin=begin, first=begin, last=last, load=path
    )
    assert facts["middle"] == reply.facts["middle"]
    loaded = [key for key in mine if key.startswith("middle/s/")]
    assert len(loaded) == sum("middle/s/" in key for key in reply.tensors)
    for key in loaded:
        assert_same_bits(mine[key], reply[key], f"{key} as loaded")
    _compare_exact(kind, mine, reply.tensors, "final")


@pytest.mark.parametrize("name", KINDS)
def test_to_upstream(ours: Side, continued: dict[str, Reply], name: str) -> None:
    """Upstream reads our state dict whole and trains on as we do."""
    (mine, facts), reply = ours[name], continued[name]
    assert facts["middle"] == reply.facts["middle"]
    for key in mine:
        if key.startswith("middle/"):
            assert_same_bits(reply[key], mine[key], f"{key} as loaded")
    _compare_exact(KINDS[name], mine, reply.tensors, "final")
