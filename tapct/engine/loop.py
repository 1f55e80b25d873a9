"""The training loop: one optimizer step after the other until the last, a signal, or a number that
is not finite.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tapct.base.exits import SharedError, UserError
from tapct.base.ranks import Ranks
from tapct.config import setting
from tapct.config.plugins import Plugin
from tapct.data import sampler
from tapct.distributed import watch as watch_module
from tapct.distributed import world as parallel
from tapct.distributed.collectives import Packet, own_slot
from tapct.distributed.world import World
from tapct.engine import compiled, desync, fsdp, initial, metrics, optim, vitals
from tapct.engine.optim import Updater
from tapct.engine.stop import FAILED_SAVE, StopFlag, job_deadline
from tapct.engine.upload import Upload
from tapct.nn.layers import DropKey
from tapct.ssl import step as ssl_step
from tapct.ssl.schedules import Schedules
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Batch, HUContract, Masks, Views
from tapct.views import masks as view_masks
from tapct.views import recipe


@dataclass(frozen=True)
class Config:
    """Length, batch and arithmetic of a run."""

    steps: int = setting(125_000, "optimizer steps; 100 'epochs' of 1250 (TAP-CT configs)", ge=1)
    global_batch: int = setting(
        1024, "samples per optimizer step over all ranks and micro-batches", ge=1
    )
    accumulation: int = setting(
        1, "micro-batches per optimizer step; Sinkhorn and KoLeo act within one", ge=1
    )
    precision: str = setting(
        "fp32",
        "compute dtype of the networks: fp32; bf16 autocast over float32 weights; fp64 "
        "throughout, to check equality",
        choices=("fp32", "bf16", "fp64"),
    )
    compile: str = setting(
        "auto",
        "torch.compile of every block of student and teacher: auto (on a GPU), always or never",
        choices=compiled.WANTED,
    )
    recompute: int = setting(
        0,
        "activation checkpointing: 1 computes each block again in the backward pass instead of "
        "keeping it, 2 every "
        "second block, and so on; 0 none",
        ge=0,
    )
    resume: str = setting(
        "auto",
        "auto: resume from the run's newest checkpoint if there is one; must: there has to be one; "
        "never: there must be none; else the path of a checkpoint or run from which a run without "
        "a checkpoint of its own starts",
    )
    init: str = setting(
        "",
        "weights that a new run starts from: a run, checkpoint, export or .safetensors file; "
        "empty: random ones",
    )
    init_allow: tuple[str, ...] = setting(
        (), "what else than a perfect fit is meant: missing, resized, unexpected"
    )
    save_before_end_s: float = setting(
        60.0,
        "in a SLURM job, save and stop this many seconds before its time ends, without a signal "
        "too",
        ge=0.0,
    )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and loss state."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def __post_init__(self) -> None:
        for kind in self.init_allow:
            if kind not in initial.KINDS:
                raise UserError(f"train.init_allow: {kind} is none of {', '.join(initial.KINDS)}")
        if self.global_batch % self.accumulation:
            raise UserError(
                f"train.global_batch {self.global_batch} is not a multiple of train.accumulation "
                f"{self.accumulation}; "
                "the batch of a rank is global_batch / (world x accumulation)"
            )


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
class Recipe:
    """What turns a batch into views and masks.

    Args:
        views: crops and ops on them.
        masks: block masks.
        contract: HU to network input.
        patch: (z, y, x) voxels of a token.
        seed: of the run.
    """

    views: recipe.Config
    masks: view_masks.Config
    contract: HUContract
    patch: tuple[int, int, int]
    seed: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patch tokens of a global crop along (z, y, x)."""
        z, y, x = (
            window // patch
            for window, patch in zip(self.views.global_window, self.patch, strict=True)
        )
        return z, y, x


@dataclass(frozen=True)
class Hooks:
    """What the loop calls out to; `run.py` hands these in.

    Args:
        log: gets each step's record, in order.
        save: begins a checkpoint of this many finished steps; the bool says that nothing follows,
            so it ends it too.
        look_after: called after every step for what goes on beside training; whether a save that
            was begun has failed, and training shall not go on without it.
        say: tells people a line.
    """

    log: Callable[[metrics.Record], None]
    save: Callable[[int, bool], object]
    look_after: Callable[[], bool] = lambda: False
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Stage:
    """What holds from a step on, until the next stage.

    Args:
        start: finished steps at its begin.
        told: a line for people.
        config: precision, length and global batch are those of the run.
        recipe: views and masks.
        schedules: values by step.
        optim: clipping and moments; its groups are those of the run.
        losses: settings of the run's losses.
    """

    start: int
    told: str
    config: Config
    recipe: Recipe
    schedules: Schedules
    optim: optim.Config
    losses: tuple[Plugin, ...]


