"""The whole config of a run: one section per part of tapct."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tapct.base.exits import UserError
from tapct.config import plugins, setting
from tapct.config.plugins import Plugin
from tapct.data import loader
from tapct.distributed.config import Config
from tapct.engine import checkpoint, loop, optim, trackers
from tapct.eval import runner
from tapct.run.stages import Part, Stage, parts_of
from tapct.types import HUContract
from tapct.views import masks, recipe


@dataclass(frozen=True)
class DataConfig:
    """Which scans a run learns from."""

    store: Path = setting(Path("data/store"), "folder written by `tapct pack`")
    held_out: float = setting(
        0.0,
        "share of patients kept out of pretraining, on which `tapct eval` tests",
        ge=0.0,
        lt=1.0,
    )
    on_change: str = setting(
        "refuse",
        "when a run is resumed and the store has other scans than before: refuse, or rebase "
        "(continue with the new ones)",
        choices=("refuse", "rebase"),
    )
    loader: loader.Config = field(default_factory=loader.Config)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of; one section per part of tapct."""

    out: Path = setting(Path("runs/default"), "run folder")
    seed: int = setting(0, "of weights, sampler, views and masks", ge=0)
    device: str = setting("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    data: DataConfig = field(default_factory=DataConfig)
    contract: HUContract = field(default_factory=HUContract)
    views: recipe.Config = field(default_factory=recipe.Config)
    masks: masks.Config = field(default_factory=masks.Config)
    model: Plugin = plugins.section("models", "vit", "backbone of student and teacher")
    losses: tuple[Plugin, ...] = plugins.table(
        "losses", ("dino", "ibot", "koleo"), "terms that are summed"
    )
    optim: optim.Config = field(default_factory=optim.Config)
    train: loop.Config = field(default_factory=loop.Config)
    parallel: Config = field(default_factory=Config)
    checkpoint: checkpoint.Config = field(default_factory=checkpoint.Config)
    log: trackers.Config = field(default_factory=trackers.Config)
    eval: runner.Config = field(default_factory=runner.Config)
    stages: tuple[Stage, ...] = setting(
        (),
        "parts of the run with other settings: sections with start (finished steps) and set (a "
        "list of key=value)",
    )

    def __post_init__(self) -> None:
        deepest = self.views.slices_needed()
        if self.data.loader.slab_depth < deepest:
            raise UserError(
                f"data.loader.slab_depth {self.data.loader.slab_depth} is less than the "
                f"{deepest:g} slices that the "
                "deepest view needs, so every view would be filled up with air; raise it"
            )
        patch = getattr(self.model.config, "patch", (1, 1, 1))
        for name in ("global_window", "local_window"):
            window = getattr(self.views, name)
            if any(size % side for size, side in zip(window, patch, strict=True)):
                raise UserError(
                    f"views.{name} {list(window)} is no multiple of model.patch {list(patch)} "
                    "along every axis; "
                    "change one of them"
                )
        self.check_neighbours(1)
        self.parts()

    def parts(self) -> list[Part]:
        """The run as stretches with one config each: this one, and then its stages."""
        return parts_of(self, self.stages, self.train.steps)

    def check_neighbours(self, world: int) -> None:
        """Raise UserError where KoLeo would have a single sample to compare, on so many ranks."""
        config = next((loss.config for loss in self.losses if loss.name == "koleo"), None)
        if config is None:
            return
        ranks = 1 if config.cross_rank else world
        samples = self.train.global_batch // (ranks * self.train.accumulation)
        if samples < 2:
            raise UserError(
                f"KoLeo compares the samples of a micro-batch of a rank, which holds {samples} at "
                "train.global_batch "
                f"{self.train.global_batch}, train.accumulation {self.train.accumulation} and "
                f"{world} ranks; raise the "
                "batch, or set losses.koleo.cross_rank=true or losses.koleo=null"
            )
