"""Linear8bitLt, Int8Params, MatmulLtState and matmul: product, gradients, state dicts, clients.

The numbers of the product are held to their definition, bit for bit.
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
import threading
import warnings
import weakref

import halfbyte
import int8_reference as ref
import pytest
import torch
from halfbyte import nn as hb_nn
from halfbyte.autograd import _functions
from halfbyte.autograd._functions import GlobalOutlierPooler, MatMul8bitFp, MatMul8bitLt
from halfbyte.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from halfbyte.nn import Int8Params, Linear8bitLt, OutlierAwareLinear
from reference import DEVICE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

matmul, MatmulLtState = halfbyte.matmul, halfbyte.MatmulLtState

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEYS = ["weight", "bias", "SCB", "weight_format"]


def float_layer(n_in: int = 96, n_out: int = 64, seed: int = 0, **config) -> Linear8bitLt:
    """A layer that is not quantized yet."""
    torch.manual_seed(seed)
    config.setdefault("has_fp16_weights", False)
    return Linear8bitLt(n_in, n_out, **config)


def layer(*sizes: int, **config) -> Linear8bitLt:
    return float_layer(*sizes, **config).to(DEVICE)


def trainable(*sizes: int, **config) -> Linear8bitLt:
    return layer(*sizes, has_fp16_weights=True, **config)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, outliers=()) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
    for column in outliers:
        x[..., column] *= 20
    return x.to(dtype)


def decoded(module: Linear8bitLt) -> torch.Tensor:
    return int8_vectorwise_dequant(module.weight.data, module.weight.SCB).double()


def definition(module: Linear8bitLt, x: torch.Tensor) -> torch.Tensor:
    """The layer's output by numerics.md, in numpy."""
    flat = ref.array32(x.reshape(-1, x.shape[-1]))
    codes, scb = module.state.CB.numpy(), module.state.SCB.numpy()
    bias = None if module.bias is None else ref.array32(module.bias.to(x.dtype))
    rows = ref.quantize(flat, module.state.threshold)
    y = ref.rounded(ref.linear32(flat, rows, codes, scb, bias), x.dtype)
    return y.reshape(*x.shape[:-1], module.out_features)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same_dict(got: dict, want: dict) -> None:
    assert list(got) == list(want)
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert got[key].shape == value.shape, key
        assert raw(got[key]) == raw(value), key


# --- Construction --------------------------------------------------------------------------------


def test_it_is_a_linear_layer():
    module = Linear8bitLt(96, 64)
    assert isinstance(module, nn.Linear)
    assert type(module.weight) is Int8Params
    assert module.weight.dtype == torch.float32
    assert module.weight.requires_grad
    assert module.weight.has_fp16_weights
    assert module.index is None
    assert list(module._parameters) == ["weight", "bias"]
    assert list(module.buffers()) == []
    state = module.state
    assert (state.threshold, state.has_fp16_weights, state.use_pool) == (0.0, True, False)
    quantized = Linear8bitLt(96, 64, False, False, 6.0, index=5)
    assert quantized.bias is None
    assert quantized.index == 5
    assert not quantized.weight.requires_grad
    state = quantized.state
    assert (state.threshold, state.has_fp16_weights, state.use_pool) == (6.0, False, True)


def test_repr_shows_sizes_and_threshold():
    assert repr(layer(threshold=6.0)) == (
        "Linear8bitLt(in_features=96, out_features=64, bias=True, threshold=6.0, "
        "has_fp16_weights=False)"
    )


def test_no_logging_and_no_warning(caplog):
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in DTYPES:
            layer(threshold=6.0)(inputs(3, 96, dtype=dtype))
            trainable()(inputs(3, 96, dtype=dtype)).sum().backward()
    assert not caplog.records


def test_classes_call_the_public_modules_their_home():
    package = halfbyte.__name__
    for name in ("Int8Params", "Linear8bitLt", "Embedding8bit", "OutlierAwareLinear"):
        cls = getattr(hb_nn, name)
        assert cls is getattr(hb_nn.modules, name)
        assert (cls.__module__, cls.__qualname__) == (f"{package}.nn.modules", name)
    for name in _functions.__all__:
        found = getattr(_functions, name)
        assert found.__module__ == f"{package}.autograd._functions", name


def test_the_drop_in_has_classes_of_its_own(python):
    code = (
        "import bitsandbytes, halfbyte, torch\n"
        "from bitsandbytes.nn import Int8Params, Linear8bitLt\n"
        "assert Int8Params is not halfbyte.nn.Int8Params\n"
        "x = torch.randn(3, 8)\n"
        "m = Linear8bitLt(8, 4, has_fp16_weights=False, threshold=2.0).to('cpu')\n"
        "o = halfbyte.nn.Linear8bitLt(8, 4, has_fp16_weights=False, threshold=2.0)\n"
        "o.load_state_dict(m.state_dict())\n"
        "assert torch.equal(m(x), o(x))\n"
        "print(Linear8bitLt.__module__, Int8Params.__qualname__, bitsandbytes.matmul.__module__,\n"
        "      bitsandbytes.MatmulLtState.__module__, bitsandbytes.modules.__name__)"
    )
    assert python(code).split() == [
        "bitsandbytes.nn.modules",
        "Int8Params",
        "bitsandbytes.autograd._functions",
        "bitsandbytes.autograd._functions",
        "bitsandbytes.nn.modules",
    ]


# --- Forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (5, 96), (2, 3, 96), (2, 1, 3, 96), (1, 1, 96)])
def test_forward_is_the_definition(dtype, threshold, shape):
    module = layer(threshold=threshold)
    x = inputs(*shape, dtype=dtype, outliers=(3, 17))
    for training in (True, False):
        module.train(training)
        got = module(x)
        assert got.dtype == dtype
        assert torch.equal(got, definition(module, x))


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (33, 7), (127, 65), (96, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_ragged_sizes(sizes, bias):
    module = layer(*sizes, bias=bias, threshold=2.0)
    x = inputs(4, sizes[0])
    assert torch.equal(module(x), definition(module, x))


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (0, 3, 96)])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_empty_inputs(shape, threshold):
    for module in (layer(threshold=threshold), trainable(threshold=threshold)):
        x = torch.empty(shape, requires_grad=True)
        y = module(x)
        assert y.shape == (*shape[:-1], 64)
        y.sum().backward()
        assert x.grad.shape == shape
        assert torch.equal(module.bias.grad, torch.zeros(64))
        if module.weight.requires_grad:
            assert not module.weight.grad.any()


def test_strided_inputs():
    module = layer(threshold=2.0)
    x = inputs(96, 10)
    assert torch.equal(module(x.t()), module(x.t().contiguous()))
    wide = inputs(4, 192)
    assert torch.equal(module(wide[:, ::2]), module(wide[:, ::2].contiguous()))
    row = inputs(96).expand(5, 96)
    assert torch.equal(module(row), module(row.contiguous()))


def test_the_input_is_left_alone():
    module, x = layer(threshold=1.0), inputs(5, 96, outliers=(2,))
    before = x.clone()
    module(x)
    assert torch.equal(x, before)


def test_float64_input():
    module, x = layer(threshold=2.0), inputs(3, 96)
    got = module(x.double())
    assert got.dtype == torch.float64
    assert torch.equal(got, module(x).double())
    double = x.double().requires_grad_()
    module(double).sum().backward()
    assert double.grad.dtype == torch.float64


def test_outlier_columns_are_reported():
    module = layer(threshold=6.0)
    assert module.state.idx is None
    x = inputs(5, 96).clamp(-5, 5)
    x[2, 40], x[0, 3], x[1, 3] = 6.0, -60.0, 7.0
    module(x)
    assert module.state.idx.tolist() == [3, 40]
    assert module.state.idx.dtype == torch.int64
    module(x.clamp(-5, 5))
    assert module.state.idx.tolist() == []
    module(x.requires_grad_())
    assert module.state.idx.tolist() == [3, 40]