class Trainer:
    """Runs optimizer steps on one rank.

    Args:
        pair: student, teacher and losses, on their device.
        updater: optimizer and teacher.
        schedules: values by step.
        config: length, batch, precision.
        recipe: views and masks.
        hooks: logging and saving.
        log_every: steps between two fetches of the metrics.
        save_every: steps between two checkpoints.
        world: this rank's place among the others; None: it is alone.
        parallel_config: how often ranks are compared, and when one is called slow.
        stages: in order; before the first one the arguments above hold.
    """

    def __init__(
        self,
        pair: StudentTeacher,
        updater: Updater,
        schedules: Schedules,
        config: Config,
        recipe: Recipe,
        hooks: Hooks,
        log_every: int,
        save_every: int,
        world: World | None = None,
        parallel_config: parallel.Config | None = None,
        stages: Sequence[Stage] = (),
    ) -> None:
        self.pair, self.updater, self.schedules, self.config = pair, updater, schedules, config
        self.recipe, self.hooks, self.log_every, self.save_every = (
            recipe,
            hooks,
            log_every,
            save_every,
        )
        self.device = next(pair.parameters()).device
        self.upload = Upload(self.device)
        self.world = world or World(Ranks(), self.device)
        self.parallel = parallel_config or parallel.Config()
        self.stages = stages
        self.stage: Stage | None = None  # that holds now
        self.flag = StopFlag(
            self.device,
            self.world.ranks.world == 1,
            job_deadline(os.environ, config.save_before_end_s),
        )
        self.pending = metrics.Pending()
        self.not_finite: list[tuple[int, Tensor]] = []  # step, which ranks' loss was not finite
        self.silent_until = 0.0  # about a slow rank
        self.vitals = vitals.Vitals(schedules.warmup_steps, vitals.window_of(config.steps))
        self.ln_k: dict[str, float] = {}  # of each prototype loss
        self.save_seconds = 0.0  # that training stood still for the last save

    def run(self, batches: Iterator[tuple[Batch, ...]], start: int) -> Stop:
        """Train from step `start` to the last one, or to a signal on any rank; ends with a
        checkpoint in both cases.

        Args:
            batches: one tuple of this rank's micro-batches per optimizer step, beginning with step
                `start`.
            start: finished optimizer steps.
        Raises:
            UserError: a loss or gradient was not finite; the weights are those before it, none were
                saved. Or a checkpoint could not be written, or a rank was lost.
        """
        self.pair.train()
        with self.flag, watch_module.watch(self.world, self.parallel) as watch:
            for step in range(start, self.config.steps):
                self.enter_stage(step)
                with watch.naming_lost_ranks():
                    watch.at(step, "training")
                    self.optimizer_step(step, batches)
                done = step + 1
                reason = self.flag.agreed()
                last = done == self.config.steps or bool(reason)
                due = last or done % self.save_every == 0
                if due or done % self.log_every == 0:
                    self.flush()
                    fsdp.forget_order(self.pair)
                if self.parallel.desync_every and done % self.parallel.desync_every == 0:
                    with watch.naming_lost_ranks():
                        desync.check_sync(self.pair, self.world, done)
                self.flag.failed_save = self.hooks.look_after()
                if due:
                    began = time.perf_counter()
                    with watch.naming_lost_ranks():
                        watch.at(step, "saving")
                        self.hooks.save(done, last)
                    self.save_seconds = time.perf_counter() - began
                if reason == FAILED_SAVE:
                    raise UserError(
                        f"stopped at step {done}: another rank could not write its part of a "
                        "checkpoint"
                    )
                if last:
                    return Stop(done, reason if done < self.config.steps else "")
        return Stop(start)

    def enter_stage(self, step: int) -> None:
        """Go on with the settings of the stage that holds at a step; what was learned and held so
        far stays.
        """
        due = next((stage for stage in reversed(self.stages) if stage.start <= step), None)
        if due is None or due is self.stage:
            return
        self.flush()  # judged by the settings that they came from
        self.stage, self.config, self.recipe, self.schedules = (
            due,
            due.config,
            due.recipe,
            due.schedules,
        )
        self.updater.config = due.optim
        self.pair.change_losses(due.losses)
        self.hooks.say(f"{due.told} from step {due.start} on")

    def optimizer_step(self, step: int, batches: Iterator[tuple[Batch, ...]]) -> None:
        """Forward and backward of all micro-batches, one update, and the numbers of it."""
        timer = metrics.StageTimer(self.device)
        values = self.schedules.at(step)
        counts = self.mask_counts(step)
        self.pair.refresh_snapshot(step, self.updater.bad == 0)
        packet, began = Packet(), time.perf_counter()
        with timer.stage("step"):
            with timer.stage("data"):
                micro_batches = next(batches)
            outputs: list[ssl_step.StepOutput] = []
            for micro, batch in enumerate(micro_batches):
                with timer.stage("views"):
                    views, masks = self.make_inputs(step, micro, batch, counts)
                if (
                    micro == 0
                    # before the step's first collective: what comes after waits for the slowest
                    # rank
                ):
                    packet.sum("arrival", own_slot(time.perf_counter() - began, self.device))
                with timer.stage("forward_backward"):
                    output = self.forward_backward(step, micro, views, masks, values.teacher_temp)
                # health looks at the last micro-batch alone: else the tokens of all of them would
                # lie in memory
                outputs = [*(replace(one, tokens=output.tokens) for one in outputs), output]
            self.ln_k = vitals.ln_prototypes(outputs[0])
            with timer.stage("optimizer"):
                metrics.collect(outputs, packet)
                packet.sum("stop", self.flag.slots())
                report = self.updater.step(
                    values, metrics.mean([output.total for output in outputs]), packet
                )
                self.flag.hear(packet["stop"])
                self.not_finite.append((step, report.not_finite_W))
            numbers = metrics.readings(
                outputs, packet, report, with_rank=(step + 1) % self.log_every == 0
            )
            numbers += metrics.arrivals(packet["arrival"])
        saving, self.save_seconds = self.save_seconds, 0.0
        self.pending.add(
            step + 1, (step + 1) * self.config.global_batch, values, numbers, timer, saving
        )

    def forward_backward(
        self, step: int, micro: int, views: Views, masks: Masks, temp: float
    ) -> ssl_step.StepOutput:
        """One micro-batch; ranks reduce the gradients after the last of a step."""
        if self.config.accumulation > 1 and self.world.mesh is not None:
            fsdp.sync_gradients(self.pair, micro == self.config.accumulation - 1)
        key = DropKey(self.recipe.seed, step, micro, self.world.ranks.rank)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            output = ssl_step.forward(
                self.pair, views, masks, temp, key, self.pair.uses_snapshot(step)
            )
        (output.total / self.config.accumulation).backward()
        return output

    def mask_counts(self, step: int) -> list[int]:
        """Masked tokens of every global crop of the step, all ranks and micro-batches,
        crop-major.
        """
        num_tokens = self.recipe.grid[0] * self.recipe.grid[1] * self.recipe.grid[2]
        num_crops = self.recipe.views.num_globals * self.config.global_batch
        return view_masks.counts(
            self.recipe.masks,
            num_crops_global=num_crops,
            num_tokens=num_tokens,
            seed=self.recipe.seed,
            step=step,
        )

    def make_inputs(
        self, step: int, micro: int, batch: Batch, counts: list[int]
    ) -> tuple[Views, Masks]:
        """Views and masks of one micro-batch, on the device."""
        config = self.config
        rank, world = self.world.ranks.rank, self.world.ranks.world
        samples = sampler.samples_of(
            step,
            micro,
            rank,
            world=world,
            accumulation=config.accumulation,
            global_batch=config.global_batch,
        )
        views_of_all = range(
            0, len(counts), config.global_batch
        )  # where each view's crops begin in the whole step
        mine = [
            counts[view + sample % config.global_batch]
            for view in views_of_all
            for sample in samples
        ]
        batch = self.upload(batch)
        views = recipe.make_views(
            batch, self.recipe.views, self.recipe.contract, self.recipe.seed, self.recipe.patch
        )
        masks = view_masks.draw(
            mine,
            self.recipe.grid,
            views.global_in_scan_VBN,
            batch.sample_B,
            self.recipe.masks,
            self.recipe.seed,
        )
        return views, masks

    def flush(self) -> None:
        """Fetch the numbers of all steps since the last time, check them, and hand them on."""
        records = self.pending.fetch()
        broken = metrics.first_not_finite(records)
        slow = metrics.straggler(records, self.parallel.straggler_factor)
        if slow and time.monotonic() > self.silent_until:
            self.hooks.say(slow)
            self.silent_until = time.monotonic() + 60.0
        for record in records:
            pace = self.config.global_batch / max(record["seconds/step"], 1e-9)
            self.hooks.log({**record, "samples_per_second": pace})
        told = self.vitals.look(records, self.ln_k)
        if told and self.world.ranks.is_first:
            self.hooks.say(told)
        if broken is not None:
            record, name = broken
            samples = self.samples_behind(int(record["step"]) - 1)
            raise SharedError(
                f"step {record['step']:.0f}: {name} is {record[name]}; nothing moved since the "
                "step before. Samples "
                f"{samples}. What was saved before is whole, but the same command would end here "
                "again: start anew in "
                "another out= with a lower optim.lr, or without these scans"
            )
        self.not_finite.clear()

    def samples_behind(self, step: int) -> list[int]:
        """Samples of the ranks whose loss was not finite in a step; of all ranks, where only a
        gradient was not.
        """
        slots_W = next(slots for at, slots in self.not_finite if at == step)
        guilty = slots_W.nonzero().flatten().tolist() or range(self.world.ranks.world)
        share = {"world": self.world.ranks.world, "accumulation": self.config.accumulation}
        parts = [
            sampler.samples_of(step, micro, rank, global_batch=self.config.global_batch, **share)
            for rank in guilty
            for micro in range(self.config.accumulation)
        ]
        return sorted(number for part in parts for number in part)
