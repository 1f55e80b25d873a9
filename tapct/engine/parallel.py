"""Many processes, one run: the process group, FSDP2 sharding, and who is late or out of step.

Student and teacher are sharded alike (`fully_shard` per block; heads and the rest of the backbone as units of their
own) over a mesh replicate x shard. float32 master shards; with bf16 the blocks and heads are gathered and computed in
bf16, gradients are reduced in float32; what lies outside of the blocks (positions, final norm) stays float32, so that
the residual stream does. One process is the same code without a mesh.
"""

from __future__ import annotations

import datetime
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree

from tapct import collectives, log, ranks
from tapct.config import setting
from tapct.nn.prototype_loss import PrototypeLoss
from tapct.ranks import Ranks
from tapct.ssl.student_teacher import Network, StudentTeacher
from tapct.types import LOST_RANK, SharedError, TargetSums, Tokens, UserError

CAUSE_FIRST_S = 1.0
MEET_S = 300.0  # Python may start much later on one node than on another, and that is no collective
NCCL_LATER_S = 60.0
PATIENCE_S = 5.0  # more than the back-end's own time-out, so that its word comes first

# FSDP looks for tensors in what a module returns, to hook their gradients
for noun in (Tokens, PrototypeLoss, TargetSums):
    _pytree.register_dataclass(noun)


