"""Reads what earlier versions wrote: results.json of schema 1, configs with `eval.task`, and
label-fraction curves that count scans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tapct.base.counted import counted
from tapct.config import plugins
from tapct.eval.contract import DEFAULT_TASKS

BY_PATIENTS = "dice_by_num_patients"  # label-fraction curve in the results of a model
BY_SCANS = "dice_by_num_scans"  # the same of earlier versions, whose numbers count scans


def config_with_task_table(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run with its one `eval.task` as an entry of the table `eval.tasks`.

    Args:
        tree: whole config of a run, as read from its config.yaml or checkpoint; a newer one comes
            back unchanged.
    """
    section = tree.get("eval")
    if not isinstance(section, Mapping) or not isinstance(section.get("task"), Mapping):
        return dict(tree)
    fields = dict(section["task"])
    # null: a task that is on by default today, but was not part of this evaluation
    tasks: dict[str, Any] = dict.fromkeys(DEFAULT_TASKS)
    tasks[fields.pop("name", DEFAULT_TASKS[0])] = fields
    others = {key: value for key, value in section.items() if key != "task"}
    return {**tree, "eval": {"tasks": tasks, **others}}


def results_from_schema_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of results.json in the form of schema 2.

    Schema 1 held the numbers of one task and no headline, so the task itself has to name them.

    Args:
        content: content of results.json, schema 1.
    Raises:
        ValueError: the content is no evaluation, or its task cannot read schema 1.
    """
    models, task = content.get("models"), str(content.get("task", ""))
    if not isinstance(models, Mapping) or not all(isinstance(m, Mapping) for m in models.values()):
        raise ValueError("it holds no models")
    if not models:
        raise ValueError("no model was evaluated")
    # only tapct's own tasks: a file must not decide which module is imported
    module = plugins.load("eval.tasks", task) if task in plugins.available("eval.tasks") else None
    section_of = getattr(module, "section_from_schema_1", None)
    if section_of is None:
        raise ValueError(
            f"it was written by an earlier version for the task {task!r}; run eval again"
        )
    return {**content, "schema": 2, "tasks": {task: section_of(content)}}


def curve_of(numbers: Mapping[str, Any]) -> tuple[str, Mapping[str, Sequence[float]]]:
    """What a label-fraction curve counts, `patient` or `scan`, and the curve.

    Args:
        numbers: results of one model, of this version or an earlier one.
    """
    if BY_PATIENTS in numbers:
        return "patient", numbers[BY_PATIENTS]
    return "scan", numbers.get(BY_SCANS) or {}


def metric_name(num: int, unit: str = "patient") -> str:
    """Name of one point of a label-fraction curve, e.g. `mean Dice with 5 labelled patients`."""
    return f"mean Dice with {counted(num, f'labelled {unit}')}"
