"""The voxels of a test scan that count for the Dice of organs, and Dice from a confusion matrix.

Axes: N patches in (z, y, x) raster order, C classes, Z Y X voxels.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tapct.eval.labels.truth import PatchTruth
from tapct.types import IGNORE_LABEL


def dice_from_confusion(confusion_CC: np.ndarray, class_index: int) -> float:
    """2 |A and B| / (|A| + |B|) of one class; rows of the confusion matrix are truth, columns
    prediction.
    """
    hit = float(confusion_CC[class_index, class_index])
    total = float(confusion_CC[class_index].sum() + confusion_CC[:, class_index].sum())
    return 2 * hit / total if total else float("nan")


class CountedVoxels:
    """The voxels of a test scan that count, and predictions at them.

    Args:
        truth: truth of the scan.
        classes_ZYX: true class of every voxel.
    """

    def __init__(self, truth: PatchTruth, classes_ZYX: np.ndarray) -> None:
        self.grid = truth.grid
        self.in_play_Z = truth.in_play_Z[self.grid.patch_of_voxel(0, self.grid.original[0])]
        self.counts_ZYX = truth.scan.label_map.labels_ZYX[self.in_play_Z] != IGNORE_LABEL
        self.true = classes_ZYX[self.in_play_Z][self.counts_ZYX]

    def predicted(self, logits_NC: Tensor) -> np.ndarray:
        """Class of every voxel of the scan, uint16, from logits on the patch grid."""
        return self.grid.argmax_voxels(logits_NC.T.unflatten(1, self.grid.shape))

    def with_ignored(self, truth: PatchTruth) -> np.ndarray:
        """True class of every voxel, uint16; IGNORE_LABEL at voxels that do not count."""
        classes_ZYX = np.full(truth.scan.label_map.labels_ZYX.shape, IGNORE_LABEL, dtype=np.uint16)
        in_play = classes_ZYX[self.in_play_Z]
        in_play[self.counts_ZYX] = self.true
        classes_ZYX[self.in_play_Z] = in_play
        return classes_ZYX

    def pairs(self, predicted_ZYX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True and predicted class of each voxel that counts."""
        return self.true, predicted_ZYX[self.in_play_Z][self.counts_ZYX]
