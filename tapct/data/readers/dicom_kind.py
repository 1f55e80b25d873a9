"""What a DICOM object is: a slice of a CT, an image computed from slices, or something else."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from tapct.base.marks import quoted
from tapct.data.readers import dicom_elements as elements

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom.dataset import Dataset

CT = "1.2.840.10008.5.1.4.1.1.2"
MULTIFRAME = (CT + ".1", CT + ".2")  # Enhanced CT, and Enhanced CT converted from single slices
DICOMDIR = "1.2.840.10008.1.3.10"
_STANDARD = "1.2.840.10008."
_STORAGE = "1.2.840.10008.5.1.4.1.1."
# SOP classes of objects that hold no image of a scanner, without `_STORAGE`; a text ends with a
# point where all classes below it are meant
OBJECTS = {
    "66.4": "segmentation",
    "66.7": "segmentation",
    "66.": "spatial registration",
    "67": "real world values",
    "88.": "structured report",
    "104.": "document",
    "11.": "presentation state",
    "9.": "waveform",
    "481.3": "RT structure set",
    "481.5": "RT plan",
    "481.": "RT object",
    "68.": "surface",
    "66": "raw data",
}
SEGMENTATIONS = (_STORAGE + "66.4", _STORAGE + "66.7")
STRUCTURE_SET = _STORAGE + "481.3"
RT_IMAGES = (_STORAGE + "481.1", _STORAGE + "481.2")  # RT Image and RT Dose hold pixels

# Words of ImageType that mark a projection for the planning of a scan.
_LOCALIZER = frozenset(("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"))
# Words of ImageType that mark values or a grid that no slice of a scanner has, whatever else the
# element shows.
_COMPUTED = {
    **dict.fromkeys(("MIP", "MINIP", "MAXIP", "MNIP", "PROJECTION"), "a projection over slices"),
    **dict.fromkeys(("MPR", "CPR", "REFORMAT", "REFORMATTED", "CURVED"), "a reformat"),
    **dict.fromkeys(("VRT", "SSD", "RENDERED", "RENDERING", "VOLREN"), "a rendering"),
    **dict.fromkeys(
        ("IODINE", "MATERIAL", "CALCIUM", "URIC", "GOUT", "VNC", "FAT", "WATER", "OVERLAY"),
        "a map of a material",
    ),
    **dict.fromkeys(("ZEFF", "RHO", "DENSITY", "MD"), "a map of a material"),
    **dict.fromkeys(
        ("PERFUSION", "CBF", "CBV", "MTT", "TTP", "TMAX", "PERMEABILITY"), "a map of perfusion"
    ),
    **dict.fromkeys(("SUBTRACTION", "DIFFERENCE", "MASKED"), "a difference of images"),
    **dict.fromkeys(("SCREEN", "SCREENSAVE", "CAPTURE", "PASTED"), "a capture of the screen"),
    **dict.fromkeys(("DOSE", "REPORT", "PROTOCOL", "DOSEREPORT"), "a report"),
    **dict.fromkeys(("FUSION", "FUSED"), "an image of two modalities"),
    **dict.fromkeys(("DIVISION", "QUANTITY"), "a calculation with images"),
}
# Phrases of several words, and words that mean this only where ImageType is DERIVED or SECONDARY.
_PHRASES = {
    "MIN_IP": "a projection over slices",
    "MAX_IP": "a projection over slices",
    "Z_EFF": "a map of a material",
    "EFF_ATOMIC_NUM": "a map of a material",
    "MAT_": "a map of a material",
    "DE_MATERIAL": "a map of a material",
    "BONE_REMOVAL": "an image without its bones",
}
_COMPUTED_IF_DERIVED = {
    **dict.fromkeys(
        ("AVERAGE", "MEAN", "MEDIAN", "MINIMUM", "MAXIMUM", "STD_DEVIATION", "AIP"),
        "a projection over slices",
    ),
    **dict.fromkeys(("3D", "VR", "MULTIPLANAR", "OBLIQUE"), "a reformat"),
}
# Words of SeriesDescription with the same meaning. Others, such as DOSE in "low dose" or CALCIUM in
# "calcium score", stand in the names of plain scans.
_IN_DESCRIPTIONS = frozenset(
    ("MIP", "MINIP", "MPR", "CPR", "VRT", "SSD", "VNC", "CBF", "CBV", "MTT")
)
_AXIAL = 0.75  # cosine of 41 degrees between the normal of a slice and the body's long axis


def object_title(sop_class: str) -> str:
    """What an object without an image is, such as `segmentation`; empty for an image."""
    if sop_class in RT_IMAGES or not sop_class.startswith(_STANDARD):
        return ""
    if not sop_class.startswith(_STORAGE):
        return "object"
    rest = sop_class.removeprefix(_STORAGE)
    for start, title in OBJECTS.items():
        if rest == start or (start.endswith(".") and rest.startswith(start)):
            return title
    return ""


def refusal_of(name: str, sop_class: str, dataset: Dataset) -> tuple[str, str] | None:
    """Reason and detail for which a file is no slice of a CT, or lacks what its values need to
    become HU; None for a slice.

    An image whose SOP class is CT Image Storage is CT where Modality is missing.

    Args:
        name: name of the file, for the detail.
        sop_class: SOPClassUID of the data set or of the meta header.
        dataset: header of the file.
    """
    modality = elements.text(dataset, "Modality").upper()
    if not modality and not sop_class:
        return "corrupt", f"{name} has neither Modality nor SOP class; copy the file again"
    is_ct_class = sop_class == CT or sop_class in MULTIFRAME
    if modality not in ("CT", "") or (not modality and not is_ct_class):
        return "not_ct", f"Modality is {quoted(modality)}; rule: CT"
    if sop_class and not is_ct_class:
        return "not_ct", f"SOP class {quoted(sop_class)} is not CT Image Storage"
    image_type = elements.text(dataset, "ImageType").upper()
    if is_localizer(image_type):
        shown = image_type.replace("\\", "/")
        return "localizer", f"ImageType is {quoted(shown)}, which is a projection and not a slice"
    if sop_class in MULTIFRAME:
        return None  # the rest is given for each frame
    num_frames = elements.whole(dataset, "NumberOfFrames")
    if num_frames > 1:
        return (
            "multiframe",
            f"{name} holds {num_frames} frames without their positions; convert it to NIfTI",
        )
    return _values_refusal(name, dataset)


def is_localizer(image_type: str) -> bool:
    """Whether ImageType or FrameType names a projection for the planning of a scan."""
    return bool(_LOCALIZER & set(_words(image_type.upper())))


def _values_refusal(name: str, dataset: Dataset) -> tuple[str, str] | None:
    """Reason and detail for which the values of a slice cannot become HU."""
    samples = elements.unsigned(dataset, "SamplesPerPixel") or 1
    photometric = elements.text(dataset, "PhotometricInterpretation").upper()
    if samples != 1 or (photometric and not photometric.startswith("MONOCHROME")):
        return (
            "not_scalar",
            f"{name} has {samples} values per pixel ({quoted(photometric)}); rule: one grey value",
        )
    return rescale_refusal(
        name,
        elements.number(dataset, "RescaleSlope"),
        elements.number(dataset, "RescaleIntercept"),
        elements.text(dataset, "RescaleType"),
        has_table="ModalityLUTSequence" in dataset,
    )


def rescale_refusal(
    name: str, slope: float | None, intercept: float | None, unit: str, *, has_table: bool = False
) -> tuple[str, str] | None:
    """Reason and detail for which a rescaling does not lead to HU.

    Args:
        name: name of the file, for the detail.
        slope: RescaleSlope; None where it is missing.
        intercept: RescaleIntercept; None where it is missing.
        unit: RescaleType; HU where it is empty.
        has_table: whether the header has a table of values, ModalityLUTSequence, instead.
    """
    if has_table and (slope is None or intercept is None):
        return (
            "no_rescale",
            f"{name} gives its HU by a table (ModalityLUTSequence), which tapct does not read; "
            "export it with RescaleSlope and RescaleIntercept",
        )
    if slope is None or intercept is None:
        return "no_rescale", f"{name} has no rescale slope and intercept, so its values are not HU"
    if slope == 0 or not (math.isfinite(slope) and math.isfinite(intercept)):
        return "no_rescale", f"{name} has rescale slope {slope}, intercept {intercept}"
    if unit.upper() not in ("", "HU", "US"):
        return "not_hu", f"RescaleType is {quoted(unit)}; rule: HU"
    return None


def derivation_of(dataset: Dataset, axes: Sequence[float]) -> str:
    """In a few words how an image was computed from others; empty for a plain slice.

    `DERIVED` alone is no sign of it: many archives and anonymisers mark plain slices so.

    Args:
        dataset: header of the file.
        axes: direction of growing column index and of growing row index, six numbers.
    """
    return derivation_from(
        elements.text(dataset, "ImageType"), elements.text(dataset, "SeriesDescription"), axes
    )


def derivation_from(image_type: str, description: str, axes: Sequence[float]) -> str:
    r"""`derivation_of` from the text of ImageType (separated by `\`) and SeriesDescription."""
    image_type = image_type.upper()
    is_derived = not image_type or bool({"DERIVED", "SECONDARY"} & set(image_type.split("\\")[:2]))
    words = _words(image_type)
    for word in words:
        if word in _COMPUTED:
            return _COMPUTED[word]
    for phrase, what in _PHRASES.items():
        if phrase in image_type:
            return what
    if not is_derived:
        return ""
    for word in words:
        if word in _COMPUTED_IF_DERIVED:
            return _COMPUTED_IF_DERIVED[word]
    # where ImageType was blanked or is silent, the name of the series often shows it
    for word in _words(description.upper()):
        if word in _IN_DESCRIPTIONS:
            return _COMPUTED[word]
    if "IODINE MAP" in description.upper():
        return _COMPUTED["IODINE"]
    if image_type and abs(axes[0] * axes[4] - axes[1] * axes[3]) < _AXIAL:
        return "a reformat"  # no scanner makes coronal or sagittal slices
    return ""


def _words(text: str) -> list[str]:
    """Words of a text, without the signs between them."""
    return re.findall(r"[A-Z0-9]+(?:_DEVIATION)?", text)
