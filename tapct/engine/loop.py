"""The training loop: one optimizer step after the other until the last, a signal, or a number that
is not finite.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tapct.base import metric_names
from tapct.base.exits import SharedError, UserError
from tapct.base.ranks import Ranks
from tapct.config import setting
from tapct.config.plugins import Plugin
from tapct.data.loading.batch_share import BatchShare
from tapct.distributed.collectives import Packet, own_slot
from tapct.distributed.config import Config as ParallelConfig
from tapct.distributed.watch import Watch, watch_ranks
from tapct.distributed.world import World
from tapct.engine import compiled, desync, fsdp, metrics, optim, vitals
from tapct.engine.archives import Archives, without_absent
from tapct.engine.optim import Updater
from tapct.engine.stop import FAILED_SAVE, StopFlag, job_deadline
from tapct.engine.upload import Upload
from tapct.nn.layers import DropKey
from tapct.ssl import step as ssl_step
from tapct.ssl.inputs import Inputs
from tapct.ssl.schedules import Schedules
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import FIT_KINDS, Batch, Masks, Views

# entries of the packet that ranks add up once per step, beside those of `metrics.collect`
ARRIVAL, DATA, STOP = "arrival", "data", "stop"


@dataclass(frozen=True)
class Config:
    """Length, batch and arithmetic of a run."""

    steps: int = setting(125_000, "optimizer steps; 100 'epochs' of 1250 (TAP-CT configs)", ge=1)
    global_batch: int = setting(
        1024, "number of samples per optimizer step, in all ranks and micro-batches together", ge=1
    )
    accumulation: int = setting(
        1,
        "number of micro-batches per optimizer step and rank; KoLeo uses the samples of one "
        "micro-batch, Sinkhorn uses the samples of the micro-batches that all ranks compute at "
        "the same time",
        ge=1,
    )
    precision: str = setting(
        "fp32",
        "compute dtype of the networks: fp32; bf16 (autocast, weights in float32); fp64 (to "
        "check that two ways of computing agree)",
        choices=("fp32", "bf16", "fp64"),
    )
    compile: str = setting(
        "auto",
        "torch.compile of every block of student and teacher: auto (only on a GPU), always or "
        "never",
        choices=compiled.WANTED,
    )
    recompute: int = setting(
        0,
        "activation checkpointing: 1 computes every block again in the backward pass instead of "
        "storing its activations; 2 does so for every second block, and so on; 0: no block",
        ge=0,
    )
    resume: str = setting(
        "auto",
        "auto: resume from the run's newest checkpoint if there is one; must: there has to be "
        "one; never: there must be none; or a path: if this run has no checkpoint yet, it "
        "starts from that checkpoint or run",
        is_path=True,
    )
    init: str = setting(
        "",
        "weights that a new run starts from: a run, checkpoint, export, Hugging Face folder or "
        "id, .safetensors, .pth, .pt or .bin file; empty: random weights",
        is_path=True,
    )
    init_allow: tuple[str, ...] = setting(
        (),
        "which mismatches between the weights of train.init and the model are allowed: missing, "
        "resized (which allows inflated too), inflated, unexpected",
    )
    init_window: tuple[int, int, int] | None = setting(
        None,
        "size of a crop in voxels (z, y, x) for which the positions of the weights of train.init "
        "were learned; null: read from config.json beside the weights, or guessed from the number "
        "of positions",
        ge=1,
    )
    init_inflate: str = setting(
        "mean",
        "how the patch kernel of a 2D model is spread over the slices of a patch: mean (equally) "
        "or centre (the middle slice gets all of it)",
        choices=("mean", "centre"),
    )
    save_before_end_s: float = setting(
        60.0,
        "in a SLURM job, the run saves and stops this many seconds before the time limit of the "
        "job, even if no signal arrives. If the signal of `tapct submit --grace` arrives earlier, "
        "it stops then",
        ge=0.0,
    )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and loss state."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def __post_init__(self) -> None:
        for kind in self.init_allow:
            if kind not in FIT_KINDS:
                raise UserError(f"train.init_allow: {kind} is none of {', '.join(FIT_KINDS)}")
        BatchShare.check(self.global_batch, self.accumulation)


@dataclass(frozen=True)
class Stop:
    """Why a loop came to its end.

    Args:
        step: finished optimizer steps.
        signal: name of the signal that stopped it, or `time limit`; empty when all steps are done.
    """

    step: int
    signal: str = ""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls; the run hands these in.

    Args:
        log: called with the record of each step, in order.
        save: called with the number of finished steps; begins a checkpoint. The bool is True for
            the last one: no step follows, so the hook waits until the checkpoint is written.
        look_after: called after every step for what runs beside training; returns whether an
            earlier save has failed and training must not continue without it.
        say: prints a line on the terminal.
    """

    log: Callable[[metrics.Record], None]
    save: Callable[[int, bool], object]
    look_after: Callable[[], bool] = lambda: False
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Cadence:
    """How often the loop does what it does not do in every step.

    Args:
        log_every: steps between two fetches of the metrics.
        save_every: steps between two checkpoints.
        parallel: how often the weights of the ranks are compared, how long ranks wait for each
            other, and when a rank counts as slow.
    """

    log_every: int
    save_every: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class StageSettings:
    """Settings of the loop from one step on, until the next stage of the run starts.

    Args:
        start: finished steps at which the stage starts; 0 for the first stage.
        title: what changes, for the log.
        config: length, batch and precision; of these only the accumulation differs between stages.
        inputs: how views and masks are made.
        schedules: learning rate, momentum and temperatures by step.
        optim: clipping and moments; the parameter groups are those of the whole run.
        losses: plug-in sections of the run's losses.
    """

    start: int
    title: str
    config: Config
    inputs: Inputs
    schedules: Schedules
    optim: optim.Config
    losses: tuple[Plugin, ...]


