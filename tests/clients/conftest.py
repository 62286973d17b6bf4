"""Small real models for the client tests, all offline; `bitsandbytes` is the drop-in."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCAB = 160


@pytest.fixture(autouse=True)
def fresh_process_state() -> Iterator[None]:
    """Undoes what clients leave behind in the process: overrides, and accelerate's settings."""
    yield
    bnb.optim.GlobalOptimManager.get_instance().initialize()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def light() -> Iterator[None]:
    """For models so small that threads, and `gc.collect()` over all modules, cost more than they.

    (Two cores, busy: a Trainer that trains and resumes takes 0.3 s like this, 4 s otherwise,
    2026-11-21.)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose projections do not all divide by the block size (112 columns)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load_4bit(llama_dir: Path) -> Callable[..., PreTrainedModel]:
    """Loads the model in 4 bits; keywords override the configuration."""

    def load(dtype: torch.dtype = torch.bfloat16, **config: object) -> PreTrainedModel:
        options: dict[str, object] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
        return AutoModelForCausalLM.from_pretrained(
            llama_dir,
            dtype=dtype,
            quantization_config=BitsAndBytesConfig(**(options | config)),
            device_map="cpu",
        ).eval()

    return load


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(input_ids=tokens).logits
    model.train(training)
    return out
