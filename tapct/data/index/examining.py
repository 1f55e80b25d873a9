"""Examine the scans of an archive in worker processes, but for those that the journal has."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tapct.data.index.examined import Examined
from tapct.data.index.finding import MODULES, ScansFound
from tapct.data.index.head_table import HEADS
from tapct.data.index.journal import KEY, KEY_BYTES, Journal, Keys, first_of_each, keys_in
from tapct.data.index.label_files import LabelStamps
from tapct.data.index.placed_rows import PLACE, PlacedRows
from tapct.data.index.scan_row import (
    ExamineTask,
    ScanRules,
    bytes_to_read,
    examine,
    failed_row,
    with_path,
)
from tapct.data.index.scan_table import (
    EXAMINED_SCHEMA,
    LABELS,
    SCAN_SCHEMA,
    SCANS,
    label_key,
    may_change,
    row_of_examined,
    row_of_labels,
    row_of_scan,
    scan_key,
    scan_of_row,
    with_known_labels,
)
from tapct.data.manifest import ACCEPTED
from tapct.data.workers.process_pool import LOST, ScanLimits, map_unordered

_NO_KEY = bytes(KEY_BYTES)  # in place of the key of a scan that has none


class Examination:
    """The rows of all scans of an archive, from the journal and from worker processes.

    Args:
        found: all scans with their labels.
        rules: what holds for all scans.
        journal: journal of the index, which gets what is read.
        scratch: folder for the rows.
        workers, limits: as in `build_manifest`.
        progress: function that is called with (scans done, scans in all).
        is_chosen: function that returns whether a scan is examined; by default each is.
    Attributes:
        rows: rows of the scans that were examined, by the numbers of the scans.
        contradiction: how label files contradict each other, of the first scan where they do.
        keys: keys of the rows of the journal that this archive uses, by kind.
    """

    def __init__(
        self,
        found: ScansFound,
        rules: ScanRules,
        journal: Journal,
        scratch: Path,
        workers: int,
        limits: ScanLimits,
        progress: Callable[[int, int], None] | None,
        is_chosen: Callable[[ExamineTask], bool] = lambda task: True,
    ) -> None:
        self.found, self.rules, self.journal = found, rules, journal
        self.workers, self.limits = workers, limits
        self.progress = progress or (lambda done, total: None)
        self.rows = PlacedRows(scratch / "examined", EXAMINED_SCHEMA)
        self.contradiction = ""
        self.keys = {SCANS: bytearray(), LABELS: bytearray()}
        self._known = PlacedRows(scratch / "known", SCAN_SCHEMA)
        self._labels = _KnownLabels(journal)
        self._stamps = LabelStamps()
        self._is_chosen = is_chosen
        self._first_contradiction = len(found)
        self._num_done = self._num_chosen = 0

    def run(self) -> None:
        """Examine all scans.

        Where a worker process was lost, the labels may be the cause, and they must not refuse their
        scan: it is read again without them.
        """
        self._find_known()
        again: list[tuple[int, ExamineTask]] = []
        try:
            for number, task, row in self._examined(self._unread()):
                if row.reason in LOST and task.labels is not None:
                    problem = f"{row.reason}: with its labels, {row.detail}"
                    again.append((number, replace(task, label_problem=problem)))
                else:
                    self._take(number, row)
            for number, _, row in self._examined(again):
                self._take(number, row)
        finally:
            self.journal.flush()
        self._known.remove()

    def keep_used(self) -> None:
        """Remove what this archive no longer has from the journal."""
        listed = self.found.listed
        self.journal.keep_only(HEADS, Keys(listed.current + listed.others))
        for kind, keys in self.keys.items():
            self.journal.keep_only(kind, Keys(keys))
        self.journal.remove_leftovers()

    def _tasks(self) -> Iterator[tuple[int, ExamineTask]]:
        """The scans that are examined, with their numbers."""
        for number, task in enumerate(self.found.tasks(self.rules)):
            if self._is_chosen(task):
                yield number, task

    def _find_known(self) -> None:
        """Find the rows of the journal that are those of scans of this archive."""
        keys, numbers = bytearray(), array("q")
        for number, task in self._tasks():
            keys += scan_key(task) or _NO_KEY
            numbers.append(number)
        self._num_chosen = len(numbers)
        wanted, number_of = Keys(keys), np.array(numbers, np.int64)
        is_known = np.zeros(len(wanted), bool)
        for part in self.journal.parts(SCANS):
            table = self.journal.read_part(part, SCANS)
            chosen = first_of_each(table, wanted)
            places = wanted.find(keys_in(table.take(chosen)))
            is_new = ~is_known[places]
            is_known[places] = True
            rows = table.take(chosen[is_new]).drop_columns([KEY])
            self._known.add(rows, number_of[places[is_new]])

    def _unread(self) -> Iterator[tuple[int, ExamineTask]]:
        """The scans for which something must be read; the rows of the others are taken in."""
        known_rows = self._known.rows()
        known = next(known_rows, None)
        for number, task in self._tasks():
            if known is None or known[PLACE] != number:
                yield number, task
                continue
            row, known = known, next(known_rows, None)
            self.keys[SCANS] += scan_key(task)
            scan = with_path(scan_of_row(row), task)
            if task.labels is not None and scan.status == ACCEPTED:
                key = label_key(task, scan, self._stamps)
                labels = self._labels.get(key)
                if labels is None:
                    yield number, replace(task, known=scan_of_row(row))
                    continue
                self.keys[LABELS] += key
                scan = with_known_labels(scan, task, labels)
            self._take(number, scan)

    def _take(self, number: int, row: Examined) -> None:
        """Take in the row of a scan."""
        self.rows.append(row_of_examined(row), number)
        if row.contradiction and number < self._first_contradiction:
            self.contradiction, self._first_contradiction = row.contradiction, number
        self._num_done += 1
        self.progress(self._num_done, self._num_chosen)

    def _examined(
        self, tasks: Iterable[tuple[int, ExamineTask]]
    ) -> Iterator[tuple[int, ExamineTask, Examined]]:
        """Number, task and row of some scans, in the order in which the rows become ready; they are
        added to the journal.
        """
        in_work: dict[int, tuple[int, ExamineTask]] = {}

        def inputs() -> Iterator[ExamineTask]:
            for count, (number, task) in enumerate(tasks):
                in_work[count] = number, task
                yield task

        results = map_unordered(
            *(examine, inputs(), self.workers, failed_row),
            num_bytes=bytes_to_read,
            limits=self.limits,
            modules=MODULES,
        )
        with contextlib.closing(results):  # ends the workers at an error or Ctrl-C
            for count, row in results:
                number, task = in_work.pop(count)
                self._remember(task, row)
                yield number, task, row

    def _remember(self, task: ExamineTask, row: Examined) -> None:
        """Add what was read to the journal, unless it may be otherwise at the next try."""
        key = scan_key(task)
        if not key or may_change(row.reason, row.detail):
            return
        if task.known is None:
            self.journal.append(SCANS, key, row_of_scan(row))
            self.keys[SCANS] += key
        # names of label files in a contradiction are reported, and not kept
        is_read = task.labels is not None and not task.label_problem and not row.contradiction
        if is_read and row.status == ACCEPTED:
            key = label_key(task, row, self._stamps)
            self.journal.append(LABELS, key, row_of_labels(row))
            self.keys[LABELS] += key


class _KnownLabels:
    """The rows of labels that the journal has, found by their keys."""

    def __init__(self, journal: Journal) -> None:
        self._table = journal.read(LABELS).combine_chunks()
        self._keys = Keys(keys_in(self._table))

    def get(self, key: bytes) -> dict[str, Any] | None:
        """The row with a key; None where there is none."""
        place = int(self._keys.find(key)[0])
        if place < 0:
            return None
        (row,) = self._table.slice(place, 1).to_pylist()
        return dict(row)
