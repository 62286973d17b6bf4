"""Quantized layers on the CUDA device: products, gradients, moves between devices, state dicts."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import emulated
import pytest
import torch
from comparison import assert_alike, same
from halfbyte import nn as hb_nn
from halfbyte.functional import dequantize_4bit
from halfbyte.nn.experts import quantize_experts_4bit, quantize_experts_8bit
from torch import nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear_4bit(device: str, **config: Any) -> hb_nn.Linear4bit:
    torch.manual_seed(0)
    config = {"quant_type": "nf4", "compress_statistics": True} | config
    return hb_nn.Linear4bit(96, 64, **config).to(device)


def linear_8bit(device: str, **config: Any) -> hb_nn.Linear8bitLt:
    torch.manual_seed(0)
    return hb_nn.Linear8bitLt(96, 64, **{"has_fp16_weights": False} | config).to(device)


LAYERS = {
    "4bit": linear_4bit,
    "4bit fp4": lambda d: linear_4bit(d, quant_type="fp4", compress_statistics=False),
    "4bit bfloat16 storage": lambda d: linear_4bit(d, quant_storage=torch.bfloat16),
    "8bit": linear_8bit,
    "8bit threshold": lambda d: linear_8bit(d, threshold=3.0),
    "8bit trainable": lambda d: linear_8bit(d, has_fp16_weights=True),
    "8bit trainable threshold": lambda d: linear_8bit(d, has_fp16_weights=True, threshold=3.0),
}
FROZEN = [name for name in LAYERS if "trainable" not in name]


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def run(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of what trains."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y))
    return [y, x.grad, *[p.grad for p in layer.parameters() if p.grad is not None]]


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(7))
    x[..., 11] *= 8
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_products_and_gradients_are_those_of_the_cpu(kind, dtype):
    on_cuda, on_cpu = LAYERS[kind]("cuda"), LAYERS[kind]("cpu")
    assert_alike(run(on_cuda, inputs(dtype).cuda()), run(on_cpu, inputs(dtype)), exact=False)


@pytest.mark.parametrize("kind", FROZEN)
def test_the_device_quantizes_as_the_cpu_does(kind):
    on_cuda, on_cpu = LAYERS[kind]("cuda").state_dict(), LAYERS[kind]("cpu").state_dict()
    assert list(on_cuda) == list(on_cpu)
    for key, value in on_cpu.items():
        if isinstance(value, torch.Tensor):
            assert same(on_cuda[key].cuda(), value), key
        else:
            assert on_cuda[key] == value


@pytest.mark.parametrize("kind", FROZEN)
def test_a_layer_goes_to_the_device_and_back(kind):
    layer = LAYERS[kind]("cpu")
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    want = layer(inputs())
    for device in ("cuda", "cuda:0", torch.device("cuda", 0), 0):
        layer = layer.to(device)
        assert layer.weight.is_cuda
        assert_alike(layer(inputs().cuda()), want, exact=False)
    if torch.cuda.device_count() > 1:
        layer = layer.to("cuda:1")
        y = layer(inputs().to("cuda:1"))
        assert y.device == torch.device("cuda", 1)
        assert_alike(y, want, exact=False)
    layer = layer.cpu()
    assert torch.equal(layer(inputs()), want)
    after = layer.state_dict()
    assert all(raw(before[k]) == raw(after[k]) for k in before)


@pytest.mark.parametrize("kind", FROZEN)
def test_half_and_cuda_in_one_call(kind):
    layer = LAYERS[kind]("cpu").to("cuda", torch.bfloat16)
    y = layer(inputs(torch.bfloat16).cuda())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", FROZEN)
def test_state_dicts_cross_devices(kind, source, target):
    buffer = io.BytesIO()
    given = LAYERS[kind](source)
    torch.save(given.state_dict(), buffer)
    buffer.seek(0)
    layer = LAYERS[kind](target)
    nn.init.zeros_(layer.bias)
    layer.load_state_dict(torch.load(buffer, weights_only=True))
    assert layer.weight.device.type == target
    want = given(inputs().to(source))
    torch.testing.assert_close(layer(inputs().to(target)).cpu(), want.cpu())


@pytest.mark.parametrize("kind", FROZEN)
def test_copies(kind):
    layer = LAYERS[kind]("cuda")
    want = layer(inputs().cuda())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.weight.is_cuda
        assert twin.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(twin(inputs().cuda()), want)


def test_from_prequantized_on_the_device():
    saved = {k: v for k, v in linear_4bit("cpu").state_dict().items() if k != "bias"}
    stats = {k.removeprefix("weight."): v for k, v in saved.items() if k != "weight"}
    weight = hb_nn.Params4bit.from_prequantized(
        data=saved["weight"], quantized_stats=stats, device="cuda"
    )
    assert weight.is_cuda
    assert weight.quant_state.absmax.is_cuda
    dense = dequantize_4bit(weight.data, weight.quant_state)
    cpu = linear_4bit("cpu").weight
    assert same(dense, dequantize_4bit(cpu.data, cpu.quant_state))


@pytest.mark.parametrize("kind", FROZEN)
def test_autocast_keeps_the_input_dtype(kind):
    layer = LAYERS[kind]("cuda")
    want = layer(inputs(torch.bfloat16).cuda())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        x = nn.functional.linear(inputs().cuda(), torch.eye(96, device="cuda"))
        y = layer(x)
    assert x.dtype == y.dtype == torch.bfloat16
    assert_alike(y, want.cpu(), exact=True)


@pytest.mark.parametrize("kind", FROZEN)
def test_activation_checkpoints(kind):
    layer = LAYERS[kind]("cuda")
    want = run(layer, inputs().cuda())
    layer.zero_grad()
    x = inputs().cuda().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y))
    assert torch.equal(y, want[0])
    assert torch.equal(x.grad, want[1])


EMBEDDINGS = {
    "nf4": lambda: hb_nn.EmbeddingNF4(50, 96),
    "fp4": lambda: hb_nn.EmbeddingFP4(50, 33),
    "8bit": lambda: hb_nn.Embedding8bit(50, 96),
    "stable": lambda: hb_nn.StableEmbedding(50, 96),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings(kind):
    torch.manual_seed(0)
    layer = EMBEDDINGS[kind]()
    twin = copy.deepcopy(layer).cuda()
    layer = layer.to("cpu")
    index = torch.tensor([[0, 49, 7], [7, 7, 1]])
    got, want = twin(index.cuda()), layer(index)
    assert_alike(got, want, exact=kind != "stable")
    back = twin.cpu()
    assert torch.equal(back(index), want)


@pytest.mark.parametrize("make", [quantize_experts_4bit, quantize_experts_8bit])
def test_weights_of_experts(make):
    weight = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(0))
    assert_alike(make(weight.cuda())[0], make(weight)[0], exact=True)


def test_the_weight_is_quantized_where_it_goes():
    layer = linear_4bit("cuda")
    state = layer.weight.quant_state
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() == 96 * 64 // 2
    nested = (state.offset, state.state2.absmax, state.state2.code)
    assert all(t.is_cuda for t in (layer.weight, state.absmax, state.code, *nested))


@pytest.mark.emulator
def test_outlier_columns_wait_only_for_who_reads_them():
    layer, x = linear_8bit("cuda", threshold=6.0), torch.zeros(3, 96, device="cuda")
    x[1, 40] = x[2, 7] = 8.0
    before = emulated.waits()
    layer(x)
    assert emulated.waits() == before
    assert layer.state.idx.tolist() == [7, 40]
    assert (layer.state.idx.dtype, layer.state.idx.device) == (torch.int64, x.device)
    copied = copy.deepcopy(layer)
    layer(x.zero_())
    assert layer.state.idx.tolist() == []
    assert copied.state.idx.tolist() == [7, 40]
    assert layer.cpu().state.idx is not None


@pytest.mark.parametrize("kind", FROZEN)
def test_data_parallel(kind, monkeypatch):
    """Replicas on two devices run at once, in threads, with the state of one layer."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    if emulated.is_emulated():  # NCCL, which copies the parameters, wants more of a device

        def broadcast(tensors: Any, devices: Any, *_: Any) -> list[list[torch.Tensor]]:
            return [[tensor.to(torch.device("cuda", d)) for tensor in tensors] for d in devices]

        monkeypatch.setattr(torch.nn.parallel.comm, "broadcast_coalesced", broadcast)
    layer, x = LAYERS[kind]("cuda"), torch.randn(8, 96).cuda()
    want = torch.cat([layer(half) for half in x.chunk(2)])
    parallel = nn.DataParallel(layer, [0, 1])
    for _ in range(10):
        assert torch.equal(parallel(x), want)
