"""Evaluation during training: in a process beside it or in a SLURM job; training never waits.

A process runs on after training has ended. In the job of a scheduler (SLURM, PBS, ...) it cannot,
because the job ends all its processes with the ranks. There the first rank waits at its end, after
the other ranks have left: the last evaluation is the one that matters most. A run of `tapct sweep`
waits too, since the table of the sweep has the results of all evaluations.

    RUN/eval/DATASET/step_00005000/
        teacher.safetensors   the weights, until they have been evaluated; those of the best step
                              stay
        meta.json             facts about the checkpoint
        log.txt               output of the evaluation
        results.json          its results
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from tapct.base import console, ranks, signals
from tapct.base.exits import INCOMPLETE
from tapct.engine.checkpoint import Checkpoints
from tapct.engine.stop import StopFlag, job_deadline
from tapct.eval.results import best_record
from tapct.eval.runner import During
from tapct.run.best_step import link_weights, waits
from tapct.run_folder import CheckpointFolder, RunFolder, step_of

# seconds before the end of the job's time in which the process and the first rank can end cleanly
LEAVE_S = 15.0
MOST_WAITING = 2  # steps that wait for their evaluation and keep their whole checkpoints


def doubts(config: During) -> Iterator[str]:
    """Why evaluations during training will not start on this machine."""
    if config.every and config.how == "job" and shutil.which("sbatch") is None:
        yield "eval.during.how=job needs sbatch, which is not on the PATH here"


class Evaluations:
    """Starts an evaluation of every checkpoint that is due; only the first rank has this object.

    Args:
        run: run folder.
        config: interval, and whether to start a process or a job.
        dataset: name of the data set of the run.
        on_validation: whether to test on validation patients, on whom the best step is chosen.
    """

    def __init__(
        self, run: Path, config: During, dataset: str, on_validation: bool = False
    ) -> None:
        self.run, self.config, self.dataset = run, config, dataset
        self.on_validation = on_validation
        self.due: list[int] = []
        self.child: subprocess.Popen[bytes] | None = None
        self.child_step = 0  # step that the child evaluates
        in_sweep = ranks.IN_SWEEP in os.environ
        self.ends_with_job = config.how == "process" and ranks.in_batch_job(os.environ)
        self.is_waited_for = self.ends_with_job or (config.how == "process" and in_sweep)

    def expect(self, step: int, last: bool) -> None:
        """Note that a checkpoint of this step is being saved."""
        if self.config.every and (step % self.config.every == 0 or last):
            self.due.append(step)

    def start_due(self, checkpoints: Checkpoints) -> None:
        """Start the evaluation that is due, once its checkpoint is saved; cheap without one."""
        busy = self.is_busy()
        save = checkpoints.save_in_progress
        if not self.due or (save is not None and not save.done()):
            return
        step = self.due.pop(0)
        saved = next((path for path in checkpoints.finished() if step_of(path) == step), None)
        if saved is None:
            return  # the checkpoint could not be written, which has been reported
        if busy:
            console.say(
                f"step {step} is not evaluated: the evaluation before it is still running; raise "
                f"eval.during.every, or run: {self.command_for(step)}"
            )
            return
        try:
            self.start(saved)
        except (OSError, subprocess.SubprocessError) as error:
            console.say(f"step {step} is not evaluated: {error}")

    def is_busy(self) -> bool:
        """Whether the child process is running; reports it once if the child has failed."""
        if self.child is not None and self.child.poll() is not None:
            if self.child.returncode:
                end = "failed"
                if self.child.returncode == INCOMPLETE:
                    end = "has no result of some tasks or models"
                console.say(
                    f"the evaluation of step {self.child_step} {end}, see "
                    f"{self.log_of(self.child_step)}"
                )
            self.child = None
        return self.child is not None

    def finish(self, checkpoints: Checkpoints, stopped: bool) -> None:
        """Start the last evaluation after training, and wait for it where it would be ended.

        Args:
            checkpoints: checkpoints of the run; none is being written any more.
            stopped: True if a signal or the end of the job's time stopped training, so that there
                is no time to wait.
        """
        self.due = self.due[-1:]  # only one more can be started: the last one
        until = math.inf
        if stopped:
            until = 0.0
        elif self.ends_with_job:
            until = min(time.time() + self.config.wait_s, job_deadline(os.environ, LEAVE_S))
        with StopFlag(torch.device("cpu"), deadline=until) as flag:
            if self.is_waited_for:
                self.wait(flag)
            # also without time to wait: this keeps the teacher, to evaluate the step later
            self.start_due(checkpoints)
            if self.is_waited_for:
                self.wait(flag)
        if self.is_busy() and not self.ends_with_job:
            console.say(
                f"the evaluation of step {self.child_step} is still running, see "
                f"{self.log_of(self.child_step)}"
            )

    def wait(self, flag: StopFlag) -> None:
        """Wait for the child process. When the flag is raised in a job, end the process and print
        how to repeat it.

        Args:
            flag: raised by a signal or at the end of the waiting time.
        """
        if self.is_busy() and not flag.reason():
            bound = ""
            if self.ends_with_job:
                bound = f", at most {console.duration(flag.deadline - time.time())}; Ctrl-C ends it"
            console.say(f"waiting for the evaluation of step {self.child_step}{bound}")
        while self.is_busy() and not flag.reason():
            time.sleep(0.1)
        if self.child is not None and self.ends_with_job:
            os.killpg(self.child.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(LEAVE_S / 2)
            self.child = None
            console.say(
                f"the evaluation of step {self.child_step} was ended with the job; run: "
                f"{self.command_for(self.child_step)}"
            )

    def command_for(self, step: int) -> str:
        """The command line that evaluates a step."""
        return shlex.join(["tapct", "eval", str(self.run), *self.options_for(step)])

    def options_for(self, step: int) -> list[str]:
        """Options of `tapct eval` for a step."""
        return [f"--step={step}", *(["--validation"] if self.on_validation else [])]

    def steps_to_keep(self) -> set[int]:
        """Steps whose checkpoints `checkpoint.keep` does not remove: the best one so far, and those
        whose evaluation may make them the best one.

        The weights of every step that is still to be evaluated are kept beside its results, so only
        the newest of these steps keep their whole checkpoints.
        """
        if not self.config.every:
            return set()
        record = best_record.read(self.run)
        best = set() if record is None or record.best is None else {record.best}
        waiting = [
            step_of(folder.path)
            for dataset, folder in RunFolder(self.run).evaluations_of_steps()
            if dataset == self.dataset and waits(folder, self.on_validation)
        ]
        return best | set(self.due) | set(sorted(waiting)[-MOST_WAITING:])

    def log_of(self, step: int) -> Path:
        """Log file of the evaluation of a step."""
        return RunFolder(self.run).evaluation(self.dataset, step).log

    def start(self, saved: Path) -> None:
        """Keep the teacher from rotation and evaluate it.

        Args:
            saved: folder of a finished checkpoint.
        """
        folder = RunFolder(self.run).evaluation(self.dataset, step_of(saved))
        folder.path.mkdir(parents=True, exist_ok=True)
        link_weights(CheckpointFolder(saved), folder)
        step = step_of(saved)
        command = [
            sys.executable,
            "-m",
            "tapct",
            "eval",
            str(self.run.absolute()),
            *self.options_for(step),
        ]
        if self.config.device:
            command.append(f"device={self.config.device}")
        if self.config.how == "job":
            self._submit(step, command, folder.log)
        else:
            self._spawn(step, command, folder.log)

    def _submit(self, step: int, command: list[str], log: Path) -> None:
        sbatch = [
            "sbatch",
            "--parsable",
            f"--job-name=eval-{self.run.name}",
            *self.config.sbatch,
            f"--output={log.absolute()}",
            "--open-mode=append",
            f"--wrap={shlex.join(command)}",
        ]
        environment = ranks.without_place(os.environ)
        done = subprocess.run(
            sbatch, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        output = (done.stdout or done.stderr).strip() or f"sbatch exited with {done.returncode}"
        job = "" if done.returncode else "job "
        console.say(f"evaluation of step {step}: {job}{output}")

    def _spawn(self, step: int, command: list[str], log: Path) -> None:
        self.child_step = step
        low_priority = ["nice", "-n", "10"] if shutil.which("nice") else []
        with log.open("ab") as output, signals.heard_by_children():
            self.child = subprocess.Popen(
                [*low_priority, *command],
                env=ranks.without_place(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C ends training, not the evaluation
            )
