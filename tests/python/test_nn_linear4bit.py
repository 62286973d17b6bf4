"""Linear4bit: the product, its gradients, dtypes, and what wrappers may do to the layer."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import pickle
import warnings

import pytest
import torch
from halfbyte import nn as hb_nn
from halfbyte.autograd._functions import matmul_4bit
from halfbyte.functional import dequantize_4bit
from halfbyte.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from halfbyte.nn.modules import fix_4bit_weight_quant_state_from_module
from reference import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
# Relative to the largest output: sums of float32, rounded once to the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-5}


def layer(n_in: int = 96, n_out: int = 64, **config) -> Linear4bit:
    config.setdefault("quant_type", "nf4")
    torch.manual_seed(0)
    return Linear4bit(n_in, n_out, **config).to(DEVICE)


def reference(module: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    w = dequantize_4bit(module.weight.data, module.weight.quant_state).double()
    bias = None if module.bias is None else module.bias.detach().double()
    return nn.functional.linear(x.detach().double(), w, bias)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    scale = want.abs().max().clamp_min(1e-30) if want.numel() else 1.0
    error = (got.double() - want).abs().max() / scale if want.numel() else 0.0
    assert error <= TOLERANCE[got.dtype], f"off by {error} of the largest value"


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().as_subclass(torch.Tensor).contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


# --- Construction ------------------------------------------------------------------------------


def test_it_is_a_linear_layer():
    module = Linear4bit(96, 64)
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (96, 64)
    assert type(module.weight) is Params4bit
    assert module.weight.module is module
    assert not module.weight.requires_grad
    assert module.bias.requires_grad
    assert module.weight.quant_type == "fp4"
    assert module.compute_dtype is None
    assert not module.compute_type_is_set
    assert module.quant_state is None
    assert Linear4bit(96, 64, compute_dtype=torch.bfloat16).compute_type_is_set
    assert list(module._parameters) == ["weight", "bias"]


def test_no_logging_and_no_warning_in_constructors(caplog):
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (None, torch.float32, torch.float16):
            Linear4bit(33, 5, compute_dtype=dtype)
        hb_nn.Embedding4bit(10, 33)
    assert not caplog.records


def test_under_the_meta_device():
    with torch.device("meta"):
        module = Linear4bit(96, 64, True, torch.bfloat16, compress_statistics=True)
    assert module.weight.device.type == "meta"
    assert type(module.weight) is Params4bit
    value = torch.randn(64, 96)
    old = module.weight
    module.weight = Params4bit(value, requires_grad=False, **old.__dict__).to(value.device)
    module.bias = nn.Parameter(torch.zeros(64))
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    assert_close(module(x), reference(module, x))
    assert module.quant_state is module.weight.quant_state


def test_device_argument_does_not_quantize():
    assert Linear4bit(8, 4, device=DEVICE).weight.dtype == torch.float32
    assert Linear4bit(8, 4, device="meta").weight.device.type == "meta"


@pytest.mark.parametrize(("cls", "kind"), [(LinearNF4, "nf4"), (LinearFP4, "fp4")])
def test_named_types(cls, kind):
    module = cls(96, 64, compute_dtype=torch.float32, quant_storage=torch.bfloat16).to(DEVICE)
    assert module.weight.quant_type == kind
    assert module.weight.quant_state.quant_type == kind
    assert module.weight.dtype == torch.bfloat16
    assert module(torch.randn(2, 96)).shape == (2, 64)


def test_unknown_quant_type_is_refused_at_once():
    with pytest.raises(ValueError, match=r"'fp4', 'nf4', got 'int4'"):
        Linear4bit(8, 4, quant_type="int4")


def test_repr_says_what_it_is():
    assert repr(layer()).startswith("Linear4bit(in_features=96, out_features=64, bias=True")
    assert "quant_type=nf4" in repr(layer())
    assert "compress_statistics" not in repr(layer(compress_statistics=False))


# --- Forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 96), (3, 96), (96,), (2, 3, 96), (0, 96), (2, 0, 96)])
def test_forward(dtype, storage, nested, shape):
    module = layer(quant_storage=storage, compress_statistics=nested)
    x = torch.randn(*shape).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], 64)
    assert_close(y, reference(module, x))


@pytest.mark.parametrize(("n_in", "n_out"), [(97, 5), (100, 7), (1, 1), (33, 33), (64, 64)])
@pytest.mark.parametrize("storage", STORAGES)
def test_odd_sizes(n_in, n_out, storage):
    module = layer(n_in, n_out, quant_storage=storage)
    x = torch.randn(3, n_in)
    assert_close(module(x), reference(module, x))


def test_float64_input():
    module = layer()
    x = torch.randn(3, 96, dtype=torch.float64)
    y = module(x)
    assert y.dtype == torch.float64
    assert_close(y, reference(module, x))


@pytest.mark.parametrize(
    "strided",
    [
        lambda: torch.randn(96, 3).t(),
        lambda: torch.randn(3, 192)[:, ::2],
        lambda: torch.randn(1, 96).expand(4, 96),
        lambda: torch.randn(96, 2, 3).permute(2, 1, 0),
        lambda: torch.randn(3, 97)[:, 1:],
    ],
)
def test_strided_inputs(strided):
    x = strided()
    assert_close(layer()(x), reference(layer(), x))


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compute_dtype(compute, dtype):
    module = layer(compute_dtype=compute)
    x = torch.randn(3, 96).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert module.compute_dtype == compute
    worst = max(TOLERANCE[compute], TOLERANCE[dtype])
    want = reference(module, x)
    assert (y.double() - want).abs().max() <= 2 * worst * want.abs().max()


def test_compute_dtype_changes_the_arithmetic():
    x = torch.randn(3, 96)
    full = layer(compute_dtype=torch.float32, bias=False)(x)
    half = layer(compute_dtype=torch.bfloat16, bias=False)(x)
    assert not torch.equal(full, half)
    assert torch.equal(half, half.bfloat16().float())


@pytest.mark.parametrize(
    ("dtype", "adopted"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, None),
        (torch.float64, None),
    ],
)
def test_first_input_sets_the_compute_dtype(dtype, adopted):
    module = layer()
    module(torch.randn(2, 96, dtype=dtype))
    assert module.compute_dtype == adopted
    assert module.compute_type_is_set


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_is_cast_for_the_product_only(dtype):
    module = layer()
    bias = module.bias
    x = torch.randn(3, 96).to(dtype)
    assert_close(module(x), reference(module, x))
    assert module.bias is bias
    assert bias.dtype == torch.float32


def test_no_bias():
    module = layer(bias=False)
    x = torch.randn(3, 96)
    assert module.bias is None
    assert_close(module(x), reference(module, x))


def test_eval_does_not_touch_the_weight():
    """Upstream re-packs weights in eval mode on some processors; that layout then breaks."""
    module = layer(n_in=128)
    train = {k: raw(v) for k, v in module.state_dict().items()}
    module.eval()
    with torch.no_grad():
        module(torch.randn(1, 128, dtype=torch.bfloat16))
    assert {k: raw(v) for k, v in module.state_dict().items()} == train
    assert module.weight.shape == (128 * 64 // 2, 1)


# --- Bad input ---------------------------------------------------------------------------------


def test_not_quantized():
    with pytest.raises(RuntimeError, match=r"Linear4bit is not quantized yet.*\[64, 96\]"):
        Linear4bit(96, 64)(torch.randn(1, 96))


def test_not_quantized_on_meta():
    with pytest.raises(RuntimeError, match="not quantized yet"):
        Linear4bit(96, 64, device="meta")(torch.randn(1, 96, device="meta"))


def test_integer_input():
    with pytest.raises(TypeError, match=r"floating-point input, got torch\.int64"):
        layer()(torch.zeros(1, 96, dtype=torch.long))


@pytest.mark.parametrize("shape", [(3, 95), (3, 64), (96, 1), ()])
def test_wrong_features(shape):
    with pytest.raises(RuntimeError, match=r"\[\.\.\., 96\]"):
        layer()(torch.randn(shape))


# --- Training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 96), (96,), (2, 3, 96), (0, 96)])
def test_gradients(dtype, shape):
    module = layer()
    x = torch.randn(*shape).to(dtype).requires_grad_()
    y = module(x)
    grad = torch.randn(*y.shape).to(dtype)
    y.backward(grad)
    w = dequantize_4bit(module.weight.data, module.weight.quant_state).double()
    assert x.grad.dtype == dtype
    assert_close(x.grad, grad.double() @ w)
    assert module.weight.grad is None
    assert module.bias.grad.dtype == torch.float32
    want = grad.double().reshape(-1, 64).sum(0)
    assert torch.allclose(module.bias.grad.double(), want, atol=2e-2, rtol=1e-2)


def test_expanded_gradient():
    """A gradient out of .sum() has stride 0."""
    module = layer()
    x = torch.randn(3, 96, requires_grad=True)
    module(x).sum().backward()
    w = dequantize_4bit(module.weight.data, module.weight.quant_state).double()
    assert_close(x.grad, torch.ones(3, 64, dtype=torch.float64) @ w)


def test_no_graph_without_gradients():
    module = layer(bias=False)
    assert not module(torch.randn(3, 96)).requires_grad
    with torch.inference_mode():
        y = layer()(torch.randn(3, 96))
    assert y.is_inference()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    module = layer()
    x = torch.randn(3, 96, requires_grad=True)
    module(x).square().sum().backward()
    want, bias = x.grad.clone(), module.bias.grad.clone()
    x.grad = module.bias.grad = None
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, want)
    assert torch.equal(module.bias.grad, bias)


class Lora(nn.Module):
    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_lora_trains_and_leaves_the_base_alone(autocast):
    torch.manual_seed(0)
    model = nn.Sequential(Lora(layer(64, 64, bias=False)), nn.ReLU(), Lora(layer(64, 8)))
    before = {k: raw(v) for k, v in model.state_dict().items() if "base.weight" in k}
    for p in model.parameters():
        p.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Lora):
            module.down.requires_grad_(True)
            module.up.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    x, target = torch.randn(32, 64), torch.randn(32, 8)
    losses = []
    for _ in range(40):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.mse_loss(model(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    after = {k: raw(v) for k, v in model.state_dict().items() if "base.weight" in k}
    assert after == before


def test_autocast_keeps_the_input_dtype():
    module = layer()
    x = torch.randn(3, 96, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = module(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert x.grad.dtype == torch.float32
    assert_close(y, reference(module, x))


# --- Compilers ---------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("nested", [False, True])
def test_compile_fullgraph_forward_and_backward(backend, nested):
    module = layer(compress_statistics=nested)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(5, 96)
    eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = module(eager)
    want.square().sum().backward()
    bias = module.bias.grad.clone()
    module.bias.grad = None
    got = compiled(traced)
    got.square().sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(traced.grad, eager.grad)
    torch.testing.assert_close(module.bias.grad, bias)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_before_the_first_call_and_with_other_row_counts():
    compiled = torch.compile(layer(), fullgraph=True, backend="aot_eager")
    reference_layer = layer()
    for rows in (3, 5, 7, 1):
        x = torch.randn(rows, 96)
        assert torch.equal(compiled(x), reference_layer(x))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_a_whole_model():
    model = nn.Sequential(layer(96, 64), nn.GELU(), layer(64, 32), nn.LayerNorm(32))
    x = torch.randn(4, 96, requires_grad=True)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, model(x))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_functions_that_use_the_weight_themselves():
    """vLLM and unsloth call the product with a layer's weight and state."""
    module = layer(bias=False)

    def product(x: torch.Tensor) -> torch.Tensor:
        weight = module.weight
        first = matmul_4bit(x, weight.t(), weight.quant_state)
        whole = dequantize_4bit(weight, weight.quant_state)
        return first + x @ whole.t()

    x = torch.randn(2, 96)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2 * module(x))
    assert torch.equal(compiled(x), product(x))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_export():
    module = layer().eval()
    x = torch.randn(4, 96)
    want = module(x)
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), want)
    assert type(module.weight) is Params4bit
    assert torch.equal(module(x), want)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_export_with_a_free_row_count():
    module = layer().eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, (torch.randn(4, 96),), dynamic_shapes=({0: rows},))
    x = torch.randn(9, 96)
    assert torch.equal(program.module()(x), module(x))


