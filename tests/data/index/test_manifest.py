"""A manifest has a row for everything that may be a scan, holds no identifier, and is the same
wherever it is made.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import SimpleITK
from scan_files import make_ct, make_labels, noise_ct, save_labels, save_scan, write_series

from tapct.base.exits import UserError
from tapct.data.index.build import build_manifest
from tapct.data.index.report import MOST_LINES, lines_about
from tapct.data.manifest import Manifest, Row
from tapct.data.patients.key import KEY_VARIABLE
from tapct.data.readers import nifti
from tapct.data.scans import ingest
from tapct.data.search import discover, passed_over
from tapct.data.workers.process_pool import Failure, map_unordered
from tapct.types import AIR_HU


@pytest.fixture(autouse=True)
def no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def make_archive(root: Path) -> Path:
    """Three scans of two patients, one with labels, and four things that are refused."""
    save_scan(root / "p1" / "scan1.nii.gz", noise_ct(1))
    save_labels(root / "p1" / "scan1_seg.nii.gz")
    save_scan(root / "p1" / "scan2.nii.gz", noise_ct(2))
    save_scan(root / "p2" / "scan3.nii.gz", noise_ct(3))
    save_scan(root / "p2" / "thin4.nii.gz", noise_ct(4, depth=2))
    save_scan(root / "p2" / "copy5.nii.gz", noise_ct(1))
    save_labels(root / "p2" / "lonely6.nii.gz")
    broken = save_scan(root / "p2" / "cut7.nii.gz", noise_ct(7))
    broken.write_bytes(broken.read_bytes()[:-300])
    return root


def by_name(built: Manifest) -> dict[str, Row]:
    return {discover.stem_of(Path(row.path)): row for row in built.rows}


def test_every_source_has_one_row_with_its_reason(tmp_path: Path) -> None:
    root = make_archive(tmp_path / "archive")
    seen: list[tuple[int, int]] = []
    built = build_manifest(
        root,
        tmp_path / "m.parquet",
        min_depth=3,
        workers=1,
        progress=lambda done, of: seen.append((done, of)),
    )
    reasons = {name: row.reason for name, row in by_name(built).items()}
    assert reasons == {
        "scan1": "",
        "scan2": "",
        "scan3": "",
        "thin4": "too_few_slices",
        "copy5": "duplicate",
        "lonely6": "label_map",
        "cut7": "truncated",
    }
    assert built.summary() == {
        "accepted": 3,
        "duplicate": 1,
        "label_map": 1,
        "too_few_slices": 1,
        "truncated": 1,
    }
    assert [row.path for row in built.rows] == sorted(row.path for row in built.rows)
    assert seen == [(done, 7) for done in range(1, 8)]
    assert len({row.id for row in built.rows}) == 7
    for row in built.rows:
        assert (row.status == "accepted") == (row.reason == "")
        assert "\n" not in row.detail
        assert row.bytes == (root / row.path).stat().st_size


@pytest.mark.parametrize("library", ["nibabel", "SimpleITK", "pydicom"])
def test_a_library_that_does_not_load_is_no_fault_of_the_scans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    archive = make_archive(tmp_path / "archive")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=library):
        build_manifest(archive, tmp_path / "manifest.parquet")
    assert not (tmp_path / "manifest.parquet").exists()


def test_the_first_of_two_equal_scans_is_kept_and_named(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "x.nii.gz", noise_ct(1))
    image = SimpleITK.GetImageFromArray(noise_ct(1))
    image.SetSpacing((0.8, 0.7, 2.0))
    SimpleITK.WriteImage(image, tmp_path / "a" / "y.nrrd")  # another format, the same voxels
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    first, second = built.rows
    assert (first.status, second.reason) == ("accepted", "duplicate")
    assert second.duplicate_of == first.id and first.id in second.detail
    assert first.patient == second.patient


def test_facts_of_a_row_come_from_the_scan(tmp_path: Path) -> None:
    hu_ZYX = noise_ct(5)
    hu_ZYX[0] = -2000
    save_scan(tmp_path / "a" / "x.nii.gz", hu_ZYX)
    sidecar = {"PatientID": "P9", "PatientSex": "M", "PatientAge": "041Y", "StudyDate": "20200102"}
    sidecar |= {"Manufacturer": "SIEMENS AG", "ConvolutionKernel": "B30f"}
    (tmp_path / "a" / "x.json").write_text(json.dumps(sidecar))
    (row,) = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert (row.depth, row.height, row.width) == (6, 24, 26)
    np.testing.assert_allclose(
        (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm), (2.0, 0.7, 0.8), rtol=1e-6
    )
    assert (row.sex, row.age_years, row.study_date) == ("M", 41.0, "2020")
    assert (row.manufacturer, row.kernel, row.kind) == ("Siemens", "B30f", "nifti")
    assert (row.label_path, row.patient_from) == ("", "side_car")
    dated = build_manifest(tmp_path / "a", tmp_path / "m.parquet", study_dates=True)
    assert dated.rows[0].study_date == "20200102"
    body = np.sort(hu_ZYX[hu_ZYX > -500])
    assert row.body_share == pytest.approx(body.size / hu_ZYX.size)
    for share, value in ((0.005, row.hu_p005), (0.5, row.hu_p50), (0.995, row.hu_p995)):
        place = share * (body.size - 1)
        low, high = body[int(np.floor(place))], body[int(np.ceil(place))]
        assert value == pytest.approx(low + (high - low) * (place % 1))
    held = np.maximum(hu_ZYX, AIR_HU).astype("<i2").tobytes()
    assert row.digest == hashlib.blake2b(b"(6, 24, 26)" + held, digest_size=16).hexdigest()


def test_an_archive_of_many_refused_scans_prints_some_of_them_and_the_number_of_the_others() -> (
    None
):
    def lines(num: int) -> list[str]:
        rows = [
            Row(f"{k}", f"{k}.nii", "nifti", "refused", "truncated", "it ends early")
            for k in range(num)
        ]
        manifest = Manifest(tuple(rows), Path("."), "")
        return [line for line in lines_about(manifest, Path("m"), 1) if line.startswith("  ")]

    assert len(lines(MOST_LINES)) == MOST_LINES and "more line" not in lines(MOST_LINES)[-1]
    many = lines(MOST_LINES + 7)
    assert len(many) == MOST_LINES + 1 and many[:-1] == lines(MOST_LINES)
    assert many[-1].startswith("  and 7 more lines;")


def test_a_row_takes_half_a_kilobyte_beside_its_texts() -> None:
    """An index holds the rows of all scans until it writes the manifest."""
    texts = ("1" * 16, "a.nii.gz", "nifti")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        rows = [Row(*texts) for _ in range(1000)]
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(rows) == 1000 and used / len(rows) < 600


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    root = make_archive(tmp_path / "archive")
    built = build_manifest(root, tmp_path / "out" / "m.parquet", min_depth=3)
    again = Manifest.read(tmp_path / "out" / "m.parquet")
    assert repr(again.rows) == repr(built.rows)  # NaN != NaN
    assert (again.root, again.ignore_labels) == (built.root, built.ignore_labels)
    assert again.digest == built.digest
    table = pyarrow.parquet.read_table(tmp_path / "out" / "m.parquet")
    assert table.column_names == [field.name for field in dataclasses.fields(Row)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".patient_key",
        "m.parquet",
    ]


def test_ids_and_digest_stay_when_the_archive_moves_or_workers_change(tmp_path: Path) -> None:
    root = make_archive(tmp_path / "archive")
    first = build_manifest(root, tmp_path / "m.parquet", min_depth=3)
    shutil.move(root, tmp_path / "elsewhere")
    moved = build_manifest(tmp_path / "elsewhere", tmp_path / "n.parquet", min_depth=3, workers=2)
    assert repr(moved.rows) == repr(first.rows)
    assert moved.digest == first.digest
    expected = "".join(
        sorted(f"{row.id} {row.digest}\n" for row in first.rows if row.status == "accepted")
    )
    assert first.digest == hashlib.blake2b(expected.encode(), digest_size=16).hexdigest()


def test_digest_follows_the_accepted_voxels_only(tmp_path: Path) -> None:
    root = make_archive(tmp_path / "archive")
    first = build_manifest(root, tmp_path / "m.parquet").digest
    (root / "p2" / "cut7.nii.gz").unlink()
    assert build_manifest(root, tmp_path / "m.parquet").digest == first
    save_scan(root / "p1" / "scan2.nii.gz", noise_ct(8))
    assert build_manifest(root, tmp_path / "m.parquet").digest != first


def test_archive_and_manifest_may_move_together(tmp_path: Path) -> None:
    save_scan(tmp_path / "old" / "scans" / "x1.nii.gz", noise_ct(1))
    build_manifest(tmp_path / "old" / "scans", tmp_path / "old" / "m.parquet")
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = Manifest.read(tmp_path / "new" / "m.parquet")
    assert (moved.root / moved.rows[0].path).is_file()
    content = (tmp_path / "new" / "m.parquet").read_bytes()
    assert str(tmp_path).encode() not in content and b"../" not in content
    assert (tmp_path / "new" / "m.parquet").stat().st_mode & 0o777 == 0o600
    assert Manifest.read(tmp_path / "new" / "m.parquet", root=tmp_path).root == tmp_path


def test_hashes_of_patients_need_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "archive"
    for name, patient in (("a", "P1"), ("b", "P1"), ("c", "P2")):
        save_scan(root / f"{name}.nii.gz", noise_ct(ord(name)))
        (root / f"{name}.json").write_text(json.dumps({"PatientID": patient}))

    def patients(out: Path) -> list[str]:
        return [row.patient for row in build_manifest(root, out).rows]

    first = patients(tmp_path / "o" / "m.parquet")
    assert first[0] == first[1] != first[2]
    assert oct((tmp_path / "o" / ".patient_key").stat().st_mode & 0o777) == "0o600"
    assert patients(tmp_path / "o" / "n.parquet") == first
    assert patients(tmp_path / "other" / "m.parquet") != first
    monkeypatch.setenv(KEY_VARIABLE, "a secret of the hospital")
    from_environment = patients(tmp_path / "p" / "m.parquet")
    assert from_environment == patients(tmp_path / "q" / "m.parquet")
    assert not (tmp_path / "p" / ".patient_key").exists()
    assert b"P1" not in (tmp_path / "p" / "m.parquet").read_bytes()
    key = hashlib.blake2b(b"a secret of the hospital", digest_size=32).digest()
    assert from_environment[2] == hashlib.blake2b(b"P2", key=key, digest_size=8).hexdigest()


@pytest.mark.parametrize(
    "paths, regex, groups",
    [
        (["case1.nii.gz", "case2.nii.gz"], None, "ab"),
        (["s0001/ct.nii.gz", "s0002/ct.nii.gz"], None, "ab"),
        (["a/ct.nii.gz", "b/ct.nii.gz"], None, "ab"),
        (["P1_a.nii.gz", "P1_b.nii.gz", "P2_a.nii.gz"], r"(P\d+)_", "aab"),
        (["x/P1/a.nii.gz", "y/P1/b.nii.gz", "y/no.nii.gz"], r"/(P\d+)/", "aab"),
    ],
)
def test_patients_without_header_come_from_regex_or_names(
    tmp_path: Path, paths: list[str], regex: str | None, groups: str
) -> None:
    for seed, path in enumerate(paths):
        save_scan(tmp_path / "a" / path, noise_ct(seed))
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet", patient_regex=regex)
    patients = [row.patient for row in built.rows]
    assert all(patients)
    assert ["ab"[patients[0] != patient] for patient in patients] == list(groups)


def test_a_dicom_folder_can_be_the_whole_archive(tmp_path: Path) -> None:
    nobody: dict[str, object] = {"PatientID": None, "StudyInstanceUID": None}
    for name in ("case7", "case8"):
        write_series(tmp_path / name, make_ct(), edit=lambda index: nobody)
    first, second = (
        build_manifest(tmp_path / name, tmp_path / f"{name}.parquet") for name in ("case7", "case8")
    )
    assert [(row.path, row.status) for row in first.rows] == [(".", "accepted")]
    assert first.digest == second.digest
    assert first.rows[0].patient != second.rows[0].patient
    np.testing.assert_array_equal(
        ingest.read_volume(first.root / first.rows[0].path).hu_ZYX, make_ct()
    )


def test_anonymous_is_not_a_patient(tmp_path: Path) -> None:
    for name in ("a1", "a2"):
        save_scan(tmp_path / "a" / f"{name}.nii.gz", noise_ct(int(name[1])))
        (tmp_path / "a" / f"{name}.json").write_text(json.dumps({"PatientID": "ANONYMOUS"}))
    first, second = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert first.patient != second.patient


def test_unexpected_reader_exceptions_become_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_archive(tmp_path / "archive")
    read_head = nifti.read_head

    def stumble(path: Path, num_bytes: int, *more: Any) -> bytes:
        if path.name == "scan2.nii.gz":
            raise RuntimeError("the library\nfell over")
        return read_head(path, num_bytes, *more)

    monkeypatch.setattr(nifti, "read_head", stumble)
    built = build_manifest(root, tmp_path / "m.parquet")
    row = by_name(built)["scan2"]
    assert row.reason == "unreadable"
    assert "RuntimeError" in row.detail and "fell over" not in row.detail
    assert by_name(built)["scan1"].status == "accepted"


def test_a_folder_that_cannot_be_listed_becomes_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_archive(tmp_path / "archive")
    (root / "p3").mkdir()
    scandir = os.scandir

    def deny(path: str | Path | int) -> object:
        if str(path) == str(root / "p3"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    row = by_name(build_manifest(root, tmp_path / "m.parquet"))["p3"]
    assert (row.status, row.reason) == ("refused", "unreadable")


def test_a_file_without_permission_becomes_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_archive(tmp_path / "archive")
    opened = Path.open

    def deny(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == "scan2.nii.gz":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", deny)
    assert by_name(build_manifest(root, tmp_path / "m.parquet"))["scan2"].reason == "unreadable"


def test_a_name_that_is_no_utf8_becomes_a_row(tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "a" / "x1.nii.gz", noise_ct(1))
    os.link(scan, os.fsencode(tmp_path / "a") + b"/caf\xe9.nii.gz")
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    assert sorted((row.path, row.reason) for row in built.rows) == [
        ("caf\\xe9.nii.gz", "bad_name"),
        ("x1.nii.gz", ""),
    ]


def test_labels_whose_path_is_no_utf8_are_not_used(tmp_path: Path) -> None:
    root, labels = tmp_path / "scans", Path(os.fsdecode(os.fsencode(tmp_path) + b"/labels\xff"))
    save_scan(root / "a.nii.gz", make_ct((6, 32, 32), 1))
    save_scan(labels / "a.nii.gz", make_labels((6, 32, 32)))
    built = build_manifest(root, tmp_path / "m.parquet", labels=labels)
    assert built.rows[0].label_path == "" and "bad_name" in built.rows[0].detail
    assert Manifest.read(tmp_path / "m.parquet").digest == built.digest


def test_a_link_to_itself_is_skipped(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    save_scan(root / "a.nii.gz", make_ct((6, 32, 32), 1))
    (root / "loop").symlink_to("loop")
    built = build_manifest(root, tmp_path / "m.parquet")
    assert len(built.accepted) == 1
    assert dict(built.passed_over) == {passed_over.BROKEN_LINK: 1}


def test_json_without_an_end_of_brackets_costs_only_itself(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    for name in ("imagesTr/a", "imagesTr/b"):
        save_scan(root / f"{name}.nii.gz", make_ct((6, 32, 32), len(name)))
    save_scan(root / "labelsTr" / "a.nii.gz", make_labels((6, 32, 32)))
    (root / "labelsTr" / "dataset.json").write_text("[" * 200_000)
    (root / "imagesTr" / "b.json").write_text("[" * 200_000)
    built = build_manifest(root, tmp_path / "m.parquet")
    assert {row.path: row.reason for row in built.rows} == {
        "imagesTr/a.nii.gz": "", "imagesTr/b.nii.gz": "bad_sidecar",
    }  # fmt: skip
    assert built.label_report is not None and "it is not JSON" in built.label_report.notes[0]


def _end_the_process_at_3(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number * 10


def _minus(number: int, failure: Failure) -> int:
    assert failure.reason == "crashed"
    return -number


def test_an_input_that_kills_its_worker_costs_only_itself() -> None:
    results = dict(map_unordered(_end_the_process_at_3, list(range(8)), 2, _minus))
    assert results == {number: -3 if number == 3 else number * 10 for number in range(8)}


def test_bad_folders_files_and_regexes_are_one_line_for_the_user(tmp_path: Path) -> None:
    root = make_archive(tmp_path / "archive")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    calls: list[tuple[Path, Path, dict[str, object], str]] = [
        (tmp_path / "missing", tmp_path / "m.parquet", {}, "missing"),
        (tmp_path / "file", tmp_path / "m.parquet", {}, "file"),
        (tmp_path / "empty", tmp_path / "m.parquet", {}, "empty"),
        (root, tmp_path / "m.parquet", {"labels": tmp_path / "none"}, "none"),
        (root, tmp_path / "m.parquet", {"patient_regex": "("}, "regex"),
        (root, tmp_path / "m.parquet", {"patient_regex": "P1"}, "group"),
        (root, tmp_path / "archive", {}, "archive"),
        (root, tmp_path / "file" / "m.parquet", {}, "file"),
    ]
    for folder, out, options, part in calls:
        with pytest.raises(UserError) as caught:
            build_manifest(folder, out, **options)  # type: ignore[arg-type]
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.parquet").exists()


def test_a_full_disk_leaves_the_old_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_archive(tmp_path / "archive")
    build_manifest(root, tmp_path / "out" / "m.parquet")
    before = (tmp_path / "out" / "m.parquet").read_bytes()
    save_scan(root / "new9.nii.gz", noise_ct(9))

    def full(table: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(UserError, match="no space left on the disk; nothing was changed"):
        build_manifest(root, tmp_path / "out" / "m.parquet")
    assert (tmp_path / "out" / "m.parquet").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".patient_key",
        "m.parquet",
    ]


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 or not")
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "b.parquet")
    save_scan(tmp_path / "scans" / "x1.nii.gz", noise_ct(1))
    build_manifest(tmp_path / "scans", tmp_path / "c.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "c.parquet")
    changed = table.set_column(table.column_names.index("digest"), "digest", [["0" * 32]])
    pyarrow.parquet.write_table(changed, tmp_path / "c.parquet")
    for name in ("a.parquet", "b.parquet", "c.parquet", "missing.parquet"):
        with pytest.raises(UserError) as caught:
            Manifest.read(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_every_damage_to_a_manifest_is_found(tmp_path: Path) -> None:
    for number in range(3):
        save_scan(tmp_path / "scans" / f"x{number}.nii.gz", noise_ct(number))
    path = tmp_path / "m.parquet"
    build_manifest(tmp_path / "scans", path)
    good, rows = path.read_bytes(), Manifest.read(path).rows
    draw = random.Random(0)
    found = 0
    for _ in range(300):
        damaged = bytearray(good)
        damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            # bytes that Parquet does not use may change without changing a row
            assert repr(Manifest.read(path).rows) == repr(rows)
        except UserError:
            found += 1
    assert found > 150
