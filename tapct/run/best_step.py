"""The best step of a run: which one it is, and keeping its weights.

The weights of the best step so far stay in the folder of its evaluation, so `checkpoint.keep` does
not remove them. They are a hard link to those of the checkpoint where the file system has links.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError
from tapct.eval.results import best_record, over_steps
from tapct.eval.results.over_steps import StepCurve, StepValue
from tapct.eval.results.terminal import shown
from tapct.run_folder import CheckpointFolder, EvaluationFolder, RunFolder, step_of

BEST = "best"  # value of --step


@dataclass(frozen=True)
class BestStep:
    """The best step of a run.

    Args:
        run: run folder.
        curve: headline over all steps.
        value: headline of the best step.
    """

    run: Path
    curve: StepCurve
    value: StepValue

    @property
    def line(self) -> str:
        """Which step it is, and how it was chosen."""
        curve = self.curve
        return (
            f"best step {self.value.step} of {self.run}: {curve.task}, {curve.metric} "
            f"{shown(self.value.value)} on the {curve.people}, the best of "
            f"{len(curve.values)} evaluated steps"
        )

    def check_weights(self, sha256: str, place: Path) -> None:
        """Raise UserError where weights are not those that were evaluated.

        Args:
            sha256: hash of the file with the weights.
            place: folder of the file.
        """
        if self.value.weights and self.value.weights != sha256:
            step = self.value.step
            raise UserError(
                f"--step {BEST}: step {step} is the best one, and the weights of step {step} in "
                f"{place} are not those that were evaluated; run `tapct eval {self.run} "
                f"--step {step}` first"
            )


def parse_step(text: str) -> int | str | None:
    """The value of --step: a number of steps, `best`, or None for an empty text.

    Raises:
        UserError: it is something else.
    """
    if not text or text == BEST:
        return text or None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--step {text}: give the step of a checkpoint, e.g. 500, or {BEST}")
    return int(text)


def find(run: Path, task: str = "") -> BestStep:
    """The best step of a run.

    Args:
        run: run folder.
        task: task whose headline chooses it; empty for the one of the run's config.
    Raises:
        UserError: no evaluation of the run can choose one.
    """
    found = over_steps.read(run)
    flag = " --validation" if found.on_validation else ""
    if not found.evaluations and not found.unreadable:
        people = "validation patients of the" if found.on_validation else ""
        data = " ".join(f"the {people} data set that it was trained on".split())
        raise UserError(
            f"--step {BEST}: {run} has no evaluation on {data}; train with eval.during.every, or "
            f"run `tapct eval {run} --step N{flag}` for some steps"
        )
    curve = found.curve(task)
    if curve is None:
        wanted = task or over_steps.ranking_task(found.settings)
        if wanted not in found.tasks():
            there = ", ".join(found.tasks()) or "none"
            raise UserError(
                f"--step {BEST}: no evaluation of {run} has the task {wanted}; there are: {there}. "
                f"Set eval.during.best"
            )
        reason = "; ".join(found.lines_without_curve(task))
        raise UserError(
            f"--step {BEST}: no evaluation of {run} was made with the settings of its config "
            f"({reason}); run `tapct eval {run} --step N{flag}` again for some steps"
        )
    if curve.best is None:
        raise UserError(
            f"--step {BEST}: {curve.metric} of {curve.task} is no number after any evaluated step "
            f"of {run}; set eval.during.best to another task"
        )
    return BestStep(run, curve, curve.best)


def settle(run: Path, folder: EvaluationFolder) -> None:
    """Write which step is the best after an evaluation, and keep the weights of that step alone.

    Weights of steps that are still to be evaluated stay.

    Args:
        run: run folder.
        folder: folder of the step that has been evaluated.
    """
    curve = best_record.update(run)
    settings = over_steps.settings_of(run)
    best = None
    during = over_steps.evaluates_during_training(settings)
    if during and curve is not None and curve.best is not None:
        best = RunFolder(run).evaluation(curve.dataset, curve.best.step)
        keep_weights(run, best)
    done = {folder.path: folder}
    for dataset, place in RunFolder(run).evaluations_of_steps():
        is_own = curve is not None and dataset == curve.dataset
        if is_own and not waits(place, over_steps.uses_validation(settings)):
            done[place.path] = place
    for path, place in done.items():
        if best is None or path != best.path:
            place.teacher.unlink(missing_ok=True)


def waits(folder: EvaluationFolder, on_validation: bool) -> bool:
    """Whether the weights in the folder of a step are still to be evaluated: there are no results,
    or they are older than the weights, because the step has been trained again.

    Args:
        folder: folder of the step.
        on_validation: whether steps are evaluated on validation patients.
    """
    results = folder.validation.results if on_validation else folder.results
    try:
        written = folder.teacher.stat().st_mtime
    except OSError:
        return False
    try:
        return results.stat().st_mtime < written
    except OSError:
        return True


def keep_weights(run: Path, folder: EvaluationFolder) -> None:
    """Put the weights of an evaluated step into the folder of its evaluation, where they are not
    there yet and its checkpoint exists.
    """
    saved = RunFolder(run).checkpoints.step(step_of(folder.path))
    if not folder.teacher.is_file() and saved.teacher.is_file() and saved.meta.is_file():
        link_weights(saved, folder)


def link_weights(saved: CheckpointFolder, folder: EvaluationFolder) -> None:
    """Put the weights of a checkpoint into the folder of an evaluation. `meta.json` comes first:
    where the weights exist, all that is needed with them exists.
    """
    for old, new in ((saved.meta, folder.meta), (saved.teacher, folder.teacher)):
        aside = new.with_name(f".{new.name}.{os.getpid()}")
        aside.unlink(missing_ok=True)
        try:
            # a link takes no space until the checkpoint is rotated away
            os.link(old, aside)
        except OSError:
            shutil.copyfile(old, aside)
        os.replace(aside, new)
        aside.unlink(missing_ok=True)  # it is left where both were already the same file
