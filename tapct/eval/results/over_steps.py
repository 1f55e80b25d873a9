"""The evaluations of one run over its steps: which can be compared, and which step is best.

Evaluations on the data set that the run was trained on are read from RUN/eval. With
`eval.validation_share`, those on validation patients are read, because on them a step is chosen;
otherwise those on the test patients.

The results are read again each time, so the answer does not depend on the order in which
evaluations end, nor on which of them were ended before they had results.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tapct.base.paths import without_absolute_paths
from tapct.config.yamlfile import from_text
from tapct.eval.contract import DEFAULT_TASKS
from tapct.eval.intervals import Interval
from tapct.eval.results import json_file
from tapct.eval.results.json_file import Evaluation
from tapct.eval.results.saved import is_own, own_digest
from tapct.eval.results.task_section import TaskSection
from tapct.eval.scores import OWN_MODEL
from tapct.run_folder import RunFolder, step_of

# settings of `eval` that decide which scans are used for what; results.json holds their values
SPLIT_SETTINGS = (
    "only",
    "test_share",
    "max_scans",
    "seed",
    "num_blocks",
    "block_gap",
    "split_column",
    "validation_share",
)
OPTIMISTIC = (
    "the best step is chosen on the test patients, so its value is optimistic; "
    "eval.validation_share chooses it on other patients"
)
UNKNOWN_SETTINGS = "an earlier version of tapct did not record its settings"


@dataclass(frozen=True)
class StepValue:
    """The headline of the pretrained model after one step.

    Args:
        step: finished steps.
        value: value of the headline; NaN where it does not exist.
        interval: 95 % interval over patients; None where there is none.
        weights: hash of the evaluated weights; empty where unknown.
    """

    step: int
    value: float
    interval: Interval | None = None
    weights: str = ""


@dataclass(frozen=True)
class StepCurve:
    """The headline of one task over the steps of a run.

    Args:
        task: task name.
        metric: name of the headline.
        direction: `higher` or `lower`, whichever is better.
        values: steps that can be compared with each other, in ascending order.
        left_out: step -> reason why it cannot be compared with them.
        on_validation: whether the scans are those of validation patients.
        scans: IDs of the scans that the values were measured on.
        dataset: name of the data set.
    """

    task: str
    metric: str
    direction: str
    values: tuple[StepValue, ...]
    left_out: Mapping[int, str]
    on_validation: bool
    scans: frozenset[str]
    dataset: str

    @property
    def best(self) -> StepValue | None:
        """The best step; the earliest of equal ones. None where no value is a number."""
        sign = 1.0 if self.direction == "higher" else -1.0
        best: StepValue | None = None
        for one in self.values:
            if math.isfinite(one.value) and (best is None or sign * (one.value - best.value) > 0):
                best = one
        return best

    @property
    def people(self) -> str:
        """The patients that the values were measured on."""
        return "validation patients" if self.on_validation else "test patients"

    def lines_left_out(self) -> list[str]:
        """One line per reason why steps are not compared."""
        return _lines(self.task, self.left_out, "not compared with the others")


@dataclass(frozen=True)
class StepEvaluations:
    """The evaluations of a run over its steps, on its own data set.

    Args:
        dataset: name of the data set.
        settings: section `eval` of the run's config; empty where it cannot be read.
        evaluations: step -> evaluation.
        unreadable: step -> reason why its results cannot be used.
    """

    dataset: str
    settings: Mapping[str, Any]
    evaluations: Mapping[int, Evaluation]
    unreadable: Mapping[int, str]

    @property
    def on_validation(self) -> bool:
        """Whether steps are chosen on validation patients."""
        return uses_validation(self.settings)

    def tasks(self) -> list[str]:
        """Tasks that any step was evaluated with."""
        return list(dict.fromkeys(name for one in self.evaluations.values() for name in one.tasks))

    def curve(self, task: str = "") -> StepCurve | None:
        """The headline of a task over the steps.

        Args:
            task: task name; empty for the one by which the run chooses its best step.
        Returns:
            None where no evaluation can be used.
        """
        task = task or ranking_task(self.settings)
        left_out = self._unusable(task)
        usable = {
            step: evaluation.tasks[task]
            for step, evaluation in self.evaluations.items()
            if step not in left_out
        }
        if not usable:
            return None
        bases = {step: _basis(self.evaluations[step], section) for step, section in usable.items()}
        # the largest group, and of equally large ones that of the newest step: a single evaluation
        # that lacks a scan does not make all the others incomparable
        sizes = Counter(bases.values())
        newest = max(bases, key=lambda step: (sizes[bases[step]], step))
        for step, basis in bases.items():
            if basis != bases[newest]:
                left_out[step] = _difference(basis, bases[newest])
        compared = sorted(step for step, basis in bases.items() if basis == bases[newest])
        headline = usable[newest].headline
        return StepCurve(
            task,
            headline.metric,
            headline.direction,
            tuple(_value(step, usable[step], self.evaluations[step]) for step in compared),
            left_out,
            self.on_validation,
            frozenset(self.evaluations[newest].split.test),
            self.dataset,
        )

    def lines_without_curve(self, task: str = "") -> list[str]:
        """One line per reason why the steps have no curve of a task, where `curve` is None."""
        task = task or ranking_task(self.settings)
        return _lines(task, self._unusable(task), "not used")

    def _unusable(self, task: str) -> dict[int, str]:
        """Step -> reason why its evaluation was not made with the settings of the run."""
        left_out = dict(self.unreadable)
        for step, evaluation in self.evaluations.items():
            reason = self._why_not(evaluation, task)
            if reason:
                left_out[step] = reason
        return left_out

    def _why_not(self, evaluation: Evaluation, task: str) -> str:
        """Reason why an evaluation was not made with the settings of the run; empty where it was
        made with them.
        """
        if task in evaluation.without_result:
            return f"the task has no result ({evaluation.without_result[task]})"
        if task not in evaluation.tasks:
            return "it was evaluated without this task"
        if not evaluation.settings:
            return UNKNOWN_SETTINGS
        tables = self.settings.get("tasks")
        own_task = tables.get(task) if isinstance(tables, Mapping) else None
        pairs = (
            ("eval", split_settings(self.settings), evaluation.settings),
            ("eval.preprocess", self.settings.get("preprocess"), evaluation.preprocess),
            (f"eval.tasks.{task}", own_task, evaluation.tasks[task].config),
        )
        for name, own, used in pairs:
            for key, value in used.items():
                expected = own.get(key, value) if isinstance(own, Mapping) else value
                # a path stands in the results as its hash
                if expected != value and without_absolute_paths(expected) == expected:
                    return f"{name}.{key} was {value} and is {expected} in the config of the run"
        return ""


def read(run: Path) -> StepEvaluations:
    """Read the evaluations of a run over its steps; empty where there are none."""
    settings, digest = settings_of(run), own_digest(run)
    on_validation = uses_validation(settings)
    dataset = ""
    evaluations: dict[int, Evaluation] = {}
    unreadable: dict[int, str] = {}
    for name, of_step in RunFolder(run).evaluations_of_steps():
        folder = of_step.validation if on_validation else of_step
        if not is_own(name, digest) or not folder.results.is_file():
            continue
        dataset = name
        evaluation, why_not = json_file.read(folder.path)
        if evaluation is None:
            unreadable[step_of(of_step.path)] = why_not
        else:
            evaluations[step_of(of_step.path)] = evaluation
    return StepEvaluations(dataset, settings, evaluations, unreadable)


def split_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide which scans are used, in the form of results.json: the patterns of
    `eval.only` are replaced by their hash, because they are parts of paths, which can name people.

    Args:
        section: section `eval` of a config; settings that it lacks are left out.
    """
    found = {key: section[key] for key in SPLIT_SETTINGS if key in section}
    if "only" in found:
        patterns = json.dumps(list(found["only"]))
        digest = hashlib.blake2b(patterns.encode(), digest_size=4).hexdigest()
        found["only"] = f"patterns-{digest}" if found["only"] else ""
    return found


