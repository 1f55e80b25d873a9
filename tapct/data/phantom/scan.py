"""Measure a painted body as a scanner does: blur, noise, field of view."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tapct.data.phantom import organs, torso
from tapct.data.phantom.canvas import Canvas, blank_canvas
from tapct.data.phantom.patient import Patient, Study, in_phase
from tapct.data.phantom.warp import Warp, draw_warp, in_first_pose, warped
from tapct.types import AIR_HU

# each is painted over the ones before it
BODY_LAYERS = (
    torso.paint_wall,
    torso.paint_breasts,
    organs.paint_bowel,
    organs.paint_colon,
    organs.paint_stomach,
    organs.paint_spleen,
    organs.paint_liver,
    organs.paint_kidneys,
    torso.paint_lungs,
    organs.paint_back_muscles,
    organs.paint_heart,
    torso.paint_ribs,
    torso.paint_spine,
    organs.paint_vessels,
    organs.paint_lesions,
)


@dataclass(frozen=True)
class Painted:
    """A body as it lies on the table of a scanner.

    Args:
        canvas: HU without blur and noise, and labels.
        lesions_ZYX: uint8, see `organs.mark_lesions`.
        pose: study in whose pose and grid the body was painted.
        warp: deformation from `canvas` to that pose; None where both are the same.
    """

    canvas: Canvas
    lesions_ZYX: np.ndarray
    pose: Study
    warp: Warp | None = None


def paint(
    patient: Patient, study: Study, first: Study | None = None, warp_mm: float = 0.0
) -> Painted:
    """Paint a patient and the table.

    Args:
        patient: body to paint.
        study: field of view and pose.
        first: first visit of the patient, for a follow-up that is a deformation of it.
        warp_mm: size of the deformation; 0 paints the follow-up in its own pose.
    """
    warp, pose = None, study
    if first is not None and warp_mm > 0:
        warp = draw_warp(patient, first, study, warp_mm)
        pose = in_first_pose(warp, first, study)
    patient = in_phase(patient, study.phase)
    canvas = blank_canvas(patient, pose)
    for paint_layer in BODY_LAYERS:
        paint_layer(canvas)
    lesions_ZYX = organs.mark_lesions(canvas)
    if warp is not None:
        canvas, lesions_ZYX = warped(canvas, lesions_ZYX, warp, study)
    torso.paint_table(canvas)
    return Painted(canvas, lesions_ZYX, pose, warp)


def scan(patient: Patient, study: Study) -> tuple[np.ndarray, np.ndarray]:
    """Paint a patient and measure the painted body.

    Args:
        patient: body to paint.
        study: scanner, field of view, noise.
    Returns:
        hu_ZYX int16 and labels_ZYX uint16, LPS, axial slices first.
    """
    canvas = paint(patient, study).canvas
    return measure(canvas), canvas.whole.label_ZYX.astype(np.uint16)


def measure(canvas: Canvas) -> np.ndarray:
    """Blur with the kernel's spread, add its correlated noise, round."""
    study, patient = canvas.study, canvas.patient
    rng = patient.rng(f"noise {study.visit}")
    hu = canvas.whole.hu_ZYX
    px = study.spacing_mm[2]
    side = _side_weight((1.1 if study.sharp else 1.9) / px)
    width = _side_weight(1.6 / px)
    gain_YX = _noise_map(canvas)
    outside = _round_field(study)
    out = np.empty(hu.shape, np.int16)
    through = np.float32(0.1)
    for k in range(len(hu)):
        near = hu[max(k - 1, 0)] + hu[min(k + 1, len(hu) - 1)]
        plane = _blur(near * through + hu[k] * (1 - 2 * through), side)
        noise = rng.standard_normal(plane.shape, dtype=np.float32)
        low = _blur(noise, width)
        if study.sharp:
            noise -= np.float32(0.8) * low
        else:
            noise = low
        plane += noise * (gain_YX / np.float32(noise[::4, ::4].std()))
        np.rint(plane, out=plane)
        np.clip(plane, AIR_HU, 3071, out=plane)
        plane[outside] = AIR_HU
        out[k] = plane
    return out


def _side_weight(sigma_px: float) -> float:
    """Weight w of the taps (w, 1 - 2w, w) whose variance is sigma squared; sigma is limited to 0.7
    pixels.
    """
    return float(min(0.5 * sigma_px**2 * 0.5, 0.25))


def _blur(plane: np.ndarray, w: float) -> np.ndarray:
    """Blur with the taps (w, 1 - 2w, w) along y, then along x."""
    out = plane * np.float32(1 - 2 * w)
    side = plane * np.float32(w)
    out[1:] += side[:-1]
    out[:-1] += side[1:]
    out[0] += side[0]
    out[-1] += side[-1]
    side = out * np.float32(w)
    out *= np.float32(1 - 2 * w)
    out[:, 1:] += side[:, :-1]
    out[:, :-1] += side[:, 1:]
    out[:, 0] += side[:, 0]
    out[:, -1] += side[:, -1]
    return out


def _noise_map(canvas: Canvas) -> np.ndarray:
    """Standard deviation of the noise per pixel, YX: rays through the middle are the weakest, so
    it is highest there.
    """
    whole, size = canvas.whole, 1 + 0.012 * canvas.patient.fat_mm[0]
    q = np.square(whole.x_YX / 170) + np.square(whole.y_YX / 120)
    return (canvas.study.noise_hu * size * (0.45 + 0.55 * np.exp(-0.9 * q))).astype(np.float32)


def _round_field(study: Study) -> np.ndarray:
    """Whether pixels lie outside the round field of view of a scanner that pads there: bool YX."""
    _, height, width = study.shape
    if not study.round_field:
        return np.zeros((height, width), bool)
    y, x = np.ogrid[:height, :width]
    return (x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2 > (min(height, width) / 2) ** 2
