"""Optimizers under FSDP1: flat parameters and their views, and checkpoints that reshard.

Every rank has the same batch, so that the mean of their gradients is that of one process.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest
import ranks
import torch
from optim_shards import assert_equal_states, half_gaps, make, numbers, raw, read
from torch import nn

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo wants a POSIX path"),
    pytest.mark.filterwarnings("ignore"),
]

DONE, MORE = 2, 2
STAGES = [(2, []), (1, [2]), (4, [4, 2, 1]), (2, [4])]
"""Numbers of ranks, and whose files they load. All save first."""
BOTH, OTHER = [(True, True), (False, False)], [(True, False), (False, True)]
SAVED = {"AdEMAMix8bit": [(True, True), *OTHER], "AdamW": OTHER, "LAMB": BOTH, "Kahan": BOTH}
"""Whether FSDP1 keeps the original parameters, when saving and when loading. LAMB's norms, and
bfloat16 sums, are of what it keeps."""
STEPPED = ("AdamW", "AdamW8bit", "AdEMAMix8bit", "PagedLion8bit", "AdamWScheduleFree8bit")
EIGHT = {"0.weight", "2.weight"}
"""Parameters of 4,096 elements or more."""


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every tensor has rows for all of 4 ranks: PyTorch (2.15) does not load a ShardedTensor on a
    rank that has none of it, of any optimizer or model."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 67), nn.Tanh(), nn.Linear(67, 7)
    ).to(dtype)


def wrapped(use_orig_params: bool, name: str = "") -> Any:
    """The first layer by itself, the others in one flat parameter."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = model(torch.bfloat16 if name == "Kahan" else torch.float32)
    cpu = {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
    net[0] = FullyShardedDataParallel(net[0], **cpu)
    return FullyShardedDataParallel(net, **cpu)


def saved_one(name: str, net: Any, lr: float = 1e-2) -> Any:
    """The optimizer of a row of SAVED."""
    if name == "Kahan":
        return make("AdamW8bit", net.parameters(), lr=lr, rounding="kahan")
    return make(name, net.parameters(), lr=lr)


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    dtype = next(net.parameters()).dtype
    for step in steps:
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x.to(dtype)).square().mean().backward()
        optimizer.step()


def parameters(net: Any) -> dict[str, torch.Tensor]:
    """All of them, whole, by their names without FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not isinstance(net, FullyShardedDataParallel):
        return {name: p.detach().clone() for name, p in net.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(net, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for name, p in net.named_parameters()
        }


def whole_states(net: Any, made: Any) -> Any:
    """FSDP1's full state dict, on every rank.

    Not offloaded to the CPU: on it, and with original parameters, PyTorch (2.15) then returns the
    same memory for all states of a parameter, of any optimizer.
    """
    from torch.distributed.fsdp import FullOptimStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    config = FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False)
    with FSDP.state_dict_type(net, StateDictType.FULL_STATE_DICT, None, config):
        return FSDP.optim_state_dict(net, made)


def values(state_dict: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The states of a full state dict by FSDP1."""
    return {
        name: {key: value.clone() for key, value in state.items() if key.startswith("values")}
        for name, state in state_dict["state"].items()
    }


# ---- steps ---------------------------------------------------------------------------------------


def check(rank: int, world: int) -> int:
    cases = 0
    for use_orig_params in (True, False):
        plain = model()
        train(plain, make("AdamW", plain.parameters()), range(DONE))
        for name in STEPPED if use_orig_params else STEPPED[:3]:
            net = wrapped(use_orig_params)
            made = make(name, net.parameters())
            train(net, made, range(DONE))
            if name == "AdamW":
                for key, p in parameters(net).items():
                    assert torch.equal(p, plain.get_parameter(key)), (key, use_orig_params)
            bits(net, made, use_orig_params, "8bit" in name)
            old_ways(net, made, name, use_orig_params)
            cases += 1
    bounds(world)
    refusals()
    without_parameters(world)
    return cases


def bits(net: Any, made: Any, use_orig_params: bool, eight: bool) -> None:
    """The size of the whole parameter decides, not that of the part."""
    for name, p in net.named_parameters():
        name = name.replace("_fsdp_wrapped_module.", "")
        if p not in made.state:
            assert p.grad is None
            continue
        state = made.state[p]
        key = "state2" if "state2" in state else "state1"
        coded = eight and (name in EIGHT or not use_orig_params)
        assert state[key].dtype == (torch.uint8 if coded else torch.float32), name


