"""Mixture models (MoE) in Transformers and PEFT: their experts in 4 and 8 bits."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate import cpu_offload
from bitsandbytes.integrations import transformers as integration
from conftest import VOCAB, logits
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    JetMoeConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

pytestmark = pytest.mark.usefixtures("light")

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# Of qwen3_ragged an expert's matrices do not divide into blocks of 64.
CONFIGS = {
    "mixtral": lambda: MixtralConfig(
        intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, **COMMON
    ),
    "qwen2": lambda: Qwen2MoeConfig(
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=3,
        **COMMON,
    ),
    "qwen3": lambda: Qwen3MoeConfig(
        intermediate_size=96,
        moe_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        head_dim=16,
        **COMMON,
    ),
    "qwen3_ragged": lambda: Qwen3MoeConfig(
        intermediate_size=96,
        moe_intermediate_size=39,
        num_experts=5,
        num_experts_per_tok=2,
        head_dim=16,
        **(COMMON | {"hidden_size": 52}),
    ),
    "gpt_oss": lambda: GptOssConfig(
        intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, head_dim=16, **COMMON
    ),
}
QUANTIZED = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
}
PARAMETERS = [f"model.layers.{i}.mlp.experts.{p}_proj" for i in (0, 1) for p in ("gate_up", "down")]


@pytest.fixture(autouse=True)
def stays_enabled():
    assert integration.enabled()
    yield
    integration.enable()


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory):
    """The folder of a random bfloat16 model of one architecture."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
            for name, parameter in model.named_parameters():
                if "proj_bias" in name:  # that they start at zero would hide them
                    torch.nn.init.normal_(parameter, std=0.1)
            folders[kind] = tmp_path_factory.mktemp(kind)
            model.to(torch.bfloat16).save_pretrained(folders[kind])
        return folders[kind]

    return folder


@pytest.fixture(scope="session")
def load_moe(moe_dir):
    def load(kind="mixtral", bits="4bit", dtype=torch.float32, folder=None, **options):
        config = BitsAndBytesConfig(**(QUANTIZED[bits] | options))
        model = AutoModelForCausalLM.from_pretrained(
            folder or moe_dir(kind), dtype=dtype, quantization_config=config, device_map="cpu"
        )
        return model.eval()

    return load


def experts_of(model):
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "has_gate")
    }


def ours(caught):
    return [str(w.message) for w in caught if str(w.message).startswith("bitsandbytes: ")]


