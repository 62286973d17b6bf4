"""LLM.int8() against float64 and against its definition. docs/int8_error.md derives the bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path

import int8_reference as ref
import numpy as np
import pytest
import torch
from halfbyte import MatmulLtState, _native, matmul
from halfbyte import functional as F
from halfbyte.nn import Linear8bitLt
from reference import DEVICE
from torch import Tensor

ops = torch.ops.halfbyte

SHAPES = [  # rows, in_features, out_features
    (1, 1, 1),
    (1, 7, 3),
    (2, 16, 16),
    (3, 64, 5),
    (2, 65, 33),
    (5, 127, 17),
    (16, 128, 64),
    (7, 255, 31),
    (17, 300, 70),
    (33, 513, 48),
    (65, 1030, 96),
    (1, 4096, 40),
]
MAX_DEPTH = 131_071
"""The longest sum of products of two int8 that cannot overflow int32."""


class Problem:
    """One product: float input and weight, the weight's codes, the rounded bias."""

    def __init__(
        self,
        a: np.ndarray,
        w: np.ndarray,
        bias: np.ndarray | None,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.a = ref.rounded(a, dtype)
        self.w = torch.from_numpy(w)
        self.bias = None if bias is None else ref.rounded(bias, dtype)
        rows = ref.quantize(ref.array32(self.w))
        self.cb, self.scb = torch.from_numpy(rows.codes), torch.from_numpy(rows.stats)

    def bound(self, threshold: float) -> ref.Bounded:
        """Against the float product."""
        bias = None if self.bias is None else ref.values(self.bias)
        return ref.linear_bound(ref.values(self.a), ref.values(self.w), bias, threshold, self.dtype)

    def stored(self, threshold: float) -> ref.Bounded:
        """Against the product of the codes."""
        a = ref.array32(self.a)
        bias = None if self.bias is None else ref.values(self.bias)
        return ref.stored_bound(
            a, ref.quantize(a, threshold), self.cb.numpy(), self.scb.numpy(), bias, self.dtype
        )

    def defined(self, threshold: float) -> Tensor:
        """The definition's result, bit for bit."""
        a = ref.array32(self.a)
        bias = None if self.bias is None else ref.array32(self.bias)
        y = ref.linear32(a, ref.quantize(a, threshold), self.cb.numpy(), self.scb.numpy(), bias)
        return ref.rounded(y, self.dtype)

    def run(self, threshold: float) -> Tensor:
        """The op."""
        return ops.int8_linear(self.a, self.cb, self.scb, self.bias, threshold)


def problem(
    shape: tuple[int, int, int], kind: str, weights: str, dtype: torch.dtype, *seed: int
) -> Problem:
    """Random values of a kind, and a bias."""
    rng = ref.generator(*seed, *shape)
    rows, inner, outer = shape
    a = ref.matrix(rng, kind, (rows, inner))
    w = ref.matrix(rng, weights, (outer, inner)) * np.float32(0.02)
    return Problem(a, w, rng.standard_normal(outer).astype(np.float32), dtype)


def tight(inner: int, rows: int, outer: int, dtype: torch.dtype) -> Problem:
    """Every code rounds up by half a step, so that all errors have one sign and add up."""
    rng = ref.generator(inner, rows, outer)
    # Ties go to even: an even code less a half is exactly half a step away, in every dtype.
    a = (rng.integers(50, 64, (rows, inner)) * 2 - 0.5).astype(np.float32)
    w = (rng.integers(50, 64, (outer, inner)) * 2 - 0.5).astype(np.float32)
    a[:, 0] = w[:, 0] = 127  # scales of exactly one
    return Problem(a, w * np.float32(2.0**-10), None, dtype)


def same_bits(mine: Tensor, expected: Tensor) -> int:
    """How many values differ in their bits."""
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    size = {2: torch.int16, 4: torch.int32, 1: torch.int8}[mine.element_size()]
    return int((mine.contiguous().view(size) != expected.contiguous().view(size)).sum())


# --- 1. error against float64 ---


@cache
def everything(dtype: torch.dtype) -> list[tuple[str, Problem]]:
    """Every shape with every kind of input and weight."""
    return [
        (f"{shape}, {kind} input, {weights} weight", problem(shape, kind, weights, dtype, 1))
        for shape in SHAPES
        for kind in ("gaussian", "heavy", "planted")
        for weights in ("gaussian", "heavy")
    ]


@pytest.mark.parametrize("threshold", ref.THRESHOLDS)
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_every_element_is_within_the_bound(dtype, threshold):
    for what, case in everything(dtype):
        y = case.run(threshold)
        assert y.dtype == dtype, what
        assert case.bound(threshold).worst(y) <= 1, f"{what}: against the float weight"
        assert case.stored(threshold).worst(y) <= 1, f"{what}: against the codes"


@pytest.mark.parametrize("dtype", ref.FLOATS)
@pytest.mark.parametrize("shape", [(3, 64, 5), (5, 256, 17), (4, 1024, 70)])
def test_the_bound_is_attained(dtype, shape):
    rows, inner, outer = shape
    case = tight(inner, rows, outer, dtype)
    worst = case.bound(0.0).worst(case.run(0.0))
    # The column that sets the scale has no error, and the last rounding may go the other way.
    floor = {torch.float32: 0.98, torch.float16: 0.9, torch.bfloat16: 0.45}[dtype]
    assert floor * (inner - 1) / inner < worst <= 1


@pytest.mark.parametrize("weights", ["gaussian", "heavy"])
@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
def test_the_mean_square_error_is_that_of_uniform_rounding(threshold, weights):
    case = problem((64, 1024, 96), "planted", weights, torch.float32, 2)
    a, w = ref.values(case.a), ref.values(case.w)
    error = ref.values(case.run(threshold)) - case.bound(threshold).exact
    expected = ref.expected_square(a, w, threshold)
    assert (error**2 / expected).mean() == pytest.approx(1, abs=0.08)


def test_a_threshold_nothing_reaches_changes_no_bit():
    case = problem((17, 300, 70), "planted", "gaussian", torch.bfloat16, 3)
    plain = case.run(0.0)
    assert same_bits(case.run(float("inf")), plain) == 0
    assert same_bits(case.run(1e30), plain) == 0
    assert same_bits(case.run(6.0), plain) > 0


@pytest.mark.parametrize("exponent", [-60, -9, 5, 60])
def test_powers_of_two_pass_through(exponent):
    case = problem((5, 127, 17), "planted", "gaussian", torch.float32, 4)
    factor = 2.0**exponent
    case.bias = None
    expected = case.run(6.0) * factor
    case.a = case.a * factor
    assert same_bits(case.run(6.0 * factor), expected) == 0


def test_outliers_alone_have_only_the_weights_error():
    """A threshold below every value leaves nothing to the int8 product."""
    case = problem((4, 70, 9), "gaussian", "gaussian", torch.float32, 5)
    case.a = case.a.sign() * (case.a.abs() + 1)
    y = case.run(1.0)
    decoded = ref.dequantize(case.cb.numpy(), case.scb.numpy()).astype(np.float64)
    exact = ref.values(case.a) @ decoded.T + ref.values(case.bias)
    assert ref.relative(y, exact) < 1e-6


# --- testing the tests: a kernel that is a little wrong must not pass ---


def _model(
    case: Problem,
    threshold: float,
    *,
    scale: float = 1.0,
    truncate: bool = False,
    keep_outlier_codes: bool = False,
    drop_outliers: bool = False,
    last_outlier_twice: bool = False,
    skip_last_column: bool = False,
    swap_stats: bool = False,
    forget_bias: bool = False,
    scale_of_outliers: bool = False,
) -> Tensor:
    """The definition, with one mistake."""
    a = ref.array32(case.a)
    rows = ref.quantize(a, threshold)
    if scale_of_outliers:
        rows.codes = ref.encode(a, ref.scales(ref.largest(np.abs(a), 1))[:, None])
        rows.codes[:, rows.outliers] = 0
    if truncate:
        rows.codes = np.trunc(a * (np.float32(127) / rows.stats[:, None])).clip(-127, 127)
        rows.codes[:, rows.outliers] = 0
    if keep_outlier_codes:
        rows.codes = ref.encode(a, ref.scales(rows.stats)[:, None])
    if skip_last_column:
        rows.codes[:, -1] = 0
    if swap_stats:
        rows.stats = np.roll(rows.stats, 1)
    if drop_outliers:
        rows.outliers = rows.outliers[:0]
    if last_outlier_twice:
        rows.outliers = np.append(rows.outliers, rows.outliers[-1:])
    bias = None if forget_bias or case.bias is None else ref.array32(case.bias)
    y = ref.linear32(a, rows, case.cb.numpy(), case.scb.numpy(), bias)
    return ref.rounded(y * np.float32(scale), case.dtype)


@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_the_definition_itself_passes(dtype):
    for shape in SHAPES:
        case = problem(shape, "planted", "heavy", dtype, 6)
        assert same_bits(_model(case, 6.0), case.defined(6.0)) == 0
        assert case.bound(6.0).worst(_model(case, 6.0)) <= 1
        assert case.stored(6.0).worst(_model(case, 6.0)) <= 1


@pytest.mark.parametrize("dtype", ref.FLOATS)
@pytest.mark.parametrize("scale", [0.99, 1.01])
def test_a_scale_off_by_one_percent_fails(dtype, scale):
    case = tight(256, 5, 17, dtype)
    assert case.bound(0.0).worst(_model(case, 0.0)) <= 1
    if scale > 1:  # the rounding errors of this case lie above; below, they would cancel
        assert case.bound(0.0).worst(_model(case, 0.0, scale=scale)) > 1
    assert case.stored(0.0).worst(_model(case, 0.0, scale=scale)) > 1


@pytest.mark.parametrize("mistake", [{"scale": 1.01}, {"scale": 0.99}, {"truncate": True}])
def test_a_mistake_shows_in_the_mean_square_error(mistake):
    case = problem((64, 1024, 96), "gaussian", "gaussian", torch.float32, 2)
    expected = ref.expected_square(ref.values(case.a), ref.values(case.w), 0.0)
    error = ref.values(_model(case, 0.0, **mistake)) - case.bound(0.0).exact
    assert (error**2 / expected).mean() > 1.5


@pytest.mark.parametrize(
    "mistake",
    [
        "truncate",
        "keep_outlier_codes",
        "drop_outliers",
        "last_outlier_twice",
        "skip_last_column",
        "swap_stats",
        "forget_bias",
        "scale_of_outliers",
    ],
)
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_a_mistake_fails(dtype, mistake):
    failed = 0
    for shape in [(5, 127, 17), (17, 300, 70)]:
        case = problem(shape, "planted", "gaussian", dtype, 7)
        y = _model(case, 6.0, **{mistake: True})
        against_codes = case.stored(6.0).worst(y) > 1
        assert against_codes, f"{shape}: {mistake} passes for right"
        failed += case.bound(6.0).worst(y) > 1
    # The bound against the float weight sees all but truncation, whose mean square error shows it.
    assert failed or mistake == "truncate"


# --- 2. planted outlier columns ---

PLANTED = 4
"""Outlier columns of 1,024: the share that LLM.int8() reports for large models is 0.1%."""


def _planted(magnitude: float, dtype: torch.dtype, share: float = 1.0) -> Problem:
    """Gaussian activations with a few large columns (in this share of the rows)."""
    rng = ref.generator(int(magnitude))
    a = rng.standard_normal((64, 1024))
    columns = rng.choice(1024, PLANTED, replace=False)
    signs = rng.choice([-1.0, 1.0], PLANTED)
    hit = np.zeros(64, bool)
    hit[: round(64 * share)] = True
    a[np.ix_(hit, columns)] += magnitude * signs
    w = (rng.standard_normal((256, 1024)) * 0.02).astype(np.float32)
    return Problem(a.astype(np.float32), w, None, dtype)


@pytest.mark.parametrize("magnitude", [20, 60, 200, 1000])
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_planted_outliers_stay_within_one_percent(dtype, magnitude):
    case = _planted(magnitude, dtype)
    float_weight = case.bound(0.0).exact
    decoded = case.cb.numpy() * ref.values(case.scb)[:, None] / 127
    stored_weight = ref.values(case.a) @ decoded.T
    mixed, plain = case.run(6.0), case.run(0.0)
    columns = F.int8_vectorwise_quant(case.a, 6.0)[2]
    assert len(columns) == PLANTED

    assert ref.relative(mixed, float_weight) < 0.01
    assert ref.relative(mixed, stored_weight) < 0.007
    assert ref.relative(plain, float_weight) > 0.01
    assert ref.relative(plain, stored_weight) > 0.01


@pytest.mark.parametrize("magnitude", [60, 200, 1000])
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_plain_int8_loses_what_is_not_an_outlier(dtype, magnitude):
    """Relative to the rest of the row: what a layer behind the outliers would see."""
    case = _planted(magnitude, dtype)
    decoded = case.cb.numpy() * ref.values(case.scb)[:, None] / 127
    a = ref.values(case.a)
    rest = ~ref.outlier_mask(a, 6.0)
    size = np.linalg.norm(a[:, rest] @ decoded[:, rest].T)
    exact = a @ decoded.T
    plain = np.linalg.norm(ref.values(case.run(0.0)) - exact) / size
    assert plain > 0.1
    if dtype == torch.float32:  # in 16 bits the rounding of the large result hides it
        mixed = np.linalg.norm(ref.values(case.run(6.0)) - exact) / size
        assert mixed < 0.01


@pytest.mark.parametrize("share", [1 / 64, 0.5])
def test_one_row_makes_a_column_an_outlier_for_all(share):
    case = _planted(200, torch.bfloat16, share)
    assert len(F.int8_vectorwise_quant(case.a, 6.0)[2]) == PLANTED
    assert ref.relative(case.run(6.0), case.bound(0.0).exact) < 0.01
    assert case.stored(6.0).worst(case.run(6.0)) <= 1


# --- 3. exact equality with the definition, on every instruction set ---

CHILD = """
import json, sys, torch
from halfbyte import _native, functional as F
ops = torch.ops.halfbyte
assert _native.isa() == sys.argv[2], _native.isa()
wrong = {}
def compare(name, mine, expected):
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    if mine.dtype != expected.dtype or mine.shape != expected.shape:
        wrong[name] = f"{mine.dtype} {tuple(mine.shape)}"
        return
    mine, expected = mine.contiguous().view(size), expected.contiguous().view(size)
    count = int((mine != expected).sum())
    if count:
        wrong[name] = count
cases = torch.load(sys.argv[1])
for threads in (1, 3):
    torch.set_num_threads(threads)
    for name, call, arguments, expected in cases:
        op = getattr(ops, call)
        if call == "int8_vectorwise_dequant":
            got = op.dtype(*arguments)
        elif call == "int8_linear":
            got = op.outliers(*arguments)
            compare(f"{name} without outliers, {threads}", op(*arguments), expected[0])
        else:
            got = op(*arguments)
        got = got if isinstance(got, (tuple, list)) else (got,)
        for index, tensor in enumerate(expected):
            if tensor is not None:
                compare(f"{name} [{index}], {threads} threads", got[index], tensor)
print(json.dumps({"cases": len(cases), "wrong": wrong}))
"""


def _quant_cases() -> list[tuple]:
    cases = []
    for dtype in ref.FLOATS:
        for shape in [(0, 8), (1, 1), (2, 16), (3, 33), (17, 127), (4, 1000), (5, 257)]:
            for threshold in (0.0, 0.5, 6.0, float("inf")):
                rng = ref.generator(*shape)
                x = ref.rounded(ref.matrix(rng, "planted", shape), dtype)
                if shape[0] > 2:
                    x[1] = 0
                    x[2, :3] = torch.tensor([0.5, 6.0, -6.0])
                rows = ref.quantize(ref.array32(x), threshold)
                found = torch.from_numpy(rows.outliers) if threshold > 0 else None
                expected = (torch.from_numpy(rows.codes), torch.from_numpy(rows.stats), found)
                name = f"{dtype} {shape} {threshold}"
                cases.append((f"quant {name}", "int8_vectorwise_quant", (x, threshold), expected))
                both, columns = ref.quantize_both(ref.array32(x), threshold)
                expected = (
                    torch.from_numpy(both.codes),
                    torch.from_numpy(columns.codes),
                    torch.from_numpy(both.stats),
                    torch.from_numpy(columns.stats),
                    found,
                )
                cases.append((f"double {name}", "int8_double_quant", (x, threshold), expected))
                if threshold == 0:
                    decoded = ref.rounded(ref.dequantize(rows.codes, rows.stats), dtype)
                    arguments = (expected[0], expected[2], dtype)
                    cases.append(
                        (f"dequant {name}", "int8_vectorwise_dequant", arguments, (decoded,))
                    )
    return cases


def _product_cases() -> list[tuple]:
    cases = []
    for number, shape in enumerate([*SHAPES, (130, 200, 130), (12, 64, 257), (0, 16, 8)]):
        rng = ref.generator(number)
        rows, inner, outer = shape
        a, b = (
            torch.from_numpy(rng.integers(-128, 128, size, np.int8))
            for size in ((rows, inner), (outer, inner))
        )
        acc = torch.from_numpy(ref.int_product(a.numpy(), b.numpy()).astype(np.int32))
        cases.append((f"product {shape}", "int8_linear_matmul", (a, b), (acc,)))
    extremes = {"-128 x -128": (-128, -128), "-128 x 127": (-128, 127), "127 x 127": (127, 127)}
    for name, (left, right) in extremes.items():
        for rows, outer, depth in [(1, 1, MAX_DEPTH), (3, 5, MAX_DEPTH), (20, 18, 4100)]:
            a = torch.full((rows, depth), left, dtype=torch.int8)
            b = torch.full((outer, depth), right, dtype=torch.int8)
            acc = torch.full((rows, outer), left * right * depth, dtype=torch.int32)
            title = f"{name} {rows} x {outer} x {depth}"
            cases.append((title, "int8_linear_matmul", (a, b), (acc,)))
    rng = ref.generator(99)
    signs = rng.choice(np.array([-128, 127], np.int8), (6, MAX_DEPTH))
    acc = torch.from_numpy(ref.int_product(signs[:2], signs[2:]).astype(np.int32))
    pair = torch.from_numpy(signs[:2].copy()), torch.from_numpy(signs[2:].copy())
    cases.append(("mixed extremes", "int8_linear_matmul", pair, (acc,)))
    return cases


def _linear_cases() -> list[tuple]:
    cases = []
    for dtype in ref.FLOATS:
        for shape in [*SHAPES, (40, 192, 150)]:
            for threshold in (0.0, 2.0, 6.0):
                case = problem(shape, "planted", "heavy", dtype, 8)
                rows = ref.quantize(ref.array32(case.a), threshold)
                codes, stats = torch.from_numpy(rows.codes), torch.from_numpy(rows.stats)
                found = torch.from_numpy(rows.outliers)
                y = case.defined(threshold)
                name = f"{dtype} {shape} {threshold}"
                arguments = (case.a, case.cb, case.scb, case.bias, threshold)
                cases.append((f"linear {name}", "int8_linear", arguments, (y, found)))
                columns = found if threshold > 0 else None
                mixed = (case.a, codes, case.cb, stats, case.scb, columns, case.bias)
                sub = case.a[:, found] if len(found) else torch.empty(0, dtype=dtype)
                cases.append((f"mixed {name}", "int8_mixed_scaled_mm", mixed, (y, sub)))
                if threshold == 0:
                    scaled = (codes, case.cb, stats, case.scb, case.bias, dtype)
                    cases.append((f"scaled {name}", "int8_scaled_mm", scaled, (y,)))
                    acc = ref.int_product(rows.codes, case.cb.numpy()).astype(np.int32)
                    parts = (torch.from_numpy(acc), stats, case.scb, dtype, case.bias)
                    cases.append((f"epilogue {name}", "int8_mm_dequant", parts, (y,)))
    return cases


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and what the definition makes of them, in a file."""
    path = tmp_path_factory.mktemp("int8") / "cases.pt"
    torch.save(_quant_cases() + _product_cases() + _linear_cases(), path)
    return path


@pytest.mark.parametrize("isa", _native.available_isas())
def test_every_instruction_set_equals_the_definition(
    python: Callable[..., str], monkeypatch: pytest.MonkeyPatch, definitions: Path, isa: str
):
    monkeypatch.setenv("HALFBYTE_ISA", isa)
    code = f"import sys; sys.argv = ['-c', {str(definitions)!r}, {isa!r}]\n{CHILD}"
    found = json.loads(python(code).splitlines()[-1])
    assert found["cases"] > 300
    assert found["wrong"] == {}


def test_the_definitions_fma_rounds_once():
    """Where rounding twice goes wrong: the sum lies just beside a float32 midpoint."""
    x = np.array([1 + 2.0**-12], np.float32)
    below, above = np.float32(1 + 2.0**-11), np.float32(1 + 2.0**-11 + 2.0**-23)
    # x * x = 1 + 2^-11 + 2^-24 is their midpoint; float64 cannot hold it and 2^-60 beside it.
    assert ref.fma(x, x, np.array([2.0**-60], np.float32))[0] == above
    assert ref.fma(x, x, np.array([0], np.float32))[0] == below
    assert ref.fma(x, x, np.array([-(2.0**-60)], np.float32))[0] == below
    rng = ref.generator(11)
    x, y, z = (rng.standard_normal(2000).astype(np.float32) for _ in range(3))
    z *= np.float32(2.0) ** rng.integers(-40, 3, 2000).astype(np.float32)
    for i, got in enumerate(ref.fma(x, y, z)):
        exact = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
        around = [np.nextafter(got, np.float32(side)) for side in (-np.inf, np.inf)]
        miss = abs(Fraction(float(got)) - exact)
        assert all(miss <= abs(Fraction(float(other)) - exact) for other in around)


def test_a_sum_that_could_overflow_is_refused():
    a = torch.zeros(1, MAX_DEPTH + 1, dtype=torch.int8)
    with pytest.raises((ValueError, RuntimeError), match=str(MAX_DEPTH)):
        ops.int8_linear_matmul(a, a)
    scb = torch.ones(1)
    with pytest.raises((ValueError, RuntimeError), match=str(MAX_DEPTH)):
        ops.int8_linear(torch.zeros(1, MAX_DEPTH + 1), a, scb, None, 0.0)


@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_nan_and_infinity_stay_in_their_rows(dtype):
    case = problem((5, 127, 17), "gaussian", "gaussian", dtype, 12)
    clean = case.run(0.0)
    case.a[1, 5] = float("nan")
    case.a[3, 7] = float("inf")
    y = case.run(0.0)
    for row in (0, 2, 4):
        assert same_bits(y[row], clean[row]) == 0
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()


# --- the layers and functions above the ops ---


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0, float("inf")])
@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_linear8bitlt_is_within_the_bound(dtype, threshold):
    for shape in [(5, 127, 17), (17, 300, 70), (1, 4096, 40)]:
        case = problem(shape, "planted", "heavy", dtype, 13)
        layer = Linear8bitLt(shape[1], shape[2], has_fp16_weights=False, threshold=threshold)
        with torch.no_grad():
            layer.weight.data = case.w.clone()
            layer.bias.data = case.bias.clone()
        layer = layer.to(DEVICE).eval()
        assert layer.weight.dtype == torch.int8
        bound = case.bound(threshold)
        y = layer(case.a)
        assert bound.worst(y) <= 1
        assert same_bits(y, case.run(threshold)) == 0
        assert same_bits(layer.train()(case.a), y) == 0
        cube = layer(case.a.reshape(1, *case.a.shape))
        assert same_bits(cube[0], y) == 0


@pytest.mark.parametrize("dtype", ref.FLOATS)
def test_matmul_quantizes_a_float_weight(dtype):
    case = problem((17, 300, 70), "planted", "gaussian", dtype, 14)
    case = Problem(ref.array32(case.a), ref.array32(case.w.to(dtype)), None, dtype)
    state = MatmulLtState()
    state.threshold = 6.0
    y = matmul(case.a, case.w.to(dtype), state=state, bias=case.bias)
    assert case.bound(6.0).worst(y) <= 1
    assert same_bits(y, case.run(6.0)) == 0


@pytest.mark.parametrize("dtype", ref.FLOATS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 64, 5), (5, 127, 17), (33, 513, 48), (300, 200, 7)]
)
def test_the_input_gradient_is_within_the_bound(dtype, shape):
    rows, inner, outer = shape
    case = problem(shape, "gaussian", "heavy", dtype, 15)
    rng = ref.generator(16)
    grad = ref.rounded(ref.matrix(rng, "heavy", (rows, outer)), dtype)
    weight = case.cb.numpy() * ref.values(case.scb)[:, None] / 127
    # A decoded weight holds three roundings: two products and the constant 1/127.
    bound = ref.product_bound(ref.values(grad), weight.T, 3, dtype)
    assert bound.worst(ops.int8_linear_grad_input(grad, case.cb, case.scb)) <= 1

    a = case.a.clone().requires_grad_()
    bias = case.bias.clone().requires_grad_()
    ops.int8_linear(a, case.cb, case.scb, bias, 6.0).backward(grad)
    assert bound.worst(a.grad) <= 1
    total = ref.values(grad).sum(0)
    limit = ref.gamma(rows) * np.abs(ref.values(grad)).sum(0)
    assert ref.after_rounding(total, limit, dtype).worst(bias.grad) <= 1
    if inner > 1 and dtype == torch.float32:
        unquantized = ref.values(grad) @ ref.values(case.w)
        assert bound.worst(unquantized) > 1, "the float weight's gradient passes too"
