"""What a path shows about whose scan it is: a doubtful name joins scans, a generic one joins no two
folders.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tapct.data.patients.names import bids_subject, guessed_identifier, person_and_visit
from tapct.data.readers import FORMATS

# groups of paths of one person each; no two groups share an identifier
ARCHIVES = {
    "folders of people": (
        ["Meyer/ser2.nii.gz", "Meyer/2019/ct.nii.gz", "Meyer/abdomen.nii.gz"],
        ["Schmidt/ser2.nii.gz", "Schmidt/CT/fu1/lung.nrrd"],
        ["p1/2019/scan.nii.gz", "p1/2021/scan.nii.gz"],
        ["p2/2019/scan.nii.gz", "p2_v2/scan.nii.gz"],
        ["A17/phase1.nii.gz", "A17/phase2.nii.gz"],
        ["B22/phase1.nii.gz"],
        ["s0001/ct.nii.gz"],
        ["1/image.nii.gz", "1/image2.nii.gz"],
        ["Müller Anna/T0/a.nii.gz", "müller_anna_20200101/b.nii.gz"],
    ),
    "CT-RATE": (
        [
            "train/train_1/train_1_a/train_1_a_1.nii.gz",
            "train/train_1/train_1_b/train_1_b_1.nii.gz",
        ],
        ["train/train_2/train_2_a/train_2_a_1.nii.gz"],
        ["valid/valid_1/valid_1_a/valid_1_a_1.nii.gz"],
    ),
    "flat names with endings": (
        [
            "case1.nii.gz",
            *(f"case1_{end}.nii.gz" for end in ("v2", "baseline", "fu1", "20190101", "Eq_1")),
            *(f"case1_{end}.nii.gz" for end in ("0000", "arterial", "lung", "B30f", "1.5mm", "a")),
            "arterial_case1.nii.gz",
            "T0_case1.nii.gz",
            "2019-03-04_case1.nii.gz",
        ],
        ["case12.nii.gz", "case12 (2).nii.gz", "case12 copy.nii.gz"],
        ["Meyer.nii.gz", "Meyer_lung.nii.gz", "20190101_Meyer.nii.gz", "meyer-thorax-B70f.nii.gz"],
        ["0815_2021.nii.gz", "0815_2023.nii.gz", "2019_0815.nii.gz"],
        ["train_1_a_2.nii.gz", "train_1_b_1.nii.gz"],
        ["kits23_case_00001_0000.nii.gz", "case_00001.nii.gz"],
        ["kits23_case_00002_0000.nii.gz"],
        ["LIDC-IDRI-0001_x.nii.gz"],
        ["LIDC-IDRI-0002_x.nii.gz"],
    ),
    "folders of the layout": (
        ["imagesTr/hn_002_0000.nii.gz", "raw/hn_002.nii.gz", "arterial/hn_002.nii.gz"],
        ["imagesTr/hn_004_0000.nii.gz"],
        ["Dataset001_Liver/imagesTr/liver_12_0000.nii.gz", "batch1/liver_12.nii.gz"],
        ["imagesTr/img0001_0000.nii.gz", "imagesTr/img0001_0001.nii.gz"],
        ["imagesTs/img0001_0000.nii.gz"],
        ["imagesTr/img0002_0000.nii.gz"],
        ["label_maps/hn_007.nii.gz", "Label-Maps_Tr/hn_007.nii.gz", "ground truth/hn_007.nii.gz"],
    ),
    "folders with a part of a name of the layout": (
        ["maps/hn_008.nii.gz"],
        ["label_truth/hn_008.nii.gz"],
    ),
    "endings without a separator": (
        ["p77a.nii.gz", "p77b.nii.gz", "P77Arterial.nii.gz", "p77venous.nii.gz", "p77v2.nii.gz"],
        ["Meyer2019.nii.gz", "Meyer2020.nii.gz", "Meyer20200103.nii.gz", "MeyerLung.nii.gz"],
        ["M\u00fcller_1.nii.gz", "Mu\u0308ller_1.nii.gz"],
        ["M\u00dcLLER/ct.nii.gz", "mu\u0308ller/ct2.nii.gz"],
        ["Stra\u00dfe/ct.nii.gz", "STRASSE/ct2.nii.gz"],
        ["P01Arterial.nii.gz", "P01Venous.nii.gz", "P01Phase2.nii.gz", "P01FollowUp.nii.gz"],
        ["case2019.nii.gz"],
        ["case2020.nii.gz"],
        ["00f3a1b4c7d2e55a.nii.gz"],
        ["00f3a1b4c7d2e55b.nii.gz"],
    ),
    "visits without a separator": (
        [
            *(f"case12{end}.nii.gz" for end in ("", "Base", "base", "Baseline", "BASE", "Follow")),
            *(f"case12{end}.nii.gz" for end in ("Fup", "FollowUp", "Follow2", "Pre", "PostOp")),
            *(f"case12{end}.nii.gz" for end in ("V1", "T0", "FU", "BL", "FU2", "Tp2", "Visit2")),
            *(f"case12{end}.nii.gz" for end in ("First", "Last", "Screening", "M06", "Scan2")),
            *(f"case12_{end}.nii.gz" for end in ("first", "second", "staging", "base", "m06")),
        ],
        ["case1.nii.gz", "case1Base.nii.gz", "case1V2.nii.gz"],
        ["case10.nii.gz", "case10Base.nii.gz", "case10V2.nii.gz"],
        ["case120.nii.gz", "case120Follow.nii.gz"],
        ["P001_CT1.nii.gz", "P001_CT2.nii.gz", "P001CT1.nii.gz", "P001CT.nii.gz", "P001S2.nii.gz"],
        ["P0011_CT1.nii.gz", "P0011CT2.nii.gz"],
        ["0012Base.nii.gz", "0012fu.nii.gz", "0012V2.nii.gz"],
        [
            *(f"Meyer{end}.nii.gz" for end in ("", "Base", "FU", "CT", "V2", "_first", "_last")),
            *("Meyer/second/ct.nii.gz", "Meyer/Base/ct.nii.gz"),
        ],
        ["patA.nii.gz", "patAPre.nii.gz", "patABase.nii.gz", "patAV1.nii.gz"],
        ["patB.nii.gz", "patBPost.nii.gz"],
        ["sub03s1.nii.gz", "sub03S2.nii.gz"],
        ["12a.nii.gz", "12b.nii.gz", "12Base.nii.gz"],
    ),
    "names that only look like visits": (
        *([f"site01s{number:02}.nii.gz"] for number in range(4)),
        *([f"LiverCT{number}.nii.gz"] for number in range(4)),
        *([f"KidneyCT_{number:03}.nii.gz"] for number in range(4)),
        *([f"BrainScan{number}.nii.gz"] for number in range(4)),
        *([f"ABT{number}.nii.gz"] for number in range(4)),
        *([f"{name}.nii.gz"] for name in ("Newman", "Basel", "Based", "Prefontaine", "Postman")),
        *([f"{name}.nii.gz"] for name in ("p12ab", "p12x_1", "A1B2", "A1B3", "McBase7", "McBase8")),
    ),
    "numbered modalities": (
        ["CT1/p02.nii.gz", "CT2/p02.nii.gz", "CT2/p02_late.nii.gz", "p02.nii.gz"],
        ["CT1/p03.nii.gz"],
        ["CT3/ser2.nii.gz", "CT3/abdomen.nii.gz", "CT3/Meyer.nii.gz"],
        ["CT4/ser2.nii.gz", "CT4/1.2.840.1.1.1.1/a.nii.gz"],
        ["scan1/p02x.nii.gz", "scan1/q7.nii.gz"],
    ),
    "generic names": (
        ["batch1/ser2.nii.gz", "batch1/scan.nii.gz", "batch1/phase1.nii.gz"],
        ["batch2/ser2.nii.gz", "batch2/IM0001.nii.gz"],
        ["a/ct.nii.gz"],
        ["b/ct.nii.gz"],
        ["CT/image.nii.gz"],
        ["2019/image.nii.gz"],
    ),
}


@pytest.mark.parametrize("layout", ARCHIVES)
def test_scans_of_one_person_share_an_identifier_and_others_do_not(layout: str) -> None:
    groups = ARCHIVES[layout]
    found = [
        {guessed_identifier(Path(path), is_series=False) for path in group} for group in groups
    ]
    assert [len(names) for names in found] == [1] * len(groups), found
    assert len(set.union(*found)) == len(groups), found


def test_generic_names_beside_each_other_are_joined() -> None:
    for name in ("ser2", "phase_1", "IM0001", "scan", "ct", "t0", "2019", "20190101", "ses-01"):
        assert guessed_identifier(Path(f"{name}.nii.gz"), is_series=False) == ""


@pytest.mark.parametrize(
    "suffix", [each for known in FORMATS if not known.is_series for each in known.suffixes]
)
def test_a_folder_that_is_named_after_a_format_is_no_person(suffix: str) -> None:
    folder = suffix.removeprefix(".").removesuffix(".gz")
    paths = [Path(f"{folder}/{name}{suffix}") for name in ("case1", "case2")]
    assert [guessed_identifier(path, is_series=False) for path in paths] == ["case1", "case2"]
    inside = Path(f"Meyer/{folder}/ser2{suffix}")
    assert guessed_identifier(inside, is_series=False) == "meyer"


def test_a_uid_is_one_word() -> None:
    names = [f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{number}.mhd" for number in (1002, 1003)]
    first, second = (guessed_identifier(Path(name), is_series=False) for name in names)
    assert first != second and first.endswith(".1002")


@pytest.mark.parametrize(
    "path, identifier",
    [
        ("p1/2019/IM0001.dcm", "p1"),
        ("p1/2019", "p1"),
        ("dicom/p1/study1/ser3", "p1"),
        ("case7", "case7"),
        ("1.2.840.113619.2.55/1.2.840.113619.2.56", "1.2.840.113619.2.55"),
        ("ser1", "ser1"),
        (".", ""),
    ],
)
def test_of_a_series_the_folders_count(path: str, identifier: str) -> None:
    assert guessed_identifier(Path(path), is_series=True) == identifier


def test_a_subject_of_bids_is_found_in_folders_and_names() -> None:
    assert bids_subject(Path("sub-01/ses-2/ct/sub-01_ses-2_ct.nii.gz")) == "sub-01"
    assert bids_subject(Path("derivatives/x/SUB-01_ct.nii.gz")) == "sub-01"
    assert bids_subject(Path("sub-verse004/ct.nii.gz")) == "sub-verse004"
    assert bids_subject(Path("resub-01/subject1/ct.nii.gz")) == ""


def test_a_visit_below_a_person_is_recognised() -> None:
    for path, person in (
        ("p1/2019/ser3", "p1"),
        ("p1/baseline", "p1"),
        ("dicom/p1/visit2/ser3", "p1"),
        ("export/siteA/s1", ""),
        ("siteA/s1", ""),
        ("p1", ""),
    ):
        assert person_and_visit(Path(path), is_series=True) == person
