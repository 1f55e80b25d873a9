"""The headlines over the evaluated steps, in the table and the charts of one run and of several."""

from __future__ import annotations

import json
import math
from pathlib import Path

from evaluated_steps import make_run, write_step
from test_report import Page

from tapct.eval.results import over_steps
from tapct.report import compare, compare_page, page, step_values

SCANS = tuple(f"s{number:02}" for number in range(12))


def trained_run(folder: Path, values: dict[int, float], share: float = 0.0) -> Path:
    """A run with metrics and with evaluations on twelve patients after some steps."""
    run = make_run(folder, validation_share=share)
    rows = [{"step": step, "loss/total": 5.0 - step / 100} for step in range(1, 41)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"validation_share": share}
    for step, value in values.items():
        write_step(run, step, value, settings=settings, validation=share > 0, test=SCANS,
                   spread=0.01)  # fmt: skip
    return run


def test_compare_shows_the_best_step_of_each_run_with_its_interval(tmp_path: Path) -> None:
    one = trained_run(tmp_path / "one", {10: 0.2, 20: 0.4, 30: 0.3})
    two = trained_run(tmp_path / "two", {10: 0.25, 20: 0.35})
    three = trained_run(tmp_path / "three", {})
    comparison = compare.read([one, two, three])
    table = dict(compare.numbers(comparison))
    assert table["Segmentation: evaluated steps"] == ["3", "2", "\u2013"]
    assert table["Segmentation: best step"] == ["20", "20", "\u2013"]
    assert table["Segmentation: mean Dice of the best step on test patients"] == [
        "0.400",
        "0.350",
        "\u2013",
    ]
    interval = table["Segmentation: 95 % interval of the best step"][0]
    low, high = (float(end) for end in interval.strip("[]").split(", "))
    assert 0.37 < low < 0.4 < high < 0.43
    # the newest evaluation is shown as before
    assert table["Segmentation: mean Dice, higher is better"] == ["0.300", "0.350", "\u2013"]
    notes = [note for note in comparison.notes if over_steps.OPTIMISTIC in note]
    assert notes == [f"{name}: {over_steps.OPTIMISTIC}" for name in ("one", "two")]
    assert "best step" in compare.render_text(comparison, 80)


def test_the_charts_have_a_point_an_interval_and_a_ring(tmp_path: Path) -> None:
    one = trained_run(tmp_path / "one", {10: 0.2, 20: 0.4, 30: 0.3})
    two = trained_run(tmp_path / "two", {10: 0.25, 20: math.nan, 30: 0.35})
    found = Page(compare_page.render(compare.read([one, two])))
    (chart,) = (one for one in found.data if "ring" in one["curves"][0])
    assert "Segmentation: mean Dice on test patients" in found.words
    first, second = chart["curves"]
    assert (first["x"], first["ring"]) == ([10, 20, 30], 20)
    assert (second["x"], second["mean"], second["ring"]) == ([10, 20, 30], [0.25, None, 0.35], 30)
    assert second["num_broken"] == 1 and second["intervals"][1] == [None, None]
    for value, (low, high) in zip(first["mean"], first["intervals"], strict=True):
        assert low < value < high
    page_of_one = Page(page.render(one))
    words = " ".join(page_of_one.words.split())
    assert "Segmentation: best of 3 evaluated steps is step 20, mean Dice 0.400 [" in words
    assert over_steps.OPTIMISTIC in words
    assert sum("ring" in curve for chart in page_of_one.data for curve in chart["curves"]) == 1


def test_on_validation_patients_the_page_names_the_command_for_the_test_patients(
    tmp_path: Path,
) -> None:
    run = trained_run(tmp_path / "run", {10: 0.2}, share=0.5)
    words = " ".join(Page(page.render(run)).words.split())
    assert "mean Dice on validation patients" in words and "--step best" in words
    assert over_steps.OPTIMISTIC not in words
    (note,) = compare.read([run]).notes
    assert "the best step is chosen on the validation patients" in note


def test_steps_with_other_settings_are_named_on_the_page_and_in_the_notes(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", {10: 0.2, 20: 0.3})
    write_step(run, 30, 0.9, settings={"max_scans": 2}, test=SCANS)
    line = "segmentation: step 30 is not compared with the others: eval.max_scans was 2"
    assert line in " ".join(Page(page.render(run)).words.split())
    assert any(line in note for note in compare.read([run]).notes)
    assert dict(step_values.rows([step_values.read(run).curves]))["Segmentation: best step"] == [
        "20"
    ]


def test_one_evaluation_on_the_test_patients_adds_nothing(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", {10: 0.2})
    assert step_values.read(run) == step_values.EvaluatedSteps()
    assert step_values.part(run, "command") == ""


def test_evaluations_of_an_earlier_version_are_named(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", {})
    for step in (10, 20):
        write_step(run, step, 0.5, settings={}, test=SCANS)
    line = f"segmentation: steps 10, 20 are not used: {over_steps.UNKNOWN_SETTINGS}"
    assert line in " ".join(Page(page.render(run)).words.split())
    assert f"run: {line}" in compare.read([run]).notes
