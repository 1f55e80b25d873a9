"""A test scan at reduced resolution, with label maps and feature colours: what the report shows
slice by slice.

One file per scan, a compressed .npz of 8-bit arrays. HU are kept as levels: fine steps in soft
tissue, coarse ones in air and bone, so that a viewer can still change the window.

Axes: Z Y X voxels of the reduced scan (LPS, z grows towards the head); C colour components.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tapct.base import files

MOST_VOXELS = 192  # along each axis; a longer one is reduced by a whole factor
MOST_CLASSES = 255  # label maps are 8 bit
# (HU, level), linear in between: 2.5 HU per level in soft tissue
LEVELS = ((-1024.0, 0.0), (-160.0, 56.0), (240.0, 216.0), (1500.0, 255.0))
SCHEMA = 1
# what numpy and json raise where a file holds something else
_DAMAGED = (KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
_SIDES = re.compile(r"(?<![a-z])(left|right|l|r)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Organ:
    """One organ of a label map.

    Args:
        index: its value in the label map.
        name: its name.
        colour: `#rrggbb`.
        hatched: whether it is drawn with a hatch: the left one of a pair.
    """

    index: int
    name: str
    colour: str
    hatched: bool


@dataclass(frozen=True)
class LabelLayer:
    """A label map of a scan.

    Args:
        title: what it is, e.g. `truth` or the name of a model.
        classes_ZYX: class of each voxel of the scan as read, or of the reduced one.
        names: class -> name of the organ; other classes are not drawn.
    """

    title: str
    classes_ZYX: np.ndarray
    names: Mapping[int, str]


@dataclass(frozen=True)
class FeatureLayer:
    """Colours of the patch features of one model.

    Args:
        title: name of the model.
        rgb_ZYXC: uint8 on the patch grid.
        patches_per_voxel: patches along (z, y, x) in one voxel of the scan as read, or of the
            reduced one. The centre of voxel i lies at (i + 0.5) times this minus 0.5.
    """

    title: str
    rgb_ZYXC: np.ndarray
    patches_per_voxel: tuple[float, float, float]


@dataclass(frozen=True)
class ScanVolume:
    """A reduced scan with its layers.

    Args:
        scan: scan ID.
        levels_ZYX: uint8, HU by `LEVELS`.
        body_ZYX: uint8, 1 in the body.
        spacing_mm: distance of the reduced voxels along (z, y, x).
        step: voxels of the scan as read in one reduced voxel, along (z, y, x).
        start: slices along (z, y, x) that a viewer shows first.
        labels: label maps.
        organs: organs of each label map.
        features: feature colours of each model.
    """

    scan: str
    levels_ZYX: np.ndarray
    body_ZYX: np.ndarray
    spacing_mm: tuple[float, float, float]
    step: tuple[int, int, int]
    start: tuple[int, int, int]
    labels: tuple[LabelLayer, ...] = ()
    organs: tuple[tuple[Organ, ...], ...] = field(default=())
    features: tuple[FeatureLayer, ...] = ()

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; its folder is made if it is missing."""
        arrays: dict[str, Any] = {"levels": self.levels_ZYX, "body": self.body_ZYX}
        labels, features = [], []
        for number, (one, organs) in enumerate(zip(self.labels, self.organs, strict=True)):
            arrays[f"labels_{number}"] = one.classes_ZYX
            labels.append({"title": one.title, "organs": [asdict(organ) for organ in organs]})
        for number, layer in enumerate(self.features):
            arrays[f"features_{number}"] = layer.rgb_ZYXC
            per_voxel = layer.patches_per_voxel
            features.append({"title": layer.title, "patches_per_voxel": per_voxel})
        about = {"schema": SCHEMA, "scan": self.scan, "spacing_mm": self.spacing_mm}
        about |= {"step": self.step, "start": self.start, "labels": labels, "features": features}
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)


