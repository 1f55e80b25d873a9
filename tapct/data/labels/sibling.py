"""Layout of sibling folders: images*/<stem> and labels*/<stem> (imagesTr -> labelsTr).

A channel number as nnU-Net writes it (case_0000) may be missing from the label's name.
"""

from __future__ import annotations

from pathlib import Path

from tapct.data.discover import Source, stem_of
from tapct.data.labels.archive import FindLabels, LabelArchive, label_stems

IMAGES = "images"


def build(archive: LabelArchive) -> FindLabels:
    """Prepare the search in the folders labels* of an archive."""

    def find(scan: Source) -> Path | None:
        folder = archive.folder_of(scan)
        if not folder.name.lower().startswith(IMAGES):
            return None
        labels = "labels" if folder.name[0] == "i" else "Labels"
        sibling = folder.parent / (labels + folder.name[len(IMAGES) :])
        for stem in label_stems(stem_of(scan.path)):
            if (sibling, stem) in archive.files:
                return archive.files[sibling, stem]
        return None

    return find
