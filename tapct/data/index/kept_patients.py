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

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tapct.base.exits import UserError
from tapct.data.manifest import Manifest
from tapct.data.patients.columns import HASH, hashes, number_of, roots, runs, unique_rows
from tapct.data.patients.identity import SOURCES
from tapct.data.patients.memory import KnownScan, PatientChanges, PatientMemory
from tapct.data.patients.split import position

KEPT = "kept"  # `patient_from` of a scan whose patient has the hash of an older manifest
RULES = ("", *SOURCES, KEPT)  # values of `patient_from`
# rules of an identifier that belongs to one person, whatever the scan is called; equal numbers are
# one rule, and 0 is none
_PERSONAL = {"column": 1, "header": 2, "side_car": 2}
_RULE_OF_PERSON = np.array([_PERSONAL.get(rule, 0) for rule in RULES])


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
        older = Manifest.open(file)
        if older.patient_key == key_name:
            return Older(older, is_given=rules.file is not None)
        problem = "they are hashed with another key than the one beside --out"
    except UserError as error:
        problem = str(error)
    if rules.file is not None:
        raise UserError(f"the patients of {file} cannot be kept: {problem}")
    return Older(problem=problem)


@dataclass(frozen=True)
class ScanPatients:
    """The patients of scans as columns.

    Args:
        ids, digests: `columns.number_of` the ids and digests of the scans.
        patients: keyed hashes of their patients; empty where there is none.
        sources: numbers in RULES of the rules that identified them.
    """

    ids: np.ndarray
    digests: np.ndarray
    patients: np.ndarray
    sources: np.ndarray

    @classmethod
    def of(cls, scans: Iterable[tuple[str, str, str, str]]) -> ScanPatients:
        """The columns of scans: id, digest, patient and rule of each."""
        ids, digests = array("Q"), array("Q")
        patients, sources = bytearray(), bytearray()
        for scan_id, digest, patient, source in scans:
            ids.append(number_of(scan_id))
            digests.append(number_of(digest))
            patients += hashes([patient]).tobytes()
            sources.append(RULES.index(source))
        return cls(
            np.frombuffer(ids, np.uint64),
            np.frombuffer(digests, np.uint64),
            np.frombuffer(patients, HASH),
            np.frombuffer(sources, np.uint8),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def is_known(self) -> np.ndarray:
        """Whether a scan has a patient; bool."""
        return self.patients != b""


def kept_patients(
    now: ScanPatients, given: np.ndarray, root: Path, older: Older, rules: KeepRules
) -> tuple[ScanPatients, PatientMemory, PatientChanges | None]:
    """The patients of an archive with those of an older manifest, and what changed.

    Args:
        now: patients by today's rules.
        given: hash that each scan's own rule gave, before scans of one person were joined.
        root: folder of the archive.
        older: older manifest.
        rules: which patients are kept.
    Returns:
        The patients, what the next index must know beyond them, and what changed, as in
        `Manifest.patient_changes`.
    """
    before = older.manifest
    problem = older.problem
    if before is not None and not older.is_given and _is_another_archive(now, root, before):
        problem = (
            f"it was made for another folder, {before.root}, and has no scan in common with this "
            "archive"
        )
    if problem:
        return now, PatientMemory(), PatientChanges(problem=problem)
    if before is None:
        return now, PatientMemory(), None
    if rules.fresh:
        return now, PatientMemory(), changes_without_keeping(now, before)
    return keep_patients(now, given, before, split_seed=rules.split_seed)


def _is_another_archive(now: ScanPatients, root: Path, older: Manifest) -> bool:
    """Whether an older manifest was made for another folder and has no scan in common with this
    one.
    """
    if older.root == root:
        return False
    known = ScanPatients.of(_known_scans(older))
    has_known = np.isin(now.digests[now.digests != 0], known.digests).any()
    return len(known) > 0 and not has_known


def keep_patients(
    now: ScanPatients, given: np.ndarray, older: Manifest, *, split_seed: int = 0
) -> tuple[ScanPatients, PatientMemory, PatientChanges]:
    """Give known scans the patients that they had.

    Args:
        now: patients by today's rules.
        given: as in `kept_patients`.
        older: manifest of the same archive at an earlier time, with hashes of the same key.
        split_seed: seed of the split, for patients that are joined.
    Returns:
        The kept patients, what the next index must know beyond them, and what changed.
    """
    known = ScanPatients.of(_known_scans(older))
    before = _Before.of(now, known)
    is_known = now.is_known()
    same_as = older.memory.same_as
    remembered = hashes(same_as.values())
    joined = (
        (now.patients[is_known], given[is_known]),
        (now.patients[before.rows], before.patients),
        (hashes(same_as), remembered),
    )
    earlier = np.concatenate([known.patients, remembered])
    name_of = _names(joined, earlier, now, split_seed)
    patients = name_of.of(now.patients)
    sources = np.where(patients == now.patients, now.sources, RULES.index(KEPT)).astype(np.uint8)
    kept = replace(now, patients=patients, sources=sources)
    is_gone = ~np.isin(known.digests, now.digests[is_known])
    gone = dict.fromkeys(
        KnownScan(scan_id, digest, name_of.text_of(patient), source)
        for (scan_id, digest, patient, source), chosen in zip(_known_scans(older), is_gone)
        if chosen
    )
    changes = replace(_changes(now, kept, before), split_seed=split_seed)
    return kept, PatientMemory(tuple(gone), name_of.changed()), changes


def changes_without_keeping(now: ScanPatients, older: Manifest) -> PatientChanges:
    """What becomes of the older patients where they are forgotten.

    Args:
        now, older: as in `keep_patients`.
    """
    before = _Before.of(now, ScanPatients.of(_known_scans(older)))
    return replace(_changes(now, now, before), num_undivided=0, forgotten=True)


def _known_scans(older: Manifest) -> Iterator[tuple[str, str, str, str]]:
    """All scans whose patients are known, the ones in the rows last: id, digest, patient, rule."""
    for scan in older.memory.gone:
        yield scan.id, scan.digest, scan.patient, scan.patient_from
    for table in older.row_table().tables(("id", "digest", "patient", "patient_from")):
        for scan_id, digest, patient, source in zip(*(each.to_pylist() for each in table)):
            if patient:
                yield scan_id, digest, patient, source


@dataclass(frozen=True)
class _Before:
    """The earlier patients of scans: of a scan by its voxels, else by its path.

    Args:
        rows: numbers of the scans, ascending; one with several earlier patients is there for each.
        patients: keyed hash of an earlier patient of each.
    """

    rows: np.ndarray
    patients: np.ndarray

    @classmethod
    def of(cls, now: ScanPatients, known: ScanPatients) -> _Before:
        """The earlier patients of scans, from all scans whose patients are known."""
        is_known = now.is_known()
        has_digest = known.digests != 0
        digests, patients = unique_rows(known.digests[has_digest], known.patients[has_digest])
        starts = np.searchsorted(digests, now.digests, side="left")
        counts = np.searchsorted(digests, now.digests, side="right") - starts
        counts[~is_known] = 0
        rows = np.repeat(np.arange(len(now)), counts)
        offsets = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        by_voxels = patients[np.repeat(starts, counts) + offsets]
        others, at_path = _at_same_path(now, known, is_known & (counts == 0))
        rows = np.concatenate([rows, others])
        order = np.argsort(rows, kind="stable")
        return cls(rows[order], np.concatenate([by_voxels, known.patients[at_path]])[order])


def _at_same_path(
    now: ScanPatients, known: ScanPatients, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of chosen scans at whose paths known scans were, and numbers of the last of those.

    A path that holds another person's scan now is left out: the scan that it held lies elsewhere,
    or the same rule of personal identifiers gives another patient.
    """
    scans = np.flatnonzero(chosen)
    if not len(known):
        return scans[:0], scans[:0]
    order = np.argsort(known.ids, kind="stable")
    places = np.searchsorted(known.ids[order], now.ids[scans], side="right") - 1
    before = order[np.maximum(places, 0)]
    is_moved = np.isin(known.digests[before], now.digests[now.is_known()])
    rules = _RULE_OF_PERSON[now.sources[scans]]
    is_other = (rules != 0) & (rules == _RULE_OF_PERSON[known.sources[before]])
    is_here = (known.ids[before] == now.ids[scans]) & ~is_moved & ~is_other
    return scans[is_here], before[is_here]


@dataclass(frozen=True)
class _Names:
    """Hashes that are joined with others, and the hash of the patient of each.

    Args:
        members: hashes, ascending.
        names: hash of the patient of each.
    """

    members: np.ndarray
    names: np.ndarray

    def of(self, patients: np.ndarray) -> np.ndarray:
        """The hashes of the patients of some hashes."""
        result = patients.copy()
        is_member = np.isin(patients, self.members)
        result[is_member] = self.names[np.searchsorted(self.members, patients[is_member])]
        return result

    def text_of(self, patient: str) -> str:
        """The hash of the patient of one hash."""
        return str(self.of(hashes([patient]))[0].decode())

    def changed(self) -> dict[str, str]:
        """The hashes that are not those of their patients, with those."""
        differ = self.members != self.names
        pairs = zip(self.members[differ].tolist(), self.names[differ].tolist())
        return {member.decode(): name.decode() for member, name in pairs}


def _names(
    joined: Iterable[tuple[np.ndarray, np.ndarray]],
    earlier: np.ndarray,
    now: ScanPatients,
    split_seed: int,
) -> _Names:
    """The hash of the patient of each joined hash: of the earlier ones the one that is held out
    last; without an earlier one, the one by today's rules.

    Args:
        joined: hashes of one array that are joined with those of another one, one by one.
        earlier: hashes of earlier patients.
        now: patients by today's rules.
        split_seed: seed of the split.
    """
    differing = [(one[one != other], other[one != other]) for one, other in joined]
    ones, others = (np.concatenate([pair[side] for pair in differing]) for side in (0, 1))
    members = np.unique(np.concatenate([ones, others]))
    pairs = (np.searchsorted(members, each) for each in (ones, others))
    root = roots(len(members), *pairs)
    is_earlier, is_today = np.isin(members, earlier), np.isin(members, now.patients)
    names = members.copy()
    order = np.argsort(root, kind="stable")
    for run in runs(root[order]):
        places = order[run]
        old = places[is_earlier[places]]
        old = old if len(old) else places[is_today[places]]
        texts = [member.decode() for member in members[old].tolist()]
        name = max(texts, key=lambda patient: (position(patient, split_seed), patient))
        names[places] = name.encode()
    return _Names(members, names)


def _changes(now: ScanPatients, result: ScanPatients, before: _Before) -> PatientChanges:
    """Count what became of the earlier patients.

    Args:
        now: patients by today's rules.
        result: the patients that the same scans get.
        before: earlier patients of the scans.
    """
    is_same, has_before = np.zeros(len(now), bool), np.zeros(len(now), bool)
    has_before[before.rows] = True
    is_same[before.rows[before.patients == result.patients[before.rows]]] = True
    is_changed = has_before & ~is_same
    changed = np.unique(before.patients[is_changed[before.rows]])
    patients, _ = unique_rows(before.patients, now.patients[before.rows])
    _, counts = np.unique(patients, return_counts=True)
    num_kept = np.count_nonzero(result.sources == RULES.index(KEPT))
    return PatientChanges(
        int(is_changed.sum()), len(changed), int(num_kept), int((counts > 1).sum())
    )
