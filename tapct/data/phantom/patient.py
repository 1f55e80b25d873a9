"""Draw the phantom's patients and their studies, each by its own random key.

Frame of all positions here: standard-body millimetres, x to the patient's Left, y to the back
(Posterior), z towards the head (Superior); z = 0 is the height of T10. `Patient.scale` converts
them to real millimetres.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

# heights of the centres of the vertebral bodies in standard mm, ascending
_LUMBAR_Z = (-257, -222, -187, -152, -118, -85)  # S1, L5 .. L1
_THORACIC_Z = (-55, -27, 0, 25, 49, 72, 95, 117, 139, 161, 182, 202)  # T12 .. T1
VERTEBRA_Z = np.array((*_LUMBAR_Z, *_THORACIC_Z, 220), np.float32)  # 220: C7
TOP_Z, BOTTOM_Z = 205.0, -225.0  # above and below there would be a neck and a pelvis

# manufacturer, soft kernel, sharp kernel, noise factor
SCANNERS = (
    ("SIEMENS", "B30f", "B70f", 1.0),
    ("GE MEDICAL SYSTEMS", "STANDARD", "LUNG", 1.25),
    ("Philips", "B", "L", 0.85),
    ("TOSHIBA", "FC08", "FC52", 1.1),
)
NATIVE, ARTERIAL, VENOUS = "native", "arterial", "venous"
ORIENTATIONS = ("LPS", "RAS", "LAS", "RPI", "PSR")


class Sizes(Protocol):
    """The part of the phantom's config from which studies are drawn."""

    @property
    def slices(self) -> tuple[int, int]:
        """Fewest and most slices."""

    @property
    def in_plane(self) -> tuple[int, int]:
        """Smallest and largest in-plane size."""

    @property
    def slice_mm(self) -> tuple[float, float]:
        """Smallest and largest slice spacing."""

    @property
    def dicom_share(self) -> float:
        """Share of DICOM series."""

    @property
    def arterial_share(self) -> float:
        """Share of the arterial phase among scans with contrast agent."""


@dataclass(frozen=True)
class Lesion:
    """A ball of other tissue; the label keeps the organ's class.

    Args:
        organ: 'liver', 'lungs', 'kidney_left' or 'kidney_right'.
        centre: position in standard mm (x, y, z).
        radius_mm: radius at the first time point.
        hu: mean HU of the ball.
        growth: factor on the radius at the second time point.
    """

    organ: str
    centre: tuple[float, float, float]
    radius_mm: float
    hu: float
    growth: float


@dataclass(frozen=True)
class Patient:
    """One body; the same at every time point.

    Args:
        key: (seed, patient number), the random key of all textures and deformations.
        sex: M or F.
        age_years: age at the first time point.
        scale: real mm per standard mm along (x, y, z).
        fat_mm: thickness of subcutaneous fat (side, front, back), standard mm.
        muscle_mm: thickness of the muscle wall relative to the standard body.
        visceral: amount of visceral fat, 0 to 1.
        contrast: contrast agent, 0 unenhanced to 1 portal venous.
        aorta_mm: radius of the aorta.
        hu: mean HU by tissue.
        gain: factor on texture amplitudes by tissue.
        shift: displacement of organs from the standard body, standard mm (x, y, z).
        size: size factor of organs (x, y, z).
        spine: amplitudes of the spine's curve (side, front) in mm, its phase and its slope.
        lesions: balls of other tissue in organs.
    """

    key: tuple[int, int]
    sex: str
    age_years: int
    scale: tuple[float, float, float]
    fat_mm: tuple[float, float, float]
    muscle_mm: float
    visceral: float
    contrast: float
    aorta_mm: float
    hu: dict[str, float]
    gain: dict[str, float]
    shift: dict[str, tuple[float, float, float]]
    size: dict[str, tuple[float, float, float]]
    spine: tuple[float, float, float, float]
    lesions: tuple[Lesion, ...]

    def rng(self, purpose: str) -> np.random.Generator:
        """A random generator of this body for one purpose, the same at every time point."""
        return keyed(*self.key, purpose)


