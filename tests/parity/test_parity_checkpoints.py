"""Checkpoints cross both ways: written by upstream and read by halfbyte, and back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes
import bitsandbytes.functional as F
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from compare import assert_same_bits, assert_same_values, bits
from oracle_client import Batch, Reply
from safetensors.torch import load_file, save_file

KINDS = [
    (quant_type, nested, storage, shape)
    for (quant_type, nested, storage), shape in zip(
        product(("nf4", "fp4"), (False, True), ("uint8", "bfloat16", "float16", "float32")),
        [(64, 96), (40, 136), (128, 64), (24, 100)] * 4,
        strict=True,
    )
]
Kind = tuple[str, bool, str, tuple[int, int]]

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-nested-bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "nf4-bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "bfloat16",
    },
}


def _name(kind: Kind) -> str:
    """A readable name of one kind of layer."""
    quant_type, nested, storage, (out, inner) = kind
    return f"{quant_type}-{'nested' if nested else 'plain'}-{storage}-{out}x{inner}"


def _layer(kind: Kind) -> Linear4bit:
    """An unquantized layer of one kind."""
    quant_type, nested, storage, (out, inner) = kind
    return Linear4bit(
        inner,
        out,
        bias=True,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=getattr(torch, storage),
    )


def _tensors(seed: int, kind: Kind) -> dict[str, torch.Tensor]:
    """A weight, a bias and an input."""
    out, inner = kind[3]
    rng = np.random.default_rng([seed, 50_000 + KINDS.index(kind)])
    shapes = {"weight": (out, inner), "bias": (out,), "input": (3, inner)}
    values = {k: rng.standard_normal(s).astype(np.float32) * 0.1 for k, s in shapes.items()}
    return {k: torch.from_numpy(v).bfloat16() for k, v in values.items()}


def _decoded_alike(quant_type: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Bits for NF4; values for FP4, whose zeros have a sign."""
    compare = assert_same_bits if quant_type == "nf4" else assert_same_values
    compare(mine, theirs, "decoded weight")


@dataclass
class Crossing:
    """Files and answers of both sides, for layers and models."""

    folder: Path
    layers: dict[str, Reply]
    models: dict[str, Reply]


@pytest.fixture(scope="module")
def ids(seed: int) -> torch.Tensor:
    """A batch of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, LLAMA["vocab_size"], (2, 12), generator=generator)


@pytest.fixture(scope="module")
def written_by_upstream(
    upstream: None, seed: int, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Crossing:
    """Layers and models that upstream quantized and saved."""
    folder = tmp_path_factory.mktemp("upstream")
    batch = Batch(tmp_path_factory.mktemp("oracle"))
    for kind in KINDS:
        quant_type, nested, storage, (out, inner) = kind
        batch.add(
            f"layer-{_name(kind)}",
            "write_linear",
            _tensors(seed, kind),
            path=str(folder / f"{_name(kind)}.safetensors"),
            in_features=inner,
            out_features=out,
            bias=True,
            nested=nested,
            quant_type=quant_type,
            quant_storage=storage,
        )
    batch.add("llama", "make_llama", {}, seed=seed, config=LLAMA, path=str(folder / "llama"))
    for name, quantization in MODELS.items():
        batch.add(
            f"model-{name}",
            "write_llama",
            {"ids": ids},
            source=str(folder / "llama"),
            path=str(folder / f"llama-{name}"),
            quantization=quantization,
        )
    answers = batch.run()
    layers = {k.removeprefix("layer-"): v for k, v in answers.items() if k.startswith("layer-")}
    models = {k.removeprefix("model-"): v for k, v in answers.items() if k.startswith("model-")}
    return Crossing(folder, layers, models)


def _quantized(model: torch.nn.Module) -> dict[str, Linear4bit]:
    """The 4-bit layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


