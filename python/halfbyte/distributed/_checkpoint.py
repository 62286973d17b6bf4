"""Checkpoints that are whole or not there, on torch.distributed.checkpoint.

A save works in ``step-00000010.<token>.partial``: all ranks write their files and wait until they
are on the disk, rank 0 adds the manifest (:mod:`._manifest`) and renames the folder to
``step-00000010``, which is one step of the file system (:mod:`._folder`). Killing any rank at any
moment leaves a folder that ends in ``.partial``, which nothing here reads. Loading checks all that
it can before it changes anything, and all ranks raise the same error.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._load import native
from . import _faults, _folder, _manifest
from ._manifest import CheckpointError

T = TypeVar("T")

_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (CheckpointError, FileExistsError, FileNotFoundError, ValueError)
}
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class Restored(NamedTuple):
    """What :func:`load_checkpoint` has loaded."""

    step: int
    extra: Any
    path: Path


class _Ranks:
    """The ranks that save or load together: those of ``group``, or this process alone."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self.group = group
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.world = 1 if self.alone else dist.get_world_size(group)

    def together(self, work: Callable[[], T]) -> list[T]:
        """Call ``work`` on every rank; what each returned, or the same error on all of them."""
        value, failed, mine = None, None, None
        try:
            value = work()
        except Exception as error:
            mine, failed = error, (type(error).__name__, str(error))
        found: list[Any] = [(value, failed)]
        if not self.alone:
            import torch.distributed as dist

            found = [None] * self.world
            dist.all_gather_object(found, (value, failed), group=self.group)
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                kind, text = failed
                if kind not in _ERRORS:
                    kind, text = "CheckpointError", f"rank {rank}: {kind}: {text}"
                raise _ERRORS[kind](text) from mine
        return [value for value, _ in found]

    def each(self, work: Callable[[], T]) -> T:
        """Call ``work`` on every rank; what it returned here, or the same error on all ranks."""
        kept: list[T] = []
        self.together(lambda: kept.append(work()))
        return kept[0]

    def first(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0; what it returned, or the same error on all ranks."""
        values: list[Any] = self.together(lambda: work() if self.rank == 0 else None)
        return values[0]


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    extra: Any = None,
    keep: int | None = None,
    trainable_only: bool = False,
    random_state: bool = True,
    overwrite: bool = False,
    process_group: Any = None,
) -> Path:
    """Save the checkpoint ``folder/step-<step>`` and return its path; all ranks call this.

    For FSDP1, FSDP2, DDP and plain models, with and without a process group. ``folder`` must be on
    a file system that all ranks share. When this has returned on any rank, the checkpoint is whole
    and on the disk.

    Args:
        folder: where the checkpoints of this run are; made if missing.
        model: quantized weights are saved packed, each rank's shard by itself.
        optimizer: saved as well. Of one that has not stepped yet only that is noted.
        step: number of steps done, 0 or more.
        extra: anything that JSON can hold, a learning rate schedule's state for example; rank 0's
            is saved. Tuples come back as lists, keys of dictionaries as strings.
        keep: how many checkpoints to leave in ``folder``, the new one among them; None means all.
        trainable_only: save only the parameters that require a gradient, such as an adapter.
            Buffers and frozen parameters are left out.
        random_state: save each rank's random state: torch, Python, numpy, the current GPU.
        overwrite: replace a checkpoint of the same step. A kill in the moment between the two
            renames loses that one.
        process_group: the ranks that save together; None means all.

    Raises:
        FileExistsError: there is a checkpoint of this step, and ``overwrite`` is False.
        ValueError: ``step`` or ``keep`` is out of range, or ``extra`` is nothing for JSON.
        CheckpointError: a rank could not write; the text says which one and why.
    """
    ranks = _Ranks(process_group)
    path = _folder.final(Path(os.path.abspath(folder)), step)

    def begin() -> str:
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}")
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be 1 or more, or None, got {keep}")
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra must be something that JSON can hold: {error}") from None
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} is there already; overwrite=True replaces it")
        return str(_folder.begin(path))

    with _faults.doing(f"saving {path.name}"):
        partial = Path(ranks.first(begin))
        try:
            _fill(ranks, partial, model, optimizer, step, extra, trainable_only, random_state)
            ranks.first(lambda: _folder.publish(partial, path))
        except BaseException:
            if ranks.rank == 0:
                _folder.give_up(partial)
            raise
        if keep is not None:
            ranks.first(lambda: _folder.thin(path, keep))
    return path


def _fill(
    ranks: _Ranks,
    partial: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    extra: Any,
    trainable_only: bool,
    random_state: bool,
) -> None:
    """Write everything into ``partial``, the manifest last."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    model = _bare(model)
    stepped = optimizer is not None and any(ranks.together(lambda: len(optimizer.state)))
    whole = ranks.each(lambda: _model_state(model))
    weights = ranks.first(lambda: _manifest.quantized(whole))
    state = {"model": _trainable(model, whole) if trainable_only else whole}
    if optimizer is not None and stepped:
        state["optimizer"] = ranks.each(lambda: _optimizer_state(model, optimizer))
    with _one_sentence(partial, "write"):
        metadata = save(
            state,
            storage_writer=FileSystemWriter(partial, sync_files=True),
            process_group=ranks.group,
            no_dist=ranks.alone,
        )
    files: dict[str, Any] = {}
    for records in ranks.together(lambda: _account(ranks, partial, metadata, random_state)):
        files.update(records)
    manifest = {
        "format": _manifest.FORMAT,
        "step": step,
        "world_size": ranks.world,
        "optimizer": "none" if optimizer is None else "full" if stepped else "fresh",
        "trainable_only": trainable_only,
        "random_state": random_state,
        "extra": extra,
        "weights": weights,
        "versions": _manifest.versions(native.version()),
        "files": files,
    }
    ranks.first(lambda: _manifest.write(partial, manifest))


def _account(ranks: _Ranks, partial: Path, metadata: Any, random_state: bool) -> dict[str, Any]:
    """Write this rank's random state, and say what is in all files that this rank has written."""
    pieces: dict[str, list[tuple[str, int, int]]] = {}
    for index, place in metadata.storage_data.items():
        pieces.setdefault(place.relative_path, []).append((index.fqn, place.offset, place.length))
    mine = [name for name in pieces if name.startswith(f"__{ranks.rank}_")]  # torch's names
    if ranks.rank == 0:
        named = tuple(f"__{rank}_" for rank in range(ranks.world))
        mine += [name for name in pieces if not name.startswith(named)] + [".metadata"]
    if random_state:
        path = partial / _random_name(ranks.rank)
        torch.save(_random_state(), path)
        _manifest.sync(path)
        mine.append(path.name)
    return {name: _manifest.describe(partial / name, pieces.get(name, [])) for name in mine}


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    checksums: bool = True,
    random_state: bool = True,
    required: bool = True,
    process_group: Any = None,
) -> Restored | None:
    """Load a checkpoint into ``model`` and ``optimizer``, in place; all ranks call this.

    The number of ranks may differ from the one that saved, and so may the engine (FSDP1, FSDP2,
    DDP, none). Everything is checked first: files, names, shapes, dtypes, and how each weight is
    quantized. If a check fails, nothing has changed and all ranks raise the same error.

    Args:
        folder: a checkpoint, or a folder of checkpoints, of which :func:`latest_checkpoint` is
            taken.
        model: as it was built for training. Of a checkpoint with ``trainable_only`` the parameters
            that require a gradient are loaded; frozen ones stay as they are.
        optimizer: None leaves out what the checkpoint has of it. For a checkpoint of an optimizer
            that had not stepped its state is emptied.
        checksums: read all files and compare their bytes, each file on one rank (about 1 GB/s a
            core). False compares sizes only.
        random_state: restore each rank's random state, if the number of ranks is the saved one.
        required: False returns None if ``folder`` has no checkpoint.
        process_group: the ranks that load together; None means all.

    Raises:
        FileNotFoundError: there is no checkpoint, and ``required`` is True.
        CheckpointError: one sentence with the file and the tensor that will not do.
    """
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    ranks, model = _Ranks(process_group), _bare(model)
    found = ranks.first(lambda: _find(Path(os.path.abspath(folder)), required))
    if found is None:
        return None
    path = Path(found)
    with _faults.doing(f"loading {path.name}"):
        manifest = ranks.each(lambda: _read(ranks, path, optimizer, checksums))
        whole = ranks.each(lambda: _model_state(model))
        state = {"model": _trainable(model, whole) if manifest["trainable_only"] else whole}
        reader = FileSystemReader(path)
        metadata = ranks.each(reader.read_metadata)

        def check() -> None:
            _manifest.check_quantized(path, manifest, _manifest.quantized(whole), list(whole))
            _fit_texts(state["model"], metadata)
            _check(path, manifest, metadata, {"model": state["model"]}, "model")

        ranks.each(check)
        fresh = optimizer is not None and not optimizer.state
        try:
            if optimizer is not None and manifest["optimizer"] == "full":
                there = ranks.each(lambda: _optimizer_state(model, optimizer))

                def check_optimizer() -> None:
                    _fit_forms(there["state"], metadata)
                    _check(path, manifest, metadata, {"optimizer": there}, "optimizer")

                ranks.each(check_optimizer)
                state["optimizer"] = there
        except CheckpointError:
            if fresh and optimizer is not None:  # _optimizer_state has made empty states
                optimizer.state.clear()
            raise
        with _one_sentence(path, "read"):
            load(state, storage_reader=reader, process_group=ranks.group, no_dist=ranks.alone)

        def put() -> None:
            options = StateDictOptions(strict=not manifest["trainable_only"])
            set_model_state_dict(model, state["model"], options=options)
            if optimizer is not None and "optimizer" in state:
                set_optimizer_state_dict(model, optimizer, state["optimizer"])
            elif optimizer is not None:
                optimizer.state.clear()
            if random_state and manifest["random_state"] and manifest["world_size"] == ranks.world:
                saved = torch.load(path / _random_name(ranks.rank), weights_only=True)
                _set_random_state(saved)

        ranks.each(put)
    return Restored(manifest["step"], manifest["extra"], path)


