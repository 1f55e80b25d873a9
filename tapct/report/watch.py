"""`tapct report --watch`: the page is written again while a run trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tapct.base import jsonl
from tapct.base.exits import UserError
from tapct.report import facts
from tapct.run_folder import RunFolder

SHARE = 0.1  # most of the time that is spent on writing


def is_finished(run_dir: Path) -> bool:
    """Whether the last step of a run is done; False where its config cannot be read."""
    folder = RunFolder(run_dir)
    config = facts.read_config(folder.config) or {}
    try:
        wanted = int(config["train.steps"])
    except (KeyError, ValueError):
        return False
    last = jsonl.read_tail(folder.metrics, "step")
    return bool(last) and last[-1]["step"] >= wanted


def watch(
    runs: Sequence[Path],
    write: Callable[[float], Path],
    every_s: float,
    report: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Write a page again and again until all runs have finished, or until Ctrl-C.

    The last page does not load itself again. A run without a finished step is waited for.

    Args:
        runs: run folders.
        write: function that writes the page, given the seconds after which it loads itself again.
        every_s: seconds between two pages; longer where writing takes more than a tenth of it.
        report: function that prints a line.
        sleep: function that waits.
    """
    last_problem, last_page = "", None
    try:
        while True:
            has_ended = all(is_finished(run) for run in runs)
            began = time.monotonic()
            try:
                page = write(0.0 if has_ended else every_s)
                if page != last_page:
                    report(f"report: {page}, written again every {every_s:g} s until Ctrl-C")
                last_page, last_problem = page, ""
            except UserError as error:  # no finished step yet, or no room at the moment
                if not any(run.is_dir() for run in runs):
                    raise
                if str(error) != last_problem:
                    report(f"waiting: {error}")
                last_problem = str(error)
                has_ended = False
            if has_ended:
                report("training has finished; the page is complete")
                return
            sleep(max(every_s, (time.monotonic() - began) / SHARE))
    except KeyboardInterrupt:
        report("stopped; the page stays as it was written last")
