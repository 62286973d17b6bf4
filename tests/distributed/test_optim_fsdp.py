"""Optimizers on FSDP2's parameters (DTensors): steps, and checkpoints that reshard."""

from __future__ import annotations

import copy
import pathlib
import sys
from typing import Any

import pytest
import ranks
import torch
from halfbyte.optim import _paged, _sharded
from halfbyte.optim.optimizer import Optimizer2State
from optim_shards import (
    ALIGNED,
    SHAPES,
    assert_equal_states,
    assert_same,
    copy_into,
    half_gaps,
    make,
    mesh,
    model,
    numbers,
    raw,
    read,
    sharded,
    train,
    whole,
)
from torch import nn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo wants a POSIX path")

NAMES = (
    *("AdamW8bit", "AdamW", "AdEMAMix8bit", "AdEMAMix", "Lion8bit", "SGD8bit", "RMSprop8bit"),
    *("Adagrad8bit", "PagedAdamW8bit", "AdamWScheduleFree8bit", "LAMB8bit"),
)
SAVED = ("AdamW8bit", "AdamW", "AdEMAMix8bit", "PagedLion8bit", "AdamWScheduleFree8bit", "LAMB")
WORLDS = [1, 2, 4]
DONE, MORE = 3, 3
FILE = "__bnb_optimizer_quant_state__"


# ---- steps ---------------------------------------------------------------------------------------


def check_steps(rank: int, world: int) -> list[str]:
    for name in NAMES:
        a, b = model(), sharded(world)
        train(a, make(name, a.parameters()), range(DONE))
        train(b, made := make(name, b.parameters()), range(DONE))
        aligned = [key for key in ALIGNED if not ("LAMB" in name and key == "few")]
        assert_same(a, b, aligned, name)
        for key, p in b.named_parameters():
            state = made.state[p]
            eight = "8bit" in name and key != "few"  # by the size of the whole parameter
            held = state["state2" if "Free" in name else "state1"]
            assert held.dtype == (torch.uint8 if eight else torch.float32), (name, key)
            assert state["state1"].shape[-p.dim() :] == p.to_local().shape
            assert state["step"] == DONE
    for check in (other_blocks, bounds, rounding, pages, nothing_yet, muon, real_steps):
        check(rank, world)
    return list(NAMES)


def other_blocks(rank: int, world: int) -> None:
    """Where blocks hold other elements, a state is off by half a gap at the scale of its block."""
    net, exact = sharded(world), model()
    train(net, made := make("AdEMAMix8bit", net.parameters()), range(1))
    train(exact, reference := make("AdEMAMix", exact.parameters()), range(1))
    for (key, p), q in zip(net.named_parameters(), exact.parameters(), strict=True):
        state = made.state[p]
        for number in numbers(state) if key != "few" else ():
            lead = int(number == "1")
            want = _sharded.part_of(p, reference.state[q][f"state{number}"], lead)
            off = (read(state, number, p) - want).abs()
            assert (off <= half_gaps(want, state, number, bool(lead))).all(), (key, number)


def bounds(rank: int, world: int) -> None:
    """LAMB and LARS bound updates by norms of whole parameters."""
    for name, more in (
        ("LAMB", {"max_unorm": 0.01}),
        ("LARS", {}),
        ("LAMB", {"weight_decay": 0.1}),
    ):
        a, b = model(), sharded(world)
        train(a, first := make(name, a.parameters(), **more), range(DONE))
        train(b, second := make(name, b.parameters(), **more), range(DONE))
        for (key, p), q in zip(b.named_parameters(), a.parameters(), strict=True):
            torch.testing.assert_close(
                whole(p), q.detach(), rtol=2e-7, atol=2e-8, msg=f"{name} {key}"
            )
            norms = second.state[p]["unorm_vec"], first.state[q]["unorm_vec"]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0.0)
            assert float(norms[0]) > 0.0
    net = sharded(world)  # a bound may be set later
    train(net, free := Optimizer2State("lamb", net.parameters()), range(1))
    bound = Optimizer2State("lamb", net.parameters(), max_unorm=0.01)
    bound.load_state_dict(free.state_dict())
    train(net, bound, range(1, 2))
    assert all(float(state["unorm_vec"]) > 0.0 for state in bound.state.values())


