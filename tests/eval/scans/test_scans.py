"""Who is trained on and who is tested."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scan_files import noise_ct, save_labels, save_scan

from tapct.base.exits import UserError
from tapct.data.index.build import build_manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store
from tapct.data.patients.split import position
from tapct.eval.scans.labelled_scan import read_scan
from tapct.eval.scans.train_test import (
    BLOCKS,
    PATIENTS,
    block_slices,
    split_by_patient,
    split_for_tasks,
)
from tapct.eval.scans.usable import Labels, usable


@dataclass(frozen=True)
class Row:
    id: str
    patient: str
    path: str = "x.nii.gz"
    has_labels: bool = True


def archive(num_patients: int, scans_each: int = 2) -> list[Row]:
    return [Row(f"s{p}-{n}", f"p{p}") for p in range(num_patients) for n in range(scans_each)]


def patients(rows) -> set[str]:
    return {row.patient for row in rows}


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_on_both_sides_and_no_scan_is_lost(seed):
    rows = archive(9)
    split = split_by_patient(rows, test_share=0.4, max_scans=0, seed=seed)
    assert split.mode == PATIENTS
    assert not patients(split.train) & patients(split.test)
    assert sorted(row.id for row in (*split.train, *split.test)) == sorted(row.id for row in rows)
    below = {name for name in patients(rows) if position(name, seed) < 0.4}
    assert patients(split.test) == below and 0 < len(below) < 9


def test_nobody_changes_sides_when_scans_are_added_and_a_forced_choice_is_printed(capsys):
    few, many = archive(4), archive(40)
    choose = {"test_share": 0.5, "max_scans": 0}
    forced = 0
    for seed in range(12):
        before, after = (split_by_patient(rows, **choose, seed=seed) for rows in (few, many))
        moved = patients(before.test) ^ (patients(after.test) & patients(few))
        assert len(moved) == ("puts all 4 patients on one side" in capsys.readouterr().out)
        forced += len(moved)
    assert 0 < forced < 6


def test_split_follows_the_seed_and_not_the_order_of_rows():
    rows = archive(12)
    one, same, other = (
        split_by_patient(given, test_share=0.5, max_scans=0, seed=seed)
        for given, seed in ((rows, 1), (rows[::-1], 1), (rows, 2))
    )
    assert one == same
    assert patients(one.test) != patients(other.test)


def test_patients_kept_out_of_pretraining_are_the_test_side():
    rows = archive(6)
    split = split_by_patient(
        rows, test_share=0.5, max_scans=0, seed=0, held_out={"p1", "p4", "not here"}
    )
    assert split.tests_held_out
    assert patients(split.test) == {"p1", "p4"}
    for nobody_or_all in ({"not here"}, patients(rows)):
        split = split_by_patient(rows, test_share=0.5, max_scans=0, seed=0, held_out=nobody_or_all)
        assert not split.tests_held_out
        assert patients(split.test) == {f"p{n}" for n in range(6) if position(f"p{n}", 0) < 0.5}


@pytest.mark.parametrize("max_scans", [2, 3, 5, 11])
def test_a_limit_on_scans_shrinks_both_sides(max_scans):
    rows = archive(10)
    split = split_by_patient(rows, test_share=0.5, max_scans=max_scans, seed=0)
    assert len(split.train) + len(split.test) == max_scans
    share = sum(position(name, 0) < 0.5 for name in patients(rows)) / 10
    assert abs(len(split.test) - max_scans * share) <= 0.5
    assert not patients(split.train) & patients(split.test)


def test_a_single_patient_is_split_within():
    split = split_by_patient(archive(1), test_share=0.5, max_scans=0, seed=0)
    assert split.mode == BLOCKS
    assert split.train == split.test


def test_scans_are_usable_where_they_have_the_labels_of_a_task():
    rows = [*archive(3, 1), Row("bare", "p9", has_labels=False), Row("twin", "p2")]
    assert usable(rows, Labels.NONE) == rows
    assert [row.id for row in usable(rows, Labels.VOXELS)] == ["s0-0", "s1-0", "s2-0", "twin"]
    assert [row.id for row in usable(rows, Labels.PAIRS)] == ["s2-0", "twin"]
    values = {"bare": {"sex": "F"}, "s1-0": {}, "elsewhere": {"sex": "M"}}
    assert [row.id for row in usable(rows, Labels.SCAN, values)] == ["bare"]
    assert usable(rows, Labels.SCAN) == []
    nobody = [Row("x", ""), Row("y", "")]  # two scans of unknown patients are no pair
    assert usable(nobody, Labels.PAIRS) == []


def test_a_second_task_leaves_the_split_of_the_first_one_alone():
    labelled = archive(7)
    bare = [Row(f"bare{n}", f"p{n}", has_labels=False) for n in range(4, 12)]
    for max_scans in (0, 5, 17):
        for held_out in (set(), {"p2", "p5", "p9"}):
            choose = {"test_share": 0.5, "max_scans": max_scans, "seed": 1, "held_out": held_out}
            alone = split_by_patient(labelled, **choose)
            both = split_for_tasks([labelled, [*labelled, *bare]], **choose)
            used = {row.id for row in labelled}
            for side in ("train", "test"):
                assert [row for row in getattr(both, side) if row.id in used] == [
                    *getattr(alone, side)
                ]
            assert not patients(both.train) & patients(both.test)
            assert both.tests_held_out == alone.tests_held_out == bool(held_out)
            if held_out:
                assert not patients(both.train) & held_out and patients(both.test) <= held_out
            total = len(both.train) + len(both.test)
            assert total == (min(max_scans, 22) or 22)


def test_a_second_task_with_scans_of_one_patient_is_split_within_too():
    bare = [Row("bare", "p5", has_labels=False)]
    choose = {"test_share": 0.5, "max_scans": 0, "seed": 1}
    split = split_for_tasks([archive(1), [*archive(1), *bare]], **choose)
    assert split.mode == BLOCKS
    assert [row.id for row in split.train] == ["s0-0", "s0-1", "bare"]
    assert split.train == split.test


@pytest.mark.parametrize(
    ("depth", "blocks", "gap"), [(31, 8, 2), (31, 4, 0), (12, 8, 3), (5, 8, 2), (4, 2, 2)]
)
def test_blocks_of_one_scan_lie_apart(depth, blocks, gap):
    train, test = (
        block_slices(depth, test=side, num_blocks=blocks, gap=gap, scan_id="s")
        for side in (False, True)
    )
    assert train.any()
    assert test.any()
    distance = np.abs(np.flatnonzero(train)[:, None] - np.flatnonzero(test)[None]).min()
    assert distance == gap + 1
    assert train[0]
    assert (~(train | test)).sum() % max(gap, 1) == 0


def test_a_scan_too_short_for_blocks_is_one_line():
    with pytest.raises(
        UserError, match=r"scan s has 3 patches along z; fitting within one patient needs 4"
    ):
        block_slices(3, test=True, num_blocks=8, gap=2, scan_id="s")


def test_scans_and_labels_are_read_from_the_store_alone(tmp_path: Path):
    hu_ZYX = noise_ct(1)
    save_scan(tmp_path / "archive" / "a.nii.gz", hu_ZYX)
    save_labels(tmp_path / "archive" / "a_seg.nii.gz")
    save_scan(tmp_path / "archive" / "b.nii.gz", noise_ct(2))
    pack(build_manifest(tmp_path / "archive", tmp_path / "m.parquet"), tmp_path / "store")
    shutil.rmtree(tmp_path / "archive")
    store = Store(tmp_path / "store")
    assert [row.path for row in usable(store.scans, Labels.VOXELS)] == ["a.nii.gz"]
    scan = read_scan(store.scans[0], store, with_labels=True)
    np.testing.assert_array_equal(scan.volume.hu_ZYX, np.maximum(hu_ZYX, -1024))
    assert scan.label_map.labels_ZYX[2, 3, 3] == 1 and scan.label_map.labels_ZYX[3, 10, 5] == 300
    assert scan.volume.spacing_mm == scan.label_map.spacing_mm == pytest.approx((2.0, 0.7, 0.8))
    assert read_scan(store.scans[0], store, with_labels=False).labels is None
