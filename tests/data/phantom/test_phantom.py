"""The phantom archive: what is on disk, read back by other libraries, and what the anatomy
promises.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch

from tapct.base.exits import UserError
from tapct.data.labels import reading
from tapct.data.phantom import archive as phantom
from tapct.data.phantom.files import write_case
from tapct.data.phantom.patient import ORIENTATIONS, draw_patient, draw_study
from tapct.data.phantom.scan import scan
from tapct.data.scans import ingest
from tapct.types import AIR_HU, HUContract, LabelMap, Volume

NAMES = {name: value for value, name in phantom.LABELS}
SMALL = phantom.Config(
    num=6, slices=(20, 28), in_plane=(64, 96), slice_mm=(4.0, 5.0), dicom_share=0.4
)
WHOLE = phantom.Config(
    slices=(80, 80), in_plane=(112, 112), slice_mm=(5.0, 5.0)
)  # 400 mm: the whole torso


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "archive"
    phantom.write(out, SMALL)
    return out


@pytest.fixture(scope="module")
def torsos() -> list[tuple[Volume, LabelMap]]:
    return [phantom.make_case(5, index, WHOLE)[:2] for index in range(8)]


def files_under(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def physical_lps(image: sitk.Image) -> np.ndarray:
    """Voxels ordered by their physical place: LPS axes, ZYX."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))


def test_same_seed_gives_the_same_bytes_and_a_larger_archive_begins_with_the_smaller(
    archive: Path, tmp_path: Path
) -> None:
    phantom.write(tmp_path / "larger", dataclasses.replace(SMALL, num=9, workers=1))
    first, larger = files_under(archive), files_under(tmp_path / "larger")
    assert len(larger) > len(first)
    tables = {name: first.pop(name) for name in ("scan_labels.csv", "landmarks.csv")}
    assert first == {name: larger[name] for name in first}
    for name, content in tables.items():
        assert larger[name].startswith(content) and len(larger[name]) > len(content)
    phantom.write(tmp_path / "other", dataclasses.replace(SMALL, num=1, seed=1))
    other = files_under(tmp_path / "other")
    assert other["labels/P0000_T0.nii.gz"] != first["labels/P0000_T0.nii.gz"]


def test_every_scan_has_a_label_map_on_its_grid_with_names_and_header_facts(archive: Path) -> None:
    images = {p.name.split(".")[0] for p in (archive / "images").iterdir()}
    labels = {p.name.split(".")[0] for p in (archive / "labels").iterdir()}
    assert images == labels and len(images) == SMALL.num
    kinds = {"dicom" if p.is_dir() else "nifti" for p in (archive / "images").iterdir()}
    assert kinds == {"dicom", "nifti"}
    for path in sorted((archive / "images").glob("*.nii.gz")):
        scan_file, label_file = nib.load(path), nib.load(archive / "labels" / path.name)
        assert scan_file.get_data_dtype() == np.int16 and label_file.get_data_dtype() == np.uint8
        assert scan_file.shape == label_file.shape
        np.testing.assert_allclose(scan_file.affine, label_file.affine)
        np.testing.assert_allclose(scan_file.get_qform(), scan_file.get_sform(), atol=1e-3)
        facts = json.loads((archive / "images" / f"{path.name[:-7]}.json").read_text())
        assert set(facts) >= {
            "PatientID",
            "PatientSex",
            "PatientAge",
            "StudyDate",
            "Manufacturer",
            "ConvolutionKernel",
        }
        assert (
            facts["Modality"] == "CT"
            and len(facts["PatientAge"]) == 4
            and facts["PatientAge"].endswith("Y")
        )
        names = json.loads((archive / "labels" / f"{path.name[:-7]}.json").read_text())["labels"]
        assert names == {str(value): name for value, name in phantom.LABELS}
        assert set(np.unique(label_file.dataobj)) <= set(range(11))
        with gzip.open(path) as stream:  # the checksum at the end is right
            stream.read()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_nifti_reads_back_as_the_case_in_memory_in_every_orientation(
    orientation: str, tmp_path: Path
) -> None:
    volume, labels, facts = phantom.make_case(3, 0, SMALL)
    facts = dataclasses.replace(facts, orientation=orientation, dicom=False)
    write_case(volume, labels, facts, tmp_path, tmp_path / "..")
    path = tmp_path / f"{facts.name}.nii.gz"
    image = nib.load(path)
    assert "".join(nib.aff2axcodes(image.affine)) == orientation
    ras = nib.as_closest_canonical(image)
    np.testing.assert_array_equal(
        np.asarray(ras.dataobj)[::-1, ::-1].transpose(2, 1, 0), volume.hu_ZYX
    )
    read = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), volume.hu_ZYX)
    np.testing.assert_allclose(read.GetOrigin(), volume.origin_mm, atol=1e-3)
    np.testing.assert_allclose(read.GetSpacing()[::-1], volume.spacing_mm, atol=1e-4)


