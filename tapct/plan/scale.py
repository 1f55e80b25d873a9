"""Memory and time of a run for each GPU count.

Memory of one GPU, GB = 10^9 bytes:

    state        student, teacher, AdamW's two moments and gradients, and the snapshot of the
                 teacher where a loss wants one: this rank's part of each (`parallel.shard`)
    copies       weights that are whole while they are used: gathered blocks and heads, or the bf16
                 weights of autocast
    inputs, activations, work, kept
                 bytes of a micro-batch; see `memory.Bytes`

Time is FLOPs over a rate that is given or measured; no rate is assumed here. Communication, views
and reading come on top. Only GPU counts that share `train.global_batch` equally are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tapct.base.exits import UserError
from tapct.data.loading.batch_share import BatchShare
from tapct.nn.contracts import Loss
from tapct.plan.memory import Footprint, ParameterCounts, fullest
from tapct.ssl import needs

GPUS = (1, 2, 4, 8, 16, 32, 64)
PER_NODE = 8
# Share of a GPU's memory for the CUDA context, the buffers of NCCL and gaps of the allocator; our
# choice, not a measurement.
RESERVE = 0.1
IN_PLANE = 512 * 512  # voxels of a CT slice, assumed where there is no store
GB, MB, DAY_S = 1e9, 1e6, 86400.0


@dataclass(frozen=True)
class RunSettings:
    """Settings of a config that decide about memory and time.

    Args:
        global_batch, accumulation, steps: settings `train.*`.
        shard: setting `parallel.shard`.
        number_bytes: bytes of a weight.
        bf16: whether the blocks are gathered in bf16, and the rest computed under autocast.
        losses: losses of the run by name, which say how few samples they accept.
        slab_depth: number of slices read for a sample.
        workers: number of threads or processes of a rank that read ahead.
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
    """Facts about reading from a store.

    Args:
        scans: number of scans.
        in_plane: mean number of voxels of a slice.
        share: bytes on the disk over bytes as int16.
    """

    scans: int
    in_plane: float
    share: float


@dataclass(frozen=True)
class Request:
    """Numbers from the command line.

    Args:
        gpus: GPU counts to report.
        per_node: GPUs of a node; the ranks that share one copy where `parallel.shard` is 0.
        memory: bytes of one GPU; None: no comparison.
        rate: FLOP/s that one GPU sustains in training; None: no times.
        rate_from: origin of the rate, in words.
        slabs_per_thread: slabs/s that one reading thread reads here; None: not measured.
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
        gpus: GPU count of the run.
        shard: number of ranks that share one copy of the state.
        samples: size of a micro-batch on a rank.
        accumulation: micro-batches of a step.
        state, copies, inputs, activations, work, kept: bytes; see the top of this file.
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
        """Sum of all parts."""
        return self.state + self.copies + self.inputs + self.activations + self.work + self.kept


@dataclass(frozen=True)
class Pace:
    """Time of a run on a number of GPUs.

    Args:
        gpus: GPU count of the run.
        step_s: seconds of an optimizer step.
        days: days of the whole run.
        slabs: slabs read per second, by all ranks.
        raw: bytes/s of these slabs as int16.
        stored: bytes/s of these slabs on the disk; None without a store.
        threads: number of threads of a rank that read so fast; None where this was not measured.
    """

    gpus: int
    step_s: float
    days: float
    slabs: float
    raw: float
    stored: float | None
    threads: float | None


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run for each GPU count.

    Args:
        settings: settings of the config.
        request: numbers from the command line.
        counts: parameters of one network.
        as_set: memory with the accumulation of the config, for the GPU counts that allow it.
        largest: GPU count, and memory with the largest micro-batch that fits `request.memory`;
            None where not even the smallest fits.
        paces: times; empty without a rate.
        slab_bytes: bytes of one sample as int16.
        store: facts of the store; None where there is none.
        left_out: reason, and the GPU counts that it excludes.
        warnings: doubtful settings, each with the next step.
    """

    settings: RunSettings
    request: Request
    counts: ParameterCounts
    as_set: tuple[Memory, ...]
    largest: tuple[tuple[int, Memory | None], ...]
    paces: tuple[Pace, ...]
    slab_bytes: float
    store: StoreFacts | None
    left_out: tuple[tuple[str, tuple[int, ...]], ...]
    warnings: tuple[str, ...]


