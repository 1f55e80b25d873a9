"""The choice of a backbone's block, and of other settings, on training patients.

Axes: D channels, Z Y X patches of the grid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor

from tapct.eval.features.dense import DenseFeatures

BLOCK_SETS = ("last", "last4", "all")


def candidate_blocks(blocks: str, num_blocks: int) -> tuple[int, ...]:
    """Numbers of the blocks to choose from, counted from 0.

    Args:
        blocks: one of BLOCK_SETS.
        num_blocks: number of blocks of the backbone.
    """
    num = {"last": 1, "last4": 4, "all": num_blocks}[blocks]
    return tuple(range(max(0, num_blocks - num), num_blocks))


def block_features(dense: DenseFeatures, blocks: str) -> dict[int, Tensor]:
    """Block -> features (D, Z, Y, X) of the blocks to choose from; one with the number -1 where
    features were computed without the numbers of blocks.
    """
    if not dense.blocks:
        return {-1: dense.features_DZYX}
    wanted = candidate_blocks(blocks, 1 + max(dense.blocks))
    return {block: dense.blocks[block].features_DZYX for block in wanted if block in dense.blocks}


class BlockChoice:
    """For each model, the block and option with the best mean score on training pairs.

    An option is any further setting that is chosen together with the block; None where there is
    none.
    """

    def __init__(self) -> None:
        self._scores: dict[str, dict[tuple[int, Hashable], list[float]]] = {}
        self._last: dict[str, int] = {}
        self._chosen: dict[str, tuple[int, Hashable]] = {}

    def add_candidates(self, model: str, blocks: Iterable[int]) -> None:
        """Note the blocks of a model; the last one is used where there is no score."""
        self._last[model] = max(blocks)

    def add_score(self, model: str, block: int, score: float, option: Hashable = None) -> None:
        """Add the score of one training pair or point; higher is better."""
        of_model = self._scores.setdefault(model, defaultdict(list))
        of_model[block, option].append(score)

    def fit(self) -> None:
        """Choose; among equal means, the later block wins."""
        for model, last in self._last.items():
            scores = self._scores.get(model, {})
            best = -float("inf")
            chosen: tuple[int, Hashable] = (last, None)
            for (block, option), values in sorted(scores.items(), key=lambda item: -item[0][0]):
                mean = sum(values) / len(values)
                if mean > best:
                    best, chosen = mean, (block, option)
            self._chosen[model] = chosen

    def option(self, model: str) -> Hashable:
        """The option chosen for a model; None without a score."""
        return self._chosen[model][1] if model in self._chosen else None

    def features(self, model: str, dense: DenseFeatures) -> Tensor:
        """Features (D, Z, Y, X) of the block chosen for a model; of the last one where there were
        no training scans.
        """
        last = max(dense.blocks, default=-1)
        block, _ = self._chosen.setdefault(model, (last, None))
        return dense.blocks[block].features_DZYX if dense.blocks else dense.features_DZYX

    def record(self, model: str, metric: str) -> dict[str, Any]:
        """What was chosen and why, for results.json.

        Args:
            model: name of the model.
            metric: name of the score.
        """
        scores = self._scores.get(model, {})
        table = {}
        for (block, option), values in sorted(scores.items(), key=lambda item: str(item[0])):
            name = f"block {block}" if option is None else f"block {block}, {option}"
            table[name] = sum(values) / len(values)
        block, _ = self._chosen[model]
        return {
            "block": block,
            "choice": {
                "metric": metric,
                "num_scores": max((len(values) for values in scores.values()), default=0),
                "means": table,
            },
        }
