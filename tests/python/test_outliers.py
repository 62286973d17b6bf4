"""The outlier analysis: planted columns are found exactly, shares agree with float64, and the model
is left as it was. And the outlier helpers that upstream has."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import halfbyte
import pytest
import torch
from halfbyte import utils
from halfbyte.utils import OutlierTracer, find_outlier_dims, find_outliers
from reference import DEVICE
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PLANTED = {3: 20.0, 17: 60.0, 95: 1000.0}


def planted(rows: int = 40, columns: int = 96, seed: int = 0) -> Tensor:
    """Uniform in (-4, 4), but columns 3, 17 and 95, which reach 20, 60 and 1000 in some rows."""
    generator = torch.Generator().manual_seed(seed)
    x = 8 * torch.rand(rows, columns, generator=generator) - 4
    for i, (column, magnitude) in enumerate(PLANTED.items()):
        x[i::3, column] = magnitude * torch.rand(len(x[i::3]), generator=generator)
        x[i, column] = magnitude if i % 2 else -magnitude
    return x


class Net(nn.Module):
    """Two layers, of which the second sees planted outliers, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(96, 96, bias=False)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(96, 32)
        self.fails = False
        with torch.no_grad():
            self.first.weight.copy_(0.1 * torch.eye(96))
            self.first.weight[17, 17] = 1.0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.drop(self.first(x * scale))
        if self.fails:
            raise ArithmeticError("a failing model")
        return self.second(input=hidden)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# ---- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_columns_are_found_exactly(dtype: torch.dtype):
    x = planted().to(dtype)
    found = find_outliers(nn.Linear(96, 64, dtype=dtype), x)["Linear"]
    assert found.columns.tolist() == list(PLANTED)
    assert found.columns.dtype == torch.int64
    assert found.outlier_magnitudes.tolist() == list(PLANTED.values())
    assert torch.equal(found.magnitudes, x.abs().amax(0).float())
    assert (found.rows, found.calls, found.in_features, found.nonfinite) == (40, 1, 96, 0)
    assert found.max == 1000.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_equal_those_in_float64(dtype: torch.dtype):
    x = planted(rows=3000).to(dtype)  # more than one chunk
    found = find_outliers(nn.Linear(96, 8, dtype=dtype), x.view(6, 500, 96))["Linear"]
    exact = x.double()
    energy = exact.square().sum(0)
    share = (energy[list(PLANTED)].sum() / energy.sum()).item()
    assert found.energy_share == pytest.approx(share, rel=1e-6)
    assert found.rms == pytest.approx(exact.square().mean().sqrt().item(), rel=1e-6)
    exceeds = exact.abs() >= 6
    assert found.row_share == exceeds.any(1).double().mean().item()
    assert torch.equal(found.column_rows, exceeds.double().mean(0))
    for q, value in found.quantiles.items():
        nearest = exact.abs().flatten().quantile(q, interpolation="higher").item()
        assert value == pytest.approx(nearest, rel=1 / 60), q


def test_the_threshold_itself_counts():
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 5] = -3.0, torch.nextafter(torch.tensor(3.0), torch.tensor(0.0))
    found = find_outliers(nn.Linear(8, 4), x, threshold=3.0)["Linear"]
    assert found.columns.tolist() == [2]
    assert found.at(3.0).columns == 1


def test_batches_add_up():
    model = nn.Linear(96, 64)
    x = planted(rows=120)
    once = find_outliers(model, x)["Linear"]
    parts = find_outliers(model, (part for part in x.split(7)))["Linear"]
    assert parts.calls == 18
    assert parts.rows == once.rows == 120
    assert torch.equal(parts.columns, once.columns)
    assert torch.equal(parts.magnitudes, once.magnitudes)
    assert torch.equal(parts.column_rows, once.column_rows)
    assert parts.energy_share == pytest.approx(once.energy_share, rel=1e-9)
    assert parts.quantiles == once.quantiles
    # Outlier columns are those of a call, as they are when the layer runs in int8.
    per_call = [(part.abs().amax(0) >= 6).sum().item() * len(part) for part in x.split(7)]
    assert parts.at(6.0).columns == pytest.approx(sum(per_call) / 120)
    assert once.at(6.0).columns == 3


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "callable", "list", "loader"])
def test_every_form_of_a_batch(form: str):
    x = planted()
    data = torch.utils.data.TensorDataset(x)
    batch = {
        "tensor": x,
        "tuple": (x, 1.0),
        "mapping": {"x": x},
        "callable": lambda model: model(x, scale=1.0),
        "list": [x[:20], (x[20:],)],
        "loader": torch.utils.data.DataLoader(data, batch_size=16),
    }[form]
    found = find_outliers(Net(), batch)
    assert list(found) == ["first", "second"]
    assert found["first"].rows == found["second"].rows == 40
    # The first layer divides all but column 17 by ten: 1000 becomes 100 and 20 becomes 2.
    assert found["second"].columns.tolist() == [17, 95]
    assert found["second"].outlier_magnitudes.tolist() == pytest.approx([60.0, 100.0])


