"""Slabs read from a store are the scans that were packed, and damage is named."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tapct.base.exits import UserError
from tapct.base.files import write_atomically
from tapct.data.digest import label_digest, table_digest, voxel_digest
from tapct.data.packed.packed_labels import encode_labels, labels_file
from tapct.data.packed.packed_scan import Damaged, encode, layout, open_packed
from tapct.data.packed.store import INDEX_NAME, Store, StoredScan, index_bytes
from tapct.types import LabelMap, Volume

SPACING_MM = (2.5, 0.75, 0.8)


def make_store(folder: Path, scans_ZYX: list[np.ndarray], level: int = 1, tile: int = 0) -> Store:
    """A store of these arrays, written past the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, hu_ZYX in enumerate(scans_ZYX):
        frame, meta = encode(Volume(hu_ZYX, SPACING_MM), f"scan{i}", level, tile=tile)
        write_atomically(folder / f"scan{i}.b2nd", frame)
        label, names = "", ()
        if i == 0:
            labels = LabelMap((hu_ZYX > 0).astype(np.uint16), SPACING_MM, names=((1, "liver"),))
            label, names = label_digest(labels), labels.names
            write_atomically(labels_file(folder, meta.id), encode_labels(labels, meta.id, level))
        rows.append(
            StoredScan(
                *(meta.id, meta.shape_ZYX, SPACING_MM, "patient", f"{i}.nii", label, meta.checksum),
                names,
            )
        )
    write_atomically(folder / INDEX_NAME, index_bytes(rows, "manifest"))
    return Store(folder)


def ct_like(shape_ZYX: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(0, 60, shape_ZYX) + rng.integers(-1000, 500), -1024, 3000).astype(
        np.int16
    )


@settings(max_examples=40, deadline=None)
@given(
    shape_ZYX=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    level=st.sampled_from([1, 5, 9]),
    seed=st.integers(0, 5),
)
@example(
    shape_ZYX=(5, 509, 600), cut=(0.3, 0.9), level=1, seed=0
)  # prime height, larger than a block
@example(shape_ZYX=(19, 512, 512), cut=(0.3, 0.9), level=1, seed=1)
@example(shape_ZYX=(3, 1030, 1024), cut=(0.0, 1.0), level=1, seed=2)  # one slice a chunk
def test_a_slab_is_what_was_packed(
    tmp_path_factory: pytest.TempPathFactory,
    shape_ZYX: tuple[int, int, int],
    cut: tuple[float, float],
    level: int,
    seed: int,
) -> None:
    hu_ZYX = ct_like(shape_ZYX, seed)
    hu_ZYX[: shape_ZYX[0] // 2] = (0, -1024, 7)[
        seed % 3
    ]  # chunks of one value are stored as a flag
    store = make_store(tmp_path_factory.mktemp("store"), [hu_ZYX], level)
    z0, z1 = sorted(int(c * shape_ZYX[0]) for c in cut)
    z1 = max(z1, z0 + 1) if z0 < shape_ZYX[0] else shape_ZYX[0]
    z0 = min(z0, z1 - 1)
    slab_ZYX = store.read_slab(0, z0, z1)
    assert slab_ZYX.dtype == np.int16 and slab_ZYX.flags.c_contiguous
    np.testing.assert_array_equal(slab_ZYX, hu_ZYX[z0:z1])
    np.testing.assert_array_equal(store.read(0), hu_ZYX)
    np.testing.assert_array_equal(
        blosc2.open(str(store.file(0)), mode="r")[z0:z1], hu_ZYX[z0:z1]
    )  # any blosc2 can
    store.verify(0)


