"""One step of the method: parts sum to the total, accumulation equals one batch, gradients go where
they should.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tapct.config.plugins import Plugin
from tapct.engine import optim
from tapct.losses import dino, ibot, koleo
from tapct.models import vit
from tapct.nn import heads, rope
from tapct.nn.layers import DropKey
from tapct.nn.prototypes import TargetConfig
from tapct.ssl import step as ssl_step
from tapct.ssl.schedules import StepValues
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Masks, Views

HEAD = heads.Config(num_prototypes=12, hidden=16, bottleneck=8)
GRID = (2, 2, 2)


def make_pair(
    targets: str = "centring", with_koleo: bool = True, drop_path: float = 0.0
) -> StudentTeacher:
    model = vit.Config(
        window=(4, 16, 16),
        patch=(2, 8, 8),
        dim=16,
        depth=2,
        heads=2,
        registers=2,
        drop_path=drop_path,
    )
    losses = [
        Plugin("dino", dino.Config(head=HEAD, targets=TargetConfig(kind=targets))),
        Plugin("ibot", ibot.Config(head=HEAD, targets=TargetConfig(kind=targets))),
    ] + ([Plugin("koleo", koleo.Config())] if with_koleo else [])
    pair = StudentTeacher(Plugin("vit", model), losses, seed=3).double().train()
    with torch.no_grad():  # a teacher of its own, so that targets differ from the student's answers
        draw = torch.Generator().manual_seed(1)
        for parameter in pair.teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return pair


def make_views(samples: range, num_locals: int = 2) -> tuple[Views, Masks]:
    """Views and masks of these samples; a sample always has the same, in whatever batch."""
    crops, locals_, masked = [], [], []
    for sample in samples:
        draw = torch.Generator().manual_seed(100 + sample)
        crops.append(torch.randn(2, 4, 16, 16, generator=draw, dtype=torch.float64))
        locals_.append(torch.randn(num_locals, 2, 8, 8, generator=draw, dtype=torch.float64))
        masked.append(torch.rand(2, 8, generator=draw) < 0.4)
    masked_VBN = torch.stack(masked, dim=1)
    weights = masked_VBN / masked_VBN.sum(-1, keepdim=True).clamp(min=1)
    flat = masked_VBN.flatten()
    masks = Masks(masked_VBN, flat.nonzero().squeeze(1), weights.flatten()[flat].double())
    ones = torch.ones_like(masked_VBN)
    mm = (torch.ones(2, len(crops), 3), torch.ones(num_locals, len(crops), 3))
    views = Views(torch.stack(crops, dim=1), torch.stack(locals_, dim=1), ones, *mm)
    return views, masks


def gradients(pair: StudentTeacher, parts: list[range]) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for part in parts:
        output = ssl_step.forward(pair, *make_views(part), 0.05, None)
        (output.total / len(parts)).backward()
        total += float(output.total.detach()) / len(parts)
    return total, {
        name: p.grad for name, p in pair.student.named_parameters() if p.grad is not None
    }


def test_the_terms_sum_to_what_is_optimised() -> None:
    pair = make_pair()
    output = ssl_step.forward(pair, *make_views(range(3)), 0.05, None)
    terms = [term for result in output.results for term in result.terms]
    assert [term.name for term in terms] == ["dino_global", "dino_local", "ibot", "koleo"]
    assert float(output.total.detach()) == pytest.approx(
        sum(float(term.value.detach()) for term in terms), rel=1e-12
    )


def test_accumulating_three_micro_batches_equals_one_batch_to_1e9() -> None:
    whole, grads_whole = gradients(make_pair(with_koleo=False), [range(6)])
    parts, grads_parts = gradients(
        make_pair(with_koleo=False), [range(0, 2), range(2, 4), range(4, 6)]
    )
    assert parts == pytest.approx(whole, rel=1e-12)
    assert grads_whole.keys() == grads_parts.keys()
    for name, grad in grads_whole.items():
        assert float((grad - grads_parts[name]).abs().max()) <= 1e-9 * max(
            float(grad.abs().max()), 1e-3
        ), name


def test_the_centre_of_an_accumulated_step_equals_that_of_one_batch() -> None:
    centres = []
    for parts in ([range(6)], [range(0, 3), range(3, 6)]):
        pair = make_pair()
        gradients(pair, parts)
        for loss in pair.losses.values():
            loss.finish_step(torch.tensor(True))
        centres.append([pair.losses[name].targets.centre_K.clone() for name in ("dino", "ibot")])
    for one, other in zip(*centres, strict=True):
        assert bool((one != 0).any()) and torch.allclose(one, other, atol=1e-12)


def test_sinkhorn_and_koleo_act_within_a_micro_batch_as_documented() -> None:
    for options in (
        {"targets": "sinkhorn", "with_koleo": False},
        {"targets": "centring", "with_koleo": True},
    ):
        whole, _ = gradients(make_pair(**options), [range(6)])
        parts, _ = gradients(make_pair(**options), [range(0, 3), range(3, 6)])
        assert abs(whole - parts) > 1e-9, options


def test_no_gradient_reaches_the_teacher_and_every_student_parameter_has_one() -> None:
    pair = make_pair()
    _, grads = gradients(pair, [range(3)])
    assert all(p.grad is None for p in pair.teacher.parameters())
    missing = [name for name, _ in pair.student.named_parameters() if name not in grads]
    assert missing == []


def test_the_teacher_sees_no_mask_and_no_drop_path() -> None:
    pair = make_pair(drop_path=0.5)
    views, masks = make_views(range(3))
    output = ssl_step.forward(pair, views, masks, 0.05, DropKey(0, 0))
    with torch.no_grad():
        alone = pair.teacher.backbone([views.global_VBZYX.flatten(0, 1)])[0]
    assert torch.equal(output.tokens.teacher_global.patches_BND, alone.patches_BND)
    other = ssl_step.forward(pair, views, masks, 0.05, DropKey(0, 1))
    assert not torch.equal(output.tokens.student_global.cls_BD, other.tokens.student_global.cls_BD)


def test_teacher_and_student_receive_the_mm_of_their_own_crops() -> None:
    model = vit.Config(
        window=(4, 16, 16), patch=(2, 8, 8), dim=16, depth=2, heads=2, layer_scale=1.0,
        drop_path=0.0,
        positions="rope", rope=rope.Config(coordinates="mm"),
    )  # fmt: skip
    pair = (
        StudentTeacher(Plugin("vit", model), [Plugin("dino", dino.Config(head=HEAD))], seed=3)
        .double()
        .train()
    )
    views, masks = make_views(range(2))
    mm_global, mm_local = (
        torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(2)
    )
    moved = replace(views, global_mm_VB3=mm_global, local_mm_VB3=mm_local)
    tokens = ssl_step.forward(pair, moved, masks, 0.05, None).tokens
    assert tokens.student_local is not None
    for view in range(2):
        for sample in range(2):
            row = 2 * view + sample  # crop-major
            one, local = (
                crops[view, sample][None] for crops in (views.global_VBZYX, views.local_VBZYX)
            )
            teacher = pair.teacher.backbone([one], spacing_mm=[mm_global[view, sample][None]])[0]
            student = pair.student.backbone([local], spacing_mm=[mm_local[view, sample][None]])[0]
            torch.testing.assert_close(tokens.teacher_global.cls_BD[row], teacher.cls_BD[0])
            torch.testing.assert_close(tokens.student_local.cls_BD[row], student.cls_BD[0])


def test_a_student_of_its_own_learns_to_follow_a_fixed_teacher() -> None:
    pair = make_pair().float()
    updater = optim.Updater(pair, optim.Config())
    losses = []
    for _ in range(40):
        views, masks = make_views(range(4))
        views = replace(
            views, global_VBZYX=views.global_VBZYX.float(), local_VBZYX=views.local_VBZYX.float()
        )
        masks = Masks(masks.masked_VBN, masks.index_M, masks.weight_M.float())
        output = ssl_step.forward(pair, views, masks, 0.05, None)
        output.total.backward()
        updater.step(StepValues(3e-3, 0.0, 1.0, 0.05, False), output.total)
        losses.append(float(output.total.detach()))
    assert losses[-1] < losses[0] - 0.5
