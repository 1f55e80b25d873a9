"""Will a run fit, and how long will it take: memory, time and reading by the number of GPUs.

Memory of one GPU, GB = 10^9 bytes:

    state        student, teacher, AdamW's two moments, gradients: this rank's part of each (`parallel.shard`); and of
                 the teacher's snapshot, where a loss wants one
    copies       what is whole while it is computed: gathered blocks and heads, or autocast's bf16 weights
    inputs, activations, work, kept: of a micro-batch, see `footprint`

Time is FLOPs over a rate that is given or measured, never one made up here; communication, views
and reading come on top. Only numbers of GPUs that share `train.global_batch` equally are told of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tapct.base.exits import UserError
from tapct.data.batch_share import BatchShare
from tapct.nn.contracts import Loss
from tapct.plan.memory import Footprint, Weights, fullest
from tapct.ssl import needs

GPUS = (1, 2, 4, 8, 16, 32, 64)
PER_NODE = 8
# of a GPU's memory, for the CUDA context, NCCL's buffers and gaps of the allocator; ours, not
# measured
RESERVE = 0.1
IN_PLANE = 512 * 512  # voxels of a CT slice, where no store tells
GB, MB, DAY_S = 1e9, 1e6, 86400.0


@dataclass(frozen=True)
class Demand:
    """What a config asks for.

    Args:
        global_batch, accumulation, steps: of the run.
        shard: `parallel.shard`.
        number_bytes: of a weight.
        bf16: whether blocks and heads are computed in bf16.
        losses: losses of the run by name, which say how few samples they accept.
        slab_depth: slices read per sample.
        workers: that read ahead, per rank.
    """

    global_batch: int
    accumulation: int
    steps: int
    shard: int
    number_bytes: int
    bf16: bool
    losses: Mapping[str, Loss]
    slab_depth: int
    workers: int

    def least(self, gpus: int) -> int:
        """Fewest samples of a micro-batch of a rank."""
        return needs.min_samples(list(self.losses.values()), gpus)


@dataclass(frozen=True)
class StoreFacts:
    """What a store tells of reading.

    Args:
        scans: how many.
        in_plane: mean voxels of a slice.
        share: bytes on the disk over those of plain int16.
    """

    scans: int
    in_plane: float
    share: float


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Args:
        gpus: numbers of GPUs.
        per_node: GPUs of a node; the ranks that share one copy where `parallel.shard` is 0.
        memory: bytes of a GPU; None: not compared.
        rate: FLOP/s that one GPU sustains in training; None: no times.
        rate_from: where the rate comes from, in words.
        slabs_per_thread: slabs/s that one reading thread was measured to give; None: not measured.
    """

    gpus: tuple[int, ...] = GPUS
    per_node: int = PER_NODE
    memory: float | None = None
    rate: float | None = None
    rate_from: str = ""
    slabs_per_thread: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the fullest moment of a step.

    Args:
        gpus: of the run.
        shard: ranks that hold one copy of the state between them.
        samples: of a micro-batch of a rank.
        accumulation: micro-batches of a step.
        state, copies, inputs, activations, work, kept: see the top of this file.
    """

    gpus: int
    shard: int
    samples: int
    accumulation: int
    state: float
    copies: float
    inputs: float
    activations: float
    work: float
    kept: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.copies + self.inputs + self.activations + self.work + self.kept


@dataclass(frozen=True)
class Pace:
    """Time of a run on so many GPUs.

    Args:
        step_s: seconds of an optimizer step.
        days: of the whole run.
        slabs: read per second, by all ranks.
        raw: bytes/s that these are as int16.
        stored: and on the disk; None without a store.
        threads: of one rank that read so fast; None where that was not measured.
    """

    gpus: int
    step_s: float
    days: float
    slabs: float
    raw: float
    stored: float | None
    threads: float | None


@dataclass(frozen=True)
class Scale:
    """Memory and time of a run by the number of GPUs.

    Args:
        demand, asked: of config and command line.
        weights: of one network.
        as_set: with the config's accumulation, for the numbers of GPUs at which that is possible.
        largest: with the largest micro-batch that fits `asked.memory`; None where not even the
            smallest does.
        paces: empty without a rate.
        slab_bytes: of one sample as int16.
        store: None where there is none.
        left_out: reason and the numbers of GPUs.
        warnings: what is possible but doubtful, each with the next move.
    """

    demand: Demand
    asked: Asked
    weights: Weights
    as_set: tuple[Memory, ...]
    largest: tuple[tuple[int, Memory | None], ...]
    paces: tuple[Pace, ...]
    slab_bytes: float
    store: StoreFacts | None
    left_out: tuple[tuple[str, tuple[int, ...]], ...]
    warnings: tuple[str, ...]


def tables(
    demand: Demand,
    asked: Asked,
    weights: Weights,
    footprint: Footprint,
    *,
    flops_per_step: float,
    store: StoreFacts | None = None,
) -> Scale:
    """Work out memory and time.

    Args:
        demand: of the config.
        asked: of the command line.
        weights: of one network.
        footprint: of a micro-batch.
        flops_per_step: of the global batch.
        store: None where there is none.
    Raises:
        UserError: no number of GPUs can run this, or none has the memory for it.
    """
    shards, left_out = sort_out(demand, asked)
    refused = {gpus for counts in left_out.values() for gpus in counts}
    as_set = tuple(
        memory_of(
            demand,
            weights,
            footprint,
            gpus,
            shard,
            BatchShare(demand.global_batch, demand.accumulation, gpus).micro,
        )
        for gpus, shard in shards.items()
        if gpus not in refused
    )
    if not shards or (not as_set and asked.memory is None):
        told = "; ".join(f"{listed(counts)}: {reason}" for reason, counts in left_out.items())
        raise UserError(
            f"no number of GPUs can run this ({told}); name others with --gpus, or change "
            "train.global_batch, "
            "train.accumulation or parallel.shard"
        )
    largest = largest_fits(demand, asked.memory, weights, footprint, shards) if asked.memory else ()
    usable = {memory.gpus for memory in as_set} | {
        gpus for gpus, memory in largest if memory is not None
    }
    slab_bytes = 2 * demand.slab_depth * (store.in_plane if store else IN_PLANE)
    paces = [
        pace_of(demand, asked, flops_per_step, slab_bytes, store, gpus)
        for gpus in shards
        if gpus in usable
    ]
    return Scale(
        demand,
        asked,
        weights,
        as_set,
        largest,
        tuple(pace for pace in paces if pace is not None),
        slab_bytes,
        store,
        tuple(left_out.items()),
        warnings_of(demand, asked, as_set, [pace for pace in paces if pace is not None], store),
    )


def sort_out(demand: Demand, asked: Asked) -> tuple[dict[int, int], dict[str, tuple[int, ...]]]:
    """Which numbers of GPUs can run this.

    Returns:
        Ranks that share a copy, for those that can at some accumulation; and those that cannot at
        the config's, by reason.
    """
    shards, left_out = {}, dict[str, tuple[int, ...]]()
    for gpus in asked.gpus:
        shard = demand.shard or min(asked.per_node, gpus)
        if gpus % shard:
            reason = (
                f"{shard} that hold a copy between them (parallel.shard, else a node's) do "
                "not divide it"
            )
        else:
            reason = why_not(demand, gpus)
            if demand.global_batch % gpus == 0 and demand.global_batch // gpus >= demand.least(
                gpus
            ):
                shards[gpus] = shard
        if reason:
            left_out[reason] = (*left_out.get(reason, ()), gpus)
    return shards, left_out


def why_not(demand: Demand, gpus: int) -> str:
    """Why the config cannot run as it is on so many GPUs; empty where it can."""
    try:
        share = BatchShare(demand.global_batch, demand.accumulation, gpus)
    except UserError:  # its line names one number of GPUs; this one stands for several
        return (
            f"train.global_batch {demand.global_batch} is not shared equally at accumulation "
            f"{demand.accumulation}"
        )
    for name, loss in demand.losses.items():
        least = loss.min_samples(gpus)
        if share.micro < least:
            key = needs.losses_key(name)
            return f"{key} needs at least {least} samples in a micro-batch of a rank"
    return ""


def memory_of(
    demand: Demand, weights: Weights, footprint: Footprint, gpus: int, shard: int, samples: int
) -> Memory:
    """Bytes of the fullest rank."""
    wide, narrow = demand.number_bytes, 2 if demand.bf16 else demand.number_bytes
    accumulation = demand.global_batch // (gpus * samples)
    state = wide * (5 * weights.on_fullest_rank(shard) + fullest(weights.snapshot, shard))
    if gpus == 1:
        copies = narrow * weights.linear if demand.bf16 else 0
    else:  # two blocks at a time, one computed and one fetched, with their gradients and those on their way
        copies = (
            narrow * weights.heads + wide * weights.rest + 2 * weights.block * (2 * narrow + wide)
        )
        if accumulation > 1:  # ranks add up whole gradients until the last micro-batch
            copies += wide * weights.total
    each = footprint.of(samples)
    kept = each.kept if accumulation > 1 else 0.0
    return Memory(
        gpus, shard, samples, accumulation, state, copies, each.inputs, each.activations, each.work, kept
    )  # fmt: skip


def largest_fits(
    demand: Demand,
    memory_bytes: float,
    weights: Weights,
    footprint: Footprint,
    shards: dict[int, int],
) -> tuple[tuple[int, Memory | None], ...]:
    """By number of GPUs the largest micro-batch that fits and divides a rank's share; None where
    none does.

    Raises:
        UserError: none does anywhere.
    """
    limit, found, least = (1 - RESERVE) * memory_bytes, [], []
    for gpus, shard in shards.items():
        share = demand.global_batch // gpus
        sizes = [size for size in range(demand.least(gpus), share + 1) if share % size == 0]
        tried = [memory_of(demand, weights, footprint, gpus, shard, size) for size in sizes]
        found.append(
            (gpus, next((memory for memory in reversed(tried) if memory.total <= limit), None))
        )
        least.append(min(tried, key=lambda memory: memory.total))
    if all(memory is None for _, memory in found):
        small = min(least, key=lambda memory: memory.total)
        num = "1 sample" if small.samples == 1 else f"{small.samples} samples"
        raise UserError(
            f"nothing fits: {num} at a time on {small.gpus} GPUs take {small.total / GB:.2f} GB "
            "of each (state "
            f"{small.state / GB:.2f}, copies {small.copies / GB:.2f}, activations "
            f"{small.activations / GB:.2f}), and "
            f"--memory {memory_bytes / GB:g} leaves {limit / GB:.2f}; take larger GPUs, more of "
            "them per copy "
            "(parallel.shard), a smaller model, or smaller or fewer views"
        )
    return tuple(found)


def pace_of(
    demand: Demand,
    asked: Asked,
    flops_per_step: float,
    slab_bytes: float,
    store: StoreFacts | None,
    gpus: int,
) -> Pace | None:
    """Time on so many GPUs, FLOPs of a step / (GPUs x rate); None without a rate."""
    if asked.rate is None:
        return None
    step_s = flops_per_step / (gpus * asked.rate)
    slabs = demand.global_batch / step_s
    threads = slabs / gpus / asked.slabs_per_thread if asked.slabs_per_thread else None
    raw = slabs * slab_bytes
    days = demand.steps * step_s / DAY_S
    return Pace(gpus, step_s, days, slabs, raw, raw * store.share if store else None, threads)


def warnings_of(
    demand: Demand,
    asked: Asked,
    as_set: Sequence[Memory],
    paces: Sequence[Pace],
    store: StoreFacts | None,
) -> tuple[str, ...]:
    """What is doubtful."""
    said = []
    if asked.memory is not None:
        full = [memory.gpus for memory in as_set if memory.total > (1 - RESERVE) * asked.memory]
        if full:
            said.append(
                f"train.accumulation={demand.accumulation} does not fit on {listed(full)} GPUs; "
                "take the "
                "train.accumulation of the second table"
            )
    if store is not None and store.scans < demand.global_batch:
        said.append(
            f"the store has {store.scans} scans for a batch of {demand.global_batch}: one step "
            "shows some of them more "
            "than once; lower train.global_batch"
        )
    slow = [
        pace.gpus
        for pace in paces
        if pace.threads is not None and pace.threads > max(demand.workers, 1)
    ]
    if slow:
        said.append(
            f"data.loader.workers={demand.workers} cannot read fast enough for {listed(slow)} "
            "GPUs, as measured here; "
            "raise it"
        )
    return tuple(said)


def listed(counts: Sequence[int]) -> str:
    """1, 2, 4."""
    return ", ".join(map(str, counts))
