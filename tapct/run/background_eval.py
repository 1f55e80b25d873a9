"""Evaluation while training goes on: a process beside it, or a SLURM job of its own; no step waits
for either.

A process outlives training, but not in a SLURM job, which ends with its ranks all that they have
started. There the
first rank waits at its end, when the others have left: the last evaluation is the one that a run is
trained for.

RUN/eval/steps/step_00005000/   teacher.safetensors (until it is judged), meta.json, log.txt, results.json
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from tapct.base import console, ranks, signals
from tapct.engine.checkpoint import Checkpoints
from tapct.engine.stop import StopFlag, job_deadline
from tapct.eval.runner import During
from tapct.run_folder import CheckpointFolder, RunFolder, step_of

LEAVE_S = 15.0  # before the end of the job's time, for the process to go and the task to end well


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
        self.judged = 0  # step that the child judges
        self.is_mortal = config.how == "process" and "SLURM_JOB_ID" in os.environ

    def expect(self, step: int, last: bool) -> None:
        """A checkpoint of this step has been begun."""
        if self.config.every and (step % self.config.every == 0 or last):
            self.due.append(step)

    def look(self, checkpoints: Checkpoints) -> None:
        """Start what is due and saved; cheap when there is nothing."""
        busy = self.is_busy()
        if not self.due or (checkpoints.under_way is not None and not checkpoints.under_way.done()):
            return
        step = self.due.pop(0)
        saved = next((path for path in checkpoints.finished() if step_of(path) == step), None)
        if saved is None:
            return  # could not be written, as has been told
        if busy:
            console.say(
                f"step {step} is not evaluated: the evaluation before it is still running; raise "
                "eval.during.every, or "
                f"run: {self.by_hand(step)}"
            )
            return
        try:
            self.start(saved)
        except (OSError, subprocess.SubprocessError) as error:
            console.say(f"step {step} is not evaluated: {error}")

    def is_busy(self) -> bool:
        """Whether a process is judging; tells when it has failed."""
        if self.child is not None and self.child.poll() is not None:
            if self.child.returncode:
                console.say(
                    f"the evaluation of step {self.judged} failed, see {self.log_of(self.judged)}"
                )
            self.child = None
        return self.child is not None

    def finish(self, checkpoints: Checkpoints, stopped: bool) -> None:
        """Training is over: what was begun last is still to be judged.

        Args:
            checkpoints: of the run; none is under way any more.
            stopped: by a signal or the end of the job's time, so nothing can be waited for.
        """
        self.due = self.due[-1:]  # nobody looks again: the last one counts
        until = (
            0.0
            if stopped
            else min(time.time() + self.config.wait_s, job_deadline(os.environ, LEAVE_S))
        )
        with StopFlag(torch.device("cpu"), deadline=until) as flag:
            if self.is_mortal:
                self.wait(flag)
            self.look(
                checkpoints
            )  # without time to wait too: it keeps the teacher, to be judged by hand
            if self.is_mortal:
                self.wait(flag)
        if self.is_busy() and not self.is_mortal:
            console.say(
                f"the evaluation of step {self.judged} goes on by itself, see "
                f"{self.log_of(self.judged)}"
            )

    def wait(self, flag: StopFlag) -> None:
        """Wait for the process that judges; end it at the flag's word, and say how to do its work
        by hand.
        """
        if self.is_busy() and not flag.reason():
            seconds = console.duration(flag.deadline - time.time())
            console.say(
                f"waiting for the evaluation of step {self.judged}, at most {seconds}; Ctrl-C "
                "ends it"
            )
        while self.is_busy() and not flag.reason():
            time.sleep(0.1)
        if self.child is not None:
            os.killpg(self.child.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(LEAVE_S / 2)
            self.child = None
            console.say(
                f"the evaluation of step {self.judged} was ended with the job; run: "
                f"{self.by_hand(self.judged)}"
            )

    def by_hand(self, step: int) -> str:
        """The command that judges a step."""
        return shlex.join(["tapct", "eval", str(self.run), f"--step={step}"])

    def log_of(self, step: int) -> Path:
        """What the process that judges a step says."""
        return RunFolder(self.run).evaluation(step).log

    def start(self, saved: Path) -> None:
        """Keep the teacher from rotation and judge it.

        Args:
            saved: a finished checkpoint.
        """
        folder = RunFolder(self.run).evaluation(step_of(saved))
        folder.path.mkdir(parents=True, exist_ok=True)
        source = CheckpointFolder(saved)
        for old, new in ((source.teacher, folder.teacher), (source.meta, folder.meta)):
            new.unlink(missing_ok=True)
            try:
                os.link(old, new)  # takes no space until the checkpoint is rotated away
            except OSError:
                shutil.copyfile(old, new)
        words = [
            sys.executable,
            "-m",
            "tapct",
            "eval",
            str(self.run.absolute()),
            f"--step={step_of(saved)}",
        ]
        if self.config.device:
            words.append(f"device={self.config.device}")
        environment = ranks.without_place(os.environ)
        if self.config.how == "job":
            options = [
                *self.config.sbatch,
                f"--output={folder.log.absolute()}",
                "--open-mode=append",
            ]
            line = [
                "sbatch",
                "--parsable",
                f"--job-name=eval-{self.run.name}",
                *options,
                f"--wrap={shlex.join(words)}",
            ]
            told = subprocess.run(
                line, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            answer = (told.stdout or told.stderr).strip() or f"sbatch left with {told.returncode}"
            console.say(
                f"evaluation of step {step_of(saved)}: "
                f"{'job ' if not told.returncode else ''}{answer}"
            )
            return
        self.judged = step_of(saved)
        with folder.log.open("ab") as output, signals.heard_by_children():
            low = ["nice", "-n", "10"] if shutil.which("nice") else []
            self.child = subprocess.Popen(
                [*low, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C for training is none for it
            )
