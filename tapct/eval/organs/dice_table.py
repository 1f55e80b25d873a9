"""Dice of organs as the headline and the table of the segmentation task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tapct.eval.scans.usable import Labels
from tapct.eval.scores import Breakdown, Headline, ScanScore


def headline(values: Mapping[str, float], resolution: str, mean_of: str = "") -> Headline:
    """The mean Dice of each model as a headline.

    Args:
        values: model name -> mean Dice.
        resolution: `patch` or `voxel`.
        mean_of: what the values are means of.
    """
    meaning = (
        "Dice of a linear decoder on frozen features, mean over organs, counted at "
        f"{resolution} resolution. Everything but the backbone is equal."
    )
    return Headline("mean Dice", values, "higher", meaning, (0.0, 1.0), mean_of)


def by_organ(organs: Sequence[str], dice_of: Mapping[str, Mapping[str, float]]) -> Breakdown | None:
    """Rows of organs from the Dice of each model; None without any organ."""
    if not organs:
        return None
    values: dict[str, dict[str, float]] = {}
    for organ in organs:
        values[organ] = {model: dice[organ] for model, dice in dice_of.items() if organ in dice}
    return Breakdown("Dice of each organ", "organ", values)


def section_from_schema_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Bring results.json of schema 1, which held this task alone, into the form of schema 2.

    Args:
        content: the whole file.
    Returns:
        The section of this task.
    """
    models: Mapping[str, Any] = content["models"]
    organs = content.get("organs") or []
    if not organs:
        for numbers in models.values():
            organs += [organ for organ in numbers.get("dice", {}) if organ not in organs]
    scans = []
    for model, numbers in models.items():
        for scan, parts in numbers.get("per_scan", {}).items():
            dice = [value for value in parts.values() if isinstance(value, float)]
            mean = float(np.mean(dice)) if dice else float("nan")
            scans.append(asdict(ScanScore(scan, model, mean, parts)))
    means = {model: numbers.get("mean_dice") for model, numbers in models.items()}
    dice_of = {model: numbers.get("dice", {}) for model, numbers in models.items()}
    table = by_organ(organs, dice_of)
    split = content.get("split", {})
    return {
        "config": content.get("task_config", {}),
        "labels": Labels.VOXELS.value,
        "num_train": len(split.get("train", ())),
        "num_test": len(split.get("test", ())),
        "headline": asdict(headline(means, content.get("resolution", "voxel"))),
        "models": models,
        "breakdown": None if table is None else asdict(table),
        "scans": scans,
        "pictures": content.get("overlays", []),
    }
