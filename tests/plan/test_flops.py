"""The plan's sums against counters that watch the model run."""

from __future__ import annotations

import dataclasses
import io
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.models import vit
from tapct.nn import heads
from tapct.nn.posembed import resize_positions
from tapct.nn.prototypes import TargetConfig
from tapct.plan import flops, tables

SMALL = vit.Config(
    window=(8, 32, 48), patch=(4, 8, 8), dim=32, depth=2, heads=2, registers=3, drop_path=0.0
)
HEAD = heads.Config(num_prototypes=64, hidden=40, bottleneck=16)
CROPS: dict[str, Any] = {
    "num_globals": 2,
    "global_window": (8, 32, 48),
    "num_locals": 3,
    "local_window": (8, 16, 16),
}
MASKED = 0.25 * 2 * 48  # a quarter of the patches of both global crops


def use_of(name: str, head: heads.Config = HEAD, kind: str = "centring") -> flops.HeadUse:
    """What a loss reports of its own head, for the crops above."""
    module = plugins.load("losses", name)
    loss = module.build(module.Config(head=head, targets=TargetConfig(kind=kind)))
    return flops.HeadUse(name, head, loss.prototype_rows(2, 3, MASKED))


USES = (use_of("dino"), use_of("ibot"))


def small_plan(model: vit.Config = SMALL, **changes: Any) -> flops.Costs:
    settings = {**CROPS, "head_uses": USES, "global_batch": 4}
    with torch.device("meta"):
        return flops.count_costs(vit.build(model), **{**settings, **changes})


def part(costs: flops.Costs, name: str) -> flops.PartCost:
    return next(each for each in costs.parts if each.name == name)


