"""The folders that were visited, in 8 bytes each."""

from __future__ import annotations

import numpy as np

_MOST_RECENT = 1 << 14


class SeenFolders:
    """A set of folders, by which a folder is visited once, whatever links lead to it."""

    def __init__(self) -> None:
        self._recent: set[tuple[int, int]] = set()
        self._inodes: dict[int, np.ndarray] = {}  # by device, sorted

    def __contains__(self, identity: tuple[int, int]) -> bool:
        """Whether a folder is here, by its device and inode."""
        if identity in self._recent:
            return True
        device, inode = identity
        inodes = self._inodes.get(device)
        if inodes is None:
            return False
        place = int(np.searchsorted(inodes, np.uint64(inode)))
        return place < len(inodes) and int(inodes[place]) == inode

    def add(self, identity: tuple[int, int]) -> None:
        """Add a folder that is not here."""
        self._recent.add(identity)
        if len(self._recent) >= _MOST_RECENT:
            self._pack()

    def _pack(self) -> None:
        recent, self._recent = self._recent, set()
        for device in {device for device, _ in recent}:
            added = np.array(sorted(i for d, i in recent if d == device), np.uint64)
            known = self._inodes.get(device, np.empty(0, np.uint64))
            self._inodes[device] = np.insert(known, np.searchsorted(known, added), added)