def test_infinity_counts_and_nan_does_not():
    x = planted()
    x[0, 50], x[1, 51], x[2, 52] = math.inf, -math.inf, math.nan
    report = find_outliers(nn.Linear(96, 8), x)
    found = report["Linear"]
    assert found.columns.tolist() == [3, 17, 50, 51, 95]
    assert found.nonfinite == 3
    assert found.max == math.inf
    assert math.isfinite(found.energy_share)
    assert math.isfinite(found.rms)
    assert all(math.isfinite(p.error) for p in found.points)
    assert "3 elements were infinite or NaN" in str(report)
    loaded = json.loads(report.to_json())
    assert loaded["layers"]["Linear"]["magnitudes"][2] is None
    ElementTree.fromstring(report.svg())


def test_an_input_without_rows_or_without_energy():
    for x in (torch.zeros(0, 8), torch.zeros(5, 8)):
        report = find_outliers(nn.Linear(8, 4), x)
        found = report["Linear"]
        assert len(found.columns) == 0
        assert (found.max, found.rms, found.energy_share, found.row_share) == (0, 0, 0, 0)
        assert {p.error for p in found.points} == {0.0}
        assert set(found.quantiles.values()) == {0.0}
        assert str(report)
        ElementTree.fromstring(report.svg())


# ---- the recommendation -------------------------------------------------------------------------


def int8_error(x: Tensor, weight: Tensor, threshold: float) -> float:
    """The relative error of LLM.int8() without rounding of the result, from its definition."""
    a, w = x.double(), weight.detach().double()
    bound = threshold if threshold > 0 else math.inf
    inner = torch.where(a.abs() < bound, a, 0.0)
    stats = inner.abs().amax(1, keepdim=True)
    codes = torch.round(inner * (127 / stats))
    outliers = (a.abs() >= bound).any(0)
    decoded = torch.where(outliers, a, codes * stats / 127)
    scales = w.abs().amax(1, keepdim=True)
    w8 = torch.round(w * (127 / scales)) * scales / 127
    exact = a @ w.T
    return ((decoded @ w8.T - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0, 40.0, 128.0])
