"""A known scan keeps its patient when the archive grows, whatever rule identifies it by then.

The truth of the simulated archives is derived from their whole history: two scans are of one
patient if a chain connects them in which neighbours had the same hash by the rules of one day. The
code under test sees the last manifest and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scan_files import noise_ct, save_scan
from shell import Shell
from shell import shell as shell  # a fixture

from tapct.base.exits import UserError
from tapct.data.index import kept_patients
from tapct.data.index.build import build_manifest
from tapct.data.index.kept_patients import KEPT, RULES, KeepRules, ScanPatients
from tapct.data.index.patient_report import lines_about_changes
from tapct.data.manifest import Manifest, Row, write_table
from tapct.data.patients.columns import hashes
from tapct.data.patients.identity import SOURCES, Known, PatientRules, patients_of
from tapct.data.patients.key import KEY_FILE, key_name
from tapct.data.patients.memory import KnownScan, PatientChanges, PatientMemory
from tapct.data.patients.split import position
from tapct.data.readers.raw import Header
from tapct.data.scans.headers import facts_of

KEY, ROOT = b"k" * 16, Path("/archive")
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Scan:
    """One scan of a simulated archive, as it lies there on one day."""

    number: int  # the simulation's name of the scan, which the index does not know
    path: str
    digest: str
    patient_id: str = ""
    study: str = ""
    side_car: bool = False

    def known(self) -> Known:
        header = Header(patient_id=self.patient_id, study_uid=self.study)
        facts = facts_of(header, KEY, "side_car" if self.side_car else "header")
        return Known(ROOT / self.path, "." not in self.path, facts, self.digest)


class Growing:
    """An archive whose files are added, renamed, converted, removed, restored and identified."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.scans: list[Scan] = []
        self.away: list[Scan] = []
        self.count = 0
        self.moved: set[int] = set()  # scans that changed since the last index
        self.one_id = self.draw.random() < 0.3  # software that writes one PatientID for all

    def grow(self) -> None:
        self.moved -= {scan.number for scan in self.scans}
        events = [self.add, self.add, self.rename, self.convert, self.take, self.bring, self.name]
        for _ in range(self.draw.randrange(1, 5)):
            self.draw.choice(events)()

    def add(self) -> None:
        person, visit = self.draw.randrange(6), self.draw.randrange(3)
        patient_id = self.draw.choice(["", "", "REMOVED", f"P{person}", f"ANON{person}"])
        study = self.draw.choice(["", f"1.{person}.{visit}"])
        is_series = self.draw.random() < 0.4
        self.count += 1
        path = f"{self.place(person, visit)}x{self.count}{'' if is_series else '.nii.gz'}"
        if self.one_id and patient_id:
            patient_id = "Hospital"
        digest = f"d{self.count}"
        if self.scans and self.draw.random() < 0.1:  # a copy under another name
            digest = self.draw.choice(self.scans).digest
        self.scans.append(Scan(self.count, path, digest, patient_id, study, not is_series))

    def place(self, person: int, visit: int) -> str:
        layouts = [
            f"case{person}_v{visit}_",
            f"Meyer{chr(97 + person)}/",
            f"p{person}/20{10 + visit}/",
            f"sub-{person}/ses-{visit}/",
            f"batch{visit}/",
            f"imagesTr/liver_{person}_000{visit}_",
        ]
        return self.draw.choice(layouts)

    def at(self) -> int | None:
        return self.draw.randrange(len(self.scans)) if self.scans else None

    def at_unmoved(self) -> int | None:
        """A scan that did not change since the last index: one that is renamed and converted at
        once is unknown, and one that is converted with another PatientID is another person's.
        """
        number = self.at()
        if number is None or self.scans[number].number in self.moved:
            return None
        return number

    def change(self, number: int | None, **fields: object) -> None:
        if number is not None:
            self.scans[number] = replace(self.scans[number], **fields)  # type: ignore[arg-type]
            self.moved.add(self.scans[number].number)

    def rename(self) -> None:
        self.count += 1
        end = self.draw.choice(["", ".nii.gz"])
        place = self.place(self.draw.randrange(6), self.draw.randrange(3))
        self.change(self.at_unmoved(), path=f"{place}y{self.count}{end}")

    def convert(self) -> None:
        self.count += 1
        number = self.at_unmoved()
        if number is None:
            return
        digests = [scan.digest for scan in (*self.scans, *self.away)]
        if digests.count(digests[number]) == 1:  # a converted copy is no copy any more
            self.change(number, digest=f"e{self.count}")

    def take(self) -> None:
        number = self.at()
        if number is not None:
            self.away.append(self.scans.pop(number))

    def bring(self) -> None:
        if self.away:
            self.scans.append(self.away.pop(self.draw.randrange(len(self.away))))

    def name(self) -> None:
        self.one_id = False
        person = self.draw.randrange(6)
        if self.draw.random() < 0.5:
            self.change(self.at_unmoved(), patient_id=f"P{person}")
        else:
            self.change(self.at_unmoved(), study=f"1.{person}.{self.draw.randrange(3)}")


