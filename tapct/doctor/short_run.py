"""A few training steps on synthetic scans in memory: the loop of `tapct train` without a store and
without files.

A slab is a pure function of its sample number, so that runs on other devices, or on another number
of ranks, see the same scans.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tapct.base import metric_names
from tapct.base.ranks import Ranks
from tapct.data.loading.batch_share import BatchShare
from tapct.distributed.world import World
from tapct.engine import compiled, fsdp, loop, optim, recompute
from tapct.engine.metrics import Record
from tapct.run.config import RunConfig
from tapct.run.pretrain import stage_settings
from tapct.ssl.needs import build_losses
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Batch

IN_PLANE = 320  # voxels of a slab along y and x
NEVER = 1 << 60  # steps between two checkpoints


@dataclass
class ShortRun:
    """A trainer whose records are kept in memory.

    Args:
        config: config of the run.
        trainer: loop with student, teacher and optimizer.
        rows: records of the finished steps.
        feed: micro-batches of every step.
    """

    config: RunConfig
    trainer: loop.Trainer
    rows: list[Record]
    feed: Iterator[tuple[Batch, ...]]

    def steps(self, number: int) -> list[Record]:
        """Take some optimizer steps; returns the records of all steps so far."""
        self.trainer.pair.train()
        first = len(self.rows)
        for step in range(first, first + number):
            self.trainer.optimizer_step(step, self.feed)
        self.trainer.flush()
        return self.rows

    def losses(self, number: int) -> list[dict[str, float]]:
        """Take some steps; returns the terms and the sum of the losses of each step so far."""
        prefix = metric_names.loss("")
        return [
            {name: value for name, value in row.items() if name.startswith(prefix)}
            for row in self.steps(number)
        ]


def start(
    config: RunConfig,
    world: World,
    backend: str = "",
    feed: Iterator[tuple[Batch, ...]] | None = None,
) -> ShortRun:
    """Build student, teacher and loop as `tapct train` does.

    Args:
        config: config of the run.
        world: this rank among the others, with its device.
        backend: back-end of torch.compile; empty: the blocks are not compiled.
        feed: micro-batches of every step; None: synthetic ones.
    """
    pair = StudentTeacher(
        config.model,
        config.losses,
        config.seed,
        device=world.device,
        dtype=config.train.dtype,
        shard=fsdp.sharder(world.mesh, bf16=config.train.precision == "bf16"),
    )
    if backend:
        compiled.compile_blocks(pair, backend)
    recompute.recompute_blocks(pair.student.backbone, config.train.recompute)
    rows: list[Record] = []
    trainer = loop.Trainer(
        pair,
        optim.Updater(pair, config.optim, world.num_copies),
        [stage_settings(config.resolved_stages()[0], pair)],
        loop.Hooks(rows.append, lambda step, last: None),
        loop.Cadence(log_every=NEVER, save_every=NEVER),
        world,
    )
    return ShortRun(config, trainer, rows, feed or synthetic(config, world.ranks, world.device))


def synthetic(
    config: RunConfig, ranks: Ranks, device: torch.device, first_step: int = 0
) -> Iterator[tuple[Batch, ...]]:
    """Micro-batches of one rank for every step.

    Args:
        config: config of the run.
        ranks: place of this rank.
        device: device of the run; for a GPU the batches lie in pinned memory.
        first_step: finished steps at the first micro-batch.
    """
    share = BatchShare(config.train.global_batch, config.train.accumulation, ranks.world)
    depth = max(config.data.loader.slab_depth, config.views.global_window[0])
    for step in itertools.count(first_step):
        micro_batches = []
        for micro in range(config.train.accumulation):
            batch = batch_of(share.samples(step, micro, ranks.rank), depth)
            if device.type == "cuda":
                batch = Batch(*(getattr(batch, each.name).pin_memory() for each in fields(batch)))
            micro_batches.append(batch)
        yield tuple(micro_batches)


def batch_of(samples: Sequence[int], depth: int, in_plane: int = IN_PLANE) -> Batch:
    """Slabs of some samples: air around a noisy ellipse of soft tissue, other in every sample.

    Args:
        samples: numbers of the samples in the whole run.
        depth: slices of a slab.
        in_plane: voxels along y and x.
    """
    slabs = [_slab(sample, depth, in_plane) for sample in samples]
    number = len(slabs)
    whole = torch.tensor([[depth, in_plane, in_plane]]).repeat(number, 1)
    zero_B = torch.zeros(number, dtype=torch.int64)
    return Batch(
        torch.stack(slabs), whole, torch.ones(number, 3), torch.tensor(list(samples)), zero_B,
        zero_B.clone(),
    )  # fmt: skip


def _slab(sample: int, depth: int, in_plane: int) -> Tensor:
    draw = torch.Generator().manual_seed(sample)
    axis = torch.linspace(-1, 1, in_plane)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centre_y, centre_x, wide = (0.4 * torch.rand(3, generator=draw) - 0.2).tolist()
    body = (y - centre_y) ** 2 + ((x - centre_x) / (1 + wide)) ** 2 < 0.6
    noise = 30 * torch.randn(depth, in_plane, in_plane, generator=draw)
    return torch.where(body, 40 + noise, -1000 + noise).clamp(min=-1024).to(torch.int16)


def shrunk(config: RunConfig, samples: int, depth: int | None = None) -> RunConfig:
    """The same config with fewer samples of a step and, if asked for, fewer blocks.

    Args:
        config: config of a run.
        samples: samples of an optimizer step; one micro-batch.
        depth: largest number of blocks; None, or a backbone without the setting: as it is.
    """
    train = replace(config.train, global_batch=samples, accumulation=1)
    config = replace(config, train=train)
    blocks = getattr(config.model.config, "depth", None)
    if depth is None or blocks is None or blocks <= depth:
        return config
    return replace(
        config, model=replace(config.model, config=replace(config.model.config, depth=depth))
    )


def with_precision(config: RunConfig, precision: str) -> RunConfig:
    """The same config with another train.precision."""
    return replace(config, train=replace(config.train, precision=precision))


def comparable_over_ranks(config: RunConfig) -> RunConfig:
    """The same config without what depends on how ranks share a batch: stochastic depth, and losses
    that compare the samples of a rank.
    """
    built = build_losses(config.losses)
    losses = tuple(loss for loss in config.losses if built[loss.name].min_samples(1) == 1)
    config = replace(config, losses=losses or config.losses)
    if getattr(config.model.config, "drop_path", 0.0) == 0.0:
        return config
    return replace(
        config, model=replace(config.model, config=replace(config.model.config, drop_path=0.0))
    )


def largest_difference(
    found: Sequence[dict[str, float]], wanted: Sequence[dict[str, float]]
) -> float:
    """Largest |a - b| / max(|b|, 0.001) over all losses of all steps."""
    assert len(found) == len(wanted) and wanted
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            worst = max(worst, abs(one[name] - value) / max(abs(value), 1e-3))
    return worst