@pytest.mark.parametrize("heavy", [False, True])
def test_the_estimated_error_is_that_of_int8(threshold: float, heavy: bool):
    torch.manual_seed(1)
    weight = torch.randn(128, 192)
    x = torch.randn(256, 192)
    x[:, ::7] *= 3
    if heavy:
        weight[:, 9] *= 4
        x[:, 9] *= 30
        x[:, 100] = 5.0  # a column that does not vanish on average
    layer = nn.Linear(192, 128)
    with torch.no_grad():
        layer.weight.copy_(weight)
    points = find_outliers(layer, x, thresholds=(threshold,))["Linear"]
    real = int8_error(x, weight, threshold)
    assert points.at(threshold).error == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_the_analysis_and_the_layer_agree(threshold: float):
    """The error of a real Linear8bitLt, and the columns that it took out."""
    source, x = nn.Linear(96, 64), planted(rows=300)
    layer = halfbyte.nn.Linear8bitLt(96, 64, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(source.state_dict())
    layer.to(DEVICE).eval()
    found = find_outliers(source, x)["Linear"]
    with torch.no_grad():
        exact = nn.functional.linear(x.double(), source.weight.double())
        mine = layer(x).double() - source.bias.double()
    real = ((mine - exact).norm() / exact.norm()).item()
    assert found.at(threshold).error == pytest.approx(real, rel=0.05)
    if threshold:
        assert layer.state.idx.tolist() == found.columns.tolist()


@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
def test_rounding_is_that_of_the_op(threshold: float):
    from halfbyte._outliers import _rounded

    x = torch.randn(64, 300) * 2
    codes, stats, outliers = halfbyte.functional.int8_vectorwise_quant(x, threshold)
    decoded = codes.float() * (stats.view(-1, 1) / 127)
    inner = x.abs() if threshold == 0 else torch.where(x.abs() < threshold, x.abs(), 0.0)
    mine = _rounded(x, inner.amax(1, keepdim=True))
    if outliers is not None:
        mine[:, outliers] = 0
    torch.testing.assert_close(mine, decoded, rtol=1e-6, atol=0)
    assert (outliers is not None and len(outliers) > 0) == (threshold > 0)


def test_the_recommendation_separates_planted_outliers():
    report = find_outliers(nn.Linear(96, 64), planted(rows=400))
    found = report["Linear"]
    assert found.recommended_threshold is not None
    assert 4.0 <= found.recommended_threshold <= min(PLANTED.values())
    best = found.at(found.recommended_threshold)
    assert best.columns == 3
    assert best.ordinary_error < 0.02
    assert found.at(0.0).ordinary_error > 20 * best.ordinary_error
    assert found.at(48.0).ordinary_error > 2 * best.ordinary_error
    assert best.objective == min(p.objective for p in found.points)
    assert report.recommended_threshold == found.recommended_threshold
    assert f"recommended threshold {best.threshold:g}" in str(report)


def test_outliers_at_another_scale():
    # As before, but ten times larger: 6 would make an outlier of every column.
    report = find_outliers(nn.Linear(96, 64), 10 * planted(rows=400), cost=0.2)
    assert report["Linear"].at(6.0).columns == 96
    assert 40.0 < report.recommended_threshold <= 200.0


def test_without_outliers_the_paper_s_threshold_is_kept():
    report = find_outliers(nn.Linear(32, 16), torch.rand(50, 32))
    assert report.recommended_threshold == 6.0
    assert report.at(6.0).columns == 0
    assert report.at(6.0).error == report.at(0.0).error > 0


def test_the_ordinary_error_does_not_depend_on_what_is_kept_exact():
    """Columns of ever larger outliers change nothing for the others, above the threshold."""
    layer = nn.Linear(96, 64)
    errors = []
    for magnitude in (10.0, 100.0, 10_000.0):
        x = planted(rows=200)
        x[:, list(PLANTED)] = magnitude
        errors.append(find_outliers(layer, x)["Linear"].at(6.0).ordinary_error)
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-3)
    assert 0.005 < errors[0] < 0.02


def test_cost_trades_columns_for_error():
    x = torch.randn(200, 64) * torch.logspace(0, 2, 64)
    layer = nn.Linear(64, 64)
    columns = []
    for cost in (0.0, 0.01, 0.1, 10.0):
        report = find_outliers(layer, x, cost=cost)
        columns.append(report.at(report.recommended_threshold).columns)
        point = report.at(6.0)
        assert point.objective == pytest.approx(point.ordinary_error + cost * point.columns / 64)
    assert columns == sorted(columns, reverse=True)
    assert columns[0] > columns[-1] == 0


def test_the_model_s_points_are_the_mean_of_the_layers():
    report = find_outliers(Net(), planted())
    for point in report.points:
        layers = [layer.at(point.threshold) for layer in report.values()]
        assert point.error == pytest.approx(sum(p.error for p in layers) / 2)
        assert point.columns == pytest.approx(sum(p.columns for p in layers) / 2)


def test_no_thresholds_no_recommendation():
    report = find_outliers(Net(), planted(), thresholds=())
    assert report.points == ()
    assert report.recommended_threshold is None
    assert report["second"].recommended_threshold is None
    assert "recommended" not in str(report)
    with pytest.raises(KeyError, match="threshold 6 was not tried; the tried ones are none"):
        report.at(6.0)


# ---- the model is left as it was ----------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_and_modes_are_restored(fails: bool):
    model = Net().train()
    model.second.eval()
    model.fails = fails
    model.first.register_forward_pre_hook(lambda module, args: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(ArithmeticError, match="a failing model"):
            find_outliers(model, planted())
    else:
        find_outliers(model, planted())
    assert hooks(model) == 1
    assert model.training
    assert model.first.training
    assert model.drop.training
    assert not model.second.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)  # no dropout was drawn
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_memory_does_not_grow_with_rows(monkeypatch):
    from halfbyte import _outliers

    kept = []
    finish = _outliers._Sums.finish

    def spy(self, *args):
        kept.append(sum(v.numel() for v in vars(self).values() if isinstance(v, Tensor)))
        return finish(self, *args)

    monkeypatch.setattr(_outliers._Sums, "finish", spy)
    for rows in (1, 5000):
        find_outliers(nn.Linear(96, 8), planted(rows=max(rows, 3))[:rows])
    assert kept[0] == kept[1] < 5 * 96 + 9000


