"""What each task of a SLURM job does: train on the config of the job, so that no signal loses the
run.

A job is ended by a signal some time before its limit (SIGUSR2) or its preemption (SIGTERM or
SIGUSR2). The training loop answers by saving; before the loop begins there is nothing to save. In
both cases the task leaves a mark for the batch script, which requeues the job
(`batch.requeue_lines`). No torch at import, so that signals are taken over early.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import tapct
from tapct.base import console, exits, ranks, signals
from tapct.base.exits import UserError

STOPPED = 143  # exit code of a task that was stopped and has saved
MARK = "TAPCT_MARK"  # environment: the file to leave for the batch script


def work(config: str, start_in: str, snapshot: str, allow_change: bool = False) -> None:
    """Train as one task of a job.

    Args:
        config: the job's own resolved config, absolute.
        start_in: folder in which the job was submitted; relative paths and your own plug-ins are
            found from there.
        snapshot: folder with the copy of tapct that the job must run.
        allow_change: go on although keys differ that shape the curve.
    Raises:
        SystemExit: training failed; its one line is in the log.
    """
    for number in signals.STOP:
        signal.signal(number, leave_early)
    os.chdir(start_in)
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    note(config, "start", restarts=int(restarts), nodes=os.environ.get("SLURM_JOB_NODELIST", ""))
    code = 1
    try:
        code = exits.exit_code_of(lambda: train(config, snapshot, restarts != "0", allow_change))
    finally:
        end = (
            "done" if code == 0 else "stopped" if code in (STOPPED, exits.INTERRUPTED) else "failed"
        )
        note(config, end, code=code)
        if end != "done":
            leave_mark(end)
    if end == "failed":
        exits.leave(code)


def train(config: str, snapshot: str, restarted: bool, allow_change: bool) -> None:
    """Train as the job's config says.

    Args:
        restarted: SLURM has started this job before.
    Raises:
        SystemExit: a signal or the time limit stopped training, and it has saved.
        UserError: another tapct is imported than that of the snapshot, or training cannot begin.
    """
    if Path(tapct.__file__).parent.parent.resolve() != Path(snapshot).resolve():
        raise UserError(
            f"this job must run the tapct in {snapshot}, but Python found {tapct.__file__}"
        )
    with signals.kept_from_children():
        # late, so that signals are taken over before torch is loaded
        from tapct.run import pretrain

        # a restarted job finds its own checkpoints, whatever its first start was asked to do
        resume = ["train.resume=auto"] if restarted else []
        resolved = pretrain.read_config(Path(config), resume)
        stop = pretrain.train(
            resolved, allow_change, shlex.join(["tapct", "train", config, *resume])
        )
    if stop.signal:
        console.say(
            f"stopped by {stop.signal} and saved at step {stop.step}; the job requeues itself"
        )
        sys.exit(exits.INTERRUPTED if stop.signal == "SIGINT" else STOPPED)


def leave_early(number: int, frame: FrameType | None) -> None:
    """Handler until the loop sets its own: leaves a mark and ends at once, since there is nothing
    to save.
    """
    leave_mark("stopped")
    os.write(1, f"stopped by {signal.Signals(number).name} before training began\n".encode())
    os._exit(0)  # an exception could be swallowed by the import that it interrupts


def leave_mark(end: str) -> None:
    """Tell the batch script why this task ended; the first word of any rank stands.

    When a rank fails, srun ends the others with SIGTERM, and they look as if they were preempted;
    when a signal ends one rank early, the others may fail for want of it. What came first is the
    cause.

    Args:
        end: `stopped` or `failed`.
    """
    if os.environ.get(MARK):
        with (
            contextlib.suppress(FileExistsError),
            open(os.environ[MARK], "x", encoding="utf-8") as file,
        ):
            file.write(end)


def note(config: str, event: str, **facts: object) -> None:
    """Append an event to events.jsonl beside the job's config; only the first rank does."""
    if ranks.from_environment(os.environ).is_first:
        row = {"event": event, "time": round(time.time(), 1), **facts}
        with (Path(config).parent / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
