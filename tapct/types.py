"""The data types that parts of tapct exchange.

Axes: B batch, V views (crop-major: all samples of view 0, then all of view 1), Z Y X depth height
width in voxels, N patch tokens of one crop, R registers, D channels, M masked tokens of this rank.
Orientation: LPS, axial slices first. Index z grows towards the head (Superior), y to the back
(Posterior), x to the patient's Left. Values: Hounsfield units (HU) as int16 until
`HUContract.normalise`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # the command line loads this file, and torch takes 2 s
    import numpy as np
    import torch
    from torch import Tensor
from tapct.base.exits import UserError, single_line
from tapct.base.marks import unmarked

# Value of padding in stored and loaded volumes: air. Never zero, which is water.
AIR_HU = -1024
# Label value of voxels that nobody has labelled; losses and metrics leave them out.
IGNORE_LABEL = 65535

# how weights may differ from the model that gets them; see weights/fit.py
FIT_KINDS = ("missing", "resized", "inflated", "unexpected")

# unit vectors in LPS (x, y, z) along which the index x, the index y and the index z grow
Directions: TypeAlias = tuple[
    tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]
]
UPRIGHT: Directions = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


MAX_DETAIL = 500  # characters


class Refused(UserError):
    """A scan that tapct will not train on.

    Args:
        reason: short code in snake_case, one per rule, e.g. `not_ct`, `truncated`,
            `missing_slices`.
        detail: one line that names the value and the rule. Texts of a file in it are made printable
            and cut. Names of files in it are marked by `tapct.base.marks`; the attribute `detail`
            is the line with the names, `marked` the one with their marks.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.marked = detail
        detail = single_line(unmarked(detail), MAX_DETAIL)
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:
        """Pickles by its two arguments, so that a worker process can raise it."""
        return type(self), (self.reason, self.marked)


@dataclass(frozen=True)
class PatientClues:
    """Facts about the patient in a scan's header or side-car, beside the PatientID.

    Args:
        patient_from: `header` or `side_car`, where the PatientID is from; empty without one.
        study: keyed hash of the StudyInstanceUID, or empty.
        series: keyed hash of the SeriesInstanceUID, or empty.
        pseudonym: keyed hash of a numbered stand-in such as ANON0012, which may stand for one
            patient or for one file; or empty.
        has_stand_in: whether the PatientID is a stand-in such as REMOVED.
    """

    patient_from: str = ""
    study: str = ""
    series: str = ""
    pseudonym: str = ""
    has_stand_in: bool = False


@dataclass(frozen=True)
class Technique:
    """How a scan was made and stored, in words and numbers that identify nobody; empty or NaN where
    the file does not show it.

    Args:
        model: short name of a known scanner, or `other`.
        kvp: tube voltage in kV.
        thickness_mm: SliceThickness, which need not be the distance of the slices.
        contrast: `yes` or `no`, whether a contrast agent is declared.
        body_part: BodyPartExamined where it is a word of the standard, or `other`.
        stored_type: type of the stored values, e.g. `uint16`.
        slope, intercept: rescaling of the stored values of the first slice to HU.
        orientation: nearest directions of the axes of the file, e.g. LPS: towards the left,
            posterior, superior.
        step_min_mm, step_max_mm: smallest and largest distance of two neighbouring slices.
        tilt_deg: angle between the stack of slices and their normal, in degrees.
    """

    model: str = ""
    kvp: float = float("nan")
    thickness_mm: float = float("nan")
    contrast: str = ""
    body_part: str = ""
    stored_type: str = ""
    slope: float = float("nan")
    intercept: float = float("nan")
    orientation: str = ""
    step_min_mm: float = float("nan")
    step_max_mm: float = float("nan")
    tilt_deg: float = float("nan")


@dataclass(frozen=True, slots=True)
class ScanFacts:
    """Facts from a scan's header or its JSON side-car; empty or NaN where it gives none.

    `patient` is a keyed hash of the PatientID, never the identifier itself; empty for a stand-in.
    """

    patient: str = ""
    study_date: str = ""  # YYYYMMDD
    manufacturer: str = ""
    kernel: str = ""
    sex: str = ""  # M, F, O or empty
    age_years: float = float("nan")
    lossy_ratio: float = float("nan")  # of a lossy compression; NaN where none is declared
    clues: PatientClues = field(default_factory=PatientClues, compare=False, repr=False)
    technique: Technique = field(default_factory=Technique, compare=False, repr=False)