def rules_of(seed: int, day: int, scans: list[Scan]) -> PatientRules:
    """The options of one day: some users give one from some day on."""
    rules = PatientRules(ROOT, KEY)
    if day < seed % 5:
        return rules
    column = {scan.path: f"T{scan.number % 4}" for scan in scans if scan.number % 3 == 0}
    options: list[dict[str, object]] = [
        *({}, {}, {"regex": r"(?:case|liver_|p)(\d+)"}, {"folder": 1}),
        *({"column": column}, {"trusts_header": True}),
    ]
    return replace(rules, **options[seed % 6])  # type: ignore[arg-type]


def indexed(scans: list[Scan], rules: PatientRules) -> tuple[list[Row], list[str]]:
    """The rows by the rules of one day, and the hash that the rule of each scan alone gives."""
    found = patients_of([scan.known() for scan in scans], rules)
    rows = [
        Row(
            hashlib.md5(scan.path.encode()).hexdigest()[:16],
            scan.path,
            "nifti",
            "accepted",
            digest=scan.digest,
            patient=patient.hash,
            patient_from=patient.source,
        )
        for scan, patient in zip(scans, found)
    ]
    return rows, [patient.given for patient in found]


def keep_patients(
    rows: Sequence[Row], given: Sequence[str], older: Manifest, *, split_seed: int = 0
) -> tuple[tuple[Row, ...], PatientMemory, PatientChanges]:
    """The rows with the patients that they had, and what `kept_patients.keep_patients` returns."""
    columns = ScanPatients.of((r.id, r.digest, r.patient, r.patient_from) for r in rows)
    kept, memory, changes = kept_patients.keep_patients(
        columns, hashes(given), older, split_seed=split_seed
    )
    pairs = zip(kept.patients.tolist(), kept.sources.tolist())
    result = tuple(
        replace(each, patient=patient.decode(), patient_from=RULES[source])
        for each, (patient, source) in zip(rows, pairs, strict=True)
    )
    return result, memory, changes


class History:
    """All that was ever known: the scans and the hashes that were equal on some day."""

    def __init__(self) -> None:
        self.beside: dict[object, set[object]] = defaultdict(set)

    def add(self, scans: list[Scan], rows: list[Row], given: list[str]) -> None:
        for scan, row, by_rule in zip(scans, rows, given):
            for end in (
                row.patient,
                by_rule,
                scan.digest,
            ):  # equal voxels are of one person on all days
                self.beside[scan.number].add(end)
                self.beside[end].add(scan.number)

    def connected(self, start: object) -> set[object]:
        """All that a chain connects with a scan."""
        found, edge = {start}, [start]
        while edge:
            for other in self.beside[edge.pop()] - found:
                found.add(other)
                edge.append(other)
        return found


