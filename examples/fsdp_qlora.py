"""QLoRA of a causal LM under FSDP2 or FSDP1, on GPUs (nccl) or on CPUs (gloo).

    torchrun --nproc-per-node 2 examples/fsdp_qlora.py
    torchrun --nproc-per-node 2 examples/fsdp_qlora.py --resume
    torchrun --nproc-per-node 2 examples/fsdp_qlora.py --fsdp 1 --optim PagedAdamW8bit
    accelerate launch --config_file examples/fsdp_qlora.yaml examples/fsdp_qlora.py --accelerate

The base model is quantized to NF4 with double quantization, the LoRA adapters are trained in
float32. The same windows of text make up a step on every number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from bitsandbytes import distributed
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "uint8": torch.uint8}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "rustdoc-llama")
    parser.add_argument("--text", type=Path, default=ROOT / "models" / "finetune" / "train.txt")
    parser.add_argument("--out", type=Path, default=Path("out"), help="adapter and checkpoints")
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=2)
    parser.add_argument("--accelerate", action="store_true", help="let accelerate shard the model")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="to compute in")
    parser.add_argument("--storage", choices=DTYPES, default="bf16", help="of the packed weights")
    parser.add_argument("--optim", default="AdamW8bit", help="a class of bitsandbytes.optim")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8, help="windows per step, of all ranks")
    parser.add_argument("--window", type=int, default=128, help="tokens per window")
    parser.add_argument("--lora-rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=25, help="steps; 0: never")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
    parser.add_argument("--json", type=Path, help="write losses, bytes and memory here")
    return parser.parse_args(arguments)


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def adapt(model: Any, options: argparse.Namespace) -> Any:
    """The model with LoRA adapters on every linear layer but the head."""
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)  # every rank begins with the same adapters
    return get_peft_model(model, config).train()


def load_sharded(options: argparse.Namespace) -> Any:
    """The model under FSDP2; every rank reads, and quantizes, its own part and no more."""
    dtype, storage = DTYPES[options.dtype], DTYPES[options.storage]
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, layer in list(model.model.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                size = (layer.in_features, layer.out_features, layer.bias is not None)
                packed = bnb.nn.LinearNF4(*size, compute_dtype=dtype, quant_storage=storage)
                model.model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # PEFT asks
    model.tie_weights()
    distributed.prepare(model, options.model)
    model = adapt(model, options)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    distributed.load(model, options.model)
    return model


def load_whole(options: argparse.Namespace) -> Any:
    """The model as Transformers loads it; whole on every rank until it is sharded."""
    dtype = DTYPES[options.dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=DTYPES[options.storage],
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=dtype, quantization_config=quantization, device_map={"": device()}
    )
    return adapt(model, options)


def shard_fsdp1(model: Any, options: argparse.Namespace) -> Any:
    """The model under FSDP1, a decoder layer a unit."""
    decoder = type(model.get_base_model().model.layers[0])

    def apart(module: torch.nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        # FSDP1 lays a unit's parameters into one tensor: they must agree in dtype and in whether
        # they are trained.
        if recurse or isinstance(module, decoder):
            return True
        if next(module.children(), None) is not None:
            return False
        trained = any(p.requires_grad for p in module.parameters())
        packed = isinstance(module, bnb.nn.Linear4bit)
        return trained or (packed and options.storage not in (options.dtype, "uint8"))

    # Integers cannot be laid into it: they stay whole on every rank.
    integers = [p for p in model.parameters() if not p.is_floating_point()]
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=apart,
        device_mesh=init_device_mesh(device().type, (dist.get_world_size(),)),
        device_id=device(),
        ignored_states=integers or None,
    )


class Wire(TorchDispatchMode):
    """Counts the bytes that this rank sends when collectives go round a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, others = func.name(), dist.get_world_size() - 1
        if name.startswith("c10d::_allgather_base_"):
            self.gathered += others * args[1].nbytes
        elif name.startswith("c10d::allgather_"):
            self.gathered += others * sum(t.nbytes for t in args[1])
        elif name.startswith("c10d::_reduce_scatter_base_"):
            self.reduced += others * args[0].nbytes
        elif name.startswith("c10d::allreduce_"):
            self.reduced += 2 * others * sum(t.nbytes for t in args[0]) // (others + 1)
        return func(*args, **(kwargs or {}))


