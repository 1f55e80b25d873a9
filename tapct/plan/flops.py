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
from tapct.models import vit
from tapct.nn import heads
from tapct.nn.layers import swiglu_hidden

ROWS_PER_PROTOTYPE_LIMIT = 64  # Sinkhorn spreads each row over at least K/n prototypes
STUDENT_PASSES = 3  # forward and twice that for backward

Window = tuple[int, int, int]


@dataclass(frozen=True)
class HeadUse:
    """One loss that compares tokens with prototypes.

    Args:
        name: of the loss, `dino` (class tokens) or `ibot` (masked patches).
        config: sizes of its head.
        sinkhorn: whether its targets are balanced by Sinkhorn.
        owns_head: False where it uses another loss's head.
    """

    name: str
    config: heads.Config
    sinkhorn: bool = False
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
    window: Window
    grid: Window
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
    model: vit.Config,
    *,
    num_globals: int,
    global_window: Window,
    num_locals: int,
    local_window: Window,
    head_uses: Sequence[HeadUse],
    masked_share: float,
    global_batch: int,
    accumulation: int = 1,
    frozen_passes: int = 1,
) -> Plan:
    """Add up a run.

    Args:
        model: the backbone.
        num_globals, num_locals: crops per sample.
        global_window, local_window: their voxels (z, y, x).
        head_uses: the losses with prototypes.
        masked_share: mean masked patches over all patches of the global crops.
        global_batch: samples per optimizer step.
        accumulation: micro-batches of a step; Sinkhorn balances the rows of one.
        frozen_passes: passes over the global crops without gradient: the teacher's, and its
            snapshot's if there is one.
    Raises:
        UserError: a window is no multiple of the patch.
    """
    views = [_view("global", num_globals, global_window, model)]
    if num_locals:
        views.append(_view("local", num_locals, local_window, model))
    # a view's share of the blocks' work that stochastic depth leaves to the student
    kept = 1 - model.drop_path
    counts = _backbone_parameters(model)
    parts = []
    for name in (
        "patch embedding",
        "tokens",
        "positions",
        "attention",
        "feed-forward",
        "norms and scales",
    ):
        forward = [view.crops * _crop_flops(name, view, model) for view in views]
        share = kept if name in ("attention", "feed-forward") else 1.0
        parts.append(PartCost(name, counts[name], share * sum(forward), frozen_passes * forward[0]))
    masked = masked_share * num_globals * math.prod(views[0].grid)
    warnings = []
    for use in head_uses:
        student_rows, teacher_rows = (
            (num_globals + num_locals, num_globals) if use.name == "dino" else (masked, masked)
        )
        parts += _head_parts(use, model.dim, student_rows, teacher_rows)
        rows = round(teacher_rows * global_batch / accumulation)
        warning = capacity_warning(use.name, use.config.num_prototypes, rows)
        warnings += [warning] if use.sinkhorn and warning else []
    return Plan(tuple(views), tuple(parts), global_batch, tuple(warnings))


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
    way_out = f"set losses.{loss}.targets.kind=centring"
    if limit >= 2:
        fewer = 2 ** int(math.log2(limit))
        way_out = (
            f"set losses.{loss}.head.num_prototypes={fewer} or less, more rows at once, or "
            f"{way_out[4:]}"
        )
    floor = math.log(num_prototypes / max(rows, 1))
    return (
        f"losses.{loss}: {num_prototypes} prototypes for {rows} rows at once: Sinkhorn targets "
        "keep at least about "
        f"{floor:.1f} of ln K = {math.log(num_prototypes):.1f} nats, so hardly anything is "
        f"learned; {way_out}"
    )


def _view(name: str, crops: int, window: Window, model: vit.Config) -> ViewCost:
    if any(size % patch for size, patch in zip(window, model.patch, strict=True)):
        sizes = ["x".join(map(str, size)) for size in (window, model.patch)]
        raise UserError(
            f"views.{name}_window {sizes[0]} is no multiple of model.patch {sizes[1]}; change one "
            "of them"
        )
    z, y, x = (size // patch for size, patch in zip(window, model.patch, strict=True))
    return ViewCost(name, crops, window, (z, y, x), 1 + model.registers + z * y * x)


def _backbone_parameters(model: vit.Config) -> dict[str, int]:
    """Parameters by part, counted on a model without values."""
    with torch.device("meta"):
        counts = parameter_count(vit.build(model))
    blocks = [f"blocks.{i}" for i in range(model.depth)]
    by_part = {
        "patch embedding": counts["patch_embed"],
        "tokens": counts["cls_token"] + counts.get("register_tokens", 0) + counts["mask_token"],
        "positions": counts.get("pos_embed", 0),
        "attention": sum(counts[f"{block}.attn"] for block in blocks),
        "feed-forward": sum(counts[f"{block}.mlp"] for block in blocks),
    }
    return by_part | {"norms and scales": counts[""] - sum(by_part.values())}


def _crop_flops(part: str, view: ViewCost, model: vit.Config) -> float:
    """Forward FLOPs of one part of the backbone for one crop."""
    dim, hidden = model.dim, int(model.dim * model.mlp_ratio)
    if part == "patch embedding":
        return 2.0 * math.prod(view.window) * model.in_chans * dim
    if part == "attention":  # qkv and output projection; scores and mixture
        return model.depth * view.tokens * (8.0 * dim * dim + 4.0 * view.tokens * dim)
    if part == "feed-forward":
        width = 3 * swiglu_hidden(hidden) if model.ffn == "swiglu" else 2 * hidden
        return model.depth * view.tokens * 2.0 * dim * width
    return 0.0


def _head_parts(use: HeadUse, dim: int, student_rows: float, teacher_rows: float) -> list[PartCost]:
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
            student_rows * cost,
            teacher_rows * cost,
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
