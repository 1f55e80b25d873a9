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
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from tapct.base.exits import UserError
from tapct.data.lazy_rows import LazyRows
from tapct.data.patients import near_copies
from tapct.data.patients.columns import HASH, number_of, pairs_of_equal, roots, unique_rows
from tapct.data.patients.key import keyed_hash
from tapct.data.patients.names import bids_subject, guessed_identifier, person_and_visit
from tapct.data.patients.stand_ins import canonical_id, is_stand_in
from tapct.types import PatientClues, ScanFacts

SOURCES = ("column", "folder", "header", "regex", "bids", "side_car", "study", "guess")
STAND_IN = "patient_stand_in"  # mark of a scan whose PatientID identifies nobody
SEVERAL_IDS = "several_patient_ids"  # mark of the scans of one study with several PatientIDs
NEAR_COPY = "near_copy"  # mark of a scan that has slices of another one
NO_SOURCE = 255  # in place of the number of a rule, where the scan could not be read
_HASH_BYTES = 16
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


class Patients(LazyRows[Identified]):
    """The patients of all scans of an archive, as columns.

    Args:
        hashes, given: keyed hashes, see `columns.HASH`; empty where the scan could not be read.
        sources: numbers of the rules in SOURCES; `NO_SOURCE` where the scan could not be read.
        has_stand_in, has_several_ids, has_near_copy: bool, as in `Identified`.
    """

    def __init__(
        self,
        hashes: np.ndarray,
        given: np.ndarray,
        sources: np.ndarray,
        has_stand_in: np.ndarray,
        has_several_ids: np.ndarray,
        has_near_copy: np.ndarray,
    ) -> None:
        self.hashes, self.given, self.sources = hashes, given, sources
        self.has_stand_in, self.has_several_ids = has_stand_in, has_several_ids
        self.has_near_copy = has_near_copy

    def __len__(self) -> int:
        return len(self.hashes)

    def row(self, i: int) -> Identified:
        """The patient of scan i."""
        number = int(self.sources[i])
        return Identified(
            self.hashes[i].decode(),
            "" if number == NO_SOURCE else SOURCES[number],
            bool(self.has_stand_in[i]),
            bool(self.has_several_ids[i]),
            bool(self.has_near_copy[i]),
            self.given[i].decode(),
        )


class _Clues:
    """What is known of all scans, in some bytes per scan.

    Args:
        scans, rules: as in `patients_of`.
        sketches: without any; gets those of all scans.
    Attributes:
        is_read: bool, whether the scan could be read.
        study, series, pseudonym, digest: `number_of` these texts.
        guess: keyed hash of the identifier that the names on the path suggest.
        given, sources: keyed hash and number of the rule by the first rule that applies.
        has_stand_in: bool, whether the PatientID identifies nobody.
    """

    def __init__(
        self, scans: Iterable[Known], rules: PatientRules, sketches: near_copies.Sketches
    ) -> None:
        self.sketches = sketches
        columns = {name: array("Q") for name in ("study", "series", "pseudonym", "digest")}
        is_read, guesses = bytearray(), bytearray()
        same_for_all = _SameForAll()
        for scan in scans:
            facts, clues = scan.facts, PatientClues() if scan.facts is None else scan.facts.clues
            guess = "" if facts is None else _guess(scan, rules)
            for name in ("study", "series", "pseudonym"):
                columns[name].append(number_of(getattr(clues, name)))
            columns["digest"].append(number_of(scan.digest))
            is_read.append(facts is not None)
            guesses += guess.encode().ljust(_HASH_BYTES, b"\0")
            self.sketches.add(scan.sketch)
            if facts is not None and not rules.trusts_header:
                same_for_all.add(facts.patient, clues.study or guess)
        arrays = [np.frombuffer(column, np.uint64) for column in columns.values()]
        self.study, self.series, self.pseudonym, self.digest = arrays
        self.is_read = np.frombuffer(is_read, bool)
        self.guess = np.frombuffer(guesses, HASH)
        self._find_first_rules(scans, rules, same_for_all.patient)

    def _find_first_rules(
        self, scans: Iterable[Known], rules: PatientRules, same_for_all: str
    ) -> None:
        given, sources, has_stand_in = bytearray(), bytearray(), bytearray()
        is_visit = bytearray()
        for scan, guess in zip(scans, self.guess):
            patient, source = _first_rule(scan, guess.decode(), rules, same_for_all)
            given += patient.encode().ljust(_HASH_BYTES, b"\0")
            sources.append(SOURCES.index(source) if source else NO_SOURCE)
            facts = scan.facts
            is_same = facts is not None and facts.patient != "" and facts.patient == same_for_all
            has_stand_in.append(facts is not None and (facts.clues.has_stand_in or is_same))
            is_visit.append(source == "study" and _is_visit(scan, rules))
        self.given, self.sources = np.frombuffer(given, HASH), np.frombuffer(sources, np.uint8)
        self.has_stand_in = np.frombuffer(has_stand_in, bool)
        self.is_visit = np.frombuffer(is_visit, bool)

    def has_rule(self, names: Iterable[str]) -> np.ndarray:
        """Whether one of some rules gave the patient of each scan; bool."""
        return np.isin(self.sources, [SOURCES.index(name) for name in names])


