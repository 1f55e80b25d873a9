"""Packing is lossless, resumes where it stopped, and leaves nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import pytest
from small_disk import grow, small_disk

from tapct.base import files
from tapct.base.exits import UserError
from tapct.data.digest import voxel_digest
from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest, Row
from tapct.data.packed import free_space
from tapct.data.packed.free_space import SAMPLE
from tapct.data.packed.pack import pack
from tapct.data.packed.store import INDEX_NAME, Store
from tapct.data.scans.ingest import read_volume

SPACING_MM = (3.0, 0.8, 0.7)


def ct_like(shape_ZYX: tuple[int, int, int], seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 40, shape_ZYX)
    body = np.where(np.arange(shape_ZYX[2]) < shape_ZYX[2] // 3, -1000, 40)
    return np.clip(noise + body, -1024, 3000).astype(np.int16)


def write_nifti(file: Path, hu_ZYX: np.ndarray) -> None:
    """NIfTI keeps (x, y, z); an affine with negative x and y is LPS."""
    affine = np.diag([-SPACING_MM[2], -SPACING_MM[1], SPACING_MM[0], 1.0])
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(hu_ZYX.transpose(2, 1, 0)), affine), file)


def row_of(name: str, hu_ZYX: np.ndarray) -> Row:
    z, y, x = hu_ZYX.shape
    return Row(
        id=name,
        path=f"{name}.nii",
        kind="nifti",
        status="accepted",
        depth=z,
        height=y,
        width=x,
        spacing_z_mm=SPACING_MM[0],
        spacing_y_mm=SPACING_MM[1],
        spacing_x_mm=SPACING_MM[2],
        patient=f"patient of {name}",
        digest=voxel_digest(hu_ZYX),
    )


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Manifest, list[np.ndarray]]:
    """Four scans and a refused row."""
    root = tmp_path / "archive"
    root.mkdir()
    scans = [
        ct_like(shape, seed)
        for seed, shape in enumerate([(5, 40, 30), (9, 33, 41), (3, 40, 30), (17, 64, 64)])
    ]
    for i, hu_ZYX in enumerate(scans):
        write_nifti(root / f"s{i}.nii", hu_ZYX)
    rows = [row_of(f"s{i}", hu_ZYX) for i, hu_ZYX in enumerate(scans)]
    rows.insert(1, Row(id="bad", path="bad.nii", kind="nifti", reason="not_ct"))
    return Manifest(tuple(rows), root), scans


def files_of(out: Path) -> set[str]:
    return {file.name for file in out.iterdir()}


@pytest.mark.parametrize(("workers", "level"), [(0, 1), (0, 9), (2, 1)])
def test_the_store_holds_the_scans_bit_for_bit(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path, workers: int, level: int
) -> None:
    manifest, scans = archive
    seen: list[tuple[int, int]] = []
    report = pack(
        manifest,
        tmp_path / "out",
        workers=workers,
        level=level,
        progress=lambda *now: seen.append(now),
    )
    store = Store(tmp_path / "out")
    assert seen == [(done, 4) for done in (1, 2, 3, 4)]
    assert report.packed == ("s0", "s1", "s2", "s3") and not (
        report.kept or report.refused or report.damaged
    )
    assert report.voxel_bytes == sum(hu_ZYX.nbytes for hu_ZYX in scans)
    assert report.stored_bytes == sum(store.file(i).stat().st_size for i in range(4))
    assert files_of(tmp_path / "out") == {INDEX_NAME, *(f"s{i}.b2nd" for i in range(4))}
    assert store.manifest_digest == manifest.digest
    for i, hu_ZYX in enumerate(scans):  # the order of the manifest, without the refused row
        np.testing.assert_array_equal(store.read(i), hu_ZYX)
        store.verify(i)
        scan = store.scans[i]
        assert (scan.id, scan.shape_ZYX, scan.patient) == (
            f"s{i}",
            hu_ZYX.shape,
            f"patient of s{i}",
        )
        np.testing.assert_allclose(scan.spacing_mm, SPACING_MM, rtol=1e-6)
        assert not scan.has_labels


def test_a_real_manifest_packs(archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path) -> None:
    manifest, scans = archive
    built = build_manifest(
        manifest.root,
        tmp_path / "manifest.parquet",
        labels=None,
        patient_regex=None,
        min_depth=1,
        workers=0,
    )
    assert len(built.accepted) == 4, [row.detail for row in built.rows]
    pack(built, tmp_path / "out")
    store = Store(tmp_path / "out")
    assert store.manifest_digest == built.digest
    assert {scan.path: scan.checksum for scan in store.scans} == {
        f"s{i}.nii": voxel_digest(s) for i, s in enumerate(scans)
    }


def test_a_second_pack_keeps_what_is_whole(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path
) -> None:
    manifest, _ = archive
    out = tmp_path / "out"
    first = pack(manifest, out)
    times = {file.name: file.stat().st_mtime_ns for file in out.glob("*.b2nd")}
    second = pack(manifest, out)
    assert (second.packed, second.kept) == ((), 4)
    assert second.stored_bytes == first.stored_bytes
    assert times == {file.name: file.stat().st_mtime_ns for file in out.glob("*.b2nd")}


def test_damaged_and_outdated_files_are_written_again_and_leftovers_removed(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path
) -> None:
    manifest, scans = archive
    out = tmp_path / "out"
    pack(manifest, out)
    whole = (out / "s1.b2nd").read_bytes()
    (out / "s1.b2nd").write_bytes(whole[:-100])  # cut short
    (out / "s2.b2nd").write_bytes(whole)  # another scan under this name
    (out / "s3.b2nd").unlink()
    (out / ".s3.b2nd.77.tmp").write_bytes(whole[:50])  # of a run that was killed
    (out / "gone.b2nd").write_bytes(whole)
    Path(os.fsdecode(os.fsencode(out) + b"/caf\xe9.b2nd")).touch()  # a name that is not Unicode
    report = pack(manifest, out)
    assert (report.packed, report.damaged, report.kept) == (("s1", "s2", "s3"), ("s1",), 1)
    assert report.unlisted == ("caf?.b2nd", "gone.b2nd") and not list(out.glob(".*.tmp"))
    for i, hu_ZYX in enumerate(scans):
        np.testing.assert_array_equal(Store(out).read(i), hu_ZYX)


def test_a_scan_with_new_voxels_on_the_old_grid_is_packed_again(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path
) -> None:
    manifest, scans = archive
    pack(manifest, tmp_path / "out")
    changed = scans[1] + np.int16(1)
    write_nifti(manifest.root / "s1.nii", changed)
    again = Manifest((row_of("s0", scans[0]), row_of("s1", changed)), manifest.root)
    report = pack(again, tmp_path / "out")
    assert (report.packed, report.kept, report.damaged) == (("s1",), 1, ())
    assert report.unlisted == ("s2.b2nd", "s3.b2nd")
    np.testing.assert_array_equal(Store(tmp_path / "out").read(1), changed)


@pytest.mark.slow
def test_real_scans_pack_bit_for_bit(tmp_path: Path) -> None:
    root = Path(os.environ.get("TAPCT_TEST_CT", "../shared/data/ct"))
    if not root.is_dir():
        pytest.skip(f"no real scans at {root}; set TAPCT_TEST_CT")
    manifest = build_manifest(
        root, tmp_path / "m.parquet", labels=None, patient_regex=None, min_depth=1, workers=0
    )
    report = pack(manifest, tmp_path / "out", workers=2)
    assert len(report.packed) == len(manifest.accepted) > 3 and not report.refused
    assert report.stored_bytes < 0.6 * report.voxel_bytes
    store = Store(tmp_path / "out")
    for i, scan in enumerate(store.scans):
        store.verify(i)
        np.testing.assert_array_equal(store.read(i), read_volume(root / scan.path).hu_ZYX)


def test_scans_that_vanished_or_changed_are_refused_and_named(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path
) -> None:
    manifest, scans = archive
    (manifest.root / "s0.nii").unlink()
    changed = scans[1].copy()
    changed[0, 0, 0] += 1
    write_nifti(manifest.root / "s1.nii", changed)
    write_nifti(manifest.root / "s2.nii", scans[2][:, :-1])
    report = pack(manifest, tmp_path / "out")
    refused = {scan.id: (scan.reason, scan.detail) for scan in report.refused}
    assert {name: reason for name, (reason, _) in refused.items()} == {
        "s0": "vanished",
        "s1": "changed",
        "s2": "changed",
    }
    assert "(3, 39, 30)" in refused["s2"][1] and "(3, 40, 30)" in refused["s2"][1]
    assert all("tapct index" in detail and "\n" not in detail for _, detail in refused.values())
    assert [scan.id for scan in Store(tmp_path / "out").scans] == ["s3"]


def test_nothing_packed_is_an_error_and_leaves_no_index(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path
) -> None:
    manifest, _ = archive
    for file in manifest.root.glob("*.nii"):
        file.unlink()
    with pytest.raises(UserError, match=r"none of the 4.*s0\.nii: vanished") as error:
        pack(manifest, tmp_path / "out")
    assert "\n" not in str(error.value) and not files_of(tmp_path / "out")


def test_bad_requests_are_refused(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path
) -> None:
    manifest, _ = archive
    row = manifest.accepted[0]
    with pytest.raises(UserError, match="no accepted scan"):
        pack(Manifest((), manifest.root), tmp_path / "out")
    for level in (0, 10):
        with pytest.raises(UserError, match=f"level is {level}; rule: 1 to 9"):
            pack(manifest, tmp_path / "out", level=level)
    for rows in [
        (row, row),
        (dataclasses.replace(row, id="../s0"),),
        (dataclasses.replace(row, id=".s0"),),
    ]:
        with pytest.raises(UserError, match="id"):
            pack(Manifest(rows, manifest.root), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the store"):
        pack(manifest, tmp_path / "file")


def test_two_packs_into_one_folder_do_not_mix(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path
) -> None:
    manifest, _ = archive

    def second_pack(done: int, total: int) -> None:
        with pytest.raises(
            UserError, match=r"is being written by another process \(.*choose another --out"
        ):
            pack(manifest, tmp_path / "out")

    assert len(pack(manifest, tmp_path / "out", progress=second_pack).packed) == 4


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_two_packs_do_not_mix_where_flock_does_not_exist(
    archive: tuple[Manifest, list[np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    def no_flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    test_two_packs_into_one_folder_do_not_mix(archive, tmp_path)


def test_a_store_that_cannot_be_written_is_refused_before_a_scan_is_read(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        pytest.fail("a scan was read")

    def open_file(path: object, flags: int, mode: int = 0o777, **_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr("tapct.data.packed.pack_scan.read_source", read)
    monkeypatch.setattr(os, "open", open_file)  # by which the lease is created
    with pytest.raises(UserError, match=r"cannot write the store .*: Read-only file system"):
        pack(archive[0], tmp_path / "out")


class FullDisk(io.FileIO):
    """Takes 1000 bytes, then the disk is full."""

    def write(self, content: bytes) -> int:  # type: ignore[override]
        super().write(content[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_scans_that_do_not_fit_are_refused_by_an_estimate_before_most_are_packed(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, scans = archive
    shape_ZYX, more = (5, 40, 30), 36
    extra = []
    for i in range(more):
        hu_ZYX = ct_like(shape_ZYX, 100 + i)
        write_nifti(manifest.root / f"t{i:02d}.nii", hu_ZYX)
        extra.append(row_of(f"t{i:02d}", hu_ZYX))
    manifest = replace(manifest, rows=(*manifest.rows, *extra))
    voxels = sum(hu_ZYX.nbytes for hu_ZYX in scans) + more * 2 * int(np.prod(shape_ZYX))
    printed_lines: list[str] = []

    def packed_with(free: int) -> int:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(free_space.shutil, "disk_usage", lambda _: usage)
        return len(pack(manifest, tmp_path / f"out{free}", say=printed_lines.append).packed)

    assert packed_with(voxels) == 40 and "40 scans to pack" in printed_lines[-1]
    # the noise of these scans packs to about two thirds: enough here, though not uncompressed
    assert packed_with(int(0.95 * voxels)) == 40 and "packed first" in printed_lines[-1]
    free = int(0.3 * voxels)
    with pytest.raises(UserError, match=r"no space .* about .* GB .*% of the voxels.*packed first"):
        packed_with(free)
    assert len(files_of(tmp_path / f"out{free}")) == SAMPLE  # nothing more was packed


def test_without_a_packed_sample_the_room_is_not_estimated(
    archive: tuple[Manifest, list[np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, scans = archive
    hu_ZYX = ct_like((5, 40, 30), 100)
    write_nifti(manifest.root / "t.nii", hu_ZYX)
    gone = [replace(row, path=f"gone{i}.nii") for i, row in enumerate(manifest.rows[:SAMPLE])]
    manifest = replace(manifest, rows=(*gone, row_of("t", hu_ZYX)))
    # the last of five scans is not among those that are packed first
    usage = shutil.disk_usage(tmp_path)._replace(free=hu_ZYX.nbytes)
    monkeypatch.setattr(free_space.shutil, "disk_usage", lambda _: usage)
    lines: list[str] = []
    report = pack(manifest, tmp_path / "out", say=lines.append)
    assert len(report.packed) == 1 and len(lines) == 1
    assert "uncompressed" in lines[0] and "about" not in lines[0]


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_every_codec_gives_back_the_voxels(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path, codec: str
) -> None:
    manifest, scans = archive
    pack(manifest, tmp_path / "out", codec=codec)
    store = Store(tmp_path / "out")
    for i, hu_ZYX in enumerate(scans):
        np.testing.assert_array_equal(store.read(i), hu_ZYX)
    used = blosc2.open(str(store.file(0)), mode="r").cparams.codec
    assert used.name.lower() == codec
    with pytest.raises(UserError, match="the codec is 'gzip'; rule: zstd or lz4"):
        pack(manifest, tmp_path / "other", codec="gzip")


def test_files_of_hashed_ids_fan_out_and_a_flat_store_stays_readable(
    archive: tuple[Manifest, list[np.ndarray]], tmp_path: Path
) -> None:
    manifest, scans = archive
    ids = {row.id: f"{k:03x}{row.id.encode().hex():0>13}" for k, row in enumerate(manifest.rows)}
    manifest = replace(manifest, rows=tuple(replace(r, id=ids[r.id]) for r in manifest.rows))
    out = tmp_path / "out"
    names = [row.id for row in manifest.accepted]
    pack(manifest, out)
    assert sorted(files_of(out)) == sorted({INDEX_NAME, *(name[:3] for name in names)})
    assert all((out / name[:3] / f"{name}.b2nd").is_file() for name in names)
    # as earlier versions wrote it
    for name in names[:2]:
        (out / name[:3] / f"{name}.b2nd").rename(out / f"{name}.b2nd")
        (out / name[:3]).rmdir()
    store = Store(out)
    for i, hu_ZYX in enumerate(scans):
        np.testing.assert_array_equal(store.read(i), hu_ZYX)
    assert store.file(0) == out / f"{names[0]}.b2nd"
    (out / names[2][:3] / f".{names[2]}.b2nd.77.tmp").write_bytes(b"of a killed pack")
    report = pack(manifest, out)
    assert (report.kept, report.unlisted) == (4, ())
    assert not list(out.rglob("*.tmp")) and (out / f"{names[0]}.b2nd").is_file()


@pytest.mark.parametrize("full_from", ["s0.b2nd", "s2.b2nd", INDEX_NAME])
def test_a_full_disk_reports_what_is_needed_and_leaves_whole_files_only(
    archive: tuple[Manifest, list[np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full_from: str,
) -> None:
    manifest, scans = archive
    out = tmp_path / "out"
    before = {"s0.b2nd": 0, "s2.b2nd": 2, INDEX_NAME: 4}[full_from]

    def open_file(file: Path, mode: str) -> Any:
        return FullDisk(file, "w") if full_from in Path(file).name else open(file, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", open_file, raising=False)
        with pytest.raises(
            UserError, match=rf"no space left.*{before} of 4 scans.*needs about .* GB.*are free"
        ) as error:
            pack(manifest, out)
    assert "\n" not in str(error.value) and str(out) in str(error.value)
    assert files_of(out) == {f"s{i}.b2nd" for i in range(before)}
    report = pack(manifest, out)
    assert (len(report.packed), report.kept, report.damaged) == (4 - before, before, ())
    for i, hu_ZYX in enumerate(scans):
        np.testing.assert_array_equal(Store(out).read(i), hu_ZYX)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_really_full_disk(tmp_path: Path, workers: int) -> None:
    root = tmp_path / "archive"
    root.mkdir()
    noise = [
        np.random.default_rng(i).integers(-1024, 3000, (4, 128, 128)).astype(np.int16)
        for i in range(6)
    ]
    for i, hu_ZYX in enumerate(noise):
        write_nifti(root / f"s{i}.nii", hu_ZYX)
    manifest = Manifest(tuple(row_of(f"s{i}", hu_ZYX) for i, hu_ZYX in enumerate(noise)), root)
    with small_disk(tmp_path / "small", "400k") as out:
        with pytest.raises(UserError, match="no space left"):
            pack(manifest, out, workers=workers)
        assert files_of(out) and all(name.endswith(".b2nd") for name in files_of(out))
        grow(out, "8m")
        whole = len(files_of(out))
        report = pack(manifest, out, workers=workers)
        assert (report.kept, len(report.packed), report.damaged) == (whole, 6 - whole, ())
        for i in range(6):
            Store(out).verify(i)


@pytest.mark.slow
def test_an_interrupt_leaves_a_state_that_resumes(tmp_path: Path) -> None:
    root, out = tmp_path / "archive", tmp_path / "out"
    root.mkdir()
    scans = [ct_like((40, 256, 256), i) for i in range(12)]
    for i, hu_ZYX in enumerate(scans):
        write_nifti(root / f"s{i}.nii", hu_ZYX)
    build_manifest(
        root, tmp_path / "manifest.parquet", labels=None, patient_regex=None, min_depth=1, workers=0
    )
    script = tmp_path / "run.py"
    script.write_text(
        "import signal, sys, time\nfrom pathlib import Path\n"
        "from tapct.data.manifest import Manifest\nfrom tapct.data.packed import pack\n"
        "once = pack.pack_scan\n"
        "def pack_scan(task):\n"  # the workers import this file too
        "    time.sleep(0.5)\n"  # else all may be packed before a busy machine sends the interrupt
        "    return once(task)\n"
        "pack_scan.__module__, pack.pack_scan = pack.__name__, pack_scan\n"
        "if __name__ == '__main__':\n"
        # what a shell starts with & ignores it
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    here = Path(sys.argv[1])\n"
        "    pack.pack(Manifest.read(here / 'manifest.parquet'), here / 'out', workers=2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.Popen(
        [sys.executable, script, tmp_path], start_new_session=True, env=environment, stderr=-1
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*.b2nd")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # what a terminal does at Ctrl-C
    stderr = run.communicate(timeout=60)[1].decode()
    assert run.returncode in (-signal.SIGINT, 1, 130) and "KeyboardInterrupt" in stderr, stderr
    assert not (out / INDEX_NAME).exists() and not list(out.glob(".*.tmp"))
    whole = len(list(out.glob("*.b2nd")))
    assert 0 < whole < 12
    report = pack(Manifest.read(tmp_path / "manifest.parquet"), out)
    assert (report.kept, report.damaged) == (whole, ())
    by_path = {scan.path: i for i, scan in enumerate(Store(out).scans)}
    for i, hu_ZYX in enumerate(scans):
        np.testing.assert_array_equal(Store(out).read(by_path[f"s{i}.nii"]), hu_ZYX)
    assert not multiprocessing.active_children()
