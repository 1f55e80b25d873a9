"""Cost of a training step: tokens, parameters and FLOPs of each part of the network.

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

from tapct.base.exits import UserError
from tapct.base.geometry import Grid, Size3, patch_grid
from tapct.nn import heads
from tapct.nn.contracts import Backbone, CropCost, HeadRows
from tapct.ssl.needs import losses_key

PROTOTYPES_PER_ROW_LIMIT = 64  # Sinkhorn spreads each row over at least K/n prototypes
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
        crops: number of crops of a sample.
        window: voxels (z, y, x) of a crop.
        grid: patches (z, y, x) of a crop.
        tokens: tokens of one crop, CLS and registers included.
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
        name: name of the part, e.g. attention.
        parameters: number of parameters in one network; student and teacher each have them.
        student_flops: FLOPs of the forward pass of a sample, all its crops; those that stochastic
            depth saves are taken off.
        teacher_flops: FLOPs of the forward pass of a sample, global crops alone.
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
class Costs:
    """Cost of a run.

    Args:
        views: global crops, then local crops.
        backbone: parts of the backbone, from the input on.
        heads: parts of the heads, a MLP and prototypes for each loss with a head.
        global_batch: samples per optimizer step.
        warnings: settings under which a loss cannot learn, each with the next step.
    """

    views: tuple[ViewCost, ...]
    backbone: tuple[PartCost, ...]
    heads: tuple[PartCost, ...]
    global_batch: int
    warnings: tuple[str, ...]

    @property
    def parts(self) -> tuple[PartCost, ...]:
        """All parts of the network, backbone and heads."""
        return self.backbone + self.heads

    @property
    def parameters(self) -> int:
        """Number of parameters of one network with its heads."""
        return sum(part.parameters for part in self.parts)

    @property
    def flops_per_sample(self) -> float:
        """FLOPs of one training step for one sample."""
        return sum(part.step_flops for part in self.parts)

    @property
    def flops_per_step(self) -> float:
        """FLOPs of one optimizer step for the global batch."""
        return self.flops_per_sample * self.global_batch


def count_costs(
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
) -> Costs:
    """Add up the cost of a training step over the parts of the network.

    Args:
        model: backbone; its parameters need no values.
        num_globals, num_locals: number of crops of a sample.
        global_window, local_window: voxels (z, y, x) of these crops.
        head_uses: losses with a head.
        global_batch: samples per optimizer step.
        accumulation: micro-batches of a step; Sinkhorn balances the rows of one.
        frozen_passes: number of passes over the global crops without gradient: that of the
            teacher, and that of its snapshot if there is one.
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
    backbone = []
    for layers in zip(*(cost.layers for cost in costs), strict=True):
        forward = [view.crops * layer.flops for view, layer in zip(views, layers, strict=True)]
        first = layers[0]
        student = first.trained_share * sum(forward)
        backbone.append(PartCost(first.name, first.parameters, student, frozen_passes * forward[0]))
    head_parts, warnings = [], []
    for use in head_uses:
        head_parts += _head_parts(use, model.dim)
        rows = round(use.rows.teacher * global_batch / accumulation)
        warning = capacity_warning(use.name, use.config.num_prototypes, rows)
        if use.rows.balanced and warning:
            warnings.append(warning)
    return Costs(tuple(views), tuple(backbone), tuple(head_parts), global_batch, tuple(warnings))


def cost_of(model: Backbone, window: Size3) -> CropCost:
    """What a crop costs, as the backbone reports it.

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
    """Warn when Sinkhorn targets must stay nearly uniform.

    That is so with more than 64 prototypes for each row that is balanced at once: each of n
    balanced targets holds at most n/K of a prototype, so its entropy is at least about
    ln(K/n).

    Args:
        loss: its name in the config.
        num_prototypes: K.
        rows: n, rows of one micro-batch over all ranks (class tokens: 2 x global batch /
            accumulation).
    """
    limit = PROTOTYPES_PER_ROW_LIMIT * rows
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
        f"{key}: {num_prototypes} prototypes for {rows} rows at once, more than "
        f"{PROTOTYPES_PER_ROW_LIMIT} per row: Sinkhorn targets keep at least about "
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
