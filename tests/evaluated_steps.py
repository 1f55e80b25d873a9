"""Run folders with written results of several steps, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tapct.eval.results import over_steps, task_statistics
from tapct.eval.results.json_file import (
    EvaluatedData,
    EvaluatedWeights,
    Evaluation,
    Origin,
    SplitRecord,
    TaskSection,
)
from tapct.eval.scans.held_out import HeldOut
from tapct.eval.scores import Headline, ScanScore, TaskResults
from tapct.run_folder import RunFolder

DIGEST = "1" * 32
DATASET = f"mine-{DIGEST[:8]}"
SETTINGS = {
    "only": [],
    "test_share": 0.5,
    "max_scans": 0,
    "seed": 0,
    "num_blocks": 8,
    "block_gap": 2,
    "split_column": "auto",
    "validation_share": 0.0,
}
PREPROCESS = {"size_yx": [64, 64], "stride": [4, 16, 16]}
TASK = {"steps": 100}


def make_run(folder: Path, best: str = "", validation_share: float = 0.0, every: int = 10) -> Path:
    """A run folder with a config and the data that it was trained on."""
    run = RunFolder(folder)
    run.evaluations.mkdir(parents=True)
    section = {
        **SETTINGS,
        "validation_share": validation_share,
        "preprocess": PREPROCESS,
        "tasks": {"segmentation": TASK},
        "during": {"every": every, "best": best},
    }
    run.config.write_text(yaml.safe_dump({"out": str(folder), "eval": section}))
    run.provenance.write_text(json.dumps({"manifest": {"digest": DIGEST}}))
    return folder


def evaluation(
    value: float,
    *,
    task: str = "segmentation",
    metric: str = "mean Dice",
    direction: str = "higher",
    settings: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    task_config: Mapping[str, Any] | None = None,
    test: Sequence[str] = ("a", "b"),
    train: Sequence[str] = ("t",),
    labels: str = "labels",
    weights: str = "",
    spread: float = 0.0,
    without_result: Mapping[str, str] | None = None,
) -> Evaluation:
    """An evaluation whose headline has a value; settings that are given differ from the usual.

    Args:
        spread: difference between neighbouring test scans; above 0, the scans have values.
    """
    changed = {}
    if settings is None or settings:
        changed = over_steps.split_settings({**SETTINGS, **(settings or {})})
    headline = Headline(metric, {"pretrained": value, "untrained": 0.05}, direction, "Overlap.")
    found, own = TaskResults({"pretrained": {}, "untrained": {}}), None
    if spread:
        middle = (len(test) - 1) / 2
        scores = [
            ScanScore(scan, model, (mean + spread * (i - middle)))
            for model, mean in headline.values.items()
            for i, scan in enumerate(test)
        ]
        found = TaskResults({"pretrained": {}, "untrained": {}}, tuple(scores))
        own = task_statistics.of_task(found, headline, {}, {scan: scan for scan in test}, 0)
    section = TaskSection(
        {**TASK, **(task_config or {})},
        "voxels",
        len(train),
        len(test),
        0,
        headline,
        found,
        (),
        own,
    )
    split = SplitRecord("patients", HeldOut(len(test)), tuple(train), tuple(test), (), tuple(test))
    origin = Origin(
        EvaluatedData(DATASET, "m", DIGEST, labels, 3),
        EvaluatedWeights("run", 1, 1, weights, DIGEST),
    )
    return Evaluation(
        {task: section},
        split,
        {**PREPROCESS, **(preprocess or {})},
        (2, 8, 8),
        0,
        origin=origin,
        settings=changed,
        without_result=without_result or {},
    )


def write_step(
    run: Path,
    step: int,
    value: float,
    *,
    dataset: str = DATASET,
    validation: bool = False,
    **what: Any,
) -> None:
    """Write the results of a step, whole or not at all; `what` as in `evaluation`."""
    folder = RunFolder(run).evaluation(dataset, step)
    evaluation(value, **what).write((folder.validation if validation else folder).path)
