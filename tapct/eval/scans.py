"""Labelled scans for evaluation: who is trained on, who is tested, and reading one at a time.

Axes: Z Y X depth height width in voxels of the scan as it was read.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tapct.base import rng
from tapct.base.exits import UserError
from tapct.data.geometry import check_same_grid
from tapct.data.ingest import read_labels, read_volume
from tapct.data.patients import held_out_patients
from tapct.types import LabelMap, Volume

PATIENTS = "patients"  # split mode: no patient on both sides
BLOCKS = "blocks"  # split mode: slabs of the same scans
BLOCKS_NOTE = "within one patient: a fit, not generalisation"


@dataclass(frozen=True)
class LabelledScan:
    """One scan in memory with its labels on the same grid."""

    id: str
    volume: Volume
    labels: LabelMap


class ScanRow(Protocol):
    """What evaluation asks of a scan; a `manifest.Row` and a `store.StoredScan` both have it."""

    @property
    def id(self) -> str:
        """Name of the scan."""

    @property
    def patient(self) -> str:
        """Keyed hash; empty where unknown."""

    @property
    def path(self) -> str:
        """Of the scan, absolute or relative to the archive's root."""

    @property
    def label_path(self) -> str:
        """Of its label map; empty where there is none."""


@dataclass(frozen=True)
class Split:
    """Scans of either side.

    Args:
        mode: `patients`, or `blocks` where one patient is all there is: then both sides hold the
            same scans and `block_slices` tells them apart.
        held_out: the test patients were kept out of pretraining too.
    """

    mode: str
    train: tuple[ScanRow, ...]
    test: tuple[ScanRow, ...]
    held_out: bool = False


def matching(rows: Sequence[ScanRow], patterns: Sequence[str]) -> list[ScanRow]:
    """The scans whose path matches one of the shell patterns; all of them without a pattern.

    Raises:
        UserError: none matches.
    """
    if not patterns:
        return list(rows)
    found = [row for row in rows if any(fnmatch.fnmatch(row.path, pattern) for pattern in patterns)]
    if not found:
        example = f", e.g. {rows[0].path}" if rows else ""
        raise UserError(
            f"eval.only {list(patterns)} matches none of the {len(rows)} scans{example}; patterns "
            "are of whole paths"
        )
    return found


def split_by_patient(
    rows: Sequence[ScanRow],
    *,
    test_share: float,
    max_scans: int,
    seed: int,
    held_out: Collection[str] = (),
) -> Split:
    """Choose labelled scans and divide them by patient, keyed by the seed and whatever the order of
    the rows.

    Args:
        rows: accepted scans; those without labels are left out.
        test_share: of the patients, at least one on either side.
        max_scans: most scans on both sides together, at least one on either; 0 means all. The sides
            shrink alike.
        held_out: patients that pretraining did not see: they are the test side where labelled scans
            lie on both sides, else the split is by `test_share`.
    Raises:
        UserError: no scan has labels.
    """
    labelled = sorted((row for row in rows if row.label_path), key=lambda row: row.id)
    if not labelled:
        raise UserError(
            f"none of the {len(rows)} accepted scans has a label map to evaluate against: name it "
            "NAME_seg.nii.gz "
            "beside NAME.nii.gz, put it in labels*/ beside images*/, or index again with --labels "
            "DIR"
        )
    people = {_patient(row) for row in labelled}
    if len(people) == 1:
        scans = tuple(labelled[: max_scans or None])
        return Split(BLOCKS, scans, scans)
    tested = people.intersection(held_out)
    as_pretrained = 0 < len(tested) < len(people)
    if not as_pretrained:
        tested = set(held_out_patients(people, test_share, seed))
    test = [row for row in labelled if _patient(row) in tested]
    train = [row for row in labelled if _patient(row) not in tested]
    if max_scans and max_scans < len(labelled):
        num_test = min(max(1, round(max_scans * len(test) / len(labelled))), max(1, max_scans - 1))
        test, train = _some(test, num_test, seed), _some(train, max(1, max_scans - num_test), seed)
    return Split(PATIENTS, tuple(train), tuple(test), as_pretrained)


def _patient(row: ScanRow) -> str:
    return row.patient or row.id


def _some(rows: list[ScanRow], num: int, seed: int) -> list[ScanRow]:
    """`num` scans in a keyed order, so that a smaller choice is part of a larger one."""
    return sorted(
        rows, key=lambda row: (rng.hash_int(seed, "eval scans", rng.purpose_id(row.id)), row.id)
    )[:num]


def block_slices(
    num_patches: int, *, test: bool, num_blocks: int, gap: int, scan_id: str
) -> np.ndarray:
    """Patch slices along z of one side, where train and test share a scan.

    The depth is cut into `num_blocks` slabs; even ones train, odd ones test. Between two slabs
    `gap` slices of patches belong to neither side, since neighbours look alike.

    Returns:
        bool (num_patches,).
    Raises:
        UserError: the scan is too short for two slabs and a gap.
    """
    num_blocks = min(num_blocks, (num_patches + gap) // (1 + gap))
    if num_blocks < 2:
        raise UserError(
            f"scan {scan_id} has {num_patches} patches along z; fitting within one patient needs "
            f"{2 + gap}. "
            "Index scans of a second patient, or give each patient its own group with "
            "--patient-regex."
        )
    edges = np.linspace(0, num_patches + gap, num_blocks + 1).round().astype(int)
    chosen = np.zeros(num_patches, dtype=bool)
    for block in range(int(test), num_blocks, 2):
        chosen[edges[block] : edges[block + 1] - gap] = True
    return chosen


def read_labelled(row: ScanRow, root: Path) -> LabelledScan:
    """Read a row's scan and labels.

    Args:
        root: folder that the row's paths are relative to; absolute ones stay.
    Raises:
        Refused: a file is not what the manifest says, or the labels lie on another grid.
    """
    volume = read_volume(root / row.path)
    labels = read_labels(root / row.label_path)
    check_same_grid(volume, labels)
    return LabelledScan(row.id, volume, labels)
