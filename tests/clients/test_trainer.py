"""Transformers' `Trainer` with every bitsandbytes name of `optim=`: training, saving, resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

pytestmark = pytest.mark.usefixtures("light")

STEPS, HALF = 6, 3
VOCAB = 1600
LARGE = 100_000  # elements: from here on states are paged, here those of embedding and head


@dataclasses.dataclass(frozen=True)
class Expected:
    kind: type
    bits: int = 32
    paged: bool = False


EXPECTED = {
    "adamw_bnb_8bit": Expected(bnb.optim.AdamW, 8),
    "adamw_8bit": Expected(bnb.optim.AdamW, 8),
    "paged_adamw_32bit": Expected(bnb.optim.AdamW, 32, paged=True),
    "paged_adamw_8bit": Expected(bnb.optim.AdamW, 8, paged=True),
    "ademamix": Expected(bnb.optim.AdEMAMix),
    "ademamix_8bit": Expected(bnb.optim.AdEMAMix, 8),
    "paged_ademamix_32bit": Expected(bnb.optim.AdEMAMix, 32, paged=True),
    "paged_ademamix_8bit": Expected(bnb.optim.AdEMAMix, 8, paged=True),
    "lion_32bit": Expected(bnb.optim.Lion),
    "lion_8bit": Expected(bnb.optim.Lion, 8),
    "paged_lion_32bit": Expected(bnb.optim.Lion, 32, paged=True),
    "paged_lion_8bit": Expected(bnb.optim.Lion, 8, paged=True),
    "rmsprop_bnb": Expected(bnb.optim.RMSprop),
    "rmsprop_bnb_8bit": Expected(bnb.optim.RMSprop, 8),
    "rmsprop_bnb_32bit": Expected(bnb.optim.RMSprop),
}


def make_model(dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    """A random Llama whose embedding and head have more than 100,000 elements."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | config))).to(dtype)


def rows() -> list[dict[str, torch.Tensor]]:
    """Two batches of four."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (8, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, optim: str = "adamw_torch", **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "optim": optim,
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3 if "rmsprop" in optim or "lion" in optim else 4e-3,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": HALF,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **(settings | more))


def run(trainer: Trainer, resume: Path | None = None) -> list[float]:
    """Trains; the loss of each step."""
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def states(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The optimizer's states by the names of the parameters."""
    optimizer = trainer.optimizer.optimizer  # below accelerate's
    return {name: optimizer.state[p] for name, p in trainer.model.named_parameters()}


def assert_same_states(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> None:
    assert a.keys() == b.keys()
    for name, state in a.items():
        assert state.keys() == b[name].keys(), name
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == b[name][key].dtype, (name, key)
                assert torch.equal(value, b[name][key]), (name, key)
            else:
                assert value == b[name][key], (name, key)


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    theirs = dict(b.named_parameters())
    for name, p in a.named_parameters():
        assert torch.equal(p, theirs[name]), name


def test_every_bitsandbytes_name_is_tried_here(tmp_path):
    found = set()
    for name in OptimizerNames:
        try:
            kind, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, name.value))
        except (ImportError, ValueError):  # its package is not installed
            continue
        if kind.__module__.startswith("bitsandbytes."):
            found.add(name.value)
    assert found == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_trains_saves_and_resumes(tmp_path, name):
    expected = EXPECTED[name]
    whole = Trainer(model=make_model(), args=arguments(tmp_path, name), train_dataset=rows())
    losses = run(whole)
    assert len(losses) == STEPS
    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.2, losses  # an epoch is two steps

    optimizer = whole.optimizer.optimizer
    assert type(optimizer) is expected.kind
    assert type(optimizer).__module__.startswith("bitsandbytes.optim.")
    for key, state in states(whole).items():
        p = whole.model.get_parameter(key)
        # What stays at 32 bits is small, or an embedding.
        eight = expected.bits == 8 and p.numel() >= 4096 and "embed_tokens" not in key
        assert state["step"] == STEPS
        for moment in {"state1", "state2"} & state.keys():
            assert state[moment].dtype is (torch.uint8 if eight else torch.float32), key
            paged = expected.paged and p.numel() >= LARGE
            assert getattr(state[moment], "is_paged", False) is paged, key
            assert bnb.optim._paged.is_file_backed(state[moment]) is paged, key

    checkpoint = tmp_path / f"checkpoint-{HALF}"
    stored = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {state["step"] for state in stored["state"].values()} == {HALF}

    resumed = Trainer(model=make_model(), args=arguments(tmp_path, name), train_dataset=rows())
    assert run(resumed, checkpoint) == losses
    assert type(resumed.optimizer.optimizer) is expected.kind
    assert_same_states(states(resumed), states(whole))
    assert_same_weights(resumed.model, whole.model)
    for state, twin in zip(states(whole).values(), states(resumed).values(), strict=True):
        for moment in {"state1", "state2"} & state.keys():
            there = bnb.optim._paged.is_file_backed(twin[moment])
            assert there is bnb.optim._paged.is_file_backed(state[moment])


