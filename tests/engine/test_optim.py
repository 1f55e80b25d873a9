"""Groups, clipping, AdamW, the teacher's move and the latch that keeps a bad number from the
weights.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from tapct.config.plugins import Plugin
from tapct.engine.optim import Config, Updater, clip, group_key, square_norms
from tapct.losses import dino, ibot, koleo
from tapct.models import vit
from tapct.nn import heads
from tapct.ssl.schedules import StepValues
from tapct.ssl.student_teacher import StudentTeacher

HEAD = heads.Config(num_prototypes=12, hidden=16, bottleneck=8)
MODEL = Plugin(
    "vit", vit.Config(window=(4, 16, 16), patch=(2, 8, 8), dim=16, depth=3, heads=2, registers=2)
)
DINO, KOLEO = Plugin("dino", dino.Config(head=HEAD)), Plugin("koleo", koleo.Config())
VALUES = StepValues(lr=0.01, wd=0.2, momentum=0.9, teacher_temp=0.04, last_layer_frozen=False)


def make_pair(last_layer: str = "weight_norm") -> StudentTeacher:
    head = dataclasses.replace(HEAD, last_layer=last_layer)
    losses = (Plugin("dino", dino.Config(head=head)), Plugin("ibot", ibot.Config(head=head)), KOLEO)
    return StudentTeacher(MODEL, losses, seed=3)


def set_gradients(pair: StudentTeacher, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in pair.student.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def test_student_and_teacher_start_equal_with_heads_and_only_the_student_learns() -> None:
    pair = make_pair()
    for (name, student), (_, teacher) in zip(
        pair.student.named_parameters(), pair.teacher.named_parameters(), strict=True
    ):
        assert torch.equal(student, teacher), name
        assert student.requires_grad and not teacher.requires_grad
    assert set(pair.student.heads) == {"dino", "ibot"}
    pair.train()
    assert pair.student.training and not pair.teacher.training


@pytest.mark.parametrize(
    ("name", "factor", "decays", "last"),
    [
        ("backbone.cls_token", 0.9**4, True, False),
        ("backbone.mask_token", 0.9**4, True, False),
        ("backbone.register_tokens", 0.9**4, True, False),
        ("backbone.pos_embed", 0.9**4, True, False),
        ("backbone.patch_embed.proj.weight", 0.2 * 0.9**4, True, False),
        ("backbone.patch_embed.proj.bias", 0.2 * 0.9**4, False, False),
        ("backbone.blocks.0.attn.qkv.weight", 0.9**3, True, False),
        ("backbone.blocks.2.attn.qkv.bias", 0.9, False, False),
        ("backbone.blocks.2.ls1.gamma", 0.9, False, False),
        ("backbone.blocks.1.norm2.weight", 0.9**2, False, False),
        ("backbone.norm.weight", 1.0, False, False),
        ("heads.dino.mlp.0.weight", 1.0, True, False),
        ("heads.dino.mlp.0.bias", 1.0, False, False),
        ("heads.ibot.last_layer.weight_g", 1.0, True, True),
        ("heads.ibot.last_layer.weight_v", 1.0, True, True),
        ("heads.ibot.last_layer.weight", 1.0, True, True),
    ],
)
def test_layer_decay_and_weight_decay_follow_dinov2(
    name: str, factor: float, decays: bool, last: bool
) -> None:
    pair = make_pair("plain" if name.endswith("last_layer.weight") else "weight_norm")
    assert name in dict(pair.student.named_parameters())
    key = group_key(name, pair.student.backbone, Config(layer_decay=0.9, patch_embed_lr_factor=0.2))
    assert (
        key.lr_factor == pytest.approx(factor)
        and key.decays == decays
        and key.is_last_layer == last
    )


def test_one_step_equals_adamw_written_out_and_moves_the_teacher_after_it() -> None:
    pair = make_pair()
    updater = Updater(pair, Config(clip_norm=1e9))
    before = {name: p.detach().clone().double() for name, p in pair.student.named_parameters()}
    set_gradients(pair)
    grads = {name: p.grad.clone().double() for name, p in pair.student.named_parameters()}
    updater.step(VALUES, torch.tensor(1.0))
    teacher = dict(pair.teacher.named_parameters())
    for name, parameter in pair.student.named_parameters():
        key = group_key(name, pair.student.backbone, updater.config)
        lr, decay = VALUES.lr * key.lr_factor, VALUES.wd * key.decays
        old, grad = before[name], grads[name]
        # the first step of Adam: both moments are unbiased to g and g^2
        new = old * (1 - lr * decay) - lr * grad / (grad.abs() + 1e-8)
        assert torch.allclose(parameter.double(), new, atol=1e-6), name
        assert torch.allclose(teacher[name].double(), 0.9 * old + 0.1 * new, atol=1e-6), name


@pytest.mark.parametrize("last_layer", ["weight_norm", "plain"])
def test_the_last_layer_does_not_move_while_it_is_frozen(last_layer: str) -> None:
    pair = make_pair(last_layer)
    updater = Updater(pair, Config())
    before = copy.deepcopy(pair.student.state_dict())
    set_gradients(pair)
    updater.step(StepValues(0.01, 0.2, 0.9, 0.04, last_layer_frozen=True), torch.tensor(1.0))
    moved = {
        name
        for name, value in pair.student.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert not any("last_layer" in name for name in moved)
    assert any(name.startswith("heads.dino.mlp") for name in moved)
    set_gradients(pair)
    updater.step(VALUES, torch.tensor(1.0))
    after = pair.student.state_dict()
    assert not any(
        torch.equal(after[name], value) for name, value in before.items() if "last_layer" in name
    )


def test_clipping_acts_on_each_submodule_by_itself() -> None:
    pair = make_pair()
    set_gradients(pair)
    for parameter in pair.student.heads["ibot"].parameters():
        parameter.grad *= 1e-4
    expected = {
        name: math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in module.parameters()))
        for name, module in pair.student.submodules()
    }
    untouched = [p.grad.clone() for p in pair.student.heads["ibot"].parameters()]
    norms = {name: square.sqrt() for name, square in square_norms(pair.student).items()}
    clip(pair.student, norms, 3.0)
    assert {name: float(norm) for name, norm in norms.items()} == pytest.approx(expected, rel=1e-5)
    assert set(norms) == {"backbone", "dino", "ibot"}
    for name, module in pair.student.submodules():
        after = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in module.parameters()))
        assert after == pytest.approx(min(expected[name], 3.0), rel=1e-4)
    small = pair.student.heads["ibot"].parameters()
    assert all(torch.equal(p.grad, old) for p, old in zip(small, untouched, strict=True))


@pytest.mark.parametrize("where", ["gradient", "inf gradient", "loss"])
def test_a_number_that_is_not_finite_moves_nothing_now_or_later(where: str) -> None:
    pair = make_pair()
    updater = Updater(pair, Config())
    set_gradients(pair)
    updater.step(VALUES, torch.tensor(1.0))
    for loss in pair.losses.values():
        if hasattr(loss, "targets"):
            loss.targets.scores(torch.randn(1, 4, 12), torch.eye(12), 0.04)
    before = copy.deepcopy(pair.state_dict())
    moments = copy.deepcopy(updater.optimizer.state_dict()["state"])
    set_gradients(pair, 1)
    bad = {"gradient": math.nan, "inf gradient": math.inf, "loss": 0.0}[where]
    if bad:
        pair.student.backbone.blocks[1].attn.qkv.weight.grad[0, 0] = bad
    report = updater.step(VALUES, torch.tensor(math.nan if where == "loss" else 1.0))
    assert not bool(report.applied)
    set_gradients(pair, 2)
    assert not bool(updater.step(VALUES, torch.tensor(1.0)).applied), (
        "the latch holds until a person looks"
    )
    after = pair.state_dict()
    moved = [n for n in before if "pending" not in n and not torch.equal(before[n], after[n])]
    assert moved == []
    for index, state in updater.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, moments[index][name]), (index, name)


def test_a_shared_head_is_one_head_and_unequal_sections_are_refused() -> None:
    shared = (DINO, Plugin("ibot", ibot.Config(head=HEAD, share_dino_head=True)))
    pair = StudentTeacher(MODEL, shared, seed=0)
    assert set(pair.student.heads) == {"dino"}
    assert pair.heads_of(pair.losses["ibot"])[0] is pair.student.heads["dino"]
    other = (DINO, Plugin("ibot", ibot.Config(share_dino_head=True)))
    with pytest.raises(ValueError, match="head sections differ"):
        StudentTeacher(MODEL, other, seed=0)
    with pytest.raises(ValueError, match="switched off"):
        StudentTeacher(MODEL, shared[1:], seed=0)
    with pytest.raises(ValueError, match="every term is switched off"):
        StudentTeacher(MODEL, (), seed=0)