class _SameForAll:
    """The PatientID that identifies nobody, because all of several studies have the same one.

    Headers and side-cars count together: one patient with two DICOM studies among others with
    side-cars is a patient.
    """

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._studies: set[str] = set()

    def add(self, patient: str, study: str) -> None:
        """Add a scan; two different values of each are enough to know."""
        if patient:
            for known, value in ((self._ids, patient), (self._studies, study)):
                if len(known) < 2:
                    known.add(value)

    @property
    def patient(self) -> str:
        """The PatientID; empty where there is none."""
        is_same = len(self._ids) == 1 and len(self._studies) > 1
        return next(iter(self._ids)) if is_same else ""


def patients_of(
    scans: Iterable[Known], rules: PatientRules, scratch: Path | None = None
) -> Patients:
    """Identify the patients of a whole archive.

    Args:
        scans: all scans of the archive, accepted and refused; they are asked for twice.
        rules: rules of the archive.
        scratch: folder for a temporary file; None for that of the system.
    Returns:
        One patient per scan, in the same order.
    """
    with near_copies.Sketches(scratch) as sketches:
        clues = _Clues(scans, rules, sketches)
        joined = _Joined(clues.given, clues.sources)
        _join_scans(clues, joined.join)
        several = _join_studies(clues, rules, joined.join)
        _join_series(clues, rules, joined.join)
        has_near_copy = _join_near_copies(clues, rules, joined.join)
    has_several_ids = clues.is_read & np.isin(clues.study, several)
    return Patients(
        *(joined.names(), clues.given, clues.sources),
        *(clues.has_stand_in, has_several_ids, has_near_copy),
    )


def _first_rule(scan: Known, guess: str, rules: PatientRules, same_for_all: str) -> tuple[str, str]:
    """The patient of a scan by the first rule that applies to it, and the name of the rule; both
    are empty where the scan could not be read.

    Args:
        scan: scan.
        guess: `_guess` of it.
        rules: rules of the archive.
        same_for_all: PatientID that identifies nobody, or empty.
    """
    if scan.facts is None:
        return "", ""
    relative = scan.path.relative_to(rules.root)
    clues = scan.facts.clues
    in_column = rules.column.get(relative.as_posix(), "")
    if in_column:
        return _hash_of_name(rules, in_column), "column"
    folders = relative.parts if scan.is_series else relative.parts[:-1]
    if 0 < rules.folder <= len(folders):
        return _hash_of_name(rules, folders[rules.folder - 1]), "folder"
    from_id = "" if scan.facts.patient == same_for_all else scan.facts.patient
    if from_id and clues.patient_from == "header":
        return from_id, "header"
    match = re.search(rules.regex, relative.as_posix()) if rules.regex and not from_id else None
    if match and match[1]:
        return _hash_of_name(rules, match[1]), "regex"
    subject = bids_subject(relative)
    if subject:
        return _hash_of_name(rules, subject), "bids"
    if from_id:
        return from_id, "side_car"
    if clues.study:
        return clues.study, "study"
    return guess, "guess"


