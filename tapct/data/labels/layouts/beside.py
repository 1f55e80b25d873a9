"""Layout of label maps beside their scans: NAME and NAME_seg in one folder.

Also _mask, _gt, _label, _labels, _dseg and other words of `words`, after _ . or -, each with or
without a number (NAME_seg62). NAME may be the scan's name without _0000, _ct or _image.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from tapct.data.labels import words
from tapct.data.labels.archive import FolderAndStem, LabelArchive, Layout, keep_first
from tapct.data.readers import stem_of
from tapct.data.search.discover import Source


def sign(source: Source, root: Path) -> bool:
    """Whether a source may be a label file by this layout."""
    return bool(words.keys_by_word(stem_of(source.path)))


def build(archive: LabelArchive) -> Layout:
    """Find all files of an archive that are named like labels."""
    labels: dict[FolderAndStem, Path] = {}  # by folder and key
    stems_in: dict[Path, list[str]] = defaultdict(list)
    likely = set()
    others: dict[Path, list[Path]] = {}
    for (folder, stem), path in archive.files.items():
        keys = words.keys_by_word(stem) if path.is_file() else ()  # a DICOM folder is never labels
        if not keys:
            stems_in[folder].append(stem)
        for key in keys:
            likely.add(path)
            keep_first(labels, (folder, key), path, others)
    shared = {folder: words.ambiguous_keys(stems) for folder, stems in stems_in.items()}

    def find(scan: Source) -> Path | None:
        folder, stem = archive.folder_of(scan), stem_of(scan.path)
        for key in words.scan_keys(stem):
            path = labels.get((folder, key))
            usable = key == stem or key not in shared.get(folder, frozenset())
            if path is not None and path != scan.path and usable:
                return path
        return None

    return Layout(find, likely=frozenset(likely), others=others)
