"""`tapct train`: build the parts of a run from its config, and start the loop.

Only this file sees the whole config (`RunConfig`, in run/config.py); each part is given its own
section.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from tapct.base import console, launcher, ranks
from tapct.base.exits import SharedError, UserError
from tapct.base.lease import Lease, LostLease
from tapct.base.ranks import Ranks
from tapct.config import Resolved
from tapct.data.loading import loader
from tapct.data.packed.store_group import StoreGroup
from tapct.distributed import collectives
from tapct.distributed.device import pick_device, prepare_cpu
from tapct.distributed.world import LostRank, World, join_ranks
from tapct.engine import checkpoint, compiled, fsdp, loop, optim, recompute, trackers
from tapct.engine.archives import Archives
from tapct.engine.checkpoint import Checkpoints, Meta
from tapct.engine.metrics import Record
from tapct.eval.results.saved import dataset_name
from tapct.nn.backends import choose
from tapct.run import background_eval, lineage
from tapct.run.config import RunConfig
from tapct.run.provenance import facts_of_rank, write_run_files
from tapct.run.resume import find_start, with_split_of
from tapct.run.rules import load_run_config, warnings
from tapct.run.stages import ResolvedStage
from tapct.run.start import check_machine, check_start, data_warnings, training_data
from tapct.run.training_data import TrainingData, evaluated_store, open_store
from tapct.run_folder import RunFolder
from tapct.ssl.inputs import Inputs
from tapct.ssl.schedules import Schedules
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Batch
from tapct.weights import initial, sources


def read_config(path: Path, overrides: Sequence[str]) -> Resolved:
    """The config of a run, as every rank reads it.

    Raises:
        UserError: the config is wrong; the ranks of a node have the same one, and only the first
            of them prints the error.
    """
    try:
        return load_run_config(path, overrides)
    except UserError as error:
        if ranks.from_environment(os.environ).local_rank == 0:
            raise
        raise SharedError(str(error)) from error


@dataclass(frozen=True)
class Start:
    """How a run would start, without starting it.

    Args:
        resolved: config that it would train with.
        warnings: lines about what works but is probably not intended.
        about_data: lines about the scans that it would be trained on.
    """

    resolved: Resolved
    warnings: tuple[str, ...]
    about_data: tuple[str, ...] = ()


def check(resolved: Resolved, allow_change: bool = False) -> Start:
    """Check what `train` checks before its first step, in a single process; nothing is written.

    Args:
        resolved: config of the run.
        allow_change: as in `train`.
    Raises:
        UserError: `train` would refuse to start.
    """
    notes: list[str] = []
    saved = check_start(resolved, allow_change, notes.append)
    if saved is not None:
        resolved = with_split_of(resolved, saved, notes.append)
    config: RunConfig = resolved.value
    notes += warnings(resolved)
    missing = [folder for folder in config.data.folders if not folder.exists()]
    if missing:
        name = "data.stores" if config.data.stores else "data.store"
        notes.append(f"{name} {missing[0]} does not exist yet, so the data was not checked")
        return Start(resolved, tuple(notes))
    store = open_store(config.data)
    data = training_data(config, store, saved)
    notes += data_warnings(config, store, data.rows, saved, data.digest)
    return Start(resolved, tuple(notes), (*data.lines, f"digest of the data: {data.digest}"))


def train(resolved: Resolved, allow_change: bool = False, command: str = "") -> loop.Stop:
    """Pretrain with a config; resume from the newest whole checkpoint of the run folder.

    Every rank of a run calls it; the launcher's environment shows which one this is.

    Args:
        resolved: config of the run.
        allow_change: whether to resume even though settings that affect training have changed.
        command: command that started the run, for run.json; empty: this process's own.
    Returns:
        How the run ended.
    Raises:
        UserError: data, config or disk do not allow it, or another rank was lost.
    """
    config: RunConfig = resolved.value
    place = ranks.from_environment(os.environ)
    launcher.check_launcher(os.environ)
    prepare_cpu()
    device, no_device = device_of_rank(config.device, place)
    lease = lease_of(config.out)

    def facts() -> Mapping[str, str]:
        if no_device is not None:
            raise no_device
        return facts_of_rank(resolved, device)

    def prepare_run_folder() -> None:
        check_machine(config, device)
        lease.acquire()

    try:
        with join_ranks(place, device, config.parallel, facts, prepare_run_folder) as world:
            pretraining = Pretraining(resolved, world, allow_change, command, lease)
            stop = pretraining.run()
        if place.is_first:
            lease.check()  # an evaluation writes into the run folder
            pretraining.evaluations.finish(pretraining.checkpoints, stopped=bool(stop.signal))
    finally:
        lease.release()
    return stop


def device_of_rank(name: str, place: Ranks) -> tuple[torch.device, UserError | None]:
    """The device of this rank, and why it has none: the other ranks wait for one that has failed,
    so it meets them first.

    Args:
        name: setting `device`.
        place: place of this process.
    Raises:
        UserError: there is no such device, in a single process.
    """
    try:
        device = pick_device(name, place.local_rank)
    except UserError as error:
        if place.world == 1:
            raise
        return torch.device("cpu"), error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, None


def lease_of(out: Path) -> Lease:
    """The right of the first rank to write a run folder; not taken yet."""
    return Lease(RunFolder(out).lease, f"the run folder {out}", os.environ, say=console.say)


class Pretraining:
    """The parts of one pretraining, put together on one rank.

    Args:
        resolved: config of the run.
        world: this rank among the others.
        allow_change: whether to resume even though settings that affect training have changed.
        command: command that started the run, as in `train`.
        lease: right of the first rank to write the run folder; None for a run that is not started.
    """

    def __init__(
        self,
        resolved: Resolved,
        world: World,
        allow_change: bool = False,
        command: str = "",
        lease: Lease | None = None,
    ) -> None:
        self.resolved, self.world, self.allow_change = resolved, world, allow_change
        self.command = command or shlex.join(sys.argv)
        self.config: RunConfig = resolved.value
        self.lease = lease
        self.store = open_store(self.config.data)
        self.data: TrainingData | None = None  # chosen when the run starts
        evaluated = evaluated_store(self.store)
        self.init_weights = ""  # file that train.init was found to mean
        self.evaluations = background_eval.Evaluations(
            self.config.out,
            self.config.eval.during,
            dataset_name(RunFolder(self.config.out).evaluations, evaluated.path, evaluated.digest),
            self.config.eval.validation_share > 0,
        )
        self.checkpoints = Checkpoints(
            RunFolder(self.config.out).checkpoints.path,
            self.config.checkpoint.keep,
            self.config.checkpoint.keep_every,
            world.side,
            world.device,
            self.check_lease,
            self.evaluations.steps_to_keep,
        )

    def run(self) -> loop.Stop:
        """Train from the newest checkpoint to the last step, or to a signal."""
        self.check_share()
        # train.resume=never and must are for the first start only: a run that its launcher has
        # started again resumes
        wanted = "auto" if ranks.restarts(os.environ) else self.config.train.resume
        saved = collectives.from_first(
            lambda: find_start(self.checkpoints, wanted, self.config, self.allow_change)
        )
        if saved is not None:
            self.resolved = with_split_of(self.resolved, saved)
            self.config = self.resolved.value
        config = self.config
        data = self.data = training_data(config, self.store, saved)
        if self.world.ranks.is_first:
            for line in data.lines:
                console.say(line)
            found = data_warnings(config, self.store, data.rows, saved, data.digest)
            for line in (*warnings(self.resolved), *found):
                console.warn(line)
        pair = self.build_pair()
        updater = optim.Updater(pair, config.optim, self.world.num_copies)
        if saved is not None:
            start = self.restore(saved, pair, updater)
        else:
            start = self.first_weights(pair)
        if start >= config.train.steps:
            console.say(f"{config.out} has all its {config.train.steps} steps; nothing to train")
            return loop.Stop(start)
        collectives.from_first(lambda: self.write_records(data, start, saved))
        if pair.student.backbone.attention == "auto":
            dtype = torch.bfloat16 if config.train.precision == "bf16" else config.train.dtype
            console.say(f"model.attention=auto: {choose(self.world.device, dtype)}")
        batches = self.batches(data, start)
        try:
            with (
                trackers.MetricsWriter(
                    config.out, config.log, start_step=start, num_steps=config.train.steps
                ) as writer,
                console.TrainProgress(config.train.steps, start, config.log.every) as progress,
            ):
                hooks = self.hooks(pair, updater, writer, progress)
                with compiled.naming_failures():
                    stop = self.trainer(pair, updater, hooks).run(batches, start)
        except LostRank:  # a save in progress will never end: do not wait for it
            raise
        except BaseException:
            self.checkpoints.settle()
            raise
        finally:
            batches.close()
            self.checkpoints.close()
        if not stop.signal:
            report = f"`tapct report {config.out}`"
            console.say(f"trained: {config.out}; {report} shows whether it learns")
        return stop

    def check_lease(self) -> None:
        """Raise LostLease where another process has taken over the run folder."""
        if self.lease is not None:
            self.lease.check()

    def write_records(self, data: TrainingData, start: int, saved: Path | None) -> None:
        """Write what the run is and which scans it is trained on; only the first rank does."""
        write_run_files(
            self.config.out,
            self.resolved,
            self.store,
            self.command,
            data,
            step=start,
            world=self.world.ranks.world,
        )
        lineage.update(
            self.config.out, self.store, data.rows, start=start, saved=saved, init=self.init_weights
        )

    def check_share(self) -> None:
        """Raise SharedError where the ranks cannot share `train.global_batch` equally, or have too
        little of it.
        """
        for stage in self.config.resolved_stages():
            config: RunConfig = stage.config
            try:
                config.check_share(self.world.ranks.world)
            except UserError as error:
                raise SharedError(stage.with_name(str(error))) from error

    def build_pair(self) -> StudentTeacher:
        """Student and teacher with their first weights, the same at any number of ranks; sharded
        over several.
        """
        config = self.config
        # The global random state is only for plug-ins that draw from it; tapct draws by keys. It
        # differs between ranks, and a checkpoint restores it.
        torch.manual_seed(config.seed + self.world.ranks.rank)
        pair = StudentTeacher(
            config.model,
            config.losses,
            config.seed,
            device=self.world.device,
            dtype=config.train.dtype,
            shard=fsdp.sharder(self.world.mesh, bf16=config.train.precision == "bf16"),
        )
        if compiled.decide(config.train.compile, self.world.device):
            console.say(
                "train.compile: the blocks are compiled in the first steps, which may take minutes"
            )
            compiled.compile_blocks(pair)
        # after compiling: a block's compiled forward is recomputed as a whole
        recompute.recompute_blocks(pair.student.backbone, config.train.recompute)
        return pair

    def first_weights(self, pair: StudentTeacher) -> int:
        """Replace random weights by those of `train.init`, if it is set; returns step 0."""
        if self.config.train.init:
            source = collectives.from_first(lambda: sources.locate(Path(self.config.train.init)))
            self.init_weights = str(source)
            report = initial.apply(source, pair, self.config.train)
            for line in report.lines():
                console.say(line)
        return 0

    def restore(self, saved: Path, pair: StudentTeacher, updater: optim.Updater) -> int:
        """Load a checkpoint; returns its step."""
        began = time.perf_counter()
        meta = checkpoint.read_meta(saved)
        checkpoint.load(saved, pair, updater.optimizer)
        if self.world.ranks.is_first and saved.parent == self.checkpoints.folder:
            self.checkpoints.announce(saved)
        took = time.perf_counter() - began
        console.say(
            f"resuming from {saved} at step {meta.step} of {self.config.train.steps}, read in "
            f"{took:.1f} s"
        )
        return meta.step

    def batches(self, data: TrainingData, start: int) -> Generator[tuple[Batch, ...], None, None]:
        """Slabs of this rank from step `start` on, from one loader per stage."""
        for stage in self.config.resolved_stages():
            if stage.stop <= start:
                continue
            config: RunConfig = stage.config
            first_step = max(stage.start, start)
            with loader.build(
                config.data.loader,
                self.store,
                seed=config.seed,
                rank=self.world.ranks.rank,
                world=self.world.ranks.world,
                accumulation=config.train.accumulation,
                global_batch=config.train.global_batch,
                start_step=first_step,
                pin=self.world.device.type == "cuda",
                rows=data.drawn,
            ) as batches:
                yield from islice(batches, stage.stop - first_step)

    def hooks(
        self,
        pair: StudentTeacher,
        updater: optim.Updater,
        writer: trackers.MetricsWriter,
        progress: console.TrainProgress,
    ) -> loop.Hooks:
        """The hooks of the loop: only the first rank logs and prints, all ranks save."""
        settings, is_first = self.config.checkpoint, self.world.ranks.is_first

        def log(record: Record) -> None:
            if is_first:
                self.check_lease()
                writer.write(record)
                progress.update(record)

        def save(step: int, last: bool) -> None:
            meta = Meta(
                step=step,
                samples=step * self.config.train.global_batch,
                config=self.resolved.to_dict(),
                data_digest=self.store.digest if self.data is None else self.data.digest,
                world=self.world.ranks.world,
            )
            with self.continuing_without():  # if the previous save has failed, this one is made
                self.checkpoints.finish()
            with self.continuing_without(last):
                self.checkpoints.begin(meta, pair, updater.optimizer)
                if last or not settings.asynchronous:
                    self.checkpoints.finish()
            self.evaluations.expect(step, last=step == self.config.train.steps)

        def look_after() -> bool:
            if self.lease is not None and self.lease.is_lost:  # noticed with a heartbeat
                self.lease.check()
            if is_first:
                self.evaluations.start_due(self.checkpoints)
            return settings.on_error == "stop" and self.checkpoints.failed()

        return loop.Hooks(log, save, look_after, console.say)

    @contextmanager
    def continuing_without(self, last: bool = False) -> Iterator[None]:
        """Print why a checkpoint could not be written and continue, if `checkpoint.on_error` asks
        for it.

        A process that has lost its lease stops whatever the setting is: the folder belongs to
        another one.

        Args:
            last: whether it is the last checkpoint; its error ends the run.
        """
        try:
            yield
        except LostLease:
            raise
        except UserError as error:
            if last or self.config.checkpoint.on_error == "stop":
                raise
            console.say(f"continuing without it: {error}")

    def trainer(
        self, pair: StudentTeacher, updater: optim.Updater, hooks: loop.Hooks
    ) -> loop.Trainer:
        """The loop, with the settings of all stages: a wrong one raises before the first step."""
        stages = [stage_settings(stage, pair) for stage in self.config.resolved_stages()]
        cadence = loop.Cadence(
            self.config.log.every, self.config.checkpoint.every, self.config.parallel
        )
        archives = None
        if isinstance(self.store, StoreGroup):
            archives = Archives(self.store.names, tuple(self.store.scans.ends))
        return loop.Trainer(pair, updater, stages, hooks, cadence, self.world, archives)


def stage_settings(stage: ResolvedStage, pair: StudentTeacher) -> loop.StageSettings:
    """The settings of the loop in a stage.

    Raises:
        SharedError: the pair's losses or the schedules cannot have these settings.
    """
    config: RunConfig = stage.config
    patch = pair.student.backbone.patch
    inputs = Inputs(config.views, config.masks, config.contract, patch, config.seed)
    try:
        pair.with_settings(config.losses)
        schedules = Schedules(config.optim, config.train.steps, config.train.global_batch)
    except UserError as error:
        raise SharedError(stage.with_name(str(error))) from error
    return loop.StageSettings(
        start=stage.start,
        title=stage.with_name(stage.changes),
        config=config.train,
        inputs=inputs,
        schedules=schedules,
        optim=config.optim,
        losses=config.losses,
    )