def packed(model):
    return {
        name: parameter.detach().as_subclass(torch.Tensor).clone()
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.original")
    }


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_are_quantized_while_loading(load_moe, moe_dir, kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_moe(kind)
    assert not ours(caught)
    assert integration.expert_parameters(model) == PARAMETERS
    dense = AutoModelForCausalLM.from_pretrained(moe_dir(kind), dtype=torch.float32)
    for name, module in experts_of(model).items():
        for parameter in ("gate_up_proj", "down_proj"):
            original = getattr(dense.get_submodule(name), parameter).data
            weight = original.transpose(1, 2) if module.is_transposed else original
            layer = bnb.nn.Experts4bit.from_float(weight)
            stored = module.parametrizations[parameter].original
            assert isinstance(stored, bnb.nn.Params4bit)
            assert stored.dtype == torch.uint8
            assert torch.equal(stored.data, layer.weight.data)
            assert stored.quant_state == layer.weight.quant_state
            assert getattr(module, parameter).shape == original.shape


@pytest.mark.parametrize("bits", QUANTIZED)
def test_the_footprint_is_that_of_quantized_experts(load_moe, moe_dir, bits):
    dense = AutoModelForCausalLM.from_pretrained(moe_dir("mixtral"), dtype=torch.bfloat16)
    values = sum(
        p.numel()
        for name, p in dense.named_parameters()
        if name.endswith(("gate_up_proj", "down_proj"))
    )
    integration.disable()
    without = load_moe(bits=bits, dtype=torch.bfloat16)
    integration.enable()
    model = load_moe(bits=bits, dtype=torch.bfloat16)
    saved = without.get_memory_footprint() - model.get_memory_footprint()
    assert saved == 2 * values - (values // 2 if bits == "4bit" else values)
    assert len(packed(without)) == 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_those_of_the_decoded_weights_in_a_loop(load_moe, tokens, kind):
    model = load_moe(kind)
    grouped = logits(model, tokens)
    assert model.config._experts_implementation == integration.IMPLEMENTATION
    # These read, and so decode, the weights. (torch's grouped_mm wants rows of 16 bytes.)
    for implementation in ("eager", "batched_mm", "grouped_mm")[: 2 if "ragged" in kind else 3]:
        model.set_experts_implementation(implementation)
        expected = logits(model, tokens)
        torch.testing.assert_close(grouped, expected, rtol=1e-4, atol=1e-5)
    model.set_experts_implementation(integration.IMPLEMENTATION)
    assert torch.equal(logits(model, tokens), grouped)


@pytest.mark.parametrize("kind", CONFIGS)
def test_8bit_logits_are_near_those_of_the_decoded_weights(load_moe, tokens, kind):
    model = load_moe(kind, "8bit")
    assert integration.expert_parameters(model) == PARAMETERS
    for module in experts_of(model).values():
        assert module.parametrizations["down_proj"].original.dtype == torch.int8
        assert module.parametrizations["down_proj"][0].threshold == 6.0
    grouped = logits(model, tokens)
    model.set_experts_implementation("eager")
    expected = logits(model, tokens)
    assert not torch.equal(grouped, expected)
    assert (grouped - expected).norm() < 0.02 * expected.norm()


def test_no_decoding_and_no_loop_in_a_forward(load_moe, tokens, monkeypatch):
    model = load_moe()
    calls = []
    for name in ("experts_matmul_4bit", "dequantize_4bit"):
        from bitsandbytes.nn import experts

        original = getattr(experts, name)
        monkeypatch.setattr(
            experts, name, lambda *a, o=original, n=name, **k: calls.append(n) or o(*a, **k)
        )
    monkeypatch.setattr(
        bnb.nn.parametrize, "dequantize_4bit", lambda *a, **k: pytest.fail("decoded")
    )
    logits(model, tokens)
    assert calls == ["experts_matmul_4bit"] * 4  # two layers, up and down


def test_tokens_without_an_expert(load_moe):
    """What expert parallelism marks with the number of experts adds nothing."""
    module = experts_of(load_moe())["model.layers.0.mlp.experts"]
    x, ids = torch.randn(5, 64), torch.tensor([[0, 4], [1, 2], [4, 4], [3, 0], [4, 1]])
    weights = torch.rand(5, 2)
    got = module(x, ids, weights)
    assert (got[2] == 0).all()
    only = module(x[:1], ids[:1, :1], weights[:1, :1])
    torch.testing.assert_close(got[:1], only)


def test_generation(load_moe, tokens):
    model = load_moe("qwen3")
    options = {"max_new_tokens": 6, "do_sample": False}
    out = model.generate(tokens[:1], **options)
    assert out.shape == (1, tokens.shape[1] + 6)
    model.set_experts_implementation("eager")
    assert torch.equal(model.generate(tokens[:1], **options), out)


LOADING = """
import sys, threading, time, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig
torch.set_num_threads(1)

def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True))

def make(folder, layers):
    config = MixtralConfig(vocab_size=160, hidden_size=256, intermediate_size=1024,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(folder)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

make(sys.argv[1] + "/small", 1)
make(sys.argv[1] + "/large", 12)
load(sys.argv[1] + "/small")  # imports what it needs
peak, done, before = 0, False, anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1] + "/large")
done = True
thread.join()
peak = max(peak, anonymous())  # the other thread may not have come to it
print(peak - before, model.get_memory_footprint() / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_memory_of_loading_is_that_of_the_quantized_model_and_a_few_tensors(tmp_path):
    """Anonymous memory of a process that loads 144 MiB of experts: never a 16-bit copy of all."""
    # Memory that is given back goes back to the system at once.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    grown = {}
    for switch in "01":
        done = subprocess.run(
            [sys.executable, "-c", LOADING, str(tmp_path)],
            env=os.environ | settings | {"HALFBYTE_QUANTIZE_EXPERTS": switch},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        grown[switch], footprint = map(float, done.stdout.split()[-2:])
        assert footprint < 45 if switch == "1" else footprint > 144
    # Of one tensor of 8 MiB there are a few copies, for Transformers stacks and joins the experts.
    assert grown["1"] < 45 + 8 * 6, grown
    assert grown["0"] > 144, grown


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("kind", CONFIGS)
def test_save_and_reload_are_bit_identical(load_moe, tokens, tmp_path, kind, bits):
    model = load_moe(kind, bits)
    expected, before = logits(model, tokens), packed(model)
    model.save_pretrained(tmp_path / "a")
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert not any("implementation" in key for key in written)
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    once.save_pretrained(tmp_path / "b")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
    for again in (once, twice):
        assert integration.expert_parameters(again) == PARAMETERS
        after = packed(again)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(logits(again, tokens), expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_other_storage_dtypes(load_moe, tokens, tmp_path, storage):
    plain = logits(load_moe(), tokens)
    model = load_moe(bnb_4bit_quant_storage=storage)
    assert all(p.dtype == storage for p in packed(model).values())
    assert torch.equal(logits(model, tokens), plain)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert all(p.dtype == storage for p in packed(again).values())
    assert torch.equal(logits(again, tokens), plain)


def test_the_file_has_the_documented_keys(load_moe, tmp_path):
    load_moe("qwen3").save_pretrained(tmp_path / "4")
    load_moe("qwen3", "8bit").save_pretrained(tmp_path / "8")
    prefix = "model.layers.0.mlp.experts.gate_up_proj"
    expected = {
        "4": {
            "",
            ".absmax",
            ".quant_map",
            ".nested_absmax",
            ".nested_quant_map",
            ".quant_state.bitsandbytes__nf4",
        },
        "8": {"", ".SCB"},
    }
    for bits, names in expected.items():
        with safe_open(tmp_path / bits / "model.safetensors", "pt") as file:
            keys = {k.removeprefix(prefix) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
            assert keys == names
            if bits == "4":
                state = file.get_tensor(prefix + ".quant_state.bitsandbytes__nf4").tolist()
                assert json.loads(bytes(state))["shape"] == [8, 80, 64]


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_checkpoints_with_experts_in_16_bits_inside(load_moe, tokens, tmp_path, kind, bits):
    """What upstream writes: linear layers quantized, experts one by one as they were."""
    integration.disable()
    model = load_moe(kind, bits, dtype=torch.bfloat16)
    assert not packed(model)
    model.save_pretrained(tmp_path)
    integration.enable()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert integration.expert_parameters(again) == PARAMETERS
    direct = load_moe(kind, bits, dtype=torch.bfloat16)
    assert torch.equal(logits(again, tokens), logits(direct, tokens))
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16).eval()
    assert torch.equal(logits(third, tokens), logits(direct, tokens))


def one_by_one(folder, kind, bits):
    """Rewrites a checkpoint as Transformers 4 wrote it: each expert a quantized linear layer."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    decoded = {}
    for key in [key for key in tensors if ".experts." in key]:
        assert key.endswith(".weight")
        weight = tensors.pop(key)
        if bits == "4bit":
            codes, state = bnb.functional.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True
            )
            for name, tensor in state.as_dict(packed=True).items():
                tensors[f"{key}.{name}"] = tensor
            decoded[key] = bnb.functional.dequantize_4bit(codes, state)
        else:
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
            prefix = key.removesuffix("weight")
            tensors[f"{prefix}SCB"] = scales
            tensors[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)
            decoded[key] = bnb.functional.int8_vectorwise_dequant(codes, scales)
        tensors[key] = codes
    save_file({k: t.clone() for k, t in tensors.items()}, folder / "model.safetensors")
    assert len(decoded) == 2 * 3 * {"mixtral": 4, "qwen3": 8, "qwen3_ragged": 5}[kind]
    return decoded


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "qwen3_ragged"])
def test_checkpoints_with_each_expert_a_quantized_linear_layer(
    load_moe, tokens, tmp_path, kind, bits
):
    """Which Transformers 5 alone cannot read."""
    integration.disable()
    load_moe(kind, bits, dtype=torch.bfloat16).save_pretrained(tmp_path)
    integration.enable()
    decoded = one_by_one(tmp_path, kind, bits)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert integration.expert_parameters(again) == PARAMETERS
    name = "block_sparse_moe.experts.2." if kind == "mixtral" else "mlp.experts.2."
    gate, up, down = (
        ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    )
    one = {p: decoded[f"model.layers.1.{name}{p}.weight"] for p in (gate, up, down)}
    module = again.model.layers[1].mlp.experts
    exact = kind != "qwen3_ragged"  # whose blocks run on from one matrix to the next
    for got, expected in (
        (module.gate_up_proj[2], torch.cat([one[gate], one[up]])),
        (module.down_proj[2], one[down]),
    ):
        expected = expected.bfloat16()
        worst = (got - expected).abs().max()
        assert worst <= expected.abs().max() * ((0.01 if bits == "8bit" else 0) if exact else 0.2)
    expected = logits(again, tokens)
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16).eval()
    assert torch.equal(logits(third, tokens), expected)


