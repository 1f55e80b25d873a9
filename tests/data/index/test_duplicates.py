"""Of copies of one scan the labelled one is kept; copies with another geometry are all refused."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from scan_files import LPS, noise_ct, save_labels, save_scan, write_nifti

from tapct.data.index.build import build_manifest
from tapct.data.index.duplicates import Copies, mirror_digest
from tapct.data.manifest import Row


def indexed(tmp_path: Path) -> dict[str, Row]:
    rows = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    return {row.path: row for row in rows}


def test_the_labelled_copy_is_kept(tmp_path: Path) -> None:
    for name in ("a_copy", "case1", "z_copy"):
        save_scan(tmp_path / "a" / f"{name}.nii.gz", noise_ct(1))
    save_labels(tmp_path / "a" / "case1_seg.nii.gz")
    rows = indexed(tmp_path)
    kept = rows.pop("case1.nii.gz")
    assert kept.status == "accepted" and kept.label_path and not kept.duplicate_of
    for row in rows.values():
        assert (row.reason, row.duplicate_of) == ("duplicate", kept.id)
        assert row.patient == kept.patient


def test_without_labels_the_first_copy_is_kept(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_scan(tmp_path / "a" / f"{name}.nii.gz", noise_ct(1))
    rows = indexed(tmp_path)
    assert rows["a.nii.gz"].status == "accepted"
    assert rows["b.nii.gz"].duplicate_of == rows["a.nii.gz"].id


def test_a_rounded_spacing_is_no_contradiction(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "x.nii.gz", noise_ct(1), (0.703125, 0.703125, 2.5))
    save_scan(tmp_path / "a" / "y.nii.gz", noise_ct(1), (0.7, 0.7, 2.5))
    assert indexed(tmp_path)["y.nii.gz"].reason == "duplicate"


@pytest.mark.parametrize("wrong", ["spacing", "mirrored", "upside down", "turned"])
def test_copies_with_another_geometry_are_all_refused(tmp_path: Path, wrong: str) -> None:
    hu_ZYX = noise_ct(1)
    affine = np.diag([0.8, 0.8, 2.0, 1.0])
    other = affine.copy()
    if wrong == "spacing":
        other[2, 2] = 5.0
    elif wrong == "mirrored":
        other[0, 0] *= -1
    elif wrong == "upside down":
        other[2, 2] *= -1
    else:
        other = other[[1, 0, 2, 3]]
    (tmp_path / "a").mkdir()
    write_nifti(tmp_path / "a" / "right.nii.gz", hu_ZYX, affine)
    write_nifti(tmp_path / "a" / "wrong.nii.gz", hu_ZYX, other)
    write_nifti(tmp_path / "a" / "another.nii.gz", noise_ct(2), LPS @ affine)
    rows = indexed(tmp_path)
    assert rows.pop("another.nii.gz").status == "accepted"
    assert {row.reason for row in rows.values()} == {"contradictory_geometry"}
    for row in rows.values():
        assert all(other.id in row.detail for other in rows.values()) and not row.duplicate_of
    assert len({row.patient for row in rows.values()}) == 1


def test_a_mirror_digest_is_that_of_flips_and_turns_and_of_no_other_scan() -> None:
    hu_ZYX = noise_ct(3)
    same = [hu_ZYX[::-1], hu_ZYX[:, ::-1], hu_ZYX[:, :, ::-1], hu_ZYX.transpose(0, 2, 1)]
    assert {mirror_digest(np.ascontiguousarray(each)) for each in (hu_ZYX, *same)} == {
        mirror_digest(hu_ZYX)
    }
    others = [noise_ct(4), np.roll(hu_ZYX, 1, 0), np.roll(hu_ZYX, 1, 2), hu_ZYX + 1]
    changed = hu_ZYX.copy()
    changed[0, 0, 0] += 1
    digests = {mirror_digest(each) for each in (hu_ZYX, changed, *others)}
    assert len(digests) == 6


def plain_refusals(rows: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """Reason and kept copy of each refused scan, each compared with all others."""
    refused = {}
    accepted = [i for i, row in enumerate(rows) if row["status"] == "accepted"]
    for i in accepted:
        voxels = rows[i]["mirror_digest"] or rows[i]["digest"]
        group = [k for k in accepted if (rows[k]["mirror_digest"] or rows[k]["digest"]) == voxels]
        first = rows[group[0]]
        if any(rows[k]["digest"] != first["digest"] for k in group) or any(
            abs(rows[k]["spacing_z_mm"] / first["spacing_z_mm"] - 1) > 0.01 for k in group
        ):
            refused[i] = ("contradictory_geometry", "")
        elif len(group) > 1:
            kept = next((k for k in group if rows[k]["label_path"]), group[0])
            if kept != i:
                refused[i] = ("duplicate", rows[kept]["id"])
    return refused


def test_copies_are_those_of_a_comparison_of_all_pairs() -> None:
    draw, num = random.Random(0), Counter[str]()
    for _ in range(200):
        rows = []
        for number in range(draw.randrange(1, 15)):
            voxels = draw.randrange(6)
            rows.append(
                {
                    **{
                        "id": f"{number:016x}",
                        "status": draw.choice(["accepted"] * 4 + ["refused"]),
                    },
                    "digest": f"{voxels}{draw.choice('0000001')}",
                    "mirror_digest": draw.choice([f"m{voxels}"] * 9 + [""]),
                    "label_path": draw.choice(["", "", "labels"]),
                    "spacing_z_mm": draw.choice([2.0] * 9 + [3.0]),
                    **{"spacing_y_mm": 1.0, "spacing_x_mm": 1.0},
                }
            )
        table = pyarrow.Table.from_pylist(rows)
        step = draw.randrange(1, 6)
        parts = [table.slice(start, step) for start in range(0, len(table), step)]
        copies = Copies(lambda parts=parts: parts)  # type: ignore[misc]
        middle = draw.randrange(len(rows) + 1)
        found = [*copies.refusals(0, middle), *copies.refusals(middle, len(rows))]
        expected = plain_refusals(rows)
        assert {i: (each.reason, each.duplicate_of) for i, each in found} == expected
        num.update(reason for reason, _ in expected.values())
    assert num["duplicate"] > 100 and num["contradictory_geometry"] > 100
