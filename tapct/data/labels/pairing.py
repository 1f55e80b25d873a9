"""Find the label map of every scan, by the layouts of this folder in a fixed order.

Pairs are made by name alone. Whether the labels can be read and lie on the scan's grid is checked
when the scan is examined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.data.discover import Source, find_sources
from tapct.data.labels import beside, given, sibling
from tapct.data.labels.archive import FolderAndStem, LabelArchive, by_folder_and_stem

LAYOUTS = (given.build, sibling.build, beside.build)  # the first that finds a file wins


@dataclass(frozen=True)
class LabelPairs:
    """Which label map belongs to which scan.

    Args:
        label_of: path of a scan to path of its label map.
        label_files: all paths of the archive that are label maps and therefore no scans.
    """

    label_of: Mapping[Path, Path]
    label_files: frozenset[Path]


def pair_labels(sources: Sequence[Source], root: Path, labels: Path | None) -> LabelPairs:
    """Find the label map of every scan.

    Args:
        sources: what `find_sources(root)` found: scans, and label maps that lie among them.
        root: folder of the archive.
        labels: folder of `--labels`, which may lie inside the archive, or None.
    """
    by_name: dict[FolderAndStem, Path] = {}
    if labels is not None:
        by_name = by_folder_and_stem(find_sources(labels), labels)
    given_files = {path.resolve() for path in by_name.values()}
    others, label_files = [], set()
    for source in sources:
        if source.path.resolve() in given_files:
            label_files.add(source.path)
        else:
            others.append(source)
    archive = LabelArchive(root, tuple(others), by_folder_and_stem(others, root), by_name)
    layouts = [build(archive) for build in LAYOUTS]
    label_of: dict[Path, Path] = {}
    for source in others:
        for find in layouts:
            path = find(source)
            if path is not None:
                label_of[source.path] = path
                break
    label_files.update(label_of.values())
    scans = {scan: path for scan, path in label_of.items() if scan not in label_files}
    return LabelPairs(scans, frozenset(label_files))
