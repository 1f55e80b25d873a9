"""What is true of a phantom scan as a whole, and where its landmarks are.

The values follow from how the body was drawn and from the painted body before blur and noise, and
hold for what the scan shows: an organ outside the field of view has no value, and a lesion outside
it does not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tapct.data.phantom.canvas import Point3
from tapct.data.phantom.frame import to_frame, to_lps_mm, to_voxels
from tapct.data.phantom.organs import (
    LABEL_OF,
    ORGANS,
    lesion_centre,
    muscle_fat_above,
    placed,
)
from tapct.data.phantom.patient import VERTEBRA_Z, Patient, Study
from tapct.data.phantom.scan import Painted
from tapct.data.phantom.torso import BODY, LUNGS, TABLE, spine_at

VERTEBRAE_NAMES = (
    *("S1", "L5", "L4", "L3", "L2", "L1"),
    *(f"T{number}" for number in range(12, 0, -1)),
    "C7",
)
CARINA_Z = 110.0  # below, the walls of the two main bronchi lie apart
FAT_HU = (-150.0, -50.0)
MIN_LESION_VOXELS = 8  # fewer are not seen
BODY_POINTS = 24
LESION_ORGANS = {
    "liver": ("liver",),
    "lung": ("lungs",),
    "kidney": ("kidney_left", "kidney_right"),
}
TARGETS = (
    "sex",
    "age_years",
    "muscle_fat_share",
    "subcutaneous_fat_mm",
    "visceral_fat",
    "body_fat_share",
    "phase",
    *(f"{organ}_lesion{ending}" for organ in LESION_ORGANS for ending in ("", "s", "_mm")),
    "lung_lesion_side",
    "kidney_lesion_side",
)


@dataclass(frozen=True)
class Landmark:
    """A named point of a scan.

    Args:
        name: name of the point, the same in all scans of the patient.
        zyx_mm: LPS position (z, y, x) in mm.
    """

    name: str
    zyx_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Truth:
    """What is true of a scan.

    Args:
        targets: value of each of TARGETS; None where the scan cannot show it.
        landmarks: points inside the scan.
    """

    targets: dict[str, str | float | None]
    landmarks: tuple[Landmark, ...]


@dataclass(frozen=True)
class _SeenLesion:
    """A lesion in the field of view: its number in the patient, its organ, side and size."""

    number: int
    organ: str
    side: str
    diameter_mm: float


def truth_of(
    patient: Patient, study: Study, painted: Painted, *, body_points: bool = False
) -> Truth:
    """What is true of a scan.

    Args:
        patient: body.
        study: visit.
        painted: the body as it was painted for this visit.
        body_points: whether points all over the body are landmarks; they are the same points at
            both visits only if the second scan is a deformation of the first.
    """
    seen = list(_seen_lesions(patient, study, painted))
    side, front, back = patient.fat_mm
    scale_x, scale_y, _ = patient.scale
    fat_mm = (2 * side * scale_x + (front + back) * scale_y) / 4
    targets: dict[str, str | float | None] = {
        "sex": patient.sex,
        "age_years": patient.age_years + study.years_later,
        "muscle_fat_share": 0.5 * math.erfc(muscle_fat_above(patient) / math.sqrt(2)),
        "subcutaneous_fat_mm": fat_mm,
        "visceral_fat": patient.visceral,
        "body_fat_share": _body_fat_share(painted),
        "phase": study.phase,
    }
    for organ, parts in LESION_ORGANS.items():
        targets |= _lesion_targets(organ, parts, seen, painted)
    assert set(targets) == set(TARGETS)
    named = dict(_points(patient, painted.pose))
    for seen_lesion in seen:
        lesion = patient.lesions[seen_lesion.number]
        named[f"lesion_{seen_lesion.number + 1}"] = lesion_centre(lesion, painted.pose)
    if body_points:
        named |= _body_points(patient)
    return Truth(
        {name: targets[name] for name in TARGETS},
        tuple(_inside(named, patient, study, painted)),
    )


def _body_fat_share(painted: Painted) -> float:
    """Share of fat among the voxels of the body without table and lungs."""
    labels = painted.canvas.whole.label_ZYX
    tissue = (labels >= BODY) & (labels != LUNGS) & (labels != TABLE)
    hu = painted.canvas.whole.hu_ZYX[tissue]
    low, high = FAT_HU
    return float(((hu > low) & (hu < high)).mean()) if hu.size else 0.0


def _seen_lesions(patient: Patient, study: Study, painted: Painted) -> Iterator[_SeenLesion]:
    """The lesions of which the scan shows enough, with the diameter of a ball of as many voxels."""
    counts = np.bincount(painted.lesions_ZYX.reshape(-1), minlength=len(patient.lesions) + 1)
    voxel_mm3 = math.prod(study.spacing_mm)
    for number, lesion in enumerate(patient.lesions):
        num_voxels = int(counts[number + 1])
        if num_voxels >= MIN_LESION_VOXELS:
            diameter = (6 * num_voxels * voxel_mm3 / math.pi) ** (1 / 3)
            side = "left" if lesion.centre[0] > 0 else "right"
            yield _SeenLesion(number, lesion.organ, side, diameter)


def _lesion_targets(
    organ: str, parts: tuple[str, ...], seen: list[_SeenLesion], painted: Painted
) -> dict[str, str | float | None]:
    """Presence, number, size and side of the lesions of an organ."""
    labels_ZYX = painted.canvas.whole.label_ZYX
    is_shown = any((labels_ZYX == LABEL_OF[part]).any() for part in parts)
    found = [lesion for lesion in seen if lesion.organ in parts]
    largest = max(found, key=lambda lesion: lesion.diameter_mm) if found else None
    targets: dict[str, str | float | None] = {
        f"{organ}_lesion": int(bool(found)) if is_shown else None,
        f"{organ}_lesions": len(found) if is_shown else None,
        f"{organ}_lesion_mm": largest.diameter_mm if largest else None,
    }
    if organ != "liver":
        targets[f"{organ}_lesion_side"] = largest.side if largest else None
    return targets


def _inside(
    named: dict[str, Point3], patient: Patient, study: Study, painted: Painted
) -> Iterator[Landmark]:
    """The points inside the scan, of points of the standard body."""
    frame = [to_frame(point, patient, painted.pose) for point in named.values()]
    index_N3 = to_voxels(frame, painted.pose, study, painted.warp)
    is_between = (index_N3 >= -0.5) & (index_N3 <= np.array(study.shape) - 0.5)
    inside_N = np.logical_and.reduce(is_between, axis=1)
    for name, is_inside, lps in zip(named, inside_N, to_lps_mm(index_N3, study)):
        if is_inside:
            z, y, x = map(float, lps)
            yield Landmark(name, (z, y, x))


def _points(patient: Patient, pose: Study) -> Iterator[tuple[str, Point3]]:
    """Points of the anatomy that every scan can have, standard mm (x, y, z)."""
    x, y = spine_at(np.array([CARINA_Z]), patient)
    yield "carina", (float(x[0]), float(y[0]) - 36.0, CARINA_Z)
    for name, z in zip(VERTEBRAE_NAMES, VERTEBRA_Z):
        x, y = spine_at(np.array([z]), patient)
        yield f"vertebra_{name}", (float(x[0]), float(y[0]), float(z))
    for name in ORGANS:
        if name == "stomach":  # its contents change from day to day
            continue
        centre, radii = placed(name, patient, pose)
        yield f"{name}_centre", centre
        if not name.startswith("kidney"):
            continue
        lean_x, lean_y = ORGANS[name].lean
        for end, height in (("upper_pole", radii[2]), ("lower_pole", -radii[2])):
            yield (
                f"{name}_{end}",
                (centre[0] + lean_x * height, centre[1] + lean_y * height, centre[2] + height),
            )


def _body_points(patient: Patient) -> dict[str, Point3]:
    """Points all over the body, whose places follow from a known deformation."""
    rng = patient.rng("body points")
    low, high = (-105.0, -70.0, -190.0), (105.0, 75.0, 160.0)
    points = {}
    for number in range(BODY_POINTS):
        x, y, z = rng.uniform(low, high)
        points[f"body_{number + 1:02}"] = (float(x), float(y), float(z))
    return points