def estimate(
    settings: RunSettings,
    request: Request,
    counts: ParameterCounts,
    footprint: Footprint,
    *,
    flops_per_step: float,
    store: StoreFacts | None = None,
) -> Estimate:
    """Work out memory and time.

    Args:
        settings: settings of the config.
        request: numbers from the command line.
        counts: parameters of one network.
        footprint: bytes of a micro-batch.
        flops_per_step: FLOPs of a step, for the global batch.
        store: facts of the store; None where there is none.
    Raises:
        UserError: the config runs on none of the GPU counts, or fits on none.
    """
    shards, left_out = sort_out(settings, request)
    excluded = {gpus for gpu_counts in left_out.values() for gpus in gpu_counts}
    as_set = []
    for gpus, shard in shards.items():
        if gpus not in excluded:
            micro = BatchShare(settings.global_batch, settings.accumulation, gpus).micro
            as_set.append(memory_of(settings, counts, footprint, gpus, shard, micro))
    if not shards or (not as_set and request.memory is None):
        reasons = [f"{listed(gpus)}: {reason}" for reason, gpus in left_out.items()]
        raise UserError(
            f"the config runs on none of these GPU counts ({'; '.join(reasons)}); give others with "
            "--gpus, or change train.global_batch, train.accumulation or parallel.shard"
        )
    largest: tuple[tuple[int, Memory | None], ...] = ()
    if request.memory:
        largest = largest_fits(settings, request.memory, counts, footprint, shards)
    usable = {memory.gpus for memory in as_set}
    usable |= {gpus for gpus, memory in largest if memory is not None}
    in_plane = IN_PLANE if store is None else store.in_plane
    slab_bytes = 2 * settings.slab_depth * in_plane
    paces = []
    if request.rate is not None:
        for gpus in shards:
            if gpus in usable:
                step_s = flops_per_step / (gpus * request.rate)
                paces.append(pace_of(settings, request, step_s, slab_bytes, store, gpus))
    return Estimate(
        settings,
        request,
        counts,
        tuple(as_set),
        largest,
        tuple(paces),
        slab_bytes,
        store,
        tuple(left_out.items()),
        warnings_of(settings, request, as_set, paces, store),
    )


def sort_out(
    settings: RunSettings, request: Request
) -> tuple[dict[int, int], dict[str, tuple[int, ...]]]:
    """The GPU counts that can run the config.

    Returns:
        GPU count -> number of ranks that share a copy, where some accumulation is possible; and
        reason -> GPU counts at which that of the config is not.
    """
    shards, left_out = {}, dict[str, tuple[int, ...]]()
    for gpus in request.gpus:
        shard = settings.shard or min(request.per_node, gpus)
        if gpus % shard:
            reason = (
                f"the {shard} GPUs that share a copy (parallel.shard, or those of a node) do not "
                "divide it"
            )
        else:
            reason = why_not(settings, gpus)
            samples, rest = divmod(settings.global_batch, gpus)
            if rest == 0 and samples >= settings.least(gpus):
                shards[gpus] = shard
        if reason:
            left_out[reason] = (*left_out.get(reason, ()), gpus)
    return shards, left_out


def why_not(settings: RunSettings, gpus: int) -> str:
    """The reason why the config cannot run as it is on this number of GPUs; empty where it can."""
    try:
        share = BatchShare(settings.global_batch, settings.accumulation, gpus)
    except UserError:  # its line names one GPU count; ours stands for several
        return (
            f"train.global_batch {settings.global_batch} is not shared equally at accumulation "
            f"{settings.accumulation}"
        )
    for name, loss in settings.losses.items():
        least = loss.min_samples(gpus)
        if share.micro < least:
            key = needs.losses_key(name)
            return f"{key} needs at least {least} samples in a micro-batch of a rank"
    return ""