def read(path: Path) -> ScanVolume:
    """Read a file that `ScanVolume.write` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            about: dict[str, Any] = json.loads(str(found["about"]))
            if about["schema"] != SCHEMA:
                raise ValueError(
                    f"schema {about['schema']} is unknown; this version reads {SCHEMA}"
                )
            labels, organs, features = [], [], []
            for number, one in enumerate(about["labels"]):
                drawn = tuple(Organ(**organ) for organ in one["organs"])
                names = {organ.index: organ.name for organ in drawn}
                labels.append(LabelLayer(one["title"], found[f"labels_{number}"], names))
                organs.append(drawn)
            for number, one in enumerate(about["features"]):
                z, y, x = one["patches_per_voxel"]
                features.append(FeatureLayer(one["title"], found[f"features_{number}"], (z, y, x)))
            return ScanVolume(
                str(about["scan"]),
                found["levels"],
                found["body"],
                _three(about["spacing_mm"]),
                _three(about["step"]),
                _three(about["start"]),
                tuple(labels),
                tuple(organs),
                tuple(features),
            )
    except _DAMAGED as error:
        raise ValueError(f"{path.name} is no volume of an evaluation: {error}") from error


def _three(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    z, y, x = values
    return z, y, x


def reduced(
    scan: str,
    hu_ZYX: np.ndarray,
    body_ZYX: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    labels: Sequence[LabelLayer] = (),
    features: Sequence[FeatureLayer] = (),
    colour_of: Mapping[str, str] | None = None,
    start: tuple[int, int] | None = None,
) -> ScanVolume:
    """Reduce a scan and its layers: HU as means of blocks of voxels, label maps at their centres.

    Args:
        scan: scan ID.
        hu_ZYX: int16, the scan as read.
        body_ZYX: bool, its body.
        spacing_mm: mm of its voxels along (z, y, x).
        labels: label maps on its voxels; one with more than `MOST_CLASSES` classes is left out.
        features: colours on patch grids, with patches per voxel of the scan as read.
        colour_of: name of an organ -> `#rrggbb`.
        start: axial and coronal slice that is shown first; None for the middle ones.
    """
    step = tuple(math.ceil(size / MOST_VOXELS) for size in hu_ZYX.shape)
    depth, height, width = hu_ZYX.shape
    first = (start[0] if start else depth // 2, start[1] if start else height // 2, width // 2)
    kept, organs = [], []
    for layer in labels:
        if int(layer.classes_ZYX.max()) > MOST_CLASSES:
            continue
        small = _at_centres(layer.classes_ZYX, step).astype(np.uint8)
        present = set(np.unique(small).tolist())
        drawn = []
        for index, name in sorted(layer.names.items()):
            if index in present:
                colour = (colour_of or {}).get(name, "#2ec4b6")
                drawn.append(Organ(index, name, colour, side_of(name) == "left"))
        kept.append(LabelLayer(layer.title, small, layer.names))
        organs.append(tuple(drawn))
    coloured = []
    for one in features:
        z, y, x = (p * k for p, k in zip(one.patches_per_voxel, step, strict=True))
        coloured.append(FeatureLayer(one.title, one.rgb_ZYXC, (z, y, x)))
    mz, my, mx = (float(mm * k) for mm, k in zip(spacing_mm, step, strict=True))
    z0, y0, x0 = (at // k for at, k in zip(first, step, strict=True))
    kz, ky, kx = step
    return ScanVolume(
        scan,
        to_levels(_block_means(hu_ZYX, step)),
        _at_centres(body_ZYX, step).astype(np.uint8),
        (mz, my, mx),
        (kz, ky, kx),
        (z0, y0, x0),
        tuple(kept),
        tuple(organs),
        tuple(coloured),
    )


def side_of(organ: str) -> str:
    """The side of an organ by its name: `left`, `right`, or empty for one without a side."""
    found = _SIDES.search(organ.replace("_", " "))
    if found is None:
        return ""
    return "left" if found[0].lower() in ("left", "l") else "right"


def to_levels(hu: np.ndarray) -> np.ndarray:
    """HU -> levels, uint8."""
    known, level = zip(*LEVELS, strict=True)
    found: np.ndarray = np.rint(np.interp(hu, known, level)).astype(np.uint8)
    return found


def _at_centres(array_ZYX: np.ndarray, step: Sequence[int]) -> np.ndarray:
    """The value in the middle of each block; of a cut block at the end, its last value."""
    kept = array_ZYX
    for axis, k in enumerate(step):
        size = array_ZYX.shape[axis]
        centre = np.minimum(np.arange(0, size, k) + k // 2, size - 1)
        kept = np.take(kept, centre, axis=axis)
    return kept


def _block_means(array_ZYX: np.ndarray, step: Sequence[int]) -> np.ndarray:
    """Mean of each block, float32, one layer of blocks at a time; the last block of an axis may be
    smaller.
    """
    kz, ky, kx = step
    layers = []
    for start in range(0, array_ZYX.shape[0], kz):
        mean_YX = array_ZYX[start : start + kz].mean(0, dtype=np.float32)
        layers.append(_means_along(_means_along(mean_YX, ky, 0), kx, 1))
    return np.stack(layers)


def _means_along(plane: np.ndarray, k: int, axis: int) -> np.ndarray:
    """Means of k neighbours along an axis of a plane."""
    if k == 1:
        return plane
    size = plane.shape[axis]
    starts = np.arange(0, size, k)
    counts = np.minimum(k, size - starts).astype(np.float32)
    sums: np.ndarray = np.add.reduceat(plane, starts, axis=axis)
    shape = [1, 1]
    shape[axis] = -1
    means: np.ndarray = sums / counts.reshape(shape)
    return means
