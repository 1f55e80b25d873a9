"""The scans of one pack as columns, and what became of each of them in a few bytes.

A manifest may list millions of scans. Its rows stay in Arrow, a row object is made for the scans
that are in work, and of a packed scan only what the manifest does not have is remembered.

Axes: N scans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tapct.base.exits import UserError
from tapct.data.index.share import Share
from tapct.data.manifest import Manifest, Row, RowTable, TextColumn, rows_as_table
from tapct.data.packed.pack_report import RefusedScan
from tapct.data.packed.pack_scan import PackOutcome
from tapct.data.packed.places import files_in
from tapct.data.packed.scan_list import NO_NAMES, SHAPE, SPACING, StoredScan, columns_of
from tapct.data.packed.store import packed_file
from tapct.data.packed.store_index import whole_column

_FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ROWS_AT_ONCE = 256  # rows that are objects at once; one of DICOM may name thousands of files
_NAMES_AT_ONCE = 100_000
# columns of the manifest from which those of the store are made
_OF_MANIFEST = ["id", *SHAPE, "patient", "label_digest", "digest", "patient_from"]
_SUFFIX, _LABELS_SUFFIX = ".b2nd", ".labels.b2nd"


class PackTable:
    """The scans that one pack handles, in the order of the manifest.

    Args:
        whole: accepted rows of the manifest.
        of_share: bool, rows that this process packs.
    Attributes:
        refused, labels_refused: refused scans and labels by row.
        held: rows of the store from before, of refused scans that it keeps.
    """

    def __init__(self, whole: RowTable, of_share: np.ndarray) -> None:
        self.whole, self.of_share = whole, of_share
        self.rows = whole if of_share.all() else whole.where(pa.array(of_share))
        self.refused: dict[int, RefusedScan] = {}
        self.labels_refused: dict[int, RefusedScan] = {}
        self.held: dict[int, StoredScan] = {}
        num = len(self.rows)
        self.is_done, self.is_kept, self.was_damaged = (np.zeros(num, bool) for _ in range(3))
        self.is_stored = np.zeros(num, bool)  # packed now, or kept
        self.stored_bytes = np.zeros(num, np.int64)
        self._spacing_mm_N3 = np.zeros((num, 3))
        self._names = np.full(num, -1, np.int32)  # number of its label names; -1 without labels
        self._known_names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, manifest: Manifest, share: Share) -> PackTable:
        """The scans of a manifest that a share packs.

        Raises:
            UserError: the manifest has no accepted scan, or ids that are no names of files.
        """
        accepted = manifest.accepted
        rows = accepted if isinstance(accepted, RowTable) else RowTable(rows_as_table(accepted))
        if not len(rows):
            raise UserError(
                f"the manifest of {manifest.root} has no accepted scan among {len(manifest.rows)}; "
                "its rows give the reasons."
            )
        ids = rows.table.column("id")
        is_name = pc.match_substring_regex(ids, f"^{_FILE_NAME}$")
        if pc.count_distinct(ids).as_py() < len(ids) or not pc.all(is_name).as_py():
            raise _wrong_id(rows)
        of_share = np.ones(len(ids), bool)
        if share.total > 1:
            of_share = np.fromiter(map(share.has, TextColumn(ids)), bool, len(ids))
        return cls(rows, of_share)

    def some(self, numbers: Sequence[int] | np.ndarray) -> Iterator[Row]:
        """The rows with these numbers, which ascend, as objects, a few at once."""
        # `take` joins all chunks of a table, which would take longer than packing a scan where
        # there are millions, and fails above 2 GiB of text: so it gets a few rows of the table
        wanted = np.asarray(numbers, np.int64)
        assert (np.diff(wanted) > 0).all()
        for first in np.unique(wanted // _ROWS_AT_ONCE).tolist():
            start = first * _ROWS_AT_ONCE
            low, high = np.searchsorted(wanted, (start, start + _ROWS_AT_ONCE))
            near = self.rows.table.slice(start, _ROWS_AT_ONCE)
            yield from RowTable(near.take(pa.array(wanted[low:high] - start)))

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the manifest."""
        return self.rows.table.column(name)

    def take(self, i: int, outcome: PackOutcome) -> None:
        """Remember what became of scan i."""
        self.is_done[i], self.is_kept[i] = True, outcome.kept
        self.was_damaged[i], self.stored_bytes[i] = outcome.was_damaged, outcome.stored_bytes
        if outcome.refused is not None:
            self.refused[i] = outcome.refused
        if outcome.labels_refused is not None:
            self.labels_refused[i] = outcome.labels_refused
        scan = outcome.scan
        self.is_stored[i] = scan is not None
        if scan is not None:
            self._spacing_mm_N3[i] = scan.spacing_mm
            if scan.has_labels:
                text = json.dumps(scan.label_names)
                self._names[i] = self._known_names.setdefault(text, len(self._known_names))

    @property
    def is_listed(self) -> np.ndarray:
        """Scans that the store lists: those that were packed or kept, and those that are held."""
        listed = self.is_stored.copy()
        listed[list(self.held)] = True
        return listed

    @property
    def is_labelled(self) -> np.ndarray:
        """Scans that the store lists with labels."""
        labelled: np.ndarray = self._names >= 0
        labelled[[i for i, scan in self.held.items() if scan.has_labels]] = True
        return labelled

    def hold(self, before: Mapping[str, StoredScan], out: Path) -> None:
        """Keep what a store had before of the scans that were refused.

        Args:
            before: rows of the store from before by id.
            out: folder of the store.
        """
        numbers = sorted(self.refused)
        for i, row in zip(numbers, self.some(numbers)):
            file = packed_file(out, row.id)
            if row.id in before and file.is_file():
                # the patient may have been identified by another rule since
                self.held[i] = replace(before[row.id], path=row.path, patient=row.patient)
                self.stored_bytes[i] += file.stat().st_size

    def store_columns(self) -> dict[str, pa.Array]:
        """The columns of the store's index, of the scans that it lists."""
        at = np.flatnonzero(self.is_stored)
        # not the lists of files, which may be above 2 GiB
        rows = self.rows.table.select(_OF_MANIFEST).take(pa.array(at))
        numbers = self._names[at]
        texts = pa.array([*self._known_names, NO_NAMES], pa.string())
        names = texts.take(pa.array(np.where(numbers < 0, len(texts) - 1, numbers)))
        digests = pc.if_else(pa.array(numbers >= 0), rows.column("label_digest"), "")
        columns: dict[str, Any] = {
            "id": rows.column("id"),
            **{name: rows.column(name).cast(pa.int32()) for name in SHAPE},
            **{name: pa.array(self._spacing_mm_N3[at, k]) for k, name in enumerate(SPACING)},
            "patient": rows.column("patient"),
            "label_digest": digests,
            "label_names": names,
            "checksum": rows.column("digest"),
            "patient_from": rows.column("patient_from"),
        }
        table = pa.table(columns)
        if self.held:
            places = sorted(self.held)
            old = columns_of(self.held[i] for i in places)
            typed = {name: pa.array(old[name], table.schema.field(name).type) for name in columns}
            order = np.argsort(np.concatenate([at, places]), kind="stable")
            table = pa.concat_tables([table, pa.table(typed)]).take(pa.array(order))
        return {name: whole_column(table.column(name)) for name in table.column_names}


