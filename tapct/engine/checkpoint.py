"""Write, verify, rotate and load checkpoints; a crash at any instant leaves the older ones whole.

Training waits only while the state is copied to host memory. A thread then writes it under a
temporary name: every rank its own shards, and the first rank the rest. One save runs at a time.

| method of `Checkpoints` | what it does |
|---|---|
| `begin` | waits for the previous save, copies the state, starts a save in the thread |
| `failed` | whether the save that was begun last has failed already; does not wait |
| `finish` | waits for the save in progress; raises its error |
| `settle` | waits for the save in progress; ignores its error, as another one is being raised |
| `close` | ends the thread; nothing can be saved after it |
| `announce` | writes the name of a checkpoint into `latest` |
| `finished` | all checkpoint folders, by step |
| `newest_whole` | the newest checkpoint whose files have their fingerprints |

    checkpoints/
      latest                 the name of the newest one, one line
      step_00000400/         torch DCP shards (.metadata, *.distcp), meta.json, teacher.safetensors,
                             files.json (size and sha256 of every other file)
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from tapct.base import files
from tapct.base.exits import UserError
from tapct.base.lease import LostLease
from tapct.config import setting
from tapct.distributed import collectives
from tapct.run_folder import CheckpointFolder, CheckpointsFolder, step_of
from tapct.ssl.student_teacher import StudentTeacher

APPEARS_S = 60.0  # longest time until a network disk shows a file of another node


@dataclass(frozen=True)
class Config:
    """When to save and what to keep."""

    every: int = setting(
        500,
        "number of optimizer steps from one checkpoint to the next; a checkpoint is always "
        "written at the end",
        ge=1,
    )
    keep: int = setting(
        2,
        "number of newest checkpoints that are kept; with eval.during.every, the weights of the "
        "best step are kept too",
        ge=1,
    )
    keep_every: int = setting(
        0, "checkpoints whose step is a multiple of this number are never deleted; 0: none", ge=0
    )
    asynchronous: bool = setting(
        True,
        "whether checkpoints are written while training continues; this needs host memory for "
        "a copy of the state",
    )
    on_error: str = setting(
        "stop",
        "when a checkpoint cannot be written (e.g. full disk): stop the run, or continue "
        "without this checkpoint",
        choices=("stop", "continue"),
    )


@dataclass(frozen=True)
class Meta:
    """The readable part of a checkpoint.

    Args:
        step: finished optimizer steps.
        samples: samples seen; the sampler continues with this number.
        config: resolved config of the run.
        data_digest: digest of the store that was trained on.
        torch_version: version of torch that wrote it.
        world: number of ranks that wrote it; any number reads it.
    """

    step: int
    samples: int
    config: dict[str, Any] = field(default_factory=dict)
    data_digest: str = ""
    torch_version: str = torch.__version__
    world: int = 1


class Checkpoints:
    """The checkpoint folder of one run, as one rank sees it.

    Args:
        folder: folder of the checkpoints; made when the first one is written.
        keep: number of the newest checkpoints that are kept.
        keep_every: checkpoints whose step is a multiple of this are never removed; 0: none.
        side: process group on the CPU in which ranks agree; None for one process.
        device: device of training.
        guard: function that the first rank calls before it changes the folder; it raises where
            another process writes the run folder now.
        also_kept: function that returns further steps whose checkpoints are kept, such as the best
            one; the first rank calls it after each save.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int = 0,
        side: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        guard: Callable[[], object] | None = None,
        also_kept: Callable[[], Collection[int]] = frozenset,
    ) -> None:
        self.guard, self.also_kept = guard, also_kept
        self.folder, self.keep, self.keep_every, self.side = folder, keep, keep_every, side
        self.paths = CheckpointsFolder(folder)
        self.is_first = side is None or dist.get_rank() == 0

        def use_own_gpu() -> None:  # a new thread works on GPU 0
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)

        self.thread = ThreadPoolExecutor(
            1, thread_name_prefix="tapct-checkpoint", initializer=use_own_gpu
        )
        self.save_in_progress: Future[Path] | None = None

    def begin(self, meta: Meta, pair: StudentTeacher, optimizer: torch.optim.Optimizer) -> None:
        """Wait for the previous save, copy the state to host memory and start to write it.

        Raises:
            UserError: the previous save failed.
        """
        self.finish()
        teacher = teacher_tensors(pair)
        stager = DefaultStager(StagingOptions(False, False, False, use_non_blocking_copy=False))
        staged = stager.stage(training_state(pair, optimizer))
        assert isinstance(staged, dict), "not asked to stage in the background"
        self.save_in_progress = self.thread.submit(self._write, meta, staged, teacher)

    def failed(self) -> bool:
        """Whether the save that was begun last has failed already; does not wait."""
        save = self.save_in_progress
        return save is not None and save.done() and save.exception() is not None

    def close(self) -> None:
        """End the thread when its work is done; nothing can be saved after this."""
        self.thread.shutdown(wait=False)

    def settle(self) -> None:
        """Wait for the save in progress and ignore its error, after another failure."""
        if self.save_in_progress is not None:
            wait([self.save_in_progress])
            self.save_in_progress = None

    def finish(self) -> Path | None:
        """Wait for the save in progress, if there is one; returns the folder of its checkpoint.

        Raises:
            UserError: it failed.
        """
        save = self.save_in_progress
        if save is None:
            return None
        self.save_in_progress = None  # before `result`, so that its error is raised only once
        return save.result()

    def _write(self, meta: Meta, state: dict[str, Any], teacher: dict[str, Tensor]) -> Path:
        """Work of the thread: every rank writes its shards, the first rank completes the folder."""
        final, aside = self.paths.step(meta.step).path, self.paths.half_written(meta.step)
        with self._agreeing(meta, aside):
            if self.is_first:
                if self.guard is not None:
                    self.guard()
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.paths.leftovers():
                    # what resists here is of no use, unless it has the name that is needed now
                    shutil.rmtree(leftover, ignore_errors=leftover != aside)
                aside.mkdir()
        with self._agreeing(meta, aside):
            if self.side is None:
                with single_process():
                    dcp.save(state, checkpoint_id=aside, no_dist=True)
            else:
                dcp.save(state, checkpoint_id=aside, process_group=self.side)
        with self._agreeing(meta, aside):
            if self.is_first:
                self._complete(meta, teacher, aside, final)
        return final

    def _complete(self, meta: Meta, teacher: dict[str, Tensor], aside: Path, final: Path) -> None:
        """Add the files besides the shards, make the checkpoint the latest, remove old ones."""
        if self.guard is not None:
            self.guard()
        paths = CheckpointFolder(aside)
        paths.teacher.write_bytes(safetensors.torch.save(teacher))
        paths.meta.write_text(json.dumps(asdict(meta), indent=1))
        paths.fingerprints.write_text(json.dumps(fingerprints(aside), indent=1))
        # `final` exists where the same step is saved again, after a damaged or repeated save
        files.put_in_place(aside, final)
        self.announce(final)
        # Checkpoints of later steps exist where the run resumed from an older one, because they are
        # damaged. They must not push whole ones out.
        kept = [path for path in self.finished() if step_of(path) <= meta.step][-self.keep :]
        also_kept = self.also_kept()
        for path in self.finished():
            step = step_of(path)
            for_ever = bool(self.keep_every) and step % self.keep_every == 0
            is_asked_for = step <= meta.step and (for_ever or step in also_kept)
            if path not in kept and not is_asked_for:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        """Remove a checkpoint. It is renamed first, so that a kill leaves no half of one under its
        name; files that cannot be removed stay under the other name.
        """
        with suppress(OSError):
            aside = self.paths.half_removed(path)
            os.replace(path, aside)
            shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _agreeing(self, meta: Meta, aside: Path) -> Iterator[None]:
        """One phase of a save: if it fails on one rank it fails on all, and what was written is
        removed.

        Raises:
            UserError: the phase failed here, with step and cause, or on another rank.
        """
        failure: BaseException | None = None
        try:
            yield
        except (Exception, CheckpointException) as error:  # DCP's derives from BaseException
            failure = error
        num_failed = torch.tensor(int(failure is not None))
        if self.side is not None:
            dist.all_reduce(num_failed, group=self.side)
        if isinstance(failure, LostLease):
            raise failure  # what lies in the folder now belongs to another process
        if num_failed:
            if self.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            cause = (
                first_cause(failure) if failure is not None else "another rank failed, see its line"
            )
            raise UserError(
                f"checkpoint of step {meta.step} could not be written to {self.folder}: {cause}. "
                "Older checkpoints are whole; free some space and start the same command again."
            ) from failure

    def announce(self, path: Path) -> None:
        """Make `latest` name a checkpoint; a kill just before this, or damage, may have left an
        older or a removed one in it.
        """
        latest, name = self.paths.latest, path.name + "\n"
        if not latest.is_file() or latest.read_text() != name:
            files.write_atomically(latest, name)

    def finished(self) -> list[Path]:
        """Checkpoint folders by step, oldest first; whether they are whole is not checked."""
        return self.paths.finished()

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """Find the newest checkpoint whose files equal its fingerprints.

        Returns:
            Its folder, None where there is none; and one line for each damaged one that was
            skipped.
        """
        complaints: list[str] = []
        for path in reversed(self.finished()):
            complaint = damage(path)
            if complaint is None:
                return path, complaints
            complaints.append(f"checkpoint {path.name} is damaged and was skipped: {complaint}")
        return None, complaints


