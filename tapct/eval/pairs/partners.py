"""Pairs of scans for tasks that compare two scans: which pairs there are, and what is kept of the
first scan until the second one has been read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Generic, TypeVar

from tapct.base.exits import UserError
from tapct.eval.scans.usable import ScanRow

T = TypeVar("T")
SAME_PATIENT, ACROSS_PATIENTS = "same_patient", "across_patients"


@dataclass(frozen=True)
class ScanPair:
    """Two scans, by ID.

    Args:
        first: scan whose points are looked for, or which is moved.
        second: scan in which they are looked for, or to which the first one is moved.
    """

    first: str
    second: str


def pairs_of(
    rows: Sequence[ScanRow],
    how: str,
    max_pairs: int,
    fits: Callable[[str, str], bool] = lambda first, second: True,
) -> list[ScanPair]:
    """The pairs among some scans, in the order in which they are complete.

    Args:
        rows: scans in the order in which they are read.
        how: `same_patient`: any two scans of a patient, in both directions; `across_patients`: each
            scan follows the last scan before it that is of another patient and fits, and the scans
            at the beginning, which have none, follow the last scan of another patient that fits.
        max_pairs: most pairs; 0: all.
        fits: whether two scans, by ID, have something that can be compared; others are no pair.
    """
    order = {row.id: number for number, row in enumerate(rows)}
    find = _of_patients if how == SAME_PATIENT else _across_patients
    pairs = find(rows, fits)
    pairs.sort(key=lambda pair: max(order[pair.first], order[pair.second]))
    return pairs[: max_pairs or None]


def share_a_name(
    names_of: Mapping[str, Collection[str]], wanted: Collection[str]
) -> Callable[[str, str], bool]:
    """A condition for `pairs_of`: both scans have a landmark of the same name.

    Args:
        names_of: scan ID -> names of its landmarks.
        wanted: names that count; empty: all.
    """

    def fits(first: str, second: str) -> bool:
        common = set(names_of.get(first, ())).intersection(names_of.get(second, ()))
        return bool(common.intersection(wanted) if wanted else common)

    return fits


def _of_patients(rows: Sequence[ScanRow], fits: Callable[[str, str], bool]) -> list[ScanPair]:
    of_patient: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.patient:
            of_patient[row.patient].append(row.id)
    pairs = []
    for scans in of_patient.values():
        for second in range(1, len(scans)):
            for first in range(second):
                if not fits(scans[first], scans[second]):
                    continue
                pairs.append(ScanPair(scans[first], scans[second]))
                pairs.append(ScanPair(scans[second], scans[first]))
    return pairs


def _across_patients(rows: Sequence[ScanRow], fits: Callable[[str, str], bool]) -> list[ScanPair]:
    pairs = []
    for number, row in enumerate(rows):
        # the scans before it, the nearest first, then those at the end, as on a ring
        for other in [*rows[:number][::-1], *rows[number + 1 :][::-1]]:
            is_other = (other.patient or other.id) != (row.patient or row.id)
            if is_other and fits(other.id, row.id):
                pairs.append(ScanPair(other.id, row.id))
                break
    return pairs


def check_sides(task: str, train: Sequence[ScanRow], test: Sequence[ScanRow]) -> None:
    """Raise UserError where both sides hold the same scans, because all are of one patient."""
    if {row.id for row in train} & {row.id for row in test}:
        raise UserError(
            f"task {task} needs scans of several patients, but all of its scans are of one "
            "patient. Index scans of a second patient, or switch the task off with "
            f"eval.tasks.{task}=null"
        )


def check_any_pair(task: str, results: Sized) -> None:
    """Raise UserError where no pair was evaluated, because scans could not be read."""
    if not results:
        raise UserError(
            f"task {task}: of each pair of test scans, at least one scan could not be read; "
            "restore the scans, or switch the task off with "
            f"eval.tasks.{task}=null"
        )


class PairedScans(Generic[T]):
    """What is kept of scans that wait for their partners.

    A scan without a partner is not kept, and a scan is dropped as soon as its last pair is
    complete.

    Args:
        pairs: pairs of one side.
    """

    def __init__(self, pairs: Iterable[ScanPair] = ()) -> None:
        self.pairs = list(pairs)
        self._of_scan: dict[str, list[ScanPair]] = defaultdict(list)
        for pair in self.pairs:
            self._of_scan[pair.first].append(pair)
            self._of_scan[pair.second].append(pair)
        self._kept: dict[tuple[Hashable, str], T] = {}
        self._open: dict[Hashable, Counter[str]] = {}
        self._most = 0

    def has_partner(self, scan: str) -> bool:
        """Whether a scan is in a pair."""
        return scan in self._of_scan

    @property
    def most_kept(self) -> int:
        """Largest number of entries that were kept at one time."""
        return self._most

    def add(self, model: Hashable, scan: str, entry: T) -> list[tuple[ScanPair, T, T]]:
        """Add what is kept of a scan for one model.

        Args:
            model: name of the model, or any other key; scans of different keys are no pairs.
            scan: scan ID.
            entry: what is kept of the scan.
        Returns:
            The pairs that are now complete, with the entries of their first and second scan.
        """
        pairs = self._of_scan.get(scan, [])
        if model not in self._open:
            counts = Counter({name: len(of) for name, of in self._of_scan.items()})
            self._open[model] = counts
        still_open = self._open[model]
        if not pairs or not still_open[scan]:
            return []
        self._kept[model, scan] = entry
        self._most = max(self._most, len(self._kept))
        complete = []
        for pair in pairs:
            both = [self._kept.get((model, name)) for name in (pair.first, pair.second)]
            if both[0] is None or both[1] is None:
                continue
            complete.append((pair, both[0], both[1]))
            for name in (pair.first, pair.second):
                still_open[name] -= 1
        for name in {name for pair, _, _ in complete for name in (pair.first, pair.second)}:
            if not still_open[name]:
                del self._kept[model, name]
        return complete
