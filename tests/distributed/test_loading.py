"""Checkpoints loaded straight into shards, on real ranks."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from halfbyte.distributed._loading import load, load_sharded
from halfbyte.distributed._prepare import prepare
from halfbyte.nn import Linear4bit, Linear8bitLt
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

safetensors = pytest.importorskip("safetensors.torch")

FILE = "model.safetensors"
STORAGES = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = ((64, 192), (192, 7), (7, 640))
"""Of the layers: blocks in the middle of rows, an odd weight, scales of several nested blocks."""


class Turns(nn.Module):
    """Has a buffer that checkpoints do not hold."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.register_buffer("angles", torch.empty(5, device=device), persistent=False)
        self.register_buffer("count", torch.tensor(7, device=device))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.angles.copy_(torch.arange(5.0))


class Model(nn.Module):
    """Quantized layers and what else a language model has; head and embedding are tied."""

    def __init__(self, kind: str, device: str, nested: bool = True, storage: str = "uint8") -> None:
        super().__init__()
        torch.manual_seed(0)

        def layer(inputs: int, outputs: int) -> nn.Module:
            bias = outputs != 7
            if kind == "float":
                return nn.Linear(inputs, outputs, bias, device=device)
            if kind == "int8":
                return Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False, device=device)
            options = {"compress_statistics": nested, "quant_storage": STORAGES[storage]}
            return Linear4bit(inputs, outputs, bias, quant_type=kind, device=device, **options)

        self.embed = nn.Embedding(37, 64, device=device)
        self.layers = nn.ModuleList(layer(*size) for size in SIZES)
        self.norm = nn.LayerNorm(640, device=device)
        self.turns = Turns(device)
        self.head = nn.Linear(64, 37, bias=False, device=device)
        self.head.weight = self.embed.weight
        self.bfloat16()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[..., :64]) + self.turns.angles.sum()


def shard(model: Any, **options: Any) -> None:
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if name != "head.weight"}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_same(model: nn.Module, want: dict[str, torch.Tensor], what: str) -> None:
    found = model.state_dict()
    assert set(found) - {"head.weight"} == set(want), what
    for name, value in want.items():
        got = whole(found[name])
        assert (got.dtype, got.shape) == (value.dtype, value.shape), (what, name)
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got, value))
        assert torch.equal(a, b), (what, name)


def write(folder: str, kind: str, nested: bool, storage: str) -> dict[str, torch.Tensor]:
    """Save ``<case>/model.safetensors`` before and after quantization; what the latter holds."""
    model = Model(kind, "cpu", nested, storage)
    unquantized = {name: value.clone() for name, value in saved(model).items()}
    model.to("cpu")
    if dist.get_rank() == 0:
        for name, tensors in (("float", unquantized), ("packed", saved(model))):
            (pathlib.Path(folder) / name).mkdir(exist_ok=True)
            safetensors.save_file(tensors, f"{folder}/{name}/{FILE}")
    dist.barrier()
    return saved(model)


CASES = [
    ("nf4", True, "bf16", ("four", "three", "alone", "twice")),
    ("int8", True, "uint8", ("four", "three")),
    ("fp4", False, "uint8", ("three",)),
    ("nf4", True, "fp32", ("three",)),
    ("nf4", False, "bf16", ("four",)),
    ("nf4", True, "uint8", ("four",)),
]
"""Kind, double quantization, storage, and the meshes to shard over."""


