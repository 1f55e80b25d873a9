"""Classification of whole scans by probes on frozen features: one probe per target and model."""

from __future__ import annotations

from dataclasses import dataclass

from tapct.config import setting
from tapct.eval.heads.probes import ABMIL, ADAMW_GRID, EFFICIENT, LOGISTIC, ClassHeadSettings
from tapct.eval.scores import Headline
from tapct.eval.targets.class_task import ClassTask
from tapct.eval.targets.probe_task import ProbeConfig, ProbeTask

HEADS = (LOGISTIC, ADAMW_GRID, ABMIL, EFFICIENT)


@dataclass(frozen=True)
class Config(ClassHeadSettings, ProbeConfig):
    """Settings of the classification of scans."""

    heads: tuple[str, ...] = setting(
        (LOGISTIC,),
        "heads to choose from: `logistic` (scikit-learn), `adamw_grid` (the grid of the CVPR 2026 "
        "challenge), `abmil` and `efficient` (attention over windows)",
        choices=HEADS,
    )


class Classification(ClassTask, ProbeTask):
    """Find the class of a scan in its frozen features."""

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__("classification", config, config.heads, seed)
        self.check_some("lr", config.lr)
        self.check_some("weight_decay", config.weight_decay)

    def headline(self) -> Headline:
        """Mean AUROC over targets."""
        meaning = (
            "AUROC of a probe on a vector of each scan from frozen features; of several classes, "
            "the mean of each class against the rest; mean over targets. Vector, block, scaling, "
            "head and its settings are chosen on validation patients."
        )
        return Headline(
            "mean AUROC", self.headline_values(), "higher", meaning, (0.0, 1.0), self.mean_of()
        )


def build(config: Config, *, seed: int) -> Classification:
    """Make the task of one evaluation.

    Args:
        config: settings.
        seed: random seed of folds and of heads that are trained by AdamW.
    """
    return Classification(config, seed)
