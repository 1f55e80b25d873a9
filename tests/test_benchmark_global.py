"""The table of vectors and heads: its values are those of the combination that validation chose."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tapct import config as configs
from tapct.eval.metrics.scan_level import auroc
from tapct.eval.results.task_section import TaskSection
from tapct.eval.scores import Breakdown, Headline, TaskResults
from tapct.run.config import RunConfig

ROOT = Path(__file__).parents[1]
SCANS = [f"s{number:02}" for number in range(30)]
CLASSES = ["native", "venous"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import benchmark_global

    return benchmark_global


def candidate(vector: str, scaling: str, validation: float, score_S: np.ndarray) -> dict[str, Any]:
    rows = zip(SCANS, np.arange(30) % 2, score_S.tolist())
    predictions = {
        scan: {"truth": CLASSES[truth], "probabilities": [1 - score, score]}
        for scan, truth, score in rows
    }
    where = {"head": "logistic", "vector": vector, "block": "last", "scaling": scaling}
    return {**where, "validation": validation, "predictions": predictions}


def test_rows_are_chosen_on_validation_and_compared_by_patient(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    runs, expected = [], []
    for seed in (0, 1):
        models = {}
        for model, gain in (("pretrained", 0.6), ("untrained", 0.1)):
            score_S = np.arange(30) % 2 * gain * 0.5 + rng.uniform(0, 0.5, 30)
            table = [
                candidate("mean", "raw", 0.5, rng.uniform(0, 1, 30)),
                candidate("mean", "zscore", 0.9, score_S),  # the better one on validation
                candidate("cls", "raw", 0.4, rng.uniform(0, 1, 30)),
            ]
            models[model] = {"targets": {"phase": {"classes": CLASSES, "table": table}}}
            if model == "pretrained":
                expected.append(auroc(np.arange(30) % 2, score_S))
        headline = Headline("mean AUROC", {"pretrained": 0.5}, "higher", "how")
        results = TaskResults(models, (), Breakdown("", "target", {"phase": {}}))
        section = TaskSection({}, "scan", 60, 30, 0, headline, results)
        evaluation = SimpleNamespace(tasks={"classification": section})
        runs.append(script.Run(seed, evaluation, 1.0, 1.0))
    rows = script.rows_of(runs, {scan: f"p{scan}" for scan in SCANS})
    found = {row.vector: row.found for row in rows}
    assert list(found) == ["mean", "cls"]  # the best one on validation first
    own = found["mean"].models[0]
    assert own.by_seed == pytest.approx(expected)
    assert own.estimate.interval is not None and own.estimate.num_patients == 30
    (pair,) = found["mean"].differences
    assert pair.other == "untrained" and pair.estimate.value > 0.1
    text = script.markdown(rows, runs)
    assert "**phase** (diffuse: phase of the contrast agent), AUROC, n = 30 test scans" in text
    assert f"| mean | logistic | 0.900 | {np.mean(expected):.3f} ± " in text


def test_the_config_keeps_the_predictions_of_all_labels(script: ModuleType) -> None:
    config = configs.load_config(RunConfig, ROOT / script.CONFIG, []).value
    targets: set[str] = set()
    for task in config.eval.tasks:
        assert task.config.all_predictions
        targets |= set(task.config.targets)
    assert targets == set(script.LABELS)