def test_a_damaged_checkpoint_is_an_error_that_names_the_weight(load_moe, tmp_path):
    from safetensors.torch import load_file, save_file

    load_moe("qwen3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.experts.down_proj"
    del tensors[f"{key}.absmax"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("reloaded", [False, True], ids=["loaded", "reloaded"])
def test_dequantize_gives_a_dense_model(load_moe, tokens, tmp_path, bits, reloaded):
    model = load_moe(bits=bits)
    expected = logits(model, tokens)
    if reloaded:
        model.save_pretrained(tmp_path / "quantized")
        folder = tmp_path / "quantized"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    twin = copy.deepcopy(model)
    dense = model.dequantize()
    assert not integration.expert_parameters(dense)
    assert {type(m).__name__ for m in experts_of(dense).values()} == {"MixtralExperts"}
    assert dense.config._experts_implementation != integration.IMPLEMENTATION
    got = logits(dense, tokens)
    assert (got - expected).norm() < (1e-5 if bits == "4bit" else 0.02) * expected.norm()
    assert torch.equal(logits(twin, tokens), expected)
    # The checkpoint is one as it was before, expert by expert.
    dense.save_pretrained(tmp_path / "dense")
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in keys
    assert not any("absmax" in key or "SCB" in key or "gate_up" in key for key in keys)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again, tokens), got)


