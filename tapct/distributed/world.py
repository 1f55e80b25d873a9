"""The process group of a run: how ranks meet, which mesh they form, and when one is lost.

The mesh is `shard` or replicate x shard, and `engine/fsdp.py` shards over it. A single process runs
the same code without a mesh.
"""

from __future__ import annotations

import datetime
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tapct.base import console, ranks
from tapct.base.counted import counted
from tapct.base.exits import LOST_RANK, UserError
from tapct.base.ranks import Ranks
from tapct.distributed import agreement, collectives
from tapct.distributed.config import Config

# A rank that has lost another one waits this long, so that the rank which knows the cause prints
# its error and ends first.
CAUSE_FIRST_S = 1.0
# Ranks may take this long to meet even where `parallel.timeout_s` is shorter: Python may start much
# later on one node than on another.
MEET_S = 300.0
# NCCL ends the process by itself after a time-out. It must do so later than `Watch`, which knows
# which rank is missing.
NCCL_LATER_S = 60.0
HINT_S = 20.0  # the first rank prints for whom it waits after this time


class LostRank(UserError):
    """Another rank ended or hangs; the cause is in that rank's log.

    Args:
        line: error line.
        nodes: names of the nodes of that rank, where they are known.
    """

    exit_code = LOST_RANK

    def __init__(self, line: str, nodes: Sequence[str] = ()) -> None:
        super().__init__(line)
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class World:
    """The ranks of a run as one of them sees it.

    Args:
        ranks: place of this process among the ranks.
        device: device of this rank.
        mesh: mesh of `mesh_of`; None for a single process.
        side: process group on the CPU, in which ranks agree on checkpoints while training
            continues; None for a single process.
        store: key-value store at which the ranks met; None for a single process.
    """

    ranks: Ranks
    device: torch.device
    mesh: DeviceMesh | None = None
    side: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def num_copies(self) -> int:
        """How often each parameter shard exists."""
        return 1 if self.mesh is None or self.mesh.ndim == 1 else self.mesh.size(0)


def _nothing() -> None:
    """What the first rank does before the others continue, by default."""


@contextmanager
def join_ranks(
    place: Ranks,
    device: torch.device,
    config: Config,
    facts: Callable[[], Mapping[str, str]] = dict,
    first: Callable[[], object] = _nothing,
) -> Iterator[World]:
    """Join the other ranks; leave them at the end.

    Args:
        place: place of this process, from the launcher's variables.
        device: device of this rank; on CUDA already the one of its local rank.
        config: shard size and time-outs.
        facts: function that returns name -> value; ranks whose facts differ refuse to start
            together, and its error ends all ranks.
        first: function that the first rank calls once all ranks have met and agree; its error ends
            all ranks.
    Raises:
        UserError: the ranks differ, or `parallel.shard` does not divide the number of ranks.
        LostRank: another rank did not come within the time-out, has ended, or hangs.
    """
    if place.world == 1:
        first()
        yield World(place, device)
        return
    # FSDP2 warns of views that a loss could write into; no loss does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    store = _meet(place, device, config, facts, first)
    shard = collectives.from_first(lambda: shard_size(place, config.shard))
    mesh = mesh_of(device.type, place.world, shard)
    # In this group a rank whose part of a checkpoint is written waits for the rank with the slowest
    # disk, and all ranks wait for the first one's checksums.
    save_timeout = datetime.timedelta(seconds=config.save_timeout_s)
    side = dist.new_group(backend="gloo", timeout=save_timeout)
    try:
        yield World(place, device, mesh, side, dist.PrefixStore("reports", store))
        dist.barrier(side)  # a rank that leaves early would look like a lost one to the others
    except RuntimeError as error:
        # `Watch` handles errors within steps; this one comes from set-up, reading or the end.
        if not lost_rank(error):
            raise
        time.sleep(CAUSE_FIRST_S)
        raise LostRank(f"lost another rank outside of training ({cause_of(error)})") from error
    # Not after an error: NCCL would first finish collectives that other ranks may never join, and
    # the cause would not be printed.
    dist.destroy_process_group()


