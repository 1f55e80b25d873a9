"""The process group of a run: how ranks meet, which mesh they form, and when one of them is lost.

The mesh is replicate x shard (`engine/fsdp.py` shards over it). One process is the same code
without a mesh.
"""

from __future__ import annotations

import datetime
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tapct.base import ranks
from tapct.base.exits import LOST_RANK, UserError
from tapct.base.ranks import Ranks
from tapct.config import setting
from tapct.distributed import collectives

CAUSE_FIRST_S = 1.0
MEET_S = 300.0  # Python may start much later on one node than on another, and that is no collective
NCCL_LATER_S = 60.0


@dataclass(frozen=True)
class Config:
    """How ranks share the work."""

    shard: int = setting(
        0,
        "ranks that hold one copy of the parameters between them; copies are replicated. 0: the "
        "ranks of a node; "
        "1: every rank a whole copy",
        ge=0,
    )
    timeout_s: float = setting(
        1800.0, "seconds after which a collective that not every rank joins ends the run", ge=1.0
    )
    save_timeout_s: float = setting(
        3600.0,
        "the same for a save, which lasts as long as the disk needs: seconds after which one that "
        "not every rank has "
        "ended ends the run",
        ge=1.0,
    )
    desync_every: int = setting(
        0,
        "steps between two checks that ranks hold the same copies, loss state and step; 0: never",
        ge=0,
    )
    straggler_factor: float = setting(
        2.0,
        "a rank that comes this many times later than the median to a step is named in the log",
        gt=1.0,
    )


class LostRank(UserError):
    """Another rank ended or hangs; the cause is with that one."""

    exit_code = LOST_RANK


@dataclass(frozen=True)
class World:
    """The ranks of a run as one of them sees it.

    Args:
        ranks: own place.
        device: of this rank.
        mesh: replicate x shard; None for one process.
        side: process group on the CPU that checkpoints are agreed in, beside training and in their
            own time; None for one process.
        store: what the ranks met at; None for one process.
    """

    ranks: Ranks
    device: torch.device
    mesh: DeviceMesh | None = None
    side: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def num_copies(self) -> int:
        """How often each parameter shard exists."""
        return self.mesh.size(0) if self.mesh is not None else 1


@contextmanager
def world(place: Ranks, device: torch.device, config: Config) -> Iterator[World]:
    """Join the other ranks; leave them at the end.

    Args:
        place: from the launcher.
        device: of this rank; on CUDA already the one of its local rank.
    Raises:
        UserError: the others did not come within the time-out, or `parallel.shard` does not divide
            the world.
        LostRank: another rank ended or hangs.
    """
    if place.world == 1:
        yield World(place, device)
        return
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view"
    )  # no loss writes into it
    timeout, patience = (
        datetime.timedelta(seconds=s) for s in (config.timeout_s, max(config.timeout_s, MEET_S))
    )
    on_gpu = device.type == "cuda"
    told = ""
    try:
        told = "{}:{}".format(*ranks.rendezvous(os.environ))
        store, _, _ = next(
            dist.rendezvous(f"tcp://{told}", place.rank, place.world, timeout=patience)
        )
        # torchrun's store outlives a restart: what the ranks before it wrote there must not be read
        store = dist.PrefixStore(
            f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
        store.set(f"here/{place.rank}", "yes")
        store.wait([f"here/{rank}" for rank in range(place.world)], patience)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world,
            # NCCL ends the process by itself: later than `Watch`, which knows who is missing
            timeout=timeout + datetime.timedelta(seconds=NCCL_LATER_S if on_gpu else 0),
            device_id=device if on_gpu else None,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f" at {told} within {patience.total_seconds():.0f} s" if told else ""
        raise UserError(
            f"rank {place.rank} of {place.world} could not meet the others{where}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    shard = collectives.from_first(lambda: shard_size(place, config.shard))
    mesh = init_device_mesh(
        device.type, (place.world // shard, shard), mesh_dim_names=("replicate", "shard")
    )
    # a rank whose part is written waits here for the slowest disk, and all for the first one's
    # fingerprints
    side = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=config.save_timeout_s))
    try:
        yield World(place, device, mesh, side, dist.PrefixStore("words", store))
        dist.barrier(side)  # a rank that leaves early would look like a dead one to the rest
    except (
        RuntimeError
    ) as error:  # outside of the steps, which `Watch` looks after: set-up, reading, the end
        if not lost_rank(error):
            raise
        time.sleep(CAUSE_FIRST_S)
        raise LostRank(f"lost another rank outside of training ({cause_of(error)})") from error
    # Not after an error: NCCL would first finish what other ranks may never join, and the cause
    # would not be told.
    dist.destroy_process_group()


def shard_size(place: Ranks, wanted: int) -> int:
    """Ranks that hold one copy between them; one rank decides, since nodes may be told different
    things.

    Raises:
        UserError: it does not divide the world.
    """
    size = wanted or ranks.per_node(os.environ, place)
    if place.world % size:
        raise UserError(
            f"parallel.shard {size} does not divide the {place.world} ranks; choose a divisor, or "
            "0 or 1"
        )
    return size


# What gloo, torch.distributed's store and NCCL raise where another rank has ended or does not come.
# Whole phrases: a kernel of this rank's own GPU can time out too, and then no other rank is lost.
LOST_PHRASES = re.compile(
    # gloo
    r"connection closed by peer|remote peer closed the connection|timed out waiting \d+ ?ms"
    r"|timed out in monitoredBarrier|application timeout caused pair closure|read timeout"
    # sockets and the store
    r"|connection (reset by peer|refused|timed out|was likely closed)|broken pipe"
    r"|socket .*timed out|timed out connecting|(wait|barrier) timeout|timeout waiting for key"
    # collectives of any back-end, NCCL
    r"|operation timed out!|collective operation timeout|before timing out"
    r"|ncclRemoteError|remote process exit",
    re.IGNORECASE,
)
OWN_FAULT = re.compile(r"\b(CUDA|CUDNN|cuBLAS|HIP) (driver )?error", re.IGNORECASE)


def lost_rank(error: RuntimeError) -> bool:
    """Whether a back-end says that another rank is gone or late, and not that this rank is at
    fault.
    """
    if isinstance(error, dist.DistNetworkError):
        return True
    text = str(error)
    return LOST_PHRASES.search(text) is not None and OWN_FAULT.search(text) is None


def cause_of(error: RuntimeError) -> str:
    """What a back-end says of a lost rank, in one line."""
    lines = str(error).splitlines()
    if "Last error:" in lines[:-1]:  # NCCL's own words
        return lines[lines.index("Last error:") + 1]
    return re.sub(r"^\[[^]]*\] *", "", lines[0]).partition(". ")[
        0
    ]  # without the place in gloo's sources