def test_a_reloaded_model_without_experts_saves_again(load_4bit, tokens, tmp_path):
    """For which Transformers 5.23 alone raises NotImplementedError."""
    model = load_4bit()
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    again.save_pretrained(tmp_path / "b")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(logits(third, tokens), logits(model, tokens))


# ---- switches ------------------------------------------------------------------------------------


def test_skipped_experts_stay_as_they_are_without_a_word(load_moe, tokens, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_moe(llm_int8_skip_modules=["lm_head", "experts"])
    assert not ours(caught)
    assert not integration.expert_parameters(model)
    assert model.config._experts_implementation != integration.IMPLEMENTATION
    # Only some: one layer's, and of the other one's one projection.
    skip = ["lm_head", "model.layers.0.mlp.experts", "model.layers.1.mlp.experts.down_proj"]
    model = load_moe(llm_int8_skip_modules=skip)
    assert integration.expert_parameters(model) == ["model.layers.1.mlp.experts.gate_up_proj"]
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert integration.expert_parameters(again) == integration.expert_parameters(model)
    assert torch.equal(logits(again, tokens), expected)


def test_disable_gives_transformers_back(load_moe):
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    changed = dict(Bnb4BitHfQuantizer.__dict__)
    integration.disable()
    assert not integration.enabled()
    model = load_moe()
    assert not integration.expert_parameters(model)
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, torch.nn.Parameter)
    assert "update_weight_conversions" not in Bnb4BitHfQuantizer.__dict__  # the base class's
    assert Bnb4BitHfQuantizer.get_quantize_ops is not changed["get_quantize_ops"]
    integration.disable()
    assert integration.enable()
    methods = dict(Bnb4BitHfQuantizer.__dict__)
    assert integration.enable()
    assert dict(Bnb4BitHfQuantizer.__dict__) == methods


def test_8bit_models_with_16bit_weights_keep_their_experts(load_moe):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_moe(bits="8bit", llm_int8_has_fp16_weight=True)
    assert not ours(caught)
    assert not integration.expert_parameters(model)


def test_one_warning_names_what_stays_unquantized(tmp_path):
    torch.manual_seed(0)
    config = JetMoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    stacks = {n: p for n, p in model.named_parameters() if p.dim() == 3}
    model.save_pretrained(tmp_path)
    options = {"load_in_4bit": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
        )
    (message,) = ours(caught)
    size = sum(p.numel() * 2 for p in stacks.values())
    assert message.startswith(
        f"bitsandbytes: {len(stacks)} 3-D weights of JetMoeForCausalLM ({size:,} bytes) stay "
        "unquantized, since they are not experts of a form known here: "
    )
    assert "model.layers.*.mlp.input_linear.weight (2), " in message
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options["llm_int8_skip_modules"] = ["lm_head", "input_linear", "output_linear"]
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
        )
    assert not ours(caught)