@settings(max_examples=30, deadline=None)
@given(
    shape_ZYX=st.tuples(st.integers(1, 20), st.integers(1, 70), st.integers(1, 70)),
    cut=st.lists(st.floats(0, 0.999), min_size=6, max_size=6),
    tile=st.sampled_from([0, 16, 32, 64]),
)
@example(shape_ZYX=(19, 64, 33), cut=[0.1, 0, 0.5, 0.9, 0.999, 0.999], tile=16)
def test_a_box_is_what_was_packed(
    tmp_path_factory: pytest.TempPathFactory,
    shape_ZYX: tuple[int, int, int],
    cut: list[float],
    tile: int,
) -> None:
    hu_ZYX = ct_like(shape_ZYX)
    hu_ZYX[: shape_ZYX[0] // 2, : shape_ZYX[1] // 2] = 0  # chunks of zeros are flags
    store = make_store(tmp_path_factory.mktemp("store"), [hu_ZYX], tile=tile)
    ends = [sorted(int(c * n) for c in cut[k::3]) for k, n in enumerate(shape_ZYX)]
    start_ZYX = (ends[0][0], ends[1][0], ends[2][0])
    size_ZYX = tuple(b - a + 1 for a, b in ends)
    box_ZYX = store.read_box(0, start_ZYX, size_ZYX)  # type: ignore[arg-type]
    expected = hu_ZYX[tuple(slice(a, b + 1) for a, b in ends)]
    np.testing.assert_array_equal(box_ZYX, expected)
    np.testing.assert_array_equal(store.read(0), hu_ZYX)
    np.testing.assert_array_equal(blosc2.open(str(store.file(0)), mode="r")[:], hu_ZYX)
    store.verify(0)


def test_a_box_reads_only_the_tiles_that_it_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hu_ZYX = ct_like((16, 128, 128))
    store = make_store(tmp_path, [hu_ZYX], tile=32)
    _, meta = open_packed(store.file(0))
    assert (meta.chunk_ZYX, meta.grid_ZYX) == ((8, 32, 32), (2, 4, 4))
    store._opened(0)
    # rows 40..99 and columns 33..63 of slices 9..15: tiles (1, 1..3, 1) of the grid
    touched = [16 + 4 * row + 1 for row in (1, 2, 3)]
    for c in set(range(32)) - set(touched):
        offset, length = (int(n) for n in meta.byte_ranges_C2[c])
        overwrite(store.file(0), offset, bytes(length))
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, num_bytes: int, offset: int) -> bytes:
        content = pread(fd, num_bytes, offset)
        read.append(len(content))
        return content

    monkeypatch.setattr(os, "pread", counted)
    box_ZYX = store.read_box(0, (9, 40, 33), (7, 60, 31))
    np.testing.assert_array_equal(box_ZYX, hu_ZYX[9:16, 40:100, 33:64])
    assert sum(read) == int(meta.byte_ranges_C2[touched, 1].sum())
    with pytest.raises(Damaged, match="chunk that begins at slice 8 differs"):
        store.read_box(0, (9, 40, 33), (7, 60, 32))
    for start, size in (((0, 0, 0), (1, 1, 129)), ((0, -1, 0), (1, 1, 1)), ((3, 3, 3), (1, 0, 1))):
        with pytest.raises(IndexError, match="asked for a box of"):
            store.read_box(0, start, size)  # type: ignore[arg-type]


def test_tiles_change_the_file_and_whole_slices_do_not() -> None:
    """A store without tiles can be read by the version before them."""
    volume = Volume(ct_like((12, 64, 64)), SPACING_MM)
    whole, wide, tiled = (encode(volume, "s", 1, tile=tile)[1].to_dict() for tile in (0, 64, 16))
    assert whole == wide and whole["schema"] == 2 and "tile" not in whole
    assert tiled["schema"] == 3 and tiled["tile"] == [16, 16]


