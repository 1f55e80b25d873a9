"""The number of files of an archive, counted ahead of the work on them, for the time that is left.

Names alone are read, without a `stat` of each file, so that counting takes a small part of the
time of an index.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from tapct.data.search.seen_folders import SeenFolders


class FileCount:
    """Counts regular files below some folders in a thread; hidden ones are left out.

    Args:
        folders: folders, with all folders in them.
        num_files: number of files to add that lie elsewhere.
    Attributes:
        num_files: number of files that were counted so far.
        is_complete: whether all of them were counted.
    """

    def __init__(self, folders: Sequence[Path], num_files: int = 0) -> None:
        self.num_files = num_files
        self.is_complete = False
        self._folders = tuple(folders)
        self._is_closed = False
        # a thread that a disk without an answer holds does not keep the process from its end
        threading.Thread(target=self._count, daemon=True).start()

    def close(self) -> None:
        """End the thread after the folder that it reads."""
        self._is_closed = True

    def _count(self) -> None:
        seen = SeenFolders()
        todo = [(folder, [""]) for folder in self._folders]  # each with the names that wait
        while todo and not self._is_closed:
            parent, waiting = todo[-1]
            if not waiting:
                todo.pop()
                continue
            folder = parent / waiting.pop()
            try:
                status = os.stat(folder)
                identity = (status.st_dev, status.st_ino)
                if identity not in seen:  # links may lead to a folder twice
                    seen.add(identity)
                    todo.append((folder, self._below(folder)))
            except OSError:
                continue  # the listing reports a folder that cannot be listed
        self.is_complete = not todo

    def _below(self, folder: Path) -> list[str]:
        """Count the files of one folder; the names of the folders in it."""
        folders = []
        num_files = 0
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__MACOSX")):
                    continue
                try:
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        num_files += 1
                except OSError:
                    continue  # a link to itself, for example
        self.num_files += num_files
        return folders
