"""Paint the phantom's torso without its organs: fat, muscle, cavity, diaphragm, lungs, spine, ribs,
table.

Axes: Z Y X voxels of a box. Positions in standard-body mm: x Left, y Posterior, z Superior, z = 0
at T10.
"""

from __future__ import annotations

import numpy as np

from tapct.data.phantom.canvas import Box, Canvas
from tapct.data.phantom.patient import VERTEBRA_Z, Patient, Study

BODY, LUNGS, LIVER, SPLEEN, KIDNEY_LEFT, KIDNEY_RIGHT, AORTA, VERTEBRAE, RIBS, TABLE = range(1, 11)

# half-axes in mm at heights z: x and y of the cavity, x and y of the muscle wall around it
_PROFILE = np.array(
    [
        (-280, 120, 86, 138, 104),
        (-220, 118, 86, 136, 103),
        (-150, 114, 84, 130, 102),
        (-80, 124, 88, 138, 106),
        (0, 134, 94, 150, 109),
        (80, 128, 88, 152, 104),
        (130, 110, 76, 162, 98),
        (170, 82, 58, 184, 90),
        (200, 52, 40, 196, 84),
        (230, 34, 30, 190, 80),
    ],
    np.float64,
)

# where the bone of each rib ends and its cartilage begins, T12 .. T1: 0 at the back, 1 in front
_RIB_ENDS = np.array([0.30, 0.42, 0.62, 0.68, 0.72, 0.75, 0.78, 0.80, 0.80, 0.80, 0.78, 0.75])


def profile(z_Z: np.ndarray, column: int) -> np.ndarray:
    """Half-axis of the torso's cross section in every slice, standard mm.

    Args:
        z_Z: heights of the slices.
        column: 0 and 1: the cavity's x and y; 2 and 3: the muscle wall's x and y.
    """
    fine = np.arange(-320.0, 280.0, 4.0)
    curve = np.interp(fine, _PROFILE[:, 0], _PROFILE[:, column + 1])
    window = np.hanning(13)
    smooth = np.convolve(np.pad(curve, 6, mode="edge"), window / window.sum(), mode="valid")
    return np.interp(z_Z, fine, smooth).astype(np.float32)


def spine_at(z: np.ndarray, patient: Patient) -> tuple[np.ndarray, np.ndarray]:
    """Centre of the vertebral bodies (x, y) at heights z, standard mm."""
    side, front, phase, skew = patient.spine
    x = side * np.sin(z / 90.0 + phase) + skew * z / 20
    y = (
        46.0
        - front * np.exp(-np.square((z + 150) / 80.0))
        + front * np.exp(-np.square((z - 80) / 90.0))
    )
    return x.astype(np.float32), y.astype(np.float32)


def diaphragm(box: Box, study: Study) -> np.ndarray:
    """Height of the diaphragm at every pixel, standard mm, YX: two domes and the tendon under the
    heart.
    """
    domes = []
    for cx, cy, rx, ry, height, drop in (
        (-66, -8, 78, 95, 38, 88),
        (68, -4, 78, 95, 26, 84),
        (12, -42, 62, 62, 8, 60),
    ):
        distance = np.square((box.x_YX - cx) / rx) + np.square((box.y_YX - cy) / ry)
        domes.append(height - drop * distance)
    highest = np.maximum(np.maximum(domes[0], domes[1]), domes[2]).astype(np.float32)
    return highest - np.float32(study.breath_mm)


