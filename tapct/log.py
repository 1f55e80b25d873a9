"""What a run tells: lines and progress for people, metrics for files and trackers. Only rank 0 speaks and writes.

No torch, rich, TensorBoard or wandb at import: `tapct --help` loads this file.
"""

from __future__ import annotations

import functools
import json
import math
import os
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from tapct import ranks
from tapct.settings import setting

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LINE_SECONDS = 5.0  # plain progress lines are at least this far apart
SYNC_SECONDS = 10.0  # metrics are forced to the disk at most this often, and on close
BAR_SECONDS = 0.1


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = setting("disabled", "offline writes to RUN/wandb for `wandb sync`")
    project: str = setting("tapct", "project there")
    entity: str | None = setting(None, "user or team there; null: your default")
    name: str | None = setting(None, "name of the run there; null: name of the run folder")


@dataclass(frozen=True)
class Config:
    """Where the metrics of a run go besides metrics.jsonl."""

    every: int = setting(10, "steps between two fetches of the metrics from the device", ge=1)
    tensorboard: bool = setting(True, "write RUN/tensorboard")
    wandb: Wandb = field(default_factory=Wandb)


@functools.cache
def console() -> Console:
    """The one console of this process, on standard output; silent on all ranks but the first."""
    from rich.console import Console

    return Console(quiet=not ranks.from_environment(os.environ).is_first, highlight=False)


def say(text: str) -> None:
    """Print plain text as it is: no markup, no colours, no wrapping; beside a running bar, not through it."""
    out = console()
    out.print(_encodable(text, out), markup=False, soft_wrap=True)


def error(text: str) -> None:
    """Print `error: ...` to standard error, as one line; on a terminal it wraps between words only."""
    from rich.console import Console

    out = Console(stderr=True, highlight=False)
    place = ranks.from_environment(os.environ)
    line = f"error: {'' if place.is_first else f'[rank {place.rank}] '}{' '.join(text.split())}"
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    if out.is_terminal:
        line = textwrap.fill(line, max(out.width, 20), break_long_words=False, break_on_hyphens=False)
    out.print("error:", style="bold red", end="")
    out.print(_encodable(line.removeprefix("error:"), out), markup=False, soft_wrap=True)


def _encodable(text: str, out: Console) -> str:
    encoding = getattr(out.file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34, 5:06:07, or 2d 03:04."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of a job of known length: a bar on a terminal, a line now and then elsewhere.

    Args:
        description: one word, e.g. `pack`.
    Yields:
        A function to call with (done, total) as the job goes on; it is cheap.
    """
    with _Meter(description) as meter:
        yield lambda done, total: meter.show(done, total, meter.remaining(done, total))


class TrainProgress:
    """Progress of training: step, loss, samples per second and time left.

    Args:
        steps: number of the last step.
        start_step: steps that were done before.
        every: plain lines tell steps that are multiples of this, the first and the last.
    """

    def __init__(self, steps: int, start_step: int, every: int) -> None:
        self._steps, self._start, self._every = steps, start_step, every
        self._step_seconds = math.nan
        self._meter = _Meter("train")

    def __enter__(self) -> TrainProgress:
        self._meter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meter.__exit__(kind, error, trace)

    def update(self, row: Mapping[str, float]) -> None:
        """Tell one finished step, a row of metrics.jsonl."""
        step = int(row["step"])
        seconds = row.get("seconds/step", math.nan)
        # about the last 20 steps; the first ones are slower (warm-up of caches, workers, compilers)
        self._step_seconds = seconds if math.isnan(self._step_seconds) else 0.95 * self._step_seconds + 0.05 * seconds
        facts = f"loss {row['loss/total']:.4f}  {row.get('samples_per_second', math.nan):.1f} samples/s"
        left = (self._steps - step) * self._step_seconds
        wanted = step == self._start + 1 or step == self._steps or step % self._every == 0
        self._meter.show(step, self._steps, left, facts, line=wanted, at_once=step == self._start + 1)


class _Meter:
    """A bar on a terminal, else lines; without a thread, which a forking data loader would not like."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._began = time.monotonic()
        self._shown = -math.inf
        self._last: tuple[int, int] | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _Meter:
        if console().is_terminal and not console().quiet:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
            )
            self._bar = Progress(*columns, console=console(), auto_refresh=False)
            self._task = self._bar.add_task(self._description, total=None, facts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()

    def remaining(self, done: int, total: int) -> float:
        """Seconds that the rest takes at the pace so far."""
        return (total - done) * (time.monotonic() - self._began) / done if done else math.nan

    def show(
        self, done: int, total: int, left: float, facts: str = "", *, line: bool = True, at_once: bool = False
    ) -> None:
        """Bring the bar up to date, or print a line when one is due: the last always, others at intervals."""
        now, at_end = time.monotonic(), done >= total
        if self._last == (done, total):
            return
        words = [facts] if facts else []
        words.append(f"took {duration(now - self._began)}" if at_end else f"left {duration(left)}")
        due = at_end or at_once or now - self._shown >= (BAR_SECONDS if self._bar is not None else LINE_SECONDS)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, facts="  ".join(words), refresh=due)
        elif due and (line or at_end):
            say("  ".join([f"{self._description} {done}/{total}", *words]))
        else:
            return
        self._last = (done, total)
        self._shown = now if due else self._shown


