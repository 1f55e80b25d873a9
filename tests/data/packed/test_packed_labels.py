"""Labels in the store are those that were indexed, and damage to them is noticed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from scan_files import noise_ct, save_labels, save_scan

from tapct.base.exits import UserError
from tapct.data.digest import label_digest
from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest
from tapct.data.packed import pack_scan, store_index
from tapct.data.packed.pack import pack
from tapct.data.packed.packed_labels import (
    encode_labels,
    labels_file,
    read_names,
    read_packed_labels,
)
from tapct.data.packed.packed_scan import Damaged
from tapct.data.packed.store import Store
from tapct.data.packed.verify import damaged_scans
from tapct.types import IGNORE_LABEL, LabelMap


def label_map(highest: int = 3, shape: tuple[int, int, int] = (6, 12, 13)) -> LabelMap:
    labels = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint16)
    labels[labels == 3] = highest
    return LabelMap(labels, (2.0, 0.7, 0.8), names=((1, "liver"), (highest, "left lung")))


@pytest.mark.parametrize("highest", [3, 255, 256, IGNORE_LABEL])
@pytest.mark.parametrize("shape", [(6, 12, 13), (1, 1, 1), (19, 33, 7)])
def test_labels_come_back_with_their_names(
    tmp_path: Path, highest: int, shape: tuple[int, int, int]
) -> None:
    labels, file = label_map(highest, shape), labels_file(tmp_path, "s0")
    file.write_bytes(encode_labels(labels, "s0", 1))
    found = read_packed_labels(file, "s0", label_digest(labels))
    np.testing.assert_array_equal(found.labels_ZYX, labels.labels_ZYX)
    assert found.labels_ZYX.dtype == np.uint16
    assert (found.names, found.spacing_mm) == (labels.names, labels.spacing_mm)
    assert read_names(file) == labels.names


def test_every_damage_is_an_error(tmp_path: Path) -> None:
    labels, file = label_map(), labels_file(tmp_path, "s0")
    whole = encode_labels(labels, "s0", 1)
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(0, 8)
        file.write_bytes(damaged)
        with pytest.raises(Damaged, match="cut short or damaged"):
            read_packed_labels(file, "s0", label_digest(labels))
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read_packed_labels(file, "s0", label_digest(labels))
    file.write_bytes(whole)
    for wrong in (("s1", label_digest(labels)), ("s0", label_digest(label_map(4)))):
        with pytest.raises(Damaged, match="other labels"):
            read_packed_labels(file, *wrong)


@pytest.fixture
def archive(tmp_path: Path) -> Manifest:
    """Two scans, one with labels that have names."""
    root = tmp_path / "a"
    save_scan(root / "c1.nii.gz", noise_ct(1))
    save_labels(root / "c1_seg.nii.gz")
    (root / "c1_seg.json").write_text('{"labels": {"liver": 1}}')
    save_scan(root / "c2.nii.gz", noise_ct(2))
    return build_manifest(root, tmp_path / "m.parquet")


def test_labels_are_packed_beside_their_scan_and_packed_again_when_they_change(
    archive: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    report = pack(archive, out)
    assert (report.num_labelled, report.labels_refused, report.unlisted) == (1, (), ())
    first = Store(out)
    assert [scan.has_labels for scan in first.scans] == [True, False]
    assert first.scans[0].label_names == ((1, "liver"),)
    assert first.read_labels(0).labels_ZYX[3, 10, 5] == 300

    (archive.root / "c1_seg.json").write_text('{"labels": {"Leber": 1}}')
    again = build_manifest(archive.root, tmp_path / "m.parquet")
    report = pack(again, out)
    assert (report.packed, report.kept, report.num_labelled) == ((), 2, 1)  # the scans are kept
    assert Store(out).scans[0].label_names == ((1, "Leber"),)
    assert Store(out).digest == first.digest

    shutil.rmtree(archive.root)  # everything that it needs is packed
    assert pack(again, out).num_labelled == 1


def test_labels_that_changed_after_the_index_are_not_packed(
    archive: Manifest, tmp_path: Path
) -> None:
    save_scan(archive.root / "c1_seg.nii.gz", np.ones((6, 24, 26), np.uint8))
    report = pack(archive, tmp_path / "store")
    (refused,) = report.labels_refused
    assert (refused.path, refused.reason, len(report.packed)) == ("c1_seg.nii.gz", "changed", 2)
    assert not Store(tmp_path / "store").scans[0].has_labels


def test_damaged_labels_are_named_found_and_packed_again(archive: Manifest, tmp_path: Path) -> None:
    pack(archive, tmp_path / "store")
    held = Store(tmp_path / "store")
    file = labels_file(held.path, held.scans[0].id)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged, match=f"labels of scan {held.scans[0].id} .*tapct pack"):
        held.read_labels(0)
    assert len(damaged_scans(held)) == 1
    assert pack(archive, tmp_path / "store").kept == 2
    assert not damaged_scans(held)


def test_ignored_values_are_packed_by_the_rule_of_the_index(tmp_path: Path) -> None:
    save_scan(tmp_path / "a" / "c1.nii.gz", noise_ct(1))
    labels = np.zeros((6, 24, 26), np.int16)
    labels[2:4], labels[5] = 1, -1
    save_scan(tmp_path / "a" / "c1_seg.nii.gz", labels)
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet", ignore_labels=[-1])
    pack(Manifest.read(tmp_path / "m.parquet"), tmp_path / "store")
    found = Store(tmp_path / "store").read_labels(0)
    assert (found.labels_ZYX[5] == IGNORE_LABEL).all() and found.labels_ZYX[2:4].min() == 1
    assert label_digest(found) == built.rows[0].label_digest


def test_a_store_of_an_earlier_version_names_the_next_step(
    archive: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_index, "SCHEMA", 1)
    pack(archive, tmp_path / "store")
    monkeypatch.undo()
    with pytest.raises(
        UserError, match="packed by an older version of tapct.*run `tapct pack` again"
    ):
        Store(tmp_path / "store")
    assert pack(archive, tmp_path / "store").kept == 2


def test_the_digest_covers_values_shape_and_names() -> None:
    labels = label_map()
    others = [
        dataclasses.replace(labels, names=()),
        dataclasses.replace(labels, labels_ZYX=labels.labels_ZYX.reshape(6, 13, 12)),
        dataclasses.replace(labels, labels_ZYX=labels.labels_ZYX[::-1]),
    ]
    assert len({label_digest(item) for item in (labels, *others)}) == 4


def test_labels_that_end_their_worker_do_not_refuse_their_scan(
    archive: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pack_scan, "read_labels_of", fail)
    report = pack(archive, tmp_path / "store")
    (refused,) = report.labels_refused
    assert (refused.path, refused.reason, report.refused) == ("c1_seg.nii.gz", "out_of_memory", ())
    assert "with its labels" in refused.detail
    held = Store(tmp_path / "store")
    assert [scan.has_labels for scan in held.scans] == [False, False]
