"""Checkpoints that are whole or not there, on torch.distributed.checkpoint.

A save works in ``step-00000010.<token>.partial``: all ranks write their files and wait until they
are on the disk, rank 0 adds the manifest (:mod:`._manifest`) and renames the folder to
``step-00000010``, which is one step of the file system (:mod:`._folder`). Killing any rank at any
moment leaves a folder that ends in ``.partial``, which nothing here reads. Loading checks all that
it can before it changes anything, and all ranks raise the same error.
"""

from __future__ import annotations

import io
import operator
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .._load import native
from . import _faults, _fit, _folder, _manifest, _state, _storage
from ._manifest import CheckpointError
from ._ranks import Ranks


class Restored(NamedTuple):
    """What :func:`load_checkpoint` has loaded."""

    step: int
    extra: Any
    path: Path


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
            Broken ones do not count: those that lack a file, or whose sizes are not the saved ones.
        trainable_only: save only the parameters that require a gradient, such as an adapter.
            Buffers and frozen parameters are left out.
        random_state: save each rank's random state: torch, Python, numpy, the current GPU.
        overwrite: replace a whole checkpoint of the same step. A kill in the moment between the two
            renames loses that one.
        process_group: the ranks that save together; None means all.

    Raises:
        FileExistsError: there is a checkpoint of this step, and ``overwrite`` is False.
        ValueError: ``step`` or ``keep`` is no whole number or out of range, or ``extra`` is nothing
            for JSON, or the ranks disagree. Nothing has been written then.
        CheckpointError: a rank could not write; the text says which one and why.
    """
    ranks = Ranks(process_group)

    def settings() -> dict[str, Any]:
        return {
            "step": _whole("step", step, 0),
            "keep": None if keep is None else _whole("keep", keep, 1),
            "optimizer": "none" if optimizer is None else "one",
            "trainable_only": trainable_only,
            "random_state": random_state,
        }

    agreed = ranks.agree(settings)
    step, keep = agreed["step"], agreed["keep"]
    path = _folder.final(Path(os.path.abspath(folder)), step)

    def begin() -> tuple[str, Any]:
        try:
            plain = _manifest.plain(extra)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"extra must be something that JSON can hold: {error}") from None
        _folder.check_free(path, overwrite=overwrite)
        return str(_folder.begin(path)), plain

    with _faults.doing(f"saving {path.name}"):
        begun, extra = ranks.first(begin)
        partial = Path(begun)
        try:
            _fill(ranks, partial, model, optimizer, step, extra, trainable_only, random_state)
            ranks.first(lambda: _folder.publish(partial, path, overwrite=overwrite))
        except BaseException:
            if ranks.rank == 0:
                _folder.give_up(partial)
            raise
        if keep is not None:
            ranks.first(lambda: _folder.thin(path, keep))
    return path


def _whole(name: str, value: Any, least: int) -> int:
    """``value`` as an int, be it numpy's or a tensor's; ValueError unless it is ``least`` or more.

    It is the argument ``name`` of :func:`save_checkpoint`.
    """
    none = ", or None" if name == "keep" else ""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} must be a whole number, {least} or more{none}, got {value!r}"
        ) from None
    if number < least:
        raise ValueError(f"{name} must be {least} or more{none}, got {number}")
    return number


def _fill(
    ranks: Ranks,
    partial: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    extra: Any,
    trainable_only: bool,
    random_state: bool,
) -> None:
    """Write everything into ``partial``, the manifest last."""
    from torch.distributed.checkpoint import save

    model = _state.bare(model)
    stepped = optimizer is not None and any(ranks.together(lambda: len(optimizer.state)))
    whole = ranks.each(lambda: _state.model_state(model))
    weights = ranks.first(lambda: _manifest.quantized(whole))
    state = {"model": _state.trainable(model, whole) if trainable_only else whole}
    groups: list[list[str]] = []
    if optimizer is not None and stepped:
        state["optimizer"] = ranks.each(lambda: _state.optimizer_state(model, optimizer))
        groups = _state.groups_of(state["optimizer"])
    with _storage.one_sentence(partial, "write"):
        metadata = save(
            state,
            storage_writer=_storage.writer(partial, ranks.rank),
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
        "groups": groups,
        "trainable_only": trainable_only,
        "random_state": random_state,
        "extra": extra,
        "weights": weights,
        "versions": _manifest.versions(native.version()),
        "files": files,
    }

    def finish() -> None:
        with _storage.writing(partial / _manifest.MANIFEST, ranks.rank):
            _manifest.write(partial, manifest)

    ranks.first(finish)


def _account(ranks: Ranks, partial: Path, metadata: Any, random_state: bool) -> dict[str, Any]:
    """Write this rank's random state, and say what is in all files that this rank has written."""
    pieces: dict[str, list[tuple[str, int, int]]] = {}
    for index, place in metadata.storage_data.items():
        pieces.setdefault(place.relative_path, []).append((index.fqn, place.offset, place.length))
    mine = [name for name in pieces if name.startswith(f"__{ranks.rank}_")]  # torch's names
    if ranks.rank == 0:
        named = tuple(f"__{rank}_" for rank in range(ranks.world))
        mine += [name for name in pieces if not name.startswith(named)] + [".metadata"]
    if random_state:
        path = partial / _state.random_name(ranks.rank)
        data = io.BytesIO()  # torch.save to a path does not say that a disk is full
        torch.save(_state.random_state(), data)
        with _storage.writing(path, ranks.rank):
            path.write_bytes(data.getbuffer())
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
            that had not stepped its state is emptied. A parameter that no gradient had reached has
            no state afterwards, as in the run that saved. Gradients stay as they are.
        checksums: read all files and compare their bytes, each file on one rank (about 1 GB/s a
            core). False compares sizes only.
        random_state: restore each rank's random state, if the number of ranks is the saved one.
        required: False returns None if ``folder`` has no checkpoint.
        process_group: the ranks that load together; None means all.

    Raises:
        FileNotFoundError: there is no checkpoint, and ``required`` is True.
        CheckpointError: one sentence with the file and the tensor that will not do.
    """
    from torch.distributed.checkpoint import FileSystemReader

    ranks, model = Ranks(process_group), _state.bare(model)
    found = ranks.first(lambda: _find(Path(os.path.abspath(folder)), required))
    if found is None:
        return None
    path = Path(found)
    with _faults.doing(f"loading {path.name}"):
        manifest = ranks.each(lambda: _read(ranks, path, optimizer, checksums))
        whole = ranks.each(lambda: _state.model_state(model))
        state = {"model": _state.trainable(model, whole) if manifest["trainable_only"] else whole}
        reader = FileSystemReader(path)
        metadata = ranks.each(reader.read_metadata)

        def check() -> None:
            _manifest.check_quantized(path, manifest, _manifest.quantized(whole), list(whole))
            _fit.fit_texts(state["model"], metadata)
            _fit.check(path, manifest, metadata, {"model": state["model"]}, "model")

        ranks.each(check)
        if optimizer is not None and manifest["optimizer"] == "full":
            with _state.room(ranks, optimizer):
                state["optimizer"] = ranks.each(lambda: _state.optimizer_state(model, optimizer))
                ranks.each(lambda: _fit.fit_optimizer(path, manifest, metadata, state["optimizer"]))
                _take(ranks, reader, state, manifest, model, optimizer)
        else:
            _take(ranks, reader, state, manifest, model, optimizer)

        def put_random_state() -> None:
            if random_state and manifest["random_state"] and manifest["world_size"] == ranks.world:
                file = path / _state.random_name(ranks.rank)
                _state.set_random_state(torch.load(file, weights_only=True))

        ranks.each(put_random_state)
    return Restored(manifest["step"], manifest["extra"], path)


def _take(
    ranks: Ranks,
    reader: Any,
    state: dict[str, Any],
    manifest: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Read ``state`` from the files, and put it into model and optimizer."""
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    with _storage.one_sentence(Path(reader.path), "read"):
        load(state, storage_reader=reader, process_group=ranks.group, no_dist=ranks.alone)

    def put() -> None:
        options = StateDictOptions(strict=not manifest["trainable_only"])
        set_model_state_dict(model, state["model"], options=options)
        if optimizer is not None and "optimizer" in state:
            # Not strict: parameters that no gradient had reached have no state.
            options = StateDictOptions(strict=False)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        elif optimizer is not None:
            optimizer.state.clear()

    ranks.each(put)


def _find(folder: Path, required: bool) -> str | None:
    if folder.name.endswith(".partial") or (folder / _manifest.MANIFEST).exists():
        return str(folder)
    if _folder.is_one(folder):  # it lacks the manifest, which is said when that is read
        return str(folder)
    found = _folder.latest_checkpoint(folder)
    if found is None and required:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    return None if found is None else str(found)


def _read(
    ranks: Ranks, path: Path, optimizer: torch.optim.Optimizer | None, checksums: bool
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
