"""A mixture model (MoE) in 4 bits: memory, speed, LoRA, and a checkpoint that reloads bit for bit.

    .venv/bin/python examples/moe_4bit.py                      a Mixtral of 0.25 G parameters
    .venv/bin/python examples/moe_4bit.py --hidden 2048 --layers 4
    .venv/bin/python examples/moe_4bit.py --kind qwen3 --experts 64 --top-k 8 --intermediate 512

The weights are random (seeded); nothing is downloaded. Times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
import transformers
from bitsandbytes.integrations import transformers as integration

MIB = 1 << 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=("mixtral", "qwen3"), default="mixtral")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def configuration(options: argparse.Namespace) -> transformers.PretrainedConfig:
    common = {
        "vocab_size": 1024,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 128,
        "num_experts_per_tok": options.top_k,
    }
    if options.kind == "mixtral":
        return transformers.MixtralConfig(
            intermediate_size=options.intermediate, num_local_experts=options.experts, **common
        )
    return transformers.Qwen3MoeConfig(
        moe_intermediate_size=options.intermediate,
        num_experts=options.experts,
        head_dim=64,
        **common,
    )


def load(folder: Path, **config: object) -> transformers.PreTrainedModel:
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **config,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
    ).eval()


def milliseconds(run: object, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()  # type: ignore[operator]
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def compare(model: transformers.PreTrainedModel, tokens: int, repeats: int) -> None:
    """One layer's experts: the grouped product beside a loop over decoded experts."""
    module = model.model.layers[0].mlp.experts
    config = module.config
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, config.hidden_size, generator=generator, dtype=torch.bfloat16)
    scores = torch.rand(tokens, module.num_experts, generator=generator)
    weights, ids = scores.softmax(-1).topk(config.num_experts_per_tok)
    times: dict[str, list[float]] = {integration.IMPLEMENTATION: [], "eager": []}
    with torch.no_grad():
        for round_ in range(repeats + 1):
            for name, taken in times.items():
                config._experts_implementation = name
                took = milliseconds(lambda: module(x, ids, weights.to(x.dtype)), 1)
                if round_:  # the first one warms up
                    taken.append(took)
    config._experts_implementation = integration.IMPLEMENTATION
    grouped, loop = (statistics.median(taken) for taken in times.values())
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    print(
        f"  {tokens:5d} tokens: grouped {grouped:8.2f} ms, loop {loop:8.2f} ms, "
        f"ratio {statistics.median(ratios):.1f}"
    )


def main() -> None:
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    ids = torch.randint(0, 1024, (2, 32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        torch.set_default_dtype(torch.bfloat16)
        dense = transformers.AutoModelForCausalLM.from_config(configuration(options))
        torch.set_default_dtype(torch.float32)
        dense.save_pretrained(path / "bf16")
        values = sum(p.numel() for p in dense.parameters())
        print(f"{options.kind}, {values / 1e6:.0f} M parameters, seed 0")
        print(f"  bfloat16:                  {dense.get_memory_footprint() / MIB:8.1f} MiB")
        del dense
        gc.collect()

        linear_only = load(path / "bf16", llm_int8_skip_modules=["lm_head", "experts"])
        print(f"  NF4, linear layers only:   {linear_only.get_memory_footprint() / MIB:8.1f} MiB")
        del linear_only
        gc.collect()

        start = time.perf_counter()
        model = load(path / "bf16")
        took = time.perf_counter() - start
        print(
            f"  NF4, with the experts:     {model.get_memory_footprint() / MIB:8.1f} MiB "
            f"(loaded in {took:.1f} s)"
        )

        print("one layer's experts:")
        for tokens in sorted({1, 16, options.tokens}):
            compare(model, tokens, options.repeats)

        with torch.no_grad():
            expected = model(input_ids=ids).logits
        model.save_pretrained(path / "nf4")
        again = transformers.AutoModelForCausalLM.from_pretrained(
            path / "nf4", dtype=torch.bfloat16, device_map="cpu"
        ).eval()
        with torch.no_grad():
            same = torch.equal(again(input_ids=ids).logits, expected)
        size = sum(f.stat().st_size for f in (path / "nf4").glob("*.safetensors"))
        print(f"checkpoint {size / MIB:.1f} MiB; reloaded bit for bit: {same}")
        del again

    base = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    adapted = peft.get_peft_model(base, lora).train()
    optimizer = bnb.optim.AdamW8bit([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(f"{loss.item():.3f}")
    print("LoRA on the attention, loss:", " ".join(losses))


if __name__ == "__main__":
    main()
