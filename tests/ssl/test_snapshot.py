"""The frozen copy of an earlier teacher: when it is taken, what it holds, and who looks at it."""

from __future__ import annotations

import pytest
import torch
from test_step import HEAD, make_pair, make_views

from tapct.base.exits import UserError
from tapct.config.plugins import Plugin
from tapct.losses import dino, gram
from tapct.models import vit
from tapct.nn.contracts import SnapshotTimes
from tapct.ssl import step as ssl_step
from tapct.ssl.student_teacher import StudentTeacher, snapshot_times

YES, NO = torch.tensor(True), torch.tensor(False)


def gram_pair(**options: object) -> StudentTeacher:
    """A pair with a snapshot, whose student, teacher and snapshot all differ."""
    model = vit.Config(
        window=(4, 16, 16), patch=(2, 8, 8), dim=16, depth=2, heads=2, registers=2, drop_path=0.0
    )
    losses = [Plugin("dino", dino.Config(head=HEAD)), Plugin("gram", gram.Config(**options))]  # type: ignore[arg-type]
    pair = StudentTeacher(Plugin("vit", model), losses, seed=3).double().train()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in pair.frozen():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=draw, dtype=parameter.dtype
                )
    return pair


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("start", "every", "begin", "taken", "wanted"),
    [
        (3, 4, 0, -1, [3, 7, 11]),
        (0, 5, 0, -1, [0, 5, 10]),
        (3, 0, 0, -1, [3]),
        (0, 0, 0, -1, [0]),
        (50, 1, 0, -1, []),
        (3, 4, 5, 3, [7, 11]),  # resumed
        (3, 0, 5, -1, [5]),  # from a checkpoint without one
        (3, 4, 5, -1, [5, 7, 11]),
        (8, 0, 5, 3, [8]),  # from a checkpoint of an earlier start
    ],
)
def test_it_is_taken_at_the_start_and_at_equal_distances_and_made_up_for(
    start: int, every: int, begin: int, taken: int, wanted: list[int]
) -> None:
    times, found = SnapshotTimes(start, every), []
    for step in range(begin, 12):
        if times.due(step, taken):
            found.append(step)
            taken = step
    assert found == wanted


def test_a_refresh_takes_the_teacher_of_that_step_and_a_refused_step_takes_nothing() -> None:
    pair = gram_pair(start=2, refresh_every=3)
    assert pair.snapshot is not None
    first = state(pair.snapshot.backbone)
    pair.refresh_snapshot(1, YES)
    assert equal(state(pair.snapshot.backbone), first) and int(pair.snapshot_taken) == -1
    pair.refresh_snapshot(2, NO)
    assert equal(state(pair.snapshot.backbone), first)
    pair.refresh_snapshot(5, YES)
    teacher = state(pair.teacher.backbone)
    assert equal(state(pair.snapshot.backbone), teacher) and int(pair.snapshot_taken) == 5
    pair.update_teacher(0.5, YES)
    assert not equal(state(pair.teacher.backbone), teacher)
    pair.refresh_snapshot(6, YES)
    assert equal(state(pair.snapshot.backbone), teacher), "it does not follow the teacher"


def test_the_term_compares_with_the_snapshot_and_not_with_the_teacher() -> None:
    pair = gram_pair(start=4, weight=1.0)
    assert pair.snapshot is not None
    views, masks = make_views(range(3))
    assert not pair.uses_snapshot(3) and pair.uses_snapshot(4)
    output = ssl_step.forward(pair, views, masks, 0.05, None, use_snapshot=True)
    crops = views.global_VBZYX.flatten(0, 1)
    grams = []
    for network, masked in ((pair.student, masks.masked_VBN.flatten(0, 1)), (pair.snapshot, None)):
        unit = torch.nn.functional.normalize(
            network.backbone([crops], [masked])[0].patches_BND, dim=-1
        )
        grams.append(unit @ unit.mT)
    value = output.results[1].terms[0].value
    assert float(value.detach()) == pytest.approx(
        float((grams[0] - grams[1]).square().mean()), rel=1e-9
    )
    output.total.backward()
    assert all(
        parameter.grad is None for network in pair.frozen() for parameter in network.parameters()
    )


def test_accumulating_micro_batches_equals_one_batch() -> None:
    totals = []
    for parts in ([range(4)], [range(0, 2), range(2, 4)]):
        pair = gram_pair(tokens="masked")
        for part in parts:
            output = ssl_step.forward(pair, *make_views(part), 0.05, None, use_snapshot=True)
            (output.results[1].terms[0].value / len(parts)).backward()
        totals.append(
            {name: p.grad for name, p in pair.student.named_parameters() if p.grad is not None}
        )
    assert totals[0].keys() == totals[1].keys() and len(totals[0]) > 20
    assert (
        max(float((grad - totals[1][name]).abs().max()) for name, grad in totals[0].items()) < 1e-12
    )


def test_it_is_frozen_and_only_there_where_a_loss_wants_it() -> None:
    pair = gram_pair()
    assert pair.snapshot is not None and not pair.snapshot.heads
    pair.train()
    assert not pair.snapshot.training and not any(
        parameter.requires_grad for parameter in pair.snapshot.parameters()
    )
    other = make_pair()
    assert other.snapshot is None and not [
        name for name in other.state_dict() if "snapshot" in name
    ]
    other.refresh_snapshot(0, YES)
    assert not other.uses_snapshot(0)


def test_the_weight_may_change_on_the_way_and_the_timetable_may_not() -> None:
    pair = gram_pair(start=4, refresh_every=2)

    def asked(**options: object) -> list[Plugin]:
        return [Plugin("dino", dino.Config(head=HEAD)), Plugin("gram", gram.Config(**options))]  # type: ignore[arg-type]

    pair.change_losses(asked(start=4, refresh_every=2, weight=0.5))
    assert pair.losses_by_name["gram"].config.weight == 0.5 and pair.snapshot is not None
    for changed in ({"start": 6, "refresh_every": 2}, {"start": 4, "refresh_every": 3}):
        with pytest.raises(UserError, match=r"losses.gram: the teacher's copy has one timetable"):
            pair.change_losses(asked(**changed))
    assert pair.losses_by_name["gram"].config.weight == 0.5


def test_two_losses_with_snapshots_of_different_steps_are_refused() -> None:
    one, two = (gram.build(gram.Config(start=start)) for start in (1, 2))
    assert snapshot_times({"gram": one, "mylab.gram": one}) == SnapshotTimes(1, 10_000)
    with pytest.raises(
        UserError, match=r"losses.gram and losses.mylab.gram want snapshots .* at different steps"
    ):
        snapshot_times({"gram": one, "mylab.gram": two})
