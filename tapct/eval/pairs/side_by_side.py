"""Pictures of two scans side by side: a point and where it was found, and a scan that was moved
onto another one with the outlines of labels.

Axes: Z Y X voxels of a small copy of a scan; N patches; K places; a last axis of 3 is (z, y, x) in
mm from the centre of the scan's first voxel. Slices are shown as in `pictures/drawing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tapct.eval.pairs.correspondence import PatchFrame
from tapct.eval.pairs.thumbnail import Thumbnail
from tapct.eval.pictures import drawing

VIEWS = ("axial", "coronal")
FIXED, MOVED = "#5bc0eb", "#ffb703"  # outlines of the labels of either scan


@dataclass(frozen=True)
class MatchColumn:
    """One model's search in the second scan.

    Args:
        title: model and error.
        scan: second scan.
        frame: patches that were compared.
        similarity_N: similarity of each of them to the point.
        found_K3: places that were found, the best first.
        true_3: true place.
    """

    title: str
    scan: Thumbnail
    frame: PatchFrame
    similarity_N: np.ndarray
    found_K3: np.ndarray
    true_3: np.ndarray


@dataclass(frozen=True)
class LabelledPicture:
    """One column of the picture of a registration.

    Args:
        title: model and result.
        hu_ZYX: HU on the grid of the fixed scan.
        labels_ZYX: labels whose outlines are drawn, on the same grid.
        colour: colour of the outlines.
    """

    title: str
    hu_ZYX: np.ndarray
    labels_ZYX: np.ndarray
    colour: str


def draw_match(
    path: Path, first: Thumbnail, from_3: np.ndarray, name: str, columns: Sequence[MatchColumn]
) -> None:
    """Write a picture of one point: the first scan with the point, then for each model the second
    scan with the similarity map, the place found (cross) and the true place (circle).

    Both slices go through the point, or through the place found. A circle is dashed where the true
    place lies more than 10 mm in front of or behind the slice.

    Args:
        path: PNG file.
        first: first scan.
        from_3: the point in it.
        name: name of the point.
        columns: one per model.
    """
    figure, axes = _figure(first, 1 + len(columns))
    for row, view in enumerate(VIEWS):
        _show_slice(axes[row][0], first, view, from_3, f"{name}, first scan", row)
        _mark(axes[row][0], first, view, from_3, "+")
    for column, one in enumerate(columns, start=1):
        best_3 = one.found_K3[0]
        for row, view in enumerate(VIEWS):
            axis = axes[row][column]
            _show_slice(axis, one.scan, view, best_3, one.title, row)
            _show_similarity(axis, one, view, best_3)
            normal = 0 if view == "axial" else 1
            is_near = abs(one.true_3[normal] - best_3[normal]) <= 10
            _mark(axis, one.scan, view, one.true_3, "o" if is_near else "dashed")
            _mark(axis, one.scan, view, best_3, "x")
    drawing.save(figure, path)


def draw_registration(
    path: Path, fixed: Thumbnail, columns: Sequence[LabelledPicture], at: tuple[int, int]
) -> None:
    """Write a picture of a registration: axial above coronal, one column per scan or model, with
    the outlines of labels.

    Args:
        path: PNG file.
        fixed: fixed scan, which gives the voxel spacing.
        columns: scans on the grid of the fixed scan.
        at: axial and coronal slice.
    """
    figure, axes = _figure(fixed, len(columns))
    spacing = fixed.spacing_mm
    for number, column in enumerate(columns):
        for row, view in enumerate(VIEWS):
            cut = drawing.axial if view == "axial" else drawing.coronal
            axis = axes[row][number]
            picture = drawing.windowed(cut(column.hu_ZYX, at[row]))
            steps = spacing[1:] if view == "axial" else spacing[::2]
            title = column.title if row == 0 else ""
            drawing.show(axis, picture, steps, title, view if number == 0 else "")
            labels = cut(column.labels_ZYX, at[row])
            for value in np.unique(labels[labels > 0]):
                inside = (labels == value).astype(np.float32)
                if min(inside.shape) > 1:
                    axis.contour(inside, levels=[0.5], colors=[column.colour], linewidths=0.8)
    drawing.save(figure, path)


def _figure(scan: Thumbnail, num_columns: int) -> tuple[Any, Any]:
    hu_ZYX, spacing = scan.hu_ZYX, scan.spacing_mm
    views = [
        ("axial", drawing.axial(hu_ZYX, 0), spacing[1:]),
        ("coronal", drawing.coronal(hu_ZYX, 0), spacing[::2]),
    ]
    return drawing.figure_grid(views, num_columns, legend_rows=0)


def _show_slice(
    axis: Any, scan: Thumbnail, view: str, through_3: np.ndarray, title: str, row: int
) -> None:
    z, y, _ = scan.index_of(through_3[None])[0]
    if view == "axial":
        picture, steps = drawing.axial(scan.hu_ZYX, z), scan.spacing_mm[1:]
    else:
        picture, steps = drawing.coronal(scan.hu_ZYX, y), scan.spacing_mm[::2]
    drawing.show(axis, drawing.windowed(picture), steps, title if row == 0 else "", "")


def _show_similarity(axis: Any, one: MatchColumn, view: str, through_3: np.ndarray) -> None:
    """Paint the similarity of the patches in the slice, from its median over the scan on."""
    shape = one.frame.grid.shape
    values = np.full(int(np.prod(shape)), np.nan, dtype=np.float32)
    values[one.frame.kept_N] = one.similarity_N
    values_ZYX = values.reshape(shape)
    index = np.rint(one.frame.to_patches(through_3)).astype(int).clip(0, np.array(shape) - 1)
    low, high = float(np.nanmedian(values)), float(np.nanmax(values))
    if view == "axial":
        picture, axes = values_ZYX[index[0]], (1, 2)
    else:
        picture, axes = values_ZYX[:, index[1]], (0, 2)
    share = np.clip((picture - low) / max(high - low, 1e-6), 0, 1)
    # edges of the first and the last patch, in voxels of the small copy
    corners = one.frame.to_mm(np.array([[-0.5] * 3, np.array(shape) - 0.5])) / one.scan.spacing_mm
    left, right = corners[:, axes[1]]
    top, bottom = corners[:, axes[0]]
    if view == "coronal":  # the head is on top
        last = one.scan.hu_ZYX.shape[0] - 1
        top, bottom = last - top, last - bottom
    limits = axis.get_xlim(), axis.get_ylim()
    axis.imshow(
        share,
        cmap="inferno",
        alpha=np.where(np.isfinite(share), 0.15 + 0.55 * np.nan_to_num(share), 0.0),
        extent=(left, right, bottom, top),
        aspect=axis.get_aspect(),
        interpolation="nearest",
        vmin=0,
        vmax=1,
    )
    axis.set_xlim(limits[0])
    axis.set_ylim(limits[1])


def _mark(axis: Any, scan: Thumbnail, view: str, mm_3: np.ndarray, kind: str) -> None:
    z, y, x = mm_3 / np.array(scan.spacing_mm)
    across = y if view == "axial" else scan.hu_ZYX.shape[0] - 1 - z
    if kind in ("o", "dashed"):
        from matplotlib.patches import Ellipse

        # a circle of 10 mm radius on the patient
        steps = scan.spacing_mm[1:] if view == "axial" else scan.spacing_mm[::2]
        axis.add_patch(
            Ellipse(
                (x, across),
                20 / steps[1],
                20 / steps[0],
                fill=False,
                edgecolor="white",
                linewidth=1.5,
                zorder=3,
                linestyle="-" if kind == "o" else "--",
            )
        )
        return
    axis.plot([x], [across], kind, color="#00e5ff", markersize=9, markeredgewidth=1.6)
