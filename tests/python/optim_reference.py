"""Every update rule in float64 numpy, and the exact 8-bit state: what the tests compare to.

Written from the papers and the project's numerics: Adam (arXiv 1412.6980) with the decoupled decay
of AdamW (1711.05101), LAMB (1904.00962) and LARS (1708.03888) as a bound on the length of the
update, Lion (2302.06675), AdEMAMix (2409.03137), block-wise 8-bit states (2110.02861). Imports
neither halfbyte nor upstream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

Array = np.ndarray

BLOCK = 256
"""Elements that share a scale of an 8-bit state."""

UNIT = 2.0**-24
"""Half the distance from 1 to the next float32: the relative error of one rounding."""

RULES = ("adam", "ademamix", "momentum", "lion", "rmsprop", "adagrad")
TWO_STATES = ("adam", "ademamix")
TRUST_RATIO = ("adam", "momentum", "rmsprop")


@dataclass(frozen=True)
class Hyper:
    """The numbers of a step; the names are those of the ops."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.9999
    alpha: float = 0.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    gnorm_scale: float = 1.0
    max_unorm: float = 0.0
    skip_zeros: bool = False
    t_alpha: int | None = None
    t_beta3: int | None = None

    def at(self, step: int) -> Hyper:
        """With AdEMAMix's schedules (the paper's algorithm 1) applied for a step, from 1."""
        alpha, beta3 = self.alpha, self.beta3
        if self.t_alpha:
            alpha = min(step / self.t_alpha, 1.0) * self.alpha
        if self.t_beta3 and step < self.t_beta3:
            # The half-life, not beta3 itself, grows linearly: 1 / ln(beta3) is interpolated.
            part = step / self.t_beta3
            inverse = (1 - part) / math.log(self.beta1) + part / math.log(self.beta3)
            beta3 = min(math.exp(1 / inverse), self.beta3)
        return replace(self, alpha=alpha, beta3=beta3)


@dataclass
class State:
    """What a parameter carries from step to step, float64.

    ``first`` has the shape of the parameter with one leading dimension of 1, or 2 for AdEMAMix;
    ``second`` is there for two-state rules; ``unorm`` is the length of the last unscaled update.
    """

    first: Array
    second: Array | None
    unorm: float = 0.0

    @staticmethod
    def zeros(rule: str, shape: tuple[int, ...]) -> State:
        """The state before the first step."""
        firsts = 2 if rule == "ademamix" else 1
        return State(np.zeros((firsts, *shape)), np.zeros(shape) if rule in TWO_STATES else None)

    def copy(self) -> State:
        """A state that shares nothing."""
        second = None if self.second is None else self.second.copy()
        return State(self.first.copy(), second, self.unorm)


# ---- the rules -----------------------------------------------------------------------------------
# Each takes gradient (scaled), parameter, state, step and numbers, and returns the new parameter
# and the new state.


def _trust(update: Array, p: Array, h: Hyper) -> tuple[float, float]:
    """Factor that keeps an update within ``max_unorm`` lengths of the parameter; its length."""
    if h.max_unorm <= 0:
        return 1.0, 0.0
    length, limit = float(np.linalg.norm(update)), h.max_unorm * float(np.linalg.norm(p))
    return (limit / length if length > limit else 1.0), length


def _adam(g: Array, p: Array, s: State, step: int, h: Hyper) -> tuple[Array, State]:
    assert s.second is not None
    m = h.beta1 * s.first[0] + (1 - h.beta1) * g
    v = h.beta2 * s.second + (1 - h.beta2) * g * g
    correct1, correct2 = 1 - h.beta1**step, math.sqrt(1 - h.beta2**step)
    update = m / (np.sqrt(v) + h.eps * correct2)
    scale, length = _trust(update, p, h)
    p = p * (1 - h.lr * h.weight_decay) - h.lr * correct2 / correct1 * scale * update
    return p, State(m[None], v, length)


