"""A real SLURM of two virtual nodes, up for the tests of this folder and taken down after them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import make_store, write_config

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


def free_ports() -> int:
    """First of the ports of a cluster, which no other cluster on this machine uses."""
    for first in range(16917, 20000, 1000):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + 3):  # controller and two nodes
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    pytest.fail("no free ports for SLURM from 16917 to 19917")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the cluster; SLURM_CONF leads there. Needs root, and TAPCT_SLURM=1: daemons may
    start.
    """
    if os.environ.get("TAPCT_SLURM") != "1":
        pytest.skip("set TAPCT_SLURM=1 to start a SLURM on this machine")
    folder = tmp_path_factory.mktemp("slurm")
    known = {**os.environ, "SLURM_TEST_DIR": str(folder), "SLURM_TEST_PORT": str(free_ports())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            subprocess.run([SCRIPTS / "slurm_up.sh"], env=known, check=True, timeout=300)
            yield folder
        finally:
            subprocess.run([SCRIPTS / "slurm_down.sh"], env=known, check=True, timeout=120)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("archive"))


@pytest.fixture
def here(slurm: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, store)
    return tmp_path
