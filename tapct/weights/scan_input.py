"""What `Pretrained.embed` takes for a scan: a path, an array in HU with its spacing, or a Volume.

An array has no header, so nothing but its shape, values and spacing shows a mistake. What is
probably another order of axes, another scale or no CT is refused; a `Volume`, whose fields name
their order, is the way past a rule that a scan breaks for a good reason.

Axes: Z Y X depth height width, in LPS order (see `tapct/types.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.base.geometry import times
from tapct.data.checks.ct_check import check_is_ct
from tapct.data.scans.geometry import SPACING_RANGE_MM, check_extent
from tapct.data.scans.ingest import read_volume, to_hu
from tapct.types import Refused, Volume

Scan: TypeAlias = "str | Path | Volume | np.ndarray | Tensor"

MAX_PLANE_MM = 1_000.0  # of an axial slice; the bore of a scanner is 0.9 m wide or less
_LOWEST_HU = -20.0  # of a scan without any air or fat
_ORDER = (
    "the axes are (z, y, x), slices first; an array that nibabel has loaded is (x, y, z): use "
    "tapct.read_volume, or array.transpose(2, 1, 0) after it was brought to LPS. If the order is "
    "right, give a tapct.Volume"
)


def volume_of(scan: Scan, spacing_mm: Sequence[float] | None = None) -> Volume:
    """A scan in any form as a `Volume`.

    Args:
        scan: path for `tapct.read_volume`, `Volume`, or HU (Z, Y, X) as array or tensor.
        spacing_mm: mm of the voxels along (z, y, x); for an array only, and needed there.
    Raises:
        UserError: no scan, wrong axes or spacing, or values that are no HU.
        Refused: the scan breaks a rule of docs/ingest.md.
    """
    if isinstance(scan, (str, Path, Volume)):
        if spacing_mm is not None:
            raise UserError(
                "spacing_mm was given with a path or a Volume, which has its own; leave it out"
            )
        return read_volume(scan) if not isinstance(scan, Volume) else _checked(scan)
    if isinstance(scan, Tensor):
        scan = scan.detach().cpu()
        scan = (scan.float() if scan.dtype == torch.bfloat16 else scan).numpy()
    if not isinstance(scan, np.ndarray):
        raise UserError(
            f"embed takes a path, a tapct.Volume, or an array (Z, Y, X) in HU with its spacing_mm, "
            f"and got {type(scan).__name__}"
        )
    _check_axes(scan)
    if spacing_mm is None:
        raise UserError(
            "an array has no spacing; give spacing_mm=(z, y, x), the distance of its voxels in mm"
        )
    spacing = checked_spacing(spacing_mm)
    _check_order(scan.shape, spacing)
    _check_values(scan)
    return Volume(to_hu(scan, 1.0, 0.0), spacing)


def checked_spacing(spacing_mm: Any) -> tuple[float, float, float]:
    """A spacing as three floats.

    Raises:
        UserError: not three numbers, or a number that no scan has.
    """
    try:
        values = [float(value) for value in spacing_mm]
    except (TypeError, ValueError, RuntimeError):
        values = []
    if len(values) != 3:
        raise UserError(f"spacing_mm is {spacing_mm!r}; give three numbers (z, y, x) in mm")
    low, high = SPACING_RANGE_MM
    if not all(low <= value <= high for value in values):
        raise UserError(f"spacing_mm is {values}; rule: each from {low:g} to {high:g} mm")
    z, y, x = values
    return z, y, x


def _checked(volume: Volume) -> Volume:
    """A `Volume` of the user, after a check of what its type promises.

    Raises:
        UserError: other axes, dtype or spacing.
    """
    hu_ZYX: Any = volume.hu_ZYX
    if not isinstance(hu_ZYX, np.ndarray):
        raise UserError(f"Volume.hu_ZYX is a {type(hu_ZYX).__name__}; give a NumPy array")
    _check_axes(hu_ZYX)
    if hu_ZYX.dtype != np.int16:
        raise UserError(
            f"Volume.hu_ZYX is {hu_ZYX.dtype}; rule: int16 HU. embed(array, spacing_mm=...) takes "
            "other dtypes"
        )
    return replace(volume, spacing_mm=checked_spacing(volume.spacing_mm))


def _check_axes(array: np.ndarray) -> None:
    shape = times(array.shape)
    if array.dtype.kind not in "iuf":
        raise UserError(f"the scan is an array of {array.dtype}; give HU as integers or floats")
    if array.ndim != 3 or not array.size:
        advice = ""
        if array.ndim in (4, 5) and 1 in array.shape:
            advice = "; take the axes of batch and channel away, e.g. array.squeeze()"
        elif array.ndim > 3:
            advice = "; call embed once per scan"
        raise UserError(
            f"the scan is {shape or 'a single number'}; rule: one scan (Z, Y, X){advice}"
        )


def _check_order(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> None:
    """Refuse axes or a spacing that are probably in the order (x, y, z).

    Pixels of an axial slice are square, and slices are further apart or nearer than pixels.
    """
    z, y, x = spacing_mm
    given = f"the scan is {times(shape)} voxels of {z:g}x{y:g}x{x:g} mm"
    if z == y != x:
        raise UserError(
            f"{given}: the first two spacings are equal, so this looks like (x, y, z); {_ORDER}"
        )
    largest = max(shape[1] * y, shape[2] * x)
    if largest > MAX_PLANE_MM:
        raise UserError(
            f"{given}: a slice would be {largest:.0f} mm wide; rule: at most {MAX_PLANE_MM:g} mm; "
            f"{_ORDER}"
        )
    try:
        check_extent(shape[::-1], np.diag([x, y, z, 1.0]))
    except Refused as error:
        raise UserError(f"{error.detail}; {_ORDER}") from error


def _check_values(array: np.ndarray) -> None:
    """Refuse values that are no HU: normalised, shifted by 1024, labels, NaN."""
    try:
        check_is_ct(array, 1.0, 0.0, declared_ct=False)
        return
    except Refused as error:
        found = error
    low, high = array.min(), array.max()
    if found.reason == "not_ct" and low <= _LOWEST_HU:
        return  # a box within the body has fat, but no air
    if found.reason == "not_ct":
        raise UserError(
            f"the array has values from {low:g} to {high:g}, and HU of a body have air or fat "
            "below zero; give HU, before any shift or window"
        ) from found
    raise UserError(f"the array is no CT in HU: {found.detail}") from found