@pytest.mark.parametrize("manufacturer", ["SIEMENS", "GE MEDICAL SYSTEMS"])
def test_a_dicom_series_and_the_nifti_of_the_same_case_are_voxel_identical(
    manufacturer: str, tmp_path: Path
) -> None:
    volume, labels, facts = phantom.make_case(3, 1, SMALL)
    for folder in ("dicom", "nifti", "labels"):
        (tmp_path / folder).mkdir()
    facts = dataclasses.replace(facts, manufacturer=manufacturer, orientation="RAS")
    write_case(
        volume,
        labels,
        dataclasses.replace(facts, dicom=True),
        tmp_path / "dicom",
        tmp_path / "labels",
    )
    write_case(
        volume,
        labels,
        dataclasses.replace(facts, dicom=False),
        tmp_path / "nifti",
        tmp_path / "labels",
    )
    nifti = sitk.ReadImage(str(tmp_path / "nifti" / f"{facts.name}.nii.gz"))
    series = tmp_path / "dicom" / facts.name
    read = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series)))
    np.testing.assert_array_equal(physical_lps(read), physical_lps(nifti))
    np.testing.assert_allclose(
        read.GetOrigin(), sitk.DICOMOrient(nifti, "LPS").GetOrigin(), atol=1e-3
    )
    np.testing.assert_allclose(
        read.GetSpacing(), sitk.DICOMOrient(nifti, "LPS").GetSpacing(), atol=1e-4
    )

    slices = sorted(
        (pydicom.dcmread(p) for p in series.iterdir()), key=lambda ds: ds.ImagePositionPatient[2]
    )
    hu = np.stack(
        [ds.pixel_array.astype(np.int64) * ds.RescaleSlope + ds.RescaleIntercept for ds in slices]
    )
    np.testing.assert_array_equal(hu, volume.hu_ZYX)
    steps = np.diff([float(ds.ImagePositionPatient[2]) for ds in slices])
    np.testing.assert_allclose(steps, volume.spacing_mm[0], atol=1e-4)
    highest = (
        pydicom.dcmread(series / "IMG0001.dcm").InstanceNumber == 1
        and slices[-1].InstanceNumber == 1
    )
    assert highest == (manufacturer == "SIEMENS"), (
        "some scanners count from the head, some from the feet"
    )
    assert len({ds.SOPInstanceUID for ds in slices}) == len(slices)
    assert {ds.SeriesInstanceUID for ds in slices} == {slices[0].SeriesInstanceUID}
    assert (
        slices[0].SOPClassUID.name == "CT Image Storage" and slices[0].PatientID == facts.patient_id
    )
    assert slices[0].file_meta.MediaStorageSOPInstanceUID == slices[0].SOPInstanceUID