def memory_of(
    settings: RunSettings,
    counts: ParameterCounts,
    footprint: Footprint,
    gpus: int,
    shard: int,
    samples: int,
) -> Memory:
    """Bytes of the rank that holds most."""
    wide = settings.number_bytes
    narrow = 2 if settings.bf16 else wide
    accumulation = settings.global_batch // (gpus * samples)
    state = wide * (5 * counts.on_fullest_rank(shard) + fullest(counts.snapshot, shard))
    if gpus == 1:
        copies = narrow * counts.linear if settings.bf16 else 0
    else:
        # two blocks at a time, one in use and one being fetched, each with its gradient and the
        # one that is on its way to the other ranks
        blocks = 2 * counts.block * (2 * narrow + wide)
        copies = wide * (counts.heads + counts.rest) + blocks
        if accumulation > 1:  # ranks add up whole gradients until the last micro-batch
            copies += wide * counts.total
    each = footprint.of(samples)
    return Memory(
        gpus=gpus,
        shard=shard,
        samples=samples,
        accumulation=accumulation,
        state=state,
        copies=copies,
        inputs=each.inputs,
        activations=each.activations,
        work=each.work,
        kept=each.kept if accumulation > 1 else 0.0,
    )


def largest_fits(
    settings: RunSettings,
    memory_bytes: float,
    counts: ParameterCounts,
    footprint: Footprint,
    shards: dict[int, int],
) -> tuple[tuple[int, Memory | None], ...]:
    """The largest micro-batch that fits and divides a rank's share of the global batch.

    Returns:
        GPU count and memory, or None where not even the smallest micro-batch fits.
    Raises:
        UserError: it fits on none of the GPU counts.
    """
    limit = (1 - RESERVE) * memory_bytes
    largest: list[tuple[int, Memory | None]] = []
    smallest: list[Memory] = []
    for gpus, shard in shards.items():
        share = settings.global_batch // gpus
        sizes = [size for size in range(settings.least(gpus), share + 1) if share % size == 0]
        memories = [memory_of(settings, counts, footprint, gpus, shard, size) for size in sizes]
        fitting = [memory for memory in memories if memory.total <= limit]
        largest.append((gpus, fitting[-1] if fitting else None))
        smallest.append(min(memories, key=lambda memory: memory.total))
    if all(memory is None for _, memory in largest):
        least = min(smallest, key=lambda memory: memory.total)
        samples = "1 sample" if least.samples == 1 else f"{least.samples} samples"
        raise UserError(
            f"nothing fits: {samples} at a time on {least.gpus} GPUs take {least.total / GB:.2f} "
            f"GB of each (state {least.state / GB:.2f}, copies {least.copies / GB:.2f}, "
            f"activations {least.activations / GB:.2f}), and --memory {memory_bytes / GB:g} leaves "
            f"{limit / GB:.2f}; take larger GPUs, more of them per copy (parallel.shard), a "
            "smaller model, or smaller or fewer views"
        )
    return tuple(largest)


def pace_of(
    settings: RunSettings,
    request: Request,
    step_s: float,
    slab_bytes: float,
    store: StoreFacts | None,
    gpus: int,
) -> Pace:
    """Time of the run, and what must be read meanwhile, for a given time per step."""
    slabs = settings.global_batch / step_s
    raw = slabs * slab_bytes
    threads = None
    if request.slabs_per_thread:
        threads = slabs / gpus / request.slabs_per_thread
    return Pace(
        gpus=gpus,
        step_s=step_s,
        days=settings.steps * step_s / DAY_S,
        slabs=slabs,
        raw=raw,
        stored=None if store is None else raw * store.share,
        threads=threads,
    )


def warnings_of(
    settings: RunSettings,
    request: Request,
    as_set: Sequence[Memory],
    paces: Sequence[Pace],
    store: StoreFacts | None,
) -> tuple[str, ...]:
    """Doubtful settings, each with the next step."""
    warnings = []
    if request.memory is not None:
        limit = (1 - RESERVE) * request.memory
        too_large = [memory.gpus for memory in as_set if memory.total > limit]
        if too_large:
            warnings.append(
                f"train.accumulation={settings.accumulation} does not fit on {listed(too_large)} "
                "GPUs; take the train.accumulation of the second table"
            )
    if store is not None and store.scans < settings.global_batch:
        warnings.append(
            f"the store has {store.scans} scans for a batch of {settings.global_batch}: one step "
            "shows some of them more than once; lower train.global_batch"
        )
    workers = max(settings.workers, 1)
    slow = [pace.gpus for pace in paces if pace.threads is not None and pace.threads > workers]
    if slow:
        warnings.append(
            f"data.loader.workers={settings.workers} cannot read fast enough for {listed(slow)} "
            "GPUs, as measured here; raise it"
        )
    return tuple(warnings)


def listed(counts: Sequence[int]) -> str:
    """Numbers as text: 1, 2, 4."""
    return ", ".join(map(str, counts))
