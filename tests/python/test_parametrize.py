"""replace_parameter_4bit: any parameter of any module, decoded when read."""

from __future__ import annotations

import copy

import pytest
import torch
from halfbyte.functional import QuantState, dequantize_4bit, quantize_4bit
from halfbyte.nn import parametrize as hb_parametrize
from halfbyte.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from reference import DEVICE
from torch import nn
from torch.nn.utils import parametrize as P


class Experts(nn.Module):
    """Fused experts, as mixtures of experts keep them: [experts, out, in]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.gate_up = nn.Parameter(torch.randn(4, 16, 64))
        self.down = nn.Parameter(torch.randn(4, 64, 8))
        self.seen: list = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.gate_up, self.gate_up
        self.seen.append(first is second)
        return x @ first.transpose(1, 2)


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.experts = Experts(seed)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts(x))


def model(seed: int = 0, **config) -> Model:
    made = Model(seed)
    replace_parameter_4bit(made.experts, "gate_up", **config)
    return made


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().as_subclass(torch.Tensor).contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [False, True])
@pytest.mark.parametrize("blocksize", [None, 128])
def test_reading_decodes(quant_type, compress_statistics, blocksize):
    module = Experts()
    original = module.gate_up.detach().clone()
    replace_parameter_4bit(module, "gate_up", compress_statistics, quant_type, blocksize)
    packed, state = quantize_4bit(
        original,
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    want = dequantize_4bit(packed, state)
    assert want.shape == (4, 16, 64)
    assert torch.equal(module.gate_up, want)
    assert raw(module.parametrizations.gate_up.original) == raw(packed)
    x = torch.randn(4, 2, 64)
    assert torch.equal(module(x), x @ want.transpose(1, 2))


def test_defaults_and_looks():
    module = model().experts
    assert module.parametrizations.gate_up[0].quant_state.quant_type == "nf4"
    assert not module.parametrizations.gate_up[0].quant_state.nested
    names = [name for name, _ in module.named_parameters()]
    assert sorted(names) == ["down", "parametrizations.gate_up.original"]
    assert "shape=[4, 16, 64], quant_type=nf4" in repr(module)


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 5, 7)])
def test_odd_shapes(shape):
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(*shape))
    replace_parameter_4bit(module, "w")
    assert module.w.shape == shape


def test_errors():
    module = Experts()
    module.register_buffer("buffer", torch.zeros(4))
    module.plain = torch.zeros(4)
    with pytest.raises(AttributeError, match="Experts has no parameter 'missing'"):
        replace_parameter_4bit(module, "missing")
    for name in ("buffer", "plain", "seen", "forward"):
        with pytest.raises(TypeError, match=rf"'{name}' of Experts must be a torch\.nn\.Parameter"):
            replace_parameter_4bit(module, name)
    with pytest.raises(ValueError, match="48"):
        replace_parameter_4bit(module, "down", blocksize=48)
    with pytest.raises(ValueError, match="zz"):
        replace_parameter_4bit(module, "down", quant_type="zz")
    assert type(module) is Experts


def test_twice_is_an_error():
    module = model().experts
    with pytest.raises(TypeError, match="gate_up"):
        replace_parameter_4bit(module, "gate_up")


# --- Decoded once a forward --------------------------------------------------------------------


def test_cache():
    made = model()
    made(torch.randn(4, 2, 64))
    assert made.experts.seen == [True]
    assert P._cache_enabled == 0
    assert not P._cache
    assert made.experts.gate_up is not made.experts.gate_up


def test_decodes_once_even_with_two_parameters(monkeypatch):
    made = model()
    replace_parameter_4bit(made.experts, "down")
    calls = []
    decode = hb_parametrize.dequantize_4bit
    monkeypatch.setattr(
        hb_parametrize, "dequantize_4bit", lambda *args: calls.append(args) or decode(*args)
    )
    made(torch.randn(4, 2, 64))
    assert len(calls) == 1
    assert P._cache_enabled == 0


def test_cache_closes_when_forward_raises():
    made = model()
    with pytest.raises(RuntimeError):
        made(torch.randn(4, 2, 63))
    assert P._cache_enabled == 0
    assert not P._cache
    made(torch.randn(4, 2, 64))
    assert P._cache_enabled == 0


def test_cache_of_nested_modules():
    class Outer(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model().experts

        def forward(self, x):
            return self.inner(x) + super().forward(x)

    made = Outer()
    replace_parameter_4bit(made, "gate_up")
    made(torch.randn(4, 2, 64))
    assert P._cache_enabled == 0


# --- Training ----------------------------------------------------------------------------------


def test_gradients_pass_through():
    made = model()
    x = torch.randn(4, 2, 64, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    assert not made.experts.gate_up.requires_grad
    assert made.experts.parametrizations.gate_up.original.grad is None


def test_compile():
    torch._dynamo.reset()
    made = model()
    made.experts.forward = lambda x: x @ made.experts.gate_up.transpose(1, 2)
    x = torch.randn(4, 2, 64)
    compiled = torch.compile(made, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))
    assert P._cache_enabled == 0


# --- State dict --------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_looks_like_linear4bits(nested):
    keys = list(model(compress_statistics=nested).state_dict())
    family = ["", ".absmax", ".quant_map"]
    family += [".nested_absmax", ".nested_quant_map"] if nested else []
    family += [".quant_state.bitsandbytes__nf4"]
    want = {f"experts.gate_up{name}" for name in family}
    assert set(keys) == want | {"experts.down", "head.weight", "head.bias"}


@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_round_trip(nested):
    source, target = model(0, compress_statistics=nested), model(1, compress_statistics=nested)
    saved = source.state_dict()
    assert target.load_state_dict(saved, strict=True) == ([], [])
    x = torch.randn(4, 2, 64)
    assert torch.equal(target(x), source(x))
    again = target.state_dict()
    assert {k: raw(v) for k, v in again.items()} == {k: raw(v) for k, v in saved.items()}


def test_loads_another_configuration():
    source, target = model(0, quant_type="fp4", blocksize=128), model(1)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.experts.gate_up, source.experts.gate_up)


def test_loads_float():
    source, target = Model(0), model(1)
    target.load_state_dict(source.state_dict())
    replace_parameter_4bit(source.experts, "gate_up")
    assert torch.equal(target.experts.gate_up, source.experts.gate_up)


def test_load_errors():
    saved = model(0).state_dict()
    target = model(1)
    before = raw(target.experts.gate_up)
    broken = {k: v for k, v in saved.items() if k != "experts.gate_up.absmax"}
    pattern = r'Missing key\(s\) in state_dict: "experts.gate_up.absmax"\. \n'
    with pytest.raises(RuntimeError, match=pattern):
        target.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="loads only as a whole"):
        target.load_state_dict(broken, strict=False)
    without = {k: v for k, v in saved.items() if not k.startswith("experts.gate_up")}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "experts.gate_up"\. '):
        target.load_state_dict(without)
    assert target.load_state_dict(without, strict=False).missing_keys == ["experts.gate_up"]
    with pytest.raises(RuntimeError, match=r'Unexpected.*"experts\.gate_up\.strange"'):
        target.load_state_dict({**saved, "experts.gate_up.strange": torch.zeros(1)})
    short = {**saved, "experts.gate_up": saved["experts.gate_up"][:7]}
    with pytest.raises(RuntimeError, match="takes 2048 elements"):
        model(1).load_state_dict(short)
    fresh = model(1)
    assert raw(fresh.experts.gate_up) == before


def test_deepcopy_casts_and_moves():
    made = model()
    x = torch.randn(4, 2, 64)
    want = made.experts(x)
    twin = copy.deepcopy(made)
    assert torch.equal(twin.experts(x), want)
    twin.half().to(DEVICE)
    assert twin.experts.parametrizations.gate_up.original.dtype == torch.uint8
    assert torch.equal(twin.experts(x), want)
    model(3).load_state_dict(twin.state_dict())


# --- Prequantized ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "experts.gate_up."])
@pytest.mark.parametrize("nested", [False, True])
def test_prequantized(prefix, nested):
    source = Experts()
    packed, state = quantize_4bit(source.gate_up.data, quant_type="nf4", compress_statistics=nested)
    stats = {prefix + k: v for k, v in state.as_dict(packed=True).items()}
    before = dict(stats)
    module = Experts(1)
    module.gate_up = nn.Parameter(packed, requires_grad=False)
    replace_parameter_4bit_prequantized(module, "gate_up", stats, DEVICE)
    assert torch.equal(module.gate_up, dequantize_4bit(packed, state))
    assert stats == before
    assert isinstance(module.parametrizations.gate_up[0].quant_state, QuantState)
    other = Experts()
    replace_parameter_4bit(other, "gate_up", nested, "nf4")
    assert list(module.state_dict()) == list(other.state_dict())


def test_prequantized_errors():
    module = Experts()
    packed, state = quantize_4bit(module.gate_up.data, quant_type="nf4")
    stats = state.as_dict(packed=True)
    device = DEVICE
    with pytest.raises(ValueError, match=r"takes 2048 .*torch\.float32|takes 512 elements"):
        replace_parameter_4bit_prequantized(module, "gate_up", stats, device)
    with pytest.raises(AttributeError, match="missing"):
        replace_parameter_4bit_prequantized(module, "missing", stats, device)
    with pytest.raises(TypeError, match="seen"):
        replace_parameter_4bit_prequantized(module, "seen", stats, device)
    module.gate_up = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match="neither"):
        replace_parameter_4bit_prequantized(module, "gate_up", {}, device)
    assert type(module) is Experts
