"""`tapct index` and `tapct pack` that are ended at any moment leave no process, no half file and no
lock that stops the next call, which gives the same result.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scan_files import make_ct, save_scan

from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store

MARK = "TAPCT_TEST_KILLED"  # a variable by which all processes of a command are found
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scans that take a second or two, and their manifest."""
    folder = tmp_path_factory.mktemp("killed")
    for seed in range(12):
        save_scan(folder / "scans" / f"c{seed}.nii.gz", make_ct((40, 96, 96), seed))
    build_manifest(folder / "scans", folder / "m.parquet")
    return folder


def start(name: str, *words: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, MARK: name, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tapct", *map(str, words), "--workers", "2"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe)


def processes_of(name: str) -> list[int]:
    """Ids of the processes that a command has started, itself included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={name}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill_and_wait(run: subprocess.Popen[bytes], name: str, number: int) -> float:
    """Send a signal to the command alone; the seconds until the last process has ended."""
    run.send_signal(number)
    began = time.monotonic()
    run.communicate(timeout=PATIENCE_S)
    while processes_of(name):
        if time.monotonic() - began > PATIENCE_S:
            pytest.fail(f"still running: {processes_of(name)}")
        time.sleep(0.02)
    return time.monotonic() - began


def ended_index(archive: Path, folder: Path, name: str, number: int, after_s: float) -> None:
    """Index, end it, index again: the manifest is that of an index that nobody ended."""
    out = folder / "m.parquet"
    # ids are hashes with the key of the archive
    shutil.copy(archive / ".patient_key", folder)
    run = start(name, "index", archive / "scans", "--out", out)
    time.sleep(after_s)
    kill_and_wait(run, name, number)
    whole = Manifest.read(archive / "m.parquet")
    if out.exists():
        assert Manifest.read(out).digest == whole.digest
    again = build_manifest(archive / "scans", out)
    assert again.digest == whole.digest
    assert {path.name for path in folder.iterdir()} - {".patient_key"} == {"m.parquet"}


def ended_pack(archive: Path, folder: Path, name: str, number: int, after_s: float) -> None:
    """Pack, end it, pack again: the store is that of a pack that nobody ended."""
    out = folder / "store"
    run = start(name, "pack", archive / "m.parquet", "--out", out)
    time.sleep(after_s)
    kill_and_wait(run, name, number)
    manifest = Manifest.read(archive / "m.parquet")
    report = pack(manifest, out)
    assert not report.damaged and not report.refused
    store = Store(out)
    for i in range(len(store)):
        store.verify(i)
    assert {path.name for path in out.rglob("*") if path.is_file()} == {
        *("store.parquet", *(f"{row.id}.b2nd" for row in manifest.accepted))
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_does_not_outlive_a_command_that_is_ended(number: int) -> None:
    """Without the start of a command: a process with a pool of workers that all are busy."""
    script = (
        "import time\nfrom tapct.data.workers.process_pool import map_unordered\n"
        "list(map_unordered(time.sleep, [100] * 8, 2, None))\n"
    )
    name = f"pool {number} {os.getpid()}"
    environment = {**os.environ, MARK: name, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=-1, stderr=-1)
    deadline = time.monotonic() + PATIENCE_S
    while len(processes_of(name)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(processes_of(name)) == 4  # the command, the server and two workers
    assert kill_and_wait(run, name, number) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", [ended_index, ended_pack])
def test_a_command_that_is_ended_at_any_moment(
    archive: Path,
    tmp_path: Path,
    number: int,
    command: object,
) -> None:
    draw = random.Random(int(number))
    for k in range(20):
        folder = tmp_path / str(k)
        folder.mkdir()
        name = f"{command} {number} {k} {os.getpid()}"
        command(archive, folder, name, number, draw.uniform(0.2, 4.0))  # type: ignore[operator]


def test_sigterm_ends_a_command_as_an_error_does(archive: Path, tmp_path: Path) -> None:
    run = start("sigterm", "pack", archive / "m.parquet", "--out", tmp_path / "store")
    deadline = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob("store/*/*.b2nd")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.terminate()
    _, err = run.communicate(timeout=PATIENCE_S)
    assert (run.returncode, err) in ((143, b""), (0, b""))
    assert not list(tmp_path.glob("store/.*"))
