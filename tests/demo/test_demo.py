"""`make demo`'s script: its refusals are one sentence each, and it runs on any causal LM."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def demo(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "demo" / "demo.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with odd sizes and the repository's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "rustdoc-llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_runs_on_any_model_and_text(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["--model", tiny_model, "--text", text, "--out", out]
    arguments += ["--steps", 6, "--window", 32, "--prompt", "The quick"]
    result = demo(*arguments)
    assert result.returncode == 0, result.stderr
    for kind in ("bf16", "int8-t0", "int8-t6", "nf4", "nf4+dq", "fp4"):
        assert re.search(rf"^{re.escape(kind)} +[\d.]+ MB +[\d.]+ +[\d.]+$", result.stdout, re.M)
    bits = dict(re.findall(r"^(\S+) +[\d.]+ MB +([\d.]+) ", result.stdout, re.M))
    assert float(bits["bf16"]) == 16.0
    assert 8.2 < float(bits["int8-t0"]) == float(bits["int8-t6"]) < 8.5
    assert 4.1 < float(bits["nf4+dq"]) < float(bits["nf4"]) == float(bits["fp4"]) < 4.6
    assert result.stdout.count("logits bit-identical") == 2
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "quantized" / "config.json").read_text())
    assert saved["quantization_config"]["bnb_4bit_use_double_quant"] is True
    assert (out / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: None, "expected a folder with a Hugging Face model, found none"),
        (lambda d: d.mkdir(), "expected config.json in it, found none"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{")), "is not readable JSON"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("[]")), "names no model_type"),
        (
            lambda d: (d.mkdir(), (d / "config.json").write_text('{"model_type": "llama"}')),
            "expected *.safetensors weights in it, found none",
        ),
    ],
)
def test_a_missing_or_broken_model_is_one_sentence(tmp_path: Path, damage, sentence: str) -> None:
    folder = tmp_path / "model"
    damage(folder)
    result = demo("--model", folder)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_truncated_weights_are_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(data[:1000] if file.suffix == ".safetensors" else data)
    result = demo("--model", folder, "--out", tmp_path / "out")
    assert result.returncode == 1
    assert "does not load" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file"),
        (b"short", "expected at least 2,000 characters, got 5"),
        (b"\xff" * 5000, "expected UTF-8 text"),
    ],
)
def test_a_bad_text_is_one_sentence(tmp_path: Path, content, sentence: str) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    result = demo("--text", text, "--out", tmp_path / "out")
    assert result.returncode == 1
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
