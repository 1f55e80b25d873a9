"""Labels come onto the grid of their scan by whole voxels, or are refused with the reason."""

from __future__ import annotations

import contextlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from scan_files import LPS, make_ct, make_labels

from tapct.data.labels.overlay import Overlay
from tapct.data.labels.reading import read_labels, read_labels_of
from tapct.data.scans.geometry import check_same_grid
from tapct.data.scans.ingest import read_volume
from tapct.types import IGNORE_LABEL, LabelMap, Refused, Volume

# a scan whose file axes are turned by 10 degrees, with its first voxel to the right and the front
_TURN = np.eye(4)
_TURN[:2, :2] = [
    [np.cos(np.radians(10)), -np.sin(np.radians(10))],
    [np.sin(np.radians(10)), np.cos(np.radians(10))],
]
OBLIQUE = _TURN @ np.diag([0.8, 0.7, 2.5, 1.0])
FLIPPED = np.diag([-0.8, 0.7, -2.5, 1.0])


def save(path: Path, values_ZYX: np.ndarray, affine_lps: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(values_ZYX.transpose(2, 1, 0), LPS @ affine_lps), path)
    return path


def moved(affine: np.ndarray, first_xyz: tuple[float, float, float]) -> np.ndarray:
    """The affine of a grid that begins at another voxel of a file."""
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ first_xyz
    return shifted


def scan_at(tmp_path: Path, affine: np.ndarray) -> Volume:
    return read_volume(save(tmp_path / "scan.nii.gz", make_ct(), affine))


@pytest.mark.parametrize("affine", [FLIPPED, OBLIQUE], ids=["flipped", "oblique"])
def test_a_crop_by_whole_voxels_is_padded(tmp_path: Path, affine: np.ndarray) -> None:
    volume, labels = scan_at(tmp_path, affine), make_labels()
    whole = read_labels(save(tmp_path / "whole.nii.gz", labels, affine))
    crop = save(tmp_path / "crop.nii.gz", labels[1:8, 1:14, 2:16], moved(affine, (2, 1, 1)))
    found = read_labels_of(volume, crop)
    np.testing.assert_array_equal(found.label_map.labels_ZYX, whole.labels_ZYX)
    check_same_grid(volume, found.label_map)


@pytest.mark.parametrize("affine", [FLIPPED, OBLIQUE], ids=["flipped", "oblique"])
def test_a_larger_grid_is_cropped_only_where_it_is_background(
    tmp_path: Path, affine: np.ndarray
) -> None:
    volume, labels = scan_at(tmp_path, affine), make_labels()
    larger = np.pad(labels, ((2, 1), (0, 0), (3, 4)))
    path = save(tmp_path / "larger.nii.gz", larger, moved(affine, (-3, 0, -2)))
    expected = read_labels(save(tmp_path / "whole.nii.gz", labels, affine)).labels_ZYX
    np.testing.assert_array_equal(read_labels_of(volume, path).label_map.labels_ZYX, expected)
    larger[0, 5, 5] = 1
    save(path, larger, moved(affine, (-3, 0, -2)))
    with pytest.raises(Refused, match="grid_mismatch.* 1 labelled voxels lie outside"):
        read_labels_of(volume, path)


@pytest.mark.parametrize(
    "affine, shape, problem",
    [
        (moved(OBLIQUE, (2.1, 1, 1)), (7, 13, 14), "0.10 voxels apart"),
        (moved(OBLIQUE, (2, 1, 1)) @ np.diag([1.01, 1, 1, 1]), (7, 13, 14), "voxels apart"),
        (moved(np.diag([0.8, 0.7, 2.5, 1]), (2, 1, 1)), (7, 13, 14), "turned by 10.0 degrees"),
        (np.diag([0.8, 0.7, 2.5, 1]), (9, 14, 17), "turned by 10.0 degrees"),
        (moved(OBLIQUE, (2, 1, 5)), (7, 13, 14), "neither holds the other"),
        (moved(OBLIQUE, (0, 0, 1)), (9, 14, 17), "1.00 voxels off"),
        (OBLIQUE, (7, 14, 17), "begin at the same voxel"),
        (OBLIQUE, (11, 14, 17), "begin at the same voxel"),
    ],
    ids=["tenth", "spacing", "crop-turned", "turned", "partly", "shifted", "stale", "stale-larger"],
)
def test_another_grid_is_refused_and_named(
    tmp_path: Path, affine: np.ndarray, shape: tuple[int, int, int], problem: str
) -> None:
    path = save(tmp_path / "labels.nii.gz", np.ones(shape, np.uint8), affine)
    with pytest.raises(Refused, match=problem) as caught:
        read_labels_of(scan_at(tmp_path, OBLIQUE), path)
    assert caught.value.reason == "grid_mismatch" and "\n" not in caught.value.detail


