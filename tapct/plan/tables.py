"""The tables and legends that `tapct plan` prints; they fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from tapct.plan.flops import Costs, PartCost
from tapct.plan.scale import GB, MB, RESERVE, Estimate, Memory, listed

GFLOP, TFLOP = 1e9, 1e12
MIN_WIDTH = 80  # in fewer columns, rich would cut digits off the numbers
HOW_TO_TIME = (
    "No times: give --tflops, the sustained TFLOP/s of one GPU (or its peak, with --utilisation), "
    "or give --measure on a machine like those of the run."
)


def cost_tables(costs: Costs) -> Group:
    """Tokens, parameters and FLOPs, and warnings about settings that cannot learn."""
    flops = costs.flops_per_step / TFLOP
    shown = f"{flops:,.3f}" if flops >= 1 else f"{flops:.3g}"
    step = f"One optimizer step of {costs.global_batch} samples: {shown} TFLOP."
    warnings = [f"Warning: {warning}" for warning in costs.warnings]
    return Group(_views(costs), _parts(costs), step, *warnings)


def estimate_tables(estimate: Estimate) -> Group:
    """Memory and time for each GPU count, and what the numbers rest on."""
    parts: list[Table | str] = []
    if estimate.as_set:
        parts += [_memory_as_set(estimate), _legend(estimate)]
    if estimate.largest:
        parts.append(_largest(estimate))
    for reason, counts in estimate.left_out:
        parts.append(f"Left out, {listed(counts)} GPUs: {reason}.")
    parts.append(_reading(estimate))
    if estimate.paces:
        parts += [_times(estimate), _basis(estimate)]
    else:
        parts.append(HOW_TO_TIME)
    parts += [f"Warning: {warning}" for warning in estimate.warnings]
    return Group(*parts)


def _table(title: str, columns: Sequence[str], *, text_columns: int = 0) -> Table:
    """An empty table; the first columns hold text, all others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        if index < text_columns:
            table.add_column(column, vertical="bottom", no_wrap=True)
        else:
            table.add_column(column, vertical="bottom", justify="right")
    return table


def _views(costs: Costs) -> Table:
    columns = ("view", "crops", "window zyx", "patches zyx", "tokens a crop", "tokens a sample")
    table = _table("Views of a sample", columns, text_columns=1)
    for view in costs.views:
        window, grid = ("x".join(map(str, size)) for size in (view.window, view.grid))
        tokens = f"{view.tokens:,}", f"{view.crops * view.tokens:,}"
        table.add_row(view.name, str(view.crops), window, grid, *tokens)
    return table


def _parts(costs: Costs) -> Table:
    table = _table(
        "Parameters of one network, and GFLOP per sample\n"
        "(step = forward and backward of the student, forward of the teacher)",
        ("part", "parameters", "student forward", "teacher forward", "step", "share"),
        text_columns=1,
    )
    for part in costs.backbone:
        table.add_row(*_part_row(part.name, [part], costs))
    table.add_section()
    table.add_row(*_part_row("backbone", costs.backbone, costs))
    table.add_section()
    for part in costs.heads:
        table.add_row(*_part_row(part.name, [part], costs))
    if costs.heads:
        table.add_section()
        table.add_row(*_part_row("heads", costs.heads, costs))
        table.add_section()
    table.add_row(*_part_row("total", costs.parts, costs))
    return table


def _part_row(name: str, parts: Sequence[PartCost], costs: Costs) -> list[str]:
    """One row: the sum over some parts."""
    step = sum(part.step_flops for part in parts)
    return [
        name,
        f"{sum(part.parameters for part in parts):,}",
        _gigaflops(sum(part.student_flops for part in parts)),
        _gigaflops(sum(part.teacher_flops for part in parts)),
        _gigaflops(step),
        f"{step / costs.flops_per_sample:.1%}",
    ]


def _gigaflops(flops: float) -> str:
    """GFLOP with two decimals; two digits where these would be zeros, for a tiny network."""
    number = flops / GFLOP
    return f"{number:.2g}" if 0 < number < 0.1 else f"{number:,.2f}"


