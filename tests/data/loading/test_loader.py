"""Batches are what the sampler and the keys give, whoever reads them and wherever the run
starts.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from keyed_draws import randint
from scipy.stats import chi2

from tapct.base.exits import UserError
from tapct.base.files import write_atomically
from tapct.config import from_dict
from tapct.data.loading import loader
from tapct.data.loading.sampler import scan_of
from tapct.data.loading.slabs import draw_slab
from tapct.data.packed.packed_scan import encode
from tapct.data.packed.store import INDEX_NAME, Store, StoredScan, index_bytes
from tapct.types import AIR_HU, Batch, Volume

DEPTH = 6
SHAPES = [
    (12, 20, 24),
    (3, 20, 24),
    (6, 30, 16),
    (20, 9, 40),
    (7, 30, 30),
]  # one is shorter than a slab
SEED = 11


def write_store(folder: Path, shapes: list[tuple[int, int, int]]) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    scans, rows = [], []
    for i, shape in enumerate(shapes):
        hu_ZYX = np.random.default_rng(i).integers(-1000, 2000, shape).astype(np.int16)
        spacing_mm = (1.0 + i, 0.5, 0.25)
        frame, meta = encode(Volume(hu_ZYX, spacing_mm), f"scan{i}", 1)
        write_atomically(folder / f"scan{i}.b2nd", frame)
        rows.append(
            StoredScan(meta.id, meta.shape_ZYX, spacing_mm, "", f"{i}.nii", "", meta.checksum)
        )
        scans.append(hu_ZYX)
    write_atomically(folder / INDEX_NAME, index_bytes(rows, "manifest"))
    return scans


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    return tmp_path / "store", write_store(tmp_path / "store", SHAPES)


def take(
    num_steps: int, folder: Path, config: loader.Config, **where: int
) -> list[tuple[Batch, ...]]:
    arguments = {"seed": SEED, "global_batch": 4, **where}
    with loader.build(config, Store(folder), **arguments) as batches:  # type: ignore[arg-type]
        return list(itertools.islice(batches, num_steps))


def config_of(**fields: object) -> loader.Config:
    return loader.Config(**{"slab_depth": DEPTH, "workers": 0, **fields})  # type: ignore[arg-type]


def assert_same(left: Batch, right: Batch) -> None:
    for name in Batch.__dataclass_fields__:
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def assert_same_steps(left: list[tuple[Batch, ...]], right: list[tuple[Batch, ...]]) -> None:
    assert len(left) == len(right) and all(len(a) == len(b) for a, b in zip(left, right))
    for a, b in zip(itertools.chain(*left), itertools.chain(*right)):
        assert_same(a, b)


def test_a_batch_is_what_a_slow_loop_over_the_scans_makes(
    packed: tuple[Path, list[np.ndarray]],
) -> None:
    folder, scans = packed
    for step, (batch,) in enumerate(take(5, folder, config_of())):
        samples = range(4 * step, 4 * step + 4)
        chosen = [scan_of(sample, len(scans), SEED) for sample in samples]
        height, width = (max(scans[scan].shape[axis] for scan in chosen) for axis in (1, 2))
        assert (
            batch.hu_BZYX.shape == (4, DEPTH, height, width) and batch.hu_BZYX.dtype == torch.int16
        )
        for b, (sample, scan) in enumerate(zip(samples, chosen)):
            hu_ZYX = scans[scan]
            starts = range(max(1, len(hu_ZYX) - DEPTH + 1))
            start = starts[int(randint(SEED, "slab", len(starts), sample))]
            expected_ZYX = np.full((DEPTH, height, width), AIR_HU, np.int16)
            for z, y, x in np.ndindex(min(DEPTH, len(hu_ZYX)), *hu_ZYX.shape[1:]):
                expected_ZYX[z, y, x] = hu_ZYX[start + z, y, x]
            np.testing.assert_array_equal(batch.hu_BZYX[b], expected_ZYX)
            assert batch.extent_B3[b].tolist() == [min(DEPTH, len(hu_ZYX)), *hu_ZYX.shape[1:]]
            assert batch.spacing_mm_B3[b].tolist() == [1.0 + scan, 0.5, 0.25]
            assert (batch.sample_B[b], batch.scan_B[b], batch.slab_start_B[b]) == (
                sample,
                scan,
                start,
            )
        whole = (batch.extent_B3, batch.sample_B, batch.scan_B, batch.slab_start_B)
        assert (
            all(t.dtype == torch.int64 for t in whole)
            and batch.spacing_mm_B3.dtype == torch.float32
        )


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 1), (3, 4)])
def test_threads_read_what_the_loop_reads(
    packed: tuple[Path, list[np.ndarray]], workers: int, prefetch: int
) -> None:
    expected = take(6, packed[0], config_of(), accumulation=2)
    assert_same_steps(
        take(6, packed[0], config_of(workers=workers, prefetch=prefetch), accumulation=2), expected
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_randomness_alone_and_starts_no_process(
    packed: tuple[Path, list[np.ndarray]], workers: int
) -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    take(4, packed[0], config_of(workers=workers), accumulation=2, start_step=3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert not multiprocessing.active_children() and loader_threads() == 0


def test_a_late_start_reads_what_a_run_through_reads(packed: tuple[Path, list[np.ndarray]]) -> None:
    through = take(9, packed[0], config_of())
    for start in (1, 4, 8):
        assert_same_steps(
            take(9 - start, packed[0], config_of(workers=1), start_step=start), through[start:]
        )
    started = time.monotonic()
    take(1, packed[0], config_of(), start_step=10**12)
    assert time.monotonic() - started < 2


def test_every_split_over_ranks_and_micro_batches_reads_the_same_slabs(
    packed: tuple[Path, list[np.ndarray]],
) -> None:
    def slabs(world: int, accumulation: int) -> list[tuple[int, int, int, int]]:
        return sorted(
            (
                int(sample),
                int(scan),
                int(start),
                int(hu_ZYX[: extent[0], : extent[1], : extent[2]].sum()),
            )
            for rank in range(world)
            for batch in itertools.chain(
                *take(3, packed[0], config_of(), rank=rank, world=world, accumulation=accumulation)
            )
            for sample, scan, start, hu_ZYX, extent in zip(
                batch.sample_B, batch.scan_B, batch.slab_start_B, batch.hu_BZYX, batch.extent_B3
            )
        )

    expected = slabs(1, 1)
    assert [sample for sample, *_ in expected] == list(range(12))
    assert slabs(2, 1) == slabs(1, 2) == slabs(2, 2) == slabs(4, 1) == expected


def test_slabs_start_everywhere_equally_often(tmp_path: Path) -> None:
    write_store(tmp_path, [(15, 2, 2)])
    store = Store(tmp_path)
    starts = [draw_slab(sample, store, 3, DEPTH).start for sample in range(4000)]
    counts = np.bincount(starts)
    assert len(counts) == 15 - DEPTH + 1 and counts.min() > 0
    assert ((counts - 400) ** 2 / 400).sum() < chi2.isf(1e-4, 9)


def damage(folder: Path, scan: int) -> None:
    file = folder / f"scan{scan}.b2nd"
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_scan_stops_the_run_with_a_one_line_error(
    packed: tuple[Path, list[np.ndarray]], workers: int
) -> None:
    folder, _ = packed
    damage(folder, 3)
    batches = loader.build(config_of(workers=workers), Store(folder), seed=SEED, global_batch=1)
    for _ in range([scan_of(sample, len(SHAPES), SEED) for sample in range(len(SHAPES))].index(3)):
        next(batches)  # what comes before it is handed over
    with pytest.raises(UserError, match=r"scan3 .*scan3\.b2nd") as error:
        next(batches)
    assert "\n" not in str(error.value)
    assert loader_threads() == 0


def test_a_damaged_scan_is_replaced_by_the_scan_of_the_next_sample(
    packed: tuple[Path, list[np.ndarray]],
) -> None:
    folder, scans = packed
    expected = take(10, folder, config_of())
    damage(folder, 3)
    damage(folder, 2)
    for workers in (0, 2):
        config = config_of(on_error="skip", workers=workers)
        with loader.build(config, Store(folder), seed=SEED, global_batch=4) as batches:
            replaced = list(itertools.islice(batches, 10))
            assert sorted(batches.skipped) == [2, 3] and "scan3" in batches.skipped[3]
        for (batch,), (whole,) in zip(replaced, expected):
            assert torch.equal(batch.sample_B, whole.sample_B)  # the keys of all other draws stay
            shapes = [scans[scan].shape for scan in batch.scan_B]
            assert batch.hu_BZYX.shape[2:] == (max(s[1] for s in shapes), max(s[2] for s in shapes))
            for b, sample in enumerate(batch.sample_B.tolist()):
                scan = next(
                    s for s in (scan_of(sample + n, 5, SEED) for n in range(9)) if s not in (2, 3)
                )
                depth = min(DEPTH, len(scans[scan]))
                start = int(randint(SEED, "slab", max(1, len(scans[scan]) - DEPTH + 1), sample))
                inside_ZYX = scans[scan][start : start + depth]
                _, y, x = inside_ZYX.shape
                assert (batch.scan_B[b], batch.slab_start_B[b]) == (scan, start)
                np.testing.assert_array_equal(batch.hu_BZYX[b, :depth, :y, :x], inside_ZYX)
                assert batch.extent_B3[b].tolist() == [depth, y, x]
                outside = batch.hu_BZYX[b].numpy().copy()
                outside[:depth, :y, :x] = AIR_HU
                assert (outside == AIR_HU).all()


def test_skipping_ends_at_max_skips_and_when_all_scans_are_damaged(
    packed: tuple[Path, list[np.ndarray]],
) -> None:
    folder, _ = packed
    for scan in (0, 1, 2):
        damage(folder, scan)
    with pytest.raises(UserError, match="max_skips accepts 2; the last: scan scan") as error:
        take(10, folder, config_of(on_error="skip", max_skips=2))
    assert "\n" not in str(error.value)
    take(10, folder, config_of(on_error="skip", max_skips=3))
    for scan in (3, 4):
        damage(folder, scan)
    with pytest.raises(UserError, match="5 scans cannot be read"):
        take(1, folder, config_of(on_error="skip", max_skips=100))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_threads_replace_the_same_damaged_scans_as_the_loop(
    packed: tuple[Path, list[np.ndarray]], accumulation: int
) -> None:
    folder, _ = packed
    damage(folder, 3)
    damage(folder, 1)
    expected = take(8, folder, config_of(on_error="skip"), accumulation=accumulation)
    for workers, prefetch in [(1, 1), (2, 3), (4, 2)]:
        config = config_of(on_error="skip", workers=workers, prefetch=prefetch)
        assert_same_steps(take(8, folder, config, accumulation=accumulation), expected)


class BrokenStore(Store):
    """Fails as a fault of tapct would, not as a damaged scan."""

    def read_into(self, i: int, z0: int, slab_ZYX: np.ndarray) -> None:
        raise ZeroDivisionError("a fault of our own")


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_fault_in_a_thread_reaches_the_loop_and_ends_the_threads(
    packed: tuple[Path, list[np.ndarray]], on_error: str
) -> None:
    config = config_of(workers=2, on_error=on_error)
    batches = loader.build(config, BrokenStore(packed[0]), seed=SEED, global_batch=4)
    with pytest.raises(ZeroDivisionError, match="a fault of our own"):
        next(batches)
    assert loader_threads() == 0 and not batches.skipped
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_batches_come_in_order_when_the_first_slabs_are_the_slowest(
    packed: tuple[Path, list[np.ndarray]],
) -> None:
    """Four threads read four steps ahead; three reads of step 0 wait until step 3 is read."""
    expected = take(4, packed[0], config_of())
    late = threading.Event()

    class LateStore(Store):
        num_reads = itertools.count()

        def read_into(self, i: int, z0: int, slab_ZYX: np.ndarray) -> None:
            number = next(self.num_reads)
            if number >= 12:
                late.set()
            elif number < 3:
                assert late.wait(20)
            super().read_into(i, z0, slab_ZYX)

    config = config_of(workers=4, prefetch=4)
    with loader.build(config, LateStore(packed[0]), seed=SEED, global_batch=4) as batches:
        assert_same_steps(list(itertools.islice(batches, 4)), expected)


def test_the_key_of_earlier_versions_is_refused_by_name_and_dropped_from_old_configs() -> None:
    old = {"seed": 1, "data": {"store": "s", "loader": {"backend": "process", "workers": 3}}}
    new = {"seed": 1, "data": {"store": "s", "loader": {"workers": 3}}}
    assert loader.without_backend(old) == new == loader.without_backend(new)
    assert "backend" in old["data"]["loader"]  # type: ignore[index]
    for tree in ({}, {"data": None}, {"data": {"loader": 3}}):
        assert loader.without_backend(tree) == tree
    with pytest.raises(UserError, match=r"backend is a key of earlier versions: .*remove") as error:
        from_dict(loader.Config, {"backend": "process"}, "here")
    assert "\n" not in str(error.value)


class CountingStore(Store):
    """Counts reads; none of the scans here needs a second one."""

    reads = 0

    def read_into(self, i: int, z0: int, slab_ZYX: np.ndarray) -> None:
        self.reads += 1
        super().read_into(i, z0, slab_ZYX)


@pytest.mark.parametrize(("prefetch", "accumulation"), [(1, 1), (3, 1), (2, 2)])
def test_threads_read_the_set_number_of_steps_ahead_and_no_more(
    packed: tuple[Path, list[np.ndarray]], prefetch: int, accumulation: int
) -> None:
    store = CountingStore(packed[0])
    config = config_of(workers=2, prefetch=prefetch)
    with loader.build(
        config, store, seed=SEED, global_batch=4, accumulation=accumulation
    ) as batches:
        for handed_over in range(3):
            expected = 4 * (prefetch + handed_over)
            deadline = time.monotonic() + 10
            while store.reads < expected and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.05)
            assert store.reads == expected
            next(batches)


def loader_threads() -> int:
    return sum(thread.name.startswith("tapct-loader") for thread in threading.enumerate())


def test_a_closed_loader_leaves_nothing_and_gives_nothing(
    packed: tuple[Path, list[np.ndarray]],
) -> None:
    batches = loader.build(config_of(workers=3), Store(packed[0]), seed=SEED, global_batch=4)
    next(batches)
    assert loader_threads() == 3
    batches.close()
    batches.close()
    assert loader_threads() == 0
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


class InterruptedStore(Store):
    def read_into(self, i: int, z0: int, slab_ZYX: np.ndarray) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt_ends_the_threads(packed: tuple[Path, list[np.ndarray]], workers: int) -> None:
    batches = loader.build(
        config_of(workers=workers), InterruptedStore(packed[0]), seed=SEED, global_batch=4
    )
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert loader_threads() == 0


def test_an_unequal_share_is_an_error_at_once(packed: tuple[Path, list[np.ndarray]]) -> None:
    with pytest.raises(UserError, match="multiple of 3"):
        loader.build(config_of(workers=2), Store(packed[0]), seed=SEED, global_batch=4, world=3)
    assert loader_threads() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_hold_the_same(packed: tuple[Path, list[np.ndarray]], workers: int) -> None:
    expected = take(3, packed[0], config_of())
    config = config_of(workers=workers)
    with loader.build(config, Store(packed[0]), seed=SEED, global_batch=4, pin=True) as batches:
        for (batch,), (whole,) in zip(itertools.islice(batches, 3), expected):
            assert all(getattr(batch, name).is_pinned() for name in Batch.__dataclass_fields__)
            assert_same(batch.to(torch.device("cuda")).to(torch.device("cpu")), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_share_a_slab_show_the_same_voxels_and_read_them_once(
    packed: tuple[Path, list[np.ndarray]], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [
        batch
        for (batch,) in take(6, packed[0], config_of(), global_batch=2)  # samples 0..11
    ]
    drawn = torch.cat([batch.scan_B for batch in alone])
    starts = torch.cat([batch.slab_start_B for batch in alone])
    reads: list[int] = []
    plain = Store.read_into

    def counted(self: Store, i: int, z0: int, slab_ZYX: np.ndarray) -> None:
        reads.append(i)
        plain(self, i, z0, slab_ZYX)

    monkeypatch.setattr(Store, "read_into", counted)
    config = config_of(crops_per_slab=3, workers=workers, prefetch=1)
    steps = take(4, packed[0], config, global_batch=6)
    for step, (batch,) in enumerate(steps):
        assert batch.sample_B.tolist() == list(range(6 * step, 6 * step + 6))
        slabs = [sample // 3 for sample in batch.sample_B.tolist()]
        assert batch.scan_B.tolist() == [int(drawn[k]) for k in slabs]
        assert batch.slab_start_B.tolist() == [int(starts[k]) for k in slabs]
        for first in (0, 3):
            for b in (first + 1, first + 2):
                assert torch.equal(batch.hu_BZYX[b], batch.hu_BZYX[first])
    if workers == 0:
        assert len(reads) == 8
    # two ranks that divide a group see what one rank sees
    halves = [take(1, packed[0], config, global_batch=6, rank=r, world=2)[0][0] for r in (0, 1)]
    assert torch.equal(torch.cat([half.scan_B for half in halves]), steps[0][0].scan_B)


def test_a_damaged_scan_is_replaced_for_all_samples_that_share_its_slab(
    packed: tuple[Path, list[np.ndarray]],
) -> None:
    folder, scans = packed
    damaged = scan_of(0, len(scans), SEED)
    file = folder / f"scan{damaged}.b2nd"
    file.write_bytes(file.read_bytes()[:-30])
    config = config_of(crops_per_slab=2, on_error="skip")
    (batch,) = take(1, folder, config, global_batch=4)[0]
    assert batch.scan_B[0] == batch.scan_B[1] != damaged
    assert torch.equal(batch.hu_BZYX[0], batch.hu_BZYX[1])
    assert batch.extent_B3[0].tolist() == batch.extent_B3[1].tolist()
