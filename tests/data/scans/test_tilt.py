"""Gantry tilt is resampled: compared with the scene from which both grids are computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scan_files import write_series

from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest
from tapct.data.packed import pack
from tapct.data.readers.raw import Image
from tapct.data.scans.ingest import read_volume
from tapct.data.scans.read_rules import ReadRules
from tapct.data.scans.tilt import is_tilted, upright
from tapct.types import AIR_HU, Refused

SIZES = (40, 48, 12)
SPACING = (2.0, 1.5, 4.0)
RESAMPLED = ReadRules(resample_tilt=True)


def body(mm: np.ndarray) -> np.ndarray:
    """HU of an analytic body at LPS places (..., 3): a soft ellipsoid with a gradient."""
    x, y, z = np.moveaxis(mm - [5.0, -3.0, 20.0], -1, 0)
    radius = np.sqrt((x / 26) ** 2 + (y / 22) ** 2 + (z / 40) ** 2)
    inside = 1 / (1 + np.exp(12 * (radius - 1)))
    return AIR_HU + inside * (1064 + 2 * x - 1.5 * y + z)


def tilted_affine(degrees: float, axis: str) -> np.ndarray:
    """Slices whose planes are tilted about an axis of the body, moved along the table."""
    angle = np.radians(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = {
        "x": np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]),
        "y": np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]),
    }[axis]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = turn[:, 0] * SPACING[0], turn[:, 1] * SPACING[1]
    affine[:3, 2] = [0, 0, SPACING[2]]
    affine[:3, 3] = [-35, -38, -3]
    return affine


def places_mm(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    index_IJK3 = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index_IJK3 @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("degrees, axis", [(20, "x"), (-15, "x"), (8, "y")])
def test_resampled_voxels_are_those_of_the_body_at_their_place(degrees: float, axis: str) -> None:
    affine = tilted_affine(degrees, axis)
    image = Image(np.rint(body(places_mm(affine, SIZES))).astype(np.int16), affine)
    assert is_tilted(affine)
    made = upright(image)
    directions = made.affine[:3, :3] / np.linalg.norm(made.affine[:3, :3], axis=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)
    expected = body(places_mm(made.affine, made.voxels_IJK.shape))
    covered = made.voxels_IJK > AIR_HU
    error = np.abs(made.voxels_IJK - expected)[covered]
    assert covered.mean() > 0.6
    assert np.median(error) < 1
    assert np.percentile(error, 99) < 15  # at the edge of the body, of 1064 HU
    wrong = np.abs(image.voxels_IJK - body(places_mm(made.affine, SIZES)))
    assert np.percentile(wrong, 99) > 200  # the same voxels, taken for a grid with right angles


def test_slope_and_intercept_are_applied_and_low_padding_is_air() -> None:
    affine = tilted_affine(10, "x")
    hu = np.rint(body(places_mm(affine, SIZES)))
    plain = upright(Image(hu.astype(np.int16), affine))
    stored = (hu + 1024) * 2
    stored[:, :4] = -5000
    hu[:, :4] = AIR_HU
    scaled = upright(Image(stored, affine, slope=0.5, intercept=-1024.0))
    np.testing.assert_array_equal(scaled.voxels_IJK, upright(Image(hu, affine)).voxels_IJK)
    assert scaled.voxels_IJK.shape == plain.voxels_IJK.shape
    assert scaled.voxels_IJK.min() == AIR_HU


@pytest.mark.parametrize("edit", ["upright", "in the plane", "steep", "nan"])
def test_only_the_lean_of_a_stack_is_a_tilt(edit: str) -> None:
    affine = tilted_affine(20, "x")
    changes: dict[str, Callable[[], object]] = {
        "upright": lambda: affine.__setitem__((slice(None, 3), 2), [0, 0, 0]),
        "in the plane": lambda: affine.__setitem__((0, 1), 0.8),
        "steep": lambda: affine.__setitem__((1, 2), 9.0),
        "nan": lambda: affine.__setitem__((1, 2), np.nan),
    }
    changes[edit]()
    assert not is_tilted(affine)


def test_a_tilted_series_is_refused_or_resampled_with_a_mark(tmp_path: Path) -> None:
    affine = tilted_affine(20, "x")
    hu_IJK = np.rint(body(places_mm(affine, SIZES))).astype(np.int16)
    row, column = affine[:3, 0] / SPACING[0], affine[:3, 1] / SPACING[1]

    def edit(k: int) -> dict[str, object]:
        return {
            "ImagePositionPatient": (affine[:3, 3] + k * affine[:3, 2]).tolist(),
            "ImageOrientationPatient": [round(float(v), 9) for v in (*row, *column)],
            "PixelSpacing": [SPACING[1], SPACING[0]],
        }

    folder = write_series(tmp_path / "a" / "s", hu_IJK.transpose(2, 1, 0), edit=edit)
    with pytest.raises(Refused, match="sheared"):
        read_volume(folder)
    volume = read_volume(folder, accept=RESAMPLED)
    assert volume.marks == ("tilt_resampled",)
    np.testing.assert_allclose(volume.spacing_mm, (4 * np.cos(np.radians(20)), 1.5, 2.0), rtol=1e-6)
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet", accept=RESAMPLED)
    assert [(scan.status, scan.marks) for scan in built.rows] == [("accepted", "tilt_resampled")]
    report = pack.pack(Manifest.read(tmp_path / "m.parquet"), tmp_path / "store")
    assert len(report.packed) == 1  # packed as it was indexed