def mesh_of(kind: str, num_ranks: int, shard: int) -> DeviceMesh:
    """The mesh of a run: one axis `shard` where all ranks share one copy of the parameters, as on
    one node, else replicate x shard.

    With an axis of one rank, FSDP would sum every gradient over groups of one rank.

    Args:
        kind: cpu or cuda.
        num_ranks: number of ranks.
        shard: number of ranks that share one copy.
    """
    if shard == num_ranks:
        return init_device_mesh(kind, (shard,), mesh_dim_names=("shard",))
    sizes = (num_ranks // shard, shard)
    return init_device_mesh(kind, sizes, mesh_dim_names=("replicate", "shard"))


def _meet(
    place: Ranks,
    device: torch.device,
    config: Config,
    facts: Callable[[], Mapping[str, str]],
    first: Callable[[], object],
) -> dist.Store:
    """Meet the other ranks, compare the facts and start the process group; returns the store at
    which they met. Arguments as in `join_ranks`.

    Raises:
        UserError: the variables of the launcher are wrong, or the ranks differ.
        LostRank: the other ranks did not come within the time-out, or the port is taken.
    """
    on_gpu = device.type == "cuda"
    meet_s = max(config.timeout_s, MEET_S)
    patience = datetime.timedelta(seconds=meet_s)
    timeout_s = config.timeout_s + (NCCL_LATER_S if on_gpu else 0)
    address = ""
    waiting: threading.Timer | None = None
    try:
        host, port = ranks.rendezvous(os.environ)
        address = f"{host}:{port}"
        waiting = threading.Timer(HINT_S, hint_at_others, (place, address))
        waiting.daemon = True
        waiting.start()
        meeting = dist.rendezvous(f"tcp://{address}", place.rank, place.world, timeout=patience)
        store, _, _ = next(meeting)
        # torchrun's store outlives a restart: what the ranks before it wrote must not be read
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt_{attempt}", store)
        store.set(f"here/{place.rank}", "yes")
        store.wait([f"here/{rank}" for rank in range(place.world)], patience)
        waiting.cancel()
        # before the process group, whose back-end depends on the device of each rank
        agreement.agree(dist.PrefixStore("start", store), place, facts, first, patience)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
    except UserError:
        raise
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f" at {address} within {meet_s:.0f} s" if address else ""
        # a wrong variable comes again; another rank or a port of this node may be in order later
        kind = UserError if isinstance(error, ValueError) else LostRank
        raise kind(
            f"rank {place.rank} of {place.world} could not meet the others{where}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    finally:
        if waiting is not None:
            waiting.cancel()
    return store


def hint_at_others(place: Ranks, address: str) -> None:
    """Print for whom the first rank waits: variables that are left from another launcher look like
    a run of several ranks.
    """
    if place.is_first:
        console.say(
            f"waiting for {counted(place.world - 1, 'other rank')} at {address}; if a single "
            "process is meant, unset RANK, WORLD_SIZE and LOCAL_RANK"
        )


def shard_size(place: Ranks, wanted: int) -> int:
    """Number of ranks over which one copy of the parameters is sharded.

    One rank computes it for all, since the launcher's variables may differ between nodes.

    Args:
        place: place of this process.
        wanted: `parallel.shard`; 0: the ranks of a node.
    Raises:
        UserError: the number does not divide the number of ranks.
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
    """Whether a back-end reports that another rank is gone or late, and not that this rank is at
    fault.
    """
    if isinstance(error, dist.DistNetworkError):
        return True
    text = str(error)
    return LOST_PHRASES.search(text) is not None and OWN_FAULT.search(text) is None


def cause_of(error: RuntimeError) -> str:
    """What a back-end reports about a lost rank, as one line."""
    lines = str(error).splitlines()
    if "Last error:" in lines[:-1]:  # NCCL names its cause on the line after this one
        return lines[lines.index("Last error:") + 1]
    # gloo begins with the place in its sources: "[../gloo/tcp/pair.cc:525] Connection closed ..."
    without_place = re.sub(r"^\[[^]]*\] *", "", lines[0])
    return without_place.partition(". ")[0]