@dataclass(frozen=True)
class Study:
    """One visit to a scanner.

    Args:
        visit: number of the time point, 0 or 1.
        shape: number of voxels (z, y, x).
        spacing_mm: distance of voxel centres (z, y, x).
        bottom_z: height of the first slice, real mm in the patient's frame.
        centre_mm: offset of the patient's axis from the image centre (x, y), real mm.
        turn: rotation about z in radians.
        breath_mm: distance of the diaphragm below that of the standard body.
        origin_mm: LPS position (x, y, z) of voxel (0, 0, 0) in the scanner's own frame.
        table_gap_mm: distance between back and table.
        manufacturer: name of the scanner's maker.
        kernel: name of the reconstruction kernel.
        noise_hu: standard deviation of the noise in the middle of the body.
        sharp: whether the kernel is a sharp one.
        round_field: whether everything outside the round field of view is padding.
        date: date of the study, YYYYMMDD.
        years_later: years since the first visit.
        body_part: scanned region, DICOM's BodyPartExamined.
        orientation: axis codes of the stored array where it is a NIfTI.
        dicom: whether the scan is written as DICOM.
        phase: `native`, `arterial` or `venous`.
    """

    visit: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    bottom_z: float
    centre_mm: tuple[float, float]
    turn: float
    breath_mm: float
    origin_mm: tuple[float, float, float]
    table_gap_mm: float
    manufacturer: str
    kernel: str
    noise_hu: float
    sharp: bool
    round_field: bool
    date: str
    years_later: int
    body_part: str
    orientation: str
    dicom: bool
    phase: str


def keyed(*key: int | str) -> np.random.Generator:
    """A random generator for one key, which holds numbers and names of purposes."""
    entropy = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy)))


def _three(values: np.ndarray) -> tuple[float, float, float]:
    """The three numbers of an array as a tuple."""
    return float(values[0]), float(values[1]), float(values[2])


def _draw_hu(rng: np.random.Generator, age: int, contrast: float) -> dict[str, float]:
    """Mean HU by tissue. Soft organs lie around one level per patient, so their values overlap."""
    level = 46.0 + 22.0 * contrast + rng.normal(0, 5)
    soft = {
        name: level + rng.normal(0, 8)
        for name in ("liver", "spleen", "kidney", "blood", "muscle", "bowel")
    }
    for name, uptake in (("blood", 22), ("kidney", 26), ("spleen", 10)):
        soft[name] += uptake * contrast
    bone = 1.0 - 0.006 * (age - 30)
    return soft | {
        "fat": rng.normal(-104, 5),
        "lungs": rng.normal(-830, 25),
        "spongiosa": 190 * bone + rng.normal(0, 20),
        "cortex": 480 * (0.5 + 0.5 * bone) + rng.normal(0, 40),
        "disc": rng.normal(85, 8),
        "fluid": rng.normal(12, 5),
    }


def _draw_lesions(rng: np.random.Generator) -> tuple[Lesion, ...]:
    """Up to four lesions in the liver, four in the lungs and one in a kidney."""
    lesions = []
    for _ in range(int(rng.integers(0, 5))):
        centre = (rng.uniform(-120, -20), rng.uniform(-50, 50), rng.uniform(-80, 15))
        lesions.append(
            Lesion("liver", centre, rng.uniform(7, 20), rng.uniform(8, 30), rng.uniform(0.8, 1.8))
        )
    for _ in range(int(rng.integers(0, 5))):
        side = rng.choice((-1.0, 1.0))
        centre = (side * rng.uniform(60, 110), rng.uniform(-45, 65), rng.uniform(45, 165))
        lesions.append(
            Lesion("lungs", centre, rng.uniform(4, 13), rng.uniform(-60, 50), rng.uniform(0.8, 1.8))
        )
    if rng.random() < 0.35:
        side = rng.choice((-1.0, 1.0))
        centre = (side * rng.uniform(60, 85), rng.uniform(40, 65), rng.uniform(-140, -70))
        organ = "kidney_left" if side > 0 else "kidney_right"
        lesions.append(
            Lesion(organ, centre, rng.uniform(6, 14), rng.uniform(0, 15), rng.uniform(1.0, 1.4))
        )
    return tuple(lesions)


