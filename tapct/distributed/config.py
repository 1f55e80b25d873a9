"""The section `parallel` of a config; `world`, `watch` and the training loop read it."""

from __future__ import annotations

from dataclasses import dataclass

from tapct.config import setting


@dataclass(frozen=True)
class Config:
    """How ranks share the work."""

    shard: int = setting(
        0,
        "number of ranks over which one copy of the parameters is sharded; copies are replicated. "
        "0: the ranks of a node; 1: every rank holds a whole copy",
        ge=0,
    )
    timeout_s: float = setting(
        1800.0,
        "seconds after which a collective that not every rank has joined ends the run",
        ge=1.0,
    )
    save_timeout_s: float = setting(
        3600.0,
        "seconds after which a save that not every rank has finished ends the run; a save takes as "
        "long as the disk needs",
        ge=1.0,
    )
    desync_every: int = setting(
        0,
        "steps between two checks that all ranks hold the same copies, loss state and step; "
        "0: never",
        ge=0,
    )
    straggler_factor: float = setting(
        2.0,
        "a rank that arrives at a step this many times later than the median rank is named in the "
        "log",
        gt=1.0,
    )
