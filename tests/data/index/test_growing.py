"""An index that was killed, or that finds an archive it knows, gives the same manifest as a fresh
one, and reads no file twice.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pytest
import SimpleITK
from scan_files import make_ct, make_labels, make_slice, save_scan

from tapct.base.exits import UserError
from tapct.data.index import finding, scan_row
from tapct.data.index.build import build_manifest, examine_share
from tapct.data.index.journal import KEY, Journal, Keys, key_of, keys_in
from tapct.data.index.kept_patients import KeepRules
from tapct.data.index.share import Share, parse_share
from tapct.data.manifest import Manifest
from tapct.data.patients.key import KEY_FILE
from tapct.data.scans.plain_facts import failure
from tapct.data.search.discover import search
from tapct.data.search.file_count import FileCount
from tapct.types import Refused

SHAPE_ZYX = (12, 32, 32)
opened: Counter[str] = Counter()
watched: list[str] = []


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Count the files below the watched folder that are opened."""
    if event == "open" and watched and isinstance(arguments[0], (str, bytes)):
        path = os.fsdecode(arguments[0])
        if path.startswith(watched[0]) and os.path.isfile(path):
            opened[path] += 1


sys.addaudithook(watch)


@contextmanager
def counted(folder: Path) -> Iterator[Counter[str]]:
    """Count how often each file of a folder is opened."""
    opened.clear()
    watched[:] = [f"{folder}{os.sep}"]
    try:
        yield opened
    finally:
        watched.clear()


def write_series(folder: Path, seed: int, *, start: int = 0, stop: int = SHAPE_ZYX[0]) -> None:
    """Slices of one DICOM series, named by the series."""
    folder.mkdir(parents=True, exist_ok=True)
    for z, plane in enumerate(make_ct(SHAPE_ZYX, seed)[start:stop], start):
        dataset = make_slice(plane, 2.0 * z, z + 1, PatientID=f"P{seed}")
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = f"1.2.{seed}", f"1.3.{seed}"
        dataset.SOPInstanceUID = f"1.2.{seed}.{z}"
        dataset.save_as(folder / f"{z:03d}_{seed}.dcm", enforce_file_format=True)


