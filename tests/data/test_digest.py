"""The digest of voxels: its value, what changes it, and that index and pack agree on it."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_run import make_archive

from tapct.data.digest import voxel_digest
from tapct.data.index.build import build_manifest
from tapct.data.packed import pack
from tapct.data.packed.store import Store

HU_ZYX = np.array([[[-1024, 0, 1], [40, 300, 3071]]], np.int16)


def test_the_digest_is_that_of_bytes_written_by_hand(tmp_path: Path) -> None:
    content = b"(1, 2, 3)" + struct.pack("<6h", -1024, 0, 1, 40, 300, 3071)
    (tmp_path / "bytes").write_bytes(content)
    line = ["b2sum", "--length=128", str(tmp_path / "bytes")]  # coreutils, not Python's hashlib
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert voxel_digest(HU_ZYX) == done.stdout.split()[0]


def test_the_digest_of_a_known_scan_never_changes() -> None:
    """Manifests and stores on disk hold it, so a change would make all of them unusable."""
    assert voxel_digest(HU_ZYX) == "2ac44439ed9233f6cd7cb1d9eae66a33"


@pytest.mark.parametrize(
    "same",
    [
        np.asfortranarray(HU_ZYX),
        HU_ZYX.astype(">i2"),
        np.repeat(HU_ZYX, 2, axis=2)[:, :, ::2],
    ],
)
def test_memory_layout_does_not_count(same: np.ndarray) -> None:
    assert voxel_digest(same) == voxel_digest(HU_ZYX)


def test_shape_and_every_voxel_count() -> None:
    digests = {voxel_digest(HU_ZYX), voxel_digest(HU_ZYX.reshape(1, 3, 2))}
    for place in np.ndindex(HU_ZYX.shape):
        changed = HU_ZYX.copy()
        changed[place] += 1
        digests.add(voxel_digest(changed))
    assert len(digests) == 2 + HU_ZYX.size


def test_manifest_and_store_hold_the_digest_of_the_voxels(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "archive", num=2, dicom_share=0.5)
    manifest = build_manifest(
        archive,
        tmp_path / "m.parquet",
        labels=None,
        patient_regex=None,
        min_depth=1,
        workers=0,
        progress=None,
    )
    pack.pack(manifest, tmp_path / "store", workers=0)
    store = Store(tmp_path / "store")
    indexed = {row.id: row.digest for row in manifest.accepted}
    assert len(indexed) == len(store.scans) == 2
    for number, scan in enumerate(store.scans):
        assert indexed[scan.id] == scan.checksum == voxel_digest(store.read(number))
