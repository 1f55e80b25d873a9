"""Examine the scans of an archive in worker processes, but for those that the journal has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tapct.data.index.examined import Examined
from tapct.data.index.finding import MODULES
from tapct.data.index.head_table import HEADS
from tapct.data.index.journal import Journal, Keys
from tapct.data.index.label_files import LabelStamps
from tapct.data.index.listing import Listed
from tapct.data.index.scan_row import ExamineTask, bytes_to_read, examine, failed_row, with_path
from tapct.data.index.scan_table import (
    LABELS,
    SCANS,
    JournalRows,
    label_key,
    may_change,
    row_of_labels,
    row_of_scan,
    scan_key,
    scan_of_row,
    with_known_labels,
)
from tapct.data.manifest import ACCEPTED
from tapct.data.workers.process_pool import LOST, ScanLimits, map_unordered


class Examination:
    """The rows of all scans of an archive, from the journal and from worker processes.

    Args:
        tasks: all scans with their labels.
        journal: journal of the index, which gets what is read.
        workers, limits: as in `build_manifest`.
        progress: function that is called with (scans done, scans in all).
    Attributes:
        keys: keys of the rows of the journal that this archive uses, by kind.
    """

    def __init__(
        self,
        tasks: Sequence[ExamineTask],
        journal: Journal,
        workers: int,
        limits: ScanLimits,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.tasks, self.journal, self.workers, self.limits = tasks, journal, workers, limits
        self.progress = progress or (lambda done, total: None)
        self.keys = {SCANS: bytearray(), LABELS: bytearray()}
        self._known = {kind: JournalRows(journal, kind) for kind in self.keys}
        self._stamps = LabelStamps()
        self._rows: dict[int, Examined] = {}

    def rows(self) -> list[Examined]:
        """The row of each scan, in their order.

        Where a worker process was lost, the labels may be the cause, and they must not refuse their
        scan: it is read again without them.
        """
        try:
            self._examine(self._unread())
            again = [i for i, row in self._rows.items() if self._is_lost_with_labels(i, row)]
            alone = []
            for i in again:
                row = self._rows[i]
                problem = f"{row.reason}: with its labels, {row.detail}"
                alone.append((i, replace(self.tasks[i], label_problem=problem)))
            self._examine(alone)
        finally:
            self.journal.flush()
        return [self._rows[index] for index in range(len(self.tasks))]

    def keep_used(self, listed: Listed) -> None:
        """Remove what this archive no longer has from the journal."""
        self.journal.keep_only(HEADS, Keys(listed.current + listed.others))
        for kind, keys in self.keys.items():
            self.journal.keep_only(kind, Keys(keys))
        self.journal.remove_leftovers()

    def _is_lost_with_labels(self, index: int, row: Examined) -> bool:
        return row.reason in LOST and self.tasks[index].labels is not None

    def _unread(self) -> list[tuple[int, ExamineTask]]:
        """The tasks for which something must be read; the rows of the others are ready."""
        unread = []
        for index, task in enumerate(self.tasks):
            key = scan_key(task)
            row = self._known[SCANS].get(key)
            if row is None:
                unread.append((index, task))
                continue
            self.keys[SCANS] += key
            known = with_path(scan_of_row(row), task)
            if task.labels is not None and known.status == ACCEPTED:
                key = label_key(task, known, self._stamps)
                labels = self._known[LABELS].get(key)
                if labels is None:
                    unread.append((index, replace(task, known=scan_of_row(row))))
                    continue
                self.keys[LABELS] += key
                known = with_known_labels(known, task, labels)
            self._rows[index] = known
            self.progress(len(self._rows), len(self.tasks))
        return unread

    def _examine(self, numbered: Sequence[tuple[int, ExamineTask]]) -> None:
        """Examine some scans, and add their rows to the journal."""
        for place, row in self._results([task for _, task in numbered]):
            index, task = numbered[place]
            self._rows[index] = row
            self._remember(task, row)
            self.progress(len(self._rows), len(self.tasks))

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

    def _results(self, tasks: Sequence[ExamineTask]) -> Iterator[tuple[int, Examined]]:
        """Yield number and row of each task, in the order in which they become ready."""
        results = map_unordered(
            *(examine, tasks, self.workers, failed_row),
            num_bytes=bytes_to_read,
            limits=self.limits,
            modules=MODULES,
        )
        with contextlib.closing(results):  # ends the workers at an error or Ctrl-C
            yield from results