def draw_patient(seed: int, number: int) -> Patient:
    """The body of one patient.

    Args:
        seed: random seed of the archive.
        number: number of the patient in the archive.
    """
    rng = keyed(seed, number, "patient")
    sex = "M" if rng.random() < 0.52 else "F"
    age = int(rng.integers(22, 90))
    build = rng.normal(0, 1)
    size = (1.0 if sex == "M" else 0.92) * (1 + 0.03 * build)
    scale = (
        size * (1 + rng.normal(0, 0.025)),
        size * (1 + rng.normal(0, 0.03)),
        size * (1 + rng.normal(0, 0.035)),
    )
    weight = float(np.clip(rng.beta(2, 3) + (0.08 if age > 45 else 0.0), 0, 1))
    female = sex == "F"
    fat = (
        4 + weight * (30 if female else 22) + rng.uniform(0, 3),
        5 + weight * (38 if female else 30) + rng.uniform(0, 4),
        6 + weight * (26 if female else 20) + rng.uniform(0, 3),
    )
    contrast = float(rng.choice((0.0, 1.0)) * rng.uniform(0.4, 1.0))
    organs = ("liver", "spleen", "kidney_left", "kidney_right", "heart", "stomach", "colon")
    spread_mm = {"liver": 6.0, "spleen": 9.0, "heart": 6.0}
    shift, sizes = {}, {}
    for organ in organs:
        shift[organ] = _three(rng.normal(0, spread_mm.get(organ, 7.0), 3) * (1, 0.7, 1.4))
    for organ in organs:
        sizes[organ] = _three((1 + rng.normal(0, 0.1)) * (1 + rng.normal(0, 0.06, 3)))
    return Patient(
        key=(seed, number),
        sex=sex,
        age_years=age,
        scale=scale,
        fat_mm=fat,
        muscle_mm=float(rng.uniform(-3, 4) - (3 if female else 0) - 0.04 * max(0, age - 50)),
        visceral=float(np.clip(0.7 * weight + rng.uniform(0, 0.45) + (0 if female else 0.1), 0, 1)),
        contrast=contrast,
        aorta_mm=float(12.0 + 0.05 * (age - 30) + rng.normal(0, 1.0)),
        hu=_draw_hu(rng, age, contrast),
        gain={
            n: float(rng.uniform(0.8, 1.25))
            for n in ("liver", "spleen", "kidney", "lungs", "muscle", "bowel")
        },
        shift=shift,
        size=sizes,
        spine=(
            float(rng.normal(0, 4)),
            float(rng.normal(8, 3)),
            float(rng.uniform(0, 6.28)),
            float(rng.normal(0, 0.3)),
        ),
        lesions=_draw_lesions(rng),
    )


