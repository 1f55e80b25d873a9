"""Evaluations that share features: what is read and computed again, and what is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryStore
from plugin_cases import user_modules

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.data.packed.packed_scan import Damaged
from tapct.eval import cache, runner
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.models.baselines import (
    NAMES,
    NamedModel,
    PositionFeatures,
    RawPatches,
    check_names,
    with_baselines,
)
from tapct.eval.results.json_file import Evaluation, from_json
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.tasks.segmentation import Config as SegmentationConfig
from tapct.eval.tasks.segmentation import Segmentation
from tapct.models import vit
from tapct.types import HUContract, LabelMap, Volume

PATCH = (2, 4, 4)
PREPROCESS = Preprocess((32, 32), (4, 16, 16), (4, 16, 16))
VIT = vit.Config(
    window=(4, 16, 16), patch=PATCH, dim=8, depth=2, heads=2, registers=1, layer_scale=1.0
)
SEGMENTATION = Plugin("segmentation", SegmentationConfig(steps=5))


@dataclasses.dataclass(frozen=True)
class Row:
    id: str
    patient: str
    path: str = ""
    has_labels: bool = True


ROWS = [Row(f"s{n}", f"p{n}") for n in range(4)]


def boxes(
    row: Row, names: tuple[tuple[int, str], ...] = ((1, "body"), (2, "liver"))
) -> LabelledScan:
    """A body with an organ; where the labels have no body, the air outside is found by HU."""
    labels = np.zeros((8, 32, 32), np.uint16)
    labels[:, 4:28, 4:28] = 1
    labels[:7, 8:16, 8:20] = 2
    noise = np.random.default_rng(int(row.id[1:])).normal(0, 20, labels.shape)
    hu = np.choose(labels, [-1000, 0, 150]) + noise
    spacing_mm = (3.0, 1.0, 1.0)
    label_map = LabelMap(labels, spacing_mm, names=names)
    return LabelledScan(row.id, Volume(hu.astype(np.int16), spacing_mm), label_map, row.patient)


class Store(MemoryStore):
    """A store whose scans may be unreadable."""

    broken: tuple[str, ...] = ()

    def read(self, i: int) -> np.ndarray:
        if "all" in self.broken or self.scans[i].id in self.broken:
            raise Damaged(f"scan {self.scans[i].id} is damaged")
        return super().read(i)


def models() -> tuple[NamedModel, ...]:
    backbone = vit.build(VIT).requires_grad_(False).eval()
    backbone.init_weights(5)
    return with_baselines(backbone, Plugin("vit", VIT), 0, ("raw_hu", "position"))


def evaluate(store: Store, out: Path, *tasks: Plugin, **settings: Any) -> Evaluation:
    given = {"num_pictures": 0, "cache": cache.Config(str(out.parent / "features"))} | settings
    chosen = given.pop("models", None) or models()
    skips = given.pop("max_skips", 0)
    config = runner.Config(tasks=tasks or (SEGMENTATION,), **given)
    return runner.evaluate(
        chosen, store.scans, store, config, contract=HUContract(), out=out,
        preprocess=PREPROCESS, max_skips=skips,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with user_modules(tmp_path_factory.mktemp("examples")):
        yield


def test_a_second_evaluation_with_another_task_reads_no_scan(tmp_path: Path) -> None:
    store = Store(ROWS, boxes)
    first = evaluate(store, tmp_path / "one")
    assert sorted(store.reads) == ["s0", "s1", "s2", "s3"]
    assert first.cost is not None and first.cost.num_computed == 12 and first.cost.num_cached == 0
    assert set(first.cost.seconds) == {"read", "prepare", "forward", "write", "load"}
    assert all(first.cost.seconds[part] > 0 for part in ("forward", "write", "load"))
    assert 0 < first.cost.features_bytes < first.cost.cache_bytes
    store.broken, store.reads = ("all",), []
    depth = Plugin("mylab.tasks.depth", plugins.load("eval.tasks", "mylab.tasks.depth").Config())
    second = evaluate(store, tmp_path / "two", depth, SEGMENTATION)
    assert store.reads == []
    assert second.cost is not None and second.cost.num_computed == 0
    assert second.cost.num_cached == 12 and second.cost.seconds["forward"] == 0
    assert list(second.tasks) == ["mylab.tasks.depth", "segmentation"]
    one, two = first.tasks["segmentation"], second.tasks["segmentation"]
    assert one.results == two.results  # equal to the bit: both read the cache
    written = json.loads((tmp_path / "two" / "results.json").read_text())
    assert written["cost"]["num_cached"] == 12
    assert from_json(written).cost == second.cost
    assert any("12 in the cache" in line for line in second.lines())


def test_scans_are_read_again_only_for_the_air_outside_and_for_pictures(tmp_path: Path) -> None:
    unnamed = Store(ROWS, lambda row: boxes(row, names=((2, "liver"),)))
    evaluate(unnamed, tmp_path / "one")
    assert len(unnamed.reads) == 8  # for the features, and for the air outside
    store = Store(ROWS, boxes)
    evaluate(store, tmp_path / "two", num_pictures=1)
    assert len(store.reads) == 1  # the scans have the same voxels as the others


def test_an_evaluation_resumes_with_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(ROWS, boxes)
    first = evaluate(store, tmp_path / "one")
    entries = sorted((tmp_path / "features").glob("*/*.features"))
    assert len(entries) == 12
    entries[0].unlink()
    entries[7].write_bytes(entries[7].read_bytes()[:100])
    store.reads = []
    again = evaluate(store, tmp_path / "two")
    assert len(store.reads) == 2 and again.cost is not None and again.cost.num_computed == 2
    assert capsys.readouterr().out.count("are damaged") == 1
    for name, numbers in first.tasks["segmentation"].results.models.items():
        found = again.tasks["segmentation"].results.models[name]
        assert found["mean_dice"] == pytest.approx(numbers["mean_dice"], abs=0.05)


def test_entries_below_the_quota_of_this_evaluation_stay_until_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = cache.Config(str(tmp_path / "features"), quota_gb=1e-8)
    evaluate(Store(ROWS, boxes), tmp_path / "one", cache=tiny)
    assert "more than eval.cache.quota_gb=1e-08" in capsys.readouterr().out
    assert list((tmp_path / "features").glob("*/*.features")) == []


def test_features_are_kept_beside_the_results_where_no_folder_is_named(tmp_path: Path) -> None:
    evaluate(Store(ROWS, boxes), tmp_path / "one", cache=cache.Config())
    assert list((tmp_path / "one" / "features").glob("*/*.features"))


def test_damaged_scans_are_skipped_on_both_sides_or_end_the_evaluation(tmp_path: Path) -> None:
    store = Store(ROWS, boxes)
    store.broken = ("s2",)
    with pytest.raises(UserError, match=r"scan s2 cannot be read: .*data.loader.on_error=skip"):
        evaluate(store, tmp_path / "one")
    found = evaluate(store, tmp_path / "two", max_skips=1)
    assert [(scan.scan, scan.side) for scan in found.split.unread] == [("s2", "train")]
    assert len(found.split.train) + len(found.split.test) == 3
    patients = [dataclasses.replace(row, patient="p") for row in ROWS]
    of_one = Store(patients, boxes)
    of_one.broken = ("s1",)
    config: dict[str, Any] = {"num_blocks": 2, "block_gap": 1, "max_skips": 1}
    config["cache"] = cache.Config(str(tmp_path / "empty"))
    within = evaluate(of_one, tmp_path / "three", **config)
    assert [(scan.scan, scan.side) for scan in within.split.unread] == [
        ("s1", "train"), ("s1", "test")
    ]  # fmt: skip


def test_models_keep_their_own_patch_contract_and_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = Preprocess((32, 32), (4, 32, 32), (4, 32, 32), 0.5)
    own = HUContract(clip_low=-500.0, clip_high=500.0, mean=0.0, std=100.0)
    others = (
        *models()[:2],
        NamedModel("coarse", RawPatches((4, 8, 8)), own, coarse),
        NamedModel("as_raw", RawPatches(PATCH), HUContract(), PREPROCESS),
    )
    grids: list[tuple[int, ...]] = []
    truth = Segmentation.truth
    monkeypatch.setattr(
        Segmentation,
        "truth",
        lambda self, scan, grid, in_play: (
            grids.append(grid.shape) or truth(self, scan, grid, in_play)
        ),
    )
    store = Store(ROWS, boxes)
    found = evaluate(store, tmp_path / "one", models=others, num_pictures=1)
    assert grids.count((4, 8, 8)) == grids.count((2, 4, 4)) == 4  # once per scan and grid
    numbers = found.tasks["segmentation"].results.models
    assert numbers["as_raw"] == numbers["raw_hu"]
    alone = evaluate(
        store, tmp_path / "two", models=[NamedModel("coarse", RawPatches((4, 8, 8)), own, coarse)]
    )
    assert alone.tasks["segmentation"].results.models["coarse"] == numbers["coarse"]
    about = found.backbones
    assert about["coarse"].patch == (4, 8, 8) and about["coarse"].contract["std"] == 100.0
    assert about["coarse"].preprocess != about["raw_hu"].preprocess == found.preprocess
    assert about["as_raw"].features == about["raw_hu"].features
    files = [picture.file for picture in found.tasks["segmentation"].pictures]
    assert len(files) == 2 and files[1].endswith("_2.png")
    assert all((tmp_path / "one" / file).is_file() for file in files)
    with pytest.raises(UserError, match=r"model coarse: .*preprocess.window"):
        evaluate(store, tmp_path / "x", models=[NamedModel("coarse", RawPatches((3, 8, 8)))])
    with pytest.raises(UserError, match="two models of one evaluation are called raw_hu"):
        evaluate(store, tmp_path / "x", models=[models()[1], models()[1]])


class TwoBlocks(Segmentation):
    """Reads both blocks."""

    seen: list[tuple[str, tuple[int, ...]]]

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        return tuple(range(num_blocks))

    def learn(self, model, dense, truth):
        self.seen.append((model, tuple(sorted(dense.blocks))))
        super().learn(model, dense, truth)


def test_a_task_gets_the_blocks_that_it_reads_and_a_new_block_adds_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(ROWS, boxes)
    evaluate(store, tmp_path / "one")
    seen: list[tuple[str, tuple[int, ...]]] = []

    class Module:
        @staticmethod
        def build(config: Any, *, seed: int) -> Segmentation:
            task = TwoBlocks(config, seed)
            task.seen = seen
            return task

    monkeypatch.setattr(plugins, "load", lambda folder, name: Module)
    again = evaluate(store, tmp_path / "two")
    assert set(seen) == {("pretrained", (0, 1)), ("raw_hu", (0,)), ("position", (0,))}
    assert again.cost is not None and again.cost.num_computed == 4  # one block of one model
    assert again.backbones["pretrained"].blocks == (0, 1)
    monkeypatch.setattr(TwoBlocks, "blocks", lambda self, num: (num,))
    with pytest.raises(
        UserError, match="segmentation reads block 2 of model pretrained, which has"
    ):
        evaluate(store, tmp_path / "three")


def test_features_that_are_not_finite_name_model_and_scan(tmp_path: Path) -> None:
    broken = vit.build(VIT).requires_grad_(False)
    broken.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"model odd, scan s\d: some features are not finite"):
        evaluate(Store(ROWS, boxes), tmp_path / "one", models=[NamedModel("odd", broken)])
    left = [path.name for path in (tmp_path / "features").rglob("*") if path.is_file()]
    assert left == ["model.json"]


# --- the baselines ---


def test_random_networks_are_wider_and_mix_their_tokens() -> None:
    config = dataclasses.replace(VIT, layer_scale=1e-5)
    named = {one.name: one for one in with_baselines(vit.build(config), Plugin("vit", config), 7)}
    assert list(named) == [
        "pretrained", "untrained", "untrained_layerscale1", "raw_hu", "position", "random_2x",
        "random_4x",
    ]  # fmt: skip
    for name, factor in (("random_2x", 2), ("random_4x", 4)):
        made = named[name].loaded()
        assert isinstance(made, vit.VisionTransformer)
        assert (made.config.dim, made.config.heads) == (8 * factor, 2 * factor)
        assert made.config.depth == 2 and made.config.layer_scale == 1.0
        expected = vit.build(made.config)
        expected.init_weights(7)
        for key, value in made.state_dict().items():
            assert torch.equal(value, expected.state_dict()[key])
        # without features to compute, there are no weights in memory
        assert all(parameter.is_meta for parameter in named[name].model.parameters())


def test_names_of_baselines_are_checked_with_a_suggestion() -> None:
    check_names(NAMES)
    with pytest.raises(UserError, match="'raw_hus', which is no baseline: did you mean raw_hu"):
        runner.Config(baselines=("raw_hus",))
    with pytest.raises(UserError, match="names raw_hu twice"):
        check_names(("raw_hu", "raw_hu"))
    assert [one.name for one in with_baselines(vit.build(VIT), Plugin("vit", VIT), 0, ())] == [
        "pretrained"
    ]


def test_a_backbone_without_a_wider_variant_leaves_the_baseline_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vit.VisionTransformer, "wider", lambda self, factor: None)
    named = with_baselines(vit.build(VIT), Plugin("vit", VIT), 0, ("position", "random_2x"))
    assert [one.name for one in named] == ["pretrained", "position"]
    assert "random_2x: the backbone vit has no wider variant" in capsys.readouterr().out
    assert isinstance(named[1].model, PositionFeatures)
