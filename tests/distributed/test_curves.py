"""Loss curves do not depend on the number of ranks; gathered weights are the file's bytes.

bench/distributed.py runs the same over 50 steps, four ranks and all settings.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import fsdp_qlora  # noqa: E402

TOLERANCE = 1e-3


def quantize(folder: Path, storage: str) -> Path:
    """The example's model in NF4 with double quantization, as a checkpoint; its folder."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=fsdp_qlora.DTYPES[storage],
    )
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / "models" / "rustdoc-llama",
        dtype=torch.float32,
        quantization_config=config,
        device_map="cpu",
    )
    from transformers import AutoTokenizer

    model.save_pretrained(folder / storage)
    AutoTokenizer.from_pretrained(ROOT / "models" / "rustdoc-llama").save_pretrained(
        folder / storage
    )
    return folder / storage


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def differing(found: dict[str, torch.Tensor], file: dict[str, torch.Tensor]) -> list[str]:
    """Names of ``file`` that ``found`` lacks or holds other bytes for."""
    return [
        name
        for name, value in file.items()
        if name not in found or not torch.equal(as_bytes(found[name]), as_bytes(value))
    ]


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """Packed weights and scales as the layers have them in a forward pass, named as in the file."""
    from bitsandbytes.nn import Linear4bit
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    found = {}

    def collect() -> None:
        for name, layer in model.named_modules():
            if isinstance(layer, Linear4bit):
                clean = name.replace("._fsdp_wrapped_module", "").replace(
                    "_fsdp_wrapped_module.", ""
                )
                clean = clean.replace(".base_layer", "")
                clean = clean.removeprefix("base_model.model.") + ".weight"
                state = getattr(layer.weight, "quant_state", None) or layer.quant_state
                found[clean] = layer.weight.detach().clone()
                for key, value in state.as_dict(packed=True).items():
                    found[f"{clean}.{key}"] = value.clone()

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            collect()
    else:
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.unshard()
        collect()
        for unit in units:
            unit.reshard()
    return found


def curves(
    rank: int, world: int, cases: list[list[str]], folders: dict[str, str], shape: list[str]
) -> list[dict[str, Any]]:
    """Runs the example once a case (fsdp, storage, optimizer, rank of the adapters).

    Returns what it measured, the names of quantized tensors that were not the file's when gathered
    before and after training, and how many optimizer states lie in files.
    """
    import bitsandbytes.optim
    from safetensors.torch import load_file
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The adapters of this small model are all below the size from which states are paged.
    bitsandbytes.optim._paged.MIN_ELEMENTS = 1024
    results = []
    for fsdp, storage, optim, lora in cases:
        folder = Path(folders[storage])
        arguments = ["--model", str(folder), "--fsdp", fsdp, "--dtype", "fp32"]
        arguments += [
            "--storage",
            storage,
            "--optim",
            optim,
            "--lora-rank",
            lora,
            "--save-every",
            "0",
        ]
        options = fsdp_qlora.parse([*arguments, *shape])
        model, optimizer, backward = fsdp_qlora.prepare(options)
        file = load_file(folder / "model.safetensors")
        quantized = {n for n in file if f"{n}.absmax" in file or ".weight." in n}
        file = {name: file[name] for name in quantized}
        wrong = differing(gathered(model), file)
        result = fsdp_qlora.train(options, model, optimizer, backward)
        wrong += differing(gathered(model), file)
        states = [value for state in optimizer.state.values() for value in state.values()]
        paged = sum(getattr(value, "is_paged", False) for value in states)
        results.append({**result, "tensors": len(file), "wrong": wrong, "paged": paged})
    return results


def deviation(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


CASES = [
    ["1", "fp32", "AdamW8bit", "32"],
    ["1", "uint8", "AdamW8bit", "32"],
    ["1", "bf16", "PagedAdamW8bit", "32"],
    ["2", "uint8", "AdamW8bit", "32"],
    ["2", "bf16", "PagedAdamW8bit", "32"],
]
SHAPE = ["--steps", "6", "--batch", "4", "--window", "64"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("curves")
    folders = {storage: str(quantize(folder, storage)) for storage in {case[1] for case in CASES}}
    return {
        world: ranks.run(curves, world, cases=CASES, folders=folders, shape=SHAPE)[0]
        for world in (1, 2)
    }


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_curves_of_one_and_two_ranks_agree(results, case):
    one, two = results[1][case], results[2][case]
    assert deviation(two["losses"], one["losses"]) <= TOLERANCE
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.parametrize("world", [1, 2])
def test_states_are_in_files_where_asked_for(results, world):
    for case, result in zip(CASES, results[world], strict=True):
        assert (result["paged"] > 0) == case[2].startswith("Paged"), case


def test_storage_and_paging_have_no_part_in_the_arithmetic(results):
    for a, b in itertools.combinations(range(len(CASES)), 2):
        alike = CASES[a][0] == CASES[b][0]
        one, other = (results[1][case]["losses"] for case in (a, b))
        # FSDP1 and FSDP2 begin with other adapters, which add nothing in the first step.
        assert one == other if alike else one[0] == other[0], (CASES[a], CASES[b])


@pytest.mark.parametrize("world", [1, 2])
def test_gathered_weights_are_the_file(results, world):
    for case, result in zip(CASES, results[world], strict=True):
        assert result["tensors"] == 28 * 6, case
        assert result["wrong"] == [], case