def paint_wall(canvas: Canvas) -> None:
    """Skin, subcutaneous fat, muscle wall and the fat that fills the cavity."""
    p, whole = canvas.patient, canvas.whole
    z = whole.z_Z11[:, 0, 0]
    side, front, back = p.fat_mm
    low, high = (-230.0, -150.0, -270.0), (230.0, 150.0, 240.0)
    strands = whole.sample(canvas.field("muscle", low, high, (7.0, 7.0, 16.0)))
    a, b = profile(z, 2) + p.muscle_mm, profile(z, 3) + p.muscle_mm
    cavity = (profile(z, 0), profile(z, 1))
    # a seam of fat between two muscle layers
    middle = (0.45 * cavity[0] + 0.55 * a, 0.45 * cavity[1] + 0.55 * b)
    skin_y = whole.y_YX - np.float32((back - front) / 2)
    skin_py = np.power(np.abs(skin_y), np.float32(2.4))
    inner_b, outer_b = b + (front + back) / 2, b + (front + back) / 2 + 2.5
    muscle, fat, amplitude = p.hu["muscle"], p.hu["fat"], 13.0 * p.gain["muscle"]
    for k in range(len(z)):
        wall = whole.wall_ZYX[k]
        outer = _ellipse(whole.px_YX, skin_py, a[k] + side + 2.5, outer_b[k], wall)
        hu = whole.hu_ZYX[k]
        np.copyto(hu, np.float32(-5.0), where=outer)
        whole.label_ZYX[k][outer] = BODY
        strand = strands[k]
        under_skin = _ellipse(whole.px_YX, skin_py, a[k] + side, inner_b[k], wall)
        np.copyto(hu, fat + 6 * strand, where=under_skin)
        fibres = muscle + amplitude * strand
        np.copyto(fibres, fat + 40, where=strand > 1.9)
        np.copyto(hu, fibres, where=_ellipse(whole.px_YX, whole.py_YX, a[k], b[k], wall))
        seam = _ellipse(whole.px_YX, whole.py_YX, middle[0][k] + 1, middle[1][k] + 1, wall)
        seam &= strand > -0.5
        seam &= ~_ellipse(whole.px_YX, whole.py_YX, middle[0][k] - 1, middle[1][k] - 1, wall)
        np.copyto(hu, np.float32(fat + 30), where=seam)
        filling = (fat + 8 * strand).astype(np.float32)
        inside = _ellipse(whole.px_YX, whole.py_YX, cavity[0][k], cavity[1][k], wall)
        np.copyto(hu, filling, where=inside)


def _ellipse(px: np.ndarray, py: np.ndarray, a: float, b: float, wall: np.ndarray) -> np.ndarray:
    """Whether pixels of one slice lie inside a superellipse with half-axes a (x) and b (y)."""
    q = px * np.float32(max(a, 1.0) ** -2.4)
    q += py * np.float32(max(b, 1.0) ** -2.4)
    q += wall
    return q < 1


def paint_breasts(canvas: Canvas) -> None:
    """Fat with glandular tissue in front of a woman's chest wall."""
    p = canvas.patient
    if p.sex != "F":
        return
    size = 24.0 + 0.9 * p.fat_mm[1]
    for side in (-1.0, 1.0):
        centre = (side * 74, -94 - 0.5 * p.fat_mm[1], 68.0)
        radii = (size * 1.5, size, size * 1.35)
        low = (centre[0] - radii[0], centre[1] - radii[1], 68 - radii[2])
        high = (centre[0] + radii[0], centre[1] + radii[1], 68 + radii[2])
        box = canvas.box(low, high)
        if box is None:
            continue
        inside = box.ellipsoid(centre, radii) < 1
        texture = box.sample(canvas.field(f"breast {side}", (-150, -190, 0), (150, -40, 150), 10.0))
        outside = inside & (box.hu_ZYX < -500)
        glands = np.where(texture > 0.7, 110, 4) * np.abs(texture)
        box.paint(outside, (p.hu["fat"] + glands).astype(np.float32), BODY)


def paint_lungs(canvas: Canvas) -> None:
    """Two lungs over the diaphragm, around the mediastinum: vessels, and tissue that is denser
    towards the back.
    """
    p = canvas.patient
    low, high = (-145.0, -105.0, -80.0), (145.0, 105.0, 215.0)
    box = canvas.box(low, high)
    if box is None:
        return
    z = box.z_Z11[:, 0, 0]
    x_spine, y_spine = (v.reshape(-1, 1, 1) for v in spine_at(z, p))
    half = np.interp(z, [-80, 0, 60, 120, 170, 210], [26, 34, 40, 35, 28, 22]).reshape(-1, 1, 1)
    mask = box.inside(profile(z, 0) - 4, profile(z, 1) - 4)
    mask &= box.z_Z11 > diaphragm(box, canvas.study)
    mask &= box.tube(x_spine + 4, y_spine - 56, half, 88.0) > 1
    shift, size = p.shift["heart"], p.size["heart"]
    heart = (20 + shift[0], -38 + shift[1], 58 + shift[2] - 0.6 * canvas.study.breath_mm)
    mask &= box.ellipsoid(heart, (60 * size[0], 47 * size[1], 50 * size[2]), (-0.25, 0.0)) > 1
    mask &= box.tube(x_spine, y_spine, 25.0, 21.0) > 1
    mask &= (np.abs(box.x_YX - x_spine) > 24) | (box.y_YX < y_spine)  # none behind the spine
    f, g = (box.sample(canvas.field(f"lung vessels {i}", low, high, 13.0)) for i in range(2))
    fine = box.sample(canvas.field("lung tissue", low, high, 6.0))
    hilum = np.minimum(
        box.ellipsoid((-38, 2, 90), (75, 75, 90)), box.ellipsoid((40, 2, 90), (75, 75, 90))
    )
    tube = np.square(f) + np.square(g)
    hu = p.hu["lungs"] + 30 * p.gain["lungs"] * fine
    hu += (box.y_YX * 0.45).astype(np.float32)  # the patient lies on the back
    np.copyto(hu, np.float32(p.hu["blood"] - 30), where=tube < 0.11 / (0.35 + hilum))
    box.paint(mask, hu, LUNGS)