def test_a_compiled_model_is_seen_too():
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    x = planted()
    compiled(x)
    assert find_outliers(compiled, x)["second"].columns.tolist() == [17, 95]
    inner = nn.Sequential(torch.compile(Net().eval(), backend="eager"))
    inner(x)
    found = find_outliers(inner, x)
    assert [layer.columns.tolist() for layer in found.values()] == [list(PLANTED), [17, 95]]
    assert hooks(inner) == 0


# ---- which layers -------------------------------------------------------------------------------


def test_include_and_skip():
    model, x = Net(), planted()
    assert list(find_outliers(model, x, include="^sec")) == ["second"]
    assert list(find_outliers(model, x, include=["first", "none"])) == ["first"]
    assert list(find_outliers(model, x, include=lambda name, m: m.out_features == 32)) == ["second"]
    assert list(find_outliers(model, x, skip=["second"])) == ["first"]
    nested = nn.ModuleDict({"lm_head": nn.Linear(96, 4), "body": nn.Linear(96, 4)})
    run = lambda m: (m["lm_head"](x), m["body"](x))  # noqa: E731
    assert list(find_outliers(nested, run)) == ["body"]
    assert list(find_outliers(nested, run, skip=())) == ["lm_head", "body"]


def test_layers_that_were_not_reached_are_named():
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})
    report = find_outliers(model, lambda m: m["a"](torch.ones(2, 8)))
    assert list(report) == ["a"]
    assert report.unused == ("b",)
    assert "1 layers were not reached: b" in str(report)
    with pytest.raises(RuntimeError, match="reached none of the 2 layers"):
        find_outliers(model, lambda m: None)


def test_four_bit_layers():
    source = nn.Linear(96, 64)
    layer = halfbyte.nn.Linear4bit(96, 64, compute_dtype=torch.float32)
    layer.load_state_dict(source.state_dict())
    layer.to(DEVICE)
    x = planted()
    found = find_outliers(layer, x)
    assert found["Linear4bit"].columns.tolist() == list(PLANTED)
    float_points = find_outliers(source, x)["Linear"].points
    for mine, other in zip(found["Linear4bit"].points, float_points, strict=True):
        assert mine.columns == other.columns
        assert mine.error == pytest.approx(other.error, rel=0.3)


