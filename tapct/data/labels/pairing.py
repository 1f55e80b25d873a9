"""Find the labels of every scan, by the layouts in a fixed order.

Pairs are made by names (or by the references of DICOM objects) alone. Whether the labels can be
read and lie on the scan's grid is checked when the scan is examined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tapct.data.labels.archive import FolderAndStem, LabelArchive, Layout, by_folder_and_stem
from tapct.data.labels.layouts import (
    beside,
    bids,
    case_folder,
    dicom_objects,
    given,
    inner_folder,
    mask_folder,
    numbered,
    sibling,
)
from tapct.data.search.discover import Source, search

# the first that finds labels is used
_MODULES = (
    given,
    sibling,
    beside,
    inner_folder,
    mask_folder,
    case_folder,
    numbered,
    bids,
    dicom_objects,
)
LAYOUTS = tuple(module.build for module in _MODULES)
_SIGNS = {module.build: module.sign for module in _MODULES}


@dataclass(frozen=True)
class LabelPairs:
    """Which labels belong to which scan.

    Args:
        label_of: path of a scan to path of its label file or folder of masks.
        label_files: paths of all sources of the archive that are labels and therefore no scans.
        unmatched: paths of label files that can only be label files and belong to no scan.
        likely: paths of sources that are named like labels but belong to no scan: they are
            examined as scans, and are label files if they are refused.
        num_given: number of files in the folder of `--labels`.
        num_given_used: number of scans whose labels lie in that folder.
        others_of: path of a scan to paths of further labels that fit it and are not used.
        passed_over: number of files of each kind that are no label files, in a folder of `--labels`
            outside of the archive.
        more_of: path of a scan to paths of the DICOM objects that are merged with the first one.
    """

    label_of: Mapping[Path, Path]
    label_files: frozenset[Path]
    unmatched: tuple[Path, ...] = ()
    likely: frozenset[Path] = frozenset()
    num_given: int = 0
    num_given_used: int = 0
    others_of: Mapping[Path, tuple[Path, ...]] = field(default_factory=dict)
    more_of: Mapping[Path, tuple[Path, ...]] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)


def pair_labels(
    sources: Sequence[Source], root: Path, labels: Path | None, seconds: float = math.inf
) -> LabelPairs:
    """Find the labels of every scan.

    Args:
        sources: what `search(root)` found: scans, and label maps that lie among them.
        root: folder of the archive.
        labels: folder of `--labels`, which may lie inside the archive, or None.
        seconds: longest time to wait for a file of that folder.
    """
    by_name: dict[FolderAndStem, Path] = {}
    twins: dict[Path, list[Path]] = {}
    passed_over: Mapping[str, int] = {}
    if labels is not None:
        listing = search(labels, seconds=seconds)
        by_name, twins = by_folder_and_stem(listing.sources, labels)
        if not labels.resolve().is_relative_to(root.resolve()):
            passed_over = listing.passed_over
    given = [*by_name.values(), *(path for paths in twins.values() for path in paths)]
    given_files = {path.resolve() for path in given}
    others = [source for source in sources if source.path.resolve() not in given_files]
    label_files = {source.path for source in sources if source.path.resolve() in given_files}
    files, more_twins = by_folder_and_stem(others, root)
    archive = LabelArchive(root, tuple(others), files, by_name, {**more_twins, **twins})
    layouts = [build(archive) for build in LAYOUTS]
    owned = frozenset(archive.with_twins(path for layout in layouts for path in layout.owned))
    likely = frozenset(archive.with_twins(path for layout in layouts for path in layout.likely))
    label_of: dict[Path, Path] = {}
    others_of: dict[Path, tuple[Path, ...]] = {}
    more_of: dict[Path, tuple[Path, ...]] = {}
    for source in others:
        if source.path in owned:
            continue
        found = _all_found(source, layouts, archive)
        if found:
            label_of[source.path], *others_found = found
            others_of[source.path] = tuple(others_found)
            more_of[source.path] = _merged_with(source, layouts, found[0])
    used = {*label_of.values(), *(path for paths in more_of.values() for path in paths)}
    label_files |= {source.path for source in others if _is_among(source, used)}
    label_files |= owned & {source.path for source in others}
    scans = {scan: path for scan, path in label_of.items() if scan not in label_files}
    used = {*scans.values(), *(path for scan in scans for path in more_of[scan])}
    return LabelPairs(
        label_of=scans,
        label_files=frozenset(label_files),
        unmatched=tuple(sorted(path for path in owned if path not in used)),
        likely=likely - label_files - used,
        num_given=len(given),
        num_given_used=sum(path.resolve() in given_files for path in scans.values()),
        others_of={scan: others_of[scan] for scan in scans if others_of[scan]},
        more_of={scan: more_of[scan] for scan in scans if more_of[scan]},
        passed_over=passed_over,
    )


def may_hold_labels(source: Source, root: Path) -> bool:
    """Whether a source may be a label file by one of the layouts. If this is False for all sources
    of an archive and no folder of labels was given, `pair_labels` finds nothing and need not be
    called.

    Args:
        source: what may be a scan or a label map.
        root: folder of the archive.
    """
    return any(build not in _SIGNS or _SIGNS[build](source, root) for build in LAYOUTS)


def _all_found(source: Source, layouts: Sequence[Layout], archive: LabelArchive) -> list[Path]:
    """All labels that fit a scan, in the order of the layouts: the first is used."""
    found: dict[Path, None] = {}
    for layout in layouts:
        path = layout.find(source)
        if path is None:
            continue
        for each in archive.with_twins((path, *layout.others.get(path, ()))):
            # a folder of labels is no other label map beside the file in it
            is_same = any(each in known.parents or known in each.parents for known in found)
            if each != source.path and not is_same:
                found.setdefault(each)
    return list(found)


def _merged_with(source: Source, layouts: Sequence[Layout], path: Path) -> tuple[Path, ...]:
    """The files that are merged with the labels of a scan."""
    for layout in layouts:
        if layout.find(source) == path:
            return tuple(layout.more(source))
    return ()


def _is_among(source: Source, used: set[Path]) -> bool:
    """Whether a source is labels that a scan uses: a file, or one in a folder of masks."""
    return source.path in used or source.path.parent in used or source.files[0] in used
