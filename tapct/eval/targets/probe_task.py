"""Tasks on labels of whole scans whose targets are predicted by heads on vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tapct.config import setting
from tapct.eval.heads.probes import SET_HEADS, HeadSettings
from tapct.eval.targets import probe_choice
from tapct.eval.targets.probe_choice import Outcome, ProbeChoice
from tapct.eval.targets.scan_task import ScanConfig, ScanTask
from tapct.eval.targets.vectors import ScanVectors


@dataclass(frozen=True)
class ProbeConfig(ScanConfig, HeadSettings):
    """What is predicted, from which vectors, by which heads."""

    folds: int = setting(
        5,
        "number of folds of training patients for the choice, if there is no official split",
        ge=2,
    )
    max_windows: int = setting(
        64, "`abmil`, `efficient`: maximum number of windows of a scan, evenly spaced", ge=1
    )


class ProbeTask(ScanTask):
    """Predict targets of whole scans by heads.

    Args:
        name: name of the task, for error messages.
        config: settings.
        heads: heads to choose from.
        seed: random seed of folds and of heads that are trained by AdamW.
    """

    def __init__(self, name: str, config: ProbeConfig, heads: Sequence[str], seed: int) -> None:
        reads_windows = any(head in SET_HEADS for head in heads)
        super().__init__(name, config, seed, config.max_windows if reads_windows else 0)
        self.head_config, self.heads = config, tuple(heads)
        for key in ("C", "attention_lr"):
            self.check_some(key, getattr(config, key))
        self.check_some("heads", heads)

    def choose(
        self, model: str, targets: Sequence[str], vectors: Mapping[str, ScanVectors]
    ) -> dict[str, ProbeChoice]:
        """Choose the probe of each target by cross-validation or on official validation scans."""
        config = self.head_config
        candidates = probe_choice.candidates(
            self.heads, config.vectors, config.blocks, config.scaling
        )
        return {
            target: probe_choice.choose(
                candidates, self.labelled(target, vectors), config, config.folds, self.seed
            )
            for target in targets
        }

    def predictions(
        self, model: str, targets: Sequence[str], vectors: ScanVectors
    ) -> dict[str, list[np.ndarray]]:
        """Predict one scan with every candidate."""
        return {
            target: [_predict(one, vectors) for one in self.choices[model][target].outcomes]
            for target in targets
        }


def _predict(outcome: Outcome, vectors: ScanVectors) -> np.ndarray:
    """Prediction of one scan: probabilities (C,), or a number ()."""
    inputs = outcome.candidate.inputs([vectors])
    assert inputs is not None, "registers are a property of the backbone, not of a scan"
    assert outcome.probe is not None, "heads are fitted"
    return np.asarray(outcome.probe.predict(inputs)[0], dtype=np.float64)