@dataclass(frozen=True)
class Volume:
    """One CT scan in memory.

    Args:
        hu_ZYX: int16, C-contiguous, LPS, axial slices first, every value >= AIR_HU.
        spacing_mm: distance of voxel centres along (z, y, x), all > 0.
        origin_mm: LPS position (x, y, z order as in DICOM) of voxel (0, 0, 0).
        facts: header facts.
        marks: codes of what is unusual about the scan, e.g. `lossy`, `tilt_resampled`.
        directions: directions of the array's axes x, y and z; a scan that lies oblique in its file
            keeps its residual rotation here.
    """

    hu_ZYX: np.ndarray
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    facts: ScanFacts = field(default_factory=ScanFacts)
    marks: tuple[str, ...] = ()
    directions: Directions = UPRIGHT


@dataclass(frozen=True)
class LabelMap:
    """Organ labels of one scan on the scan's own grid.

    Args:
        labels_ZYX: uint16, 0 is background, IGNORE_LABEL is not labelled; same orientation rule as
            `Volume`.
        spacing_mm: distance of voxel centres along (z, y, x), all > 0.
        origin_mm: LPS position (x, y, z order as in DICOM) of voxel (0, 0, 0).
        names: pairs of label value and name from the file or a side-car; may be empty.
        directions: as in `Volume`.
    """

    labels_ZYX: np.ndarray
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    names: tuple[tuple[int, str], ...] = ()
    directions: Directions = UPRIGHT


@dataclass(frozen=True)
class HUContract:
    """HU window and z-score of the network's input; stored in every checkpoint and export.

    Args:
        clip_low: lower end of the window in HU.
        clip_high: upper end of the window in HU.
        mean: mean in HU that is subtracted.
        std: standard deviation in HU that divides.
    Source: TAP-CT's released processor: 0.5 and 99.5 percentiles, mean and standard deviation of
        foreground voxels, arXiv:2512.00872.
    """

    clip_low: float = -1008.0
    clip_high: float = 822.0
    mean: float = -86.80862426757812
    std: float = 322.63470458984375

    def __post_init__(self) -> None:
        if not self.clip_low < self.clip_high:
            raise UserError(
                f"contract.clip_low {self.clip_low:g} is not below contract.clip_high "
                f"{self.clip_high:g}: every voxel would have the same value"
            )
        if not self.clip_low <= self.mean <= self.clip_high:
            raise UserError(
                f"contract.mean {self.mean:g} lies outside the window from contract.clip_low "
                f"{self.clip_low:g} to contract.clip_high {self.clip_high:g}; give the mean of the "
                "clipped voxels"
            )
        if not self.std > 0:
            raise UserError(f"contract.std {self.std:g} must be above 0: values are divided by it")

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
        sample_B: int64, number of the sample within the run, which is the key of its random draws.
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
        local_VBZYX: the local crops; V = 0 where there are none, and the other axes have their
            configured size.
        global_in_scan_VBN: bool, False where a patch token lies wholly in padding outside the scan.
        global_mm_VB3: float32, mm of the body per voxel of each global crop along (z, y, x).
        local_mm_VB3: float32, the same for the local crops.
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
    """Output of a backbone for crops of one size, after the final norm.

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
    """Tokens of student and teacher for one micro-batch: the input of every loss.

    Args:
        student_global: tokens of the masked global crops, crop-major (V*B first axis).
        student_local: tokens of the local crops, crop-major, or None without local crops.
        teacher_global: tokens of the same global crops unmasked, without gradient.
        masks: masked patch tokens of the global crops, which the student did not see.
        num_globals: number of global views V.
        num_locals: number of local views V.
        teacher_temp: temperature of the teacher's targets at this step.
        snapshot_global: tokens of the same global crops unmasked, from a frozen copy of an earlier
            teacher; None where no loss needs one at this step.
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
        name: name in `metrics.jsonl`, e.g. `dino_local`.
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
    """Statistics of one loss's teacher targets, so that the targets themselves can be freed.

    Args:
        name: name of the loss, e.g. `dino`.
        sums: sums over the targets of this micro-batch.
        cross_entropy: scalar, plain mean cross-entropy of the student in nats, over all pairs of
            this loss.
    """

    name: str
    sums: TargetSums
    cross_entropy: Tensor


@dataclass(frozen=True)
class LossResult:
    """Result of a loss plug-in: its terms and, if it has prototypes, the statistics of its targets.

    Args:
        terms: optimised terms.
        targets: statistics of the teacher's targets; None without prototypes.
        value_by_sample: function that returns the part of each sample in the sum of the terms'
            values, (B,), without gradient; None where a loss cannot be divided, because it compares
            samples.
    """

    terms: tuple[Term, ...]
    targets: TargetStats | None = None
    value_by_sample: Callable[[], Tensor] | None = field(default=None, repr=False)
