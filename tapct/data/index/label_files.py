"""Whether the labels of a scan changed since they were read: the files that they depend on."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from tapct.data.index.journal import key_of
from tapct.data.labels.names import DATASET_FILE
from tapct.data.readers import stem_of
from tapct.data.search.passed_over import COMPANIONS

_MOST_FOLDERS = 64  # whose lists of files are kept
_DETACHED = (".nhdr", ".mhd", ".hdr")  # the voxels may lie in any other file of the folder


class LabelStamps:
    """Hashes of names, sizes, times of change and inodes of label files.

    Label maps depend on more than their own file: on a side-car, on voxels in another file, and on
    the `dataset.json` above them.
    """

    def __init__(self) -> None:
        self._folders: OrderedDict[Path, dict[str, bytes]] = OrderedDict()

    def of(self, paths: Sequence[Path]) -> bytes:
        """The hash of label files, or of folders of masks, and of all that they depend on."""
        return key_of(*(part for path in paths for part in self._parts(path)))

    def _parts(self, path: Path) -> list[bytes | str]:
        files = self._files_of(path.parent)
        inside = self._files_of(path) if path.name not in files else {}
        parts: list[bytes | str] = [str(path)]
        parts += [value for name in sorted(inside) for value in (name, inside[name])]
        stem = stem_of(path)
        names = [path.name, *(stem + suffix for suffix in COMPANIONS)]
        if path.name.lower().endswith(_DETACHED):
            names = sorted(files)
        parts += [value for name in names for value in (name, files.get(name, b""))]
        for folder in list(path.absolute().parents)[:2]:
            parts.append(self._files_of(folder).get(DATASET_FILE, b""))
        return parts

    def _files_of(self, folder: Path) -> dict[str, bytes]:
        """The stamp of every file in a folder; empty for what is no folder."""
        if folder in self._folders:
            self._folders.move_to_end(folder)
            return self._folders[folder]
        found: dict[str, bytes] = {}
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_file():
                        at = entry.stat()
                        found[entry.name] = b"%d %d %d" % (at.st_size, at.st_mtime_ns, at.st_ino)
        self._folders[folder] = found
        if len(self._folders) > _MOST_FOLDERS:
            self._folders.popitem(last=False)
        return found