# --- What wrappers do --------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to(DEVICE, torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m._apply(lambda t: torch.Tensor.to(t, torch.float16)),
    ],
    ids=["half", "bfloat16", "float", "double", "to", "todev", "type", "apply"],
)
def test_module_casts_leave_packed_bytes_alone(storage, cast):
    module = nn.Sequential(layer(quant_storage=storage))
    want = raw(module[0].weight)
    x = torch.randn(3, 96)
    expected = module[0](x)
    cast(module)
    weight = module[0].weight
    assert type(weight) is Params4bit
    assert weight.dtype == storage
    assert raw(weight) == want
    module[0].compute_type_is_set = False
    got = module[0](x)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_cast_before_quantization_sets_the_decoded_dtype():
    module = Linear4bit(96, 64, quant_type="nf4").to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.to(DEVICE).weight.quant_state.dtype == torch.bfloat16
    assert module.bias.dtype == torch.bfloat16


def test_to_meta_and_back_to_empty():
    module = Linear4bit(96, 64, quant_type="nf4")
    module.to("meta")
    assert type(module.weight) is Params4bit
    assert module.weight.device.type == "meta"
    module.to_empty(device=DEVICE)
    assert type(module.weight) is Params4bit
    assert module.weight.device.type == DEVICE.type
    assert not module.weight.bnb_quantized
    module.load_state_dict(layer().state_dict())
    x = torch.randn(2, 96)
    assert torch.equal(module(x), layer()(x))