def _ademamix(g: Array, p: Array, s: State, step: int, h: Hyper) -> tuple[Array, State]:
    assert s.second is not None
    fast = h.beta1 * s.first[0] + (1 - h.beta1) * g
    slow = h.beta3 * s.first[1] + (1 - h.beta3) * g
    v = h.beta2 * s.second + (1 - h.beta2) * g * g
    correct1, correct2 = 1 - h.beta1**step, math.sqrt(1 - h.beta2**step)
    update = (fast / correct1 + h.alpha * slow) / (np.sqrt(v) / correct2 + h.eps)
    return p * (1 - h.lr * h.weight_decay) - h.lr * update, State(np.stack((fast, slow)), v)


def _momentum(g: Array, p: Array, s: State, step: int, h: Hyper) -> tuple[Array, State]:
    g = g + h.weight_decay * p
    m = g if step == 1 else h.beta1 * s.first[0] + g
    scale, length = _trust(m, p, h)
    return p - h.lr * scale * m, State(m[None], None, length)


def _lion(g: Array, p: Array, s: State, step: int, h: Hyper) -> tuple[Array, State]:
    del step
    direction = np.sign(h.beta1 * s.first[0] + (1 - h.beta1) * g)
    m = h.beta2 * s.first[0] + (1 - h.beta2) * g
    return p * (1 - h.lr * h.weight_decay) - h.lr * direction, State(m[None], None)


def _rmsprop(g: Array, p: Array, s: State, step: int, h: Hyper) -> tuple[Array, State]:
    del step
    g = g + h.weight_decay * p
    v = h.beta1 * s.first[0] + (1 - h.beta1) * g * g
    update = g / (np.sqrt(v) + h.eps)
    scale, length = _trust(update, p, h)
    return p - h.lr * scale * update, State(v[None], None, length)


def _adagrad(g: Array, p: Array, s: State, step: int, h: Hyper) -> tuple[Array, State]:
    del step
    g = g + h.weight_decay * p
    v = s.first[0] + g * g
    return p - h.lr * g / (np.sqrt(v) + h.eps), State(v[None], None)


_RULES: dict[str, Callable[[Array, Array, State, int, Hyper], tuple[Array, State]]] = {
    "adam": _adam,
    "ademamix": _ademamix,
    "momentum": _momentum,
    "lion": _lion,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}


def update(rule: str, g: Array, p: Array, state: State, step: int, h: Hyper) -> tuple[Array, State]:
    """One step in float64, schedules of AdEMAMix included.

    ``g``, ``p``: arrays of one shape, any float type. Returns the new parameter (not rounded to any
    type) and the new state; the arguments are not changed.
    """
    h = h.at(step)
    g, p = g.astype(np.float64), p.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        new_p, new = _RULES[rule](h.gnorm_scale * g, p, state, step, h)
    if h.skip_zeros:
        kept = g == 0
        new_p = np.where(kept, p, new_p)
        new.first = np.where(kept, state.first, new.first)
        if new.second is not None:
            assert state.second is not None
            new.second = np.where(kept, state.second, new.second)
    return new_p, new


# ---- how far float32 may be from that ------------------------------------------------------------


@dataclass
class Slack:
    """Sums of the magnitudes that a step adds up: errors are some ``UNIT`` times these."""

    p: Array
    first: Array
    second: Array | None
    either: Array
    """Elements whose update may have either sign, or none, for all that float32 can tell (Lion)."""