def are_present(out: Path, rows: RowTable) -> np.ndarray:
    """Which of some scans have a packed file in a store, whole or not: bool (N,).

    The folders are listed, which takes less time than asking for one file after the other.

    Args:
        out: folder of the store.
        rows: rows of a manifest.
    """
    ids = whole_column(rows.table.column("id"))
    present = np.zeros(len(ids), bool)
    for names in _in_batches(file.name for file in files_in(out, f"*{_SUFFIX}")):
        stems = pa.array([name[: -len(_SUFFIX)] for name in names], ids.type)
        found = pc.drop_null(pc.index_in(stems, value_set=ids))
        present[found.to_numpy()] = True
    return present


def unlisted_files(out: Path, columns: Mapping[str, pa.Array]) -> tuple[str, ...]:
    """Names of the packed files of a store that belong to no scan of its list, sorted.

    Args:
        out: folder of the store.
        columns: columns of its index.
    """
    ids = columns["id"]
    labelled = ids.filter(pc.not_equal(columns["label_digest"], ""))
    found: list[str] = []
    for names in _in_batches(file.name for file in files_in(out, f"*{_SUFFIX}")):
        of_labels = [name.endswith(_LABELS_SUFFIX) for name in names]
        for is_labels, suffix, known in (
            (False, _SUFFIX, ids),
            (True, _LABELS_SUFFIX, labelled),
        ):
            some = [name for name, each in zip(names, of_labels) if each == is_labels]
            stems = pa.array([name[: -len(suffix)] for name in some], ids.type)
            is_known = pc.is_in(stems, value_set=known).to_pylist()
            found += [name for name, each in zip(some, is_known) if not each]
    return tuple(sorted(found))


def _wrong_id(rows: RowTable) -> UserError:
    """The error of the first row whose id occurs twice or is no name of a file."""
    seen: set[str] = set()
    for scan_id, path in zip(*(TextColumn(rows.table.column(name)) for name in ("id", "path"))):
        if scan_id in seen or not re.fullmatch(_FILE_NAME, scan_id):
            return UserError(
                f"scan id {scan_id!r} of {path} occurs twice or is not a file name; run `tapct "
                "index` again."
            )
        seen.add(scan_id)
    raise AssertionError("all ids are right")


def _in_batches(names: Iterable[str]) -> Iterator[list[str]]:
    """Names in lists of limited length; `?` replaces what is not Unicode, as no id has it."""
    batch: list[str] = []
    for name in names:
        batch.append(name.encode("utf-8", "replace").decode())
        if len(batch) == _NAMES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
