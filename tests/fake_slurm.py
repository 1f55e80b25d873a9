"""SLURM's commands as small scripts on PATH: they print what a test wrote for them, and note their
calls.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_run import make_store, write_config

SBATCH = 'cp "$1" "{here}/submitted.sh"\necho "Submitted batch job 77"\n'
RECORD = 'echo "{name} $*" >> "{here}/calls"\n'


class FakeSlurm:
    """A folder of commands in front of PATH."""

    def __init__(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = here
        here.mkdir()
        self.command("sbatch", SBATCH)
        self.command("srun", "exit 0\n")
        self.command("scancel", "")
        self.command("scontrol", "")
        self.command("squeue", 'cat "{here}/queue"\n')
        self.queue()
        monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)

    def command(self, name: str, body: str) -> None:
        """Set what a command does; {here} is the folder."""
        path = self.here / name
        path.write_text("#!/bin/bash\n" + (RECORD + body).format(here=self.here, name=name))
        path.chmod(0o755)

    def queue(self, *jobs: tuple[str, str, int, str]) -> None:
        """Set the queue: id, state, restarts, reason."""
        rows = [
            f"{job:<40}{state:<20}{restarts:<12}{reason:<60}\n"
            for job, state, restarts, reason in jobs
        ]
        (self.here / "queue").write_text("".join(rows))

    def calls(self, name: str = "") -> list[str]:
        """What was called so far, one command with its words a line."""
        path = self.here / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(name)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("archive"))


@pytest.fixture
def config(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny.yaml in the working directory, whose run folder is `run` beside it."""
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, store)
    path.write_text(path.read_text().replace(f"out: {tmp_path}/run", "out: run"))
    return path


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)
