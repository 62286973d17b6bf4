"""Which columns of a model's activations are too large for int8, and from which threshold on.

LLM.int8() rounds a row of activations to 255 steps of its largest magnitude. One column of 60
among columns of 1 leaves those 4 steps; a threshold takes such columns out (docs/int8.md).
:func:`find_outliers` runs a model on a sample of its data and measures what each linear layer
gets to see.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

THRESHOLDS = (
    0.0,
    1.0,
    2.0,
    3.0,
    4.0,
    5.0,
    6.0,
    8.0,
    10.0,
    12.0,
    16.0,
    24.0,
    32.0,
    48.0,
    64.0,
    128.0,
)
"""The thresholds that are tried unless others are given; 0 is plain int8."""

QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)

_PAPER = 6.0
"""The threshold of the LLM.int8() paper: ties between thresholds go to the one nearest to it."""

_CHUNK = 1 << 17
"""Elements of an activation that are looked at together: bounds the memory of the analysis."""

# Magnitudes are counted by the top bits of their float32 pattern: exponent and five bits of the
# fraction, so that the middle of a bin is within 1/64 of every value in it.
_BIN_SHIFT = 18
_BINS = 1 << (31 - _BIN_SHIFT)

Batch = Any
Include = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class ThresholdPoint:
    """What a threshold would do to a layer, or to the mean of all layers."""

    threshold: float
    columns: float
    """Outlier columns of a forward call, on average over rows."""

    activation_error: float
    """Relative error of the output that the rounding of the activations makes."""

    error: float
    """The same with the rounding of the weight."""

    ordinary_error: float
    """``error`` if every column had the energy of an ordinary one; 1 when all is lost."""

    objective: float
    """``ordinary_error + cost * columns / in_features``."""


@dataclass(frozen=True, eq=False)
class LayerOutliers:
    """What one layer's input looked like.

    Attributes:
        name: the qualified name of the module; its class's name for the model itself.
        kind: the name of its class.
        in_features: columns of the input.
        calls: how often the layer ran.
        rows: rows (tokens) of all its inputs together.
        threshold: what ``columns`` and the shares are about.
        columns: int64 ``[outliers]``, ascending: where any ``|x| >= threshold``.
        magnitudes: float32 ``[in_features]``: the largest ``|x|`` of each column. Infinities
            count, NaN does not.
        column_rows: float64 ``[in_features]``: the share of rows that exceed in each column.
        row_share: the share of rows with any outlier.
        energy_share: the sum of ``x**2`` in outlier columns over that in all; infinities and NaN
            are left out of both.
        rms: the root of the mean of ``x**2``.
        quantiles: of ``|x|``, each within 1.6 %.
        nonfinite: how many elements were infinite or NaN.
        points: what each tried threshold would do, ascending; empty if none was tried.
        recommended_threshold: the one whose objective is least, None if none was tried.
    """

    name: str
    kind: str
    in_features: int
    calls: int
    rows: int
    threshold: float
    columns: Tensor
    magnitudes: Tensor
    column_rows: Tensor
    row_share: float
    energy_share: float
    rms: float
    quantiles: dict[float, float]
    nonfinite: int
    points: tuple[ThresholdPoint, ...] = ()
    recommended_threshold: float | None = None

    @property
    def outlier_magnitudes(self) -> Tensor:
        """float32 ``[outliers]``: the largest ``|x|`` of each outlier column."""
        return self.magnitudes[self.columns]

    @property
    def max(self) -> float:
        """The largest ``|x|``; 0 for an input without rows."""
        return self.magnitudes.max().item() if self.rows else 0.0

    def at(self, threshold: float) -> ThresholdPoint:
        """The point of one of the tried thresholds.

        Raises:
            KeyError: when it was not tried.
        """
        return _point_at(self.points, threshold)

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """Plain numbers and lists; with ``full`` the magnitudes of all columns too."""
        out: dict[str, Any] = {
            "kind": self.kind,
            "in_features": self.in_features,
            "calls": self.calls,
            "rows": self.rows,
            "columns": self.columns.tolist(),
            "magnitudes": self.outlier_magnitudes.tolist(),
            "column_rows": self.column_rows[self.columns].tolist(),
            "row_share": self.row_share,
            "energy_share": self.energy_share,
            "rms": self.rms,
            "max": self.max,
            "quantiles": {str(q): value for q, value in self.quantiles.items()},
            "nonfinite": self.nonfinite,
            "recommended_threshold": self.recommended_threshold,
            "points": [vars(point) for point in self.points],
        }
        if full:
            out["all_magnitudes"] = self.magnitudes.tolist()
        return out


@dataclass(frozen=True, eq=False, repr=False)
class OutlierReport(Mapping[str, LayerOutliers]):
    """What :func:`find_outliers` found: layers by name, in the model's order.

    Attributes:
        threshold: what counts as an outlier.
        cost: the price of sending every column through the exact path, as a relative error.
        layers: by name.
        unused: names of layers that the batch never reached.
        points: the mean over layers of what each tried threshold would do.
        recommended_threshold: the one whose mean objective is least: what to give as
            ``llm_int8_threshold``. None if no threshold was tried.
    """

    threshold: float
    cost: float
    layers: dict[str, LayerOutliers]
    unused: tuple[str, ...] = ()
    points: tuple[ThresholdPoint, ...] = ()
    recommended_threshold: float | None = None

    def __getitem__(self, name: str) -> LayerOutliers:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def at(self, threshold: float) -> ThresholdPoint:
        """The mean over layers at one of the tried thresholds.

        Raises:
            KeyError: when it was not tried.
        """
        return _point_at(self.points, threshold)

    def repeated_columns(self, in_features: int) -> dict[int, int]:
        """Outlier columns of the layers of a width, and in how many of them each is one.

        The columns of a residual stream come back in layer after layer: most frequent first.
        """
        counts: dict[int, int] = {}
        for layer in self.layers.values():
            if layer.in_features == in_features:
                for column in layer.columns.tolist():
                    counts[column] = counts.get(column, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries; ``full`` as in :meth:`LayerOutliers.to_dict`."""
        return {
            "threshold": self.threshold,
            "cost": self.cost,
            "recommended_threshold": self.recommended_threshold,
            "points": [vars(point) for point in self.points],
            "unused": list(self.unused),
            "layers": {name: layer.to_dict(full) for name, layer in self.layers.items()},
        }

    def to_json(self, path: str | Path | None = None, full: bool = False) -> str:
        """:meth:`to_dict` as JSON, infinities as null; written to ``path`` if there is one."""
        text = json.dumps(_finite(self.to_dict(full)), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def __str__(self) -> str:
        from . import _outlier_figures as figures

        return figures.table(self)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} layers, threshold={self.threshold:g}, "
            f"recommended_threshold={self.recommended_threshold})"
        )

    def svg(self) -> str:
        """A figure of the largest magnitude per layer and column, as SVG text."""
        from . import _outlier_figures as figures

        return figures.svg(self)

    def save_svg(self, path: str | Path) -> None:
        """Writes :meth:`svg` to a file."""
        Path(path).write_text(self.svg(), encoding="utf-8")

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure: magnitude per layer and column, and error against threshold.

        Args:
            path: where to save it too, in any format that matplotlib writes.

        Raises:
            ImportError: when matplotlib is not installed; :meth:`save_svg` does without.
        """
        from . import _outlier_figures as figures

        return figures.plot(self, path)


def _point_at(points: Sequence[ThresholdPoint], threshold: float) -> ThresholdPoint:
    for point in points:
        if point.threshold == threshold:
            return point
    tried = ", ".join(f"{point.threshold:g}" for point in points) or "none"
    raise KeyError(f"threshold {threshold:g} was not tried; the tried ones are {tried}")


def _finite(value: Any) -> Any:
    """A copy in which infinities and NaN are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


