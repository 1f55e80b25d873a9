"""One forward pass of the whole method: views and masks in, loss terms out.

teacher(globals)  -> targets           no gradient, unmasked
snapshot(globals)                      the same, where a loss wants an earlier teacher
student(globals with masks, locals)    one packed pass
total = sum of the terms of every loss
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tapct.nn.contracts import encode
from tapct.nn.layers import DropKey
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import LossResult, Masks, TokenSets, Views


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives.

    Args:
        total: scalar, the sum of all terms: what is optimised.
        results: one per loss, in the order of the config.
        tokens: tokens of student and teacher, for the health numbers.
    """

    total: Tensor
    results: tuple[LossResult, ...]
    tokens: TokenSets


def forward(
    pair: StudentTeacher,
    views: Views,
    masks: Masks,
    teacher_temp: float,
    key: DropKey | None,
    use_snapshot: bool = False,
) -> StepOutput:
    """Run teacher and student on one micro-batch and sum the loss terms.

    Args:
        pair: student, teacher and losses.
        views: normalised crops, crop-major.
        masks: block masks of the global crops.
        teacher_temp: temperature of the teacher's targets at this step.
        key: key of the student's draws, such as stochastic depth; None for none.
        use_snapshot: whether to run the snapshot too, from `StudentTeacher.uses_snapshot`.
    Returns:
        The total with its parts.
    """
    num_globals, num_locals = views.global_VBZYX.shape[0], views.local_VBZYX.shape[0]
    globals_BZYX = views.global_VBZYX.flatten(0, 1)
    crops: list[Tensor] = [globals_BZYX]
    crop_masks: list[Tensor | None] = [masks.masked_VBN.flatten(0, 1)]
    spacing_mm = [views.global_mm_VB3.flatten(0, 1)]
    if num_locals:
        crops, crop_masks = [*crops, views.local_VBZYX.flatten(0, 1)], [*crop_masks, None]
        spacing_mm.append(views.local_mm_VB3.flatten(0, 1))

    with torch.no_grad():
        teacher_global = encode(
            pair.teacher.backbone, [globals_BZYX], [None], None, spacing_mm[:1]
        )[0]
        snapshot_global = None
        if use_snapshot:
            assert pair.snapshot is not None
            snapshot_global = encode(
                pair.snapshot.backbone, [globals_BZYX], [None], None, spacing_mm[:1]
            )[0]
    student = encode(pair.student.backbone, crops, crop_masks, key, spacing_mm)
    sets = TokenSets(
        student_global=student[0],
        student_local=student[1] if num_locals else None,
        teacher_global=teacher_global,
        masks=masks,
        num_globals=num_globals,
        num_locals=num_locals,
        teacher_temp=teacher_temp,
        snapshot_global=snapshot_global,
    )
    results = tuple(loss(sets, *pair.heads_of(loss)) for loss in pair.terms.values())
    total = torch.stack([term.value for result in results for term in result.terms]).sum()
    # nothing reads the snapshot's tokens after the losses
    return StepOutput(total, results, replace(sets, snapshot_global=None))
