"""One multi-frame file with several stacks of slices: each whole stack is a scan of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from scan_files import item, make_ct, write_enhanced

from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store
from tapct.data.scans.ingest import read_volume
from tapct.data.search.frame_numbers import with_frames, without_frames
from tapct.types import Refused

NUM = 9  # slices of each stack
Edit = Callable[[Dataset, int, int], None]  # groups of a frame, number of its stack, its slice


def content(groups: Dataset, **values: object) -> None:
    for name, value in values.items():
        setattr(groups.FrameContentSequence[0], name, value)


def at(groups: Dataset, *position: float) -> None:
    groups.PlanePositionSequence[0].ImagePositionPatient = list(position)


def by_stack_id(groups: Dataset, stack: int, place: int) -> None:
    at(groups, -10, -20, 100 + 2 * place)
    content(groups, StackID=str(stack + 1))


def by_acquisition(groups: Dataset, stack: int, place: int) -> None:
    at(groups, -10, -20, 100 + 2 * place + stack)
    content(groups, FrameAcquisitionNumber=stack + 1)


def by_time(groups: Dataset, stack: int, place: int) -> None:
    at(groups, -10, -20, 100 + 2 * place)
    content(groups, TemporalPositionIndex=stack + 1)


def by_gap(groups: Dataset, stack: int, place: int) -> None:
    at(groups, -10, -20, 100 + 2 * place + 100 * stack)
    content(groups, StackID=str(stack + 1))


def by_orientation(groups: Dataset, stack: int, place: int) -> None:
    axes = [1, 0, 0, 0, 1, 0] if stack == 0 else [1, 0, 0, 0, 0.98, 0.199]
    normal = np.cross(axes[:3], axes[3:])
    at(groups, *(np.array([-10, -20, 100]) + 2.0 * place * normal))
    oriented = item(PlaneOrientationSequence={"ImageOrientationPatient": axes})
    groups.PlaneOrientationSequence = oriented.PlaneOrientationSequence


def write(path: Path, edit: Edit, *, extra: Callable[[Dataset], None] | None = None) -> np.ndarray:
    """A file of two stacks whose frames are mixed; the HU of both, (2, Z, Y, X)."""
    hu_ZYX = make_ct((2 * NUM, 24, 26), seed=4)

    def change(dataset: Dataset) -> None:
        for groups in dataset.PerFrameFunctionalGroupsSequence:
            place = groups.FrameContentSequence[0].InStackPositionNumber - 1
            edit(groups, place // NUM, place % NUM)
        if extra is not None:
            extra(dataset)

    write_enhanced(path, hu_ZYX, change)
    return hu_ZYX.reshape(2, NUM, 24, 26)


@pytest.mark.parametrize("edit", [by_stack_id, by_acquisition, by_time, by_gap, by_orientation])
def test_each_whole_stack_is_a_scan(tmp_path: Path, edit: Edit) -> None:
    hu_SZYX = write(tmp_path / "a" / "e.dcm", edit)
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    assert [row.reason for row in built.rows] == ["", ""]
    assert len({row.id for row in built.rows}) == 2
    assert {row.file_paths for row in built.rows} == {("e.dcm",)}
    numbers = [without_frames(row.path)[1] for row in built.rows]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 2 * NUM + 1))
    pack(Manifest.read(tmp_path / "m.parquet"), tmp_path / "store")
    held = Store(tmp_path / "store")
    found = [read_volume(tmp_path / "a" / row.path).hu_ZYX for row in built.rows]
    for hu_ZYX in hu_SZYX:
        assert any(np.array_equal(hu_ZYX, other) for other in found)
    for row, hu_ZYX in zip(built.rows, found):
        np.testing.assert_array_equal(held.read(held.index_of(row.id)), hu_ZYX)
    with pytest.raises(Refused, match="holds 2 stacks of slices; give one of them, such as e.dcm#"):
        read_volume(tmp_path / "a" / "e.dcm")


def test_frames_that_belong_to_no_stack_are_listed(tmp_path: Path) -> None:
    def scout(dataset: Dataset) -> None:
        for groups in dataset.PerFrameFunctionalGroupsSequence:
            if groups.FrameContentSequence[0].InStackPositionNumber == 2 * NUM:
                groups.CTImageFrameTypeSequence = Sequence([Dataset()])
                groups.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    hu_SZYX = write(tmp_path / "a" / "e.dcm", by_stack_id, extra=scout)
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    assert sorted((row.reason, row.depth) for row in built.rows) == [
        ("", NUM - 1),  # the last slice of the second stack is the scout
        ("", NUM),
        ("localizer", 0),
    ]
    whole = next(row for row in built.rows if row.depth == NUM)
    volume = read_volume(tmp_path / "a" / whole.path)
    np.testing.assert_array_equal(volume.hu_ZYX, hu_SZYX[0])


def test_one_stack_with_another_number_on_the_way_stays_one_scan(tmp_path: Path) -> None:
    def acquired_twice(dataset: Dataset) -> None:
        for groups in dataset.PerFrameFunctionalGroupsSequence:
            place = groups.FrameContentSequence[0].InStackPositionNumber
            content(groups, FrameAcquisitionNumber=1 + place // 5)

    write_enhanced(tmp_path / "a" / "e.dcm", make_ct(), acquired_twice)
    (row,) = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert (row.file_paths, row.reason, row.depth) == (("e.dcm",), "", 9)


def test_stacks_of_a_concatenation_are_split_over_its_files(tmp_path: Path) -> None:
    hu_SZYX = make_ct((2 * NUM, 24, 26), seed=4).reshape(2, NUM, 24, 26)

    def part(number: int) -> Callable[[Dataset], None]:
        def edit(dataset: Dataset) -> None:
            dataset.ConcatenationUID, dataset.SOPInstanceUID = "1.9", f"1.2.3.{number}"
            for groups in dataset.PerFrameFunctionalGroupsSequence:
                place = groups.FrameContentSequence[0].InStackPositionNumber - 1
                by_stack_id(groups, place % 2, 5 * number + place // 2)

        return edit

    # both files hold slices of both stacks
    mixed = hu_SZYX.swapaxes(0, 1).reshape(2 * NUM, 24, 26)
    write_enhanced(tmp_path / "a" / "e" / "0", mixed[:10], part(0))
    write_enhanced(tmp_path / "a" / "e" / "1", mixed[10:], part(1))
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    assert [row.file_paths for row in built.accepted] == [("e/0", "e/1")] * 2
    found = [read_volume(tmp_path / "a" / row.path).hu_ZYX for row in built.rows]
    for hu_ZYX in hu_SZYX:
        assert any(np.array_equal(hu_ZYX, other) for other in found)
    assert len(pack(built, tmp_path / "store").packed) == 2


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        ([1, 2, 3, 4], "1-4"),
        ([1, 3, 5, 7], "1-7:2"),
        ([2, 9], "2,9"),
        ([1, 2], "1-2"),
        ([1, 2, 3, 10, 20, 30, 31], "1-3,10-30:10,31"),
    ],
)
def test_frame_numbers_as_text(numbers: list[int], text: str) -> None:
    path = with_frames(Path("a/e.dcm"), numbers)
    assert str(path) == f"a/e.dcm#{text}"
    assert without_frames(str(path)) == ("a/e.dcm", tuple(numbers))


def test_any_frame_numbers_come_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        numbers = sorted({int(n) for n in rng.integers(1, 60, rng.integers(1, 40))})
        assert without_frames(str(with_frames(Path("e"), numbers))) == ("e", tuple(numbers))


def test_a_name_with_a_number_sign_is_no_stack(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "a" / "e#3" / "x#1-2", make_ct())
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    assert [(row.path, row.depth) for row in built.accepted] == [("e#3", 9)]
    assert len(pack(built, tmp_path / "store").packed) == 1
