"""What a run would cost, before it runs: tokens, parameters and FLOPs by part, and settings that
cannot learn.

FLOPs count matrix products (a multiply-add is 2), which is all that shows at these sizes; norms,
GELU and softmax are left out, as in fvcore and in torch's counter. The backward pass costs twice
the forward pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fvcore.nn import parameter_count
from rich.console import Group
from rich.table import Table

from tapct.base.exits import UserError
from tapct.base.geometry import Grid, Size3, patch_grid
from tapct.nn import heads
from tapct.nn.contracts import Backbone, CropCost, HeadRows
from tapct.ssl.needs import losses_key

ROWS_PER_PROTOTYPE_LIMIT = 64  # Sinkhorn spreads each row over at least K/n prototypes
STUDENT_PASSES = 3  # forward and twice that for backward


@dataclass(frozen=True)
class HeadUse:
    """One loss that compares tokens with prototypes.

    Args:
        name: name of the loss in the config.
        config: sizes of its head.
        rows: tokens of a sample that go through the head.
        owns_head: False where it uses another loss's head.
    """

    name: str
    config: heads.Config
    rows: HeadRows
    owns_head: bool = True


@dataclass(frozen=True)
class ViewCost:
    """Crops of one kind.

    Args:
        name: global or local.
        crops: per sample.
        window: voxels (z, y, x).
        grid: patches (z, y, x).
        tokens: of one crop, CLS and registers included.
    """

    name: str
    crops: int
    window: Size3
    grid: Grid
    tokens: int


@dataclass(frozen=True)
class PartCost:
    """One part of the network.

    Args:
        name: of the part.
        parameters: of one network (student and teacher each have them).
        student_flops: forward, per sample, all its crops; stochastic depth taken off.
        teacher_flops: forward, per sample, global crops.
    """

    name: str
    parameters: int
    student_flops: float
    teacher_flops: float

    @property
    def step_flops(self) -> float:
        """Per sample: student forward and backward, teacher forward."""
        return STUDENT_PASSES * self.student_flops + self.teacher_flops


@dataclass(frozen=True)
class Plan:
    """Cost of a run.

    Args:
        views: globals, then locals.
        parts: from the input to the heads.
        global_batch: samples per optimizer step.
        warnings: settings under which a loss cannot learn, each with the next move.
    """

    views: tuple[ViewCost, ...]
    parts: tuple[PartCost, ...]
    global_batch: int
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Of one network with its heads."""
        return sum(part.parameters for part in self.parts)

    @property
    def flops_per_sample(self) -> float:
        """Of one training step, for one sample."""
        return sum(part.step_flops for part in self.parts)

    @property
    def flops_per_step(self) -> float:
        """Of one optimizer step, for the global batch."""
        return self.flops_per_sample * self.global_batch


def tables(
    model: Backbone,
    *,
    num_globals: int,
    global_window: Size3,
    num_locals: int,
    local_window: Size3,
    head_uses: Sequence[HeadUse],
    global_batch: int,
    accumulation: int = 1,
    frozen_passes: int = 1,
) -> Plan:
    """Add up a run.

    Args:
        model: backbone; it may have no values.
        num_globals, num_locals: crops per sample.
        global_window, local_window: their voxels (z, y, x).
        head_uses: the losses with prototypes.
        global_batch: samples per optimizer step.
        accumulation: micro-batches of a step; Sinkhorn balances the rows of one.
        frozen_passes: passes over the global crops without gradient: the teacher's, and its
            snapshot's if there is one.
    Raises:
        UserError: a window is no multiple of the patch, or the backbone does not know its cost.
    """
    crops = [("global", num_globals, global_window)]
    if num_locals:
        crops.append(("local", num_locals, local_window))
    views, costs = [], []
    for name, num, window in crops:
        grid = patch_grid(window, model.patch, f"views.{name}_window")
        cost = cost_of(model, window)
        views.append(ViewCost(name, num, window, grid, cost.tokens))
        costs.append(cost)
    parts = []
    for layers in zip(*(cost.layers for cost in costs), strict=True):
        forward = [view.crops * layer.flops for view, layer in zip(views, layers, strict=True)]
        first = layers[0]
        student = first.trained_share * sum(forward)
        parts.append(PartCost(first.name, first.parameters, student, frozen_passes * forward[0]))
    warnings = []
    for use in head_uses:
        parts += _head_parts(use, model.dim)
        rows = round(use.rows.teacher * global_batch / accumulation)
        warning = capacity_warning(use.name, use.config.num_prototypes, rows)
        if use.rows.balanced and warning:
            warnings.append(warning)
    return Plan(tuple(views), tuple(parts), global_batch, tuple(warnings))