def slack(rule: str, g: Array, p: Array, state: State, step: int, h: Hyper, units: float) -> Slack:
    """How far one float32 step may be from ``update``: ``units * UNIT *`` the returned sums."""
    h = h.at(step)
    raw = h.gnorm_scale * g.astype(np.float64)
    p = p.astype(np.float64)
    g, size = np.abs(raw), np.abs(p)
    m = np.abs(state.first)
    either = np.zeros(p.shape, bool)
    correct1, correct2 = 1 - h.beta1**step, math.sqrt(max(1 - h.beta2**step, 0.0))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if rule == "adam":
            assert state.second is not None
            first = h.beta1 * m + (1 - h.beta1) * g
            second = h.beta2 * state.second + (1 - h.beta2) * g * g
            moved = h.lr * correct2 / correct1 * first[0] / (np.sqrt(second) + h.eps * correct2)
        elif rule == "ademamix":
            assert state.second is not None
            betas = np.array([h.beta1, h.beta3]).reshape(2, *[1] * p.ndim)
            first = betas * m + (1 - betas) * g
            second = h.beta2 * state.second + (1 - h.beta2) * g * g
            moved = h.lr * (first[0] / correct1 + h.alpha * first[1])
            moved = moved / (np.sqrt(second) / correct2 + h.eps)
        elif rule == "momentum":
            first = (h.beta1 * m if step > 1 else 0 * m) + g + h.weight_decay * size
            second, moved = None, h.lr * first[0]
        elif rule == "lion":
            first, second = h.beta2 * m + (1 - h.beta2) * g, None
            sum1 = h.beta1 * m[0] + (1 - h.beta1) * g
            value = h.beta1 * state.first[0] + (1 - h.beta1) * raw
            either = (np.abs(value) <= units * UNIT * sum1) & (sum1 > 0)
            moved = np.full(p.shape, h.lr)
        else:
            total = g + h.weight_decay * size
            signed = np.abs(raw + h.weight_decay * p)
            old = h.beta1 * m if rule == "rmsprop" else m
            part = 1 - h.beta1 if rule == "rmsprop" else 1.0
            # The gradient is off by UNIT * total, its square by twice that times the gradient.
            first, second = old + part * (signed * signed + 2 * signed * total), None
            v = (old + part * signed * signed)[0]
            moved = h.lr * total / (np.sqrt(v) + h.eps)
            # ... and the root of the state by half the state's relative error.
            doubt = np.divide(first[0], v, out=np.ones_like(v), where=v > 0)
            moved = moved + h.lr * signed / (np.sqrt(v) + h.eps) * doubt
    return Slack(size + 2 * moved, first, second, either)


# ---- 8-bit states --------------------------------------------------------------------------------


