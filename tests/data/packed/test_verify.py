"""A store is verified by reading it whole: damage that a plain pack does not notice is found."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scan_files import noise_ct, save_scan
from shell import Shell, files_of
from shell import shell as shell  # a fixture

from tapct.base import exits
from tapct.data.index.build import build_manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.packed_scan import open_packed
from tapct.data.packed.store import Store
from tapct.data.packed.verify import damaged_scans


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Path]:
    """(manifest, store) of three scans."""
    for seed in range(3):
        save_scan(tmp_path / "scans" / f"c{seed}.nii.gz", noise_ct(seed))
    manifest = build_manifest(tmp_path / "scans", tmp_path / "m.parquet")
    pack(manifest, tmp_path / "store")
    return tmp_path / "m.parquet", tmp_path / "store"


def flip_voxels(store: Store, i: int) -> None:
    """Damage the middle of a scan's first chunk, where opening the file does not look."""
    offset, length = (int(number) for number in open_packed(store.file(i))[1].byte_ranges_C2[0])
    content = bytearray(store.file(i).read_bytes())
    for place in range(offset + length // 2, offset + length // 2 + 8):
        content[place] ^= 0xFF
    store.file(i).write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_store_has_no_damaged_scan(packed: tuple[Path, Path], workers: int) -> None:
    seen: list[tuple[int, int]] = []
    store = Store(packed[1])
    assert damaged_scans(store, workers=workers, progress=lambda *now: seen.append(now)) == {}
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_scans_are_named_in_the_order_of_the_store(
    packed: tuple[Path, Path], workers: int
) -> None:
    store = Store(packed[1])
    flip_voxels(store, 2)
    store.file(0).write_bytes(store.file(0).read_bytes()[:-50])
    damaged = damaged_scans(Store(packed[1]), workers=workers)
    errors = [str(error) for error in damaged.values()]
    assert list(damaged) == [0, 2]
    assert len(errors) == 2 and all("\n" not in error for error in errors)
    assert store.scans[0].id in errors[0] and store.scans[2].id in errors[1]


def test_pack_verify_reports_each_damaged_scan_and_ends_with_2(
    packed: tuple[Path, Path], shell: Shell
) -> None:
    manifest, folder = packed
    command = ("pack", manifest, "--out", folder, "--workers", "0")
    assert "3 of 3 packed scans verified" in shell.good(*command, "--verify")
    store = Store(folder)
    original = store.read(1)
    flip_voxels(store, 1)
    assert "verified" not in shell.good(*command)  # a plain pack looks at the outside of a file
    code, out, err = shell(*command, "--verify")
    lines = [line for line in out.splitlines() if "is damaged" in line]
    assert (code, err) == (2, "") and "2 of 3 packed scans verified" in out
    assert len(lines) == 1 and str(store.file(1)) in lines[0]
    assert "--verify --repair" in lines[0]
    store.file(1).unlink()
    assert "1 packed, 2 kept" in shell.good(*command)
    assert "3 of 3 packed scans verified" in shell.good(*command, "--verify")
    np.testing.assert_array_equal(Store(folder).read(1), original)


def test_pack_reports_damaged_files_and_files_of_no_scan(
    packed: tuple[Path, Path], shell: Shell
) -> None:
    manifest, folder = packed
    store = Store(folder)
    content = store.file(0).read_bytes()
    store.file(0).write_bytes(content[:-50])
    (folder / "other.b2nd").write_bytes(content)
    out = shell.good("pack", manifest, "--out", folder, "--workers", "0")
    assert f"damaged files packed again: {store.scans[0].id}" in out
    assert "1 file of" in out and "belongs to no scan that the store lists" in out


def test_repair_packs_the_damaged_scans_again_from_the_archive(
    packed: tuple[Path, Path], shell: Shell
) -> None:
    manifest, folder = packed
    command = ("pack", manifest, "--out", folder, "--workers", "0")
    store = Store(folder)
    originals = [store.read(i) for i in range(3)]
    flip_voxels(store, 1)
    store.file(2).write_bytes(store.file(2).read_bytes()[:-50])
    times = store.file(0).stat().st_mtime_ns
    out = shell.good(*command, "--verify", "--repair")
    assert "2 of 3 packed scans verified" in out and "3 of 3 packed scans verified" in out
    for i, original in enumerate(originals):
        np.testing.assert_array_equal(Store(folder).read(i), original)
    assert store.file(0).stat().st_mtime_ns == times  # a whole one is not touched


def test_repair_names_what_the_archive_no_longer_has(
    packed: tuple[Path, Path], shell: Shell
) -> None:
    manifest, folder = packed
    store = Store(folder)
    flip_voxels(store, 1)
    (manifest.parent / "scans" / store.scans[1].path).unlink()
    command = ("pack", manifest, "--out", folder, "--workers", "0")
    code, out, _ = shell(*command, "--verify", "--repair")
    assert code == 2 and f"cannot be packed: {store.scans[1].path}" in out
    assert out.count("2 of 3 packed scans verified") == 2  # the store keeps what it has
    assert Store(folder).digest == store.digest
    assert "give both" in shell.bad(*command, "--repair")
    code, out, _ = shell(*command, "--verify", "--repair", "--drop-missing")
    assert code == 2 and f"cannot be packed: {store.scans[1].path}" in out
    assert "2 of 2 packed scans verified" in out and store.file(1).is_file()


def test_a_damaged_scan_that_cannot_be_packed_again_is_not_deleted(
    packed: tuple[Path, Path], shell: Shell
) -> None:
    manifest, folder = packed
    store, scans = Store(folder), manifest.parent / "scans"
    flip_voxels(store, 1)
    content = store.file(1).read_bytes()
    scans.rename(manifest.parent / "moved")
    command = ("pack", manifest, "--out", folder, "--workers", "0", "--verify", "--repair")
    code, out, _ = shell(*command)
    assert code == 2 and f"cannot be packed: {store.scans[1].path}" in out
    assert store.file(1).read_bytes() == content and len(Store(folder)) == 3
    # with the archive back, it is repaired
    out = shell.good(*command, "--root", manifest.parent / "moved")
    assert "3 of 3 packed scans verified" in out


def facts_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of the last change and inode of a folder and of everything in it."""
    found = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def test_verify_alone_writes_nothing(
    packed: tuple[Path, Path], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not for an instant: no file of the store's folder is opened for writing."""
    manifest, folder = packed
    (folder / ".other.b2nd.77.tmp").write_bytes(b"of a pack that was killed")
    flip_voxels(Store(folder), 1)
    before, contents = facts_of(manifest.parent), files_of(manifest.parent)
    command = ("pack", manifest, "--out", folder, "--workers", "1", "--verify")
    code, out, _ = shell(*command)
    assert code == 2 and "2 of 3 packed scans verified" in out
    assert facts_of(manifest.parent) == before and files_of(manifest.parent) == contents
    # a folder that nobody may write: root may write everywhere, so the calls are refused here
    real_open = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real_open(path, flags, *rest, **more)

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "open", read_only)
    for name in ("mkdir", "unlink", "remove", "rename", "replace", "link", "symlink", "chmod"):
        monkeypatch.setattr(os, name, refuse)
    assert shell(*command)[:2] == (code, out)