@pytest.fixture(scope="module")
def written_by_halfbyte(
    written_by_upstream: Crossing,
    seed: int,
    ids: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Crossing, dict[str, Any]]:
    """Layers and models that halfbyte quantized and saved, as upstream reads them."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("halfbyte")
    batch = Batch(tmp_path_factory.mktemp("oracle"))
    mine: dict[str, Any] = {}
    for kind in KINDS:
        quant_type, nested, storage, (out, inner) = kind
        tensors = _tensors(seed, kind)
        layer = _layer(kind)
        layer.weight.data = tensors["weight"].clone()
        layer.bias.data = tensors["bias"].clone()
        layer = layer.to("cpu")
        path = folder / f"{_name(kind)}.safetensors"
        state = {k: v.detach().contiguous() for k, v in layer.state_dict().items()}
        save_file(state, path, metadata={"format": "pt"})
        mine[_name(kind)] = layer
        batch.add(
            f"layer-{_name(kind)}",
            "read_linear",
            {"input": tensors["input"]},
            path=str(path),
            in_features=inner,
            out_features=out,
            bias=True,
            nested=nested,
            quant_type=quant_type,
            quant_storage=storage,
        )
    for name, quantization in MODELS.items():
        model = AutoModelForCausalLM.from_pretrained(
            written_by_upstream.folder / "llama",
            quantization_config=BitsAndBytesConfig(**quantization),
            dtype=torch.float32,
            device_map="cpu",
        )
        model.save_pretrained(folder / f"llama-{name}")
        mine[f"llama-{name}"] = model
        batch.add(f"model-{name}", "read_llama", {"ids": ids}, path=str(folder / f"llama-{name}"))
    answers = batch.run()
    layers = {k.removeprefix("layer-"): v for k, v in answers.items() if k.startswith("layer-")}
    models = {k.removeprefix("model-"): v for k, v in answers.items() if k.startswith("model-")}
    return Crossing(folder, layers, models), mine


def test_the_drop_in_is_ours() -> None:
    """These tests would prove nothing if this environment held upstream."""
    assert "halfbyte" in bitsandbytes.__version__, (
        "the bitsandbytes of this environment is upstream's: the drop-in must be installed here "
        "and upstream only in .venv-upstream"
    )


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_layer_from_upstream(written_by_upstream: Crossing, seed: int, kind: Kind) -> None:
    """Read upstream's state dict as Transformers does, and decode the same weight."""
    theirs = written_by_upstream.layers[_name(kind)]
    state = load_file(written_by_upstream.folder / f"{_name(kind)}.safetensors")
    statistics = {k.removeprefix("weight."): v for k, v in state.items() if "weight." in k}
    layer = _layer(kind)
    layer.weight = Params4bit.from_prequantized(
        data=state["weight"], quantized_stats=statistics, device="cpu", module=layer
    )
    layer.bias = torch.nn.Parameter(state["bias"])
    _check_layer(layer, theirs, seed, kind)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_layer_from_upstream_by_load_state_dict(
    written_by_upstream: Crossing, seed: int, kind: Kind
) -> None:
    """A strict load_state_dict of packed tensors into a layer that was never quantized."""
    theirs = written_by_upstream.layers[_name(kind)]
    layer = _layer(kind)
    layer.load_state_dict(
        load_file(written_by_upstream.folder / f"{_name(kind)}.safetensors"), strict=True
    )
    _check_layer(layer, theirs, seed, kind)


