"""The tasks of one evaluation: built from the config, with the scans that each can use, and what
they found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tapct.base import console
from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.data.packed.packed_scan import Damaged
from tapct.data.packed.store import Store
from tapct.eval.contract import DEFAULT_TASKS, Task
from tapct.eval.scans import labelled_scan
from tapct.eval.scans.labelled_scan import TableLabels
from tapct.eval.scans.train_test import BLOCKS, Split
from tapct.eval.scans.usable import Labels, ScanRow, how_to_label, usable, what_is_missing
from tapct.eval.scores import Headline, TaskResults

MOST_LABELS_IN_LINE = 40


@dataclass(frozen=True)
class TaskRun:
    """A task and the scans that it can use.

    Args:
        name: name of the task's plug-in.
        task: the task.
        scan_ids: IDs of the scans that have the labels it needs.
    """

    name: str
    task: Task[Any, Any]
    scan_ids: frozenset[str]

    def count(self, rows: Sequence[ScanRow]) -> int:
        """Number of scans among these that the task can use."""
        return sum(row.id in self.scan_ids for row in rows)

    def checked_results(self, models: Sequence[str]) -> tuple[TaskResults, Headline]:
        """The results and the headline of the task, after the last test scan.

        Args:
            models: names of the models that were evaluated.
        Raises:
            UserError: they are no results and no headline, or the headline has values for a model
                that was not evaluated.
        """
        results, headline = self.task.results(), self.task.headline()
        for method, value, kind in (
            ("results", results, TaskResults),
            ("headline", headline, Headline),
        ):
            if not isinstance(value, kind):
                raise UserError(
                    f"task {self.name}: {method}() returned a {type(value).__name__}; it must "
                    f"return a {kind.__name__}"
                )
        unknown = set(headline.values) - {*models, *self.task.own_baselines}
        if unknown:
            raise UserError(
                f"task {self.name}: its headline has values for {', '.join(sorted(unknown))}; "
                f"the models are {', '.join(models)}"
            )
        return results, headline


def check_model_names(task_runs: Sequence[TaskRun], models: Sequence[str]) -> None:
    """Raise UserError where a model has the name of a baseline that a task computes by itself."""
    for each in task_runs:
        for name in set(each.task.own_baselines) & set(models):
            raise UserError(
                f"task {each.name}: {name} is a baseline of its own, so no model can have this "
                "name; give the model another name in --models NAME=PATH"
            )


def build_tasks(sections: Sequence[Plugin], seed: int) -> dict[str, Task[Any, Any]]:
    """Build the tasks of a config by name, in its order.

    Args:
        sections: plug-in sections of `eval.tasks`.
        seed: random seed of the evaluation.
    Raises:
        UserError: no task is on, or what a module builds is no task.
    """
    if not sections:
        raise UserError(f"eval.tasks has no task; write e.g. eval.tasks.{DEFAULT_TASKS[0]}={{}}")
    tasks: dict[str, Task[Any, Any]] = {}
    for plugin in sections:
        task = plugins.load("eval.tasks", plugin.name).build(plugin.config, seed=seed)
        if not isinstance(task, Task) or not isinstance(getattr(task, "labels", None), Labels):
            raise UserError(
                f"task {plugin.name}: build() returned a {type(task).__name__}; it must return an "
                "object of a class that derives from tapct.extend.Task and sets `labels`"
            )
        tasks[plugin.name] = task
    return tasks


def usable_rows(
    tasks: Mapping[str, Task[Any, Any]], rows: Sequence[ScanRow], tables: TableLabels
) -> dict[str, list[ScanRow]]:
    """Task name -> the scans that it can use. A task without any is left out, and a line about it
    is printed.

    Raises:
        UserError: no task has a scan.
    """
    rows_of_task: dict[str, list[ScanRow]] = {}
    missing: list[str] = []
    for name, task in tasks.items():
        chosen = usable(rows, task.labels, tables.scan_labels, tables.landmarks)
        chosen = _with_named(name, task, chosen, tables)
        what = what_is_missing(task.labels)
        if not chosen:
            how = how_to_label(task.labels)
            missing.append(f"{name}: none of the {len(rows)} accepted scans has a {what}: {how}")
            continue
        if len(chosen) < len(rows):
            num = len(rows) - len(chosen)
            console.say(f"{name}: {num} of {len(rows)} scans have no {what} and are skipped")
        rows_of_task[name] = chosen
    if not rows_of_task:
        raise UserError("; ".join(missing))
    for line in missing:
        console.say(f"{line}. The task is skipped")
    return rows_of_task


def _with_named(
    name: str, task: Task[Any, Any], rows: list[ScanRow], tables: TableLabels
) -> list[ScanRow]:
    """The scans of a task with labels from a table that have at least one of those which its
    settings name.

    Raises:
        UserError: a setting names a label that no scan has.
    """
    of_scan = {Labels.SCAN: tables.scan_labels, Labels.LANDMARKS: tables.landmarks}.get(task.labels)
    settings = {key: words for key, words in task.named_labels().items() if words}
    if of_scan is None or not rows or not settings:
        return rows
    known = {label for row in rows for label in of_scan[row.id]}
    for key, words in settings.items():
        for word in words:
            if word not in known:
                raise UserError(
                    f"eval.tasks.{name}.{key} names {word!r}, which none of the {len(rows)} "
                    f"scans has; they have {', '.join(sorted(known)[:MOST_LABELS_IN_LINE])}"
                )
    wanted = {word for words in settings.values() for word in words}
    return [row for row in rows if wanted & set(of_scan[row.id])]


def check_label_settings(
    name: str, task: Task[Any, Any], rows: Sequence[ScanRow], store: Store
) -> None:
    """Check that the labels which the settings of a task name exist, before features are computed.

    Label maps are read until all have been found, so a right setting costs one label map as a rule.

    Args:
        name: name of the task's plug-in.
        task: the task.
        rows: scans that it can use.
        store: packed scans and labels.
    Raises:
        UserError: a setting names a label that no label map has.
    """
    if task.labels in (Labels.SCAN, Labels.LANDMARKS):  # checked when its scans were chosen
        return
    missing = {key: list(words) for key, words in task.named_labels().items() if words}
    known: dict[int, str] = {}
    num_read = 0
    for row in rows:
        if not any(missing.values()):
            return
        try:
            known |= labelled_scan.labels_of(row, store)
        except Damaged:  # it is named, skipped and counted when it is used
            continue
        num_read += 1
        called = {text.lower() for value, label in known.items() for text in (str(value), label)}
        for key, words in missing.items():
            missing[key] = [word for word in words if word.lower() not in called]
    for key, words in missing.items():
        if words:
            there = [f"{value} {label}".rstrip() for value, label in sorted(known.items())]
            more = ", ..." if len(there) > MOST_LABELS_IN_LINE else ""
            raise UserError(
                f"eval.tasks.{name}.{key} names {words[0]!r}, which is no label of the {num_read} "
                f"label maps; they have {', '.join(there[:MOST_LABELS_IN_LINE])}{more}"
            )


def begin(
    name: str, task: Task[Any, Any], rows: Sequence[ScanRow], split: Split, tables: TableLabels
) -> TaskRun:
    """Start a task on the scans of the split that it can use.

    Args:
        name: name of the task's plug-in.
        task: the task.
        rows: scans that it can use.
        split: training and test scans of all tasks.
        tables: labels from tables.
    Raises:
        UserError: it can use no training scan or no test scan, it cannot work within one patient,
            or no result can come of the values of the scans.
    """
    task_run = TaskRun(name, task, frozenset(row.id for row in rows))
    num_train, num_test = task_run.count(split.train), task_run.count(split.test)
    if not num_test or (task.needs_training and not num_train):
        needed = "one of each" if task.needs_training else "a test scan"
        raise UserError(
            f"task {name} has {num_train} training and {num_test} test scans; it needs {needed}. "
            "Raise eval.max_scans, change eval.test_share or eval.seed, or switch the task "
            f"off with eval.tasks[{name}]=null"
        )
    if split.mode == BLOCKS and task.labels in (Labels.SCAN, Labels.LANDMARKS, Labels.PAIRS):
        raise UserError(
            f"task {name} needs labelled scans of several patients, but all of its scans are of "
            "one patient. Index scans of a second patient, or switch the task off "
            f"with eval.tasks[{name}]=null"
        )
    task.begin(num_train)
    train, test = (
        [row for row in side if row.id in task_run.scan_ids] for side in (split.train, split.test)
    )
    if task.labels is Labels.LANDMARKS:
        named = {row.id: tables.landmarks[row.id] for row in (*train, *test)}
        task.expect_landmarks(named)
    task.expect_scans(train, test)
    if task.labels is Labels.SCAN:
        values = tables.scan_labels
        task.expect_values([values[row.id] for row in train], [values[row.id] for row in test])
    return task_run
