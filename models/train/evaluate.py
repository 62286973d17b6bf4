"""Bits per byte of a causal language model on text, with a sliding window."""

import argparse
import math
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = Path(__file__).resolve().parent.parent


@torch.no_grad()
def bits_per_byte(model, tokenizer, text: str, *, window: int = 512, stride: int = 256, batch: int = 8) -> float:
    """The model's code length for the text, in bits, over the text's length in UTF-8 bytes.

    Windows of `window` tokens start every `stride` tokens; each token is scored once, in the first window that has
    it, so all but the first `window` tokens are predicted from at least `window - stride` tokens before them.
    The text is preceded by the tokenizer's bos token, which is not scored itself.
    """
    if not 0 < stride <= window:
        raise ValueError(f"stride must be from 1 to window ({window}), got {stride}")
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)])
    starts = list(range(0, max(1, len(ids) - 1 - window + stride), stride))
    nats = 0.0
    for first in range(0, len(starts), batch):
        chosen = starts[first : first + batch]
        rows = [ids[start : start + window + 1] for start in chosen]
        length = max(len(row) for row in rows)
        padded = torch.stack([functional.pad(row, (0, length - len(row))) for row in rows]).to(device)
        logits = model(padded[:, :-1]).logits.float()
        losses = functional.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none")
        for start, row, loss in zip(chosen, rows, losses.view(len(rows), -1), strict=True):
            nats += loss[window - stride if start else 0 : len(row) - 1].double().sum().item()
    return nats / math.log(2) / len(text.encode())


def main() -> None:
    """Print a line for each text and one for all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, nargs="*", help="default: every file of heldout/")
    parser.add_argument("--model", type=Path, default=MODELS / "rustdoc-llama")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, or float32 for the same weights in wider sums")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    total_bits, total_bytes = 0.0, 0
    for path in args.texts or sorted((MODELS / "heldout").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        bits, size = bits_per_byte(model, tokenizer, text), len(text.encode())
        total_bits, total_bytes = total_bits + bits * size, total_bytes + size
        print(f"{bits:.4f} bits/byte  {size:>8,} bytes  {path.name}")
    print(f"{total_bits / total_bytes:.4f} bits/byte  {total_bytes:>8,} bytes  in all")


if __name__ == "__main__":
    main()
