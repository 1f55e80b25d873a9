"""Stop signals reach the process that trains and none that it starts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tapct.base import signals

BLOCKED = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"


def blocked_by_children() -> list[int]:
    output = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True
    ).stdout
    return [int(word) for word in output.strip("[]\n").split(",") if word]


def test_children_are_deaf_and_this_process_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: heard.append(number))
        for number in signals.STOP
    }
    try:
        outside = blocked_by_children()
        with signals.kept_from_children():
            assert set(blocked_by_children()) - set(outside) == {
                int(number) for number in signals.STOP
            }
            for number in signals.STOP:
                os.kill(os.getpid(), number)
                for _ in range(1000):
                    if number in heard:
                        break
                    time.sleep(0.001)
            assert heard == list(signals.STOP)
        assert blocked_by_children() == outside
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_spawned_processes_are_deaf_too() -> None:
    with signals.kept_from_children():
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        process.start()
        status = Path(f"/proc/{process.pid}/status").read_text()
        for number in signals.STOP:  # from the first instruction on, while it is still importing
            os.kill(process.pid or 0, number)
        time.sleep(0.3)
        assert process.is_alive()
        process.kill()
        process.join()
    mask = int(
        next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16
    )
    assert all(mask >> (number - 1) & 1 for number in signals.STOP)
