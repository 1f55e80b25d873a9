"""Read one scan from disk as a `Volume`; `labels.reading` does the same for its labels.

A reader gives the voxels as stored. Here they become HU in LPS with axial slices first.
Nothing is resampled: axes are permuted and flipped to the nearest LPS axes, and a scan that this
cannot bring upright (gantry tilt, more than 41 degrees off the body's axes) is refused. Every rule
has a reason code. An exception inside a reader library becomes `unreadable` with its message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tapct.data.ct_check import check_is_ct
from tapct.data.discover import UNREADABLE, Source, find_source
from tapct.data.geometry import to_lps
from tapct.data.headers import facts_of, merge_sidecar, read_sidecar
from tapct.data.plain_facts import failure
from tapct.data.readers import DICOM, format_named
from tapct.data.readers.raw import Image
from tapct.types import AIR_HU, Refused, Volume

MAX_HU = 32767  # largest int16


def read_volume(path: Path | str, key: bytes | None = None) -> Volume:
    """Read one CT scan.

    Args:
        path: path of a NIfTI, NRRD or MetaImage file, of a folder with one DICOM series, or of one
            DICOM file, which stands for its whole series.
        key: secret of the patient's hash in `facts`; without it the hash stays empty.
    Returns:
        The scan in int16 HU, (Z, Y, X) in LPS, every value >= AIR_HU.
    Raises:
        Refused: the scan breaks a rule.
    """
    return read_source(find_source(Path(path)), key)


def read_source(source: Source, key: bytes | None = None) -> Volume:
    """`read_volume` for a source that `find_sources` found, without searching its folder again."""
    with refusing():
        image = read_image(source)
    header, patient_from = image.header, "header"
    if source.kind != DICOM.name:
        merged = merge_sidecar(header, read_sidecar(source.path))
        if merged.patient_id != header.patient_id:
            patient_from = "side_car"
        header = merged
    if header.modality and header.modality.upper() != "CT":
        raise Refused("not_ct", f"Modality is '{header.modality}'; rule: CT")
    view_ZYX, spacing_mm, origin_mm, directions = to_lps(image.voxels_IJK, image.affine)
    check_is_ct(
        image.voxels_IJK, image.slope, image.intercept, declared_ct=header.modality.upper() == "CT"
    )
    hu_ZYX = _to_hu(view_ZYX, image.slope, image.intercept)
    return Volume(hu_ZYX, spacing_mm, origin_mm, facts_of(header, key, patient_from), directions)


def read_image(source: Source) -> Image:
    """Call the format's reader."""
    if source.kind == UNREADABLE:
        raise Refused(
            "unreadable", f"folder {source.path.name} cannot be listed; check its permissions"
        )
    for path in source.files:
        if path.stat().st_size == 0:
            raise Refused("empty_file", f"{path.name} has no content")
    return format_named(source.kind).read(source.files)


@contextmanager
def refusing() -> Iterator[None]:
    """Within this context, every exception but a missing library becomes a refusal, without the
    text of the library, which may quote the file.
    """
    try:
        yield
    except (Refused, ImportError):  # a library that cannot be loaded is not a fault of this scan
        raise
    except Exception as error:
        raise Refused("unreadable", failure(error)) from error


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
