"""`tapct plan`: from the config and the options of the command line to the tables that it prints.

config, options -> `flops`     tokens, parameters and FLOPs by part
                -> `memory`    bytes of a micro-batch, counted on fake tensors
                -> `scale`     memory and time for each GPU count
                -> `tables`    what is printed
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.console import Group
from rich.text import Text

from tapct.base.exits import UserError
from tapct.base.geometry import patch_grid
from tapct.config import plugins
from tapct.data.loading import read_rate
from tapct.data.packed.store import INDEX_NAME
from tapct.distributed.device import pick_device
from tapct.nn.contracts import Backbone
from tapct.plan import flops, measure, memory, scale, tables
from tapct.run.config import RunConfig
from tapct.run.stages import ResolvedStage
from tapct.ssl import needs
from tapct.views import masks

# share of the rate of plain matrix products that a training step reaches; our assumption
UTILISATION = 0.4


@dataclass(frozen=True)
class Options:
    """Options of the command line.

    Args:
        gpus: GPU counts to report, separated by commas.
        per_node: GPUs of a node.
        memory_gb: memory of one GPU in GB; None prints no table of what fits.
        tflops: sustained TFLOP/s of one GPU, or its peak if there is a utilisation.
        measure: whether to time matrix products on the device of the config, and reading from its
            store if there is one.
        utilisation: share of the rate that training reaches.
    """

    gpus: str = "1,2,4,8,16,32,64"
    per_node: int = 8
    memory_gb: float | None = None
    tflops: float | None = None
    measure: bool = False
    utilisation: float | None = None

    def __post_init__(self) -> None:
        numbers = {
            "--memory": self.memory_gb,
            "--tflops": self.tflops,
            "--utilisation": self.utilisation,
        }
        for name, value in numbers.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value:g}; it must be more than 0")
        if self.utilisation is not None and self.utilisation > 1:
            raise UserError(
                f"--utilisation is {self.utilisation:g}; it is a share and must be at most 1"
            )
        if self.measure and self.tflops is not None:
            raise UserError(
                "--measure and --tflops exclude each other: the rate is measured or given"
            )
        if self.utilisation is not None and self.tflops is None and not self.measure:
            raise UserError(
                "--utilisation is a share of a rate; give the rate with --tflops or --measure"
            )


def report(config: RunConfig, options: Options) -> Group:
    """Everything that `tapct plan` prints.

    Raises:
        UserError: the config cannot run, or an option is wrong.
    """
    costs, request = costs_of(config), request_of(config, options)
    stage_warnings = []
    for stage in stages_of(config):
        line = f"Warning: {stage.name} is not counted; for it give 'stages=[]' {stage.changes}"
        stage_warnings.append(Text(line))  # not a string: rich would read [...] as markup
    try:
        estimate = tables.estimate_tables(estimate_of(config, costs, request))
        return Group(tables.cost_tables(costs), estimate, *stage_warnings)
    except memory.NeedsValues as error:
        missing = Text(f"Warning: memory and time are not estimated: {error}")
        return Group(tables.cost_tables(costs), missing, *stage_warnings)


def stages_of(config: RunConfig) -> list[ResolvedStage]:
    """The stages that train with other settings than the config itself."""
    declared = zip(config.resolved_stages()[1:], config.stages, strict=True)
    return [resolved for resolved, stage in declared if stage.set]


def masked_share(config: RunConfig) -> float:
    """Share of the patches of the global crops that are masked.

    It is the same in every step; only the crops that are masked change.
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


