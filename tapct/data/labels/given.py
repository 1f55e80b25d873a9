"""Layout `--labels DIR`: DIR/<the scan's folder below the root>/<the scan's stem>.

DIR/<the scan's stem> is taken too where no other scan of the archive has that stem. A channel
number as nnU-Net writes it (case_0000) may be missing from the label's name.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tapct.data.discover import Source, stem_of
from tapct.data.labels.archive import FindLabels, LabelArchive, label_stems


def build(archive: LabelArchive) -> FindLabels:
    """Prepare the search in the folder of `--labels`."""
    num_with = Counter(stem_of(source.path) for source in archive.sources)

    def find(scan: Source) -> Path | None:
        stem = stem_of(scan.path)
        folders = [archive.folder_of(scan)]
        if num_with[stem] == 1:
            folders.append(Path())
        for folder in folders:
            for label_stem in label_stems(stem):
                if (folder, label_stem) in archive.given:
                    return archive.given[folder, label_stem]
        return None

    return find
