"""Check that a scan is CT in Hounsfield units, by its values: NIfTI and NRRD name no modality.

CT is the one common modality with an absolute scale: air is near -1000 HU and soft tissue between
-200 and 300 HU. MR, PET, label maps, photographs and rescaled floats have no values near -1000. A
file that declares CT (DICOM, or a side-car's Modality) needs no air, since a crop inside the body
has none, but it still needs fat or air below zero.
"""

from __future__ import annotations

import numpy as np

from tapct.types import Refused

AIR_RANGE = (-1150.0, -300.0)  # air and lung, with noise
TISSUE_RANGE = (-200.0, 300.0)
BODY_ABOVE = -500.0  # HU; voxels above it count as body in the manifest's statistics
MIN_AIR = 5e-4  # share of voxels; the smallest share in real scans was 0.22, an MR has 0
MIN_TISSUE = 5e-3  # share of voxels; a head phantom of hard plastic has 0.055
_UNIT_SPAN = 64.0  # fractional values that span less are shares, z-scores or logarithms
_SAMPLE = 1 << 20  # voxels


def subsample(voxels: np.ndarray, limit: int = _SAMPLE) -> np.ndarray:
    """A strided subsample of at most about `limit` voxels, same axes; the stride is the same along
    all axes.
    """
    stride = 1
    while np.prod([-(-size // stride) for size in voxels.shape]) > limit:
        stride += 1
    return voxels[tuple(slice(None, None, stride) for _ in voxels.shape)]


def check_is_ct(voxels: np.ndarray, slope: float, intercept: float, declared_ct: bool) -> None:
    """Refuse voxels whose values cannot be HU.

    Args:
        voxels: stored voxels along three axes, any real dtype.
        slope: factor to HU.
        intercept: offset in HU.
        declared_ct: whether the file or its side-car gives Modality CT.
    Raises:
        Refused: not_finite, constant, normalised, label_map, no_rescale, not_hu, not_ct.
    """
    values = subsample(voxels).astype(np.float64) * slope + intercept
    if not np.isfinite(values).all():
        raise Refused("not_finite", "voxels hold NaN or infinity; write air (-1024) there")
    low, high = float(values.min()), float(values.max())
    span = f"values run from {low:g} to {high:g}"
    if low == high:
        raise Refused("constant", f"every voxel is {low:g}")
    if high - low < _UNIT_SPAN and (values != np.rint(values)).any():
        raise Refused(
            "normalised", f"{span}; HU span hundreds; export the scan without normalisation"
        )
    if low >= 0 and _is_label_map(voxels, values):
        raise Refused("label_map", f"{span} in flat regions, so these are labels and not a scan")
    air, tissue = _share(values, AIR_RANGE), _share(values, TISSUE_RANGE)
    if air < MIN_AIR and low > -300 and high > 900:
        shifted = values - 1024
        if _share(shifted, AIR_RANGE) >= 0.05 and _share(shifted, TISSUE_RANGE) >= 0.05:
            raise Refused(
                "no_rescale",
                f"{span}, which are not HU; if the rescale intercept was lost, subtract 1024",
            )
    if declared_ct:
        if low > -20:
            raise Refused(
                "not_hu",
                f"Modality is CT, but {span}, without air or fat; check the rescale intercept",
            )
        return
    if air < MIN_AIR:
        raise Refused(
            "not_ct",
            f"{span}, {air:.2%} are air or lung (-1150 to -300 HU); rule: at least {MIN_AIR:.2%}",
        )
    _check_padding(values)
    if tissue < MIN_TISSUE:
        raise Refused(
            "not_ct",
            f"{span}, {tissue:.2%} are soft tissue (-200 to 300 HU); rule: {MIN_TISSUE:.1%}",
        )


def _share(values: np.ndarray, bounds: tuple[float, float]) -> float:
    """Share of values between two bounds."""
    return float(((values >= bounds[0]) & (values <= bounds[1])).mean())


def _is_label_map(voxels: np.ndarray, values: np.ndarray) -> bool:
    """Whether values are few whole numbers, and most neighbours in the foreground are equal."""
    if (values != np.rint(values)).any():
        return False
    num_distinct = len(np.unique(values))
    if num_distinct <= 2:
        return True
    axis = int(np.argmax(voxels.shape))
    lines = np.moveaxis(voxels, axis, 0)
    stride = max(1, int(np.sqrt(lines[0].size * lines.shape[0] / _SAMPLE)))
    lines = lines[:, ::stride, ::stride]  # neighbours stay neighbours along the first axis
    first, second = lines[:-1], lines[1:]
    foreground = (first != 0) | (second != 0)
    equal = ((first == second) & foreground).sum() / max(1, foreground.sum())
    return num_distinct <= 4096 and bool(equal > 0.5)


def _check_padding(values: np.ndarray) -> None:
    """Refuse many different values below air, which mean a shifted scale; padding is one or two
    constants.
    """
    below = values[values < AIR_RANGE[0]]
    if below.size > 0.02 * values.size:
        _, counts = np.unique(below, return_counts=True)
        if np.sort(counts)[-2:].sum() < 0.5 * below.size:
            raise Refused(
                "not_hu",
                f"{below.size / values.size:.0%} of the values lie below air and are not constant, "
                "so the scale is shifted; check slope and intercept",
            )
