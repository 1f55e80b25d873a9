"""Layout of DICOM SEG and RTSTRUCT: the object names the series that it was drawn on.

It is matched by the SeriesInstanceUID that it refers to, else by its FrameOfReferenceUID where one
scan of the archive has it. A NIfTI scan matches by the SeriesInstanceUID in its JSON side-car.
Several objects of one scan are merged (see `merging`), in the order of their paths, DICOM SEG
before RTSTRUCT.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tapct.data.labels.archive import LabelArchive, Layout
from tapct.data.readers import DICOM
from tapct.data.readers.dicom_kind import SEGMENTATIONS, STRUCTURE_SET
from tapct.data.readers.dicom_labels import Reference, reference_of
from tapct.data.scans.headers import read_sidecar
from tapct.data.search.discover import DICOM_OBJECT, Source
from tapct.types import Refused


@dataclass(frozen=True)
class _Object:
    """A DICOM SEG or RTSTRUCT of the archive."""

    path: Path
    reference: Reference


def sign(source: Source, root: Path) -> bool:
    """Whether a source may be a label file by this layout."""
    return source.kind == DICOM_OBJECT and source.sop_class in (*SEGMENTATIONS, STRUCTURE_SET)


def build(archive: LabelArchive) -> Layout:
    """Read the objects that hold labels and, if there are any, one header of every series."""
    objects: list[_Object] = []
    for source in archive.sources:
        if sign(source, archive.root):
            reference = reference_of(source.path)
            if reference is not None:
                objects.append(_Object(source.path, reference))
    if not objects:
        return Layout(lambda scan: None)
    scan_references: dict[Path, Reference] = {}  # by path of the scan
    for source in archive.sources:
        reference = reference_of(source.files[0]) if source.kind == DICOM.name else None
        if reference is not None:
            scan_references[source.path] = reference
    objects.sort(key=lambda item: (item.reference.is_contours, str(item.path)))
    by_series: dict[str, list[Path]] = defaultdict(list)
    by_frame: dict[str, list[Path]] = defaultdict(list)
    for item in objects:
        for uid in item.reference.referenced_series:
            by_series[uid].append(item.path)
        if item.reference.frame and not item.reference.referenced_series:
            by_frame[item.reference.frame].append(item.path)
    num_with: dict[str, int] = defaultdict(int)
    for reference in scan_references.values():
        num_with[reference.frame] += 1

    def objects_of(scan: Source) -> list[Path]:
        if scan.kind != DICOM.name:
            return by_series.get(_series_in_sidecar(scan.path), [])
        own = scan_references.get(scan.path)
        if own is None:
            return []
        if own.series in by_series:
            return by_series[own.series]
        return by_frame.get(own.frame, []) if num_with[own.frame] == 1 else []

    return Layout(
        find=lambda scan: next(iter(objects_of(scan)), None),
        owned=frozenset(item.path for item in objects),
        more=lambda scan: objects_of(scan)[1:],
    )


def _series_in_sidecar(scan: Path) -> str:
    """SeriesInstanceUID in the JSON side-car of a scan; empty where there is none."""
    try:
        return str(read_sidecar(scan).get("SeriesInstanceUID") or "")
    except Refused:  # the scan is refused with this reason when it is examined
        return ""
