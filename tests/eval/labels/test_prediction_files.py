"""Predicted label maps lie on the voxels of the original files, whatever their axes.

Labels that are drawn in the geometry of a file are indexed and packed with the scan. Written back
from the store, they must be the same file.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from scan_files import LPS, make_ct

from tapct.data.index.build import build_manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store
from tapct.data.readers.nifti import read as read_nifti
from tapct.eval.labels.prediction_files import PredictionFiles

TURN = np.radians(6)
AFFINES = {  # LPS
    "upright": np.diag([0.8, 0.7, 2.0, 1.0]),
    "permuted": np.array([[0, 0, 0.8, 3], [0.7, 0, 0, -2], [0, 2.0, 0, 5], [0, 0, 0, 1.0]]),
    "flipped": np.array([[-0.8, 0, 0, 3], [0, 0.7, 0, -2], [0, 0, -2.0, 5], [0, 0, 0, 1.0]]),
    "oblique": np.array(
        [
            [0, -0.7 * np.cos(TURN), -2.0 * np.sin(TURN), 1],
            [-0.8, 0, 0, 2],
            [0, -0.7 * np.sin(TURN), 2.0 * np.cos(TURN), 3],
            [0, 0, 0, 1.0],
        ]
    ),
}


def labels_like(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Different labels at every place, so that no flip or permutation goes unseen."""
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)


def file_axes(name: str, hu_ZYX: np.ndarray) -> np.ndarray:
    """The scan along the axes of the file."""
    hu_XYZ = hu_ZYX.transpose(2, 1, 0)
    if name == "permuted":
        return hu_XYZ.transpose(1, 2, 0)
    if name == "flipped":
        return hu_XYZ[::-1, :, ::-1]
    if name == "oblique":
        return hu_XYZ.transpose(1, 0, 2)[::-1, ::-1]
    return hu_XYZ


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an archive, its manifest and its store."""
    folder = tmp_path_factory.mktemp("originals")
    root = folder / "archive"
    root.mkdir()
    for seed, (name, affine) in enumerate(AFFINES.items()):
        voxels_IJK = file_axes(name, make_ct((6, 24, 26), seed))
        for ending, array in (("", voxels_IJK), ("_seg", labels_like(voxels_IJK.shape, seed))):
            image = nibabel.Nifti1Image(array, LPS @ affine)
            image.set_sform(LPS @ affine, 2)
            image.header["descrip"] = b"NAME OF A PATIENT"
            nibabel.save(image, root / f"{name}{ending}.nii.gz")
    for ending, array in (("", make_ct((6, 24, 26), 9)), ("_seg", labels_like((6, 24, 26), 9))):
        nrrd = SimpleITK.GetImageFromArray(array)
        nrrd.SetSpacing([0.8, 0.7, 2.0])
        nrrd.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1])
        SimpleITK.WriteImage(nrrd, root / f"nrrd{ending}.nrrd")
    manifest = build_manifest(root, folder / "manifest.parquet", min_depth=2)
    assert len(manifest.accepted) == 5 and all(row.label_path for row in manifest.accepted)
    pack(manifest, folder / "store")
    return folder


def written(packed: Path, out: Path, name: str) -> tuple[Path, PredictionFiles]:
    """The packed labels of a scan, written as a prediction."""
    store = Store(packed / "store")
    (number,) = (i for i, scan in enumerate(store.scans) if scan.path.startswith(name))
    files = PredictionFiles(out, store)
    files.write("segmentation", "pretrained", store.scans[number].id, store.read_labels(number))
    return out / "segmentation" / "pretrained" / f"{store.scans[number].id}.nii.gz", files


@pytest.mark.parametrize("name", AFFINES)
def test_a_prediction_has_the_voxels_and_the_affine_of_the_original(
    packed: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, files = written(packed, tmp_path, name)
    new, original = nibabel.load(path), nibabel.load(packed / "archive" / f"{name}.nii.gz")
    truth = nibabel.load(packed / "archive" / f"{name}_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(new.dataobj), np.asarray(truth.dataobj))
    np.testing.assert_array_equal(new.affine, original.affine)  # to the bit
    for key in ("sform_code", "qform_code", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(new.header[key], original.header[key])
    assert b"PATIENT" not in bytes(new.header["descrip"])
    files.report()
    printed = capsys.readouterr()
    assert "LPS" not in printed.out + printed.err


def test_a_prediction_on_another_format_lies_at_the_same_place(
    packed: Path, tmp_path: Path
) -> None:
    path, _ = written(packed, tmp_path, "nrrd")
    new = SimpleITK.ReadImage(str(path))
    truth = SimpleITK.ReadImage(str(packed / "archive" / "nrrd_seg.nrrd"))
    np.testing.assert_array_equal(
        SimpleITK.GetArrayFromImage(new), SimpleITK.GetArrayFromImage(truth)
    )
    np.testing.assert_allclose(new.GetOrigin(), truth.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(new.GetDirection(), truth.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(new.GetSpacing(), truth.GetSpacing(), rtol=1e-6)


def test_without_the_original_the_place_is_right_and_the_axes_are_reported(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = packed / "archive" / "permuted.nii.gz"
    aside = original.rename(packed / "aside.nii.gz")
    try:
        path, files = written(packed, tmp_path, "permuted")
    finally:
        aside.rename(original)
    files.report()
    printed = capsys.readouterr()
    assert "predictions of 1 scan have the axes of the packed scan (LPS)" in (
        printed.out + printed.err
    ).replace("\n", " ")
    new = nibabel.load(path)
    truth = nibabel.load(packed / "archive" / "permuted_seg.nii.gz")
    again = nibabel.as_closest_canonical(new), nibabel.as_closest_canonical(truth)
    np.testing.assert_array_equal(*(np.asarray(image.dataobj) for image in again))
    np.testing.assert_allclose(again[0].affine, again[1].affine, atol=1e-4)
    names = json.loads((path.parent / "labels.json").read_text())
    assert isinstance(names, dict)
    assert read_nifti([path]).voxels_IJK.dtype == np.uint8
