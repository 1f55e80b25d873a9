"""Several processes pack one store, each its share; a last call lists what they have packed."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scan_files import make_ct, save_scan

from tapct.base.exits import UserError
from tapct.base.lease import hold
from tapct.data.index.build import build_manifest
from tapct.data.index.share import Share
from tapct.data.manifest import Manifest, Row, RowTable, rows_as_table
from tapct.data.packed import free_space
from tapct.data.packed import pack as packer
from tapct.data.packed.pack import LEASE_NAME, pack
from tapct.data.packed.pack_scan import PackOutcome
from tapct.data.packed.store import Store, StoredScan
from tapct.data.patients.key import KEY_VARIABLE


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("shares")
    for seed in range(6):
        save_scan(folder / "scans" / f"c{seed}.nii.gz", make_ct((12, 32, 32), seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "shares")  # with a random key, a share may be empty
        return build_manifest(folder / "scans", folder / "m.parquet")


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.rglob("*.b2nd")}


def test_shares_pack_what_one_process_packs(manifest: Manifest, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    pack(manifest, alone)
    packed: list[str] = []
    for number in (3, 1, 1):  # the second of three is lost, one is done twice
        part = pack(manifest, shared, share=Share(number, 3))
        assert not part.unlisted  # the files of the other shares are no leftovers
        packed += part.packed
    assert len(packed) == len(set(packed)) < len(manifest.accepted)
    assert not (shared / "store.parquet").exists()
    report = pack(manifest, shared)
    assert report.kept == len(packed) and report.kept + len(report.packed) == 6
    assert contents(shared) == contents(alone)
    ids = [[scan.id for scan in Store(out).scans] for out in (alone, shared)]
    assert ids[0] == ids[1]
    assert not [name for name in os.listdir(shared) if name.startswith(".lease")]


def test_a_store_is_not_finished_while_a_share_is_packed(
    manifest: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    out.mkdir()
    with (
        hold(out / f"{LEASE_NAME}{Share(1, 2).name}", "the store"),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        pack(manifest, out)
    assert len(pack(manifest, out).packed) == 6


def test_the_room_of_a_share_counts_the_scans_of_the_others(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = sum(2 * row.depth * row.height * row.width for row in manifest.accepted)
    usage = shutil.disk_usage(tmp_path)._replace(free=voxels // 4)  # enough for one share of six
    monkeypatch.setattr(free_space.shutil, "disk_usage", lambda _: usage)
    lines: list[str] = []
    number = next(k for k in range(1, 7) if any(Share(k, 6).has(r.id) for r in manifest.accepted))
    with pytest.raises(UserError, match="no space .* in all 6 parts"):
        pack(manifest, tmp_path / "store", share=Share(number, 6), say=lines.append)
    usage = usage._replace(free=voxels)
    pack(manifest, tmp_path / "store", share=Share(number, 6), say=lines.append)
    (line,) = lines
    left = len(manifest.accepted) - len(list((tmp_path / "store").rglob("*.b2nd")))
    assert line.startswith("space: ") and "in all 6 parts" in line and left < 6


def test_no_object_is_kept_for_a_scan(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest of many scans that are packed: memory beside its columns grows by a few bytes
    per scan.
    """
    few, many = 300, 1500
    table = rows_as_table(manifest.accepted[:1])
    monkeypatch.setattr(
        packer, "pack_task", lambda task: PackOutcome(_stored(task.row), stored_bytes=1)
    )
    monkeypatch.setattr(packer, "are_present", lambda out, rows: np.ones(len(rows), bool))
    peaks = []
    for num in (few, many):
        rows = table.take(pa.array(np.zeros(num, np.int64)))
        ids = pa.array([f"{k:016x}" for k in range(num)])
        rows = rows.set_column(rows.schema.get_field_index("id"), "id", ids)
        large = replace(manifest, rows=RowTable(rows), file=None)
        assert len(large.accepted) == num
        tracemalloc.start()
        report = pack(large, tmp_path / str(num))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(report.packed) == num == len(Store(tmp_path / str(num)))
        assert report.packed[0] == f"{0:016x}" and report.packed[-1] == f"{num - 1:016x}"
    # the list of the store is written as bytes, about 100 per scan, some of them twice
    assert (peaks[1] - peaks[0]) / (many - few) < 600


def _stored(row: Row) -> StoredScan:
    shape_ZYX = (row.depth, row.height, row.width)
    spacing_mm = (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm)
    return StoredScan(row.id, shape_ZYX, spacing_mm, row.patient, row.path, "", row.digest)
