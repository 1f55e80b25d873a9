"""Stages: parts of one run with other settings, each from a step on until the next one begins or
the run ends.

Before the first stage the config itself holds. A stage is the config with its own `key=value`
overrides, and takes nothing from the stages before it: each can be read by itself. Weights,
moments, centres, the sampler and all draws continue.

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
        r"(seed|train\.steps|train\.global_batch|data\.store|data\.held_out)$",
        "it says which scan comes at which step",
    ),
    (r"model\.", "the weights are built by it once"),
    (r"contract\.", "the exported weights have one"),
    (r"", "it is of the whole run"),
)


@dataclass(frozen=True)
class StageConfig:
    """When a stage begins and what it changes."""

    start: int = setting(dataclasses.MISSING, "finished steps after which it holds", ge=1)
    set: tuple[str, ...] = setting(
        (), "key=value, as on the command line; none: the config itself holds again"
    )


@dataclass(frozen=True)
class Part:
    """A stretch of a run with one config.

    Args:
        start: finished steps at its begin.
        stop: finished steps at its end.
        config: of these steps, whole.
        name: `stages[0]`, empty before the first stage.
        words: what it changes, for people.
    """

    start: int
    stop: int
    config: Any
    name: str = ""
    words: str = ""

    def says(self, text: str) -> str:
        """A line about this part."""
        return f"{self.name}: {text}" if self.name else text


def parts_of(config: Any, stages: Sequence[StageConfig], steps: int) -> list[Part]:
    """The whole run, part by part.

    Args:
        config: a RunConfig, as it holds before the first stage.
        stages: of it, in order.
        steps: of the whole run.
    Raises:
        ConfigError: a stage that never holds, or that sets what is unknown, wrong, or kept for the
            whole run.
    """
    parts = [Part(0, steps, config)]
    for stage in stages:
        name, before = f"stages[{len(parts) - 1}]", parts[-1]
        if before.start >= stage.start:
            raise ConfigError(
                f"{name}.start {stage.start} is not after {before.start}, where {before.name} "
                "starts"
            )
        if stage.start >= steps:
            raise ConfigError(
                f"{name}.start {stage.start} is not less than train.steps {steps}; lower it"
            )
        parts[-1] = dataclasses.replace(before, stop=stage.start)
        words = " ".join(stage.set) or "the config itself"
        parts.append(Part(stage.start, steps, config_of(config, stage, name), name, words))
    return parts


def config_of(config: Any, stage: StageConfig, name: str) -> Any:
    """The config that holds in a stage.

    Args:
        config: a RunConfig, as it holds before the first stage.
        stage: one of its stages.
        name: for error lines.
    Raises:
        ConfigError: a word is unknown or wrong, or changes what is kept for the whole run.
    """
    before = {**to_dict(config), "stages": []}
    result = configs.from_dict(type(config), before, name, stage.set)
    old, new = flatten(before), flatten(to_dict(result))
    if [loss.name for loss in result.losses] != [loss.name for loss in config.losses]:
        raise ConfigError(
            f"{name}: a loss cannot come or go in a stage; set its weight to 0 where it shall not "
            "count"
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
