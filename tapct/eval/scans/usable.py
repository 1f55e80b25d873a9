"""Which scans an evaluation can use: rows of the store, by path and by the labels a task needs."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

from tapct.base.exits import UserError


class Labels(Enum):
    """The labels that a task needs of a scan. Scans without them are skipped for that task."""

    VOXELS = "voxels"  # a label map on the scan's own grid: LabelledScan.labels
    SCAN = "scan"  # values for the scan as a whole: LabelledScan.scan_labels
    LANDMARKS = "landmarks"  # named points: LabelledScan.landmarks_mm
    PAIRS = "pairs"  # label maps of at least two scans of one patient: LabelledScan.patient
    NONE = "none"


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
    scan_labels: Mapping[str, Mapping[str, object]] | None = None,
    landmarks: Mapping[str, Mapping[str, object]] | None = None,
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
