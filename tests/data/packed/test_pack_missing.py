"""What `tapct pack` does with accepted scans that are gone, changed, or of another archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scan_files import noise_ct, save_labels, save_scan
from shell import Shell
from shell import shell as shell  # a fixture

from tapct.base import exits
from tapct.base.exits import UserError
from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.packed_scan import open_packed
from tapct.data.packed.store import Store

NUM = 14  # more than `tapct pack` names one by one


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(folder of scans, manifest, store that is not packed yet)."""
    for seed in range(NUM):
        save_scan(tmp_path / "scans" / f"c{seed:02d}.nii.gz", noise_ct(seed))
    build_manifest(tmp_path / "scans", tmp_path / "m.parquet", min_depth=1)
    assert len(Manifest.read(tmp_path / "m.parquet").accepted) == NUM
    return tmp_path / "scans", tmp_path / "m.parquet", tmp_path / "store"


def test_missing_scans_are_named_the_rest_is_packed_and_the_exit_code_is_4(
    archive: tuple[Path, Path, Path], shell: Shell
) -> None:
    scans, manifest, folder = archive
    for seed in range(12):
        (scans / f"c{seed:02d}.nii.gz").unlink()
    save_scan(scans / "c12.nii.gz", noise_ct(99))
    command = ("pack", manifest, "--out", folder, "--workers", "1")
    code, out, err = shell(*command)
    assert code == exits.INCOMPLETE == 4
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "13 accepted scans" in lines[0]
    assert "12 vanished, 1 changed" in lines[0] and "--allow-missing 13" in lines[0]
    named = [line for line in out.splitlines() if line.startswith("  refused ")]
    assert len(named) == 11 and "c00.nii.gz: vanished" in named[0] and "3 more" in named[-1]
    assert [scan.path for scan in Store(folder).scans] == ["c13.nii.gz"]
    assert shell(*command, "--allow-missing", "12")[0] == exits.INCOMPLETE
    assert "13 refused" in shell.good(*command, "--allow-missing", "13")


def test_missing_labels_count_as_a_missing_scan(tmp_path: Path, shell: Shell) -> None:
    for seed in range(2):
        save_scan(tmp_path / "scans" / f"c{seed}.nii.gz", noise_ct(seed))
        save_labels(tmp_path / "labels" / f"c{seed}.nii.gz")
    built = build_manifest(
        tmp_path / "scans", tmp_path / "m.parquet", labels=tmp_path / "labels", min_depth=1
    )
    assert all(row.label_path for row in built.accepted)
    (tmp_path / "labels" / "c1.nii.gz").unlink()
    code, out, err = shell("pack", tmp_path / "m.parquet", "--out", tmp_path / "store")
    assert code == exits.INCOMPLETE and "2 packed" in out and "1 accepted scan " in err
    assert "labels ../labels/c1.nii.gz not packed" in out


def outdated(archive: tuple[Path, Path, Path]) -> tuple[Store, Path]:
    """A store whose scan 1 changed before the second index, and vanished after it; and the new
    manifest.
    """
    scans, manifest, folder = archive
    pack(Manifest.read(manifest), folder)
    store = Store(folder)
    save_scan(scans / "c01.nii.gz", noise_ct(99))
    build_manifest(scans, manifest, min_depth=1)
    (scans / "c01.nii.gz").unlink()
    return store, manifest


def test_the_store_keeps_what_it_has_of_a_missing_scan_until_it_is_dropped(
    archive: tuple[Path, Path, Path], shell: Shell
) -> None:
    store, manifest = outdated(archive)
    original = store.read(1)
    command = ("pack", manifest, "--out", store.path, "--workers", "1")
    code, out, _ = shell(*command)
    assert code == exits.INCOMPLETE and "keeps what it had before of 1 refused scan" in out
    kept = Store(store.path)
    assert kept.scans == store.scans and kept.digest == store.digest
    np.testing.assert_array_equal(kept.read(1), original)
    assert "belongs to no scan" not in out
    code, out, _ = shell(*command, "--drop-missing")
    assert code == exits.INCOMPLETE and "keeps what" not in out
    assert len(Store(store.path)) == NUM - 1 and store.file(1).is_file()
    assert "1 file of" in out and "no scan that the store lists" in out


def test_a_damaged_file_whose_scan_is_gone_stays_listed(archive: tuple[Path, Path, Path]) -> None:
    scans, manifest, folder = archive
    pack(Manifest.read(manifest), folder)
    store = Store(folder)
    store.file(2).write_bytes(store.file(2).read_bytes()[:-20])
    (scans / "c02.nii.gz").unlink()
    report = pack(Manifest.read(manifest), folder)
    assert report.held == (store.scans[2].id,) and report.num_missing == 1
    assert Store(folder).scans == store.scans
    store.file(2).unlink()  # now the store has nothing of it
    assert pack(Manifest.read(manifest), folder).held == ()
    assert len(Store(folder)) == NUM - 1


@pytest.mark.parametrize("same_key", [True, False])
def test_a_manifest_of_another_archive_replaces_a_store_only_on_request(
    archive: tuple[Path, Path, Path], shell: Shell, same_key: bool
) -> None:
    scans, manifest, folder = archive
    pack(Manifest.read(manifest), folder)
    before = Store(folder).scans
    other = scans.parent if same_key else scans.parent / "elsewhere"
    # the same names: with one key, the same ids
    for seed in range(2):
        save_scan(other / "others" / f"c{seed:02d}.nii.gz", noise_ct(50 + seed))
    build_manifest(other / "others", other / "o.parquet", min_depth=1)
    command = ("pack", other / "o.parquet", "--out", folder, "--workers", "1")
    line = shell.bad(*command)
    assert "another archive" in line and "--replace-store" in line
    assert ("patient key" in line) == (not same_key)
    assert Store(folder).scans == before
    files = {scan.id: open_packed(Store(folder).file(i))[1] for i, scan in enumerate(before)}
    assert all(meta.checksum == scan.checksum for meta, scan in zip(files.values(), before))
    assert "2 packed" in shell.good(*command, "--replace-store")
    assert len(Store(folder)) == 2


def test_an_archive_that_grew_shrank_or_was_converted_again_is_the_same_archive(
    archive: tuple[Path, Path, Path],
) -> None:
    scans, manifest, folder = archive
    pack(Manifest.read(manifest), folder)
    for seed in range(1, NUM):
        (scans / f"c{seed:02d}.nii.gz").unlink()
    save_scan(scans / "new.nii.gz", noise_ct(77))
    assert len(pack(build_manifest(scans, manifest, min_depth=1), folder).packed) == 1
    assert len(Store(folder)) == 2
    save_scan(scans / "c00.nii.gz", noise_ct(200))  # every scan has other voxels
    save_scan(scans / "new.nii.gz", noise_ct(201))
    assert len(pack(build_manifest(scans, manifest, min_depth=1), folder).packed) == 2


def test_nothing_of_a_store_changes_where_no_scan_can_be_packed(
    archive: tuple[Path, Path, Path],
) -> None:
    scans, manifest, folder = archive
    pack(Manifest.read(manifest), folder)
    for i in range(NUM):
        save_scan(scans / f"c{i:02d}.nii.gz", noise_ct(200 + i))
    built = build_manifest(scans, manifest, min_depth=1)
    for file in scans.glob("*.nii.gz"):
        file.unlink()
    before = (folder / "store.parquet").read_bytes()
    with pytest.raises(UserError, match="none of the 14 accepted scans could be packed"):
        pack(built, folder)
    assert (folder / "store.parquet").read_bytes() == before