def rounding(rank: int, world: int) -> None:
    for how in ("stochastic", "kahan"):
        nets = [model(dtype=torch.bfloat16)] + [
            sharded(world, tuple(SHAPES), torch.bfloat16) for _ in "ab"
        ]
        for net in nets:
            train(net, make("AdamW8bit", net.parameters(), lr=1e-4, rounding=how, seed=3), range(2))
        assert_same(nets[1], nets[2], SHAPES, how)
        if how == "kahan" or world == 1:
            assert_same(nets[0], nets[1], ALIGNED, how)
    if world > 1:  # parts that are alike are not rounded alike
        net = sharded(world, ("rows",), torch.bfloat16)
        with torch.no_grad():
            net.rows.to_local().fill_(1.0)
        net.rows.grad = torch.full_like(net.rows, 0.5)
        make("AdamW", net.parameters(), lr=1e-3, rounding="stochastic").step()
        parts = whole(net.rows).chunk(world)
        assert len({tuple(part.flatten().tolist()) for part in parts}) == world


def pages(rank: int, world: int) -> None:
    """Memory is what paging is about: the size of the part decides."""
    from torch.distributed.tensor import Shard, distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.ones(400, 512), mesh(world), [Shard(0)]))
    p.grad = torch.full_like(p, 0.25)
    made = make("PagedAdamW8bit", [p])
    made.step()
    assert _paged.is_file_backed(made.state[p]["state1"]) == (world <= 2)
    twin = make("PagedAdamW8bit", [p])
    twin.load_state_dict(made.state_dict())
    assert _paged.is_file_backed(twin.state[p]["state2"]) == (world <= 2)
    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(twin.state[p][key], made.state[p][key])


def nothing_yet(rank: int, world: int) -> None:
    """Making the states for a checkpoint counts no step and moves nothing."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for name in ("AdamW8bit", "LAMB", "AdamWScheduleFree8bit", "Muon8bit"):
        a, b = model(), sharded(world)
        made = make(name, b.parameters())
        if "Free" in name:
            made.eval()
        saved = get_optimizer_state_dict(b, made)
        assert_same(a, b, SHAPES, name)
        assert {state["step"] for state in saved["state"].values()} == {0}
        assert len(saved["state"]) == len(SHAPES)
        assert made.param_groups[0]["lr"] == 1e-2
        assert all(p.grad is None for p in b.parameters())
        if name == "AdamW8bit":
            train(a, make(name, a.parameters()), range(1))
            train(b, made, range(1))
            assert_same(a, b, ALIGNED, name)
    b = sharded(world)
    made = make("AdamW8bit", b.parameters(), lr=0.0)  # as a warm-up starts
    train(b, made, range(1))
    assert {state["step"] for state in made.state.values()} == {1}


def muon(rank: int, world: int) -> None:
    """Every rank iterates on the whole matrix, so the blocks of the momentum alone may differ."""
    a, b = model(), sharded(world)
    train(a, make("Muon8bit", a.parameters()), range(DONE))
    train(b, make("Muon8bit", b.parameters()), range(DONE))
    for key in ALIGNED:
        torch.testing.assert_close(whole(b.get_parameter(key)), whole(a.get_parameter(key)))


def real_steps(rank: int, world: int) -> None:
    """Gradients that FSDP2 reduces, of the same batch on every rank."""
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 3))
    net = copy.deepcopy(plain)
    fully_shard(net[0], mesh=mesh(world))
    fully_shard(net, mesh=mesh(world))
    for trained in (plain, net):
        made = make("AdamW8bit", trained.parameters(), lr=1e-3)
        for _ in range(DONE):
            made.zero_grad()
            trained(x).square().mean().backward()
            made.step()
    assert_same(plain, net, ("0.weight", "0.bias", "2.weight", "2.bias"), "real steps")


def of_each_size(rank: int, world: int) -> list[Any]:
    """Some ranks and then more of them, as if they were all."""
    done = []
    for size in WORLDS:
        mesh(size)
    for size in WORLDS:
        done.append(check_steps(rank, size) if rank < size else None)
        torch.distributed.barrier()
    return done


def test_steps():
    for rank, done in enumerate(ranks.run(of_each_size, WORLDS[-1])):
        assert done == [list(NAMES) if rank < size else None for size in WORLDS]


# ---- checkpoints ---------------------------------------------------------------------------------


def save(rank: int, world: int, folder: str) -> None:
    """What a run of this many ranks saves, and where it goes from there."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    for name in SAVED:
        net = sharded(world)
        train(net, made := make(name, net.parameters()), range(DONE))
        held = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, made)}
        place = pathlib.Path(folder, f"{name}-{world}")
        dcp.save(held, checkpoint_id=str(place), process_group=mesh(world).get_group())
        then = {key: raw(made.state[p]) for key, p in net.named_parameters()}
        values = {}
        for key, p in net.named_parameters():
            for number in numbers(made.state[p]):
                part = read(made.state[p], number, p)
                values[f"{key} {number}"] = _sharded.gathered(p, part, part.dim() - p.dim())
        train(net, made, range(DONE, DONE + MORE))
        end = {key: whole(p) for key, p in net.named_parameters()}
        torch.save({"raw": then, "values": values, "end": end}, f"{place}-rank{rank}.pt")