@pytest.mark.parametrize(
    ("name", "tolerance"), [("paged_adamw_32bit", 1e-6), ("adamw_8bit", 1e-3)], ids=str
)
def test_losses_are_those_of_torch_adamw(tmp_path, name, tolerance):
    """Clipping, the schedule and the groups with and without decay included."""
    curves = []
    for optim in ("adamw_torch", name):
        args = arguments(tmp_path, optim, save_strategy="no", max_steps=10, warmup_steps=2)
        curves.append(run(Trainer(model=make_model(), args=args, train_dataset=rows())))
    assert curves[0][-1] < 0.8 * curves[0][0]
    torch.testing.assert_close(
        torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=tolerance, atol=0.0
    )


def test_a_tied_embedding_stays_at_32_bits(tmp_path):
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    args = arguments(tmp_path, "adamw_8bit", max_steps=2)
    trainer = Trainer(model=model, args=args, train_dataset=rows())
    trainer.train()
    kept = {name for name, s in states(trainer).items() if s["state1"].dtype is torch.float32}
    small = {name for name, p in model.named_parameters() if p.numel() < 4096}
    assert kept == small | {"model.embed_tokens.weight"}
    assert len(small) < len(states(trainer)) - 1


def test_two_trainers_in_one_process_do_not_share_overrides(tmp_path):
    """Overrides go with their modules: a second model's embedding is found as well."""
    for seed in range(2):
        args = arguments(tmp_path / str(seed), "lion_8bit", max_steps=1, save_strategy="no")
        trainer = Trainer(model=make_model(), args=args, train_dataset=rows())
        trainer.train()
        found = {name: s["state1"].dtype for name, s in states(trainer).items()}
        assert found["model.embed_tokens.weight"] is torch.float32
        assert found["lm_head.weight"] is torch.uint8


@pytest.mark.parametrize("optim_args", ["alpha=4,t_alpha=6,t_beta3=6,beta3=0.999", None], ids=str)
def test_ademamix_takes_its_optim_args(tmp_path, optim_args):
    args = arguments(tmp_path, "ademamix_8bit", optim_args=optim_args)
    whole = Trainer(model=make_model(), args=args, train_dataset=rows())
    losses = run(whole)
    groups = whole.optimizer.param_groups
    expected = (4.0, 6, 6, 0.999) if optim_args else (5.0, None, None, 0.9999)
    for group in groups:
        got = (group["alpha"], group["t_alpha"], group["t_beta3"], group["betas"][2])
        assert got == expected
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.1]
    resumed = Trainer(model=make_model(), args=args, train_dataset=rows())
    assert run(resumed, tmp_path / f"checkpoint-{HALF}") == losses
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("more", [{"bf16": True}, {"activation_checkpointing": True}], ids=str)
def test_accumulation_and_mixed_precision_resume(tmp_path, more):
    args = arguments(
        tmp_path,
        "paged_adamw_8bit",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        **more,
    )
    whole = Trainer(model=make_model(), args=args, train_dataset=rows())
    losses = run(whole)
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.2, losses
    resumed = Trainer(model=make_model(), args=args, train_dataset=rows())
    assert run(resumed, tmp_path / f"checkpoint-{HALF}") == losses
    assert_same_states(states(resumed), states(whole))
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_rounding_of_bfloat16_weights_through_optimizer_cls_and_kwargs(tmp_path, rounding):
    chosen = (bnb.optim.AdamW, {"lr": 4e-3, "optim_bits": 8, "rounding": rounding, "seed": 7})

    def trainer() -> Trainer:
        return Trainer(
            model=make_model(torch.bfloat16),
            args=arguments(tmp_path),
            train_dataset=rows(),
            optimizer_cls_and_kwargs=chosen,
        )

    whole = trainer()
    losses = run(whole)
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.2, losses
    found = states(whole)
    assert found["model.embed_tokens.weight"]["state1"].dtype is torch.float32
    assert found["lm_head.weight"]["state1"].dtype is torch.uint8
    assert all(("compensation" in state) == (rounding == "kahan") for state in found.values())
    resumed = trainer()
    assert run(resumed, tmp_path / f"checkpoint-{HALF}") == losses
    assert_same_states(states(resumed), found)
    assert_same_weights(resumed.model, whole.model)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    """Not taken for one without states, which would silently start again from zero moments."""
    Trainer(model=make_model(), args=arguments(tmp_path), train_dataset=rows()).train()
    ours = Trainer(model=make_model(), args=arguments(tmp_path, "adamw_8bit"), train_dataset=rows())
    with pytest.raises(ValueError, match=r"state\[0\] must hold state1 .* exp_avg"):
        ours.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))


def test_a_32_bit_checkpoint_goes_on_at_32_bits_under_an_8_bit_name(tmp_path):
    args = arguments(tmp_path, "paged_adamw_32bit")
    whole = Trainer(model=make_model(), args=args, train_dataset=rows())
    losses = run(whole)
    eight = arguments(tmp_path, "adamw_8bit")
    resumed = Trainer(model=make_model(), args=eight, train_dataset=rows())
    assert run(resumed, tmp_path / f"checkpoint-{HALF}") == losses
    assert all(s["state1"].dtype is torch.float32 for s in states(resumed).values())
    assert_same_weights(resumed.model, whole.model)