def draw_study(patient: Patient, visit: int, sizes: Sizes) -> Study:
    """One visit of a patient: scanner, region, slices, field of view, breath, noise.

    Args:
        patient: body that is scanned.
        visit: number of the time point, 0 or 1.
        sizes: ranges of the archive.
    """
    rng = patient.rng(f"study {visit}")
    region = str(rng.choice(("CHESTABDOMEN", "CHEST", "ABDOMEN"), p=(0.6, 0.15, 0.25)))
    low, high = {"CHESTABDOMEN": (-200, 150), "CHEST": (-60, 200), "ABDOMEN": (-215, 60)}[region]
    wanted = (high - low + rng.uniform(-25, 25)) * patient.scale[2]
    steps = np.array([1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0])
    steps = steps[(steps >= sizes.slice_mm[0]) & (steps <= sizes.slice_mm[1])]
    slice_mm = float(rng.choice(steps)) if steps.size else float(rng.uniform(*sizes.slice_mm))
    depth = int(np.clip(round(wanted / slice_mm), *sizes.slices))
    room = max(0.0, (TOP_Z - BOTTOM_Z) * patient.scale[2] - depth * slice_mm)
    lowest = BOTTOM_Z * patient.scale[2]
    centred = (low + high) / 2 * patient.scale[2] - depth * slice_mm / 2
    bottom = float(np.clip(centred + rng.normal(0, 15), lowest, lowest + room))
    pixels = int(round(rng.uniform(*sizes.in_plane) / 16) * 16)
    width = 2 * (150 + patient.fat_mm[0]) * patient.scale[0]
    field_mm = float(np.clip(width * rng.uniform(0.92, 1.1), 270, 500))
    sharp = bool(rng.random() < (0.6 if region == "CHEST" else 0.25))
    name, soft_kernel, sharp_kernel, factor = SCANNERS[int(rng.integers(len(SCANNERS)))]
    thickness = (2.5 / max(slice_mm, 1.0)) ** 0.35  # thin slices are noisier
    noise = factor * rng.uniform(8, 15) * (1.9 if sharp else 1.0) * thickness
    corner = np.array([-field_mm / 2, -field_mm / 2 - 110, -300])
    corner = corner + rng.uniform(-1, 1, 3) * (15, 90, 600)
    later = visit * int(rng.integers(80, 700))
    day = int(patient.rng("date").integers(0, 3000)) + later
    return Study(
        visit=visit,
        shape=(depth, pixels, pixels),
        spacing_mm=(slice_mm, field_mm / pixels, field_mm / pixels),
        bottom_z=bottom,
        centre_mm=(float(rng.normal(0, 8)), float(rng.normal(-12, 6))),
        turn=float(rng.normal(0, 0.05)),
        breath_mm=float(rng.normal(0, 7)),
        origin_mm=_three(np.round(corner, 1)),
        table_gap_mm=float(rng.uniform(0, 5)),
        manufacturer=name,
        kernel=sharp_kernel if sharp else soft_kernel,
        noise_hu=float(noise),
        sharp=sharp,
        round_field=bool(rng.random() < 0.3),
        date=str(np.datetime64("2014-03-01") + np.timedelta64(day, "D")).replace("-", ""),
        years_later=later // 365,
        body_part=region,
        orientation=ORIENTATIONS[int(rng.choice(5, p=(0.4, 0.25, 0.15, 0.1, 0.1)))],
        dicom=bool(rng.random() < sizes.dicom_share),
        phase=_draw_phase(patient, visit, sizes.arterial_share),
    )


def _draw_phase(patient: Patient, visit: int, arterial_share: float) -> str:
    """The phase of the contrast agent, by a random key of its own."""
    if patient.contrast == 0:
        return NATIVE
    is_arterial = patient.rng(f"phase {visit}").random() < arterial_share
    return ARTERIAL if is_arterial else VENOUS


def in_phase(patient: Patient, phase: str) -> Patient:
    """A patient as scanned in a phase. `draw_patient` draws native and venous ones; in the arterial
    phase the agent is in the arteries, the cortex of the kidneys and the spleen, and has hardly
    reached the liver, the veins and the muscles.
    """
    if phase != ARTERIAL:
        return patient
    c, hu = patient.contrast, dict(patient.hu)
    for name, uptake in (("blood", 120), ("kidney", 35), ("spleen", 15), ("liver", -18)):
        hu[name] += uptake * c
    for name in ("muscle", "bowel"):
        hu[name] -= 12 * c
    return replace(patient, contrast=0.2 * c, hu=hu)
