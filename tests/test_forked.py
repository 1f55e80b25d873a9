"""A forked process is what a Python of its own would be: arguments, folder, exit codes, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

REPORT = """
import json, os, sys
print(json.dumps([sys.argv, sys.path[0], os.getcwd(), os.environ["COLOUR"], __name__]))
print("an error", file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["-c", "file"])
def test_a_process_gets_its_arguments_folder_and_variables(tmp_path: Path, kind: str) -> None:
    script = tmp_path / "code" / "script.py"
    script.parent.mkdir()
    script.write_text(REPORT)
    start = ["-c", REPORT] if kind == "-c" else [str(script)]
    environment = {**os.environ, "COLOUR": "green"}
    by_nest = forked.run([*start, "one", "two words"], environment, tmp_path)
    by_python = subprocess.run(
        [sys.executable, *start, "one", "two words"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert by_nest.stdout == by_python.stdout and by_nest.stderr == "an error\n"


@pytest.mark.parametrize(
    ("code", "returned", "output"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a text')", 1, "a text"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit; atexit.register(print, 'over')", 0, "over"),
        ("import threading; threading.Timer(0.1, print, ['late']).start()", 0, "late"),
    ],
)
def test_a_process_ends_as_in_python(code: str, returned: int, output: str) -> None:
    done = forked.run(["-c", code])
    assert done.returncode == returned and output in done.stdout + done.stderr


def gone_within(seconds: float, process: int) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not Path(f"/proc/{process}").exists():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_to_the_program_reaches_the_process(number: signal.Signals) -> None:
    code = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: sys.exit(number))
print(os.getpid(), flush=True)
for _ in range(6000):
    time.sleep(0.01)  # Python calls a handler of a signal just before a sleep after it
"""
    environment = forked.with_nest(os.environ)
    with subprocess.Popen(
        [forked.python(), "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        process = int(program.stdout.readline())
        assert process != program.pid
        program.send_signal(number)
        assert program.wait(30) == (number if number != signal.SIGKILL else -number)
    assert gone_within(30, process)


def test_a_process_that_nobody_waits_for_is_ended() -> None:
    process = forked.Forked(["-c", "import time; time.sleep(60)"])
    number = process.pid
    del process
    assert gone_within(30, number)
