"""PEFT on 4-bit weights: train, merge, unmerge, save, reload."""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import pytest
import torch
from conftest import logits

TARGETS = ["q_proj", "v_proj", "down_proj"]

ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True),
    "rslora-all-linear": lambda: peft.LoraConfig(
        r=4, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    # VeRA shares its projections, which wants targets of one shape.
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=4, tinit=1, tfinal=1, deltaT=1, total_step=10, target_modules=TARGETS
    ),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "road": lambda: peft.RoadConfig(group_size=8, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "pvera": lambda: peft.PveraConfig(r=8, target_modules=["q_proj", "o_proj"]),
}
# Outside autocast these return float32 from bfloat16 inputs (PEFT's own conversion), which the
# attention of a bfloat16 model refuses: they are tried on a float32 model.
FLOAT32 = {"ia3", "road", "randlora", "pvera"}
# PEFT has no merging of IA3 into 4-bit weights and raises NotImplementedError.
MERGING = sorted(ADAPTERS.keys() - {"ia3", "adalora"})
# Adapters that start small or learn slowly.
RATES = {"ia3": 5e-2}


def load_for(kind, load_4bit):
    return load_4bit(dtype=torch.float32 if kind in FLOAT32 else torch.bfloat16)


def packed(model):
    return {
        name: module.weight.data.view(torch.uint8).clone()
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def train(model, tokens, steps=8, lr=1e-2):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_learn_and_leave_the_base_alone(load_4bit, tokens, kind):
    base = peft.prepare_model_for_kbit_training(
        load_for(kind, load_4bit), use_gradient_checkpointing=False
    )
    before = packed(base)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, ADAPTERS[kind]())
    losses = train(model, tokens, lr=RATES.get(kind, 1e-2))
    assert torch.tensor(losses).isfinite().all()
    # (PVeRA samples, so its last loss need not be its lowest.)
    assert min(losses) < losses[0] - 0.02, losses
    after = packed(model.get_base_model())
    assert len(before) == 14
    for name, weight in before.items():
        key = next(k for k in after if k.removesuffix(".base_layer") == name)
        assert torch.equal(after[key], weight), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_saves_and_reloads(load_4bit, tokens, tmp_path, kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(load_for(kind, load_4bit), ADAPTERS[kind]())
    train(model, tokens, steps=2)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load_for(kind, load_4bit), tmp_path).eval()
    if kind == "adalora":  # PEFT does not save `ranknum`, which enters as 1e-5 of a divisor
        torch.testing.assert_close(logits(again, tokens), expected, rtol=2e-2, atol=1e-2)
    else:
        assert torch.equal(logits(again, tokens), expected)


@pytest.mark.filterwarnings("ignore:Merge .* module to 4-bit")
@pytest.mark.parametrize("kind", MERGING)
def test_merge_and_unmerge(load_4bit, tokens, kind):
    torch.manual_seed(0)
    base = load_4bit(dtype=torch.float32)
    plain = logits(base, tokens)
    model = peft.get_peft_model(base, ADAPTERS[kind]())
    train(model, tokens, steps=4)
    adapted = logits(model, tokens)
    moved = (adapted - plain).norm()
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert isinstance(module.weight, bnb.nn.Params4bit)
            assert module.weight.dtype == torch.uint8, "the merged weight was not requantized"
            assert module.weight.quant_state is not None
    merged = logits(model, tokens)
    if kind == "randlora":  # its delta weight is not what its forward computes, by PEFT's own sums
        assert merged.isfinite().all()
        return
    # Merging requantizes: the merged model is near the adapted one, not equal to it.
    assert (merged - adapted).norm() < 0.6 * (moved + plain.norm() * 0.3)
    model.unmerge_adapter()
    restored = logits(model, tokens)
    assert (restored - adapted).norm() < 0.6 * (moved + plain.norm() * 0.3)


@pytest.mark.filterwarnings("ignore:Merge .* module to 4-bit")
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_merge_and_unload_keeps_linear4bit_and_saves(load_4bit, tokens, tmp_path, storage):
    torch.manual_seed(0)
    base = load_4bit(bnb_4bit_quant_storage=storage)
    model = peft.get_peft_model(base, ADAPTERS["lora"]())
    train(model, tokens, steps=2)
    merged = model.merge_and_unload()
    linears = [m for m in merged.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linears) == 14
    for module in linears:
        assert module.weight.dtype == storage
        assert module.weight.quant_state.nested
    expected = logits(merged, tokens)
    merged.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert torch.equal(logits(again, tokens), expected)


def test_gradients_equal_those_of_the_decoded_weights(load_4bit, llama_dir, tokens):
    """LoRA gradients through the fused kernels against autograd through dense float32 weights."""
    from transformers import AutoModelForCausalLM

    quantized = load_4bit(dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            decoded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(decoded)
    grads = []
    for base in (quantized, dense):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, ADAPTERS["lora"]())
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(grads[1]) == 2 * 2 * 3
    for name, expected in grads[1].items():
        torch.testing.assert_close(grads[0][name], expected, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(load_4bit, tokens):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = peft.prepare_model_for_kbit_training(
            load_4bit(),
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        model = peft.get_peft_model(base, ADAPTERS["lora"]()).train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_prepare_for_kbit_training_leaves_packed_weights_alone(load_4bit):
    for storage in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
        model = load_4bit(bnb_4bit_quant_storage=storage)
        before = packed(model)
        model = peft.prepare_model_for_kbit_training(model)
        assert all(torch.equal(w, before[n]) for n, w in packed(model).items())
        linear = model.model.layers[0].mlp.up_proj
        assert linear.weight.dtype == storage
        assert model.model.norm.weight.dtype == torch.float32


def test_deepcopy_of_a_peft_model(load_4bit, tokens):
    import copy

    model = peft.get_peft_model(load_4bit(), ADAPTERS["lora"]())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), logits(model, tokens))
