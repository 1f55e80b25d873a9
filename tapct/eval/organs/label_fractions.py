"""The label-fraction curve of the segmentation task: Dice by the number of labelled patients.

A number counts patients, and a drawn patient brings all of its training scans. The draws are fixed
by the seed of the evaluation and equal for all models. They are nested: in one draw, the patients
of a smaller number are among those of a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tapct.base import console, rng
from tapct.base.counted import counted
from tapct.eval.organs.fitting import FittedDecoder, KeptPatches
from tapct.eval.results.old_formats import metric_name
from tapct.eval.scores import FurtherMetric, ScanScore


@dataclass(frozen=True)
class Draw:
    """One draw of some patients.

    Args:
        num: number of patients.
        number: number of the draw, from 0.
    """

    num: int
    number: int


class LabelFractions:
    """Fits the decoders of the curve and collects their Dice.

    Args:
        nums: numbers of patients.
        num_draws: draws for each number.
        seed: random seed of the evaluation.
    """

    def __init__(self, nums: Sequence[int], num_draws: int, seed: int) -> None:
        self.nums = tuple(sorted(set(nums)))
        self.num_draws, self.seed = num_draws, seed
        self._decoders: dict[str, dict[Draw, FittedDecoder]] = {}
        # model -> draw -> scan -> organ -> Dice
        self._dice: dict[str, dict[Draw, dict[str, Mapping[str, float]]]] = {}

    def fit(
        self,
        model: str,
        kept: Sequence[KeptPatches],
        fitted: Callable[[Sequence[KeptPatches]], FittedDecoder],
    ) -> None:
        """Fit the decoders of one model.

        Args:
            model: model name.
            kept: training patches by scan.
            fitted: function that fits a decoder to the patches of some scans.
        """
        patients = labelled_patients(kept)
        decoders = self._decoders.setdefault(model, {})
        for num in self.nums:
            for number in range(self.num_draws if num < len(patients) else 0):
                drawn = patients_of_draw(patients, num, number, self.seed)
                few = [one for one in kept if one.patient in drawn]
                decoders[Draw(num, number)] = fitted(few)

    def report(self, num_patients: int) -> None:
        """Print which numbers are left out, since that many patients are not there to be drawn.

        Args:
            num_patients: number of training patients.
        """
        too_large = [str(num) for num in self.nums if num >= num_patients]
        if too_large:
            console.say(
                f"label fractions: {', '.join(too_large)} left out, because there are "
                f"{counted(num_patients, 'training patient')}; the headline is the value with all"
            )

    def decoders(self, model: str) -> Iterator[tuple[Draw, FittedDecoder]]:
        """The decoders of one model."""
        yield from self._decoders.get(model, {}).items()

    def add(self, model: str, draw: Draw, scan: str, dice: Mapping[str, float]) -> None:
        """Keep the Dice of the organs of one test scan."""
        self._dice.setdefault(model, {}).setdefault(draw, {})[scan] = dice

    def curve(
        self,
        model: str,
        mean_by_organ: Callable[[Mapping[str, Mapping[str, float]]], Mapping[str, float]],
    ) -> dict[str, list[float]]:
        """Number of patients -> mean Dice of each draw; empty without a curve.

        Args:
            model: model name.
            mean_by_organ: function from the Dice of all test scans to that of each organ.
        """
        curve: dict[str, list[float]] = {}
        by_draw = self._dice.get(model, {})
        for draw in sorted(by_draw, key=lambda draw: (draw.num, draw.number)):
            means = mean_by_organ(by_draw[draw])
            if means:
                curve.setdefault(str(draw.num), []).append(float(np.mean(list(means.values()))))
        return curve

    def metrics(self) -> tuple[FurtherMetric, ...]:
        """One metric for each number of patients; the Dice of a scan is the mean over the draws."""
        found = []
        for num in self.nums:
            scans: list[ScanScore] = []
            for model, by_draw in self._dice.items():
                of_num = [per_scan for draw, per_scan in by_draw.items() if draw.num == num]
                scans += [_mean_of_draws(scan, model, of_num) for scan in (of_num or [{}])[0]]
            if scans:
                meaning = (
                    f"mean Dice of decoders fitted to {counted(num, 'labelled patient')}, "
                    f"mean over {counted(self.num_draws, 'draw')}"
                )
                found.append(
                    FurtherMetric(metric_name(num), "higher", meaning, tuple(scans), (0.0, 1.0))
                )
        return tuple(found)


def _mean_of_draws(
    scan: str, model: str, by_draw: Sequence[Mapping[str, Mapping[str, float]]]
) -> ScanScore:
    """Dice of each organ of one scan, which the same organs have in every draw."""
    parts = {
        organ: float(np.mean([per_scan[scan][organ] for per_scan in by_draw]))
        for organ in by_draw[0][scan]
    }
    return ScanScore(scan, model, float(np.mean(list(parts.values()))) if parts else np.nan, parts)


def labelled_patients(kept: Iterable[KeptPatches]) -> list[str]:
    """The patients with training patches. A patient whose voxels all are to be ignored has none."""
    return sorted({one.patient for one in kept if len(one.features_KD)})


def patients_of_draw(patients: Sequence[str], num: int, draw: int, seed: int) -> frozenset[str]:
    """The patients of one draw. Those of a smaller number are part of those of a larger one.

    Args:
        patients: all training patients; scan IDs where they are unknown.
        num: number of patients to draw.
        draw: number of the draw.
        seed: random seed of the evaluation.
    """

    def place(patient: str) -> tuple[int, str]:
        return rng.hash_int(seed, "label fraction", draw, rng.purpose_id(patient)), patient

    return frozenset(sorted(set(patients), key=place)[:num])
