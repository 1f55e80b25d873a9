"""Layout of label maps beside their scans: NAME and NAME_seg in one folder.

Also NAME-seg, NAME.seg, NAME_label and NAME_labels, each with or without a number (NAME_seg62).
"""

from __future__ import annotations

import re
from pathlib import Path

from tapct.data.discover import Source, stem_of
from tapct.data.labels.archive import FindLabels, FolderAndStem, LabelArchive

_LABEL_STEM = re.compile(r"(?P<scan>.+?)(?:[_.-]seg\d*|[_-]labels?\d*)", re.IGNORECASE)


def build(archive: LabelArchive) -> FindLabels:
    """Find all files of an archive that are named like labels."""
    labels: dict[FolderAndStem, Path] = {}  # by folder and stem of the scan
    for (folder, stem), path in archive.files.items():
        match = _LABEL_STEM.fullmatch(stem)
        if match and path.is_file():  # a DICOM folder is never a label map
            labels.setdefault((folder, match["scan"]), path)

    def find(scan: Source) -> Path | None:
        return labels.get((archive.folder_of(scan), stem_of(scan.path)))

    return find
