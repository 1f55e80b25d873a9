"""The journal of an index: what was read, as Parquet parts, so that a killed index resumes and a
later one reads only the files that are new or changed.

Rows are found by a key of 16 bytes, a hash of all that their content depends on: names, sizes,
times of change and inodes of the files, and the options. A row whose files changed is therefore not
found. A part is complete or absent. The journal holds no identifier of a header in clear.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from tapct.base import files
from tapct.base.exits import UserError

KEY_BYTES = 16
KEY = "key"  # column with the key of a row
_ABOUT = "about.json"
_FLUSH_SECONDS = 5.0  # work that a kill may lose
_FLUSH_ROWS = 20_000
_PART_ROWS, _PART_BYTES = 100_000, 1 << 25  # of a part that is not written again, at most
_STALE_SECONDS = 3600.0  # after which an unfinished file belongs to no process


def key_of(*parts: bytes | str) -> bytes:
    """The key of a row: a hash of parts, whose borders count."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


class Keys:
    """Keys of 16 bytes in a sorted array, 24 bytes each with their places.

    Args:
        keys: all keys, one after the other.
    """

    def __init__(self, keys: bytes | bytearray | memoryview = b"") -> None:
        words_N2 = np.frombuffer(keys, "<u8").reshape(-1, 2)
        order = np.argsort(words_N2[:, 0], kind="stable")
        self._sorted_N2 = words_N2[order]
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def find(self, keys: bytes | bytearray) -> np.ndarray:
        """The place of each of some keys, int64; -1 for one that is not here."""
        wanted_M2 = np.frombuffer(keys, "<u8").reshape(-1, 2)
        found = np.full(len(wanted_M2), -1, np.int64)
        if not len(self) or not len(found):
            return found
        at = np.searchsorted(self._sorted_N2[:, 0], wanted_M2[:, 0])
        # equal first halves of different keys practically never occur, but two equal keys do
        for _ in range(3):
            inside = np.minimum(at, len(self) - 1)
            is_same = (self._sorted_N2[inside] == wanted_M2).all(axis=1) & (found < 0)
            found[is_same] = self._order[inside[is_same]]
            at = at + 1
        return found


