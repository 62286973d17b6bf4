"""What the memory plan knows of a model: its dimensions and the shapes of its weights.

They come from the headers of safetensors files, from ``config.json``, or from the table of public
architectures here. No weight is read.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["PRESETS", "Model", "Quantization", "Weight", "read_model"]

_ALIASES = {
    "llama-7b": "llama-2-7b",
    "llama-13b": "llama-2-13b",
    "llama-70b": "llama-2-70b",
    "llama-8b": "llama-3-8b",
}


def _preset(
    hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, kind: str = "llama"
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocab,
    }


#: Public architectures, by name: what their ``config.json`` says of their size.
PRESETS: Mapping[str, dict[str, Any]] = {
    "llama-2-7b": _preset(4096, 32, 32, 32, 11008, 32000),
    "llama-2-13b": _preset(5120, 40, 40, 40, 13824, 32000),
    "llama-2-70b": _preset(8192, 80, 64, 8, 28672, 32000),
    "llama-3-8b": _preset(4096, 32, 32, 8, 14336, 128256),
    "llama-3-70b": _preset(8192, 80, 64, 8, 28672, 128256),
    "mistral-7b": _preset(4096, 32, 32, 8, 14336, 32000, "mistral"),
    "qwen2.5-7b": _preset(3584, 28, 28, 4, 18944, 152064, "qwen2"),
    "qwen2.5-72b": _preset(8192, 80, 64, 8, 29568, 152064, "qwen2"),
}

# Layers of these are written down in _llama; others are built by Transformers on the meta device.
_LIKE_LLAMA = ("llama", "mistral", "qwen2")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_TABLES = re.compile(r"\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+)$")


class Weight(NamedTuple):
    """A parameter of a model, by the shape that it has before it is quantized.

    layer: which decoder layer it belongs to; None for what is outside them. linear: whether it is
    the weight of a linear layer within a decoder layer, which quantization packs.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    linear: bool

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


class Quantization(NamedTuple):
    """How the linear weights of a checkpoint are quantized already."""

    kind: str
    nested: bool
    blocksize: int
    storage: torch.dtype


@dataclass(frozen=True)
class Model:
    """A decoder-only model, as far as its memory goes.

    Attributes:
        name: what to call it.
        hidden, layers, vocab: sizes.
        queries, keys: width of all query heads and of all key (or value) heads.
        heads: query heads.
        inner: width of the feed-forward layer that a token passes (of mixtures of experts: of all
            that one token is sent to).
        gated: whether the feed-forward layer has a gate.
        weights: all parameters; a tied output layer is not listed.
        dtype: of the parameters in the checkpoint; None when there is none.
        quantized: how the checkpoint is quantized, if it is.
        modelled: whether the formulas for activations were made for this kind of layer.
    """

    name: str
    hidden: int
    layers: int
    vocab: int
    queries: int
    keys: int
    heads: int
    inner: int
    gated: bool
    weights: tuple[Weight, ...]
    dtype: torch.dtype | None = None
    quantized: Quantization | None = None
    modelled: bool = True

    @property
    def numel(self) -> int:
        """All parameters."""
        return sum(weight.numel for weight in self.weights)

    @functools.cached_property
    def units(self) -> dict[int | None, tuple[Weight, ...]]:
        """The weights by layer; those outside of layers under None."""
        found: dict[int | None, list[Weight]] = {None: []}
        for weight in self.weights:
            found.setdefault(weight.layer, []).append(weight)
        return {layer: tuple(weights) for layer, weights in found.items()}


def read_model(source: str | os.PathLike[str] | Mapping[str, Any]) -> Model:
    """The model at ``source``: a Hugging Face folder, a ``config.json``, the name of a preset, or
    the contents of a ``config.json``.

    Raises:
        FileNotFoundError: it is neither a preset nor there.
        ValueError: a file does not say what it should.
        ImportError: without weights and of a kind that only Transformers knows, and Transformers is
            not installed; or there are weights, and safetensors is not installed.
    """
    if isinstance(source, Mapping):
        return _from_config(source, source.get("model_type", "model"))
    known = _ALIASES.get(str(source).lower(), str(source).lower())
    path = pathlib.Path(source)
    if known in PRESETS and not path.exists():
        return _from_config(PRESETS[known], known)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no model at {path}; expected a folder with config.json, a config.json, or "
            f"one of {', '.join(PRESETS)}"
        )
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} holds no config.json") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}")
    name = file.resolve().parent.name
    if path.is_dir() and any(path.glob("*.safetensors*")):
        return _from_files(path, config, name)
    return _from_config(config, name)


# ---- where the shapes come from ------------------------------------------------------------------


def _from_config(config: Mapping[str, Any], name: str) -> Model:
    if config.get("model_type") in _LIKE_LLAMA:
        return _describe(config, name, tuple(_llama(config)))
    return _describe(config, name, tuple(_on_meta(config)))


