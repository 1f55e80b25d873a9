"""The training loop: one optimizer step after the other until the last, a signal, or a number that is not finite."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import torch

from tapct.config import setting
from tapct.data import sampler
from tapct.engine import metrics
from tapct.engine.optim import Updater
from tapct.nn.layers import DropKey
from tapct.ssl import step as ssl_step
from tapct.ssl.schedules import Schedules
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Batch, HUContract, Masks, UserError, Views
from tapct.views import masks as view_masks
from tapct.views import recipe


@dataclass(frozen=True)
class Config:
    """Length, batch and arithmetic of a run."""

    steps: int = setting(125_000, "optimizer steps; 100 'epochs' of 1250 (TAP-CT configs)", ge=1)
    global_batch: int = setting(1024, "samples per optimizer step over all ranks and micro-batches", ge=1)
    accumulation: int = setting(1, "micro-batches per optimizer step; Sinkhorn and KoLeo act within one", ge=1)
    precision: str = setting("fp32", "compute dtype of the networks: fp32, or bf16 autocast", choices=("fp32", "bf16"))
    resume: str = setting("auto", "auto: go on from a checkpoint if there is one", choices=("auto", "must", "never"))

    def __post_init__(self) -> None:
        if self.global_batch % self.accumulation:
            raise UserError(
                f"train.global_batch {self.global_batch} is not a multiple of train.accumulation {self.accumulation}; "
                "the batch of a rank is global_batch / (world x accumulation)"
            )


@dataclass(frozen=True)
class Stop:
    """Why a loop came to its end.

    Args:
        step: finished optimizer steps.
        signal: name of the signal that stopped it, empty when all steps are done.
    """

    step: int
    signal: str = ""


class SignalFlag:
    """Remembers the first stop signal instead of dying from it; the second Ctrl-C goes through."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.name = ""
        self.previous: dict[int, object] = {}

    def __enter__(self) -> SignalFlag:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self.previous[number] = signal.signal(number, self.notice)
        return self

    def notice(self, number: int, frame: FrameType | None) -> None:
        """Handler of all four signals."""
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Recipe:
    """What turns a batch into views and masks.

    Args:
        views: crops and intensity ops.
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
        z, y, x = (window // patch for window, patch in zip(self.views.global_window, self.patch, strict=True))
        return z, y, x


@dataclass(frozen=True)
class Hooks:
    """What the loop calls out to; `run.py` hands these in.

    Args:
        log: gets each step's record, in order.
        save: writes a checkpoint of this many finished steps.
    """

    log: Callable[[metrics.Record], None]
    save: Callable[[int], object]


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
    ) -> None:
        self.pair, self.updater, self.schedules, self.config = pair, updater, schedules, config
        self.recipe, self.hooks, self.log_every, self.save_every = recipe, hooks, log_every, save_every
        self.device = next(pair.parameters()).device
        self.pending = metrics.Pending()
        self.sample_numbers: dict[int, list[int]] = {}

    def run(self, batches: Iterator[tuple[Batch, ...]], start: int) -> Stop:
        """Train from step `start` to the last one, or to a signal; ends with a checkpoint in both cases.

        Args:
            batches: one tuple of micro-batches per optimizer step, beginning with step `start`.
            start: finished optimizer steps.
        Raises:
            UserError: a loss or gradient was not finite; the weights are those before it, none were saved.
        """
        self.pair.train()
        saved = start
        with SignalFlag() as flag:
            for step in range(start, self.config.steps):
                self.optimizer_step(step, batches)
                done = step + 1
                due = done % self.save_every == 0 or done == self.config.steps or bool(flag.name)
                if due or done % self.log_every == 0:
                    self.flush()
                if due:
                    self.hooks.save(done)
                    saved = done
                if flag.name:
                    return Stop(saved, flag.name if done < self.config.steps else "")
        return Stop(saved)

    def optimizer_step(self, step: int, batches: Iterator[tuple[Batch, ...]]) -> None:
        """Forward and backward of all micro-batches, one update, and the numbers of it."""
        timer = metrics.StageTimer(self.device)
        values = self.schedules.at(step)
        counts = self.mask_counts(step)
        with timer.stage("step"):
            with timer.stage("data"):
                micro_batches = next(batches)
            self.sample_numbers[step + 1] = [n for batch in micro_batches for n in batch.sample_B.tolist()]
            outputs = []
            for micro, batch in enumerate(micro_batches):
                with timer.stage("views"):
                    views, masks = self.make_inputs(step, micro, batch, counts)
                with timer.stage("forward_backward"):
                    key = DropKey(self.recipe.seed, step, micro)
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                        output = ssl_step.forward(self.pair, views, masks, values.teacher_temp, key)
                    (output.total / self.config.accumulation).backward()
                outputs.append(output)
            with timer.stage("optimizer"):
                report = self.updater.step(values, metrics.mean([output.total for output in outputs]))
            numbers = metrics.readings(outputs, report, with_rank=(step + 1) % self.log_every == 0)
        self.pending.add(step + 1, (step + 1) * self.config.global_batch, values, numbers, timer)

    def mask_counts(self, step: int) -> list[int]:
        """Masked tokens of every global crop of the step, all ranks and micro-batches, crop-major."""
        num_tokens = self.recipe.grid[0] * self.recipe.grid[1] * self.recipe.grid[2]
        num_crops = self.recipe.views.num_globals * self.config.global_batch
        return view_masks.counts(
            self.recipe.masks, num_crops_global=num_crops, num_tokens=num_tokens, seed=self.recipe.seed, step=step
        )

    def make_inputs(self, step: int, micro: int, batch: Batch, counts: list[int]) -> tuple[Views, Masks]:
        """Views and masks of one micro-batch, on the device."""
        config = self.config
        samples = sampler.samples_of(
            step, micro, 0, world=1, accumulation=config.accumulation, global_batch=config.global_batch
        )
        views_of_all = range(0, len(counts), config.global_batch)  # where each view's crops begin in the whole step
        mine = [counts[view + sample % config.global_batch] for view in views_of_all for sample in samples]
        batch = batch.to(self.device)
        views = recipe.make_views(batch, self.recipe.views, self.recipe.contract, self.recipe.seed, self.recipe.patch)
        masks = view_masks.draw(
            mine, self.recipe.grid, views.global_in_scan_VBN, batch.sample_B, self.recipe.masks, self.recipe.seed
        )
        return views, masks

    def flush(self) -> None:
        """Fetch the numbers of all steps since the last time, check them, and hand them on."""
        records = self.pending.fetch()
        broken = metrics.first_not_finite(records)
        for record in records:
            pace = self.config.global_batch / max(record["seconds/step"], 1e-9)
            self.hooks.log({**record, "samples_per_second": pace})
        if broken is not None:
            record, name = broken
            samples = self.sample_numbers[int(record["step"])]
            raise UserError(
                f"step {record['step']:.0f}: {name} is {record[name]}; nothing moved since the step before. Samples "
                f"{samples}. The last checkpoint is whole, but the same command would end here again: start anew in "
                "another out= with a lower optim.lr, or without these scans"
            )
        self.sample_numbers.clear()