def _is_visit(scan: Known, rules: PatientRules) -> bool:
    """Whether the names on a scan's path are those of a person and of a visit."""
    relative = scan.path.relative_to(rules.root)
    return bool(person_and_visit(relative, is_series=scan.is_series))


def _guess(scan: Known, rules: PatientRules) -> str:
    """The keyed hash of the identifier that the names on a scan's path suggest."""
    relative = scan.path.relative_to(rules.root)
    name = guessed_identifier(relative, is_series=scan.is_series)
    return _hash_of_name(rules, name or rules.root.resolve().name)


def _hash_of_name(rules: PatientRules, name: str) -> str:
    """The keyed hash of an identifier, however it is written."""
    return keyed_hash(rules.key, canonical_id(name) or name)


Join: TypeAlias = Callable[[np.ndarray, np.ndarray], None]


def _join_scans(clues: _Clues, join: Join) -> None:
    """Join the patients of scans that must be of one person.

    Args:
        clues: what is known of all scans.
        join: function that joins patients of one array with those of another one, one by one.
    """
    given = clues.given
    # copies, in whatever format and under whatever name
    columns = [clues.digest]
    # one number for all identifies nobody; several may count patients
    if len(np.unique(clues.pseudonym[clues.is_read & (clues.pseudonym != 0)])) > 1:
        columns.append(clues.pseudonym)
    for column in columns:
        one, other = pairs_of_equal(column, clues.is_read)
        join(given[one], given[other])
    join(clues.guess[clues.is_visit], given[clues.is_visit])
    # the folder of one known patient; a folder of several is not a person
    is_known = clues.has_rule(("header", "bids", "side_car", "study"))
    guesses, patients = unique_rows(clues.guess[is_known], given[is_known])
    folders, first, counts = np.unique(guesses, return_index=True, return_counts=True)
    guessed = np.unique(given[clues.has_rule(("guess",))])
    places = np.searchsorted(folders, guessed)
    places[places == len(folders)] = 0
    if len(folders):
        is_person = (folders[places] == guessed) & (counts[places] == 1)
        join(patients[first[places[is_person]]], guessed[is_person])


def _sure(rules: PatientRules) -> tuple[str, ...]:
    """Rules whose patients are right, whatever the studies and voxels show."""
    return (*_BY_USER, "header", "side_car") if rules.trusts_header else _BY_USER


def _join_studies(clues: _Clues, rules: PatientRules, join: Join) -> np.ndarray:
    """Join the patients of one study, whatever their identifiers.

    Patients that the user named for each scan stay apart, and so do several PatientIDs
    where the user trusts them.

    Args:
        clues, join: as in `_join_scans`.
        rules: rules of the archive.
    Returns:
        Numbers of the studies of which several identifiers were joined.
    """
    has_study = clues.is_read & (clues.study != 0)
    # 0: named by the user, 1: doubtful, 2: without an identifier
    sort = np.where(clues.has_rule(("study",)), 2, 1)
    sort[clues.has_rule(_sure(rules))] = 0
    studies, sorts, patients = unique_rows(
        clues.study[has_study], sort[has_study], clues.given[has_study]
    )
    names, starts, counts = np.unique(studies, return_index=True, return_counts=True)
    several: list[int] = []
    pairs: list[tuple[bytes, bytes]] = []
    for study, start, count in zip(names, starts, counts):
        if count < 2:
            continue
        of_study = slice(start, start + count)
        named, doubtful, without_id = (
            patients[of_study][sorts[of_study] == number].tolist() for number in range(3)
        )
        members = doubtful
        if len(named) == 1:
            members = sorted({*named, *doubtful})
        if len(members) > 1:
            several.append(int(study))
        if len(named) < 2:
            members = members + without_id
        pairs += [(members[0], other) for other in members[1:]]
    joined = np.array(pairs, HASH).reshape(-1, 2)
    join(joined[:, 0], joined[:, 1])
    return np.array(several, np.uint64)


