"""Scans for evaluation: which ones a task can use, the split by patient, reading one at a time.

Axes: Z Y X depth height width in voxels of the scan as it was read.
"""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import numpy as np

from tapct.base import console, rng
from tapct.base.exits import UserError
from tapct.data.digest import voxel_digest
from tapct.data.packed.store import Store
from tapct.data.patients.split import patients_below, two_sides
from tapct.eval.contract import Labels
from tapct.eval.results import BLOCKS, PATIENTS
from tapct.types import IGNORE_LABEL, LabelMap, Volume

# truth of a statement, a number, or a category
ScanValue: TypeAlias = bool | float | str
Point: TypeAlias = tuple[float, float, float]  # mm (z, y, x)
TRAIN, VAL, TEST = "train", "val", "test"


@dataclass(frozen=True)
class StoredVolume:
    """The voxels of a scan in a store, which are read when they are needed.

    Args:
        store: packed scans.
        number: number of the scan in the store.
    """

    store: Store
    number: int

    @property
    def shape_ZYX(self) -> tuple[int, int, int]:
        """Number of voxels."""
        return self.store.scans[self.number].shape_ZYX

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of voxel centres along (z, y, x)."""
        return self.store.scans[self.number].spacing_mm

    @property
    def digest(self) -> str:
        """Digest of the voxels."""
        return self.store.scans[self.number].checksum

    def read(self) -> Volume:
        """The voxels. Raises: Damaged."""
        return Volume(self.store.read(self.number), self.spacing_mm)


@dataclass(frozen=True)
class LabelledScan:
    """One scan with its labels. Its voxels are read at the first use of `volume`.

    Args:
        id: scan ID.
        source: voxels in HU, in memory or in a store.
        labels: label map on the scan's grid; None where the scan has none or no task needs it.
        patient: keyed hash of the patient ID; empty where unknown.
        scan_labels: target -> value for the scan as a whole, without unknown values; may be empty.
            All values of a target have one type, see `scan_labels.py`.
        landmarks_mm: name -> position (z, y, x) in mm from the centre of voxel (0, 0, 0), along the
            axes of the scan: the index of a voxel times the spacing. May be empty. The scans of one
            patient share the names of the points that they have in common.
        official_side: `train`, `val` or `test` where the table of `eval.scan_labels` gives an
            official split; empty where it gives none.
    """

    id: str
    source: Volume | StoredVolume
    labels: LabelMap | None = None
    patient: str = ""
    scan_labels: Mapping[str, ScanValue] = field(default_factory=dict)
    landmarks_mm: Mapping[str, Point] = field(default_factory=dict)
    official_side: str = ""

    @functools.cached_property
    def volume(self) -> Volume:
        """Voxels in HU. A task that does without them spares an evaluation the reading, where the
        features are in the cache.

        Raises:
            Damaged: the packed scan is damaged.
        """
        return self.source.read() if isinstance(self.source, StoredVolume) else self.source

    @property
    def shape_ZYX(self) -> tuple[int, int, int]:
        """Number of voxels; they are not read."""
        if isinstance(self.source, StoredVolume):
            return self.source.shape_ZYX
        z, y, x = self.source.hu_ZYX.shape
        return z, y, x

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of voxel centres along (z, y, x); the voxels are not read."""
        return self.source.spacing_mm

    @property
    def digest(self) -> str:
        """Digest of the voxels; voxels in a store are not read."""
        if isinstance(self.source, StoredVolume):
            return self.source.digest
        return voxel_digest(self.source.hu_ZYX)

    @property
    def label_map(self) -> LabelMap:
        """The label map of a scan that a task with voxel labels was given."""
        assert self.labels is not None, f"scan {self.id} was read without its label map"
        return self.labels


ScanLabels: TypeAlias = Mapping[str, Mapping[str, ScanValue]]  # scan ID -> target -> value
Landmarks: TypeAlias = Mapping[str, Mapping[str, Point]]  # scan ID -> name -> position


