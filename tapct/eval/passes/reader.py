"""Goes through the scans of an evaluation one at a time: labels, truths and features from the
cache, the same for all models and tasks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tapct.base import console
from tapct.base.exits import UserError, single_line
from tapct.data.packed.packed_scan import Damaged
from tapct.data.packed.store import Store
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.models.evaluated import EvaluatedModel
from tapct.eval.passes.ahead import one_ahead
from tapct.eval.passes.failures import LeftOut
from tapct.eval.passes.fill import Features
from tapct.eval.passes.task_runs import TaskRun
from tapct.eval.results.json_file import UnreadScan
from tapct.eval.scans import labelled_scan
from tapct.eval.scans.labelled_scan import LabelledScan, TableLabels
from tapct.eval.scans.train_test import PATIENTS, Split, block_slices
from tapct.eval.scans.usable import ScanRow
from tapct.types import Refused

PREFETCH_BYTES = 512 << 20  # larger features are read when they are due: two may not fit in memory


@dataclass(frozen=True)
class Blocks:
    """How a scan is divided where all scans are of one patient.

    Args:
        num: number of slabs along z.
        gap: patch slices that are left out between two slabs.
    """

    num: int
    gap: int


@dataclass(frozen=True)
class ScanAndTruths:
    """One scan, with everything that is the same for all models of one patch grid.

    Args:
        labelled: scan with its labels.
        truths: patch grid -> task name -> what the task's `truth` returned.
    """

    labelled: LabelledScan
    truths: Mapping[PatchGrid, Mapping[str, Any]]


@dataclass(frozen=True)
class ModelOnScan:
    """The features of one model on one scan.

    Args:
        scan: scan and truths.
        model: model.
        dense: features.
        is_last: whether it is the last model of this scan.
    """

    scan: ScanAndTruths
    model: EvaluatedModel
    dense: DenseFeatures
    is_last: bool

    @property
    def truths(self) -> Mapping[str, Any]:
        """Task name -> truth on the patch grid of this model."""
        return self.scan.truths[self.dense.grid]

    @property
    def place(self) -> str:
        """Model and scan, for error lines."""
        return f"model {self.model.name} on scan {self.scan.labelled.id}"


class ScanReader:
    """The scans of a split, with truths and features.

    Args:
        split: training and test scans.
        store: packed scans and labels.
        task_runs: tasks, with the scans that each can use.
        tables: labels that come from tables.
        features: features of the models.
        blocks: division of scans of one patient.
        max_skips: largest number of scans that may be skipped because they cannot be read.
    Attributes:
        unread: scans that were skipped.
        failures: tasks that have failed.
    """

    def __init__(
        self,
        split: Split,
        store: Store,
        task_runs: Sequence[TaskRun],
        tables: TableLabels,
        *,
        features: Features,
        blocks: Blocks,
        max_skips: int,
    ) -> None:
        self.split, self.store = split, store
        self._task_runs = {each.name: each for each in task_runs}
        self.failures = LeftOut("task", self._task_runs)
        self.tables, self.features, self.blocks = tables, features, blocks
        self.max_skips = max_skips
        self.unread: list[UnreadScan] = []

    @property
    def task_runs(self) -> list[TaskRun]:
        """The tasks that have not failed. What those have kept of the scans is freed."""
        for name in self.failures.reasons:
            self._task_runs.pop(name, None)
        return list(self._task_runs.values())

    def rows(self) -> list[ScanRow]:
        """The scans of both sides, each once."""
        return list({row.id: row for row in (*self.split.train, *self.split.test)}.values())

    def on_side(self, side: str) -> Iterator[ModelOnScan]:
        """Every model on every scan of a side, `train` or `test`: all models of one scan, then the
        next scan.
        """
        rows: tuple[ScanRow, ...] = getattr(self.split, side)
        for row in rows:
            if row.id in self.features.unreadable:
                self._skip(row, side, self.features.unreadable[row.id])
        pairs = (
            (row, labelled_scan.read_scan(row, self.store, with_labels=False), model)
            for row in self.read_rows(side)
            for model in self.features.models
        )
        first, last = self.features.models[0], self.features.models[-1]
        scan: ScanAndTruths | None = None
        # the thread reads features alone; tasks see the scans in order, one after another
        for (row, _, model), dense in one_ahead(pairs, self._load, self._is_large):
            if model is first:
                scan = self._with_truths(row, side)
            if scan is not None:
                yield ModelOnScan(scan, model, dense, model is last)
            del dense  # before the next one is read: two large ones may not fit in memory
        if rows and not self.read_rows(side):
            raise UserError(
                f"none of the {len(rows)} {side} scans could be read; the last: "
                f"{self.unread[-1].scan}: {self.unread[-1].reason}"
            )

    def read_rows(self, side: str) -> tuple[ScanRow, ...]:
        """Rows of a side, `train` or `test`, without those that could not be read."""
        unread = {scan.scan for scan in self.unread if scan.side == side}
        return tuple(row for row in getattr(self.split, side) if row.id not in unread)

    def check_skips(self) -> None:
        """Raise UserError where more scans cannot be read than may be skipped."""
        bad = {**{scan.scan: scan.reason for scan in self.unread}, **self.features.unreadable}
        if len(bad) > self.max_skips:
            scan_id, reason = list(bad.items())[-1]
            raise UserError(
                f"scan {scan_id} cannot be read: {reason}. Restore it, or skip up to N damaged "
                "scans with data.loader.on_error=skip data.loader.max_skips=N"
            )

    def _load(self, item: tuple[ScanRow, LabelledScan, EvaluatedModel]) -> DenseFeatures:
        _, scan, model = item
        return self.features.load(scan, model)

    def _is_large(self, item: tuple[ScanRow, LabelledScan, EvaluatedModel]) -> bool:
        _, scan, model = item
        return self.features.num_bytes(scan, model) > PREFETCH_BYTES

    def _with_truths(self, row: ScanRow, side: str) -> ScanAndTruths | None:
        """One scan; None where it cannot be read, which is printed and counted.

        Raises:
            UserError: more scans cannot be read than may be skipped.
        """
        runs = [each for each in self.task_runs if row.id in each.scan_ids]
        needs_map = row.has_labels and any(each.task.needs_label_map for each in runs)
        try:
            values = self.tables.scan_labels.get(row.id)
            labelled = self.tables.added_to(
                labelled_scan.read_scan(row, self.store, with_labels=needs_map, scan_labels=values)
            )
            return ScanAndTruths(labelled, self._truths(labelled, runs, side))
        except (Refused, Damaged) as error:
            self._skip(row, side, single_line(error))
            return None

    def _truths(
        self, labelled: LabelledScan, runs: Sequence[TaskRun], side: str
    ) -> dict[PatchGrid, dict[str, Any]]:
        """What the tasks need of a scan, once for each patch grid."""
        truths: dict[PatchGrid, dict[str, Any]] = {}
        for model in self.features.models:
            grid = model.grid(labelled.shape_ZYX, labelled.spacing_mm)
            if grid in truths:
                continue
            in_play_Z = self._in_play(grid, labelled.id, side)
            truths[grid] = {}
            for each in runs:
                if each.name not in self.failures.left:
                    continue
                # a scan whose voxels cannot be read is no fault of the task that reads them first
                doing = f"truth() of {side} scan {labelled.id}"
                with self.failures.caught(each.name, doing, passed_on=(Refused, Damaged)):
                    truths[grid][each.name] = each.task.truth(labelled, grid, in_play_Z)
        return truths

    def _skip(self, row: ScanRow, side: str, reason: str) -> None:
        in_store = reason.replace(f"{self.store.path}{os.sep}", "")  # results hold no path
        self.unread.append(UnreadScan(row.id, side, in_store))
        self.check_skips()
        console.say(f"skipped: {side} scan {row.id} cannot be read: {reason}")

    def _in_play(self, grid: PatchGrid, scan_id: str, side: str) -> np.ndarray:
        """Slices of patches that this side of the split may use: bool (Z,)."""
        if self.split.mode == PATIENTS:
            return np.ones(grid.shape[0], dtype=bool)
        return block_slices(
            grid.shape[0],
            test=side == "test",
            num_blocks=self.blocks.num,
            gap=self.blocks.gap,
            scan_id=scan_id,
        )