def test_a_threshold_saves_the_small_values():
    """What LLM.int8() is for: one huge column must not cost the others their precision."""
    module = layer(threshold=6.0)
    plain = copy.deepcopy(module)
    plain.state.threshold = 0.0
    x = inputs(32, 96)
    x[:, 5] = 500
    exact = nn.functional.linear(x.double(), decoded(module), module.bias.double())
    error = (module(x) - exact).norm() / exact.norm()
    assert error < 1e-3
    assert (plain(x) - exact).norm() / exact.norm() > 10 * error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_the_bias_keeps_its_own_dtype(dtype, bias_dtype):
    module = layer()
    module.bias.data = module.bias.data.to(bias_dtype)
    before = raw(module.bias)
    x = inputs(3, 96, dtype=dtype)
    assert torch.equal(module(x), definition(module, x))
    assert module.bias.dtype == bias_dtype
    assert raw(module.bias) == before
    module(x).sum().backward()
    assert module.bias.grad.dtype == bias_dtype
    assert torch.equal(module.bias.grad, torch.full((64,), 3, dtype=bias_dtype))


def test_autocast_keeps_the_input_dtype():
    module = trainable()
    x = inputs(3, 96)
    want = module(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = module(x)
        got.square().sum().backward()
    assert torch.equal(got, want)
    plain = trainable()
    plain(x).square().sum().backward()
    assert torch.equal(module.weight.grad, plain.weight.grad)


def test_not_quantized():
    with pytest.raises(
        RuntimeError,
        match=r"Linear8bitLt is not quantized yet: its weight is torch\.float32 of shape "
        rf"\[64, 96\] on {DEVICE}\. Move the layer",
    ):
        float_layer()(inputs(1, 96))


def test_scales_lost():
    module = layer()
    module._parameters["weight"] = nn.Parameter(module.weight.data, requires_grad=False)
    module.state.reset_grads()
    with pytest.raises(RuntimeError, match=r"but not their scales: weight\.SCB is None"):
        module(inputs(1, 96))


@pytest.mark.parametrize("shape", [(97,), (3, 64), (), (0,)])
def test_wrong_features(shape):
    with pytest.raises(RuntimeError, match=r"takes inputs of shape \[\.\.\., 96\], got \["):
        layer()(torch.zeros(shape))


def test_integer_input():
    with pytest.raises(TypeError, match=r"floating-point input, got torch\.int64"):
        layer()(torch.zeros(3, 96, dtype=torch.int64))


def test_wrong_bias():
    module = layer()
    module.bias = nn.Parameter(torch.zeros(63))
    with pytest.raises(ValueError, match=r"bias must have shape \[64\], got \[63\]"):
        module(inputs(2, 96))


# --- Gradients -----------------------------------------------------------------------------------

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_near(got: torch.Tensor, want: torch.Tensor, slack: float = 1.0) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
    assert error <= slack * TOLERANCE[got.dtype], f"off by {error} of the largest value"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96)])
def test_gradients_of_a_quantized_layer(dtype, threshold, shape):
    module = layer(threshold=threshold)
    x = inputs(*shape, dtype=dtype).requires_grad_()
    grad = inputs(*shape[:-1], 64, dtype=dtype)
    module(x).backward(grad)
    assert x.grad.dtype == dtype
    assert_near(x.grad, grad.double() @ decoded(module))
    want = grad.double().reshape(-1, 64).sum(0)
    assert (module.bias.grad - want).abs().max() <= 1e-2 * want.abs().max()
    assert module.weight.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96)])
def test_gradients_of_a_float_weight(dtype, weight, threshold, shape):
    module = trainable(threshold=threshold).to(weight)
    x = inputs(*shape, dtype=dtype).requires_grad_()
    grad = inputs(*shape[:-1], 64, dtype=dtype)
    module(x).backward(grad)
    codes, scb = module.state.CB, module.state.SCB
    assert_near(x.grad, grad.double() @ int8_vectorwise_dequant(codes, scb).double())
    assert module.weight.grad.dtype == weight
    rows = grad.double().reshape(-1, 64), x.detach().double().reshape(-1, 96)
    assert_near(module.weight.grad, rows[0].t() @ rows[1])
    assert module.bias.grad.dtype == weight
    assert_near(module.bias.grad, rows[0].sum(0))


def test_only_what_needs_a_gradient_gets_one():
    module = layer().requires_grad_(False)
    assert not module(inputs(3, 96)).requires_grad
    module = trainable()
    module.bias.requires_grad_(False)
    module(inputs(3, 96)).sum().backward()
    assert module.bias.grad is None
    assert module.weight.grad is not None
    with torch.no_grad():
        assert not module(inputs(3, 96)).requires_grad


def test_expanded_gradient():
    module, x = layer(), inputs(3, 96).requires_grad_()
    module(x).sum().backward()
    assert_near(x.grad, torch.ones(3, 64).double() @ decoded(module))


def test_two_products_before_one_backward():
    """Each keeps the weight it was made with: the state has room for one only."""
    module = trainable()
    x = inputs(3, 96).requires_grad_()
    first = module(x)
    codes, scb = module.state.CB, module.state.SCB
    with torch.no_grad():
        module.weight.mul_(torch.linspace(1, 2, 96))
    second = module(x)
    assert not torch.equal(module.state.CB, codes)
    (grad,) = torch.autograd.grad(first.sum(), x)
    assert_near(grad, torch.ones(3, 64).double() @ int8_vectorwise_dequant(codes, scb).double())
    (grad,) = torch.autograd.grad(second.sum(), x)
    now = int8_vectorwise_dequant(module.state.CB, module.state.SCB).double()
    assert_near(grad, torch.ones(3, 64).double() @ now)


def test_double_backward():
    module, x = layer(), inputs(3, 96).requires_grad_()
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    w = decoded(module)
    assert_near(second, 2 * torch.ones(3, 96).double() @ w.t() @ w, slack=4)


def test_forward_mode():
    module = trainable()
    x, dx = inputs(3, 96), inputs(3, 96).flip(0)
    with forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, dx)))
    w = int8_vectorwise_dequant(module.state.CB, module.state.SCB).double()
    assert_near(tangent, dx.double() @ w.t())


def test_functional_gradients():
    module, x = trainable(threshold=2.0), inputs(3, 96)
    module(x).square().sum().backward()

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    grads = torch.func.grad(loss)(parameters)
    torch.testing.assert_close(grads["weight"], module.weight.grad)
    torch.testing.assert_close(grads["bias"], module.bias.grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [layer, trainable])
def test_gradient_checkpointing(make, reentrant):
    module = make(threshold=2.0)
    x = inputs(3, 96).requires_grad_()
    module(x).square().sum().backward()
    want = x.grad.clone(), module.bias.grad.clone()
    x.grad = module.bias.grad = None
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, want[0])
    assert torch.equal(module.bias.grad, want[1])


def test_inference_mode_and_then_training():
    with torch.inference_mode():
        module = layer(threshold=2.0)
        want = module(inputs(3, 96))
    x = inputs(3, 96).requires_grad_()
    got = module(x)
    assert torch.equal(got, want)
    got.sum().backward()
    assert_near(x.grad, torch.ones(3, 64).double() @ decoded(module))
    floating = trainable().eval()
    with torch.inference_mode():
        floating(inputs(3, 96))
        floating.weight.mul_(3)
        assert torch.equal(floating(inputs(3, 96)), definition(floating, inputs(3, 96)))


