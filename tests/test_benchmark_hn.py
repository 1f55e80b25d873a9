"""The benchmark on a folder of people: it refuses what would make its table wrong, and shows every
number of every task.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tiny_run import make_archive, write_config

from tapct import config as configs
from tapct.base.exits import UserError
from tapct.data.manifest import Manifest, Row
from tapct.data.patients import split
from tapct.data.phantom import archive as phantom
from tapct.eval.scans.held_out import HeldOut
from tapct.run.config import RunConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import benchmark_hn

    return benchmark_hn


@pytest.fixture
def data(benchmark: ModuleType) -> ModuleType:
    import benchmark_data

    return benchmark_data


def test_every_fold_has_test_people(data: ModuleType) -> None:
    people = [f"p{number}" for number in range(10)]
    seed = data.seed_of_folds(people, 0.2, 5)
    folds = [split.patients_below(people, 0.2, seed, number * 0.2) for number in range(5)]
    assert all(folds) and sorted(one for fold in folds for one in fold) == sorted(people)
    assert data.seed_of_folds(people, 1 / 3, 1) == split.seed_with_both_sides(people, 1 / 3)
    assert data.seed_of_folds(people[:3], 0.2, 5) is None


def test_a_recipe_is_chosen_without_the_test_people(data: ModuleType, tmp_path: Path) -> None:
    rows = [
        *(Row(f"s{number}", f"{number}.nii.gz", "nifti", "accepted", patient=f"p{number}")
          for number in range(12)),
        Row("s12", "12.nii.gz", "nifti", "refused", "empty", patient="p0"),
    ]  # fmt: skip
    everyone = Manifest(tuple(rows), tmp_path)
    people = [row.patient for row in rows[:12]]
    ((fold,), seed) = data.divided(people, 1)
    tested = split.patients_below(people, fold.share, seed, fold.start)
    data.without_test_people(everyone, tmp_path / "others.parquet")
    others = Manifest.read(tmp_path / "others.parquet")
    assert {row.patient for row in others.rows} == set(people) - tested
    assert 0 < len(tested) < 12
    ((fold,), seed) = data.divided([row.patient for row in others.accepted], 1)
    validated = split.patients_below(people, fold.share, seed, fold.start) - tested
    assert 0 < len(validated) < len(others.accepted)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--phantom", "--validation", "--folds", "5"], "--validation needs --folds 1"),
        (["--data", "folder", "--phantom"], "give --data DIR or --phantom"),
    ],
)
def test_options_that_contradict_each_other(
    benchmark: ModuleType, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.options_of(words)
    assert line in capsys.readouterr().err


def test_overrides_may_stand_behind_the_seeds(benchmark: ModuleType) -> None:
    words = ["--phantom", "a=1", "--out", "runs/x=y", "--seeds", "3", "4", "train.steps=2"]
    options = benchmark.options_of(words)
    assert options.seeds == [3, 4] and options.overrides == ["a=1", "train.steps=2"]
    assert options.out == Path("runs/x=y")


def test_validation_has_a_folder_of_its_own(benchmark: ModuleType) -> None:
    options = benchmark.options_of(["--phantom", "--validation", "--out", "runs/mine"])
    assert options.out == Path("runs/mine/validation")


def test_results_of_other_settings_are_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    saved = configs.load_config(RunConfig, None, [f"out={tmp_path}", "seed=3"])
    (tmp_path / "config.yaml").write_text(saved.to_yaml())
    benchmark.check_same_settings(tmp_path, saved)
    same = configs.load_config(RunConfig, None, [f"out={tmp_path}", "seed=3", "eval.seed=1"])
    benchmark.check_same_settings(tmp_path, same)  # the run is evaluated again
    other = configs.load_config(RunConfig, None, [f"out={tmp_path}", "seed=3", "train.steps=7"])
    with pytest.raises(UserError, match="was made with train.steps=.*, and this command has 7"):
        benchmark.check_same_settings(tmp_path, other)


def test_test_people_of_pretraining_are_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    def evaluation(held_out: HeldOut) -> SimpleNamespace:
        return SimpleNamespace(split=SimpleNamespace(held_out=held_out))

    benchmark.check_held_out(tmp_path, evaluation(HeldOut(4)))
    with pytest.raises(UserError, match="1 of 4 test scans was pretrained on"):
        benchmark.check_held_out(tmp_path, evaluation(HeldOut(4, num_scans=1)))


def test_a_run_that_was_stuck_is_named_under_the_table(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    def run_of(name: str, information: float) -> Path:
        out = tmp_path / name
        out.mkdir()
        target = math.log(256) - information
        row = {
            "loss/dino_global": 2.0,
            "health/dino_ln_k_minus_ce": information,
            "health/dino_information": information,
            "health/dino_marginal_entropy": math.log(256),
            "health/dino_target_entropy": target,
        }
        lines = [json.dumps({"step": step, **row}) for step in range(1, 301)]
        (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return out

    import benchmark_table as table

    trouble = benchmark.trouble_of(run_of("stuck", 0.0))
    assert trouble.startswith("stuck. DINO: ") and "nothing is learned" in trouble
    assert benchmark.trouble_of(run_of("alive", 1.0)) == ""
    evaluation = SimpleNamespace(tasks={})
    runs = [table.Run(seed, evaluation, 60.0, 60.0, trouble * seed) for seed in (0, 1)]
    assert table.rendered([], runs).splitlines()[1:] == [
        f"warning: pretraining of seed 1: {trouble}"
    ]


CONFIG = """
base: tiny.yaml
eval:
  baselines: [untrained, position]
  num_pictures: 0
  tasks:
    segmentation: {fractions: [1], draws: 2, surface: true, steps: 5}
    patch_knn: {k: [3, 5], max_queries: 40}
    registration: {max_pairs: 6, max_train_pairs: 2, max_patches: 50, label_mm: 10, blocks: last}
    regression: {vectors: [mean]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny scans in the layout of nnU-Net."""
    root = tmp_path_factory.mktemp("nnunet")
    archive = make_archive(root / "archive", num=7)
    for name, ending in (("images", "_0000"), ("labels", "")):
        (root / f"{name}Tr").mkdir()
        for file in sorted((archive / name).glob("*.nii.gz")):
            stem = file.name.removesuffix(".nii.gz")
            file.rename(root / f"{name}Tr" / f"{stem}{ending}.nii.gz")
    labels = {"background": 0, **{name: value for value, name in phantom.LABELS}}
    facts = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps({**facts, "numTraining": 7}))
    return root


def test_every_number_of_every_task_is_in_the_table(
    benchmark: ModuleType, folder: Path, tmp_path: Path
) -> None:
    write_config(tmp_path, tmp_path / "store")
    config = tmp_path / "benchmark.yaml"
    config.write_text(CONFIG)
    words = ["train.steps=2", "--data", str(folder), "--config", str(config)]
    benchmark.main([*words, "--out", str(tmp_path / "out"), "--seeds", "0", "1"])
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["model"] == "pretrained" and row["part"] == "all"]
    metrics = {
        ("segmentation", "mean Dice"),
        ("segmentation", "mean NSD"),
        ("segmentation", "mean HD95"),
        ("segmentation", "mean Dice with 1 labelled patient"),
        ("patch_knn", "balanced accuracy"),
        ("registration", "mean Dice"),
        ("regression", "mean R^2"),
    }
    for seed in ("all", "0", "1"):
        assert {(row["task"], row["metric"]) for row in own if row["seed"] == seed} == metrics
    results = []
    for number in (0, 1):
        evaluation = benchmark.own_evaluation(tmp_path / "out" / f"fold_0_seed_{number}")
        assert evaluation is not None
        results.append(evaluation)
    for row in own:
        headline = [one.tasks[row["task"]].headline for one in results]
        if row["metric"] != headline[0].metric:
            continue
        by_seed = [one.values["pretrained"] for one in headline]
        expected = np.mean(by_seed) if row["seed"] == "all" else by_seed[int(row["seed"])]
        assert float(row["value"]) == pytest.approx(expected, rel=1e-4)
    parts = {row["part"] for row in rows if row["task"] == "regression"}
    assert {"all", "liver ml", "lungs ml"} <= parts
    assert any(row["model"] == "pretrained - position" for row in rows)
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "registration: mean Dice (higher is better)" in text

    # other tasks: the run is evaluated again, not pretrained again
    began = (tmp_path / "out" / "fold_0_seed_0" / "cost.json").stat().st_mtime_ns
    off = [f"eval.tasks.{name}=null" for name in ("segmentation", "registration", "regression")]
    benchmark.main([*off, *words, "--out", str(tmp_path / "out"), "--seeds", "0"])
    assert (tmp_path / "out" / "fold_0_seed_0" / "cost.json").stat().st_mtime_ns == began
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        assert {row["task"] for row in csv.DictReader(file)} == {"patch_knn"}
