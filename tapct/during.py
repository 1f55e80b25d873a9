"""Evaluation while training goes on: a process beside it, or a SLURM job of its own; training never waits for either.

RUN/eval/steps/step_00005000/   teacher.safetensors (until it is judged), meta.json, log.txt, results.json
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tapct import log, ranks
from tapct.engine.checkpoint import Checkpoints, step_of
from tapct.eval.runner import During


class Evaluations:
    """Starts an evaluation for every checkpoint that is due; the first rank of a run has one.

    Args:
        run: run folder.
        config: how often, and where.
    """

    def __init__(self, run: Path, config: During) -> None:
        self.run, self.config = run, config
        self.due: list[int] = []
        self.child: subprocess.Popen[bytes] | None = None

    def expect(self, step: int, last: bool) -> None:
        """A checkpoint of this step has been begun."""
        if self.config.every and (step % self.config.every == 0 or last):
            self.due.append(step)

    def look(self, checkpoints: Checkpoints) -> None:
        """Start what is due and saved; cheap when there is nothing."""
        if not self.due or (checkpoints.under_way is not None and not checkpoints.under_way.done()):
            return
        step = self.due.pop(0)
        saved = next((path for path in checkpoints.finished() if step_of(path) == step), None)
        if saved is None:
            return  # could not be written, as has been told
        if self.child is not None and self.child.poll() is None:
            log.say(f"step {step} is not evaluated: the evaluation before it is still running; raise eval.during.every")
            return
        try:
            self.start(saved)
        except (OSError, subprocess.SubprocessError) as error:
            log.say(f"step {step} is not evaluated: {error}")

    def start(self, saved: Path) -> None:
        """Keep the teacher from rotation and judge it.

        Args:
            saved: a finished checkpoint.
        """
        folder = steps_folder(self.run) / saved.name
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("teacher.safetensors", "meta.json"):
            (folder / name).unlink(missing_ok=True)
            try:
                os.link(saved / name, folder / name)  # takes no space until the checkpoint is rotated away
            except OSError:
                shutil.copyfile(saved / name, folder / name)
        words = [sys.executable, "-m", "tapct", "eval", str(self.run.absolute()), f"--step={step_of(saved)}"]
        if self.config.device:
            words.append(f"device={self.config.device}")
        environment = ranks.without_place(os.environ)
        if self.config.how == "job":
            options = [*self.config.sbatch, f"--output={(folder / 'log.txt').absolute()}", "--open-mode=append"]
            line = ["sbatch", "--parsable", f"--job-name=eval-{self.run.name}", *options, f"--wrap={shlex.join(words)}"]
            told = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=False)
            answer = (told.stdout or told.stderr).strip() or f"sbatch left with {told.returncode}"
            log.say(f"evaluation of step {step_of(saved)}: {'job ' if not told.returncode else ''}{answer}")
            return
        with (folder / "log.txt").open("ab") as output:
            low = ["nice", "-n", "10"] if shutil.which("nice") else []
            self.child = subprocess.Popen(
                [*low, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C for training is none for it
            )


def steps_folder(run: Path) -> Path:
    """Where the evaluations of single steps lie."""
    return run / "eval" / "steps"