@pytest.fixture
def archive(template: Path, tmp_path: Path) -> Path:
    """A copy of the archive, which a test may change."""
    return Path(shutil.copytree(template, tmp_path / "scans"))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single files with and without labels, series in folders of their own, in one folder with
    others, and in two folders; a copy, a damaged file and files that are no scans.
    """
    root = tmp_path_factory.mktemp("growing") / "scans"
    for seed in range(3):
        save_scan(root / "nifti" / f"c{seed}.nii.gz", make_ct(SHAPE_ZYX, seed))
    save_scan(root / "nifti" / "c0_seg.nii.gz", make_labels(SHAPE_ZYX))
    shutil.copy(root / "nifti" / "c1.nii.gz", root / "nifti" / "copy.nii.gz")
    content = (root / "nifti" / "c2.nii.gz").read_bytes()
    (root / "nifti" / "cut.nii.gz").write_bytes(content[: len(content) // 2])
    write_series(root / "dicom" / "a", 10)
    for seed in (11, 12):
        write_series(root / "flat", seed)
    write_series(root / "half" / "one", 13, stop=4)
    write_series(root / "half" / "two", 13, start=4)
    (root / "flat" / "notes.txt").write_text("no scan")
    (root / "flat" / "broken.dcm").write_bytes(b"no DICOM")
    return root


def rows_of(manifest: Manifest) -> list[str]:
    """All values of all rows as text, in which NaN equals NaN."""
    return [repr(dataclasses.astuple(row)) for row in manifest.rows]


def fresh(root: Path, like: Path) -> Manifest:
    """The manifest of a fresh index with the key of another one."""
    folder = root.parent / "fresh"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(like / ".patient_key", folder)
    return build_manifest(root, folder / "m.parquet")


def test_each_file_is_opened_once_and_not_at_all_where_nothing_changed(archive: Path) -> None:
    out = archive.parent / "out"
    with counted(archive) as times:
        first = build_manifest(archive, out)
    # a series in two folders is known only once both are listed; labels of a scan are read apart
    again = {name: count for name, count in times.items() if count > 1}
    assert {Path(name).parent.parent.name for name in again} <= {"half"}
    assert len(times) == sum(path.is_file() for path in archive.rglob("*"))
    with counted(archive) as times:
        second = build_manifest(archive, out)
    assert not times
    assert rows_of(second) == rows_of(first)
    assert first.passed_over == second.passed_over
    assert rows_of(fresh(archive, out)) == rows_of(first)
    assert rows_of(Manifest.read(out)) == rows_of(first)


def test_only_new_and_changed_files_are_read_again(archive: Path) -> None:
    out = archive.parent / "out"
    build_manifest(archive, out)
    save_scan(archive / "nifti" / "c2.nii.gz", make_ct(SHAPE_ZYX, 77))  # changed
    save_scan(archive / "nifti" / "c9.nii.gz", make_ct(SHAPE_ZYX, 9))  # new
    save_scan(archive / "nifti" / "c9_seg.nii.gz", make_labels(SHAPE_ZYX))
    save_scan(archive / "nifti" / "c1_seg.nii.gz", make_labels(SHAPE_ZYX))  # of a known scan
    write_series(archive / "flat", 14)
    with counted(archive) as times:
        grown = build_manifest(archive, out)
    names = {Path(name).name for name in times}
    expected = {"c2.nii.gz", "c9.nii.gz", "c9_seg.nii.gz", "c1_seg.nii.gz"}
    assert names == expected | {f"{z:03d}_14.dcm" for z in range(SHAPE_ZYX[0])}
    assert rows_of(grown) == rows_of(fresh(archive, out))
    labelled = {row.path for row in grown.accepted if row.label_path}
    assert labelled == {f"nifti/c{number}.nii.gz" for number in (0, 1, 9)}


@pytest.mark.parametrize("changed", ["side-car", "dataset.json", "removed labels", "slices"])
def test_what_a_row_depends_on_beside_its_own_file_is_noticed(archive: Path, changed: str) -> None:
    out = archive.parent / "out"
    before = build_manifest(archive, out)
    if changed == "side-car":
        (archive / "nifti" / "c1.json").write_text('{"PatientSex": "F", "Manufacturer": "GE"}')
    elif changed == "dataset.json":
        (archive / "dataset.json").write_text('{"labels": {"liver": 1}}')
    elif changed == "removed labels":
        (archive / "nifti" / "c0_seg.nii.gz").unlink()
    else:
        plane = make_ct(SHAPE_ZYX, 10)[0]
        dataset = make_slice(plane, 2.0 * SHAPE_ZYX[0], 99, PatientID="P10")
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "1.2.10", "1.3.10"
        (archive / "dicom" / "b").mkdir()
        dataset.save_as(archive / "dicom" / "b" / "z.dcm", enforce_file_format=True)
    after = build_manifest(archive, out)
    assert rows_of(after) != rows_of(before)
    assert rows_of(after) == rows_of(fresh(archive, out))


def test_a_scan_that_is_gone_stays_as_a_refused_row_until_it_is_back(archive: Path) -> None:
    out = archive.parent / "out"
    before = build_manifest(archive, out)
    aside = archive.parent / "c2.nii.gz"
    shutil.move(archive / "nifti" / "c2.nii.gz", aside)
    for _ in range(2):
        after = build_manifest(archive, out)
        (gone,) = [row for row in after.rows if row.reason == "vanished"]
        assert (gone.path, gone.status) == ("nifti/c2.nii.gz", "refused")
        assert len(after.rows) == len(before.rows)
        rest = dataclasses.replace(after, rows=tuple(r for r in after.rows if r.id != gone.id))
        assert rows_of(rest) == rows_of(fresh(archive, out))
    shutil.move(aside, archive / "nifti" / "c2.nii.gz")
    assert rows_of(build_manifest(archive, out)) == rows_of(before)


def test_slices_that_are_named_like_the_voxels_of_a_header_are_found(tmp_path: Path) -> None:
    """`.raw` beside a `.mhd` is the end of its voxels, and of slices of some old scanners."""
    folder = tmp_path / "scans"
    write_series(folder, 7)
    for file in folder.glob("*.dcm"):
        file.rename(file.with_suffix(".raw"))
    image = SimpleITK.GetImageFromArray(make_ct(SHAPE_ZYX, 8))
    image.SetSpacing((0.8, 0.7, 2.0))
    SimpleITK.WriteImage(image, str(folder / "x.mhd"))
    for found in (build_manifest(folder, tmp_path / "m.parquet").rows, search(folder).sources):
        assert sorted(row.kind for row in found) == ["dicom", "meta"]
    with counted(folder) as times:
        build_manifest(folder, tmp_path / "again.parquet")
    assert set(times.values()) == {1} and len(times) == 2 + SHAPE_ZYX[0]


def test_less_of_an_archive_keeps_paths_and_ids_and_reads_nothing_again(archive: Path) -> None:
    out = archive.parent / "out"
    before = {row.path: row for row in build_manifest(archive, out).rows}
    with counted(archive) as times:
        after = build_manifest([archive / "dicom", archive / "nifti" / "c1.nii.gz"], out)
    assert not times and after.root == archive
    for row in after.rows:
        is_given = row.path in ("dicom/a", "nifti/c1.nii.gz")
        assert row.id == before[row.path].id and (row.reason == "vanished") != is_given
    assert len(after.rows) == len(before)
    again = build_manifest(archive / "dicom", out)  # one folder, which is not the root
    assert {row.path: row.id for row in again.rows} == {p: row.id for p, row in before.items()}
    assert rows_of(build_manifest(archive, out)) == rows_of(fresh(archive, out))


def test_a_line_is_printed_where_paths_start_at_another_folder_than_before(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (archive.parent / "out", archive.parent / "m.parquet"):
        build_manifest(archive / "dicom", out)
        assert not capsys.readouterr().err
        build_manifest([archive / "dicom", archive / "flat"], out)
        assert f"start at {archive / 'dicom'}, and now at {archive}, the" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out", "m.parquet"])
def test_root_keeps_paths_and_ids_when_scans_are_added_outside_of_the_first_folder(
    archive: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = archive.parent / name
    whole = {row.path: row.id for row in build_manifest(archive, archive.parent / "w.parquet").rows}
    if name == "out":  # IDs are keyed hashes: with the same key
        out.mkdir()
        shutil.copy(archive.parent / KEY_FILE, out / KEY_FILE)
    (archive.parent / "lists").mkdir()
    more = archive.parent / "lists" / "more.csv"
    more.write_text("path\n../scans/nifti/c1.nii.gz\n")
    first = build_manifest(archive / "dicom", out, start_at=archive)
    assert first.root == archive and {row.path for row in first.rows} == {"dicom/a"}
    second = build_manifest([archive / "dicom", more], out, start_at=archive)
    assert {row.path for row in second.rows} == {"dicom/a", "nifti/c1.nii.gz"}
    assert all(row.id == whole[row.path] for row in (*first.rows, *second.rows))
    link = archive.parent / "link"
    link.symlink_to(archive)
    same = build_manifest([archive / "dicom", more], out, start_at=link)
    assert rows_of(same) == rows_of(second) and not capsys.readouterr().err
    if name == "out":  # an archive keeps its root
        kept = build_manifest(archive / "dicom", out)
        assert kept.root == archive and "dicom/a" in {row.path for row in kept.rows}
    build_manifest([archive / "dicom", more], out, start_at=archive.parent)
    line = (
        f"start at {archive}, and now at {archive.parent}, which --root sets: all scans get other"
    )
    assert line in capsys.readouterr().err


def test_root_contains_everything_also_behind_a_link_or_is_one_line(
    archive: Path, tmp_path: Path
) -> None:
    disk, out = tmp_path / "disk", tmp_path / "m.parquet"
    disk.mkdir()
    (disk / "scans").symlink_to(archive / "dicom")
    assert build_manifest(disk / "scans", out, start_at=disk).rows[0].path == "scans/a"
    share = Share(1, 1)
    examine_share(disk / "scans", tmp_path / "shared", share, start_at=disk)
    shared = build_manifest(disk / "scans", tmp_path / "shared", start_at=disk)
    assert [row.path for row in shared.rows] == ["scans/a"]
    file = archive / "nifti" / "c1.nii.gz"
    with pytest.raises(UserError, match=f"--root {disk} does not contain {archive}/nifti/c1"):
        build_manifest([disk / "scans", file], out, start_at=disk)
    with pytest.raises(UserError, match=f"--root {disk} does not contain {archive}; give a"):
        build_manifest(archive, out, start_at=disk)
    with pytest.raises(UserError, match="/nowhere does not exist; give a folder that contains"):
        build_manifest(archive, out, start_at=tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file; give a folder"):
        build_manifest(file, out, start_at=file)
    (tmp_path / "also").symlink_to(archive)
    with pytest.raises(UserError, match="several names of the folder"):
        build_manifest([archive / "dicom", tmp_path / "also" / "nifti"], out, start_at=archive)


def test_a_changed_side_car_of_a_named_scan_is_noticed(archive: Path) -> None:
    side_car, out = archive / "nifti" / "c1.json", archive.parent / "out"
    side_car.write_text('{"PatientSex": "M"}')
    given = [archive / "nifti" / "c1.nii.gz", archive / "nifti" / "c2.nii.gz"]
    for sex in "MFO":
        side_car.write_text(f'{{"PatientSex": "{sex}", "Manufacturer": "GE{sex}"}}')
        with counted(archive) as times:
            assert build_manifest(given, out).rows[0].sex == sex
        assert ("c2.nii.gz" in {Path(name).name for name in times}) == (sex == "M")


def test_a_pattern_may_match_side_cars_and_lists_keep_their_meaning(archive: Path) -> None:
    (archive / "nifti" / "c1.json").write_text('{"PatientSex": "F"}')
    out = archive.parent / "m.parquet"
    rows = build_manifest(archive / "nifti" / "c1*", out).rows
    assert [(row.path, row.sex) for row in rows] == [("c1.nii.gz", "F")]
    (archive.parent / "scans.json").write_text('["scans/nifti/c2.nii.gz"]')
    rows = build_manifest([archive / "dicom", archive.parent / "scans.json"], out).rows
    assert [row.path for row in rows] == ["dicom/a", "nifti/c2.nii.gz"]
    (archive.parent / "scans.json").write_text('{"path": "scans/nifti/c2.nii.gz"}')
    with pytest.raises(UserError, match="is no JSON list"):
        build_manifest([archive / "dicom", archive.parent / "scans.json"], out)


def test_lists_patterns_and_files_name_scans_labels_patients_and_splits(archive: Path) -> None:
    shutil.copy(archive / "nifti" / "c0_seg.nii.gz", archive.parent / "organs.nii.gz")
    table = archive.parent / "list.csv"
    table.write_text(
        "Path;label;patient;split\n"
        "scans/nifti/c0.nii.gz;organs.nii.gz;Ann;train\n"
        "scans/dicom/a;;Ann;test\n"
        "scans/half/one/000_13.dcm;;Bob;\n"
    )
    found = build_manifest(table, archive.parent / "m.parquet")
    assert found.root == archive
    rows = {row.path: row for row in found.rows}
    assert set(rows) == {"nifti/c0.nii.gz", "dicom/a", "half/one"}
    assert [rows[name].split for name in sorted(rows)] == ["test", "", "train"]
    assert rows["nifti/c0.nii.gz"].patient == rows["dicom/a"].patient != rows["half/one"].patient
    assert rows["nifti/c0.nii.gz"].label_path == "../organs.nii.gz"
    assert {row.patient_from for row in found.rows} == {"column"}
    pattern = build_manifest(archive / "nifti" / "c[12].nii.gz", archive.parent / "p.parquet")
    assert [row.path for row in pattern.rows] == ["c1.nii.gz", "c2.nii.gz"]
    several = build_manifest([archive / "dicom", archive / "flat"], archive.parent / "s.parquet")
    assert [row.path for row in several.rows if not row.reason] == [
        *("dicom/a", "flat/000_11.dcm", "flat/000_12.dcm"),
    ]
    paths = archive.parent / "list.json"
    paths.write_text('["scans/nifti/c1.nii.gz", {"path": "scans/dicom/a", "split": "val"}]')
    listed = build_manifest(paths, archive.parent / "j.parquet")
    assert [(row.path, row.split) for row in listed.rows] == [
        *(("dicom/a", "val"), ("nifti/c1.nii.gz", "")),
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("name,split\nc1,train\n", "no column path"),
        ("path,labels\nscans/dicom/a,x\n", "rename it to label if"),
        ("path,label\nscans/dicom/a,\nscans/gone.nii.gz,\n", "row 2 of the list .*/gone.nii.gz"),
        ("path,split\nscans/none.nii.gz,train\n", "does not exist"),
        ("path,label\nscans/nifti/c1.nii.gz,none.nii.gz\n", "which is missing"),
        ("path,split\n,train\n", "row 1 .* has no path|has no rows"),
        ("path,split\nscans/flat/notes.txt,train\n", "holds no|is no scan"),
        ("path,split\nscans/dicom/a,x\nscans/dicom/a,y\n", "given twice, .* of split: x and y"),
        ("Path,path\nscans/dicom/a,scans/flat\n", "columns Path and path, which are one but"),
        ('[{"path": "scans/dicom/a", "patient": ["a"]}]', r'patient in row 1 .* is \["a"\]; rule'),
        ('[{"path": "scans/dicom/a"}, {"path": true}]', "path in row 2 .* is true; rule"),
        ('[{"Path": "scans/dicom/a", "path": "scans/flat"}]', "columns Path and path"),
        ("[", "or leave it out, if it is no list of scans"),
    ],
)
def test_a_wrong_list_is_refused_with_one_line(archive: Path, content: str, problem: str) -> None:
    table = archive.parent / ("list.json" if content.startswith("[") else "list.csv")
    table.write_text(content)
    with pytest.raises(UserError, match=problem):
        build_manifest(table, archive.parent / "m.parquet")


def test_lists_as_spreadsheets_and_other_systems_write_them(archive: Path) -> None:
    """With a byte order mark, other line ends, spaces around values, empty cells as NaN."""
    out = archive.parent / "m.parquet"
    text = "\ufeff\r\nPath ,Split, Patient\r\nscans/dicom/a , val ,\r\n"
    (archive.parent / "list.csv").write_bytes(text.encode())
    text = '\ufeff[{" Path": " scans/dicom/a ", "split": " val", "patient": NaN, "seen": [1, 2]}]'
    (archive.parent / "list.json").write_bytes(text.encode())
    for name in ("list.csv", "list.json"):
        (row,) = build_manifest(archive.parent / name, out).rows
        assert (row.path, row.split, row.patient_from) == (".", "val", "header")


def test_a_scan_that_is_given_twice_has_the_values_of_both_places(archive: Path) -> None:
    first, second = archive.parent / "a.csv", archive.parent / "b.csv"
    first.write_text("path,split\nscans/nifti/c1.nii.gz,val\n")
    second.write_text("path,patient\nscans/nifti/c1.nii.gz,Ann\n")
    given = [archive / "nifti" / "c1.nii.gz", first, second, first]
    forget = KeepRules(fresh=True)
    for several in (given, given[::-1]):
        (row,) = build_manifest(several, archive.parent / "m.parquet", keep=forget).rows
        assert (row.path, row.split, row.patient_from) == ("c1.nii.gz", "val", "column")


def test_tables_beside_scans_are_no_lists_where_a_pattern_matches_them(archive: Path) -> None:
    """As `bids/*` matches participants.tsv and dataset_description.json."""
    (archive / "participants.tsv").write_text("participant_id\tsex\nsub-01\tF\n")
    (archive / "dataset_description.json").write_text('{"Name": "x"}')
    (archive / "list.csv").write_text("path\ndicom/a\n")
    out = archive.parent / "m.parquet"
    whole = rows_of(build_manifest(archive, out))
    assert rows_of(build_manifest(archive / "*", out)) == whole
    assert [row.path for row in build_manifest(archive / "*.csv", out).rows] == ["."]
    with pytest.raises(UserError, match="only tables and JSON files, such as .*participants.tsv"):
        build_manifest(archive / "part*", out)


def test_other_columns_of_a_list_are_named_and_not_read(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`patient_id` is nearly `patient`, which the list has too, so it is no typing error."""
    table = archive.parent / "list.csv"
    table.write_text("path,patient,patient_id,dose\nscans/dicom/a,Ann,7,3\n")
    assert len(build_manifest(table, archive.parent / "m.parquet").rows) == 1
    assert "columns that are not read: dose, patient_id" in capsys.readouterr().err


