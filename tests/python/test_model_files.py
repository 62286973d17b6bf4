"""The view of a model on disk that loading and slicing read through, in one process."""

from __future__ import annotations

import json
import pathlib
import struct

import pytest
import torch
from halfbyte.distributed._loading import load, load_sharded
from halfbyte.distributed._prepare import plain_name, prepare
from halfbyte.distributed._reader import ModelFiles
from halfbyte.nn import Embedding4bit, Linear4bit, Linear8bitLt
from torch import nn

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two files and an index: ``a`` [4, 6] and a packed layer ``b`` in one, ``c`` in the other."""
    layer = Linear4bit(64, 8, bias=False, quant_type="nf4").to("cpu")
    first = {"a": torch.arange(24.0).view(4, 6)}
    first |= {f"b.{name}": value for name, value in layer.state_dict().items()}
    second = {"c": torch.arange(5, dtype=torch.int8), "s": torch.tensor(2.0)}
    places = {}
    for number, tensors in enumerate((first, second)):
        file = f"model-{number}.safetensors"
        safetensors.save_file(tensors, tmp_path / file)
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_reads_what_is_asked_for(folder: pathlib.Path) -> None:
    files = ModelFiles(folder)
    assert len(files) == len(list(files)) == 9
    assert "a" in files
    assert "d" not in files
    assert files.file("c").name == "model-1.safetensors"
    assert (files.dtype("c"), files.shape("a")) == (torch.int8, torch.Size((4, 6)))
    assert files.bytes_read == 0
    assert files.read_rows("a", 1, 3).tolist() == torch.arange(6.0, 18).view(2, 6).tolist()
    assert files.bytes_read == 2 * 6 * 4
    assert files.read_slice("a", 5, 8).tolist() == [5, 6, 7]
    assert files.bytes_read == 2 * 6 * 4 + 3 * 4
    assert files.read("s").item() == 2
    assert files.bytes_read == 2 * 6 * 4 + 3 * 4 + 4
    with pytest.raises(ValueError, match=r"0.safetensors: tensor a has 4 rows, asked for 3 to 5"):
        files.read_rows("a", 3, 5)
    with pytest.raises(ValueError, match="tensor a has 24 elements, asked for 20 to 25"):
        files.read_slice("a", 20, 25)
    with pytest.raises(KeyError, match="holds no tensor d"):
        files.read("d")


def test_opens_files_of_any_name(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    one = ModelFiles(folder / "model-1.safetensors")
    assert sorted(one) == ["c", "s"]
    assert len(ModelFiles(folder / "model.safetensors.index.json")) == 9
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(FileNotFoundError, match=r"but no .safetensors file"):
        ModelFiles(alone)
    safetensors.save_file({"x": torch.zeros(1)}, alone / "adapter.safetensors")
    assert list(ModelFiles(alone)) == ["x"]
    safetensors.save_file({"y": torch.zeros(1)}, alone / "more.safetensors")
    with pytest.raises(FileNotFoundError, match=r"but 2 .safetensors files"):
        ModelFiles(alone)
    with pytest.raises(FileNotFoundError, match=r"there is no model at .*nowhere"):
        ModelFiles(tmp_path / "nowhere")


def test_broken_files_are_named(folder: pathlib.Path) -> None:
    file = folder / "model-0.safetensors"
    good = file.read_bytes()

    file.write_bytes(good[:-30])
    with pytest.raises(ValueError, match="model-0") as error:
        ModelFiles(folder)
    size = len(good)
    assert f"it has {size - 30} of {size} bytes, and the first tensor that is cut" in str(
        error.value
    )
    file.write_bytes(good[:20])
    with pytest.raises(ValueError, match=r"model-0.* its header takes \d+ bytes, the file has 20"):
        ModelFiles(folder)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model-0.safetensors is not a whole safetensors file"):
        ModelFiles(folder)
    file.write_bytes(good + b"more")
    with pytest.raises(ValueError, match=r"model-0.safetensors is not a whole safetensors file"):
        ModelFiles(folder)
    (length,) = struct.unpack("<Q", good[:8])
    file.write_bytes(good[:8] + b"?" * length + good[8 + length :])
    with pytest.raises(ValueError, match=r"model-0.* JSON"):
        ModelFiles(folder)
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-0.safetensors is missing; it should hold the tensor a"
    ):
        ModelFiles(folder)


def test_broken_indexes_are_named(folder: pathlib.Path) -> None:
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]

    index.write_text(json.dumps({"weight_map": places | {"d": "model-1.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"model-1.safetensors lacks the tensor d, which the index places there"
    ):
        ModelFiles(folder)
    index.write_text(json.dumps({"weight_map": places | {"d": "../model-1.safetensors"}}))
    with pytest.raises(ValueError, match="places the tensor d outside of its folder"):
        ModelFiles(folder)
    for place in ("", "."):
        index.write_text(json.dumps({"weight_map": places | {"d": place}}))
        with pytest.raises(ValueError, match=r"tensor d in '\.', which is a folder"):
            ModelFiles(folder)
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index.json is not an index of safetensors files"):
            ModelFiles(folder)


def test_quantized_weights(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    files = ModelFiles(folder)
    assert files.holds_4bit("b.weight")
    assert not files.holds_4bit("a")
    packed, state = files.weight("b.weight")
    assert (tuple(state.shape), packed.shape[0]) == ((8, 64), 256)
    assert files.bytes_read == 0
    with pytest.raises(ValueError, match=r"model-0.safetensors: a is not quantized"):
        files.weight("a")

    broken = tmp_path / "broken.safetensors"
    family = {name: files.read(name) for name in files if name.startswith("b.")}
    for name, value, message in (
        ("b.weight.absmax", family["b.weight.absmax"][:-1], "have"),
        ("b.weight.quant_map", None, "lacks b.weight.quant_map"),
        ("b.weight", family["b.weight"][:-1], "takes 256 elements of torch.uint8"),
        ("b.weight.quant_state.bitsandbytes__nf4", torch.tensor([1, 2]).byte(), "not give a shape"),
    ):
        changed = {**family, name: value} if value is not None else dict(family)
        if value is None:
            del changed[name]
        safetensors.save_file(changed, broken)
        with pytest.raises(ValueError, match=f"broken.safetensors: .*b.weight.*{message}"):
            ModelFiles(broken).weight("b.weight")
    safetensors.save_file({"SCB": torch.ones(3), "weight": torch.ones(4, 2).char()}, broken)
    codes = {"SCB": torch.ones(4), "weight": torch.ones(4, 2).char()}
    safetensors.save_file({**codes, "weight_format": torch.tensor(0).byte()}, tmp_path / "rows.st")
    assert torch.equal(ModelFiles(tmp_path / "rows.st").weight("weight")[0], codes["weight"])
    safetensors.save_file({**codes, "weight_format": torch.tensor(1).byte()}, tmp_path / "cols.st")
    with pytest.raises(ValueError, match=r"cols.st: weight_format must be 0 \(row-major.*, got 1"):
        ModelFiles(tmp_path / "cols.st").weight("weight")
    with pytest.raises(ValueError, match="weight must be int8 with a scale for each row, got"):
        ModelFiles(broken).weight("weight")


def test_names_without_wrappers() -> None:
    want = "model.layers.0.mlp.up_proj.weight"
    for name in (
        want,
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
        "_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.modules_to_save.default.weight",
        "model.layers.0._fsdp_wrapped_module.mlp.up_proj.original_module.weight",
    ):
        assert plain_name(name) == want
    assert plain_name("my_base_layer.weight") == "my_base_layer.weight"


class Pair(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


def test_prepare_puts_the_checkpoints_layers_in_place(tmp_path: pathlib.Path) -> None:
    four = Linear4bit(96, 64, quant_type="fp4", quant_storage=torch.bfloat16)
    eight = Linear8bitLt(64, 5, bias=False, has_fp16_weights=False)
    safetensors.save_file(Pair(four, eight).to("cpu").state_dict(), tmp_path / "model.safetensors")
    settings = {"bnb_4bit_compute_dtype": "bfloat16", "llm_int8_threshold": 3.0}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))

    with torch.device("meta"):
        model = Pair(nn.Linear(96, 64), nn.Linear(64, 5, bias=False)).eval()
    bias = model.first.bias
    assert prepare(model, tmp_path) is model
    assert type(model.first) is Linear4bit
    assert model.first.weight.shape == (96 * 64 // 4, 1)
    assert model.first.weight.dtype == torch.bfloat16
    assert model.first.weight.quant_type == "fp4"
    assert model.first.weight.compress_statistics
    assert model.first.compute_dtype == torch.bfloat16
    assert model.first.bias is bias
    assert not model.first.training
    assert type(model.second) is Linear8bitLt
    assert (model.second.weight.dtype, model.second.state.threshold) == (torch.int8, 3.0)
    assert {t.device.type for t in model.state_dict().values()} <= {"meta", "cpu"}
    assert model.first.weight.device.type == model.second.weight.device.type == "meta"
    weight = model.first.weight
    prepare(model, tmp_path)  # again
    assert model.first.weight is weight


def test_prepare_names_what_does_not_fit(tmp_path: pathlib.Path) -> None:
    four = Linear4bit(96, 64, bias=False, quant_type="nf4").to("cpu")
    safetensors.save_file(four.state_dict(), tmp_path / "model.safetensors")
    shape = r"model.safetensors: weight is a weight of shape \[64, 96\], the model has \[65, 96\]"
    with pytest.raises(ValueError, match=shape):
        prepare(Linear4bit(96, 65, bias=False, device="meta"), tmp_path)
    with pytest.raises(ValueError, match=r"weight is quantized, but the model has a .*LayerNorm"):
        prepare(nn.LayerNorm(64, device="meta"), tmp_path)
    with pytest.raises(ValueError, match="must not be a bare"):
        prepare(nn.Linear(96, 64, bias=False, device="meta"), tmp_path)
    real = Linear4bit(96, 64, bias=False)
    assert prepare(real, tmp_path).weight.is_floating_point()
    table = prepare(Embedding4bit(64, 96, device="meta"), tmp_path)
    assert table.weight.shape == (64 * 48, 1)


def test_what_the_checkpoint_lacks_is_initialized(tmp_path: pathlib.Path) -> None:
    packed = Linear4bit(96, 64, bias=False, quant_type="nf4").to("cpu")
    tensors = {f"first.{name}": value for name, value in packed.state_dict().items()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")

    def build() -> Pair:
        return prepare(Pair(nn.Linear(96, 64, bias=False), nn.Linear(64, 5)).to("meta"), tmp_path)

    with pytest.raises(ValueError, match=r"lacks 2 tensors of the model: second.weight, second.bi"):
        load(build(), tmp_path)
    torch.manual_seed(3)
    model = build()
    done = load(model, tmp_path, may_lack=("second.*",))
    assert sorted(done.initialized) == ["second.bias", "second.weight"]
    torch.manual_seed(3)
    again = build()
    seen = []

    def ones(module: nn.Module) -> None:
        seen.append([tuple(value.shape) for value in module.parameters()])
        for value in module.parameters():
            assert value.isnan().all()
            nn.init.ones_(value)

    load(again, tmp_path, may_lack=("second.*",), initialize=ones)
    assert seen == [[(5, 64), (5,)]]
    assert again.second.weight.eq(1).all()
    assert 0 < model.second.weight.abs().max() <= 1 / 8  # torch's own bound for 64 inputs
    assert model.second.weight.requires_grad
    torch.manual_seed(3)
    third = build()
    load(third, tmp_path, may_lack=("second.*",))
    assert torch.equal(third.second.weight, model.second.weight)

    plain = build()
    with pytest.raises(RuntimeError, match=r"does not hold second.weight, and nothing here knows"):
        load(plain, tmp_path, may_lack=("second.*",), initialize=lambda module: None)


def test_the_dtype_to_quantize_from(tmp_path: pathlib.Path) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    safetensors.save_file({"weight": weight}, tmp_path / "model.safetensors")
    for dtype in (None, torch.bfloat16):
        want = Linear4bit(96, 64, bias=False, quant_type="nf4")
        want.weight.data = weight.to(dtype or torch.float32)
        want.to("cpu")
        found = prepare(
            Linear4bit(96, 64, bias=False, quant_type="nf4", device="meta"), tmp_path, dtype=dtype
        )
        load(found, tmp_path)
        assert found.weight.quant_state == want.weight.quant_state
        assert torch.equal(found.weight, want.weight)
        assert found.weight.quant_state.dtype == (dtype or torch.float32)
    eight = Linear8bitLt(96, 64, bias=False, has_fp16_weights=False, device="meta")
    load_sharded(eight, tmp_path, lambda model: None)
    want = Linear8bitLt(96, 64, bias=False, has_fp16_weights=False)
    want.weight.data = weight
    want.to("cpu")
    assert torch.equal(eight.weight, want.weight)
    assert torch.equal(eight.SCB, want.SCB)
