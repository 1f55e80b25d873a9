"""One scan or label map from disk to `Volume` or `LabelMap`, and the list of what a folder holds.

The readers give voxels as stored; here they become HU in LPS with axial slices first. Nothing is resampled: axes are
permuted and flipped to the nearest LPS axes; what that cannot mend (gantry tilt, turns beyond 41 degrees) is refused.
Every rule has a reason code; an exception inside a reader library becomes `unreadable` with its message.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tapct.data.judge import check_is_ct
from tapct.data.readers import dicom, itk, nifti
from tapct.data.readers.raw import Header, Image, one_line
from tapct.types import AIR_HU, LabelMap, Refused, ScanFacts, UserError, Volume

SPACING_RANGE_MM = (0.05, 50.0)
MAX_SHEAR = 5e-3  # |cosine| between two axes; rounding of headers stays below 1e-3, half a degree of tilt gives 9e-3
MIN_ALIGNMENT = 0.75  # cosine of 41 degrees between a file axis and the LPS axis that it becomes
GRID_TOLERANCE = 0.25  # voxels that two grids may be apart at any corner
Triple = tuple[float, float, float]
_MAX_HU = 32767
_NOT_AN_ID = {"", "0", "none", "unknown", "anonymous", "anonymized", "anonymised", "anon", "n/a", "na"}


@dataclass(frozen=True)
class Source:
    """One thing on disk that may be a scan.

    Args:
        path: the file; of a DICOM series its folder, or its first file where the folder holds several series.
        kind: nifti, nrrd, meta, dicom, or unreadable for what cannot be opened at all.
        files: all files that hold it.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]


def read_volume(path: Path | str, key: bytes | None = None) -> Volume:
    """Read one CT scan.

    Args:
        path: NIfTI, NRRD or MetaImage file, a folder with one DICOM series, or a DICOM file (then its whole series).
        key: for the hashes of patient, study and series in `facts`; without it they stay empty.
    Returns:
        The scan in int16 HU, (Z, Y, X) in LPS, every value >= AIR_HU.
    Raises:
        Refused: the scan breaks a rule.
    """
    return read_source(_source_of(Path(path)), key)


def read_source(source: Source, key: bytes | None = None) -> Volume:
    """`read_volume` for a source that `find_sources` found; saves looking through the folder again."""
    image = _read_image(source)
    header = image.header
    if source.kind != "dicom":
        header = _merge(header, _sidecar(source.path))
    if header.modality and header.modality.upper() != "CT":
        raise Refused("not_ct", f"Modality is '{header.modality}'; rule: CT")
    hu_ZYX, spacing_mm, origin_mm = to_lps(image.voxels_IJK, image.affine)
    check_is_ct(image.voxels_IJK, image.slope, image.intercept, declared_ct=header.modality.upper() == "CT")
    hu_ZYX = _to_hu(hu_ZYX, image.slope, image.intercept)
    return Volume(hu_ZYX, spacing_mm, origin_mm, _facts(header, key))


def read_labels(path: Path | str) -> LabelMap:
    """Read one label map.

    Names come from NAME.json {"labels": {"1": "liver"}}, else from the file's own table (Slicer segments, the label
    table of a NIfTI extension), else they stay empty.

    Args:
        path: NIfTI, NRRD or MetaImage file.
    Returns:
        Labels as uint16, (Z, Y, X) in LPS.
    Raises:
        Refused: unreadable like a scan, or `not_labels`: values that are not whole numbers from 0 to 65535.
    """
    source = _source_of(Path(path))
    if source.kind == "dicom":
        raise Refused("unsupported", "labels are read from NIfTI, NRRD or MetaImage; convert the DICOM SEG")
    image = _read_image(source)
    values_ZYX, spacing_mm, origin_mm = to_lps(image.voxels_IJK, image.affine)
    labels_ZYX = np.empty(values_ZYX.shape, dtype=np.uint16)
    for z, plane in enumerate(values_ZYX):
        values = plane.astype(np.float64) * image.slope + image.intercept
        if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
            raise Refused("not_labels", f"{source.path.name} holds values that are not whole numbers")
        if values.min() < 0 or values.max() > 65535:
            raise Refused("not_labels", f"labels run from {values.min():g} to {values.max():g}; rule: 0 to 65535")
        labels_ZYX[z] = values
    names = _label_names(source.path, _sidecar(source.path)) or image.names
    return LabelMap(labels_ZYX, spacing_mm, origin_mm, names)


def check_same_grid(volume: Volume, labels: LabelMap) -> None:
    """Refuse labels that do not lie on the scan's own voxels.

    Equal shape, and first and last voxel at the same place to a quarter of a voxel. Headers are all that can be
    compared: a scan that was cropped but kept the affine of the whole one cannot be told from a right one.

    Raises:
        Refused: `grid_mismatch`.
    """
    if volume.hu_ZYX.shape != labels.labels_ZYX.shape:
        raise Refused("grid_mismatch", f"labels are {labels.labels_ZYX.shape}, the scan is {volume.hu_ZYX.shape}")
    spacing = np.asarray(volume.spacing_mm[::-1])
    extent = np.asarray(volume.hu_ZYX.shape[::-1]) - 1
    first = np.asarray(labels.origin_mm) - np.asarray(volume.origin_mm)
    last = first + extent * (np.asarray(labels.spacing_mm[::-1]) - spacing)
    off = float(max(np.abs(first / spacing).max(), np.abs(last / spacing).max()))
    if off > GRID_TOLERANCE:
        raise Refused("grid_mismatch", f"labels lie up to {off:.2f} voxels off the scan; rule: {GRID_TOLERANCE}")


