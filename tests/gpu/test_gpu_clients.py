"""Real clients on the CUDA device: Transformers, PEFT, a training run beside the CPU's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from halfbyte import nn as hb_nn
from halfbyte import optim
from torch import nn

MODEL = Path(__file__).parents[2] / "models" / "rustdoc-llama"


class Lora(nn.Module):
    """A frozen 4-bit layer and a low-rank correction."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.base = hb_nn.Linear4bit(n_in, n_out, quant_type="nf4", compress_statistics=True)
        self.base.requires_grad_(False)
        self.down = nn.Linear(n_in, 4, bias=False)
        self.up = nn.Linear(4, n_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def fine_tune(device: str, steps: int = 12) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(Lora(96, 64), nn.GELU(), Lora(64, 16)).to(device)
    frozen = model[0].base.weight.data.clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=64)
    data = torch.Generator().manual_seed(1)
    x = torch.randn(32, 96, generator=data).to(device)
    target = torch.randint(0, 16, (32,), generator=data).to(device)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(model[0].base.weight.data, frozen)
    return losses, {k: p.detach().cpu() for k, p in model.named_parameters() if p.requires_grad}


def test_lora_trains_as_on_the_cpu():
    """A first moment near a border of its 8-bit code may fall either way: losses are compared."""
    got, weights = fine_tune("cuda")
    want, reference = fine_tune("cpu")
    assert got[-1] < 0.8 * got[0]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=2e-3, atol=2e-3)
    for key, value in reference.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=0.02)


@pytest.fixture(scope="module")
def load():
    transformers = pytest.importorskip("transformers")

    def make(device: str, **config):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_pretrained(
            MODEL,
            dtype=torch.float32,
            quantization_config=transformers.BitsAndBytesConfig(**config),
            device_map={"": 0 if device == "cuda" else "cpu"},
        ).eval()

    return make


CONFIGS = {
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8bit": {"load_in_8bit": True},
}


def tokens() -> torch.Tensor:
    return torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_load_and_generate(kind, load):
    on_cuda, on_cpu = load("cuda", **CONFIGS[kind]), load("cpu", **CONFIGS[kind])
    assert {p.device.type for p in on_cuda.parameters()} == {"cuda"}
    ids = tokens()
    with torch.no_grad():
        got = on_cuda(input_ids=ids.cuda()).logits.cpu()
        want = on_cpu(input_ids=ids).logits
    error = float((got - want).norm() / want.norm())
    assert error < 2e-2, error
    out = on_cuda.generate(ids[:1].cuda(), max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 8)
    assert out.is_cuda


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_mixture_of_experts(kind, tmp_path):
    """Experts are quantized as they are loaded, and run and train as on the CPU."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.device("cpu"):
        transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(**CONFIGS[kind])
    logits, grads = {}, {}
    for device in ("cuda", "cpu"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            dtype=torch.float32,
            quantization_config=quantization,
            device_map={"": 0 if device == "cuda" else "cpu"},
        )
        layers = [m for m in model.modules() if hasattr(m, "_apply_gate")]
        stored = {p.dtype for m in layers for p in m.parameters()}
        assert len(layers) == 2
        assert stored == {torch.uint8 if kind == "4bit" else torch.int8}
        assert {p.device.type for p in model.parameters()} == {device}
        embedded = model.get_input_embeddings()(tokens().remainder(128).to(device)).detach()
        embedded.requires_grad_()
        out = model(inputs_embeds=embedded).logits
        out.square().mean().backward()
        logits[device], grads[device] = out.detach().cpu(), embedded.grad.cpu()
    for got, want in ((logits["cuda"], logits["cpu"]), (grads["cuda"], grads["cpu"])):
        error = float((got - want).norm() / want.norm())
        assert error < 2e-2, error


def test_transformers_save_and_reload(load, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = load("cuda", **CONFIGS["4bit"])
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0}).eval()
    ids = tokens().cuda()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_trains(kind, load):
    peft = pytest.importorskip("peft")
    base = load("cuda", **CONFIGS[kind])
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.device.type for p in trained} == {"cuda"}
    before = [copy.deepcopy(p.detach()) for p in trained]
    optimizer = optim.PagedAdamW8bit(trained, lr=1e-2)
    ids = tokens().cuda()
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
