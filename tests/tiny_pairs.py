"""Small scans for tasks that compare two scans, with features whose places are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tapct.eval.features.dense import BlockFeatures, DenseFeatures, PatchGrid, WindowVectors
from tapct.eval.pairs.correspondence import PatchFrame, ScanFeatures
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.types import LabelMap, Volume

GRID = PatchGrid((2, 4, 4), (12, 28, 32), (12, 28, 32))
SPACING_MM = (2.0, 1.0, 1.0)


@dataclass(frozen=True)
class Row:
    """What a task is given of a scan before it is read."""

    id: str
    patient: str
    path: str = ""
    has_labels: bool = True


def scan_with(
    name: str,
    patient: str,
    landmarks_mm: Mapping[str, tuple[float, float, float]],
    labels: LabelMap | None = None,
) -> LabelledScan:
    """A scan that is body everywhere, so that every patch may be matched."""
    volume = Volume(np.full(GRID.original, 40, np.int16), SPACING_MM)
    return LabelledScan(name, volume, labels, patient, landmarks_mm=landmarks_mm)


def dense_of(*blocks_DZYX: torch.Tensor) -> DenseFeatures:
    """Features of a scan; the last block comes last."""
    blocks = {}
    for number, features in enumerate(blocks_DZYX):
        vector = features.flatten(1).mean(1)[None]
        start = torch.zeros(1, 3, dtype=torch.int64)
        windows = WindowVectors(vector, vector, vector, vector, vector[:, None][:, :0], start)
        blocks[number] = BlockFeatures(features, windows)
    last = blocks_DZYX[-1]
    return DenseFeatures(last, last.flatten(1).mean(1), GRID, blocks)


def rolled(features_DZYX: torch.Tensor, patches: int) -> torch.Tensor:
    """Features that lie some patches further to the left."""
    return torch.roll(features_DZYX, patches, 3)


def position_map(mm_P3: np.ndarray) -> np.ndarray:
    """Features (P, 4) that are linear in the position, so that interpolation is exact."""
    scaled = (np.asarray(mm_P3) - 14) / 20
    return np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)


def position_features(
    frame: PatchFrame, body_of: Callable[[np.ndarray], np.ndarray]
) -> ScanFeatures:
    """Features of a scan that show where in the body each patch lies.

    Args:
        frame: patches of the scan.
        body_of: position in the scan -> position in the body.
    """
    rows = torch.from_numpy(position_map(body_of(frame.centre_N3)))
    return ScanFeatures(frame, rows, torch.device("cpu"))
