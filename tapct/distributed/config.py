"""The section `parallel` of a config; `world`, `watch` and the training loop read it."""

from __future__ import annotations

from dataclasses import dataclass

from tapct.config import setting


@dataclass(frozen=True)
class Config:
    """How ranks share the work."""

    shard: int = setting(
        0,
        "number of ranks among which one copy of the parameters is divided; each further group of "
        "this size has a copy of its own; 0: the ranks of a node; 1: every rank holds a complete "
        "copy",
        ge=0,
    )
    timeout_s: float = setting(
        1800.0,
        "the run ends if a rank does not take part in a collective operation within this time, "
        "in seconds",
        ge=1.0,
        le=1e7,
    )
    save_timeout_s: float = setting(
        3600.0,
        "the run ends if a rank does not finish a save within this time, in seconds; a save "
        "takes as long as the disk needs",
        ge=1.0,
        le=1e7,
    )
    desync_every: int = setting(
        0,
        "number of steps from one check to the next; a check compares the weights, the state of "
        "the losses and the step number of all ranks; 0: never",
        ge=0,
    )
    straggler_factor: float = setting(
        2.0,
        "a rank is slow if the time from the start of a step until it waits for the other ranks "
        "is at least this many times the median of all ranks; the log names slow ranks",
        gt=1.0,
    )
