"""What each task of a SLURM job does: it trains, and no signal loses the run.

SLURM signals a job some time before its time limit (SIGUSR2) or its preemption (SIGTERM or
SIGUSR2). The training loop responds by saving a checkpoint; before the loop begins there is nothing
to save. In both cases the task leaves a mark for the batch script, which requeues the job
(`restarts.REQUEUE`). This file imports torch inside a function, so that signals are handled early.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import tapct
from tapct.base import console, ending, exits, ranks, signals
from tapct.base.exits import UserError
from tapct.run_folder import JobFolder

STOPPED = 143  # exit code of training that a signal or the time limit stopped, after it has saved


def run_task(config: str, start_in: str, snapshot: str, allow_change: bool = False) -> None:
    """Train as one task of a job.

    Args:
        config: absolute path of the job's own resolved config.
        start_in: folder in which the job was submitted; relative paths and the user's own plug-ins
            are found from there.
        snapshot: folder with the copy of tapct that the job must run.
        allow_change: resume even though settings that affect training have changed.
    Raises:
        SystemExit: training failed; the log holds the reason.
    """
    for number in signals.STOP:
        signal.signal(number, end_before_training)
    os.chdir(start_in)
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    record_event(config, "start", restarts=int(restarts), nodes=nodes)
    code, error_end = 1, "failed"

    def work() -> None:
        nonlocal error_end
        try:
            train_job(config, snapshot, restarts != "0", allow_change)
        except Exception as error:
            error_end = ending.leave_error(error)
            raise

    try:
        code = exits.exit_code_of(work)
    finally:
        if code == 0:
            record_event(config, "done", code=code)
        elif code in (STOPPED, exits.INTERRUPTED):
            record_event(config, "stopped", code=code)
            ending.leave("stopped")
        else:
            ending.leave("failed")
            if error_end == "failed":  # a loss is recorded by the batch script, with its cause
                record_event(config, "failed", code=code)
    if code not in (0, STOPPED, exits.INTERRUPTED):
        exits.leave(code)


def train_job(config: str, snapshot: str, restarted: bool, allow_change: bool) -> None:
    """Train with the job's config.

    Args:
        config: as in `run_task`.
        snapshot: as in `run_task`.
        restarted: whether SLURM has started this job before.
        allow_change: as in `run_task`.
    Raises:
        SystemExit: a signal or the time limit stopped training, and it has saved.
        UserError: Python imports another tapct than that of the snapshot, or training cannot begin.
        RuntimeError: training code has raised SystemExit.
    """
    if Path(tapct.__file__).parent.parent.resolve() != Path(snapshot).resolve():
        raise UserError(
            f"this job must run the tapct in {snapshot}, but Python imports {tapct.__file__}"
        )
    with signals.kept_from_children():
        # imported here, so that signals are handled before torch is loaded
        from tapct.run import pretrain

        # A restarted job resumes from its own checkpoints, whatever train.resume was at its start.
        overrides = ["train.resume=auto"] if restarted else []
        command = shlex.join(["tapct", "train", config, *overrides])
        try:
            resolved = pretrain.read_config(Path(config), overrides)
            stop = pretrain.train(resolved, allow_change, command)
        except SystemExit as error:
            # A plug-in that calls sys.exit() must not look like a run that is done or was stopped.
            raise RuntimeError(
                f"SystemExit({error.code!r}) was raised before training ended; a plug-in must "
                "raise another exception"
            ) from error
    if stop.signal:
        console.say(
            f"stopped by {stop.signal} and saved at step {stop.step}; the job requeues itself"
        )
        sys.exit(exits.INTERRUPTED if stop.signal == "SIGINT" else STOPPED)


def end_before_training(number: int, frame: FrameType | None) -> None:
    """Signal handler until the training loop sets its own: leave a mark and end at once.

    There is nothing to save yet.
    """
    ending.leave("stopped")
    os.write(1, f"stopped by {signal.Signals(number).name} before training began\n".encode())
    os._exit(0)  # an exception could be swallowed by the import that it interrupts


def record_event(config: str, event: str, **details: object) -> None:
    """Append an event to events.jsonl beside the job's config; only the first rank does.

    Args:
        config: as in `run_task`.
        event: `start`, `done`, `stopped` or `failed`.
        details: further entries of the line.
    """
    if ranks.from_environment(os.environ).is_first:
        row = {"event": event, "time": round(time.time(), 1), **details}
        with JobFolder(Path(config).parent).events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