def test_ingest_reads_every_case_as_it_was_in_memory(archive: Path) -> None:
    for index in range(SMALL.num):
        volume, labels, facts = phantom.make_case(SMALL.seed, index, SMALL)
        path = archive / "images" / (facts.name if facts.dicom else f"{facts.name}.nii.gz")
        read = ingest.read_volume(path)
        np.testing.assert_array_equal(read.hu_ZYX, volume.hu_ZYX)
        np.testing.assert_allclose(read.spacing_mm, volume.spacing_mm, atol=1e-4)
        assert (read.facts.study_date, read.facts.sex) == (facts.study_date, facts.sex)
        assert (read.facts.kernel, read.facts.age_years) == (facts.kernel, facts.age_years)
        stored = reading.read_labels(archive / "labels" / f"{facts.name}.nii.gz")
        np.testing.assert_array_equal(stored.labels_ZYX, labels.labels_ZYX)
        assert set(stored.names) == set(phantom.LABELS)


def test_organs_lie_where_they_lie_in_a_body(torsos: list[tuple[Volume, LabelMap]]) -> None:
    for _, labels in torsos:
        middle = {
            name: np.array([axis.mean() for axis in np.nonzero(labels.labels_ZYX == value)])
            for name, value in NAMES.items()
        }
        z, y, x = 0, 1, 2
        spine = middle["vertebrae"]
        assert middle["liver"][x] < spine[x] < middle["spleen"][x], "x grows to the patient's left"
        assert middle["kidney_right"][x] < spine[x] < middle["kidney_left"][x]
        assert middle["kidney_right"][z] < middle["liver"][z] < middle["lungs"][z], (
            "z grows to the head"
        )
        assert middle["spleen"][z] > middle["kidney_left"][z]
        assert spine[y] > middle["body"][y] and middle["table"][y] > spine[y], "y grows to the back"
        assert middle["liver"][y] < spine[y]
        column = labels.labels_ZYX[:, :, :]
        low = range(int(middle["kidney_right"][z]), int(middle["liver"][z]))
        for k in low:  # the abdominal aorta: in front of the vertebra and a little left of it
            aorta, bone = (
                np.argwhere(column[k] == NAMES["aorta"]),
                np.argwhere(column[k] == NAMES["vertebrae"]),
            )
            if len(aorta) and len(bone):
                assert aorta[:, 0].mean() < bone[:, 0].mean()
                assert aorta[:, 1].mean() > np.median(bone[:, 1]) - 3


def test_all_labels_occur_in_a_whole_torso_and_tissue_has_its_hounsfield_units(
    torsos: list[tuple[Volume, LabelMap]],
) -> None:
    for volume, labels in torsos:
        assert set(np.unique(labels.labels_ZYX)) == set(range(11))
        hu = volume.hu_ZYX
        assert hu.dtype == np.int16 and hu.min() >= AIR_HU and hu.flags["C_CONTIGUOUS"]
        assert labels.labels_ZYX.dtype == np.uint16
        median = {
            name: float(np.median(hu[labels.labels_ZYX == value])) for name, value in NAMES.items()
        }
        assert np.median(hu[labels.labels_ZYX == 0]) < -980
        assert -920 < median["lungs"] < -760
        for organ in ("liver", "spleen", "kidney_left", "kidney_right", "aorta"):
            assert 0 < median[organ] < 130
        assert 110 < median["vertebrae"] < 500 and 110 < median["ribs"] < 600
        assert -1000 < median["table"] < -100


def test_soft_organs_overlap_so_that_a_threshold_cannot_separate_them() -> None:
    rng = np.random.default_rng(0)
    samples: dict[str, list[np.ndarray]] = {}
    for index in range(12):
        volume, labels, _ = phantom.make_case(9, index, WHOLE)
        for name in ("liver", "spleen", "kidney_left", "aorta"):
            values = volume.hu_ZYX[labels.labels_ZYX == NAMES[name]]
            samples.setdefault(name, []).append(rng.choice(values, 300))
    pooled = {name: np.concatenate(parts) for name, parts in samples.items()}
    for a in pooled:
        for b in pooled:
            if a < b:
                wins = np.mean(pooled[a][:, None] > pooled[b][None, ::7])
                assert 0.2 < wins < 0.8, f"{a} against {b}: AUC {wins:.2f}"


