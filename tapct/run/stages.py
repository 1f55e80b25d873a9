"""Stages: parts of one run with other settings, each from a step on until the next one begins or
the run ends.

A `StageConfig` is what a config holds about a stage: where it starts, and `key=value` overrides. A
`ResolvedStage` is what follows from it: first and last step, and the whole config of these steps.
Before the first `StageConfig` the config itself applies, as a `ResolvedStage` without a name.

A stage is the config with its own overrides, and takes nothing from the stages before it: each can
be read by itself. Weights, moments, centres, the sampler and all draws continue.

| key | in a stage |
|---|---|
| `views.*`, `masks.*`, `losses.*`, `optim.*`, `data.loader.*` | may change (`MAY_CHANGE`) |
| `train.accumulation` | may change |
| heads, which losses there are, lr factors of layers | refused (`KEPT`) |
| everything else: model, contract, seed, length, batch, archive, logging, ... | refused |
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tapct import config as configs
from tapct.config import ConfigError, setting, to_dict
from tapct.config.flat import flatten
from tapct.ssl import needs

MAY_CHANGE = ("views.", "masks.", "losses.", "optim.", "data.loader.", "train.accumulation")
HEADS_STAY = "the heads are made once"
# Pattern of a key, and why it keeps its value for the whole run; the first match is reported.
KEPT = (
    (r"losses\..*\bhead\.", HEADS_STAY),
    (r"optim\.(layer_decay|patch_embed_lr_factor)$", "the optimizer's groups are formed once"),
    (
        r"(seed|train\.steps|train\.global_batch|data\.store|data\.held_out|data\.split_.*)$",
        "it decides which scan comes at which step",
    ),
    (r"model\.", "the weights are built by it once"),
    (r"contract\.", "the exported weights have one"),
    (r"", "it is of the whole run"),
)


@dataclass(frozen=True)
class StageConfig:
    """A stage as a config declares it: when it starts and what it changes."""

    start: int = setting(
        dataclasses.MISSING,
        "number of finished steps after which the settings of this stage apply",
        ge=1,
    )
    set: tuple[str, ...] = setting(
        (), "settings as key=value, as on the command line; empty: those of the config apply again"
    )


@dataclass(frozen=True)
class ResolvedStage:
    """A range of steps that are trained with one config.

    Args:
        start: finished steps at its start.
        stop: finished steps at its end.
        config: RunConfig of these steps.
        name: `stages[0]` for the first declared stage; empty for the steps before it.
        changes: its overrides as one line of text.
    """

    start: int
    stop: int
    config: Any
    name: str = ""
    changes: str = ""

    def with_name(self, text: str) -> str:
        """A line of text with the name of the stage before it, where it has one."""
        return f"{self.name}: {text}" if self.name else text


def resolve_stages(config: Any, stages: Sequence[StageConfig], steps: int) -> list[ResolvedStage]:
    """All stages of a run, from step 0 to the last step.

    Args:
        config: RunConfig that applies before the first declared stage.
        stages: declared stages, in order.
        steps: steps of the whole run.
    Raises:
        ConfigError: a stage applies to no step, or sets what is unknown, wrong, or fixed for the
            whole run.
    """
    resolved = [ResolvedStage(0, steps, config)]
    for number, stage in enumerate(stages):
        name, before = f"stages[{number}]", resolved[-1]
        if before.start >= stage.start:
            raise ConfigError(
                f"{name}.start {stage.start} is not after {before.start}, where {before.name} "
                "starts"
            )
        if stage.start >= steps:
            raise ConfigError(
                f"{name}.start {stage.start} is not less than train.steps {steps}; lower it"
            )
        resolved[-1] = dataclasses.replace(before, stop=stage.start)
        resolved.append(
            ResolvedStage(
                start=stage.start,
                stop=steps,
                config=config_of(config, stage, name),
                name=name,
                changes=" ".join(stage.set) or "the config itself",
            )
        )
    return resolved


def config_of(config: Any, stage: StageConfig, name: str) -> Any:
    """The config that applies in a stage.

    Args:
        config: RunConfig that applies before the first declared stage.
        stage: declared stage.
        name: name of the stage, for error lines.
    Raises:
        ConfigError: an override is unknown or wrong, or changes what is fixed for the whole run.
    """
    before = {**to_dict(config), "stages": []}
    result = configs.from_dict(type(config), before, name, stage.set)
    old, new = flatten(before), flatten(to_dict(result))
    if [loss.name for loss in result.losses] != [loss.name for loss in config.losses]:
        raise ConfigError(
            f"{name}: a stage cannot add or remove a loss; list the loss in the config, and set "
            "its weight to 0 where it is off"
        )
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    for key in changed:
        reasons = [reason for pattern, reason in KEPT[:-1] if re.match(pattern, key)]
        if reasons or not key.startswith(MAY_CHANGE):
            raise ConfigError(cannot_change(name, key, (reasons or [KEPT[-1][1]])[0]))
    losses_after = needs.build_losses(result.losses)
    for loss, built in needs.build_losses(config.losses).items():
        if built.head_of != losses_after[loss].head_of:
            keys = [key for key in changed if key.startswith(f"losses.{loss}.")]
            raise ConfigError(cannot_change(name, ", ".join(keys), HEADS_STAY))
    return result


def cannot_change(stage: str, keys: str, reason: str) -> str:
    """The line that refuses what a stage sets."""
    return (
        f"{stage}: {keys} cannot change in a stage: {reason}; views, masks, data.loader, "
        "train.accumulation and most of losses and optim can"
    )