def test_files_are_counted_beside_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b", "below/c"):
        (tmp_path / name).touch()
    count = FileCount([tmp_path])
    until = time.monotonic() + 60
    while not count.is_complete and time.monotonic() < until:
        time.sleep(0.01)
    assert count.is_complete and count.num_files == 3


class Killed(BaseException):
    """Stands for the end of the process: nothing may run after it but what Python itself runs."""


@pytest.mark.parametrize("out_name", ["m.parquet", "out"])
def test_an_index_that_ends_at_any_scan_resumes(
    archive: Path, monkeypatch: pytest.MonkeyPatch, out_name: str
) -> None:
    out = archive.parent / out_name
    monkeypatch.setattr("tapct.data.index.journal._FLUSH_SECONDS", 0.0)
    for limit in (4, 5, 7):

        def end(done: int, total: int, limit: int = limit) -> None:
            if done >= limit:
                raise Killed

        with pytest.raises(Killed):
            build_manifest(archive, out, progress=end)
    with counted(archive) as times:
        resumed = build_manifest(archive, out)
    read_before = {"c0.nii.gz", "c0_seg.nii.gz", "c1.nii.gz", "000_10.dcm", "000_11.dcm"}
    assert not {Path(name).name for name in times} & read_before
    assert rows_of(resumed) == rows_of(fresh(archive, out if out_name == "out" else out.parent))
    assert not list(archive.parent.glob(".m.parquet*"))