def paint_spine(canvas: Canvas) -> None:
    """Vertebral bodies with cortex and spongiosa, discs, canal and cord, arches and processes."""
    p = canvas.patient
    box = canvas.box((-62.0, 0.0, -270.0), (62.0, 135.0, 235.0))
    if box is None:
        return
    z = box.z_Z11[:, 0, 0]
    level = np.interp(z, VERTEBRA_Z, np.arange(len(VERTEBRA_Z)))
    pitch = np.interp(z, VERTEBRA_Z[1:], np.diff(VERTEBRA_Z))
    # 0 in the middle of a body, +-0.5 in the middle of a disc
    phase = (level - np.round(level)).reshape(-1, 1, 1).astype(np.float32)
    grow = np.interp(z, [-260, -150, 0, 100, 215], [25, 24, 20, 16.5, 13.5]).reshape(-1, 1, 1)
    x, y = (v.reshape(-1, 1, 1) for v in spine_at(z, p))
    bump = 0.12 * box.sample(canvas.field("vertebrae", (-62, 0, -270), (62, 135, 235), 9.0))
    waist = 1 - 0.10 * np.cos(2 * np.pi * phase)  # bodies are narrower in the middle
    body = box.tube(x, y, grow * waist, 0.78 * grow * waist) + bump
    trabecula = box.sample(canvas.field("trabecula", (-62, 0, -270), (62, 135, 235), 4.5))
    gap = np.float32(3.2) / pitch.reshape(-1, 1, 1)
    disc = np.abs(phase) > 0.5 - gap
    plate = np.abs(phase) > 0.5 - gap - np.float32(2.5) / pitch.reshape(-1, 1, 1)
    bone = (p.hu["spongiosa"] + 45 * trabecula).astype(np.float32)
    np.copyto(bone, np.float32(p.hu["cortex"]), where=(body > 0.78) | plate)
    box.paint((body < 1) & ~disc, bone, VERTEBRAE)
    box.paint((body < 1) & disc, np.float32(p.hu["disc"]), BODY)
    back = y + 0.78 * grow + 9
    canal = box.tube(x, back, 9.0, 8.0)
    hard = (p.hu["cortex"] * 0.7 + 60 * trabecula).astype(np.float32)
    dx, dy = np.abs(box.x_YX - x), box.y_YX - back
    arch = (canal < 3.0) & (phase > -0.25) & (dy > -9)
    wing = (np.abs(dy - 3) < 5.5) & (dx < grow + 17) & (np.abs(phase) < 0.22)
    spinous = (dx < 4.5) & (dy > 8) & (dy < 36) & (np.abs(phase + dy / 90) < 0.24)
    box.paint(arch | wing | spinous, hard, VERTEBRAE)
    box.paint(canal < 1, np.float32(18.0), BODY)
    box.paint(canal < 0.35, np.float32(40.0))