def test_a_transformers_that_has_moved_on_still_loads(load_moe, tokens, monkeypatch):
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    integration.disable()
    monkeypatch.setattr(Bnb4BitHfQuantizer, "get_quantize_ops", None)
    with pytest.raises(RuntimeError, match="Bnb4BitHfQuantizer has no method get_quantize_ops"):
        integration.enable()
    with pytest.warns(UserWarning, match="experts of mixture models stay unquantized"):
        integration.watch()
    assert not integration.enabled()
    monkeypatch.undo()
    integration.enable()

    def broken(module):
        raise AttributeError("no such thing")

    monkeypatch.setattr(integration, "_names", broken)
    with pytest.warns(UserWarning, match=r"experts of MixtralForCausalLM stay unquantized: Attr"):
        model = load_moe()
    assert not integration.expert_parameters(model)
    assert logits(model, tokens).isfinite().all()


ORDERS = {
    "bitsandbytes first": "import bitsandbytes, transformers.modeling_utils",
    "transformers first": "import transformers.modeling_utils, bitsandbytes",
    "switched off": "import os; os.environ['HALFBYTE_QUANTIZE_EXPERTS'] = '0'\n"
    "import bitsandbytes, transformers.modeling_utils",
    "halfbyte alone": "import halfbyte, transformers.modeling_utils",
}


@pytest.mark.parametrize("order", ORDERS)
def test_it_is_active_once_transformers_uses_the_drop_in(order):
    package = "halfbyte" if order == "halfbyte alone" else "bitsandbytes"
    code = f"""
import sys
{ORDERS[order]}
from {package}.integrations import transformers as integration
print(integration.enabled(), [type(f).__name__ for f in sys.meta_path].count("_Watcher"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(order.endswith("first")), "0"]


def test_importing_the_drop_in_does_not_import_transformers():
    code = "import sys, bitsandbytes; print('transformers' in sys.modules, 'peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["False", "False"], done.stderr


# ---- training ------------------------------------------------------------------------------------

TARGETS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": PARAMETERS},
    "both": {"target_modules": ["q_proj"], "target_parameters": PARAMETERS[:1]},
}


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("targets", TARGETS)
def test_lora_trains_and_leaves_the_experts_alone(load_moe, tokens, tmp_path, targets, bits):
    base = peft.prepare_model_for_kbit_training(load_moe("qwen3", bits))
    before, plain = packed(base), logits(base, tokens)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **TARGETS[targets]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0] - 0.02, losses
    after = packed(model.get_base_model())
    assert [p.tolist() for p in after.values()] == [p.tolist() for p in before.values()]
    # The adapter comes off after each forward, and does not add up.
    adapted = logits(model, tokens)
    assert torch.equal(logits(model, tokens), adapted)
    with model.disable_adapter():
        near = 0 if bits == "4bit" else 1e-5
        torch.testing.assert_close(logits(model, tokens), plain, rtol=near, atol=near)
    model.save_pretrained(tmp_path)
    fresh = peft.prepare_model_for_kbit_training(load_moe("qwen3", bits))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(logits(again, tokens), adapted)
    if targets != "attention":  # PEFT itself would lose the adapter and say nothing
        with pytest.raises(NotImplementedError, match="cannot merge an adapter into"):
            again.merge_and_unload()


def test_lora_gradients_equal_those_of_the_decoded_weights(load_moe, tokens):
    grads = []
    for implementation in (integration.IMPLEMENTATION, "eager"):
        model = load_moe("qwen3")
        model.set_experts_implementation(implementation)
        torch.manual_seed(0)
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(grads[1]) == 8
    for name, expected in grads[1].items():
        torch.testing.assert_close(grads[0][name], expected, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(load_moe, tokens):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = peft.prepare_model_for_kbit_training(
            load_moe(),
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(base, config).train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(grads[0]) == 8


@pytest.mark.parametrize("bits", QUANTIZED)
def test_copies_and_compiled_experts(load_moe, tokens, bits):
    model = load_moe(bits=bits)
    expected = logits(model, tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), expected)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin, tokens), expected)
    module = experts_of(model)["model.layers.0.mlp.experts"]
    x, ids, weights = torch.randn(7, 64), torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, ids, weights), module(x, ids, weights))


@pytest.mark.parametrize("bits", QUANTIZED)
def test_accelerate_offloads_experts_with_the_rest(load_moe, bits):
    """Its hooks wrap the forward of parametrizations, which the grouped product does not call."""
    model = load_moe(bits=bits)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        want = model(input_ids=tokens).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        for _ in range(2):
            assert torch.equal(model(input_ids=tokens).logits, want)
            stored = next(iter(experts_of(model).values())).parametrizations["down_proj"].original
            assert stored.device.type == "meta"
