"""A model on disk (safetensors), of which each rank reads what it needs.

Files are mapped, not read: :meth:`ModelFiles.tensor` gives a tensor whose pages come from the file
when they are touched, and the ``read`` methods copy a part out of it.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import QuantState
from ..nn import _packed

__all__ = ["ModelFiles"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class ModelFiles:
    """The tensors of a model folder or file, by name. Nothing is read before it is asked for.

    Args:
        path: a folder that holds ``model.safetensors.index.json`` and the files it names, or
            ``model.safetensors``, or one other ``.safetensors`` file; or one of these files.

    Attributes:
        path: what was opened.
        bytes_read: how many bytes the ``read`` methods have copied.

    Raises:
        FileNotFoundError: there is no such folder or file, or one that the index names is missing.
        ValueError: a file is truncated or broken, or lacks a tensor that the index places in it.
        ImportError: the package safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.bytes_read = 0
        self._places = _places(self.path)
        self._files: dict[pathlib.Path, Any] = {}
        listed: dict[pathlib.Path, list[str]] = {}
        for name, file in self._places.items():
            listed.setdefault(file, []).append(name)
        for file, names in listed.items():
            self._files[file] = _open(file)
            held = set(self._files[file].keys())
            for name in names:
                if name not in held:
                    raise ValueError(
                        f"{file} lacks the tensor {name}, which the index places there"
                    )

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def file(self, name: str) -> pathlib.Path:
        """The file that holds the tensor ``name``; KeyError if none does."""
        try:
            return self._places[name]
        except KeyError:
            raise KeyError(f"{self.path} holds no tensor {name}") from None

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, mapped from its file: do not write to it.

        It stays valid after this object is gone. KeyError when there is none, ValueError when torch
        has no such dtype.
        """
        file = self.file(name)
        try:
            return self._files[file].get_tensor(name)
        except Exception as error:
            raise ValueError(f"{file}: tensor {name} cannot be read: {error}") from error

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor ``name``."""
        return self.tensor(name).dtype

    def shape(self, name: str) -> torch.Size:
        """The shape of the tensor ``name``."""
        return self.tensor(name).shape

    def read(self, name: str) -> Tensor:
        """A copy of the tensor ``name``, in memory."""
        return self.copy(self.tensor(name))

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """A copy, 1-D, of elements ``start`` to ``stop`` of the flattened tensor ``name``.

        ValueError when they are not all there.
        """
        flat = self.tensor(name).reshape(-1)
        return self.copy(self._part(name, flat, start, stop, "elements"))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of ``tensor[start:stop]`` along the first dimension of the tensor ``name``.

        ValueError when they are not all there.
        """
        return self.copy(self._part(name, self.tensor(name), start, stop, "rows"))

    def _part(self, name: str, whole: Tensor, start: int, stop: int, what: str) -> Tensor:
        length = whole.shape[0] if whole.dim() else 0
        if not 0 <= start <= stop <= length:
            raise ValueError(
                f"{self.file(name)}: tensor {name} has {length} {what}, asked for {start} to {stop}"
            )
        return whole[start:stop]

    def copy(self, part: Tensor) -> Tensor:
        """A copy of ``part``, a slice of a mapped tensor."""
        self.bytes_read += part.numel() * part.element_size()
        return part.clone()

    def fingerprint(self) -> int:
        """The same for all who see the same names in files of the same names and sizes."""
        sizes = {file: file.stat().st_size for file in self._files}
        listed = sorted((name, file.name, sizes[file]) for name, file in self._places.items())
        return zlib.crc32(repr(listed).encode())

    def holds_4bit(self, name: str) -> bool:
        """Whether ``name`` is a packed 4-bit weight."""
        return any(
            f"{name}.quant_state.{kind}" in self._places for kind in QuantState.valid_qs_type_keys
        )

    def holds_8bit(self, name: str) -> bool:
        """Whether ``name`` is an int8 weight with its scales beside it."""
        return scales_name(name) in self._places

    def family(self, name: str) -> list[str]:
        """The names that the 4-bit weight ``name`` consists of, its own first."""
        states = [f"quant_state.{kind}" for kind in QuantState.valid_qs_type_keys]
        parts = (*_packed.PLAIN_KEYS, *_packed.NESTED_KEYS, *states)
        return [name, *(key for part in parts if (key := f"{name}.{part}") in self._places)]

    def weight(self, name: str) -> tuple[Tensor, Any]:
        """The quantized weight ``name``, mapped: packed codes and QuantState, or int8 codes and
        scales; what ``shard_rows`` and its kin take.

        Raises:
            KeyError: there is no tensor of that name.
            ValueError: it is not quantized, or parts of it are missing or do not fit each other.
        """
        file = self.file(name)
        if self.holds_8bit(name):
            codes, scales = self.tensor(name), self.tensor(scales_name(name))
            if codes.dtype != torch.int8 or scales.shape != codes.shape[:-1]:
                raise ValueError(
                    f"{file}: {name} must be int8 with a scale for each row, got {codes.dtype} of "
                    f"shape {list(codes.shape)} and {scales_name(name)} of shape "
                    f"{list(scales.shape)}"
                )
            self._check_layout(name, file)
            return codes, scales
        if not self.holds_4bit(name):
            raise ValueError(f"{file}: {name} is not quantized, it is {self.dtype(name)}")
        family = {key: self.tensor(key) for key in self.family(name)}
        report = _packed.Report([], [], [])
        shape = _described_shape(family, name, file)
        found = _packed.read(family, name, shape, torch.device("cpu"), report, share=True)
        if found is None:
            raise ValueError(f"{file}: {'; '.join(report.errors) or report.missing}")
        return found.packed, found.state

    def _check_layout(self, name: str, file: pathlib.Path) -> None:
        """Raise ValueError unless the int8 weight ``name`` is row-major."""
        key = scales_name(name).removesuffix("SCB") + "weight_format"
        if key not in self._places:
            return
        found = self.tensor(key).tolist()
        if found != 0:
            raise ValueError(
                f"{file}: {key} must be 0 (row-major, the only layout there is for 8-bit weights), "
                f"got {found!r}"
            )


def scales_name(name: str) -> str:
    """Under which name the scales of the int8 weight ``name`` lie: ``layer.SCB`` for
    ``layer.weight``."""
    layer, dot, last = name.rpartition(".")
    return layer + dot + "SCB" if last == "weight" else name + ".SCB"


def _described_shape(family: dict[str, Tensor], name: str, file: pathlib.Path) -> Sequence[int]:
    """The shape that the JSON of a packed family gives."""
    from ..utils import unpack_tensor_to_dict

    for kind in QuantState.valid_qs_type_keys:
        key = f"{name}.quant_state.{kind}"
        if key in family:
            try:
                return tuple(unpack_tensor_to_dict(family[key])["shape"])
            except Exception as error:
                raise ValueError(f"{file}: {key} does not give a shape: {error!r}") from error
    raise AssertionError(f"{name} has no quantization state")


# ---- files ---------------------------------------------------------------------------------------


def _places(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """In which file each tensor of a model lies."""
    if path.is_dir():
        path = _main_file(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no model at {path}")
    if path.suffix == ".json":
        return _read_index(path)
    return dict.fromkeys(_open(path).keys(), path)


def _main_file(folder: pathlib.Path) -> pathlib.Path:
    """The file that says, or is, what the folder holds."""
    for name in (_INDEX, _SINGLE):
        if (folder / name).exists():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    held = f"{len(found)} .safetensors files" if found else "no .safetensors file"
    raise FileNotFoundError(f"{folder} holds neither {_INDEX} nor {_SINGLE}, but {held}")


def _read_index(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """What ``model.safetensors.index.json`` says."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        places = {name: pathlib.PurePath(file) for name, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error!r}") from error
    for name, file in places.items():
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(f"{path} places the tensor {name} outside of its folder, in {file}")
        if (path.parent / file).is_dir():
            raise ValueError(f"{path} places the tensor {name} in {str(file)!r}, which is a folder")
        if not (path.parent / file).exists():
            raise FileNotFoundError(
                f"{path.parent / file} is missing; it should hold the tensor {name}"
            )
    return {name: path.parent / file for name, file in places.items()}


def _open(path: pathlib.Path) -> Any:
    """The file as safetensors sees it: header checked, tensors mapped."""
    safetensors = _library()
    if path.is_dir():
        raise ValueError(f"{path} must be a safetensors file, and is a folder")
    try:
        return safetensors.safe_open(str(path), framework="pt", device="cpu")
    except OSError as error:
        raise type(error)(f"{path} cannot be opened: {error}") from error
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file: {_cut(path) or error}"
        ) from error


@functools.cache
def _library() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "reading safetensors files needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors


def _cut(path: pathlib.Path) -> str | None:
    """Where a truncated file ends, if its header can still be read."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                return f"its header takes {length} bytes, the file has {size}"
            header = json.loads(file.read(length))
        ends = {
            name: 8 + length + entry["data_offsets"][1]
            for name, entry in header.items()
            if name != "__metadata__"
        }
        beyond = [name for name in sorted(ends, key=lambda name: ends[name]) if ends[name] > size]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    if not beyond:
        return None
    end = max(ends.values())
    return f"it has {size} of {end} bytes, and the first tensor that is cut off is {beyond[0]}"
