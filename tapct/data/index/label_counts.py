"""Count the labels of an archive that was examined."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapct.data.labels.names import table_of_dataset
from tapct.data.labels.report import LabelReport
from tapct.data.manifest import ACCEPTED

_NOT_USED = re.compile(r"its labels are not used: ([a-z0-9_]+):")


def not_used(reason: str) -> str:
    """The detail of a scan whose labels were found and cannot be used.

    Args:
        reason: the refusal, which begins with its reason code.
    """
    return f"its labels are not used: {reason}"


def path_from(root: Path, labels: Path) -> str:
    """Path of labels relative to the archive; it begins with .. where they lie elsewhere."""
    if labels.is_relative_to(root):
        return labels.relative_to(root).as_posix()
    return Path(os.path.relpath(labels.resolve(), root.resolve())).as_posix()


@dataclass(frozen=True)
class Unpaired:
    """Label files of an archive that no scan uses, and counts of `--labels`; as in `LabelPairs`."""

    unmatched: tuple[Path, ...]
    likely: frozenset[Path]
    num_given: int
    num_given_used: int


@dataclass(frozen=True)
class LabelsFound:
    """The labels that were found for one scan.

    Args:
        label: path of its label file or folder of masks, or None.
        more: paths of the DICOM objects that are merged with it.
        num_others: number of further label maps that fit the scan and are not used.
        first_other: path of the first of them, or None.
    """

    label: Path | None = None
    more: tuple[Path, ...] = ()
    num_others: int = 0
    first_other: Path | None = None


class LabelCounts:
    """Counts the labels of an archive, scan by scan.

    Args:
        unpaired: label files that no scan uses.
        root: folder of the archive.
    """

    def __init__(self, unpaired: Unpaired, root: Path) -> None:
        self._unpaired, self._root = unpaired, root
        self._likely = [_shown(path, root) for path in sorted(unpaired.likely)]
        # a DICOM object may have its folder as the path of its row
        self._asked = {*self._likely, *(str(Path(path).parent) for path in self._likely)}
        self._refused: set[str] = set()
        self._unusable: Counter[str] = Counter()
        self._notes: dict[str, None] = {}
        self._last_folder: Path | None = None
        self._num_scans = self._num_labelled = self._num_several = 0
        self._example = ("", "")

    def add(self, pair: LabelsFound, row: Mapping[str, Any]) -> None:
        """Count one scan.

        Args:
            pair: labels that were found for it.
            row: columns path, status, detail and label_path of its row.
        """
        if pair.label is not None and pair.label.parent != self._last_folder:
            self._last_folder = pair.label.parent
            self._notes.update(dict.fromkeys(table_of_dataset(pair.label).notes))
        if row["status"] != ACCEPTED:
            if row["path"] in self._asked:
                self._refused.add(row["path"])
            return
        self._num_scans += 1
        self._num_labelled += bool(row["label_path"])
        match = _NOT_USED.match(row["detail"])
        if match:
            self._unusable[match[1]] += 1
        if pair.label is not None and pair.first_other is not None:
            if not self._num_several:
                used, other = pair.label, pair.first_other
                self._example = _shown(used, self._root), _shown(other, self._root)
            self._num_several += 1

    def report(self, contradiction: str) -> LabelReport:
        """The counts.

        Args:
            contradiction: how the label files of one scan contradict each other; empty for most.
        """
        unmatched = [_shown(path, self._root) for path in self._unpaired.unmatched]
        unmatched += [
            path for path in self._likely if {path, str(Path(path).parent)} & self._refused
        ]
        return LabelReport(
            num_scans=self._num_scans,
            num_labelled=self._num_labelled,
            unusable=tuple(self._unusable.most_common()),
            unmatched=tuple(unmatched),
            num_given=self._unpaired.num_given,
            num_given_used=self._unpaired.num_given_used,
            notes=tuple(self._notes),
            num_several=self._num_several,
            contradiction=contradiction,
            example=self._example,
        )


def _shown(path: Path, root: Path) -> str:
    """Path below the root where it lies there, else the whole path."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
