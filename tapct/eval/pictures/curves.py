"""Pictures of numbers: calibration curves.

matplotlib is imported with the first picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.base import files

_COLUMNS = 4
_INCHES = 3.2
_MOST_TARGETS = 16  # in one picture; results.json has them all


@dataclass(frozen=True)
class CalibrationCurve:
    """A reliability curve as results.json holds it.

    Args:
        confidence: mean predicted probability of each bin; None for an empty bin.
        frequency: share of the scans of each bin for which the prediction is true.
        error: expected calibration error.
    """

    confidence: Sequence[float | None]
    frequency: Sequence[float | None]
    error: float | None


def draw_calibration(path: Path, curves: Mapping[str, Mapping[str, CalibrationCurve]]) -> None:
    """Write one panel per target with a curve per model.

    Args:
        path: PNG file to write; its folder may be missing.
        curves: target -> model -> curve.
    """
    from matplotlib.figure import Figure

    shown = list(curves.items())[:_MOST_TARGETS]
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(columns * _INCHES, rows * _INCHES), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (target, of_model) in zip(panels.flat, shown, strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
        for model, curve in of_model.items():
            pairs = zip(curve.confidence, curve.frequency, strict=True)
            known = [(x, y) for x, y in pairs if x is not None and y is not None]
            error = "" if curve.error is None else f" (ECE {curve.error:.2f})"
            axes.plot(
                *zip(*known, strict=True), "o-", markersize=3, linewidth=1, label=model + error
            )
        axes.set(title=target, xlabel="predicted probability", ylabel="share that is true")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": "tapct"})
