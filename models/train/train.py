"""Train the tokenizer and the small Llama model on the text that prepare.py wrote.

The schedule is counted in processor time, so neither a busy machine nor a process that was stopped and continued
loses training. Every few minutes the whole state goes to RUN/checkpoint.pt; the same command takes up from there, and
another --cpu-minutes stretches or shortens what is left of the schedule.

Matrices are updated by Muon; the embedding and the norms by AdamW. No dropout.

Each core works alone on a few windows at a time, taken from a common queue, in one-threaded torch. Splitting every
operation over all cores instead waits, hundreds of times a step, for the core that another program holds.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluate import bits_per_byte

MODELS = Path(__file__).resolve().parent.parent
END = "<|endoftext|>"
CONTEXT = 512
LOG_SECONDS = 30.0
WINDOWS_AT_A_TIME = 2
PROMPTS = ("The borrow checker", "A `Vec<T>` is", "fn main() {")


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token, so that any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A fresh model; the projections that write into the residual stream start at zero."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def batches(documents: list[np.ndarray], size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of packed windows: each epoch joins the documents in a new order and cuts anew."""
    epoch = 0
    while True:
        shuffled = np.random.default_rng((seed, epoch))
        stream = np.concatenate([documents[i] for i in shuffled.permutation(len(documents))])
        stream = stream[shuffled.integers(CONTEXT) :]
        count = (len(stream) - 1) // CONTEXT
        starts = shuffled.permutation(count) * CONTEXT
        for first in range(0, count - size + 1, size):
            windows = [stream[start : start + CONTEXT + 1] for start in starts[first : first + size]]
            yield torch.from_numpy(np.stack(windows).astype(np.int64))
        epoch += 1


def learning_rate(progress: float) -> float:
    """The share of the peak rate: up over the first 2 %, level to 35 %, then straight down to nothing."""
    return min(1.0, (progress + 1e-3) / 0.02, max(0.0, (1.0 - progress) / 0.65))


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for the embedding and the norms, and a Muon for each thread's share of the layers' matrices."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": 0.01},
        {"params": norms, "weight_decay": 0.0},
    ]
    muons = [
        torch.optim.Muon(matrices[i :: args.threads], lr=args.muon_lr, weight_decay=args.weight_decay, momentum=0.95)
        for i in range(args.threads)
    ]
    return [torch.optim.AdamW(groups, lr=args.adam_lr, betas=(0.9, 0.98), eps=1e-10), *muons]