def _check_layer(layer: Linear4bit, theirs: Reply, seed: int, kind: Kind) -> None:
    """Packed bytes, scales, decoded weight and product of a layer read from upstream."""
    state = layer.weight.quant_state
    assert_same_bits(layer.weight.data, theirs["packed"], "packed")
    assert_same_bits(state.absmax, theirs["absmax"], "absmax")
    assert tuple(state.shape) == kind[3]
    assert str(state.dtype).removeprefix("torch.") == theirs.facts["dtype"]
    decoded = F.dequantize_4bit(layer.weight.data, state)
    _decoded_alike(kind[0], decoded, theirs["decoded"])
    y = layer(_tensors(seed, kind)["input"].float())
    torch.testing.assert_close(y, theirs["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_layer_to_upstream(
    written_by_halfbyte: tuple[Crossing, dict[str, Any]], seed: int, kind: Kind
) -> None:
    """Upstream reads our state dict, decodes the same weight and computes the same product."""
    crossing, mine = written_by_halfbyte
    layer, theirs = mine[_name(kind)], crossing.layers[_name(kind)]
    state = layer.weight.quant_state
    assert_same_bits(layer.weight.data, theirs["packed"], "packed")
    assert_same_bits(state.absmax, theirs["absmax"], "absmax")
    assert theirs.facts["shape"] == list(kind[3])
    _decoded_alike(kind[0], F.dequantize_4bit(layer.weight.data, state), theirs["decoded"])
    y = layer(_tensors(seed, kind)["input"].float())
    torch.testing.assert_close(y, theirs["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_layer_files_are_alike(
    written_by_upstream: Crossing,
    written_by_halfbyte: tuple[Crossing, dict[str, Any]],
    kind: Kind,
) -> None:
    """Both sides write the same keys, dtypes, shapes and state text."""
    file = f"{_name(kind)}.safetensors"
    theirs = load_file(written_by_upstream.folder / file)
    mine = load_file(written_by_halfbyte[0].folder / file)
    assert set(mine) == set(theirs)
    for key, value in theirs.items():
        if "bitsandbytes__" in key:
            a, b = (json.loads(bytes(t.tolist())) for t in (mine[key], value))
            assert list(a) == list(b), "keys of the state text, in order"
            offsets = [s.pop("nested_offset", 0.0) for s in (a, b)]
            assert a == b
            assert offsets[0] == pytest.approx(offsets[1], rel=1e-6)
            if offsets[0] == offsets[1]:
                assert_same_bits(mine[key], value, f"bytes of {key}")
        else:
            assert mine[key].dtype == value.dtype, key
            assert mine[key].shape == value.shape, key
            if key.endswith("quant_map") or key == "bias":
                assert_same_values(mine[key], value, key)
    if kind[0] == "nf4":
        assert_same_bits(mine["weight"], theirs["weight"], "packed")


@pytest.mark.parametrize("name", MODELS)
def test_model_from_upstream(written_by_upstream: Crossing, ids: torch.Tensor, name: str) -> None:
    """Transformers and the drop-in load a model that upstream saved in 4 bits."""
    from transformers import AutoModelForCausalLM

    theirs = written_by_upstream.models[name]
    model = AutoModelForCausalLM.from_pretrained(
        written_by_upstream.folder / f"llama-{name}", dtype=torch.float32, device_map="cpu"
    )
    _check_model(model, theirs, ids, MODELS[name]["bnb_4bit_quant_type"])


@pytest.mark.parametrize("name", MODELS)
def test_model_to_upstream(
    written_by_halfbyte: tuple[Crossing, dict[str, Any]], ids: torch.Tensor, name: str
) -> None:
    """Upstream loads a model that the drop-in saved in 4 bits."""
    crossing, mine = written_by_halfbyte
    quant_type = MODELS[name]["bnb_4bit_quant_type"]
    _check_model(mine[f"llama-{name}"], crossing.models[name], ids, quant_type)


@pytest.mark.parametrize("name", MODELS)
def test_model_configs_are_alike(
    written_by_upstream: Crossing, written_by_halfbyte: tuple[Crossing, dict[str, Any]], name: str
) -> None:
    """config.json carries the same quantization_config."""
    folders = (written_by_halfbyte[0].folder, written_by_upstream.folder)
    mine, theirs = (
        json.loads((folder / f"llama-{name}" / "config.json").read_text())["quantization_config"]
        for folder in folders
    )
    assert mine == theirs


def _check_model(model: Any, theirs: Reply, ids: torch.Tensor, quant_type: str) -> None:
    """Every quantized layer and the logits."""
    layers = _quantized(model)
    assert sorted(layers) == sorted(theirs.facts["layers"])
    assert layers, "nothing was quantized"
    for layer, module in layers.items():
        weight = module.weight
        assert_same_bits(weight.data, theirs[f"{layer}/packed"], f"{layer} packed")
        assert_same_bits(weight.quant_state.absmax, theirs[f"{layer}/absmax"], f"{layer} absmax")
        decoded = F.dequantize_4bit(weight.data, weight.quant_state)
        _decoded_alike(quant_type, decoded, theirs[f"{layer}/decoded"])
        assert bits(weight.data).numel() > 0
    with torch.no_grad():
        logits = model(ids).logits.float()
    torch.testing.assert_close(logits, theirs["logits"], rtol=1e-3, atol=1e-3)
