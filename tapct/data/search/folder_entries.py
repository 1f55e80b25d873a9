"""What one folder holds: its subfolders and regular files, and what is neither, counted by kind."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tapct.data.search import passed_over as passed

_SPECIAL = {  # opening a FIFO waits for a writer, and a device may never end
    stat.S_IFIFO: passed.FIFO,
    stat.S_IFSOCK: passed.SOCKET,
    stat.S_IFCHR: passed.DEVICE,
    stat.S_IFBLK: passed.DEVICE,
}


Stamp: TypeAlias = tuple[int, int, int]
_NO_STAMP = (-1, 0, 0)  # of a file that has gone since its folder was listed


@dataclass(frozen=True)
class Entries:
    """The content of one folder.

    Args:
        identity: device and inode, by which a folder is recognised behind a link.
        folders: names of the subfolders that are searched, sorted.
        files: names of the regular files that are searched, sorted.
        stamps: size in bytes, time of the last change in ns, and inode of each of `files`; they
            differ where a file was changed or replaced.
        passed_over: number of the others by kind.
    """

    identity: tuple[int, int]
    folders: tuple[str, ...]
    files: tuple[str, ...]
    stamps: tuple[Stamp, ...]
    passed_over: Counter[str]


def read(folder: Path) -> Entries:
    """List a folder; links are followed.

    Raises:
        OSError: the folder is gone or may not be listed.
    """
    status = os.stat(folder)
    folders: list[str] = []
    files: dict[str, Stamp] = {}
    others: Counter[str] = Counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = _kind_of(entry)
            is_hidden = entry.name.startswith(".")
            if kind == stat.S_IFDIR and (is_hidden or entry.name.startswith("__MACOSX")):
                others[passed.HIDDEN_FOLDER] += 1
            elif kind == stat.S_IFDIR:
                folders.append(entry.name)
            elif is_hidden:
                others[passed.HIDDEN_FILE] += 1
            elif kind == stat.S_IFREG:
                files[entry.name] = _stamp(entry)
            else:
                others[_SPECIAL.get(kind, passed.BROKEN_LINK)] += 1
    names = tuple(sorted(files))
    return Entries(
        (status.st_dev, status.st_ino),
        tuple(sorted(folders)),
        names,
        tuple(files[name] for name in names),
        others,
    )


def _stamp(entry: os.DirEntry[str]) -> Stamp:
    """Size, time of the last change and inode of a file; links are followed."""
    try:
        status = entry.stat()
    except OSError:
        return _NO_STAMP
    return status.st_size, status.st_mtime_ns, status.st_ino


def _kind_of(entry: os.DirEntry[str]) -> int:
    """File type as in `stat`; 0 for a link to nothing or to itself, and for what cannot be read."""
    try:
        # most file systems give the type of a folder or file with its name, without a `stat`
        if entry.is_dir():
            return stat.S_IFDIR
        if entry.is_file():
            return stat.S_IFREG
        return stat.S_IFMT(entry.stat().st_mode)
    except OSError:
        return 0
