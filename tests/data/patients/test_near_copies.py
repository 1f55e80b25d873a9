"""A cropped, padded or mirrored copy is found, and no two scans of different people are joined."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from scan_files import make_ct, noise_ct, save_scan

from tapct.data.index.build import build_manifest
from tapct.data.index.patient_report import lines_about_patients
from tapct.data.patients import near_copies
from tapct.data.patients.identity import NEAR_COPY
from tapct.data.patients.near_copies import SLICES, Sketches, sketch

SHAPE_ZYX = (40, 24, 26)


def pairs(sketches: Iterable[bytes]) -> list[tuple[int, ...]]:
    """Numbers of near copies."""
    with Sketches() as all_sketches:
        for each in sketches:
            all_sketches.add(each)
        return [tuple(pair) for pair in all_sketches.pairs().tolist()]


def edits(hu_ZYX: np.ndarray) -> dict[str, np.ndarray]:
    """The same scan, saved again in several ways."""
    margin = ((0, 0), (3, 5), (0, 7))
    clean = np.where(hu_ZYX > -600, hu_ZYX, -1000).astype(np.int16)
    return {
        "one slice less": hu_ZYX[1:],
        "the middle third": hu_ZYX[13:27],
        "upside down": hu_ZYX[::-1],
        "mirrored": hu_ZYX[:, :, ::-1],
        "turned": np.ascontiguousarray(hu_ZYX.transpose(0, 2, 1)),
        "a margin of padding": np.pad(hu_ZYX, margin, constant_values=-1024),
        "more slices of air": np.pad(hu_ZYX, ((4, 2), (0, 0), (0, 0)), constant_values=-1000),
        "air without noise": clean,
        "all at once": np.pad(clean[::-1][5:-4], margin, constant_values=-900),
    }


def test_near_copies_share_a_hash_and_other_scans_do_not() -> None:
    scans = {f"scan {seed}": make_ct(SHAPE_ZYX, seed) for seed in range(12)}
    others = [sketch(hu_ZYX) for hu_ZYX in scans.values()]
    assert pairs(others) == []
    for name, edited in edits(scans["scan 3"]).items():
        assert pairs([*others, sketch(edited)]) == [(3, 12)], name


def masses(hu_ZYX: np.ndarray) -> list[int]:
    """The body mass of each slice, voxel by voxel."""
    result = []
    for plane_YX in hu_ZYX.tolist():
        result.append(sum(max(int(hu) + 500, 0) for row in plane_YX for hu in row))
    return result


def test_scans_are_joined_exactly_where_four_slices_in_a_row_are_equal() -> None:
    base = noise_ct(0, depth=30)
    for length, start in itertools.product(range(1, 7), (0, 5)):
        other = noise_ct(1, depth=20)
        other[start : start + length] = base[11 : 11 + length]
        a, b = masses(base), masses(other)
        groups = [
            {tuple(each[z : z + SLICES]) for z in range(len(each) - SLICES + 1)} for each in (a, b)
        ]
        expected = bool(groups[0] & groups[1])
        assert expected == (length >= SLICES)
        assert bool(pairs([sketch(base), sketch(other)])) == expected, (length, start)


def test_slices_that_say_nothing_join_nobody() -> None:
    constant = np.full((20, 9, 9), 40, np.int16)
    air = np.full((20, 9, 9), -1000, np.int16)
    few = noise_ct(3, depth=SLICES - 1)
    assert [sketch(each) for each in (constant, air, few)] == [b""] * 3
    assert pairs([]) == pairs([b"", b""]) == []


def test_masses_of_large_slices_of_metal_are_exact() -> None:
    hu_ZYX = np.full((6, 3000, 40), 32767, np.int16)
    hu_ZYX[:, 0, 0] = range(6)
    exact = [(3000 * 40 - 1) * (32767 + 500) + z + 500 for z in range(6)]
    assert sketch(hu_ZYX) == near_copies._sketch_of(np.array(exact, np.int64)).tobytes() != b""


@pytest.mark.parametrize("option, num_patients", [(None, 2), ("folder:1", 3)])
def test_the_index_joins_and_marks_near_copies(
    tmp_path: Path, option: str | None, num_patients: int
) -> None:
    hu_ZYX = make_ct(SHAPE_ZYX, 1)
    save_scan(tmp_path / "a" / "Meyer" / "x.nii.gz", hu_ZYX)
    save_scan(tmp_path / "a" / "k7" / "cropped.nii.gz", hu_ZYX[1:])
    save_scan(tmp_path / "a" / "Schmidt" / "y.nii.gz", make_ct(SHAPE_ZYX, 2))
    manifest = build_manifest(tmp_path / "a", tmp_path / "m.parquet", patient_from=option)
    rows = {row.path: row for row in manifest.accepted}
    assert len(rows) == 3
    assert len({row.patient for row in rows.values()}) == num_patients
    marked = {path for path, row in rows.items() if NEAR_COPY in row.marks.split(",")}
    assert marked == {"Meyer/x.nii.gz", "k7/cropped.nii.gz"}
    assert lines_about_patients(manifest.row_table())[0].startswith(
        "2 scans have slices of another scan"
    )


def test_whole_copies_are_duplicates_and_no_near_copies(tmp_path: Path) -> None:
    for name in ("b", "c"):
        save_scan(tmp_path / "a" / f"{name}.nii.gz", make_ct(SHAPE_ZYX, 1))
    rows = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert [row.reason for row in rows] == ["", "duplicate"]
    assert not any(row.marks for row in rows)
