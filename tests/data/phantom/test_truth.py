"""What the phantom states about its scans, compared with what its voxels and label maps show."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tapct.data.index.build import build_manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store
from tapct.data.phantom import archive as phantom
from tapct.data.phantom.patient import (
    ARTERIAL,
    NATIVE,
    VENOUS,
    Patient,
    Study,
    draw_patient,
    draw_study,
)
from tapct.data.phantom.scan import paint
from tapct.data.phantom.truth import TARGETS, truth_of
from tapct.data.phantom.warp import draw_warp
from tapct.eval.labels.landmarks import read_landmarks
from tapct.eval.labels.scan_values import Kind, read_scan_labels

NAMES = {name: value for value, name in phantom.LABELS}
SMALL = phantom.Config(
    num=5,
    slices=(20, 28),
    in_plane=(64, 96),
    slice_mm=(4.0, 5.0),
    dicom_share=0.4,
    followup_share=0.6,
)
WHOLE = phantom.Config(slices=(80, 80), in_plane=(112, 112), slice_mm=(5.0, 5.0))
QUIET = 1e-3  # HU of noise


@pytest.fixture(scope="module")
def torsos() -> list[phantom.Case]:
    return [phantom.draw_case(5, index, WHOLE) for index in range(5)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("truth") / "archive"
    phantom.write(out, SMALL)
    return out


def index_of(case: phantom.Case, zyx_mm: tuple[float, ...]) -> np.ndarray:
    """Index (z, y, x) of an LPS position, by the grid of the volume."""
    origin = np.array(case.volume.origin_mm)[::-1]
    return (np.array(zyx_mm) - origin) / case.volume.spacing_mm


def points_of(case: phantom.Case) -> dict[str, np.ndarray]:
    return {point.name: index_of(case, point.zyx_mm) for point in case.truth.landmarks}


def whole_body(patient: Patient) -> Study:
    """A visit that shows the whole torso from the same place for all patients."""
    study = draw_study(patient, 0, WHOLE)
    return dataclasses.replace(study, noise_hu=QUIET, centre_mm=(0.0, 0.0))


def test_lesions_are_where_the_voxels_differ_from_those_of_a_healthy_twin() -> None:
    num_seen = 0
    for number in range(3):
        patient = draw_patient(3, number)
        study = whole_body(patient)
        truth = truth_of(patient, study, paint(patient, study))
        points = {point.name: np.array(point.zyx_mm) for point in truth.landmarks}
        owner = np.zeros(study.shape, int)
        before = painted_hu(patient, study, 0)
        for at in range(1, len(patient.lesions) + 1):
            now = painted_hu(patient, study, at)
            owner[now != before] = at
            before = now
        diameters: dict[str, list[float]] = {"liver": [], "lung": [], "kidney": []}
        for at, lesion in enumerate(patient.lesions, start=1):
            where = np.argwhere(owner == at)
            assert (f"lesion_{at}" in points) == (len(where) >= 8)
            if len(where) < 8:
                continue
            num_seen += 1
            volume = len(where) * np.prod(study.spacing_mm)
            organ = next(name for name in diameters if lesion.organ.startswith(name))
            diameters[organ].append(float((6 * volume / np.pi) ** (1 / 3)))
            middle = np.array(study.origin_mm)[::-1] + where.mean(0) * study.spacing_mm
            # only the part inside the organ is seen: its middle is within a radius of the centre
            reach = lesion.radius_mm * max(patient.scale) + max(study.spacing_mm)
            assert np.linalg.norm(middle - points[f"lesion_{at}"]) < reach
        for organ, sizes in diameters.items():
            assert truth.targets[f"{organ}_lesions"] == len(sizes)
            assert truth.targets[f"{organ}_lesion"] == int(bool(sizes))
            largest = truth.targets[f"{organ}_lesion_mm"]
            assert largest == (pytest.approx(max(sizes)) if sizes else None)
    assert num_seen > 6


def painted_hu(patient: Patient, study: Study, num_lesions: int) -> np.ndarray:
    """HU without noise of a patient with the first few of the lesions."""
    fewer = dataclasses.replace(patient, lesions=patient.lesions[:num_lesions])
    return paint(fewer, study).canvas.whole.hu_ZYX


def test_the_side_of_a_lesion_is_the_side_of_the_label_that_it_lies_in(
    torsos: list[phantom.Case],
) -> None:
    sides = set()
    for case in torsos:
        side = case.truth.targets["kidney_lesion_side"]
        kidneys = [
            name
            for name, index in points_of(case).items()
            if name.startswith("lesion")
            for kidney in ("kidney_left", "kidney_right")
            if case.labels.labels_ZYX[tuple(np.rint(index).astype(int))] == NAMES[kidney]
        ]
        if side is None:
            assert not kidneys
            continue
        sides.add(side)
        (name,) = kidneys or ("",)
        if name:
            at = tuple(np.rint(points_of(case)[name]).astype(int))
            assert case.labels.labels_ZYX[at] == NAMES[f"kidney_{side}"]
    assert sides


def test_fat_of_the_body_is_what_the_voxels_show(torsos: list[phantom.Case]) -> None:
    stated, measured, thickness, drawn = [], [], [], []
    for case in torsos:
        hu, labels = case.volume.hu_ZYX, case.labels.labels_ZYX
        tissue = (labels > 0) & (labels != NAMES["lungs"]) & (labels != NAMES["table"])
        stated.append(case.truth.targets["body_fat_share"])
        measured.append(float((hu[tissue] < -45).mean()))
        drawn.append(case.truth.targets["subcutaneous_fat_mm"])
        thickness.append(fat_under_the_skin(case))
    np.testing.assert_allclose(stated, measured, atol=0.06)
    assert np.corrcoef(stated, measured)[0, 1] > 0.98
    assert np.ptp(stated) > 0.05  # the patients differ
    assert np.corrcoef(drawn, thickness)[0, 1] > 0.95
    np.testing.assert_allclose(drawn, thickness, atol=8)


def fat_under_the_skin(case: phantom.Case) -> float:
    """Mean thickness in mm of the fat under the skin on both sides, in front and behind, at the
    height of the kidneys.
    """
    hu, labels = case.volume.hu_ZYX, case.labels.labels_ZYX
    step = case.volume.spacing_mm[2]
    middle = int(np.mean(np.nonzero(labels == NAMES["kidney_right"])[0]))
    values = []
    for k in range(middle - 3, middle + 4):
        body = (labels[k] > 0) & (labels[k] != NAMES["table"])
        row, column = (
            (at[0] + at[-1]) // 2 for at in map(np.flatnonzero, (body.any(1), body.any(0)))
        )
        aside = round(40 / step)  # beside the spine
        for plane, mask, at in (
            (hu[k], body, (row,)),
            (hu[k].T, body.T, (column - aside, column + aside)),
        ):
            thickness = []
            for line in at:
                inside = np.flatnonzero(mask[line])
                ray = plane[line - 1 : line + 2].mean(0)[inside[0] + 1 : inside[-1]]
                thickness += [int(np.argmax(ray > -30)), int(np.argmax(ray[::-1] > -30))]
            values.append(np.mean(thickness) * step)
    return float(np.mean(values))


def test_muscles_of_older_patients_hold_the_stated_share_of_fat() -> None:
    patient = draw_patient(7, 1)
    study = whole_body(patient)

    def at_age(years: int) -> tuple[np.ndarray, float]:
        aged = dataclasses.replace(patient, age_years=years)
        painted = paint(aged, study)
        hu = painted.canvas.whole.hu_ZYX.copy()
        hu[painted.canvas.whole.label_ZYX == NAMES["aorta"]] = 0  # its wall ages too
        return hu, truth_of(aged, study, painted).targets["muscle_fat_share"]

    # all muscle of the two extremes: no fat in it, and nothing but fat
    young, old = at_age(-2000)[0], at_age(2000)[0]
    muscle = young != old
    assert muscle.sum() > 2000
    shares = []
    for years in (25, 55, 85):
        hu, stated = at_age(years)
        shares.append(float((hu[muscle] == old[muscle]).mean()))
        assert abs(shares[-1] - stated) < 0.03  # of one random field
    assert shares[2] > 1.5 * shares[0]


def test_the_phase_is_visible_in_aorta_kidneys_and_liver() -> None:
    config = dataclasses.replace(WHOLE, arterial_share=1.0)
    enhanced = native = 0
    for index in range(3):
        venous, arterial = (phantom.draw_case(5, index, each) for each in (WHOLE, config))
        phases = (venous.truth.targets["phase"], arterial.truth.targets["phase"])
        if phases == (NATIVE, NATIVE):
            native += 1
            np.testing.assert_array_equal(venous.volume.hu_ZYX, arterial.volume.hu_ZYX)
            continue
        enhanced += 1
        assert phases == (VENOUS, ARTERIAL)
        np.testing.assert_array_equal(venous.labels.labels_ZYX, arterial.labels.labels_ZYX)
        change = {
            name: float(
                np.median(arterial.volume.hu_ZYX[venous.labels.labels_ZYX == NAMES[name]])
                - np.median(venous.volume.hu_ZYX[venous.labels.labels_ZYX == NAMES[name]])
            )
            for name in ("aorta", "kidney_left", "liver")
        }
        assert change["aorta"] > 40 and change["kidney_left"] > 10 and change["liver"] < -4
    assert enhanced and native


def test_phases_are_drawn_with_their_share_and_leave_all_other_draws_alone() -> None:
    studies = []
    for share in (0.0, 0.5):
        config = dataclasses.replace(WHOLE, arterial_share=share)
        studies.append([draw_study(draw_patient(1, n), 0, config) for n in range(300)])
    for plain, other in zip(*studies):
        assert dataclasses.replace(other, phase=plain.phase) == plain
    phases = [study.phase for study in studies[1]]
    assert ARTERIAL not in {study.phase for study in studies[0]}
    arterial = phases.count(ARTERIAL)
    assert 0.4 < arterial / (arterial + phases.count(VENOUS)) < 0.6
    assert 0.4 < phases.count(NATIVE) / 300 < 0.6


def test_landmarks_lie_in_the_anatomy_that_they_name(torsos: list[phantom.Case]) -> None:
    for case in torsos:
        labels, spacing = case.labels.labels_ZYX, np.array(case.volume.spacing_mm)
        points = points_of(case)
        assert {"carina", "liver_centre", "vertebra_L1", "kidney_left_upper_pole"} <= set(points)
        for name, index in points.items():
            at = tuple(np.rint(index).astype(int))
            if name.startswith("vertebra") and 0 < at[0] < len(labels) - 1:
                assert labels[at] == NAMES["vertebrae"], name
        for kidney in ("kidney_left", "kidney_right"):
            where = np.argwhere(labels == NAMES[kidney])
            if where[:, 0].min() == 0:
                continue  # cut by the field of view
            apart = (where.mean(0) - points[f"{kidney}_centre"]) * spacing
            assert np.linalg.norm(apart) < 10
            ends = where[:, 0].max(), where[:, 0].min()
            for end, slice_of_end in zip(("upper", "lower"), ends):
                assert abs(points[f"{kidney}_{end}_pole"][0] - slice_of_end) * spacing[0] < 14
        above = points["vertebra_T10"][0] > points["vertebra_T12"][0] > points["vertebra_L3"][0]
        assert above, "z grows to the head"


def test_the_windpipe_divides_at_the_carina() -> None:
    for number in range(3):
        patient = draw_patient(11, number)
        study = dataclasses.replace(whole_body(patient), turn=0.0)
        painted = paint(patient, study)
        (carina,) = (
            point for point in truth_of(patient, study, painted).landmarks if point.name == "carina"
        )
        at = (np.array(carina.zyx_mm) - np.array(study.origin_mm)[::-1]) / study.spacing_mm

        hu_ZYX = painted.canvas.whole.hu_ZYX

        def hu(z_mm: float, x_mm: float, at=at, hu_ZYX=hu_ZYX, study=study) -> float:
            index = np.rint(at + np.array([z_mm, 0, x_mm]) / study.spacing_mm).astype(int)
            return float(hu_ZYX[tuple(index)])

        assert hu(14, 0) < -900, "one airway above"
        assert hu(-12, 0) > -200, "none in the middle below"
        assert hu(-12, 20) < -900 and hu(-12, -20) < -900, "two airways beside"


# ------------------------------------------------------------------------------- follow-ups


@pytest.fixture(scope="module")
def pair() -> tuple[phantom.Case, phantom.Case]:
    """Two scans of a patient, the second one deformed."""
    config = dataclasses.replace(WHOLE, followup_share=1.0, warp_mm=8.0)
    first, second = (phantom.draw_case(2, index, config) for index in (0, 1))
    return first, second


def studies_of_pair() -> tuple[Patient, Study, Study]:
    config = dataclasses.replace(WHOLE, followup_share=1.0, warp_mm=8.0)
    patient = draw_patient(2, 0)
    return patient, draw_study(patient, 0, config), draw_study(patient, 1, config)


def test_a_deformation_is_inverted_and_is_the_same_slice_by_slice() -> None:
    patient, first, second = studies_of_pair()
    warp = draw_warp(patient, first, second, 12.0)
    rng = np.random.default_rng(0)
    points = rng.uniform(-180, 180, (200, 3))
    np.testing.assert_allclose(warp.followup(warp.first(points)), points, atol=1e-5)
    y, x = np.linspace(-120, 120, 7), np.linspace(-150, 150, 5)
    plane = warp.first_of_slice(33.0, y, x)
    grid = np.stack(np.meshgrid(x, y, [33.0], indexing="xy"), -1).reshape(-1, 3)
    np.testing.assert_allclose(plane.reshape(3, -1).T, warp.first(grid), atol=1e-9)
    step = 1e-3
    for axis in np.eye(3):  # it keeps the order of points, so it does not fold the body
        slope = (warp.first(points + step * axis) - warp.first(points)) @ axis / step
        assert slope.min() > 0.4


def test_points_of_one_name_lie_in_the_same_tissue_of_both_scans(
    pair: tuple[phantom.Case, phantom.Case],
) -> None:
    first, second = map(points_of, pair)
    both = sorted(set(first) & set(second))
    assert len([name for name in both if name.startswith("body")]) > 12
    agree = 0
    for name in both:
        labels = [
            case.labels.labels_ZYX[tuple(np.rint(points[name]).astype(int))]
            for case, points in zip(pair, (first, second))
        ]
        agree += labels[0] == labels[1]
    assert agree >= 0.9 * len(both)  # a point at the edge of an organ may fall on either side
    shift = np.array([(second[n] - first[n]) * pair[0].volume.spacing_mm for n in both])
    design = np.array([[*first[n], 1.0] for n in both])
    rest = shift - design @ np.linalg.lstsq(design, shift, rcond=None)[0]
    assert np.linalg.norm(rest, axis=1).mean() > 1.0, "the deformation is more than an affine map"


def test_organs_move_with_the_deformation(pair: tuple[phantom.Case, phantom.Case]) -> None:
    patient, first_study, second_study = studies_of_pair()
    warp = draw_warp(patient, first_study, second_study, 8.0)
    for organ in ("spleen", "kidney_left", "kidney_right"):
        clouds = []
        for case, study in zip(pair, (first_study, second_study)):
            where = np.argwhere(case.labels.labels_ZYX == NAMES[organ]).astype(float)
            middle = (np.array(study.shape) - 1) / 2
            frame = (where - middle) * study.spacing_mm - (0, *study.centre_mm[::-1])
            frame[:, 0] = study.bottom_z + where[:, 0] * study.spacing_mm[0]
            clouds.append(frame[:, ::-1])
        if min(cloud[:, 2].min() for cloud in clouds) < -190:
            continue  # cut by the field of view
        moved = warp.first(clouds[1])
        np.testing.assert_allclose(moved.mean(0), clouds[0].mean(0), atol=1.5)


def test_without_a_deformation_lesions_and_bones_have_the_same_names_at_both_visits() -> None:
    config = dataclasses.replace(WHOLE, followup_share=1.0)
    first, second = (points_of(phantom.draw_case(2, index, config)) for index in (0, 1))
    both = set(first) & set(second)
    assert any(name.startswith("lesion") for name in both)
    assert any(name.startswith("vertebra") for name in both)
    assert not any(name.startswith("body") for name in both)


# ------------------------------------------------------------------------------------ tables


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_tables_are_what_eval_reads_for_every_scan(archive: Path, tmp_path: Path) -> None:
    manifest = build_manifest(archive, tmp_path / "m.parquet", min_depth=1, workers=0)
    pack(manifest, tmp_path / "store", workers=0)
    store = Store(tmp_path / "store")
    labels, points = rows_of(archive / "scan_labels.csv"), rows_of(archive / "landmarks.csv")
    assert {row["path"] for row in labels} == {row.path for row in manifest.accepted}
    assert tuple(labels[0]) == ("path", "patient", *TARGETS)

    table = read_scan_labels(archive / "scan_labels.csv", store.scans)
    assert table.summary.startswith(
        "scan labels: 5 of 5 scans; columns that identify and are not read: patient; targets: sex"
    )
    assert table.kinds["phase"] is Kind.CATEGORY and table.kinds["age_years"] is Kind.NUMBER
    assert table.kinds["lung_lesion"] is Kind.BINARY
    by_path = {row.path: row for row in manifest.accepted}
    for row in labels:
        values = table.values[by_path[row["path"]].id]
        assert values["age_years"] == by_path[row["path"]].age_years
        assert values["sex"] == by_path[row["path"]].sex
        assert {name for name in TARGETS if row[name]} == set(values)

    found = read_landmarks(archive / "landmarks.csv", store.scans, store.places())
    assert found.summary == f"landmarks: {len(points)} points in 5 of 5 scans"
    for row in points:
        packed = found.points[by_path[row["path"]].id][row["name"]]
        image = read_by_simpleitk(archive / row["path"])
        place = [float(row[axis]) for axis in ("x_mm", "y_mm", "z_mm")]
        index_xyz = image.TransformPhysicalPointToContinuousIndex(place)
        wanted = np.array(index_xyz) * image.GetSpacing()
        np.testing.assert_allclose(packed, wanted[::-1], atol=2e-2)


IMAGES: dict[Path, sitk.Image] = {}


def read_by_simpleitk(path: Path) -> sitk.Image:
    """A scan with LPS axes."""
    if path not in IMAGES:
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)) if path.is_dir() else path
        IMAGES[path] = sitk.DICOMOrient(sitk.ReadImage(files), "LPS")
    return IMAGES[path]


def test_an_organ_that_a_scan_does_not_show_has_no_value() -> None:
    patient = draw_patient(3, 0)
    study = dataclasses.replace(whole_body(patient), shape=(12, 96, 96), bottom_z=100.0)
    targets = truth_of(patient, study, paint(patient, study)).targets
    assert targets["kidney_lesion"] is None and targets["kidney_lesions"] is None
    assert targets["liver_lesion"] is None and targets["lung_lesion"] is not None