def cost_of(model: Backbone, window: Size3) -> CropCost:
    """What the backbone says that a crop costs.

    Raises:
        UserError: it does not say.
    """
    cost = model.crop_cost(window)
    if cost is None:
        raise UserError(
            f"tapct plan cannot count the FLOPs of {type(model).__name__}: this backbone does not "
            "know its cost; let it override Backbone.crop_cost"
        )
    return cost


def capacity_warning(loss: str, num_prototypes: int, rows: int) -> str | None:
    """Say when Sinkhorn targets must stay nearly uniform: more prototypes than 64 per row that it
    balances at once.

    Each of n balanced targets holds at most n/K of a prototype, so its entropy is at least about
    ln(K/n).

    Args:
        loss: its name in the config.
        num_prototypes: K.
        rows: n, rows of one micro-batch over all ranks (class tokens: 2 x global batch /
            accumulation).
    """
    limit = ROWS_PER_PROTOTYPE_LIMIT * rows
    if num_prototypes <= limit:
        return None
    key = losses_key(loss)
    way_out = f"set {key}.targets.kind=centring"
    if limit >= 2:
        fewer = 2 ** int(math.log2(limit))
        way_out = (
            f"set {key}.head.num_prototypes={fewer} or less, more rows at once, or {way_out[4:]}"
        )
    floor = math.log(num_prototypes / max(rows, 1))
    return (
        f"{key}: {num_prototypes} prototypes for {rows} rows at once: Sinkhorn targets "
        "keep at least about "
        f"{floor:.1f} of ln K = {math.log(num_prototypes):.1f} nats, so hardly anything is "
        f"learned; {way_out}"
    )


def _head_parts(use: HeadUse, dim: int) -> list[PartCost]:
    """MLP and prototypes of one loss."""
    config = use.config
    with torch.device("meta"):
        counts = parameter_count(heads.PrototypeHead(dim, config))
    widths = [dim, *[config.hidden] * (config.layers - 1), config.bottleneck]
    mlp = 2.0 * sum(a * b for a, b in itertools.pairwise(widths))
    last = 2.0 * config.bottleneck * config.num_prototypes
    return [
        PartCost(
            f"{use.name} {name}",
            count if use.owns_head else 0,
            use.rows.student * cost,
            use.rows.teacher * cost,
        )
        for name, count, cost in (
            ("MLP", counts["mlp"], mlp),
            ("prototypes", counts["last_layer"], last),
        )
    ]


def render(plan: Plan) -> Group:
    """The plan as tables for a terminal."""
    views = Table(
        "view",
        "crops",
        "window (z,y,x)",
        "patches (z,y,x)",
        "tokens per crop",
        "tokens per sample",
        title="Views",
    )
    for view in plan.views:
        sizes = ["x".join(map(str, size)) for size in (view.window, view.grid)]
        views.add_row(
            view.name, str(view.crops), *sizes, f"{view.tokens:,}", f"{view.crops * view.tokens:,}"
        )
    title = "Parameters and GFLOP per sample (student forward and backward, teacher forward)"
    costs = Table(title=title, pad_edge=False)
    costs.add_column("part", no_wrap=True)
    costs.add_column("parameters", justify="right", min_width=len(f"{plan.parameters:,}"))
    for column in ("student forward", "teacher forward", "step", "share"):
        costs.add_column(column, justify="right")
    for part in plan.parts:
        flops = [
            f"{value / 1e9:,.2f}"
            for value in (part.student_flops, part.teacher_flops, part.step_flops)
        ]
        costs.add_row(
            part.name,
            f"{part.parameters:,}",
            *flops,
            f"{part.step_flops / plan.flops_per_sample:.1%}",
        )
    totals = [
        sum(part.student_flops for part in plan.parts),
        sum(part.teacher_flops for part in plan.parts),
    ]
    costs.add_section()
    costs.add_row(
        "total",
        f"{plan.parameters:,}",
        *(f"{value / 1e9:,.2f}" for value in (*totals, plan.flops_per_sample)),
        "100.0%",
    )
    step = (
        f"One optimizer step of {plan.global_batch} samples: {plan.flops_per_step / 1e12:,.3f} "
        "TFLOP."
    )
    return Group(views, costs, step, *(f"Warning: {warning}" for warning in plan.warnings))
