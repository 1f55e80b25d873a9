"""Pictures of an evaluation: organ overlays beside the truth, and patch features as colours.

Axes: Z Y X voxels of the scan as read (LPS, z grows towards the head); D channels; C colour
components. Axial slices are shown as radiologists view them: patient's right on the left, front on
top. Coronal slices have the head on top.

matplotlib is imported with the first picture: every rank of a training run imports this file and
draws nothing.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tapct.base import files
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.pictures.volumes import side_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Colour = tuple[float, float, float]
LEVEL_HU, WIDTH_HU = 40.0, 400.0  # the soft-tissue window of abdominal reading
_INK, _PAPER, _MUTED = "#e8eaed", "#111418", "#9aa0a6"
# organs that occur in most label sets keep their colour from run to run
_KNOWN = {
    "liver": "#c96a4a",
    "spleen": "#9b6fd0",
    "kidney_right": "#f2c14e",
    "kidney_left": "#f29e4c",
    "kidneys": "#f2c14e",
    "aorta": "#ef476f",
    "lung": "#5bc0eb",
    "lungs": "#5bc0eb",
    "lung_right": "#5bc0eb",
    "lung_left": "#3d8fd1",
    "vertebrae": "#e9e4d0",
    "ribs": "#9fd356",
    "heart": "#d7263d",
    "stomach": "#2ec4b6",
    "pancreas": "#ffd6a5",
    "bladder": "#70c1b3",
    "lesion": "#ff2e93",
    "lesions": "#ff2e93",
}
_MOST_IN_LEGEND = 28
_PANEL_INCHES = 2.3


@dataclass(frozen=True)
class Panel:
    """One column of a picture: a title and class indices (Z, Y, X) painted over the scan; None
    paints nothing.
    """

    title: str
    classes_ZYX: np.ndarray | None


def colours(organs: Sequence[str]) -> dict[str, Colour]:
    """A colour per organ: the known ones fixed, the rest spread over hues by position."""
    chosen: dict[str, Colour] = {}
    for position, organ in enumerate(organs):
        fixed = _KNOWN.get(organ.lower())
        known = _rgb(fixed) if fixed else None
        if known and known not in chosen.values():
            chosen[organ] = known
        else:  # golden-ratio steps keep neighbours in the list apart
            chosen[organ] = colorsys.hls_to_rgb(
                (0.09 + 0.618034 * position) % 1, (0.58, 0.7, 0.46)[position % 3], 0.7
            )
    return chosen


def hex_colours(organs: Sequence[str]) -> dict[str, str]:
    """The same colours as `#rrggbb`."""
    found = {}
    for organ, colour in colours(organs).items():
        found[organ] = "#" + "".join(f"{round(255 * one):02x}" for one in colour)
    return found


def _rgb(code: str) -> Colour:
    """`#rrggbb` -> components in 0..1."""
    red, green, blue = bytes.fromhex(code[1:])
    return red / 255, green / 255, blue / 255


def richest_slices(classes_ZYX: np.ndarray, organ_indices: Sequence[int]) -> tuple[int, int]:
    """The axial and the coronal slice that show most organs, and of those the one with most organ
    voxels.

    Returns:
        (z, y) indices.
    """
    depth, height, _ = classes_ZYX.shape
    score_z, score_y = np.zeros(depth), np.zeros(height)
    for index in organ_indices:
        mask = classes_ZYX == index
        if mask.any():
            in_z, in_y = mask.sum((1, 2)), mask.sum((0, 2))
            score_z += (in_z > 0.2 * in_z.max()) + 1e-3 * in_z / in_z.max()
            score_y += (in_y > 0.2 * in_y.max()) + 1e-3 * in_y / in_y.max()
    return int(score_z.argmax()), int(score_y.argmax())


def draw_overlay(
    path: Path,
    hu_ZYX: np.ndarray,
    spacing_mm: Sequence[float],
    panels: Sequence[Panel],
    classes: Sequence[str],
    organs: Sequence[str],
    at: tuple[int, int],
) -> None:
    """Write one picture: axial above coronal, one column per panel, organs in colour with a legend.

    Args:
        spacing_mm: of the voxels along (z, y, x), so that the patient keeps their shape.
        classes: name of each class index.
        at: axial and coronal slice.
    """
    colour_of = colours(organs)
    visible = [o for o in organs if any(_shows(p, classes.index(o), at) for p in panels)]
    shown = visible[:_MOST_IN_LEGEND]
    views = [
        ("axial", axial(hu_ZYX, at[0]), spacing_mm[1:]),
        ("coronal", coronal(hu_ZYX, at[1]), spacing_mm[::2]),
    ]
    legend_columns = _legend_columns(shown, len(panels))
    figure, axes = figure_grid(views, len(panels), legend_rows=-(-len(shown) // legend_columns))
    for column, panel in enumerate(panels):
        for row, (name, hu_slice, spacing) in enumerate(views):
            picture = windowed(hu_slice)
            if panel.classes_ZYX is not None:
                if name == "axial":
                    cut = axial(panel.classes_ZYX, at[0])
                else:
                    cut = coronal(panel.classes_ZYX, at[1])
                picture = _painted(picture, cut, classes, colour_of)
            show(
                axes[row][column],
                picture,
                spacing,
                panel.title if row == 0 else "",
                name if column == 0 else "",
            )
    from matplotlib.patches import Patch

    handles = []
    for organ in shown:
        hatch = "/////" if side_of(organ) == "left" else ""
        label = organ.replace("_", " ")
        handles.append(
            Patch(facecolor=colour_of[organ], hatch=hatch, edgecolor=_PAPER, lw=0, label=label)
        )
    if handles:
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=legend_columns,
            frameon=False,
            labelcolor=_INK,
            fontsize=8,
            handlelength=1,
            handleheight=1,
            columnspacing=1.2,
        )
    save(figure, path)


def draw_pca(
    path: Path,
    hu_ZYX: np.ndarray,
    spacing_mm: Sequence[float],
    columns: Sequence[tuple[str, PatchGrid, Tensor]],
    body_ZYX: np.ndarray,
    at: tuple[int, int],
) -> None:
    """Write one picture: the scan, then per model its patch features' first three principal
    components as colours.

    Args:
        columns: of each model its title, its patch grid and what `feature_colours` returned.
        body_ZYX: bool, body of the patient.
        at: axial and coronal slice.
    """
    views = [
        ("axial", axial(hu_ZYX, at[0]), spacing_mm[1:]),
        ("coronal", coronal(hu_ZYX, at[1]), spacing_mm[::2]),
    ]
    figure, axes = figure_grid(views, 1 + len(columns), legend_rows=0)
    for row, (name, hu_slice, spacing) in enumerate(views):
        show(axes[row][0], windowed(hu_slice), spacing, "CT" if row == 0 else "", name)
    for column, (title, grid, colours_CZYX) in enumerate(columns, start=1):
        rgb_CZYX = grid.to_voxels(colours_CZYX).numpy()
        for row, (name, _, spacing) in enumerate(views):
            cut = axial if name == "axial" else coronal
            rgb = np.stack([cut(channel, at[row]) for channel in rgb_CZYX], axis=-1)
            mask = cut(body_ZYX, at[row])[..., None]
            show(
                axes[row][column],
                np.where(mask, rgb.clip(0, 1), 0.0),
                spacing,
                title if row == 0 else "",
                "",
            )
    save(figure, path)


def feature_colours(dense: DenseFeatures, body_ZYX: np.ndarray) -> Tensor:
    """Colours of the patches of a scan, from the principal components of those in the body.

    Args:
        dense: features of one model.
        body_ZYX: bool, body of the patient.
    Returns:
        float32 (3, z, y, x) on the patch grid, 0 to 1.
    """
    return pca_colours(dense.features_DZYX.cpu(), patch_share(body_ZYX, dense) > 0.5)


def pca_colours(features_DZYX: Tensor, foreground_ZYX: Tensor) -> Tensor:
    """First three principal components of the foreground patches, each stretched to [0, 1] over its
    1-99 % range.

    A component's sign is free: it is fixed so that its largest loading is positive; equal input
    gives equal colours.

    Args:
        features_DZYX: float32 on the patch grid, CPU.
        foreground_ZYX: bool on the patch grid; all patches where fewer than four are set.
    Returns:
        float32 (3, z, y, x); background patches hold the colour that the same projection gives
        them, clipped.
    """
    inside_ZP = foreground_ZYX.flatten(1)
    if int(inside_ZP.sum()) < 4:
        inside_ZP = torch.ones_like(inside_ZP)
    # float64 of one layer at a time: a scan can be 1 GB
    layers_ZPD = features_DZYX.permute(1, 2, 3, 0).flatten(1, 2)
    layers = list(zip(layers_ZPD, inside_ZP, strict=True))
    mean_D = (
        torch.stack([x_PD[inside_P].double().sum(0) for x_PD, inside_P in layers]).sum(0)
        / inside_ZP.sum()
    )
    covariance_DD = mean_D.new_zeros(len(mean_D), len(mean_D))
    for x_PD, inside_P in layers:
        centred_ND = x_PD[inside_P].double() - mean_D
        covariance_DD += centred_ND.T @ centred_ND
    loadings_D3 = torch.linalg.eigh(covariance_DD).eigenvectors.flip(1)[:, :3]
    largest = loadings_D3.abs().argmax(0)
    loadings_D3 = loadings_D3 * loadings_D3[largest, torch.arange(loadings_D3.shape[1])].sign()
    scores_N3 = torch.cat([(x_PD.double() - mean_D) @ loadings_D3 for x_PD, _ in layers])
    inside_N = inside_ZP.flatten()
    low, high = (torch.quantile(scores_N3[inside_N], q, dim=0) for q in (0.01, 0.99))
    scaled_N3 = ((scores_N3 - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return scaled_N3.T.float().unflatten(1, foreground_ZYX.shape)


def patch_share(mask_ZYX: np.ndarray, dense: DenseFeatures) -> Tensor:
    """Share of true voxels in each patch of the grid, by voxel centres: float32 on the patch
    grid.
    """
    share = mask_ZYX.astype(np.float32)
    for axis in range(3):
        patch_of = dense.grid.patch_of_voxel(axis, mask_ZYX.shape[axis])
        mean = np.zeros((dense.grid.shape[axis], mask_ZYX.shape[axis]), dtype=np.float32)
        mean[patch_of, np.arange(len(patch_of))] = 1
        mean /= np.maximum(mean.sum(1, keepdims=True), 1)
        share = np.moveaxis(np.tensordot(mean, share, axes=(1, axis)), 0, axis)
    return torch.from_numpy(np.ascontiguousarray(share))


def axial(array_ZYX: np.ndarray, z: int) -> np.ndarray:
    """An axial slice as it is shown."""
    return array_ZYX[z]


def coronal(array_ZYX: np.ndarray, y: int) -> np.ndarray:
    """A coronal slice as it is shown: the head on top."""
    return array_ZYX[::-1, y]


def windowed(hu: np.ndarray) -> np.ndarray:
    """HU of a slice -> grey values 0..1 of three equal colours, by the soft-tissue window."""
    grey = np.clip((hu.astype(np.float32) - (LEVEL_HU - WIDTH_HU / 2)) / WIDTH_HU, 0, 1)
    return np.repeat(grey[..., None], 3, axis=-1)


def _painted(
    picture: np.ndarray,
    class_slice: np.ndarray,
    classes: Sequence[str],
    colour_of: dict[str, Colour],
) -> np.ndarray:
    """Paint organs in transparent colour with an opaque rim: the anatomy stays visible. The left
    organ of a pair gets stripes, so that the pair can be distinguished without colours.
    """
    out = picture.copy()
    rows, columns = np.indices(class_slice.shape)
    is_stripe = (rows + columns) % 6 < 3
    for organ, colour in colour_of.items():
        mask = class_slice == classes.index(organ)
        if not mask.any():
            continue
        inner = mask.copy()
        inner[1:] &= mask[:-1]
        inner[:-1] &= mask[1:]
        inner[:, 1:] &= mask[:, :-1]
        inner[:, :-1] &= mask[:, 1:]
        rim = mask & ~inner
        share = np.full(class_slice.shape, 0.45)
        if side_of(organ) == "left":
            share = np.where(is_stripe, 0.7, 0.1)
        of_colour = share[inner][:, None]
        out[inner] = (1 - of_colour) * out[inner] + of_colour * np.asarray(colour)
        out[rim] = 0.1 * out[rim] + 0.9 * np.asarray(colour)
    return out


def _shows(panel: Panel, index: int, at: tuple[int, int]) -> bool:
    if panel.classes_ZYX is None:
        return False
    return bool(
        (panel.classes_ZYX[at[0]] == index).any() or (panel.classes_ZYX[:, at[1]] == index).any()
    )


def _legend_columns(names: Sequence[str], num_panels: int) -> int:
    """As many columns as fit below the panels: an entry takes 0.35 inch and 0.065 inch a letter."""
    inches = 0.35 + 0.065 * max((len(name) for name in names), default=1)
    return max(1, min(len(names), int(num_panels * _PANEL_INCHES / inches)))


def figure_grid(
    views: Sequence[tuple[str, np.ndarray, Sequence[float]]], columns: int, legend_rows: int
) -> tuple[Figure, Any]:
    """A dark figure whose rows have the true proportions of the slices."""
    from matplotlib.figure import Figure

    width = _PANEL_INCHES
    heights = [
        min(max(width * s.shape[0] * mm[0] / (s.shape[1] * mm[1]), 0.35 * width), 2 * width)
        for _, s, mm in views
    ]
    top, bottom = 0.32, 0.1 + 0.2 * legend_rows
    total = sum(heights) + top + bottom + 0.06
    figure = Figure(figsize=(columns * width + 0.3, total), facecolor=_PAPER)
    margins = {
        "left": 0.25 / (columns * width + 0.3),
        "right": 1 - 0.05 / (columns * width),
        "top": 1 - top / total,
        "bottom": bottom / total,
    }
    spaces = {"height_ratios": heights, "wspace": 0.025, "hspace": 0.02}
    axes = figure.subplots(2, columns, squeeze=False, gridspec_kw=spaces | margins)
    return figure, axes


def show(
    axis: Any, picture: np.ndarray, spacing_mm: Sequence[float], title: str, side: str
) -> None:
    """Draw one slice, with a title above it and the name of the view at its side."""
    axis.imshow(picture, aspect=spacing_mm[0] / spacing_mm[1], interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_facecolor("black")
    for spine in axis.spines.values():
        spine.set_visible(False)
    if title:
        axis.set_title(title, color=_INK, fontsize=9, pad=5)
    if side:
        axis.set_ylabel(side, color=_MUTED, fontsize=8, labelpad=4)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = figure.get_facecolor()
    with files.replacing(path) as file:
        figure.savefig(
            file, format="png", dpi=120, facecolor=colour, metadata={"Software": "tapct"}
        )
