"""One forward pass of the whole method: views and masks in, loss terms out.

teacher(globals)  -> targets           no gradient, unmasked
snapshot(globals)                      the same, where a loss wants an earlier teacher
student(globals with masks, locals)    one packed pass
total = sum of the terms of every loss

Crop-major: the first axis of a tensor holds all samples of view 0, then all of view 1 (V*B). Here
B stands for that axis once the views are flattened into it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tapct.nn.contracts import encode
from tapct.nn.layers import DropKey
from tapct.ssl.student_teacher import Network, StudentTeacher
from tapct.types import LossResult, Masks, Tokens, TokenSets, Views


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
    drop_key: DropKey | None,
    use_snapshot: bool = False,
) -> StepOutput:
    """Run teacher and student on one micro-batch and sum the loss terms.

    Args:
        pair: student, teacher and losses.
        views: normalised crops.
        masks: block masks of the global crops.
        teacher_temp: temperature of the teacher's targets at this step.
        drop_key: key of the student's random draws, such as stochastic depth; None: no draws.
        use_snapshot: whether to run the snapshot too, from `StudentTeacher.uses_snapshot`.
    Returns:
        The total with its parts.
    """
    num_globals, num_locals = views.global_VBZYX.shape[0], views.local_VBZYX.shape[0]
    globals_BZYX = views.global_VBZYX.flatten(0, 1)
    global_spacing_mm_B3 = views.global_mm_VB3.flatten(0, 1)
    crops: list[Tensor] = [globals_BZYX]
    crop_masks: list[Tensor | None] = [masks.masked_VBN.flatten(0, 1)]
    spacing_mm = [global_spacing_mm_B3]
    if num_locals:
        crops.append(views.local_VBZYX.flatten(0, 1))
        crop_masks.append(None)
        spacing_mm.append(views.local_mm_VB3.flatten(0, 1))

    teacher_global = encode_frozen(pair.teacher, globals_BZYX, global_spacing_mm_B3)
    snapshot_global = None
    if use_snapshot:
        assert pair.snapshot is not None
        snapshot_global = encode_frozen(pair.snapshot, globals_BZYX, global_spacing_mm_B3)
    student = encode(pair.student.backbone, crops, crop_masks, drop_key, spacing_mm)
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
    results = tuple(loss(sets, *pair.heads_of(loss)) for loss in pair.losses_by_name.values())
    total = torch.stack([term.value for result in results for term in result.terms]).sum()
    # The losses were the last to read the snapshot's tokens: without them in the output, their
    # memory is free before the backward pass.
    return StepOutput(total, results, replace(sets, snapshot_global=None))


@torch.no_grad()
def encode_frozen(network: Network, globals_BZYX: Tensor, spacing_mm_B3: Tensor) -> Tokens:
    """Tokens of the unmasked global crops, without gradient and without random draws.

    Args:
        network: teacher or its snapshot.
        globals_BZYX: global crops.
        spacing_mm_B3: mm of the body per voxel of each crop along (z, y, x).
    """
    tokens = encode(
        network.backbone, crops=[globals_BZYX], masks=[None], key=None, spacing_mm=[spacing_mm_B3]
    )
    return tokens[0]
