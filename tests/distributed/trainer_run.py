"""One rank of a Transformers ``Trainer`` run: rustdoc-llama in 4 bits, LoRA, FSDP by accelerate.

As a script (torchrun, ``accelerate launch``): ``trainer_run.py FOLDER SETTINGS``, where SETTINGS is
JSON for :func:`train`; the result goes to ``FOLDER/result-<rank>``.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

MODEL = pathlib.Path(__file__).parents[2] / "models" / "rustdoc-llama"
FSDP1 = {"use_orig_params": True, "sync_module_states": False}


def pretend_accelerator() -> None:
    """accelerate wraps with FSDP only where it sees an accelerator; the rest of it runs on CPUs."""
    state = PartialState()._shared_state
    state["distributed_type"], state["device"] = DistributedType.MULTI_GPU, torch.device("cpu")


def load(storage: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        MODEL,
        dtype=getattr(torch, storage),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, storage),
            bnb_4bit_quant_storage=getattr(torch, storage),
        ),
        device_map={"": "cpu"},
    )


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 4096, (16, 24), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(
    folder: str,
    version: int | None,
    storage: str,
    optim: str,
    steps: int,
    state_dict: str = "SHARDED_STATE_DICT",
    bf16: bool = False,
    **settings: Any,
) -> Trainer:
    options: dict[str, Any] = {}
    if version is not None:
        config = {
            "version": version,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": state_dict,
            **(FSDP1 if version == 1 else {}),
        }
        options = {"fsdp": True, "fsdp_config": config | settings}
    torch.manual_seed(0)
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(load(storage), adapter)
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        bf16=bf16,
        optim=optim,
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **options,
    )
    assert arguments.device.type == "cpu"  # makes the state that accelerate will find
    if version is not None:
        pretend_accelerator()
    return Trainer(model, arguments, train_dataset=rows())  # type: ignore[arg-type]


def raw_bytes(model: Any) -> int:
    """Bytes of packed weights that this rank keeps between steps."""
    total = 0
    for name, p in model.named_parameters():
        if "base_layer" in name:
            local = p.to_local() if hasattr(p, "to_local") else p
            total += local.numel() * local.element_size()
    return total


def train(folder: str, resume: bool = False, **settings: Any) -> dict[str, Any]:
    run = trainer(folder, **settings)
    saved = str(pathlib.Path(folder) / "checkpoint-2") if resume else None
    run.train(resume_from_checkpoint=saved)
    optimizer = run.optimizer.optimizer
    return {
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in run.state.log_history if "loss" in entry],
        "optimizer": type(optimizer).__module__.partition(".")[0] + "." + type(optimizer).__name__,
        "bits": sorted(
            {str(t.dtype) for s in optimizer.state.values() for k, t in s.items() if k == "state1"}
        ),
        "base": raw_bytes(run.model),
        "weights": sorted({type(p).__name__ for p in run.model.parameters()}),
        "kind": [type(run.model_wrapped).__name__, str(run.accelerator.distributed_type)],
    }


if __name__ == "__main__":
    assert bnb.__name__ == "bitsandbytes"
    torch.set_num_threads(1)
    _result = train(sys.argv[1], **json.loads(sys.argv[2]))
    _file = pathlib.Path(sys.argv[1]) / f"result-{os.environ['RANK']}"
    _file.write_text(json.dumps(_result))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still hold tensors at exit, and abort (pytorch#179291)