def load(rank: int, world: int, folder: str) -> int:
    """Loads what other numbers of ranks saved, and goes on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    loaded = 0
    for name in SAVED:
        for origin in WORLDS:
            place = pathlib.Path(folder, f"{name}-{origin}")
            net = sharded(world)
            made = make(name, net.parameters(), lr=0.5)
            held = {
                "model": get_model_state_dict(net),
                "optim": get_optimizer_state_dict(net, made),
            }
            dcp.load(held, checkpoint_id=str(place), process_group=mesh(world).get_group())
            set_model_state_dict(net, held["model"])
            set_optimizer_state_dict(net, made, held["optim"])
            was = torch.load(f"{place}-rank{rank if origin == world else 0}.pt")
            assert made.param_groups[0]["lr"] == 1e-2
            for key, p in net.named_parameters():
                assert_loaded(
                    f"{name} {origin} {world} {key}", p, key, made.state[p], was, origin == world
                )
            train(net, made, range(DONE, DONE + MORE))
            for key, p in net.named_parameters():
                end = was["end"][key]
                if name == "LAMB" and origin != world:  # norms are summed in another order
                    torch.testing.assert_close(whole(p), end, rtol=1e-6, atol=1e-7)
                elif key in ALIGNED or origin == world or name == "AdamW":
                    assert torch.equal(whole(p), end), (name, origin, world, key)
                else:
                    # Each step moves by about lr, and of that a small share differs.
                    off = (whole(p) - end).abs().mean() / (1e-2 * MORE)
                    assert off < 0.1, (name, origin, world, key, float(off))
            loaded += 1
    return loaded


def assert_loaded(
    what: str, p: Any, key: str, state: dict[str, Any], was: dict[str, Any], same: bool
) -> None:
    assert state["step"] == DONE, what
    if same:
        assert set(state) == set(was["raw"][key]), what
        for item, value in was["raw"][key].items():
            equal = (
                torch.equal(state[item], value)
                if isinstance(value, torch.Tensor)
                else state[item] == value
            )
            assert equal, f"{what}: {item}"
    for number in numbers(state):
        want = was["values"][f"{key} {number}"]
        lead = want.dim() - p.dim()
        want = _sharded.part_of(p, want, lead)
        got = read(state, number, p)
        if key in ALIGNED or state[f"state{number}"].dtype is torch.float32:
            assert torch.equal(got, want), f"{what}: state{number}"
        else:
            bound = half_gaps(want, state, number, bool(lead)) * (2 if number == "1" else 1)
            assert ((got - want).abs() <= bound).all(), f"{what}: state{number}"


def matrix(rank: int, world: int, folder: str) -> list[int]:
    """Every number of ranks saves, then every one loads what any of them saved."""
    for size in WORLDS:
        mesh(size)
    loaded = []
    for step in (save, load):
        for size in WORLDS:
            if rank < size:
                loaded.append(step(rank, size, folder))
            torch.distributed.barrier()
    return [count for count in loaded if count]


def test_checkpoints_of_any_number_of_ranks(tmp_path):
    for rank, counts in enumerate(ranks.run(matrix, WORLDS[-1], folder=str(tmp_path))):
        sizes = [size for size in WORLDS if rank < size]
        assert counts == [len(SAVED) * len(WORLDS)] * len(sizes)


def forms(rank: int, world: int, folder: str) -> list[str]:
    """The other forms that are taken: whole states, those of one rank, and what is refused."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    full = StateDictOptions(full_state_dict=True)
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for name in ("AdamW8bit", "AdEMAMix8bit", "AdamWScheduleFree8bit"):
        plain, net = model(), sharded(world)
        train(plain, single := make(name, plain.parameters()), range(DONE))
        train(net, made := make(name, net.parameters()), range(DONE))
        after = model()
        after.load_state_dict(plain.state_dict())
        last = make(name, after.parameters())
        last.load_state_dict(single.state_dict())
        train(after, last, range(DONE, DONE + MORE))

        # The states of an optimizer without shards, whole.
        twin = sharded(world)
        copy_into(twin, plain)
        other = make(name, twin.parameters())
        other.load_state_dict(single.state_dict())
        assert other.state[twin.ragged]["state2"].dtype is torch.uint8
        train(twin, other, range(DONE, DONE + MORE))
        assert_same(after, twin, ALIGNED, f"{name}: whole states")

        # The form of the state dict is that of an optimizer without shards where rows are blocks.
        a, b = single.state_dict()["state"], made.state_dict()["state"]
        for index, key in enumerate(SHAPES):
            if key in ("rows", "uneven", "few"):
                assert a[index][FILE].keys() == b[index][FILE].keys(), key
                for item, value in a[index][FILE].items():
                    held = b[index][FILE][item]
                    held = held.full_tensor() if _sharded.is_dtensor(held) else held
                    assert torch.equal(value, held), (name, key, item)
            else:
                assert "decoded2" in b[index][FILE]

        # Gathered on every rank, then by one; and back.
        for options in (full, from_first):
            gathered = get_optimizer_state_dict(net, made, options=full)
            fresh = sharded(world)
            copy_into(fresh, net)
            again = make(name, fresh.parameters())
            set_optimizer_state_dict(fresh, again, gathered, options=options)
            for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
                assert_equal_states(made.state[p], again.state[q])
        # A gathered one goes into an optimizer without shards.
        gathered = get_optimizer_state_dict(net, made, options=full)
        lone = model()
        solo = make(name, lone.parameters())
        set_optimizer_state_dict(lone, solo, gathered)
        for key in ALIGNED:
            assert_equal_states(
                solo.state[lone.get_parameter(key)], single.state[plain.get_parameter(key)]
            )
        assert solo.state[lone.ragged]["state2"].dtype is torch.uint8

        # Tensors of the part, as older versions saved.
        older = {
            "state": {
                i: {
                    "step": made.state[p]["step"],
                    FILE: {k: v for k, v in raw(made.state[p]).items() if k != "step"},
                }
                for i, p in enumerate(net.parameters())
            },
            "param_groups": made.state_dict()["param_groups"],
        }
        again = make(name, net.parameters())
        again.load_state_dict(older)
        for p in net.parameters():
            assert_equal_states(made.state[p], again.state[p])

    exchange(world, folder, dcp, get_optimizer_state_dict, set_optimizer_state_dict)
    layouts()
    return refusals(world)


