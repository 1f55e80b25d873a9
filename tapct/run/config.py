"""The whole config of a run: one section per part of tapct."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from tapct.base.exits import UserError
from tapct.base.geometry import patch_grid
from tapct.config import plugins, setting
from tapct.config.plugins import Plugin
from tapct.data.loading.batch_share import BatchShare
from tapct.distributed.config import Config
from tapct.engine import checkpoint, loop, optim, trackers
from tapct.eval import runner
from tapct.run.data_config import DataConfig
from tapct.run.stages import ResolvedStage, StageConfig, resolve_stages
from tapct.ssl import needs
from tapct.types import HUContract
from tapct.views import masks, recipe


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of; one section per part of tapct."""

    out: Path = setting(Path("runs/default"), "run folder")
    seed: int = setting(0, "random seed of weights, sampler, views and masks", ge=0, lt=2**63)
    device: str = setting(
        "auto", "auto: a GPU if there is one, else the CPU", choices=("auto", "cpu", "cuda")
    )
    data: DataConfig = field(default_factory=DataConfig)
    contract: HUContract = field(default_factory=HUContract)
    views: recipe.Config = field(default_factory=recipe.Config)
    masks: masks.Config = field(default_factory=masks.Config)
    model: Plugin = plugins.section("models", "vit", "backbone of student and teacher")
    losses: tuple[Plugin, ...] = plugins.table(
        "losses", ("dino", "ibot", "koleo"), "losses; their terms are summed"
    )
    optim: optim.Config = field(default_factory=optim.Config)
    train: loop.Config = field(default_factory=loop.Config)
    parallel: Config = field(default_factory=Config)
    checkpoint: checkpoint.Config = field(default_factory=checkpoint.Config)
    log: trackers.Config = field(default_factory=trackers.Config)
    eval: runner.Config = field(default_factory=runner.Config)
    stages: tuple[StageConfig, ...] = setting(
        (),
        "list of {start, set}: after `start` finished steps, the settings in `set` (a list of "
        "key=value) replace those of the config, until the next stage starts",
    )

    def __post_init__(self) -> None:
        deepest = self.views.slices_needed()
        if self.data.loader.slab_depth < deepest:
            raise UserError(
                f"data.loader.slab_depth {self.data.loader.slab_depth} is less than the "
                f"{deepest:g} slices that the "
                "deepest view needs, so every view would be filled up with air; raise it"
            )
        needs.check_channels(self.model)
        patch = needs.patch_of(self.model)
        patch_grid(self.views.global_window, patch, "views.global_window")
        if self.views.num_locals:
            patch_grid(self.views.local_window, patch, "views.local_window")
        self.check_share(1)
        self.resolved_stages()

    def resolved_stages(self) -> list[ResolvedStage]:
        """All stages of the run, each with its whole config; the first one is this config."""
        return list(self._stages)

    @functools.cached_property
    def _stages(self) -> tuple[ResolvedStage, ...]:
        return tuple(resolve_stages(self, self.stages, self.train.steps))

    def share(self, world: int) -> BatchShare:
        """How `world` ranks share the global batch. Raises: UserError: not equally."""
        return BatchShare(self.train.global_batch, self.train.accumulation, world)

    def check_share(self, world: int) -> None:
        """Raise UserError where `world` ranks cannot share the global batch equally, or a loss
        needs more samples than a rank then has at once.
        """
        needs.check_min_samples(self.losses, self.share(world).micro, world)
