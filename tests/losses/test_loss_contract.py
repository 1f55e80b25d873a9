"""What every loss promises: those of the losses folder and a user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import plugin_cases
import pytest
import torch
from torch import Tensor, nn

from tapct.config import plugins
from tapct.nn import heads
from tapct.nn.contracts import Loss
from tapct.types import LossResult, Masks, Tokens, TokenSets

LOSSES = plugin_cases.cases("losses", "losses")
GLOBALS, LOCALS, B, N, DIM = 2, 2, 4, 6, 8
HEAD = heads.Config(num_prototypes=12, hidden=10, bottleneck=6)


@pytest.fixture(scope="module", autouse=True)
def user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with plugin_cases.user_modules(tmp_path_factory.mktemp("losses")):
        yield


def small(config: Any) -> Any:
    """A config with a small head, where it has one."""
    return dataclasses.replace(config, head=HEAD) if hasattr(config, "head") else config


def build(name: str, config: Any) -> Loss:
    loss: Loss = plugins.load("losses", name).build(config)
    return loss


def token_sets(seed: int, batch: int = B) -> TokenSets:
    """Tokens of a micro-batch; each global crop has two masked patches, one of them all padding."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(crops: int, learns: bool) -> Tokens:
        parts = [torch.randn(crops, *shape, generator=draw) for shape in ((DIM,), (N, DIM))]
        cls_BD, patches_BND = (part.requires_grad_(learns) for part in parts)
        return Tokens(cls_BD, torch.zeros(crops, 0, DIM), patches_BND, (1, 2, 3))

    masked = torch.zeros(GLOBALS, batch, N, dtype=torch.bool)
    masked[..., 1:3] = True
    index_M = masked.flatten().nonzero()[:, 0]
    weight_M = torch.where(torch.arange(len(index_M)) % 2 == 0, 1.0, 0.0)
    crops = GLOBALS * batch
    return TokenSets(
        student_global=tokens(crops, True),
        student_local=tokens(LOCALS * batch, True),
        teacher_global=tokens(crops, False),
        masks=Masks(masked, index_M, weight_M),
        num_globals=GLOBALS,
        num_locals=LOCALS,
        teacher_temp=0.05,
        snapshot_global=tokens(crops, False),
    )


class Counted(nn.Module):
    """A head that counts the rows which go through it."""

    def __init__(self, config: heads.Config, seed: int) -> None:
        super().__init__()
        self.head = heads.PrototypeHead(DIM, config)
        self.head.init_weights(seed)
        self.rows = 0

    def forward(self, tokens: Tensor, *rest: Any) -> Any:
        self.rows += tokens.shape[0]
        return self.head(tokens, *rest)


def heads_for(loss: Loss) -> tuple[Counted | None, Counted | None]:
    if not loss.head_of:
        return None, None
    return Counted(loss.config.head, 1), Counted(loss.config.head, 2)


def students(sets: TokenSets) -> list[Tensor]:
    assert sets.student_local is not None
    both = (sets.student_global, sets.student_local)
    return [part for tokens in both for part in (tokens.cls_BD, tokens.patches_BND)]


def total(result: LossResult) -> Tensor:
    return torch.stack([term.value for term in result.terms]).sum()


def readings(name: str, config: Any) -> list[Tensor]:
    """All that a loss gives in two steps, and what it answers."""
    loss = build(name, config)
    student, teacher = heads_for(loss)
    numbers: list[Tensor] = []
    for step in range(2):
        sets = token_sets(step)
        result = loss(sets, student, teacher)
        gradients = torch.autograd.grad(total(result), students(sets), allow_unused=True)
        numbers += [term.value.detach() for term in result.terms]
        numbers += [each.detach() for each in gradients if each is not None]
        loss.finish_step(torch.tensor(True))
    answers = [float(loss.min_samples(world)) for world in (1, 2)]
    times = loss.snapshot
    answers += [float(times.start), float(times.every)] if times is not None else []
    answers += [float(len(loss.head_of)), float(loss.head_of == name)]
    if student is not None:
        answers += [float(sum(p.numel() for p in student.parameters()))]
    return [*numbers, torch.tensor(answers)]


def differ(one: list[Tensor], two: list[Tensor]) -> bool:
    if [x.shape for x in one] != [x.shape for x in two]:
        return True
    return any(not torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_gives_finite_terms_and_gradients_from_its_defaults(name: str) -> None:
    loss = build(name, plugin_cases.default("losses", name))
    assert isinstance(loss, Loss)
    student, teacher = heads_for(loss)
    sets = token_sets(0)
    result = loss(sets, student, teacher)
    names = [term.name for term in result.terms]
    assert names and len(set(names)) == len(names)
    for term in result.terms:
        assert term.value.shape == () and term.value.dtype == torch.float32
        assert term.value.isfinite()
    total(result).backward()
    gradients = [x.grad for x in students(sets) if x.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
    if student is not None and teacher is not None:
        learned = [parameter.grad for parameter in student.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in learned)
        assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_tokens_give_the_same_terms_whatever_torch_draws(name: str) -> None:
    config = small(plugin_cases.default("losses", name))
    torch.manual_seed(1)
    one = readings(name, config)
    torch.manual_seed(2)
    assert not differ(one, readings(name, config))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_that_was_refused_leaves_the_state_as_it_was(name: str) -> None:
    loss = build(name, small(plugin_cases.default("losses", name)))
    student, teacher = heads_for(loss)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    loss(token_sets(0), student, teacher)
    loss.finish_step(torch.tensor(False))
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    buffers = {id(buffer) for buffer in loss.buffers()}
    assert all(id(tensor) in buffers for tensor in loss.pending())


@pytest.mark.parametrize("name", LOSSES)
def test_the_fewest_samples_that_a_loss_accepts_are_enough(name: str) -> None:
    loss = build(name, small(plugin_cases.default("losses", name)))
    least = loss.min_samples(1)
    assert isinstance(least, int) and least >= 1
    assert least == 1 or loss.min_samples_reason
    assert total(loss(token_sets(0, least), *heads_for(loss))).isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_the_rows_that_a_loss_names_are_those_that_go_through_its_head(name: str) -> None:
    loss = build(name, small(plugin_cases.default("losses", name)))
    student, teacher = heads_for(loss)
    sets = token_sets(0)
    loss(sets, student, teacher)
    rows = loss.prototype_rows(GLOBALS, LOCALS, len(sets.masks.index_M) / B)
    if student is None or teacher is None:
        assert rows is None
    else:
        assert rows is not None
        assert (student.rows, teacher.rows) == (rows.student * B, rows.teacher * B)


def fields() -> list[tuple[str, str]]:
    # a user's example is no module yet when tests are collected: its fields are one case
    tapcts = [name for name in LOSSES if "." not in name]
    pairs = []
    for name in tapcts:
        for path in plugin_cases.leaves(small(plugin_cases.default("losses", name))):
            pairs.append((name, ".".join(path)))
    return pairs + [(name, "") for name in LOSSES if "." in name]


@pytest.mark.parametrize(("name", "field"), fields())
def test_every_field_changes_something(name: str, field: str) -> None:
    config = small(plugin_cases.default("losses", name))
    paths = [tuple(field.split("."))] if field else plugin_cases.leaves(config)
    for path in paths:
        assert any(
            differ(readings(name, base), readings(name, other))
            for base in plugin_cases.bases(config)
            for other in plugin_cases.others(base, path)
        ), path
