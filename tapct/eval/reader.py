"""Reads the scans of an evaluation one at a time, prepared once for all models and tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tapct.base import console
from tapct.base.exits import UserError, single_line
from tapct.data.packed import Damaged
from tapct.data.store import Store
from tapct.eval import scans
from tapct.eval.contract import Labels
from tapct.eval.features import PatchGrid, Prepared, Preprocess, prepare
from tapct.eval.results import PATIENTS, UnreadScan
from tapct.eval.scans import LabelledScan, ScanRow, Split, TableLabels
from tapct.eval.task_runs import TaskRun
from tapct.types import HUContract, Refused


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
class PreparedScan:
    """One scan, with everything that is the same for all models.

    Args:
        labelled: voxels and labels.
        prepared: input of the backbones.
        truths: task name -> what its `truth` returned.
    """

    labelled: LabelledScan
    prepared: Prepared
    truths: Mapping[str, Any]


class ScanReader:
    """The scans of a split, read and prepared.

    Args:
        split: training and test scans.
        store: packed scans and labels.
        task_runs: tasks, with the scans that each can use.
        tables: labels that come from tables.
        contract: HU to network input.
        preprocess: how scans are prepared.
        patch: voxels (z, y, x) of a patch.
        device: device that scans are prepared on.
        blocks: division of scans of one patient.
        max_skips: largest number of scans that may be skipped because they cannot be read.
        progress: function that is called with (scans done, scans in all).
    Attributes:
        unread: scans that were skipped.
    """

    def __init__(
        self,
        split: Split,
        store: Store,
        task_runs: Sequence[TaskRun],
        tables: TableLabels,
        *,
        contract: HUContract,
        preprocess: Preprocess,
        patch: tuple[int, int, int],
        device: torch.device,
        blocks: Blocks,
        max_skips: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.split, self.store, self.task_runs = split, store, task_runs
        self.tables, self.contract, self.preprocess = tables, contract, preprocess
        self.patch, self.device, self.blocks = patch, device, blocks
        self.max_skips, self.progress = max_skips, progress
        self.unread: list[UnreadScan] = []

    def train(self) -> Iterator[PreparedScan]:
        """The training scans."""
        return self._scans(self.split.train, "train", num_before=0)

    def test(self) -> Iterator[PreparedScan]:
        """The test scans."""
        return self._scans(self.split.test, "test", num_before=len(self.split.train))

    def read_rows(self, side: str) -> tuple[ScanRow, ...]:
        """Rows of a side, `train` or `test`, without those that could not be read."""
        unread = {scan.scan for scan in self.unread if scan.side == side}
        return tuple(row for row in getattr(self.split, side) if row.id not in unread)

    def _scans(self, rows: Sequence[ScanRow], side: str, num_before: int) -> Iterator[PreparedScan]:
        total = len(self.split.train) + len(self.split.test)
        for number, row in enumerate(rows, start=num_before + 1):
            labelled = self._read(row, side)
            if labelled is not None:
                yield self._prepared(labelled, side)
            if self.progress:
                self.progress(number, total)
        if rows and not self.read_rows(side):
            raise UserError(
                f"none of the {len(rows)} {side} scans could be read; the last: "
                f"{self.unread[-1].scan}: {self.unread[-1].reason}"
            )

    def _read(self, row: ScanRow, side: str) -> LabelledScan | None:
        """One scan; None where it cannot be read, which is printed and counted.

        Raises:
            UserError: more scans cannot be read than may be skipped.
        """
        tasks = [each.task for each in self.task_runs if row.id in each.scan_ids]
        need_map = any(task.labels in (Labels.VOXELS, Labels.PAIRS) for task in tasks)
        try:
            values = self.tables.scan_labels.get(row.id)
            scan = scans.read_scan(row, self.store, with_labels=need_map, scan_labels=values)
            return self.tables.added_to(scan)
        except (Refused, Damaged, OSError) as error:
            reason = single_line(error)
            in_store = reason.replace(f"{self.store.path}{os.sep}", "")  # results hold no path
            self.unread.append(UnreadScan(row.id, side, in_store))
            if len({scan.scan for scan in self.unread}) > self.max_skips:
                raise UserError(
                    f"scan {row.id} cannot be read: {reason}. Restore it, or skip up to N damaged "
                    "scans with data.loader.on_error=skip data.loader.max_skips=N"
                ) from error
            console.say(f"skipped: {side} scan {row.id} cannot be read: {reason}")
            return None

    def _prepared(self, labelled: LabelledScan, side: str) -> PreparedScan:
        volume = labelled.volume
        prepared = prepare(
            volume.hu_ZYX,
            self.contract,
            self.preprocess,
            self.patch,
            self.device,
            volume.spacing_mm,
        )
        in_play_Z = self._in_play(prepared.grid, labelled.id, side)
        truths = {}
        for each in self.task_runs:
            if labelled.id in each.scan_ids:
                truths[each.name] = each.task.truth(labelled, prepared.grid, in_play_Z)
        return PreparedScan(labelled, prepared, truths)

    def _in_play(self, grid: PatchGrid, scan_id: str, side: str) -> np.ndarray:
        """Slices of patches that this side of the split may use: bool (Z,)."""
        if self.split.mode == PATIENTS:
            return np.ones(grid.shape[0], dtype=bool)
        return scans.block_slices(
            grid.shape[0],
            test=side == "test",
            num_blocks=self.blocks.num,
            gap=self.blocks.gap,
            scan_id=scan_id,
        )
