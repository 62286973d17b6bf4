"""Transformers: load in 4 bits, save, reload, dequantize, generate."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch
from conftest import logits
from safetensors import safe_open
from transformers import AutoModelForCausalLM

LINEARS = 2 * 7  # two layers of q, k, v, o, gate, up, down

CONFIGS = [
    {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": nested}
    for quant_type in ("nf4", "fp4")
    for nested in (False, True)
]
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def layers(model):
    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def test_the_drop_in_is_what_transformers_sees():
    from importlib.metadata import version

    from transformers.utils import is_bitsandbytes_available

    assert is_bitsandbytes_available()
    assert version("bitsandbytes").startswith("0.50.2+halfbyte.")
    assert bnb.nn.Linear4bit.__module__ == "bitsandbytes.nn.modules"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_weights_equal_a_direct_quantization(load_4bit, llama_dir, config):
    model = load_4bit(**config)
    assert len(layers(model)) == LINEARS
    dense = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        weight = dense.get_submodule(name).weight.data
        packed, state = bnb.functional.quantize_4bit(
            weight,
            quant_type=config["bnb_4bit_quant_type"],
            compress_statistics=config["bnb_4bit_use_double_quant"],
        )
        assert torch.equal(module.weight.data, packed), name
        assert module.weight.quant_state == state, name
        error = (bnb.functional.dequantize_4bit(packed, state) - weight).abs().max()
        assert error < 0.2 * weight.abs().max()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_save_and_reload_give_bit_identical_logits(load_4bit, tokens, tmp_path, config, storage):
    model = load_4bit(**config, bnb_4bit_quant_storage=storage)
    assert {m.weight.dtype for m in layers(model)} == {storage}
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "bitsandbytes"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert len(layers(again)) == LINEARS
    assert torch.equal(logits(again, tokens), expected)
    for a, b in zip(layers(model), layers(again), strict=True):
        assert torch.equal(a.weight.view(torch.uint8), b.weight.view(torch.uint8))
        assert a.weight.dtype == b.weight.dtype
        assert a.weight.quant_state == b.weight.quant_state


def test_the_file_has_the_documented_keys(load_4bit, tmp_path):
    load_4bit().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        prefix = "model.layers.0.mlp.up_proj.weight"
        keys = {k.removeprefix(prefix) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
        assert keys == {
            "",
            ".absmax",
            ".quant_map",
            ".nested_absmax",
            ".nested_quant_map",
            ".quant_state.bitsandbytes__nf4",
        }
        state = bytes(file.get_tensor(prefix + ".quant_state.bitsandbytes__nf4").tolist())
    document = json.loads(state)
    assert list(document) == [
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]
    assert (document["dtype"], document["shape"]) == ("bfloat16", [112, 96])


def test_logits_stay_near_those_of_the_decoded_weights(load_4bit, llama_dir, tokens):
    model = load_4bit(dtype=torch.float32, bnb_4bit_compute_dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            decoded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(decoded)
    torch.testing.assert_close(logits(model, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-5)


def test_dequantize_gives_a_dense_model(load_4bit, tokens):
    model = load_4bit()
    expected = logits(model, tokens).float()
    dense = model.dequantize()
    assert not layers(dense)
    got = logits(dense, tokens).float()
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_dequantized_model_saves_and_reloads_unquantized(load_4bit, tmp_path):
    dense = load_4bit().dequantize()
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    expected = dense.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_skipped_modules_stay_dense(load_4bit):
    model = load_4bit(llm_int8_skip_modules=["lm_head", "down_proj"])
    assert len(layers(model)) == LINEARS - 2
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_greedy_and_sampled_generation(load_4bit, tokens):
    model = load_4bit()
    ids = tokens[:1]
    mask = torch.ones_like(ids)
    common = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    once = model.generate(ids, do_sample=False, **common)
    again = model.generate(ids, do_sample=False, **common)
    assert once.shape == (1, ids.shape[1] + 12)
    assert torch.equal(once, again)
    torch.manual_seed(0)
    assert model.generate(ids, do_sample=True, num_beams=2, **common).shape[0] == 1


def test_memory_footprint_is_about_a_quarter(load_4bit, llama_dir):
    dense = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    linear = 2 * sum(
        m.weight.numel() for m in dense.model.layers.modules() if hasattr(m, "in_features")
    )
    saved = dense.get_memory_footprint() - load_4bit().get_memory_footprint()
    assert saved > 0.7 * linear


def test_a_model_can_be_quantized_without_device_map(llama_dir, tokens):
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        llama_dir, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    assert len(layers(model)) == LINEARS
    assert torch.isfinite(logits(model, tokens)).all()


def test_state_dict_round_trip_into_a_fresh_quantized_model(load_4bit, tokens):
    one = load_4bit()
    two = load_4bit(bnb_4bit_quant_type="nf4")
    with torch.no_grad():
        for module in layers(two):
            module.weight.data.view(torch.uint8).zero_()
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(logits(one, tokens), logits(two, tokens))


def test_compiled_forward_equals_eager(load_4bit, tokens):
    model = load_4bit()
    expected = logits(model, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(x), model.model.layers[0].mlp(x))
    assert torch.equal(logits(model, tokens), expected)
