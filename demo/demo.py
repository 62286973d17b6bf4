"""halfbyte's main job, start to end, on the CPU.

Loads a causal LM through Transformers in bfloat16, int8 (LLM.int8() with threshold 0 and 6), NF4,
NF4 with double quantization and FP4 and compares them on held-out text; fine-tunes the
double-quantized one with LoRA through PEFT; saves adapter and quantized model; reloads both in a
new process and generates, before and after.

    make demo                                             the small model in the repository
    make demo ARGS="--model DIR --text FILE"              any local causal LM, any text
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = ROOT / "models" / "rustdoc-llama"
FORMATS = ("bf16", "int8-t0", "int8-t6", "nf4", "nf4+dq", "fp4")
PROMPTS = ("# Error code E0", "The borrow checker")


class DemoError(Exception):
    """A condition that the user can mend; printed as one sentence."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="demo")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="a Hugging Face folder")
    parser.add_argument(
        "--text", type=Path, help="what to fine-tune on; its last tenth is held out"
    )
    parser.add_argument("--prompt", action="append", help="what to generate from (repeatable)")
    parser.add_argument("--steps", type=int, default=200, help="LoRA steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--window", type=int, default=256, help="tokens per window")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--eval-bytes", type=int, default=60_000, help="held-out text to score")
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "out", help="where to save")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def quiet() -> None:
    """Silences what Transformers and PEFT say about themselves."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def check_model(folder: Path) -> None:
    """Refuses what is not a loadable Hugging Face causal LM, saying what is missing."""
    if not folder.is_dir():
        raise DemoError(
            f"--model {folder}: expected a folder with a Hugging Face model, found none"
        )
    config = folder / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DemoError(f"--model {folder}: expected config.json in it, found none") from None
    except (OSError, ValueError) as error:
        raise DemoError(f"--model {folder}: config.json is not readable JSON ({error})") from None
    if not isinstance(kind, dict) or "model_type" not in kind:
        raise DemoError(f"--model {folder}: config.json names no model_type")
    if "quantization_config" in kind:
        raise DemoError(f"--model {folder} is quantized already; give the 16-bit model")
    if not any(folder.glob("*.safetensors")):
        raise DemoError(f"--model {folder}: expected *.safetensors weights in it, found none")


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DemoError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DemoError(
            f"{path}: expected UTF-8 text, but {error.reason} at byte {error.start}"
        ) from None
    if len(text) < 2000:
        raise DemoError(f"{path}: expected at least 2,000 characters, got {len(text):,}")
    return text


def texts(args: argparse.Namespace) -> tuple[str, str, str]:
    """(general held-out text, fine-tuning text, its held-out part)."""
    if args.text is not None:
        text = read_text(args.text)
        cut = len(text) * 9 // 10
        return text[cut:], text[:cut], text[cut:]
    models = ROOT / "models"
    chapters = sorted((models / "heldout").glob("*.txt"))
    # The same share of every chapter, so that the figure stands for all of them.
    share = max(1, args.eval_bytes // max(1, len(chapters)))
    general = "\n\n".join(read_text(path)[:share] for path in chapters)
    tune = models / "finetune"
    return general, read_text(tune / "train.txt"), read_text(tune / "heldout.txt")


def load(folder: Path, kind: str):
    """The model in one of FORMATS, on the CPU, computing in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = None
    if kind.startswith("int8"):
        threshold = float(kind.partition("-t")[2])
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    elif kind != "bf16":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind[:3],
            bnb_4bit_use_double_quant=kind.endswith("+dq"),
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        )
    except Exception as error:  # whatever Transformers finds wrong with the folder
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DemoError(f"--model {folder} does not load: {first}") from error
    return model.eval()


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise DemoError(f"--model {folder}: its tokenizer does not load: {error}") from error
    return tokenizer


def storage(model) -> tuple[int, float]:
    """(bytes of all parameters and scales, bits per parameter of the quantizable linear layers).

    The language-model head stays in 16 bits under Transformers' defaults and is not counted in the
    second figure.
    """
    import torch

    total = 0
    linear_bits = linear_numel = 0
    seen = set()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = parameter.numel() * parameter.element_size()
            state = getattr(parameter, "quant_state", None)
            numel = parameter.numel()
            if parameter.dtype == torch.int8:
                scales = parameter.SCB if parameter.SCB is not None else module.state.SCB
                size += scales.numel() * scales.element_size()
            elif state is not None:
                numel = math.prod(state.shape)
                packed = state.as_dict(packed=True)
                size += sum(
                    v.numel() * v.element_size() for k, v in packed.items() if "absmax" in k
                )
            total += size
            if key == "weight" and "Linear" in type(module).__name__ and "lm_head" not in name:
                linear_bits += 8 * size
                linear_numel += numel
    return total, linear_bits / max(1, linear_numel)


def bits_per_byte(model, tokenizer, text: str, limit: int) -> float:
    sys.path.insert(0, str(ROOT / "models" / "train"))
    from evaluate import bits_per_byte as score

    text = text.encode()[:limit].decode(errors="ignore")
    return score(model, tokenizer, text, window=512, stride=384)


def generate(model, tokenizer, prompt: str, tokens: int = 60) -> str:
    """Greedy with a mild repetition penalty: the same text for the same weights."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=1.15,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def fingerprint(model, tokenizer, prompt: str) -> str:
    """A hash of the logits, bit for bit."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        logits = model(**inputs).logits.float().contiguous()
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]


