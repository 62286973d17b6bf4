"""The table and the figures of an :class:`~.utils.OutlierReport`."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import torch

if TYPE_CHECKING:
    from ._outliers import LayerOutliers, OutlierReport


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.9995 or share == 1 else ">99.9%"


def table(report: OutlierReport) -> str:
    """One line for each layer, and the recommendation."""
    tried = bool(report.points)
    head = ["layer", "outliers", "columns", "max |x|", "99.9 %", "rows", "energy"]
    if tried:
        head += ["error, t=0", f"t={report.threshold:g}", "best t"]
    rows = [head]
    for layer in report.layers.values():
        row = [
            layer.name,
            str(len(layer.columns)),
            str(layer.in_features),
            f"{layer.max:.4g}",
            f"{layer.quantiles[0.999]:.3g}" if 0.999 in layer.quantiles else "",
            _percent(layer.row_share),
            _percent(layer.energy_share),
        ]
        if tried:
            row += [
                f"{100 * layer.at(0.0).error:.2f}%",
                f"{100 * layer.at(report.threshold).error:.2f}%",
                f"{layer.recommended_threshold:g}",
            ]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    count = len(report)
    seen = max(layer.rows for layer in report.layers.values())
    title = f"{count} layer{'s' * (count != 1)}, up to {seen:,} rows each, "
    lines.insert(0, f"{title}outliers from {report.threshold:g} on")
    if tried:
        best = report.at(report.recommended_threshold or 0.0)
        plain = report.at(0.0)
        lines.append(
            f"recommended threshold {best.threshold:g}: mean error {100 * best.error:.2f}% and "
            f"{best.columns:.1f} outlier columns a call; plain int8 {100 * plain.error:.2f}%"
        )
    nonfinite = sum(layer.nonfinite for layer in report.layers.values())
    if nonfinite:
        lines.append(f"{nonfinite:,} elements were infinite or NaN")
    if report.unused:
        names = ", ".join(report.unused[:4]) + (", ..." if len(report.unused) > 4 else "")
        lines.append(f"{len(report.unused)} layers were not reached: {names}")
    return "\n".join(lines)


_BARS = 256
"""Bars of a layer in the figure: of more columns than that each shows the largest of its share."""


def _rows(report: OutlierReport) -> list[tuple[str, LayerOutliers]]:
    """Layers to draw: those in a row that see the same input (q, k and v) are one."""
    out: list[tuple[str, LayerOutliers]] = []
    for layer in report.layers.values():
        if out and torch.equal(out[-1][1].magnitudes, layer.magnitudes):
            out[-1] = (f"{out[-1][0]}, {layer.name.rpartition('.')[2]}", out[-1][1])
        else:
            out.append((layer.name, layer))
    return out


def svg(report: OutlierReport) -> str:
    """The largest magnitude per layer and column: the figure that needs no library."""
    rows = _rows(report)
    layers = [layer for _, layer in rows]
    finite = [m[m.isfinite() & (m > 0)] for m in (layer.magnitudes for layer in layers)]
    largest = max((m.max().item() for m in finite if m.numel()), default=1.0)
    largest = max(largest, report.threshold)
    # The least column that counts: so that one dead column does not flatten all others.
    least = min((m.quantile(0.02).item() for m in finite if m.numel()), default=0.1)
    low = math.floor(math.log10(max(min(least, report.threshold / 2), largest * 1e-5)))
    high = math.log10(largest) + 0.05
    left, right, top, height, gap = 10 + 6 * max(len(name) for name, _ in rows), 190, 44, 22, 6
    width = 640
    total = left + width + right
    bottom = top + len(layers) * (height + gap)

    def level(value: float) -> float:
        """The height of a magnitude above the base line of its layer, in pixels."""
        if value <= 0:
            return 0.0
        return height * min(1.0, max(0.0, (math.log10(value) - low) / (high - low)))

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{bottom + 36}" '
        f'viewBox="0 0 {total} {bottom + 36}" font-family="sans-serif" font-size="10">',
        f'<rect width="{total}" height="{bottom + 36}" fill="white"/>',
        f'<text x="{left}" y="16" font-size="12">Largest magnitude of each column of the input, '
        f"log scale from {10.0**low:g} to {10.0**high:.3g}</text>",
        f'<text x="{left}" y="32" fill="#555">dashed: {report.threshold:g}; '
        "red: outlier columns, the largest with their index</text>",
    ]
    for i, (name, layer) in enumerate(rows):
        base = top + (i + 1) * (height + gap) - gap
        n = layer.in_features
        bars = min(n, _BARS)
        step = width / bars
        cuts = [j * n // bars for j in range(bars + 1)]
        out.append(f'<text x="{left - 6}" y="{base - 6}" text-anchor="end">{escape(name)}</text>')
        tops = [layer.magnitudes[a:b].max().item() for a, b in pairwise(cuts)]
        for above, color in ((False, "#7a9cc6"), (True, "#c0392b")):
            path = ""
            inside = False
            for j, value in enumerate(tops):
                if (value >= report.threshold) == above:
                    path += "" if inside else f"M{left + j * step:.4g} {base}"
                    path += f"V{base - level(value):.1f}h{step:.4g}"
                    inside = True
                elif inside:
                    path += f"V{base}z"
                    inside = False
            path += f"V{base}z" if inside else ""
            if path:
                out.append(f'<path fill="{color}" d="{path}"/>')
        line = base - level(report.threshold)
        out.append(
            f'<path stroke="#333" stroke-width="0.6" stroke-dasharray="3 3" '
            f'd="M{left} {line:.1f}h{width}"/>'
        )
        strongest = layer.columns[layer.outlier_magnitudes.argsort(descending=True)][:3]
        if len(layer.columns) > n // 8:
            strongest = strongest[:0]  # a label among so many would not be read
        placed: list[float] = []
        for column in strongest.tolist():
            x = left + (column + 0.5) * width / n
            if all(abs(x - other) > 24 for other in placed):
                placed.append(x)
                y = base - level(layer.magnitudes[column].item()) + 3
                anchor = "end" if x > left + width - 30 else "start"
                x += -step - 2 if anchor == "end" else step + 2
                out.append(
                    f'<text x="{x:.1f}" y="{y:.1f}" font-size="8" fill="#c0392b" '
                    f'text-anchor="{anchor}">{column}</text>'
                )
        note = f"max {layer.max:.3g}, {len(layer.columns)} of {n}"
        if len(layer.columns):
            note += f", energy {_percent(layer.energy_share)}"
        out.append(f'<text x="{left + width + 8}" y="{base - 6}">{note}</text>')
    out.append(
        f'<text x="{left + width / 2}" y="{bottom + 20}" text-anchor="middle">column (each layer '
        "over the whole width)</text>"
    )
    out.append("</svg>\n")
    return "\n".join(out)


def plot(report: OutlierReport, path: str | Path | None) -> Any:
    """The matplotlib figure, saved to ``path`` if there is one.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib, which is not installed: pip install matplotlib, "
            "or use save_svg(path), which does without"
        ) from error
    rows = _rows(report)
    layers = [layer for _, layer in rows]
    bars = min(_BARS, max(layer.in_features for layer in layers))
    image = torch.zeros(len(layers), bars)
    for i, layer in enumerate(layers):
        # Column j of the layer stands at the same share of the width in every row.
        at = torch.arange(layer.in_features) * bars // layer.in_features
        image[i] = torch.zeros(bars).scatter_reduce(0, at, layer.magnitudes, "amax")
        if layer.in_features < bars:
            image[i] = layer.magnitudes[torch.arange(bars) * layer.in_features // bars]
    shown = image[image.isfinite() & (image > 0)]
    low, high = (shown.min().item(), shown.max().item()) if shown.numel() else (0.1, 1.0)
    image = image.clamp(low, high)
    figure = Figure(figsize=(9, 2.8 + 0.22 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = (max(2, len(layers)), 8)
    upper, lower = figure.subplots(2, 1, height_ratios=ratios)
    drawn = upper.imshow(
        image.tolist(),
        aspect="auto",
        interpolation="nearest",
        norm=LogNorm(low, max(high, low * 1.01)),
        extent=(0, 1, len(layers) - 0.5, -0.5),
    )
    figure.colorbar(drawn, ax=upper, label="largest |x| of the column")
    upper.set_yticks(range(len(layers)), [name for name, _ in rows], fontsize=7)
    upper.set_xlabel("column, as a share of the layer's width")
    upper.set_title(f"Columns of the inputs; outliers from {report.threshold:g} on")
    for i, layer in enumerate(layers):
        if len(layer.columns):
            places = [(column + 0.5) / layer.in_features for column in layer.columns.tolist()]
            upper.plot(places, [i] * len(places), "r|", markersize=5, markeredgewidth=0.6)
    if report.points:
        tried = [point for point in report.points if point.threshold > 0]
        at_threshold = [point.threshold for point in tried]
        errors = [100 * point.error for point in tried]
        lower.axhline(100 * report.at(0.0).error, color="0.6", label="plain int8")
        lower.semilogx(at_threshold, errors, "o-", markersize=3, color="black", label="threshold")
        lower.set_ylabel("estimated error of\nthe output, %")
        lower.set_ylim(bottom=0)
        lower.legend(loc="lower right")
        other = lower.twinx()
        columns = [point.columns for point in tried]
        other.plot(at_threshold, columns, "s:", markersize=3, color="tab:red")
        other.set_ylabel("outlier columns a call", color="tab:red")
        if report.recommended_threshold:
            lower.axvline(report.recommended_threshold, color="tab:green", linewidth=1)
    lower.set_xlabel("threshold; green: the recommended one")
    lower.grid(alpha=0.3)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