def test_no_known_scan_moves_to_the_test_side_in_simulated_growths() -> None:
    moved_by_rules = num_days = num_joined = num_kept = 0
    sources: set[str] = set()
    for seed in range(120):
        archive, history = Growing(seed), History()
        older = Manifest((), ROOT)
        before: dict[int, str] = {}
        split_seed = seed % 3
        for day in range(8):
            archive.grow()
            scans = archive.scans
            rows, given = indexed(scans, rules_of(seed, day, scans))
            history.add(scans, rows, given)
            kept, memory, changes = keep_patients(rows, given, older, split_seed=split_seed)
            older = Manifest(kept, ROOT, memory=PatientMemory.from_json(memory.to_json()))
            after = {scan.number: row.patient for scan, row in zip(scans, kept)}
            for one in scans:
                people = history.connected(one.number)
                for other in scans:
                    same = other.number in people
                    assert (after[one.number] == after[other.number]) == same, (seed, one, other)
            known_before = set(before.values())
            for scan, row in zip(scans, rows):
                old = before.get(scan.number)
                if old is None:
                    continue
                new = after[scan.number]
                assert new == old or new in known_before, "only a join with a known patient"
                for share in SHARES:
                    was_tested = position(old, split_seed) < share
                    assert was_tested or position(new, split_seed) >= share, (seed, scan)
                    is_tested = position(row.patient, split_seed) < share
                    moved_by_rules += not was_tested and is_tested
                num_joined += new != old
            before |= after
            num_kept += changes.num_kept
            sources |= {row.patient_from for row in rows}
            num_days += 1
    assert sources == set(SOURCES)
    assert num_days == 960 and num_joined > 20 and num_kept > 200
    assert moved_by_rules > 100, "without an older manifest, scans move to the test side"


def row(path: str, digest: str, patient: str, source: str = "guess") -> Row:
    return Row(path, path, "nifti", "accepted", digest=digest, patient=patient, patient_from=source)


def kept(rows: list[Row], older: list[Row], seed: int = 0) -> tuple[list[str], PatientChanges]:
    given = [each.patient for each in rows]
    before = Manifest(tuple(older), ROOT)
    result, _, changes = keep_patients(rows, given, before, split_seed=seed)
    return [each.patient for each in result], changes


def test_a_scan_is_known_by_its_voxels_else_by_its_path() -> None:
    older = [row("a", "1", "P"), row("b", "2", "Q")]
    assert kept([row("a", "2", "X"), row("b", "1", "Y")], older)[0] == ["Q", "P"], "names swapped"
    assert kept([row("a", "9", "X"), row("c", "1", "Y")], older)[0] == ["X", "P"], "a was renamed"
    assert kept([row("a", "9", "X"), row("c", "8", "Y")], older)[0] == ["P", "Y"], "a was converted"


def test_a_file_that_was_replaced_by_another_persons_is_another_patient() -> None:
    older = [row("a", "1", "P", "header")]
    assert kept([row("a", "2", "Q", "header")], older)[0] == ["Q"]
    for source in ("study", "guess", "regex", "column"):
        assert kept([row("a", "2", "Q", source)], older)[0] == ["P"], "doubtful, so they are joined"


def test_the_hash_of_joined_patients_is_held_out_last_whatever_the_order() -> None:
    for seed in range(10):
        older = [row("a", "1", "P"), row("b", "2", "Q"), row("c", "3", "R")]
        last = max("PQR", key=lambda patient: position(patient, seed))
        rows = [row(name, digest, "X", "header") for name, digest in zip("abc", "123")]
        patients, changes = kept(rows, older, seed)
        assert patients == [last] * 3
        assert (changes.num_scans, changes.num_patients, changes.num_kept) == (2, 2, 3)
        assert changes.num_undivided == 0
        (line, kept_line) = lines_about_changes(changes)
        assert line.startswith("2 scans of 2 patients changed patient since the older manifest: ")
        assert f"data.split_seed={seed} " in line and "no training scan became a test scan" in line
        assert kept_line.startswith("3 scans have the patient of the older manifest")


