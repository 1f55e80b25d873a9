"""`tapct plan`: what its options ask for, measured if they say so, and memory and time of a config
by them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Group
from rich.text import Text

from tapct.base.exits import UserError
from tapct.base.geometry import patch_grid
from tapct.config import plugins
from tapct.data import read_rate
from tapct.data.store import INDEX_NAME, Store
from tapct.distributed.device import pick_device
from tapct.nn.contracts import Backbone
from tapct.plan import flops, scale
from tapct.plan import memory as footprint
from tapct.plan import tables as scale_tables
from tapct.run.config import RunConfig
from tapct.run.stages import Part
from tapct.ssl import needs
from tapct.views import masks

UTILISATION = (
    0.4  # of the rate of plain matrix products that a training step reaches; ours, an assumption
)
STORE_SAMPLE = 256  # scans whose files are looked at, of a store that may hold a million


@dataclass(frozen=True)
class Options:
    """Of the command line.

    Args:
        gpus: numbers of GPUs, with commas.
        per_node: GPUs of a node.
        memory_gb: of a GPU.
        tflops: TFLOP/s that one GPU sustains, or its peak where there is a utilisation.
        measure: time matrix products on the config's device, and reading from its store if there is
            one.
        utilisation: share of the rate that training reaches.
    """

    gpus: str = "1,2,4,8,16,32,64"
    per_node: int = 8
    memory_gb: float | None = None
    tflops: float | None = None
    measure: bool = False
    utilisation: float | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("--memory", self.memory_gb),
            ("--tflops", self.tflops),
            ("--utilisation", self.utilisation),
        ):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value:g}; it must be more than 0")
        if self.utilisation is not None and self.utilisation > 1:
            raise UserError(
                f"--utilisation is {self.utilisation:g}, more than all of the rate; give a share"
            )
        if self.measure and self.tflops is not None:
            raise UserError(
                "--measure and --tflops exclude each other: the rate is measured or given"
            )
        if self.utilisation is not None and self.tflops is None and not self.measure:
            raise UserError(
                "--utilisation is a share of a rate; give that with --tflops, or --measure it"
            )


def tables(config: RunConfig, options: Options) -> Group:
    """All that `tapct plan` prints. Raises: UserError: the config cannot run so, or an option makes
    no sense.
    """
    costs, wanted = make_plan(config), asked(config, options)
    told = [
        f"Warning: {part.name} is not counted; for it give 'stages=[]' {part.words}"
        for part in stages_of(config)
    ]
    later = map(Text, told)  # as it is: brackets of a key are no markup
    try:
        return Group(
            flops.render(costs), scale_tables.render(make_scale(config, costs, wanted)), *later
        )
    except footprint.NeedsValues as error:
        return Group(flops.render(costs), f"Warning: memory and time are not told: {error}", *later)


def stages_of(config: RunConfig) -> list[Part]:
    """The parts of the run that are not the config itself."""
    return [
        part for part, stage in zip(config.parts()[1:], config.stages, strict=True) if stage.set
    ]


def masked_share(config: RunConfig) -> float:
    """Masked patches over all patches of the global crops: the same in every step, only on other
    crops.
    """
    num_crops, num_tokens = config.views.num_globals * config.train.global_batch, tokens_of(config)
    counts = masks.counts(
        config.masks, num_crops_global=num_crops, num_tokens=num_tokens, seed=config.seed, step=0
    )
    return sum(counts) / (num_crops * num_tokens)


def tokens_of(config: RunConfig) -> int:
    """Patches of a global crop."""
    patch = needs.patch_of(config.model)
    return math.prod(patch_grid(config.views.global_window, patch, "views.global_window"))


def make_plan(config: RunConfig) -> flops.Plan:
    """Tokens, parameters and FLOPs of a config.

    Raises:
        UserError: the backbone does not know its cost, or a loss not the rows of its head.
    """
    with torch.device("meta"):
        backbone: Backbone = plugins.load("models", config.model.name).build(config.model.config)
    losses = needs.build_losses(config.losses)
    views = config.views
    masked = masked_share(config) * views.num_globals * tokens_of(config)
    uses = []
    for name, loss in losses.items():
        if not loss.head_of:
            continue
        rows = loss.prototype_rows(views.num_globals, views.num_locals, masked)
        if rows is None:
            raise UserError(
                f"tapct plan cannot count the FLOPs of {needs.losses_key(name)}: it has a head, "
                "but does not say how many rows go through it; let it override Loss.prototype_rows"
            )
        uses.append(flops.HeadUse(name, loss.config.head, rows, owns_head=loss.head_of == name))
    return flops.tables(
        backbone,
        num_globals=config.views.num_globals,
        global_window=config.views.global_window,
        num_locals=config.views.num_locals,
        local_window=config.views.local_window,
        head_uses=uses,
        global_batch=config.train.global_batch,
        accumulation=config.train.accumulation,
        # an earlier teacher, where a loss wants one, sees the global crops too
        frozen_passes=1 + any(loss.snapshot is not None for loss in losses.values()),
    )


def asked(config: RunConfig, options: Options) -> scale.Asked:
    """Numbers from the options, measured if they say so. Raises: UserError."""
    counts, share = gpu_counts(options.gpus), options.utilisation
    memory = None if options.memory_gb is None else options.memory_gb * scale.GB
    rate, source, slabs = None, "", None
    if options.tflops is not None:
        rate, source = 1e12 * options.tflops * (share or 1.0), "--tflops"
        if share is not None:
            source = f"--tflops {options.tflops:g} x --utilisation {share:g}"
    if options.measure:
        device = pick_device(config.device)
        found = gemm_rate(
            device, torch.bfloat16 if config.train.precision == "bf16" else config.train.dtype
        )
        rate = found * (share or UTILISATION)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        what = (
            f"{found / 1e12:.3g} TFLOP/s of {config.train.precision} matrix products on this {name}"
        )
        source = (
            f"{what} x {share:g}"
            if share
            else f"{what} x {UTILISATION}, an assumption: see --utilisation"
        )
        if (config.data.store / INDEX_NAME).is_file():
            slabs = read_rate.measure(
                config.data.store, config.data.loader.slab_depth, 1
            ).slabs_per_s
    return scale.Asked(counts, options.per_node, memory, rate, source, slabs)


def gpu_counts(text: str) -> tuple[int, ...]:
    """1,2,8 -> the numbers in ascending order, each once. Raises: UserError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UserError(
            f"--gpus {text} is no list of numbers of GPUs; write for example --gpus 1,8,64"
        )
    return tuple(sorted({int(word) for word in words}))


