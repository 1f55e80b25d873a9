"""`patients.identity` with an object per scan, sets and dicts: slower, larger, and plain to read.
`test_patients_plain` compares the two.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tapct.data.patients.identity import SOURCES, Identified, Known, PatientRules
from tapct.data.patients.key import keyed_hash
from tapct.data.patients.names import bids_subject, guessed_identifier, person_and_visit
from tapct.data.patients.stand_ins import canonical_id
from tapct.types import ScanFacts

Join = Callable[[str, str], None]


@dataclass(frozen=True)
class Read:
    """A scan that could be read, with the patient that the first rule gives."""

    number: int
    scan: Known
    facts: ScanFacts
    patient: str
    source: str


def patients_of(scans: Sequence[Known], rules: PatientRules) -> list[Identified]:
    """As `identity.patients_of`."""
    same = same_for_all(scans, rules)
    found = [
        Read(number, scan, scan.facts, *first_rule(scan, scan.facts, rules, same))
        for number, scan in enumerate(scans)
        if scan.facts is not None
    ]
    rank: dict[str, int] = {}
    for each in found:
        place = SOURCES.index(each.source)
        rank[each.patient] = min(place, rank.get(each.patient, place))
    sets: dict[str, set[str]] = {}

    def join(one: str, other: str) -> None:
        both = sets.get(one, {one}) | sets.get(other, {other})
        sets.update(dict.fromkeys(both, both))

    join_scans(found, rules, join)
    several = join_studies(found, rules, join)
    join_series(found, rules, join)
    near = join_near_copies(found, rules, join)
    result = [Identified()] * len(scans)
    for each in found:
        members = sets.get(each.patient, {each.patient})
        name = min(members, key=lambda member: (rank.get(member, len(SOURCES)), member))
        clues = each.facts.clues
        result[each.number] = Identified(
            name,
            each.source,
            clues.has_stand_in or each.facts.patient in same,
            clues.study in several,
            each.number in near,
            each.patient,
        )
    return result


def guess(scan: Known, rules: PatientRules) -> str:
    """The hash of the identifier that the names on the path suggest."""
    name = guessed_identifier(scan.path.relative_to(rules.root), is_series=scan.is_series)
    return hash_of(rules, name or rules.root.resolve().name)


def hash_of(rules: PatientRules, name: str) -> str:
    """The hash of an identifier."""
    return keyed_hash(rules.key, canonical_id(name) or name)


def same_for_all(scans: Sequence[Known], rules: PatientRules) -> set[str]:
    """The one PatientID of several studies."""
    with_id = [(scan, scan.facts) for scan in scans if scan.facts and scan.facts.patient]
    ids = {facts.patient for _, facts in with_id}
    studies = {facts.clues.study or guess(scan, rules) for scan, facts in with_id}
    is_same = len(ids) == 1 and len(studies) > 1 and not rules.trusts_header
    return ids if is_same else set()


def first_rule(
    scan: Known, facts: ScanFacts, rules: PatientRules, same: set[str]
) -> tuple[str, str]:
    """The patient by the first rule that applies, and the rule."""
    return next(
        (patient, source) for patient, source in all_rules(scan, facts, rules, same) if patient
    )


def all_rules(
    scan: Known, facts: ScanFacts, rules: PatientRules, same: set[str]
) -> Iterator[tuple[str, str]]:
    """The patient by each rule in its turn; empty where it does not apply."""
    relative = scan.path.relative_to(rules.root)
    column = rules.column.get(relative.as_posix(), "")
    yield hash_of(rules, column) if column else "", "column"
    folders = relative.parts if scan.is_series else relative.parts[:-1]
    is_deep = 0 < rules.folder <= len(folders)
    yield hash_of(rules, folders[rules.folder - 1]) if is_deep else "", "folder"
    own = "" if facts.patient in same else facts.patient
    yield own if facts.clues.patient_from == "header" else "", "header"
    match = re.search(rules.regex, relative.as_posix()) if rules.regex and not own else None
    yield hash_of(rules, match[1]) if match and match[1] else "", "regex"
    subject = bids_subject(relative)
    yield hash_of(rules, subject) if subject else "", "bids"
    yield own, "side_car"
    yield facts.clues.study, "study"
    yield guess(scan, rules), "guess"


def sure_rules(rules: PatientRules) -> tuple[str, ...]:
    """Rules whose patients stay apart."""
    return ("column", "folder", *(("header", "side_car") if rules.trusts_header else ()))


def join_scans(found: Sequence[Read], rules: PatientRules, join: Join) -> None:
    """Copies, numbered stand-ins, and folders of one person."""
    pseudonyms = {each.facts.clues.pseudonym for each in found} - {""}
    by_guess: dict[str, set[str]] = defaultdict(set)
    for each in found:
        for other in found:
            pseudonym = each.facts.clues.pseudonym
            is_one = pseudonym == other.facts.clues.pseudonym != "" and len(pseudonyms) > 1
            if is_one or each.scan.digest == other.scan.digest != "":
                join(each.patient, other.patient)
        if each.source in ("header", "bids", "side_car", "study"):
            by_guess[guess(each.scan, rules)].add(each.patient)
        relative = each.scan.path.relative_to(rules.root)
        is_visit = person_and_visit(relative, is_series=each.scan.is_series)
        if each.source == "study" and is_visit:
            join(guess(each.scan, rules), each.patient)
    for each in found:
        if each.source == "guess" and len(by_guess[each.patient]) == 1:
            join(*by_guess[each.patient], each.patient)


def join_studies(found: Sequence[Read], rules: PatientRules, join: Join) -> set[str]:
    """Patients of one study; the studies with several identifiers."""
    several = set()
    for study in {each.facts.clues.study for each in found} - {""}:
        of_study = [each for each in found if each.facts.clues.study == study]
        named = {each.patient for each in of_study if each.source in sure_rules(rules)}
        without = {each.patient for each in of_study if each.source == "study"}
        rest = [e for e in of_study if e.source not in (*sure_rules(rules), "study")]
        members = {each.patient for each in rest}
        if len(named) == 1:
            members |= named
        if len(members) > 1:
            several.add(study)
        if len(named) < 2:
            members |= without
        for one in members:
            for other in members:
                join(one, other)
    return several


def join_series(found: Sequence[Read], rules: PatientRules, join: Join) -> None:
    """Patients of one series where no study separates them."""
    doubtful = [each for each in found if each.source not in sure_rules(rules)]
    all_series = {each.facts.clues.series for each in doubtful} - {""}
    for series in all_series if len(all_series) > 1 else ():
        members = [each for each in doubtful if each.facts.clues.series == series]
        if len({each.facts.clues.study for each in members} - {""}) < 2:
            for other in members:
                join(members[0].patient, other.patient)


def join_near_copies(found: Sequence[Read], rules: PatientRules, join: Join) -> set[int]:
    """Patients of scans that share a hash; the scans that share one with no copy of theirs."""
    owners: dict[bytes, list[Read]] = defaultdict(list)
    for each in found:
        hashes = {each.scan.sketch[at : at + 8] for at in range(0, len(each.scan.sketch), 8)}
        for content in hashes:
            owners[content].append(each)
    near = set()
    for members in owners.values():
        for one, other in zip(members, members[1:]):
            if one.scan.digest != other.scan.digest:
                near |= {one.number, other.number}
            if not {one.source, other.source} <= set(sure_rules(rules)):
                join(one.patient, other.patient)
    return near