def test_a_crop_that_kept_the_header_of_the_whole_is_refused_from_every_corner(
    tmp_path: Path,
) -> None:
    for affine in (FLIPPED, np.diag([0.8, -0.7, 2.5, 1.0]), np.diag([-0.8, -0.7, -2.5, 1.0])):
        volume = scan_at(tmp_path, affine)
        path = save(tmp_path / "crop.nii.gz", make_labels()[3:], affine)
        with pytest.raises(Refused, match="kept the header of the whole"):
            read_labels_of(volume, path)


def test_values_are_rounded_to_1e_3_and_ignored_by_choice(tmp_path: Path) -> None:
    labels = make_labels().astype(np.float32)
    expected = make_labels()
    near = save(tmp_path / "near.nii.gz", labels + 0.0009, FLIPPED)
    np.testing.assert_array_equal(read_labels(near).labels_ZYX, expected[::-1, :, ::-1])
    with pytest.raises(Refused, match="not_labels.*whole numbers"):
        read_labels(save(tmp_path / "far.nii.gz", labels + 0.0011, FLIPPED))
    labels[0, 0, 0], labels[8, 13, 16], labels[4, 0, 0] = -1, 7, -1
    path = save(tmp_path / "ignored.nii.gz", labels, np.diag([0.8, 0.7, 2.5, 1.0]))
    with pytest.raises(Refused, match="holds -1.*--ignore-label -1"):
        read_labels(path)
    expected[0, 0, 0] = expected[8, 13, 16] = expected[4, 0, 0] = IGNORE_LABEL
    np.testing.assert_array_equal(read_labels(path, ignore=(-1, 7)).labels_ZYX, expected)
    labels[1, :2, 1] = np.nan
    with pytest.raises(Refused, match="NaN or infinity in 2 voxels"):
        read_labels(save(path, labels, FLIPPED), ignore=(-1, 7))
    with pytest.raises(Refused, match="holds 65535; rule: 0 to 65534"):
        read_labels(save(path, np.full((4, 5, 6), 65535, np.uint16), FLIPPED))


def slicer_layers(path: Path, layers: list[np.ndarray], segments: list[tuple[int, int, str]]):
    """A segmentation as 3D Slicer writes it, byte by byte.

    Args:
        path: path of the file.
        layers: arrays (Z, Y, X).
        segments: (layer, value, name) of each.
    """
    z, y, x = layers[0].shape
    lines = [
        "NRRD0004",
        "type: unsigned char",
        "dimension: 4",
        "space: left-posterior-superior",
        f"sizes: {len(layers)} {x} {y} {z}",
        "space directions: none (-0.8,0,0) (0,0.7,0) (0,0,-2.5)",
        "kinds: list domain domain domain",
        "encoding: raw",
        "space origin: (0,0,0)",
    ]
    for number, (layer, value, name) in enumerate(segments):
        lines += [
            f"Segment{number}_Layer:={layer}",
            f"Segment{number}_LabelValue:={value}",
            f"Segment{number}_Name:={name}",
        ]
    voxels = np.stack(layers, axis=-1).astype(np.uint8)
    path.write_bytes("\n".join([*lines, "", ""]).encode() + voxels.tobytes())
    return path


def test_layers_of_slicer_become_one_map_in_which_the_smaller_segment_is_kept(
    tmp_path: Path,
) -> None:
    shape = (9, 14, 17)
    liver, tumour, spleen = (np.zeros(shape, np.uint8) for _ in range(3))
    liver[2:8, 3:11, 3:12], tumour[3:5, 4:6, 4:6], spleen[7:9, 10:14, 10:17] = 1, 1, 2
    path = slicer_layers(
        tmp_path / "s.seg.nrrd",
        [np.maximum(liver, 0), tumour + spleen],
        [(0, 1, "liver"), (1, 1, "tumour"), (1, 2, "spleen")],
    )
    found = read_labels_of(scan_at(tmp_path, FLIPPED), path)
    expected = np.where(tumour > 0, 2, np.where(spleen > 0, 3, liver))[::-1, :, ::-1]
    np.testing.assert_array_equal(found.label_map.labels_ZYX, expected)
    assert found.label_map.names == ((1, "liver"), (2, "tumour"), (3, "spleen"))
    overlap = int((liver & (tumour | (spleen > 0))).sum())
    assert found.notes == (f"structures overlap in {overlap} voxels; the smaller one is kept",)


def test_layers_of_slicer_with_a_value_of_no_segment_are_refused(tmp_path: Path) -> None:
    layers = [np.ones((9, 14, 17)), np.full((9, 14, 17), 4)]
    path = slicer_layers(tmp_path / "s.seg.nrrd", layers, [(0, 1, "a"), (1, 1, "b")])
    with pytest.raises(Refused, match="not_labels: layer 1 .* holds value 4"):
        read_labels_of(scan_at(tmp_path, FLIPPED), path)
    slicer_layers(path, layers, [(0, 1, "a"), (2, 4, "b")])
    with pytest.raises(Refused, match="not_labels: a segment .* layer 2 of 2"):
        read_labels_of(scan_at(tmp_path, FLIPPED), path)


