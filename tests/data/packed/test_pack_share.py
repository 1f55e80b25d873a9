"""Several processes pack one store, each its share; a last call lists what they have packed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scan_files import make_ct, save_scan

from tapct.base.exits import UserError
from tapct.base.lease import hold
from tapct.data.index.build import build_manifest
from tapct.data.index.share import Share
from tapct.data.manifest import Manifest
from tapct.data.packed.pack import LEASE_NAME, pack
from tapct.data.packed.store import Store
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