def test_a_followup_is_the_same_body_on_another_day() -> None:
    config = dataclasses.replace(SMALL, followup_share=1.0)
    first, second = (phantom.make_case(2, index, config) for index in (0, 1))
    assert first[2].patient_id == second[2].patient_id and first[2].name != second[2].name
    assert first[2].study_date < second[2].study_date and first[2].sex == second[2].sex
    assert 0 <= second[2].age_years - first[2].age_years <= 2
    assert phantom.make_case(2, 2, config)[2].patient_id != first[2].patient_id

    patient = draw_patient(2, 0)
    study = dataclasses.replace(draw_study(patient, 0, WHOLE), noise_hu=0.01)
    lesions = tuple(dataclasses.replace(lesion, growth=1.6) for lesion in patient.lesions)
    assert any(lesion.organ == "lungs" for lesion in lesions)
    patient = dataclasses.replace(patient, lesions=lesions)
    healthy = dataclasses.replace(patient, lesions=())
    volumes = []
    for visit in (0, 1):
        same_pose = dataclasses.replace(study, visit=visit)
        changed = scan(patient, same_pose)[0].astype(int) - scan(healthy, same_pose)[0]
        volumes.append(int((np.abs(changed) > 100).sum()))
    assert volumes[1] > 1.8 * volumes[0] > 0


def test_sharp_kernels_have_finer_and_stronger_noise_than_soft_ones() -> None:
    patient = draw_patient(0, 1)
    study = dataclasses.replace(draw_study(patient, 0, WHOLE), noise_hu=10.0)
    study = dataclasses.replace(study, shape=(6, 256, 256), spacing_mm=(5.0, 1.5, 1.5))
    quiet = dataclasses.replace(study, noise_hu=1e-3)
    neighbour = {}
    for sharp in (False, True):
        loud, still = (dataclasses.replace(s, sharp=sharp) for s in (study, quiet))
        noise = (scan(patient, loud)[0] - scan(patient, still)[0].astype(float))[2, 98:158, 98:158]
        noise = noise - noise.mean()
        neighbour[sharp] = float((noise[:, 1:] * noise[:, :-1]).mean() / noise.var())
        assert 5 < noise.std() < 16
    assert neighbour[False] > 0.3 and neighbour[True] < neighbour[False] - 0.3
    studies = [draw_study(draw_patient(0, n), 0, phantom.Config()) for n in range(200)]
    for kernel in {s.kernel for s in studies}:
        assert len({s.sharp for s in studies if s.kernel == kernel}) == 1, (
            "kernels of one name have one noise level"
        )
    mean = {
        sharp: np.mean([s.noise_hu for s in studies if s.sharp == sharp]) for sharp in (False, True)
    }
    assert mean[True] > 1.4 * mean[False]


def test_sizes_and_shares_of_the_config_are_observed() -> None:
    config = phantom.Config(dicom_share=0.3, followup_share=0.4)
    cases = [phantom.patient_of(4, index, config.followup_share) for index in range(400)]
    assert cases == sorted(cases) and len(set(cases)) == 400
    second = sum(visit for _, visit in cases)
    assert 0.3 < second / (400 - second) < 0.5
    studies = [draw_study(draw_patient(4, p), v, config) for p, v in cases]
    assert 0.22 < np.mean([s.dicom for s in studies]) < 0.38
    depths, sizes = zip(*((s.shape[0], s.shape[1]) for s in studies), strict=True)
    assert min(depths) >= 48 and max(depths) <= 110 and len(set(depths)) > 20
    assert min(sizes) >= 160 and max(sizes) <= 256 and len(set(sizes)) > 4
    steps = {s.spacing_mm[0] for s in studies}
    assert min(steps) == 1.0 and max(steps) == 5.0 and len(steps) > 5
    assert {s.orientation for s in studies} == set(ORIENTATIONS)