def _find(folder: Path, required: bool) -> str | None:
    if folder.name.endswith(".partial") or (folder / _manifest.MANIFEST).exists():
        return str(folder)
    found = _folder.latest_checkpoint(folder)
    if found is None and required:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    return None if found is None else str(found)


def _read(
    ranks: _Ranks, path: Path, optimizer: torch.optim.Optimizer | None, checksums: bool
) -> dict[str, Any]:
    """The manifest, after the files and what the checkpoint is about have been checked."""
    manifest = _manifest.read(path)
    share = (ranks.rank, ranks.world)
    _manifest.check_files(path, manifest["files"], checksums=checksums, share=share)
    if optimizer is not None and manifest["optimizer"] == "none":
        raise CheckpointError(
            f"{path / _manifest.MANIFEST}: the checkpoint was saved without an optimizer; "
            "load it with optimizer=None"
        )
    return manifest


def _check(path: Path, manifest: dict[str, Any], metadata: Any, state: Any, root: str) -> None:
    """CheckpointError unless the checkpoint has what ``state`` has, in the same shapes."""
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    planner = DefaultLoadPlanner()  # which gives everything the name that it has in the files
    planner.set_up_planner(state, metadata, False)
    wanted, saved = planner.state_dict, metadata.state_dict_metadata
    for name in sorted({*wanted, *(name for name in saved if name.startswith(root + "."))}):
        where, what = path / _manifest.home(manifest, name), f"{root} {name.partition('.')[2]}"
        if name not in saved:
            raise CheckpointError(f"{path / '.metadata'}: the checkpoint lacks {what}")
        if name not in wanted:
            raise CheckpointError(f"{where}: the checkpoint has {what}, which is not there to load")
        there, here = saved[name], wanted[name]
        if isinstance(there, TensorStorageMetadata) != isinstance(here, Tensor):
            kinds = ("a tensor", "a value") if isinstance(here, Tensor) else ("a value", "a tensor")
            raise CheckpointError(f"{where}: {what} is {kinds[1]}, {kinds[0]} is wanted")
        if not isinstance(here, Tensor):
            continue
        old = (list(there.size), there.properties.dtype)
        new = (list(here.size()), here.dtype)
        if old != new:
            raise CheckpointError(
                f"{where}: {what} was saved as {old[1]} of shape {old[0]}, "
                f"{new[1]} of shape {new[0]} is wanted"
            )


