"""Layout of a folder per case: case_00000/imaging and case_00000/segmentation (KiTS).

The name of the label file is a word for labels alone (segmentation, mask, label, Segmentation.seg);
the folder holds one scan and one such file. The scan may be a DICOM series that lies in the folder.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from tapct.data.labels import words
from tapct.data.labels.archive import LabelArchive, Layout
from tapct.data.readers import stem_of
from tapct.data.search.discover import Source


def sign(source: Source, root: Path) -> bool:
    """Whether a source may be a label file by this layout."""
    return words.is_only_label_word(stem_of(source.path))


def build(archive: LabelArchive) -> Layout:
    """Find the folders with one scan and one label file."""
    scans: dict[Path, list[Path]] = defaultdict(list)
    labels: dict[Path, list[Path]] = defaultdict(list)
    for source in archive.sources:
        stem = stem_of(source.path)
        if source.path.is_file() and words.is_only_label_word(stem):
            labels[source.path.parent].append(source.path)
        elif not (source.path.is_file() and words.keys_by_word(stem)):
            for folder in _folders_of(source.path):
                scans[folder].append(source.path)

    def find(scan: Source) -> Path | None:
        for folder in _folders_of(scan.path):
            if scans[folder] == [scan.path] and len(labels.get(folder, ())) == 1:
                return labels[folder][0]
        return None

    return Layout(find, likely=frozenset(path for paths in labels.values() for path in paths))


def _folders_of(scan: Path) -> tuple[Path, ...]:
    """The folder of a scan; for a DICOM folder that folder itself, then the one that it is in."""
    return (scan, scan.parent) if scan.is_dir() else (scan.parent,)
