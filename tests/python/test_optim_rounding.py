"""Stochastic rounding and Kahan compensation of bfloat16 parameters."""

from __future__ import annotations

import optim_cases as cases
import pytest
import torch
from torch import nn


def pulled(rounding: str, steps: int, dtype=torch.bfloat16, **more):
    """Ones, pulled down by 1e-4 a step: a twentieth of half a bfloat16 step there."""
    p = nn.Parameter(torch.ones(8192, dtype=dtype))
    made = cases.make("SGD8bit", [p], lr=1e-4, momentum=1e-12, rounding=rounding, **more)
    for _ in range(steps):
        p.grad = torch.ones(8192, dtype=dtype)
        made.step()
    return p.detach(), made


def test_small_updates_vanish_to_the_nearest():
    p, made = pulled("nearest", 100)
    assert torch.equal(p, torch.ones_like(p))
    assert "rounding" not in made.param_groups[0]


def test_stochastic_rounding_is_right_on_average():
    p, _ = pulled("stochastic", 100)
    mean = p.float().mean().item()
    # 8,192 elements, 100 draws each with a spread below 2^-8: six standard errors.
    assert mean == pytest.approx(0.99, abs=6 * 10 * 2**-9 / 8192**0.5)
    assert p.unique().numel() > 3


def test_stochastic_rounding_picks_a_neighbour():
    p, _ = pulled("stochastic", 1)
    assert set(p.float().unique().tolist()) == {1.0, 1.0 - 2**-8}


def test_kahan_keeps_what_rounding_cuts_off():
    p, made = pulled("kahan", 100)
    state = made.state[made.param_groups[0]["params"][0]]
    kept = state["compensation"]
    assert kept.dtype == torch.bfloat16
    assert kept.shape == p.shape
    total = p.float() + kept.float()
    # Each step the compensation itself is rounded, to 2^-9 of its size of at most 2^-9.
    assert (total - 0.99).abs().max().item() < 100 * 2**-18
    assert (p.float() - 0.99).abs().max().item() <= 2**-8


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "Lion8bit", "AdEMAMix8bit", "LAMB"])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_other_dtypes_round_to_nearest(name, rounding):
    for dtype in (torch.float32, torch.float16):
        a, b = (cases.parameters((64, 80), dtype=dtype) for _ in range(2))
        made = cases.make(name, a, rounding=rounding)
        cases.train(made, a, range(3))
        cases.train(cases.make(name, b), b, range(3))
        assert cases.equal(a, b)
        assert "compensation" not in made.state[a[0]]


def test_dtypes_may_be_mixed():
    mixed = [*cases.parameters((64, 80)), *cases.parameters((64, 80), dtype=torch.bfloat16)]
    made = cases.make("AdamW8bit", mixed, rounding="kahan")
    cases.train(made, mixed, range(3))
    assert ["compensation" in made.state[p] for p in mixed] == [False, True]


def test_seeds_and_streams():
    def run(seed: int, count: int = 1, threads: int = 2) -> list[torch.Tensor]:
        params = [nn.Parameter(torch.ones(64, 80, dtype=torch.bfloat16)) for _ in range(count)]
        made = cases.make("AdamW8bit", params, lr=1e-4, rounding="stochastic", seed=seed)
        old = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                for p in params:
                    p.grad = torch.ones_like(p)
                made.step()
        finally:
            torch.set_num_threads(old)
        return [p.detach() for p in params]

    first, second = run(3, 2)
    assert torch.equal(run(3)[0], first)  # whatever else is in the optimizer
    assert torch.equal(run(3, threads=1)[0], first)
    assert not torch.equal(first, second)  # another parameter, other bits
    assert not torch.equal(run(4)[0], first)
    assert torch.equal(run(-5)[0], run(-5)[0])


def test_streams_are_positions_over_all_groups():
    """Absent gradients, groups and calls do not shift the bits of a parameter."""

    def params() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(64, 80, dtype=torch.bfloat16)) for _ in range(4)]

    def step(made, members, absent=()):
        for index, p in enumerate(members):
            p.grad = None if index in absent else torch.ones_like(p)
        made.step()

    more = {"rounding": "stochastic", "lr": 1e-4}
    a, b, c, d = params(), params(), params(), params()
    step(cases.make("AdamW", a, **more), a)
    step(cases.make("AdamW", [{"params": b[:1]}, {"params": b[1:]}], **more), b)
    step(cases.make("AdamW", c, **more), c, absent=(0, 2))
    grown = cases.make("AdamW", d[:3], **more)
    grown.add_param_group({"params": d[3:]})
    step(grown, d)
    assert cases.equal(a, b)
    assert cases.equal(a, d)
    assert torch.equal(a[1], c[1])
    assert torch.equal(a[3], c[3])
    alone = params()
    group = cases.make("AdamW", [{"params": alone[:2]}, {"params": alone[2:]}], **more)
    for index in (0, 1):
        p = alone[2 + index]
        p.grad = torch.ones_like(p)
        group.init_state(group.param_groups[1], p, 1, index)
        group.update_step(group.param_groups[1], p, 1, index)
    assert cases.equal(alone[2:], a[2:])


def test_rounding_per_group():
    groups = [
        {"params": cases.parameters((64, 80), dtype=torch.bfloat16), "rounding": how}
        for how in ("nearest", "kahan", "stochastic")
    ]
    params = [group["params"][0] for group in groups]
    made = cases.make("AdamW8bit", groups)
    cases.train(made, params, range(2))
    assert ["compensation" in made.state[p] for p in params] == [False, True, False]


def test_training_in_bfloat16_needs_one_of_them():
    """A quadratic whose last steps are smaller than half a bfloat16 step."""

    def loss(rounding: str) -> float:
        generator = torch.Generator().manual_seed(0)
        target = 1.0 + 0.5 * torch.rand(4096, generator=generator)
        p = nn.Parameter(torch.full((4096,), 2.0, dtype=torch.bfloat16))
        made = cases.make("SGD8bit", [p], lr=2e-3, momentum=0.5, rounding=rounding)
        for _ in range(1500):
            p.grad = (p.detach().float() - target).bfloat16()
            made.step()
        return (p.detach().float() - target).square().mean().item()

    nearest, stochastic, kahan = (loss(how) for how in ("nearest", "stochastic", "kahan"))
    assert nearest > 0.01
    assert stochastic < 0.1 * nearest
    assert kahan < 0.1 * nearest


def test_a_rounding_set_later_is_checked():
    params = cases.parameters((64, 80), dtype=torch.bfloat16)
    made = cases.make("AdamW8bit", params)
    made.param_groups[0]["rounding"] = "up"
    cases.set_grads(params, 0)
    with pytest.raises(ValueError, match=r"rounding must be .* got 'up'"):
        made.step()
