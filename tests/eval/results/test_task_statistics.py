"""Statistics in the results of an evaluation: values, intervals and differences equal those of the
methods, survive results.json, and stand on the terminal and in the table.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tapct.eval.metrics.prediction_statistics import PredictedScans, ScanPredictions
from tapct.eval.metrics.scan_level import auroc
from tapct.eval.results import csv_file, json_file, task_statistics, terminal
from tapct.eval.results.json_file import (
    EvaluatedData,
    EvaluatedWeights,
    Evaluation,
    Origin,
    SplitRecord,
    TaskSection,
)
from tapct.eval.results.task_statistics import MetricStatistics
from tapct.eval.scans.held_out import HeldOut
from tapct.eval.scores import FurtherMetric, Headline, ScanScore, TaskResults

MODELS = (
    "pretrained", "untrained", "untrained_layerscale1", "raw_hu", "position", "random_2x",
    "random_4x", "theirs",
)  # fmt: skip
ORGANS = ("liver", "spleen")


def scores(num_scans: int, models: tuple[str, ...] = MODELS) -> tuple[ScanScore, ...]:
    """Dice of two organs; the spleen is not in every third scan."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(num_scans):
        easy = rng.uniform(0.2, 0.6)
        for place, model in enumerate(models):
            dice = np.clip(easy + 0.1 * (place == 0) + rng.normal(0, 0.05, 2), 0, 1)
            parts = dict(zip(ORGANS, dice.tolist()))
            if number % 3 == 2:
                del parts["spleen"]
            found.append(
                ScanScore(f"s{number:02}", model, float(np.mean([*parts.values()])), parts)
            )
    return tuple(found)


def mean_of_organs(rows: tuple[ScanScore, ...], model: str) -> float:
    of_model = [row.parts for row in rows if row.model == model]
    return float(np.mean([np.mean([p[organ] for p in of_model if organ in p]) for organ in ORGANS]))


def section(num_scans: int, models: tuple[str, ...] = MODELS) -> TaskSection:
    rows = scores(num_scans, models)
    values = {model: mean_of_organs(rows, model) for model in models}
    headline = Headline("mean Dice", values, "higher", "Dice.", (0, 1), "mean of 2 organs")
    distance = tuple(
        replace(row, value=10 * row.value, parts={k: 10 * v for k, v in row.parts.items()})
        for row in rows
    )
    further = FurtherMetric("mean HD95", "lower", "HD95 in mm.", distance)
    found = TaskResults({model: {} for model in models}, rows, None, True, (further,))
    patients = {f"s{number:02}": f"p{number // 2}" for number in range(num_scans)}
    own = task_statistics.of_task(found, headline, {}, patients, 7)
    return TaskSection({}, "voxels", 3, num_scans, 0, headline, found, (), own)


def evaluation(num_scans: int = 24) -> Evaluation:
    ids = tuple(f"s{number:02}" for number in range(num_scans))
    first = tuple(f"s{number // 2 * 2:02}" for number in range(num_scans))
    split = SplitRecord("patients", HeldOut(num_scans), ("a",), ids, test_patients=first)
    origin = Origin(
        EvaluatedData("hn-0123abcd", "m", "0123abcd", "l", 30),
        EvaluatedWeights("mine", 500, 4000, "f00", "0123abcd"),
        "tapct eval runs/mine", "abc123", {"tapct": "1"}, "Processor of 1 GHz",
    )  # fmt: skip
    return Evaluation(
        {"segmentation": section(num_scans)}, split, {}, (2, 4, 4), 7, origin=origin, seconds=3.5
    )


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return evaluation()


def test_values_are_the_headline_and_differences_are_paired_by_patient(whole: Evaluation) -> None:
    task = whole.tasks["segmentation"]
    assert task.statistics is not None and task.statistics.why_none == ""
    found = task.statistics.of("mean Dice")
    assert found is not None
    for one in found.whole.models:
        assert one.estimate.value == pytest.approx(task.headline.values[one.model])
        assert (one.estimate.num_scans, one.estimate.num_patients) == (24, 12)
        assert one.estimate.interval is not None
        assert one.estimate.interval.low < one.estimate.value < one.estimate.interval.high
    assert [pair.other for pair in found.whole.differences] == list(MODELS[1:])
    for pair in found.whole.differences:
        gap = task.headline.values["pretrained"] - task.headline.values[pair.other]
        assert pair.estimate.value == pytest.approx(gap)
        assert pair.p <= pair.p_holm <= 1 and pair.num_comparisons == 7
    # scans of one patient count as one: with 24 patients the interval is another one
    alone = task_statistics.of_task(task.results, task.headline, {}, {}, 7).of("mean Dice")
    assert alone is not None and alone.whole.models[0].estimate.num_patients == 24
    assert alone.whole.models[0].estimate.interval != found.whole.models[0].estimate.interval