def compare_formats(args: argparse.Namespace, tokenizer, text: str) -> None:
    print(f"{'format':<8} {'memory':>10} {'bits/param':>11} {'bits/byte':>10}   (held-out text)")
    for kind in FORMATS:
        model = load(args.model, kind)
        size, bits = storage(model)
        score = bits_per_byte(model, tokenizer, text, args.eval_bytes)
        print(f"{kind:<8} {size / 1e6:>7.2f} MB {bits:>11.3f} {score:>10.4f}")
        del model
    print("bits/param: the linear layers that Transformers quantizes, scales included")
    print("int8-t6: columns with a magnitude of 6 or more are multiplied unrounded\n")


def finetune(args: argparse.Namespace, model, tokenizer, text: str) -> tuple[object, list[float]]:
    """LoRA on every linear layer, AdamW with a linear warm-up and decay; one loss per step."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from tqdm import tqdm

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)

    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    window = min(args.window, len(ids) - 2)
    generator = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    trainable = sum(p.numel() for p in parameters)
    bar = tqdm(range(args.steps), desc=f"LoRA r={args.rank} ({trainable:,} parameters)", ncols=90)
    for step in bar:
        warm, left = (step + 1) / 5, (args.steps - step) / max(1, args.steps - 5)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, warm, left)
        starts = torch.randint(len(ids) - window, (args.batch,), generator=generator)
        batch = torch.stack([ids[s : s + window] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return model.eval(), losses


def sparkline(values: list[float], width: int = 60) -> str:
    """The curve in one terminal line, each column the mean of its share of the values."""
    columns = min(width, len(values))
    cuts = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    ticks = "▁▂▃▄▅▆▇█"
    return "".join(ticks[round((m - low) / ((high - low) or 1) * 7)] for m in means)


def plot(losses: list[float], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    smooth, mean = [], losses[0]
    for loss in losses:
        mean += 0.1 * (loss - mean)
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(losses, alpha=0.3, label="per step")
    axes.plot(smooth, label="moving mean")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def reload(args: argparse.Namespace) -> None:
    """The second process: reads what the first one saved and prints its findings as JSON."""
    import torch
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    quiet()
    tokenizer = load_tokenizer(args.out / "quantized")
    model = AutoModelForCausalLM.from_pretrained(
        args.out / "quantized", dtype=torch.bfloat16, device_map="cpu"
    ).eval()
    prompts = args.prompt or list(PROMPTS)
    before = [generate(model, tokenizer, prompt) for prompt in prompts]
    base = fingerprint(model, tokenizer, prompts[0])
    # The adapter was trained beside float32 norms, which this restores.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = PeftModel.from_pretrained(model, args.out / "adapter").eval()
    after = [generate(model, tokenizer, prompt) for prompt in prompts]
    tuned = fingerprint(model, tokenizer, prompts[0])
    print(json.dumps({"before": before, "after": after, "base": base, "tuned": tuned}))


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())


def run(args: argparse.Namespace) -> None:
    began = time.monotonic()
    check_model(args.model)
    if args.steps < 1 or args.batch < 1 or args.window < 8:
        raise DemoError("--steps and --batch must be at least 1 and --window at least 8")
    general, train, heldout = texts(args)

    import torch

    quiet()
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    prompts = args.prompt or list(PROMPTS)

    print(f"model {args.model.name}, {torch.get_num_threads()} threads\n")
    compare_formats(args, tokenizer, general)

    model = load(args.model, "nf4+dq")
    base = fingerprint(model, tokenizer, prompts[0])
    score_before = bits_per_byte(model, tokenizer, heldout, args.eval_bytes)
    (args.out / "quantized").mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out / "quantized")
    tokenizer.save_pretrained(args.out / "quantized")

    model, losses = finetune(args, model, tokenizer, train)
    score_after = bits_per_byte(model, tokenizer, heldout, args.eval_bytes)
    tuned = fingerprint(model, tokenizer, prompts[0])
    model.save_pretrained(args.out / "adapter")
    plot(losses, args.out / "loss.png", f"LoRA on NF4 + double quant, {args.model.name}")
    tail = losses[-max(1, len(losses) // 10) :]
    print(f"loss {losses[0]:.3f} {sparkline(losses)} {sum(tail) / len(tail):.3f}")
    print(f"held-out bits/byte of that text: {score_before:.4f} before, {score_after:.4f} after\n")
    del model

    command = [sys.executable, __file__, "--reload", "--out", str(args.out)]
    for prompt in prompts:
        command += ["--prompt", prompt]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise DemoError(f"the process that reloads {args.out} ended with code {child.returncode}")
    found = json.loads(child.stdout.splitlines()[-1])
    print("reloaded in a new process:")
    for title, here, there in (
        ("quantized model", base, found["base"]),
        ("with adapter", tuned, found["tuned"]),
    ):
        if here != there:
            raise DemoError(
                f"the reloaded {title} gives other logits: {here} saved, {there} reloaded"
            )
        print(f"  {title}: logits bit-identical ({here})")
    for i, prompt in enumerate(prompts):
        print(f"\n  {prompt!r}, before:\n{indent(found['before'][i])}")
        print(f"  after:\n{indent(found['after'][i])}")
    size = sum(f.stat().st_size for f in (args.out / "quantized").glob("*.safetensors"))
    print(f"\nsaved {args.out}/quantized ({size / 1e6:.1f} MB), adapter, loss.png", end="")
    print(f"; {time.monotonic() - began:.0f} s in all")


def main() -> int:
    args = parse_args()
    try:
        reload(args) if args.reload else run(args)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