class MetricsWriter:
    """Writes each step's metrics to RUN/metrics.jsonl, and to TensorBoard and wandb where the config asks for them.

    A run that goes on first drops the rows after `start_step` (and a row that was cut off), so that no step is told
    twice. A row is one write at the end of the file, whole or not at all. Does nothing on ranks other than the first.

    Args:
        run_dir: the run folder; its config.yaml, where there is one, is shown in wandb.
        config: the `log` section.
        start_step: finished steps that the run goes on from; 0 for a new run.
    Raises:
        OSError: the folder cannot be written, or wandb cannot start.
    """

    def __init__(self, run_dir: Path, config: Config, *, start_step: int = 0) -> None:
        self._file = -1
        self._trackers: list[Any] = []
        self._synced = time.monotonic()
        if not ranks.from_environment(os.environ).is_first:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        last = _drop_rows_after(path, start_step)
        if start_step and last != start_step:
            say(f"{path} ends at step {last}, the run goes on from {start_step}: the steps between are not in it")
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if config.tensorboard:
                self._trackers.append(_TensorBoard(run_dir / "tensorboard", start_step))
            if config.wandb.mode != "disabled":
                self._trackers.append(_Wandb(run_dir, config.wandb))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, row: Mapping[str, float]) -> None:
        """Write one finished step.

        Args:
            row: flat, with `step`; values that are not finite become null.
        Raises:
            OSError: the disk is full; the file still ends with a whole row.
        """
        if self._file < 0:
            return
        clean = {name: _json_number(name, value) for name, value in row.items()}
        _append(self._file, json.dumps(clean, allow_nan=False).encode() + b"\n")
        for tracker in self._trackers:
            tracker.write(clean)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Force what was written to the disk."""
        if self._file >= 0:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Flush and end all trackers; a second call does nothing."""
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
        while written < len(line):  # a nearly full disk takes a part, and refuses the rest
            written += os.write(file, line[written:])
    except OSError:
        os.ftruncate(file, end)
        raise


def _drop_rows_after(path: Path, step: int) -> int:
    """Rewrite metrics.jsonl without rows after `step` and without what is no row; returns the last step left."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    kept, last = [], 0
    for line in content.splitlines(keepends=True):
        try:
            found = int(json.loads(line)["step"]) if line.endswith(b"\n") else step + 1
        except (ValueError, TypeError, KeyError):  # cut off by a kill, or mangled by hand
            found = step + 1
        if found <= step:
            kept.append(line)
            last = max(last, found)
    if b"".join(kept) != content:
        aside = path.with_suffix(".jsonl.part")
        aside.write_bytes(b"".join(kept))
        aside.replace(path)
    return last


class _TensorBoard:
    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)  # hides what an earlier try wrote after it

    def write(self, row: Mapping[str, float | None]) -> None:
        for name, value in row.items():
            if name not in ("step", "time") and value is not None:
                self._writer.add_scalar(name, value, int(row["step"] or 0), walltime=row.get("time"))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, config: Wandb) -> None:
        import wandb
        import yaml

        identity = run_dir / "wandb" / "tapct_run_id"  # the same run there when this one goes on
        identity.parent.mkdir(exist_ok=True)
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        stored = run_dir / "config.yaml"
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
                config=yaml.safe_load(stored.read_text(encoding="utf-8")) if stored.exists() else None,
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except wandb.errors.Error as error:
            rule = "log in with `wandb login`, or set log.wandb.mode=offline"
            raise ConnectionError(f"log.wandb.mode = {config.mode}: {error}; {rule}") from error

    def write(self, row: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in row.items() if value is not None}
        self._run.log(known, step=int(row["step"] or 0))

    def close(self) -> None:
        self._run.finish()
        if self._offline:
            say(f"wandb kept this run here; where there is internet: wandb sync {self._folder}/offline-run-*")
