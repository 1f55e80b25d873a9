"""Run training in children that are killed: `python killed_runs.py` gets one JSON request, answers
one line a child.

A program of its own, since it forks: nothing but imports has happened in it, so no thread is lost
    in a child.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.dataset  # noqa: F401  # this and the next are imported late, and then by every child for itself
import torch
import torch._dynamo

from tapct.config import load_config
from tapct.engine.checkpoint import Checkpoints, damage
from tapct.run import pretrain
from tapct.run.config import RunConfig

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
PATIENCE_SECONDS = 120.0


def start(
    config: Path,
    out: Path,
    overrides: list[str],
    die_at_event: int = 0,
    events_to: Path | None = None,
) -> int:
    """Fork a child that trains; returns its process id.

    Args:
        die_at_event: the child kills itself just before this change of a file in the run folder,
            1-based; 0: never.
        events_to: file that gets the number of such changes when the child ends by itself.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        resolved = load_config(RunConfig, config, [f"out={out}", *overrides])
        seen = watch(str(out), die_at_event)
        pretrain.train(resolved)
        if events_to is not None:
            events_to.write_text(str(seen[0]))
        code = 0
    finally:
        os._exit(code)


def watch(folder: str, die_at_event: int) -> list[int]:
    """Count the changes of files in a folder; the counter is the list's one item."""
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        within = (
            event in ("os.remove", "os.rmdir") and arguments[1] != -1
        )  # rmtree's, relative to an open folder
        if event not in FILE_EVENTS or not (within or str(arguments[0]).startswith(folder)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen[0] += 1
        if seen[0] == die_at_event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def ended(child: int) -> tuple[bool, int]:
    """Whether a child has ended, and how: its exit code, or minus the signal."""
    found, status = os.waitpid(child, os.WNOHANG)
    return bool(found), os.waitstatus_to_exitcode(status) if found else 0


def wait(child: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def announced(out: Path) -> int:
    """Step that the file `latest` names; 0 without one."""
    latest = out / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0


def kill_at_random(
    config: Path, out: Path, overrides: list[str], draw: random.Random
) -> tuple[int, int]:
    """Let a run write 0 to 2 checkpoints more, and kill it within about the time of the next: (step
    before, code).
    """
    before = announced(out)
    goal, began = before + draw.randrange(3), time.monotonic()
    child = start(config, out, overrides)
    while announced(out) < goal and time.monotonic() - began < PATIENCE_SECONDS:
        over, code = ended(child)
        if over:
            return before, code
        time.sleep(0.002)
    pace = (time.monotonic() - began) / (goal - before) if goal > before else 0.3
    time.sleep(draw.uniform(0, pace))
    os.kill(child, signal.SIGKILL)
    return before, wait(child)


def state_after(out: Path) -> dict[str, Any]:
    """What is on disk after a kill."""
    newest, complaints = Checkpoints(out / "checkpoints", keep=1).newest_whole()
    latest = announced(out)
    whole = latest == 0 or damage(out / "checkpoints" / f"step_{latest:08d}") is None
    step = int(newest.name.removeprefix("step_")) if newest else 0
    torn = (
        len(list((out / "checkpoints").glob(".writing_*"))) if (out / "checkpoints").is_dir() else 0
    )
    return {
        "announced": latest,
        "announced_is_whole": whole,
        "newest_whole": step,
        "damaged": complaints,
        "torn": torn,
    }


def main() -> None:
    """Serve one request: `kills` at random moments, or one death at each of the `events`; then run
    to the end.
    """
    request = json.loads(sys.argv[1])
    config, overrides = Path(request["config"]), request["overrides"]
    if "kills" in request:
        out, draw = Path(request["out"]), random.Random(request["seed"])
        while request["kills"] > 0:
            before, code = kill_at_random(config, out, overrides, draw)
            request["kills"] -= code == -signal.SIGKILL
            print(json.dumps({"before": before, "code": code, **state_after(out)}), flush=True)
            if code != -signal.SIGKILL:
                break
        print(json.dumps({"finished": wait(start(config, out, overrides))}), flush=True)
        return
    Path(request["out"]).mkdir(exist_ok=True)
    for event in request["events"]:
        out = Path(request["out"]) / f"event_{event}"
        code = wait(start(config, out, overrides, event, Path(request["count_to"])))
        after = state_after(out)
        finished = wait(start(config, out, overrides))
        print(json.dumps({"event": event, "code": code, **after, "finished": finished}), flush=True)


if __name__ == "__main__":
    main()
