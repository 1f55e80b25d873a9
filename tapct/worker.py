"""What each task of a SLURM job does: `tapct train` on the config of the job, so that no signal loses the run.

A job is ended by a signal some time before its limit (SIGUSR2) or its preemption (SIGTERM or SIGUSR2). The training
loop answers by saving; before the loop begins there is nothing to save. In both cases the task leaves a mark for the
batch script, which requeues the job (`batch.requeue_lines`). No torch at import, so that signals are taken over early.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tapct import cli, ranks, signals
from tapct.types import UserError

STOPPED = 143  # how `tapct train` is asked to leave when it was stopped and has saved
MARK = "TAPCT_MARK"  # environment: the file to leave for the batch script


def work(config: str, start_in: str, snapshot: str, allow_change: bool = False) -> None:
    """Train as one task of a job.

    Args:
        config: the job's own resolved config, absolute.
        start_in: folder in which the job was submitted; relative paths and your own plug-ins are found from there.
        snapshot: folder with the copy of tapct that the job must run.
        allow_change: go on although keys differ that shape the curve.
    Raises:
        SystemExit: training failed; its one line is in the log.
        UserError: another tapct is imported than that of the snapshot.
    """
    for number in signals.STOP:
        signal.signal(number, leave_early)
    os.chdir(start_in)
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    note(config, "start", restarts=int(restarts), nodes=os.environ.get("SLURM_JOB_NODELIST", ""))
    code = 1
    try:
        if Path(cli.__file__).parent.parent.resolve() != Path(snapshot).resolve():
            raise UserError(f"this job must run the tapct in {snapshot}, but Python found {cli.__file__}")
        # a job that goes on finds its own checkpoints, whatever was asked of its first start
        resume = ["train.resume=auto"] if restarts != "0" else []
        allowed = ["--allow-change"] if allow_change else []
        sys.argv = ["tapct", "train", config, *resume, *allowed, f"--stopped-code={STOPPED}"]
        code = cli.answer()
    finally:
        end = "done" if code == 0 else "stopped" if code in (STOPPED, 130) else "failed"
        note(config, end, code=code)
        if end != "done":
            leave_mark(end)
    if end == "failed":
        cli.leave(code)


def leave_early(number: int, frame: FrameType | None) -> None:
    """Handler until the loop sets its own: leaves a mark and ends at once, since there is nothing to save."""
    leave_mark("stopped")
    os.write(1, f"stopped by {signal.Signals(number).name} before training began\n".encode())
    os._exit(0)  # an exception could be swallowed by the import that it interrupts


def leave_mark(end: str) -> None:
    """Tell the batch script why this task ended; the first word of any rank stands.

    When a rank fails, srun ends the others with SIGTERM, and they look as if they were preempted; when a signal ends
    one rank early, the others may fail for want of it. What came first is the cause.

    Args:
        end: `stopped` or `failed`.
    """
    if os.environ.get(MARK):
        with contextlib.suppress(FileExistsError), open(os.environ[MARK], "x", encoding="utf-8") as file:
            file.write(end)


def note(config: str, event: str, **facts: object) -> None:
    """Append an event to events.jsonl beside the job's config; only the first rank does."""
    if ranks.from_environment(os.environ).is_first:
        row = {"event": event, "time": round(time.time(), 1), **facts}
        with (Path(config).parent / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
