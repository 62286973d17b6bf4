"""Errors of LLM.int8() against float64: the tables and the figure of docs/int8_error.md.

    python bench/int8_error.py            print the tables and draw docs/figures/int8_error.svg
    python bench/int8_error.py --print    only print

The bounds and the mean square error come from tests/python/int8_reference.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))

import halfbyte  # noqa: E402, F401
import int8_reference as ref  # noqa: E402

FIGURE = ROOT / "docs" / "figures" / "int8_error.svg"
ROWS, INNER, OUTER, PLANTED = 64, 1024, 256, 4
MAGNITUDES = [1, 2, 4, 6, 8, 12, 20, 35, 60, 110, 200, 350, 600, 1000]
THRESHOLDS = [0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 12, 20, 40, 60, 80]


def planted(magnitude: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian input ``[64, 1024]`` with four large columns, and a Gaussian weight."""
    rng = np.random.default_rng(1)
    a = rng.standard_normal((ROWS, INNER))
    columns = rng.choice(INNER, PLANTED, replace=False)
    a[:, columns] += magnitude * rng.choice([-1.0, 1.0], PLANTED)
    w = rng.standard_normal((OUTER, INNER)) * 0.02
    return torch.from_numpy(a).float(), torch.from_numpy(w).float()


def measure(a: torch.Tensor, w: torch.Tensor, threshold: float) -> tuple[float, float, float]:
    """Relative error of ``int8_linear``, the one expected, and the worst error over its bound."""
    rows = ref.quantize(ref.array32(w))
    codes, stats = torch.from_numpy(rows.codes), torch.from_numpy(rows.stats)
    y = torch.ops.halfbyte.int8_linear(a, codes, stats, None, threshold)
    x, v = ref.values(a), ref.values(w)
    bound = ref.linear_bound(x, v, None, threshold, a.dtype)
    square = ref.expected_square(x, v, threshold).sum()
    expected = float(np.sqrt(square) / np.linalg.norm(bound.exact))
    return ref.relative(y, bound.exact), expected, bound.worst(y)


def tables() -> tuple[dict[str, list[tuple[float, float]]], list[tuple[float, float, float]]]:
    """Measured and expected error by magnitude and kind, and by threshold."""
    by_magnitude: dict[str, list[tuple[float, float]]] = {"int8": [], "mixed": []}
    print("| magnitude | int8 | threshold 6 | bfloat16, int8 | bfloat16, threshold 6 |")
    print("| --- | --- | --- | --- | --- |")
    for magnitude in MAGNITUDES:
        a, w = planted(magnitude)
        cells = []
        for name, threshold in (("int8", 0.0), ("mixed", 6.0)):
            error, expected, _ = measure(a, w, threshold)
            by_magnitude[name].append((error, expected))
            cells.append(error)
        cells += [measure(a.bfloat16(), w, threshold)[0] for threshold in (0.0, 6.0)]
        print(f"| {magnitude} | " + " | ".join(f"{cell:.2%}" for cell in cells) + " |")
    print()
    print("| threshold | outlier columns | error | expected | largest error over bound |")
    print("| --- | --- | --- | --- | --- |")
    by_threshold = []
    a, w = planted(60)
    for threshold in THRESHOLDS:
        error, expected, worst = measure(a, w, threshold)
        share = int(ref.outlier_mask(ref.values(a), threshold).sum())
        by_threshold.append((threshold, error, expected))
        print(f"| {threshold} | {share} | {error:.2%} | {expected:.2%} | {worst:.3f} |")
    return by_magnitude, by_threshold


def draw(
    by_magnitude: dict[str, list[tuple[float, float]]],
    by_threshold: list[tuple[float, float, float]],
    path: Path,
) -> None:
    """The figure; the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "halfbyte", "svg.fonttype": "none", "font.size": 9})
    canvas, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    colors = {"int8": "#c44e52", "mixed": "#4c72b0"}
    labels = {"int8": "int8 alone", "mixed": "threshold 6"}
    for name, points in by_magnitude.items():
        measured, expected = ([100 * p[i] for p in points] for i in (0, 1))
        left.plot(MAGNITUDES, measured, "o", markersize=3.5, color=colors[name], label=labels[name])
        left.plot(MAGNITUDES, expected, linewidth=1.2, color=colors[name])
    left.axhline(1, color="0.6", linewidth=0.8, linestyle="--")
    left.set(xscale="log", xlabel="magnitude of four columns of 1,024", ylabel="relative error, %")
    left.legend(title="dots measured, lines expected", title_fontsize=8)
    x, measured, expected = zip(*by_threshold, strict=True)
    right.plot(x, [100 * v for v in measured], "o", markersize=3.5, color="0.2", label="measured")
    right.plot(x, [100 * v for v in expected], linewidth=1.2, color="0.2", label="expected")
    right.axhline(1, color="0.6", linewidth=0.8, linestyle="--")
    right.set(xscale="log", xlabel="threshold (magnitude 60)")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, metadata={"Date": None})
    plt.close(canvas)


def main() -> int:
    """Print, and draw unless told not to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--print", action="store_true", help="draw no figure")
    options = parser.parse_args()
    numbers = tables()
    if not options.print:
        draw(*numbers, FIGURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
