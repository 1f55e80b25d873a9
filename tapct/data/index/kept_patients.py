"""Patients keep their hashes when an archive grows and is indexed again.

The split depends on the hash of a patient alone, so a patient whose hash changes can change sides.
A hash would change where a scan that was identified by its name gets a PatientID, or where a
PatientID that all studies had is one of several now. So an index reads the older manifest, and a
scan that is in it keeps its patient. A scan is known by its voxels, else by its path.

| today's rules | patient |
|---|---|
| give a known patient another hash | the hash of the older manifest, `patient_from` is `kept` |
| divide a known patient | they stay one: a run may have trained on some of the scans |
| join several known patients | one of their hashes: the one that is held out last |

*Held out last* is the largest position on the scale of the split, see `split.position`. A joined
patient is therefore held out only where each of them was, whatever the share: scans can move from
the test side to the training side, but none moves from the training side to the test side. This
holds for one seed of the split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data.manifest import Manifest, Row
from tapct.data.patients.memory import KnownScan, PatientChanges, PatientMemory
from tapct.data.patients.split import position

KEPT = "kept"  # `patient_from` of a scan whose patient has the hash of an older manifest
# rules of an identifier that belongs to one person, whatever the scan is called; equal values are
# one rule
_PERSONAL = {"column": "column", "header": "PatientID", "side_car": "PatientID"}


@dataclass(frozen=True)
class KeepRules:
    """Which patients are kept.

    Args:
        file: older manifest; None for the one that is replaced, where there is one.
        fresh: whether the patients of the older manifest are forgotten.
        split_seed: seed of the split, for patients that are joined.
    """

    file: Path | None = None
    fresh: bool = False
    split_seed: int = 0


KEEP_ALL = KeepRules()


@dataclass(frozen=True)
class Older:
    """An older manifest, as far as it can be used.

    Args:
        manifest: older manifest; None where there is none, or it cannot be used.
        problem: why it cannot be used; empty where there is none.
        is_given: whether the user named its file.
    """

    manifest: Manifest | None = None
    problem: str = ""
    is_given: bool = False


def read_older(out: Path, rules: KeepRules, key_name: str) -> Older:
    """Read the manifest whose patients are kept, before the archive is read.

    Args:
        out: file of the new manifest.
        rules: which patients are kept.
        key_name: name of the key of the hashes.
    Raises:
        UserError: `rules.file` was given and cannot be used.
    """
    file = rules.file or out
    if rules.file is None and not out.exists():
        return Older()
    problem = ""
    try:
        older = Manifest.read(file)
        if older.patient_key == key_name:
            return Older(older, is_given=rules.file is not None)
        problem = "they are hashed with another key than the one beside --out"
    except UserError as error:
        problem = str(error)
    if rules.file is not None:
        raise UserError(f"the patients of {file} cannot be kept: {problem}")
    return Older(problem=problem)


def with_kept_patients(
    manifest: Manifest, given: Sequence[str], older: Older, rules: KeepRules
) -> Manifest:
    """A manifest with the patients of an older one, and with what changed.

    Args:
        manifest: manifest with patients by today's rules.
        given: hash that each scan's own rule gave, before scans of one person were joined.
        older: older manifest.
        rules: which patients are kept.
    """
    before = older.manifest
    problem = older.problem
    if before is not None and not older.is_given and _is_another_archive(manifest, before):
        problem = (
            f"it was made for another folder, {before.root}, and has no scan in common with this "
            "archive"
        )
    if problem:
        return replace(manifest, patient_changes=PatientChanges(problem=problem))
    if before is None:
        return manifest
    if rules.fresh:
        changes = changes_without_keeping(manifest.rows, before)
        return replace(manifest, patient_changes=changes)
    rows, memory, changes = keep_patients(manifest.rows, given, before, split_seed=rules.split_seed)
    return replace(manifest, rows=rows, memory=memory, patient_changes=changes)


def _is_another_archive(manifest: Manifest, older: Manifest) -> bool:
    """Whether an older manifest was made for another folder and has no scan in common with this
    one.
    """
    known = {scan.digest for scan in _known_scans(older)}
    has_known = any(row.digest in known for row in manifest.rows if row.digest)
    return bool(known) and older.root != manifest.root and not has_known


def keep_patients(
    rows: Sequence[Row], given: Sequence[str], older: Manifest, *, split_seed: int = 0
) -> tuple[tuple[Row, ...], PatientMemory, PatientChanges]:
    """Give known scans the patients that they had.

    Args:
        rows: rows of an archive, with patients by today's rules.
        given: as in `with_kept_patients`.
        older: manifest of the same archive at an earlier time, with hashes of the same key.
        split_seed: seed of the split, for patients that are joined.
    Returns:
        The rows with the kept patients, what the next index must know beyond them, and what
        changed.
    """
    known = _known_scans(older)
    before = _patients_before(rows, known)
    joined = _Sets()
    for row, by_rule, patients in zip(rows, given, before):
        for patient in (by_rule, *patients) if row.patient else ():
            joined.join(row.patient, patient)
    for by_rule, patient in older.memory.same_as.items():
        joined.join(by_rule, patient)
    earlier = {scan.patient for scan in known} | set(older.memory.same_as.values())
    name_of = _names(joined, earlier, {row.patient for row in rows}, split_seed)
    kept = []
    for row in rows:
        name = name_of.get(row.patient, row.patient)
        source = row.patient_from if name == row.patient else KEPT
        kept.append(replace(row, patient=name, patient_from=source))
    digests = {row.digest for row in rows if row.patient}
    gone = dict.fromkeys(
        replace(scan, patient=name_of.get(scan.patient, scan.patient))
        for scan in known
        if scan.digest not in digests
    )
    same_as = {by_rule: name for by_rule, name in name_of.items() if by_rule != name}
    changes = _changes(rows, kept, before)
    return tuple(kept), PatientMemory(tuple(gone), same_as), replace(changes, split_seed=split_seed)


def changes_without_keeping(rows: Sequence[Row], older: Manifest) -> PatientChanges:
    """What becomes of the older patients where they are forgotten.

    Args:
        rows, older: as in `keep_patients`.
    """
    before = _patients_before(rows, _known_scans(older))
    return replace(_changes(rows, rows, before), num_undivided=0, forgotten=True)


def _known_scans(older: Manifest) -> list[KnownScan]:
    """All scans whose patients are known, the ones in the rows last."""
    rows = (
        KnownScan(row.id, row.digest, row.patient, row.patient_from)
        for row in older.rows
        if row.patient
    )
    return [*older.memory.gone, *rows]


def _patients_before(rows: Sequence[Row], known: Iterable[KnownScan]) -> list[list[str]]:
    """The earlier patients of each scan: by its voxels, else by its path; sorted."""
    by_id: dict[str, KnownScan] = {}
    by_digest: dict[str, set[str]] = defaultdict(set)
    for scan in known:
        by_id[scan.id] = scan
        if scan.digest:
            by_digest[scan.digest].add(scan.patient)
    digests = {row.digest for row in rows if row.patient}
    found: list[list[str]] = []
    for row in rows:
        at_path = by_id.get(row.id)
        if not row.patient:
            found.append([])
        elif row.digest in by_digest:
            found.append(sorted(by_digest[row.digest]))
        elif at_path and not _is_replaced(row, at_path, digests):
            found.append([at_path.patient])
        else:
            found.append([])
    return found


def _is_replaced(row: Row, before: KnownScan, digests: set[str]) -> bool:
    """Whether a path holds another person's scan now: the scan that it held lies elsewhere, or the
    same rule of personal identifiers gives another patient.
    """
    if before.digest in digests:
        return True
    rule = _PERSONAL.get(before.patient_from)
    return rule is not None and rule == _PERSONAL.get(row.patient_from)


def _names(joined: _Sets, earlier: set[str], today: set[str], split_seed: int) -> dict[str, str]:
    """The hash of the patient of each joined hash: of the earlier ones the one that is held out
    last; without an earlier one, the one by today's rules.
    """
    names: dict[str, str] = {}
    for members in joined.sets():
        names_now = [member for member in members if member in today]
        old = [member for member in members if member in earlier] or names_now
        name = max(old, key=lambda patient: (position(patient, split_seed), patient))
        names.update(dict.fromkeys(members, name))
    return names


def _changes(
    rows: Sequence[Row], result: Sequence[Row], before: Sequence[Sequence[str]]
) -> PatientChanges:
    """Count what became of the earlier patients.

    Args:
        rows: rows with patients by today's rules.
        result: the same rows with the patients that they get.
        before: earlier patients of each row.
    """
    num_scans = num_kept = 0
    changed: set[str] = set()
    by_rules: dict[str, set[str]] = defaultdict(set)
    for row, now, patients in zip(rows, result, before):
        for patient in patients:
            by_rules[patient].add(row.patient)
        num_kept += now.patient_from == KEPT
        if patients and now.patient not in patients:
            num_scans += 1
            changed.update(patients)
    num_undivided = sum(len(names) > 1 for names in by_rules.values())
    return PatientChanges(num_scans, len(changed), num_kept, num_undivided)


class _Sets:
    """Sets of hashes that are of one patient."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def _root(self, member: str) -> str:
        self._parent.setdefault(member, member)
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def join(self, one: str, other: str) -> None:
        """Join the sets of two hashes."""
        self._parent[self._root(one)] = self._root(other)

    def sets(self) -> Iterator[list[str]]:
        """All sets."""
        members: dict[str, list[str]] = defaultdict(list)
        for member in self._parent:
            members[self._root(member)].append(member)
        yield from members.values()