@dataclass(frozen=True)
class Config:
    """How ranks share the work."""

    shard: int = setting(
        0,
        "ranks that hold one copy of the parameters between them; copies are replicated. 0: the ranks of a node; "
        "1: every rank a whole copy",
        ge=0,
    )
    timeout_s: float = setting(
        1800.0, "seconds after which a collective that not every rank joins ends the run", ge=1.0
    )
    save_timeout_s: float = setting(
        3600.0,
        "the same for a save, which lasts as long as the disk needs: seconds after which one that not every rank has "
        "ended ends the run",
        ge=1.0,
    )
    desync_every: int = setting(
        0, "steps between two checks that ranks hold the same copies, loss state and step; 0: never", ge=0
    )
    straggler_factor: float = setting(
        2.0, "a rank that comes this many times later than the median to a step is named in the log", gt=1.0
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
        side: process group on the CPU that checkpoints are agreed in, beside training and in their own time; None for
            one process.
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
        UserError: the others did not come within the time-out, or `parallel.shard` does not divide the world.
        LostRank: another rank ended or hangs.
    """
    if place.world == 1:
        yield World(place, device)
        return
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # no loss writes into it
    timeout, patience = (datetime.timedelta(seconds=s) for s in (config.timeout_s, max(config.timeout_s, MEET_S)))
    on_gpu = device.type == "cuda"
    told = ""
    try:
        told = "{}:{}".format(*ranks.rendezvous(os.environ))
        store, _, _ = next(dist.rendezvous(f"tcp://{told}", place.rank, place.world, timeout=patience))
        # torchrun's store outlives a restart: what the ranks before it wrote there must not be read
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
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
            f"rank {place.rank} of {place.world} could not meet the others{where}: {str(error).splitlines()[0]}"
        ) from error
    shard = collectives.from_first(lambda: shard_size(place, config.shard))
    mesh = init_device_mesh(device.type, (place.world // shard, shard), mesh_dim_names=("replicate", "shard"))
    # a rank whose part is written waits here for the slowest disk, and all for the first one's fingerprints
    side = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=config.save_timeout_s))
    try:
        yield World(place, device, mesh, side, dist.PrefixStore("words", store))
        dist.barrier(side)  # a rank that leaves early would look like a dead one to the rest
    except RuntimeError as error:  # outside of the steps, which `Watch` looks after: set-up, reading, the end
        if not lost_rank(error):
            raise
        time.sleep(CAUSE_FIRST_S)
        raise LostRank(f"lost another rank outside of training ({cause_of(error)})") from error
    # Not after an error: NCCL would first finish what other ranks may never join, and the cause would not be told.
    dist.destroy_process_group()


def shard_size(place: Ranks, wanted: int) -> int:
    """Ranks that hold one copy between them; one rank decides, since nodes may be told different things.

    Raises:
        UserError: it does not divide the world.
    """
    size = wanted or ranks.per_node(os.environ, place)
    if place.world % size:
        raise UserError(f"parallel.shard {size} does not divide the {place.world} ranks; choose a divisor, or 0 or 1")
    return size


def shard(network: Network, mesh: DeviceMesh, *, bf16: bool, keeps_gradient: bool) -> None:
    """Shard a network of the meta device or of this rank's, in place.

    Args:
        network: student, teacher or the teacher's snapshot.
        mesh: replicate x shard.
        bf16: gather and compute in bf16.
        keeps_gradient: the student. The others have no backward pass after which FSDP would free the gathered copy,
            and would go on with a copy from before its last move.
    """
    compute = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )  # fmt: skip
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    if mesh.size(0) == 1:  # no copies: else FSDP sums every gradient over groups of one rank
        mesh = mesh["shard"]
    for block in blocks_of(network.backbone):
        fully_shard(block, mesh=mesh, mp_policy=compute, reshard_after_forward=True)
    fully_shard(network.backbone, mesh=mesh, mp_policy=whole, reshard_after_forward=not keeps_gradient)
    for head in network.heads.values():
        fully_shard(head, mesh=mesh, mp_policy=compute, reshard_after_forward=not keeps_gradient)


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The repeated layers of a backbone, each gathered by itself: `backbone.blocks`; none where it has no such list."""
    blocks = getattr(backbone, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def forget_order(pair: StudentTeacher) -> None:
    """Let FSDP forget the order of gathering in networks that have no backward pass, which alone does so."""
    for root in (part for network in pair.frozen() for part in (network.backbone, *network.heads.values())):
        if isinstance(root, FSDPModule) and hasattr(root, "reset_iter_state"):  # torch 2.13
            root.reset_iter_state()


def sync_gradients(pair: StudentTeacher, enabled: bool) -> None:
    """Reduce gradients over ranks in the next backward pass, or only add them up here until a later one does."""
    for module in pair.student.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled, recurse=False)


class Watch:
    """Ends a run in which a rank hangs, and says which: every rank writes down where it is, where all can read it.

    A collective that not every rank joins never returns on NCCL, and without a word of who is missing on gloo. So a
    thread beside training looks at the clock, and reads the others' last words when this rank has been in one place for
    longer than that place's time-out.
    """

    def __init__(self, world: World, config: Config) -> None:
        self.world, self.config = world, config
        self.where, self.since, self.until = "starting", time.monotonic(), math.inf
        self.over = threading.Event()

    def at(self, step: int, what: Literal["starting", "training", "saving"]) -> None:
        """Write down where this rank is; a few bytes to the store that the ranks met at."""
        limit_s = self.config.save_timeout_s if what == "saving" else self.config.timeout_s
        self.where, self.since = f"{what} in step {step + 1}", time.monotonic()
        self.until = self.since + limit_s + PATIENCE_S  # one number, so that the thread reads no half of a change
        if self.world.store is not None:
            self.world.store.set(f"where/{self.world.ranks.rank}", f"{step + 1} {what}")

    def others(self) -> str:
        """Who is behind, in words."""
        assert self.world.store is not None
        try:
            keys = [f"where/{rank}" for rank in range(self.world.ranks.world)]
            # `get` would wait for a word that was never written
            told = [
                self.world.store.get(key).decode() if self.world.store.check([key]) else "0 nothing" for key in keys
            ]
        except (dist.DistError, RuntimeError):
            return "and the store that they met at is gone, so rank 0 or its launcher has ended"
        steps = [int(line.split()[0]) for line in told]
        behind = [f"rank {rank} ({line})" for rank, line in enumerate(told) if int(line.split()[0]) == min(steps)]
        if len(behind) == len(told):
            return f"all ranks had come to step {steps[0]}"
        return f"the last word of {', '.join(behind[:4])}{' and others' if len(behind) > 4 else ''} is the oldest"

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turn what a back-end says when a rank is gone into one line with rank, step and who was last heard of."""
        try:
            yield
        except RuntimeError as error:
            if self.world.store is None or not lost_rank(error):
                raise
            words = f"{self.where}: lost another rank ({cause_of(error)}); {self.others()}"
            time.sleep(CAUSE_FIRST_S)  # so that the rank which knows the cause speaks and ends first
            raise LostRank(words) from error

    def look(self) -> None:
        """The thread."""
        while not self.over.wait(min(self.config.timeout_s / 4, self.config.save_timeout_s / 4, 10.0)):
            if time.monotonic() > self.until:
                log.error(f"{self.where}: nothing moved for {time.monotonic() - self.since:.0f} s; {self.others()}")
                os._exit(LOST_RANK)


@contextmanager
def watch(world: World, config: Config) -> Iterator[Watch]:
    """Look after the ranks while training runs; one process needs nobody to look after it."""
    watch = Watch(world, config)
    if world.store is None:
        yield watch
        return
    thread = threading.Thread(target=watch.look, name="tapct-watch", daemon=True)
    watch.at(-1, "starting")
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def lost_rank(error: RuntimeError) -> bool:
    """Whether a back-end says that another rank is gone or late, and not that something is wrong here."""
    told = str(error).lower()
    signs = (
        "closed by peer",
        "connection reset",
        "connection refused",
        "timed out",
        "timeout",
        "broken pipe",
        "remote",
    )
    return isinstance(error, dist.DistNetworkError) or any(sign in told for sign in signs)


def cause_of(error: RuntimeError) -> str:
    """What a back-end says of a lost rank, in one line."""
    lines = str(error).splitlines()
    if "Last error:" in lines[:-1]:  # NCCL's own words
        return lines[lines.index("Last error:") + 1]
    return re.sub(r"^\[[^]]*\] *", "", lines[0]).partition(". ")[0]  # without the place in gloo's sources


@torch.no_grad()
def fingerprint(tensors: Iterator[Tensor]) -> Tensor:
    """int64 sum of the bit patterns of local parts, each element weighted by its place: differs when any bit does."""
    total = None
    for tensor in tensors:
        flat = collectives.local_part(tensor).detach().contiguous().flatten()
        bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        weights = torch.arange(1, 2 * len(bits) + 1, 2, device=bits.device)  # odd: no bit is lost modulo 2^64
        one = (bits.to(torch.int64) * weights).sum()
        total = one if total is None else total * 1_000_003 + one
    return total if total is not None else torch.zeros((), dtype=torch.int64)


def check_sync(pair: StudentTeacher, world: World, step: int) -> None:
    """Compare what ranks should hold alike: replicated shards, loss state, the draws of plug-ins aside.

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
    width = world.mesh.size(1)
    for rank, row in enumerate(all_W3):
        twin = rank % width  # the rank of the first copy that holds the same shard
        for part, other, what in ((0, twin, "parameters"), (1, 0, "loss state"), (2, 0, "step")):
            if row[part] != all_W3[other][part]:
                raise SharedError(
                    f"step {step}: rank {rank} and rank {other} no longer hold the same {what}; a fault of memory, "
                    "network or a plug-in that draws without a key. Start the same command again: it goes on from the "
                    "last checkpoint"
                )