def meshes() -> dict[str, tuple[Any, Any]]:
    """Device meshes and the groups of all their ranks, by name."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    three = DeviceMesh("cpu", [0, 1, 2])
    return {
        "four": (init_device_mesh("cpu", (4,)), None),
        "three": (three, three.get_group() if dist.get_rank() < 3 else None),
        "alone": (DeviceMesh.from_group(alone, "cpu"), alone),
        "twice": (init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")), None),
    }


def every_byte_arrives(rank: int, world: int, folder: str) -> list[tuple[str, int, int, int]]:
    known, read = meshes(), []
    for kind, nested, storage, names in CASES:
        want = write(folder, kind, nested, storage)
        plain = Model(kind, "cpu", nested, storage).to("cpu")
        for name in names:
            mesh, group = known[name]
            if name == "three" and rank == 3:
                continue
            for source in ("packed", "float"):
                what = f"{kind} {nested} {storage} {source} {name}"
                path = f"{folder}/{source}"
                model = prepare(Model(kind, "meta", nested, storage), path)
                shard(model, mesh=mesh)
                done = load(model, path, group=group)
                assert done.initialized == ["turns.angles"], what
                assert done.unexpected == [], what
                size = sum(
                    tensor.nbytes for tensor in safetensors.load_file(f"{path}/{FILE}").values()
                )
                read.append((what, done.bytes_read, size, mesh.shape[-1]))
                check_same(model, want, what)
                assert model.head.weight is model.embed.weight, what
                assert model.turns.angles.tolist() == [0, 1, 2, 3, 4], what
                assert model.turns.count.item() == 7, what
                ids = torch.arange(6).view(2, 3)
                with torch.no_grad():
                    torch.testing.assert_close(model(ids), plain(ids), msg=what)
        dist.barrier()
    # Without sharding, and into layers that are there already.
    model = load_sharded(Model("nf4", "meta"), f"{folder}/float", lambda model: None)
    check_same(model, want, "not sharded")
    with torch.no_grad():
        model.layers[0].weight.zero_()
        model.norm.weight.zero_()
    load(model, f"{folder}/packed")
    check_same(model, want, "loaded again")
    return read


def test_every_byte_arrives(tmp_path: pathlib.Path) -> None:
    for found in ranks.run(every_byte_arrives, 4, folder=str(tmp_path)):
        for what, read, size, parts in found:
            # Of an embedding of 37 rows, three ranks read 13; and there are blocks at the edges.
            assert 0 < read < size / parts + 2048, (what, read, size)


# ---- errors --------------------------------------------------------------------------------------


def changed(folder: pathlib.Path, name: str, value: torch.Tensor | None) -> pathlib.Path:
    """A copy of the packed model in which one tensor is another, or missing."""
    tensors = dict(safetensors.load_file(folder / "packed" / FILE))
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    path = folder / "changed" / FILE
    path.parent.mkdir(exist_ok=True)
    safetensors.save_file(tensors, path)
    return path


def broken(folder: pathlib.Path) -> list[tuple[str, Any]]:
    """What each broken model should be blamed for, and how it comes to be."""
    path = folder / "packed" / FILE

    def truncated() -> pathlib.Path:
        short = folder / "short.safetensors"
        short.write_bytes(path.read_bytes()[:-50])
        return short

    def other(**options: Any) -> pathlib.Path:
        layer = Linear4bit(64, 192, **options).to("cpu")
        tensors = {n: t for n, t in safetensors.load_file(path).items() if "layers.0" not in n}
        tensors |= {f"layers.0.{name}": value for name, value in layer.state_dict().items()}
        safetensors.save_file(tensors, folder / "other.safetensors")
        return folder / "other.safetensors"

    missing = "layers.1.weight.absmax"
    return [
        ("short.safetensors is not a whole .* that is cut off is ", truncated),
        ("lacks 1 tensors of the model: norm.bias", lambda: changed(folder, "norm.bias", None)),
        (f"changed.*lacks {missing}", lambda: changed(folder, missing, None)),
        (
            r"norm.bias has shape \[639\], the model has \[640\]",
            lambda: changed(folder, "norm.bias", torch.zeros(639)),
        ),
        (
            "turns.count is torch.float32, the model has torch.int64",
            lambda: changed(folder, "turns.count", torch.zeros(())),
        ),
        (
            "layers.0.weight: quant_type must stay 'nf4'",
            lambda: other(quant_type="fp4", compress_statistics=True),
        ),
        (
            "layers.0.weight: nested must stay True",
            lambda: other(quant_type="nf4", compress_statistics=False),
        ),
        ("there is no model at .*nowhere", lambda: folder / "nowhere"),
    ]


def errors_are_the_same_everywhere(rank: int, world: int, folder: str) -> list[str]:
    home = pathlib.Path(folder)
    write(folder, "nf4", True, "uint8")
    model = prepare(Model("nf4", "meta"), home / "packed")
    shard(model)
    messages = []

    def attempt(path: pathlib.Path, of: Any = model) -> None:
        dist.barrier()
        try:
            load(of, path)
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("loaded")
        dist.barrier()

    for _, make in broken(home):
        where: list[Any] = [make() if rank == 0 else None]
        dist.broadcast_object_list(where)
        attempt(where[0])
    # One rank alone does not see the files.
    attempt(home / ("packed" if rank != 1 else "nowhere"))
    attempt(home / "packed" if rank != 1 else changed(home, "norm.bias", torch.ones(640).double()))
    unprepared = Model("nf4", "meta")
    attempt(home / "packed", unprepared)
    assert all(p.device.type == "meta" for p in (*model.parameters(), *unprepared.parameters()))

    model.turns.reset_buffers = lambda: None
    attempt(home / "packed")
    return messages


def test_errors_are_the_same_everywhere(two: tuple[pathlib.Path, list[Any]]) -> None:
    tmp_path, found = two[0], [messages for messages, _ in two[1]]
    assert found[0] == found[1]
    wanted = [
        *(pattern for pattern, _ in broken(tmp_path)),
        "FileNotFoundError: there is no model at .*nowhere",
        "rank 1 does not see the same model as rank 0",
        "layers.0.weight is for a Linear4bit that prepare.. has not seen",
        "does not hold turns.angles, and nothing here knows how to initialize it",
    ]
    for message, pattern in zip(found[0], wanted, strict=True):
        assert re.search(pattern, message), (pattern, message)


# ---- memory --------------------------------------------------------------------------------------

WIDTH, DEPTH = 2048, 8


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Linear4bit(WIDTH, WIDTH, bias=False, quant_type="nf4", device="meta")
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, 2 * WIDTH, bias=False, device="meta")
        self.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def anonymous() -> int:
    """Bytes of this process that are not pages of files."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