def test_eight_bit_layers():
    source = nn.Linear(96, 64)
    layer = halfbyte.nn.Linear8bitLt(96, 64, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(source.state_dict())
    layer.to(DEVICE)
    x = planted()
    float_points = find_outliers(source, x)["Linear"].points
    for _ in range(2):  # before and after the first forward has moved the scales
        found = find_outliers(layer, x)["Linear8bitLt"]
        assert found.columns.tolist() == list(PLANTED)
        for mine, other in zip(found.points, float_points, strict=True):
            assert mine.error == pytest.approx(other.error, rel=0.1)


class FusedExperts(nn.Module):
    """What Transformers makes of experts, with a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 96))
        self.down_proj = nn.Parameter(torch.randn(4, 96, 16))

    def forward(self, hidden_states: Tensor, ids: Tensor) -> Tensor:
        inner = torch.einsum("ti,eoi->teo", hidden_states, self.gate_up_proj).relu()
        every = torch.einsum("teo,eio->tei", inner, self.down_proj)
        return every[torch.arange(len(ids)), ids]


def test_fused_experts():
    ids = torch.arange(40) % 4
    found = find_outliers(FusedExperts(), (planted(), ids))["FusedExperts"]
    assert found.columns.tolist() == list(PLANTED)
    assert found.at(6.0).activation_error < 0.02 * found.at(0.0).activation_error


@pytest.mark.parametrize("name", ["Experts4bit", "Experts8bit"])
def test_quantized_experts(name: str):
    torch.manual_seed(0)
    experts = getattr(halfbyte.nn, name).from_float(torch.randn(4, 16, 96))
    ids = torch.arange(40).view(40, 1) % 4
    found = find_outliers(experts, (planted(), ids))[name]
    assert found.columns.tolist() == list(PLANTED)
    assert found.rows == 40
    assert found.at(6.0).activation_error < 0.02 * found.at(0.0).activation_error


def test_experts_quantized_in_place():
    class Halves(nn.Module):
        """A weight behind a parametrization, as loading in 4 bits leaves it."""

        shape = (4, 16, 96)

        def forward(self, packed: Tensor) -> Tensor:
            return packed.float().view(self.shape)

    experts = FusedExperts()
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().half().flatten())
    nn.utils.parametrize.register_parametrization(experts, "gate_up_proj", Halves(), unsafe=True)
    (found,) = find_outliers(experts, (planted(), torch.arange(40) % 4)).values()
    assert found.in_features == 96
    assert found.columns.tolist() == list(PLANTED)


def test_conv1d():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    layer = transformers.Conv1D(64, 96)
    linear = nn.Linear(96, 64)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    x = planted()
    found = find_outliers(layer, x)["Conv1D"]
    assert found.columns.tolist() == list(PLANTED)
    for mine, other in zip(found.points, find_outliers(linear, x)["Linear"].points, strict=True):
        assert mine.error == pytest.approx(other.error, rel=1e-5)


# ---- how it is shown ----------------------------------------------------------------------------


def test_the_table_and_the_dictionary(tmp_path: Path):
    report = find_outliers(Net(), planted())
    lines = str(report).splitlines()
    assert lines[0] == "2 layers, up to 40 rows each, outliers from 6 on"
    assert lines[1].split()[:4] == ["layer", "outliers", "columns", "max"]
    assert lines[2].split()[:4] == ["first", "3", "96", "1000"]
    assert repr(report).startswith("OutlierReport(2 layers, threshold=6, recommended_threshold=")
    file = tmp_path / "outliers.json"
    text = report.to_json(file, full=True)
    loaded = json.loads(file.read_text())
    assert loaded == json.loads(text)
    first = loaded["layers"]["first"]
    assert first["columns"] == list(PLANTED)
    assert first["magnitudes"] == list(PLANTED.values())
    assert first["all_magnitudes"] == report["first"].magnitudes.tolist()
    assert "all_magnitudes" not in report.to_dict()["layers"]["first"]
    assert loaded["recommended_threshold"] == report.recommended_threshold
    assert list(first["points"][0]) == [
        "threshold",
        "columns",
        "activation_error",
        "error",
        "ordinary_error",
        "objective",
    ]
    assert report.repeated_columns(96) == {17: 2, 95: 2, 3: 1}


def test_the_figure(tmp_path: Path):
    model = nn.ModuleDict({"a<b>": nn.Linear(96, 4), "wide": nn.Linear(700, 4)})
    wide = torch.rand(4, 700)
    wide[1, 699] = 50.0
    run = lambda m: (m["a<b>"](planted()), m["wide"](wide))  # noqa: E731
    report = find_outliers(model, run)
    report.save_svg(tmp_path / "figure.svg")
    tree = ElementTree.parse(tmp_path / "figure.svg").getroot()
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a<b>", "wide", "95", "17", "3", "699"} <= set(texts)
    red = [e for e in tree.iter("{http://www.w3.org/2000/svg}path") if e.get("fill") == "#c0392b"]
    assert [path.get("d").count("M") for path in red] == [3, 1]
    figure = report.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a<b>", "wide"]


def test_plot_without_matplotlib_is_a_clear_error(monkeypatch):
    report = find_outliers(nn.Linear(4, 4), torch.rand(2, 4))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib.*save_svg"):
        report.plot()


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"threshold": 0.0}, ValueError, "threshold must be positive and finite, got 0"),
        ({"threshold": math.nan}, ValueError, "threshold must be positive and finite, got nan"),
        ({"thresholds": (-1.0,)}, ValueError, "thresholds must be finite and not negative, got -1"),
        ({"cost": -0.5}, ValueError, "cost must be finite and not negative, got -0.5"),
        ({"quantiles": (1.5,)}, ValueError, "quantiles must be from 0 to 1, got 1.5"),
        ({"batch": []}, ValueError, "batch must hold at least one batch, got none"),
        ({"batch": 3}, TypeError, "batch must be a tensor, .* got int"),
        ({"batch": [3]}, TypeError, "an item of batch must be a tensor, .* got int"),
        ({"include": "third"}, ValueError, "leave none of the 2 linear layers; they are named fir"),
        ({"model": nn.ReLU()}, ValueError, "expected a model with linear layers, found none in Re"),
    ],
)
def test_refusals(arguments: dict, error: type[Exception], sentence: str):
    arguments = {"model": Net(), "batch": planted(), **arguments}
    with pytest.raises(error, match=sentence):
        find_outliers(**arguments)
    assert hooks(arguments["model"]) == 0


# ---- the command --------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys):
    main = importlib.import_module("halfbyte.__main__").main
    text = tmp_path / "text.txt"
    text.write_text("The borrow checker looks at every reference. " * 20, encoding="utf-8")
    arguments = ["outliers", "--model", str(ROOT / "models" / "rustdoc-llama")]
    arguments += ["--text", str(text), "--tokens", "64", "--window", "32", "--threshold", "4"]
    arguments += ["--json", str(tmp_path / "o.json"), "--figure", str(tmp_path / "o.svg")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("28 layers, up to 64 rows each, outliers from 4 on\n")
    assert "recommended threshold" in out
    assert len(json.loads((tmp_path / "o.json").read_text())["layers"]) == 28
    ElementTree.parse(tmp_path / "o.svg")


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["outliers", "--model", "none", "--text", "none"], 1, "expected a folder, found none"),
        (["outliers", "--model", str(ROOT / "docs"), "--text", "none"], 1, "outliers: "),
        (
            ["unknown"],
            2,
            "expected no argument, or outliers or plan and its options, got 'unknown'",
        ),
    ],
)
def test_the_command_s_refusals(arguments: list[str], status: int, sentence: str, capsys):
    assert importlib.import_module("halfbyte.__main__").main(arguments) == status
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


# ---- upstream's helpers -------------------------------------------------------------------------


def test_find_outlier_dims():
    torch.manual_seed(0)
    weight = torch.randn(64, 48)
    weight[:, 7] *= 20
    weight[:, 30] *= 40
    assert find_outlier_dims(weight, zscore=2.0).tolist() == [7, 30]
    assert find_outlier_dims(weight, topk=2).tolist() == [30, 7]
    assert find_outlier_dims(weight.t(), reduction_dim=1, zscore=2.0).tolist() == [7, 30]
    drawn = find_outlier_dims(weight, topk=5, rdm=True)
    assert drawn.shape == (5,)
    assert drawn.dtype == torch.int64
    assert drawn.max() < 48
    with pytest.raises(ValueError, match="topk must be given"):
        find_outlier_dims(weight, rdm=True)


def test_outlier_tracer():
    with pytest.raises(RuntimeError, match="get_instance"):
        OutlierTracer()
    tracer = OutlierTracer.get_instance()
    assert tracer is OutlierTracer.get_instance()
    model = Net().eval()
    with torch.no_grad():
        model.second.weight[:, 40] *= 100
    tracer.initialize(model)
    assert tracer.is_initialized()
    assert tracer.get_outliers(model.first.weight) is None
    x = planted()
    model(x)
    assert set(PLANTED) <= set(tracer.get_outliers(model.first.weight).tolist())
    assert tracer.get_outliers(model.second.weight).tolist() == [40]
    assert tracer.get_hvalue(model.second.weight) in tracer.hvalue2outlier_idx
    model(x)
    assert hooks(model) == 0
    with pytest.raises(TypeError, match=r"outlier_hook is for nn\.Linear, got ReLU"):
        utils.outlier_hook(nn.ReLU(), (x,))


def test_the_rest_of_utils():
    assert utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"] == 0
    inverse = utils.INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING
    assert {inverse[v]: v for v in inverse} == utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING
    command = f"{sys.executable} -c \"import sys; print('a b '); print('c', file=sys.stderr)\""
    assert utils.execute_and_return(command) == ("a b", "c")
    assert utils.sync_gpu(torch.zeros(1)) is None
    assert list(inspect.signature(utils.find_outlier_dims).parameters) == [
        "weight",
        "reduction_dim",
        "zscore",
        "topk",
        "rdm",
    ]


def test_figures_are_loaded_when_asked_for(python):
    code = "import sys, halfbyte; print(sorted(m for m in sys.modules if 'figures' in m))"
    assert python(code).strip() == "[]"


def test_an_infinity_is_never_left_to_plain_int8():
    layer = torch.nn.Linear(16, 32)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    x[0, 3] = torch.inf
    report = find_outliers(layer, x)
    assert report.recommended_threshold > 0
    assert all(found.recommended_threshold > 0 for found in report.layers.values())