def test_a_cropped_slicer_segmentation_may_begin_at_the_first_voxel(tmp_path: Path) -> None:
    volume = scan_at(tmp_path, np.diag([0.8, 0.7, 2.5, 1.0]))
    image = SimpleITK.GetImageFromArray(np.full((3, 4, 5), 2, np.uint8))
    image.SetSpacing((0.8, 0.7, 2.5))
    image.SetMetaData("Segment0_LabelValue", "2")
    image.SetMetaData("Segment0_Name", "skin")
    SimpleITK.WriteImage(image, tmp_path / "x.seg.nrrd", True)
    labels = read_labels_of(volume, tmp_path / "x.seg.nrrd").label_map
    assert (labels.labels_ZYX[:3, :4, :5] == 2).all() and labels.labels_ZYX.sum() == 2 * 60
    assert labels.names == ((2, "skin"),)


def test_a_folder_of_masks_is_a_label_map_with_names(tmp_path: Path) -> None:
    volume, labels = scan_at(tmp_path, FLIPPED), make_labels()
    folder = tmp_path / "segmentations"
    folder.mkdir()
    for value, name in ((1, "spleen"), (256, "aorta"), (782, "liver")):
        save(folder / f"{name}.nii.gz", (labels == value).astype(np.uint8) * 255, FLIPPED)
    save(folder / "bladder.nii.gz", np.zeros_like(labels), FLIPPED)
    (folder / "statistics.json").write_text("{}")
    found = read_labels_of(volume, folder).label_map
    assert found.names == ((1, "aorta"), (2, "bladder"), (3, "liver"), (4, "spleen"))
    expected = np.select([labels == 256, labels == 782, labels == 1], [1, 3, 4], 0)
    np.testing.assert_array_equal(found.labels_ZYX, expected[::-1, :, ::-1])
    save(folder / "liver.nii.gz", labels, FLIPPED)
    with pytest.raises(Refused, match="not_labels: segmentations/liver.nii.gz holds the values"):
        read_labels_of(volume, folder)


def test_overlaps_do_not_depend_on_the_order_of_structures() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((6, 7, 8)) < share for share in (0.9, 0.3, 0.5, 0.1)]
    sizes = [int(mask.sum()) for mask in masks]
    expected = np.zeros((6, 7, 8), np.uint16)
    for number in np.argsort(sizes)[::-1]:
        expected[masks[number]] = number + 1
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        overlay = Overlay((6, 7, 8))
        for number in order:
            overlay.add(number + 1, masks[number])
        np.testing.assert_array_equal(overlay.labels_ZYX, expected)
        assert overlay.num_overlapping == sum(sizes) - int(np.any(masks, axis=0).sum())


def test_what_a_label_file_holds_raises_nothing_but_refusals(tmp_path: Path) -> None:
    volume = scan_at(tmp_path, FLIPPED)
    rng = np.random.default_rng(0)
    good = slicer_layers(
        tmp_path / "g.seg.nrrd", [np.ones((9, 14, 17))] * 2, [(0, 1, "a"), (1, 1, "b")]
    ).read_bytes()
    for _ in range(60):
        content = bytearray(good)
        for place in rng.integers(0, 500, 3):
            content[place] = rng.integers(0, 256)
        path = tmp_path / "broken.seg.nrrd"
        path.write_bytes(content)
        with contextlib.suppress(Refused):
            read_labels_of(volume, path)


def test_directions_are_part_of_the_grid() -> None:
    volume = Volume(make_ct(), (2.5, 0.7, 0.8))
    for angle, problem in ((0.2, ""), (0.6, "turned by 0.6"), (5, "turned by 5.0")):
        c, s = float(np.cos(np.radians(angle))), float(np.sin(np.radians(angle)))
        directions = ((c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0))
        labels = LabelMap(make_labels(), (2.5, 0.7, 0.8), directions=directions)
        if not problem:
            check_same_grid(volume, labels)
            continue
        with pytest.raises(Refused, match=problem):
            check_same_grid(volume, labels)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_the_stored_code_of_not_labelled_is_no_label_unless_it_is_ignored(
    tmp_path: Path, dtype: type
) -> None:
    values = make_labels().astype(dtype)
    values[:, 0, 0] = IGNORE_LABEL
    volume, file = scan_at(tmp_path, FLIPPED), save(tmp_path / "labels.nii.gz", values, FLIPPED)
    with pytest.raises(Refused, match="not_labels: .* --ignore-label 65535"):
        read_labels_of(volume, file)
    found = read_labels_of(volume, file, (IGNORE_LABEL,)).label_map
    assert (found.labels_ZYX == IGNORE_LABEL).sum() == len(values)
