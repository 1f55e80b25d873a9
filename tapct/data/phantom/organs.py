"""Paint the phantom's organs: liver, spleen, kidneys, aorta and heart, stomach, bowel, muscles
along the spine, lesions.

Axes: Z Y X voxels of a box. Positions in standard-body mm: x Left, y Posterior, z Superior, z = 0
at T10. Each function paints over what was painted before; `scan.BODY_LAYERS` holds the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tapct.data.phantom.canvas import Box, Canvas, Point3
from tapct.data.phantom.patient import Lesion, Patient, Study
from tapct.data.phantom.torso import (
    AORTA,
    BODY,
    KIDNEY_LEFT,
    KIDNEY_RIGHT,
    LIVER,
    LUNGS,
    SPLEEN,
    diaphragm,
    profile,
    spine_at,
)

LABEL_OF = {
    "liver": LIVER,
    "lungs": LUNGS,
    "kidney_left": KIDNEY_LEFT,
    "kidney_right": KIDNEY_RIGHT,
}


@dataclass(frozen=True)
class Ellipsoid:
    """An organ, or a part of one, in the standard body.

    Args:
        organ: key of `Patient.shift` and `Patient.size`.
        centre: position in standard mm (x, y, z).
        radii: half-axes in mm (x, y, z).
        breath: share of the diaphragm's motion that moves it down.
        lean: shear of x and y along z, mm per mm.
    """

    organ: str
    centre: Point3
    radii: Point3
    breath: float
    lean: tuple[float, float] = (0.0, 0.0)


ORGANS = {
    "liver": Ellipsoid("liver", (-74.0, 0.0, -36.0), (76.0, 88.0, 86.0), 0.9),
    "liver_left_lobe": Ellipsoid("liver", (2.0, -46.0, -14.0), (72.0, 40.0, 40.0), 0.9),
    "stomach": Ellipsoid("stomach", (52.0, -28.0, -20.0), (40.0, 42.0, 48.0), 0.8, (0.3, 0.1)),
    "spleen": Ellipsoid("spleen", (98.0, 38.0, -26.0), (38.0, 52.0, 54.0), 0.8, (-0.15, 0.1)),
    "kidney_left": Ellipsoid(
        "kidney_left", (62.0, 46.0, -96.0), (30.0, 27.0, 54.0), 0.6, (-0.18, -0.12)
    ),
    "kidney_right": Ellipsoid(
        "kidney_right", (-62.0, 46.0, -110.0), (30.0, 27.0, 54.0), 0.6, (0.18, -0.12)
    ),
    "heart": Ellipsoid("heart", (20.0, -38.0, 58.0), (57.0, 44.0, 48.0), 0.6, (-0.25, 0.0)),
}


def placed(name: str, patient: Patient, study: Study) -> tuple[Point3, Point3]:
    """Centre and radii of one of ORGANS in a patient at a visit, standard mm."""
    part = ORGANS[name]
    shift, size = patient.shift[part.organ], patient.size[part.organ]
    centre, radii, down = part.centre, part.radii, part.breath * study.breath_mm
    return (
        (centre[0] + shift[0], centre[1] + shift[1], centre[2] + shift[2] - down),
        (radii[0] * size[0], radii[1] * size[1], radii[2] * size[2]),
    )


def _below_diaphragm(box: Box, canvas: Canvas, gap: float = 1.5) -> np.ndarray:
    """Bool ZYX: inside the cavity and under the diaphragm."""
    z = box.z_Z11[:, 0, 0]
    return box.inside(profile(z, 0) - gap, profile(z, 1) - gap) & (
        box.z_Z11 < diaphragm(box, canvas.study) - gap
    )


def paint_bowel(canvas: Canvas) -> None:
    """Loops of small bowel in visceral fat: walls, contents, some gas in front."""
    p = canvas.patient
    low, high = (-125.0, -95.0, -270.0), (125.0, 55.0, -35.0)
    box = canvas.box(low, high)
    if box is None:
        return
    loops = box.sample(canvas.field("bowel", low, high, (16.0, 14.0, 16.0)))
    fine = box.sample(canvas.field("bowel content", low, high, 6.0))
    # fewer loops towards the stomach, so that they do not end at a flat plane
    rarer = np.square(np.maximum(box.z_Z11 + 80, 0) / 32)
    mask = _below_diaphragm(box, canvas, 6.0) & (loops > -0.7 + 1.1 * p.visceral + rarer)
    hu = p.hu["bowel"] - 12 + 11 * p.gain["bowel"] * fine
    np.copyto(hu, np.float32(p.hu["bowel"] + 18), where=loops < -0.35 + 1.1 * p.visceral)
    np.copyto(hu, np.float32(-820.0), where=(loops > 1.7) & (box.y_YX < -30))
    box.paint(mask, hu)


def paint_colon(canvas: Canvas) -> None:
    """Ascending and descending colon with haustra, faeces and gas, and the transverse colon in
    front.
    """
    p = canvas.patient
    shift = p.shift["colon"]
    for side, width in ((-1.0, 24.0), (1.0, 19.0)):
        low = (side * 92 - 40 + shift[0] / 2, -35.0, -270.0)
        high = (side * 92 + 40 + shift[0] / 2, 70.0, -70.0)
        box = canvas.box(low, high)
        if box is None:
            continue
        z = box.z_Z11
        x = side * 92 + shift[0] / 2 + 6 * np.sin(z / 23 + shift[2])
        tube = box.tube(
            x, 16 + 5 * np.sin(z / 31), width + 3 * np.sin(z / 5.5), width + 3 * np.cos(z / 6)
        )
        _fill_colon(box, canvas, tube, f"colon {side}", low, high)
    low, high = (-95.0, -95.0, -140.0), (95.0, -20.0, -60.0)
    box = canvas.box(low, high)
    if box is not None:
        sag = -88 + shift[2] - 22 * np.cos(box.x_YX / 60)
        tube = np.square((box.y_YX + 66) / 17) + np.square(
            (box.z_Z11 - sag) / (17 + 3 * np.sin(box.x_YX / 6))
        )
        _fill_colon(box, canvas, tube.astype(np.float32), "colon transverse", low, high)


def _fill_colon(
    box: Box, canvas: Canvas, tube: np.ndarray, name: str, low: Point3, high: Point3
) -> None:
    """Paint wall, faeces and gas of one part of the colon where `tube` is below 1."""
    p = canvas.patient
    mottle = box.sample(canvas.field(name, low, high, 7.0))
    slow = box.sample(canvas.field(name + " gas", low, high, 45.0))
    mask = _below_diaphragm(box, canvas, 4.0) & (tube < 1)
    hu = np.where(
        slow > 0.6, np.float32(-900), np.minimum(10 + 70 * mottle - 60 * np.square(mottle), 90)
    )
    np.copyto(hu, np.float32(p.hu["bowel"] + 5), where=tube > 0.75)
    box.paint(mask, hu.astype(np.float32))


def paint_stomach(canvas: Canvas) -> None:
    """The stomach left of the liver, filled with fluid under gas."""
    p = canvas.patient
    centre, radii = placed("stomach", p, canvas.study)
    low, high = _around(centre, radii, 1.35)
    box = canvas.box(low, high)
    if box is None:
        return
    bump = box.sample(canvas.field("stomach", low, high, 30.0))
    q = box.ellipsoid(centre, radii, ORGANS["stomach"].lean) + 0.18 * bump
    mask = (q < 1) & _below_diaphragm(box, canvas)
    fine = box.sample(canvas.field("chyme", low, high, 9.0))
    hu = p.hu["fluid"] + 10 + 14 * fine
    level = centre[1] - radii[1] * (0.15 + 0.4 * np.sin(p.spine[2]))
    hu = np.where(box.y_YX < level, np.float32(-930), hu)
    np.copyto(hu, np.float32(p.hu["bowel"] + 4), where=q > 0.8)
    box.paint(mask, hu.astype(np.float32))


def _around(centre: Point3, radii: Point3, factor: float) -> tuple[Point3, Point3]:
    """Corners of the box around an ellipsoid whose radii are multiplied by `factor`."""
    low = tuple(c - factor * r for c, r in zip(centre, radii, strict=True))
    high = tuple(c + factor * r for c, r in zip(centre, radii, strict=True))
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def paint_liver(canvas: Canvas) -> None:
    """Right and left lobe under the diaphragm with an oblique lower edge, a tree of vessels, the
    gall bladder.
    """
    p = canvas.patient
    right, r_right = placed("liver", p, canvas.study)
    left, r_left = placed("liver_left_lobe", p, canvas.study)
    low, high = (-145.0, -105.0, -150.0), (95.0, 100.0, 60.0)
    box = canvas.box(low, high)
    if box is None:
        return
    bump = 0.16 * box.sample(canvas.field("liver shape", low, high, 38.0))
    cut = box.z_Z11 - (right[2] - 76 + np.float32(0.42) * (box.x_YX + 125) - 12 * bump)
    mask = (
        (box.ellipsoid(right, r_right) + bump < 1) | (box.ellipsoid(left, r_left) + bump < 1)
    ) & (cut > 0)
    mask &= _below_diaphragm(box, canvas)
    f, g = (box.sample(canvas.field(f"liver vessels {i}", low, high, 26.0)) for i in range(2))
    grain = box.sample(canvas.field("liver grain", low, high, 11.0))
    porta = box.ellipsoid((right[0] + 45, right[1] - 5, right[2] + 2), (85, 85, 85))
    vessel = (46.0 * p.contrast - (1 - p.contrast) * 24.0) * p.gain["liver"]
    hu = p.hu["liver"] + 9 * p.gain["liver"] * grain
    hu += np.where(
        np.square(f) + np.square(g) < 0.085 / (0.3 + porta), np.float32(vessel), np.float32(0)
    )
    box.paint(mask, hu, LIVER)
    bladder = (
        box.ellipsoid((right[0] + 32, right[1] - 50, right[2] - 38), (14, 20, 24), (0.1, 0.2)) < 1
    )
    box.paint(bladder & (box.label_ZYX != 0), np.float32(p.hu["fluid"]), BODY)


def paint_spleen(canvas: Canvas) -> None:
    """A crescent along the left back wall, with the fine texture of its pulp."""
    p = canvas.patient
    centre, radii = placed("spleen", p, canvas.study)
    low, high = _around(centre, radii, 1.25)
    box = canvas.box(low, high)
    if box is None:
        return
    bump = 0.15 * box.sample(canvas.field("spleen shape", low, high, 30.0))
    hollow = box.ellipsoid((centre[0] - 40, centre[1] - 28, centre[2] - 4), (40, 44, 60))
    mask = (box.ellipsoid(centre, radii, ORGANS["spleen"].lean) + bump < 1) & (hollow > 1)
    mask &= _below_diaphragm(box, canvas)
    pulp = box.sample(canvas.field("pulp", low, high, 4.5))
    box.paint(mask, p.hu["spleen"] + 17 * p.gain["spleen"] * pulp, SPLEEN)


def paint_kidneys(canvas: Canvas) -> None:
    """Kidneys beside the psoas in a capsule of fat: cortex outside, then pyramids, then the fat of
    the sinus.
    """
    p = canvas.patient
    for side, name, label in (
        (1.0, "kidney_left", KIDNEY_LEFT),
        (-1.0, "kidney_right", KIDNEY_RIGHT),
    ):
        centre, radii = placed(name, p, canvas.study)
        low, high = _around(centre, radii, 1.5)
        box = canvas.box(low, high)
        if box is None:
            continue
        lean = ORGANS[name].lean
        q = box.ellipsoid(centre, radii, lean) + 0.1 * box.sample(
            canvas.field(name, low, high, 22.0)
        )
        free = _below_diaphragm(box, canvas, 1.0)
        capsule = (q < 1.25 + 0.5 * p.visceral) & free & (box.label_ZYX == BODY)
        box.paint(capsule, np.float32(p.hu["fat"]))
        pyramids = box.sample(canvas.field(name + " pyramids", low, high, 12.0))
        grain = box.sample(canvas.field(name + " grain", low, high, 5.0))
        zone = np.where((q < 0.66) & (pyramids > -0.1), np.float32(-38), np.float32(4))
        hu = p.hu["kidney"] + 10 + 4 * grain + zone
        box.paint((q < 1) & free, hu.astype(np.float32), label)
        sinus = box.ellipsoid((centre[0] - side * 14, centre[1] - 4, centre[2]), (17, 9, 27), lean)
        soft = np.where(pyramids > 0.6, np.float32(p.hu["fluid"]), np.float32(p.hu["fat"] + 15))
        box.paint((sinus < 1) & (q < 1.2), soft, label)


def muscle_fat_above(patient: Patient) -> float:
    """The value of a field of unit variance above which muscles along the spine are fat: the older
    the patient, the lower.
    """
    return 1.5 - 0.008 * (patient.age_years - 50)


def paint_back_muscles(canvas: Canvas) -> None:
    """Psoas beside the lumbar spine, erector muscles behind the arches, quadratus lumborum,
    crura.
    """
    p = canvas.patient
    low, high = (-95.0, 0.0, -270.0), (95.0, 125.0, 180.0)
    box = canvas.box(low, high)
    if box is None:
        return
    z = box.z_Z11[:, 0, 0]
    x, y = (v.reshape(-1, 1, 1) for v in spine_at(z, p))
    t = np.clip((-40 - box.z_Z11) / 170, 0, 1)
    strands = box.sample(canvas.field("back muscles", low, high, (5.0, 5.0, 18.0)))
    hu = p.hu["muscle"] + 15 * p.gain["muscle"] * strands
    np.copyto(hu, np.float32(p.hu["fat"] + 45), where=strands > muscle_fat_above(p))
    thick = np.float32(1 + 0.03 * p.muscle_mm)
    for side in (-1.0, 1.0):
        psoas = box.tube(
            x + side * (26 + 13 * t), y + 4, thick * (7 + 15 * t), thick * (8 + 16 * t)
        )
        box.paint((psoas < 1) & (t > 0), hu)
        erector = box.tube(x + side * 30, y + 44 - 2 * t, 26.0 + 4 * t, 15 + 5 * t)
        box.paint((erector < 1) & (box.label_ZYX == BODY), hu)
        quadratus = box.tube(x + side * 62, y + 33, 20.0, 9.0)
        box.paint((quadratus < 1) & (t > 0.25), hu)
        crus = box.tube(x + side * 14, y - 20, 11.0, 6.0)
        box.paint((crus < 1) & (box.z_Z11 < 5) & (box.z_Z11 > -110), hu, BODY)


def paint_vessels(canvas: Canvas) -> None:
    """The caval vein, and the aorta from its root over the arch to its fork; the older the patient,
    the more its wall is calcified.
    """
    p = canvas.patient
    low, high = (-70.0, -80.0, -200.0), (80.0, 75.0, 175.0)
    box = canvas.box(low, high)
    if box is None:
        return
    z, r = box.z_Z11, p.aorta_mm
    x, y = (v.reshape(-1, 1, 1) for v in spine_at(z[:, 0, 0], p))
    blood = p.hu["blood"] + 3 * box.sample(canvas.field("blood", low, high, 14.0))
    cava = box.tube(x - 25, y - 27, 13.0, 10.0)
    box.paint((cava < 1) & (z < 25), blood - 5, BODY)
    up = np.clip((z + 60) / 170, 0, 1)
    ax, ay = x + 9 + 19 * up, y - 19 - r + 12 * up
    down = box.tube(ax, ay, r, r)
    down = np.where((z < 128) & (z > -187), down, np.float32(9))
    rise = box.tube(np.float32(-16), np.float32(-30), r * 1.2, r * 1.2)
    rise = np.where((z > 62) & (z < 128), rise, np.float32(9))
    end_x, end_y = np.interp(128, z[:, 0, 0], ax[:, 0, 0]), np.interp(128, z[:, 0, 0], ay[:, 0, 0])
    q = np.minimum(down, rise)
    for t in np.linspace(0, 1, 11):  # the arch: balls along half an ellipse
        centre = (
            -16 + t * (end_x + 16),
            -30 + t * (end_y + 30),
            128 + 22 * float(np.sin(np.pi * t)),
        )
        ball = r * (1.2 - 0.2 * t)
        q = np.minimum(q, box.ellipsoid(centre, (ball, ball, ball)))
    chalk = box.sample(canvas.field("chalk", low, high, 8.0))
    box.paint(q < 1, blood, AORTA)
    box.paint((q < 1) & (q > 0.6) & (chalk > 3.2 - 0.022 * p.age_years), np.float32(420.0), AORTA)
    box.paint((q > 1) & (q < 1.35) & (box.label_ZYX == AORTA), np.float32(p.hu["fat"]), BODY)


def paint_heart(canvas: Canvas) -> None:
    """Heart with chambers and fat strands, windpipe with its two branches, gullet."""
    p = canvas.patient
    centre, radii = placed("heart", p, canvas.study)
    low, high = _around(centre, radii, 1.4)
    box = canvas.box(low, high)
    if box is not None:
        q = box.ellipsoid(centre, radii, ORGANS["heart"].lean)
        rooms = box.sample(canvas.field("chambers", low, high, 26.0))
        hu = (
            p.hu["muscle"]
            + np.where(rooms > 0, np.float32(10 + 25 * p.contrast), np.float32(-4))
            + 3 * rooms
        )
        np.copyto(hu, np.float32(p.hu["fat"] + 20), where=(np.abs(rooms) < 0.12) & (q > 0.45))
        box.paint((q < 1) & (box.label_ZYX == BODY), hu.astype(np.float32))
    box = canvas.box((-70.0, -60.0, 60.0), (70.0, 60.0, 235.0))
    if box is None:
        return
    z = box.z_Z11
    x, y = (v.reshape(-1, 1, 1) for v in spine_at(z[:, 0, 0], p))
    box.paint(
        (box.tube(x + 7, y - 24, 8.0, 6.0) < 1) & (box.label_ZYX == BODY),
        np.float32(p.hu["muscle"]),
    )
    for side in (-1.0, 1.0):
        fork = np.clip(118 - z, 0, 45)
        branch = box.tube(x + side * fork * 1.1, y - 36, 8.0 + 0.1 * fork, 8.0)
        box.paint((branch < 1.6) & (fork < 40) & (box.label_ZYX == BODY), np.float32(40.0))
        box.paint((branch < 1) & (fork < 40) & (box.label_ZYX != AORTA), np.float32(-990.0), BODY)


def paint_lesions(canvas: Canvas) -> None:
    """Balls with an irregular edge inside their organ, larger or smaller at the second visit."""
    for number, box, ball, ragged in _lesion_balls(canvas):
        box.paint(ball, np.float32(canvas.patient.lesions[number].hu) + 6 * ragged)


def mark_lesions(canvas: Canvas) -> np.ndarray:
    """The lesions of a painted canvas: uint8 ZYX, the number of the lesion in `Patient.lesions`
    from 1, and 0 elsewhere. Where two overlap, the later one is seen.
    """
    marks_ZYX = np.zeros(canvas.study.shape, np.float32)
    marked = replace(canvas, whole=replace(canvas.whole, hu_ZYX=marks_ZYX))
    for number, box, ball, _ in _lesion_balls(marked):
        box.paint(ball, float(number + 1))
    return marks_ZYX.astype(np.uint8)


def lesion_centre(lesion: Lesion, study: Study) -> Point3:
    """The centre of a lesion at a visit, standard mm: the diaphragm takes it along."""
    down = study.breath_mm * (0.5 if lesion.organ == "lungs" else 0.8)
    return (lesion.centre[0], lesion.centre[1], lesion.centre[2] - down)


def _lesion_balls(canvas: Canvas) -> Iterator[tuple[int, Box, np.ndarray, np.ndarray]]:
    """Each lesion in the field of view: its number, its box, where it is in the box, and the field
    of its ragged edge.
    """
    for number, lesion in enumerate(canvas.patient.lesions):
        r = lesion.radius_mm * (lesion.growth if canvas.study.visit else 1.0)
        centre = lesion_centre(lesion, canvas.study)
        low, high = _around(centre, (r, r, r), 1.4)
        box = canvas.box(low, high)
        if box is None:
            continue
        ragged = box.sample(canvas.field(f"lesion {number}", low, high, 5.0))
        ball = box.ellipsoid(centre, (r, r, r)) + 0.2 * ragged < 1
        yield number, box, ball & (box.label_ZYX == LABEL_OF[lesion.organ]), ragged
