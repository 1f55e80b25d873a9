"""Whether a training step on a GPU would make the host wait, found out without a GPU.

The loop of `tapct train` takes whole optimizer steps on fake CUDA tensors: views, masks, forward,
backward, clipping, AdamW, teacher, centres and metrics. Every operation after which the host would
need a value of the GPU is recorded. RankMe is left out: it is known to wait, and is computed only
in the steps that are logged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tapct.doctor.fake_cuda import DEVICE, HostWaits, NeedsValue, fake_cuda
from tapct.engine import loop, optim, recompute
from tapct.plan import memory
from tapct.run.config import RunConfig
from tapct.run.pretrain import stage_settings
from tapct.ssl.inputs import Inputs
from tapct.types import Batch

SIDE = 320  # voxels of a slab along y and x
NEVER = 1 << 60  # interval of what is not done in these steps: fetching metrics, saving


@dataclass(frozen=True)
class Waits:
    """What was recorded in one optimizer step.

    Args:
        operations: operations on the GPU.
        waits: (operation, lines of tapct that called it, number of calls).
    """

    operations: int
    waits: tuple[tuple[str, str, int], ...]

    def lines(self) -> list[str]:
        """One line per operation and place."""
        return [f"{count} x {name} at {where}" for name, where, count in self.waits]


class HostCounts(Inputs):
    """Inputs whose mask counts are computed on the host's real numbers, as in training."""

    def mask_counts(self, step: int, global_batch: int) -> list[int]:
        """See `Inputs.mask_counts`."""
        with _disable_current_modes():
            return super().mask_counts(step, global_batch)


def host_waits(config: RunConfig, samples: int = 2, steps: int = 2) -> Waits:
    """Record the host's waits in the last of a few optimizer steps on fake CUDA tensors.

    The first step also makes the optimizer's moments; the last one stands for all that follow.

    Args:
        config: config of a run on one GPU.
        samples: samples of a micro-batch, in place of those of the config: the operations are the
            same, and more samples would only make more chunks of scores.
        steps: number of optimizer steps.
    """
    batch = samples * config.train.accumulation
    config = replace(config, train=replace(config.train, global_batch=batch))
    pair = memory.Valueless(config.model, config.losses)
    recompute.recompute_blocks(pair.student.backbone, config.train.recompute)
    pair.train()
    recorded = HostWaits()
    with fake_cuda():
        memory.give_shapes(pair, config.train.dtype, bf16=False, device=DEVICE)
        trainer = _trainer(config, pair)
        try:
            for step in range(steps):
                recorded = HostWaits()
                with recorded:
                    trainer.optimizer_step(step, _batches(config, samples))
        except NeedsValue:
            # fake tensors have no value to continue with; the operation is recorded
            if not recorded.waits:
                raise
    waits = tuple((*key, count) for key, count in recorded.waits.most_common())
    return Waits(recorded.operations, waits)


def _trainer(config: RunConfig, pair: memory.Valueless) -> loop.Trainer:
    """The loop of `tapct train`, which neither logs nor saves."""
    updater = optim.Updater(pair, config.optim)
    (stage,) = (stage_settings(each, pair) for each in config.resolved_stages()[:1])
    inputs = HostCounts(
        config.views, config.masks, config.contract, pair.student.backbone.patch, config.seed
    )
    hooks = loop.Hooks(lambda record: None, lambda step, last: None)
    return loop.Trainer(
        pair, updater, [replace(stage, inputs=inputs)], hooks, loop.Cadence(NEVER, NEVER)
    )


def _batches(config: RunConfig, samples: int) -> Iterator[tuple[Batch, ...]]:
    """The micro-batches of one optimizer step, in the host's memory and without values."""
    depth = max(config.data.loader.slab_depth, math.prod(config.views.global_window[:1]))

    def number() -> torch.Tensor:
        return torch.empty(samples, dtype=torch.int64)

    batch = Batch(
        hu_BZYX=torch.empty(samples, depth, SIDE, SIDE, dtype=torch.int16),
        extent_B3=torch.empty(samples, 3, dtype=torch.int64),
        spacing_mm_B3=torch.empty(samples, 3),
        sample_B=number(),
        scan_B=number(),
        slab_start_B=number(),
    )
    return iter([(batch,) * config.train.accumulation])