def test_a_failure_of_the_machine_is_tried_again(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = archive.parent / "out"

    def no_disk(*_: object) -> object:
        raise Refused("unreadable", failure(OSError(5, "Input/output error")))

    monkeypatch.setattr(scan_row, "read_source", no_disk)
    assert not build_manifest(archive, out).accepted
    monkeypatch.undo()
    assert rows_of(build_manifest(archive, out)) == rows_of(fresh(archive, out))


def test_other_options_read_again_and_another_key_forgets(archive: Path) -> None:
    out = archive.parent / "out"
    build_manifest(archive, out)
    strict = build_manifest(archive, out, min_depth=13)
    assert not strict.accepted
    (out / ".patient_key").write_bytes(b"k" * 16)
    (out / "manifest.parquet").unlink()
    assert rows_of(build_manifest(archive, out)) == rows_of(fresh(archive, out))


def test_shares_in_any_order_and_number_make_the_whole(archive: Path) -> None:
    out = archive.parent / "out"
    for number in (2, 3, 3):  # the first one is lost, the third done twice
        examine_share(archive, out, Share(number, 3))
    with counted(archive) as times:
        whole = build_manifest(archive, out)
    assert len(times) < sum(path.is_file() for path in archive.rglob("*"))
    assert rows_of(whole) == rows_of(fresh(archive, out))


def test_all_shares_twice_leave_nothing_to_read(archive: Path) -> None:
    out = archive.parent / "out"
    for number in (1, 2, 1, 2):  # the second round finds the heads of all
        examine_share(archive, out, Share(number, 2))
    with counted(archive) as times:
        whole = build_manifest(archive, out)
    assert not times
    assert rows_of(whole) == rows_of(fresh(archive, out))


def test_a_share_is_a_number_of_a_number() -> None:
    assert parse_share("3/16") == Share(3, 16)
    assert parse_share(None) is None
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="rule: I/N"):
            parse_share(wrong)
    names = [f"scan{number}" for number in range(200)]
    parts = [[name for name in names if Share(k, 4).has(name)] for k in range(1, 5)]
    assert sorted(sum(parts, [])) == sorted(names)
    assert all(len(part) > 20 for part in parts)


