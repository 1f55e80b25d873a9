"""Write the metrics of every step to metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from tapct.base import jsonl, metric_names, ranks
from tapct.base.console import say
from tapct.config.fields import setting
from tapct.run_folder import RunFolder

# A row has 1.5 to 2 kB in metrics.jsonl and 2.5 kB in TensorBoard: together below 300 MB.
MOST_ROWS = 100_000
MOST_TENSORBOARD_ROWS = 25_000
BLOCK_BYTES = 1 << 18  # read at once from the end of metrics.jsonl
SYNC_SECONDS = 10.0  # metrics are forced to the disk at most this often, and on close


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = setting(
        "disabled",
        "Weights & Biases: disabled; offline writes to RUN/wandb for `wandb sync`; online",
    )
    project: str = setting("tapct", "project at wandb")
    entity: str | None = setting(None, "user or team at wandb; null: your default")
    name: str | None = setting(None, "name of the run at wandb; null: name of the run folder")


@dataclass(frozen=True)
class Config:
    """Where the metrics of a run go besides metrics.jsonl."""

    every: int = setting(
        10,
        "number of steps from one write of the metrics to the next; the metrics of all steps in "
        "between are then copied from the device together",
        ge=1,
    )
    metrics_every: int = setting(
        0,
        "number of steps from one row of metrics.jsonl to the next. 0: every step has a row; in a "
        "run of more than 100,000 steps, every 2nd, 5th, 10th, 20th ... step, so that the file "
        "has at most 100,000 rows. TensorBoard gets at most 25,000 of these rows",
        ge=0,
    )
    tensorboard: bool = setting(True, "whether the metrics are also written to RUN/tensorboard")
    wandb: Wandb = field(default_factory=Wandb)


def steps_between(most: int, num_steps: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... steps between two rows with which a run has no more
    rows than `most`.

    Args:
        most: largest number of rows.
        num_steps: steps of the run.
    """
    wanted, every = num_steps / most, 1
    while every < wanted:
        every = every * 5 // 2 if str(every)[0] == "2" else every * 2
    return every