def _memory_as_set(estimate: Estimate) -> Table:
    table = _table(
        f"Memory of one GPU in GB, with train.accumulation={estimate.settings.accumulation}",
        ("GPUs", "samples", "state", "copies", "inputs", "activations", "work", "kept", "total"),
    )
    for memory in estimate.as_set:
        sizes = (
            memory.state,
            memory.copies,
            memory.inputs,
            memory.activations,
            memory.work,
            memory.kept,
            memory.total,
        )
        table.add_row(str(memory.gpus), str(memory.samples), *map(_gigabytes, sizes))
    return table


def _legend(estimate: Estimate) -> str:
    state_bytes, parameters = 5 * estimate.settings.number_bytes, estimate.counts.total
    lines = [
        "samples      size of a micro-batch on one GPU",
        f"state        {state_bytes} bytes for each of {parameters:,} parameters: student, "
        "teacher,",
        "             gradients, two moments; divided among the GPUs that share a copy",
        "copies       weights that are whole while they are used",
        "activations  stored for the backward pass",
        "work         most memory in use beside them, chunks of prototype scores included",
        "kept         tokens of the micro-batch before",
        "Not included: CUDA context, NCCL, gaps of the allocator.",
        "",
    ]
    if estimate.counts.snapshot:
        lines.insert(3, "             also the snapshot of the teacher, divided in the same way")
    return "\n".join(lines)


def _largest(estimate: Estimate) -> Table:
    assert estimate.request.memory is not None
    limit = (1 - RESERVE) * estimate.request.memory
    table = _table(
        f"Largest micro-batch that fits into {1 - RESERVE:.0%} of {estimate.request.memory / GB:g} "
        "GB",
        ("GPUs", "samples", "train.accumulation", "total GB", "the config as it is"),
    )
    as_set = {memory.gpus: memory for memory in estimate.as_set}
    for gpus, memory in estimate.largest:
        fitting = ["none", "", ""]
        if memory is not None:
            fitting = [str(memory.samples), str(memory.accumulation), _gigabytes(memory.total)]
        table.add_row(str(gpus), *fitting, _verdict(as_set.get(gpus), limit))
    return table


def _verdict(memory: Memory | None, limit: float) -> str:
    if memory is None:
        return "left out"
    return "fits" if memory.total <= limit else "too large"


def _reading(estimate: Estimate) -> str:
    batch = estimate.settings.global_batch
    size = batch * estimate.slab_bytes / GB
    basis = "there is no store yet: slices of 512x512 are assumed"
    if estimate.store is not None:
        basis = f"the store holds it in {estimate.store.share:.0%} of that"
    return f"Each step reads {batch} slabs, {size:.3g} GB as int16 ({basis})."


def _times(estimate: Estimate) -> Table:
    settings = estimate.settings
    columns = ["GPUs", "s a step", "days", "GPU-days", "slabs/s", "MB/s int16"]
    if estimate.store is not None:
        columns.append("MB/s on disk")
    if estimate.request.slabs_per_thread:
        columns.append("reading threads a GPU")
    samples = settings.steps * settings.global_batch
    table = _table(f"Time of {settings.steps:,} steps, {samples:,} samples", columns)
    for pace in estimate.paces:
        numbers = [pace.step_s, pace.days, pace.days * pace.gpus, pace.slabs, pace.raw / MB]
        if pace.stored is not None:
            numbers.append(pace.stored / MB)
        if pace.threads is not None:
            numbers.append(pace.threads)
        table.add_row(str(pace.gpus), *map(_number, numbers))
    return table


def _basis(estimate: Estimate) -> str:
    request = estimate.request
    assert request.rate is not None
    return (
        f"At {request.rate / TFLOP:.3g} TFLOP/s a GPU ({request.rate_from}). Not included: "
        "communication, making views, and reading where it is slower than the table asks for."
    )


def _gigabytes(size: float) -> str:
    if not size or size >= 100 * GB:
        return f"{size / GB:,.0f}"
    return f"{size / GB:.2f}" if size >= 0.1 * GB else f"{size / GB:.3f}"


def _number(value: float) -> str:
    """Three digits; whole numbers from 100 on, one digit below 0.01."""
    if 100 <= value < 1e6:
        return f"{value:,.0f}"
    return f"{value:.1g}" if value < 0.01 else f"{value:.3g}"
