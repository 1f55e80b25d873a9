"""How a scan was made and stored: columns of the manifest without free text of a header."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scan_files import make_ct, make_slice, save_scan

from tapct.data.index.build import build_manifest
from tapct.data.scans import technique

SHAPE_ZYX = (12, 32, 32)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", ""),
        ("SOMATOM Definition AS 64", "SOMATOM Definition 64"),
        ("Aquilion", "Aquilion"),
        ("LightSpeed VCT", "LightSpeed"),
        ("iCT 256", "iCT 256"),
        ("Dr. Mueller's scanner 1234567", "other"),
        ("Revolution Mueller", "Revolution"),
    ],
)
def test_a_model_is_a_word_of_the_list(text: str, name: str) -> None:
    assert technique.model(text) == name


def test_body_part_and_contrast_are_closed_words() -> None:
    assert [technique.body_part(text) for text in ("CHEST", "chest ", "", "Mueller")] == [
        *("CHEST", "CHEST", "", "other"),
    ]
    texts = ("", "NONE", "Ultravist 370", "no")
    assert [technique.contrast(text) for text in texts] == ["", "no", "yes", "no"]


def test_orientation_and_tilt_come_from_the_affine() -> None:
    assert technique.orientation(np.diag([1.0, 1.0, 2.0, 1.0])) == "LPS"
    assert technique.orientation(np.diag([-1.0, -1.0, -2.0, 1.0])) == "RAI"
    turned = np.eye(4)[[2, 0, 1, 3]]  # i runs along y, j along z, k along x
    assert technique.orientation(turned) == "PSL"
    assert technique.tilt_deg(np.diag([0.7, 0.7, -3.0, 1.0])) == 0
    tilted = np.diag([0.7, 0.7, 3.0, 1.0])
    tilted[1, 2] = 3.0 * math.tan(math.radians(20))
    assert technique.tilt_deg(tilted) == pytest.approx(20, abs=0.01)


def test_columns_of_a_series_and_of_a_nifti_file(tmp_path: Path) -> None:
    hu_ZYX = make_ct(SHAPE_ZYX, 1)
    (tmp_path / "a" / "s").mkdir(parents=True)
    for z, plane in enumerate(hu_ZYX):
        tags = {"KVP": "120", "SliceThickness": "3", "BodyPartExamined": "CHEST"}
        dataset = make_slice(plane, 2.0 * z, z + 1, **tags, ManufacturerModelName="Aquilion 64")
        dataset.ContrastBolusAgent = "Zebedee 300"
        dataset.save_as(tmp_path / "a" / "s" / f"{z}.dcm", enforce_file_format=True)
    save_scan(tmp_path / "a" / "n.nii.gz", make_ct(SHAPE_ZYX, 2))
    nifti, series = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert (series.model, series.kvp, series.thickness_mm) == ("Aquilion 64", 120, 3)
    assert (series.body_part, series.contrast) == ("CHEST", "yes")
    assert (series.stored_type, series.slope, series.intercept) == ("uint16", 1, -1024)
    assert (series.step_min_mm, series.step_max_mm, series.orientation) == (2, 2, "LPS")
    assert len(series.uid) == 16 and "1.2.3" not in series.uid
    assert (series.hu_min, series.hu_max) == (hu_ZYX.min(), hu_ZYX.max())
    assert series.air_share == pytest.approx(np.mean(hu_ZYX < -900), abs=0.02)
    assert (nifti.uid, nifti.model, nifti.stored_type) == ("", "", "int16")
    assert math.isnan(nifti.kvp) and math.isnan(nifti.step_min_mm)
