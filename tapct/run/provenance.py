"""What a run was: config, command, versions, machine and data, written beside its checkpoints."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import tapct
from tapct.base import files
from tapct.config import Resolved
from tapct.data.store import Store
from tapct.run_folder import RunFolder


def write_run_files(out: Path, resolved: Resolved, store: Store, command: str) -> None:
    """config.yaml and run.json: what was run, on what, with which versions."""
    out.mkdir(parents=True, exist_ok=True)
    files.write_atomically(RunFolder(out).config, resolved.to_yaml())
    packages = ("torch", "numpy", "nibabel", "SimpleITK", "pydicom", "blosc2")
    about = {
        "command": command,
        "versions": {
            "tapct": tapct.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "git_revision": git_revision(),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "gpu": gpu_name()},
        "manifest": {
            "digest": store.digest,
            "scans": len(store),
            "accepted": store.summary.get("accepted", len(store)),
            "refused": {
                reason: count for reason, count in store.summary.items() if reason != "accepted"
            },
        },
    }
    files.write_atomically(RunFolder(out).provenance, json.dumps(about, indent=1))


def gpu_name() -> str:
    """Name of the first GPU, or empty."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def git_revision() -> str:
    """Revision of the source tree that tapct is imported from, `+` for local changes; empty outside
    of git.
    """
    folder = Path(tapct.__file__).resolve().parent
    if (
        folder / "REVISION"
    ).is_file():  # a copy for a SLURM job, which may lie in a tree that has moved on
        return (folder / "REVISION").read_text(encoding="utf-8").strip()
    try:
        ask = [
            "git",
            "-C",
            str(folder),
            "describe",
            "--always",
            "--dirty=+",
            "--abbrev=12",
            "--exclude=*",
        ]
        return subprocess.run(
            ask, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
