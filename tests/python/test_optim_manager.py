"""GlobalOptimManager: settings per parameter."""

from __future__ import annotations

import gc
import inspect

import pytest
import torch
from halfbyte import optim
from halfbyte.optim import GlobalOptimManager
from torch import nn


@pytest.fixture
def manager():
    made = GlobalOptimManager.get_instance()
    saved = dict(vars(made))
    made.initialize()
    yield made
    vars(made).update(saved)


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3)) for _ in range(count)]


def test_one_per_process(manager):
    assert GlobalOptimManager.get_instance() is manager
    with pytest.raises(RuntimeError, match=r"get_instance\(\)"):
        GlobalOptimManager()
    assert GlobalOptimManager.__module__ == f"{optim.__name__}.optimizer"


def test_starts_empty(manager):
    assert manager.pid2config == {}
    assert manager.index2config == {}
    assert manager.module_weight_config_triple == []
    assert manager.optimizer is None
    assert manager.uses_config_override is False


def test_override(manager):
    first, second, third = parameters(3)
    manager.override_config(first, "optim_bits", 8)
    manager.override_config(first, "lr", 1.0)
    manager.override_config([second, third], key_value_dict={"a": 1})
    manager.override_config((p for p in [second]), key="b", value=None)
    manager.override_config(second, key_value_dict={"a": 2})
    assert manager.pid2config == {
        id(first): {"optim_bits": 8, "lr": 1.0},
        id(second): {"a": 2, "b": None},
        id(third): {"a": 1},
    }


def test_override_does_not_keep_the_callers_dict(manager):
    (parameter,) = parameters(1)
    settings = {"a": 1}
    manager.override_config(parameter, key_value_dict=settings)
    settings["a"] = 2
    assert manager.pid2config[id(parameter)] == {"a": 1}


@pytest.mark.parametrize(
    ("arguments", "got"),
    [({}, "neither"), ({"value": 3}, "neither"), ({"key": "a", "key_value_dict": {}}, "both")],
)
def test_override_needs_settings(manager, arguments, got):
    with pytest.raises(ValueError, match=f"got {got}"):
        manager.override_config(parameters(1), **arguments)


def test_register_parameters(manager):
    made = parameters(4)
    manager.override_config(made[1], "lr", 1.0)
    manager.override_config(made[2], "lr", 2.0)
    manager.register_parameters(made)
    assert manager.index2config == {(0, 1): {"lr": 1.0}, (0, 2): {"lr": 2.0}}
    manager.index2config.clear()
    manager.register_parameters([{"params": made[:2]}, {"params": iter(made[2:]), "lr": 3}])
    assert manager.index2config == {(0, 1): {"lr": 1.0}, (1, 0): {"lr": 2.0}}
    manager.index2config.clear()
    manager.register_parameters(p for p in made)
    manager.register_parameters([])
    manager.register_parameters([{"params": made[1]}])
    assert manager.index2config[(0, 0)] == {"lr": 1.0}


def test_register_module_override(manager):
    module = nn.Linear(2, 2)
    assert manager.register_module_override(module, "weight", {"optim_bits": 32}) is None
    assert manager.module_weight_config_triple == [(module, "weight", {"optim_bits": 32})]


def test_settings_leave_with_their_parameter(manager):
    """An id is given to another tensor afterwards, which must not inherit them."""
    (parameter,) = parameters(1)
    manager.override_config(parameter, "lr", 1.0)
    manager.override_config(parameter, "b", 1.0)
    del parameter
    gc.collect()
    assert manager.pid2config == {}


def test_signatures():
    names = {
        "override_config": ["self", "parameters", "key", "value", "key_value_dict"],
        "register_parameters": ["self", "params"],
        "register_module_override": ["self", "module", "param_name", "config"],
        "initialize": ["self"],
    }
    for name, want in names.items():
        assert list(inspect.signature(getattr(GlobalOptimManager, name)).parameters) == want
