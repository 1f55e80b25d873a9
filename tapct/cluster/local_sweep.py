"""`tapct sweep`: the runs of a sweep on this machine, some at a time, in the folders that
`tapct submit --sweep` makes.

SWEEP/lr=1e-3/jobs/<time>/   config.yaml and log.txt of a run
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from tapct.base import console, files, jsonl, lease, ranks
from tapct.base.exits import UserError, single_line
from tapct.cluster import sweep
from tapct.cluster.folders import make_new_folder
from tapct.cluster.jobs import step_and_loss
from tapct.cluster.submit import PlannedRuns
from tapct.eval.results import best_record
from tapct.eval.results.best_record import BestRecord
from tapct.eval.results.terminal import shown
from tapct.run.pretrain import check
from tapct.run_folder import JobFolder, RunFolder

if TYPE_CHECKING:
    from rich.table import Table

STOP_SECONDS = 120.0  # within which a run that is stopped must have saved


@dataclass(frozen=True)
class RunEnd:
    """How a run of a sweep ended.

    Args:
        run: run folder.
        code: exit code of `tapct train`.
        why: last error line of its log; empty where it succeeded.
    """

    run: Path
    code: int
    why: str = ""


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of all runs, and those with several values.

    Args:
        words: texts `key=value` or `key=value,value`; commas in brackets or quotes belong to a
            value.
    Returns:
        Overrides, and arguments for `sweep.product`.
    """
    common: list[str] = []
    axes: list[str] = []
    for word in words:
        _, _, listed = word.partition("=")
        (axes if len(sweep.split_outside(listed, ",")) > 1 else common).append(word)
    return common, axes


def check_runs(planned: PlannedRuns) -> list[str]:
    """Refuse a sweep of which one run could not start.

    Returns:
        Warnings, each once.
    Raises:
        UserError: a run could not start, or another process writes its folder.
    """
    warnings: dict[str, None] = {}
    for run in planned.runs:
        warnings.update(dict.fromkeys(check(run).warnings, None))
    holders = lease.living_holders([RunFolder(folder).lease for folder in planned.folders])
    for folder, holder in zip(planned.folders, holders, strict=True):
        if holder is not None:
            raise UserError(
                f"{folder} is being written by another process ({holder.described()}); wait "
                "for it, end it, or choose another out="
            )
    return list(warnings)


def train_all(
    planned: PlannedRuns, parallel: int, say: Callable[[str], object] = console.say
) -> list[RunEnd]:
    """Train all runs, some at a time; a run that fails does not stop the others.

    At Ctrl-C, or at SIGTERM within `signals.leaving_at_sigterm`, the runs save and end, and no
    further one starts.

    Args:
        planned: runs, each of which `check_runs` has accepted.
        parallel: number of runs that train at the same time.
        say: function that prints a line.
    Returns:
        Outcomes in the order of the runs.
    Raises:
        KeyboardInterrupt: Ctrl-C, after all runs have ended.
    """
    training = _Training(planned, parallel, say)
    with ThreadPoolExecutor(parallel, thread_name_prefix="tapct-sweep") as pool:
        tasks = [pool.submit(training.train, number) for number in range(len(planned.runs))]
        try:
            return [task.result() for task in tasks]
        except BaseException:
            training.stop()
            raise


