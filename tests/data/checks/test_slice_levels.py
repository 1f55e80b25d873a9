"""Slices whose HU are shifted are refused; anatomy and legal rescaling slice by slice are not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scan_files import make_ct, refusal, write_series

from tapct.data.checks.slice_levels import check_levels
from tapct.data.scans.ingest import read_volume
from tapct.types import AIR_HU, Refused

REAL = ("ts_body/example_ct.nii.gz", "elastix_lung/3DCT_lung.nrrd", "cip_chest/ct-64.nrrd")


@pytest.fixture(scope="module")
def real_scans(real_ct: Path) -> list[np.ndarray]:
    return [read_volume(real_ct / name).hu_ZYX for name in REAL]


def test_real_scans_thick_slices_air_and_padding_are_accepted(
    real_scans: list[np.ndarray],
) -> None:
    for hu in real_scans:
        air = np.random.default_rng(0).normal(-1000, 10, (5, *hu.shape[1:])).astype(np.int16)
        padding = np.full_like(hu[:4], AIR_HU)
        quarter = hu[:, hu.shape[1] // 4 : -hu.shape[1] // 4, hu.shape[2] // 4 : -hu.shape[2] // 4]
        for view in (hu, hu[::3], hu.swapaxes(0, 1), quarter, quarter[::3]):
            check_levels(view)
        for ends in (air, padding):
            check_levels(np.concatenate([ends, hu, ends]))


@pytest.mark.parametrize("num_slices", [3, 8])
@pytest.mark.parametrize("shift", [1024, 200, -200, -500])
def test_shifted_slices_of_real_scans_are_refused(
    real_scans: list[np.ndarray], shift: int, num_slices: int
) -> None:
    for hu in real_scans:
        shifted = hu.copy()
        first = len(hu) // 2
        part = shifted[first : first + num_slices]
        part[:] = np.maximum(part + shift, AIR_HU)
        with pytest.raises(Refused, match="slices") as caught:
            check_levels(shifted)
        assert caught.value.reason == "not_hu"


def rescaled(by_slice: Callable[[int], tuple[float, float]]) -> Callable[[int], dict[str, object]]:
    def tags(index: int) -> dict[str, object]:
        slope, intercept = by_slice(index)
        return {"RescaleSlope": slope, "RescaleIntercept": intercept}

    return tags


def test_a_rescaling_of_its_own_in_every_slice_is_legal(tmp_path: Path) -> None:
    own = rescaled(lambda index: (1 + index % 3, -1024 - 7 * index))
    volume = read_volume(write_series(tmp_path / "s", make_ct(), edit=own))
    np.testing.assert_allclose(volume.hu_ZYX, make_ct(), atol=2)


@pytest.mark.parametrize("last", [6, 9])
@pytest.mark.parametrize("shift", [40, -500, 1024])
def test_a_step_where_the_intercept_changes_is_refused(
    tmp_path: Path, shift: int, last: int
) -> None:
    hu = make_ct().astype(np.int32)
    hu[4:last] += shift
    wrong = rescaled(lambda index: (1.0, -1024 + shift * (4 <= index < last)))
    folder = write_series(tmp_path / "s", hu, edit=wrong)
    assert refusal(folder) == "not_hu"
    line = rf"between the slices \d and \d of 9, where .* -1024 .*{re.escape(str(shift - 1024))}"
    with pytest.raises(Refused, match=line):
        read_volume(folder)


def test_slices_that_an_intercept_turns_into_air_are_refused(tmp_path: Path) -> None:
    hu = make_ct().astype(np.int32)
    hu[3:6] -= 1024
    wrong = rescaled(lambda index: (1.0, -2048.0 if 3 <= index < 6 else -1024.0))
    folder = write_series(tmp_path / "s", hu, edit=wrong)
    with pytest.raises(Refused, match="the slices 3 to 5 of 9 hold no body") as caught:
        read_volume(folder)
    assert caught.value.reason == "not_hu"