def test_chunks_are_whole_slices_and_small_and_blocks_are_whole_rows() -> None:
    for shape_ZYX in [
        (192, 512, 512),
        (300, 256, 256),
        (79, 64, 64),
        (3, 512, 512),
        (50, 1024, 1024),
        (9, 509, 509),
    ]:
        (z, y, x), (block_z, block_y, block_x) = layout(shape_ZYX)
        assert (y, x) == shape_ZYX[1:] and z <= min(4, shape_ZYX[0]) and block_x == x
        assert z == 1 or 2 * z * y * x <= 1 << 20
        assert y % block_y == 0 and z % block_z == 0 and (block_z == 1 or block_y == y)
        assert 2 * block_z * block_y * x <= 1 << 18 or shape_ZYX[1] == 509
    assert layout((192, 512, 512)) == ((2, 512, 512), (1, 256, 512))


def chunk_bytes(store: Store, i: int, c: int) -> tuple[int, int]:
    offset, length = open_packed(store.file(i))[1].byte_ranges_C2[c]
    return int(offset), int(length)


def overwrite(file: Path, offset: int, content: bytes) -> None:
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def test_a_slab_touches_only_its_own_chunks(tmp_path: Path) -> None:
    hu_ZYX = ct_like((12, 512, 512))
    store = make_store(tmp_path, [hu_ZYX])
    for offset, length in [chunk_bytes(store, 0, c) for c in (0, 1, 2, 5)]:
        # slices 0..5 and 10..11 are rubbish now, 6..9 are left; blosc2 wants the first chunk's
        # header to open a file
        overwrite(store.file(0), offset + 32, b"\xff" * (length - 32))
    np.testing.assert_array_equal(store.read_slab(0, 6, 10), hu_ZYX[6:10])
    np.testing.assert_array_equal(store.read_slab(0, 7, 8), hu_ZYX[7:8])
    for z0, z1 in [(5, 8), (9, 11), (0, 12)]:
        with pytest.raises(Damaged, match=r"scan scan0 is damaged: .*scan0\.b2nd.*tapct pack"):
            store.read_slab(0, z0, z1)