def settings_of(run: Path) -> Mapping[str, Any]:
    """Section `eval` of a run's config; empty where it cannot be read."""
    try:
        tree = from_text(RunFolder(run).config.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return {}
    section = tree.get("eval") if isinstance(tree, dict) else None
    return section if isinstance(section, dict) else {}


def evaluates_during_training(settings: Mapping[str, Any]) -> bool:
    """Whether a section `eval` evaluates checkpoints while the run trains."""
    during = settings.get("during")
    return bool(isinstance(during, Mapping) and during.get("every"))


def uses_validation(settings: Mapping[str, Any]) -> bool:
    """Whether a section `eval` sets validation patients apart."""
    share = settings.get("validation_share", 0)
    return isinstance(share, int | float) and share > 0


def ranking_task(settings: Mapping[str, Any]) -> str:
    """The task by which a run chooses its best step: `eval.during.best`, or else the first task.

    Args:
        settings: section `eval` of the run's config.
    """
    during, tasks = settings.get("during"), settings.get("tasks")
    wanted = during.get("best") if isinstance(during, Mapping) else ""
    if wanted:
        return str(wanted)
    names = [name for name, section in tasks.items() if section is not None] if tasks else []
    return str(names[0]) if names else DEFAULT_TASKS[0]


def _lines(task: str, left_out: Mapping[int, str], what: str) -> list[str]:
    """One line per reason, with all steps that it holds for."""
    steps_of: dict[str, list[int]] = {}
    for step, reason in sorted(left_out.items()):
        steps_of.setdefault(reason, []).append(step)
    lines = []
    for reason, steps in steps_of.items():
        names = ", ".join(map(str, steps))
        which = f"steps {names} are" if len(steps) > 1 else f"step {names} is"
        lines.append(f"{task}: {which} {what}: {reason}")
    return lines


Basis = tuple[Hashable, ...]
_PARTS = ("the test scans", "the training scans", "the labels", "the metric", "the direction")


def _basis(evaluation: Evaluation, section: TaskSection) -> Basis:
    """What must be equal where two values are compared, in the order of `_PARTS`."""
    data = evaluation.origin.data
    return (
        frozenset(evaluation.split.test),
        frozenset(evaluation.split.train),
        None if data is None else (data.labels, data.tables),
        section.headline.metric,
        section.headline.direction,
    )


def _difference(one: Basis, other: Basis) -> str:
    parts = zip(_PARTS, one, other, strict=True)
    name = next(name for name, mine, theirs in parts if mine != theirs)
    return f"{name} of its evaluation differ{'s' if name in _PARTS[3:] else ''}"


def _value(step: int, section: TaskSection, evaluation: Evaluation) -> StepValue:
    headline, interval = section.headline, None
    found = section.statistics.of(headline.metric) if section.statistics is not None else None
    for one in found.whole.models if found is not None else ():
        if one.model == OWN_MODEL:
            interval = one.estimate.interval
    weights = evaluation.origin.weights
    return StepValue(
        step,
        headline.values.get(OWN_MODEL, math.nan),
        interval,
        weights.sha256 if weights is not None else "",
    )