class Workers:
    """Threads that share the model's weights, each with gradients of its own."""

    def __init__(self, model: LlamaForCausalLM, threads: int) -> None:
        torch.set_num_threads(1)
        self._model = model
        self._pool = ThreadPoolExecutor(threads)
        self._replicas = [LlamaForCausalLM(model.config) for _ in range(threads)]
        self._idle: SimpleQueue[LlamaForCausalLM] = SimpleQueue()
        for replica in self._replicas:
            for mine, shared in zip(replica.parameters(), model.parameters(), strict=True):
                mine.data = shared.data
            self._idle.put(replica)

    def backward(self, ids: torch.Tensor) -> float:
        """Leave the gradient of the batch's mean loss in the model, and return that loss."""

        def one(windows: torch.Tensor) -> float:
            replica = self._idle.get()
            logits = replica(windows[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) * len(windows) / len(ids)
            loss.backward()
            self._idle.put(replica)
            return loss.item()

        loss = sum(self._pool.map(one, ids.split(WINDOWS_AT_A_TIME)))
        for parts in zip(self._model.parameters(), *(r.parameters() for r in self._replicas), strict=True):
            total, *shares = parts
            total.grad = sum(share.grad for share in shares if share.grad is not None)
            for share in shares:
                share.grad = None
        return loss

    def step(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Update the weights, a thread to an optimizer."""
        list(self._pool.map(lambda optimizer: optimizer.step(), optimizers))


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int = 40) -> str:
    """One continuation of the prompt, drawn at temperature 0.7 from the 40 likeliest tokens."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    draw = torch.Generator().manual_seed(0)
    for _ in range(tokens):
        top = torch.topk(model(ids[:, -CONTEXT:]).logits[0, -1] / 0.7, 40)
        choice = torch.multinomial(torch.softmax(top.values, 0), 1, generator=draw)
        ids = torch.cat((ids, top.indices[choice][None]), 1)
    return tokenizer.decode(ids[0])


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face files in bfloat16: first beside the folder, then each renamed into place."""
    fresh = folder.with_name(folder.name + ".new")
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.config.use_cache = True
    copy.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=True, temperature=0.7, top_k=40
    )
    copy.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    named = fresh / "tokenizer_config.json"  # by the class that every version of Transformers knows
    settings = {**json.loads(named.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    for local in ("backend", "is_local", "local_files_only"):
        settings.pop(local, None)
    named.write_text(json.dumps(settings, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(fresh.iterdir()):
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    shutil.rmtree(fresh)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus.jsonl")
    parser.add_argument("--run", type=Path, required=True, help="folder for the tokenizer, checkpoint and log")
    parser.add_argument("--export", type=Path, help="folder for the finished model")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint as it is, train no further")
    parser.add_argument("--cpu-minutes", type=float, default=60, help="training time, of all cores together")
    parser.add_argument("--heldout", type=Path, default=MODELS / "heldout")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="windows of 512 tokens to a step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one for each core")
    parser.add_argument("--checkpoint-minutes", type=float, default=3, help="processor time too")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclass
class Progress:
    """How far a run has come; `active` is in seconds of processor time."""

    step: int = 0
    tokens: int = 0
    active: float = 0.0


class Run:
    """A run's folder, with everything that a checkpoint must bring back."""

    def __init__(self, args: argparse.Namespace, texts: list[str]) -> None:
        self.checkpoint = args.run / "checkpoint.pt"
        args.run.mkdir(parents=True, exist_ok=True)
        if not (args.run / "tokenizer").is_dir():
            train_tokenizer(texts, args.vocab).save_pretrained(args.run / "tokenizer")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(args.run / "tokenizer")
        self.model = new_model(args)
        self.optimizers = optimizers(self.model, args)
        self.progress = Progress()
        if self.checkpoint.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(state["step"], state["tokens"], state["active"])

    def save(self) -> None:
        """Write the checkpoint so that a crash leaves the old one or the new one."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            **asdict(self.progress),
        }
        torch.save(state, self.checkpoint.with_suffix(".new"))
        os.replace(self.checkpoint.with_suffix(".new"), self.checkpoint)

    def show(self, chapters: list[str]) -> None:
        """Print the bits per byte of the held-out chapters, and a few samples."""
        self.model.eval()
        bits = [bits_per_byte(self.model, self.tokenizer, text) for text in chapters]
        print(f"held out, the first 6 kB of each chapter: {sum(bits) / len(bits):.4f} bits/byte", flush=True)
        for prompt in PROMPTS:
            print("  " + repr(sample(self.model, self.tokenizer, prompt)), flush=True)
        self.model.train()


def fit(run: Run, texts: list[str], chapters: list[str], args: argparse.Namespace) -> None:
    """Train until the time is used up."""
    model, progress = run.model, run.progress
    documents = [
        np.array([run.tokenizer.bos_token_id, *ids], dtype=np.uint16)
        for ids in run.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    ]
    total = sum(len(document) for document in documents)
    size = sum(len(text.encode()) for text in texts)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} documents, {size:,} bytes, {total:,} tokens; {count:,} parameters", flush=True)

    workers = Workers(model, args.threads)
    source = batches(documents, args.batch, args.seed)
    for _ in range(progress.step):
        next(source)
    budget = args.cpu_minutes * 60
    saved = logged = progress.active
    losses: list[float] = []
    while progress.active < budget:
        started = time.process_time()
        share = learning_rate(progress.active / budget)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * (args.muon_lr if isinstance(optimizer, torch.optim.Muon) else args.adam_lr)
        ids = next(source)
        losses.append(workers.backward(ids))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        workers.step(run.optimizers)
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is not finite at step {progress.step}")
        progress.step += 1
        progress.tokens += ids.shape[0] * CONTEXT
        progress.active += time.process_time() - started

        done = progress.active >= budget
        if progress.active - logged >= LOG_SECONDS or done:
            rate = len(losses) * args.batch * CONTEXT / (progress.active - logged)
            print(
                f"{time.strftime('%H:%M:%S')} step {progress.step} epoch {progress.tokens / total:.2f} "
                f"{progress.active / budget:6.1%} loss {sum(losses) / len(losses):.4f} lr {share:.3f} "
                f"{rate:,.0f} tokens per processor second",
                flush=True,
            )
            losses, logged = [], progress.active
        if progress.active - saved >= args.checkpoint_minutes * 60 or done:
            saved = progress.active
            run.save()
            run.show(chapters)


def main() -> None:
    """Train until the time is used up, then export."""
    args = parse()
    torch.manual_seed(args.seed)
    with (args.data / "corpus.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    chapters = [path.read_text(encoding="utf-8")[:6_000] for path in sorted(args.heldout.glob("*.txt"))]
    run = Run(args, texts)
    if not args.export_only:
        fit(run, texts, chapters, args)
    if args.export:
        export(run.model, run.tokenizer, args.export)
        print(f"exported to {args.export}")


if __name__ == "__main__":
    main()