def test_reading_finds_what_decodes_without_any_complaint(tmp_path: Path) -> None:
    noise_ZYX = np.random.default_rng(0).integers(-1024, 3000, (4, 64, 64)).astype(np.int16)
    noise_ZYX &= 0x0FF0  # stays compressible, so a flipped literal decodes without any complaint
    store = make_store(tmp_path, [noise_ZYX])
    offset, length = chunk_bytes(store, 0, 0)
    whole = store.file(0).read_bytes()
    silent = 0
    for position in range(offset + length // 2, offset + length // 2 + 40):
        overwrite(store.file(0), position, bytes([whole[position] ^ 0x10]))
        try:  # what blosc2 alone notices
            silent += not np.array_equal(blosc2.open(str(store.file(0)), mode="r")[:], noise_ZYX)
        except RuntimeError:
            pass
        for read in (Store(tmp_path).read, Store(tmp_path).verify):
            with pytest.raises(Damaged, match="scan0"):
                read(0)
        overwrite(store.file(0), position, whole[position : position + 1])
    assert silent > 0
    store.verify(0)


DAMAGES = ("one bit flipped", "64 bytes inverted", "4 KiB zeroed", "cut short", "bytes exchanged")


def damaged(whole: bytes, kind: str, draw: random.Random) -> bytes:
    """The content of a file with one damage at a random place, the last byte included."""
    content = bytearray(whole)
    at = draw.randrange(len(whole))
    if kind == "one bit flipped":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "64 bytes inverted":
        content[at : at + 64] = bytes(byte ^ 0xFF for byte in content[at : at + 64])
    elif kind == "4 KiB zeroed":
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    elif kind == "cut short":
        del content[at:]
    else:
        other = draw.randrange(len(whole) - 8)
        at = min(at, len(whole) - 8)
        content[at : at + 8], content[other : other + 8] = whole[other : other + 8], whole[at:][:8]
    return bytes(content)


def test_every_damage_to_a_packed_scan_is_found(tmp_path: Path) -> None:
    hu_ZYX = ct_like((9, 48, 40))
    hu_ZYX[4:8] = 0  # a chunk of which the file holds only a flag
    store = make_store(tmp_path, [hu_ZYX])
    file, whole = store.file(0), store.file(0).read_bytes()
    draw, found = random.Random(1), 0
    while found < 300:
        content = damaged(whole, DAMAGES[found % len(DAMAGES)], draw)
        if content == whole:
            continue  # zeros were zeroed
        file.write_bytes(content)
        with pytest.raises(Damaged, match="scan scan0 is damaged") as error:
            Store(tmp_path).read(0)
        assert "\n" not in str(error.value)
        found += 1
    file.write_bytes(whole)
    np.testing.assert_array_equal(Store(tmp_path).read(0), hu_ZYX)


def test_damage_to_the_index_is_found_or_harmless(tmp_path: Path) -> None:
    """Bytes of the index that nobody reads may change; its content and its scans may not."""
    store = make_store(tmp_path, [ct_like((4, 20, 20), seed) for seed in range(3)])
    index = tmp_path / INDEX_NAME
    whole, draw, found = index.read_bytes(), random.Random(2), 0
    for number in range(200):
        index.write_bytes(damaged(whole, DAMAGES[number % len(DAMAGES)], draw))
        try:
            read = Store(tmp_path)
        except UserError:
            found += 1
            continue
        assert (read.scans, read.digest) == (store.scans, store.digest)
        assert read.manifest_digest == store.manifest_digest
    assert found > 100


def without_checksums(file: Path) -> None:
    """Rewrite a packed scan as earlier versions wrote it."""
    frame_bytes = int.from_bytes(file.read_bytes()[-16:-8], "little")
    file.write_bytes(file.read_bytes()[:frame_bytes])
    array = blosc2.open(str(file), mode="a")
    meta = dict(array.schunk.vlmeta["tapct"])
    del meta["checksums"]
    array.schunk.vlmeta["tapct"] = {**meta, "schema": 1}


def test_a_packed_scan_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    hu_ZYX = ct_like((9, 48, 40))
    hu_ZYX[4:8] = 0
    store = make_store(tmp_path, [hu_ZYX])
    without_checksums(store.file(0))
    assert open_packed(store.file(0))[1].checksums_C is None
    np.testing.assert_array_equal(Store(tmp_path).read(0), hu_ZYX)
    Store(tmp_path).verify(0)
    offset, length = chunk_bytes(store, 0, 0)
    overwrite(store.file(0), offset + length // 2, b"\0" * 40)
    with pytest.raises(Damaged):  # by the digest of the voxels alone
        Store(tmp_path).verify(0)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_one_line_error_names_a_cut_file(tmp_path: Path, keep: float) -> None:
    store = make_store(tmp_path, [ct_like((8, 40, 40))])
    whole = store.file(0).read_bytes()
    store.file(0).write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(Damaged, match="scan scan0 is damaged") as error:
        store.read(0)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path, [ct_like((4, 9, 9), 0), ct_like((4, 9, 9), 1)])
    os.replace(store.file(1), store.file(0))
    with pytest.raises(Damaged, match=r"scan scan0 .* holds scan scan1"):
        store.read(0)
    with pytest.raises(Damaged, match=r"scan scan1 .*does not exist"):
        store.read(1)


def test_the_index_holds_all_facts_of_a_scan(tmp_path: Path) -> None:
    store = make_store(tmp_path, [ct_like((4, 9, 8)), ct_like((3, 5, 6))])
    assert len(store) == 2 and store.manifest_digest == "manifest"
    first, second = store.scans
    assert (first.id, first.shape_ZYX, first.spacing_mm, first.patient) == (
        "scan0",
        (4, 9, 8),
        SPACING_MM,
        "patient",
    )
    assert (first.has_labels, second.has_labels) == (True, False)
    assert (first.label_names, second.label_names) == (((1, "liver"),), ())
    np.testing.assert_array_equal(store.read_labels(0).labels_ZYX, store.read(0) > 0)
    assert first.checksum == voxel_digest(store.read(0)) != second.checksum


def test_the_digest_names_the_voxels_not_the_compression(tmp_path: Path) -> None:
    scans = [ct_like((4, 9, 8)), ct_like((3, 5, 6))]
    digests = [make_store(tmp_path / str(level), scans, level).digest for level in (1, 5, 9)]
    scans[1][0, 0, 0] += 1
    assert len(set(digests)) == 1 and make_store(tmp_path / "other", scans).digest != digests[0]


def test_what_is_no_store_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tapct pack"):
        Store(tmp_path / "nowhere")
    (tmp_path / INDEX_NAME).write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(UserError, match="not readable.*tapct pack") as error:
        Store(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("z0", "z1"), [(-1, 2), (2, 2), (3, 2), (3, 5), (4, 5)])
def test_slices_outside_the_scan_are_an_error(tmp_path: Path, z0: int, z1: int) -> None:
    with pytest.raises(IndexError, match=r"slices 0\.\.3"):
        make_store(tmp_path, [ct_like((4, 9, 8))]).read_slab(0, z0, z1)


def num_open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_many_threads_and_few_handles_read_right(tmp_path: Path) -> None:
    scans = [ct_like((12, 40, 40), seed) for seed in range(6)]
    make_store(tmp_path, scans)
    before = num_open_files()
    store = Store(tmp_path, max_open=2)

    def compare(store: Store, k: int) -> bool:
        return bool(
            np.array_equal(
                store.read_slab(k % 6, k % 7, k % 7 + 4), scans[k % 6][k % 7 : k % 7 + 4]
            )
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(compare, [store] * 300, range(300)))
    assert num_open_files() - before <= 2
    del store
    assert num_open_files() == before


def test_other_threads_run_while_a_slab_is_decompressed(tmp_path: Path) -> None:
    blosc2.set_releasegil(False)
    make_store(tmp_path, [ct_like((4, 9, 8))])
    assert blosc2.set_releasegil(True) is True


def test_a_pickled_store_reads_and_refuses_a_store_that_changed(tmp_path: Path) -> None:
    scans = [ct_like((4, 9, 8))]
    frozen = pickle.dumps(make_store(tmp_path, scans))
    np.testing.assert_array_equal(pickle.loads(frozen).read(0), scans[0])
    make_store(tmp_path, [ct_like((4, 9, 8), 1)])
    with pytest.raises(UserError, match="packed again"):
        pickle.loads(frozen)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_reads_even_while_the_parent_holds_the_lock(tmp_path: Path) -> None:
    scans = [ct_like((4, 9, 8))]
    store = make_store(tmp_path, scans)
    store.read(0)
    with store._lock:
        child = os.fork()
        if child == 0:
            watchdog = threading.Timer(20, os._exit, (2,))
            watchdog.start()
            os._exit(0 if np.array_equal(store.read(0), scans[0]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_store_of_an_earlier_version_does_not_know_the_rules_of_patients(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [ct_like((3, 8, 9))])
    known = [replace(scan, patient_from="header") for scan in store.scans]
    file = tmp_path / "s" / INDEX_NAME
    file.write_bytes(index_bytes(known, "manifest"))
    assert [scan.patient_from for scan in Store(file.parent).scans] == ["header"]
    table = pq.read_table(file).drop_columns(["patient_from"])
    info = json.loads(table.schema.metadata[b"tapct.store"])
    facts = {key: value for key, value in info.items() if key != "content"}
    info["content"] = table_digest([column.to_pylist() for column in table.columns], facts)
    pq.write_table(table.replace_schema_metadata({b"tapct.store": json.dumps(info)}), file)
    earlier = Store(file.parent)
    assert earlier.scans == tuple(replace(scan, patient_from="") for scan in known)
    assert earlier.digest == store.digest
