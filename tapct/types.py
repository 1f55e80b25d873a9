"""The nouns that cross a border between two parts of tapct.

Axes: B batch, V views (crop-major: all samples of view 0, then all of view 1), Z Y X depth height
width in voxels, N patch tokens of one crop, R registers, D channels, M masked tokens of this rank.
Orientation: LPS, axial slices first. Index z grows towards the head (Superior), y to the back
(Posterior), x to the patient's Left. Values: Hounsfield units (HU) as int16 until
`HUContract.normalise`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line loads this file, and torch takes 2 s
    import numpy as np
    import torch
    from torch import Tensor
from tapct.base.exits import UserError

AIR_HU = (
    -1024
)  # what padding is made of in stored and loaded volumes; air, never zero (zero is water)


class Refused(UserError):
    """A scan that tapct will not train on.

    Args:
        reason: short code in snake_case, one per rule, e.g. `not_ct`, `truncated`,
            `missing_slices`.
        detail: one line that names the value and the rule.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:
        """Pickles by its two arguments, so that a worker process can raise it."""
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class ScanFacts:
    """Facts from a scan's header or its JSON side-car; empty or NaN where it gives none.

    `patient` is a keyed hash, never the identifier itself.
    """

    patient: str = ""
    study_date: str = ""  # YYYYMMDD
    manufacturer: str = ""
    kernel: str = ""
    sex: str = ""  # M, F, O or empty
    age_years: float = float("nan")


@dataclass(frozen=True)
class Volume:
    """One CT scan in memory.

    Args:
        hu_ZYX: int16, C-contiguous, LPS, axial slices first, every value >= AIR_HU.
        spacing_mm: distance of voxel centres along (z, y, x), all > 0.
        origin_mm: LPS position (x, y, z order as in DICOM) of voxel (0, 0, 0).
        facts: header facts.
    """

    hu_ZYX: np.ndarray
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    facts: ScanFacts = field(default_factory=ScanFacts)


@dataclass(frozen=True)
class LabelMap:
    """Organ labels of one scan on the scan's own grid.

    Args:
        labels_ZYX: uint16, 0 is background, same orientation rule as `Volume`.
        spacing_mm: as in `Volume`.
        names: label value and name, where the file or a side-car tells; may be empty.
    """

    labels_ZYX: np.ndarray
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    names: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class HUContract:
    """How HU become network input; stored in every checkpoint and export.

    Source: TAP-CT's released processor: 0.5 and 99.5 percentiles, mean and std of foreground
        voxels, arXiv:2512.00872.
    """

    clip_low: float = -1008.0
    clip_high: float = 822.0
    mean: float = -86.80862426757812
    std: float = 322.63470458984375

    def normalise(self, hu: Tensor) -> Tensor:
        """Clip and z-score: any shape in HU -> float32, unitless."""
        return hu.float().clamp(self.clip_low, self.clip_high).sub(self.mean).div(self.std)


@dataclass(frozen=True)
class Batch:
    """Slabs of one micro-batch on one rank, as the loader hands them over.

    Args:
        hu_BZYX: int16 HU, padded with AIR_HU at the far end of each axis to the batch's largest
            slab.
        extent_B3: int64, how many voxels (z, y, x) of each slab are scan; the rest is padding.
        spacing_mm_B3: float32, distance of voxel centres along (z, y, x).
        sample_B: int64, the number of the sample in the whole run: the key of all its random draws.
        scan_B: int64, row of the scan in the store.
        slab_start_B: int64, z index in the scan of the slab's first slice.
    """

    hu_BZYX: Tensor
    extent_B3: Tensor
    spacing_mm_B3: Tensor
    sample_B: Tensor
    scan_B: Tensor
    slab_start_B: Tensor

    def to(self, device: torch.device) -> Batch:
        """Move all tensors, asynchronously where the memory is pinned."""
        return Batch(
            *(
                getattr(self, name).to(device, non_blocking=True)
                for name in self.__dataclass_fields__
            )
        )


