"""Copies on the disk of a node are read in place of the store, bounded, and never trusted."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_store import ct_like, make_store

from tapct.base.exits import UserError
from tapct.data.packed.local_cache import Config, LocalCache
from tapct.data.packed.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", [ct_like((9, 40, 40), seed) for seed in range(4)])


def copies(folder: Path) -> set[str]:
    """Digests of the scans that have a copy."""
    return {file.stem.partition("-")[0] for file in folder.glob("*/*.b2nd")}


def test_a_scan_is_copied_once_and_then_read_without_the_store(
    store: Store, tmp_path: Path
) -> None:
    cache = LocalCache(tmp_path / "node" / "cache", 10**9)
    assert not cache.folder.exists()  # nothing is written before the first scan is read
    cached = Store(store.path, cache=cache)
    for i in range(4):
        np.testing.assert_array_equal(cached.read_slab(i, 2, 7), store.read_slab(i, 2, 7))
    assert (cache.copies, cache.hits) == (4, 0)
    assert copies(cache.folder) == {scan.checksum for scan in store.scans}
    for i in range(4):
        store.file(i).unlink()
    again = Store(store.path, cache=LocalCache(cache.folder, 10**9))
    np.testing.assert_array_equal(again.read(1), ct_like((9, 40, 40), 1))
    assert all(oct(file.stat().st_mode)[-3:] == "600" for file in cache.folder.glob("*/*"))


def test_the_copies_used_least_recently_are_deleted_and_the_quota_holds(
    store: Store, tmp_path: Path
) -> None:
    sizes = [store.file(i).stat().st_size for i in range(4)]
    cache = LocalCache(tmp_path / "cache", int(3.5 * max(sizes)))
    sums = [scan.checksum for scan in store.scans]
    for when, i in enumerate((0, 1, 2)):
        copy = cache.local(store.file(i), sums[i])
        os.utime(copy, (when, when))
    cache.local(store.file(0), sums[0])  # used again, so 1 is the oldest now
    cache.local(store.file(3), sums[3])
    assert copies(cache.folder) == {sums[0], sums[2], sums[3]}
    total = sum(file.stat().st_size for file in cache.folder.glob("*/*"))
    assert total <= cache.quota and int((cache.folder / ".total").read_text()) >= total


def test_a_scan_of_more_than_half_the_quota_is_read_from_the_store_which_is_logged_once(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = max(store.file(i).stat().st_size for i in range(4))
    for quota in (size, 10):
        cached = Store(store.path, cache=LocalCache(tmp_path / "cache", quota))
        caplog.clear()
        for i in range(4):
            np.testing.assert_array_equal(cached.read(i), store.read(i))
        assert len(caplog.messages) == 1 and "data.cache.quota_gb" in caplog.messages[0]
    assert not (tmp_path / "cache").exists()


def test_each_reason_why_the_cache_is_not_used_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path / "store", [ct_like((9, 40, 40), 0), ct_like((90, 40, 40), 1)])
    large = store.file(1).stat().st_size
    folder = tmp_path / "cache"
    cached = Store(store.path, cache=LocalCache(folder, int(1.5 * large)))
    np.testing.assert_array_equal(cached.read(1), store.read(1))
    folder.write_text("a file where the folder should be")
    for i in (0, 1, 0):
        np.testing.assert_array_equal(cached.read(i), store.read(i))
    assert [message.split()[0] for message in caplog.messages] == [
        "data.cache.quota_gb",
        "data.cache.dir",
    ]


def test_two_archives_with_the_same_voxels_use_their_copies_side_by_side(tmp_path: Path) -> None:
    """Their scans have other IDs, which the packed files hold."""
    volumes = [ct_like((9, 40, 40), seed) for seed in range(2)]
    stores = [make_store(tmp_path / "a", volumes), make_store(tmp_path / "b", volumes[::-1])]
    cache = LocalCache(tmp_path / "cache", 10**9)
    for turn in (1, 2):
        for store in stores:
            cached = Store(store.path, cache=cache)
            for i in range(2):
                np.testing.assert_array_equal(cached.read(i), store.read(i))
        assert (cache.copies, cache.hits) == (4, 4 * (turn - 1))


def test_an_unfinished_copy_of_a_killed_process_is_counted_and_makes_room(
    store: Store, tmp_path: Path
) -> None:
    size = max(store.file(i).stat().st_size for i in range(4))
    cache = LocalCache(tmp_path / "cache", int(2.5 * size))
    (cache.folder / "ab").mkdir(parents=True)
    torn = cache.folder / "ab" / ".abc.b2nd.77.tmp"
    torn.write_bytes(b"x" * int(1.9 * size))
    os.utime(torn, (0, 0))
    cache.local(store.file(0), store.scans.checksum(0))
    assert not torn.exists() and copies(cache.folder) == {store.scans.checksum(0)}


def test_a_damaged_or_deleted_copy_is_replaced_by_the_store(store: Store, tmp_path: Path) -> None:
    cache = LocalCache(tmp_path / "cache", 10**9)
    expected = [store.read(i) for i in range(2)]
    paths = [cache.local(store.file(i), store.scans.checksum(i)) for i in range(2)]
    content = bytearray(paths[0].read_bytes())
    content[len(content) // 2] ^= 255
    paths[0].write_bytes(content)
    shutil.copy(store.file(2), paths[1])  # another scan under this name
    cached = Store(store.path, cache=cache)
    for i in range(2):
        np.testing.assert_array_equal(cached.read(i), expected[i])
    assert not paths[0].exists() and not paths[1].exists()


def test_without_a_usable_folder_the_store_is_read_and_a_line_is_logged_once(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cached = Store(store.path, cache=LocalCache(tmp_path / "file" / "cache", 10**9))
    for i in range(3):
        np.testing.assert_array_equal(cached.read(i), store.read(i))
    assert len(caplog.messages) == 1 and "scans are read from the store" in caplog.messages[0]
    assert Config().open() is None
    assert Config(str(tmp_path), 2.0).open() is not None


def _read_all(path: Path, folder: Path, quota: int) -> None:
    cached = Store(path, max_open=1, cache=LocalCache(folder, quota))
    for i in itertools.islice(itertools.cycle(range(4)), 24):
        assert cached.read(i).shape == (9, 40, 40)


def test_processes_share_a_folder_that_is_too_small_for_all_scans(
    store: Store, tmp_path: Path
) -> None:
    size = max(store.file(i).stat().st_size for i in range(4))
    quota = int(2.5 * size)
    context = multiprocessing.get_context("fork")
    runs = [
        context.Process(target=_read_all, args=(store.path, tmp_path / "cache", quota))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert sum(f.stat().st_size for f in (tmp_path / "cache").glob("*/*")) <= quota


def test_a_damaged_scan_of_the_store_is_still_reported(store: Store, tmp_path: Path) -> None:
    content = bytearray(store.file(0).read_bytes())
    content[len(content) // 2] ^= 255
    store.file(0).write_bytes(content)
    cached = Store(store.path, cache=LocalCache(tmp_path / "cache", 10**9))
    with pytest.raises(UserError, match="scan scan0 is damaged"):
        cached.read(0)