def find_sources(root: Path | str) -> list[Source]:
    """List what may be a scan below a folder, in a fixed order; label maps are listed too.

    Hidden names are skipped; links are followed, each folder once. DICOM is known by its preamble, not by its name,
    and grouped by SeriesInstanceUID within a folder. A file that is named like a scan but cannot be one is listed, so
    that it is refused with a reason.

    Raises:
        UserError: `root` is missing or not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file; give its folder" if root.exists() else "does not exist; check the path"
        raise UserError(f"folder {root} {what}")
    closed: list[Path] = []
    sources = [source for folder in _walk(root, closed) for source in _in_folder(folder)]
    sources += [Source(path, "unreadable", (path,)) for path in closed]
    return sorted(sources, key=lambda source: source.path.relative_to(root).as_posix())


def stem_of(path: Path) -> str:
    """File name without the suffix of its format (`.nii.gz` is one); a folder's whole name."""
    lower = path.name.lower()
    for suffix in (*nifti.SUFFIXES, *itk.SUFFIXES, *dicom.SUFFIXES):
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def keyed_hash(key: bytes, text: str) -> str:
    """16 hex digits that cannot be turned back, nor found by trying all identifiers, without the key."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), key=key[:64], digest_size=8).hexdigest()


def patient_id_of(header_id: str) -> str:
    """The identifier, or empty where the header holds only a stand-in such as ANONYMOUS."""
    cleaned = header_id.strip()
    return "" if cleaned.lower() in _NOT_AN_ID else cleaned


def to_lps(voxels_IJK: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, Triple, Triple]:
    """Permute and flip to the nearest LPS axes, z first.

    Args:
        voxels_IJK: voxels in file axes.
        affine: (i, j, k, 1) -> LPS mm.
    Returns:
        A view (Z, Y, X) of the voxels, spacing (z, y, x) in mm, position (x, y, z) of its first voxel in LPS mm.
    Raises:
        Refused: bad_affine, bad_spacing, sheared, oblique.
    """
    if not np.isfinite(affine).all():
        raise Refused("bad_affine", "the affine holds NaN or infinity")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing < SPACING_RANGE_MM[0]).any() or (spacing > SPACING_RANGE_MM[1]).any():
        raise Refused("bad_spacing", f"spacing is {spacing.round(4).tolist()} mm; rule: {SPACING_RANGE_MM} mm")
    direction = affine[:3, :3] / spacing
    shear = float(np.abs(direction.T @ direction - np.eye(3)).max())
    if shear > MAX_SHEAR:
        raise Refused("sheared", f"axes are {np.degrees(np.arcsin(min(1, shear))):.1f} degrees off a right angle "
                      "(gantry tilt?); resample the scan to an upright grid")  # fmt: skip
    axes = max(itertools.permutations(range(3)), key=lambda p: np.prod([abs(direction[w, p[w]]) for w in range(3)]))
    alignment = min(abs(direction[world, axes[world]]) for world in range(3))
    if alignment < MIN_ALIGNMENT:
        angle = np.degrees(np.arccos(alignment))
        raise Refused("oblique", f"an axis is {angle:.0f} degrees off the body's; rule: 41; resample to axial slices")
    origin, index = affine[:3, 3].copy(), [slice(None)] * 3
    for world, axis in enumerate(axes):
        if direction[world, axis] < 0:
            origin += affine[:3, axis] * (voxels_IJK.shape[axis] - 1)
            index[axis] = slice(None, None, -1)
    view_ZYX = voxels_IJK[tuple(index)].transpose(axes[::-1])
    x, y, z = axes
    spacing_zyx = (float(spacing[z]), float(spacing[y]), float(spacing[x]))
    return view_ZYX, spacing_zyx, (float(origin[0]), float(origin[1]), float(origin[2]))


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
            raise Refused("not_finite", f"slice {z} holds NaN or infinity; write air ({AIR_HU}) there")
        if values.max() > _MAX_HU:
            raise Refused("out_of_range", f"slice {z} reaches {values.max():g} HU; rule: at most {_MAX_HU}")
        hu_ZYX[z] = np.maximum(values, AIR_HU)
    return hu_ZYX


def _read_image(source: Source) -> Image:
    """Call the reader; whatever goes wrong in there is the file's fault, not the run's."""
    if source.kind == "unreadable":
        raise Refused("unreadable", f"folder {source.path.name} cannot be listed; check its permissions")
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


def _kind(path: Path) -> str:
    """Format by file name; empty where the name does not tell."""
    lower = path.name.lower()
    if lower.endswith(nifti.SUFFIXES):
        return "nifti"
    if lower.endswith(itk.SUFFIXES):
        return "nrrd" if lower.endswith((".nrrd", ".nhdr")) else "meta"
    return ""


def _source_of(path: Path) -> Source:
    """The one source that a path stands for."""
    if not path.exists():
        raise Refused("unreadable", f"{path} does not exist")
    kind = "" if path.is_dir() else _kind(path)
    if kind:
        return Source(path, kind, (path,))
    folder = path if path.is_dir() else path.parent
    found = [source for source in _in_folder(folder) if source.kind == "dicom"]
    if path.is_dir():
        found = [source for source in found if source.path == path] or found
    else:
        found = [source for source in found if path in source.files]
    if not found:
        raise Refused("unreadable", f"{path} is no NIfTI, NRRD, MetaImage or DICOM")
    if len(found) > 1:
        raise Refused("mixed_series", f"{path} holds {len(found)} DICOM series; give one file of the series meant")
    return found[0]


def _walk(root: Path, closed: list[Path]) -> Iterator[Path]:
    """`root` and the folders below, each once, none that is hidden; `closed` gets what cannot be listed."""
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, _ in os.walk(
        root, followlinks=True, onerror=lambda error: closed.append(Path(error.filename))
    ):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
        yield Path(folder)


def _in_folder(folder: Path) -> list[Source]:
    """Sources among the files of one folder."""
    with os.scandir(folder) as entries:
        files = sorted(folder / entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())
    sources: list[Source] = []
    series: dict[str, list[Path]] = {}
    for path in files:
        kind = _kind(path)
        if kind:
            sources.append(Source(path, kind, (path,)))
            continue
        try:
            is_slice = dicom.is_dicom(path)
            uid = dicom.series_uid(path) if is_slice else None
        except Exception:  # listed here; reading it again gives the reason for which it is refused
            sources.append(Source(path, "dicom", (path,)))
            continue
        if uid:
            series.setdefault(uid, []).append(path)
        elif uid == "" or (not is_slice and path.suffix.lower() in dicom.SUFFIXES):
            sources.append(Source(path, "dicom", (path,)))
    for members in series.values():
        sources.append(Source(folder if len(series) == 1 else members[0], "dicom", tuple(members)))
    return sources


def _sidecar(path: Path) -> dict[str, Any]:
    """The JSON object NAME.json beside NAME, or an empty one where there is none."""
    sidecar = path.with_name(stem_of(path) + ".json")
    if not sidecar.is_file():
        return {}
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused("bad_sidecar", one_line(f"{sidecar.name} is not JSON: {error}")) from error
    if not isinstance(content, dict):
        raise Refused("bad_sidecar", f"{sidecar.name} holds a {type(content).__name__}; rule: one JSON object")
    return content


def _merge(header: Header, sidecar: dict[str, Any]) -> Header:
    """What the file says, completed by its side-car (BIDS and dcm2niix keys)."""
    keys = {
        "patient_id": "PatientID",
        "study_uid": "StudyInstanceUID",
        "series_uid": "SeriesInstanceUID",
        "study_date": "StudyDate",
        "modality": "Modality",
        "manufacturer": "Manufacturer",
        "kernel": "ConvolutionKernel",
        "sex": "PatientSex",
        "age": "PatientAge",
        "body_part": "BodyPartExamined",
    }
    told = {field: one_line(sidecar[key]) for field, key in keys.items() if sidecar.get(key) not in (None, "", [])}
    return replace(header, **told)


def _facts(header: Header, key: bytes | None) -> ScanFacts:
    def hashed(text: str) -> str:
        return keyed_hash(key, text) if key and text else ""

    date = re.sub(r"\D", "", header.study_date)
    sex = header.sex.strip()[:1].upper()
    return ScanFacts(
        patient=hashed(patient_id_of(header.patient_id)),
        study=hashed(header.study_uid),
        series=hashed(header.series_uid),
        study_date=date if len(date) == 8 else "",
        modality=header.modality,
        manufacturer=header.manufacturer,
        kernel=header.kernel,
        sex=sex if sex in ("M", "F", "O") else "",
        age_years=_age_years(header.age),
        body_part=header.body_part,
    )


def _age_years(text: str) -> float:
    """Years from DICOM's `063Y`, `018M`, `012W`, `003D` or a plain number; NaN for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([YMWD]?)\s*", text.upper())
    if not match:
        return float("nan")
    return float(match[1]) * {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}[match[2]]


def _label_names(path: Path, sidecar: dict[str, Any]) -> tuple[tuple[int, str], ...]:
    """Names from {"labels": {"1": "liver"}} or, as some data sets write it, {"labels": {"liver": 1}}."""
    table = sidecar.get("labels", {})
    if not isinstance(table, dict):
        raise Refused("bad_sidecar", f"'labels' beside {path.name} is no JSON object of value and name")
    pairs = []
    for left, right in table.items():
        value, name = (left, right) if str(left).isdigit() else (right, left)
        if not str(value).isdigit():
            raise Refused("bad_sidecar", f"'labels' beside {path.name} has '{left}': '{right}'; rule: value and name")
        pairs.append((int(value), str(name)))
    return tuple(sorted(pairs))
