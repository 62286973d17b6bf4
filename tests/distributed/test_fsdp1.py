"""FSDP1 (``FullyShardedDataParallel``) over quantized layers, on real ranks.

Every case is a function that all ranks run; one launch of ranks runs all of them. The sharded model
is compared with a whole one of the same process, bit for bit: losses, trained parameters, packed
bytes, state dicts.
"""

from __future__ import annotations

import copy
import itertools
import pathlib
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import ranks
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from halfbyte.nn import Embedding4bit, Experts4bit, Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as cw
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

WORLDS = (2, 4)
WIDTHS = (64, 96, 33, 64)
CPU = torch.device("cpu")
WRAPS = ("layers", "blocks", "root")


class Lora(nn.Module):
    def __init__(self, base: Any, dtype: torch.dtype, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Routed(nn.Module):
    """The other layers that hold packed weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = Embedding4bit(30, 64, dtype=dtype, quant_storage=dtype)
        self.experts = Experts4bit(4, 64, 32, quant_storage=dtype)
        self.head = nn.Linear(32, 64, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[0])
        return self.head(self.experts(self.embedding(index), index[:, None] % 4).sum(1))


def build(
    storage: torch.dtype, seed: int = 0, nested: bool = True, dtype: torch.dtype | None = None
) -> nn.Module:
    """Blocks with an adapter each. Adapters have ``dtype``, that of the storage by default."""
    torch.manual_seed(seed)
    config = {"quant_type": "nf4", "quant_storage": storage, "compress_statistics": nested}
    blocks = [
        Lora(Linear4bit(a, b, bias=False, **config), dtype or storage)
        for a, b in itertools.pairwise(WIDTHS)
    ]
    return nn.Sequential(*blocks).to("cpu")


def shard(model: nn.Module, orig: bool, wrap: str = "layers", **options: Any) -> Any:

    kinds: dict[str, set[type[nn.Module]]] = {
        "layers": {Linear4bit, Embedding4bit, Experts4bit, nn.Linear},
        "blocks": {Lora},
    }
    policy = ModuleWrapPolicy(kinds[wrap]) if wrap in kinds else None
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=CPU, use_orig_params=orig, **options
    )


def batch(dtype: torch.dtype, rank: int = 0) -> Tensor:
    drawn = torch.randn(4, WIDTHS[0], generator=torch.Generator().manual_seed(rank + 1))
    return drawn.to(dtype).requires_grad_()  # reentrant checkpointing wants an input with one


def loss(model: nn.Module, dtype: torch.dtype, rank: int = 0) -> Tensor:
    return model(batch(dtype, rank)).float().square().mean()


def train(model: nn.Module, dtype: torch.dtype, steps: int = 3) -> list[float]:
    """The losses of some steps of SGD; all ranks have the same batch."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, dtype)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def raw(tensor: Tensor) -> Tensor:
    """Bytes, not values: packed codes hold NaN patterns."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def clean(name: str) -> str:
    return re.sub(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.", "", name)


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(found) == list(want)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(raw(found[name]), raw(tensor)), name


def assert_same_parameters(sharded: Any, whole: nn.Module) -> None:
    with sharded.summon_full_params(sharded):
        found = {clean(name): p.detach().clone() for name, p in sharded.named_parameters()}
    want = dict(whole.named_parameters())
    assert found.keys() == want.keys()
    for name, p in want.items():
        assert torch.equal(raw(found[name]), raw(p)), name


def assert_trains_as(sharded: Any, whole: nn.Module, dtype: torch.dtype) -> None:
    names = [name for name, _ in sharded.named_parameters()]
    assert train(sharded, dtype) == train(whole, dtype)
    assert [name for name, _ in sharded.named_parameters()] == names
    assert_same_parameters(sharded, whole)
    found = {clean(name): tensor for name, tensor in sharded.state_dict().items()}
    assert_same(found, whole.state_dict())


# ---- cases: every rank runs them ----------------------------------------------------------------


def trains(storage: str, orig: bool, wrap: str, nested: bool = True, **options: Any) -> None:

    if "sharding_strategy" in options:
        options["sharding_strategy"] = fsdp.ShardingStrategy[options["sharding_strategy"]]
    if "backward_prefetch" in options:
        options["backward_prefetch"] = fsdp.BackwardPrefetch[options["backward_prefetch"]]
    dtype = getattr(torch, storage)
    whole = build(dtype, nested=nested)
    assert_trains_as(shard(copy.deepcopy(whole), orig, wrap, **options), whole, dtype)


def hybrid(orig: bool, strategy: str) -> None:

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    trains("bfloat16", orig, "layers", sharding_strategy=strategy, device_mesh=mesh)


def trains_routed(orig: bool, wrap: str) -> None:
    torch.manual_seed(0)
    whole = Routed(torch.bfloat16).to("cpu")
    sharded = shard(copy.deepcopy(whole), orig, wrap)
    start = whole.state_dict()
    saved = {name: tensor.clone() for name, tensor in start.items()}
    assert_trains_as(sharded, whole, torch.bfloat16)
    sharded.load_state_dict(saved)
    assert_same(sharded.state_dict(), saved)


def own_batches(orig: bool) -> None:
    """Each rank has its own batch: gradients are the mean, up to the order of the sum."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = build(torch.float32)
    sharded = shard(copy.deepcopy(whole), orig)
    for _ in range(2):
        for model in (whole, sharded):
            model.zero_grad()
        loss(sharded, torch.float32, rank).backward()
        (sum(loss(whole, torch.float32, r) for r in range(world)) / world).backward()  # type: ignore
        for model in (whole, sharded):
            trainable = [p for p in model.parameters() if p.requires_grad]
            torch.optim.SGD(trainable, lr=0.5).step()
    with sharded.summon_full_params(sharded):
        for (_, found), want in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            if want.requires_grad:
                torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def accumulates(orig: bool, wrap: str) -> None:
    """``no_sync`` for all but the last of three passes."""
    whole = build(torch.float32)
    sharded = shard(copy.deepcopy(whole), orig, wrap)
    for _ in range(2):
        with sharded.no_sync():
            loss(sharded, torch.float32).backward()
    loss(sharded, torch.float32).backward()
    for _ in range(3):
        loss(whole, torch.float32).backward()
    for model in (whole, sharded):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    assert_same_parameters(sharded, whole)


def checkpointed(orig: bool, wrap: str, reentrant: bool, first: str) -> None:

    kind = cw.CheckpointImpl.REENTRANT if reentrant else cw.CheckpointImpl.NO_REENTRANT
    apply = partial(
        cw.apply_activation_checkpointing,
        checkpoint_wrapper_fn=partial(cw.checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: isinstance(module, Lora),
    )
    whole = build(torch.bfloat16)
    model = copy.deepcopy(whole)
    if first == "checkpointing":
        apply(model)
    sharded = shard(model, orig, wrap)
    if first == "sharding":
        apply(sharded)
    assert_trains_as(sharded, whole, torch.bfloat16)


def offloaded(orig: bool) -> None:
    """CPU offload, with stand-ins for what it asks of an accelerator.

    Without one it mixes up gradients of plain layers, too, with ``use_orig_params``: no steps here.
    """
    pin = Tensor.pin_memory
    Tensor.pin_memory = lambda self, *_: self.clone()  # type: ignore[method-assign,assignment]
    torch.cpu.Stream.synchronize = lambda self: None  # type: ignore[attr-defined]
    try:
        whole = build(torch.bfloat16)
        offload = fsdp.CPUOffload(offload_params=True)
        sharded = shard(copy.deepcopy(whole), orig, cpu_offload=offload)
        for _ in range(2):
            value = loss(sharded, torch.bfloat16)
            value.backward()
            assert torch.equal(value, loss(whole, torch.bfloat16))
        assert_same(sharded.state_dict(), whole.state_dict())
        sharded.load_state_dict(build(torch.bfloat16, seed=5).state_dict())
        assert_same_parameters(sharded, build(torch.bfloat16, seed=5))
    finally:
        Tensor.pin_memory = pin  # type: ignore[method-assign]
        del torch.cpu.Stream.synchronize  # type: ignore[attr-defined]


def saves(kind: str, orig: bool, wrap: str, mesh: bool = False, **config: Any) -> None:
    """Save in the middle of training; load into another sharded model and into a whole one."""

    options = {"device_mesh": init_device_mesh("cpu", (dist.get_world_size(),))} if mesh else {}
    whole = build(torch.bfloat16)
    sharded = shard(copy.deepcopy(whole), orig, wrap, **options)
    other = shard(build(torch.bfloat16, seed=5), orig, wrap, **options)
    assert train(sharded, torch.bfloat16) == train(whole, torch.bfloat16)
    train(other, torch.bfloat16)
    form = fsdp.StateDictType[f"{kind}_STATE_DICT"]
    settings = fsdp.FullStateDictConfig(**config) if config else None
    with sharded.state_dict_type(sharded, form, settings):
        saved = sharded.state_dict()
    want = whole.state_dict()
    if config.get("rank0_only"):
        box = [saved]
        dist.broadcast_object_list(box)
        saved = box[0]
    if kind == "FULL":
        assert_same(saved, want)
        fresh = build(torch.bfloat16, seed=7)
        fresh.load_state_dict(saved)
        assert_same(fresh.state_dict(), want)
    with other.state_dict_type(other, form):
        other.load_state_dict(saved)
    assert_same_parameters(other, whole)
    assert_same(other.state_dict(), want)
    assert torch.equal(loss(other, torch.bfloat16), loss(whole, torch.bfloat16))


def checkpoints(orig: bool, wrap: str, full: bool) -> None:
    """torch.distributed.checkpoint's get_model_state_dict and set_model_state_dict."""

    options = dsd.StateDictOptions(full_state_dict=full)
    whole = build(torch.bfloat16)
    sharded = shard(copy.deepcopy(whole), orig, wrap)
    other = shard(build(torch.bfloat16, seed=5), orig, wrap)
    saved = dsd.get_model_state_dict(sharded, options=options)
    assert list(saved) == list(whole.state_dict())
    if full:
        assert_same(saved, whole.state_dict())
    dsd.set_model_state_dict(other, saved, options=options)
    assert_same(other.state_dict(), whole.state_dict())
    assert_trains_as(other, whole, torch.bfloat16)


def mixed_precision(orig: bool, wrap: str) -> None:
    """The dtype of the pass is that of the storage, or the layer refuses."""

    half, single = torch.bfloat16, torch.float32
    whole = build(half)
    policy = MixedPrecision(param_dtype=half, reduce_dtype=half, buffer_dtype=half)
    assert_trains_as(shard(copy.deepcopy(whole), orig, wrap, mixed_precision=policy), whole, half)
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
        for storage, cast in ((single, half), (half, single), (half, torch.float16)):
            sharded = shard(
                build(storage),
                orig,
                wrap,
                mixed_precision=MixedPrecision(param_dtype=cast),
                sharding_strategy=fsdp.ShardingStrategy[strategy],
            )
            with pytest.raises(RuntimeError, match=f"now {cast}.*quant_storage="):
                sharded(batch(storage))


def upcast(orig: bool, wrap: str) -> None:
    """What accelerate does to flat parameters with a gradient under mixed precision."""

    policy = MixedPrecision(param_dtype=torch.bfloat16)
    sharded = shard(build(torch.bfloat16), orig, wrap, mixed_precision=policy)
    units = [unit for unit in sharded.fsdp_modules(sharded) if unit._has_params]
    for unit in units:
        unit._handle._orig_param_dtype = torch.float32
        unit._flat_param.data = unit._flat_param.data.float()
    with pytest.raises(RuntimeError, match=r"casts them to torch\.bfloat16"):
        sharded(batch(torch.bfloat16))


def integers(make: Callable[[], Any], fits: bool) -> None:
    """uint8 and int8 weights cannot be flattened; they train when FSDP1 ignores them."""
    torch.manual_seed(0)
    whole = nn.Sequential(*(Lora(make(), torch.float32) for _ in range(2))).to("cpu")
    if not fits:
        with pytest.raises(ValueError, match=r"Cannot flatten integer dtype tensors|uniform dtype"):
            shard(copy.deepcopy(whole), True, "blocks")
    model = copy.deepcopy(whole)
    ignored = [p for p in model.parameters() if not p.is_floating_point()]
    assert bool(ignored) != fits
    sharded = shard(model, True, "blocks", ignored_states=ignored)
    assert_trains_as(sharded, whole, torch.float32)
    sharded.load_state_dict(whole.state_dict())
    assert torch.equal(loss(sharded, torch.float32), loss(whole, torch.float32))


def folder_of(form: str, world: int, folder: str) -> str:
    return str(pathlib.Path(folder) / f"{form}-{world}")


def writes(form: str, folder: str) -> None:
    """A checkpoint for other world sizes."""

    model = build(torch.bfloat16, seed=11)
    sharded = shard(model, form == "orig", "layers")
    path = folder_of(form, dist.get_world_size(), folder)
    dcp.save(dsd.get_model_state_dict(sharded), checkpoint_id=path)


def reads(form: str, saved_by: int, folder: str) -> None:

    sharded = shard(build(torch.bfloat16, seed=3), form == "orig", "layers")
    found = dsd.get_model_state_dict(sharded)
    dcp.load(found, checkpoint_id=folder_of(form, saved_by, folder))
    dsd.set_model_state_dict(sharded, found)
    assert_same(sharded.state_dict(), build(torch.bfloat16, seed=11).state_dict())


def cases(world: int, folder: str) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}

    def add(function: Callable[..., None], *arguments: Any, **options: Any) -> None:
        words = [function.__name__, *map(str, arguments)]
        words += [f"{name}={value}" for name, value in options.items()]
        found[" ".join(words)] = partial(function, *arguments, **options)

    # What does not depend on the layout of the flat parameters runs on two ranks only.
    few = world == 2
    layouts = [(True, wrap) for wrap in WRAPS if few or wrap == "root"] + [(False, "layers")]
    for orig, wrap in layouts:
        for storage in ("bfloat16", "float32"):
            add(trains, storage, orig, wrap)
        add(saves, "FULL", orig, wrap)
        add(saves, "SHARDED", orig, wrap)
        add(checkpoints, orig, wrap, full=False)
        if few:
            add(checkpoints, orig, wrap, full=True)
            add(mixed_precision, orig, wrap)
            add(upcast, orig, wrap)
            add(accumulates, orig, wrap)
            for strategy in ("SHARD_GRAD_OP", "NO_SHARD"):
                add(trains, "bfloat16", orig, wrap, sharding_strategy=strategy)
    for orig in (True, False):
        add(trains_routed, orig, "layers")
        add(own_batches, orig)
        if not few:
            add(hybrid, orig, "HYBRID_SHARD")
            add(hybrid, orig, "_HYBRID_SHARD_ZERO2")
            continue
        add(trains, "bfloat16", orig, "layers", nested=False)
        add(trains, "bfloat16", orig, "layers", limit_all_gathers=False, forward_prefetch=True)
        add(trains, "bfloat16", orig, "layers", backward_prefetch="BACKWARD_POST")
        add(offloaded, orig)
        add(saves, "FULL", orig, "layers", rank0_only=True, offload_to_cpu=True)
        add(saves, "SHARDED", orig, "layers", mesh=True)
        for first in ("sharding", "checkpointing"):
            add(checkpointed, orig, "layers", False, first)
            add(checkpointed, orig, "layers", True, first)
    if few:
        add(saves, "LOCAL", False, "layers")  # FSDP1 cannot load them with use_orig_params
        add(checkpointed, True, "root", False, "sharding")
        add(checkpointed, True, "blocks", True, "sharding")
        add(trains_routed, True, "root")
        int8 = partial(Linear8bitLt, 64, 64, has_fp16_weights=False)
        found["uint8"] = partial(integers, partial(Linear4bit, 64, 64, quant_type="nf4"), False)
        found["int8"] = partial(integers, int8, False)
        found["int8 trained"] = partial(integers, partial(Linear8bitLt, 64, 64), True)
    for form in ("orig", "flat"):
        found[f"writes {form}"] = partial(writes, form, folder)
        for saved_by in (w for w in WORLDS if w <= world):
            found[f"reads {form} of {saved_by}"] = partial(reads, form, saved_by, folder)
    return found


def work(rank: int, world: int, folder: str) -> dict[str, str]:
    warnings.simplefilter("ignore")  # FSDP1 warns of what is asked of it here, once a module
    results = {}
    for name, run in cases(world, folder).items():
        try:
            run()
            results[name] = "ok"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("fsdp1")


@pytest.fixture(scope="module")
def results(checkpoint_folder: pathlib.Path) -> dict[int, list[dict[str, str]]]:
    return {w: ranks.run(work, w, folder=str(checkpoint_folder)) for w in WORLDS}


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in WORLDS for name in cases(world, "")]
)
def test_case(results, world, name):
    assert [rank[name] for rank in results[world]] == ["ok"] * world


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("form", ["orig", "flat"])
def test_checkpoints_load_without_ranks(results, checkpoint_folder, form, world):

    assert results[world][0][f"writes {form}"] == "ok"
    model = build(torch.bfloat16, seed=3)
    found = model.state_dict()
    dcp.load(found, checkpoint_id=folder_of(form, world, str(checkpoint_folder)))
    model.load_state_dict(found)
    assert_same(model.state_dict(), build(torch.bfloat16, seed=11).state_dict())
