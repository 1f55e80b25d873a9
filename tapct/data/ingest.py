"""Read one scan or label map from disk as a `Volume` or `LabelMap`.

A reader gives the voxels as stored. Here they become HU (or labels) in LPS with axial slices first.
Nothing is resampled: axes are permuted and flipped to the nearest LPS axes, and a scan that this
cannot bring upright (gantry tilt, more than 41 degrees off the body's axes) is refused. Every rule
has a reason code. An exception inside a reader library becomes `unreadable` with its message.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tapct.base.exits import single_line
from tapct.data import formats
from tapct.data.check_rules import DEFAULT_RULES, CheckRules
from tapct.data.ct_check import check_hu, check_is_ct
from tapct.data.discover import UNREADABLE, Source, find_source
from tapct.data.geometry import to_lps
from tapct.data.headers import facts_of, label_names, merge_sidecar, read_sidecar
from tapct.data.readers import DICOM, format_named
from tapct.data.readers.raw import MAX_TEXT, Image
from tapct.types import AIR_HU, LabelMap, Refused, Volume

MAX_HU = 32767  # largest int16
MAX_LABEL = 65535  # largest uint16


def read_volume(
    path: Path | str, key: bytes | None = None, rules: CheckRules | None = DEFAULT_RULES
) -> Volume:
    """Read one CT scan.

    Args:
        path: path of a NIfTI, NRRD or MetaImage file, of a folder with one DICOM series, or of one
            DICOM file, which stands for its whole series.
        key: secret of the patient's hash in `facts`; without it the hash stays empty.
        rules: thresholds of the checks of values; None leaves these checks out, for a scan that
            passed them before and is recognised by its digest.
    Returns:
        The scan in int16 HU, (Z, Y, X) in LPS, every value >= AIR_HU.
    Raises:
        Refused: the scan breaks a rule.
    """
    return read_source(find_source(Path(path)), key, rules)


def read_source(
    source: Source, key: bytes | None = None, rules: CheckRules | None = DEFAULT_RULES
) -> Volume:
    """`read_volume` for a source that `find_sources` found, without searching its folder again."""
    image = _read_image(source)
    header = image.header
    if source.kind != DICOM.name:
        header = merge_sidecar(header, read_sidecar(source.path))
    if header.modality and header.modality.upper() != "CT":
        raise Refused("not_ct", f"Modality is '{header.modality}'; rule: CT")
    view_ZYX, spacing_mm, origin_mm = to_lps(image.voxels_IJK, image.affine)
    declared_ct = header.modality.upper() == "CT"
    if rules is not None:
        check_is_ct(image.voxels_IJK, image.slope, image.intercept, declared_ct, rules)
    hu_ZYX = _to_hu(view_ZYX, image.slope, image.intercept)
    marks = () if rules is None else check_hu(hu_ZYX, declared_ct, rules)
    return Volume(hu_ZYX, spacing_mm, origin_mm, facts_of(header, key), marks)


def read_labels(path: Path | str) -> LabelMap:
    """Read one label map.

    Names come from NAME.json {"labels": {"1": "liver"}}, else from the file's own table (Slicer
    segments, the label table of a NIfTI extension), else they stay empty.

    Args:
        path: path of a NIfTI, NRRD or MetaImage file.
    Returns:
        Labels as uint16, (Z, Y, X) in LPS.
    Raises:
        Refused: a reason for which a scan is refused too, or `not_labels`: values that are not
            whole numbers from 0 to 65535.
    """
    source = find_source(Path(path))
    if source.kind == DICOM.name:
        raise Refused(
            "unsupported",
            f"labels are read from {formats.listed('or', without=DICOM.name)}; convert the DICOM "
            "SEG",
        )
    image = _read_image(source)
    view_ZYX, spacing_mm, origin_mm = to_lps(image.voxels_IJK, image.affine)
    labels_ZYX = _to_labels(source.path.name, view_ZYX, image.slope, image.intercept)
    names = label_names(source.path, read_sidecar(source.path)) or image.names
    return LabelMap(labels_ZYX, spacing_mm, origin_mm, names)


def _read_image(source: Source) -> Image:
    """Call the format's reader; every exception but a missing library becomes a refusal."""
    if source.kind == UNREADABLE:
        raise Refused(
            "unreadable", f"folder {source.path.name} cannot be listed; check its permissions"
        )
    try:
        for path in source.files:
            if path.stat().st_size == 0:
                raise Refused("empty_file", f"{path.name} has no content")
        return format_named(source.kind).read(source.files)
    except (Refused, ImportError):  # a library that cannot be loaded is not a fault of this scan
        raise
    except Exception as error:
        raise Refused(
            "unreadable", single_line(f"{type(error).__name__}: {error}", MAX_TEXT)
        ) from error


def _to_hu(view_ZYX: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """int16 HU, slice by slice: clamp to AIR_HU from below, refuse what int16 cannot hold."""
    hu_ZYX = np.empty(view_ZYX.shape, dtype=np.int16)
    is_whole = view_ZYX.dtype.kind in "iu" and slope == 1.0 and float(intercept).is_integer()
    for z, plane_YX in enumerate(view_ZYX):
        if is_whole and plane_YX.dtype == np.int16 and intercept == 0:
            np.maximum(plane_YX, AIR_HU, out=hu_ZYX[z])
            continue
        if is_whole:  # exact: float64 would round 64-bit integers
            values_YX = plane_YX.astype(np.int64) + int(intercept)
        else:
            values_YX = np.rint(plane_YX.astype(np.float64) * slope + intercept)
        if not np.isfinite(values_YX).all():
            raise Refused(
                "not_finite", f"slice {z} holds NaN or infinity; write air ({AIR_HU}) there"
            )
        if values_YX.max() > MAX_HU:
            raise Refused(
                "out_of_range", f"slice {z} reaches {values_YX.max():g} HU; rule: at most {MAX_HU}"
            )
        hu_ZYX[z] = np.maximum(values_YX, AIR_HU)
    return hu_ZYX


def _to_labels(name: str, view_ZYX: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """uint16 labels, slice by slice: refuse fractions and what uint16 cannot hold."""
    labels_ZYX = np.empty(view_ZYX.shape, dtype=np.uint16)
    for z, plane_YX in enumerate(view_ZYX):
        values_YX = plane_YX.astype(np.float64) * slope + intercept
        if not (np.isfinite(values_YX).all() and (values_YX == np.rint(values_YX)).all()):
            raise Refused("not_labels", f"{name} holds values that are not whole numbers")
        if values_YX.min() < 0 or values_YX.max() > MAX_LABEL:
            raise Refused(
                "not_labels",
                f"labels run from {values_YX.min():g} to {values_YX.max():g}; rule: 0 to "
                f"{MAX_LABEL}",
            )
        labels_ZYX[z] = values_YX
    return labels_ZYX