@dataclass(frozen=True)
class TableLabels:
    """Labels that come from tables and not from the store, by scan ID.

    Args:
        scan_labels: values for scans as a whole.
        landmarks: positions of named points, as in `LabelledScan.landmarks_mm`.
        sides: official split: `train`, `val` or `test`; scans without a side are missing. Empty
            where there is no official split.
        digest: hash of all of this; empty without a table.
    """

    scan_labels: ScanLabels = field(default_factory=dict)
    landmarks: Landmarks = field(default_factory=dict)
    sides: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    def added_to(self, scan: LabelledScan) -> LabelledScan:
        """A scan as it was read, with its landmarks and its side of the official split."""
        return replace(
            scan,
            landmarks_mm=self.landmarks.get(scan.id, {}),
            official_side=self.sides.get(scan.id, ""),
        )


class ScanRow(Protocol):
    """What evaluation reads of a scan's row; `store.StoredScan` has it."""

    @property
    def id(self) -> str:
        """Name of the scan."""

    @property
    def patient(self) -> str:
        """Keyed hash of the patient ID; empty where unknown."""

    @property
    def path(self) -> str:
        """Path of the scan, absolute or relative to the archive's root."""

    @property
    def has_labels(self) -> bool:
        """Whether the store holds labels of the scan."""


@dataclass(frozen=True)
class Split:
    """Scans of either side.

    Args:
        mode: `patients`, or `blocks` where there is one patient only: then both sides hold the
            same scans and `block_slices` separates them.
        train: scans that tasks learn from.
        test: scans that models are evaluated on.
        tests_held_out: True if the test patients are those that `data.held_out` names.
    """

    mode: str
    train: tuple[ScanRow, ...]
    test: tuple[ScanRow, ...]
    tests_held_out: bool = False


def of_paths(rows: Sequence[ScanRow], patterns: Sequence[str]) -> list[ScanRow]:
    """Select the scans whose path matches one of the shell patterns; all of them without a pattern.

    Raises:
        UserError: none matches.
    """
    if not patterns:
        return list(rows)
    chosen = [
        row for row in rows if any(fnmatch.fnmatch(row.path, pattern) for pattern in patterns)
    ]
    if rows and not any(row.path for row in rows):
        raise UserError(
            f"eval.only {list(patterns)} needs the paths of the scans, which only the manifest "
            "holds; the manifest that was packed is gone or has changed: put it back, or run "
            "`tapct pack` with the new one"
        )
    if not chosen:
        example = f", e.g. {rows[0].path}" if rows else ""
        raise UserError(
            f"eval.only {list(patterns)} matches none of the {len(rows)} scans{example}; a pattern "
            "must match the whole path"
        )
    return chosen


def usable(
    rows: Sequence[ScanRow],
    labels: Labels,
    scan_labels: ScanLabels | None = None,
    landmarks: Landmarks | None = None,
) -> list[ScanRow]:
    """Select the scans that have the labels a task needs.

    Args:
        rows: accepted scans.
        labels: labels that the task needs.
        scan_labels: values for scans as a whole, by scan ID.
        landmarks: positions of named points, by scan ID.
    """
    if labels is Labels.NONE:
        return list(rows)
    if labels is Labels.SCAN:
        return [row for row in rows if (scan_labels or {}).get(row.id)]
    if labels is Labels.LANDMARKS:
        return [row for row in rows if (landmarks or {}).get(row.id)]
    with_map = [row for row in rows if row.has_labels]
    if labels is Labels.VOXELS:
        return with_map
    per_patient = Counter(row.patient for row in with_map if row.patient)
    return [row for row in with_map if per_patient[row.patient] > 1]


def what_is_missing(labels: Labels) -> str:
    """What a scan without the labels of a task lacks: a singular noun, so that it can follow both
    "has a" and "have no".
    """
    return {
        Labels.VOXELS: "label map",
        Labels.SCAN: "scan-level label",
        Labels.LANDMARKS: "landmark",
        Labels.PAIRS: "second scan of the same patient with a label map",
        Labels.NONE: "CT volume",
    }[labels]


