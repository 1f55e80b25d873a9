"""NSD and HD95 of each organ and test scan, beside the Dice of the segmentation task.

Empty organs: an organ that is not in the truth of a scan has no score there, as for Dice; the scans
where a model predicts it nevertheless are counted. An organ that the model misses has NSD 0, and as
HD95 the diagonal of the scan.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from tapct.eval.metrics.surface import Presence, surface_score
from tapct.eval.metrics.tolerances import Tolerance, tolerance_of
from tapct.eval.scores import FurtherMetric, ScanScore


class Surfaces:
    """Collects the surface distances of all models.

    Args:
        own_mm: tolerances that the user has set, by organ.
    Attributes:
        invented: model -> organ -> number of test scans without the organ where it is predicted.
    """

    def __init__(self, own_mm: Mapping[str, float] | None = None) -> None:
        self._own_mm = own_mm
        self.invented: dict[str, dict[str, int]] = {}
        self._nsd: list[ScanScore] = []
        self._hd95: list[ScanScore] = []
        self._tolerances: dict[str, Tolerance] = {}

    def add(
        self,
        model: str,
        scan_id: str,
        truth_ZYX: np.ndarray,
        prediction_ZYX: np.ndarray,
        class_of: Mapping[str, int],
        spacing_mm: Sequence[float],
    ) -> None:
        """Compare one prediction with the truth.

        Args:
            model: model name.
            scan_id: scan ID.
            truth_ZYX: true class of every voxel; IGNORE_LABEL where it does not count.
            prediction_ZYX: predicted class of every voxel.
            class_of: organ -> class.
            spacing_mm: spacing (z, y, x).
        """
        invented = self.invented.setdefault(model, defaultdict(int))
        nsd: dict[str, float] = {}
        hd95: dict[str, float] = {}
        for organ, label in class_of.items():
            tolerance = self._tolerances.setdefault(organ, tolerance_of(organ, self._own_mm))
            score = surface_score(truth_ZYX, prediction_ZYX, label, spacing_mm, tolerance.mm)
            if score.presence is Presence.INVENTED:
                invented[organ] += 1
            if math.isfinite(score.nsd):
                nsd[organ], hd95[organ] = score.nsd, score.hd95_mm
        self._nsd.append(ScanScore(scan_id, model, _mean(nsd), nsd))
        self._hd95.append(ScanScore(scan_id, model, _mean(hd95), hd95))

    def metrics(self) -> tuple[FurtherMetric, ...]:
        """NSD and HD95 as metrics beside the headline."""
        tolerances = ", ".join(f"{organ} {mm}" for organ, mm in self._tolerances.items())
        nsd = (
            f"share of the surfaces within a tolerance, mean over organs; tolerances: {tolerances}"
        )
        hd95 = "95th percentile of the surface distance in mm; a missed organ: diagonal of the scan"
        return (
            FurtherMetric("mean NSD", "higher", nsd, tuple(self._nsd), (0.0, 1.0)),
            FurtherMetric("mean HD95", "lower", hd95, tuple(self._hd95), (0.0, math.inf)),
        )


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values()))) if values else math.nan