class _Training:
    """The processes of a sweep; threads share it, one per run that trains.

    Args:
        planned, parallel, say: as in `train_all`.
    """

    def __init__(self, planned: PlannedRuns, parallel: int, say: Callable[[str], object]) -> None:
        self.planned, self.parallel, self.say = planned, parallel, say
        self.name = time.strftime("%Y%m%d-%H%M%S")
        self.places: SimpleQueue[int] = SimpleQueue()  # numbers of the runs that may train now
        for place in range(parallel):
            self.places.put(place)
        self.is_over = False
        # held while a run starts, so that none starts unseen while the others are stopped
        self.starting = threading.Lock()
        self.running: set[subprocess.Popen[bytes]] = set()

    def train(self, number: int) -> RunEnd:
        """Train one run, once there is a place for it.

        Args:
            number: its number in the sweep, from 0.
        """
        run = self.planned.runs[number]
        place = self.places.get()
        try:
            if self.is_over:
                return self._not_started(number)
            with contextlib.ExitStack() as undo:
                folder = make_new_folder(RunFolder(run.value.out).jobs, self.name, undo)
                undo.pop_all()
            files.write_atomically(JobFolder(folder).config, run.to_yaml())
            log = JobFolder(folder).log
            self.say(f"run {number + 1} of {len(self.planned.runs)}: {run.value.out}, log in {log}")
            process = self._start(JobFolder(folder).config, log, place)
            if process is None:
                return self._not_started(number)
            code = process.wait()
            self.running.discard(process)
        finally:
            self.places.put(place)
        why = "" if code == 0 else last_error(log)
        if code:
            self.say(f"{run.value.out} ended with exit code {code}: {why}")
        return RunEnd(run.value.out, code, why)

    def _start(self, config: Path, log: Path, place: int) -> subprocess.Popen[bytes] | None:
        """The process of a run; None if the sweep was stopped before it started."""
        with log.open("wb") as out, self.starting:
            if self.is_over:
                return None
            # of a session of its own: Ctrl-C reaches it through this process alone
            process = subprocess.Popen(
                [sys.executable, "-m", "tapct", "train", str(config)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment_of(os.environ, place, self.parallel),
                start_new_session=True,
            )
            self.running.add(process)
        return process

    def _not_started(self, number: int) -> RunEnd:
        return RunEnd(self.planned.runs[number].value.out, -signal.SIGINT, "not started")

    def stop(self) -> None:
        """Let all runs save and end, and start no further one; returns when they have ended."""
        with self.starting:
            self.is_over = True
            started = list(self.running)
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            if process.poll() is None:
                process.kill()


def environment_of(environment: Mapping[str, str], place: int, parallel: int) -> dict[str, str]:
    """Environment of one of several runs: its share of the CPU cores and of the GPUs.

    Args:
        environment: environment variables of this process.
        place: number of the run among those that train at the same time.
        parallel: how many these are.
    """
    own = {**ranks.without_place(environment), ranks.IN_SWEEP: "1"}
    cores = len(os.sched_getaffinity(0))
    own.setdefault("OMP_NUM_THREADS", str(max(1, cores // parallel)))
    cards = visible_gpus(environment)
    if parallel > 1 and cards:
        own["CUDA_VISIBLE_DEVICES"] = cards[place % len(cards)]
    return own


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES has them; none where there is no GPU.

    Args:
        environment: environment variables of this process.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    try:
        names = [path.name for path in Path("/proc/driver/nvidia/gpus").iterdir()]
    except OSError:
        return []
    return [str(number) for number in range(len(names))]


def last_error(log: Path) -> str:
    """The last error line of a log, or else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    chosen = (errors or lines or ["no output"])[-1]
    return single_line(chosen.removeprefix("error: "), 300)


@dataclass(frozen=True)
class Ranked:
    """A run of a sweep in the table of its results.

    Args:
        run: run folder.
        record: evaluated headline; None where nothing was evaluated.
        step: finished steps.
        loss: total loss at the end; NaN where there is none.
    """

    run: Path
    record: BestRecord | None
    step: int
    loss: float

    @property
    def best(self) -> float:
        """Best value of the headline; NaN where there is none."""
        if self.record is None or self.record.best is None:
            return math.nan
        return self.record.values[self.record.best]


def ranked(folders: Sequence[Path]) -> list[Ranked]:
    """Runs by the best value of their evaluated headline, the best first; below them the runs
    without one, by their loss.

    A loss does not compare runs with different losses or temperatures, so it only orders what
    nothing else does. Headlines of other tasks than that of the first run count as none.

    Args:
        folders: run folders.
    """
    rows = list(map(read_result, folders))
    known = [row for row in rows if not math.isnan(row.best)]
    first = known[0].record if known else None

    def order(row: Ranked) -> tuple[bool, float, float]:
        loss = math.inf if math.isnan(row.loss) else row.loss
        if first is None or row.record is None or math.isnan(row.best):
            return True, 0.0, loss
        if (row.record.task, row.record.metric) != (first.task, first.metric):
            return True, 0.0, loss
        return False, -row.best if first.direction == "higher" else row.best, loss

    return sorted(rows, key=order)


def read_result(run: Path) -> Ranked:
    """The result of a run as far as it has come."""
    step, loss = step_and_loss(jsonl.read_tail(RunFolder(run).metrics, "step"))
    return Ranked(run, best_record.read(run), step, loss)


def result_table(rows: Sequence[Ranked]) -> Table:
    """The table of the results of a sweep."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("run", overflow="fold", min_width=12)
    records = [row.record for row in rows if row.record is not None]
    columns = ["steps", "loss"]
    if records:
        columns = [f"{records[0].task} {records[0].metric}", "at step", *columns]
    for name in columns:
        table.add_column(name, justify="right")
    for number, row in enumerate(rows, start=1):
        evaluated = []
        if records:
            evaluated = ["", ""]
        if row.record is not None and row.record.best is not None:
            evaluated = [shown(row.best), str(row.record.best)]
        loss = "" if math.isnan(row.loss) else f"{row.loss:.3f}"
        table.add_row(str(number), os.path.relpath(row.run), *evaluated, str(row.step), loss)
    return table


def lines_about(planned: PlannedRuns, outcomes: Sequence[RunEnd]) -> Iterator[str]:
    """What to do next, and which runs failed."""
    failed = [outcome for outcome in outcomes if outcome.code]
    for outcome in failed:
        yield f"failed: {outcome.run}: {outcome.why}"
    yield f"compare: tapct compare {shlex.quote(str(planned.root))}/*=*"
    if not any(best_record.read(folder) for folder in planned.folders):
        yield (
            "the runs were not evaluated, so they are ordered by their loss, which does not "
            "compare different losses; set eval.during.every, or run tapct eval for each"
        )