def old_ways(net: Any, made: Any, name: str, use_orig_params: bool) -> None:
    """FSDP1's own functions give back what they took, to the bit."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import OptimStateKeyType

    def again() -> Any:
        return make(name, net.parameters())

    full = whole_states(net, made)
    for key, state in full["state"].items():
        assert state["step"] == DONE
        for item in values(full)[key].values():
            assert item.dtype is torch.float32
            assert item.shape == parameters(net)[key].shape
    first = full if dist.get_rank() == 0 else None
    loads = [
        FSDP.shard_full_optim_state_dict(full, net, optim=again()),
        FSDP.optim_state_dict_to_load(net, again(), full),
        FSDP.scatter_full_optim_state_dict(
            full if dist.get_rank() == 0 else None, net, optim=again()
        ),
    ]
    if not use_orig_params:
        first = FSDP.full_optim_state_dict(net, made) or None
        assert (first is not None) == (dist.get_rank() == 0)
        loads.append(FSDP.scatter_full_optim_state_dict(first, net, optim=again()))
    with sharded_state(net):
        loads.append(FSDP.optim_state_dict_to_load(net, again(), FSDP.optim_state_dict(net, made)))
    for loaded in loads:
        other = again()
        other.load_state_dict(loaded)
        for p in net.parameters():
            assert (p in made.state) == (p in other.state)
            if p in made.state and p.numel():
                mine = {k: v for k, v in made.state[p].items() if k != "unorm_vec"}
                assert_equal_states(mine, other.state[p])
    # By position it goes into an optimizer without shards.
    plain = model()
    solo = make(name, plain.parameters())
    by_position = FSDP.rekey_optim_state_dict(full, OptimStateKeyType.PARAM_ID, plain)
    solo.load_state_dict(by_position)
    for key, p in plain.named_parameters():
        state = solo.state[p]
        last = numbers(state)[-1]
        coded = "8bit" in name and key in EIGHT
        assert state[f"state{last}"].dtype == (torch.uint8 if coded else torch.float32)
        want = full["state"][key][f"values{last}"]
        off = (read(state, last, p) - want).abs()
        assert (off <= (half_gaps(want, state, last, False) if coded else 0.0)).all()


def bounds(world: int) -> None:
    """LAMB bounds updates by the norm of each whole parameter, where FSDP1 keeps them apart."""
    plain, net = model(), wrapped(True)
    train(plain, make("LAMB", plain.parameters(), max_unorm=0.01), range(DONE))
    train(net, made := make("LAMB", net.parameters(), max_unorm=0.01), range(DONE))
    for key, p in parameters(net).items():
        torch.testing.assert_close(p, plain.get_parameter(key).detach(), rtol=1e-6, atol=1e-7)
    assert all(float(state["unorm_vec"]) > 0.0 for state in made.state.values())


def refusals() -> None:
    with pytest.raises(ValueError, match="Muon8bit needs matrices, which FSDP1 flattens"):
        make("Muon8bit", wrapped(True).parameters())
    make("Muon8bit", [{"params": wrapped(False).parameters(), "use_muon": False}])


# ---- checkpoints ---------------------------------------------------------------------------------


def save(rank: int, world: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    for name, ways in SAVED.items():
        for use_orig_params in {before for before, _ in ways}:
            net = wrapped(use_orig_params, name)
            train(net, made := saved_one(name, net), range(DONE))
            place = pathlib.Path(folder, f"{name}-{world}-{use_orig_params}")
            with sharded_state(net):
                held = {
                    "model": get_model_state_dict(net),
                    "optim": get_optimizer_state_dict(net, made),
                }
                dcp.save(held, checkpoint_id=str(place))
            was = [raw(made.state.get(p, {})) for p in net.parameters()]
            whole = values(whole_states(net, made))  # copies: of one rank they are the states
            train(net, made, range(DONE, DONE + MORE))
            out = {"raw": was, "values": whole, "end": parameters(net)}
            torch.save(out, f"{place}-rank{rank}.pt")


def sharded_state(net: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import StateDictType

    return FSDP.state_dict_type(net, StateDictType.SHARDED_STATE_DICT)


def load(rank: int, world: int, folder: str, origins: list[int]) -> int:
    """Loads what was saved under FSDP1 of one kind into the other, and into the same."""
    loaded = 0
    for name, ways in SAVED.items():
        for origin in origins:
            for before, now in ways:
                same = origin == world and before == now
                place = pathlib.Path(folder, f"{name}-{origin}-{before}")
                was = torch.load(f"{place}-rank{rank if same else 0}.pt")
                go_on(name, place, now, was, same)
                loaded += 1
    return loaded


def go_on(name: str, place: pathlib.Path, use_orig_params: bool, was: Any, same: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    net = wrapped(use_orig_params, name)
    made = saved_one(name, net, lr=0.5)
    eight = name in ("AdEMAMix8bit", "Kahan")
    with sharded_state(net):
        held = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, made)}
        dcp.load(held, checkpoint_id=str(place))
        set_model_state_dict(net, held["model"])
        set_optimizer_state_dict(net, made, held["optim"])
    assert made.param_groups[0]["lr"] == 1e-2
    bits(net, made, use_orig_params, eight)
    if same:
        for p, state in zip(net.parameters(), was["raw"], strict=True):
            if p.numel() and state:
                state.pop("unorm_vec", None)  # of the last step, made again by the next
                assert_equal_states(state, made.state[p])
    got = values(whole_states(net, made))
    assert got.keys() == was["values"].keys()
    for key, state in was["values"].items():
        assert got[key].keys() == state.keys()
        for item, want in state.items():
            if item == "values_rest":
                assert want.any()
            if same or not eight or item == "values_rest" or (use_orig_params and key not in EIGHT):
                assert torch.equal(got[key][item], want), (place, key, item)
            else:
                # Blocks hold other elements, of several parameters in one flat one. At the largest
                # scale of all a gap between codes is at most 1.5% of it.
                top = max(float(other[item].abs().max()) for other in was["values"].values())
                off = float((got[key][item] - want).abs().max())
                assert off <= 0.015 * top, (place, use_orig_params, key, item, off, top)
    train(net, made, range(DONE, DONE + MORE))
    for key, p in parameters(net).items():
        if same or name == "AdamW":
            assert torch.equal(p, was["end"][key]), (place, key)
        elif name == "LAMB":  # norms are summed in another order
            torch.testing.assert_close(p, was["end"][key], rtol=1e-6, atol=1e-7)
        else:
            off = (p - was["end"][key]).abs().mean() / (1e-2 * MORE)
            assert off < 0.1, (place, key, float(off))


def without_parameters(world: int) -> None:
    """A rank that has no part of what is trained, while the learning rate is 0."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = nn.Linear(64, 96)
    net.weight.requires_grad_(False)
    net = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    made = make("LAMB", net.parameters(), lr=0.0)
    train(net, made, range(3))
    assert {state["step"] for state in made.state.values()} <= {3}
    made.param_groups[0]["lr"] = 1e-2
    train(net, made, range(3, 4))
    assert not torch.equal(parameters(net)["bias"], torch.zeros(96))


def stages(rank: int, world: int, folder: str) -> int:
    """All that is done, with some of the ranks and then with others, as if they were all."""
    import torch.distributed as dist

    loaded = 0
    for number, (size, origins) in enumerate(STAGES):
        dist.destroy_process_group()
        if rank < size:
            join(rank, size, f"{folder}/store{number}")
            if not pathlib.Path(folder, f"AdamW-{size}-True").exists():
                dist.barrier()
                if size < world:
                    assert check(rank, size) == 8
                save(rank, size, folder)
            loaded += load(rank, size, folder, origins)
            dist.destroy_process_group()
        join(rank, world, f"{folder}/all{number}")  # when the others are done
    return loaded


def join(rank: int, world: int, store: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def test_steps_and_checkpoints_of_any_number_of_ranks(tmp_path):
    ways = sum(map(len, SAVED.values()))
    for rank, loaded in enumerate(ranks.run(stages, 4, folder=str(tmp_path))):
        assert loaded == sum(len(origins) for size, origins in STAGES if rank < size) * ways