# --- Training with float weights: never a stale quantized copy -----------------------------------

CHANGES = {
    "in place": lambda w: w.mul_(torch.linspace(1, 3, w.shape[1])),
    "copy": lambda w: w.copy_(w.flip(1)),
    "optimizer": lambda w: torch.optim.SGD([w], lr=0.5).step(),
    "own optimizer": lambda w: halfbyte.optim.AdamW([w], lr=0.5).step(),
    "data": lambda w: setattr(w, "data", w.data.flip(1).contiguous()),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_a_changed_weight_is_quantized_again(how, training):
    module = trainable().train(training)
    x = inputs(3, 96)
    before = module(x).detach()
    module(x).square().sum().backward()
    with torch.no_grad():
        CHANGES[how](module.weight)
    after = module(x)
    assert not torch.equal(after, before)
    fresh = int8_vectorwise_quant(module.weight.detach())
    assert torch.equal(module.state.CB, fresh[0])
    assert torch.equal(module.state.SCB, fresh[1])
    assert torch.equal(after, definition(module, x))


def test_writes_through_data_while_training():
    """Hand-made optimizers; gradients that are zeroed in place stay there."""
    module, x = trainable(), inputs(3, 96)
    module(x).sum().backward()
    module.weight.grad.zero_()
    module.weight.data.mul_(torch.linspace(1, 3, 96))
    assert torch.equal(module(x), definition(module, x))
    assert torch.equal(module.state.CB, int8_vectorwise_quant(module.weight.detach())[0])
    module.eval()
    module.weight.data.neg_()
    module.state.reset_grads()
    assert torch.equal(module(x), definition(module, x))
    assert torch.equal(module.state.CB, int8_vectorwise_quant(module.weight.detach())[0])


# Neither of these counts as a write.
TRACELESS = {
    "data": lambda w: w.data.mul_(torch.linspace(1, 3, w.shape[1])),
    **{
        name: lambda w, name=name: getattr(torch.optim, name)([w], lr=0.5, fused=True).step()
        for name in ("AdamW", "Adam", "SGD", "Adagrad")
    },
}


@pytest.mark.parametrize("how", TRACELESS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_codes_of_a_recorded_forward_are_not_used_again(how, training, grad):
    """Whatever mode trained, the first evaluation after a step sees it."""
    module, x = trainable().train(training), inputs(3, 96)
    module(x).square().sum().backward()
    version = module.weight._version
    TRACELESS[how](module.weight)
    assert module.weight._version == version
    module.eval()
    with torch.set_grad_enabled(grad):
        got = module(x)
    assert torch.equal(got.detach(), definition(module, x).detach())
    assert torch.equal(module.state.CB, int8_vectorwise_quant(module.weight.detach())[0])


def test_evaluation_between_steps_of_a_fused_optimizer():
    module, x = trainable(), inputs(3, 96)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        module.train()(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(module.eval()(x), definition(module, x))


def test_other_tensors_in_the_same_memory():
    """An address and a count of writes recur when memory is used again."""
    state, x = MatmulLtState(), inputs(3, 64)
    state.is_training = False
    addresses = set()
    for seed in range(20):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        addresses.add(weight.data_ptr())
        got = matmul(x, weight, state=state)
        assert torch.equal(got, matmul(x, weight))
        del weight
    assert len(addresses) < 20


@pytest.mark.parametrize("freed", [True, False])
def test_other_data_at_the_same_address(freed):
    """FSDP and offloaders free a weight's data and put other data in their place."""
    module, x = trainable(64, 64, bias=False).eval().requires_grad_(False), inputs(3, 64)
    for seed in range(20):
        if freed:
            module.weight.data = torch.empty(0)
        module.weight.data = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(module(x), matmul(x, module.weight.detach().clone()))
    square = module.weight.data
    module.weight.data = square.t()
    assert torch.equal(module(x), matmul(x, square.t().contiguous()))


def test_a_state_keeps_no_weight_alive():
    state = MatmulLtState()
    state.is_training = False
    weight = torch.randn(64, 64)
    matmul(inputs(3, 64), weight, state=state)
    gone = weakref.ref(weight)
    del weight
    assert gone() is None
    again = [copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
    for other in again:
        weight = torch.randn(64, 64)
        want = matmul(inputs(3, 64), weight)
        assert torch.equal(matmul(inputs(3, 64), weight, state=other), want)


@pytest.mark.parametrize("grad", [False, None])
def test_an_unchanged_weight_is_quantized_once_in_eval_mode(grad):
    module = trainable().eval()
    if grad is None:
        module.requires_grad_(False)
    x = inputs(3, 96)
    with torch.set_grad_enabled(grad is None):
        module(x)
        codes = module.state.CB
        module(x)
        assert module.state.CB is codes


@pytest.mark.parametrize("make", [layer, trainable])
def test_fake_tensors_over_a_real_layer(make):
    module, x = make(threshold=2.0), inputs(3, 96)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = module(mode.from_tensor(x))
    assert y.shape == (3, 64)
    assert module.state.idx is None


@pytest.mark.parametrize("make", [layer, trainable])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_functorch(make, threshold):
    """Each sample of a batched dimension is a call of its own: its outlier columns, too."""
    module = make(threshold=threshold)
    x = inputs(4, 3, 96)
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.is_floating_point()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", message="`torch.jit.script", category=FutureWarning)
        got = torch.func.vmap(module)(x)
        samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        back = torch.func.jacrev(module)(x[0, 0])
        ahead = torch.func.jacfwd(module)(x[0, 0])
        _, tangent = torch.func.jvp(module, (x[0, 0],), (x[0, 1],))
    assert torch.equal(got, torch.stack([module(sample) for sample in x]))
    for i, sample in enumerate(x):
        one = torch.func.grad(loss)(parameters, sample)
        assert samples.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(samples[name][i], one[name])
    torch.testing.assert_close(back, ahead)
    torch.testing.assert_close(tangent, ahead @ x[0, 1], rtol=1e-4, atol=1e-4)


def test_a_model_trains():
    torch.manual_seed(0)
    model = nn.Sequential(
        Linear8bitLt(32, 64, threshold=4.0), nn.ReLU(), Linear8bitLt(64, 4, threshold=4.0)
    ).to(DEVICE)
    x, goal = torch.randn(64, 32), torch.randn(64, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), goal)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_lora_trains_and_leaves_the_base_alone():
    base = layer(threshold=2.0).requires_grad_(False)
    before = raw(base.weight), raw(base.weight.SCB)
    down, up = nn.Linear(96, 4, bias=False), nn.Linear(4, 64, bias=False)
    x = inputs(8, 96)
    (base(x) + up(down(x))).square().sum().backward()
    assert down.weight.grad.abs().max() > 0
    assert (raw(base.weight), raw(base.weight.SCB)) == before


# --- matmul and its state ------------------------------------------------------------------------


def test_state_fields_and_defaults():
    state = MatmulLtState()
    for name in ("CB", "SB", "SCB", "SBt", "CBt", "subB", "outlier_pool", "idx"):
        assert getattr(state, name) is None, name
    assert state.force_no_igemmlt is False
    assert state.has_accumulated_gradients is False
    assert state.threshold == 0.0
    assert state.is_training is True
    assert state.has_fp16_weights is True
    assert state.use_pool is False
    assert str(inspect.signature(MatmulLtState)).startswith(
        "(force_no_igemmlt: 'bool' = False, CB: 'Tensor | None' = None, "
    )
    assert list(inspect.signature(MatmulLtState).parameters) == [
        "force_no_igemmlt",
        "CB",
        "SB",
        "SCB",
        "SBt",
        "CBt",
        "subB",
        "outlier_pool",
        "idx",
    ]
    assert repr(state).startswith("MatmulLtState(force_no_igemmlt=False, CB=None, SB=None, ")
    assert "idx=None)" in repr(state)


@pytest.mark.parametrize("name", ["CxB", "CxBt", "formatB", "_tile_indices"])
def test_deprecated_fields_are_none(name):
    with pytest.warns(FutureWarning, match=f"MatmulLtState.{name} is deprecated"):
        assert getattr(MatmulLtState(), name) is None


def test_unknown_fields_are_errors():
    with pytest.raises(AttributeError, match="has no attribute 'CBx'"):
        _ = MatmulLtState().CBx


def test_reset_grads():
    tensor = torch.zeros(2)
    state = MatmulLtState(CB=tensor, SB=tensor, SCB=tensor, SBt=tensor, CBt=tensor, idx=tensor)
    state.threshold = 3.0
    state.reset_grads()
    for name in ("CB", "SB", "SCB", "SBt", "CBt"):
        assert getattr(state, name) is None, name
    assert state.idx is tensor
    assert state.threshold == 3.0


@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_as_vllm_calls_it(has_fp16_weights):
    module, x = layer(threshold=2.0), inputs(2, 5, 96, outliers=(4,))
    want = layer(threshold=2.0, bias=False)(x)
    weight = Int8Params(
        data=module.weight.data,
        requires_grad=False,
        has_fp16_weights=has_fp16_weights,
        output_dim=0,
        quant_states={},
    )
    state = MatmulLtState()
    state.CB = weight[0:64]
    state.SCB = module.weight.SCB.to(DEVICE)
    state.threshold = 2.0
    state.has_fp16_weights = has_fp16_weights
    state.is_training = False
    state.use_pool = True
    assert torch.equal(matmul(x, weight[0:64], state=state), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert state.CxB is None
    del state.CB
    assert state.CB is None
    assert torch.equal(matmul(x, weight[0:64], state=state), want)  # from the weight and state.SCB


def test_matmul_of_a_float_weight_without_a_state():
    w, x = inputs(64, 96), inputs(3, 96)
    got = matmul(x, w)
    state = MatmulLtState()
    assert torch.equal(got, matmul(x, w, state=state))
    codes, scb, _ = int8_vectorwise_quant(w)
    assert torch.equal(state.CB, codes)
    assert torch.equal(state.SCB, scb)
    assert torch.equal(matmul(x, w.t().contiguous().t()), got)
    assert torch.equal(matmul(x, w.double()), got)


def test_matmul_threshold_replaces_the_states():
    module, x = layer(threshold=0.0, bias=False), inputs(3, 96)
    state = copy.copy(module.state)
    got = matmul(x, module.weight, state=state, threshold=1.0)
    assert state.threshold == 1.0
    module.state.threshold = 1.0
    assert torch.equal(got, module(x))
    assert torch.equal(state.idx, module.state.idx)


def test_matmul_quantizes_once_for_a_state_without_float_weights():
    w, x, state = inputs(64, 96), inputs(3, 96), MatmulLtState()
    state.has_fp16_weights = False
    matmul(x, w, state=state)
    codes = state.CB
    matmul(x, w, state=state)
    assert state.CB is codes
    w.mul_(torch.linspace(1, 2, 96))
    matmul(x, w, state=state)
    assert torch.equal(state.CB, int8_vectorwise_quant(w)[0])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_matmul_honours_out(grad, dtype):
    module = layer(threshold=2.0)
    x = inputs(2, 3, 96, dtype=dtype)
    want = module(x)
    x.requires_grad_(grad)
    out = torch.full((2, 3, 64), 7.0, dtype=dtype)
    got = matmul(x, module.weight, out=out, bias=module.bias, state=module.state)
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(got, want)
    got.sum().backward()
    assert module.bias.grad is not None
    assert (x.grad is not None) == grad


@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 63), (2, 3, 64, 1)])
def test_matmul_refuses_an_out_that_does_not_fit(shape):
    module = layer()
    with pytest.raises(ValueError, match=r"out must be torch\.float32 of shape \[2, 3, 64\]"):
        matmul(inputs(2, 3, 96), module.weight, out=torch.empty(shape), state=module.state)


def test_matmul_errors():
    w = inputs(64, 96)
    with pytest.raises(TypeError, match=r"A must be a floating-point tensor, got torch\.int32"):
        matmul(torch.zeros(3, 96, dtype=torch.int32), w)
    with pytest.raises(TypeError, match="A must be a floating-point tensor, got str"):
        matmul("x", w)
    with pytest.raises(ValueError, match="A must have at least one dimension"):
        matmul(torch.tensor(1.0), w)
    with pytest.raises(ValueError, match=r"its scales are\s+missing"):
        matmul(inputs(3, 96), torch.zeros(64, 96, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"\[out_features, in_features\], got \[96\]"):
        matmul(inputs(3, 96), inputs(96))
    with pytest.raises(ValueError, match=r"last dimension of A must be 96, got A of shape"):
        matmul(inputs(3, 95), w)


@pytest.mark.parametrize("cls", [MatMul8bitLt, MatMul8bitFp])
def test_autograd_functions(cls):
    module = trainable(threshold=2.0)
    x = inputs(3, 96).requires_grad_()
    out = torch.empty(3, 64)
    got = cls.apply(x, module.weight, out, module.bias, module.state)
    assert got.data_ptr() == out.data_ptr()
    w = int8_vectorwise_dequant(module.state.CB, module.state.SCB).double()
    exact = nn.functional.linear(x.detach().double(), w, module.bias.detach().double())
    if cls is MatMul8bitFp:
        assert_near(got, exact)
    else:
        assert torch.equal(got, module(x))
    assert torch.equal(cls.apply(x, module.weight, None, module.bias, module.state), got)
    got.sum().backward()
    assert_near(x.grad, torch.ones(3, 64).double() @ w)
    assert_near(module.weight.grad, torch.ones(64, 3).double() @ x.detach().double())


def test_the_pooler():
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOutlierPooler()
    pooler = GlobalOutlierPooler.get_instance()
    assert pooler is GlobalOutlierPooler.get_instance()
    pooler.initialize()
    pooler.add_outliers(torch.tensor([5, 2]), 96)
    pooler.add_outliers(torch.tensor([9]), 384)  # another width: not pooled
    pooler.add_outliers(torch.tensor([2, 7]), 96)
    assert pooler.get_current_outlier_idx().tolist() == [2, 5, 7]
    assert pooler.get_current_outlier_idx().dtype == torch.int64
    pooler.initialize()
    assert pooler.get_current_outlier_idx().tolist() == []
    assert pooler.model_dim is None


def test_threads_share_a_layer():
    for module in (layer(threshold=2.0), trainable(threshold=2.0).eval()):
        xs = [inputs(i + 1, 96) for i in range(4)]
        want = [module(x).detach() for x in xs]
        if module.weight.requires_grad:
            module.state.reset_grads()
        failures: list[int] = []

        def work(i: int, module=module, xs=xs, want=want, failures=failures) -> None:
            for _ in range(50):
                if not torch.equal(module(xs[i]), want[i]):
                    failures.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


# --- torch.compile and torch.export --------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_dynamo(request):
    yield
    if "compile" in request.node.name or "export" in request.node.name:
        torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("make", [layer, trainable])
def test_compile_training(make, threshold, backend):
    module = make(threshold=threshold)
    x = inputs(5, 96).requires_grad_()
    module(x).square().sum().backward()
    want = [None if t.grad is None else t.grad.clone() for t in (x, *module.parameters())]
    for tensor in (x, *module.parameters()):
        tensor.grad = None
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    compiled(x).square().sum().backward()
    for tensor, grad in zip((x, *module.parameters()), want, strict=True):
        assert (tensor.grad is None) == (grad is None)
        if grad is not None:
            torch.testing.assert_close(tensor.grad, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [layer, trainable])
def test_compile_eval(make, dtype):
    module = make(threshold=2.0).eval().requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (5, 1, 7):
        x = inputs(rows, 96, dtype=dtype)
        assert torch.equal(compiled(x), module(x))


def test_compile_sees_a_trained_weight():
    module = trainable()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = inputs(3, 96)
    assert torch.equal(compiled(x), module(x))
    with torch.no_grad():
        module.weight.mul_(torch.linspace(1, 3, 96))
    assert torch.equal(compiled(x), module(x))


def test_compile_a_state_dict_that_is_loaded_afterwards():
    module, other = layer(threshold=2.0), layer(seed=1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = inputs(3, 96)
    compiled(x)
    module.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), module(x))


def test_compile_a_whole_model():
    model = nn.Sequential(layer(threshold=2.0), nn.GELU(), layer(64, 32), nn.LayerNorm(32)).eval()
    x = inputs(5, 96)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, model(x))


def test_compile_matmul():
    module = layer(threshold=2.0)

    def product(x, w):
        return matmul(x, w) + matmul(x, module.weight, state=module.state, bias=module.bias)

    w, x = inputs(64, 96).requires_grad_(), inputs(3, 96)
    got = torch.compile(product, fullgraph=True, backend="aot_eager")(x, w)
    assert torch.equal(got, product(x, w))
    (grad,) = torch.autograd.grad(got.sum(), w)
    assert_near(grad, torch.ones(64, 3).double() @ x.double())


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    module = layer(threshold=2.0).eval()
    x = inputs(4, 96)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},), strict=strict)
    assert torch.equal(program.module()(x), module(x))
    longer = inputs(9, 96)
    assert torch.equal(program.module()(longer), module(longer))
    assert any("int8_linear" in str(node.target) for node in program.graph.nodes)


def test_meta_device_runs_shapes():
    module = layer(threshold=2.0).to("meta")
    assert module(torch.empty(2, 5, 96, device="meta")).shape == (2, 5, 64)


# --- Int8Params ----------------------------------------------------------------------------------


def test_parameter_before_quantization():
    data = inputs(64, 96)
    p = Int8Params(data)
    assert type(p) is Int8Params
    assert isinstance(p, nn.Parameter)
    assert p.requires_grad
    assert p.data_ptr() == data.data_ptr()
    assert (p.CB, p.SCB, p.has_fp16_weights) == (None, None, False)
    assert Int8Params().shape == (0,)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "move",
    [
        lambda p: p.to(DEVICE),
        lambda p: p.cpu(),
        lambda p: p.to(DEVICE, torch.float16),
        lambda p: p.to(torch.empty(0)),
    ],
)
def test_first_move_quantizes_in_place(dtype, move):
    data = inputs(64, 96).to(dtype)
    p = Int8Params(data)
    assert move(p) is p
    want = int8_vectorwise_quant(data.float() if dtype == torch.float64 else data)
    assert p.dtype == torch.int8
    assert torch.equal(p.data, want[0].to(p.device))
    assert torch.equal(p.SCB, want[1].to(p.device))
    assert p.CB.data_ptr() == p.data_ptr()
    assert type(p.CB) is torch.Tensor
    assert not p.requires_grad


def test_has_fp16_weights_stay_float():
    p = Int8Params(inputs(64, 96), has_fp16_weights=True)
    assert p.to(DEVICE) is p
    assert p.dtype == torch.float32
    half = p.to(DEVICE, torch.float16)
    assert type(half) is Int8Params
    assert half.has_fp16_weights
    assert half.requires_grad
    assert half.dtype == torch.float16


def test_dtype_alone_and_meta_do_not_quantize():
    p = Int8Params(inputs(64, 96), requires_grad=False)
    half = p.to(torch.float16)
    assert type(half) is Int8Params
    assert half.dtype == torch.float16
    meta = p.to("meta")
    assert type(meta) is Int8Params
    assert (meta.device.type, meta.dtype) == ("meta", torch.float32)
    copied = p.to(DEVICE, copy=True)
    assert copied is not p
    assert (copied.dtype, p.dtype) == (torch.int8, torch.float32)


def test_moves_of_codes():
    p = Int8Params(inputs(64, 96)).to(DEVICE)
    assert p.to(DEVICE) is p
    assert p.to(torch.float16) is p
    assert p.to(DEVICE, torch.bfloat16) is p
    meta = p.to("meta")
    assert (meta.dtype, meta.device.type) == (torch.int8, "meta")
    assert meta.SCB.device.type == "meta"
    assert meta.CB.device.type == "meta"
    assert p.SCB.device.type == DEVICE.type
    copied = p.to(DEVICE, copy=True)
    copied.SCB.zero_()
    copied.data.zero_()
    assert p.SCB.all()
    assert p.data.any()


def test_every_attribute_is_a_constructor_keyword():
    old = Int8Params(inputs(64, 96)).to(DEVICE)
    old._is_hf_initialized = True
    assert set(old.__dict__) == {"CB", "SCB", "has_fp16_weights", "_is_hf_initialized"}
    same = Int8Params(old.data, requires_grad=False, **old.__dict__)
    assert torch.equal(same.SCB, old.SCB)
    assert same.CB.data_ptr() == old.data_ptr()
    moved = same.to(same.device)
    assert torch.equal(moved.SCB, old.SCB)
    new = inputs(64, 96).flip(0)  # a merged weight with the attributes of the old one
    again = Int8Params(new, requires_grad=False, **old.__dict__).to(DEVICE)
    assert torch.equal(again.data, int8_vectorwise_quant(new)[0])
    assert torch.equal(again.SCB, int8_vectorwise_quant(new)[1])


def test_codes_cannot_require_a_gradient():
    codes, scb, _ = int8_vectorwise_quant(inputs(64, 96))
    p = Int8Params(codes, SCB=scb)  # requires_grad is True by default
    assert not p.requires_grad
    assert torch.equal(p.SCB, scb)
    p = Int8Params(CB=codes, SCB=scb, has_fp16_weights=False, requires_grad=False)
    assert torch.equal(p.data, codes)


def test_made_by_hand():
    p = torch.Tensor._make_subclass(Int8Params, inputs(64, 96), False)
    assert (p.CB, p.SCB, p.has_fp16_weights) == (None, None, False)
    assert p.to(DEVICE).SCB.shape == (64,)


def test_refused_weights():
    with pytest.raises(TypeError, match=r"must be floating-point, got torch\.int32"):
        Int8Params(torch.zeros(3, 4, dtype=torch.int32), requires_grad=False).to(DEVICE)
    with pytest.raises(ValueError, match=r"must have shape \[out_features, in_features\], got \[4"):
        Int8Params(torch.zeros(4)).to(DEVICE)
    with pytest.raises(NotImplementedError, match="meta"):
        Int8Params(torch.empty(3, 4, device="meta"), requires_grad=False).to(DEVICE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_torchs_error():
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        Int8Params(inputs(3, 4)).cuda()
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        Int8Params(inputs(3, 4)).cuda(0)


def pickled(p):
    return pickle.loads(pickle.dumps(p))


def saved(p):
    file = io.BytesIO()
    torch.save(p, file)
    file.seek(0)
    return torch.load(file)  # weights_only


@pytest.mark.parametrize("trip", [copy.copy, copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("quantized", [False, True])
def test_copies_keep_class_and_scales(trip, quantized):
    p = Int8Params(inputs(64, 96), has_fp16_weights=not quantized).to(DEVICE)
    p.mine = [1, 2]
    other = trip(p)
    assert type(other) is Int8Params
    assert torch.equal(other.data, p.data)
    assert other.requires_grad == p.requires_grad
    assert other.has_fp16_weights == p.has_fp16_weights
    assert other.mine == [1, 2]
    if quantized:
        assert torch.equal(other.SCB, p.SCB)
        assert other.CB.data_ptr() == other.data_ptr()
    else:
        assert (other.CB, other.SCB) == (None, None)
    if trip is not copy.copy:
        before = p.data.clone()
        other.data.zero_()
        if quantized:
            other.SCB.zero_()
            assert p.SCB.all()
        assert torch.equal(p.data, before)


def test_pickle_saves_the_codes_once():
    p = Int8Params(torch.randn(256, 256)).to(DEVICE)
    module = layer(256, 256)
    module(inputs(1, 256))
    for thing in (p, module):
        size = len(pickle.dumps(thing))
        assert 65536 < size < 65536 + 8192


def test_views_are_plain_tensors():
    p = Int8Params(inputs(64, 96)).to(DEVICE)
    for pieces in (torch.chunk(p, 4), p.split(16), (p[0:16], p.t(), p.float(), p.detach())):
        assert all(type(piece) is torch.Tensor for piece in pieces)


def test_scales_in_place():
    """What RWKV does to rescale its layers."""
    module, x = layer(bias=False), inputs(3, 96)
    want = module(x)
    module.weight.SCB.div_(4)
    assert torch.equal(module(x), want / 4)


# --- Moves of layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)]
)
def test_casts_leave_codes_and_scales_alone(cast):
    module = layer()
    before = raw(module.weight), raw(module.weight.SCB)
    parameter = module.weight
    cast(module)
    assert module.weight is parameter
    assert (raw(module.weight), raw(module.weight.SCB)) == before
    assert module.weight.SCB.dtype == torch.float32
    assert module.bias.dtype in (torch.float16, torch.bfloat16, torch.float64)
    module.type(torch.float32)
    assert module.weight.dtype == torch.int8
    assert raw(module.weight) == before[0]


def test_casts_convert_float_weights_and_their_gradients():
    module = trainable()
    module(inputs(3, 96)).sum().backward()
    parameter = module.weight
    module.bfloat16()
    assert module.weight is parameter
    assert (module.weight.dtype, module.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert module(inputs(3, 96)).shape == (3, 64)


def test_parameter_object_survives_quantization_and_moves_of_models():
    model = nn.Sequential(float_layer(), float_layer(64, 8))
    parameters = list(model.parameters())
    model.cpu()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model[0].state.SCB is model[0].weight.SCB
    assert model[0].state.CB.dtype == torch.int8


def test_swap_tensors_on_conversion():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = float_layer().to(DEVICE).half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert type(module.weight) is Int8Params
    assert module.weight.dtype == torch.int8
    assert module(inputs(1, 96)).shape == (1, 64)


def test_to_meta_to_empty_and_loaded():
    module = layer(threshold=2.0)
    x = inputs(3, 96)
    want, saved = module(x), copy.deepcopy(module.state_dict())
    module.to("meta")
    assert module.weight.SCB.device.type == "meta"
    assert module.state.CB.device.type == "meta"
    with pytest.raises(NotImplementedError, match="meta"):
        module.to(DEVICE)
    module.to_empty(device=DEVICE)
    assert type(module.weight) is Int8Params
    module.load_state_dict(saved)
    assert torch.equal(module(x), want)


def test_skip_init():
    module = nn.utils.skip_init(Linear8bitLt, 96, 64, has_fp16_weights=False)
    assert type(module.weight) is Int8Params
    nn.init.ones_(module.weight)
    nn.init.zeros_(module.bias)
    assert module.to(DEVICE)(torch.ones(1, 96)).tolist() == [[96.0] * 64]


def test_share_memory():
    module = layer()
    module.share_memory()
    assert module.weight.is_shared()
    assert module.weight.SCB.is_shared()
    assert type(module.weight) is Int8Params


def test_tied_weights_stay_tied():
    model = nn.ModuleList([float_layer(), float_layer()])
    model[1].weight = model[0].weight
    model.to(DEVICE)
    assert model[1].weight is model[0].weight
    x = inputs(3, 96)
    model[1].bias = model[0].bias
    assert torch.equal(model[0](x), model[1](x))


@pytest.mark.parametrize("how", ["parameter", "tensor", "attribute"])
def test_scales_that_wrappers_lose_are_recovered(how):
    module, x = layer(threshold=2.0), inputs(3, 96)
    want, saved = module(x), copy.deepcopy(module.state_dict())
    if how == "parameter":
        module._parameters["weight"] = nn.Parameter(module.weight.data, requires_grad=False)
    elif how == "tensor":
        data = module.weight.data
        del module.weight
        module.__dict__["weight"] = data
    else:
        module.weight.SCB = None
    assert torch.equal(module(x), want)
    if how != "tensor":
        assert_same_dict(module.state_dict(), saved)
        again = copy.deepcopy(module)
        assert torch.equal(again(x), want)
        module.to(DEVICE)
        assert torch.equal(module(x), want)


def test_functional_call():
    module, other, x = layer(threshold=2.0), layer(seed=1), inputs(3, 96)
    parameters = {"weight": other.weight, "bias": other.bias}
    got = torch.func.functional_call(module, parameters, (x,))
    other.state.threshold = 2.0
    assert torch.equal(got, other(x))


def test_a_replaced_weight_is_the_one_that_counts():
    module, other, x = layer(), layer(seed=1), inputs(3, 96)
    module(x)
    other.bias = module.bias
    module.weight = other.weight
    assert module.state.SCB is other.weight.SCB
    assert torch.equal(module(x), other(x))


def test_deepcopy_of_a_layer_is_independent():
    module, x = layer(threshold=2.0), inputs(3, 96)
    want = module(x)
    other = copy.deepcopy(module)
    assert other.state is not module.state
    assert other.state.threshold == 2.0
    assert other.state.CB.data_ptr() == other.weight.data_ptr()
    other.weight.data.zero_()
    assert torch.equal(module(x), want)
    assert not torch.equal(other(x), want)


@pytest.mark.parametrize("make", [layer, trainable, float_layer])
def test_pickle_of_a_layer(make):
    module, x = make(threshold=2.0), inputs(3, 96)
    other = pickled(module)
    assert type(other.weight) is Int8Params
    if make is float_layer:
        module, other = module.to(DEVICE), other.to(DEVICE)
    assert torch.equal(other(x), module(x))
    assert other.state.threshold == 2.0
    if make is trainable:
        assert module.state.CB is not None  # the copy is not saved with a layer that is trained
        assert pickled(module).state.CB is None


def test_a_copied_float_layer_does_not_trust_the_copied_state():
    module, x = trainable().eval(), inputs(3, 96)
    module(x)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.mul_(torch.linspace(1, 3, 96))
    assert torch.equal(other(x), definition(other, x))
    assert torch.equal(other.state.CB, int8_vectorwise_quant(other.weight.detach())[0])


def test_subclasses():
    class Mine(Linear8bitLt):
        def __init__(self, *args, device=None, threshold=6.0, **kwargs):
            super().__init__(*args, device=device, threshold=threshold, **kwargs)

        def forward(self, x):
            if self.weight.CB is not None:
                self.init_8bit_state()
            return matmul(x, self.weight, bias=self.bias, state=self.state)

    module = Mine(96, 64, has_fp16_weights=False).to(DEVICE)
    x = inputs(3, 96)
    got = module(x)
    assert module.state.threshold == 6.0
    assert torch.equal(got, Linear8bitLt.forward(module, x))


# --- State dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_keys(bias):
    saved = layer(bias=bias).state_dict(prefix="a.")
    assert list(saved) == ["a." + key for key in KEYS if bias or key != "bias"]
    assert all(type(value) is torch.Tensor for value in saved.values())
    assert (saved["a.weight"].dtype, saved["a.weight"].shape) == (torch.int8, (64, 96))
    assert (saved["a.SCB"].dtype, saved["a.SCB"].shape) == (torch.float32, (64,))
    assert (saved["a.weight_format"].dtype, saved["a.weight_format"].shape) == (torch.uint8, ())
    assert saved["a.weight_format"].item() == 0


def test_float_weights_are_saved_as_such():
    for module in (float_layer(), trainable()):
        module.state.has_fp16_weights and module(inputs(1, 96))
        assert list(module.state_dict()) == ["weight", "bias"]
        assert module.state_dict()["weight"].dtype == torch.float32


def test_keep_vars():
    module = layer()
    saved = module.state_dict(keep_vars=True)
    assert saved["weight"] is module.weight
    assert saved["SCB"] is module.weight.SCB


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("ready", [False, True], ids=["into-unquantized", "into-quantized"])
@pytest.mark.parametrize("sizes", [(96, 64), (33, 5), (1, 1)])
def test_round_trip(sizes, ready, used):
    source = layer(*sizes, threshold=2.0)
    target = (layer if ready else float_layer)(*sizes, seed=1, threshold=2.0)
    x = inputs(3, sizes[0])
    if used:
        source(x)
        ready and target(x)
    parameter = target.weight
    assert target.load_state_dict(source.state_dict(), strict=True) == ([], [])
    assert target.weight is parameter
    assert type(target.weight) is Int8Params
    assert_same_dict(target.state_dict(), source.state_dict())
    assert torch.equal(target(x), source(x))
    source.weight.SCB.zero_()
    assert target.weight.SCB.all()


@pytest.mark.parametrize("form", [0, "row", torch.tensor(0, dtype=torch.uint8), None])
def test_forms_of_weight_format(form):
    source, target = layer(), float_layer(seed=1)
    saved = dict(source.state_dict())
    if form is None:
        del saved["weight_format"]
    else:
        saved["weight_format"] = form
    assert target.load_state_dict(saved) == ([], [])
    assert_same_dict(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (torch.tensor(2, dtype=torch.uint8), r"got 2 \(col_turing\)"),
        (1, r"got 1 \(col32\)"),
        ("col_ampere", "got 'col_ampere'"),
        (9, "got 9"),
        (torch.tensor([0, 0]), r"got \[0, 0\]"),
    ],
)
def test_other_layouts_are_refused(form, named):
    source, target = layer(), layer(seed=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match=rf"weight_format: the only layout .* {named}"):
        target.load_state_dict(source.state_dict() | {"weight_format": form})
    assert_same_dict(target.state_dict(), before)


def test_float_into_quantized_is_quantized():
    source, target = nn.Linear(96, 64).bfloat16(), layer()
    parameter = target.weight
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert target.weight is parameter
    codes, scb, _ = int8_vectorwise_quant(source.weight.detach())
    assert torch.equal(target.weight.data, codes)
    assert torch.equal(target.weight.SCB, scb)
    assert torch.equal(target.state.SCB, scb)


def test_float_into_float():
    source, target = nn.Linear(96, 64), float_layer()
    target.load_state_dict(source.state_dict())
    assert target.weight.dtype == torch.float32
    assert torch.equal(target.weight, source.weight)
    module = trainable().eval()
    x = inputs(3, 96)
    module(x)
    module.load_state_dict(source.state_dict())
    assert torch.equal(module(x), definition(module, x))
    assert torch.equal(module.state.CB, int8_vectorwise_quant(source.weight.detach())[0])


@pytest.mark.parametrize("assign", [False, True])
def test_quantized_into_a_layer_that_keeps_floats_is_decoded(assign):
    source, target = layer(), trainable(seed=1)
    assert target.load_state_dict(source.state_dict(), assign=assign) == ([], [])
    assert type(target.weight) is Int8Params
    assert target.weight.requires_grad
    assert torch.equal(target.weight.double(), decoded(source))
    target(inputs(3, 96)).sum().backward()
    assert target.weight.grad is not None


def test_assign_takes_the_tensors_of_the_state_dict():
    source = layer(threshold=2.0)
    with torch.device("meta"):
        target = Linear8bitLt(96, 64, has_fp16_weights=False, threshold=2.0)
    saved = source.state_dict()
    assert target.load_state_dict(saved, assign=True) == ([], [])
    assert type(target.weight) is Int8Params
    assert target.weight.data_ptr() == saved["weight"].data_ptr()
    assert target.weight.SCB.data_ptr() == saved["SCB"].data_ptr()
    assert torch.equal(target(inputs(3, 96)), source(inputs(3, 96)))


def test_assign_of_a_float_weight_keeps_the_class():
    with torch.device("meta"):
        target = Linear8bitLt(96, 64, has_fp16_weights=False)
    target.load_state_dict(nn.Linear(96, 64).state_dict(), assign=True)
    assert type(target.weight) is Int8Params
    target.to(DEVICE)
    assert target.weight.dtype == torch.int8
    assert target(inputs(3, 96)).shape == (3, 64)


def test_meta_without_assign_warns_and_does_nothing():
    with torch.device("meta"):
        target = Linear8bitLt(96, 64, has_fp16_weights=False)
    with pytest.warns(UserWarning, match="copying") as caught:
        target.load_state_dict(layer().state_dict())
    assert any("on the meta device does nothing" in str(w.message) for w in caught)
    assert (target.weight.device.type, target.weight.dtype) == ("meta", torch.float32)


def test_as_transformers_loads(caplog):
    """Built on the meta device, then the parameter is replaced by one made from the checkpoint."""
    source, x = layer(threshold=6.0), inputs(3, 96, dtype=torch.bfloat16)
    for quantized in (True, False):
        with torch.device("meta"):
            target = Linear8bitLt(96, 64, True, has_fp16_weights=False, threshold=6.0)
            if quantized:
                target.weight.data = target.weight.data.to(dtype=torch.int8)
        target.requires_grad_(False)
        kwargs = target.get_parameter("weight").__dict__
        if quantized:
            value = source.weight.data
            kwargs["SCB"] = source.weight.SCB
        else:
            torch.manual_seed(0)
            value = nn.Linear(96, 64).weight.data
            kwargs.pop("SCB", None)
        new = Int8Params(value.to(DEVICE), requires_grad=False, **kwargs).to(value.device)
        new._is_hf_initialized = True
        target.weight = new
        target.bias = source.bias
        assert torch.equal(target(x), source(x))
        assert_same_dict(target.state_dict(), source.state_dict())


def spoiled(saved: dict, name: str) -> dict:
    saved = dict(saved)
    if name.startswith("no "):
        del saved[name[3:]]
    elif name == "rows":
        saved["weight"] = saved["weight"][:-1]
    elif name == "columns":
        saved["weight"] = saved["weight"][:, :-1]
    elif name == "scales":
        saved["SCB"] = saved["SCB"][:-1]
    elif name == "scales of integers":
        saved["SCB"] = saved["SCB"].int()
    elif name == "floats":
        saved["weight"] = saved["weight"].float()
    elif name == "list":
        saved["SCB"] = saved["SCB"].tolist()
    elif name == "bias":
        saved["bias"] = saved["bias"][:-1]
    return saved


@pytest.mark.parametrize("ready", [False, True], ids=["into-unquantized", "into-quantized"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no SCB", r"a\.weight: an 8-bit weight loads only as a whole, .* lacks a\.SCB"),
        ("no weight", r"loads only as a whole, and the state dict lacks a\.weight"),
        ("rows", r"size mismatch for a\.weight: .* \[63, 96\], the module has \[64, 96\]"),
        ("columns", r"size mismatch for a\.weight: .* \[64, 95\], the module has \[64, 96\]"),
        ("scales", r"size mismatch for a\.SCB: .* 64 rows .* holds \[63\]"),
        ("scales of integers", r"a\.SCB: must be floating-point, got torch\.int32"),
        ("floats", r"a\.weight: with a\.SCB beside it, it must be torch\.int8"),
        ("list", r"a\.SCB: expected a tensor, got list"),
        ("bias", r"size mismatch for a\.bias"),
    ],
)
def test_a_failed_load_changes_nothing(ready, strict, name, message):
    if ready and name == "no weight":
        # What torch.distributed.checkpoint saves without frozen parameters: scales without codes.
        if not strict:
            model = nn.ModuleDict({"a": layer(seed=1)})
            scales = {"a.SCB": torch.ones(64), "a.bias": torch.zeros(64)}
            assert model.load_state_dict(scales, strict=False).missing_keys == ["a.weight", "a.SCB"]
            assert torch.equal(model["a"].weight.data, layer(seed=1).weight.data)
            return
        message = r'Missing key\(s\) in state_dict: "a.weight"'
        # torch finds out that keys are missing after it has loaded the others
        with pytest.raises(RuntimeError, match=message):
            nn.ModuleDict({"a": layer(seed=1)}).load_state_dict({"a.SCB": torch.ones(64)})
        return
    model = nn.ModuleDict({"a": layer(seed=1) if ready else float_layer(seed=1)})
    before = copy.deepcopy(model.state_dict())
    saved = {f"a.{key}": value for key, value in spoiled(layer().state_dict(), name).items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(saved, strict=strict)
    assert_same_dict(model.state_dict(), before)
    model.load_state_dict({f"a.{k}": v for k, v in layer().state_dict().items()})
    assert torch.equal(model["a"](inputs(3, 96)), layer()(inputs(3, 96)))


def test_missing_and_unexpected_keys():
    model = nn.Sequential(layer(), float_layer())
    result = model.load_state_dict({"0.bias": torch.zeros(64)}, strict=False)
    assert sorted(result.missing_keys) == ["0.SCB", "0.weight", "1.bias", "1.weight"]
    assert model[0].bias.sum() == 0
    saved = layer().state_dict() | {"extra": torch.zeros(1)}
    assert layer().load_state_dict(saved, strict=False).unexpected_keys == ["extra"]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "extra"'):
        layer().load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight", "SCB"'):
        layer().load_state_dict({"bias": torch.zeros(64)})


def test_wrong_float_shape_into_quantized():
    module = layer()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .* \[64, 95\]"):
        module.load_state_dict(nn.Linear(95, 64).state_dict())
    assert_same_dict(module.state_dict(), before)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = nn.Sequential(layer(), layer(64, 8))
    source(inputs(1, 96))
    safetensors.save_file(source.state_dict(), tmp_path / "m.safetensors")
    target = nn.Sequential(float_layer(seed=1), float_layer(64, 8, seed=1))
    target.load_state_dict(safetensors.load_file(tmp_path / "m.safetensors"))
    assert_same_dict(target.state_dict(), source.state_dict())


def test_distributed_checkpoint_state_dict():
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    source = nn.Sequential(layer(), nn.ReLU())
    saved = dcp.get_model_state_dict(source)
    assert_same_dict(dict(saved), dict(source.state_dict()))
    target = nn.Sequential(layer(seed=1), nn.ReLU())
    dcp.set_model_state_dict(target, saved)
    assert_same_dict(dict(target.state_dict()), dict(source.state_dict()))


def test_loaded_layers_still_copy_and_move():
    target = float_layer(seed=1, threshold=2.0)
    target.load_state_dict(layer().state_dict())
    other = copy.deepcopy(target).to(DEVICE).half()
    x = inputs(3, 96)
    torch.testing.assert_close(other(x), target(x), rtol=0, atol=1e-3)  # the bias is half now
    assert_same_dict(
        {k: v for k, v in other.state_dict().items() if k != "bias"},
        {k: v for k, v in target.state_dict().items() if k != "bias"},
    )


# --- Clients -------------------------------------------------------------------------------------


def test_peft_merge():
    """A constructor, .to(), and reset_grads(), as PEFT merges."""
    module, x = layer(threshold=6.0), inputs(3, 96)
    module(x)
    weight, state = module.weight, module.state
    if state.SCB is None:
        state.SCB = weight.SCB
    merged = int8_vectorwise_dequant(weight.data, state.SCB) + 0.1 * inputs(64, 96)
    module.weight = Int8Params(
        merged.to(DEVICE), requires_grad=False, has_fp16_weights=weight.has_fp16_weights
    ).to(weight.device)
    state.reset_grads()
    got = module(x)
    assert torch.equal(module.state.CB, int8_vectorwise_quant(merged)[0])
    assert torch.equal(got, definition(module, x))
    state.reset_grads()  # and without a new weight, it comes from the weight again
    assert torch.equal(module(x), got)
    assert torch.equal(module.state.SCB, module.weight.SCB)


def test_accelerate_offloads_through_meta():
    """The weight leaves for the meta device and comes back with its scales, by hand."""
    module, x = layer(threshold=6.0).requires_grad_(False), inputs(3, 96)
    want = module(x)
    kept, scales = module.weight.data.clone(), module.weight.SCB.clone()
    for _ in range(2):
        old = module._parameters["weight"]
        new = Int8Params(old.to("meta"), requires_grad=old.requires_grad, **old.__dict__)
        module._parameters["weight"] = new.to("meta")
        module.state.SCB = None
        module.state.CxB = None
        assert module.state.CB is None  # nothing keeps the codes in memory
        del old, new
        old = module._parameters["weight"]
        with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
            module(x)
        new = Int8Params(kept.clone(), requires_grad=False, **old.__dict__).to(DEVICE)
        new.CB = new.CB.to(DEVICE)
        module._parameters["weight"] = new
        with pytest.raises(RuntimeError, match=r"weight\.SCB is on the meta device"):
            module(x)
        module._parameters["weight"].SCB = scales.to(DEVICE)
        assert torch.equal(module(x), want)


def test_lightning_quantizes_by_attributes():
    module = float_layer()
    codes, scb, _ = int8_vectorwise_quant(module.weight.data)
    module.weight.data = codes
    module.weight.CB = codes
    module.weight.SCB = scb
    module.weight = module.weight
    assert torch.equal(module(inputs(3, 96)), layer()(inputs(3, 96)))


def test_outlier_aware_linear():
    class Rounded(OutlierAwareLinear):
        def quantize_weight(self, w, outlier_idx):
            return w.round()

        def forward_with_outliers(self, x, outlier_idx):
            return nn.functional.linear(x, self.weight, self.bias)

    module, x = Rounded(96, 64), inputs(3, 96)
    assert isinstance(module, nn.Linear)
    want = nn.functional.linear(x, module.weight.round(), module.bias)
    module.outlier_dim = torch.tensor([3])
    assert torch.equal(module(x), want)
    assert module.is_quantized
    bare = OutlierAwareLinear(4, 2)
    bare.outlier_dim = torch.tensor([0])
    with pytest.raises(NotImplementedError, match="must define quantize_weight"):
        bare(torch.zeros(1, 4))
    bare.is_quantized = True
    with pytest.raises(NotImplementedError, match="must define forward_with_outliers"):
        bare(torch.zeros(1, 4))
