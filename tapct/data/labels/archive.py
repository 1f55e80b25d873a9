"""What every label layout starts from: the files of the archive by folder and name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tapct.data.discover import Source, stem_of

# folder below the root, and file name without the suffix of its format
FolderAndStem: TypeAlias = tuple[Path, str]
# the contract of a layout: from a scan to its label file, or None where the layout does not apply
FindLabels: TypeAlias = Callable[[Source], Path | None]

_CHANNEL = re.compile(r"_0000$")


@dataclass(frozen=True)
class LabelArchive:
    """The files among which a layout finds label maps.

    Args:
        root: folder of the archive.
        sources: everything in it that may be a scan or a label map, without the files of
            `--labels`.
        files: path of every one of `sources`, by folder below `root` and stem.
        given: path of every file in the folder of `--labels`, by folder below that one and stem;
            empty without the option.
    """

    root: Path
    sources: tuple[Source, ...]
    files: Mapping[FolderAndStem, Path]
    given: Mapping[FolderAndStem, Path]

    def folder_of(self, scan: Source) -> Path:
        """The folder of a scan below the root."""
        return Path() if scan.path == self.root else scan.path.parent.relative_to(self.root)


def by_folder_and_stem(sources: Iterable[Source], root: Path) -> dict[FolderAndStem, Path]:
    """Paths by folder below `root` and stem; the first in order where two files share a stem."""
    table: dict[FolderAndStem, Path] = {}
    for source in sources:
        if source.path != root:
            key = (source.path.parent.relative_to(root), stem_of(source.path))
            table.setdefault(key, source.path)
    return table


def label_stems(stem: str) -> tuple[str, str]:
    """Stems that the label map of a scan may have: the scan's own, and the one without the channel
    number that nnU-Net writes (case_0000 -> case).
    """
    return stem, _CHANNEL.sub("", stem)