def _fit_texts(state: dict[str, Any], metadata: Any) -> None:
    """Make room for the JSON of each 4-bit weight; its length depends on the numbers in it."""
    for key, value in state.items():
        saved = metadata.state_dict_metadata.get(f"model.{key}")
        if _manifest.is_text(key) and saved is not None and value.shape != saved.size:
            state[key] = value.new_empty(tuple(saved.size))


def _fit_forms(states: dict[str, Any], metadata: Any) -> None:
    """Make room for optimizer states as they were saved, where that is in another form.

    8-bit states are codes or, of sharded parameters whose rows are no whole blocks, values; FSDP1
    has a form of its own. Our optimizers load each of them, as whole tensors, for any parameter.
    States of another precision are left alone, to be refused.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    saved: dict[str, list[str]] = {}
    for name, path in metadata.planner_data.items():
        if path[:2] == ("optimizer", "state") and len(path) > 3:
            saved.setdefault(path[2], []).append(name)
    for parameter, state in states.items():
        here = {"/".join(path) for path in _paths(state)}
        names = saved.get(parameter, [])
        there = {"/".join(metadata.planner_data[name][3:]) for name in names}
        if here == there or _coded(here) is None or _coded(there) not in (_coded(here), "any"):
            continue
        state.clear()
        for name in names:
            entry, value = metadata.state_dict_metadata[name], None
            if isinstance(entry, TensorStorageMetadata):
                value = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
            inner, path = state, metadata.planner_data[name][3:]
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = value


def _paths(state: dict[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _paths(value, *above, key)
        else:
            yield (*above, key)


def _coded(names: set[str]) -> str | None:
    """Which precision the states of a parameter have, by their names; None if not one of ours."""
    last = {name.rpartition("/")[2] for name in names}
    if last & {"values1", "values2"}:
        return "any"
    if last & {"absmax1", "absmax2", "decoded1", "decoded2"}:
        return "8-bit"
    return None


@contextlib.contextmanager
def _one_sentence(path: Path, verb: str) -> Iterator[None]:
    """Turn what torch raises on all ranks when one has failed into a CheckpointError."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():  # that there is no process group, and that pickles are read
            warnings.filterwarnings("ignore", message="torch.distributed is")
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise CheckpointError(
            f"rank {rank} could not {verb} {path}: {type(cause).__name__}: {cause}"
        ) from cause


def _bare(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile, so that names are those of the plain model."""
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _model_state(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model)


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer)


def _trainable(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
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


def _random_name(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _random_state() -> dict[str, Any]:
    """The random state of this process, in types that torch.load(weights_only=True) takes."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(kind), torch.from_numpy(keys.astype("int64")), *map(float, rest))
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "numpy" in state and "numpy" in sys.modules:
        kind, keys, position, has_gauss, gauss = state["numpy"]
        words = keys.numpy().astype("uint32")
        sys.modules["numpy"].random.set_state((kind, words, int(position), int(has_gauss), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
