"""Find the scans in a folder: files by their content, DICOM series by their headers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data.readers import dicom, itk, nifti
from tapct.types import Refused


@dataclass(frozen=True)
class Source:
    """One thing on disk that may be a scan.

    Args:
        path: the file; of a DICOM series its folder, or its first file where the folder holds
            several series.
        kind: nifti, nrrd, meta, dicom, or unreadable for what cannot be opened at all.
        files: all files that hold it.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]


def find_sources(root: Path | str) -> list[Source]:
    """List what may be a scan below a folder, in a fixed order; label maps are listed too.

    Hidden names are skipped; links are followed, each folder once. DICOM is known by its preamble,
    not by its name, and grouped by SeriesInstanceUID within a folder. A file that is named like a
    scan but cannot be one is listed, so that it is refused with a reason.

    Raises:
        UserError: `root` is missing or not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file; give its folder" if root.exists() else "does not exist; check the path"
        raise UserError(f"folder {root} {what}")
    closed: list[Path] = []
    sources = [source for folder in _walk(root, closed) for source in in_folder(folder)]
    sources += [Source(path, "unreadable", (path,)) for path in closed]
    return sorted(sources, key=lambda source: source.path.relative_to(root).as_posix())


def stem_of(path: Path) -> str:
    """File name without the suffix of its format (`.nii.gz` is one); a folder's whole name."""
    lower = path.name.lower()
    for suffix in (*nifti.SUFFIXES, *itk.SUFFIXES, *dicom.SUFFIXES):
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def kind_of(path: Path) -> str:
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
    kind = "" if path.is_dir() else kind_of(path)
    if kind:
        return Source(path, kind, (path,))
    folder = path if path.is_dir() else path.parent
    found = [source for source in in_folder(folder) if source.kind == "dicom"]
    if path.is_dir():
        found = [source for source in found if source.path == path] or found
    else:
        found = [source for source in found if path in source.files]
    if not found:
        raise Refused("unreadable", f"{path} is no NIfTI, NRRD, MetaImage or DICOM")
    if len(found) > 1:
        raise Refused(
            "mixed_series",
            f"{path} holds {len(found)} DICOM series; give one file of the series meant",
        )
    return found[0]


def _walk(root: Path, closed: list[Path]) -> Iterator[Path]:
    """`root` and the folders below, each once, none that is hidden; `closed` gets what cannot be
    listed.
    """
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, _ in os.walk(
        root, followlinks=True, onerror=lambda error: closed.append(Path(error.filename))
    ):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith((".", "__MACOSX"))
        )
        yield Path(folder)


def in_folder(folder: Path) -> list[Source]:
    """Sources among the files of one folder."""
    with os.scandir(folder) as entries:
        files = sorted(
            folder / entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_file()
        )
    sources: list[Source] = []
    series: dict[str, list[Path]] = {}
    for path in files:
        kind = kind_of(path)
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
