"""How a scan was made and stored, for the columns of the manifest: closed lists of words, and
numbers.
"""

from __future__ import annotations

import math
import re

import numpy as np

from tapct.data.readers.raw import Header, Image
from tapct.data.scans.plain_facts import OTHER
from tapct.types import Technique

# families of scanners; a number behind one is kept, e.g. `Aquilion 64`
_MODELS_TEXT = """
    Sensation Emotion Volume_Zoom Definition Perspective Scope Spirit Force Drive Edge Flash go
    NAEOTOM SOMATOM Biograph mCT Symbia LightSpeed BrightSpeed HiSpeed ProSpeed Discovery Optima
    Revolution Apex Frontier Brilliance Ingenuity IQon iCT Incisive Gemini Vereos MX8000 MX
    Precedence Aquilion ONE PRIME Lightning Asteion Alexion Activion Astelion SCENARIA Supria ECLOS
    Pronto uCT uMI NeuViz Ingenia CereTom BodyTom PQ5000 Access
"""
_MODELS = {name.lower(): name for name in _MODELS_TEXT.replace("Volume_", "").split()}
_WORD_OR_NUMBER = re.compile(r"[A-Za-z]+\d*|\d+")
# BodyPartExamined in the standard, as far as it occurs in CT
_BODY_PARTS_TEXT = """
    ABDOMEN ABDOMENPELVIS AORTA ARM BRAIN BREAST CHEST CHESTABDOMEN CHESTABDPELVIS CSPINE CTSPINE
    EAR ELBOW EXTREMITY EYE FACE FEMUR FOOT HAND HEAD HEADNECK HEART HIP JAW KIDNEY KNEE LEG LIVER
    LSPINE LSSPINE LUNG MANDIBLE MAXILLA MEDIASTINUM NECK NECKCHEST NECKCHESTABDOMEN
    NECKCHESTABDPELV ORBIT PANCREAS PELVIS SHOULDER SINUS SKULL SPINE TEETH THORAX TLSPINE TSPINE
    WHOLEBODY WRIST
"""
_BODY_PARTS = frozenset(_BODY_PARTS_TEXT.split())
_NO_CONTRAST = frozenset(("NO", "NONE", "N", "0", "WITHOUT", "NATIVE", "NONCONTRAST"))


def technique_of(header: Header, image: Image) -> Technique:
    """How a scan was made and stored.

    Args:
        header: header, completed by the side-car.
        image: scan as its file holds it.
    """
    slope, intercept = image.rescaling or (image.slope, image.intercept)
    low, high = image.steps_mm or (math.nan, math.nan)
    return Technique(
        model=model(header.model),
        kvp=_number(header.kvp, 20, 300),
        thickness_mm=_number(header.thickness, 0, 1000),
        contrast=contrast(header.contrast),
        body_part=body_part(header.body_part),
        stored_type=image.stored_type or image.voxels_IJK.dtype.newbyteorder("=").name,
        slope=float(slope),
        intercept=float(intercept),
        orientation=orientation(image.affine),
        step_min_mm=low,
        step_max_mm=high,
        tilt_deg=tilt_deg(image.affine),
    )


def model(text: str) -> str:
    """The family of a scanner and its number; `other` for a text that names none of the list."""
    words = _WORD_OR_NUMBER.findall(text)
    found = [_MODELS[word.lower()] for word in words if word.lower() in _MODELS]
    if not found:
        return OTHER if text.strip() else ""
    rows = [word for word in words if word.isdigit() and len(word) <= 3]  # of the detector
    return " ".join([*found, *rows[:1]])


def body_part(text: str) -> str:
    """A body part of the standard; `other` for any other text."""
    word = re.sub(r"[^A-Z]", "", text.upper())
    if word in _BODY_PARTS:
        return word
    return OTHER if text.strip() else ""


def contrast(text: str) -> str:
    """Whether a contrast agent is declared: yes, no, or empty where nothing is."""
    word = re.sub(r"[^A-Z0-9]", "", text.upper())
    if not word:
        return ""
    return "no" if word in _NO_CONTRAST else "yes"


def orientation(affine: np.ndarray) -> str:
    """The nearest directions of the axes i, j, k in LPS; empty where two of them are the same.

    Args:
        affine: 4x4 matrix, (i, j, k, 1) -> LPS mm.
    """
    axes = np.asarray(affine)[:3, :3]
    if not np.isfinite(axes).all():
        return ""
    nearest = np.abs(axes).argmax(axis=0)
    if len(set(nearest.tolist())) < 3:
        return ""
    letters = (("R", "L"), ("A", "P"), ("I", "S"))
    return "".join(letters[axis][int(axes[axis, k] > 0)] for k, axis in enumerate(nearest))


def tilt_deg(affine: np.ndarray) -> float:
    """Angle between the step from slice to slice and the normal of the slices, in degrees."""
    i, j, k = np.asarray(affine, np.float64)[:3, :3].T
    normal = np.cross(i, j)
    lengths = float(np.linalg.norm(normal) * np.linalg.norm(k))
    if not math.isfinite(lengths) or lengths == 0:
        return math.nan
    across = float(np.linalg.norm(np.cross(normal, k))) / lengths
    along = abs(float(normal @ k)) / lengths
    return round(math.degrees(math.atan2(across, along)), 2)


def _number(text: str, low: float, high: float) -> float:
    """A number above `low` and below `high` from a text; NaN for any other."""
    try:
        value = float(text.split("/")[0].strip(" \0"))
    except ValueError:
        return math.nan
    return value if low < value < high else math.nan
