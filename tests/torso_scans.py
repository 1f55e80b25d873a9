"""Small scans of a torso with two organs, and a small network to evaluate on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tapct.config.plugins import Plugin
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.tasks.segmentation import Config as SegmentationConfig
from tapct.models import vit
from tapct.types import LabelMap, Volume

PATCH = (2, 4, 4)
PREPROCESS = Preprocess((32, 32), (4, 16, 16), (4, 16, 16))
VIT = vit.Config(
    window=(4, 16, 16), patch=PATCH, dim=16, depth=1, heads=2, registers=0, layer_scale=1e-5
)


@dataclass(frozen=True)
class Row:
    id: str
    patient: str
    path: str
    has_labels: bool = True


def torso(seed: int) -> LabelledScan:
    """An ellipse of tissue with a bright and a dark organ."""
    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[:12, :40, :40]
    labels = np.zeros((12, 40, 40), np.uint16)
    labels[((y - 20) / 16) ** 2 + ((x - 20) / 18) ** 2 + 0 * z < 1] = 1
    centre = 14 + rng.integers(0, 4)
    labels[(abs(y - 20) < 6) & (abs(x - centre) < 6) & (z < 9)] = 2
    labels[(abs(y - 22) < 7) & (abs(x - 29) < 4) & (z > 2)] = 3
    hu = np.choose(labels, [-1000, 0, 150, -700]) + rng.normal(0, 20, labels.shape)
    names = ((1, "body"), (2, "liver"), (3, "lungs"))
    spacing_mm = (3.0, 1.0, 1.0)
    return LabelledScan(
        f"s{seed}",
        Volume(hu.astype(np.int16), spacing_mm),
        LabelMap(labels, spacing_mm, names=names),
    )


def torso_of(row: Row) -> LabelledScan:
    return torso(int(row.path))


def segmentation(**settings) -> tuple[Plugin, ...]:
    """The task with few iterations of its decoder, unless a test gives their number."""
    return (Plugin("segmentation", SegmentationConfig(**{"steps": 10} | settings)),)