def test_each_organ_has_its_own_numbers_of_scans(whole: Evaluation) -> None:
    task = whole.tasks["segmentation"]
    assert task.statistics is not None
    for metric, factor in (("mean Dice", 1), ("mean HD95", 10)):
        found = task.statistics.of(metric)
        assert found is not None and tuple(found.parts) == ORGANS
        for organ, num_scans in zip(ORGANS, (24, 16)):
            own = found.parts[organ].models[0].estimate
            values = [
                row.parts[organ]
                for row in task.results.scans
                if row.model == "pretrained" and organ in row.parts
            ]
            assert own.value == pytest.approx(factor * np.mean(values))
            assert own.num_scans == num_scans == len(values)


def test_results_json_keeps_all_of_it(whole: Evaluation, tmp_path: Path) -> None:
    whole.write(tmp_path)
    back, why_not = json_file.read(tmp_path)
    assert back == whole and why_not == ""
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["schema"] == 4 and content["machine"] == "Processor of 1 GHz"
    assert content["split"]["test_patients"][:3] == ["s00", "s00", "s02"]
    # a file of schema 3 has none of it, and is read
    content["schema"] = 3
    for key in ("statistics", "further", "mean_over_parts"):
        del content["tasks"]["segmentation"][key]
    del content["split"]["test_patients"], content["machine"]
    old = json_file.from_json(content)
    assert old.tasks["segmentation"].statistics is None
    assert old.tasks["segmentation"].headline == whole.tasks["segmentation"].headline
    assert old.split.held_out == whole.split.held_out
    assert old.lines()[0].startswith("pretrained               mean Dice 0.")


def test_eight_models_fit_a_terminal_of_80_columns(whole: Evaluation) -> None:
    lines = whole.lines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    own = whole.tasks["segmentation"].headline.values["pretrained"]
    assert f"pretrained             mean Dice {own:.3f} [0." in text
    assert "n = 24 scans of 12 patients" in text
    assert any(line.startswith("pretrained - random_4x") and " p = " in line for line in lines)
    assert "adjusted for 7 comparisons (Holm)" in text


def test_few_models_have_their_numbers_of_scans_beside_the_value() -> None:
    lines = terminal.task_lines(section(24, ("pretrained", "raw_hu")))
    assert lines[0].endswith("n = 24 scans of 12 patients")
    assert lines[1].startswith("raw_hu      mean Dice 0.")
    assert lines[2].startswith("pretrained - raw_hu +0.") and lines[2].count("(") == 0


def test_below_ten_patients_the_scans_are_listed_without_an_interval() -> None:
    few = section(6)
    lines = terminal.task_lines(few)
    text = "\n".join(lines)
    assert "[" not in text and " p = " not in text
    assert "no interval: 3 patients, fewer than 10" in lines
    assert "scans: s00, s01, s02, s03, s04, s05" in lines
    values = [f"{row.value:.3f}" for row in few.results.scans if row.model == "raw_hu"]
    assert f"  raw_hu                 {' '.join(values)}" in lines
    assert max(map(len, lines)) <= 80


def test_a_headline_that_is_another_number_has_no_interval(whole: Evaluation) -> None:
    task = whole.tasks["segmentation"]
    median = replace(task.headline, values=dict.fromkeys(MODELS, 0.123))
    found = task_statistics.of_task(task.results, median, {}, {}, 7)
    assert found.of("mean Dice") is None and found.of("mean HD95") is not None
    lines = terminal.task_lines(replace(task, headline=median, statistics=found))
    assert f"no interval: {task_statistics.NO_MEAN}" in lines
    # rows that contradict each other do not end an evaluation either
    double = replace(task.results, scans=task.results.scans * 2)
    assert "two rows" in task_statistics.of_task(double, task.headline, {}, {}, 7).why_none


def test_predictions_give_the_interval_of_a_metric_that_is_no_mean() -> None:
    rng = np.random.default_rng(1)
    truth = np.repeat([0, 1], 15)
    ids = tuple(f"s{number:02}" for number in range(30))
    good, bad = truth + rng.normal(0, 0.7, 30), rng.normal(0, 1, 30)
    given = ScanPredictions(ids, ("",) * 30, truth, {"pretrained": good[None], "raw_hu": bad[None]})
    values = {"pretrained": auroc(truth, good), "raw_hu": auroc(truth, bad)}
    headline = Headline("AUROC", values, "higher", "A.", (0, 1))
    patients = {scan: f"p{number}" for number, scan in enumerate(ids)}
    predicted = {"lesion": PredictedScans(given, auroc)}
    found = task_statistics.of_task(TaskResults({}), headline, predicted, patients, 3)
    own = found.of("AUROC")
    assert own is not None and own.whole.num_unknown == 0
    assert own.whole.models == own.parts["lesion"].models
    assert own.whole.models[0].estimate.interval is not None and own.whole.differences[0].p < 0.05
    assert own.whole.differences[0].estimate.value == pytest.approx(
        values["pretrained"] - values["raw_hu"]
    )
    other = replace(headline, values={"pretrained": 0.5, "raw_hu": 0.5})
    wrong = task_statistics.of_task(TaskResults({}), other, predicted, patients, 3)
    assert "give other values than the headline" in wrong.why_none