@dataclass(frozen=True)
class Views:
    """The crops of one micro-batch, float32, after the ops and `HUContract.normalise`.

    Args:
        global_VBZYX: the global crops (V = views.num_globals).
        local_VBZYX: the local crops; V = 0 when there are none (the other axes then have their
            configured size).
        global_in_scan_VBN: bool, False where a patch token lies wholly in padding outside the scan.
        global_mm_VB3: float32, mm of the body per voxel of each global crop along (z, y, x).
        local_mm_VB3: the same of the local crops.
    """

    global_VBZYX: Tensor
    local_VBZYX: Tensor
    global_in_scan_VBN: Tensor
    global_mm_VB3: Tensor
    local_mm_VB3: Tensor


@dataclass(frozen=True)
class Masks:
    """Block masks of the global crops, with exact counts.

    Args:
        masked_VBN: bool, True where the student sees the mask token.
        index_M: int64, ascending indices of the masked tokens into the flattened (V*B*N).
        weight_M: float32, 1 / (masked in-scan tokens of that crop); 0 for a masked token that is
            all padding.
    """

    masked_VBN: Tensor
    index_M: Tensor
    weight_M: Tensor


@dataclass(frozen=True)
class Tokens:
    """What a backbone makes of crops of one size, after the final norm.

    Args:
        cls_BD: class tokens.
        registers_BRD: register tokens.
        patches_BND: patch tokens in (z, y, x) raster order.
        grid: patches along (z, y, x), product N.
    """

    cls_BD: Tensor
    registers_BRD: Tensor
    patches_BND: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class TokenSets:
    """What student and teacher made of one micro-batch: the input of every loss.

    Args:
        student_global: tokens of the masked global crops, crop-major (V*B first axis).
        student_local: tokens of the local crops, crop-major, or None without local crops.
        teacher_global: tokens of the same global crops unmasked, without gradient.
        masks: which global patch tokens the student did not see.
        num_globals: V of the global crops.
        num_locals: V of the local crops.
        teacher_temp: temperature of the teacher's targets at this step.
        snapshot_global: tokens of the same global crops unmasked, from the frozen copy of an
            earlier teacher; None where no loss wants one, or not yet.
    """

    student_global: Tokens
    student_local: Tokens | None
    teacher_global: Tokens
    masks: Masks
    num_globals: int
    num_locals: int
    teacher_temp: float
    snapshot_global: Tokens | None = None


@dataclass(frozen=True)
class Term:
    """One optimised loss term.

    Args:
        name: as in `metrics.jsonl`, e.g. `dino_local`.
        value: scalar float32, weighted: the terms' values sum to the total that is optimised.
        cross_entropy: scalar, plain mean per (student, teacher) pair in nats before any weight;
            None for other terms.
    """

    name: str
    value: Tensor
    cross_entropy: Tensor | None = None


@dataclass(frozen=True)
class TargetSums:
    """Sums over teacher targets that add up over chunks, micro-batches and ranks.

    Args:
        mass_K: float32, sum of the targets.
        entropy: float32 scalar, sum of the targets' entropies.
        rows: float32 scalar, number of targets.
    """

    mass_K: Tensor
    entropy: Tensor
    rows: Tensor

    def __add__(self, other: TargetSums) -> TargetSums:
        return TargetSums(
            self.mass_K + other.mass_K, self.entropy + other.entropy, self.rows + other.rows
        )


@dataclass(frozen=True)
class TargetStats:
    """What is kept of one loss's teacher targets, so that the targets themselves can be freed.

    Args:
        name: of the loss, e.g. `dino`.
        sums: over the targets of this micro-batch.
        cross_entropy: scalar, plain mean cross-entropy of the student over all pairs of this loss,
            nats.
    """

    name: str
    sums: TargetSums
    cross_entropy: Tensor


@dataclass(frozen=True)
class LossResult:
    """What one loss plug-in returns: its terms and, where it has prototypes, the statistics of its
    targets.
    """

    terms: tuple[Term, ...]
    targets: TargetStats | None = None
