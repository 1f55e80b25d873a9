"""results.json: what is written comes back, earlier files too, and headlines compare models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapct.base.exits import UserError
from tapct.eval.results import json_file
from tapct.eval.results.json_file import (
    EvaluatedData,
    EvaluatedWeights,
    Evaluation,
    Origin,
    Picture,
    SplitRecord,
    TaskSection,
)
from tapct.eval.results.old_formats import config_with_task_table
from tapct.eval.scans.held_out import HeldOut
from tapct.eval.scores import Breakdown, Headline, ScanScore, TaskResults

OLD = Path(__file__).parents[2] / "report" / "results_schema_1.json"


def evaluation() -> Evaluation:
    headline = Headline("accuracy", {"pretrained": 0.75, "raw_hu": 0.5}, "higher", "Right.", (0, 1))
    found = TaskResults(
        {"pretrained": {"accuracy": 0.75, "by_k": [0.5, 1.0]}, "raw_hu": {"accuracy": 0.5}},
        (ScanScore("s1", "pretrained", 1.0, {"left": 1.0}), ScanScore("s2", "raw_hu", 0.5)),
        Breakdown("Accuracy of each side", "side", {"left": {"pretrained": 1.0}, "right": {}}),
    )
    section = TaskSection(
        {"k": 5}, "scan", 3, 2, 1, headline, found, (Picture("s1", "pictures/s1.png", "A."),)
    )
    split = SplitRecord("patients", HeldOut(2), ("s3", "s4", "s5"), ("s1", "s2"))
    origin = Origin(
        EvaluatedData("phantom-0123abcd", "m1", "0123abcd", "1ab", 9),
        EvaluatedWeights("run", 500, 4000, "f00", "0123abcd"),
        "tapct eval x", "abc123", {"tapct": "1"},
    )  # fmt: skip
    return Evaluation(
        {"knn": section}, split, {"size_yx": [8, 8]}, (2, 4, 4), 7,
        (Picture("s1", "pictures/s1_features.png", "B."),), origin, 3.5,
    )  # fmt: skip


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    one = evaluation()
    one.write(tmp_path / "eval")
    back, why_not = json_file.read(tmp_path / "eval")
    assert back == one and why_not == ""
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["results.json"]


def test_numbers_that_json_cannot_hold_become_null_and_come_back_as_nan(tmp_path: Path) -> None:
    one = evaluation()
    section = one.tasks["knn"]
    values = {"pretrained": math.nan, "raw_hu": np.float32(0.5)}
    models: dict[str, Any] = {"pretrained": {"curve": np.array([1.0, np.inf]), "n": np.int64(3)}}
    section = replace(
        section,
        headline=replace(section.headline, values=values),
        results=replace(section.results, models=models),
    )
    replace(one, tasks={"knn": section}).write(tmp_path)
    back, _ = json_file.read(tmp_path)
    assert back is not None
    found = back.tasks["knn"]
    assert math.isnan(found.headline.values["pretrained"])
    assert found.headline.values["raw_hu"] == 0.5
    assert found.results.models == {"pretrained": {"curve": [1.0, None], "n": 3}}


def test_schema_1_reads_as_schema_2() -> None:
    old = json.loads(OLD.read_text())
    assert old["schema"] == 1
    new = json_file.from_json(old)
    section = new.tasks["segmentation"]
    assert section.headline.values == {n: m["mean_dice"] for n, m in old["models"].items()}
    assert (section.headline.metric, section.headline.direction) == ("mean Dice", "higher")
    assert section.config == old["task_config"]
    for name, model in old["models"].items():
        per_scan = {s.scan: s for s in section.results.scans if s.model == name}
        assert {scan: one.parts for scan, one in per_scan.items()} == model["per_scan"]
        for scan, parts in model["per_scan"].items():
            assert per_scan[scan].value == pytest.approx(sum(parts.values()) / len(parts))
        assert section.results.breakdown is not None
        by_organ = section.results.breakdown.values
        assert {organ: row[name] for organ, row in by_organ.items()} == model["dice"]
    assert new.split.mode == old["split"]["mode"]
    assert list(new.split.test) == old["split"]["test"]
    assert [picture.file for picture in section.pictures] == ["overlays/s0.png"]
    assert [picture.file for picture in new.pca] == ["overlays/s0_pca.png"]
    # what was not checked then is unknown now
    assert new.to_json()["split"]["held_out_from_pretraining"] == "unknown"
    assert "earlier version" in new.split.caveat


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is damaged: it holds no JSON object"),
        ("[1]", "is damaged: it holds no JSON object"),
        ("{}", "it holds no models"),
        ('{"models": {}}', "no model was evaluated"),
        ('{"models": {"pretrained": 3}}', "it holds no models"),
        ('{"schema": 5}', "schema 5, this version of tapct reads up to 4"),
        ('{"schema": 2}', "it is no evaluation"),
        ('{"schema": 2, "tasks": {"a": {}}}', "it is no evaluation"),
        (
            '{"schema": 1, "task": "mylab.tasks.depth", "models": {"a": {"mean_error": 1}}}',
            "earlier version for the task 'mylab.tasks.depth'; run eval again",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "results.json").write_text(content)
    found, why_not = json_file.read(tmp_path)
    assert found is None
    assert reason in why_not and "\n" not in why_not
    assert json_file.read(tmp_path / "nowhere") == (None, "results.json is not there")


@pytest.mark.parametrize(
    ("values", "direction", "expected"),
    [
        ({"pretrained": 3.0, "a": 1.0, "b": 2.0}, "higher", (3.0, 1.0, "b")),
        ({"pretrained": 3.0, "a": 1.0, "b": 2.0}, "lower", (3.0, -2.0, "a")),
        ({"a": 4.0, "pretrained": 3.0, "b": math.nan}, "lower", (3.0, 1.0, "a")),
    ],
)
def test_a_lead_is_positive_where_the_pretrained_model_is_better(
    values: dict[str, float], direction: str, expected: tuple[float, float, str]
) -> None:
    lead = Headline("m", values, direction, "").lead()
    assert (lead.own, lead.gain, lead.baseline) == expected


def test_a_lead_needs_both_sides() -> None:
    alone = Headline("m", {"pretrained": 1.0}, "higher", "").lead()
    assert alone.own == 1 and math.isnan(alone.gain) and alone.baseline == ""
    without = Headline("m", {"raw_hu": 1.0}, "higher", "").lead()
    assert math.isnan(without.own) and math.isnan(without.gain)


def test_a_headline_without_direction_or_values_is_one_line() -> None:
    with pytest.raises(UserError, match="direction is 'up', must be one of higher or lower"):
        Headline("m", {"a": 1.0}, "up", "")
    with pytest.raises(UserError, match="has no value"):
        Headline("m", {}, "higher", "")


def test_headlines_are_lines_for_a_terminal() -> None:
    one = evaluation()
    assert one.lines() == [
        "pretrained               accuracy 0.750",
        "raw_hu                   accuracy 0.500",
    ]
    two = replace(one, tasks={**one.tasks, "mylab.tasks.depth": one.tasks["knn"]})
    assert two.lines()[0] == "knn (higher is better)"
    assert two.lines()[3] == "mylab.tasks.depth (higher is better)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (0.0, "0.000"), (-2.5, "-2.500"), (4e-5, "4e-05"), (12345.6, "1.23e+04"),
     (math.nan, "\u2013")],
)  # fmt: skip
def test_values_are_short(value: float, text: str) -> None:
    assert json_file.shown(value) == text


def test_an_earlier_config_gets_the_table_of_tasks() -> None:
    old = {"seed": 1, "eval": {"task": {"name": "segmentation", "l2": 0.1}, "seed": 2}}
    assert config_with_task_table(old) == {
        "seed": 1,
        "eval": {"tasks": {"segmentation": {"l2": 0.1}}, "seed": 2},
    }
    own = {"eval": {"task": {"name": "mylab.tasks.depth", "ridge": 10.0}}}
    assert config_with_task_table(own) == {
        "eval": {"tasks": {"segmentation": None, "mylab.tasks.depth": {"ridge": 10.0}}}
    }
    for new in ({"eval": {"tasks": {"segmentation": {}}}}, {"eval": {}}, {"seed": 1}):
        assert config_with_task_table(new) == new
