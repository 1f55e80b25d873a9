"""Layout of LiTS: volume-3 and segmentation-3, in one folder or in two folders of the archive.

Across folders a number counts only where one scan and one label file of the archive have it.
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
    return any(key.startswith("#") for key in words.keys_by_word(stem_of(source.path)))


def build(archive: LabelArchive) -> Layout:
    """Find all files of an archive that are a word for labels and a number."""
    labels: dict[str, list[Path]] = defaultdict(list)
    num_scans: dict[str, int] = defaultdict(int)
    for (_, stem), path in archive.files.items():
        for key in words.keys_by_word(stem):
            if key.startswith("#") and path.is_file():
                labels[key].append(path)
        for key in words.scan_keys(stem)[1:]:
            num_scans[key] += key.startswith("#")

    def find(scan: Source) -> Path | None:
        for key in words.scan_keys(stem_of(scan.path))[1:]:
            if len(labels.get(key, ())) == 1 and num_scans[key] == 1:
                return labels[key][0]
        return None

    return Layout(find, likely=frozenset(path for paths in labels.values() for path in paths))
