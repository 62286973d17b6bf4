"""accelerate: `load_and_quantize_model`, preparing for training, moving parameters."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
from conftest import logits
from transformers import AutoConfig, AutoModelForCausalLM


def layers(model):
    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_load_and_quantize_model(llama_dir, load_4bit, tokens, tmp_path, quant_type, nested):
    config = BnbQuantizationConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype="bf16",
        torch_dtype="bf16",
    )
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama_dir))
    empty.tie_weights()
    # accelerate refuses the *string* "cpu" here (it takes it for offloading) and hands a device on
    # to safetensors, which wants the string: with a PyTorch file the device is fine.
    weights = tmp_path / "pytorch_model.bin"
    dense = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    torch.save(dense.state_dict(), weights)
    model = load_and_quantize_model(
        empty, config, weights_location=str(weights), device_map={"": torch.device("cpu")}
    )
    assert len(layers(model)) == 14
    reference = load_4bit(bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested)
    for ours, theirs in zip(layers(model), layers(reference), strict=True):
        assert torch.equal(ours.weight.data, theirs.weight.data)
        assert ours.weight.quant_state == theirs.weight.quant_state
    assert torch.equal(logits(model, tokens), logits(reference, tokens))


def test_accelerator_prepares_and_trains_a_lora_model(load_4bit, tokens):
    import peft

    accelerator = Accelerator(cpu=True)
    model = peft.get_peft_model(load_4bit(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_set_module_tensor_to_device_keeps_the_parameter_class(load_4bit):
    from accelerate.utils import set_module_tensor_to_device

    model = load_4bit()
    module = model.model.layers[0].mlp.up_proj
    before = module.weight.data.clone()
    state = module.weight.quant_state
    set_module_tensor_to_device(model, "model.layers.0.mlp.up_proj.weight", "cpu", value=before)
    assert type(module.weight).__name__ == "Params4bit"
    assert torch.equal(module.weight.data, before)
    assert module.weight.quant_state == state


def test_features_that_accelerate_asks_for():
    assert "multi_backend" in bnb.features
    assert "cpu" in bnb.supported_torch_devices
