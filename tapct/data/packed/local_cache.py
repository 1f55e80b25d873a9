"""Copies of packed scans on a disk of the node, for stores on a network file system.

A scan is copied when it is first read. Its copy has the digest of the voxels and the ID of the scan
as its name, so that several stores may share the folder: two archives that hold the same voxels
call them by other IDs, and a packed file holds its ID. Beyond the quota, the copies that were used
least recently (by their time of change) are deleted.

Any number of processes may share the folder: a copy is written under another name and renamed, and
the sum of all sizes is kept in a file that is changed under a lock. A process that is killed leaves
at most an unfinished copy, which is counted, and deleted when room is needed. Where the folder
cannot be used, the scan is read from the store.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tapct.base import files
from tapct.config.fields import setting

_log = logging.getLogger(__name__)
GB = 10**9
_TOTAL = ".total"  # holds the sum of the sizes; it is also what processes lock
_KEPT_SHARE = 0.9  # of the quota, after copies were deleted
_COPYING_S = 600.0  # an unfinished copy that was not written to for this time belongs to nobody
_LARGEST_SHARE = 0.5  # of the quota that one scan may have


@dataclass(frozen=True)
class Config:
    """Copies of packed scans on a disk of the node."""

    dir: str = setting(
        "", "folder on a disk of the node; empty: scans are read from the store", is_path=True
    )
    quota_gb: float = setting(
        100.0,
        "maximum size in GB of the copies of all processes together; a scan that needs more than "
        "half of this size is read from the store",
        gt=0.0,
    )

    def open(self) -> LocalCache | None:
        """The cache; None without a folder."""
        if not self.dir:
            return None
        return LocalCache(Path(self.dir), int(self.quota_gb * GB))


class LocalCache:
    """The folder with the copies; may be used by any number of threads and processes.

    Args:
        folder: folder on a disk of the node; made with the first copy.
        quota: bytes that all copies together may have.
    Attributes:
        hits, copies: scans that were found in the folder, and that were copied to it.
    """

    def __init__(self, folder: Path, quota: int) -> None:
        self.folder, self.quota = files.expand_path(folder), quota
        self.hits = self.copies = 0
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "quota": self.quota}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["folder"], state["quota"])  # type: ignore[misc]

    def local(self, source: Path, checksum: str) -> Path:
        """The copy of a packed scan, made if it is missing; the source where that is not possible.

        Args:
            source: file in the store.
            checksum: digest of its voxels, 32 hex digits.
        """
        copy = self._copy_of(source, checksum)
        try:
            os.utime(copy)  # used now
            self.hits += 1
            return copy
        except FileNotFoundError:
            pass
        except OSError as error:
            return self._not_used(source, error)
        try:
            size = source.stat().st_size
            if size > _LARGEST_SHARE * self.quota:
                self._warn(
                    "data.cache.quota_gb %g: scans of more than half of it, such as one of "
                    "%.3g GB, are read from the store",
                    *(self.quota / GB, size / GB),
                )
                return source
            copy.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            with files.replacing(copy, mode=files.PRIVATE) as target, source.open("rb") as content:
                shutil.copyfileobj(content, target, 1 << 20)
            self.copies += 1
            return copy
        except FileNotFoundError:  # another process has deleted the unfinished copy
            return source
        except OSError as error:
            return self._not_used(source, error)

    def drop(self, source: Path, checksum: str) -> None:
        """Delete the copy of a scan, because it is damaged; arguments as in `local`."""
        with suppress(OSError):
            self._copy_of(source, checksum).unlink()

    def _copy_of(self, source: Path, checksum: str) -> Path:
        """Where the copy of a scan lies; a packed file has the ID of its scan as its name."""
        return self.folder / checksum[:2] / f"{checksum}-{source.name}"

    def _not_used(self, source: Path, error: OSError) -> Path:
        """The source; the first time, the reason is logged."""
        cause = error.strerror or type(error).__name__
        self._warn(
            "data.cache.dir %s is not used: %s; scans are read from the store",
            *(self.folder, cause),
        )
        return source

    def _warn(self, line: str, *values: object) -> None:
        """Log a line of this kind once."""
        if line not in self._warned:
            self._warned.add(line)
            _log.warning(line, *values)

    def _make_room(self, size: int) -> None:
        """Count a copy that is about to be written; delete old ones where the quota would not hold.

        The size is counted before the copy is written: if the process is killed in between, the sum
        is too large, never too small, until the copies are counted again.
        """
        with self._locked() as file:
            text = os.pread(file, 64, 0).decode("ascii", "replace").strip()
            total = int(text) if text.isdigit() else self._delete_down_to(self.quota)
            if total + size > self.quota:
                total = self._delete_down_to(int(_KEPT_SHARE * self.quota) - size)
            os.ftruncate(file, 0)
            os.pwrite(file, str(total + size).encode(), 0)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file with the sum, locked against other threads and processes."""
        with self._lock:
            file = os.open(self.folder / _TOTAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however it ends
                yield file
            finally:
                os.close(file)

    def _delete_down_to(self, most: int) -> int:
        """Delete the copies that were used least recently until the others fit.

        Unfinished copies count too: those of living processes are new and stay, those of killed
        ones get old.

        Args:
            most: bytes that may stay.
        Returns:
            Bytes that are left.
        """
        found: list[tuple[float, int, Path]] = []
        for file in self.folder.glob("*/*"):  # hidden ones too
            with suppress(OSError):  # deleted by another process
                facts = file.stat()
                found.append((facts.st_mtime, facts.st_size, file))
        total = sum(size for _, size, _ in found)
        now = time.time()
        for when, size, file in sorted(found):
            if total <= most:
                break
            if file.name.startswith(".") and now - when < _COPYING_S:
                continue
            with suppress(OSError):
                file.unlink()
                total -= size
        return total
