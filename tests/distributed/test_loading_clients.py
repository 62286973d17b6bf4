"""Transformers models with PEFT adapters, loaded straight into shards."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FOLDER = pathlib.Path(__file__).parents[2] / "models" / "rustdoc-llama"
TEXT = torch.arange(20, 52).view(2, 16)


def adapted(model: Any) -> Any:
    targets = ["q_proj", "v_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))


def shard(model: Any) -> None:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)


def on_meta() -> Any:
    config = transformers.AutoConfig.from_pretrained(FOLDER)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def settings(bits: int) -> Any:
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.bfloat16,
    )


def adapters_on_shards(rank: int, world: int, folder: str) -> list[float]:
    from bitsandbytes.distributed._loading import load
    from bitsandbytes.distributed._prepare import prepare

    losses = []
    for bits in (4, 8):
        whole = transformers.AutoModelForCausalLM.from_pretrained(
            FOLDER, quantization_config=settings(bits), dtype=torch.bfloat16
        )
        packed = f"{folder}/{bits}"
        if rank == 0:
            whole.save_pretrained(packed, max_shard_size="500KB")
            assert len(list(pathlib.Path(packed).glob("*.safetensors"))) > 1
        dist.barrier()
        want = whole.state_dict()
        with torch.no_grad():
            expected = whole(TEXT).logits

        for source in (packed, FOLDER):
            model = on_meta()
            if source == FOLDER:  # quantized while it is loaded, as this package's layers say
                replace = transformers.integrations.bitsandbytes.replace_with_bnb_linear
                model = replace(model, ["lm_head"], settings(bits))
            prepare(model, source)
            model = adapted(model)
            shard(model)
            torch.manual_seed(rank)  # adapters must be the same on all ranks nevertheless
            done = load(model, source)
            assert any("lora_A" in name for name in done.initialized)
            assert all("lora_" in name or "inv_freq" in name for name in done.initialized), done
            model.eval()
            found = model.state_dict()
            assert {t.device.type for t in found.values()} == {"cpu"}
            for name, value in want.items():
                mine = found[renamed(name, found)]
                mine = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
                assert mine.dtype == value.dtype, (bits, source, name)
                assert torch.equal(mine.view(-1).view(torch.uint8), bytes_of(value)), name
            for name, value in found.items():
                if "lora_B" in name:
                    assert value.full_tensor().count_nonzero() == 0, name
                if "lora_A" in name:
                    part = value.full_tensor()
                    assert 0 < part.abs().max() < 1, name
            with torch.no_grad():
                torch.testing.assert_close(model(TEXT).logits, expected)
            model.train()
            loss = model(TEXT, labels=TEXT).loss
            loss.backward()
            grads = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
            assert any(grad.abs().max() > 0 for grad in grads)
            losses.append(loss.item())
    return losses


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def renamed(name: str, found: Any) -> str:
    """The name that PEFT has given to the parameter ``name``."""
    from bitsandbytes.distributed._prepare import plain_name

    return next(key for key in found if plain_name(key) == name)


def test_adapters_on_shards(tmp_path: pathlib.Path) -> None:
    first, second = ranks.run(adapters_on_shards, 2, folder=str(tmp_path))
    assert first == second
    assert first[0] == first[1]
    assert first[2] == first[3]
