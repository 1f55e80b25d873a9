"""Activation checkpointing: blocks that are computed again in the backward pass instead of being
kept.

What is changed is the `forward` of a block, not the block: parameters keep their names, FSDP's
hooks stay outside, so that a block is gathered once for both, and a compiled `forward` is called as
it is. All draws of a step are made before the blocks and handed in, so the second time gives the
numbers of the first; a plug-in that draws by itself does so from torch's generators, which are set
back.
Source: Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tapct.base.exits import UserError
from tapct.nn.contracts import Backbone


def recompute_blocks(backbone: Backbone, every: int) -> None:
    """Keep only the input of every so-many-th block, in place.

    Args:
        every: 1 for all blocks, 2 for every second one, ...; 0 changes nothing.
    Raises:
        UserError: the backbone has no repeated blocks.
    """
    if not every:
        return
    blocks = backbone.repeated_blocks()
    if not blocks:
        raise UserError(
            f"train.recompute={every}: this backbone has no repeated blocks to compute again; set "
            "it to 0"
        )
    for block in blocks[::every]:
        recompute_forward(block)


def recompute_forward(block: nn.Module) -> None:
    """Let a module keep its inputs alone for its backward pass; nothing changes where no gradient
    is recorded.
    """
    once = block.forward

    @functools.wraps(once)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return once(*args, **kwargs)
        return checkpoint(once, *args, use_reentrant=False, **kwargs)

    block.forward = forward