def test_packed_to_meta_to_empty_and_loaded():
    module = layer(quant_storage=torch.bfloat16)
    saved = copy.deepcopy(module.state_dict())
    x = torch.randn(2, 96)
    want = module(x)
    module.to("meta")
    assert module.weight.device.type == "meta"
    assert module.weight.dtype == torch.bfloat16
    module.to_empty(device=DEVICE)
    assert type(module.weight) is Params4bit
    module.load_state_dict(saved)
    assert torch.equal(module(x), want)


def test_parameter_object_survives_quantization():
    module = Linear4bit(96, 64)
    before = module.weight
    module.to(DEVICE)
    assert module.weight is before


def test_swap_tensors_on_conversion():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = Linear4bit(96, 64, quant_type="nf4")
        module.to(DEVICE)
        module.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert type(module.weight) is Params4bit
    assert module.weight.dtype == torch.uint8
    assert module(torch.randn(1, 96)).shape == (1, 64)


def lose(module: Linear4bit, how: str) -> None:
    """Take the state off the weight the way wrappers do."""
    if how == "parameter":
        module._parameters["weight"] = nn.Parameter(module.weight.data, requires_grad=False)
    elif how == "tensor":
        data = module.weight.data
        del module.weight
        module.__dict__["weight"] = data
    elif how == "flag":
        module.weight.quant_state = None
    elif how == "foreign":
        weight = nn.Parameter(module.weight.data, requires_grad=False)
        weight.quant_state = module.quant_state
        module._parameters["weight"] = weight
        module.quant_state = None