def attention_flops(q: torch.Size, *others: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scores and mixture of (B, H, N, C)."""
    return 4 * q[0] * q[1] * q[2] ** 2 * q[3]


def attention_backward_flops(
    gradient: torch.Size, *others: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Twice that: scores that are made again are no work."""
    return 2 * attention_flops(gradient)


FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_backbone_flops_are_what_torch_counts(ffn: str) -> None:
    config = dataclasses.replace(SMALL, ffn=ffn)
    model = vit.build(config)
    costs = small_plan(config)
    globals_BZYX, locals_BZYX = torch.randn(2, 8, 32, 48), torch.randn(3, 8, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FUSED) as teacher:
        model([globals_BZYX])
    with FlopCounterMode(display=False, custom_mapping=FUSED) as student:
        tokens = model([globals_BZYX, locals_BZYX])
    pos_ND = torch.zeros(
        48, SMALL.dim, requires_grad=True
    )  # resized once a step whatever the batch: not in the plan
    with FlopCounterMode(display=False) as resize:
        resized = resize_positions(pos_ND, SMALL.grid, (2, 2, 2))
    with FlopCounterMode(display=False) as resize_backward:
        resized.sum().backward()
    with FlopCounterMode(display=False, custom_mapping=FUSED) as backward:
        torch.stack([each.patches_BND.square().sum() for each in tokens]).sum().backward()
    backbone = [each for each in costs.parts if not each.name.startswith(("dino", "ibot"))]
    assert sum(each.teacher_flops for each in backbone) == teacher.get_total_flops()
    forward = student.get_total_flops() - resize.get_total_flops()
    assert sum(each.student_flops for each in backbone) == forward
    # twice the forward pass, but for the input's gradient of the patch embedding, which nobody
    # needs
    want = 2 * forward - part(costs, "patch embedding").student_flops
    assert backward.get_total_flops() - resize_backward.get_total_flops() == want


class Linears(nn.Module):
    """The model as fvcore wants it: tensors in, tensors out."""

    def __init__(self, model: vit.VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, crop: Tensor) -> Tensor:
        return self.model([crop])[0].patches_BND


@pytest.mark.filterwarnings("ignore")
def test_linear_layers_are_what_fvcore_counts() -> None:
    """fvcore counts multiply-adds, and knows no fused attention."""
    counter = FlopCountAnalysis(Linears(vit.build(SMALL)), torch.randn(2, 8, 32, 48))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    costs = small_plan(num_locals=0)
    tokens = costs.views[0].tokens
    fused = 2 * SMALL.depth * 4 * tokens * tokens * SMALL.dim
    counted = 2 * counter.by_operator()["linear"]
    names = ("patch embedding", "attention", "feed-forward")
    assert sum(part(costs, name).teacher_flops for name in names) - fused == counted


def test_head_flops_are_what_torch_counts() -> None:
    head = heads.PrototypeHead(SMALL.dim, HEAD)
    costs = small_plan()
    for name, student_rows, teacher_rows in (("dino", 5, 2), ("ibot", MASKED, MASKED)):
        for rows, kind in ((student_rows, "student_flops"), (teacher_rows, "teacher_flops")):
            with FlopCounterMode(display=False) as counter:
                head(torch.randn(int(rows), SMALL.dim))
            assert sum(
                getattr(part(costs, f"{name} {each}"), kind) for each in ("MLP", "prototypes")
            ) == (counter.get_total_flops())


def test_a_plain_last_layer_is_one_number_a_prototype_less_and_costs_the_same() -> None:
    plain = dataclasses.replace(HEAD, last_layer="plain")
    costs = small_plan(head_uses=[dataclasses.replace(use, config=plain) for use in USES])
    assert part(costs, "dino prototypes").parameters == 64 * 16
    assert part(small_plan(), "dino prototypes").parameters == 64 * (16 + 1)
    assert costs.flops_per_sample == small_plan().flops_per_sample


def test_parameters_add_up_to_the_networks() -> None:
    costs = small_plan()
    head = sum(parameter.numel() for parameter in heads.PrototypeHead(SMALL.dim, HEAD).parameters())
    backbone = sum(parameter.numel() for parameter in vit.build(SMALL).parameters())
    assert costs.parameters == backbone + 2 * head
    shared = small_plan(head_uses=(USES[0], dataclasses.replace(USES[1], owns_head=False)))
    assert shared.parameters == backbone + head
    assert shared.flops_per_sample == costs.flops_per_sample
    assert part(costs, "positions").parameters == 32 * (1 + 48)
    assert part(costs, "tokens").parameters == 32 * (1 + 3 + 1)


def test_the_published_model_has_its_published_sizes() -> None:
    with torch.device("meta"):
        base = vit.build(vit.Config(dim=768, heads=12))
    costs = flops.count_costs(
        base,
        num_globals=2,
        global_window=(12, 224, 224),
        num_locals=8,
        local_window=(12, 96, 96),
        head_uses=(use_of("dino", heads.Config()),),
        global_batch=1024,
    )
    assert [view.grid for view in costs.views] == [(3, 28, 28), (3, 12, 12)]
    assert [view.tokens for view in costs.views] == [2357, 437]
    assert (
        costs.parameters
        - part(costs, "dino MLP").parameters
        - part(costs, "dino prototypes").parameters
        == 87_083_520
    )
    # 2 FLOPs per weight of the blocks and token, and 4 N D per token and block for attention
    forward = 2 * 2357 * (12 * (12 * 768**2 * 2 + 4 * 2357 * 768))
    blocks = part(costs, "attention").teacher_flops + part(costs, "feed-forward").teacher_flops
    assert blocks == forward
    assert costs.flops_per_step == 1024 * costs.flops_per_sample


def test_a_step_is_three_student_passes_and_one_of_the_teacher() -> None:
    costs = small_plan()
    assert costs.flops_per_sample == sum(
        3 * each.student_flops + each.teacher_flops for each in costs.parts
    )
    dropped = small_plan(dataclasses.replace(SMALL, drop_path=0.5))
    for name, factor in (("attention", 0.5), ("feed-forward", 0.5), ("patch embedding", 1.0)):
        assert part(dropped, name).student_flops == factor * part(costs, name).student_flops
        assert part(dropped, name).teacher_flops == part(costs, name).teacher_flops


def test_sinkhorn_with_too_many_prototypes_is_warned_of_and_centring_is_not() -> None:
    big = heads.Config(num_prototypes=65_536)
    sinkhorn = small_plan(head_uses=(use_of("dino", big, "sinkhorn"),), global_batch=8)
    (warning,) = sinkhorn.warnings
    assert "65536 prototypes for 16 rows at once, more than 64 per row" in warning
    assert "losses.dino.head.num_prototypes=1024" in warning and "centring" in warning
    assert f"{math.log(65536 / 16):.1f} of ln K = {math.log(65536):.1f}" in warning
    assert small_plan(head_uses=(use_of("dino", big),), global_batch=8).warnings == ()
    assert small_plan(head_uses=(use_of("dino", big, "sinkhorn"),), global_batch=512).warnings == ()


@pytest.mark.parametrize(
    ("prototypes", "rows", "warns"),
    [(1024, 16, False), (1025, 16, True), (64, 1, False), (2, 0, True)],
)
def test_the_capacity_rule_is_64_prototypes_a_row(prototypes: int, rows: int, warns: bool) -> None:
    assert (flops.capacity_warning("ibot", prototypes, rows) is not None) == warns


def test_ibot_capacity_counts_masked_patches() -> None:
    big = heads.Config(num_prototypes=8192)
    rows = 0.25 * 2 * 48 * 4
    (warning,) = small_plan(head_uses=(use_of("ibot", big, "sinkhorn"),)).warnings
    assert f"8192 prototypes for {rows:.0f} rows" in warning and "num_prototypes=4096" in warning


def test_a_window_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(
        UserError, match="views.local_window 8x16x15 is no multiple of the patch 4x8x8 along x"
    ):
        small_plan(local_window=(8, 16, 15))


def test_the_tables_show_parts_totals_and_warnings() -> None:
    out = io.StringIO()
    costs = small_plan(head_uses=(use_of("dino", heads.Config(), "sinkhorn"),))
    Console(file=out, width=160).print(tables.cost_tables(costs))
    text = out.getvalue()
    assert all(each.name in text for each in costs.parts)
    assert f"{costs.parameters:,}" in text and "Warning: losses.dino" in text and "8x32x48" in text


def test_the_command_lines_start_up_does_not_load_the_plan() -> None:
    code = (
        "import sys, tapct.cli; sys.exit('tapct.plan.flops' in sys.modules or 'fvcore' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
