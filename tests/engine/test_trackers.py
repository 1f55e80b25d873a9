"""Metrics of every step: metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forked
import pytest

from tapct.base import console, jsonl
from tapct.engine import trackers

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
QUIET = trackers.Config(tensorboard=False)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
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


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with trackers.MetricsWriter(tmp_path / "run", QUIET) as writer:
        writer.write(row(1))
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_metrics_are_one_strict_json_object_per_step(tmp_path: Path) -> None:
    with trackers.MetricsWriter(tmp_path, QUIET) as writer:
        writer.write(row(1.0, loss=0.1 + 0.2) | {"samples": 8.0})  # type: ignore[arg-type]
        writer.write(row(2, loss=math.nan, other=math.inf))
    first, second = rows(tmp_path)
    assert first["loss/total"] == 0.1 + 0.2
    assert (type(first["step"]), type(first["samples"])) == (int, int)
    assert (second["loss/total"], second["other"]) == (None, None)


def test_resuming_drops_the_rows_after_the_checkpoint_and_cut_off_ones(
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


@pytest.mark.parametrize(
    ("most", "steps", "every"),
    [(100, 0, 1), (100, 100, 1), (100, 101, 2), (100, 450, 5), (100, 501, 10), (100, 10_000, 100)],
)
def test_rows_are_written_as_rarely_as_needed(most: int, steps: int, every: int) -> None:
    assert trackers.steps_between(most, steps) == every


def test_a_long_run_writes_some_steps_and_all_that_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(QUIET, metrics_every=5)
    with trackers.MetricsWriter(tmp_path, config, num_steps=23) as writer:
        for step in range(1, 14):
            loss = math.nan if step == 7 else 1.5
            writer.write(row(step, loss=loss) | {"seconds/save": 2.0 if step in (6, 8) else 0.0})
    found = [(one["step"], one["seconds/save"]) for one in rows(tmp_path)]
    assert found == [(5, 0.0), (7, 2.0), (10, 2.0)]
    with trackers.MetricsWriter(tmp_path, config, start_step=13, num_steps=23) as writer:
        for step in range(14, 24):
            writer.write(row(step))
    assert [one["step"] for one in rows(tmp_path)] == [5, 7, 10, 15, 20, 23]
    assert capsys.readouterr().out == ""


def test_a_start_reads_only_the_end_of_a_long_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "pad": "x" * (step % 50)}) + "\n" for step in range(1, 3000)]
    path.write_text("".join(lines))
    monkeypatch.setattr(trackers, "BLOCK_BYTES", 100)  # lines lie in two blocks
    for start in (2998, 2400, 2399, 1, 0):
        trackers.MetricsWriter(tmp_path, QUIET, start_step=start).close()
        assert path.read_text() == "".join(lines[:start])
    path.write_text("".join(lines))
    monkeypatch.setattr(trackers, "BLOCK_BYTES", 1000)
    reads: list[bytes] = []
    parse = jsonl.parse

    def counted(line: bytes) -> dict[str, Any] | None:
        reads.append(line)
        return parse(line)

    monkeypatch.setattr(jsonl, "parse", counted)
    trackers.MetricsWriter(tmp_path, QUIET, start_step=2990).close()
    assert len(reads) == 10


def test_a_run_of_a_million_steps_stays_small(tmp_path: Path) -> None:
    """By the size of a row of a run with all losses, as tap_s_3d writes it."""
    numbers = {f"group/metric_{i}": 0.1234567890123456 * (i + 1) for i in range(45)}
    config = trackers.Config()
    with trackers.MetricsWriter(tmp_path, config, num_steps=1_000_000) as writer:
        for step in range(1, 2001):
            writer.write(row(step, time=1e9 + step / 7) | numbers)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size * 1_000_000 / 2000 < 300e6


def test_missing_steps_before_the_start_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    trackers.MetricsWriter(tmp_path, QUIET, start_step=4).close()
    assert "ends at step 1 and the run resumes from step 4" in capsys.readouterr().out


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

    monkeypatch.setattr(trackers.os, "write", short)
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
    assert forked.run(["-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL
    assert [one["step"] for one in rows(tmp_path)] == [1]


def scalars(folder: Path) -> Mapping[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(one.step, one.value) for one in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_each_step_once_after_resuming(tmp_path: Path) -> None:
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
def test_wandb_works_offline_and_resumes_under_the_same_identity(
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