@pytest.mark.parametrize("how", ["parameter", "tensor", "flag", "foreign"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_lost_state_is_recovered(how, storage):
    module = layer(quant_storage=storage)
    x = torch.randn(3, 96)
    want = module(x)
    state = module.quant_state
    lose(module, how)
    lost = module.weight
    assert torch.equal(module(x), want)
    if how == "tensor":  # FSDP1 knows its views again by their identity
        assert module.weight is lost
        fix_4bit_weight_quant_state_from_module(module)
    assert type(module.weight) is Params4bit
    assert module.weight.quant_state is state
    assert module.weight.quant_storage == storage
    assert module.weight.bnb_quantized
    assert set(module.state_dict()) >= {"weight", "weight.absmax"}


@pytest.mark.parametrize("how", ["parameter", "tensor"])
def test_lost_state_still_saves(how):
    module = layer()
    want = list(module.state_dict())
    lose(module, how)
    if how == "parameter":
        assert list(module.state_dict()) == want


def test_fix_is_public_and_idempotent():
    module = layer()
    weight = module.weight
    fix_4bit_weight_quant_state_from_module(module)
    assert module.weight is weight
    lose(module, "parameter")
    fix_4bit_weight_quant_state_from_module(module)
    assert type(module.weight) is Params4bit


def test_fix_on_an_unquantized_layer():
    with pytest.raises(RuntimeError, match="not quantized yet"):
        fix_4bit_weight_quant_state_from_module(Linear4bit(8, 4))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w[:100],
        lambda w: w.to(torch.float32),
        lambda w: torch.cat([w, w]),
        lambda w: w.to(torch.int16),
    ],
    ids=["sharded", "cast", "doubled", "widened"],
)
def test_fix_refuses_what_is_not_the_packed_weight(spoil):
    module = layer()
    module._parameters["weight"] = nn.Parameter(spoil(module.weight.data), requires_grad=False)
    with pytest.raises(RuntimeError, match="must not be cast, resized or left sharded"):
        module(torch.randn(1, 96))