def how_to_label(labels: Labels) -> str:
    """How labels of a kind are given to tapct, for error lines."""
    return {
        Labels.VOXELS: "name it NAME_seg.nii.gz beside NAME.nii.gz, put it in labels*/ beside "
        "images*/ (docs/data.md lists all layouts), or use --labels DIR; then index and pack again",
        Labels.SCAN: "give a CSV file with eval.scan_labels=FILE.csv; docs/evaluation.md describes "
        "its columns",
        Labels.LANDMARKS: "give a CSV file with eval.landmarks=FILE.csv; docs/evaluation.md "
        "describes its columns",
        Labels.PAIRS: "index again with --labels DIR and a --patient-regex that finds the patient, "
        "and pack again",
        Labels.NONE: "index and pack an archive with accepted scans",
    }[labels]


def split_for_tasks(
    groups: Sequence[Sequence[ScanRow]],
    *,
    test_share: float,
    max_scans: int,
    seed: int,
    held_out: Collection[str] = (),
    sides: Mapping[str, str] | None = None,
) -> Split:
    """Divide the scans of several tasks by patient, so that each scan is read for all of them.

    The scans of the first task are divided as if it were alone: its numbers do not change when
    other tasks are added. Scans that only later tasks can use follow; no patient is on both sides.

    Args:
        groups: scans that each task can use, none of them empty.
        test_share: share of the patients to test on.
        max_scans: most scans of all tasks together; 0 means all.
        seed: random seed of the split.
        held_out: patients that pretraining did not see.
        sides: official split, by scan ID, see `by_official_split`; empty or None where there is
            none.
    """
    if sides:
        everything = {row.id: row for group in groups for row in group}
        return by_official_split(list(everything.values()), sides, max_scans=max_scans, seed=seed)
    first = split_by_patient(
        groups[0], test_share=test_share, max_scans=max_scans, seed=seed, held_out=held_out
    )
    known = {row.id for row in groups[0]}
    others = {row.id: row for group in groups[1:] for row in group if row.id not in known}
    used = len({row.id for row in (*first.train, *first.test)})
    rest = sorted(others.values(), key=lambda row: row.id)
    if max_scans:
        rest = _some(rest, max(0, max_scans - used), seed)
    if not rest:
        return first
    if first.mode == BLOCKS:
        scans = (*first.train, *rest)
        return Split(BLOCKS, scans, scans)
    tested, trained = ({_patient(row) for row in side} for side in (first.test, first.train))
    new = {_patient(row) for row in rest} - tested - trained
    if first.tests_held_out:
        tested |= new.intersection(held_out)
    else:
        tested |= patients_below(new, test_share, seed)
    train = [row for row in rest if _patient(row) not in tested]
    test = [row for row in rest if _patient(row) in tested]
    return Split(PATIENTS, (*first.train, *train), (*first.test, *test), first.tests_held_out)


def split_by_patient(
    rows: Sequence[ScanRow],
    *,
    test_share: float,
    max_scans: int,
    seed: int,
    held_out: Collection[str] = (),
) -> Split:
    """Divide scans by patient; the result depends on the seed, not on the order of the rows.

    Args:
        rows: at least one scan.
        test_share: expected share of the patients to test on, at least one on either side; see
            `data.split`.
        max_scans: most scans on both sides together, at least one on either; 0 means all. The sides
            shrink alike.
        seed: random seed of the split.
        held_out: patients that pretraining did not see: they are the test side where some scans
            are theirs and some are not, else the split is by `test_share`.
    """
    ordered = sorted(rows, key=lambda row: row.id)
    people = {_patient(row) for row in ordered}
    if len(people) == 1:
        scans = tuple(ordered[: max_scans or None])
        return Split(BLOCKS, scans, scans)
    tested = people.intersection(held_out)
    as_pretrained = 0 < len(tested) < len(people)
    if not as_pretrained:
        drawn, was_moved = two_sides(people, test_share, seed)
        tested = set(drawn)
        if was_moved:
            console.say(
                f"eval.test_share {test_share:g} with eval.seed {seed} puts all {len(people)} "
                "patients on one side, so the patient nearest to the share is moved to the other; "
                "another eval.seed divides them in another way"
            )
    test = [row for row in ordered if _patient(row) in tested]
    train = [row for row in ordered if _patient(row) not in tested]
    if max_scans and max_scans < len(ordered):
        num_test = min(max(1, round(max_scans * len(test) / len(ordered))), max(1, max_scans - 1))
        test, train = _some(test, num_test, seed), _some(train, max(1, max_scans - num_test), seed)
    return Split(PATIENTS, tuple(train), tuple(test), as_pretrained)


