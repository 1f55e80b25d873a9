"""The models of an evaluation: their own settings, the blocks that tasks read, and their key in the
feature cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tapct.base.exits import UserError
from tapct.base.geometry import Size3
from tapct.eval.cache import ModelKey, model_key
from tapct.eval.contract import Task
from tapct.eval.features.dense import PatchGrid
from tapct.eval.features.extraction import patch_of
from tapct.eval.features.preprocess import Preprocess
from tapct.nn.contracts import num_blocks_of
from tapct.types import HUContract


@dataclass(frozen=True)
class NamedModel:
    """A frozen backbone under the name that results carry.

    Args:
        name: name in the results.
        model: backbone. With `load`, it only answers what patch and blocks it has, and may lie on
            the meta device.
        contract: its own HU contract; None for that of the evaluation.
        preprocess: its own preprocessing; None for that of the evaluation.
        load: function that makes the backbone with its weights. It is called only if features are
            missing in the cache.
        weights: text that stands for the weights that `load` makes.
    """

    name: str
    model: nn.Module
    contract: HUContract | None = None
    preprocess: Preprocess | None = None
    load: Callable[[], nn.Module] | None = None
    weights: str = ""

    def loaded(self) -> nn.Module:
        """The backbone with its weights."""
        return self.model if self.load is None else self.load()


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with all that an evaluation settles about it.

    Args:
        named: model.
        contract: HU to network input.
        preprocess: how scans are prepared for it.
        patch: voxels (z, y, x) of its patch.
        blocks: blocks whose features tasks read, ascending; the last block is one of them.
        key: key in the feature cache.
    """

    named: NamedModel
    contract: HUContract
    preprocess: Preprocess
    patch: Size3
    blocks: tuple[int, ...]
    key: ModelKey

    @property
    def name(self) -> str:
        """Name in the results."""
        return self.named.name

    @property
    def last(self) -> int:
        """Number of the last block."""
        return num_blocks_of(self.named.model) - 1

    def grid(self, shape_ZYX: Sequence[int], spacing_mm: Sequence[float]) -> PatchGrid:
        """The patch grid of a scan of this shape and spacing in mm."""
        return PatchGrid.of_scan(shape_ZYX, self.preprocess, self.patch, spacing_mm)


def settle(
    models: Sequence[NamedModel],
    tasks: Iterable[tuple[str, Task[Any, Any]]],
    *,
    contract: HUContract,
    preprocess: Preprocess,
    device: torch.device,
) -> tuple[EvaluatedModel, ...]:
    """Settle contract, preprocessing, blocks and key of each model.

    Args:
        models: models, at least one.
        tasks: names and tasks.
        contract: HU contract of models without their own.
        preprocess: preprocessing of models without their own.
        device: device that features are computed on.
    Raises:
        UserError: no model, two of one name, windows off the patch grid of a model, or a task that
            reads a block that a model does not have.
    """
    tasks = list(tasks)
    names = [model.name for model in models]
    if not names:
        raise UserError("an evaluation needs at least one model, got none")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models of one evaluation are called {name}; rename one of them")
    settled = []
    for named in models:
        own_contract, own_preprocess = named.contract or contract, named.preprocess or preprocess
        patch = patch_of(named.model)
        try:
            own_preprocess.cell(patch)
        except UserError as error:
            raise UserError(f"model {named.name}: {error}") from error
        key = model_key(named.model, own_contract, own_preprocess, device, named.weights)
        blocks = _blocks(named, tasks)
        settled.append(EvaluatedModel(named, own_contract, own_preprocess, patch, blocks, key))
    return tuple(settled)


def _blocks(named: NamedModel, tasks: Iterable[tuple[str, Task[Any, Any]]]) -> tuple[int, ...]:
    """The blocks of a model that tasks read, and the last one."""
    num_blocks = num_blocks_of(named.model)
    blocks = {num_blocks - 1}
    for name, task in tasks:
        for block in task.blocks(num_blocks):
            if not 0 <= block < num_blocks:
                raise UserError(
                    f"task {name} reads block {block} of model {named.name}, which has the blocks "
                    f"0 to {num_blocks - 1}"
                )
            blocks.add(block)
    return tuple(sorted(blocks))