def load(path: Path, pair: StudentTeacher, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, optimizer moments, centres and random state in place, at any number of ranks.

    A snapshot of the teacher that only the checkpoint holds is ignored. One that only the config
    asks for keeps its state "never taken", so it is taken before the first step that needs it.

    Args:
        path: checkpoint folder that `damage` finds whole.
        pair: student and teacher, built from the same config.
        optimizer: optimizer of the student, built from the same config.
    """
    state = training_state(pair, optimizer)
    # A rank or a device that did not exist when the checkpoint was written has no random state in
    # it, and keeps its own.
    known = FileSystemReader(path).read_metadata().state_dict_metadata
    absent = [
        key for key in state["pair"] if key.startswith("snapshot") and f"pair.{key}" not in known
    ]
    lacking = {key: state["pair"].pop(key) for key in absent}
    name = f"rank_{collectives.rank()}"
    state["rng"] = {
        name: {
            kind: old for kind, old in state["rng"][name].items() if f"rng.{name}.{kind}" in known
        }
    }
    with single_process():
        dcp.load(state, checkpoint_id=path, no_dist=collectives.world_size() == 1)
    pair.load_state_dict({**state["pair"], **lacking})
    set_optimizer_state_dict(pair.student, optimizer, state["optimizer"])
    for device, random in state["rng"][name].items():
        torch.set_rng_state(random) if device == "cpu" else torch.cuda.set_rng_state(random)


@contextmanager
def single_process() -> Iterator[None]:
    """Keep DCP from warning that there is no process group, where one process is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def read_meta(path: Path) -> Meta:
    """Read the readable part of a checkpoint folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return Meta(**json.loads(CheckpointFolder(path).meta.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of tapct: {error}; name a folder RUN/checkpoints/step_..."
        ) from error


def training_state(pair: StudentTeacher, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that resuming needs, in the form that DCP takes; random state by rank."""
    rng = {"cpu": torch.get_rng_state()}
    if next(pair.parameters()).is_cuda:
        rng["cuda"] = torch.cuda.get_rng_state()
    moments = get_optimizer_state_dict(pair.student, optimizer)
    return {
        "pair": pair.state_dict(),
        "optimizer": moments,
        "rng": {f"rank_{collectives.rank()}": rng},
    }


def teacher_tensors(pair: StudentTeacher) -> dict[str, Tensor]:
    """Copy the teacher's backbone to the CPU, unsharded, under its own parameter names.

    A collective where it is sharded. Only the first rank keeps the tensors; others return none.
    """
    tensors = {}
    for name, tensor in pair.teacher.backbone.state_dict().items():
        full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        if collectives.rank() == 0:
            # a copy, because training changes the tensor while the thread writes
            tensors[name] = torch.empty_like(full, device="cpu").copy_(full).contiguous()
    return tensors


def damage(path: Path) -> str | None:
    """Compare a checkpoint folder with its fingerprints.

    Returns:
        None when all files are whole, else the first thing that is wrong.
    """
    try:
        expected = json.loads(CheckpointFolder(path).fingerprints.read_text())
    except (OSError, ValueError) as error:
        return f"files.json cannot be read ({error})"
    for name, (size, digest) in expected.items():
        part = path / name
        if not part.is_file():
            return f"{name} is missing"
        if part.stat().st_size != size:
            return f"{name} has {part.stat().st_size} bytes instead of {size}"
        if files.sha256(part) != digest:
            return f"{name} has changed since it was written"
    return None


def fingerprints(folder: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and sha256 of each file of a folder, and of each file that the plan of the save
    names: a network disk may list a folder without what another node has just written to it.

    Raises:
        OSError: a file that the plan names is missing.
    """
    plan = FileSystemReader(folder).read_metadata().storage_data or {}
    planned = {place.relative_path for place in plan.values()}
    found = {}
    for name in sorted(planned | {path.name for path in folder.iterdir()}):
        path = folder / name
        wait_for_file(path)
        found[name] = (path.stat().st_size, files.sha256(path))
    return found


def wait_for_file(path: Path, patience_s: float = APPEARS_S) -> None:
    """Wait until a file that another node has written is seen here too.

    Args:
        path: the file.
        patience_s: seconds after which it counts as missing.
    Raises:
        FileNotFoundError: it is missing.
    """
    until = time.monotonic() + patience_s
    while not path.is_file():
        if time.monotonic() > until:
            raise FileNotFoundError(
                errno.ENOENT, "no such file, although a rank has written it", str(path)
            )
        time.sleep(0.1)


def first_cause(error: BaseException) -> str:
    """One line with the innermost reason of a failed save, also where DCP has wrapped it."""
    if isinstance(error, CheckpointException) and error.failures:
        wrapped = next(iter(error.failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    return files.first_cause(error)
