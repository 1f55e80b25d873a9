"""Vectors of whole scans equal plain loops over patches and windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tapct.base.exits import UserError
from tapct.eval.features.dense import BlockFeatures, DenseFeatures, PatchGrid, WindowVectors
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.targets import vectors
from tapct.types import LabelMap, Volume

GRID = PatchGrid((2, 4, 4), (4, 8, 8), (4, 8, 8))
EVERYTHING = (*vectors.PARTS, "mask:liver")


def dense_of(num_blocks: int, num_windows: int = 3, num_registers: int = 2) -> DenseFeatures:
    """Random features of every block."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    blocks = {}
    for number in range(num_blocks):
        windows = WindowVectors(
            random(num_windows, 3),
            random(num_windows, 3),
            random(num_windows, 3),
            random(num_windows, 3),
            random(num_windows, num_registers, 3),
            torch.zeros(num_windows, 3, dtype=torch.int64),
        )
        blocks[number] = BlockFeatures(random(3, *GRID.shape), windows)
    last = blocks[num_blocks - 1]
    return DenseFeatures(last.features_DZYX, last.windows.cls_WD.mean(0), GRID, blocks)


def scan_with_liver() -> LabelledScan:
    labels = np.zeros(GRID.original, np.uint16)
    labels[0:2, 0:4, 0:6] = 3  # a whole patch, and half of the next one
    volume = Volume(np.zeros(GRID.original, np.int16), (1.0, 1.0, 1.0))
    return LabelledScan("s", volume, LabelMap(labels, (1.0, 1.0, 1.0), names=((3, "Liver"),)))


def test_every_vector_equals_a_loop() -> None:
    dense = dense_of(2)
    shares = vectors.organ_shares(scan_with_liver(), GRID, EVERYTHING)
    found = vectors.scan_vectors(dense, EVERYTHING, ("last",), shares=shares)
    block = dense.blocks[1]
    patches_ND = block.features_DZYX.flatten(1).T.numpy()
    windows = block.windows
    expected = {
        "cls": windows.cls_WD.numpy().mean(0),
        "mean": patches_ND.mean(0),
        "cls_mean": np.concatenate([windows.cls_WD.numpy().mean(0), patches_ND.mean(0)]),
        "mean_std_max": np.concatenate([patches_ND.mean(0), patches_ND.std(0), patches_ND.max(0)]),
        "registers": np.concatenate(list(windows.registers_WRD.numpy().mean(0))),
        "mask:liver": (patches_ND[0] * 1.0 + patches_ND[1] * 0.5) / 1.5,
    }
    for name, vector_D in expected.items():
        own = found.vector(name, "last")
        assert own is not None and own.dtype == np.float64
        assert own == pytest.approx(vector_D, abs=1e-6), name


def test_blocks_are_the_last_the_middle_and_the_last_four() -> None:
    assert vectors.block_numbers("middle", 12) == (5,)
    assert vectors.block_numbers("last4", 12) == (8, 9, 10, 11)
    assert vectors.block_numbers("last4", 1) == vectors.block_numbers("middle", 1) == (0,)
    assert vectors.blocks_to_read(("last4", "middle", "last"), 6) == (2, 3, 4, 5)
    dense = dense_of(6)
    found = vectors.scan_vectors(dense, ("mean",), ("last4", "middle"))
    pieces = [dense.blocks[n].features_DZYX.mean((1, 2, 3)).numpy() for n in (2, 3, 4, 5)]
    assert found.vector("mean", "last4") == pytest.approx(np.concatenate(pieces), abs=1e-6)
    assert found.vector("mean", "middle") == pytest.approx(pieces[0], abs=1e-6)


def test_windows_are_evenly_spaced_where_there_are_many() -> None:
    dense = dense_of(1, num_windows=9)
    windows = dense.blocks[0].windows
    both_WD = torch.cat([windows.cls_WD, windows.mean_WD], dim=1).numpy()
    few = vectors.scan_vectors(dense, ("cls",), ("last",), max_windows=3).window_set("last")
    assert (few == both_WD[[0, 4, 8]]).all()
    all_of_them = vectors.scan_vectors(dense, ("cls",), ("last",), max_windows=50)
    assert (all_of_them.window_set("last") == both_WD).all()


def test_what_a_backbone_or_a_scan_lacks_is_no_vector_of_zeros() -> None:
    found = vectors.scan_vectors(dense_of(1, num_registers=0), EVERYTHING, ("last",))
    assert found.vector("registers", "last") is None
    of_liver = found.vector("mask:liver", "last")
    assert of_liver is not None and np.isnan(of_liver).all()
    assert vectors.organ_shares(scan_with_liver(), GRID, ("mask:spleen", "mean")) == {}
    plain = DenseFeatures(torch.ones(3, *GRID.shape), torch.arange(3.0), GRID)
    known = vectors.scan_vectors(plain, ("cls_mean",), ("last4",), max_windows=4)
    assert known.vector("cls_mean", "last4").tolist() == [0, 1, 2, 1, 1, 1]
    assert known.window_set("last").tolist() == [[0, 1, 2, 1, 1, 1]]


def test_an_unknown_vector_is_an_error() -> None:
    with pytest.raises(UserError, match=r"vectors has 'max', which is none of cls, mean,.*ORGAN"):
        vectors.check_vectors(("cls", "max"), "eval.tasks.classification.vectors")
    with pytest.raises(UserError, match="vectors is empty"):
        vectors.check_vectors((), "eval.tasks.classification.vectors")