# ---- what is summed while the model runs --------------------------------------------------------


def _weight_sums(module: nn.Module, in_features: int) -> tuple[Tensor, Tensor] | None:
    """What the layer's weight w ``[out, in]`` does to errors, or None where it is not at hand.

    Returns:
        the sum over n of ``w[n, j]**2``, and that of the square of the error that int8 rounding
        makes in ``w[n, j]``; float64 ``[in]`` both. (Of a weight that is int8 already, the error
        to be expected: a twelfth of the square of a step.)
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = next(iter(_expert_weights(module)), None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    scales: Tensor | None = None
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from . import functional as F

        weight = F.dequantize_4bit(weight.detach(), state)
    elif weight.dtype == torch.int8:
        held = getattr(module, "state", None)
        scales = getattr(weight, "SCB", None)
        scales = getattr(held, "SCB", None) if scales is None else scales
        if scales is None and _is_experts(module):
            scales = getattr(module, "SCB", None)
        if scales is None:
            return None
    elif not weight.is_floating_point():
        return None
    if type(module).__name__ == "Conv1D":
        weight = weight.t()
    weight = weight.detach().reshape(-1, weight.shape[-1])
    if weight.shape[1] != in_features:
        return None
    energy = torch.zeros(in_features, dtype=torch.float64, device=weight.device)
    rounding = torch.zeros_like(energy)
    step = max(1, _CHUNK // in_features)
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].float()
        if scales is None:
            rounding += _rounded(rows).sub_(rows).square_().sum(0)
        else:
            steps = scales.reshape(-1, 1)[start : start + step].float() / 127
            # The largest of a row is exact.
            rounding += ((rows.abs() < 127) * (steps.square() / 12)).sum(0)
            rows = rows * steps
        energy += rows.square().sum(0)
    return energy, rounding


def _rounded(rows: Tensor, stats: Tensor | None = None) -> Tensor:
    """int8 and back by rows: codes of at most 127, ``stats`` ``[rows, 1]`` the magnitude of 127
    (by default each row's largest)."""
    if stats is None:
        stats = rows.abs().amax(1, keepdim=True)
    scale = torch.where(stats > 0, 127 / stats, 0.0).clamp_(max=torch.finfo(rows.dtype).max)
    return (rows * scale).round_().clamp_(-127, 127).mul_(stats / 127)


@dataclass
class _Sums:
    """The running statistics of a layer: O(columns), whatever the number of rows."""

    name: str
    module: nn.Module
    in_features: int
    threshold: float
    thresholds: tuple[float, ...]
    calls: int = 0
    rows: int = 0
    row_hits: int = 0
    nonfinite: int = 0
    magnitudes: Tensor = field(default_factory=lambda: torch.zeros(0))
    energy: Tensor = field(default_factory=lambda: torch.zeros(0))
    hits: Tensor = field(default_factory=lambda: torch.zeros(0))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0))
    gain: Tensor = field(default_factory=lambda: torch.zeros(0))
    weight_rounding: Tensor = field(default_factory=lambda: torch.zeros(0))
    output: float | None = None
    errors: list[float] = field(default_factory=list)
    columns: list[float] = field(default_factory=list)

    def _begin(self, device: torch.device) -> None:
        n = self.in_features
        self.magnitudes = torch.zeros(n, dtype=torch.float64, device=device)
        self.energy = torch.zeros(n, dtype=torch.float64, device=device)
        self.hits = torch.zeros(n, dtype=torch.int64, device=device)
        self.counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self.errors = [0.0] * len(self.thresholds)
        self.columns = [0.0] * len(self.thresholds)
        sums = _weight_sums(self.module, n) if self.thresholds else None
        if sums is None:
            # A weight of independent columns of the same length, taken as exact.
            self.gain = torch.ones(n, dtype=torch.float64, device=device)
            self.weight_rounding = torch.zeros_like(self.gain)
        else:
            self.gain, self.weight_rounding = (part.to(device) for part in sums)

    def add(self, a: Tensor) -> None:
        """Counts one input ``[..., in_features]`` of any float dtype."""
        a = a.detach().reshape(-1, self.in_features)
        if self.calls == 0:
            self._begin(a.device)
        elif a.device != self.magnitudes.device:
            a = a.to(self.magnitudes.device)
        self.calls += 1
        self.rows += a.shape[0]
        if a.numel() == 0:
            return
        here = torch.zeros_like(self.magnitudes)
        for chunk in _chunks(a):
            here = torch.maximum(here, self._count(chunk))
        self.magnitudes = torch.maximum(self.magnitudes, here)
        if not self.thresholds:
            return
        largest = here.max().item()
        # From the first threshold above everything on all are plain int8, as 0 is.
        tried = sorted({t if 0 < t <= largest else math.inf for t in self.thresholds})
        lost = dict.fromkeys(tried, 0.0)
        for chunk in _chunks(a):
            x = _magnitude(chunk).nan_to_num_(nan=0.0, posinf=0.0)
            for t in tried:
                lost[t] += _rounding_loss(x, t, torch.where(here < t, self.gain, 0.0))
        for i, t in enumerate(self.thresholds):
            self.errors[i] += lost.get(t, lost[math.inf])
            if t in lost:
                self.columns[i] += a.shape[0] * int((here >= t).sum())

    def _count(self, chunk: Tensor) -> Tensor:
        """Counts some rows, and returns the largest magnitude of each column, float64."""
        x = _magnitude(chunk)
        if not x.sum().isfinite():
            self.nonfinite += int((~x.isfinite()).sum())
            x.nan_to_num_(nan=0.0, posinf=math.inf)
        largest = x.amax(0)
        if largest.max() >= self.threshold:
            exceeds = x >= self.threshold
            self.hits += exceeds.sum(0)
            self.row_hits += int(exceeds.any(1).sum())
        if not largest.isfinite().all():
            x.nan_to_num_(posinf=0.0)
        bits = x.float().view(torch.int32) >> _BIN_SHIFT
        self.counts += torch.bincount(bits.flatten(), minlength=_BINS)
        self.energy += x.square_().sum(0)
        return largest.double()

    def add_output(self, y: Tensor) -> None:
        """Adds up the energy of an output ``[..., out_features]``, its bias taken off."""
        y = y.detach().reshape(-1, y.shape[-1])
        bias = getattr(self.module, "bias", None)
        step = max(1, _CHUNK // max(1, y.shape[1]))
        total = self.output or 0.0
        for start in range(0, y.shape[0], step):
            rows = y[start : start + step].float()
            if isinstance(bias, Tensor) and bias.numel() == y.shape[1]:
                rows = rows - bias.detach().float()
            rows = rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            total += rows.square().sum(dtype=torch.float64).item()
        self.output = total

    def finish(self, quantiles: Sequence[float], cost: float) -> LayerOutliers:
        magnitudes = self.magnitudes.cpu()
        energy = self.energy.cpu()
        columns = (magnitudes >= self.threshold).nonzero().flatten()
        whole = energy.sum().item()
        elements = self.rows * self.in_features
        points = self._points(cost)
        return LayerOutliers(
            name=self.name,
            kind=type(self.module).__name__,
            in_features=self.in_features,
            calls=self.calls,
            rows=self.rows,
            threshold=self.threshold,
            columns=columns,
            magnitudes=magnitudes.float(),
            column_rows=self.hits.cpu().double() / max(1, self.rows),
            row_share=self.row_hits / max(1, self.rows),
            energy_share=energy[columns].sum().item() / whole if whole else 0.0,
            rms=math.sqrt(whole / max(1, elements - self.nonfinite)),
            quantiles=_quantiles(self.counts.cpu(), self.nonfinite, magnitudes, quantiles),
            nonfinite=self.nonfinite,
            points=points,
            recommended_threshold=_best(points, bool(magnitudes.isinf().any())),
        )

    def _points(self, cost: float) -> tuple[ThresholdPoint, ...]:
        columns_energy = self.energy * self.gain
        signal = columns_energy.sum().item() if self.output is None else self.output
        weight = torch.dot(self.energy, self.weight_rounding).item()
        alive = columns_energy > 0
        ordinary = ordinary_weight = 0.0
        if alive.any():
            ordinary = self.in_features * columns_energy[alive].median().item()
            rounding = (self.energy * self.weight_rounding)[alive]
            ordinary_weight = self.in_features * rounding.median().item()

        def relative(lost: float, whole: float) -> float:
            return math.sqrt(lost / whole) if whole else 0.0

        out = []
        for threshold, lost, columns in zip(
            self.thresholds, self.errors, self.columns, strict=True
        ):
            columns /= max(1, self.rows)
            loss = min(1.0, relative(lost + ordinary_weight, ordinary))
            out.append(
                ThresholdPoint(
                    threshold,
                    columns,
                    relative(lost, signal),
                    relative(lost + weight, signal),
                    loss,
                    loss + cost * columns / self.in_features,
                )
            )
        return tuple(out)


def _chunks(a: Tensor) -> Iterator[Tensor]:
    step = max(1, _CHUNK // a.shape[1])
    return (a[start : start + step] for start in range(0, a.shape[0], step))


def _magnitude(a: Tensor) -> Tensor:
    """``|a|`` in float32, or float64 if that is what it is in; always a copy."""
    return (a if a.dtype == torch.float64 else a.float()).abs()


def _rounding_loss(x: Tensor, threshold: float, gain: Tensor) -> float:
    """The sum over elements of ``gain[j] * d[m, j]**2`` for magnitudes ``x`` ``[rows, columns]``.

    The sign does not matter: the codes of -x are those of x, negated.
    """
    stats = x.amax(1, keepdim=True)
    if stats.max() >= threshold:
        # hardshrink keeps what is above its bound, here what is not below the threshold.
        below = torch.nextafter(
            torch.tensor(threshold, dtype=x.dtype), torch.zeros((), dtype=x.dtype)
        )
        stats = (x - nn.functional.hardshrink(x, below.item())).amax(1, keepdim=True)
    squares = _rounded(x, stats).sub_(x).square_()
    return torch.mv(squares, gain.to(x.dtype)).sum(dtype=torch.float64).item()


def _quantiles(
    counts: Tensor, left_out: int, magnitudes: Tensor, wanted: Sequence[float]
) -> dict[float, float]:
    """The middle of the bin that holds each quantile, no more than the largest finite value."""
    # Non-finite elements were counted as zeros.
    counts = counts.clone()
    counts[0] -= left_out
    total = int(counts.sum())
    if total <= 0:
        return dict.fromkeys(wanted, 0.0)
    reached = counts.cumsum(0)
    edges = (torch.arange(_BINS + 1, dtype=torch.int32)[:-1] << _BIN_SHIFT).view(torch.float32)
    top = magnitudes.max().item()
    out = {}
    for q in wanted:
        index = int(torch.searchsorted(reached, max(1, math.ceil(q * total))))
        low, high = edges[index].item(), edges[min(index + 1, _BINS - 1)].item()
        out[q] = 0.0 if index == 0 else min((low + high) / 2, top)
    return out


def _best(points: Sequence[ThresholdPoint], infinite: bool) -> float | None:
    """The least objective; of those within 0.1 % of it the one nearest to 6, then the larger. With
    infinities in the input, 0 is out: plain int8 loses the rows that hold them."""
    points = [point for point in points if point.threshold > 0 or not infinite]
    if not points:
        return None
    least = min(point.objective for point in points)
    ties = [point.threshold for point in points if point.objective <= least * 1.001]

    def distance(threshold: float) -> float:
        return abs(math.log(threshold / _PAPER)) if threshold > 0 else math.inf

    return min(ties, key=lambda threshold: (distance(threshold), -threshold))


def _mean_points(layers: Sequence[LayerOutliers]) -> tuple[ThresholdPoint, ...]:
    out = []
    for same in zip(*(layer.points for layer in layers), strict=True):
        n = len(same)
        out.append(
            ThresholdPoint(
                same[0].threshold,
                sum(point.columns for point in same) / n,
                sum(point.activation_error for point in same) / n,
                sum(point.error for point in same) / n,
                sum(point.ordinary_error for point in same) / n,
                sum(point.objective for point in same) / n,
            )
        )
    return tuple(out)


# ---- running the model --------------------------------------------------------------------------


def _is_experts(module: nn.Module) -> bool:
    """Whether the class is named after experts, as Transformers' fused ones and ours are."""
    return "expert" in type(module).__name__.lower() and not isinstance(module, nn.Linear)


def _expert_weights(module: nn.Module) -> Iterator[Tensor]:
    """The weights of fused experts ``[experts, out, in]``, as Transformers lays them out: direct
    3-D parameters. Those that are quantized in place (parametrized) are not among them."""
    if _is_experts(module):
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3:
                transposed = getattr(module, "is_transposed", False)
                yield parameter.transpose(1, 2) if transposed else parameter


def _expert_width(module: nn.Module) -> int | None:
    """The columns of the input of fused experts: those of their first weight."""
    if not _is_experts(module):
        return None
    in_features = getattr(module, "in_features", None)
    if isinstance(in_features, int):
        return in_features  # Experts4bit, Experts8bit
    for held in getattr(module, "parametrizations", {}).values():
        shape = getattr(held[0], "shape", held.original.shape)
        if len(shape) == 3:
            return int(shape[-1])
    return next((weight.shape[-1] for weight in _expert_weights(module)), None)


def _width(module: nn.Module) -> int | None:
    """The columns of the input, None for a module that is not a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(cast(Tensor, module.weight).shape[0])
    return _expert_width(module)


def _chosen(include: Include, name: str, module: nn.Module) -> bool:
    if include is None:
        return True
    if callable(include):
        return bool(include(name, module))
    patterns = (include,) if isinstance(include, str) else tuple(include)
    return any(re.search(pattern, name) for pattern in patterns)


def _layers(
    model: nn.Module, include: Include, skip: Iterable[str]
) -> list[tuple[str, nn.Module, int]]:
    skipped = (skip,) if isinstance(skip, str) else tuple(skip)
    every = []
    for name, module in model.named_modules():
        width = _width(module)
        if width is not None and width > 0:
            every.append((name or type(module).__name__, module, width))
    if not every:
        raise ValueError(
            f"expected a model with linear layers, found none in {type(model).__name__}"
        )
    found = [
        (name, module, width)
        for name, module, width in every
        if not any(f".{part}." in f".{name}." for part in skipped)
        and _chosen(include, name, module)
    ]
    if not found:
        some = ", ".join(name for name, _, _ in every[:6])
        raise ValueError(
            f"include and skip leave none of the {len(every)} linear layers; "
            f"they are named {some}{', ...' if len(every) > 6 else ''}"
        )
    return found


def _batches(batch: Batch) -> Iterator[Any]:
    """The calls that a batch stands for: itself, or its items if it is a collection of batches."""
    if isinstance(batch, (Mapping, Tensor, tuple)) or callable(batch):
        yield batch
    elif isinstance(batch, Iterable):
        yield from batch
    else:
        raise TypeError(
            "batch must be a tensor, a tuple, a mapping, a callable or an iterable of these, "
            f"got {type(batch).__name__}"
        )


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    elif callable(batch):
        batch(model)
    else:
        raise TypeError(
            "an item of batch must be a tensor, a tuple, a mapping or a callable, "
            f"got {type(batch).__name__}"
        )


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value:g}")
    return value


def find_outliers(
    model: nn.Module,
    batch: Batch,
    threshold: float = 6.0,
    *,
    include: Include = None,
    skip: Iterable[str] = ("lm_head",),
    thresholds: Sequence[float] = THRESHOLDS,
    cost: float = 0.1,
    quantiles: Sequence[float] = QUANTILES,
) -> OutlierReport:
    """Measures the inputs of a model's linear layers, and what thresholds would do to them.

    The model runs in eval mode, without gradients, on every batch. Afterwards it is as it was, also
    when it raises: no hook is left and every module is back in its mode. Statistics are kept per
    column, never per row: 64 KiB and a few numbers per column for each layer.

    Layers are ``nn.Linear`` and its subclasses (those of this package among them), GPT-2's
    ``Conv1D``, and modules of fused experts, whose input is that of their first product (the input
    of the second never leaves the module; weights of experts that Transformers has quantized in
    place are taken as exact, with columns of one length). A layer that is quantized already gives
    what its input looks like now.

    The recommendation: for each of ``thresholds`` t, every input ``a`` is quantized by the rule of
    ``int8_vectorwise_quant`` (outlier columns are those of the call at hand), giving errors
    ``d = a - dequantized``, which are zero in outlier columns. With ``c[j] = sum_n w[n, j]**2``
    and ``e[j]`` the same sum over the errors of the weight in int8::

        signal      = sum_mn (y[m, n] - bias[n])**2          (the layer's own output)
        lost(t)     = sum_mj c[j] * d[m, j]**2               (rounding of the activations)
        weight      = sum_mj e[j] * a[m, j]**2               (rounding of the weight)
        error(t)    = sqrt((lost(t) + weight) / signal)
        ordinary(t) = min(1, sqrt((lost(t) + weight') / signal'))
        objective   = ordinary(t) + cost * columns(t) / in_features

    ``error`` estimates ``||y_int8 - y|| / ||y||`` of the layer's output before its bias, rounding
    errors being independent. (For fused experts, whose products are not seen, ``signal`` is
    ``sum_mj c[j] * a[m, j]**2``.) An output that one column dominates hides in it what the others
    lose, which is what spoils a model; so the objective measures by the ordinary column:
    ``signal'`` and ``weight'`` are ``in_features`` times the medians over columns of
    ``c[j] * sum_m a[m, j]**2`` and ``e[j] * sum_m a[m, j]**2``. ``columns`` is the number of
    outlier columns of a call.
    The recommended threshold has the least objective, of the layer or in the mean over
    layers. Where several are within 0.1 % the one nearest to 6, the paper's, is taken: with no
    outlier in the sample it costs nothing, and it is there for the one that was not in it.

    Args:
        model: any module, quantized or not, on any device.
        batch: what to run it on: a mapping (keyword arguments), a tensor, a tuple (positional
            arguments), a callable that is given the model, or any other iterable of these (a
            list, a generator, a DataLoader). Tensors must be on the model's device.
        threshold: magnitude from which on an element makes its column an outlier.
        include: regular expressions searched for in the names of layers, one or several, or a
            function of name and module. All layers by default.
        skip: names, or parts of names between dots, of layers to leave out. By default the head,
            which Transformers leaves in 16 bits too.
        thresholds: what to try for the recommendation; 0 (plain int8) and ``threshold`` are always
            among them. Empty: none, which is the greater part of the analysis's time saved.
        cost: the ``ordinary`` error that you would take on rather than have every column of a
            layer go through the exact path. 0.1: one more column in a hundred must lower it by
            0.001.
        quantiles: of magnitudes, from 0 to 1.

    Returns:
        a mapping from names to :class:`LayerOutliers`, that prints as a table and plots itself.

    Raises:
        ValueError: when no layer is left to measure, there is no batch, ``threshold`` is not
            positive, ``cost`` or one of ``thresholds`` is negative, or a quantile is not in 0..1.
        RuntimeError: when the batches reached none of the layers.
        TypeError: when a batch is none of the above.
        Exception: whatever the model raises.
    """
    threshold = _positive("threshold", threshold)
    tried = sorted({float(t) for t in thresholds} | ({0.0, threshold} if thresholds else set()))
    for t in tried:
        if not 0 <= t < math.inf:
            raise ValueError(f"thresholds must be finite and not negative, got {t:g}")
    if not 0 <= cost < math.inf:
        raise ValueError(f"cost must be finite and not negative, got {cost:g}")
    for q in quantiles:
        if not 0 <= q <= 1:
            raise ValueError(f"quantiles must be from 0 to 1, got {q:g}")

    # The forward of a compiled module does not run hooks that are added later.
    model = getattr(model, "_orig_mod", model)
    sums = [
        _Sums(name, module, width, threshold, tuple(tried))
        for name, module, width in _layers(model, include, skip)
    ]
    modes = [(module, module.training) for module in model.modules()]
    ran = 0
    with ExitStack() as stack:
        stack.callback(_set_modes, modes)
        for layer in sums:
            hook = layer.module.register_forward_pre_hook(_input_hook(layer), with_kwargs=True)
            stack.callback(hook.remove)
            if tried and not _is_experts(layer.module):
                hook = layer.module.register_forward_hook(_output_hook(layer))
                stack.callback(hook.remove)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        model.eval()
        for item in _batches(batch):
            _call(model, item)
            ran += 1
    if ran == 0:
        raise ValueError("batch must hold at least one batch, got none")
    reached = [layer for layer in sums if layer.calls]
    if not reached:
        raise RuntimeError(f"the batches reached none of the {len(sums)} layers that were watched")
    layers = [layer.finish(quantiles, cost) for layer in reached]
    points = _mean_points(layers)
    return OutlierReport(
        threshold=threshold,
        cost=cost,
        layers={layer.name: layer for layer in layers},
        unused=tuple(layer.name for layer in sums if not layer.calls),
        points=points,
        recommended_threshold=_best(points, any(math.isinf(layer.max) for layer in layers)),
    )


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _output_hook(layer: _Sums) -> Callable[..., None]:
    def observe(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.dim():
            layer.add_output(output)

    return observe


def _input_hook(layer: _Sums) -> Callable[..., None]:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                if value.dim() and value.shape[-1] == layer.in_features:
                    layer.add(value)
                return

    return observe


__all__ = ["LayerOutliers", "OutlierReport", "ThresholdPoint", "find_outliers"]
