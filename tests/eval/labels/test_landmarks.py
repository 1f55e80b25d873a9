"""Named points from a CSV file, in the frame of their scan."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from tapct.base.exits import UserError
from tapct.data.index.build import build_manifest
from tapct.data.packed.pack import pack
from tapct.data.packed.store import Store
from tapct.eval.labels.landmarks import read_landmarks
from tapct.eval.scans.labelled_scan import TableLabels, read_scan
from tapct.eval.scans.usable import Labels, usable

SHAPE_XYZ = (24, 20, 12)
MARK_IJK = (5, 14, 8)  # bright voxel, in the axes of the file


def turned_affine() -> np.ndarray:
    """RAS affine of an array whose first axis grows to the left and the feet come last, turned by 6
    degrees about z.
    """
    angle = np.radians(6)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:2, :2] = turn @ np.diag([-0.9, 1.1])
    affine[2, 2] = -2.5
    affine[:3, 3] = (31.5, -77.25, 410.0)
    return affine


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One scan with one bright voxel, oblique and in other axes than the store's."""
    folder = tmp_path_factory.mktemp("landmarks")
    rng = np.random.default_rng(0)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE_XYZ), indexing="ij")
    hu = np.where(x**2 + y**2 < 0.8, 40, -1000) + rng.normal(0, 10, SHAPE_XYZ)
    hu[MARK_IJK] = 2000
    (folder / "archive").mkdir()
    image = nibabel.Nifti1Image(np.rint(hu).astype(np.int16), turned_affine())
    image.header.set_xyzt_units("mm")
    nibabel.save(image, folder / "archive" / "one.nii.gz")
    found = build_manifest(folder / "archive", folder / "m.parquet", min_depth=1, workers=0)
    pack(found, folder / "store", workers=0)
    return Store(folder / "store")


def points_of(store: Store, folder: Path, content: str):
    (folder / "points.csv").write_text(content)
    return read_landmarks(folder / "points.csv", store.scans, store.places())


def mark_lps() -> np.ndarray:
    """LPS position (x, y, z) of the bright voxel, by the affine of the file alone."""
    ras = nibabel.affines.apply_affine(turned_affine(), MARK_IJK)
    return ras * (-1, -1, 1)


def test_a_point_in_mm_falls_on_its_voxel_in_the_packed_scan(store: Store, tmp_path: Path) -> None:
    x, y, z = mark_lps()
    table = points_of(store, tmp_path, f"path,name,z_mm,y_mm,x_mm\none,mark,{z},{y},{x}\n")
    (row,) = store.scans
    scan = TableLabels(landmarks=table.points).added_to(read_scan(row, store, with_labels=False))
    index = np.array(scan.landmarks_mm["mark"]) / scan.volume.spacing_mm
    bright = np.unravel_index(int(scan.volume.hu_ZYX.argmax()), scan.volume.hu_ZYX.shape)
    np.testing.assert_allclose(index, bright, atol=1e-4)
    assert table.summary == "landmarks: 1 point in 1 of 1 scan"


def test_a_point_in_voxels_is_the_same_point(store: Store, tmp_path: Path) -> None:
    (row,) = store.scans
    hu_ZYX = store.read(0)
    z, y, x = np.unravel_index(int(hu_ZYX.argmax()), hu_ZYX.shape)
    content = f"case_id;name;z_voxel;y_voxel;x_voxel\none;mark;{z};{y},0;{x}\n"
    table = points_of(store, tmp_path, content)
    wanted = np.array((z, y, x)) * row.spacing_mm
    np.testing.assert_allclose(table.points[row.id]["mark"], wanted)
    assert usable(store.scans, Labels.LANDMARKS, landmarks=table.points) == [row]
    assert usable(store.scans, Labels.LANDMARKS) == []


def test_points_outside_their_scan_are_counted_and_left_out(store: Store, tmp_path: Path) -> None:
    depth = store.scans[0].shape_ZYX[0]
    lines = "".join(f"one,p{at},{at},0,0\n" for at in (-1, -0.4, depth - 0.6, depth))
    table = points_of(store, tmp_path, "path,name,z_voxel,y_voxel,x_voxel\n" + lines)
    assert set(next(iter(table.points.values()))) == {"p-0.4", f"p{depth - 0.6}"}
    assert table.summary == "landmarks: 2 points in 1 of 1 scan; points outside their scan: 2"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("path,z_mm,y_mm,x_mm\none,1,2,3\n", "rule: name, and z_mm, y_mm, x_mm or z_voxel"),
        ("path,name,z_mm,y_mm\none,a,1,2\n", "rule: name, and"),
        ("name,z_mm,y_mm,x_mm\na,1,2,3\n", "no column that names the scans"),
        ("path,name,z_mm,y_mm,x_mm\none,,1,2,3\n", "point without a name"),
        ("path,name,z_mm,y_mm,x_mm\none,a,1,2,\n", "has x_mm ''; rule: a number"),
        ("path,name,z_mm,y_mm,x_mm\none,a,1,2,inf\n", "has x_mm 'inf'; rule: a number"),
        ("path,name,z_mm,y_mm,x_mm\none,a,9999,0,0\n", "LPS coordinates of the patient"),
        ("path,name,z_mm,y_mm,x_mm\nelse,a,1,2,3\n", "none of the 1 rows"),
        (
            "path,name,z_voxel,y_voxel,x_voxel\none,a,1,2,3\none,a,1,2,4\n",
            "two positions of a",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(
    store: Store, tmp_path: Path, content: str, part: str
) -> None:
    with pytest.raises(UserError) as caught:
        points_of(store, tmp_path, content)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_points_in_mm_need_the_origins_in_the_manifest(store: Store, tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("path,name,z_mm,y_mm,x_mm\none,a,1,2,3\n")
    with pytest.raises(UserError, match="index and pack again, or give z_voxel"):
        read_landmarks(tmp_path / "points.csv", store.scans, {})