def exchange(world: int, folder: str, dcp: Any, get: Any, put: Any) -> None:
    """DCP files of an optimizer without shards, where rows are blocks."""
    names = ("rows", "uneven", "few")
    plain, net = model(names), sharded(world, names)
    train(plain, single := make("AdamW8bit", plain.parameters()), range(DONE))
    dcp.save({"optim": get(plain, single)}, checkpoint_id=folder)
    made = make("AdamW8bit", net.parameters())
    held = {"optim": get(net, made)}
    dcp.load(held, checkpoint_id=folder)
    put(net, made, held["optim"])
    copy_into(net, plain)
    train(plain, single, range(DONE, DONE + MORE))
    train(net, made, range(DONE, DONE + MORE))
    assert_same(plain, net, names, "DCP of one")


def layouts() -> None:
    """Copies of parts, parts of columns, parts of parts: 4 ranks as 2 x 2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

    def parameter(placements: Any, dtype: torch.dtype) -> nn.Module:
        net = model(("rows", "ragged"), dtype)
        for key, p in list(net.named_parameters()):
            if placements is None:  # tensor parallel, then FSDP2
                placed = distribute_tensor(p.detach(), square["inner"], [Shard(0)])
            else:
                placed = distribute_tensor(p.detach(), square, placements)
            setattr(net, key, nn.Parameter(placed))
        return net if placements is not None else fully_shard(net, mesh=square["outer"])

    copies, both, columns = [Replicate(), Shard(0)], [Shard(0), Shard(1)], [Replicate(), Shard(1)]
    for placements in (copies, both, columns, None):
        net = parameter(placements, torch.bfloat16)
        how = "stochastic" if placements == copies else "kahan"
        made = make("AdEMAMix8bit", net.parameters(), rounding=how, lr=1e-4)
        train(net, made, range(DONE))
        saved = made.state_dict()
        twin = make("AdEMAMix8bit", net.parameters(), rounding=how, lr=1e-4)
        twin.load_state_dict(saved)
        for index, (key, p) in enumerate(net.named_parameters()):
            assert_equal_states(made.state[p], twin.state[p])
            inside = saved["state"][index][FILE]
            wanted = (
                {"state1", "absmax2"} if (key, placements) == ("rows", copies) else {"decoded1"}
            )
            assert wanted <= inside.keys()
            for item, value in inside.items():
                if _sharded.is_dtensor(value) and not item.startswith("absmax"):
                    assert value.shape[-2:] == p.shape, item
        if placements == copies:  # a part is the same on both of its ranks
            part = net.rows.to_local().detach().float()
            others = [torch.empty_like(part) for _ in range(2)]
            torch.distributed.all_gather(others, part, group=square["outer"].get_group())
            assert torch.equal(*others)
            parts = [torch.empty_like(part) for _ in range(2)]
            torch.distributed.all_gather(parts, part, group=square["inner"].get_group())
            assert not torch.equal(*parts)


def refusals(world: int) -> list[str]:
    """What does not fit is refused on every rank, with the name of the tensor."""
    net = sharded(world)
    train(net, made := make("AdamW8bit", net.parameters()), range(1))
    said = []

    def refused(index: int, optimizer: Any = made, **changes: Any) -> None:
        saved = made.state_dict()
        saved["state"][index][FILE] |= changes
        was = raw(next(iter(optimizer.state.values()), {}))
        with pytest.raises(ValueError, match=r"state\[\d\]\['") as error:
            optimizer.load_state_dict(saved)
        if was:
            assert_equal_states(was, next(iter(optimizer.state.values())))
        said.append(str(error.value))

    other = made.state_dict()["state"]
    refused(0, state1=other[1][FILE]["state1"])
    refused(0, absmax2=other[1][FILE]["absmax2"])
    refused(3, decoded1=other[0][FILE]["state1"])
    refused(3, decoded2=other[4][FILE]["decoded2"])
    refused(0, state1=torch.zeros(3, dtype=torch.uint8))
    lone = make("AdamW8bit", model().parameters())
    refused(0, lone)
    return said


def test_forms_that_are_taken(tmp_path):
    for said in ranks.run(forms, 4, folder=str(tmp_path)):
        assert len(said) == 6
        assert "state[0]['state1'] must have shape [8, 512]" in said[0]
        assert "got [5, 1024]" in said[0]
        assert "state[0]['absmax2'] must be scales of whole rows" in said[1]
        assert "state[3]['decoded1'] must be a float32 tensor, got torch.uint8" in said[2]
        assert "state[3]['decoded2'] must have shape [67, 80]" in said[3]
        assert "state[0]['state1'] must have shape" in said[4]
        assert "is a DTensor, but the parameter is not sharded" in said[5]
