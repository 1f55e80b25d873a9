"""Layout of a folder of labels in the folder of the scans: case1 and labels/case1.

The folder is named by a word for labels (labels, masks, segmentations), the file like its scan.
"""

from __future__ import annotations

from pathlib import Path

from tapct.data.labels import words
from tapct.data.labels.archive import FolderAndStem, LabelArchive, Layout, keep_first
from tapct.data.readers import stem_of
from tapct.data.search.discover import Source


def sign(source: Source, root: Path) -> bool:
    """Whether a source may be a label file by this layout."""
    return source.path != root and source.path.parent.name.lower() in words.LABEL_FOLDERS


def build(archive: LabelArchive) -> Layout:
    """Find the files in folders that are named by a word for labels."""
    labels: dict[FolderAndStem, Path] = {}  # by folder of the scans and key
    stems_in: dict[Path, list[str]] = {}
    others: dict[Path, list[Path]] = {}
    for (folder, stem), path in archive.files.items():
        stems_in.setdefault(folder, []).append(stem)
        if path.is_file() and folder != Path() and folder.name.lower() in words.LABEL_FOLDERS:
            for key in words.label_keys(stem):
                keep_first(labels, (folder.parent, key), path, others)
    shared = {folder: words.ambiguous_keys(stems) for folder, stems in stems_in.items()}

    def find(scan: Source) -> Path | None:
        folder, stem = archive.folder_of(scan), stem_of(scan.path)
        for key in words.scan_keys(stem):
            if (folder, key) in labels and (key == stem or key not in shared[folder]):
                return labels[folder, key]
        return None

    return Layout(find, likely=frozenset(labels.values()), others=others)