def costs_of(config: RunConfig) -> flops.Costs:
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
    return flops.count_costs(
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


def request_of(config: RunConfig, options: Options) -> scale.Request:
    """What the options ask for in numbers; measured on this machine if they say so.

    Raises:
        UserError: --gpus is not a list of GPU counts.
    """
    counts = gpu_counts(options.gpus)
    memory_bytes = None if options.memory_gb is None else options.memory_gb * scale.GB
    rate, source, slabs_per_thread = None, "", None
    if options.tflops is not None:
        rate, source = _given_rate(options.tflops, options.utilisation)
    if options.measure:
        rate, source = _measured_rate(config, options.utilisation)
        if (config.data.folders[0] / INDEX_NAME).is_file():
            measured = read_rate.measure(config.data.folders[0], config.data.loader.slab_depth, 1)
            slabs_per_thread = measured.slabs_per_s
    return scale.Request(counts, options.per_node, memory_bytes, rate, source, slabs_per_thread)


def _given_rate(tflops: float, utilisation: float | None) -> tuple[float, str]:
    """FLOP/s of --tflops, and where they come from."""
    if utilisation is None:
        return 1e12 * tflops, "--tflops"
    return 1e12 * tflops * utilisation, f"--tflops {tflops:g} x --utilisation {utilisation:g}"


def _measured_rate(config: RunConfig, utilisation: float | None) -> tuple[float, str]:
    """FLOP/s of --measure, and where they come from."""
    device = pick_device(config.device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else config.train.dtype
    products = measure.gemm_rate(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    precision = config.train.precision
    source = f"{products / 1e12:.3g} TFLOP/s of {precision} matrix products on this {name}"
    if utilisation is None:
        assumption = f"{source} x {UTILISATION}, an assumption: see --utilisation"
        return products * UTILISATION, assumption
    return products * utilisation, f"{source} x {utilisation:g}"


def gpu_counts(text: str) -> tuple[int, ...]:
    """The GPU counts of a list such as 1,8,64: ascending, each once.

    Raises:
        UserError: an entry is not a positive whole number.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entry.isascii() and entry.isdigit() and int(entry) > 0 for entry in entries):
        raise UserError(f"--gpus {text} is not a list of GPU counts; write e.g. --gpus 1,8,64")
    return tuple(sorted({int(entry) for entry in entries}))


def counts_compiled(config: RunConfig, request: scale.Request) -> bool:
    """Whether memory is counted for compiled blocks: with --memory, where the GPU of the run will
    compile them. Making the graphs takes some seconds, which the other tables need not wait for.
    """
    if request.memory is None or config.train.compile == "never":
        return False
    return config.train.compile == "always" or config.device != "cpu"


def estimate_of(config: RunConfig, costs: flops.Costs, request: scale.Request) -> scale.Estimate:
    """Memory and time of a config for each GPU count.

    Args:
        config: config of the run.
        costs: its FLOPs.
        request: numbers from the command line.
    Raises:
        UserError: the config runs on none of the GPU counts.
        NeedsValues: a plug-in cannot run without values.
    """
    train, views, bf16 = config.train, config.views, config.train.precision == "bf16"
    settings = scale.RunSettings(
        global_batch=train.global_batch,
        accumulation=train.accumulation,
        steps=train.steps,
        shard=config.parallel.shard,
        number_bytes=train.dtype.itemsize,
        bf16=bf16,
        losses=needs.build_losses(config.losses),
        slab_depth=config.data.loader.slab_depth,
        workers=config.data.loader.workers,
    )
    num_tokens = tokens_of(config)
    sample = memory.SampleShape(
        num_globals=views.num_globals,
        global_window=views.global_window,
        num_locals=views.num_locals,
        local_window=views.local_window,
        num_tokens=num_tokens,
        masked=masked_share(config) * views.num_globals * num_tokens,
    )
    return scale.estimate(
        settings,
        request,
        memory.count_parameters(memory.Valueless(config.model, config.losses)),
        memory.count_bytes(
            config.model,
            config.losses,
            sample,
            dtype=train.dtype,
            bf16=bf16,
            every=train.recompute,
            compiles=counts_compiled(config, request),
        ),
        flops_per_step=costs.flops_per_step,
        store=measure.store_facts(config.data.folders[0]),
    )
