"""The feature cache: what it keeps, what it refuses, what it removes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tapct.base.exits import UserError
from tapct.eval import cache as feature_cache
from tapct.eval.cache import CacheSink, FeatureCache, ModelKey, model_key
from tapct.eval.features import entry_file
from tapct.eval.features.dense import PatchGrid, WindowVectors
from tapct.eval.features.entry_file import DamagedFeatures, FeatureWriter, to_half
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.stopwatch import Stopwatch
from tapct.eval.models.baselines import RawPatches
from tapct.models import vit
from tapct.nn import rope
from tapct.types import HUContract

GRID = PatchGrid((2, 4, 4), (9, 12, 16), (9, 24, 32))
DIM = 6
CPU = torch.device("cpu")
PREPROCESS = Preprocess((16, 16), (4, 16, 16), (4, 16, 16))


def windows(seed: int = 0, registers: int = 2) -> WindowVectors:
    generator = torch.Generator().manual_seed(seed)
    cls, mean, std, largest = (torch.randn(4, DIM, generator=generator) for _ in range(4))
    return WindowVectors(
        cls, mean, std, largest, torch.randn(4, registers, DIM, generator=generator),
        torch.arange(12).reshape(4, 3),
    )  # fmt: skip


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(*GRID.shape, DIM, generator=torch.Generator().manual_seed(seed))


def write(path: Path, values_ZYXD: torch.Tensor, vectors: WindowVectors | None = None) -> None:
    writer = FeatureWriter(path, GRID, "model m, scan s")
    for first in range(0, GRID.shape[0], 2):
        writer.rows(first, values_ZYXD[first : first + 2])
    writer.finish(vectors or windows())


@pytest.mark.parametrize("registers", [0, 2])
def test_a_file_holds_the_features_as_float16(tmp_path: Path, registers: int) -> None:
    values, vectors = features(), windows(registers=registers)
    write(tmp_path / "f", values, vectors)
    found, grid = entry_file.read(tmp_path / "f")
    assert grid == GRID
    assert torch.equal(found.features_DZYX, values.half().float().permute(3, 0, 1, 2))
    for field in dataclasses.fields(WindowVectors):
        kept, expected = getattr(found.windows, field.name), getattr(vectors, field.name)
        assert torch.equal(
            kept, expected.half().float() if expected.is_floating_point() else expected
        )
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("factor", [1e-30, 1e-5, 1e4, 1e6, 1e30])
def test_a_channel_beyond_float16_keeps_its_digits(tmp_path: Path, factor: float) -> None:
    values = features()
    values[..., 3] *= factor
    write(tmp_path / "f", values)
    found, _ = entry_file.read(tmp_path / "f")
    error = (found.features_DZYX.permute(1, 2, 3, 0) - values).abs().amax((0, 1, 2))
    largest = values.abs().amax((0, 1, 2))
    assert bool((error <= largest * 2**-11).all())
    half, exponents = to_half(values)
    assert torch.isfinite(half).all()
    needed = float(values[..., 3].abs().max())
    assert bool(exponents) == (not entry_file.SMALLEST <= needed <= entry_file.LARGEST)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_one_line(tmp_path: Path, bad: float) -> None:
    values = features()
    values[3, 1, 2, 4] = bad
    sink = sink_of(FeatureCache(tmp_path, 1.0), key_of(), "scan")
    sink.rows(0, 0, values[:2])
    with pytest.raises(UserError, match=r"model m, scan s: some features are not finite"):
        sink.rows(0, 2, values[2:])
    sink.abandon()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model.json"]


def test_damage_to_any_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, features())
    content = path.read_bytes()
    for at in [*range(8, len(content), max(1, len(content) // 60)), len(content) - 1]:
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DamagedFeatures):
            entry_file.read(path)
    for length in (0, 7, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFeatures):
            entry_file.read(path)


def test_missing_rows_are_damage(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path / "f", GRID, "")
    writer.rows(0, features()[:2])
    writer.rows(3, features()[3:])
    writer.finish(windows())
    with pytest.raises(DamagedFeatures, match="rows 2 to 2 are missing"):
        entry_file.read(tmp_path / "f")


# --- keys ---

BASE = vit.Config(window=(4, 16, 16), patch=(2, 4, 4), dim=16, depth=1, heads=2, layer_scale=1.0)


def key_of(
    config: vit.Config = BASE, seed: int = 0, device: torch.device = CPU, **changes: Any
) -> ModelKey:
    model = vit.build(config)
    model.init_weights(seed)
    settings = {"contract": HUContract(), "preprocess": PREPROCESS, **changes}
    return model_key(model, settings["contract"], settings["preprocess"], device)


def test_a_key_changes_with_all_that_features_depend_on() -> None:
    keys = [
        key_of(),
        key_of(seed=1),
        key_of(dataclasses.replace(BASE, qk_norm=True)),
        key_of(dataclasses.replace(BASE, heads=4)),  # the same weights, used in another way
        key_of(contract=HUContract(clip_low=-1000.0)),
        key_of(preprocess=dataclasses.replace(PREPROCESS, border_weight=0.5)),
        key_of(device=torch.device("cuda")),
    ]
    assert len({key.text for key in keys}) == len(keys)
    assert key_of() == key_of()


def test_modules_that_compute_something_else_have_another_key() -> None:
    class Scaled(RawPatches):
        def __init__(self, factor: float) -> None:
            super().__init__((2, 4, 4))
            self.factor = factor

    def key(model: torch.nn.Module) -> str:
        return model_key(model, HUContract(), PREPROCESS, CPU).text

    assert key(Scaled(1.0)) == key(Scaled(1.0)) != key(Scaled(2.0))
    patched, hooked = Scaled(1.0), Scaled(1.0)
    patched.forward = lambda crops: []  # type: ignore[method-assign]
    hooked.register_forward_hook(lambda *_: None)
    assert len({key(Scaled(1.0)), key(patched), key(hooked)}) == 3


def test_a_changed_source_file_of_any_layer_has_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "layers_of_a_user.py"
    file.write_text("import torch\n\nclass Layer(torch.nn.Identity):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = RawPatches((2, 4, 4))
    model.add_module("layer", importlib.import_module("layers_of_a_user").Layer())
    before = model_key(model, HUContract(), PREPROCESS, CPU).text
    assert model_key(model, HUContract(), PREPROCESS, CPU).text == before
    file.write_text(file.read_text() + "    scale = 2\n")
    assert model_key(model, HUContract(), PREPROCESS, CPU).text != before


def test_the_spacing_counts_where_scans_are_resized_to_one() -> None:
    model, device = RawPatches((2, 4, 4)), torch.device("cpu")
    for wanted, differ in (((0.0, 0.0, 0.0), False), ((0.0, 1.0, 1.0), True)):
        preprocess = Preprocess((32, 32), (4, 16, 16), (4, 16, 16), spacing_mm=wanted)
        key = model_key(model, HUContract(), preprocess, device)
        one, other = (key.scan("ab" * 16, (3.0, mm, mm)) for mm in (0.7, 0.8))
        assert key.in_mm is differ and (one != other) is differ


def test_the_spacing_counts_only_for_a_model_in_mm() -> None:
    in_mm = dataclasses.replace(BASE, dim=32, positions="rope", rope=rope.Config(coordinates="mm"))
    one, two = (1.0, 1.0, 1.0), (2.0, 1.0, 1.0)
    assert key_of().scan("d", one) == key_of().scan("d", two) == "d"
    key = key_of(in_mm)
    assert key.scan("d", one) == key.scan("d", one) != key.scan("d", two)
    assert key.scan("e", one) != key.scan("d", one)


# --- the folder ---


def sink_of(
    cache: FeatureCache, key: ModelKey, scan: str, blocks: tuple[int, ...] = (0,)
) -> CacheSink:
    cache.prepare(key, "m")
    return CacheSink(cache, key, scan, blocks, GRID, "model m, scan s", Stopwatch())


def put(cache: FeatureCache, key: ModelKey, scan: str, block: int = 0) -> Path:
    sink = sink_of(cache, key, scan, (block,))
    sink.rows(block, 0, features())
    sink.finish(block, windows())
    return cache.file(key, scan, block)


def test_an_entry_is_found_and_private(tmp_path: Path) -> None:
    cache, key = FeatureCache(tmp_path / "new" / "cache", 1.0), key_of()
    assert cache.missing(key, "a", (0, 2)) == (0, 2)
    path = put(cache, key, "a", 2)
    assert cache.missing(key, "a", (0, 2)) == (0,)
    assert cache.load(key, "a", 0, CPU) is None
    found = cache.load(key, "a", 2, CPU)
    assert found is not None and found[1] == GRID
    for folder in (tmp_path / "new" / "cache", path.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads((path.parent / "model.json").read_text())["name"] == "m"
    assert cache.size() == sum(file.stat().st_size for file in path.parent.iterdir())


def test_a_damaged_entry_counts_as_missing_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, key = FeatureCache(tmp_path, 1.0), key_of()
    path = put(cache, key, "a")
    path.write_bytes(path.read_bytes()[:-5])
    assert cache.load(key, "a", 0, CPU) is None
    assert "are damaged" in capsys.readouterr().out


def test_the_entries_used_least_recently_are_removed(tmp_path: Path) -> None:
    cache, key, other = FeatureCache(tmp_path, 1.0), key_of(), key_of(seed=1)
    paths = [put(cache, key, name) for name in "abc"] + [put(cache, other, "d")]
    for age, path in enumerate(paths):
        os.utime(path, (time.time() - 1000 + age,) * 2)
    cache.missing(key, "a", (0,))  # used just now
    size = paths[0].stat().st_size
    cache.quota = cache.size() - size - 1
    cache.trim()
    assert [path.exists() for path in paths] == [True, False, False, True]
    cache.quota = 0
    cache.trim()
    assert not any(path.exists() for path in paths)
    assert [path for path in tmp_path.glob("*/*") if path.is_file()] == []


def test_entries_of_a_running_evaluation_are_never_removed(tmp_path: Path) -> None:
    running, key, old = FeatureCache(tmp_path, 1.0), key_of(), key_of(seed=1)
    used, unused = put(running, key, "a"), put(running, old, "a")
    with running.in_use([key]):
        FeatureCache(tmp_path, 1e-9).trim()  # another process, whose quota is full
        assert used.exists() and not unused.exists()
        os.utime(running.sign, (time.time() - feature_cache.STALE_S - 10,) * 2)
        FeatureCache(tmp_path, 1e-9).trim()  # it was killed long ago
        assert not used.exists() and not running.sign.exists()
    put(running, key, "a")
    running.quota = 0
    with running.in_use([key]):
        assert used.exists()
    assert not used.exists() and list((tmp_path / "in_use").iterdir()) == []


def test_a_half_written_file_is_removed_when_its_process_must_have_ended(tmp_path: Path) -> None:
    cache, key = FeatureCache(tmp_path, 1.0), key_of()
    left = put(cache, key, "a").with_name(".b-0.features.0011.tmp")
    left.write_bytes(b"x")
    cache.trim()
    assert left.exists()
    os.utime(left, (time.time() - feature_cache.LEFTOVER_S - 10,) * 2)
    cache.trim()
    assert not left.exists()


def test_several_writers_of_one_entry_do_no_harm(tmp_path: Path) -> None:
    key, failures = key_of(), []

    def work() -> None:
        cache = FeatureCache(tmp_path, 1.0)
        try:
            for _ in range(5):
                put(cache, key, "a")
                found = cache.load(key, "a", 0, CPU)
                assert found is not None
                np.testing.assert_array_equal(
                    found[0].features_DZYX, features().half().float().permute(3, 0, 1, 2)
                )
                cache.trim()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list(tmp_path.glob("*/*.features"))) == 1 and not list(tmp_path.glob("*/.*"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file", 1.0)
    with (
        pytest.raises(
            UserError, match=r"feature cache .*file cannot be written: .*eval.cache.path"
        ),
        cache.in_use([key_of()]),
    ):
        pass