def test_progress_comes_before_the_libraries_of_the_readers_and_ends_with_all_files(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[int, int] | str] = []
    load = finding.load_libraries
    monkeypatch.setattr(finding, "load_libraries", lambda: (events.append("loaded"), load()))
    build_manifest(
        *(archive, archive.parent / "out"),
        listed=lambda done, total, is_all: events.append((done, total)),
    )
    assert "loaded" in events[1:]  # something was shown before
    shown = [event for event in events if isinstance(event, tuple)]
    assert all(0 <= done <= total for done, total in shown)
    num_files = sum(path.is_file() for path in archive.rglob("*"))
    assert shown[-1] == (num_files, num_files)


def test_series_in_many_groups_are_put_together_as_in_one(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = archive.parent / "out"
    whole = build_manifest(archive, out)
    monkeypatch.setattr("tapct.data.index.grouping._HEADS_AT_ONCE", 4)
    monkeypatch.setattr("tapct.data.index.grouping._ROWS_AT_ONCE", 9)
    assert rows_of(build_manifest(archive, out)) == rows_of(whole)
    assert not list((out / "parts").glob("groups*"))


def test_unfinished_files_of_killed_processes_are_removed(archive: Path) -> None:
    out = archive.parent / "out"
    build_manifest(archive, out)
    old, new = out / "parts" / ".heads-1.parquet.x.tmp", out / "parts" / ".heads-2.parquet.y.tmp"
    groups = out / "parts" / "groupsabc"
    groups.mkdir()
    for path in (old, new, groups / "1-00000000.parquet"):
        path.write_bytes(b"half")
    for path in (old, groups):
        os.utime(path, (0, 0))
    build_manifest(archive, out)
    assert new.exists() and not old.exists() and not groups.exists()


def test_damaged_parts_of_a_journal_are_read_again(archive: Path) -> None:
    out = archive.parent / "out"
    build_manifest(archive, out)
    for part in (out / "parts").glob("*.parquet"):
        part.write_bytes(part.read_bytes()[:-20])
    assert rows_of(build_manifest(archive, out)) == rows_of(fresh(archive, out))


@pytest.mark.parametrize("part_rows", [4, 10, 1000])
def test_the_rows_that_are_kept_do_not_depend_on_the_size_of_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int
) -> None:
    monkeypatch.setattr("tapct.data.index.journal._PART_ROWS", part_rows)
    schema = pyarrow.schema([("number", pyarrow.int64())])
    journal = Journal(tmp_path / "parts", {}, {"rows": schema})
    names = [key_of(str(number)) for number in range(60)]
    expected: dict[bytes, int] = {}
    wanted = {names[number] for number in range(0, 60, 2)}
    for first in range(0, 60, 12):  # parts overlap, so half of the keys are there twice
        for number in range(first, min(60, first + 24)):
            journal.append("rows", names[number], {"number": number})
            if names[number] in wanted:
                expected.setdefault(names[number], number)
        journal.flush()
    for _ in range(2):
        journal.keep_only("rows", Keys(b"".join(sorted(wanted))))
        table = journal.read("rows")
        rows = list(zip(table.column(KEY).to_pylist(), table.column("number").to_pylist()))
        assert len(rows) == len(wanted) and dict(rows) == expected
        assert keys_in(table) == b"".join(key for key, _ in rows)
        assert keys_in(table[3:7]) == b"".join(key for key, _ in rows[3:7])
    sizes = [len(journal.read_part(part, "rows")) for part in journal.parts("rows")]
    assert max(sizes) <= max(part_rows // 2 + 24, part_rows) and len(sizes) <= 1 + 120 // part_rows
    before = {part: part.stat().st_mtime_ns for part in journal.parts("rows")}
    if part_rows == 1000:  # one part that is right is not written again
        journal.keep_only("rows", Keys(b"".join(wanted)))
        assert {part: part.stat().st_mtime_ns for part in journal.parts("rows")} == before


def test_keys_are_found_in_any_order() -> None:
    keys = [key_of(str(number)) for number in range(1000)]
    table = Keys(b"".join(keys))
    asked = b"".join([keys[7], key_of("missing"), keys[999], keys[7]])
    assert table.find(asked).tolist() == [7, -1, 999, 7]
    assert Keys().find(asked).tolist() == [-1] * 4


def test_a_folder_with_other_files_is_no_place_for_an_archive(archive: Path) -> None:
    with pytest.raises(UserError, match="this one has other files"):
        build_manifest(archive, archive)
    with pytest.raises(UserError, match="does not end in .parquet"):
        build_manifest(archive, archive.parent / "m.csv")


def test_a_manifest_without_the_later_columns_is_read_and_keeps_its_patients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is of a version with 34 columns, and of these two scans."""
    monkeypatch.setenv("TAPCT_PATIENT_KEY", "a key for this test")
    for seed in range(2):
        save_scan(tmp_path / "scans" / f"p{seed}" / "ct.nii.gz", make_ct((12, 32, 32), seed))
    out = tmp_path / "m.parquet"
    shutil.copy(Path(__file__).parent / "manifest_of_34_columns.parquet", out)
    before = Manifest.read(out)
    assert [(row.split, row.model) for row in before.rows] == [("", "")] * 2
    after = build_manifest(tmp_path / "scans", out)
    assert after.patient_changes is not None and not after.patient_changes.problem
    assert [row.patient for row in after.rows] == [row.patient for row in before.rows]
    assert after.digest == before.digest
    assert after.rows[0].stored_type == "int16"
