"""The contract of an archive is the window and the statistics of its foreground."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_store import SPACING_MM, ct_like, make_store

from tapct.base.exits import UserError
from tapct.base.files import write_atomically
from tapct.config import from_dict
from tapct.data.digest import label_digest
from tapct.data.packed.foreground import body_voxels, measure
from tapct.data.packed.packed_labels import encode_labels, labels_file
from tapct.data.packed.store import INDEX_NAME, Store, index_bytes
from tapct.types import IGNORE_LABEL, HUContract, LabelMap


def body(seed: int) -> np.ndarray:
    """Air, in it a body with a closed hole of lung."""
    rng = np.random.default_rng(seed)
    hu_ZYX = np.full((6, 40, 40), -1000, np.int16)
    hu_ZYX[:, 5:35, 5:35] = rng.normal(40, 20, (6, 30, 30))
    hu_ZYX[:, 12:20, 12:20] = rng.normal(-850, 20, (6, 8, 8))
    return hu_ZYX


def test_without_labels_the_body_with_its_lungs_is_the_foreground(tmp_path: Path) -> None:
    scans = [body(seed) for seed in range(3)]
    store = make_store(tmp_path / "store", scans)
    write_atomically(
        tmp_path / "store" / INDEX_NAME,
        index_bytes([replace(scan, label_digest="", label_names=()) for scan in store.scans], "m"),
    )
    store = Store(store.path)
    assert len(body_voxels(store, 0)) == 6 * 30 * 30
    found = measure(store)
    values = np.concatenate([scan[:, 5:35, 5:35].ravel() for scan in scans]).astype(float)
    expected = [*np.percentile(values, (0.5, 99.5)), values.mean(), values.std()]
    assert [found.low, found.high, found.mean, found.std] == pytest.approx(
        expected, rel=0.02, abs=6
    )
    assert (found.scans, found.empty, found.by_labels) == (3, 0, False)
    assert measure(store) == found and measure(store, seed=1) != found
    assert measure(store, most_scans=2).scans == 2


def test_with_labels_each_labelled_scan_counts_the_same(tmp_path: Path) -> None:
    """One scan has 8 labelled voxels and one has thousands; the first half of each is ignored."""
    scans = [ct_like((6, 40, 40), seed) for seed in range(3)]
    store = make_store(tmp_path / "store", scans)
    rows = []
    for i, scan in enumerate(store.scans):
        labels_ZYX = np.zeros(scans[i].shape, np.uint16)
        if i == 0:
            labels_ZYX[2, 4:6, 4:8] = 7
        if i == 1:
            labels_ZYX[:3], labels_ZYX[3:] = IGNORE_LABEL, 1
        labels = LabelMap(labels_ZYX, SPACING_MM)
        write_atomically(labels_file(store.path, scan.id), encode_labels(labels, scan.id, 1))
        rows.append(replace(scan, label_digest=label_digest(labels), label_names=()))
    write_atomically(store.path / INDEX_NAME, index_bytes(rows, "m"))
    found = measure(Store(store.path))
    few, many = scans[0][2, 4:6, 4:8].astype(float), scans[1][3:].astype(float)
    assert found.mean == pytest.approx((few.mean() + many.mean()) / 2, abs=3)
    assert (found.scans, found.empty, found.by_labels) == (2, 1, True)
    lines = found.lines("store")
    assert "# 1 scans without such voxels were skipped" in lines
    contract = from_dict(HUContract, yaml.safe_load("\n".join(lines))["contract"], "printed")
    assert contract == found.contract()


def test_a_store_without_foreground_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [np.full((4, 20, 20), -1000, np.int16)])
    with pytest.raises(UserError, match="has foreground voxels"):
        measure(store)