def test_a_known_patient_is_never_divided() -> None:
    older = [row("a", "1", "P"), row("b", "2", "P")]
    rows = [
        row("a", "1", "X", "header"),
        row("b", "2", "Y", "header"),
        row("c", "3", "Y", "header"),
    ]
    patients, changes = kept(rows, older)
    assert patients == ["P"] * 3
    assert changes == PatientChanges(num_kept=3, num_undivided=1)
    assert "1 patient of the older manifest would be divided" in lines_about_changes(changes)[1]


def test_an_index_without_a_scan_does_not_forget_its_patient() -> None:
    older = Manifest((row("a", "1", "P"),), ROOT)
    rows, memory, _ = keep_patients([row("b", "2", "Q")], ["Q"], older)
    assert memory.gone == (KnownScan("a", "1", "P", "guess"),)
    again = Manifest(rows, ROOT, memory=memory)
    rows, memory, _ = keep_patients([row("elsewhere", "1", "X", "header")], "X", again)
    assert rows[0].patient == "P" and rows[0].patient_from == KEPT
    assert dict(memory.same_as) == {"X": "P"}
    # X is known as P from now on, also where no known scan shows it
    only_memory = Manifest((), ROOT, memory=memory)
    rows, _, _ = keep_patients([row("new", "5", "X", "header")], "X", only_memory)
    assert rows[0].patient == "P"


def test_an_identifier_that_was_joined_is_remembered_from_the_first_index_on() -> None:
    first = [row("a", "1", "P", "header")]
    rows, memory, _ = keep_patients(first, ["Q"], Manifest((), ROOT))
    assert rows == tuple(first) and dict(memory.same_as) == {"Q": "P"}
    converted = [row("a", "2", "Q", "header")]
    rows, _, _ = keep_patients(converted, ["Q"], Manifest(rows, ROOT, memory=memory))
    assert rows[0].patient == "P"


def test_nothing_changes_where_nothing_is_new(tmp_path: Path) -> None:
    rows = (row("a", "1", "P"), row("b", "2", "Q", "header"))
    same, memory, changes = keep_patients(rows, "PQ", Manifest(rows, ROOT))
    assert same == rows and changes == PatientChanges() and memory == PatientMemory()
    assert lines_about_changes(changes) == lines_about_changes(None) == []
    for path, content in (("x.parquet", PatientMemory()), ("y.parquet", memory)):
        write_table(Manifest(rows, ROOT, memory=content), tmp_path / path)
    assert (tmp_path / "x.parquet").read_bytes() == (tmp_path / "y.parquet").read_bytes()


