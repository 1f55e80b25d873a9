"""Read one scan from disk as a `Volume`; `labels.reading` does the same for its labels.

A reader gives the voxels as stored. Here they become HU in LPS with axial slices first.
Nothing is resampled unless `ReadRules.resample_tilt` asks for it: axes are permuted and flipped to
the nearest LPS axes, and a scan that this cannot bring upright (gantry tilt, more than 41 degrees
off the body's axes) is refused. Every rule has a reason code. An exception inside a reader library
becomes `unreadable` with its message.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from tapct.base.files import expand_path
from tapct.base.marks import file_name, quoted
from tapct.base.signals import Terminated
from tapct.data.checks.axis_check import check_axes
from tapct.data.checks.ct_check import check_hu, check_is_ct
from tapct.data.checks.wrap_check import check_wrap
from tapct.data.readers import DICOM, FORMATS, dicom, format_named
from tapct.data.readers.raw import Image, is_out_of_memory
from tapct.data.scans import tilt
from tapct.data.scans.geometry import check_extent, to_lps
from tapct.data.scans.headers import facts_of, merge_sidecar, read_sidecar
from tapct.data.scans.plain_facts import failure
from tapct.data.scans.read_rules import PLAIN, ReadRules
from tapct.data.scans.technique import technique_of
from tapct.data.search.discover import UNREADABLE, Source, find_source
from tapct.types import AIR_HU, Refused, Volume

OUT_OF_MEMORY = "out_of_memory"
MAX_HU = 32767  # largest int16


def read_volume(path: Path | str, key: bytes | None = None, accept: ReadRules = PLAIN) -> Volume:
    """Read one CT scan.

    Args:
        path: path of a file, of a folder with one DICOM series, or of one DICOM file, which stands
            for its whole series in this folder.
        key: secret of the patient's hash in `facts`; without it the hash stays empty.
        accept: what is accepted beyond plain scans.
    Returns:
        The scan in int16 HU, (Z, Y, X) in LPS, every value >= AIR_HU.
    Raises:
        Refused: the scan breaks a rule.
    """
    with refusing():
        source = find_source(expand_path(path), derived=accept.derived)
    return read_source(source, key, accept)


def read_source(source: Source, key: bytes | None = None, accept: ReadRules = PLAIN) -> Volume:
    """`read_volume` for a source that `find_sources` found, without searching its folder again."""
    load_library(source)
    with refusing():
        return _read_source(source, key, accept)


def _read_source(source: Source, key: bytes | None, accept: ReadRules) -> Volume:
    image = stored = read_image(source)
    marks = _marks(source, image, accept)
    header, patient_from = image.header, "header"
    if source.kind != DICOM.name:
        merged = merge_sidecar(header, read_sidecar(source.path))
        if merged.patient_id != header.patient_id:
            patient_from = "side_car"
        header = merged
    if header.modality and header.modality.upper() != "CT":
        raise Refused("not_ct", f"Modality is {quoted(header.modality)}; rule: CT")
    if accept.resample_tilt and tilt.is_tilted(image.affine):
        image = tilt.upright(image)
        marks += (tilt.MARK,)
    view_ZYX, spacing_mm, origin_mm, directions = to_lps(image.voxels_IJK, image.affine)
    check_extent(image.voxels_IJK.shape, image.affine)
    declared_ct = header.modality.upper() == "CT"
    if accept.checks is not None:
        check_is_ct(image.voxels_IJK, image.slope, image.intercept, declared_ct, accept.checks)
        check_wrap(stored.voxels_IJK, stored.slope, stored.intercept)
        check_axes(stored.voxels_IJK, stored.affine, stored.slope, stored.intercept, accept.checks)
    hu_ZYX = to_hu(view_ZYX, image.slope, image.intercept)
    if accept.checks is not None:
        marks += check_hu(hu_ZYX, declared_ct, accept.checks)
    facts = replace(
        facts_of(header, key, patient_from),
        lossy_ratio=image.lossy_ratio,
        technique=technique_of(header, stored),
    )
    return Volume(hu_ZYX, spacing_mm, origin_mm, facts, marks, directions)


def _marks(source: Source, image: Image, accept: ReadRules) -> tuple[str, ...]:
    """Codes of what is unusual about a scan as its file holds it.

    Raises:
        Refused: derived_image, lossy, where that is not to be accepted.
    """
    if image.derived and not accept.derived:
        raise Refused("derived_image", f"it is {image.derived}; accept with --derived")
    if image.lossy_ratio > accept.max_lossy_ratio:
        raise Refused(
            "lossy",
            f"it was compressed {image.lossy_ratio:g}:1 with loss; rule: at most "
            f"{accept.max_lossy_ratio:g}:1 (--max-lossy-ratio)",
        )
    marks = [source.mark] if source.mark else []
    if image.derived:
        marks.append("derived")
    if image.is_lossy:
        marks.append("lossy")
    return tuple(marks)


def read_image(source: Source) -> Image:
    """Call the format's reader."""
    if source.reason:
        raise Refused(source.reason, source.detail)
    if source.kind == UNREADABLE:
        raise Refused(
            "unreadable", f"folder {file_name(source.path)} cannot be listed; check its permissions"
        )
    for path in source.files:
        if path not in source.contents and path.stat().st_size == 0:
            raise Refused("empty_file", f"{file_name(path)} has no content")
    if source.frames or source.contents:
        return dicom.read(source.files, source.frames or None, source.contents)
    return format_named(source.kind).read(source.files)


def load_library(source: Source) -> None:
    """Load what decodes a source; a library that cannot be loaded is not a fault of the scan."""
    # a source that is refused without being read, such as a folder that cannot be listed, has no
    # format
    if source.kind in {known.name for known in FORMATS}:
        for library in format_named(source.kind).libraries:
            importlib.import_module(library)


@contextmanager
def refusing() -> Iterator[None]:
    """Within this context, every exception that a file can cause becomes a refusal without the text
    of the library, which may quote the file, and no warning of Python code is printed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Refused, Terminated):
        raise
    except Exception as error:
        reason = OUT_OF_MEMORY if is_out_of_memory(error) else "unreadable"
        raise Refused(reason, failure(error)) from error
    except SystemExit as error:
        raise Refused("unreadable", failure(error)) from error


def to_hu(view_ZYX: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """int16 HU, slice by slice: clamp to AIR_HU from below, refuse what int16 cannot hold.

    Args:
        view_ZYX: values as stored, any real dtype.
        slope: factor to HU.
        intercept: offset in HU.
    Raises:
        Refused: not_finite, out_of_range.
    """
    hu_ZYX = np.empty(view_ZYX.shape, dtype=np.int16)
    # int64 holds the sum of every smaller type; larger values are refused, rounded or not
    is_small = view_ZYX.dtype.kind in "iu" and view_ZYX.dtype.itemsize < 8
    is_whole = is_small and slope == 1.0 and float(intercept).is_integer()
    for z, plane_YX in enumerate(view_ZYX):
        if is_whole and plane_YX.dtype == np.int16 and intercept == 0:
            np.maximum(plane_YX, AIR_HU, out=hu_ZYX[z])
            continue
        if is_whole:
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
