"""The vectors of many scans in one Parquet file, which a killed call leaves whole.

    OUT/vectors.parquet          one row per scan, sorted by ID
    OUT/vectors.parquet.part     rows of a call that has not finished: one JSON object per line
    OUT/vectors.parquet.part.1   the same, of one of several calls that share the scans

A finished scan is a line at the end of the second file. At the end of the call all files are
merged, row by row, into a new first one, and the others are removed. Sorted rows make the result
independent of where calls were interrupted. Path and label of a scan that is done are those of the
last call, so that a corrected label needs no new vector. A torn last line is left out; a row that
stands in several files is taken from a later one, so a crash in between costs nothing. Calls that
share the scans do not merge: the first call for all scans does, once they have ended.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tapct.base import files
from tapct.base.exits import UserError
from tapct.base.jsonl import parse
from tapct.run.embed.named_scans import NamedScan
from tapct.run.embed.one_scan import ScanEncoder
from tapct.run.embed.outputs import Output, check_facts
from tapct.run.embed.scan_vector import VectorChoice, vector_of
from tapct.types import Volume

TABLE, PART = "vectors.parquet", "vectors.parquet.part"
_ROWS = 1024  # rows in memory at a time
_FACTS = b"tapct"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        ("label", pa.string()),  # null without a column `label` in the table of scans
        ("block", pa.string()),
        ("kind", pa.string()),
        ("vector", pa.list_(pa.float32())),
        ("shape_zyx", pa.list_(pa.int32())),  # voxels
        ("spacing_mm_zyx", pa.list_(pa.float64())),
        ("origin_mm_xyz", pa.list_(pa.float64())),  # LPS, of the first voxel
        ("directions", pa.list_(pa.float64())),  # of the axes x, y and z, one after the other
        ("stamp", pa.string()),  # of the files of the scan: sizes and times of change
    ]
)


class VectorTable(Output):
    """See above.

    Args:
        out, encoder, wanted: as in `Output`.
        share: number of this call among those that share the scans; 0 where there is one call.
    """

    def __init__(
        self, out: Path, encoder: ScanEncoder, wanted: VectorChoice | None, share: int = 0
    ) -> None:
        super().__init__(out, encoder, wanted)
        self.share = share
        self.table = out / TABLE
        self.part = out / (f"{PART}.{share}" if share else PART)
        self.stamps: dict[str, str] = {}
        self.names: dict[str, tuple[str, str | None]] = {}  # ID -> path and label, as in the files
        self.renamed: dict[str, dict[str, str | None]] = {}  # scans whose path or label differ now
        # ID -> file and first byte of its line; the last line counts
        self.places: dict[str, tuple[Path, int]] = {}

    @property
    def place_of_results(self) -> Path:
        """The table, or the file of the rows of this share."""
        return self.part if self.share else self.table

    def __enter__(self) -> VectorTable:
        """Take the folder and find out what is done.

        Raises:
            UserError: another call writes to it, or it holds vectors of another model or kind.
        """
        super().__enter__()
        self.stack.callback(os.close, _locked(self.out, alone=not self.share))
        try:
            if self.share:
                self.part.touch()
                self.stack.callback(os.close, _locked(self.part))
            self._read_table()
            for part in self._parts():
                self._read_part(part)
        except BaseException:
            self.stack.close()
            raise
        return self

    def is_done(self, case: NamedScan) -> bool:
        """See `Output.is_done`."""
        if self.stamps.get(case.id) != case.stamp():
            return False
        if self.names[case.id] != (case.path, case.label):
            self.renamed[case.id] = {"path": case.path, "label": case.label}
        return True

    def add(self, case: NamedScan, volume: Volume, stamp: str) -> None:
        """See `Output.add`."""
        assert self.wanted is not None
        vector_D = vector_of(self.encoder, case, volume, self.wanted)
        row = {
            "id": case.id,
            "path": case.path,
            "label": case.label,
            "block": self.wanted.block,
            "kind": self.wanted.vector,
            "vector": base64.b64encode(vector_D.astype("<f4").tobytes()).decode(),
            "shape_zyx": list(volume.hu_ZYX.shape),
            "spacing_mm_zyx": list(volume.spacing_mm),
            "origin_mm_xyz": list(volume.origin_mm),
            "directions": [cosine for direction in volume.directions for cosine in direction],
            "stamp": stamp,
        }
        self._append(row)

    def remove(self, case: NamedScan) -> None:
        """See `Output.remove`."""
        if case.id in self.stamps:
            self._append({"id": case.id, "removed": True})

    def finish(self) -> None:
        """Merge the two files.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        parts = self._parts()
        if self.share or not (parts or self.renamed or not self.table.exists()):
            return
        try:
            with files.replacing(self.table) as target:
                self._merge(target)
            for part in parts:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.table}: {files.first_cause(error)}") from error

    def _read_table(self) -> None:
        """Stamps of the rows of the finished file."""
        if not self.table.exists():
            return
        try:
            opened = pq.ParquetFile(self.table)
            facts = json.loads(opened.schema_arrow.metadata[_FACTS])
            rows = opened.read(columns=["id", "path", "label", "stamp"]).to_pydict()
        except (OSError, KeyError, ValueError, TypeError, pa.ArrowException):
            raise UserError(
                f"{self.table} is damaged or was not written by tapct embed; remove it, or give "
                "another --out"
            ) from None
        check_facts(self.table, facts, self.made_with)
        self.stamps = dict(zip(rows["id"], rows["stamp"], strict=True))
        self.names = dict(zip(rows["id"], zip(rows["path"], rows["label"]), strict=True))

    def _parts(self) -> list[Path]:
        """The files with unfinished rows, of this and of other calls."""
        return sorted(self.out.glob(f"{PART}*"))

    def _read_part(self, part: Path) -> None:
        """Stamps and places of unfinished rows; a torn end is cut off, where no other call may be
        writing it.
        """
        whole = 0
        with open(part, "rb") as file:
            for line in file:
                row = parse(line) if line.endswith(b"\n") else None
                if row is None:
                    break
                if whole == 0:
                    check_facts(part, row, self.made_with)
                else:
                    self._note(row, part, whole)
                whole += len(line)
        if part == self.part and whole < part.stat().st_size:
            os.truncate(part, whole)

    def _note(self, row: dict[str, Any], part: Path, place: int) -> None:
        self.places[row["id"]] = part, place
        self.stamps.pop(row["id"], None)
        if not row.get("removed"):
            self.stamps[row["id"]] = row["stamp"]
            self.names[row["id"]] = row["path"], row["label"]

    def _append(self, row: dict[str, Any]) -> None:
        """Write one line; it is on its way to the disk when this returns.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        try:
            with open(self.part, "ab") as file:
                if file.tell() == 0:
                    file.write(json.dumps(self.made_with).encode() + b"\n")
                place = file.tell()
                file.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {self.part}: {files.first_cause(error)}") from error
        self._note(row, self.part, place)

    def _merge(self, target: BinaryIO) -> None:
        """Write the rows of both files, sorted by ID."""
        schema = SCHEMA.with_metadata({_FACTS: json.dumps(self.made_with).encode()})
        rows: list[dict[str, Any]] = []
        with pq.ParquetWriter(target, schema) as writer:
            for row in self._merged():
                rows.append({**row, **self.renamed.get(row["id"], {})})
                if len(rows) == _ROWS:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    rows = []
            if rows or not self.stamps:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))

    def _merged(self) -> Iterator[dict[str, Any]]:
        newer = sorted(self.places)
        at = 0
        for row in self._old_rows():
            while at < len(newer) and newer[at] < row["id"]:
                yield from self._new_row(newer[at])
                at += 1
            if row["id"] not in self.places:
                yield row
        for name in newer[at:]:
            yield from self._new_row(name)

    def _old_rows(self) -> Iterator[dict[str, Any]]:
        if not self.table.exists():
            return
        with pq.ParquetFile(self.table) as opened:
            for batch in opened.iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()

    def _new_row(self, name: str) -> Iterator[dict[str, Any]]:
        """The row of an ID; nothing where it was removed."""
        part, place = self.places[name]
        with open(part, "rb") as file:
            file.seek(place)
            row = json.loads(file.readline())
        if not row.get("removed"):
            yield {**row, "vector": np.frombuffer(base64.b64decode(row["vector"]), "<f4")}


def _locked(path: Path, alone: bool = True) -> int:
    """Lock a file or folder for this process.

    Args:
        path: file or folder.
        alone: whether no other process may lock it; else only none that wants it alone.
    Returns:
        Descriptor that holds the lock until it is closed.
    Raises:
        UserError: another process holds the lock.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        # some network file systems lock no folders
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(handle)
            raise UserError(
                f"another tapct embed writes to {path}; wait until it ends, or give another --out"
            ) from error
    return handle
