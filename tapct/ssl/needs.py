"""What a backbone and losses need, asked of their plug-ins before a run has any of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tapct.base.exits import UserError
from tapct.base.geometry import Size3
from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.nn.contracts import Loss


def patch_of(model: Plugin) -> Size3:
    """Voxels (z, y, x) of a patch.

    Args:
        model: plug-in section of the backbone.
    Raises:
        UserError: its `Config` has no `patch`.
    """
    patch: Size3 | None = getattr(model.config, "patch", None)
    if patch is None:
        raise UserError(
            f"model.name {model.name}: its Config has no patch; add it as a field or a property, "
            "voxels (z, y, x) of one patch"
        )
    return patch


def check_channels(model: Plugin) -> None:
    """Raise UserError where a backbone expects several channels: views have one, (B, Z, Y, X).

    Args:
        model: plug-in section of the backbone.
    """
    in_chans = getattr(model.config, "in_chans", 1)
    if in_chans != 1:
        raise UserError(
            f"model.in_chans is {in_chans}; a run needs 1, because the views of a CT scan have one "
            "channel, (B, Z, Y, X). Set model.in_chans=1, or build the backbone in your own code"
        )


def build_losses(losses: Sequence[Plugin]) -> dict[str, Loss]:
    """Losses by name that can be asked what they need; they hold no values.

    Args:
        losses: plug-in sections of the losses.
    """
    # a draw in a constructor must not move the draws of training
    with torch.random.fork_rng(devices=[]):
        return {each.name: _build_loss(each) for each in losses}


def _build_loss(section: Plugin) -> Loss:
    module = plugins.load("losses", section.name)
    try:
        with torch.device("meta"):  # buffers of any size cost no memory
            loss: Loss = module.build(section.config)
    except (RuntimeError, NotImplementedError):  # its constructor reads values, so it gets them
        loss = module.build(section.config)
    return loss


def losses_key(name: str) -> str:
    """Key of a loss on the command line: losses.koleo, losses[mylab.losses.variance]."""
    return f"losses[{name}]" if "." in name else f"losses.{name}"


def min_samples(losses: Sequence[Loss], world: int) -> int:
    """Fewest samples of a micro-batch of a rank that every loss accepts.

    Args:
        losses: losses of the run.
        world: number of ranks.
    """
    return max((loss.min_samples(world) for loss in losses), default=1)


def check_min_samples(losses: Sequence[Plugin], samples: int, world: int) -> None:
    """Raise UserError where a loss needs more samples than a micro-batch of a rank holds.

    Args:
        losses: plug-in sections of the losses.
        samples: samples of a micro-batch of a rank.
        world: number of ranks.
    """
    for name, loss in build_losses(losses).items():
        least = loss.min_samples(world)
        if samples >= least:
            continue
        key = losses_key(name)
        reason = f" ({loss.min_samples_reason})" if loss.min_samples_reason else ""
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        raise UserError(
            f"{key} needs at least {least} samples in a micro-batch of a rank{reason}, which on "
            f"{ranks} holds {samples}; raise train.global_batch, lower train.accumulation, or set "
            f"{key}=null"
        )
