"""What every label layout starts from, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from tapct.data.readers import stem_of
from tapct.data.search.discover import Source

# folder below the root, and file name without the suffix of its format
FolderAndStem: TypeAlias = tuple[Path, str]
# from a scan to its label file or folder of masks, or None where the layout does not apply
FindLabels: TypeAlias = Callable[[Source], Path | None]


@dataclass(frozen=True)
class Layout:
    """One layout, prepared for one archive.

    Args:
        find: function from a scan to the path of its labels.
        owned: paths of files that can only be label files, whether a scan matches them or not;
            they are never scans.
        likely: paths of files that are named like labels; one that no scan matches is examined as
            a scan, and reported where it is refused.
        others: further files that fit where `find` returns the first one, by the path of that one.
        more: function from a scan to the files that are merged with the one that `find` returns.
    """

    find: FindLabels
    owned: frozenset[Path] = frozenset()
    likely: frozenset[Path] = frozenset()
    others: Mapping[Path, Sequence[Path]] = field(default_factory=dict)
    more: Callable[[Source], Sequence[Path]] = lambda scan: ()


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
        twins: paths of the files with another suffix that have folder and stem of a file in `files`
            or `given`, by the path of that file.
    """

    root: Path
    sources: tuple[Source, ...]
    files: Mapping[FolderAndStem, Path]
    given: Mapping[FolderAndStem, Path]
    twins: Mapping[Path, Sequence[Path]] = field(default_factory=dict)

    def with_twins(self, paths: Iterable[Path]) -> Iterator[Path]:
        """These files, each followed by its twins."""
        for path in paths:
            yield path
            yield from self.twins.get(path, ())

    def folder_of(self, scan: Source) -> Path:
        """The folder of a scan below the root."""
        return Path() if scan.path == self.root else scan.path.parent.relative_to(self.root)


def by_folder_and_stem(
    sources: Iterable[Source], root: Path
) -> tuple[dict[FolderAndStem, Path], dict[Path, list[Path]]]:
    """Paths by folder below `root` and stem.

    Returns:
        The table, in which a file comes before a folder, and the first in the order of paths before
        the others; and the others by the path of the first.
    """
    table: dict[FolderAndStem, Path] = {}
    twins: dict[Path, list[Path]] = {}
    for source in sorted(sources, key=lambda source: (source.path.is_dir(), source.path)):
        if source.path != root:
            key = (source.path.parent.relative_to(root), stem_of(source.path))
            keep_first(table, key, source.path, twins)
    return table, twins


def keep_first(
    table: dict[FolderAndStem, Path], key: FolderAndStem, path: Path, others: dict[Path, list[Path]]
) -> None:
    """Enter a label file under its key; one that comes later under the same key is counted among
    the others of the first.

    Args:
        table: label files by folder and key.
        key: folder and key of this file.
        path: path of this file.
        others: dict that receives the further files, by the path of the first.
    """
    first = table.setdefault(key, path)
    if first != path and path not in others.setdefault(first, []):
        others[first].append(path)
