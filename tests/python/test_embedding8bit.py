"""Embedding8bit: rows decoded one by one equal the rows of the decoded table; it can be saved."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from halfbyte.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from halfbyte.nn import Embedding8bit, Int8Params
from reference import DEVICE
from torch import nn

KEYS = ["weight", "SCB", "weight_format"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def quantized(rows: int = 10, dim: int = 64, **config) -> Embedding8bit:
    return Embedding8bit(rows, dim, **config).to(DEVICE)


def table(module: Embedding8bit) -> torch.Tensor:
    decoded = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return decoded.to(module.dtype)


def test_attributes():
    module = Embedding8bit(10, 64)
    assert isinstance(module, nn.Embedding)
    assert type(module.weight) is Int8Params
    assert not module.weight.requires_grad
    assert module.dtype == torch.float32
    assert module.padding_idx is None
    assert list(module.buffers()) == []
    assert repr(module) == "Embedding8bit(10, 64)"
    assert Embedding8bit(10, 64, device="meta").weight.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("rows", "dim"), [(10, 64), (7, 33), (1, 1), (300, 5)])
def test_rows_of_the_table(rows, dim, dtype):
    floats = nn.Embedding(rows, dim, dtype=dtype)
    module = Embedding8bit(rows, dim, dtype=dtype)
    module.load_state_dict(floats.state_dict())
    module.to(DEVICE)
    index = torch.tensor([[0, rows - 1], [rows // 2, 0]])
    got = module(index)
    assert (got.shape, got.dtype) == ((2, 2, dim), dtype)
    assert torch.equal(got, table(module)[index])
    # Half a step of 1/127 of the row's largest value, and the rounding of the dtype.
    limit = floats.weight.detach().abs().amax(1, keepdim=True)[index] * 0.5 / 127
    slack = 1.001 + 254 * torch.finfo(dtype).eps
    assert ((got - floats(index)).abs() <= limit * slack).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (2, 3, 4)])
def test_index_shapes(dtype, shape):
    module = quantized()
    index = torch.randint(0, 10, shape).to(dtype)
    got = module(index)
    assert (got.shape, got.dtype) == ((*shape, 64), torch.float32)
    assert torch.equal(got, table(module)[index.long()])


@pytest.mark.parametrize("index", [10, -1])
def test_index_out_of_range(index):
    with pytest.raises(IndexError):
        quantized()(torch.tensor([0, index]))


def test_not_quantized():
    with pytest.raises(RuntimeError, match="Embedding8bit is not quantized yet"):
        Embedding8bit(10, 64)(torch.tensor([1]))


def test_only_the_rows_asked_for_are_decoded():
    module = quantized(100_000, 64)
    index = torch.tensor([5, 99_999])
    with torch.profiler.profile(profile_memory=True) as profile:
        module(index)
    used = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert used < 64 * 1024


def test_casts_and_meta():
    module = quantized()
    index = torch.arange(10)
    want = module(index)
    codes = module.weight.data.clone()
    module.half().bfloat16().to(torch.float64)
    assert torch.equal(module.weight.data, codes)
    assert module.weight.SCB.dtype == torch.float32
    assert torch.equal(module(index), want)
    saved = copy.deepcopy(module.state_dict())
    module.to("meta").to_empty(device=DEVICE)
    module.load_state_dict(saved)
    assert torch.equal(module(index), want)
    module._parameters["weight"] = nn.Parameter(module.weight.data, requires_grad=False)
    assert torch.equal(module(index), want)


@pytest.mark.parametrize("trip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(trip):
    module = quantized()
    other = trip(module)
    index = torch.arange(10)
    assert type(other.weight) is Int8Params
    assert torch.equal(other(index), module(index))
    module.weight.SCB.zero_()
    assert other(index).any()


def test_keys():
    saved = quantized().state_dict()
    assert list(saved) == KEYS
    assert (saved["weight"].dtype, saved["weight"].shape) == (torch.int8, (10, 64))
    assert (saved["SCB"].dtype, saved["SCB"].shape) == (torch.float32, (10,))
    assert saved["weight_format"].item() == 0
    assert list(Embedding8bit(10, 64).state_dict()) == ["weight"]


@pytest.mark.parametrize("ready", [False, True], ids=["into-unquantized", "into-quantized"])
def test_saved_and_loaded(ready):
    source = quantized()
    target = quantized() if ready else Embedding8bit(10, 64)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert target.load_state_dict(torch.load(file)) == ([], [])
    index = torch.arange(10)
    assert torch.equal(target(index), source(index))
    assert list(target.state_dict()) == KEYS
    assert torch.equal(target.weight.data, source.weight.data)


def test_float_tables_load_into_quantized_ones():
    floats, target = nn.Embedding(10, 64), quantized()
    target.load_state_dict(floats.state_dict())
    codes, scales, _ = int8_vectorwise_quant(floats.weight.detach())
    assert torch.equal(target.weight.data, codes)
    assert torch.equal(target.weight.SCB, scales)


def test_tables_that_do_not_fit():
    saved = quantized().state_dict()
    with pytest.raises(RuntimeError, match=r"shape \[10, 64\], the module has \[11, 64\]"):
        quantized(11).load_state_dict(saved)
    del saved["SCB"]
    with pytest.raises(RuntimeError, match=r"loads only as a whole, .* lacks SCB"):
        quantized().load_state_dict(saved, strict=False)


def test_in_a_compiled_model_and_exported():
    torch._dynamo.reset()
    module = quantized()
    index = torch.tensor([[1, 9, 3]])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), module(index))
    program = torch.export.export(module, (index,))
    assert torch.equal(program.module()(index), module(index))
    torch._dynamo.reset()


def test_gradients_reach_what_comes_after():
    module = nn.Sequential(quantized(), nn.Linear(64, 3))
    module(torch.tensor([1, 2])).sum().backward()
    assert module[0].weight.grad is None
    assert module[1].weight.grad is not None