class Watch(TorchDispatchMode):
    """Looks at the memory of the process after every operation."""

    peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, anonymous())
        return result


def memory_of_loading(rank: int, world: int, folder: str) -> dict[str, dict[str, int]]:
    files = {"float": f"{folder}/float.safetensors", "packed": f"{folder}/packed.safetensors"}
    if rank == 0:
        tensors = {f"layers.{i}.weight": torch.randn(WIDTH, WIDTH) for i in range(DEPTH)}
        tensors["head.weight"] = torch.randn(2 * WIDTH, WIDTH)
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        safetensors.save_file(tensors, files["float"])
        model = load_alone(Wide(), files["float"])
        safetensors.save_file(model.state_dict(), files["packed"])
        del model, tensors
    dist.barrier()
    measured = {}
    for source, path in files.items():
        model = Wide()
        prepare(model, path)
        shard(model)
        before = anonymous()
        with Watch() as watch:
            done = load(model, path)
        kept = sum(tensor_bytes(value) for value in model.state_dict().values())
        measured[source] = {
            "read": done.bytes_read,
            "kept": kept,
            "grown": anonymous() - before,
            "beyond": watch.peak - before - kept,
        }
        del model
    return measured


def tensor_bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def load_alone(model: nn.Module, path: str) -> nn.Module:
    """Load a model on this rank only."""
    prepare(model, path)
    load(model, path, group=dist.new_group([0], use_local_synchronization=True))
    return model


def errors_and_memory(rank: int, world: int, folder: str) -> list[Any]:
    arguments = rank, world, folder
    return [errors_are_the_same_everywhere(*arguments), memory_of_loading(*arguments)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[Any]]:
    """A folder, and what two ranks say of errors and memory."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory is given back at once
        return folder, ranks.run(errors_and_memory, 2, folder=str(folder))


def test_no_rank_holds_more_than_its_part(two: tuple[pathlib.Path, list[Any]]) -> None:
    tmp_path, found = two[0], [measured for _, measured in two[1]]
    layer, head = 2 * WIDTH * WIDTH, 4 * WIDTH * WIDTH  # bytes in bfloat16
    packed = (tmp_path / "packed.safetensors").stat().st_size
    for measured in found:
        for source, total in (("float", DEPTH * layer + head), ("packed", packed)):
            m = measured[source]
            # Tables, JSON and headers are not counted as read; they are 1,300 bytes a layer.
            assert abs(m["read"] - total / 2) < DEPTH * 2048 + 8192, (source, m)
            assert abs(m["kept"] - packed / 2) < DEPTH * 2048 + 8192, (source, m)
            assert m["beyond"] < layer, (source, m)