class Trainer:
    """Runs optimizer steps on one rank.

    Args:
        pair: student, teacher and losses, on their device and with the losses of the first stage.
        updater: optimizer and teacher, with the settings of the first stage.
        stages: settings by step, in order; the first one starts at step 0.
        hooks: logging and saving.
        cadence: how often metrics are fetched and checkpoints written.
        world: this rank's place among the others; None where it is alone.
        archives: archives that the run is trained on; None for a single one.
    """

    def __init__(
        self,
        pair: StudentTeacher,
        updater: Updater,
        stages: Sequence[StageSettings],
        hooks: Hooks,
        cadence: Cadence,
        world: World | None = None,
        archives: Archives | None = None,
    ) -> None:
        assert stages[0].start == 0
        self.archives = archives
        self.pair, self.updater, self.hooks, self.cadence = pair, updater, hooks, cadence
        self.stages = stages
        self.stage = stages[0]  # the stage of the current step
        self.device = next(pair.parameters()).device
        self.world = world or World(Ranks(), self.device)
        self.watch = Watch(self.world, cadence.parallel)
        self.upload = Upload(self.device)
        config = self.stage.config
        self.num_ranks = self.world.ranks.world
        self.flag = StopFlag(
            self.device,
            alone=self.num_ranks == 1,
            deadline=job_deadline(os.environ, config.save_before_end_s),
        )
        self.pending = metrics.Pending()
        # per step since the last flush: its index, and 1 for each rank whose loss was not finite
        self.not_finite: list[tuple[int, Tensor]] = []
        self.silent_until = 0.0  # time before which no second line about a slow rank is printed
        self.vitals = vitals.Vitals(
            self.stage.schedules.warmup_steps, vitals.window_of(config.steps)
        )
        self.ln_k: dict[str, float] = {}  # name of a prototype loss -> ln(number of prototypes)
        self.save_seconds = 0.0  # seconds that training waited for the last save

    @property
    def share(self) -> BatchShare:
        """How ranks and micro-batches share the samples of a step in the current stage."""
        config = self.stage.config
        return BatchShare(config.global_batch, config.accumulation, self.num_ranks)

    def run(self, batches: Iterator[tuple[Batch, ...]], start: int) -> Stop:
        """Train from step `start` to the last one, or to a signal on any rank; ends with a
        checkpoint in both cases.

        Args:
            batches: one tuple of this rank's micro-batches per optimizer step, beginning with step
                `start`.
            start: finished optimizer steps.
        Raises:
            UserError: a loss or gradient was not finite (the weights are those before that step),
                a checkpoint could not be written, or a rank was lost.
        """
        steps, parallel = self.stage.config.steps, self.cadence.parallel
        self.pair.train()
        with self.flag, watch_ranks(self.watch) as watch:
            for step in range(start, steps):
                self.enter_stage(step)

                # one optimizer step
                with watch.naming_lost_ranks():
                    self.optimizer_step(step, batches)
                done = step + 1

                # Do all ranks stop here, and is a checkpoint due? On several GPUs `agreed` answers
                # with the reasons of one step earlier, so that the host does not wait.
                reason = self.flag.agreed()
                last = done == steps or bool(reason)
                save_due = last or done % self.cadence.save_every == 0

                # Fetch and log the numbers. A save comes after it, because `flush` raises where a
                # number is not finite: weights after such a step are never saved.
                if save_due or done % self.cadence.log_every == 0:
                    self.flush()
                    # else FSDP's list of gathered modules would grow as long as the run lasts
                    fsdp.forget_order(self.pair)

                # do all ranks still hold the same weights
                if parallel.desync_every and done % parallel.desync_every == 0:
                    with watch.naming_lost_ranks():
                        desync.check_sync(self.pair, self.world, done)

                # what runs beside training: evaluations, and the save that was begun last
                self.flag.failed_save = self.hooks.look_after()

                # Save. After a failed save, a rank whose own part failed raises here, with the
                # cause; a rank whose part was written raises below.
                if save_due:
                    self.save(done, last, watch)
                if reason == FAILED_SAVE:
                    raise UserError(
                        f"stopped at step {done}: another rank could not write its part of a "
                        "checkpoint"
                    )
                if done == steps:
                    return Stop(done)  # finished, even if a signal came during the last step
                if reason:
                    return Stop(done, reason)
        return Stop(start)  # no step was left; `tapct train` ends before it calls this

    def save(self, done: int, last: bool, watch: Watch) -> None:
        """Begin a checkpoint of `done` finished steps, and measure how long training waits."""
        began = time.perf_counter()
        with watch.naming_lost_ranks():
            watch.at(done - 1, "save")
            self.hooks.save(done, last)
        self.save_seconds = time.perf_counter() - began

    def enter_stage(self, step: int) -> None:
        """Change to the settings of the stage that a step belongs to; weights, moments and centres
        stay.
        """
        stage = next(stage for stage in reversed(self.stages) if stage.start <= step)
        if stage is self.stage:
            return
        self.flush()  # the numbers so far belong to the settings of the stage before
        self.stage = stage
        self.updater.config = stage.optim
        self.pair.change_losses(stage.losses)
        self.hooks.say(f"{stage.title} from step {stage.start} on")

    def optimizer_step(self, step: int, batches: Iterator[tuple[Batch, ...]]) -> None:
        """Forward and backward of all micro-batches, one update, and its numbers."""
        config = self.stage.config
        timer = metrics.PhaseTimer(self.device)
        values = self.stage.schedules.at(step)
        counts = self.stage.inputs.mask_counts(step, config.global_batch)
        self.pair.refresh_snapshot(step, self.updater.is_finite)
        packet = Packet()
        began = time.perf_counter()
        with timer.phase("step"):
            self.watch.at(step, "data")
            with timer.phase("data"):
                micro_batches = next(batches)
            data_s = time.perf_counter() - began

            # gradients of all micro-batches, added up
            outputs: list[ssl_step.StepOutput] = []
            by_archive: list[Tensor | None] = []
            for micro, batch in enumerate(micro_batches):
                self.watch.at(step, "views")
                with timer.phase("views"):
                    views, masks = self.make_inputs(step, micro, batch, counts)
                if micro == 0:
                    # before the first collective of the step: after it, all wait for the slowest
                    packet.sum(ARRIVAL, own_slot(time.perf_counter() - began, self.device))
                    packet.sum(DATA, own_slot(data_s, self.device))
                self.watch.at(step, "forward")
                with timer.phase("forward_backward"):
                    output = self.forward_backward(step, micro, views, masks, values.teacher_temp)
                metrics.append_output(outputs, output)
                if self.archives is not None:
                    by_archive.append(self.archives.sums(output, batch))
            self.ln_k = vitals.ln_prototypes(outputs[0])

            # one update of student and teacher, and one collective for all that ranks agree on
            with timer.phase("optimizer"):
                metrics.collect(outputs, packet)
                if self.archives is not None:
                    self.archives.collect(by_archive, packet)
                packet.sum(STOP, self.flag.slots())
                total = metrics.mean([output.total for output in outputs])
                self.watch.at(step, "collective")
                report = self.updater.step(
                    values, total, packet, lambda: self.watch.at(step, "optimizer")
                )
                self.flag.hear(packet[STOP])
                self.not_finite.append((step, report.not_finite_W))

            # numbers of the step; they stay on the device
            # RankMe is slow: only in the steps that are logged by the cadence, not in those that a
            # save fetches
            with_rankme = (step + 1) % self.cadence.log_every == 0
            numbers = metrics.readings(outputs, packet, report, with_rankme=with_rankme)
            numbers += metrics.arrivals(packet[ARRIVAL], packet[DATA])
            if self.archives is not None:
                numbers += self.archives.readings(packet)
        samples = (step + 1) * config.global_batch
        self.pending.add(step + 1, samples, values, numbers, timer, self.save_seconds)
        self.save_seconds = 0.0  # counted once, in the step after the save

    def make_inputs(
        self, step: int, micro: int, batch: Batch, counts: list[int]
    ) -> tuple[Views, Masks]:
        """Views and masks of one micro-batch, on the device."""
        samples = self.share.samples(step, micro, self.world.ranks.rank)
        return self.stage.inputs.make(self.upload(batch), samples, counts)

    def forward_backward(
        self, step: int, micro: int, views: Views, masks: Masks, temp: float
    ) -> ssl_step.StepOutput:
        """One micro-batch; ranks reduce the gradients after the last of a step."""
        config = self.stage.config
        if config.accumulation > 1 and self.world.mesh is not None:
            fsdp.sync_gradients(self.pair, micro == config.accumulation - 1)
        drop_key = DropKey(self.stage.inputs.seed, step, micro, self.world.ranks.rank)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            output = ssl_step.forward(
                self.pair, views, masks, temp, drop_key, self.pair.uses_snapshot(step)
            )
        (output.total / config.accumulation).backward()
        return output

    def flush(self) -> None:
        """Fetch the numbers of all steps since the last flush, check them, and log them."""
        records = [without_absent(record) for record in self.pending.fetch()]
        broken = metrics.first_not_finite(records)
        factor = self.cadence.parallel.straggler_factor
        slow = metrics.straggler(records, factor, self.watch.node_of)
        if slow and time.monotonic() > self.silent_until:
            self.hooks.say(slow)
            self.silent_until = time.monotonic() + 60.0
        for record in records:
            pace = self.stage.config.global_batch / max(record[metric_names.seconds("step")], 1e-9)
            self.hooks.log({**record, "samples_per_second": pace})
        line = self.vitals.update(records, self.ln_k)
        if line and self.world.ranks.is_first:
            self.hooks.say(line)
        if broken is not None:
            record, name = broken
            samples = self.samples_of_bad_ranks(int(record["step"]) - 1)
            raise SharedError(
                f"step {record['step']:.0f}: {name} is {record[name]}; the weights were not "
                f"updated. Samples {samples}. The checkpoints before it are whole, but resuming "
                "would fail at the same step: start a new run in another out= with a lower "
                "optim.lr, or without these scans"
            )
        self.not_finite.clear()

    def samples_of_bad_ranks(self, step: int) -> list[int]:
        """Samples of the ranks whose loss was not finite in a step; of all ranks, where only a
        gradient was not.
        """
        slots_W = dict(self.not_finite)[step]
        ranks = slots_W.nonzero().flatten().tolist() or range(self.num_ranks)
        samples: list[int] = []
        for rank in ranks:
            for micro in range(self.stage.config.accumulation):
                samples += self.share.samples(step, micro, rank)
        return sorted(samples)
