"""The benchmark on a folder of people refuses what would make its table wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tapct import config as configs
from tapct.base.exits import UserError
from tapct.data.patients import split
from tapct.eval.contract import Headline, ScanScore, TaskResults
from tapct.eval.held_out import HeldOut
from tapct.run.config import RunConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import benchmark_hn

    return benchmark_hn


def test_every_fold_has_test_people(benchmark: ModuleType) -> None:
    people = [f"p{number}" for number in range(10)]
    seed = benchmark.seed_of_folds(people, 0.2, 5)
    folds = [split.patients_below(people, 0.2, seed, number * 0.2) for number in range(5)]
    assert all(folds) and sorted(one for fold in folds for one in fold) == sorted(people)
    assert benchmark.seed_of_folds(people, 1 / 3, 1) == split.seed_with_both_sides(people, 1 / 3)
    assert benchmark.seed_of_folds(people[:3], 0.2, 5) is None


def test_results_of_other_settings_are_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    saved = configs.load_config(RunConfig, None, [f"out={tmp_path}", "seed=3"])
    (tmp_path / "config.yaml").write_text(saved.to_yaml())
    benchmark.check_same_settings(tmp_path, saved)
    other = configs.load_config(RunConfig, None, [f"out={tmp_path}", "seed=3", "eval.seed=1"])
    with pytest.raises(UserError, match="was made with eval.seed=0, and this command has 1"):
        benchmark.check_same_settings(tmp_path, other)


def test_test_people_of_pretraining_are_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    def evaluation(held_out: HeldOut) -> SimpleNamespace:
        return SimpleNamespace(split=SimpleNamespace(held_out=held_out))

    benchmark.check_held_out(tmp_path, evaluation(HeldOut(4)))
    with pytest.raises(UserError, match="1 of 4 test scans was pretrained on"):
        benchmark.check_held_out(tmp_path, evaluation(HeldOut(4, num_scans=1)))


def test_rows_of_scans_are_averaged_as_the_headline_is(benchmark: ModuleType) -> None:
    scans = (
        ScanScore("a", "pretrained", 0.5, {"liver": 0.4, "spleen": 0.6}),
        ScanScore("b", "pretrained", 0.8, {"liver": 0.8}),
    )
    for value, by_part in ((0.6, True), (0.65, False), (0.9, None)):
        headline = Headline("a metric", {"pretrained": value}, "higher", "how")
        section = SimpleNamespace(headline=headline, results=TaskResults({}, scans))
        assert benchmark.mean_over_parts(section) is by_part
