"""Checkpoints: written aside, verified, renamed, rotated; a crash at any instant leaves the older ones whole.

    checkpoints/
      latest                 the name of the newest one, one line
      step_00000400/         torch DCP shards (.metadata, *.distcp), meta.json, teacher.safetensors,
                             files.json (size and sha256 of every other file)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tapct.config import setting
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import UserError


@dataclass(frozen=True)
class Config:
    """When to save and what to keep."""

    every: int = setting(500, "optimizer steps between checkpoints; one is always written at the end", ge=1)
    keep: int = setting(2, "how many of the newest checkpoints stay on disk", ge=1)


@dataclass(frozen=True)
class Meta:
    """The readable part of a checkpoint.

    Args:
        step: finished optimizer steps.
        samples: samples seen; the sampler continues with this number.
        config: the resolved config of the run.
        data_digest: of the store that was trained on.
        torch_version: that wrote it.
    """

    step: int
    samples: int
    config: dict[str, Any] = field(default_factory=dict)
    data_digest: str = ""
    torch_version: str = torch.__version__


FOLDER = re.compile(r"step_\d+")


def step_of(path: Path) -> int:
    """Finished steps of a checkpoint folder, by its name."""
    return int(path.name.removeprefix("step_"))


class Checkpoints:
    """The checkpoint folder of one run.

    Args:
        folder: made when the first checkpoint is written.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, meta: Meta, pair: StudentTeacher, optimizer: torch.optim.Optimizer) -> Path:
        """Write a checkpoint, make it the latest, and drop the oldest beyond `keep`.

        Raises:
            UserError: the disk is full or not writable; nothing half-written is left, older checkpoints are whole.
        """
        final = self.folder / f"step_{meta.step:08d}"
        aside = self.folder / f".writing_step_{meta.step:08d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".writing_*"):
                shutil.rmtree(leftover)
            aside.mkdir()
            with single_process():
                dcp.save(training_state(pair, optimizer), checkpoint_id=aside, no_dist=True)
            (aside / "teacher.safetensors").write_bytes(safetensors.torch.save(teacher_tensors(pair)))
            (aside / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
            (aside / "files.json").write_text(json.dumps(fingerprints(aside), indent=1))
            for path in (*aside.iterdir(), aside):
                sync_path(path)
            if final.exists():  # the same step again, after a damaged or repeated save
                shutil.rmtree(final)
            os.replace(aside, final)
            self.announce(final)
        except (OSError, CheckpointException, RuntimeError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"checkpoint of step {meta.step} could not be written to {self.folder}: {first_cause(error)}. "
                "Older checkpoints are whole; free some space and start the same command again."
            ) from error
        # later steps are of a future that a damaged checkpoint took away: they must not crowd out the whole ones
        kept = [path for path in self.finished() if step_of(path) <= meta.step][-self.keep :]
        for path in self.finished():
            if path not in kept:
                shutil.rmtree(path)
        return final

    def announce(self, path: Path) -> None:
        """Make `latest` name a checkpoint; a kill between a save and this, or damage, may have left it behind."""
        latest, name = self.folder / "latest", path.name + "\n"
        if not latest.is_file() or latest.read_text() != name:
            replace_text(latest, name)

    def finished(self) -> list[Path]:
        """Checkpoint folders by step, oldest first; whether they are whole is not checked."""
        return sorted((path for path in self.folder.glob("step_*") if FOLDER.fullmatch(path.name)), key=step_of)

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that passes its own fingerprints, and one line for each damaged one passed over."""
        complaints: list[str] = []
        for path in reversed(self.finished()):
            complaint = damage(path)
            if complaint is None:
                return path, complaints
            complaints.append(f"checkpoint {path.name} is damaged and was skipped: {complaint}")
        return None, complaints


def load(path: Path, pair: StudentTeacher, optimizer: torch.optim.Optimizer) -> None:
    """Bring weights, optimizer moments, centres and random state back, in place.

    Args:
        path: a checkpoint folder that `damage` finds whole.
        pair: of the same config.
        optimizer: of the same config.
    """
    state = training_state(pair, optimizer)
    with single_process():
        dcp.load(state, checkpoint_id=path, no_dist=True)
    pair.load_state_dict(state["pair"])
    set_optimizer_state_dict(pair.student, optimizer, state["optimizer"])
    torch.set_rng_state(state["rng"]["cpu"])
    if torch.cuda.is_available() and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"])


@contextmanager
def single_process() -> Iterator[None]:
    """Keep DCP from warning that there is no process group: one process is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def read_meta(path: Path) -> Meta:
    """The readable part of a checkpoint folder.

    Raises:
        UserError: there is none, or it is not readable.
    """
    try:
        return Meta(**json.loads((path / "meta.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a tapct checkpoint: {error}") from error


def training_state(pair: StudentTeacher, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything a run needs to go on, as DCP takes it."""
    rng = {"cpu": torch.get_rng_state()}
    if next(pair.parameters()).is_cuda:
        rng["cuda"] = torch.cuda.get_rng_state()
    return {"pair": pair.state_dict(), "optimizer": get_optimizer_state_dict(pair.student, optimizer), "rng": rng}


def teacher_tensors(pair: StudentTeacher) -> dict[str, Tensor]:
    """The teacher's backbone under its own parameter names, on the CPU."""
    state = pair.teacher.backbone.state_dict()
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}


def damage(path: Path) -> str | None:
    """Compare a checkpoint folder with its fingerprints: None when whole, else what is wrong."""
    try:
        expected = json.loads((path / "files.json").read_text())
    except (OSError, ValueError) as error:
        return f"files.json cannot be read ({error})"
    for name, (size, digest) in expected.items():
        part = path / name
        if not part.is_file():
            return f"{name} is missing"
        if part.stat().st_size != size:
            return f"{name} has {part.stat().st_size} bytes instead of {size}"
        if sha256(part) != digest:
            return f"{name} has changed since it was written"
    return None


def fingerprints(folder: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and sha256 of each file of a folder."""
    return {path.name: (path.stat().st_size, sha256(path)) for path in sorted(folder.iterdir())}


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_path(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    sync_path(aside)
    os.replace(aside, path)
    sync_path(path.parent)


def first_cause(error: BaseException) -> str:
    """The innermost reason of a failed save, in a few words."""
    if isinstance(error, CheckpointException) and error.failures:
        wrapped = next(iter(error.failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the disk"
    return f"{type(error).__name__}: {error}".splitlines()[0]