def test_verify_without_a_store_names_the_next_step_and_makes_none(
    packed: tuple[Path, Path], shell: Shell, tmp_path: Path
) -> None:
    line = shell.bad("pack", packed[0], "--out", tmp_path / "none", "--verify")
    assert "none does not exist" in line and "tapct pack" in line
    assert not (tmp_path / "none").exists()


def test_verify_notices_scans_that_were_never_packed_and_stores_of_another_archive(
    packed: tuple[Path, Path], shell: Shell, tmp_path: Path
) -> None:
    scans, folder = packed[0].parent / "scans", packed[1]
    save_scan(scans / "c3.nii.gz", noise_ct(3))
    build_manifest(scans, packed[0])
    code, out, err = shell("pack", packed[0], "--out", folder, "--verify")
    assert code == exits.INCOMPLETE and "3 of 3 packed scans verified" in out
    assert "lacks 1 accepted scan" in err and "c3.nii.gz" in err
    shell.good("pack", packed[0], "--out", folder, "--verify", "--allow-missing", "1")
    save_scan(tmp_path / "others" / "c0.nii.gz", noise_ct(7))
    build_manifest(tmp_path / "others", tmp_path / "o.parquet")
    code, _, err = shell("pack", tmp_path / "o.parquet", "--out", folder, "--verify")
    assert code == 2 and "another archive" in err
