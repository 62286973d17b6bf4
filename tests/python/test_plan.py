"""The memory plan: shapes, sizes, what fits, and its command line. Measured steps:
``tests/distributed/test_plan_measured.py``."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib

import pytest
import torch
from halfbyte import functional as F
from halfbyte.distributed._plan import Plan, plan
from halfbyte.distributed._plan_memory import hold
from halfbyte.distributed._plan_model import Model, Weight, read_model
from halfbyte.distributed._plan_setting import Setting, parse_bytes, parse_optimizer
from halfbyte.nn import Linear4bit

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ROOT / "models" / "rustdoc-llama"
GIB = 1 << 30

# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-70b", 68_976_648_192),
        ("llama-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-72b", 72_706_203_648),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    assert read_model(name).numel == parameters


def shapes(model: Model) -> dict[str, tuple[tuple[int, ...], int | None, bool]]:
    return {w.name: (w.shape, w.layer, w.linear) for w in model.weights}


def test_headers_config_and_transformers_agree():
    pytest.importorskip("safetensors")
    from_files = read_model(SMALL)
    from_config = read_model(SMALL / "config.json")
    assert shapes(from_files) == shapes(from_config)
    assert from_files.dtype == from_config.dtype == torch.bfloat16
    assert "lm_head.weight" not in shapes(from_files)  # tied
    pytest.importorskip("transformers")
    from halfbyte.distributed._plan_model import _on_meta

    config = json.loads((SMALL / "config.json").read_text())
    assert {w.name: (w.shape, w.layer, w.linear) for w in _on_meta(config)} == shapes(from_files)


def test_other_architectures_come_from_transformers(tmp_path):
    pytest.importorskip("transformers")
    config = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 100, "word_embed_proj_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(tmp_path)
    linear = {w.name.rpartition("decoder.")[2] for w in model.weights if w.linear}
    assert "layers.1.fc1.weight" in linear
    assert len(linear) == 12
    assert model.inner == 128
    assert not model.gated
    assert not model.modelled
    assert "estimate" in str(plan(model))


def test_gpt2_has_linear_layers_of_its_own_kind():
    pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    found = plan({**config, "n_positions": 64})
    assert sum(weight.linear for weight in found.model.weights) == 8
    widths = ((64, 192), (64, 64), (64, 256), (256, 64))
    assert found.trained == 2 * 16 * sum(a + b for a, b in widths)
    named = plan({**config, "n_positions": 64}, lora_targets="c_attn")
    assert named.trained == 2 * 16 * (64 + 192)


def test_a_quantized_checkpoint_is_planned_as_it_is(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    config = json.loads((SMALL / "config.json").read_text())
    config["num_hidden_layers"] = 1
    tensors = {}
    for weight in read_model(config).weights:
        value = torch.randn(weight.shape)
        if weight.linear:
            rows, columns = weight.shape
            layer = Linear4bit(columns, rows, bias=False, quant_type="fp4")
            layer.weight.data.copy_(value)
            state = layer.to("cpu").state_dict(prefix=weight.name.removesuffix("weight"))
            tensors |= state
        else:
            tensors[weight.name] = value
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan(tmp_path, ranks=2)
    assert shapes(found.model) == shapes(read_model(config))
    assert (found.setting.quant, found.setting.double_quant) == ("fp4", True)
    assert found.setting.dtype is torch.float32
    same = plan(config, ranks=2, quant="fp4", dtype="fp32")
    assert (found.rows, found.wire) == (same.rows, same.wire)
    with pytest.raises(ValueError, match=r"quantized already, as fp4; quant says 'int8'"):
        plan(tmp_path, quant="int8")


def test_what_is_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model at .*nowhere; expected a folder"):
        plan(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        plan(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json lacks hidden_size, a positive integer"):
        plan({"model_type": "llama"})
    lone = dataclasses.replace(read_model("llama-7b"), weights=(Weight("w", (4, 4), None, False),))
    with pytest.raises(ValueError, match="named after a numbered layer"):
        plan(lone)


# ---- sizes ---------------------------------------------------------------------------------------


def alone(shape: tuple[int, int]) -> Model:
    """A model that has one linear weight."""
    weights = (Weight("layers.0.q_proj.weight", shape, 0, True),)
    return dataclasses.replace(read_model("llama-7b"), layers=1, weights=weights)


@pytest.mark.parametrize("shape", [(7, 9), (33, 65), (512, 384)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_packed_sizes_are_those_of_quantized_tensors(shape, nested, storage):
    packed, state = F.quantize_4bit(
        torch.randn(shape), compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    scales = [state.absmax, state.state2.absmax] if nested else [state.absmax]
    s = Setting(strategy="single", quant_storage=storage, double_quant=nested)
    held = hold(alone(shape), s)[0]
    assert held.codes == packed.nbytes
    assert held.scales == sum(scale.nbytes for scale in scales)
    # Of three ranks the first has the longest part of each tensor.
    held = hold(alone(shape), dataclasses.replace(s, strategy="fsdp2", ranks=3))[0]
    assert held.codes == -(-packed.numel() // 3) * storage.itemsize
    assert held.scales == sum(-(-t.numel() // 3) * t.element_size() for t in scales)
    assert held.packed == 3 * (held.codes + held.scales)


def test_int8_sizes_go_by_rows():
    held = hold(alone((7, 9)), Setting(ranks=2, quant="int8"))[0]
    assert (held.codes, held.scales, held.packed) == (4 * 9, 4 * 4, 2 * 4 * (9 + 4))


@pytest.mark.parametrize(
    "optim", ["AdamW8bit", "AdamW32bit", "Lion8bit", "AdEMAMix8bit", "SGD8bit"]
)
def test_states_are_those_of_the_optimizers(optim):
    from halfbyte import optim as optimizers

    made = getattr(optimizers, optim)
    arguments = {"momentum": 0.9} if optim == "SGD8bit" else {}
    for rank in (4, 128):  # adapters of fewer than 4,096 elements have 32-bit states
        s = Setting(lora_rank=rank, optim=parse_optimizer(optim), strategy="single")
        shapes_ = [(rank, 65), (33, rank)]
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes_]
        optimizer = made(parameters, lr=1e-3, **arguments)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states = [
            value
            for state in optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not key.startswith("qmap")
        ]
        held = hold(alone((33, 65)), s)[0]
        assert held.state == sum(value.nbytes for value in states)
        assert held.adapters == held.gradients == sum(p.nbytes for p in parameters)


def test_paged_states_of_large_parts_are_in_files():
    def held(ranks: int):
        s = Setting(ranks=ranks, lora_rank=100, optim=parse_optimizer("paged_adamw8bit"))
        return hold(alone((1000, 2000)), s)[0]

    assert held(1).paged == 2 * 300_000
    # On two ranks the part of B has 50,000 elements; that of A has just the 100,000 it takes.
    assert held(2).paged == 2 * 100_000
    assert held(2).state == 2 * 50_000 + 2 * 4 * (-(-50_000 // 256) + -(-100_000 // 256))


# ---- plans ---------------------------------------------------------------------------------------


def test_bits_on_the_wire_are_the_theory():
    found = plan("llama-70b", ranks=2)
    assert found.wire.bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-6)
    assert found.wire.bits == pytest.approx(4.127, abs=5e-4)
    assert plan("llama-70b", ranks=2, double_quant=False).wire.bits == pytest.approx(4.5)
    # Forward and backward, of which half comes from the other rank.
    linear = sum(w.numel for w in found.model.weights if w.linear)
    assert found.wire.packed == pytest.approx(linear * found.wire.bits / 8, rel=1e-9)
    once = found.change(reshard=False)
    assert once.wire.packed * 2 == found.wire.packed
    assert plan("llama-7b").wire.total == 0


def test_the_total_is_the_largest_moment():
    found = plan("llama-8b", ranks=4, gpu_mem="24G")
    assert found.total == max(moment.total for moment in found.moments)
    assert found.total == sum(row.at_peak for row in found.rows)
    assert all(row.size >= row.at_peak for row in found.rows)
    accumulated = found.change(accumulation=4)
    assert all(moment.parts["gradients"] for moment in accumulated.moments)
    assert found.moments[0].parts["gradients"] == 0


def test_sharding_and_offloading_need_less():
    totals = [
        plan("llama-13b", ranks=4, strategy=strategy, quant_storage=storage, offload=offload).total
        for strategy, storage, offload in (
            ("fsdp2", "uint8", True),
            ("fsdp2", "uint8", False),
            ("fsdp1", "bf16", False),
            ("ddp", "uint8", False),
        )
    ]
    assert totals == sorted(totals)
    offloaded = plan("llama-13b", ranks=4, offload=True)
    kept = plan("llama-13b", ranks=4).rows
    static = sum(row.size for row in kept[:5]) + kept[5].size
    assert sum(offloaded.host.values()) == static


def test_70b_on_two_cards_of_24_gib():
    found = plan("llama-70b", ranks=2, gpu_mem="24G", seq=1024, optim="paged_adamw8bit")
    assert found.fits
    assert found.largest("batch") == 1
    longest = found.largest("seq")
    assert 1024 < longest < 4096
    assert found.change(seq=longest).fits
    assert not found.change(seq=longest + 1).fits
    offloaded = found.change(offload=True)
    assert offloaded.largest("seq") > 2 * longest
    assert plan("llama-70b", ranks=1, gpu_mem="24G", seq=1024).fits is False


def test_what_would_fit_is_said():
    found = plan("llama-70b", ranks=2, gpu_mem="24G", seq=4096, double_quant=False)
    ranks = found.ranks_needed()
    assert ranks is not None
    assert found.change(ranks=ranks).fits
    assert not found.change(ranks=ranks - 1).fits
    remedies = dict(found.remedies())
    assert set(remedies) >= {"with double quantization", "with CPU offload"}
    assert all(changed.total < found.total for changed in remedies.values())
    said = str(found)
    assert "does not fit" in said
    assert f"ranks needed: {ranks}" in said
    assert "with activation checkpointing" in dict(found.change(checkpointing=False).remedies())
    assert plan("llama-7b", gpu_mem="1M").ranks_needed() is None


def test_the_drop_in_has_it():
    module = pytest.importorskip("bitsandbytes.distributed")
    assert module.plan("llama-7b").total == plan("llama-7b").total


# ---- settings ------------------------------------------------------------------------------------


def test_sizes_and_optimizers_are_read():
    assert parse_bytes("24G") == parse_bytes("24 GiB") == 24 * GIB
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("1.5m") == 3 << 19
    assert parse_bytes("77") == parse_bytes(77) == 77
    with pytest.raises(ValueError, match=r"expected a size such as 24G .*, got '24 cards'"):
        parse_bytes("24 cards")
    assert parse_optimizer("paged_adamw_8bit")[1:] == (2, 8, True)
    assert parse_optimizer("adamw_bnb_8bit")[1:] == (2, 8, False)
    assert parse_optimizer("adamw_torch")[1:] == (2, 0, False)
    assert parse_optimizer("paged_lion")[1:] == (1, 32, True)
    assert parse_optimizer("sgd")[1:] == (0, 0, False)
    with pytest.raises(ValueError, match=r"expected an optimizer such as .*; got 'adafactor'"):
        parse_optimizer("adafactor")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"strategy": "zero3"}, "strategy must be one of fsdp2, fsdp1, ddp, single; got 'zero3'"),
        ({"blocksize": 48}, "blocksize must be one of 32, .*; got 48"),
        ({"blocksize": 0}, "blocksize must be one of 32, .*; got 0"),
        ({"gpu_mem": 24}, r"gpu_mem 24 means 24 bytes, .*; is 24G meant"),
        ({"ranks": 2.5}, r"ranks must be a whole number, got 2\.5"),
        ({"ranks": 4, "seq": "2"}, "seq must be a whole number, got '2'"),
        ({"overhead": -1}, "overhead must be 0 or more bytes, got -1"),
        ({"gpu_mem": -1.0}, r"gpu_mem -1\.0 means -1 bytes"),
        ({"gpu_mem": "24"}, r"gpu_mem '24' means 24 bytes, .*; is 24G meant"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"ranks": 2, "strategy": "single"}, "strategy single means one rank, got ranks 2"),
        ({"full": True, "quant": "nf4"}, "full needs quant none, got nf4"),
        ({"offload": True}, "offload needs strategy fsdp2 or fsdp1, got single"),
        ({"strategy": "fsdp1", "quant_storage": "uint8"}, "quant_storage must be bf16, fp16"),
        ({"dtype": "int4"}, "expected one of bf16, .*, got 'int4'"),
    ],
)
def test_contradictions_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan("llama-7b", **settings)


@pytest.mark.parametrize("targets", ["typo_proj", ("q_proj", "typo_proj"), "q_proj,typo_proj"])
def test_a_target_that_there_is_not_is_named(targets):
    has = "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ValueError, match=rf"'typo_proj', but llama-2-7b has no such .*; {has}$"):
        plan("llama-7b", lora_targets=targets)
    assert plan("llama-7b", lora_targets=targets, full=True).trained  # nothing is aimed at


@pytest.mark.parametrize("targets", ["", (), "oj", "q_proj,", "lm_head"])
def test_no_target_is_refused(targets):
    with pytest.raises(ValueError, match=r"lora_targets has '.*', but llama-2-7b has no such"):
        plan("llama-7b", lora_targets=targets)


def test_targets_are_ends_of_names():
    named = plan("llama-7b", lora_targets=("q_proj", "up_proj")).trained
    assert plan("llama-7b", lora_targets=("self_attn.q_proj", "mlp.up_proj")).trained == named
    assert plan("llama-7b", lora_targets="q_proj, up_proj").trained == named
    four = plan("llama-7b", lora_targets=("q_proj", "k_proj", "v_proj", "o_proj")).trained
    assert plan("llama-7b", lora_targets="attention").trained == four
    weights = (Weight("layers.0.fc.weight", (4, 4), 0, True),)
    lone = dataclasses.replace(alone((4, 4)), weights=weights)
    with pytest.raises(ValueError, match=r"lora_targets has 'attention', but .*; it has fc$"):
        plan(lone, lora_targets="attention")


# ---- command line --------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    return importlib.import_module("halfbyte.__main__").main(["plan", *arguments])


def test_the_command_prints_a_table(capsys):
    arguments = ("--model", "llama-70b", "--ranks", "2", "--gpu-mem", "24G", "--seq", "1024")
    assert command(*arguments) == 0
    said = capsys.readouterr().out
    found = plan("llama-70b", ranks=2, gpu_mem="24G", seq=1024)
    assert said == f"{found}\n"
    assert "quantized weights            15.94 GiB" in said
    assert "(4.127 bits a parameter)" in said


def test_the_command_gives_json_and_a_status(capsys):
    arguments = ("--model", str(SMALL / "config.json"), "--gpu-mem", "64M", "--device", "cpu")
    targets = ("--lora-targets", "q_proj, v_proj", "--json", "--no-checkpointing")
    assert command(*arguments, *targets) == 3  # does not fit
    found = json.loads(capsys.readouterr().out)
    same = plan(
        SMALL / "config.json",
        gpu_mem="64M",
        device="cpu",
        lora_targets=("q_proj", "v_proj"),
        checkpointing=False,
    )
    assert found == json.loads(json.dumps(same.as_dict()))
    assert found["fits"] is False
    assert found["total"] > found["memory"]
    assert found["setting"]["lora_targets"] == ["q_proj", "v_proj"]
    assert isinstance(same, Plan)


def test_the_command_complains_in_one_sentence(capsys):
    assert command("--model", "nothing-of-the-kind") == 1
    assert command("--model", "llama-7b", "--gpu-mem", "much") == 1
    assert command("--model", "llama-70b", "--ranks", "2", "--lora-targets", "typo_proj") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("plan: there is no model at nothing-of-the-kind")
    assert said[1] == "plan: expected a size such as 24G (or GiB), 24GB, or bytes, got 'much'"
    assert said[2].startswith("plan: lora_targets has 'typo_proj', but llama-2-70b has")
    assert len(said) == 3
