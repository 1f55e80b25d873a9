"""Compare the weights of all ranks, so that a rank that computes something else is found."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tapct.base.exits import SharedError
from tapct.distributed import collectives
from tapct.distributed.world import World
from tapct.ssl.student_teacher import StudentTeacher


@torch.no_grad()
def fingerprint(tensors: Iterator[Tensor]) -> Tensor:
    """int64 sum of the bit patterns of local parts, each element weighted by its place: differs
    when any bit does.
    """
    total = None
    for tensor in tensors:
        flat = collectives.local_part(tensor).detach().contiguous().flatten()
        bits = flat.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        )
        weights = torch.arange(
            1, 2 * len(bits) + 1, 2, device=bits.device
        )  # odd: no bit is lost modulo 2^64
        one = (bits.to(torch.int64) * weights).sum()
        total = one if total is None else total * 1_000_003 + one
    return total if total is not None else torch.zeros((), dtype=torch.int64)


def check_sync(pair: StudentTeacher, world: World, step: int) -> None:
    """Compare what ranks should hold alike: replicated shards, loss state, the draws of plug-ins
    aside.

    Raises:
        SharedError: they differ; it names two ranks that stand apart.
    """
    if world.mesh is None:
        return
    device = world.device
    shards = fingerprint(iter(pair.state_dict().values())).to(device)
    buffers = fingerprint(iter(pair.losses.buffers())).to(device)
    mine = torch.stack([shards, buffers, torch.tensor(step, device=device)])
    all_W3 = collectives.gather(mine).cpu()
    width = world.ranks.world // world.num_copies
    for rank, row in enumerate(all_W3):
        twin = rank % width  # the rank of the first copy that holds the same shard
        for part, other, what in ((0, twin, "parameters"), (1, 0, "loss state"), (2, 0, "step")):
            if row[part] != all_W3[other][part]:
                raise SharedError(
                    f"step {step}: rank {rank} and rank {other} no longer hold the same {what}. "
                    "The cause is a fault of memory or network, or a plug-in that draws random "
                    "numbers without a key. Start the same command again: it resumes from the "
                    "last checkpoint"
                )
