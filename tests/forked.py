"""Starts Python processes in which torch is loaded already, by forking them from a nest.

`Forked` has what tests use of subprocess.Popen, `run` is subprocess.run, and `python` is a program
to start where a test needs the path of a Python, e.g. for torchrun. Tests of how tapct starts, and
of what Pythons of their own differ in, use subprocess.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

HERE = Path(__file__).resolve().parent
NEST = "TAPCT_TEST_NEST"  # environment variable: the socket of the nest
SHARED = "TAPCT_TEST_NEST_FOLDER"  # environment variable: folder of the nest of all processes


@functools.cache
def nest() -> Path:
    """Folder of the nest, which listens: that of the session of tests, or one of this process."""
    folder = Path(os.environ.get(SHARED) or start_nest())
    end = time.monotonic() + 300.0
    while not (folder / "ready").exists():
        assert time.monotonic() < end, "no nest"
        time.sleep(0.01)
    return folder


def start_nest() -> str:
    """Start a nest that ends with this process; returns its folder before the nest listens."""
    folder = tempfile.mkdtemp(prefix="tapct-nest-")
    started = subprocess.Popen(
        [sys.executable, str(HERE / "nest.py"), f"{folder}/socket"],
        # passive: threads that spin while they wait take ten times as long on a busy machine
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        stdin=subprocess.PIPE,
    )

    def end() -> None:
        started.communicate()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return folder


def python() -> str:
    """A program that does what `python` does, in a process forked from the nest.

    The environment that it is started in must have the variables of `with_nest`.
    """
    program = nest() / "python"
    if not program.is_file():
        line = f'exec {sys.executable} -I -S {HERE / "nest_python.py"} "$@"'
        own = program.with_name(f"python-{os.getpid()}")  # others may write the same program now
        own.write_text(f"#!/bin/sh\n{line}\n")
        own.chmod(0o755)
        own.rename(program)
    return str(program)


def with_nest(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with which `python`, and the ranks that torchrun starts, find the nest."""
    return {**environment, NEST: str(nest() / "socket"), "PYTHON_EXEC": python()}


@pytest.fixture
def python_from_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    """tapct starts its own processes (evaluations, probes) from the nest, too."""
    for name, value in with_nest({}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", python())


class Forked:
    """A Python process that was forked from the nest.

    Args:
        arguments: what would follow `python` on a command line.
        env: all variables of its environment; None: those of this process.
        cwd: working directory; None: the one of this process.
        merged: standard error goes to where standard output goes.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        merged: bool = False,
    ) -> None:
        self.args = [str(word) for word in arguments]
        self.out: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.err: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.merged = merged
        request = {
            "arguments": self.args,
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or os.getcwd()),
        }
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(str(nest() / "socket"))
        outputs = [self.out.fileno(), (self.out if merged else self.err).fileno()]
        socket.send_fds(self.connection, [b"{"], outputs)
        self.connection.sendall(json.dumps(request).encode()[1:] + b"\n")
        self.answers = self.connection.makefile("rb", buffering=0)
        self.pid = int(self.answers.readline())
        self.returncode: int | None = None

    def poll(self, wait_s: float | None = 0.0) -> int | None:
        """Exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None and select.select([self.connection], [], [], wait_s)[0]:
            self.returncode = int(self.answers.readline())
            self.answers.close()
            self.connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns the exit code."""
        code = self.poll(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, *self.output())
        return code

    def output(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        return read(self.out), "" if self.merged else read(self.err)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; returns standard output and standard error."""
        self.wait(timeout)
        return self.output()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its group, whatever they do."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait(60)


def read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def run(
    arguments: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run a Python process to its end, which it must reach in time."""
    process = Forked(arguments, env, cwd)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def end_together(processes: Sequence[Forked], timeout: float, grace_s: float) -> list[int | None]:
    """Wait for all; exit codes, with None for one that had to be killed here.

    Args:
        processes: ranks of a run.
        timeout: seconds for all of them.
        grace_s: seconds that the others have to end by themselves when one has failed.
    """
    end = time.monotonic() + timeout
    while running := [process for process in processes if process.poll() is None]:
        select.select([one.connection for one in running], [], [], max(end - time.monotonic(), 0))
        if time.monotonic() >= end:
            break
        if any(process.poll() for process in running):
            end = min(end, time.monotonic() + grace_s)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
    return codes
