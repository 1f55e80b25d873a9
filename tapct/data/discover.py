"""Find the scans in a folder: files by their suffix, DICOM series by their content and headers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data import formats
from tapct.data.readers import DICOM, FORMATS, dicom, format_of
from tapct.types import Refused

UNREADABLE = "unreadable"  # kind of a folder that cannot be listed


@dataclass(frozen=True)
class Source:
    """One file or DICOM series that may be a scan.

    Args:
        path: path of the file. For a DICOM series it is the folder, or the first file where the
            folder holds several series.
        kind: name of its format in `readers.FORMATS`, or `unreadable` for a folder that cannot be
            listed.
        files: all files of the scan.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]


def find_sources(root: Path | str) -> list[Source]:
    """List everything below a folder that may be a scan, in a fixed order; label maps are listed
    too.

    Hidden files and folders are skipped. Links are followed, and each folder is visited once. DICOM
    is recognised by its preamble and not by its name, and grouped by SeriesInstanceUID within a
    folder. A file that is named like a scan but cannot be one is listed, so that it is refused with
    a reason.

    Args:
        root: folder of the archive.
    Raises:
        UserError: `root` is missing or not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        problem = (
            "is a file; give its folder" if root.exists() else "does not exist; check the path"
        )
        raise UserError(f"folder {root} {problem}")
    sources: list[Source] = []
    unlisted: list[Path] = []
    for folder in _folders_below(root, unlisted):
        sources += _sources_in(folder)
    sources += [Source(path, UNREADABLE, (path,)) for path in unlisted]
    return sorted(sources, key=lambda source: source.path.relative_to(root).as_posix())


def find_source(path: Path) -> Source:
    """The one scan that a path stands for: a file, a folder with one DICOM series, or any file of a
    series.

    Raises:
        Refused: `unreadable` where there is no scan, `mixed_series` where there are several.
    """
    if not path.exists():
        raise Refused("unreadable", f"{path} does not exist")
    file_format = None if path.is_dir() else format_of(path)
    if file_format is not None:
        return Source(path, file_format.name, (path,))
    folder = path if path.is_dir() else path.parent
    series = [source for source in _sources_in(folder) if source.kind == DICOM.name]
    if path.is_dir():
        # a folder with one series is that series, whatever damaged DICOM files lie beside it
        series = [source for source in series if source.path == path] or series
    else:
        series = [source for source in series if path in source.files]
    if not series:
        raise Refused("unreadable", f"{path} is not a {formats.listed('or')} scan")
    if len(series) > 1:
        raise Refused(
            "mixed_series",
            f"{path} holds {len(series)} DICOM series; give one file of the series to read",
        )
    return series[0]


def stem_of(path: Path) -> str:
    """File name without the suffix of its format (`.nii.gz` is one suffix); a folder's whole
    name.
    """
    for known in FORMATS:
        for suffix in known.suffixes:
            if path.name.lower().endswith(suffix):
                return path.name[: -len(suffix)]
    return path.name


def _folders_below(root: Path, unlisted: list[Path]) -> Iterator[Path]:
    """`root` and all folders below it that are not hidden, each once.

    Args:
        root: folder to start from.
        unlisted: list that receives the folders that cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, _ in os.walk(
        root, followlinks=True, onerror=lambda error: unlisted.append(Path(error.filename))
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


def _sources_in(folder: Path) -> list[Source]:
    """Scans among the files of one folder, without its subfolders."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        files = sorted(folder / entry.name for entry in visible if entry.is_file())
    sources: list[Source] = []
    series: dict[str, list[Path]] = {}
    for path in files:
        file_format = format_of(path)
        if file_format is not None:
            sources.append(Source(path, file_format.name, (path,)))
            continue
        try:
            is_slice = dicom.is_dicom(path)
            uid = dicom.series_uid(path) if is_slice else None
        except Exception:  # it is listed here, and reading it again gives the reason of its refusal
            sources.append(Source(path, DICOM.name, (path,)))
            continue
        is_named_dicom = path.suffix.lower() in DICOM.suffixes
        if uid:
            series.setdefault(uid, []).append(path)
        elif uid == "" or (is_named_dicom and not is_slice):
            sources.append(Source(path, DICOM.name, (path,)))
    for members in series.values():
        path = folder if len(series) == 1 else members[0]
        sources.append(Source(path, DICOM.name, tuple(members)))
    return sources