def statistics_of_candidates(num_scans: int) -> tuple[MetricStatistics, Mapping[str, float]]:
    """FROC, as docs/extending.md describes: the true value of a scan is its index, and the metric
    looks up the rest. Each scan is of its own patient.

    Returns:
        The statistics of the headline, and its value by model.
    """
    rng = np.random.default_rng(4)
    ids = tuple(f"s{number:02}" for number in range(num_scans))
    index_S = np.arange(num_scans)
    num_nodules = index_S % 3

    def candidates(skill: float) -> np.ndarray:
        """[1, S, 2C]: a probability of each candidate, -1 for none; then 1 for a hit, else 0."""
        hit_SC = np.arange(4) < num_nodules[:, None]
        p_SC = np.clip(rng.uniform(0, 1, (num_scans, 4)) + skill * hit_SC, 0, 2)
        p_SC[:, 3] = np.where(index_S % 2, -1, p_SC[:, 3])  # scans have 3 or 4 candidates
        return np.concatenate([p_SC, hit_SC], axis=1)[None]

    def sensitivity(scan_N: np.ndarray, scores_NK: np.ndarray) -> float:
        """Share of nodules that are found with at most one false positive per scan."""
        p_NC, hit_NC = scores_NK[:, :4], scores_NK[:, 4:] > 0
        wrong = np.sort(p_NC[~hit_NC & (p_NC >= 0)])[::-1]
        limit = wrong[len(scan_N)] if len(wrong) > len(scan_N) else -0.5
        num = num_nodules[scan_N.astype(int)].sum()
        return float((hit_NC & (p_NC > limit)).sum() / num) if num else math.nan

    scores = {"pretrained": candidates(0.4), "untrained": candidates(0.0)}
    truth_S = index_S.astype(float)  # as int, each scan would be a class, which needs patients
    values = {model: sensitivity(truth_S, each[0]) for model, each in scores.items()}
    given = ScanPredictions(ids, ("",) * num_scans, truth_S, scores)
    headline = Headline("sensitivity at 1 per scan", values, "higher", "S.", (0, 1))
    predicted = {"nodule": PredictedScans(given, sensitivity)}
    found = task_statistics.of_task(TaskResults({}), headline, predicted, {}, 3)
    own = found.of("sensitivity at 1 per scan")
    assert own is not None, found.why_none
    return own, values


def test_several_candidates_of_a_scan_give_an_interval_as_docs_extending_describes() -> None:
    own, values = statistics_of_candidates(30)
    for model in own.whole.models:
        interval = model.estimate.interval
        assert interval is not None and interval.low < values[model.model] < interval.high
    assert own.whole.differences[0].p < 0.05


# with 9 scans, more scans than the 8 scores of a scan; with 6, fewer
@pytest.mark.parametrize("num_scans", [6, 9])
def test_several_candidates_of_few_scans_give_the_value_without_an_interval(num_scans: int) -> None:
    own, values = statistics_of_candidates(num_scans)
    for model in own.whole.models:
        assert model.estimate.value == pytest.approx(values[model.model])
        assert model.estimate.interval is None
        assert f"{num_scans} patients" in model.estimate.why_none


def test_the_mean_over_targets_has_an_interval_of_its_own() -> None:
    """The targets have different scans; one of them has three classes."""
    rng = np.random.default_rng(2)
    side, phase = np.repeat([0, 1], 12), np.repeat([0, 1, 2], 10)
    ids = [f"s{number:02}" for number in range(30)]
    scores_of_side = rng.normal(0, 1, (1, 24)) + 2 * side
    scores_of_phase = rng.normal(0, 1, (1, 30, 3)) + np.eye(3)[phase]
    targets = {
        "side": PredictedScans(
            ScanPredictions(tuple(ids[:24]), ("",) * 24, side, {"pretrained": scores_of_side}),
            auroc,
        ),
        "phase": PredictedScans(
            ScanPredictions(tuple(ids), ("",) * 30, phase, {"pretrained": scores_of_phase}), auroc
        ),
    }
    each = [auroc(side, scores_of_side[0]), auroc(phase, scores_of_phase[0])]
    headline = Headline("mean AUROC", {"pretrained": float(np.mean(each))}, "higher", "A.", (0, 1))
    found = task_statistics.of_task(TaskResults({}), headline, targets, {}, 3).of("mean AUROC")
    assert found is not None
    of_target = [found.parts[name].models[0].estimate for name in ("side", "phase")]
    assert [one.value for one in of_target] == pytest.approx(each)
    assert [one.num_scans for one in of_target] == [24, 30]
    whole = found.whole.models[0].estimate
    assert whole.interval is not None and whole.num_patients == 30
    widths = [one.interval.high - one.interval.low for one in of_target if one.interval]
    # the targets are independent, so the mean is more certain than the less certain one of them
    assert whole.interval.low < whole.value < whole.interval.high
    assert whole.interval.high - whole.interval.low < max(widths)


