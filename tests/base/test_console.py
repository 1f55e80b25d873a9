"""Log: what people see on a terminal and elsewhere, and what is left in the run folder."""

from __future__ import annotations

import errno
import json
import math
import os
import pty
import select
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tapct.base import console, ranks
from tapct.engine import trackers

LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
)
QUIET = trackers.Config(tensorboard=False)


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


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
            except OSError as error:  # Linux tells the end of a terminal so
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
    console.error("configs/[bold]a.yaml:3: a\nb " + "word " * 60 + "\x1b[31m")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: configs/[bold]a.yaml:3: a b " + "word " * 60 + "\\x1b[31m\n"


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
    console.say("[red]" + "x" * 300 + " 12")
    assert capsys.readouterr().out == "[red]" + "x" * 300 + " 12\n"


def test_only_the_first_rank_speaks_but_errors_of_all_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    console.say("hello")
    with console.TrainProgress(3, 0, 1) as progress, console.progress_bar("pack") as bar:
        progress.update(row(1))
        bar(1, 1)
    with trackers.MetricsWriter(tmp_path / "run", QUIET) as writer:
        writer.write(row(1))
        writer.flush()
    console.error("no such file")
    assert capsys.readouterr() == ("", "error: [rank 3] no such file\n")
    assert not (tmp_path / "run").exists()


def test_plain_progress_tells_the_end_and_not_every_item(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.progress_bar("pack") as progress:
        for done in range(1, 1001):
            progress(done, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("pack 1000/1000  took 0:0")
    assert len(lines) <= 3


def test_plain_progress_of_training_tells_chosen_steps(
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
                progress.update({"step": step, "loss/total": 9.25, "seconds/step": 0.5, "samples_per_second": 16.0})
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


def test_durations_read_well() -> None:
    given = (0.4, 59.6, 754, 3599.7, 18367, 183870, math.inf, math.nan, -3.0)
    told = ["0:00", "1:00", "12:34", "1:00:00", "5:06:07", "2d 03:04", "?", "?", "0:00"]
    assert [console.duration(seconds) for seconds in given] == told


def test_metrics_are_one_strict_json_object_per_step(tmp_path: Path) -> None:
    with trackers.MetricsWriter(tmp_path, QUIET) as writer:
        writer.write(row(1.0, loss=0.1 + 0.2) | {"samples": 8.0})  # type: ignore[arg-type]
        writer.write(row(2, loss=math.nan, other=math.inf))
    first, second = rows(tmp_path)
    assert first["loss/total"] == 0.1 + 0.2
    assert (type(first["step"]), type(first["samples"])) == (int, int)
    assert (second["loss/total"], second["other"]) == (None, None)


def test_going_on_drops_the_rows_after_the_checkpoint_and_cut_off_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trackers.MetricsWriter(tmp_path, QUIET) as writer:
        for step in range(1, 8):
            writer.write(row(step))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + b'{"step": 8, "loss/to')
    with trackers.MetricsWriter(tmp_path, QUIET, start_step=5) as writer:
        writer.write(row(6, loss=7.0))
    assert [(one["step"], one["loss/total"]) for one in rows(tmp_path)] == [
        *((i, 1.5) for i in range(1, 6)),
        (6, 7.0),
    ]
    assert capsys.readouterr().out == ""
    with trackers.MetricsWriter(tmp_path, QUIET, start_step=0) as writer:
        writer.write(row(1))
    assert [one["step"] for one in rows(tmp_path)] == [1]


def test_a_row_without_its_end_is_dropped_even_if_it_parses(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with trackers.MetricsWriter(tmp_path, QUIET, start_step=2) as writer:
        writer.write(row(3))
    assert [one["step"] for one in rows(tmp_path)] == [1, 3]


def test_missing_steps_before_the_start_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    trackers.MetricsWriter(tmp_path, QUIET, start_step=4).close()
    assert "ends at step 1, the run goes on from 4" in capsys.readouterr().out


def test_a_full_disk_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = trackers.MetricsWriter(tmp_path, QUIET)
    writer.write(row(1))
    whole = os.write
    calls: list[int] = []

    def short(file: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return whole(file, data[:7])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(console.os, "write", short)
    with pytest.raises(OSError, match="No space left"):
        writer.write(row(2))
    monkeypatch.undo()
    writer.close()
    assert [one["step"] for one in rows(tmp_path)] == [1]


def test_rows_are_in_the_file_before_the_writer_is_closed(tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        from tapct.engine import trackers
        writer = trackers.MetricsWriter(Path({str(tmp_path)!r}), trackers.Config(tensorboard=False))
        writer.write({{"step": 1, "loss/total": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert [one["step"] for one in rows(tmp_path)] == [1]


def scalars(folder: Path) -> Mapping[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(one.step, one.value) for one in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_each_step_once_after_going_on(tmp_path: Path) -> None:
    with trackers.MetricsWriter(tmp_path, trackers.Config()) as writer:
        for step in range(1, 5):
            writer.write(row(step, time=1e9 + step))
    time.sleep(1.1)  # TensorBoard orders its files by their second
    with trackers.MetricsWriter(tmp_path, trackers.Config(), start_step=2) as writer:
        writer.write(row(3, loss=9.0) | {"ce/dino_global": math.nan})
    found = scalars(tmp_path)
    assert found["loss/total"] == [(1, 1.5), (2, 1.5), (3, 9.0)]
    assert "ce/dino_global" not in found and "step" not in found and "time" not in found
    assert not (tmp_path / "wandb").exists()


@pytest.mark.slow
def test_wandb_works_offline_and_goes_on_under_the_same_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    config = trackers.Config(tensorboard=False, wandb=trackers.Wandb(mode="offline", name="mine"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("optim: {lr: 0.1}\n")
    names = []
    for start in (0, 2):
        with trackers.MetricsWriter(folder, config, start_step=start) as writer:
            writer.write(row(start + 1))
            writer.write(row(start + 2, loss=math.nan))
        names.append((folder / "wandb" / "tapct_run_id").read_text())
    assert names[0] == names[1]
    stored = list(folder.glob(f"wandb/offline-run-*/run-{names[0]}.wandb"))
    assert len(stored) == 2
    assert all(path.stat().st_size > 200 for path in stored)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ranks.Ranks(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ranks.Ranks(3, 4, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, ranks.Ranks(3, 4, 0)),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"},
            ranks.Ranks(5, 8, 1),
        ),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "SLURM_PROCID": "5",
                "SLURM_STEP_NUM_TASKS": "8",
            },
            ranks.Ranks(0, 2, 0),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, ranks.Ranks(0, 1, 0)),
        ({"RANK": "1"}, ranks.Ranks(0, 1, 0)),
    ],
)
def test_the_place_of_a_process_is_torchruns_then_sruns_then_alone(
    environment: dict[str, str], expected: ranks.Ranks
) -> None:
    assert ranks.from_environment(environment) == expected


@pytest.mark.parametrize(
    ("rank", "world", "local"),
    [("4", "4", "0"), ("-1", "2", "0"), ("x", "2", "0"), ("0", "2", "1")],
)
def test_places_that_cannot_be_are_refused(rank: str, world: str, local: str) -> None:
    with pytest.raises(ValueError, match="the launcher's variables are not valid: RANK="):
        ranks.from_environment({"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local})