def patients_together(split: Split) -> Split:
    """Order the test scans so that those of one patient follow one another, first the patients with
    several scans: tasks that compare two scans of a patient then keep little, and the first test
    scans, of which pictures are drawn, are a pair.
    """
    if split.mode == BLOCKS:
        return split
    num_scans = Counter(_patient(row) for row in split.test)
    place: dict[str, int] = {}
    for row in split.test:
        place.setdefault(_patient(row), len(place))
    test = sorted(split.test, key=lambda row: (num_scans[_patient(row)] == 1, place[_patient(row)]))
    return replace(split, test=tuple(test))


def by_official_split(
    rows: Sequence[ScanRow], sides: Mapping[str, str], *, max_scans: int, seed: int
) -> Split:
    """Divide scans by an official split. Its validation scans are among the training scans:
    tasks find them by `LabelledScan.official_side`. Scans without a side are left out.

    Args:
        rows: scans that the tasks can use.
        sides: `train`, `val` or `test` by scan ID.
        max_scans, seed: as in `split_by_patient`.
    Raises:
        UserError: a side has no scan, or a patient has test scans and others.
    """
    ordered = sorted((row for row in rows if row.id in sides), key=lambda row: row.id)
    test = [row for row in ordered if sides[row.id] == TEST]
    train = [row for row in ordered if sides[row.id] != TEST]
    if not test or not train:
        raise UserError(
            f"the official split of eval.scan_labels has {len(train)} training and validation "
            f"scans and {len(test)} test scans among the {len(rows)} scans that the tasks can use; "
            "it needs one of each. Set eval.split_column=none to divide the scans by patient"
        )
    mixed = {_patient(row) for row in test} & {_patient(row) for row in train}
    if mixed:
        raise UserError(
            f"the official split of eval.scan_labels has {len(mixed)} patients with test scans and "
            "other scans, so the results would not hold for new patients. Correct the column, or "
            "set eval.split_column=none to divide the scans by patient"
        )
    if len(ordered) < len(rows):
        num = len(rows) - len(ordered)
        console.say(f"{num} of {len(rows)} scans have no side in the official split and are unused")
    if max_scans and max_scans < len(ordered):
        num_test = min(max(1, round(max_scans * len(test) / len(ordered))), max(1, max_scans - 1))
        test, train = _some(test, num_test, seed), _some(train, max(1, max_scans - num_test), seed)
    return Split(PATIENTS, tuple(train), tuple(test))


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


def labels_of(row: ScanRow, store: Store) -> dict[int, str]:
    """The labels of a scan: value -> name, empty where it has none; without the background.

    Args:
        row: scan with labels.
        store: packed scans and labels.
    """
    labels = store.read_labels(store.index_of(row.id))
    names = dict(labels.names)
    present = np.flatnonzero(np.bincount(labels.labels_ZYX.reshape(-1)))
    values = {*present.tolist(), *names} - {0, IGNORE_LABEL}
    return {value: names.get(value, "") for value in sorted(values)}


def read_scan(
    row: ScanRow,
    store: Store,
    *,
    with_labels: bool,
    scan_labels: Mapping[str, ScanValue] | None = None,
) -> LabelledScan:
    """A scan of the store, whose voxels are read later, and, where a task needs them, its labels.

    Args:
        row: scan to read.
        store: packed scans.
        with_labels: True to read the labels too.
        scan_labels: values for the scan as a whole.
    Raises:
        Damaged: its labels are damaged.
    """
    i = store.index_of(row.id)
    labels = store.read_labels(i) if with_labels else None
    return LabelledScan(row.id, StoredVolume(store, i), labels, row.patient, scan_labels or {})
