"""A disk that is soon full: a tmpfs of a few hundred kilobytes, for as long as a test needs it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PATIENCE_S = 10.0


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of that size, e.g. `400k`, on a new folder; skips the test where nobody may
    mount.

    Whoever still has a file on it after the test is named: a handle that was not closed is a
    fault.
    """
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"may not mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        end = (
            time.monotonic() + PATIENCE_S
        )  # whatever looks at all disks of a machine may look at this one just now
        while subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            if time.monotonic() > end:
                holders = open_files_below(folder)
                subprocess.run(["umount", "--lazy", str(folder)], check=True)
                pytest.fail(f"still in use: {holders}")
            time.sleep(0.1)


def grow(folder: Path, size: str) -> None:
    """Make the disk larger."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def open_files_below(folder: Path) -> list[str]:
    """Of all processes that may be looked at: `PID COMMAND: file`."""
    found = []
    links = [
        link
        for where in ("fd/*", "map_files/*", "cwd")
        for link in Path("/proc").glob(f"[0-9]*/{where}")
    ]
    for link in links:
        try:
            target = os.readlink(link)
            if f"{target}/".startswith(f"{folder}/"):
                command = (
                    Path("/proc", link.parts[2], "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode()
                )
                found.append(f"{link.parts[2]} {command}: {target}")
        except OSError:
            continue
    return found