def dynamic_code(*, signed: bool) -> Array:
    """The dynamic map of 256 values, ascending, float32; the unsigned one starts at 0."""
    values = [0.0, 1.0]
    for exponent in range(7):
        parts = 2**exponent if signed else 2 ** (exponent + 1)
        borders = torch.linspace(0.1, 1, parts + 1)  # float32, as the paper's code has it
        means = (borders[:-1] + borders[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*means.tolist(), *((-means).tolist() if signed else [])]
    return np.sort(np.array(values)).astype(np.float32)


SIGNED, UNSIGNED = dynamic_code(signed=True), dynamic_code(signed=False)


def blocks_of(n: int) -> int:
    """Blocks that n elements take."""
    return -(-n // BLOCK)


def _spread(absmax: Array, n: int) -> Array:
    """The scale of each of n elements."""
    return np.repeat(absmax, BLOCK)[:n]


def decode(codes: Array, absmax: Array, code: Array) -> Array:
    """Values of 8-bit codes (flat), as the float32 product, in float64."""
    product = code.astype(np.float32)[codes] * _spread(absmax.astype(np.float32), codes.size)
    return product.astype(np.float64)


def scales(values: Array) -> Array:
    """The largest magnitude of each block of flat values, rounded to float32."""
    padded = np.zeros(blocks_of(values.size) * BLOCK)
    padded[: values.size] = np.abs(values)
    with np.errstate(over="ignore"):
        return padded.reshape(-1, BLOCK).max(axis=1).astype(np.float32)


def midpoints(code: Array) -> Array:
    """The borders between neighbouring codes, exact."""
    wide = code.astype(np.float64)
    return (wide[1:] + wide[:-1]) / 2


def encode(values: Array, absmax: Array, code: Array) -> Array:
    """Nearest codes of flat values for given scales; a zero block holds the code of 0.

    With the unsigned map a positive value never becomes 0: it would be divided by.
    """
    scale = _spread(absmax.astype(np.float64), values.size)
    scaled = np.divide(values, scale, out=np.zeros(values.size), where=scale > 0)
    codes = np.searchsorted(midpoints(code), np.clip(scaled, -1, 1))
    if code[0] == 0:
        codes = np.maximum(codes, scaled > 0)
    return codes.astype(np.uint8)


def admissible(values: Array, doubt: Array, absmax: Array, code: Array) -> tuple[Array, Array]:
    """The lowest and highest code that values may get which are uncertain by ``doubt``.

    One rounding of the scale's reciprocal, of the quotient and of the border are allowed besides.
    """
    doubt = doubt + 4 * UNIT * np.abs(values)
    return encode(values - doubt, absmax, code), encode(values + doubt, absmax, code)


@dataclass
class State8:
    """An 8-bit state: flat codes ``[firsts, n]`` and ``[n]``, scales ``[firsts, blocks]``."""

    first: Array
    absmax1: Array
    second: Array | None
    absmax2: Array | None

    @staticmethod
    def zeros(rule: str, n: int) -> State8:
        """The state before the first step: codes 0 and scales 0, as the optimizers store it."""
        firsts, blocks = (2 if rule == "ademamix" else 1), blocks_of(n)
        two = rule in TWO_STATES
        return State8(
            np.zeros((firsts, n), np.uint8),
            np.zeros((firsts, blocks), np.float32),
            np.zeros(n, np.uint8) if two else None,
            np.zeros(blocks, np.float32) if two else None,
        )

    def decoded(self) -> State:
        """The values it stands for."""
        first = np.stack(
            [decode(q, a, SIGNED) for q, a in zip(self.first, self.absmax1, strict=True)]
        )
        if self.second is None:
            return State(first, None)
        assert self.absmax2 is not None
        return State(first, decode(self.second, self.absmax2, UNSIGNED))

    @staticmethod
    def encoded(state: State) -> State8:
        """The 8-bit form of flat values."""
        absmax1 = np.stack([scales(values) for values in state.first])
        first = np.stack([encode(v, a, SIGNED) for v, a in zip(state.first, absmax1, strict=True)])
        if state.second is None:
            return State8(first, absmax1, None, None)
        absmax2 = scales(state.second)
        return State8(first, absmax1, encode(state.second, absmax2, UNSIGNED), absmax2)


def update_values_8bit(
    rule: str, g: Array, p: Array, before: State8, step: int, h: Hyper
) -> tuple[Array, State]:
    """One step from an 8-bit state, flat: new parameter, and the state's values before encoding.

    The bound on the update's length does not apply. Where the gradient or a new state is not a
    finite float32 the parameter stays and the states become zero.
    """
    h = replace(h, max_unorm=0.0)
    old = before.decoded()
    new_p, new = update(rule, g, p, old, step, h)
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(g.astype(np.float64))
        for values in (*new.first, *(() if new.second is None else (new.second,))):
            bad |= ~np.isfinite(values.astype(np.float32))
    new_p = np.where(bad, p.astype(np.float64), new_p)
    new.first = np.where(bad, 0.0, new.first)
    if new.second is not None:
        new.second = np.where(bad, 0.0, new.second)
    return new_p, new


def update_8bit(
    rule: str, g: Array, p: Array, before: State8, step: int, h: Hyper
) -> tuple[Array, State8]:
    """One step of flat arrays with an 8-bit state."""
    new_p, values = update_values_8bit(rule, g, p, before, step, h)
    return new_p, State8.encoded(values)
