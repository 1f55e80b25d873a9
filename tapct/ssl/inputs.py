"""From a batch of slabs to what a step takes: views and the masks of the global ones.

B batch, V global views, N patch tokens of one crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tapct.base.geometry import Grid, Size3, patch_grid
from tapct.types import Batch, HUContract, Masks, Views
from tapct.views import masks as block_masks
from tapct.views import recipe


@dataclass(frozen=True)
class Inputs:
    """How views and masks are made; every draw is keyed by (seed, sample number).

    Args:
        views: crops and the ops on them.
        masks: block masks.
        contract: how HU become network input.
        patch: voxels (z, y, x) of a patch.
        seed: random seed of the run.
    """

    views: recipe.Config
    masks: block_masks.Config
    contract: HUContract
    patch: Size3
    seed: int

    @property
    def grid(self) -> Grid:
        """Patches of a global crop along (z, y, x)."""
        return patch_grid(self.views.global_window, self.patch, "views.global_window")

    def mask_counts(self, step: int, global_batch: int) -> list[int]:
        """Masked tokens of every global crop of an optimizer step, over all ranks and
        micro-batches, crop-major: the host knows them before the step.

        Args:
            step: finished optimizer steps.
            global_batch: samples of an optimizer step.
        """
        return block_masks.counts(
            self.masks,
            num_crops_global=self.views.num_globals * global_batch,
            num_tokens=math.prod(self.grid),
            seed=self.seed,
            step=step,
        )

    def make(
        self, batch: Batch, samples: Sequence[int], counts: Sequence[int]
    ) -> tuple[Views, Masks]:
        """Views and masks of one micro-batch, on the device of the batch.

        Args:
            batch: slabs, on the device.
            samples: numbers of its samples in the whole run, which the host knows too.
            counts: `mask_counts` of the step.
        """
        global_batch = len(counts) // self.views.num_globals
        mine = []
        for first_of_view in range(0, len(counts), global_batch):
            for sample in samples:
                mine.append(counts[first_of_view + sample % global_batch])
        views = recipe.make_views(batch, self.views, self.contract, self.seed, self.patch)
        masks = block_masks.draw(
            mine, self.grid, views.global_in_scan_VBN, batch.sample_B, self.masks, self.seed
        )
        return views, masks
