"""What people see of a run, on a terminal and elsewhere."""

from __future__ import annotations

import errno
import math
import os
import pty
import select
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest

from tapct.base import console

LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
)


@pytest.fixture(autouse=True)
def fresh_console(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    console.console.cache_clear()
    yield
    console.console.cache_clear()


def row(step: int, loss: float = 1.5, **more: float) -> dict[str, float]:
    return {
        "step": step,
        "samples": step * 8,
        "loss/total": loss,
        "seconds/step": 0.5,
        "samples_per_second": 16.0,
    } | more


def on_a_terminal(code: str, columns: int = 80) -> str:
    """What a program prints on a real terminal of that width."""
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in (*LAUNCHERS, "COLUMNS", "NO_COLOR")
    }
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"TERM": "xterm"},
    )
    os.close(theirs)
    seen = b""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError as error:  # so Linux reports the end of a terminal
                if error.errno != errno.EIO:
                    raise
                break
            if not part:
                break
            seen += part
    assert program.wait(timeout=60) == 0, seen.decode()
    os.close(ours)
    return seen.decode()


def test_log_is_light_enough_for_the_help_text() -> None:
    code = "import sys, tapct.base.console; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "tensorboard", "wandb", "omegaconf", "rich.progress"} & set(
        done.stdout.split()
    )


def test_an_error_is_one_plain_line_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    console.error("configs/[bold]a:b:.yaml:3: a\nb " + "word " * 60 + "\x1b[31m")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: configs/[bold]a:b:.yaml:3: a b " + "word " * 60 + "\\x1b[31m\n"


def test_an_error_breaks_between_words_only_on_a_narrow_terminal() -> None:
    words = [
        "volume",
        "/a/very/long/path/of/some/scan-with-hyphens-in-it.nii.gz",
        *(f"word{i}" for i in range(20)),
    ]
    seen = on_a_terminal(
        f"from tapct.base import console; console.error({' '.join(words)!r})", columns=30
    )
    plain = seen.replace("\x1b[1;31m", "").replace("\x1b[0m", "")
    lines = plain.replace("\r", "").splitlines()
    assert len(lines) > 4
    assert " ".join(lines).split() == ["error:", *words]
    assert all(len(line) <= 30 for line in lines if "/a/very" not in line)


def test_text_that_the_stream_cannot_hold_is_escaped() -> None:
    code = (
        "from tapct.base import console; console.say('tête \\udcff'); console.error('tête \\udcff')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "t\\xeate \\udcff\n"
    assert done.stderr == "error: t\\xeate \\udcff\n"


def test_say_neither_wraps_nor_reads_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("[red]a:b:" + "x" * 300 + " 12")
    assert capsys.readouterr().out == "[red]a:b:" + "x" * 300 + " 12\n"


def test_only_the_first_rank_prints_but_errors_of_all_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    console.say("hello")
    with console.TrainProgress(3, 0, 1) as progress, console.progress_bar("pack") as bar:
        progress.update(row(1))
        bar(1, 1)
    console.error("no such file")
    assert capsys.readouterr() == ("", "error: [rank 3] no such file\n")


def test_plain_progress_prints_the_end_and_not_every_item(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.progress_bar("pack") as progress:
        for done in range(1, 1001):
            progress(done, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("pack 1000/1000  took 0:0")
    assert len(lines) <= 3


def test_plain_progress_of_training_prints_chosen_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10**6, 2))  # every look at the clock is two seconds after the one before
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.TrainProgress(25, 4, 10) as progress:
        for step in range(5, 26):
            progress.update(row(step, loss=step / 2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["5/25", "10/25", "20/25", "25/25"]
    assert (
        lines[1] == "train 10/25  loss 5.0000  16.0 samples/s  left 0:08"
    )  # 15 steps of half a second


def test_a_terminal_gets_a_bar_with_step_loss_pace_and_time_left() -> None:
    seen = on_a_terminal(
        """
        from tapct.base import console
        with console.TrainProgress(500, 0, 10) as progress:
            for step in range(1, 21):
                row = {"step": step, "loss/total": 9.25, "seconds/step": 0.5}
                progress.update(row | {"samples_per_second": 16.0})
                if step == 5:
                    console.say("saved [step] 5")
        """,
        columns=120,
    )
    assert "20/500" in seen.rpartition("train")[2]
    assert "loss 9.2500  16.0 samples/s" in seen
    assert "left 4:00" in seen  # 480 steps of half a second
    assert "━" in seen
    assert "saved [step] 5" in seen


def test_listing_shows_files_first_and_then_items_with_their_pace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.ListingProgress("index", "scans") as progress:
        progress.listed(0, 0)  # nothing to show yet
        progress.listed(0, 700)
        clock[0] += 2
        progress.listed(500, 2000)  # too soon for another line
        clock[0] += 8
        progress.listed(600, 1800)
        clock[0] += 10
        progress.listed(1200, 1800, is_all=True)
        for done in range(1, 5):  # what was known takes no time
            progress.update(done, 104)
        clock[0] += 10
        progress.update(24, 104)
        clock[0] += 0.1
        progress.update(104, 104)
    assert capsys.readouterr().out.splitlines() == [
        "index  0 of at least 700 files",
        "index  600 of at least 1800 files  60 files/s  left at least 0:20",
        "index  1200 of 1800 files  60 files/s  left 0:10",
        "index 1/104  0 scans/s  left ?",
        "index 24/104  2.3 scans/s  left 0:35",
        "index 104/104  10.2 scans/s  took 0:30",
    ]


def test_a_narrow_terminal_gets_the_numbers_without_a_bar() -> None:
    seen = on_a_terminal(
        """
        from tapct.base import console
        with console.progress_bar("embed", "scan") as progress:
            for number in range(1, 25):
                progress(number, 24)
        """,
        columns=40,
    )
    assert "24/24" in seen and "scans/s" in seen and "took 0:00" in seen and "━" not in seen


def test_durations_read_well() -> None:
    given = (0.4, 59.6, 754, 3599.7, 18367, 183870, math.inf, math.nan, -3.0)
    shown = ["0:00", "1:00", "12:34", "1:00:00", "5:06:07", "2d 03:04", "?", "?", "0:00"]
    assert [console.duration(seconds) for seconds in given] == shown


def test_control_characters_of_a_file_name_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "new\nline\x1b[31m\x07\r\x9b.nii.gz"
    console.say(f"first {name}")
    console.say_line(f"second {name}")
    console.warn(f"third {name}")
    out, err = capsys.readouterr()
    escaped = r"line\x1b[31m\x07\r\x9b.nii.gz"
    assert out == f"first new\n{escaped}\nsecond new\\n{escaped}\n"
    assert "third new line" in err
    assert (out + err).replace("\n", "").isprintable()
