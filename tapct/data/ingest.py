"""One scan or label map from disk to `Volume` or `LabelMap`, and the list of what a folder holds.

The readers give voxels as stored; here they become HU in LPS with axial slices first. Nothing is
resampled: axes are permuted and flipped to the nearest LPS axes; what that cannot mend (gantry
tilt, turns beyond 41 degrees) is refused. Every rule has a reason code; an exception inside a
reader library becomes `unreadable` with its message.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tapct.data.ct_check import check_is_ct
from tapct.data.discover import Source, _source_of
from tapct.data.geometry import (
    to_lps,
)
from tapct.data.headers import facts_from_header, label_names, merge_facts, read_sidecar
from tapct.data.readers import dicom, itk, nifti
from tapct.data.readers.raw import Image, one_line
from tapct.types import AIR_HU, LabelMap, Refused, Volume

_MAX_HU = 32767


def read_volume(path: Path | str, key: bytes | None = None) -> Volume:
    """Read one CT scan.

    Args:
        path: NIfTI, NRRD or MetaImage file, a folder with one DICOM series, or a DICOM file (then
            its whole series).
        key: for the hashes of patient, study and series in `facts`; without it they stay empty.
    Returns:
        The scan in int16 HU, (Z, Y, X) in LPS, every value >= AIR_HU.
    Raises:
        Refused: the scan breaks a rule.
    """
    return read_source(_source_of(Path(path)), key)


def read_source(source: Source, key: bytes | None = None) -> Volume:
    """`read_volume` for a source that `find_sources` found; saves looking through the folder
    again.
    """
    image = _read_image(source)
    header = image.header
    if source.kind != "dicom":
        header = merge_facts(header, read_sidecar(source.path))
    if header.modality and header.modality.upper() != "CT":
        raise Refused("not_ct", f"Modality is '{header.modality}'; rule: CT")
    hu_ZYX, spacing_mm, origin_mm = to_lps(image.voxels_IJK, image.affine)
    check_is_ct(
        image.voxels_IJK, image.slope, image.intercept, declared_ct=header.modality.upper() == "CT"
    )
    hu_ZYX = _to_hu(hu_ZYX, image.slope, image.intercept)
    return Volume(hu_ZYX, spacing_mm, origin_mm, facts_from_header(header, key))


def read_labels(path: Path | str) -> LabelMap:
    """Read one label map.

    Names come from NAME.json {"labels": {"1": "liver"}}, else from the file's own table (Slicer
    segments, the label table of a NIfTI extension), else they stay empty.

    Args:
        path: NIfTI, NRRD or MetaImage file.
    Returns:
        Labels as uint16, (Z, Y, X) in LPS.
    Raises:
        Refused: unreadable like a scan, or `not_labels`: values that are not whole numbers from 0
            to 65535.
    """
    source = _source_of(Path(path))
    if source.kind == "dicom":
        raise Refused(
            "unsupported", "labels are read from NIfTI, NRRD or MetaImage; convert the DICOM SEG"
        )
    image = _read_image(source)
    values_ZYX, spacing_mm, origin_mm = to_lps(image.voxels_IJK, image.affine)
    labels_ZYX = np.empty(values_ZYX.shape, dtype=np.uint16)
    for z, plane in enumerate(values_ZYX):
        values = plane.astype(np.float64) * image.slope + image.intercept
        if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
            raise Refused(
                "not_labels", f"{source.path.name} holds values that are not whole numbers"
            )
        if values.min() < 0 or values.max() > 65535:
            raise Refused(
                "not_labels",
                f"labels run from {values.min():g} to {values.max():g}; rule: 0 to 65535",
            )
        labels_ZYX[z] = values
    names = label_names(source.path, read_sidecar(source.path)) or image.names
    return LabelMap(labels_ZYX, spacing_mm, origin_mm, names)


def _to_hu(view_ZYX: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """int16 HU, slice by slice: clamp to AIR_HU from below, refuse what int16 cannot hold."""
    hu_ZYX = np.empty(view_ZYX.shape, dtype=np.int16)
    whole = view_ZYX.dtype.kind in "iu" and slope == 1.0 and float(intercept).is_integer()
    for z, plane in enumerate(view_ZYX):
        if whole and plane.dtype == np.int16 and intercept == 0:
            np.maximum(plane, AIR_HU, out=hu_ZYX[z])
            continue
        if whole:
            values = plane.astype(np.int64) + int(intercept)
        else:
            values = np.rint(plane.astype(np.float64) * slope + intercept)
        if not np.isfinite(values).all():
            raise Refused(
                "not_finite", f"slice {z} holds NaN or infinity; write air ({AIR_HU}) there"
            )
        if values.max() > _MAX_HU:
            raise Refused(
                "out_of_range", f"slice {z} reaches {values.max():g} HU; rule: at most {_MAX_HU}"
            )
        hu_ZYX[z] = np.maximum(values, AIR_HU)
    return hu_ZYX


def _read_image(source: Source) -> Image:
    """Call the reader; whatever goes wrong in there is the file's fault, not the run's."""
    if source.kind == "unreadable":
        raise Refused(
            "unreadable", f"folder {source.path.name} cannot be listed; check its permissions"
        )
    try:
        for path in source.files:
            if path.stat().st_size == 0:
                raise Refused("empty_file", f"{path.name} has no content")
        if source.kind == "dicom":
            return dicom.read(source.files)
        return nifti.read(source.path) if source.kind == "nifti" else itk.read(source.path)
    except (Refused, ImportError):  # that a library does not load is not
        raise
    except Exception as error:
        raise Refused("unreadable", one_line(f"{type(error).__name__}: {error}")) from error