def _llama(config: Mapping[str, Any]) -> Iterator[Weight]:
    """The parameters of the Llama family: gated feed-forward layers, grouped queries, two norms."""
    size = functools.partial(_size, config)
    hidden, inner, vocab = size("hidden_size"), size("intermediate_size"), size("vocab_size")
    heads = size("num_attention_heads")
    width = config.get("head_dim") or hidden // heads
    queries, keys = heads * width, (config.get("num_key_value_heads") or heads) * width
    qwen = config["model_type"] == "qwen2"
    bias = {"attention": qwen or config.get("attention_bias"), "mlp": config.get("mlp_bias")}
    linears = [
        ("self_attn.q_proj", queries, hidden, bias["attention"]),
        ("self_attn.k_proj", keys, hidden, bias["attention"]),
        ("self_attn.v_proj", keys, hidden, bias["attention"]),
        ("self_attn.o_proj", hidden, queries, bias["attention"] and not qwen),
        ("mlp.gate_proj", inner, hidden, bias["mlp"]),
        ("mlp.up_proj", inner, hidden, bias["mlp"]),
        ("mlp.down_proj", hidden, inner, bias["mlp"]),
    ]
    yield Weight("model.embed_tokens.weight", (vocab, hidden), None, False)
    for layer in range(size("num_hidden_layers")):
        start = f"model.layers.{layer}."
        for name, rows, columns, biased in linears:
            yield Weight(f"{start}{name}.weight", (rows, columns), layer, True)
            if biased:
                yield Weight(f"{start}{name}.bias", (rows,), layer, False)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Weight(f"{start}{norm}.weight", (hidden,), layer, False)
    yield Weight("model.norm.weight", (hidden,), None, False)
    if not config.get("tie_word_embeddings", False):
        yield Weight("lm_head.weight", (vocab, hidden), None, False)


def _on_meta(config: Mapping[str, Any]) -> Iterator[Weight]:
    """The parameters of the model that Transformers builds from ``config``, without memory."""
    kind = str(config.get("model_type"))
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, [in, out]
    except ImportError as error:
        raise ImportError(
            f"the shapes of a model of type {kind!r} without weights come from Transformers, "
            f"which does not import: {error}"
        ) from None
    try:
        rest = {key: value for key, value in config.items() if key != "model_type"}
        made = AutoConfig.for_model(kind, **rest)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made)
    except Exception as error:  # whatever Transformers cannot make of it
        raise ValueError(f"Transformers builds no model of type {kind!r}: {error}") from error
    kinds = (torch.nn.Linear, Conv1D)
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds)}
    for name, parameter in model.named_parameters():
        layer = _layer(name)
        packs = layer is not None and (name in linear or _is_experts(name, parameter.shape))
        yield Weight(name, tuple(parameter.shape), layer, packs)


def _from_files(path: pathlib.Path, config: Mapping[str, Any], name: str) -> Model:
    """Exact names, shapes and dtypes, from the headers of the files."""
    from ._reader import ModelFiles, _described_shape, scales_name

    files = ModelFiles(path)
    weights: list[Weight] = []
    quantized: Quantization | None = None
    dtypes: dict[torch.dtype, int] = {}
    for key in files:
        base = _TABLES.sub("", key)
        if (base != key and base in files) or key.endswith((".SCB", ".weight_format")):
            continue
        layer, shape, dtype = _layer(key), tuple(files.shape(key)), files.dtype(key)
        if files.holds_4bit(key):
            family = {n: files.tensor(n) for n in files if n.startswith(f"{key}.")}
            shape = tuple(_described_shape(family, key, files.file(key)))
            if quantized is None:
                _, state = files.weight(key)
                quantized = Quantization(state.quant_type, state.nested, state.blocksize, dtype)
            weights.append(Weight(key, shape, layer, True))
        elif dtype == torch.int8 and scales_name(key) in files:
            quantized = quantized or Quantization("int8", False, 0, dtype)
            weights.append(Weight(key, shape, layer, True))
        else:
            if dtype.is_floating_point:
                dtypes[dtype] = dtypes.get(dtype, 0) + math.prod(shape)
            matrix = len(shape) == 2 and key.endswith("weight") and "norm" not in key
            packs = layer is not None and (matrix or _is_experts(key, shape))
            weights.append(Weight(key, shape, layer, packs))
    if quantized is not None:  # what the checkpoint left alone stays alone
        packed = {w.name for w in weights if files.holds_4bit(w.name) or files.holds_8bit(w.name)}
        weights = [w._replace(linear=w.name in packed) for w in weights]
    most = max(dtypes, key=lambda found: dtypes[found]) if dtypes else None
    return _describe(config, name, tuple(weights), most, quantized)


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def _is_experts(name: str, shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether it is the fused weight of all experts of a layer."""
    return len(shape) == 3 and ".experts." in name


# ---- dimensions ----------------------------------------------------------------------------------


def _size(config: Mapping[str, Any], *names: str) -> int:
    """The first of ``names`` that ``config`` has; ValueError when it has none."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ValueError(f"config.json lacks {names[0]}, a positive integer")


def _describe(
    config: Mapping[str, Any],
    name: str,
    weights: tuple[Weight, ...],
    dtype: torch.dtype | None = None,
    quantized: Quantization | None = None,
) -> Model:
    text = config.get("text_config", config)
    hidden = _size(text, "hidden_size", "n_embd", "d_model")
    heads = _size(text, "num_attention_heads", "n_head", "num_heads")
    width = text.get("head_dim") or hidden // heads
    inner = text.get("intermediate_size") or text.get("n_inner") or text.get("ffn_dim")
    inner = inner or 4 * hidden
    experts = text.get("num_experts_per_tok") or 0
    if experts:
        inner = experts * (text.get("moe_intermediate_size") or inner)
        inner += text.get("shared_expert_intermediate_size") or 0
    said = config.get("dtype") or config.get("torch_dtype")
    return Model(
        name=name,
        hidden=hidden,
        layers=_size(text, "num_hidden_layers", "n_layer", "num_layers"),
        vocab=_size(text, "vocab_size"),
        queries=heads * width,
        keys=(text.get("num_key_value_heads") or heads) * width,
        heads=heads,
        inner=inner,
        gated=any("gate_proj" in w.name or "gate_up" in w.name for w in weights) or bool(experts),
        weights=weights,
        dtype=dtype or (getattr(torch, said, None) if isinstance(said, str) else None),
        quantized=quantized,
        modelled=text.get("model_type") in _LIKE_LLAMA,
    )
