"""Layout `--labels DIR`: DIR/<the scan's folder below the root>/<the scan's name>.

DIR/<the scan's name> is taken too where no other scan of the archive has that name. The name of the
labels may lack nnU-Net's channel number (case_0000) and may end in a word for labels (case_seg).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tapct.data.labels import words
from tapct.data.labels.archive import FolderAndStem, LabelArchive, Layout, keep_first
from tapct.data.readers import stem_of
from tapct.data.search.discover import Source


def sign(source: Source, root: Path) -> bool:
    """False: the files of `--labels` are found by this option, and not by their names."""
    return False


def build(archive: LabelArchive) -> Layout:
    """Prepare the search in the folder of `--labels`."""
    num_with = Counter(stem_of(source.path) for source in archive.sources)
    by_key: dict[FolderAndStem, Path] = dict(archive.given)
    others: dict[Path, list[Path]] = {}
    for (folder, stem), path in archive.given.items():
        for key in words.keys_by_word(stem):
            keep_first(by_key, (folder, key), path, others)
    shared = words.ambiguous_keys(num_with)

    def find(scan: Source) -> Path | None:
        stem = stem_of(scan.path)
        folders = [archive.folder_of(scan)]
        if num_with[stem] == 1:
            folders.append(Path())
        for folder in dict.fromkeys(folders):
            for key in words.scan_keys(stem):
                if (folder, key) in by_key and (key == stem or key not in shared):
                    return by_key[folder, key]
        return None

    return Layout(find, owned=frozenset(archive.given.values()), others=others)
