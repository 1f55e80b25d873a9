"""The best step of a run, from written results: order, ties, missing numbers, other settings."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluated_steps import DATASET, evaluation, make_run, write_step

from tapct.base.exits import UserError
from tapct.eval.results import best_record, over_steps
from tapct.eval.results.json_file import EvaluatedData, Origin, SplitRecord
from tapct.run import best_step
from tapct.run_folder import RunFolder


def steps_of(run: Path, values: Iterable[tuple[int, float]]) -> Path:
    for step, value in values:
        write_step(run, step, value)
    return run


def test_the_best_step_is_the_first_of_the_highest_numbers_in_any_order(tmp_path: Path) -> None:
    values = [(10, 0.1), (20, 0.4), (30, math.nan), (40, 0.4), (50, 0.3), (60, math.inf)]
    draw = random.Random(0)
    for number in range(4):
        run = make_run(tmp_path / str(number))
        draw.shuffle(values)
        best = []
        for step, value in values:
            write_step(run, step, value)
            best_record.update(run)
            record = best_record.read(run)
            assert record is not None
            best.append(record.best)
        assert best[-1] == 20
        assert record.newest == 60 and sorted(record.values) == [10, 20, 30, 40, 50, 60]
        # after each step, the best of those that had ended by then, counted in another way
        for i, found in enumerate(best):
            known = sorted((-value, step) for step, value in values[: i + 1] if abs(value) < 1)
            assert found == (known[0][1] if known else None)


def test_the_task_decides_whether_lower_is_better(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step, value in ((10, 3.0), (20, 2.0), (30, 2.5)):
        write_step(run, step, value, direction="lower")
    curve = over_steps.read(run).curve()
    assert curve is not None and curve.best is not None and curve.best.step == 20


def test_steps_without_a_number_have_no_best(tmp_path: Path) -> None:
    run = steps_of(make_run(tmp_path / "run"), [(10, math.nan), (20, math.nan)])
    assert best_record.update(run) is not None
    record = best_record.read(run)
    assert record is not None and record.best is None
    with pytest.raises(UserError, match="mean Dice of segmentation is no number after any"):
        best_step.find(run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"settings": {"max_scans": 2}},
            "eval.max_scans was 2 and is 0 in the config of the run",
        ),
        ({"settings": {"only": ["Doe_John/*"]}}, "eval.only was patterns-"),
        ({"preprocess": {"stride": [2, 8, 8]}}, "eval.preprocess.stride was [2, 8, 8] and is"),
        ({"settings": {}}, over_steps.UNKNOWN_SETTINGS),
        ({"task_config": {"steps": 5}}, "eval.tasks.segmentation.steps was 5 and is 100 in"),
        ({"test": ("a", "c")}, "the test scans of its evaluation differ"),
        ({"train": ("x",)}, "the training scans of its evaluation differ"),
        ({"labels": "other"}, "the labels of its evaluation differ"),
        ({"metric": "mean Dice on patches"}, "the metric of its evaluation differs"),
        ({"task": "knn"}, "it was evaluated without this task"),
        (
            {"task": "knn", "without_result": {"segmentation": "no organ"}},
            "the task has no result (no organ)",
        ),
    ],
)
def test_evaluations_that_cannot_be_compared_are_left_out_with_the_reason(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    run = steps_of(make_run(tmp_path / "run"), [(10, 0.1), (20, 0.2)])
    write_step(run, 30, 0.9, **change)
    found = over_steps.read(run)
    curve = found.curve()
    assert curve is not None and curve.best is not None and curve.best.step == 20
    assert [one.step for one in curve.values] == [10, 20]
    assert reason in curve.left_out[30]
    (line,) = curve.lines_left_out()
    assert line.startswith("segmentation: step 30 is not compared with the others: ")
    assert "Doe" not in RunFolder(run).evaluation(DATASET, 30).results.read_text()


def test_of_equally_many_the_newest_evaluations_are_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_step(run, 10, 0.9, labels="old")
    write_step(run, 20, 0.1, labels="new")
    curve = over_steps.read(run).curve()
    assert curve is not None and [one.step for one in curve.values] == [20]
    write_step(run, 15, 0.3, labels="old")
    curve = over_steps.read(run).curve()
    assert curve is not None and [one.step for one in curve.values] == [10, 15]


def test_results_that_are_damaged_or_of_another_data_set_do_not_count(tmp_path: Path) -> None:
    run = steps_of(make_run(tmp_path / "run"), [(10, 0.1), (20, 0.2)])
    write_step(run, 30, 0.9, dataset="theirs-99999999")
    RunFolder(run).evaluation(DATASET, 40).path.mkdir()  # killed before it had results
    broken = RunFolder(run).evaluation(DATASET, 50)
    broken.path.mkdir()
    broken.results.write_text('{"schema": ')
    curve = over_steps.read(run).curve()
    assert curve is not None and curve.best is not None and curve.best.step == 20
    assert "is damaged" in curve.left_out[50] and set(curve.left_out) == {50}


def test_validation_results_count_where_the_run_has_validation_patients(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", validation_share=0.5)
    settings = {"validation_share": 0.5}
    write_step(run, 10, 0.9, settings=settings)  # on the test patients: no part in the choice
    for step, value in ((10, 0.1), (20, 0.2)):
        write_step(run, step, value, validation=True, settings=settings)
    curve = over_steps.read(run).curve()
    assert curve is not None and curve.best is not None and curve.best.step == 20
    assert curve.people == "validation patients"
    best_record.update(run)
    assert json.loads(RunFolder(run).best.read_text())["note"] == ""


def test_many_evaluations_that_end_at_once_leave_the_right_record(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    draw = random.Random(1)
    values = [(step, draw.random()) for step in range(10, 90, 10)]

    def finish(one: tuple[int, float]) -> None:
        write_step(run, *one)
        best_record.update(run)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(finish, values))
    record = best_record.read(run)
    assert record is not None and dict(record.values) == dict(values)
    assert record.best == max(values, key=lambda one: one[1])[0]


def test_a_record_that_is_damaged_is_none_and_is_written_again(tmp_path: Path) -> None:
    run = steps_of(make_run(tmp_path / "run"), [(10, 0.1)])
    assert best_record.read(run) is None
    for text in ("{", "[]", '{"best": 10, "values": [{"step": 20, "value": 1}]}'):
        RunFolder(run).best.write_text(text)
        assert best_record.read(run) is None
    best_record.update(run)
    record = best_record.read(run)
    assert record is not None and record.best == 10


def test_the_errors_of_step_best_name_the_next_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"has no evaluation on the data set .*eval --step|--step N"
    ):
        best_step.find(run)
    write_step(run, 10, 0.5, settings={"max_scans": 2})
    with pytest.raises(UserError, match=r"config \(segmentation: step 10 is not used: eval"):
        best_step.find(run)
    with pytest.raises(UserError, match=r"has the task knn; there are: segmentation"):
        best_step.find(run, "knn")
    for text, value in (("", None), ("best", "best"), ("500", 500)):
        assert best_step.parse_step(text) == value
    for text in ("bst", "0", "-1", "1.5", "newest"):
        with pytest.raises(UserError, match=f"--step {text}: give the step of a checkpoint"):
            best_step.parse_step(text)


def test_the_record_of_an_evaluation_is_read_back_as_it_was(tmp_path: Path) -> None:
    one = evaluation(0.5)
    split = replace(one.split, on_validation=True, num_chosen_on=2)
    assert isinstance(split, SplitRecord)
    origin = Origin(EvaluatedData("mine", "m", "s", "l", 2))
    replace(one, split=split, origin=origin).write(tmp_path)
    from tapct.eval.results import json_file

    found, why_not = json_file.read(tmp_path)
    assert why_not == "" and found is not None
    assert found.split == split and found.settings == one.settings
    assert "chosen as the best one on 2 of 2 test scans" in found.split.caveat
