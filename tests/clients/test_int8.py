"""LLM.int8() through its clients: Transformers, PEFT, accelerate."""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from conftest import logits
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]
LINEARS = 2 * 7  # two layers of q, k, v, o, gate, up, down

ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=4, tinit=1, tfinal=1, deltaT=1, total_step=10, target_modules=TARGETS
    ),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "road": lambda: peft.RoadConfig(group_size=8, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}
# PEFT itself has no merging of these into 8-bit weights.
MERGING = sorted(ADAPTERS.keys() - {"ia3", "adalora"})
RATES = {"ia3": 5e-2}


@pytest.fixture
def load_8bit(llama_dir):
    """Loads the model in 8 bits; keywords override the configuration."""

    def load(dtype=torch.float32, **config):
        return AutoModelForCausalLM.from_pretrained(
            llama_dir,
            dtype=dtype,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True, **config),
            device_map="cpu",
        ).eval()

    return load


def layers(model):
    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_load_in_8bit(load_8bit, llama_dir, tokens, threshold, dtype):
    model = load_8bit(dtype, llm_int8_threshold=threshold)
    assert len(layers(model)) == LINEARS
    dense = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=dtype).eval()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            assert module.state.threshold == threshold
            weight = dense.get_submodule(name).weight.data
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
            assert torch.equal(module.weight.data, codes), name
            assert torch.equal(module.weight.SCB, scales), name
    want, got = logits(dense, tokens).float(), logits(model, tokens).float()
    assert (got - want).norm() < 0.05 * want.norm()
    assert model.get_memory_footprint() < dense.get_memory_footprint()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_save_and_reload_give_bit_identical_logits(load_8bit, tokens, tmp_path, threshold):
    model = load_8bit(torch.bfloat16, llm_int8_threshold=threshold)
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert {f"model.layers.0.mlp.up_proj.{k}" for k in ("weight", "SCB", "weight_format")} <= (
            keys
        )
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert len(layers(again)) == LINEARS
    assert layers(again)[0].state.threshold == threshold
    assert torch.equal(logits(again, tokens), want)
    for ours, theirs in zip(layers(again), layers(model), strict=True):
        assert torch.equal(ours.weight.data, theirs.weight.data)
        assert torch.equal(ours.weight.SCB, theirs.weight.SCB)


def test_skip_modules(load_8bit):
    model = load_8bit(llm_int8_skip_modules=["down_proj", "lm_head"])
    assert len(layers(model)) == LINEARS - 2
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_float_weights_that_are_quantized_for_each_product(load_8bit, tokens):
    model = load_8bit(llm_int8_has_fp16_weight=True)
    assert all(m.weight.is_floating_point() and m.state.has_fp16_weights for m in layers(model))
    assert torch.equal(logits(model, tokens), logits(load_8bit(), tokens))


def test_float_weights_are_saved_and_reloaded(load_8bit, tokens, tmp_path):
    """Transformers alone cannot: it makes parameters with gradients int8."""
    want = logits(load_8bit(torch.bfloat16, llm_int8_has_fp16_weight=True), tokens)
    folder = tmp_path
    for generation in range(2):
        if generation == 0:
            model = load_8bit(torch.bfloat16, llm_int8_has_fp16_weight=True)
        model.save_pretrained(folder / str(generation))
        model = AutoModelForCausalLM.from_pretrained(folder / str(generation)).eval()
        assert len(layers(model)) == LINEARS
        assert all(m.weight.dtype == torch.bfloat16 for m in layers(model))
        assert torch.equal(logits(model, tokens), want)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_dequantize_after_saving(llama_dir, tokens, tmp_path, bits):
    """Saving leaves the name of a dtype in the configuration."""
    config = BitsAndBytesConfig(**{bits: True})
    arguments = {"dtype": torch.bfloat16, "quantization_config": config}
    models = [AutoModelForCausalLM.from_pretrained(llama_dir, **arguments) for _ in range(2)]
    models[1].save_pretrained(tmp_path)
    want, got = (logits(model.dequantize().eval(), tokens) for model in models)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


@pytest.mark.parametrize("used", [False, True])
def test_dequantize(load_8bit, tokens, used):
    model = load_8bit()
    want = {
        name: bnb.functional.int8_vectorwise_dequant(m.weight.data, m.weight.SCB)
        for name, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear8bitLt)
    }
    before = logits(model, tokens) if used else None
    model.dequantize()
    assert not layers(model)
    for name, weight in want.items():
        assert torch.equal(model.get_submodule(name).weight.data, weight), name
    if before is not None:
        got = logits(model, tokens)
        assert (got - before).norm() < 0.05 * before.norm()


def test_generate(load_8bit, tokens):
    model = load_8bit(torch.bfloat16)
    out = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (2, tokens.shape[1] + 5)
    assert torch.equal(out[:, :-5], tokens)


def train(model, tokens, steps=8, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
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


def codes(model):
    return [(m.weight.data.clone(), m.weight.SCB.clone()) for m in layers(model)]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_learn_and_leave_the_base_alone(load_8bit, tokens, kind):
    base = peft.prepare_model_for_kbit_training(load_8bit(), use_gradient_checkpointing=False)
    before = codes(base)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, ADAPTERS[kind]())
    losses = train(model, tokens, lr=RATES.get(kind, 1e-2))
    assert min(losses) < losses[0] - 0.02, losses
    after = codes(model)
    assert len(before) == len(after) == LINEARS
    for (codes0, scales0), (codes1, scales1) in zip(before, after, strict=True):
        assert torch.equal(codes0, codes1)
        assert torch.equal(scales0, scales1)


@pytest.mark.filterwarnings("ignore:Merge .* module to 8-bit")
@pytest.mark.parametrize("kind", MERGING)
def test_merge_and_unload(load_8bit, tokens, kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(load_8bit(), ADAPTERS[kind]())
    plain = logits(model, tokens)
    train(model, tokens)
    want = logits(model, tokens)
    assert (want - plain).norm() > 0.1 * plain.norm()
    merged = model.merge_and_unload()
    assert len(layers(merged)) == LINEARS
    for module in layers(merged):
        assert type(module.weight) is bnb.nn.Int8Params
        assert module.weight.dtype == torch.int8
    got = logits(merged, tokens)
    if kind == "randlora":  # its delta weight is not what its forward computes, by PEFT's own sums
        assert got.isfinite().all()
        return
    assert (got - want).norm() < 0.1 * want.norm()


def test_offloaded_layers_give_the_same_and_free_their_codes(load_8bit, tokens):
    """accelerate keeps the state dict aside, and moves weight and scales in for each forward."""
    model = load_8bit(llm_int8_threshold=6.0)
    want = logits(model, tokens)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    module = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, module.in_features)
    expected = module(x)
    cpu_offload(
        module,
        execution_device=torch.device("cpu"),
        state_dict={
            name.removeprefix("model.layers.0.mlp.up_proj."): value
            for name, value in saved.items()
            if name.startswith("model.layers.0.mlp.up_proj.")
        },
    )
    assert module.weight.device.type == "meta"
    for _ in range(2):
        assert torch.equal(module(x), expected)
        assert module.weight.device.type == "meta"
        assert module.state.CB is None or module.state.CB.device.type == "meta"
    assert torch.equal(logits(model, tokens), want)
    remove_hook_from_module(module)
