"""Runs that are stopped at a step by a real signal, and what tests of them share."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_run import config_of

from tapct.base.exits import UserError
from tapct.engine import loop
from tapct.run import pretrain

STEPS = 12


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a real signal while it works on a step."""
    original = loop.Trainer.optimizer_step

    def with_signal(self: loop.Trainer, index: int, batches: Any) -> None:
        if index + 1 == step:
            os.kill(os.getpid(), number)
        original(self, index, batches)

    monkeypatch.setattr(loop.Trainer, "optimizer_step", with_signal)


def stopped_run(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    store: Path,
    step: int,
    *overrides: str,
    number: int = signal.SIGTERM,
) -> loop.Stop:
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        return pretrain.train(config_of(folder, store, *overrides))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