def batch(ids: torch.Tensor, step: int, options: argparse.Namespace) -> torch.Tensor:
    """This rank's windows of a step: int64 [batch / ranks, window]."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(ids) - options.window, (options.batch,), generator=generator)
    mine = starts[dist.get_rank() :: dist.get_world_size()]
    return torch.stack([ids[s : s + options.window] for s in mine.tolist()]).to(device())


def prepare(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Sharded model, its optimizer, and what runs the backward pass."""
    if options.fsdp == 2 and not options.accelerate:
        model = load_sharded(options)
    else:
        model = load_whole(options)
        if not options.accelerate:
            model = shard_fsdp1(model, options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(bnb.optim, options.optim)(trained, lr=options.lr)
    if options.accelerate:
        from accelerate import Accelerator, DistributedType, PartialState

        if device().type == "cpu":  # where accelerate by itself replicates instead of sharding
            PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        accelerator = Accelerator()
        return *accelerator.prepare(model, optimizer), accelerator.backward
    return model, optimizer, torch.Tensor.backward


def train(options: argparse.Namespace, model: Any, optimizer: Any, backward: Any) -> dict[str, Any]:
    """Trains and saves; every rank calls it, and gets the same losses and figures."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    checkpoints = options.out / "checkpoints"
    first = distributed.load_checkpoint(checkpoints, model, optimizer).step if options.resume else 0
    losses: list[float] = []
    wire = Wire()
    with distributed.watch() as watcher:  # names the rank that dies
        for step in range(first, options.steps):
            watcher.step(step)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * min(1.0, (step + 1) / 5)
            windows = batch(ids, step, options)
            with wire if step == first else nullcontext():  # all steps send the same
                loss = model(input_ids=windows, labels=windows).loss
                backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loss = loss.detach().float()
            dist.all_reduce(loss)
            losses.append(loss.item() / world)
            if rank == 0:
                print(f"step {step:4d}  loss {losses[-1]:.5f}", flush=True)
            if options.save_every and (step + 1) % options.save_every == 0:
                distributed.save_checkpoint(
                    checkpoints, model, optimizer, step=step + 1, keep=2, trainable_only=True
                )
    return {"first": first, "losses": losses, **measured(wire)}


def save_adapter(options: argparse.Namespace, model: Any) -> None:
    """The adapters in PEFT's format, by the first rank; every rank calls it."""
    adapter = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    adapter = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        for name, value in adapter.items()
        if "lora_" in name
    }
    if dist.get_rank() == 0:
        peft = model.module if isinstance(model, FullyShardedDataParallel) else model
        peft.save_pretrained(options.out / "adapter", state_dict=adapter)


def measured(wire: Wire) -> dict[str, Any]:
    """Bytes sent in a step and peak memory (bytes) of every rank."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    mine = torch.tensor([wire.gathered, wire.reduced, peak], device=device())
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    columns = zip(*(figures.tolist() for figures in all_ranks), strict=True)
    return dict(zip(("gathered", "reduced", "peak"), map(list, columns), strict=True))


def main() -> None:
    options = parse()
    if "RANK" not in os.environ:
        sys.exit("launch this with torchrun or accelerate, see the top of the file")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group()
    if options.batch % dist.get_world_size():
        sys.exit(f"--batch {options.batch} does not divide by {dist.get_world_size()} ranks")
    if not options.resume and distributed.latest_checkpoint(options.out / "checkpoints"):
        sys.exit(f"{options.out} holds checkpoints: give --resume, or another --out")
    model, optimizer, backward = prepare(options)
    result = train(options, model, optimizer, backward)
    save_adapter(options, model)
    if dist.get_rank() == 0:
        for rank, (gathered, reduced, peak) in enumerate(
            zip(result["gathered"], result["reduced"], result["peak"], strict=True)
        ):
            print(
                f"rank {rank}: {gathered / 1e6:.3f} MB of weights and {reduced / 1e6:.3f} MB of "
                f"gradients sent in a step, peak memory {peak / 1e6:.0f} MB"
            )
        if options.json:
            options.json.write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
