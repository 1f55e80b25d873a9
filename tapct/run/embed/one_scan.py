"""Features of one scan outside of an evaluation, from the feature cache where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from tapct.base.exits import UserError
from tapct.data.digest import voxel_digest
from tapct.eval.cache import CacheSink, FeatureCache, ModelKey
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.features.extraction import Extractor, Sink, dense_features, dense_of, patch_of
from tapct.eval.features.prepared import prepare
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.stopwatch import Stopwatch
from tapct.nn.contracts import num_blocks_of
from tapct.types import HUContract, Volume

S = TypeVar("S", bound=Sink)


@dataclass(frozen=True)
class ScanEncoder:
    """A frozen model that computes the features of scans, one after the other.

    Args:
        model: backbone on `device`.
        key: key of the model in the cache.
        contract: HU to network input.
        preprocess: windows.
        device: device of the model.
        cache: feature cache; None computes every scan.
        batch: windows per forward call.
    """

    model: nn.Module
    key: ModelKey
    contract: HUContract
    preprocess: Preprocess
    device: torch.device
    cache: FeatureCache | None = None
    batch: int = 8

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the model."""
        return num_blocks_of(self.model)

    @contextlib.contextmanager
    def using_cache(self) -> Iterator[None]:
        """Keep the features of this model in the cache, if there is one, while it is used."""
        with contextlib.ExitStack() as stack:
            if self.cache is not None:
                stack.enter_context(self.cache.in_use([self.key]))
            yield

    def features(self, volume: Volume, blocks: Sequence[int]) -> DenseFeatures:
        """Dense features of a scan.

        Args:
            volume: scan.
            blocks: blocks beside the last one.
        Raises:
            UserError: the cache cannot be used.
        """
        if self.cache is None:
            return dense_features(
                self.model,
                volume.hu_ZYX,
                self.contract,
                self.preprocess,
                batch=self.batch,
                device=self.device,
                spacing_mm=volume.spacing_mm,
                blocks=blocks,
            )
        return self._through(self.cache, volume, sorted({*blocks, self.num_blocks - 1}))

    def extract(
        self, volume: Volume, blocks: Sequence[int], sink_of: Callable[[PatchGrid], S]
    ) -> S:
        """Compute the features of a scan without the cache; finished rows of patches go to a sink,
        so that the memory does not depend on the number of slices.

        Args:
            volume: scan.
            blocks: blocks to compute.
            sink_of: function that makes the sink for a patch grid.
        Returns:
            The sink, which has received everything.
        """
        prepared = prepare(
            volume.hu_ZYX,
            self.contract,
            self.preprocess,
            patch_of(self.model),
            self.device,
            volume.spacing_mm,
        )
        sink = sink_of(prepared.grid)
        extractor = Extractor(self.model, self.preprocess, batch=self.batch)
        extractor.add(prepared, blocks, sink)
        extractor.flush()
        return sink

    def grid_of(self, volume: Volume) -> PatchGrid:
        """The patch grid of a scan."""
        z, y, x = volume.hu_ZYX.shape
        patch = patch_of(self.model)
        return PatchGrid.of_scan((z, y, x), self.preprocess, patch, volume.spacing_mm)

    def _through(self, cache: FeatureCache, volume: Volume, blocks: Sequence[int]) -> DenseFeatures:
        """Features from the cache, into which the missing ones are written first."""
        scan = self.key.scan(voxel_digest(volume.hu_ZYX), volume.spacing_mm)
        patch, grid = patch_of(self.model), self.grid_of(volume)
        found = {block: cache.load(self.key, scan, block, self.device) for block in blocks}
        absent = [block for block, entry in found.items() if entry is None or entry[1] != grid]
        if absent:
            cache.prepare(self.key, "embed")
            sink = CacheSink(cache, self.key, scan, absent, grid, "tapct embed", Stopwatch())
            prepared = prepare(
                volume.hu_ZYX, self.contract, self.preprocess, patch, self.device, volume.spacing_mm
            )
            try:
                extractor = Extractor(self.model, self.preprocess, batch=self.batch)
                extractor.add(prepared, absent, sink)
                extractor.flush()
            finally:
                sink.abandon()
            found |= {block: cache.load(self.key, scan, block, self.device) for block in absent}
        entries = {block: entry[0] for block, entry in found.items() if entry is not None}
        if len(entries) < len(blocks):
            raise UserError(
                f"features in {cache.folder} were removed as soon as they were written; choose "
                "another folder with --cache"
            )
        return dense_of(entries, self.num_blocks - 1, grid, self.preprocess.window)
