"""Positions of the standard body in a scan: in the patient's frame, in voxels and in LPS mm."""

from __future__ import annotations

import numpy as np

from tapct.data.phantom.canvas import Point3
from tapct.data.phantom.patient import Patient, Study
from tapct.data.phantom.warp import Warp, grid_mm


def to_frame(point: Point3, patient: Patient, study: Study) -> Point3:
    """A position of the standard body in the patient's frame.

    Args:
        point: standard mm (x, y, z).
        patient: body.
        study: pose in which the body is painted.
    Returns:
        Real mm (x, y, z) from the body's axis and the height of T10.
    """
    c, s = np.cos(study.turn), np.sin(study.turn)
    x, y, z = (at * scale for at, scale in zip(point, patient.scale))
    return float(c * x - s * y), float(s * x + c * y), float(z)


def to_voxels(points: list[Point3], painted: Study, study: Study, warp: Warp | None) -> np.ndarray:
    """Where positions of the patient's frame lie in a scan.

    Args:
        points: real mm (x, y, z), in the pose in which the body was painted.
        painted: pose and grid in which the body was painted.
        study: scan.
        warp: deformation between both; None where they are the same.
    Returns:
        float64 (N, 3): indices z, y, x, which may lie outside the scan.
    """
    at_N3 = np.asarray(points, np.float64).reshape(-1, 3)
    if warp is not None:
        at_N3 = warp.followup(at_N3)
    starts = np.array([axis[0] for axis in grid_mm(study)])
    index_N3: np.ndarray = (at_N3[:, ::-1] - starts) / study.spacing_mm
    return index_N3


def to_lps_mm(index_N3: np.ndarray, study: Study) -> np.ndarray:
    """LPS positions (z, y, x) in mm of indices (z, y, x) of a scan."""
    lps_N3: np.ndarray = np.asarray(study.origin_mm)[::-1] + index_N3 * study.spacing_mm
    return lps_N3
