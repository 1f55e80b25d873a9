"""Which scans a network has been trained on: a table that a run keeps and an export carries
(Parquet).

A scan is named by the digest of its voxels, and its patient by the keyed hash of the store. Hashes
that were made with different keys cannot be compared, so each row also names its key. The table has
one row per scan and is written when a run starts, never during steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tapct.base import files
from tapct.base.exits import UserError, single_line
from tapct.data.packed.store import Store

SCHEMA = 1
_KEY = b"tapct.trained_on"
_COLUMNS = pa.schema(
    [
        ("digest", pa.string()),
        ("patient", pa.string()),
        ("patient_key", pa.string()),
        ("from_step", pa.int64()),
        ("patient_from", pa.string()),  # lists of earlier versions lack it
    ]
)
_OF_STORE = ("checksum", "patient", "patient_from")  # columns of a store's list


@dataclass(frozen=True)
class SeenScan:
    """One scan that was trained on.

    Args:
        digest: digest of its voxels.
        patient: keyed hash of the patient's identifier; empty where unknown.
        patient_key: name of the key of that hash, see `Store.patient_key`.
        patient_from: rule that identified the patient, as in the manifest; empty where unknown.
    """

    digest: str
    patient: str
    patient_key: str
    patient_from: str = ""


@dataclass(frozen=True)
class TrainedOn:
    """The scans that a network has been trained on.

    Args:
        from_step: scan -> finished steps at the start of the first steps that could draw it.
        unknown: reasons why the table may lack scans; empty where it is complete.
    """

    from_step: dict[SeenScan, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def before(self, step: int) -> TrainedOn:
        """What the weights after `step` steps have been trained on."""
        kept = {scan: first for scan, first in self.from_step.items() if first < step}
        return replace(self, from_step=kept)

    def at_start(self) -> TrainedOn:
        """The same scans as those of a run that starts from these weights."""
        return replace(self, from_step=dict.fromkeys(self.from_step, 0))

    def with_store(self, store: Store, rows: Sequence[int] | np.ndarray, step: int) -> TrainedOn:
        """Add the scans of a store that are drawn from a step on.

        Args:
            store: packed scans.
            rows: rows of the store that are trained on.
            step: finished steps.
        """
        from_step = dict(self.from_step)
        at = pa.array(np.asarray(rows, np.int64))
        columns = [store.scans.column(name).take(at).to_pylist() for name in _OF_STORE]
        for checksum, patient, rule in zip(*columns, strict=True):
            seen = SeenScan(checksum, patient, store.patient_key, rule)
            from_step[seen] = min(step, from_step.get(seen, step))
        return replace(self, from_step=from_step)

    def write(self, path: Path) -> None:
        """Write the table, whole or not at all.

        Raises:
            UserError: the disk is full or the folder is not writable.
        """
        rows = [
            (scan.digest, scan.patient, scan.patient_key, first, scan.patient_from)
            for scan, first in self.from_step.items()
        ]
        arrays = [
            pa.array([row[number] for row in rows], column.type)
            for number, column in enumerate(_COLUMNS)
        ]
        _write(path, pa.Table.from_arrays(arrays, schema=_COLUMNS), self.unknown)


def write_first(path: Path, parts: Sequence[tuple[Store, np.ndarray]], step: int) -> None:
    """Write the table of a run that begins with random weights: that of `TrainedOn().with_store` of
    each part, without an object per scan.

    Args:
        path: file to write.
        parts: stores, and the rows of each that are trained on.
        step: finished steps.
    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    tables = []
    for store, rows in parts:
        at = pa.array(np.asarray(rows, np.int64))
        columns = {name: store.scans.column(name).take(at) for name in _OF_STORE}
        columns["patient_key"] = pa.array([store.patient_key] * len(at), pa.string())
        columns["from_step"] = pa.array(np.full(len(at), step))
        names = {"checksum": "digest"}
        table = pa.table({names.get(name, name): column for name, column in columns.items()})
        tables.append(table.select(_COLUMNS.names).cast(_COLUMNS))
    whole = pa.concat_tables(tables)
    if pc.count_distinct(whole.column("digest")).as_py() == len(whole):
        _write(path, whole, ())
        return
    known = TrainedOn()  # some scans are listed twice
    for store, rows in parts:
        known = known.with_store(store, rows, step)
    known.write(path)


def _write(path: Path, table: pa.Table, unknown: Sequence[str]) -> None:
    """Write a table of scans, whole or not at all; arguments and errors as in `TrainedOn`."""
    info = json.dumps({"schema": SCHEMA, "unknown": list(unknown)}).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_KEY: info}), sink)
    try:
        files.write_atomically(path, sink.getvalue().to_pybytes())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {files.first_cause(error)}; free space or check the folder's "
            "permissions"
        ) from error


def read(path: Path) -> TrainedOn:
    """Read a table; one that cannot be read is an incomplete one, with the reason."""
    if not path.is_file():
        return TrainedOn(unknown=("there is no list of the scans of pretraining",))
    try:
        table = pq.read_table(path, partitioning=None)
        info = json.loads((table.schema.metadata or {})[_KEY])
        if info["schema"] != SCHEMA:
            raise ValueError(f"schema {info['schema']}, this version of tapct reads {SCHEMA}")
        if "patient_from" not in table.column_names:
            unknown_rule = pa.array([""] * table.num_rows, pa.string())
            table = table.append_column("patient_from", unknown_rule)
        columns = [table.column(column.name).to_pylist() for column in _COLUMNS]
        unknown = tuple(str(reason) for reason in info["unknown"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        problem = f"the list of the scans of pretraining cannot be read ({single_line(error)})"
        return TrainedOn(unknown=(problem,))
    from_step: dict[SeenScan, int] = {}
    for digest, patient, patient_key, first, rule in zip(*columns, strict=True):
        from_step[SeenScan(digest, patient, patient_key, rule)] = first
    return TrainedOn(from_step, unknown)
