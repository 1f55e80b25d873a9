"""The whole config of a run: one section per part of tapct."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tapct.base.exits import UserError
from tapct.base.geometry import patch_grid
from tapct.config import plugins, setting
from tapct.config.plugins import Plugin
from tapct.data.loading import loader
from tapct.data.loading.batch_share import BatchShare
from tapct.data.patients import split
from tapct.distributed.config import Config
from tapct.engine import checkpoint, loop, optim, trackers
from tapct.eval import runner
from tapct.run.stages import ResolvedStage, StageConfig, resolve_stages
from tapct.ssl import needs
from tapct.types import HUContract
from tapct.views import masks, recipe


@dataclass(frozen=True)
class DataConfig:
    """Which scans a run learns from."""

    store: Path = setting(Path("data/store"), "folder written by `tapct pack`")
    held_out: float = setting(
        0.0,
        "share of the patients that pretraining does not see; these are the test patients of "
        "`tapct eval`",
        ge=0.0,
        lt=1.0,
    )
    held_out_start: float = setting(
        0.0,
        "place between 0 and 1 at which the held-out share begins: with data.held_out=0.2, the "
        "values 0, 0.2, 0.4, 0.6 and 0.8 are the five folds of a cross-validation",
        ge=0.0,
        lt=1.0,
    )
    split_seed: int = setting(
        0,
        "random seed of the choice of held-out patients; it does not follow `seed`, so runs with "
        "other seeds hold out the same patients",
        ge=0,
        lt=2**63,
    )
    split_version: int = setting(
        split.VERSION,
        "rule by which held-out patients are chosen; a run that began with rule 1 keeps it",
        choices=(1, split.VERSION),
    )
    on_change: str = setting(
        "refuse",
        "when a run is resumed and the store has other scans than before: refuse, or rebase "
        "(continue with the new ones)",
        choices=("refuse", "rebase"),
    )
    loader: loader.Config = field(default_factory=loader.Config)

    def __post_init__(self) -> None:
        if self.held_out_start + self.held_out > 1 + 1e-9:
            raise UserError(
                f"data.held_out_start {self.held_out_start:g} and data.held_out {self.held_out:g} "
                "end beyond 1; their sum must be 1 or less"
            )

    def held_out_patients(self, patients: Iterable[str], run_seed: int) -> frozenset[str]:
        """The patients of a store that pretraining does not see.

        Args:
            patients: keyed hashes, one per scan.
            run_seed: `seed` of the run, which rule 1 uses.
        """
        return split.split_of_version(
            self.split_version,
            patients,
            self.held_out,
            split_seed=self.split_seed,
            run_seed=run_seed,
            start=self.held_out_start,
        )

    def one_sided(self, patients: Iterable[str], run_seed: int) -> str:
        """One line about a share above 0 that holds out nobody or everybody; empty where it does
        not. Arguments as in `held_out_patients`.
        """
        names = set(patients)
        num = len(self.held_out_patients(names, run_seed))
        if self.held_out <= 0 or not names or 0 < num < len(names):
            return ""
        if self.split_version == 1:  # it holds out nobody where there is one patient, only
            return (
                f"data.held_out {self.held_out:g} holds out none of the store's patients "
                f"({len(names)}) by rule 1 (data.split_version); set data.held_out=0"
            )
        return split.imbalance(names, self.held_out, self.split_seed, self.held_out_start)


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
