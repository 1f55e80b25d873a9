"""Layout of one mask per organ: s0001/ct and s0001/segmentations/liver, spleen, ...

TotalSegmentator writes it. The folder is named by a word for labels (segmentations, masks, organs)
and lies beside the only scan of its parent, or it is named after its scan (case1_seg/liver). The
names of the files are the names of the organs.
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
    return source.path != root and _may_hold_masks(source.path.parent, root)


def build(archive: LabelArchive) -> Layout:
    """Find the folders of an archive that may hold masks."""
    masks: dict[Path, set[str]] = defaultdict(set)  # folder of masks -> stems in it
    folders_in: dict[Path, list[Path]] = defaultdict(list)
    scans_in: dict[Path, list[Path]] = defaultdict(list)
    likely = set()
    for source in archive.sources:
        folder, stem = source.path.parent, stem_of(source.path)
        if source.path == archive.root or not source.path.is_file():
            for place in (folder, source.path):
                scans_in[place].append(source.path)
        elif _may_hold_masks(folder, archive.root):
            masks[folder].add(stem)
            if words.is_mask_folder(folder.name):
                likely.add(source.path)
        is_named_like_labels = words.keys_by_word(stem) or words.is_only_label_word(stem)
        if source.path.is_file() and not is_named_like_labels:
            scans_in[folder].append(source.path)
    for folder in masks:
        folders_in[folder.parent].append(folder)

    def find(scan: Source) -> Path | None:
        stem = stem_of(scan.path)
        for place in (scan.path, scan.path.parent) if scan.path.is_dir() else (scan.path.parent,):
            for folder in folders_in.get(place, ()):
                if folder == scan.path:
                    continue
                own = words.is_label_folder_of(folder.name, stem)
                alone = words.is_mask_folder(folder.name) and scans_in[place] == [scan.path]
                if own or alone:
                    return folder
        return None

    return Layout(find, likely=frozenset(likely))


def _may_hold_masks(folder: Path, root: Path) -> bool:
    """Whether the name of a folder below the root means masks."""
    if folder == root:
        return False
    return words.is_mask_folder(folder.name) or bool(words.keys_by_word(folder.name))