def test_bad_settings_and_used_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="slices"):
        phantom.Config(slices=(50, 40))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        phantom.write(tmp_path, SMALL)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupt_leaves_nothing_that_looks_like_an_archive(
    tmp_path: Path, existed: bool
) -> None:
    out = tmp_path / "archive"
    if existed:
        out.mkdir()

    def interrupt(done: int, total: int) -> None:
        assert list((out / "images").iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantom.write(out, SMALL, interrupt)
    assert out.exists() == existed and not list(tmp_path.rglob("*.nii.gz"))
    assert not existed or list(out.iterdir()) == []


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = phantom.write(
        tmp_path / "a", dataclasses.replace(SMALL, num=3), lambda *at: seen.append(at)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert report.scans == 3 and 1 <= report.patients <= 3
    assert report.num_bytes == sum(
        p.stat().st_size for p in (tmp_path / "a").rglob("*") if p.is_file()
    )


def patches_of(volume: Volume, labels: LabelMap) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised HU (N, 256) of patches of 4x8x8 voxels, and the label that most of their voxels
    have.
    """
    depth, size = volume.hu_ZYX.shape[0] // 4, volume.hu_ZYX.shape[1] // 8

    def cells(array: np.ndarray) -> torch.Tensor:
        cut = torch.from_numpy(array[: depth * 4].astype(np.float32)).reshape(
            depth, 4, size, 8, size, 8
        )
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, 256)

    return HUContract().normalise(cells(volume.hu_ZYX)), cells(labels.labels_ZYX).mode(
        dim=1
    ).values.long()


@pytest.mark.slow
def test_a_balanced_linear_decoder_on_raw_patches_reaches_a_mean_dice_of_about_0_3() -> None:
    # in plane 128: about 3 mm a pixel, so a patch is some 25 mm wide
    config = phantom.Config(in_plane=(128, 128), slices=(40, 80), slice_mm=(2.5, 5.0))
    cases = [phantom.make_case(0, index, config) for index in range(30)]
    held_out = set(sorted({facts.patient_id for *_, facts in cases})[::3])
    data = [
        (facts.patient_id in held_out, *patches_of(volume, labels))
        for volume, labels, facts in cases
    ]
    x = torch.cat([features for test, features, _ in data if not test])
    y = torch.cat([target for test, _, target in data if not test])
    generator = torch.Generator().manual_seed(0)
    rows = [torch.nonzero(y == k)[:, 0] for k in range(11)]
    kept = torch.cat([r[torch.randperm(len(r), generator=generator)[:3000]] for r in rows])
    mean, std = x.mean(0), x.std(0)
    x, y = (x[kept] - mean) / std, y[kept]
    weight = (1.0 / torch.bincount(y, minlength=11))[y]
    decoder = torch.nn.Linear(256, 11)
    torch.nn.init.zeros_(decoder.weight)
    solver = torch.optim.LBFGS(
        decoder.parameters(), max_iter=400, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(decoder(x), y, reduction="none")
        loss = (loss * weight).sum() / weight.sum() + 1e-4 * decoder.weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    dice: dict[int, list[float]] = {}
    for test, features, target in data:
        if not test:
            continue
        guess = decoder((features - mean) / std).argmax(1)
        for k in range(1, 11):
            truth = target == k
            if truth.any():
                hit = float((truth & (guess == k)).sum())
                dice.setdefault(k, []).append(2 * hit / float(truth.sum() + (guess == k).sum()))
    assert set(dice) == set(range(1, 11))
    assert 0.24 < np.mean([np.mean(values) for values in dice.values()]) < 0.36
    soft = [
        np.mean(dice[NAMES[n]]) for n in ("liver", "spleen", "kidney_left", "kidney_right", "aorta")
    ]
    assert max(soft) < 0.45, "raw HU alone must not find the soft organs"
