"""Identity and privacy: which patient a scan belongs to, and how that is kept secret.

| order | a patient is identified by | `patient_from` |
|---|---|---|
| 1 | the table of `--patient-column` | `column` |
| 2 | the folder of `--patient-from folder:N` | `folder` |
| 3 | the PatientID of a DICOM header, unless it is a stand-in | `header` |
| 4 | `--patient-regex`, for scans without a PatientID in header or side-car | `regex` |
| 5 | `sub-XX` of BIDS on the path | `bids` |
| 6 | the PatientID of a side-car, unless it is a stand-in | `side_car` |
| 7 | the StudyInstanceUID: one study is one patient | `study` |
| 8 | a guess from names, see `patients.names` | `guess` |

Copies of one scan, scans of one study or series and numbered stand-ins join what these rules give,
since a leak is worse than a coarse split. The identifier never leaves this file: what is stored is
a hash, keyed with a secret, so that nobody without the secret can test whether a known identifier
is among the hashes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data.patients import near_copies
from tapct.data.patients.key import keyed_hash
from tapct.data.patients.names import bids_subject, guessed_identifier, person_and_visit
from tapct.data.patients.stand_ins import canonical_id, is_stand_in
from tapct.types import ScanFacts

SOURCES = ("column", "folder", "header", "regex", "bids", "side_car", "study", "guess")
STAND_IN = "patient_stand_in"  # mark of a scan whose PatientID identifies nobody
SEVERAL_IDS = "several_patient_ids"  # mark of the scans of one study with several PatientIDs
NEAR_COPY = "near_copy"  # mark of a scan that has slices of another one
_BY_USER = ("column", "folder")  # rules by which the user names the patient of each scan


@dataclass(frozen=True)
class PatientRules:
    """How the patients of one archive are identified.

    Args:
        root: folder of the archive.
        key: secret of the keyed hashes, see `patients.key`.
        regex: regular expression whose group 1, searched in the path below the root, is the
            identifier; None to guess from the names on the path.
        folder: number of the folder on the path below the root that is the patient, from 1; 0 for
            none.
        trusts_header: whether a PatientID counts also where all studies have the same one, or one
            study has several.
        column: identifier of a scan by its path below the root, from a table.
    """

    root: Path
    key: bytes
    regex: str | None = None
    folder: int = 0
    trusts_header: bool = False
    column: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one scan before its patient is decided.

    Args:
        path: path of the scan, below the archive.
        is_series: whether it is a DICOM series.
        facts: facts of its header and side-car; None where it could not be read.
        digest: digest of its voxels, or empty.
        sketch: `near_copies.sketch` of its voxels, or empty.
    """

    path: Path
    is_series: bool
    facts: ScanFacts | None
    digest: str = ""
    sketch: bytes = b""


@dataclass(frozen=True)
class Identified:
    """The patient of one scan.

    Args:
        hash: keyed hash of the identifier; empty where the scan could not be read.
        source: rule that identified it, one of SOURCES; empty where the scan could not be read.
        has_stand_in: whether the scan has a PatientID that identifies nobody.
        has_several_ids: whether scans of its study have other identifiers, which were joined.
        has_near_copy: whether another scan has slices of it.
        given: keyed hash by its rule alone, before scans of one person were joined.
    """

    hash: str = ""
    source: str = ""
    has_stand_in: bool = False
    has_several_ids: bool = False
    has_near_copy: bool = False
    given: str = ""


def patients_of(scans: Sequence[Known], rules: PatientRules) -> list[Identified]:
    """Identify the patients of a whole archive.

    Args:
        scans: all scans of the archive, accepted and refused.
        rules: rules of the archive.
    Returns:
        One patient per scan, in the same order.
    """
    same_for_all = set() if rules.trusts_header else _same_for_all(scans, rules)
    found = [_first_rule(scan, rules, same_for_all) for scan in scans]
    joined = _Joined(found)
    _join_scans(scans, found, rules, joined.join)
    several = _join_studies(scans, found, rules, joined.join)
    _join_series(scans, found, rules, joined.join)
    near = _join_near_copies(scans, found, rules, joined.join)
    patients = []
    for number, (scan, patient) in enumerate(zip(scans, found)):
        is_stand_in = scan.facts is not None and (
            scan.facts.clues.has_stand_in or scan.facts.patient in same_for_all
        )
        has_several_ids = scan.facts is not None and scan.facts.clues.study in several
        name = joined.name_of(patient.hash)
        patients.append(
            Identified(
                name,
                patient.source,
                is_stand_in,
                has_several_ids,
                has_near_copy=number in near,
                given=patient.hash,
            )
        )
    return patients


