"""Embeddings: rows decoded one by one equal the rows of the decoded table."""

from __future__ import annotations

import copy

import pytest
import torch
from halfbyte.functional import dequantize_4bit
from halfbyte.nn import (
    Embedding,
    Embedding4bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Params4bit,
    StableEmbedding,
)
from halfbyte.optim import GlobalOptimManager
from reference import DEVICE
from torch import nn

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def table(module: Embedding4bit) -> torch.Tensor:
    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().as_subclass(torch.Tensor).contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("rows", "dim"), [(10, 64), (7, 128), (10, 33), (10, 96), (5, 1), (3, 32), (1, 7)]
)
def test_rows_of_the_table(quant_type, storage, rows, dim):
    module = Embedding4bit(rows, dim, quant_type=quant_type, quant_storage=storage).to(DEVICE)
    index = torch.tensor([[0, rows - 1], [rows // 2, 0]])
    got = module(index)
    assert got.shape == (2, 2, dim)
    assert torch.equal(got, table(module)[index])


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("dim", [128, 96, 33])
@pytest.mark.parametrize("rows", [5, 700])
def test_nested_scales(blocksize, dim, rows):
    """Not what Embedding4bit makes, but what a checkpoint or a replaced weight may hold."""
    module = EmbeddingNF4(rows, dim)
    weight = Params4bit(module.weight.data, blocksize=blocksize, quant_type="nf4", module=module)
    module.weight = weight.to(DEVICE)
    assert module.weight.quant_state.nested
    index = torch.tensor([rows - 1, 0, rows // 3])
    assert torch.equal(module(index), table(module)[index])


@pytest.mark.parametrize("dim", [64, 33])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (2, 3, 4)])
def test_index_shapes(dim, dtype, shape):
    module = EmbeddingFP4(10, dim).to(DEVICE)
    index = torch.randint(0, 10, shape).to(dtype)
    got = module(index)
    assert got.shape == (*shape, dim)
    assert got.dtype == torch.float32
    assert torch.equal(got, table(module)[index.long()])


@pytest.mark.parametrize("dim", [64, 33])
@pytest.mark.parametrize("index", [10, -1])
def test_index_out_of_range(dim, index):
    with pytest.raises(IndexError):
        EmbeddingNF4(10, dim).to(DEVICE)(torch.tensor([0, index]))


@pytest.mark.parametrize("dim", [64, 33])
def test_dtypes(dim):
    half = EmbeddingNF4(10, dim, dtype=torch.bfloat16).to(DEVICE)
    index = torch.arange(10)
    assert half.weight.quant_state.dtype == torch.bfloat16
    assert half(index).dtype == torch.bfloat16
    assert torch.equal(half(index), table(half))
    full = EmbeddingNF4(10, dim).to(torch.bfloat16).to(DEVICE)
    assert full.dtype == torch.float32
    assert torch.equal(full(index), table(full).float())


def test_attributes():
    module = Embedding4bit(10, 64)
    assert isinstance(module, nn.Embedding)
    assert module.weight.compress_statistics is False
    assert module.weight.quant_type == "fp4"
    assert module.weight.module is module
    assert repr(module) == "Embedding4bit(10, 64)"
    assert EmbeddingNF4(10, 64).weight.quant_type == "nf4"
    with pytest.raises(ValueError, match="'int4'"):
        Embedding4bit(10, 64, quant_type="int4")


def test_not_quantized():
    with pytest.raises(RuntimeError, match="Embedding4bit is not quantized yet"):
        Embedding4bit(10, 64)(torch.tensor([1]))


@pytest.mark.parametrize("storage", STORAGES)
def test_casts_leave_packed_bytes_alone(storage):
    module = EmbeddingNF4(10, 64, quant_storage=storage).to(DEVICE)
    want = raw(module.weight)
    module.half().bfloat16().to(torch.float64)
    assert raw(module.weight) == want
    assert module.weight.dtype == storage


def test_lost_state_copy_meta():
    module = EmbeddingNF4(10, 64).to(DEVICE)
    index = torch.tensor([1, 2])
    want = module(index)
    module._parameters["weight"] = nn.Parameter(module.weight.data, requires_grad=False)
    assert torch.equal(module(index), want)
    assert torch.equal(copy.deepcopy(module)(index), want)
    saved = copy.deepcopy(module.state_dict())
    module.to("meta").to_empty(device=DEVICE)
    module.load_state_dict(saved)
    assert torch.equal(module(index), want)


def test_in_a_compiled_model():
    torch._dynamo.reset()
    module = EmbeddingNF4(10, 64).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    index = torch.tensor([[1, 9, 3]])
    assert torch.equal(compiled(index), module(index))


def test_gradients_reach_what_comes_after():
    module = nn.Sequential(EmbeddingNF4(10, 64).to(DEVICE), nn.Linear(64, 3))
    module(torch.tensor([1, 2])).sum().backward()
    assert module[0].weight.grad is None
    assert module[1].weight.grad is not None


# --- Float embeddings --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [StableEmbedding, Embedding])
def test_float_embeddings_ask_for_32_bit_states(cls):
    manager = GlobalOptimManager.get_instance()
    before = len(manager.module_weight_config_triple)
    module = cls(10, 64)
    new = manager.module_weight_config_triple[before:]
    assert len(new) == 1
    assert new[0][0] is module
    assert new[0][1:] == ("weight", {"optim_bits": 32})


@pytest.mark.parametrize("cls", [StableEmbedding, Embedding])
def test_float_embeddings_start_xavier(cls):
    module = cls(100, 64, padding_idx=3)
    bound = (6 / (100 + 64)) ** 0.5
    assert module.weight.abs().max() <= bound
    assert module.weight.abs().max() > 0.9 * bound
    assert not module.weight[3].any()
    kept = torch.randn(4, 8)
    assert torch.equal(cls(4, 8, _weight=kept).weight, kept)


def test_stable_embedding_is_normalized():
    module = StableEmbedding(10, 64)
    index = torch.tensor([[1, 2], [3, 9]])
    got = module(index)
    want = nn.functional.layer_norm(module.weight[index], (64,))
    torch.testing.assert_close(got, want)
    assert list(module.state_dict()) == ["weight", "norm.weight", "norm.bias"]
    half = StableEmbedding(10, 64, dtype=torch.bfloat16)
    assert half.norm.weight.dtype == torch.float32
    assert half(index).dtype == torch.bfloat16
    got.sum().backward()
    assert module.weight.grad is not None


def test_embedding_is_an_embedding():
    module = Embedding(10, 64, max_norm=1.0)
    got = module(torch.tensor([1]))
    assert torch.equal(got, module.weight[[1]])
    assert got.norm() <= 1.0 + 1e-5
