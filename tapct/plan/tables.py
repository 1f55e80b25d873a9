"""Memory and time of a run as tables for a terminal of 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table

from tapct.plan.scale import GB, MB, RESERVE, Memory, Scale, listed

HOW_TO_TIME = (
    "Times: give --tflops, what one GPU sustains in training (or its peak, with --utilisation); "
    "or --measure, on a "
    "machine like those of the run."
)


def render(scale: Scale) -> Group:
    """All tables, and what they rest on."""
    parts: list[Table | str] = []
    if scale.as_set:
        parts += [_as_set(scale), _legend(scale)]
    if scale.largest:
        parts.append(_largest(scale))
    parts += [f"Left out, {listed(counts)} GPUs: {reason}." for reason, counts in scale.left_out]
    parts.append(_reading(scale))
    parts += [_paces(scale), _basis(scale)] if scale.paces else [HOW_TO_TIME]
    return Group(*parts, *(f"Warning: {warning}" for warning in scale.warnings))


def _table(title: str, columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns.split(","):
        table.add_column(column.strip(), justify="right", vertical="bottom")
    return table


def _as_set(scale: Scale) -> Table:
    table = _table(
        f"Memory of each GPU in GB, train.accumulation={scale.demand.accumulation}",
        "GPUs, samples, state, copies, inputs, activations, work, kept, total",
    )
    for memory in scale.as_set:
        parts = (
            memory.state,
            memory.copies,
            memory.inputs,
            memory.activations,
            memory.work,
            memory.kept,
            memory.total,
        )
        table.add_row(str(memory.gpus), str(memory.samples), *(_gb(part) for part in parts))
    return table


def _legend(scale: Scale) -> str:
    wide = scale.demand.number_bytes
    snapshot = " and the teacher's snapshot" if scale.weights.snapshot else ""
    return (
        f"samples: of a micro-batch. state: {5 * wide} bytes for each of {scale.weights.total:,} "
        "parameters (student, "
        f"teacher, gradients, two moments){snapshot}, shared by the ranks of a copy. copies: "
        "whole while "
        "computed. activations: kept for the backward pass. work: most beside it, scores by chunk "
        "included. kept: "
        "tokens of the micro-batch before. Not in it: CUDA context, NCCL, gaps of the allocator."
    )


def _largest(scale: Scale) -> Table:
    assert scale.asked.memory is not None
    table = _table(
        f"What fits into {1 - RESERVE:.0%} of {scale.asked.memory / GB:g} GB",
        "GPUs, largest micro-batch, train.accumulation, total GB, as the config is",
    )
    as_set = {memory.gpus: memory for memory in scale.as_set}
    for gpus, memory in scale.largest:
        fits = (
            (str(memory.samples), str(memory.accumulation), _gb(memory.total))
            if memory
            else ("none", "", "")
        )
        table.add_row(
            str(gpus), *fits, _verdict(as_set.get(gpus), (1 - RESERVE) * scale.asked.memory)
        )
    return table


def _verdict(memory: Memory | None, limit: float) -> str:
    if memory is None:
        return "left out"
    return "fits" if memory.total <= limit else "too large"


def _reading(scale: Scale) -> str:
    size = scale.demand.global_batch * scale.slab_bytes / GB
    where = (
        f"{scale.store.share:.0%} of it on the disk"
        if scale.store
        else "no store yet: slices of 512x512 assumed"
    )
    return f"Each step reads {scale.demand.global_batch} slabs, {size:.3g} GB as int16 ({where})."


def _paces(scale: Scale) -> Table:
    demand = scale.demand
    table = _table(
        f"Time of {demand.steps:,} steps, {demand.steps * demand.global_batch:,} samples",
        "GPUs, s a step, days, GPU-days, slabs/s, MB/s int16"
        + (", MB/s on disk" if scale.store else "")
        + (", reading threads a GPU" if scale.asked.slabs_per_thread else ""),
    )
    for pace in scale.paces:
        numbers = [pace.step_s, pace.days, pace.days * pace.gpus, pace.slabs, pace.raw / MB]
        numbers += [
            value for value in (pace.stored and pace.stored / MB, pace.threads) if value is not None
        ]
        table.add_row(str(pace.gpus), *(_number(value) for value in numbers))
    return table


def _basis(scale: Scale) -> str:
    assert scale.asked.rate is not None
    return (
        f"At {scale.asked.rate / 1e12:.3g} TFLOP/s a GPU ({scale.asked.rate_from}). "
        "Communication, views, and reading "
        "that is slower than this come on top."
    )


def _gb(size: float) -> str:
    if not size or size >= 100 * GB:
        return f"{size / GB:,.0f}"
    return f"{size / GB:.2f}" if size >= 0.1 * GB else f"{size / GB:.3f}"


def _number(value: float) -> str:
    return (
        f"{value:,.0f}"
        if 100 <= value < 1e6
        else f"{value:.1g}"
        if value < 0.01
        else f"{value:.3g}"
    )