def test_a_manifest_keeps_its_memory_and_notices_damage_to_it(tmp_path: Path) -> None:
    memory = PatientMemory((KnownScan("a", "1", "P", "guess"),), {"X": "P"})
    write_table(Manifest((row("b", "2", "Q"),), ROOT, memory=memory), tmp_path / "m.parquet")
    assert Manifest.read(tmp_path / "m.parquet").memory == memory
    table = pq.read_table(tmp_path / "m.parquet")
    metadata = dict(table.schema.metadata)
    metadata[b"tapct.patient_memory"] = PatientMemory(memory.gone).to_json().encode()
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "m.parquet")
    with pytest.raises(UserError, match="was changed"):
        Manifest.read(tmp_path / "m.parquet")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two flat names that are one person, which a side-car shows later; and another person."""
    for number, name in enumerate(("Meyer", "k7", "other")):
        save_scan(tmp_path / "a" / f"{name}.nii.gz", noise_ct(number))
    return tmp_path


def identify(folder: Path) -> None:
    for name, patient in (("Meyer", "0815"), ("k7", "815"), ("other", "P2")):
        (folder / "a" / f"{name}.json").write_text(json.dumps({"PatientID": patient}))


def patients(manifest: Manifest) -> dict[str, str]:
    return {each.path.split(".")[0]: each.patient for each in manifest.rows}


def test_the_index_prints_whose_patient_changed_and_fresh_forgets(
    archive: Path, shell: Shell
) -> None:
    out = archive / "m.parquet"
    command = ("index", archive / "a", "--out", out, "--workers", 0)
    assert "older manifest" not in shell.good(*command)
    first = patients(Manifest.read(out))
    assert "older manifest" not in shell.good(*command)
    identify(archive)
    printed = shell.good(*command, "--split-seed", 4)
    assert "1 scan of 1 patient changed patient since the older manifest: " in printed
    assert "3 scans have the patient of the older manifest (patient_from: kept)" in printed
    second = patients(Manifest.read(out))
    assert second["other"] == first["other"]
    last = max(first["Meyer"], first["k7"], key=lambda patient: position(patient, 4))
    assert second["Meyer"] == second["k7"] == last
    assert {each.patient_from for each in Manifest.read(out).rows} == {KEPT}
    shell.good(*command)
    assert patients(Manifest.read(out)) == second
    printed = shell.good(*command, "--fresh")
    assert "3 scans of 2 patients changed patient since the older manifest: --fresh" in printed
    assert {each.patient_from for each in Manifest.read(out).rows} == {"side_car"}
    assert not set(patients(Manifest.read(out)).values()) & set(first.values())
    assert "give one of them" in shell.bad(*command, "--fresh", "--older", out)


def test_an_older_manifest_elsewhere_is_used_when_it_is_named(archive: Path) -> None:
    first = build_manifest(archive / "a", archive / "m.parquet")
    identify(archive)
    keep = KeepRules(file=archive / "m.parquet")
    second = build_manifest(archive / "a", archive / "n.parquet", keep=keep)
    assert patients(second)["other"] == patients(first)["other"]
    fresh = build_manifest(archive / "a", archive / "o.parquet")
    assert fresh.patient_changes is None and patients(fresh)["other"] != patients(first)["other"]
    for file in (archive / "nothing.parquet", archive / "a" / "k7.json"):
        with pytest.raises(UserError, match="cannot be kept"):
            build_manifest(archive / "a", archive / "n.parquet", keep=KeepRules(file=file))


def test_an_older_manifest_that_cannot_be_used_is_named(archive: Path) -> None:
    out = archive / "m.parquet"
    build_manifest(archive / "a", out)
    (archive / KEY_FILE).write_bytes(b"x" * 16)
    changes = build_manifest(archive / "a", out).patient_changes
    assert changes is not None and "another key" in changes.problem
    assert Manifest.read(out).patient_key == key_name(b"x" * 16)
    (line,) = lines_about_changes(changes)
    assert "cannot be kept" in line and "\n" not in line
    save_scan(archive / "b" / "k7.nii.gz", noise_ct(9))
    changes = build_manifest(archive / "b", out).patient_changes
    assert changes is not None and "was made for another folder" in changes.problem
    out.write_bytes(out.read_bytes()[:-9])
    changes = build_manifest(archive / "b", out).patient_changes
    assert changes is not None and "not a readable Parquet file" in changes.problem


def test_an_archive_that_moved_keeps_its_patients(archive: Path) -> None:
    first = build_manifest(archive / "a", archive / "m.parquet")
    (archive / "a").rename(archive / "elsewhere")
    (archive / "elsewhere" / "k7.nii.gz").rename(archive / "elsewhere" / "Meyer_v2.nii.gz")
    manifest = build_manifest(archive / "elsewhere", archive / "m.parquet")
    (changes,) = [manifest.patient_changes]
    assert changes is not None and not changes.problem
    found, before = patients(manifest), patients(first)
    assert found["other"] == before["other"]
    assert found["Meyer"] == found["Meyer_v2"] in (before["Meyer"], before["k7"])
