"""Print lines, errors and progress for people; lines and progress come from the first rank only.

No torch, rich or numpy at import: `tapct --help` loads this file.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from tapct.base import ranks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


LINE_SECONDS = 5.0  # plain progress lines are at least this far apart
NARROW = 60  # columns of a terminal below which there are numbers and no bar
BAR_SECONDS = 0.1
PACE_SECONDS = 60.0  # over which the pace of a job is measured


@functools.cache
def console() -> Console:
    """Return the console of this process, on standard output; it prints on the first rank only."""
    from rich.console import Console

    return Console(quiet=not ranks.for_output(os.environ).is_first, highlight=False, emoji=False)


def say(text: str) -> None:
    """Print plain text: no markup, no colours, no wrapping; beside a running bar, not through it.

    Characters that a terminal would obey, such as ESC, are escaped, since names of files may hold
    them; only the ends of lines are kept.
    """
    out = console()
    lines = "\n".join(printable(line) for line in text.split("\n"))
    out.print(_encodable(lines, out), markup=False, soft_wrap=True)


def say_line(text: str) -> None:
    """Print one line as `say` does, with escapes also in place of the ends of lines that the name
    of a file may hold.
    """
    say(printable(text))


def printable(text: str) -> str:
    """Text with escapes in place of characters that a terminal would obey, such as ESC."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def error(text: str) -> None:
    """Print `error: ...` to standard error, as one line; on a terminal it wraps between words
    only.
    """
    from rich.console import Console

    out = Console(stderr=True, highlight=False, emoji=False)
    place = ranks.for_output(os.environ)
    line = f"error: {'' if place.is_first else f'[rank {place.rank}] '}{' '.join(text.split())}"
    line = printable(line)
    if out.is_terminal:
        line = textwrap.fill(
            line, max(out.width, 20), break_long_words=False, break_on_hyphens=False
        )
    out.print("error:", style="bold red", end="")
    out.print(_encodable(line.removeprefix("error:"), out), markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print `warning: ...` to standard error, as one line; only the first rank does."""
    if ranks.for_output(os.environ).is_first:
        print(f"warning: {printable(' '.join(text.split()))}", file=sys.stderr, flush=True)


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
def progress_bar(description: str, item: str = "") -> Iterator[Callable[[int, int], None]]:
    """Show progress of a job of known length: a bar on a terminal, a line now and then elsewhere.

    Args:
        description: name of the job in one word, e.g. `pack`.
        item: what is counted, e.g. `scan`, to show the rate; empty to leave it out.
    Yields:
        Function to call with (done, total) whenever an item is done; a call is cheap.
    """
    with _Meter(description) as meter:
        yield lambda done, total: meter.show(
            done, total, meter.remaining(done, total), meter.rate(done, item) if item else ""
        )


class ListingProgress:
    """Shows progress of a job that first reads files while it lists them, and then works on what it
    found: number, pace and time left, first of files, then of items. The first line comes at once.

    Args:
        description: name of the job in one word, e.g. `index`.
        unit: what the job works on, in the plural, e.g. `scans`.
    """

    def __init__(self, description: str, unit: str) -> None:
        self._unit = unit
        self._meter = _Meter(description)
        self._files, self._items = _Pace(), _Pace()
        self._files.rate(0)  # files are read from now on

    def __enter__(self) -> ListingProgress:
        self._meter.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._meter.__exit__(kind, error, trace)

    def listed(self, done: int, total: int, is_all: bool = False) -> None:
        """Show the number of files that have been read, and the pace of the last minute.

        Args:
            done: files that have been read, or are known from before.
            total: files that were found so far.
            is_all: whether these are all files, so that the time left is known.
        """
        if not total:
            return
        rate = self._files.rate(done)
        parts = [f"{done} of {'' if is_all else 'at least '}{total} files"]
        if rate > 0:
            left = duration((total - done) / rate)
            pace = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
            parts += [f"{pace} files/s", f"left {'' if is_all else 'at least '}{left}"]
        self._meter.show_count(*parts)

    def update(self, done: int, total: int) -> None:
        """Show the number of finished items, and the pace of the last minute."""
        is_first = self._items.is_empty
        rate = self._items.rate(done)
        left = (total - done) / rate if rate > 0 else math.nan
        facts = f"{rate:.3g} {self._unit}/s"
        self._meter.show(done, total, left, facts, at_once=is_first)


class _Pace:
    """The pace of a job over the last minute."""

    def __init__(self) -> None:
        self._paces: deque[tuple[float, int]] = deque()  # times and numbers of finished items

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been counted yet."""
        return not self._paces

    def rate(self, done: int) -> float:
        """Items per second; 0 at first.

        Args:
            done: number of items that are finished now.
        """
        now = time.monotonic()
        if not self._paces or now - self._paces[-1][0] > PACE_SECONDS / 60:
            self._paces.append((now, done))
        while len(self._paces) > 1 and now - self._paces[0][0] > PACE_SECONDS:
            self._paces.popleft()
        since, before = self._paces[0]
        return (done - before) / (now - since) if now > since else 0.0


class TrainProgress:
    """Shows progress of training: step, loss, samples per second and time left.

    Args:
        steps: number of the last step.
        start_step: steps that were finished before this start.
        every: steps between two plain lines; the first and the last step are printed too.
    """

    def __init__(self, steps: int, start_step: int, every: int) -> None:
        self._steps, self._start, self._every = steps, start_step, every
        self._step_seconds = math.nan
        self._meter = _Meter("train")

    def __enter__(self) -> TrainProgress:
        self._meter.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._meter.__exit__(kind, error, trace)

    def update(self, row: Mapping[str, float]) -> None:
        """Show one finished step.

        Args:
            row: its row of metrics.jsonl.
        """
        step = int(row["step"])
        seconds = row.get("seconds/step", math.nan)
        # about the last 20 steps; the first ones are slower (warm-up of caches, workers, compilers)
        self._step_seconds = (
            seconds
            if math.isnan(self._step_seconds)
            else 0.95 * self._step_seconds + 0.05 * seconds
        )
        facts = (
            f"loss {row['loss/total']:.4f}  {row.get('samples_per_second', math.nan):.1f} samples/s"
        )
        left = (self._steps - step) * self._step_seconds
        is_chosen = step == self._start + 1 or step == self._steps or step % self._every == 0
        self._meter.show(
            step, self._steps, left, facts, line=is_chosen, at_once=step == self._start + 1
        )


class _Meter:
    """A bar on a terminal, else lines. It runs no thread, because a thread that holds a lock while
    the data loader forks would leave the child without a way to release it.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._began = time.monotonic()
        self._shown = -math.inf
        self._last: tuple[int, int] | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _Meter:
        if console().is_terminal and not console().quiet:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                ProgressColumn,
                TextColumn,
            )

            columns: list[ProgressColumn] = [TextColumn("{task.description}")]
            if console().width >= NARROW:  # else it would take the place of the numbers
                columns.append(BarColumn())
            columns += [MofNCompleteColumn(), TextColumn("{task.fields[facts]}")]
            self._bar = Progress(*columns, console=console(), auto_refresh=False)
            self._task = self._bar.add_task(self._description, total=None, facts="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()

    def show_count(self, *facts: str) -> None:
        """Show facts about a job whose length is not known yet, when a line is due."""
        now = time.monotonic()
        if now - self._shown < (BAR_SECONDS if self._bar is not None else LINE_SECONDS):
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=0, facts="  ".join(facts), refresh=True)
        else:
            say("  ".join([self._description, *facts]))
        self._shown = now

    def remaining(self, done: int, total: int) -> float:
        """Estimate the seconds that are left, from the mean pace so far."""
        return (total - done) * (time.monotonic() - self._began) / done if done else math.nan

    def rate(self, done: int, item: str) -> str:
        """Items per second, or seconds per item, from the mean pace so far."""
        seconds = time.monotonic() - self._began
        if not done or seconds <= 0:
            return ""
        if done >= seconds:
            return f"{done / seconds:.1f} {item}s/s"
        return f"{seconds / done:.1f} s/{item}"

    def show(
        self,
        done: int,
        total: int,
        left: float,
        facts: str = "",
        *,
        line: bool = True,
        at_once: bool = False,
    ) -> None:
        """Update the bar, or print a line when one is due.

        Args:
            done: finished items.
            total: all items.
            left: estimate of the seconds that are left.
            facts: further text, e.g. the loss.
            line: whether this item may be printed as a line; the last one always is.
            at_once: whether it is printed even if the line before it is recent.
        """
        now, at_end = time.monotonic(), done >= total
        if self._last == (done, total):
            return
        parts = [facts] if facts else []
        parts.append(f"took {duration(now - self._began)}" if at_end else f"left {duration(left)}")
        due = (
            at_end
            or at_once
            or now - self._shown >= (BAR_SECONDS if self._bar is not None else LINE_SECONDS)
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=done, total=total, facts="  ".join(parts), refresh=due
            )
        elif due and (line or at_end):
            say("  ".join([f"{self._description} {done}/{total}", *parts]))
        else:
            return
        self._last = (done, total)
        self._shown = now if due else self._shown
