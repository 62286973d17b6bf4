"""Upstream bitsandbytes as an oracle, run as a process of its own in its own environment.

    .venv-upstream/bin/python tests/parity/oracle.py FOLDER

FOLDER holds ``request.json`` (``{"portable", "jobs": [{"id", "op", "tensors", "options"}]}``) and
``inputs.safetensors``; ``tensors`` maps an argument to the name of a tensor of that file. The
answers are written beside them: ``outputs.safetensors`` with tensors named ``<id>/<tensor>`` and
``reply.json`` with the versions and, for each job, its facts or its error. Everything runs through
the portable path, unless the request says ``"portable": false``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import bitsandbytes as upstream
import bitsandbytes.functional as F
import eight_bit
import optimizers
import portable
import torch
from bitsandbytes import optim
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Answer = tuple[Tensors, dict[str, Any]]


def _dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as ``bfloat16``."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is not a dtype")
    return dtype


def _state_tensors(state: F.QuantState) -> Answer:
    """The tensors and facts of a quantization state."""
    tensors = {"absmax": state.absmax}
    if state.code is not None:
        tensors["code"] = state.code
    if state.nested:
        tensors |= {"offset": state.offset, "nested_absmax": state.state2.absmax}
        tensors["nested_code"] = state.state2.code
    facts = {"blocksize": state.blocksize, "quant_type": state.quant_type, "nested": state.nested}
    facts["dtype"] = str(state.dtype).removeprefix("torch.")
    if state.shape is not None:
        facts["shape"] = list(state.shape)
    return tensors, facts


def maps(_: Tensors, options: dict[str, Any]) -> Answer:
    """Make one code with a function of upstream's API."""
    return {"code": getattr(F, options["function"])(**options["arguments"])}, {}


