"""Layout of sibling folders: images*/case1 and labels*/case1 (imagesTr -> labelsTr, img -> label).

nnU-Net, MSD, FLARE, AMOS and many others. The folder of the labels may also be called masks,
segmentations or gt; folders below it repeat those below the folder of the images.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from tapct.data.labels import words
from tapct.data.labels.archive import FolderAndStem, LabelArchive, Layout, keep_first
from tapct.data.readers import stem_of
from tapct.data.search.discover import Source


def sign(source: Source, root: Path) -> bool:
    """Whether a source may be a label file by this layout."""
    folders = source.path.parent.relative_to(root).parts if source.path != root else ()
    return any(folder.lower().startswith(words.LABEL_FOLDERS) for folder in folders)


def build(archive: LabelArchive) -> Layout:
    """Prepare the search in the folders of labels of an archive."""
    stems_in: dict[Path, list[str]] = defaultdict(list)
    labels_in: dict[FolderAndStem, Path] = {}
    others: dict[Path, list[Path]] = {}
    lower: dict[str, Path] = {}  # folder in lower case -> folder
    for (folder, stem), path in archive.files.items():
        stems_in[folder].append(stem)
        lower.setdefault(folder.as_posix().lower(), folder)
        if path.is_file():
            for key in words.label_keys(stem):
                keep_first(labels_in, (folder, key), path, others)
    siblings = {folder: _label_folders(folder, lower) for folder in stems_in}
    shared = {folder: words.ambiguous_keys(stems) for folder, stems in stems_in.items()}

    def find(scan: Source) -> Path | None:
        folder, stem = archive.folder_of(scan), stem_of(scan.path)
        for labels in siblings.get(folder, ()):
            for key in words.scan_keys(stem):
                if (labels, key) in labels_in and (key == stem or key not in shared[folder]):
                    return labels_in[labels, key]
        return None

    label_folders = {folder for folders in siblings.values() for folder in folders}
    owned = frozenset(
        path
        for (folder, _), path in archive.files.items()
        if folder in label_folders and path.is_file()
    )
    return Layout(find, owned=owned, others=others)


def _label_folders(folder: Path, lower: dict[str, Path]) -> tuple[Path, ...]:
    """The folders of labels that belong to a folder of images; empty for any other folder.

    Args:
        folder: folder below the root.
        lower: all folders with files, by their path in lower case.
    """
    parts = folder.parts
    found = []
    for depth in reversed(range(len(parts))):
        for name in words.label_folder_names(parts[depth]):
            path = Path(*parts[:depth], name, *parts[depth + 1 :]).as_posix().lower()
            if path in lower and lower[path] != folder:
                found.append(lower[path])
    return tuple(found)
