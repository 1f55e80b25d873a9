"""Make and write a synthetic archive of torso CT with organ labels, for tests, for learning and for
measurements where no real scans are available.

Every case is a pure function of (seed, index): the first N cases of a larger archive are those of a
smaller one. Bytes repeat on one machine with one set of library versions; on another CPU a voxel
may be rounded differently by 1 HU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapct.base.exits import UserError
from tapct.base.files import check_new_path
from tapct.config import setting
from tapct.data.phantom.files import CaseFacts, write_case
from tapct.data.phantom.patient import draw_patient, draw_study, keyed
from tapct.data.phantom.scan import measure, paint
from tapct.data.phantom.truth import Truth, truth_of
from tapct.data.phantom.truth_files import LANDMARKS, SCAN_LABELS, write_truth
from tapct.data.phantom.warp import MAX_MM
from tapct.types import LabelMap, ScanFacts, Volume

LABELS = (
    (1, "body"),
    (2, "lungs"),
    (3, "liver"),
    (4, "spleen"),
    (5, "kidney_left"),
    (6, "kidney_right"),
    (7, "aorta"),
    (8, "vertebrae"),
    (9, "ribs"),
    (10, "table"),
)


@dataclass(frozen=True)
class Config:
    """The phantom archive."""

    num: int = setting(40, "number of scans", ge=1)
    seed: int = setting(0, "random seed; the same seed gives the same bytes", ge=0)
    slices: tuple[int, int] = setting((48, 110), "fewest and most slices of a scan", ge=2)
    in_plane: tuple[int, int] = setting(
        (160, 256), "smallest and largest in-plane size in voxels, in steps of 16", ge=32
    )
    slice_mm: tuple[float, float] = setting(
        (1.0, 5.0), "smallest and largest slice spacing in mm", gt=0, le=10
    )
    dicom_share: float = setting(
        0.2, "share of scans written as DICOM series, the others as NIfTI", ge=0, le=1
    )
    followup_share: float = setting(0.25, "share of patients with a second time point", ge=0, le=1)
    arterial_share: float = setting(
        0.0,
        "share of the arterial phase among scans with contrast agent, the others are venous",
        ge=0,
        le=1,
    )
    warp_mm: float = setting(
        0.0,
        "largest bump in mm of a known smooth deformation between the two scans of a patient; 0: "
        "the second scan is painted in a pose of its own",
        ge=0,
        le=MAX_MM,
    )
    workers: int = setting(0, "threads that make scans; 0: one per core", ge=0)

    def __post_init__(self) -> None:
        for name in ("slices", "in_plane", "slice_mm"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(
                    f"phantom.{name} is ({low}, {high}), but the first must not exceed the second; "
                    "swap them"
                )


@dataclass(frozen=True)
class PhantomReport:
    """Counts of a written archive.

    Args:
        scans: number of scans.
        patients: number of patients.
        dicom: number of scans that are DICOM series.
        num_bytes: bytes of all files.
    """

    scans: int
    patients: int
    dicom: int
    num_bytes: int


def patient_of(seed: int, index: int, followup_share: float) -> tuple[int, int]:
    """Patient and visit of a case: (patient, visit), the same for every archive size."""
    patient = 0
    while True:
        visits = 1 + int(keyed(seed, patient, "visits").random() < followup_share)
        if index < visits:
            return patient, index
        index -= visits
        patient += 1


@dataclass(frozen=True)
class Case:
    """One scan of the archive, in memory.

    Args:
        volume: scan.
        labels: its labels; LABELS holds values and names.
        facts: its header facts in plain text.
        truth: what is true of it.
    """

    volume: Volume
    labels: LabelMap
    facts: CaseFacts
    truth: Truth


def make_case(seed: int, index: int, config: Config) -> tuple[Volume, LabelMap, CaseFacts]:
    """Scan, labels and header facts of `draw_case`."""
    case = draw_case(seed, index, config)
    return case.volume, case.labels, case.facts


def draw_case(seed: int, index: int, config: Config) -> Case:
    """One scan of the archive, in memory.

    Args:
        seed: random seed of the archive.
        index: number of the case, from 0.
        config: ranges and shares; `num` and `seed` are not read.
    """
    number, visit = patient_of(seed, index, config.followup_share)
    patient = draw_patient(seed, number)
    study = draw_study(patient, visit, config)
    first = draw_study(patient, 0, config) if visit else None
    painted = paint(patient, study, first, config.warp_mm)
    name = f"P{number:04d}_T{visit}"
    facts = CaseFacts(
        name=name,
        patient_id=f"PHANTOM-{seed}-{number}",
        uid_key=f"tapct phantom {seed} {name}",
        visit=visit,
        sex=patient.sex,
        age_years=patient.age_years + study.years_later,
        study_date=study.date,
        manufacturer=study.manufacturer,
        kernel=study.kernel,
        body_part=study.body_part,
        orientation=study.orientation,
        dicom=study.dicom,
    )
    header = ScanFacts(
        study_date=facts.study_date,
        manufacturer=facts.manufacturer,
        kernel=facts.kernel,
        sex=facts.sex,
        age_years=float(facts.age_years),
    )
    grid = (study.spacing_mm, study.origin_mm)
    labels_ZYX = painted.canvas.whole.label_ZYX.astype(np.uint16)
    return Case(
        Volume(measure(painted.canvas), *grid, header),
        LabelMap(labels_ZYX, *grid, LABELS),
        facts,
        truth_of(patient, study, painted, body_points=config.warp_mm > 0),
    )


def write(
    out: Path, config: Config, progress: Callable[[int, int], None] | None = None
) -> PhantomReport:
    """Write an archive: OUT/images (NIfTI with JSON, DICOM folders), OUT/labels (NIfTI with JSON),
    and what is true of the scans: OUT/scan_labels.csv and OUT/landmarks.csv.

    Args:
        out: folder to make; must be empty or absent.
        config: settings of the archive.
        progress: function that is called with (scans done, scans in all).
    Raises:
        UserError: the folder is not empty, or cannot be made.
    """
    images, labels = out / "images", out / "labels"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"phantom --out {out}: it exists and is not an empty folder; choose another folder or "
            "remove it"
        )
    check_new_path(out)
    workers = min(config.workers or os.cpu_count() or 1, config.num)

    def make_and_write(index: int) -> tuple[CaseFacts, Truth, int]:
        case = draw_case(config.seed, index, config)
        num_bytes = write_case(case.volume, case.labels, case.facts, images, labels)
        return case.facts, case.truth, num_bytes

    done: dict[int, tuple[CaseFacts, Truth, int]] = {}
    existed = out.exists()
    try:
        images.mkdir(parents=True)
        labels.mkdir()
        with ThreadPoolExecutor(workers) as pool:
            jobs = {pool.submit(make_and_write, index): index for index in range(config.num)}
            try:
                for job in as_completed(jobs):
                    done[jobs[job]] = job.result()
                    if progress is not None:
                        progress(len(done), config.num)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        cases = [done[index] for index in range(config.num)]
        num_bytes = write_truth(out, [(facts, truth) for facts, truth, _ in cases])
    except BaseException:  # Ctrl-C too: half an archive would look like a whole one
        for folder in (images, labels) if existed else (out,):
            shutil.rmtree(folder, ignore_errors=True)
        for name in (SCAN_LABELS, LANDMARKS):
            (out / name).unlink(missing_ok=True)
        raise
    return PhantomReport(
        scans=len(cases),
        patients=len({facts.patient_id for facts, _, _ in cases}),
        dicom=sum(facts.dicom for facts, _, _ in cases),
        num_bytes=num_bytes + sum(num for _, _, num in cases),
    )
