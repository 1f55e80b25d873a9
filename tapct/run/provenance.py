"""What a run was: config, command, versions, machine and data, written beside its checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tapct
from tapct.base import ending, files, ranks
from tapct.base.exits import UserError, single_line
from tapct.config import Resolved
from tapct.config.flat import flatten
from tapct.config.plugins import Plugin
from tapct.data.packed.store_group import AnyStore
from tapct.run.training_data import TrainingData, open_store
from tapct.run_folder import RunFolder

MOST_STARTS = 1000  # kept in run.json


def write_run_files(
    out: Path,
    resolved: Resolved,
    store: AnyStore,
    command: str,
    data: TrainingData,
    *,
    step: int = 0,
    world: int = 1,
) -> None:
    """config.yaml and run.json: what was run, on what, with which versions, and all starts of it.

    Args:
        out: run folder.
        resolved: config of the run.
        store: packed archive.
        command: command that started the run.
        data: scans that the run is trained on.
        step: finished steps at this start.
        world: number of ranks.
    """
    out.mkdir(parents=True, exist_ok=True)
    files.write_atomically(RunFolder(out).config, resolved.to_yaml())
    packages = ("torch", "numpy", "nibabel", "SimpleITK", "pydicom", "blosc2")
    versions = {
        "tapct": tapct.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }
    revision, gpu = git_revision(), gpu_name()
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "step": step,
        "command": command,
        **launch(os.environ),
        "ranks": world,
        "gpu": gpu,
        "git_revision": revision,
        "versions": versions,
        "manifest": store.digest,
    }
    about = {
        "command": command,
        "versions": versions,
        "git_revision": revision,
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "gpu": gpu},
        "manifest": {
            "digest": store.digest,
            "scans": len(store),
            "accepted": store.summary.get("accepted", len(store)),
            "refused": {
                reason: count for reason, count in store.summary.items() if reason != "accepted"
            },
        },
        "starts": [*earlier_starts(RunFolder(out).provenance), start][-MOST_STARTS:],
        "training": {
            "digest": data.digest,
            "scans": len(data.rows),
            "about": list(data.lines),
        },
    }
    files.write_atomically(RunFolder(out).provenance, json.dumps(about, indent=1))


def launch(environment: Mapping[str, str]) -> dict[str, Any]:
    """The job and the nodes of a start.

    Args:
        environment: environment variables, `os.environ`.
    """
    job = environment.get("SLURM_JOB_ID") or environment.get("TORCHELASTIC_RUN_ID", "none")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    return {
        "job": "" if job == "none" else job,
        "restarts": ranks.restarts(environment),
        "nodes": nodes or ending.node_name(environment),
    }


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """The starts that run.json holds; none where it is missing, damaged or of an earlier version of
    tapct.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    starts = content.get("starts", []) if isinstance(content, dict) else []
    return starts if isinstance(starts, list) else []


def facts_of_rank(resolved: Resolved, device: torch.device) -> dict[str, str]:
    """What all ranks of a run must have in common: every setting, code, versions and data.

    The folder of the store may differ, because nodes can have copies of it on their own disks.

    Args:
        resolved: config of the run, as this rank has read it.
        device: device of this rank; `device: auto` may choose another kind on another node.
    """
    facts = {key: str(value) for key, value in flatten(resolved.to_dict()).items()}
    store = Path(facts.pop("data.store"))
    facts.pop("data.cache.dir")  # it may hold the name of a node or job
    data = resolved.value.data
    facts["data.stores"] = str([(one.name or one.path.name, one.weight) for one in data.stores])
    try:
        facts["digest of data.store"] = open_store(data).digest
    except (UserError, OSError) as error:
        facts["digest of data.store"] = f"unknown ({store}: {single_line(error, 120)})"
    facts["kind of device"] = device.type
    facts["version of tapct"] = tapct.__version__
    facts["version of torch"] = torch.__version__
    facts["digest of the code"] = code_digest(resolved.value)
    return facts


def code_digest(config: Any) -> str:
    """Hash of the Python files of tapct, and of the plug-ins outside of it that a config names."""
    package = Path(tapct.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    for name in sorted({each.name for each in plugins_in(config) if "." in each.name}):
        file_name = sys.modules[name].__file__
        if file_name is not None:
            digest.update(f"{name}\n".encode() + Path(file_name).read_bytes())
    return digest.hexdigest()[:16]


def plugins_in(value: Any) -> Iterator[Plugin]:
    """The plug-ins in a config, those in the settings of others included."""
    if isinstance(value, Plugin):
        yield value
    if isinstance(value, tuple):
        for item in value:
            yield from plugins_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from plugins_in(getattr(value, field.name))


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