def quantize_4bit(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Quantize ``x`` to 4 bits and decode it again."""
    packed, state = F.quantize_4bit(
        tensors["x"],
        blocksize=options["blocksize"],
        quant_type=options["quant_type"],
        compress_statistics=options.get("nested", False),
        quant_storage=_dtype(options.get("quant_storage", "uint8")),
    )
    out, facts = _state_tensors(state)
    out["decoded"] = F.dequantize_4bit(packed, state)
    out["packed"] = packed
    return out, facts


def dequantize_4bit(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Decode any packed bytes with any scales."""
    decoded = portable.portable(
        "dequantize_4bit",
        tensors["packed"],
        tensors["absmax"],
        options["blocksize"],
        options["quant_type"],
        options["shape"],
        _dtype(options["dtype"]),
    )
    return {"decoded": decoded.reshape(options["shape"])}, {}


def quantize_blockwise(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Quantize ``x`` to 8 bits with a code, and decode it again."""
    packed, state = F.quantize_blockwise(
        tensors["x"],
        code=tensors.get("code"),
        blocksize=options["blocksize"],
        nested=options.get("nested", False),
    )
    out, facts = _state_tensors(state)
    out["decoded"] = F.dequantize_blockwise(packed, state)
    out["codes"] = packed
    return out, facts


def dequantize_blockwise(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Decode any 8-bit codes."""
    decoded = portable.portable(
        "dequantize_blockwise",
        tensors["codes"],
        tensors["absmax"],
        tensors["code"],
        options["blocksize"],
        _dtype(options["dtype"]),
    )
    return {"decoded": decoded}, {}


def _layer(options: dict[str, Any]) -> Linear4bit:
    """An unquantized Linear4bit of the wanted kind."""
    return Linear4bit(
        options["in_features"],
        options["out_features"],
        bias=options["bias"],
        compute_dtype=torch.float32,
        compress_statistics=options["nested"],
        quant_type=options["quant_type"],
        quant_storage=_dtype(options["quant_storage"]),
    )


def write_linear(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Quantize a weight through Linear4bit, save its state dict, decode and apply it."""
    layer = _layer(options)
    with torch.no_grad():
        layer.weight.data = tensors["weight"].clone()
        if options["bias"]:
            layer.bias.data = tensors["bias"].clone()
    layer = layer.to("cpu")
    state = {key: value.detach().contiguous() for key, value in layer.state_dict().items()}
    save_file(state, options["path"], metadata={"format": "pt"})
    return _apply(layer, tensors)


def read_linear(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Read a state dict written by somebody else, decode and apply it."""
    state = load_file(options["path"])
    layer = _layer(options)
    statistics = {
        key.removeprefix("weight."): value
        for key, value in state.items()
        if key.startswith("weight.")
    }
    layer.weight = Params4bit.from_prequantized(
        state["weight"], statistics, requires_grad=False, device="cpu", module=layer
    )
    if options["bias"]:
        layer.bias = torch.nn.Parameter(state["bias"])
    return _apply(layer, tensors)


def _apply(layer: Linear4bit, tensors: Tensors) -> Answer:
    """What a loaded layer holds and computes."""
    out, facts = _state_tensors(layer.weight.quant_state)
    out["packed"] = layer.weight.data
    out["decoded"] = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if "input" in tensors:
        out["y"] = layer(tensors["input"].float())
    return out, facts


def make_llama(_: Tensors, options: dict[str, Any]) -> Answer:
    """Save a small random Llama in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options["seed"])
    model = LlamaForCausalLM(LlamaConfig(**options["config"])).to(torch.bfloat16)
    model.save_pretrained(options["path"])
    return {}, {"parameters": sum(p.numel() for p in model.parameters())}


def _answer_llama(model: Any, tensors: Tensors) -> Answer:
    """The quantized weights of a model, decoded, and its logits."""
    out: Tensors = {}
    facts: dict[str, Any] = {"layers": []}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = module.weight
            facts["layers"].append(name)
            out[f"{name}/packed"] = weight.data
            out[f"{name}/absmax"] = weight.quant_state.absmax
            out[f"{name}/decoded"] = F.dequantize_4bit(weight.data, weight.quant_state)
    with torch.no_grad():
        out["logits"] = model(tensors["ids"]).logits.float()
    return out, facts


def write_llama(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Load a model in 4 bits and save it quantized."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        options["source"],
        quantization_config=BitsAndBytesConfig(**options["quantization"]),
        dtype=torch.float32,
        device_map="cpu",
    )
    model.save_pretrained(options["path"])
    return _answer_llama(model, tensors)


def read_llama(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Load a model that was saved quantized."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        options["path"], dtype=torch.float32, device_map="cpu"
    )
    return _answer_llama(model, tensors)


def optim_train(tensors: Tensors, options: dict[str, Any]) -> Answer:
    """Train one kind of optimizer, or go on from a state dict of somebody else."""
    return optimizers.train(
        optim,
        optimizers.KINDS[options["kind"]],
        tensors,
        first=options["first"],
        last=options["last"],
        begin=options.get("begin", 0),
        load=options.get("load"),
        save=options.get("save"),
    )


def optim_facts(_: Tensors, options: dict[str, Any]) -> Answer:
    """Signatures of the optimizer classes, and what they refuse."""
    del options
    return {}, {
        "signatures": optimizers.signatures(optim),
        "outcomes": optimizers.outcomes(optim),
    }


OPS: dict[str, Callable[[Tensors, dict[str, Any]], Answer]] = {
    function.__name__: function
    for function in (
        maps,
        quantize_4bit,
        dequantize_4bit,
        quantize_blockwise,
        dequantize_blockwise,
        write_linear,
        read_linear,
        make_llama,
        write_llama,
        read_llama,
        optim_train,
        optim_facts,
    )
} | eight_bit.OPS


def main(folder: Path) -> int:
    """Answer every job of a folder."""
    torch.set_num_threads(1)
    request = json.loads((folder / "request.json").read_text())
    if request["portable"]:
        portable.force_portable()
    jobs = request["jobs"]
    inputs = load_file(folder / "inputs.safetensors")
    outputs: Tensors = {}
    replies: dict[str, Any] = {}
    for job in jobs:
        tensors = {key: inputs[name] for key, name in job["tensors"].items()}
        try:
            answer, facts = OPS[job["op"]](tensors, job["options"])
        except Exception as error:  # an answer too: the test decides what it means
            traceback.print_exc()
            replies[job["id"]] = {"error": f"{type(error).__name__}: {error}"}
            continue
        replies[job["id"]] = {"error": None, **facts}
        for key, value in answer.items():
            outputs[f"{job['id']}/{key}"] = value.detach().contiguous().clone()
    save_file(outputs, folder / "outputs.safetensors")
    versions = {"bitsandbytes": upstream.__version__, "torch": torch.__version__}
    (folder / "reply.json").write_text(json.dumps({"versions": versions, "jobs": replies}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
