"""Slices become scans: put together over all folders, split where stacks lie in each other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scan_files import make_ct, write_series

from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest, Row
from tapct.data.packed import pack
from tapct.data.packed.packed_scan import open_packed
from tapct.data.packed.store import packed_file
from tapct.data.readers.dicom_head import TRAITS, Head
from tapct.data.readers.dicom_kind import derivation_from
from tapct.data.scans.ingest import read_volume
from tapct.data.scans.read_rules import ReadRules
from tapct.data.search.discover import find_sources
from tapct.data.search.series import Stack, stacks_of
from tapct.types import Refused

AXES = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def heads(
    places: list[float] | np.ndarray,
    *,
    first: int = 1,
    folder: str = "s",
    axes: tuple[float, ...] = AXES,
    spacing: tuple[float, float] = (0.7, 0.8),
    uid: str = "1.2.3",
    patient: str = "P",
    **traits: str,
) -> list[Head]:
    """Slices at places along their normal; `traits` by the names of the elements."""
    normal = np.cross(axes[:3], axes[3:])
    return [
        Head(
            Path(folder, f"{number:04d}.dcm"),
            patient_id=patient,
            series_uid=uid,
            number=number,
            traits=tuple(traits.get(name, "") for name in TRAITS),
            size=(64, 64),
            spacing=spacing,
            position=tuple((normal * place).tolist()),  # type: ignore[arg-type]
            axes=axes,
        )
        for number, place in enumerate(places, first)
    ]


def shape(stacks: list[Stack]) -> list[tuple[int, str]]:
    """Number of slices and reason of each stack."""
    return sorted((len(stack.heads), stack.reason) for stack in stacks)


def rows_of(root: Path, out: Path, **options: object) -> list[Row]:
    return list(build_manifest(root, out / "m.parquet", min_depth=1, **options).rows)  # type: ignore[arg-type]


def scatter(series: Path, root: Path) -> None:
    """Spread the slices over folders with names that mean nothing, as Orthanc does."""
    for number, file in enumerate(sorted(series.iterdir())):
        place = root / f"{number * 7 % 5:02x}" / f"{number:04x}"
        place.mkdir(parents=True)
        file.rename(place / "f")


def test_a_series_in_hashed_folders_is_one_scan_and_every_file_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scatter(write_series(tmp_path / "s", make_ct()), tmp_path / "a")
    (row,) = rows_of(tmp_path / "a", tmp_path)
    assert (row.status, row.depth, row.path) == ("accepted", 9, row.file_paths and "00/0000/f")
    assert [file[-6:] for file in row.file_paths] == [f"{number:04x}/f" for number in range(9)]
    manifest = Manifest.read(tmp_path / "m.parquet")
    opened: list[Path] = []
    plain_open = Path.open

    def counted(path: Path, *args: object, **options: object) -> object:
        opened.append(path)
        return plain_open(path, *args, **options)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", counted)
        report = pack.pack(manifest, tmp_path / "store")
    files = [path for path in opened if path.is_relative_to(tmp_path / "a")]
    assert len(files) == len(set(files)) == 9
    array, _ = open_packed(packed_file(tmp_path / "store", report.packed[0]))
    np.testing.assert_array_equal(array[:], make_ct())


def test_a_series_in_two_folders_is_one_scan(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a" / "A", make_ct())
    (tmp_path / "a" / "B").mkdir()
    for file in sorted(series.iterdir())[5:]:
        file.rename(tmp_path / "a" / "B" / file.name)
    (source,) = find_sources(tmp_path / "a")
    assert (source.path.name, len(source.files)) == ("slice000.dcm", 9)
    np.testing.assert_array_equal(read_volume(tmp_path / "a").hu_ZYX, make_ct())


def test_a_copy_of_a_series_is_a_duplicate_and_overlapping_copies_are_one_scan(
    tmp_path: Path,
) -> None:
    series = write_series(tmp_path / "a" / "A", make_ct())
    shutil.copytree(series, tmp_path / "a" / "B")
    rows = rows_of(tmp_path / "a", tmp_path)
    assert [(row.path, row.reason) for row in rows] == [("A", ""), ("B", "duplicate")]
    for number in range(3):
        (series / f"slice{number:03d}.dcm").unlink()
        (tmp_path / "a" / "B" / f"slice{8 - number:03d}.dcm").unlink()
    rows = rows_of(tmp_path / "a", tmp_path)
    assert [(len(row.file_paths), row.reason, row.depth) for row in rows] in (
        [(3, "duplicate", 0), (9, "", 9)],
        [(9, "", 9), (3, "duplicate", 0)],
    )


def test_slices_without_series_uid_are_one_scan_or_one_refused_row(tmp_path: Path) -> None:
    no_uid = {"SeriesInstanceUID": None, "StudyInstanceUID": None, "PatientID": None}
    write_series(tmp_path / "a" / "s", make_ct(), edit=lambda i: no_uid)
    (row,) = rows_of(tmp_path / "a", tmp_path)
    assert (row.status, row.depth, row.marks) == ("accepted", 9, "no_series_uid")
    (tmp_path / "a" / "s" / "slice004.dcm").unlink()
    (row,) = rows_of(tmp_path / "a", tmp_path)
    assert (row.reason, len(row.file_paths)) == ("no_series_uid", 8)


def test_slices_without_any_uid_in_hashed_folders_are_no_scans() -> None:
    scattered = [head for z in range(9) for head in heads([z], folder=f"s/{z}", uid="")]
    assert {stack.reason for stack in stacks_of(scattered)} == {"no_series_uid"}


def test_a_series_is_not_shared_by_two_patients() -> None:
    both = heads(range(9), patient="A", folder="a") + heads(range(9), patient="B", folder="b")
    assert shape(stacks_of(both)) == [(9, ""), (9, "")]


def test_a_series_whose_patient_changes_is_refused_as_a_whole() -> None:
    halves = heads(range(20), patient="A1") + heads(range(20, 40), first=21, patient="A2")
    assert shape(stacks_of(halves)) == [(40, "mixed_patients")]
    in_turn = [replace(head, patient_id=f"A{head.number % 2}") for head in heads(range(40))]
    assert shape(stacks_of(in_turn)) == [(40, "mixed_patients")]
    one_form = [replace(head, patient_id=["a07", "A7 "][head.number % 2]) for head in in_turn]
    assert shape(stacks_of(one_form)) == [(40, "")]
    some_without = [replace(head, patient_id="A" * (head.number % 2)) for head in in_turn]
    assert shape(stacks_of(some_without)) == [(40, "")]
    three = [replace(head, patient_id="A" * (1 + (head.number in (7, 8, 9)))) for head in in_turn]
    assert all(reason for _, reason in shape(stacks_of(three[:20] + three[21:])))
    studies = [replace(head, study_uid=f"1.{head.patient_id}") for head in halves]
    assert shape(stacks_of(studies)) == [(20, ""), (20, "")]


@pytest.mark.parametrize("trait", ["ImageType", "ConvolutionKernel", "KVP", "AcquisitionNumber"])
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5, 5.0])
def test_two_stacks_in_each_other_are_two_scans(trait: str, shift: float) -> None:
    """A shift by half a step looks like one stack with half the step."""
    places = 5.0 * np.arange(12)
    first = heads(places, **{trait: "1"})
    second = heads(places + shift, first=100, **{trait: "2"})
    assert shape(stacks_of(first + second)) == [(12, ""), (12, "")]


def test_two_kernels_of_two_phases_are_four_scans() -> None:
    slices: list[Head] = []
    for kernel in "AB":
        for phase in "12":
            slices += heads(
                range(8), first=len(slices) + 1, ConvolutionKernel=kernel, AcquisitionNumber=phase
            )
    assert shape(stacks_of(slices)) == [(8, "")] * 4


@pytest.mark.parametrize("order", ["phase by phase", "place by place", "down, then up"])
def test_phases_that_only_the_instance_number_separates_are_scans(order: str) -> None:
    up = [5.0 * place for place in range(10)]
    places = {
        "phase by phase": up + up,
        "place by place": [place for place in up for _ in range(2)],
        "down, then up": up[::-1] + up,
    }[order]
    assert shape(stacks_of(heads(places))) == [(10, ""), (10, "")]


def test_acquisitions_one_behind_the_other_stay_one_scan() -> None:
    """Sequential scanners number each turn of the gantry."""
    slices = [
        head
        for z in range(20)
        for head in heads([z], first=z + 1, AcquisitionNumber=str(z // 4), AcquisitionTime=str(z))
    ]
    assert shape(stacks_of(slices)) == [(20, "")]
    del slices[10]
    assert shape(stacks_of(slices)) == [(19, "missing_slices")]


def test_two_blocks_with_a_gap_are_two_scans_only_where_a_trait_differs() -> None:
    chest, head = np.arange(10.0), 40 + np.arange(12.0)
    blocks = heads(chest, AcquisitionNumber="1") + heads(head, first=50, AcquisitionNumber="2")
    assert shape(stacks_of(blocks)) == [(10, ""), (12, "")]
    assert shape(stacks_of(heads([*chest, *head]))) == [(22, "missing_slices")]


def test_a_stack_survives_scouts_and_bolus_tracking_in_its_series() -> None:
    stack = heads(range(20), AcquisitionNumber="3")
    scout = heads([0], first=90, axes=CORONAL, spacing=(1.0, 1.0))
    bolus = heads([7.0] * 6, first=50, AcquisitionNumber="2")
    planning = heads([7.0], first=40, AcquisitionNumber="1")
    assert shape(stacks_of(stack + scout + bolus + planning)) == [
        (1, "bolus_tracking"),
        (1, "localizer"),
        (6, "bolus_tracking"),
        (20, ""),
    ]


def test_a_slice_that_nothing_separates_from_the_stack_refuses_it() -> None:
    assert shape(stacks_of(heads([*range(9), 4.0]))) == [(10, "duplicate_slices")]


def test_whole_stacks_of_different_orientation_are_scans_of_their_own() -> None:
    both = heads(range(12)) + heads(range(15), first=50, axes=CORONAL)
    assert shape(stacks_of(both)) == [(12, ""), (15, "")]


def test_a_slice_of_unknown_place_refuses_the_stack_that_may_lack_it() -> None:
    slices = heads(range(9))
    lost = Head(Path("s/x.dcm"), "", "", "P", series_uid="1.2.3", size=(64, 64))
    lost = Head(
        **{**{f: getattr(lost, f) for f in Head.__slots__}, "misplaced": ("bad_affine", "x")}
    )
    assert shape(stacks_of([*slices, lost])) == [(10, "bad_affine")]


def test_the_scan_of_a_folder_is_read_in_spite_of_a_scout(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a" / "s", make_ct())
    scout = {
        "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"],
        "ImageOrientationPatient": [*CORONAL],
    }
    write_series(tmp_path / "t", make_ct()[:1], edit=lambda i: dict(scout))
    (tmp_path / "t" / "slice000.dcm").rename(folder / "scout.dcm")
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, make_ct())
    with pytest.raises(Refused, match="localizer"):
        read_volume(folder / "scout.dcm")
    rows = rows_of(tmp_path / "a", tmp_path)
    assert [(row.path, row.reason) for row in rows] == [("s", ""), ("s/scout.dcm", "localizer")]


@pytest.mark.parametrize(
    "image_type",
    [
        r"DERIVED\SECONDARY\MIP",
        r"DERIVED\SECONDARY\AXIAL\MINIP",
        r"DERIVED\SECONDARY\REFORMATTED\AVERAGE",
        r"DERIVED\SECONDARY\MPR\CSA MPR\\CSAPARALLEL",
        r"DERIVED\SECONDARY\PROJECTION IMAGE",
        r"DERIVED\SECONDARY\DE_MATERIAL\IODINE",
        r"DERIVED\PRIMARY\AXIAL\CT_SOM5 SPI DUAL\VNC",
        r"DERIVED\PRIMARY\AXIAL\MAT_SPECIFIC",
        r"DERIVED\SECONDARY\AXIAL\GSI MD WATER",
        r"DERIVED\SECONDARY\SCREEN SAVE",
        r"DERIVED\SECONDARY\OTHER\CT_SOM5 PROT DOSE_INFO",
        r"ORIGINAL\PRIMARY\VOLUME\MAXIMUM MIP",
        r"DERIVED\PRIMARY\VOLUME\STD_DEVIATION",
    ],
)
def test_computed_images_are_recognised(image_type: str) -> None:
    assert derivation_from(image_type, "", AXES)


@pytest.mark.parametrize(
    "image_type, description",
    [
        (r"ORIGINAL\PRIMARY\AXIAL", "Chest MIP and MPR"),
        (r"DERIVED\PRIMARY\AXIAL", "LOW DOSE LUNG SCREEN"),
        (r"DERIVED\SECONDARY\AXIAL", "CALCIUM SCORE"),
        (r"DERIVED\SECONDARY", "Abdomen w iodine"),
        (r"DERIVED\SECONDARY\AXIAL\RESAMPLED", ""),
        (r"ORIGINAL\PRIMARY\AXIAL\CT_SOM5 SPI", ""),
        (r"ORIGINAL\PRIMARY\AXIAL\HELIX", ""),
        (r"ORIGINAL\PRIMARY\VOLUME\NONE", ""),
        (r"DERIVED\PRIMARY\AXIAL\CT_SOM7 SPI DUAL\STD\SNRG\DET_AB", ""),
        ("", ""),
    ],
)
def test_plain_slices_are_not_taken_for_computed_images(image_type: str, description: str) -> None:
    assert derivation_from(image_type, description, AXES) == ""


def test_computed_images_are_recognised_without_a_value_in_image_type() -> None:
    assert derivation_from("", "Thorax MIP", AXES) == "a projection over slices"
    assert derivation_from(r"DERIVED\SECONDARY", "Cor MPR", AXES) == "a reformat"
    assert derivation_from(r"DERIVED\SECONDARY", "", CORONAL) == "a reformat"
    assert derivation_from(r"ORIGINAL\PRIMARY\AXIAL", "", CORONAL) == ""


def test_derived_images_are_refused_in_one_row_or_accepted_with_a_mark(tmp_path: Path) -> None:
    edit = {"ImageType": ["DERIVED", "SECONDARY", "MIP"]}
    folder = write_series(tmp_path / "a" / "s", make_ct(), edit=lambda i: edit)
    (row,) = rows_of(tmp_path / "a", tmp_path)
    assert (row.path, row.reason, row.marks) == ("s", "derived_image", "")
    (row,) = rows_of(tmp_path / "a", tmp_path, accept=ReadRules(derived=True))
    assert (row.status, row.marks) == ("accepted", "derived")
    report = pack.pack(Manifest.read(tmp_path / "m.parquet"), tmp_path / "store")
    assert len(report.packed) == 1
    with pytest.raises(Refused, match="derived_image"):
        read_volume(folder)
    assert read_volume(folder, accept=ReadRules(derived=True)).marks == ("derived",)