def _same_for_all(scans: Iterable[Known], rules: PatientRules) -> set[str]:
    """The PatientID that identifies nobody, because all of several studies have the same one.

    Headers and side-cars count together: one patient with two DICOM studies among others with
    side-cars is a patient.
    """
    studies: set[str] = set()
    ids: set[str] = set()
    for scan in scans:
        if scan.facts is not None and scan.facts.patient:
            ids.add(scan.facts.patient)
            studies.add(scan.facts.clues.study or _guess(scan, rules))
    return ids if len(ids) == 1 and len(studies) > 1 else set()


def _first_rule(scan: Known, rules: PatientRules, same_for_all: set[str]) -> Identified:
    """The patient of a scan by the first rule that applies to it."""
    if scan.facts is None:
        return Identified()
    relative = scan.path.relative_to(rules.root)
    clues = scan.facts.clues
    in_column = rules.column.get(relative.as_posix(), "")
    if in_column:
        return Identified(_hash_of_name(rules, in_column), "column")
    folders = relative.parts if scan.is_series else relative.parts[:-1]
    if 0 < rules.folder <= len(folders):
        return Identified(_hash_of_name(rules, folders[rules.folder - 1]), "folder")
    from_id = "" if scan.facts.patient in same_for_all else scan.facts.patient
    if from_id and clues.patient_from == "header":
        return Identified(from_id, "header")
    match = re.search(rules.regex, relative.as_posix()) if rules.regex and not from_id else None
    if match and match[1]:
        return Identified(_hash_of_name(rules, match[1]), "regex")
    subject = bids_subject(relative)
    if subject:
        return Identified(_hash_of_name(rules, subject), "bids")
    if from_id:
        return Identified(from_id, "side_car")
    if clues.study:
        return Identified(clues.study, "study")
    return Identified(_guess(scan, rules), "guess")


def _guess(scan: Known, rules: PatientRules) -> str:
    """The keyed hash of the identifier that the names on a scan's path suggest."""
    relative = scan.path.relative_to(rules.root)
    name = guessed_identifier(relative, is_series=scan.is_series)
    return _hash_of_name(rules, name or rules.root.resolve().name)


def _hash_of_name(rules: PatientRules, name: str) -> str:
    """The keyed hash of an identifier, however it is written."""
    return keyed_hash(rules.key, canonical_id(name) or name)


def _join_scans(
    scans: Sequence[Known],
    found: Sequence[Identified],
    rules: PatientRules,
    join: Callable[[str, str], None],
) -> None:
    """Join the patients of scans that must be of one person.

    Args:
        scans, rules: as in `patients_of`.
        found: patient of each scan by the first rule.
        join: function that joins two patients.
    """
    pseudonyms = {scan.facts.clues.pseudonym for scan in scans if scan.facts is not None} - {""}
    by_digest: dict[str, str] = {}
    by_pseudonym: dict[str, str] = {}
    by_guess: dict[str, set[str]] = defaultdict(set)
    for scan, patient in zip(scans, found):
        if scan.facts is None:
            continue
        clues = scan.facts.clues
        if scan.digest:  # copies, in whatever format and under whatever name
            join(by_digest.setdefault(scan.digest, patient.hash), patient.hash)
        # one number for all identifies nobody; several may count patients
        if clues.pseudonym and len(pseudonyms) > 1:
            join(by_pseudonym.setdefault(clues.pseudonym, patient.hash), patient.hash)
        if patient.source in ("header", "bids", "side_car", "study"):
            by_guess[_guess(scan, rules)].add(patient.hash)
        if patient.source == "study":
            relative = scan.path.relative_to(rules.root)
            if person_and_visit(relative, is_series=scan.is_series):
                join(_guess(scan, rules), patient.hash)
    for patient in found:
        # the folder of one known patient; a folder of several is not a person
        if patient.source == "guess" and len(by_guess[patient.hash]) == 1:
            join(next(iter(by_guess[patient.hash])), patient.hash)


def _join_studies(
    scans: Sequence[Known],
    found: Sequence[Identified],
    rules: PatientRules,
    join: Callable[[str, str], None],
) -> set[str]:
    """Join the patients of one study, whatever their identifiers.

    Patients that the user named for each scan stay apart, and so do several PatientIDs
    where the user trusts them.

    Args:
        scans, found, rules, join: as in `_join_scans`.
    Returns:
        Studies of which several identifiers were joined.
    """
    sure = (*_BY_USER, "header", "side_car") if rules.trusts_header else _BY_USER
    named: dict[str, set[str]] = defaultdict(set)
    doubtful: dict[str, set[str]] = defaultdict(set)
    without_id: dict[str, set[str]] = defaultdict(set)
    for scan, patient in zip(scans, found):
        if scan.facts is None or not scan.facts.clues.study:
            continue
        sort = without_id if patient.source == "study" else doubtful
        sort = named if patient.source in sure else sort
        sort[scan.facts.clues.study].add(patient.hash)
    several = set()
    for study in {*named, *doubtful, *without_id}:
        members = sorted(doubtful[study])
        if len(named[study]) == 1:
            members = sorted(named[study] | doubtful[study])
        if len(members) > 1:
            several.add(study)
        if len(named[study]) < 2:
            members += sorted(without_id[study])
        for other in members[1:]:
            join(members[0], other)
    return several