def paint_ribs(canvas: Canvas) -> None:
    """Twelve pairs of ribs as oblique bands in the chest wall, costal cartilage, breast bone,
    shoulder blades.
    """
    p, whole = canvas.patient, canvas.whole
    z = whole.z_Z11[:, 0, 0]
    ribs_z = VERTEBRA_Z[6:18]  # T12 .. T1
    # 0 at the back, 1 in front
    turn = np.arctan2(np.abs(whole.x_YX) / 130, whole.y_YX / 92) / np.float32(np.pi)
    rise = 92 * turn * turn * (3 - 2 * turn) + 8 * np.sin(np.float32(np.pi) * turn)
    a, b = profile(z, 0), profile(z, 1)
    texture = whole.sample(canvas.field("ribs", (-160, -120, -140), (160, 120, 220), 6.0))
    thick = 9.5
    for k in range(len(z)):
        if not -170 < z[k] < 212:
            continue
        wall = whole.wall_ZYX[k]
        shell = _ellipse(whole.px_YX, whole.py_YX, a[k] + thick + 0.5, b[k] + thick + 0.5, wall)
        shell &= ~_ellipse(whole.px_YX, whole.py_YX, a[k] - 0.5, b[k] - 0.5, wall)
        rows, columns = np.nonzero(shell)
        t = turn[rows, columns]
        number = np.interp(z[k] + rise[rows, columns], ribs_z, np.arange(12), left=-9, right=99)
        nearest = np.clip(np.round(number), 0, 11).astype(np.int64)
        gap = np.abs(number - nearest)
        end = _RIB_ENDS[nearest]
        band = (gap < 0.32) & (np.abs(whole.x_YX[rows, columns]) > 20)
        bone = band & (t < end)
        cartilage = band & (t >= end) & (nearest > 1) & (t < 0.95)
        hu, label = whole.hu_ZYX[k], whole.label_ZYX[k]
        hard = p.hu["cortex"] * np.where(gap > 0.2, 0.9, 0.45) + 40 * texture[k, rows, columns]
        hu[rows[bone], columns[bone]] = hard[bone]
        label[rows[bone], columns[bone]] = RIBS
        hu[rows[cartilage], columns[cartilage]] = 95
        plate = (np.abs(whole.x_YX[rows, columns]) < 17) & (t > 0.8) & (z[k] > 10) & (z[k] < 150)
        hu[rows[plate], columns[plate]] = p.hu["spongiosa"] * 0.8
    _paint_shoulder_blades(canvas)


def _paint_shoulder_blades(canvas: Canvas) -> None:
    """A curved plate on either side of the spine, behind the ribs."""
    p = canvas.patient
    for side in (-1.0, 1.0):
        inner, outer = side * 60, side * 160
        box = canvas.box((min(inner, outer), 20.0, 70.0), (max(inner, outer), 125.0, 205.0))
        if box is None:
            continue
        # distances along the blade, outwards and backwards, and at a right angle to it
        across = (box.x_YX * side - 112) * 0.77 + (box.y_YX - 72) * 0.64
        normal = (box.x_YX * side - 112) * 0.64 + (box.y_YX - 72) * 0.77 + np.square(across) / 160
        reach = np.interp(box.z_Z11, [70, 110, 170, 200], [4, 24, 40, 30])
        blade = (np.abs(normal - 12) < 3.5) & (np.abs(across) < reach)
        box.paint(blade & (box.label_ZYX == BODY), np.float32(p.hu["cortex"] * 0.75))


def paint_table(canvas: Canvas) -> None:
    """A curved couch under the back, a hard shell around foam. It does not turn with the
    patient.
    """
    study, p = canvas.study, canvas.patient
    whole = canvas.whole
    touched = np.flatnonzero((whole.label_ZYX == BODY).any(axis=(0, 2)))
    lowest_row = int(touched[-1]) if touched.size else study.shape[1] // 2
    floor = lowest_row * study.spacing_mm[1] + study.table_gap_mm
    from_middle = np.arange(study.shape[2]) - (study.shape[2] - 1) / 2
    columns = from_middle * study.spacing_mm[2] - study.centre_mm[0]
    rows = np.arange(study.shape[1]) * study.spacing_mm[1]
    surface = floor - np.square(columns)[None, :] / 1400
    depth = rows[:, None] - surface  # mm below the couch's surface
    slab = (depth > 0) & (depth < 16) & (np.abs(columns) < 215)[None, :]
    skin = slab & ((depth < 4) | (depth > 12))
    rng = p.rng(f"table {study.visit}")
    foam, hard = np.float32(rng.uniform(-960, -900)), np.float32(rng.uniform(-250, 40))
    free = slab & (whole.label_ZYX == 0)
    np.copyto(whole.hu_ZYX, np.where(skin, hard, foam), where=free)
    whole.label_ZYX[free] = TABLE