def test_fix_refuses_bytes_cast_to_a_dtype_of_the_same_size():
    module = layer(quant_storage=torch.bfloat16)
    spoiled = module.weight.data.to(torch.float16)
    module._parameters["weight"] = nn.Parameter(spoiled, requires_grad=False)
    with pytest.raises(RuntimeError, match=r"bfloat16.*now torch\.float16"):
        module(torch.randn(1, 96))


def test_module_follows_a_replaced_weight():
    module = layer()
    new = Params4bit(torch.randn(64, 96), quant_type="fp4", quant_storage=torch.float32).to(DEVICE)
    module.weight = new
    x = torch.randn(2, 96)
    assert_close(module(x), reference(module, x))
    assert module.quant_state is new.quant_state
    lose(module, "parameter")
    assert_close(module(x), reference(module, x))
    assert module.weight.quant_type == "fp4"


def test_module_learns_the_storage_of_a_weight_that_names_it():
    module = layer()
    weight = Params4bit(torch.randn(64, 96), quant_storage=torch.float32, module=module)
    module.weight = weight.to(DEVICE)
    lose(module, "parameter")
    x = torch.randn(2, 96)
    assert_close(module(x), reference(module, x))
    assert module.quant_storage == torch.float32


def test_skip_init():
    module = nn.utils.skip_init(Linear4bit, 96, 64, quant_type="nf4", device=DEVICE)
    assert type(module.weight) is Params4bit
    assert module.weight.device.type == DEVICE.type
    assert not module.weight.bnb_quantized


def test_state_on_another_device_is_brought_to_the_weight():
    module = layer(bias=False)
    x = torch.randn(2, 96)
    want = module(x)
    state = module.quant_state
    absmax = state.absmax
    state.absmax = absmax.to("meta")
    seen = []

    def back(device):
        seen.append(device)
        state.absmax = absmax

    state.to = back
    assert torch.equal(module(x), want)
    module(x)
    assert seen == [DEVICE]


def test_made_by_hand():
    """unsloth builds weights with _make_subclass and sets what it needs."""
    module = layer()
    x = torch.randn(2, 96)
    want = module(x)
    weight = torch.Tensor._make_subclass(Params4bit, module.weight.data)
    weight.quant_state = module.weight.quant_state
    module.weight = weight
    module.quant_state = None
    assert torch.equal(module(x), want)


def test_without_torch_function(monkeypatch):
    monkeypatch.delattr(Params4bit, "__torch_function__")
    module = layer()
    x = torch.randn(2, 96, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert_close(y, reference(module, x))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)


def test_deepcopy_ties_the_copy_to_itself():
    model = nn.Sequential(layer(), layer(64, 8))
    twin = copy.deepcopy(model)
    x = torch.randn(2, 96)
    assert torch.equal(twin(x), model(x))
    for old, new in zip(model, twin, strict=True):
        assert new.weight.module is new
        assert new.weight.quant_state is new.quant_state
        assert new.quant_state is not old.quant_state
        assert new.weight.data_ptr() != old.weight.data_ptr()
    alone = copy.deepcopy(model[0].weight)
    assert alone.module is model[0]


