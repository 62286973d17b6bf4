"""Settings per parameter, as the optimizers honour them."""

from __future__ import annotations

import halfbyte
import optim_cases as cases
import pytest
import torch
from halfbyte.optim import GlobalOptimManager
from torch import nn


@pytest.fixture
def manager():
    made = GlobalOptimManager.get_instance()
    saved = dict(vars(made))
    made.initialize()
    yield made
    vars(made).update(saved)


def bits(made, params):
    return [8 * made.state[p]["state1"].itemsize for p in params]


@pytest.mark.parametrize("when", ["before", "after"])
def test_override_of_bits(manager, when):
    params = cases.parameters((64, 80), (64, 80))
    if when == "before":
        manager.override_config(params[0], "optim_bits", 32)
    made = cases.make("AdamW8bit", params)
    if when == "after":
        manager.override_config(params[0], "optim_bits", 32)
    cases.train(made, params, range(2))
    assert bits(made, params) == [32, 8]
    assert manager.uses_config_override


def test_override_to_8_bits(manager):
    params = cases.parameters((10, 30), (10, 30))
    manager.override_config(params[1], key_value_dict={"optim_bits": 8, "min_8bit_size": 300})
    made = cases.make("PagedLion", params)
    cases.train(made, params, range(2))
    assert bits(made, params) == [32, 8]


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.5},
        {"betas": (0.5, 0.6)},
        {"weight_decay": 0.5},
        {"eps": 0.1},
        {"skip_zeros": True},
        {"max_unorm": 0.001},
        {"lr": 0.1, "betas": (0.1, 0.2), "optim_bits": 8},
    ],
)
def test_overrides_of_hyperparameters(manager, settings):
    a, b = cases.parameters((64, 80), (64, 80)), cases.parameters((64, 80), (64, 80))
    manager.override_config(a[1], key_value_dict=settings)
    made = cases.make("AdamW", a)
    plain = cases.make("AdamW", b[:1])
    other = cases.make("AdamW", b[1:], **{k: v for k, v in settings.items() if k in ("lr", "eps")})
    for key, value in settings.items():
        if key in other.param_groups[0]:
            other.param_groups[0][key] = value
        else:
            setattr(other.args, key, value)
    for step in range(3):
        for params in (a, b):
            cases.set_grads(params, step)
            params[1].grad[::2] = 0.0
        made.step()
        plain.step()
        other.step()
    assert cases.equal(a, b)
    assert not torch.equal(a[0], a[1])


def test_a_later_override_counts_from_the_next_step(manager):
    params = cases.parameters((5,))
    made = cases.make("SGD", params, lr=1.0)
    cases.train(made, params, range(1))
    manager.override_config(params[0], "lr", 0.0)
    old = params[0].detach().clone()
    cases.train(made, params, range(1, 2))
    assert torch.equal(params[0], old)


@pytest.mark.parametrize("when", ["before", "after construction", "after a step"])
def test_module_override(manager, when):
    module = nn.Linear(80, 64)
    made = None
    if when != "before":
        made = cases.make("AdamW8bit", module.parameters())
        if when == "after a step":
            module.bias.grad = torch.ones(64)
            made.step()
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    made = made or cases.make("AdamW8bit", module.parameters())
    module.weight.grad = torch.ones(64, 80)
    made.step()
    assert bits(made, [module.weight]) == [32]


def test_module_overrides_find_what_the_parameter_is_by_then(manager):
    module = nn.Linear(80, 64)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    module.weight = nn.Parameter(torch.zeros(64, 80))
    made = cases.make("AdamW8bit", module.parameters())
    module.weight.grad = torch.ones(64, 80)
    made.step()
    assert bits(made, [module.weight]) == [32]


def test_module_overrides_that_find_nothing(manager):
    """A module whose parameter is gone, or somebody else's, is no concern of this optimizer."""
    gone, other = nn.Linear(80, 64), nn.Linear(80, 64)
    for module in (gone, other):
        manager.register_module_override(module, "weight", {"optim_bits": 32})
    gone.weight = None
    params = cases.parameters((64, 80))
    made = cases.make("AdamW8bit", params)
    cases.train(made, params, range(1))
    assert bits(made, params) == [8]


@pytest.mark.parametrize("kind", ["Embedding", "StableEmbedding"])
def test_embeddings_keep_32_bits(manager, kind):
    model = nn.Sequential(getattr(halfbyte.nn, kind)(100, 64), nn.Linear(64, 80))
    other = nn.Sequential(nn.Linear(64, 80))
    made, apart = (cases.make("AdamW8bit", m.parameters()) for m in (model, other))
    model(torch.tensor([1, 2])).sum().backward()
    made.step()
    other(torch.ones(2, 64)).sum().backward()
    apart.step()
    assert bits(made, [model[0].weight, model[1].weight]) == [32, 8]
    # The first parameter of another model is not the embedding.
    assert bits(apart, [other[0].weight]) == [8]


def test_settings_by_position(manager):
    """An optimizer over copies of the parameters finds what was registered for the originals."""
    originals = cases.parameters((64, 80), (64, 80))
    manager.override_config(originals[1], "optim_bits", 32)
    manager.register_parameters(originals)
    copies = [nn.Parameter(p.detach().clone()) for p in originals]
    made = cases.make("AdamW8bit", copies)
    cases.train(made, copies, range(1))
    assert bits(made, copies) == [8, 32]


def test_settings_by_identity_come_last(manager):
    params = cases.parameters((64, 80))
    made = cases.make("AdamW", params)
    manager.index2config[(0, 0)] = {"lr": 1.0, "eps": 0.5}
    manager.override_config(params[0], "lr", 2.0)
    config = made.get_config(0, 0, made.param_groups[0])
    assert (config["lr"], config["eps"]) == (2.0, 0.5)
    assert made.param_groups[0]["lr"] == 1e-2