def gemm_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of the best of some square matrix products."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def make_scale(config: RunConfig, costs: flops.Plan, asked: scale.Asked) -> scale.Scale:
    """Memory and time of a config by the number of GPUs.

    Args:
        costs: its plan.
        asked: of the command line.
    Raises:
        UserError: no number of GPUs can run it.
        NeedsValues: a plug-in cannot run without values.
    """
    train, views, bf16 = config.train, config.views, config.train.precision == "bf16"
    demand = scale.Demand(
        train.global_batch,
        train.accumulation,
        train.steps,
        config.parallel.shard,
        train.dtype.itemsize,
        bf16,
        needs.build_losses(config.losses),
        config.data.loader.slab_depth,
        config.data.loader.workers,
    )
    num_tokens = tokens_of(config)
    sizes = footprint.Sizes(
        views.num_globals,
        views.global_window,
        views.num_locals,
        views.local_window,
        num_tokens,
        masked_share(config) * views.num_globals * num_tokens,
    )
    return scale.tables(
        demand,
        asked,
        footprint.weigh(footprint.Valueless(config.model, config.losses)),
        footprint.trace(
            config.model, config.losses, sizes, dtype=train.dtype, bf16=bf16, every=train.recompute
        ),
        flops_per_step=costs.flops_per_step,
        store=store_facts(config.data.store),
    )


def store_facts(path: Path) -> scale.StoreFacts | None:
    """What a store tells of reading, from some of its scans; None where there is none."""
    if not (path / INDEX_NAME).is_file():
        return None
    store = Store(path)
    some = range(0, len(store), max(1, len(store) // STORE_SAMPLE))
    planes = [math.prod(store.scans[i].shape_ZYX[1:]) for i in some]
    raw = sum(2 * math.prod(store.scans[i].shape_ZYX) for i in some)
    if not raw:
        return None
    held = sum(store.file(i).stat().st_size for i in some if store.file(i).is_file())
    return scale.StoreFacts(len(store), sum(planes) / len(planes), held / raw)