def test_shallow_copy_works():
    module = layer()
    x = torch.randn(2, 96)
    assert torch.equal(copy.copy(module)(x), module(x))


@pytest.mark.parametrize("how", ["pickle", "save"])
def test_pickle_of_a_model(how):
    model = nn.Sequential(layer(quant_storage=torch.bfloat16), nn.ReLU(), layer(64, 8))
    buffer = io.BytesIO()
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 96)
    assert torch.equal(twin(x), model(x))
    assert twin[0].weight.module is twin[0]
    assert twin[0].weight.quant_state is twin[0].quant_state


def test_pickle_of_a_weight_leaves_its_module_out():
    module = layer(512, 512)
    assert pickle.loads(pickle.dumps(module.weight)).module is None


def test_functional_call():
    module = layer()
    x = torch.randn(2, 96)
    want = module(x)
    weight = module.weight
    plain = {k: v.detach() for k, v in module.named_parameters()}
    assert torch.equal(torch.func.functional_call(module, plain, (x,)), want)
    assert module.weight is weight
    bias = torch.zeros(64)
    moved = torch.func.functional_call(module, {"bias": bias}, (x,))
    torch.testing.assert_close(moved, want - module.bias)


def test_data_parallel_replica():
    module = layer()
    x = torch.randn(2, 96)
    replica = module._replicate_for_data_parallel()
    for name, value in module.named_parameters():
        setattr(replica, name, value.detach())
    assert torch.equal(replica(x), module(x))


def test_torch_parametrization_of_the_weight():
    class Same(nn.Module):
        def forward(self, w):
            return w.clone()

    module = layer(bias=False)
    x = torch.randn(2, 96)
    want = module(x)
    nn.utils.parametrize.register_parametrization(module, "weight", Same(), unsafe=True)
    assert torch.equal(module(x), want)
    module.half()
    assert torch.equal(module(x), want)


def test_share_memory():
    model = nn.Sequential(layer())
    x = torch.randn(2, 96)
    want = model(x)
    model.share_memory()
    assert model[0].weight.is_shared()
    assert torch.equal(model(x), want)


def test_tied_weights_stay_tied():
    first, second = Linear4bit(96, 64), Linear4bit(96, 64)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    model.to(DEVICE)
    assert first.weight is second.weight
    x = torch.randn(2, 96)
    second.bias = first.bias
    assert torch.equal(first(x), second(x))


def test_offloading_through_meta():
    """accelerate: the weight rests on meta, its bytes elsewhere, and comes back for a call."""
    module = layer()
    x = torch.randn(2, 96)
    want = module(x)
    rest = module.weight.data.clone()
    kwargs = module.weight.__dict__
    on_meta = module.weight.to("meta")
    module._parameters["weight"] = type(module.weight)(on_meta, requires_grad=False, **kwargs)
    assert module.weight.to("meta").device.type == "meta"
    kwargs = module.weight.__dict__
    module._parameters["weight"] = type(module.weight)(rest, requires_grad=False, **kwargs).to(
        DEVICE
    )
    assert torch.equal(module(x), want)


def test_peft_merge_and_unmerge():
    module = layer()
    delta = torch.randn(64, 96) * 0.1
    for sign in (1, -1):
        weight = module.weight
        kwargs = weight.__dict__
        merged = dequantize_4bit(weight.data, weight.quant_state) + sign * delta
        kwargs["bnb_quantized"] = False
        kwargs["requires_grad"] = False
        kwargs.pop("data", None)
        kwargs = {k: v for k, v in kwargs.items() if not k.startswith("_")}
        module.weight = Params4bit(merged.to(DEVICE), **kwargs).to(weight.device)
        assert module.weight.bnb_quantized
        decoded = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert (decoded - merged).abs().max() < 0.3 * merged.abs().max()
        x = torch.randn(2, 96)
        assert_close(module(x), reference(module, x))


