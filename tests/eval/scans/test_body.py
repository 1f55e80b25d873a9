"""The rough body of a scan."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tapct.eval.scans.body import body_mask, thick_tissue


@pytest.mark.parametrize("shape", [(3, 40, 30), (2, 70, 128), (1, 33, 513)])
def test_thick_tissue_is_more_than_half_of_a_square(shape):
    tissue = np.random.default_rng(0).random(shape) > 0.5
    side = 2 * (shape[2] // 64) + 1
    share = F.avg_pool2d(
        torch.from_numpy(tissue).double()[:, None], side, stride=1, padding=side // 2
    )[:, 0]
    np.testing.assert_array_equal(thick_tissue(tissue), (share > 0.5).numpy())


def test_a_scan_of_several_slabs_equals_its_slices_one_by_one(monkeypatch):
    tissue = np.random.default_rng(1).random((7, 20, 130)) > 0.4
    one_by_one = np.concatenate([thick_tissue(slice_ZYX) for slice_ZYX in tissue[:, None]])
    monkeypatch.setattr("tapct.eval.scans.body._SLAB_VOXELS", 3 * 20 * 130)
    np.testing.assert_array_equal(thick_tissue(tissue), one_by_one)


def test_body_mask_keeps_the_lungs_and_leaves_out_air_and_table():
    hu = np.full((1, 128, 128), -1000, np.int16)
    hu[:, 30:90, 20:110] = 30
    hu[:, 45:75, 35:60] = -850
    hu[:, 110:112, 5:123] = 200
    mask = body_mask(hu)[0]
    assert mask[45:75, 35:60].all()
    assert mask[60, 22:108].all()
    assert not mask[100:].any()
    assert not mask[:25].any()


def test_the_body_is_what_lies_between_the_first_and_the_last_tissue_of_both_axes():
    hu = np.where(np.random.default_rng(3).random((2, 9, 11)) > 0.8, 0, -1000).astype(np.int16)
    hu[0, 4] = -1000  # a row without tissue
    expected = np.zeros(hu.shape, dtype=bool)
    for z, y, x in np.ndindex(hu.shape):
        row, column = hu[z, y] > -300, hu[z, :, x] > -300
        lines = ((row, x), (column, y))
        expected[z, y, x] = all(line[: at + 1].any() and line[at:].any() for line, at in lines)
    np.testing.assert_array_equal(body_mask(hu), expected)