def test_a_target_without_an_interval_leaves_the_mean_without_one() -> None:
    truth = np.repeat([0, 1], [25, 5])  # five positive scans are too few
    ids = tuple(f"s{number:02}" for number in range(30))
    scores_ES = np.random.default_rng(0).normal(0, 1, (1, 30)) + truth
    many = np.repeat([0, 1], 15)
    targets = {
        name: PredictedScans(
            ScanPredictions(ids, ("",) * 30, values, {"pretrained": scores_ES}), auroc
        )
        for name, values in (("rare", truth), ("common", many))
    }
    mean = float(np.mean([auroc(values, scores_ES[0]) for values in (truth, many)]))
    headline = Headline("mean AUROC", {"pretrained": mean}, "higher", "A.", (0, 1))
    found = task_statistics.of_task(TaskResults({}), headline, targets, {}, 3).of("mean AUROC")
    assert found is not None
    (whole,) = found.whole.models
    assert whole.estimate.interval is None and whole.estimate.why_none.startswith("rare: ")
    assert whole.estimate.value == pytest.approx(mean)
    assert found.parts["common"].models[0].estimate.interval is not None


def test_the_table_has_one_row_per_number(whole: Evaluation, tmp_path: Path) -> None:
    csv_file.write_csv(tmp_path / "results.csv", csv_file.rows_of(whole), {"benchmark": "hn"})
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ("benchmark", *csv_file.COLUMNS)
    task = whole.tasks["segmentation"]

    def only(**wanted: str) -> dict[str, str]:
        (row,) = (row for row in rows if all(row[key] == text for key, text in wanted.items()))
        return row

    every = {"metric": "mean Dice", "part": "all", "scan": "all", "minus": ""}
    own = only(model="pretrained", **every)
    assert task.statistics is not None
    found = task.statistics.of("mean Dice")
    assert found is not None
    estimate = found.whole.models[0].estimate
    assert estimate.interval is not None
    for key, number in (
        ("value", task.headline.values["pretrained"]),
        ("low", estimate.interval.low), ("high", estimate.interval.high),
    ):  # fmt: skip
        assert float(own[key]) == pytest.approx(number, rel=1e-6)
    assert own["p"] == "" and (own["n_scans"], own["n_patients"]) == ("24", "12")
    assert (own["run"], own["step"], own["dataset"], own["seed"], own["commit"]) == (
        "mine", "500", "hn-0123abcd", "7", "abc123",
    )  # fmt: skip
    assert own["machine"] == "Processor of 1 GHz" and own["seconds"] == "3.5"
    pair = only(**{**every, "minus": "raw_hu"})
    assert pair["model"] == "pretrained" and math.isfinite(float(pair["p_holm"]))
    one = only(model="raw_hu", metric="mean HD95", part="spleen", scan="s03", minus="")
    expected = next(
        s for s in task.results.further[0].scans if (s.scan, s.model) == ("s03", "raw_hu")
    )
    assert float(one["value"]) == pytest.approx(expected.parts["spleen"], rel=1e-6)
    # two metrics: 8 values and 7 differences of all and of 2 organs, then the single values
    singles = 8 * (24 + 24 + 16)
    assert len(rows) == 2 * (3 * 15 + singles)
    again = csv_file.rows_of(whole, run="other", seed=3)
    assert {(row.origin.run, row.origin.seed) for row in again} == {("other", 3)}


def test_earlier_results_still_make_a_table() -> None:
    old = Path(__file__).parents[2] / "report" / "results_schema_1.json"
    content = json.loads(old.read_text())
    rows = csv_file.rows_of(json_file.from_json(content))
    whole = {row.model: row.value for row in rows if (row.part, row.scan) == ("all", "all")}
    assert whole == {name: model["mean_dice"] for name, model in content["models"].items()}
    assert all(math.isnan(row.low) and row.origin.machine == "" for row in rows)