def _join_series(
    scans: Sequence[Known],
    found: Sequence[Identified],
    rules: PatientRules,
    join: Callable[[str, str], None],
) -> None:
    """Join the patients of one series where no study separates them.

    Some anonymisation software gives all series one UID, so series of different studies and a UID
    that all series have join nobody.

    Args:
        scans, found, rules, join: as in `_join_scans`.
    """
    sure = (*_BY_USER, "header", "side_car") if rules.trusts_header else _BY_USER
    members: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for scan, patient in zip(scans, found):
        if scan.facts is not None and scan.facts.clues.series and patient.source not in sure:
            members[scan.facts.clues.series].append((scan.facts.clues.study, patient.hash))
    if len(members) < 2:
        return
    for series in members.values():
        if len({study for study, _ in series} - {""}) < 2:
            for _, other in series[1:]:
                join(series[0][1], other)


def _join_near_copies(
    scans: Sequence[Known],
    found: Sequence[Identified],
    rules: PatientRules,
    join: Callable[[str, str], None],
) -> set[int]:
    """Join the patients of scans that share slices, unless the user named both of them.

    Args:
        scans, found, rules, join: as in `_join_scans`.
    Returns:
        Numbers of the scans that share slices with a scan that is no whole copy of them.
    """
    sure = (*_BY_USER, "header", "side_car") if rules.trusts_header else _BY_USER
    near = set()
    for one, other in near_copies.pairs([scan.sketch for scan in scans]):
        if not (found[one].hash and found[other].hash):
            continue
        if scans[one].digest != scans[other].digest:
            near |= {one, other}
        if found[one].source not in sure or found[other].source not in sure:
            join(found[one].hash, found[other].hash)
    return near


class _Joined:
    """Sets of patients that are one; each is named after the member that the best rule gave.

    Args:
        found: patient of each scan by the first rule.
    """

    def __init__(self, found: Iterable[Identified]) -> None:
        self._parent: dict[str, str] = {}
        self._rank: dict[str, int] = {}
        for patient in found:
            if patient.hash:
                rank = SOURCES.index(patient.source)
                self._rank[patient.hash] = min(rank, self._rank.get(patient.hash, rank))

    def name_of(self, patient: str) -> str:
        """The patient after whom the set of this one is named."""
        while patient in self._parent:
            patient = self._parent[patient]
        return patient

    def join(self, one: str, other: str) -> None:
        """Join the sets of two patients."""
        one, other = self.name_of(one), self.name_of(other)
        if one != other:
            first, second = sorted((one, other), key=lambda name: (self._place(name), name))
            self._parent[second] = first

    def _place(self, patient: str) -> int:
        return self._rank.get(patient, len(SOURCES))


def hash_of_patient_id(patient_id: str, key: bytes | None) -> str:
    """The keyed hash of a PatientID.

    Args:
        patient_id: identifier as a header or a side-car holds it.
        key: secret of the keyed hashes; None where no hash is wanted.
    Returns:
        16 hex digits; empty without a key, and where the identifier is a stand-in.
    """
    if not key or is_stand_in(patient_id):
        return ""
    return keyed_hash(key, canonical_id(patient_id))


def check_regex(regex: str | None) -> None:
    """Raise UserError where a patient regex is not a regular expression or has no group."""
    if regex is None:
        return
    try:
        num_groups = re.compile(regex).groups
    except re.error as error:
        raise UserError(f"patient regex '{regex}' is not valid: {error}") from error
    if num_groups < 1:
        raise UserError(
            f"patient regex '{regex}' has no group; put parentheses around the part that "
            "identifies the patient"
        )


def parse_patient_from(text: str | None) -> tuple[int, bool]:
    """The folder number of `--patient-from folder:N`, and whether it is `--patient-from header`.

    Raises:
        UserError: it is neither.
    """
    if text is None:
        return 0, False
    if text == "header":
        return 0, True
    match = re.fullmatch(r"folder:([1-9]\d?)", text)
    if match is None:
        raise UserError(
            f"--patient-from {text}: rule: folder:N, where folder 1 is the first one below the "
            "archive, or header"
        )
    return int(match[1]), False
