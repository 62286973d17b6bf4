"""What a checkpoint folder says about itself, and whether it still tells the truth.

A checkpoint is a folder ``step-00000010`` with the files of torch.distributed.checkpoint, one file
of random state a rank, and ``halfbyte.json``, the manifest. The manifest is written last. For each
file it has the size and, piece by piece, which tensor lies where and its CRC-32; one for itself as
well.
"""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MANIFEST = "halfbyte.json"
FORMAT = 1
_CHUNK = 1 << 22  # bytes read at a time
_STATE = ".quant_state.bitsandbytes__"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or could not be written; the text names file and tensor."""


def plain(value: Any) -> Any:
    """``value`` as it comes back from JSON.

    Raises:
        TypeError, ValueError: JSON does not hold it, or two keys of a dictionary are the same text.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"two keys of a dictionary are the same text: {sorted(found)}")
        return found

    return json.loads(json.dumps(value), object_pairs_hook=distinct)


def _checksum(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for that
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into ``folder`` and wait until it is on the disk."""
    path, manifest = folder / MANIFEST, plain(manifest)  # the checksum is of what will be read
    path.write_text(json.dumps({"crc32": _checksum(manifest), "manifest": manifest}))
    sync(path)
    sync(folder)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``.

    Raises:
        CheckpointError: there is none, it is damaged, or a later halfbyte wrote it.
    """
    path = folder / MANIFEST
    if folder.name.endswith(".partial"):
        raise CheckpointError(f"{folder} was never finished: it is what an interrupted save left")
    try:
        both = json.loads(path.read_text())
        manifest, found = both["manifest"], both["crc32"]
        whole = found == _checksum(manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {folder} is no whole checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not whole:
        raise CheckpointError(f"{path} is damaged: it has another checksum than when it was saved")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this halfbyte reads format {FORMAT}"
        )
    return manifest


def versions(package: str) -> dict[str, str]:
    """Versions of what wrote a checkpoint; ``package`` is this one's."""
    return {"halfbyte": package, "torch": torch.__version__, "python": platform.python_version()}


def _crc(stream: Any, length: int) -> int:
    """CRC-32 of the next ``length`` bytes; of fewer where the file ends."""
    value = 0
    while length > 0:
        data = stream.read(min(length, _CHUNK))
        if not data:
            break
        value, length = zlib.crc32(data, value), length - len(data)
    return value


def describe(path: Path, tensors: Iterable[tuple[str, int, int]]) -> dict[str, Any]:
    """What the manifest says of a file.

    tensors: ``(name, start, length)`` in bytes. What lies between them becomes a piece without a
    name, so that every byte has a checksum.
    """
    size, at = path.stat().st_size, 0
    covered: list[tuple[str, int, int]] = []
    for name, start, length in sorted(tensors, key=lambda piece: piece[1]):
        if start > at:
            covered.append(("", at, start - at))
        covered.append((name, start, length))
        at = start + length
    if at < size:
        covered.append(("", at, size - at))
    with path.open("rb") as stream:
        return {
            "bytes": size,
            "pieces": [
                [name, start, length, _crc(stream, length)] for name, start, length in covered
            ],
        }


def _holds(record: Mapping[str, Any]) -> str:
    names = [piece[0] for piece in record["pieces"] if piece[0]]
    names.sort(key=lambda name: not name.startswith("model."))
    if not names:
        return "part of the checkpoint"
    more = len(names) - 1
    return names[0] + (f" and {more} more tensor{'s' * (more > 1)}" if more else "")


def check_size(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """CheckpointError if the file is missing or has another size than the manifest says."""
    path = folder / name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: it holds {_holds(record)}") from None
    if size == record["bytes"]:
        return
    if size > record["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes instead of {record['bytes']}")
    cut = next((piece[0] for piece in record["pieces"] if piece[1] + piece[2] > size), "")
    within = f", cut off within {cut}" if cut else ""
    raise CheckpointError(f"{path} is truncated: it has {size} of {record['bytes']} bytes{within}")


def check_sizes(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``; CheckpointError if a file is missing or has another size."""
    manifest = read(folder)
    for name, record in manifest["files"].items():
        check_size(folder, name, record)
    return manifest


def check_bytes(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """CheckpointError if a piece of the file has another CRC-32 than the manifest says."""
    path = folder / name
    with path.open("rb") as stream:
        for tensor, start, length, expected in record["pieces"]:
            if _crc(stream, length) != expected:
                raise CheckpointError(
                    f"{path} is damaged: bytes {start} to {start + length}"
                    + (f", which hold {tensor}," if tensor else "")
                    + " have another checksum than when they were saved"
                )


def check_files(
    folder: Path, files: Mapping[str, Any], *, checksums: bool, share: tuple[int, int] = (0, 1)
) -> None:
    """Check the sizes of all files and the bytes of this rank's share of them.

    share: ``(rank, world)``; the files are dealt to the ranks, the largest first.
    """
    for name, record in files.items():
        check_size(folder, name, record)
    if checksums:
        rank, world = share
        for name in sorted(files, key=lambda name: -files[name]["bytes"])[rank::world]:
            check_bytes(folder, name, files[name])


def home(manifest: Mapping[str, Any], key: str) -> str:
    """The file that holds a tensor, or the manifest's own name when none does."""
    for name, record in manifest["files"].items():
        if any(piece[0] == key for piece in record["pieces"]):
            return name
    return MANIFEST


def quantized(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How each quantized weight of a model's state dict is quantized, by its name.

    Whole or sharded; the tensors may be on any device.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        weight, mark, _ = key.partition(_STATE)
        if mark and weight in state:
            text = json.loads(bytes(value.cpu().tolist()))
            found[weight] = {
                "quant_type": text["quant_type"],
                "blocksize": text["blocksize"],
                "nested_blocksize": text.get("nested_blocksize"),
                "shape": list(text["shape"]),
                "storage": str(state[weight].dtype).removeprefix("torch."),
            }
        elif key.endswith("weight_format") and key.removesuffix("_format") in state:
            weight = key.removesuffix("_format")
            found[weight] = {
                "quant_type": "int8",
                "blocksize": None,
                "nested_blocksize": None,
                "shape": list(state[weight].shape),
                "storage": str(state[weight].dtype).removeprefix("torch."),
            }
    return found


def is_text(key: str) -> bool:
    """Whether ``key`` names the JSON of a 4-bit weight, whose length may vary."""
    return _STATE in key


def _words(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "a weight that is not quantized"
    text = f"{facts['quant_type']} of shape {facts['shape']}"
    if facts["blocksize"] is not None:
        text += f" in blocks of {facts['blocksize']}"
        nested = facts["nested_blocksize"]
        text += f", scales quantized in blocks of {nested}" if nested else ", scales as float32"
        text += f", stored as {facts['storage']}"
    return text


def check_quantized(
    folder: Path,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
) -> None:
    """CheckpointError if a weight of the model is quantized in another way than the saved one.

    weights: :func:`quantized` of the model; names: all keys of its state dict.
    """
    known, saved = set(names), manifest["weights"]
    for name in sorted({*saved, *weights}):
        there, here = saved.get(name), weights.get(name)
        if there == here or (here is None and name not in known):
            continue  # a name that the model lacks is reported as such
        if there is None and f"model.{name}" not in _all_names(manifest):
            continue
        raise CheckpointError(
            f"{folder / home(manifest, 'model.' + name)}: {name} was saved as {_words(there)}; "
            f"the model has {_words(here)}"
        )


def _all_names(manifest: Mapping[str, Any]) -> set[str]:
    return {piece[0] for record in manifest["files"].values() for piece in record["pieces"]}
