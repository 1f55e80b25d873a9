"""The list of a store in Arrow holds the same rows, digests and splits as lists of objects."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tapct.base.files import write_atomically
from tapct.data import digest
from tapct.data.digest import arrow_digest, table_digest
from tapct.data.loading.slabs import draw_slab
from tapct.data.packed import store_index
from tapct.data.packed.scan_list import ScanList, StoredScan
from tapct.data.packed.store import INDEX_NAME, Store, index_bytes
from tapct.data.packed.store_group import StoreGroup
from tapct.data.packed.store_index import MAPPED_NAME, read_index, write_index
from tapct.data.patients.split import are_below, patients_below, position, positions


def scans_of(num: int, seed: int = 0) -> list[StoredScan]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        shape = tuple(int(n) for n in rng.integers(3, 90, 3))
        labelled = i % 3 == 0
        rows.append(
            StoredScan(
                f"{i:016x}", shape, tuple(rng.uniform(0.3, 5, 3).tolist()), f"p{i // 2}", "",
                f"l{i}" if labelled else "", rng.bytes(16).hex(),
                ((1, "liver"), (2, "ø")) if labelled else (), "guess" if i % 5 else "header",
            )
        )  # fmt: skip
    return rows


@pytest.fixture(params=["decoded", "mapped"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store_index, "MAPPED_FROM", 0 if request.param == "mapped" else 10**9)
    write_index(tmp_path, index_bytes(scans_of(50), "manifest", {"accepted": 50}, "key"))
    assert (tmp_path / MAPPED_NAME).exists() == (request.param == "mapped")
    return tmp_path


def test_rows_come_back_one_by_one_in_slices_and_in_a_loop(folder: Path) -> None:
    expected, scans = scans_of(50), Store(folder).scans
    assert isinstance(scans, ScanList) and list(scans) == expected
    assert [scans[i] for i in range(50)] == expected and scans == tuple(expected)
    assert scans[-1] == expected[-1] and scans[3:9] == tuple(expected[3:9])
    for i in (0, 7, 49):
        assert scans.id(i) == expected[i].id and scans.checksum(i) == expected[i].checksum
        assert scans.shape_ZYX(i) == expected[i].shape_ZYX
        assert scans.spacing_mm(i) == expected[i].spacing_mm
    labelled = scans.labelled()
    assert list(labelled) == [scan for scan in expected if scan.has_labels]
    assert labelled.shape_ZYX(2) == expected[6].shape_ZYX and labelled.id(2) == expected[6].id
    assert labelled.depths().tolist() == [s.shape_ZYX[0] for s in expected if s.has_labels]
    with pytest.raises(IndexError):
        scans[50]
    assert pickle.loads(pickle.dumps(Store(folder))).scans == scans


def test_the_split_of_columns_is_the_split_of_patients(folder: Path) -> None:
    scans = Store(folder).scans
    patients = [scan.patient for scan in scans]
    for seed, share, start in [(0, 0.3, 0.0), (7, 0.5, 0.25), (2**62 + 3, 0.2, 0.8)]:
        numbers = scans.patient_numbers()
        assert positions(numbers, seed).tolist() == [position(name, seed) for name in patients]
        chosen = patients_below(patients, share, seed, start)
        assert are_below(numbers, share, seed, start).tolist() == [p in chosen for p in patients]


def test_samples_show_the_scans_and_slices_of_earlier_versions(folder: Path) -> None:
    store = Store(folder)
    held_out = are_below(store.scans.patient_numbers(), 0.3, 1)
    rows = np.flatnonzero(~held_out)
    slabs = [draw_slab(sample, store, 11, 24, rows=rows) for sample in range(8)]
    # written down from the version that kept a list of objects
    earlier = [(42, 5, 24), (16, 14, 24), (9, 0, 23), (17, 22, 24), (13, 2, 24), (1, 3, 24)]
    assert [(s.scan, s.start, s.depth) for s in slabs] == [*earlier, (20, 19, 24), (48, 23, 24)]


def test_a_mapped_list_that_is_damaged_or_of_another_store_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_index, "MAPPED_FROM", 0)
    write_index(tmp_path, index_bytes(scans_of(9), "manifest"))
    mapped = tmp_path / MAPPED_NAME
    content = bytearray(mapped.read_bytes())
    content[len(content) // 2] ^= 1
    mapped.write_bytes(content)
    assert list(read_index(tmp_path)[0]) == scans_of(9)
    mapped.write_bytes(b"short")
    assert list(read_index(tmp_path)[0]) == scans_of(9)
    # a store.parquet that was written without it, as by an earlier version
    write_index(tmp_path, index_bytes(scans_of(9), "manifest"))
    write_atomically(tmp_path / INDEX_NAME, index_bytes(scans_of(7, seed=1), "manifest"))
    assert list(read_index(tmp_path)[0]) == scans_of(7, seed=1)
    monkeypatch.setattr(store_index, "MAPPED_FROM", 100)
    write_index(tmp_path, index_bytes(scans_of(7), "manifest"))
    assert not mapped.exists()


@pytest.mark.parametrize("rows_at_once", [2, 16_384])
def test_the_digest_of_columns_is_that_of_lists(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "_ROWS_AT_ONCE", rows_at_once)
    facts = {"a": 1, "b": ["c"]}
    columns = [
        ["x", "", "ä\1"], [1, -2, 3], [0.1, float("nan"), -0.0], [["a", "b"], [], ["c"]],
        [[1e-7, 2.5], [], [1e22]],
    ]  # fmt: skip
    arrays = [pa.array(values) for values in columns]
    assert arrow_digest(arrays, facts) == table_digest(columns, facts)
    # a column of much text has several chunks, some of which may be empty
    chunked = [pa.chunked_array([one[:0], one[:1], one[1:2], one[2:]]) for one in arrays]
    assert arrow_digest(chunked, facts) == table_digest(columns, facts)
    assert arrow_digest([array[:0] for array in arrays], facts) == table_digest([[]] * 5, facts)
    coded = [arrays[0].dictionary_encode(), *arrays[1:]]
    assert arrow_digest(coded, facts) == table_digest(columns, facts)
    with pytest.raises(ValueError, match="missing"):
        arrow_digest([pa.array(["a", None])], facts)
    assert json.dumps(facts)


def test_a_group_numbers_the_scans_of_its_stores_through(tmp_path: Path) -> None:
    for name, num, seed in (("a", 5, 0), ("b", 3, 1)):
        (tmp_path / name).mkdir()
        write_index(tmp_path / name, index_bytes(scans_of(num, seed), name, {"accepted": num}))
    stores = [Store(tmp_path / "a"), Store(tmp_path / "b")]
    group = StoreGroup(stores, ["a", "b"])
    both = [*scans_of(5, 0), *scans_of(3, 1)]
    assert list(group.scans) == both and len(group) == 8 and group.scans[6] == both[6]
    assert [group.scans.id(i) for i in range(8)] == [scan.id for scan in both]
    assert group.scans.depths().tolist() == [scan.shape_ZYX[0] for scan in both]
    assert group.range_of(1) == range(5, 8) and group.summary == {"accepted": 8}
    assert group.scans.column("patient").to_pylist() == [scan.patient for scan in both]
    assert group.digest != StoreGroup(stores[::-1], ["b", "a"]).digest