def test_subclasses_with_their_own_device_argument():
    """Lightning's layers."""

    class Quantizing(Linear4bit):
        def __init__(self, *args, device=None, **kwargs):
            super().__init__(*args, device=device, **kwargs)
            self.weight = self.weight.to(DEVICE)
            self.to(DEVICE)

    module = Quantizing(96, 64, quant_type="nf4", device=DEVICE)
    assert module.weight.bnb_quantized
    assert module(torch.randn(1, 96)).shape == (1, 64)


def test_replaced_names_in_the_module_namespace(monkeypatch):
    """unsloth replaces classes in nn.modules; the layer must not have bound them elsewhere."""
    assert hb_nn.modules.Linear4bit is Linear4bit
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: x)
    x = torch.randn(1, 96)
    assert layer()(x) is x


# --- Signatures --------------------------------------------------------------------------------

# name, kind and default of each parameter, as inspect prints upstream 0.50.2's without annotations
SIGNATURES = {
    "Linear4bit": "(input_features, output_features, bias=True, compute_dtype=None, "
    "compress_statistics=True, quant_type='fp4', quant_storage=torch.uint8, device=None)",
    "LinearNF4": "(input_features, output_features, bias=True, compute_dtype=None, "
    "compress_statistics=True, quant_storage=torch.uint8, device=None)",
    "LinearFP4": "(input_features, output_features, bias=True, compute_dtype=None, "
    "compress_statistics=True, quant_storage=torch.uint8, device=None)",
    "Linear8bitLt": "(input_features, output_features, bias=True, has_fp16_weights=True, "
    "threshold=0.0, index=None, device=None)",
    "Embedding4bit": "(num_embeddings, embedding_dim, dtype=None, quant_type='fp4', "
    "quant_storage=torch.uint8, device=None)",
    "EmbeddingNF4": "(num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, "
    "device=None)",
    "EmbeddingFP4": "(num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, "
    "device=None)",
    "Embedding8bit": "(num_embeddings, embedding_dim, device=None, dtype=None)",
    "OutlierAwareLinear": "(input_features, output_features, bias=True, device=None)",
    "StableEmbedding": "(num_embeddings, embedding_dim, padding_idx=None, max_norm=None, "
    "norm_type=2.0, scale_grad_by_freq=False, sparse=False, _weight=None, device=None, dtype=None)",
    "Embedding": "(num_embeddings, embedding_dim, padding_idx=None, max_norm=None, "
    "norm_type=2.0, scale_grad_by_freq=False, sparse=False, _weight=None, device=None)",
    "Params4bit.__new__": "(cls, data=None, requires_grad=False, quant_state=None, blocksize=None, "
    "compress_statistics=True, quant_type='fp4', quant_storage=torch.uint8, module=None, "
    "bnb_quantized=False, **kwargs)",
    "Int8Params.__new__": "(cls, data=None, requires_grad=True, has_fp16_weights=False, CB=None, "
    "SCB=None, **kwargs)",
    "fix_4bit_weight_quant_state_from_module": "(module)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_upstreams(name):
    found = hb_nn.modules
    for part in name.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found)
    bare = signature.replace(
        parameters=[
            p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
        ],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == SIGNATURES[name]


def test_classes_call_the_modules_file_their_home():
    package = hb_nn.__name__
    for name in SIGNATURES:
        head = name.split(".")[0]
        found = getattr(hb_nn, head)
        assert found is getattr(hb_nn.modules, head)
        assert found.__module__ == f"{package}.modules"
        assert found.__qualname__ == head


# --- Clients ask which kind a layer is ----------------------------------------------------------


def test_4_bit_and_8_bit_classes_are_no_kin():
    module = layer()
    assert not isinstance(module, hb_nn.Linear8bitLt)
    assert not isinstance(module.weight, hb_nn.Int8Params)
    assert isinstance(module, hb_nn.Linear4bit)
    assert isinstance(module.weight, hb_nn.Params4bit)
    assert not isinstance(hb_nn.Linear8bitLt(8, 4), Linear4bit)
    assert not isinstance(hb_nn.Linear8bitLt(8, 4).weight, Params4bit)