class MetricsWriter:
    """Writes the metrics of steps to RUN/metrics.jsonl, and to TensorBoard and wandb where the
    config asks for them.

    A resumed run first drops the rows after `start_step`, and a row that was cut off, so that no
    step is logged twice. A row is one write at the end of the file, whole or not at all. Ranks
    other than the first write nothing. A step whose numbers are not all finite is always written,
    and so is the last step.

    Args:
        run_dir: run folder; its config.yaml, where there is one, is shown in wandb.
        config: section `log` of the config.
        start_step: finished steps that the run resumes from; 0 for a new run.
        num_steps: steps of the whole run; 0: unknown, and every step is written.
    Raises:
        OSError: the folder cannot be written, or wandb cannot start.
    """

    def __init__(
        self, run_dir: Path, config: Config, *, start_step: int = 0, num_steps: int = 0
    ) -> None:
        self._file = -1
        self._num_steps = num_steps
        self._every = config.metrics_every or steps_between(MOST_ROWS, num_steps)
        self._save_seconds = 0.0  # of steps that were not written
        self._trackers: list[Any] = []
        self._synced = time.monotonic()
        if not ranks.from_environment(os.environ).is_first:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(run_dir)
        path = folder.metrics
        last = _drop_rows_after(path, start_step)
        if start_step and start_step - last >= self._every:
            say(
                f"{path} ends at step {last} and the run resumes from step {start_step}; the "
                "steps between them are missing in the file"
            )
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if config.tensorboard:
                every = max(self._every, steps_between(MOST_TENSORBOARD_ROWS, num_steps))
                self._trackers.append(_TensorBoard(folder.tensorboard, start_step, every))
            if config.wandb.mode != "disabled":
                self._trackers.append(_Wandb(run_dir, config.wandb))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, row: Mapping[str, float]) -> None:
        """Write one finished step, if it is due.

        Args:
            row: metric name -> value, with `step`; values that are not finite become null.
        Raises:
            OSError: the disk is full; the file still ends with a whole row.
        """
        if self._file < 0:
            return
        clean = {name: _json_number(name, value) for name, value in row.items()}
        is_due = int(row["step"]) % self._every == 0 or int(row["step"]) == self._num_steps
        saving = metric_names.seconds("save")
        if not is_due and None not in clean.values():
            self._save_seconds += row.get(saving, 0.0)
            return
        if self._save_seconds:  # each save is counted once, in the next row
            clean[saving] = self._save_seconds + row.get(saving, 0.0)
            self._save_seconds = 0.0
        _append(self._file, json.dumps(clean, allow_nan=False).encode() + b"\n")
        for tracker in self._trackers:
            tracker.write(clean)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Force the rows that were written to the disk."""
        if self._file >= 0:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Flush and close all trackers; a second call does nothing."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1
        while self._trackers:
            self._trackers.pop().close()


def _json_number(name: str, value: float) -> float | int | None:
    if name in ("step", "samples"):
        return int(value)
    return value if math.isfinite(value) else None


def _append(file: int, line: bytes) -> None:
    end = os.fstat(file).st_size
    try:
        written = os.write(file, line)
        while written < len(line):  # a nearly full disk takes a part and refuses the rest
            written += os.write(file, line[written:])
    except OSError:
        os.ftruncate(file, end)
        raise


def _drop_rows_after(path: Path, step: int) -> int:
    """Cut metrics.jsonl off after the row of a step, together with a line that is no row.

    The file is read from its end, so that a start costs the same however long the run is.

    Returns:
        The last step that is left; 0 where none is.
    """
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        whole, last = _end_of_row(file, end, step) if step else (0, 0)
        if whole < end:
            file.truncate(whole)
            os.fsync(file.fileno())
    return last


def _end_of_row(file: BinaryIO, end: int, step: int) -> tuple[int, int]:
    """The offset behind the last whole row whose step is not above `step`, and its step; (0, 0)
    where there is none.

    Args:
        file: open metrics.jsonl.
        end: offset behind the lines to look at.
        step: finished steps.
    """
    rest, start = b"", end  # the beginning of a line that began before the block
    while start:
        size = min(BLOCK_BYTES, start)
        start -= size
        file.seek(start)
        block = file.read(size) + rest
        lines = block.splitlines(keepends=True)
        at = start + len(block)
        for number in range(len(lines) - 1, -1, -1):
            line = lines[number]
            if number == 0 and start:
                rest = line
                break
            # a row without its line break may parse, but the next row would be appended to it
            row = jsonl.parse(line) if line.endswith(b"\n") else None
            finished = row.get("step") if row is not None else None
            if isinstance(finished, int | float) and finished <= step:
                return at, int(finished)
            at -= len(line)
    return 0, 0


class _TensorBoard:
    def __init__(self, folder: Path, start_step: int, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._every = every
        # TensorBoard then hides the steps that an earlier start wrote after the checkpoint
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, row: Mapping[str, float | None]) -> None:
        if int(row["step"] or 0) % self._every and None not in row.values():
            return
        for name, value in row.items():
            if name not in ("step", "time") and value is not None:
                self._writer.add_scalar(
                    name, value, int(row["step"] or 0), walltime=row.get("time")
                )

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, config: Wandb) -> None:
        import wandb
        import yaml

        folder = RunFolder(run_dir)
        identity = folder.wandb_run_id  # a resumed run must be the same run there
        identity.parent.mkdir(exist_ok=True)
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        stored = folder.config
        self._offline, self._folder = config.mode == "offline", identity.parent
        try:
            self._run = wandb.init(
                mode=config.mode,
                project=config.project,
                entity=config.entity,
                name=config.name or run_dir.resolve().name,
                id=identity.read_text(),
                resume="allow",
                dir=str(run_dir),
                config=yaml.safe_load(stored.read_text(encoding="utf-8"))
                if stored.exists()
                else None,
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, save_code=False
                ),
            )
        except wandb.errors.Error as error:
            rule = "log in with `wandb login`, or set log.wandb.mode=offline"
            raise ConnectionError(f"log.wandb.mode = {config.mode}: {error}; {rule}") from error

    def write(self, row: Mapping[str, float | None]) -> None:
        finite = {name: value for name, value in row.items() if value is not None}
        self._run.log(finite, step=int(row["step"] or 0))

    def close(self) -> None:
        self._run.finish()
        if self._offline:
            say(
                "wandb stored this run offline; to upload it from a machine with internet, run: "
                f"wandb sync {self._folder}/offline-run-*"
            )
