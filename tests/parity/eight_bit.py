"""What both sides do with LLM.int8(): the oracle with upstream, the tests with the drop-in.

Both are called ``bitsandbytes`` where they run, so both run the very same calls: arguments that
one of them does not take are found here first.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from bitsandbytes.autograd import _functions
from bitsandbytes.nn import Embedding8bit, Int8Params, Linear8bitLt, OutlierAwareLinear
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Answer = tuple[Tensors, dict[str, Any]]


def int8_quant(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Quantize ``x`` ``[m, k]`` by rows and decode it again; ``columns`` are its outliers."""
    x = tensors["x"].clone()
    codes, stats, columns = F.int8_vectorwise_quant(x, threshold=options["threshold"])
    out = {"codes": codes, "stats": stats, "decoded": F.int8_vectorwise_dequant(codes, stats)}
    if columns is not None:
        out["columns"] = columns
    return out, {"untouched": bool(torch.equal(x, tensors["x"])), "columns": columns is not None}


def int8_products(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Every function of the product of ``x`` and a weight, both quantized already."""
    del options
    ops = torch.ops.bitsandbytes
    x, codes, stats = tensors["x"], tensors["codes"], tensors["stats"]
    mine, scale, columns = tensors["row_codes"], tensors["row_stats"], tensors.get("columns")
    bias = tensors.get("bias")
    acc = F.int8_linear_matmul(mine, codes)
    whole = None if bias is None else bias.float()
    out = {
        "acc": acc,
        "half": F.int8_mm_dequant(acc, scale, stats, bias=None if bias is None else bias.half()),
        "float": ops.int8_mm_dequant(acc, scale, stats, dtype=torch.float32, bias=whole),
        "scaled": ops.int8_scaled_mm(mine, codes, scale, stats, bias=bias, dtype=x.dtype),
        "default": ops.int8_scaled_mm(mine, codes, scale, stats),
    }
    out["mixed"], sub = ops.int8_mixed_scaled_mm(x, mine, codes, scale, stats, columns, bias)
    if sub is not None:
        out["sub"] = sub
    filled = torch.empty_like(acc)
    F.int8_linear_matmul(mine, codes, out=filled)
    return out | {"filled": filled}, {"sub": sub is not None}


def _layer(options: dict[str, Any]) -> Linear8bitLt:
    """An unquantized layer of the wanted kind."""
    return Linear8bitLt(
        options["in_features"],
        options["out_features"],
        bias=options["bias"],
        has_fp16_weights=False,
        threshold=options["threshold"],
    )


def _apply(layer: Linear8bitLt, tensors: Tensors) -> Answer:
    """What a quantized layer holds and computes."""
    state = layer.state_dict()
    out = {f"state/{key}": value for key, value in state.items()}
    facts = {"keys": list(state)}
    with torch.no_grad():
        out["y"] = layer.eval()(tensors["input"])
        cube = tensors["input"].reshape(2, -1, tensors["input"].shape[1])
        out["cube"] = layer(cube)
    return out, facts


def write_linear8(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Quantize a weight through Linear8bitLt, save its state dict and apply it."""
    layer = _layer(options)
    with torch.no_grad():
        layer.weight.data = tensors["weight"].clone()
        if options["bias"]:
            layer.bias.data = tensors["bias"].clone()
    layer = layer.to("cpu")
    state = {key: value.detach().contiguous() for key, value in layer.state_dict().items()}
    save_file(state, options["path"], metadata={"format": "pt"})
    return _apply(layer, tensors)


def read_linear8(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Read a state dict written by somebody else into a quantized layer, and apply it."""
    layer = _layer(options).to("cpu")
    layer.load_state_dict(load_file(options["path"]), strict=True)
    return _apply(layer, tensors)


def train_linear8(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Forward and gradients of one training step."""
    layer = Linear8bitLt(
        options["in_features"],
        options["out_features"],
        has_fp16_weights=options["has_fp16_weights"],
        threshold=options["threshold"],
    )
    with torch.no_grad():
        layer.weight.data = tensors["weight"].clone()
        layer.bias.data = tensors["bias"].clone()
    layer = layer.to("cpu").train()
    x = tensors["input"].clone().requires_grad_()
    y = layer(x)
    y.backward(tensors["grad"])
    out = {"y": y, "input": x.grad, "bias": layer.bias.grad}
    if layer.weight.grad is not None:
        out["weight"] = layer.weight.grad
    return out, {"weight": layer.weight.grad is not None}


def embed8(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Rows of an Embedding8bit."""
    count, width = tensors["weight"].shape
    layer = Embedding8bit(count, width, dtype=getattr(torch, options["dtype"]))
    layer.weight.data = tensors["weight"].clone()
    layer = layer.to("cpu")
    rows = layer(tensors["ids"])
    return {"codes": layer.weight.data, "stats": layer.weight.SCB, "rows": rows}, {}


def _arguments(function: Any) -> list[list[str]]:
    """Name, kind and default of every argument."""
    return [
        [argument.name, argument.kind.name, repr(argument.default)]
        for argument in inspect.signature(function).parameters.values()
    ]


def int8_facts(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Signatures of the classes, functions and ops, and the fields of the state."""
    del tensors, options
    named = {
        "Int8Params": Int8Params.__new__,
        "Linear8bitLt": Linear8bitLt,
        "Embedding8bit": Embedding8bit,
        "OutlierAwareLinear": OutlierAwareLinear,
        "OutlierAwareLinear.forward_with_outliers": OutlierAwareLinear.forward_with_outliers,
        "OutlierAwareLinear.quantize_weight": OutlierAwareLinear.quantize_weight,
        "MatMul8bitLt.forward": _functions.MatMul8bitLt.forward,
        "MatMul8bitFp.forward": _functions.MatMul8bitFp.forward,
        "MatmulLtState": bnb.MatmulLtState,
        "GlobalOutlierPooler": _functions.GlobalOutlierPooler,
        "GlobalOutlierPooler.add_outliers": _functions.GlobalOutlierPooler.add_outliers,
        "matmul": bnb.matmul,
        **{name: getattr(F, name) for name in dir(F) if name.startswith("int8_")},
    }
    schemas = {}
    for name in INT8_OPS:
        packet = getattr(torch.ops.bitsandbytes, name)
        schemas[name] = str(packet.default._schema)
    schemas["int8_linear_matmul.out"] = str(torch.ops.bitsandbytes.int8_linear_matmul.out._schema)
    state = bnb.MatmulLtState()
    return {}, {
        "signatures": {name: _arguments(value) for name, value in named.items()},
        "schemas": schemas,
        "fields": [
            [field.name, repr(field.default)]
            for field in dataclasses.fields(bnb.MatmulLtState)
            if not field.name.startswith("_")
        ],
        "modules": [
            cls.__module__
            for cls in (Int8Params, Linear8bitLt, Embedding8bit, bnb.MatmulLtState, bnb.matmul)
        ],
        "pool": [_pool(threshold) for threshold in (0.0, 6.0)],
        "state": {
            name: repr(getattr(state, name))
            for name in ("CB", "SCB", "idx", "threshold", "is_training", "has_fp16_weights")
        },
    }


INT8_OPS = (
    "int8_vectorwise_quant",
    "int8_vectorwise_dequant",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_mixed_scaled_mm",
)


def _pool(threshold: float) -> dict[str, Any]:
    """What a new layer's state says of itself."""
    state = Linear8bitLt(3, 5, has_fp16_weights=False, threshold=threshold).state
    return {
        "use_pool": state.use_pool,
        "threshold": state.threshold,
        "has_fp16_weights": state.has_fp16_weights,
    }


def _load_llama(folder: str, quantization: dict[str, Any] | None) -> Any:
    """A Llama in float32 beside its int8 layers, quantized while it is loaded or before."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    extra = {}
    if quantization is not None:
        extra["quantization_config"] = BitsAndBytesConfig(**quantization)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", **extra
    )


def _answer_llama(model: Any, tensors: Tensors) -> Answer:
    """The int8 weights of a model and its logits."""
    out: Tensors = {}
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt):
            state = module.state_dict()
            layers.append(name)
            out[f"{name}/weight"] = state["weight"]
            out[f"{name}/SCB"] = state["SCB"]
    with torch.no_grad():
        out["logits"] = model.eval()(tensors["ids"]).logits.float()
    return out, {"layers": layers}


def write_llama8(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Load a model in 8 bits, save it quantized, and say what it computes."""
    model = _load_llama(options["source"], options["quantization"])
    Path(options["path"]).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options["path"])
    return _answer_llama(model, tensors)


def read_llama8(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Load a model that was saved in 8 bits."""
    return _answer_llama(_load_llama(options["path"], None), tensors)


OPS = {
    function.__name__: function
    for function in (
        int8_quant,
        int8_products,
        write_linear8,
        read_linear8,
        train_linear8,
        embed8,
        int8_facts,
        write_llama8,
        read_llama8,
    )
}