class Journal:
    """The parts of one index, by kind of row.

    Args:
        folder: folder of the parts; made with the first part.
        about: what must be equal for rows to be used again, such as the version of tapct.
        name: name of the process in the names of its parts, for several that write at once.
        schemas: columns of each kind of row, beside the key.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, str],
        schemas: Mapping[str, pyarrow.Schema],
        name: str = "",
    ) -> None:
        self.folder, self.name = folder, name
        self._about = json.dumps(dict(sorted(about.items())))
        self._schemas = schemas
        self._token = secrets.token_hex(3)
        self._count = 0
        self._waiting: dict[str, list[dict[str, Any]]] = {kind: [] for kind in schemas}
        self._flushed = time.monotonic()
        if folder.exists() and self._read_about() != self._about:
            self.remove()

    def _read_about(self) -> str:
        try:
            return (self.folder / _ABOUT).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def append(self, kind: str, key: bytes, row: Mapping[str, Any]) -> None:
        """Add a row; it is written with the next part, within a few seconds."""
        self._waiting[kind].append({KEY: key, **row})
        is_due = time.monotonic() - self._flushed > _FLUSH_SECONDS
        if is_due or len(self._waiting[kind]) >= _FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait.

        Raises:
            UserError: the disk is full or the folder is not writable.
        """
        # heads come last: with a head on disk, the rows that were made from it are there too
        for kind in sorted(self._waiting, reverse=True):
            rows, self._waiting[kind] = self._waiting[kind], []
            if rows:
                columns = {name: [row[name] for row in rows] for name in self.schema(kind).names}
                self.write(kind, pyarrow.table(columns, schema=self.schema(kind)))
        self._flushed = time.monotonic()

    def schema(self, kind: str) -> pyarrow.Schema:
        """Columns of a kind of row, the key first."""
        key = pyarrow.field(KEY, pyarrow.binary(KEY_BYTES))
        return pyarrow.schema([key, *self._schemas[kind]])

    def write(self, kind: str, table: pyarrow.Table) -> Path:
        """Write one part; its path."""
        self._count += 1
        name = "-".join(filter(None, (kind, self.name, self._token, f"{self._count:05d}")))
        part = self.folder / f"{name}.parquet"
        try:
            if self._count == 1:
                self._make_folder()
            with files.replacing(part, mode=files.PRIVATE) as file:
                pyarrow.parquet.write_table(table, file)
        except OSError as error:
            if not any(self.folder.glob("*.parquet")):
                self.remove()
            raise _not_written(part, error) from error
        return part

    def _make_folder(self) -> None:
        """Make the folder, with the file that shows for what its rows can be used."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._read_about() != self._about:
            files.write_atomically(self.folder / _ABOUT, self._about, mode=files.PRIVATE)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new folder in that of the journal, for rows that are of no use after this call.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self._make_folder()
            place = tempfile.TemporaryDirectory(
                prefix="scratch", dir=self.folder, ignore_cleanup_errors=True
            )
        except OSError as error:
            raise _not_written(self.folder, error) from error
        with place as name:
            yield Path(name)

    def parts(self, kind: str) -> list[Path]:
        """The files with rows of one kind."""
        return sorted(self.folder.glob(f"{kind}-*.parquet"))

    def read(self, kind: str, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """The rows of one kind that are on disk.

        Args:
            kind: kind of row.
            columns: names of the columns; None for all.
        """
        return pyarrow.concat_tables(
            [self._empty(kind, columns)]
            + [self.read_part(part, kind, columns) for part in self.parts(kind)]
        )

    def read_part(
        self, part: Path, kind: str, columns: Sequence[str] | None = None
    ) -> pyarrow.Table:
        """The rows of one part; arguments as in `read`. A part that cannot be read is removed, so
        that its files are read again.
        """
        empty = self._empty(kind, columns)
        try:
            table = pyarrow.parquet.read_table(part, columns=columns, partitioning=None)
            return table.cast(empty.schema)
        except (pyarrow.ArrowException, OSError, ValueError):
            with contextlib.suppress(OSError):
                part.unlink()
        return empty

    def _empty(self, kind: str, columns: Sequence[str] | None) -> pyarrow.Table:
        schema = self.schema(kind)
        if columns is not None:
            schema = pyarrow.schema([schema.field(name) for name in columns])
        return schema.empty_table()

    def keep_only(self, kind: str, keys: Keys) -> None:
        """Leave the rows with some keys, each once, in parts of limited size.

        One part is in memory at a time. After a crash in between, rows are there twice, and the
        first of each is used.
        """
        is_kept = np.zeros(len(keys), bool)
        waiting: list[pyarrow.Table] = []
        replaced: list[Path] = []
        parts = self.parts(kind)
        for part in parts:
            table = self.read_part(part, kind)
            chosen = first_of_each(table, keys)
            places = keys.find(keys_in(table.take(chosen)))
            chosen = chosen[~is_kept[places]]
            is_kept[places] = True
            is_large = len(parts) == 1 or _is_large(table)
            if is_large and len(chosen) == len(table):
                continue
            replaced.append(part)
            if len(chosen):
                waiting.append(table.take(chosen))
            if waiting and _is_large(pyarrow.concat_tables(waiting)):
                self.write(kind, pyarrow.concat_tables(waiting))
                waiting = []
        if waiting:
            self.write(kind, pyarrow.concat_tables(waiting))
        for part in replaced:
            part.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the whole journal."""
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                _remove(path)
            self.folder.rmdir()
        self._count = 0

    def remove_leftovers(self) -> None:
        """Remove the unfinished files of processes that were killed, which are old by now."""
        before = time.time() - _STALE_SECONDS
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                is_part = path.suffix == ".parquet" and not path.name.startswith(".")
                if not is_part and path.name != _ABOUT and path.stat().st_mtime < before:
                    _remove(path)


def _is_large(table: pyarrow.Table) -> bool:
    """Whether rows are enough for a part."""
    return bool(len(table) > _PART_ROWS // 2 or table.nbytes > _PART_BYTES // 2)


def _not_written(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the journal {path}: {files.first_cause(error)}; nothing was changed, and "
        "what was read before is kept"
    )


def _remove(path: Path) -> None:
    """Remove a file, or a folder."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def keys_in(table: pyarrow.Table) -> bytes:
    """All keys of a table, one after the other."""
    column = []
    for chunk in filter(len, table.column(KEY).chunks):
        first, end = KEY_BYTES * chunk.offset, KEY_BYTES * (chunk.offset + len(chunk))
        column.append(memoryview(chunk.buffers()[1])[first:end])
    return b"".join(column)


def first_of_each(table: pyarrow.Table, keys: Keys) -> np.ndarray:
    """Numbers of the rows of a table with some keys, each key once, ascending."""
    content = keys_in(table)
    is_wanted = keys.find(content) >= 0
    words_N2 = np.frombuffer(content, "<u8").reshape(-1, 2)
    _, first = np.unique(words_N2, axis=0, return_index=True)
    return np.sort(first[is_wanted[first]])
