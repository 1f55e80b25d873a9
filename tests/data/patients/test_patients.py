"""Two scans of one person are never two patients where a file or a name shows it; a stand-in for an
identifier is none.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scan_files import make_ct, noise_ct, save_scan, write_series
from shell import Shell
from shell import shell as shell  # a fixture

from tapct.base.exits import UserError
from tapct.data.index.build import build_manifest
from tapct.data.index.patient_report import lines_about_patients
from tapct.data.manifest import Row, RowTable, rows_as_table
from tapct.data.patients.identity import (
    SEVERAL_IDS,
    STAND_IN,
    Identified,
    Known,
    PatientRules,
    patients_of,
)
from tapct.data.patients.stand_ins import canonical_id, is_stand_in, numbered_stand_in
from tapct.data.patients.table import patients_from_table
from tapct.data.readers.raw import Header
from tapct.data.scans.headers import facts_of, merge_sidecar
from tapct.types import ScanFacts

KEY = b"k" * 16
ROOT = Path("/archive")


def known(path: str, digest: str = "", side_car: str | None = None, **header: str) -> Known:
    """A scan with these fields in its header, or a PatientID in its side-car."""
    if side_car is None:
        facts = facts_of(Header(**header), KEY)
    else:
        facts = facts_of(Header(patient_id=side_car), KEY, "side_car")
    return Known(ROOT / path, "." not in path, facts, digest)


def identified(*scans: Known, **rules: object) -> tuple[str, list[str]]:
    """Patients as letters in the order in which they appear, and the rule of each scan."""
    found = patients_of(scans, PatientRules(ROOT, KEY, **rules))  # type: ignore[arg-type]
    letters: dict[str, str] = {}
    for patient in found:
        letters.setdefault(patient.hash, "abcdefgh"[len(letters)])
    return "".join(letters[patient.hash] for patient in found), [each.source for each in found]


def test_the_first_rule_that_applies_identifies_a_scan() -> None:
    groups, sources = identified(
        known("x1", patient_id="P1", study_uid="1"),
        known("x2", patient_id="P1", study_uid="2"),
        known("x3", patient_id="P2", study_uid="3"),
        known("ds/sub-07/ses-1/ct.nii.gz"),
        known("other/sub-07_ct.nii.gz", side_car="whatever"),
        known("x5", study_uid="5"),
        known("y5", study_uid="5"),
        known("z.nii.gz", side_car="P1"),
        known("Meyer/a.nii.gz"),
    )
    assert groups == "aabccddae"
    rules = ["header"] * 3 + ["bids"] * 2 + ["study"] * 2 + ["side_car", "guess"]
    assert sources == rules


def test_options_outrank_what_files_say_as_documented() -> None:
    scans = [
        known("wardA/p1/x1", patient_id="P1"),
        known("wardA/p2/x2", patient_id="P1", study_uid="2"),
        known("wardB/p1/sub-3.nii.gz"),
        known("wardB/p3/x4.nii.gz"),
    ]
    assert identified(*scans, folder=2) == ("abac", ["folder"] * 4)
    # one PatientID for all studies identifies nobody, so the regex is for all of them
    assert identified(*scans, regex=r"(ward.)") == ("aabb", ["regex"] * 4)
    table = {"wardA/p1/x1": "one", "wardB/p3/x4.nii.gz": "one"}
    groups, sources = identified(*scans, column=table)
    assert groups[0] == groups[3] and (sources[0], sources[3]) == ("column", "column")
    assert sources[2] == "bids"


def test_a_regex_is_for_scans_without_a_patient_id() -> None:
    groups, sources = identified(
        known("x/P1/a", patient_id="Q7"),
        known("x/P1/b", patient_id="Q8"),
        known("y/P1/c.nii.gz"),
        known("y/P1/sub-1.nii.gz"),
        known("y/none.nii.gz"),
        regex=r"/(P\d+)/",
    )
    assert (groups, sources) == ("abccd", ["header", "header", "regex", "regex", "guess"])


@pytest.mark.parametrize("text", ["REMOVED", "ANONYMOUS", "Anon^", "0", "000000", "xxx", "", "n/a"])
def test_stand_ins_are_no_identifier(text: str) -> None:
    assert is_stand_in(text)
    groups, sources = identified(
        known("one", patient_id=text, study_uid="1"),
        known("two", patient_id=text, study_uid="2"),
        known("third", patient_id="P3", study_uid="3"),
        known("fourth.nii.gz", side_car=text),
    )
    assert (groups, sources) == ("abcd", ["study", "study", "header", "guess"])


def test_words_of_anonymisation_software_are_stand_ins_and_identifiers_are_not() -> None:
    for text in (
        *("De-Identified", "DEIDENTIFIED", "anonymized patient", "REDACTED", "Unknown", "None"),
        *("no id", "---", "???", "9999", "X", "patient", "Patient ID", "Dummy 1"),
    ):
        assert is_stand_in(text), text
    for text in (
        "P-007",
        "1",
        "12",
        "999",
        "0815",
        "123456",
        "A",
        "LIDC-IDRI-0001",
        "Meyer",
        "PHANTOM-0-3",
    ):
        assert not is_stand_in(text), text


def test_an_identifier_that_all_studies_have_identifies_nobody() -> None:
    scans = [known(f"p{n}/x", patient_id="Hospital", study_uid=f"{n}") for n in range(3)]
    assert identified(*scans) == ("abc", ["study"] * 3)
    assert identified(*scans, trusts_header=True) == ("aaa", ["header"] * 3)
    one_study = [known(f"s{n}", patient_id="P1", study_uid="1") for n in range(3)]
    assert identified(*one_study) == ("aaa", ["header"] * 3)
    side_cars = [known(f"case{n}.nii.gz", side_car="Hospital") for n in range(3)]
    assert identified(*side_cars) == ("abc", ["guess"] * 3)
    assert identified(*side_cars, known("case9.nii.gz", side_car="P1"))[0] == "aaab"
    mixed = [known(f"a{n}/x", patient_id="P1", study_uid=f"{n}") for n in range(2)]
    mixed.append(known("case9.nii.gz", side_car="P2"))
    assert identified(*mixed) == ("aab", ["header"] * 2 + ["side_car"]), "two studies of a patient"
    follow_ups = [known(f"Meyer/{n}/x", patient_id="P1", study_uid=f"{n}") for n in (2019, 2020)]
    assert identified(*follow_ups) == ("aa", ["study"] * 2), "one folder, two visits"


FORMS = {
    "leading zeros": ("0815", "815", "00815"),
    "letter case": ("mrn77", "MRN77", "Mrn077"),
    "spaces around it": ("Q9", " Q9", "Q9 ", "Q9\0"),
    "a table of floating-point numbers": ("12", "12.0", "012"),
    "accents": ("M\u00fcller", "Mu\u0308ller", "M\u00dcLLER"),
}


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_one_identifier_written_in_several_forms_is_one_patient(forms: tuple[str, ...]) -> None:
    assert len({canonical_id(form) for form in forms}) == 1
    scans = [
        known(f"x{number}", patient_id=form, study_uid=str(number))
        for number, form in enumerate(forms)
    ]
    groups, _ = identified(*scans, known("y.nii.gz", side_car=forms[1]), known("z", patient_id="R"))
    assert groups == "a" * (len(forms) + 1) + "b"


def test_different_identifiers_stay_different() -> None:
    names = ("P-1", "P-10", "P1", "1.0.1", "1.1", "A", "AA", "1-2", "12", "10", "100", "1.5")
    assert len({canonical_id(name) for name in names}) == len(names)


def test_subjects_that_differ_in_zeros_or_case_are_one() -> None:
    names = ("sub-09/ses-1/ct.nii.gz", "sub-9_ses-2_ct.nii.gz", "SUB-09_x.nii.gz", "sub-90.nii.gz")
    assert identified(*map(known, names))[0] == "aaab"
    table = {"a.nii.gz": "12.0", "b.nii.gz": "12", "c.nii.gz": "13"}
    assert identified(*map(known, table), column=table)[0] == "aab"


@pytest.mark.parametrize("value", [None, True, False, ["x"], {"id": "x"}, ""])
def test_a_value_of_json_that_is_no_text_or_number_is_no_identifier(value: object) -> None:
    merged = merge_sidecar(Header(), {"PatientID": value, "StudyInstanceUID": value})
    assert merged.patient_id == merged.study_uid == ""
    assert merge_sidecar(Header(), {"PatientID": 12.0}).patient_id == "12.0"


def test_one_study_is_one_patient_whatever_the_ids_and_the_rows_are_marked() -> None:
    scans = [
        known("x1", patient_id="K1", study_uid="9"),
        known("x2.nii.gz", study_uid="9", side_car=None, patient_id="K2"),
        known("x3", study_uid="9"),
        known("x4", patient_id="K2", study_uid="8"),
        known("x5", patient_id="K3", study_uid="7"),
    ]
    assert identified(*scans)[0] == "aaaab"
    found = patients_of(scans, PatientRules(ROOT, KEY))
    assert [patient.has_several_ids for patient in found] == [True, True, True, False, False]
    assert identified(*scans, trusts_header=True)[0] == "abcbd"
    table = {"x1": "one", "x2.nii.gz": "two"}
    assert identified(*scans, column=table)[0][:2] == "ab", "the table of the user holds"
    row = Row("1", "a", "dicom", "accepted", marks=f"lossy,{SEVERAL_IDS}", patient_from="header")
    assert lines_about_patients(RowTable(rows_as_table([row, row])))[0].startswith(
        "2 scans have one StudyInstanceUID and several PatientIDs; they count as one patient"
    )


@pytest.mark.parametrize("option, num_patients", [(None, 1), ("header", 2)])
def test_the_index_joins_and_marks_a_study_with_several_ids(
    tmp_path: Path, option: str | None, num_patients: int
) -> None:
    for number in range(2):
        path = tmp_path / "a" / f"x{number}.nii.gz"
        save_scan(path, noise_ct(number))
        clues = {"PatientID": f"K{number}", "StudyInstanceUID": "1.9"}
        path.with_name(f"x{number}.json").write_text(json.dumps(clues))
    rows = build_manifest(tmp_path / "a", tmp_path / "m.parquet", patient_from=option).rows
    assert len({row.patient for row in rows}) == num_patients
    marked = [SEVERAL_IDS in row.marks.split(",") for row in rows]
    assert marked == [num_patients == 1] * 2


def test_one_series_is_one_patient_unless_its_uid_was_copied() -> None:
    one = [known("x", patient_id="A", series_uid="1"), known("y", patient_id="B", series_uid="1")]
    other = known("z", patient_id="C", series_uid="2")
    assert identified(*one, other)[0] == "aab"
    assert identified(*one)[0] == "ab", "one UID for all shows nothing"
    studies = [known(name, patient_id=name, series_uid="1", study_uid=f"1.{name}") for name in "xy"]
    assert identified(*studies, other)[0] == "abc"


def test_a_number_that_looks_like_a_stand_in_joins_its_studies() -> None:
    scans = [known(f"x{n}", patient_id="123456", study_uid=str(n)) for n in range(2)]
    assert identified(*scans, known("y", patient_id="P2"))[0] == "aab"
    assert identified(*scans)[0] == "ab", "all studies have it"


def test_numbered_stand_ins_join_but_do_not_identify() -> None:
    assert numbered_stand_in("ANON0012") and not numbered_stand_in("ANONYMOUS")
    groups, sources = identified(
        known("a", patient_id="ANON1", study_uid="1"),
        known("b", patient_id="ANON2", study_uid="1"),
        known("c", patient_id="ANON2", study_uid="2"),
        known("d", patient_id="ANON3", study_uid="3"),
    )
    assert (groups, sources) == ("aaab", ["study"] * 4)
    same = [known(name, patient_id="ANON1", study_uid=name) for name in "ab"]
    assert identified(*same)[0] == "ab", "one number for all is no number"


def test_copies_and_scans_of_one_study_are_of_one_patient() -> None:
    groups, _ = identified(
        known("x/case1_Eq_1.nii.gz", digest="same"),
        known("y/case7.nii.gz", digest="same"),
        known("y/case7_late.nii.gz", digest="other"),
        known("z1", patient_id="P9", study_uid="4", digest="third"),
        known("z2", study_uid="4"),
        known("w/copy.nii.gz", digest="third"),
    )
    assert groups == "aaabbb"


def test_a_scan_without_an_identifier_joins_the_only_patient_of_its_folder() -> None:
    groups, sources = identified(
        known("Meyer/2019/x", patient_id="P1"),
        known("Meyer/thorax.nii.gz"),
        known("site/x", patient_id="P2"),
        known("site/y", patient_id="P3"),
        known("site/z.nii.gz"),
    )
    assert groups == "aabcd"
    assert sources[1] == sources[4] == "guess"


def test_the_patient_of_a_joined_set_is_the_one_of_the_best_rule() -> None:
    alone = patients_of([known("x", patient_id="P1")], PatientRules(ROOT, KEY))[0]
    guess = known("q/case1.nii.gz", digest="d")
    for scans in (
        [guess, known("x", "d", patient_id="P1")],
        [known("x", "d", patient_id="P1"), guess],
    ):
        assert {each.hash for each in patients_of(scans, PatientRules(ROOT, KEY))} == {alone.hash}


def test_a_scan_that_could_not_be_read_has_no_patient() -> None:
    scan = Known(ROOT / "x.nii.gz", False, None)
    assert patients_of([scan], PatientRules(ROOT, KEY)) == [Identified()]


def test_the_index_prints_what_was_guessed_and_what_is_no_identifier(
    tmp_path: Path, shell: Shell
) -> None:
    for number in range(3):
        for visit in (1, 2):
            path = tmp_path / "a" / f"p{number}" / f"visit{visit}.nii.gz"
            save_scan(path, noise_ct(10 * number + visit))
    path.with_name("visit2.json").write_text(json.dumps({"PatientID": "ANON"}))
    printed = shell.good("index", tmp_path / "a", "--out", tmp_path / "m.parquet", "--workers", 0)
    assert (
        "patients guessed from file names: 6 scans as 3 patients, e.g. p0/visit1.nii.gz and "
        "p0/visit2.nii.gz as one; check, or give --patient-regex / --patient-column\n" in printed
    )
    assert "1 of 6 scans has a PatientID that identifies nobody" in printed
    table = tmp_path / "who.csv"
    table.write_text("path;person\np0;X\np1/visit1;X\np1/visit2.nii.gz;X\np2;Y\n")
    printed = shell.good(
        *("index", tmp_path / "a", "--out", tmp_path / "m.parquet", "--workers", 0),
        *("--patient-column", f"{table}:person"),
    )
    assert "guessed" not in printed
    by_folder = shell.good(
        *("index", tmp_path / "a", "--out", tmp_path / "m.parquet", "--workers", 0),
        *("--patient-from", "folder:1"),
    )
    assert "guessed" not in by_folder


def test_lines_about_patients_count_accepted_scans() -> None:
    rows = [
        Row("1", "a.nii.gz", "nifti", "accepted", patient="x", patient_from="guess"),
        Row("2", "b.nii.gz", "nifti", "refused", patient="x", patient_from="guess"),
        Row("3", "c.nii.gz", "nifti", "accepted", patient="y", patient_from="header"),
        Row("4", "d.nii.gz", "nifti", "accepted", marks=f"lossy,{STAND_IN}", patient_from="study"),
    ]
    stand_in, guess = lines_about_patients(RowTable(rows_as_table(rows)))
    assert stand_in.startswith("1 of 3 scans")
    assert guess.startswith("patients guessed from file names: 1 scan as 1 patient; check")
    assert lines_about_patients(RowTable(rows_as_table(rows[2:3]))) == []


def test_series_without_an_identifier_are_one_patient_per_study(tmp_path: Path) -> None:
    for number, (study, name) in enumerate((("1.5", "A"), ("1.5", "B"), ("1.6", "C"))):
        tags: dict[str, object] = {
            "PatientID": "REMOVED",
            "StudyInstanceUID": study,
            "SeriesInstanceUID": f"1.9.{number}",
        }
        folder = tmp_path / "a" / name
        write_series(folder, make_ct(seed=number), edit=lambda index, tags=tags: tags)
    first, second, third = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert first.patient == second.patient != third.patient
    assert {row.patient_from for row in (first, second, third)} == {"study"}
    assert {row.marks for row in (first, second, third)} == {STAND_IN}


def test_a_table_names_scans_by_path_stem_or_folder(tmp_path: Path) -> None:
    scans = [Path("a/x.nii.gz"), Path("b/x.nii.gz"), Path("b/y.nii.gz"), Path("c/d/z.nrrd")]
    table = tmp_path / "t.csv"
    table.write_text("\ufefffile,age,who\na/x.nii.gz,3,P1\nb/x,4,P2\ny,5,P3\nc\\,6,P4\nelse,1,P5\n")
    assert patients_from_table(f"{table}:who", scans) == {
        "a/x.nii.gz": "P1",
        "b/x.nii.gz": "P2",
        "b/y.nii.gz": "P3",
        "c/d/z.nrrd": "P4",
    }


@pytest.mark.parametrize(
    "content, option, part",
    [
        ("path,who\nx,1\n", "{}:whom", "did you mean who?"),
        ("path,who\nnone,1\n", "{}:who", "none of the 1 rows names one of the 1 scans"),
        ("path,who\nx,1\nx,2\n", "{}:who", "gives x to two patients"),
        ("who\n1\n", "{}:who", "no column that names the scans"),
        ("", "{}:who", "no column 'who'"),
        ("path,who\n", "{}x:who", "cannot read"),
        ("path,who\n", "who", "FILE.csv:COLUMN"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(
    tmp_path: Path, content: str, option: str, part: str
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(content)
    with pytest.raises(UserError) as caught:
        patients_from_table(option.format(table), [Path("x.nii.gz")])
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_source_of_patients_is_one_line(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "x1.nii.gz", noise_ct(1))
    for option in ("folder:0", "folder", "names"):
        with pytest.raises(UserError, match=r"folder:N"):
            build_manifest(tmp_path / "a", tmp_path / "m.parquet", patient_from=option)


def test_facts_without_a_key_identify_nobody() -> None:
    facts = facts_of(Header(patient_id="P1", study_uid="1"), None)
    assert facts == ScanFacts() or (facts.patient == "" and facts.clues.study == "")
    assert np.isnan(facts.age_years)