def _join_series(clues: _Clues, rules: PatientRules, join: Join) -> None:
    """Join the patients of one series where no study separates them.

    Some anonymisation software gives all series one UID, so series of different studies and a UID
    that all series have join nobody.

    Args:
        clues, rules, join: as in `_join_studies`.
    """
    is_in = clues.is_read & (clues.series != 0) & ~clues.has_rule(_sure(rules))
    if len(np.unique(clues.series[is_in])) < 2:
        return
    has_study = is_in & (clues.study != 0)
    series, _ = unique_rows(clues.series[has_study], clues.study[has_study])
    names, counts = np.unique(series, return_counts=True)
    is_in &= ~np.isin(clues.series, names[counts > 1])
    one, other = pairs_of_equal(clues.series, is_in)
    join(clues.given[one], clues.given[other])


def _join_near_copies(clues: _Clues, rules: PatientRules, join: Join) -> np.ndarray:
    """Join the patients of scans that share slices, unless the user named both of them.

    Args:
        clues, rules, join: as in `_join_studies`.
    Returns:
        bool: whether a scan shares slices with a scan that is no whole copy of it.
    """
    one, other = clues.sketches.pairs().T
    is_read = clues.is_read[one] & clues.is_read[other]
    one, other = one[is_read], other[is_read]
    has_near_copy = np.zeros(len(clues.given), bool)
    differ = clues.digest[one] != clues.digest[other]
    has_near_copy[one[differ]] = has_near_copy[other[differ]] = True
    is_sure = clues.has_rule(_sure(rules))
    is_joined = ~(is_sure[one] & is_sure[other])
    join(clues.given[one[is_joined]], clues.given[other[is_joined]])
    return has_near_copy


class _Joined:
    """Sets of patients that are one; each is named after the member that the best rule gave.

    Args:
        given, sources: as in `_Clues`.
    """

    def __init__(self, given: np.ndarray, sources: np.ndarray) -> None:
        self._given, self._sources = given, sources
        self._ones, self._others = [np.empty(0, HASH)], [np.empty(0, HASH)]

    def join(self, ones: np.ndarray, others: np.ndarray) -> None:
        """Join the sets of patients of one array with those of another one, one by one."""
        differ = ones != others
        self._ones.append(ones[differ])
        self._others.append(others[differ])

    def names(self) -> np.ndarray:
        """The patient after whom the set of each scan's patient is named; empty without one."""
        ones, others = np.concatenate(self._ones), np.concatenate(self._others)
        if not len(ones):
            return self._given
        members = np.unique(np.concatenate([ones, others]))
        is_member = np.isin(self._given, members)
        places = np.searchsorted(members, self._given[is_member])
        ranks = np.full(len(members), len(SOURCES), np.uint8)
        np.minimum.at(ranks, places, self._sources[is_member])
        # in the order of the rules, so that the first member of a set is its name
        order = np.lexsort((members, ranks))
        place_of = np.empty(len(members), np.int64)
        place_of[order] = np.arange(len(members))
        pairs = (place_of[np.searchsorted(members, each)] for each in (ones, others))
        root = roots(len(members), *pairs)
        names = self._given.copy()
        names[is_member] = members[order][root[place_of[places]]]
        return names


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
