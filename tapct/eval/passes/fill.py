"""Fills the feature cache for the scans of an evaluation, and reads features from it.

A scan is read only if features of it are missing, once for all models; the next scan is read and
prepared in a thread meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from tapct.base.exits import UserError, single_line
from tapct.base.geometry import Size3
from tapct.data.packed.packed_scan import Damaged
from tapct.data.packed.store import Store
from tapct.eval.cache import CacheSink, FeatureCache
from tapct.eval.features.dense import BlockFeatures, DenseFeatures, PatchGrid
from tapct.eval.features.extraction import Extractor, dense_of
from tapct.eval.features.prepared import Prepared, prepare
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.stopwatch import LOAD, PREPARE, READ, Stopwatch
from tapct.eval.models.evaluated import EvaluatedModel
from tapct.eval.passes.ahead import one_ahead
from tapct.eval.scans import labelled_scan
from tapct.eval.scans.labelled_scan import LabelledScan, StoredVolume
from tapct.eval.scans.usable import ScanRow
from tapct.types import HUContract, Refused

# what a prepared scan depends on
Setting: TypeAlias = tuple[HUContract, Preprocess, Size3]


@dataclass(frozen=True)
class Wanted:
    """A scan with missing features.

    Args:
        scan: scan.
        blocks: for each model with missing features, its number and the blocks.
    """

    scan: LabelledScan
    blocks: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Ready:
    """A scan that was read and prepared.

    Args:
        inputs: prepared scan by setting.
        unreadable: reason why it cannot be read; empty where it can.
    """

    inputs: Mapping[Setting, Prepared]
    unreadable: str = ""


class Features:
    """The features of the scans and models of one evaluation.

    Args:
        models: models.
        store: packed scans.
        cache: feature cache.
        batch: windows per call.
        device: device that features are computed on and read to.
    Attributes:
        stopwatch: seconds by part.
        unreadable: scan ID -> reason why the scan could not be read.
        num_extracted: pairs of scan and model whose features were computed.
    """

    def __init__(
        self,
        models: Sequence[EvaluatedModel],
        store: Store,
        cache: FeatureCache,
        *,
        batch: int,
        device: torch.device,
    ) -> None:
        self.models, self.store, self.cache = models, store, cache
        self.batch, self.device = batch, device
        self.stopwatch = Stopwatch()
        self.unreadable: dict[str, str] = {}
        self.num_extracted = 0
        self._loaded: dict[int, nn.Module] = {}

    def missing(self, rows: Iterable[ScanRow]) -> list[Wanted]:
        """The scans that lack features of some model; features of equal models count once."""
        wanted = []
        for row in rows:
            scan = labelled_scan.read_scan(row, self.store, with_labels=False)
            blocks: dict[int, tuple[int, ...]] = {}
            claimed: set[tuple[str, int]] = set()
            for number, model in enumerate(self.models):
                absent = self.cache.missing(model.key, self._scan_key(model, scan), model.blocks)
                new = tuple(b for b in absent if (model.key.text, b) not in claimed)
                claimed.update((model.key.text, block) for block in new)
                if new:
                    blocks[number] = new
            if blocks:
                wanted.append(Wanted(scan, blocks))
        return wanted

    def fill(
        self,
        wanted: Sequence[Wanted],
        *,
        check: Callable[[], None] = lambda: None,
        done: Callable[[int], None] = lambda num: None,
    ) -> None:
        """Compute features and write them into the cache.

        Args:
            wanted: scans with missing features.
            check: function that is called after a scan that cannot be read; it may raise.
            done: function that is called with the number of pairs of scan and model that were
                computed, or are not, because the scan cannot be read.
        """
        if not wanted:
            return
        with ExitStack() as stack:
            sinks: list[CacheSink] = []
            stack.callback(lambda: abandon(sinks))
            extractors: dict[int, Extractor] = {}
            for one, ready in one_ahead(wanted, self._make_ready):
                if ready.unreadable:
                    self.unreadable[one.scan.id] = ready.unreadable
                    check()
                for number, blocks in one.blocks.items():
                    if not ready.unreadable:
                        extractor = self._extractor(extractors, number)
                        sink = self._sink(number, one.scan, blocks)
                        sinks.append(sink)
                        extractor.add(ready.inputs[_setting(self.models[number])], blocks, sink)
                        self.num_extracted += 1
                    done(1)
                sinks = [sink for sink in sinks if sink.left]
            for extractor in extractors.values():
                extractor.flush()

    def release(self) -> None:
        """Free the weights that were loaded to compute features."""
        self._loaded.clear()

    def load(self, scan: LabelledScan, model: EvaluatedModel) -> DenseFeatures:
        """The features of a scan from the cache. What is missing or damaged is computed again.

        Args:
            scan: scan.
            model: model.
        Raises:
            Damaged: the features are missing, and the scan cannot be read.
        """
        key = self._scan_key(model, scan)
        blocks: dict[int, BlockFeatures] = {}
        for block in model.blocks:
            with self.stopwatch.part(LOAD):
                found = self.cache.load(model.key, key, block, self.device)
            if found is None or found[1] != model.grid(scan.shape_ZYX, scan.spacing_mm):
                found = self._again(scan, model, key, block)
            blocks[block] = found[0]
        self.cache.alive()
        return dense_of(blocks, model.last, model.grid(scan.shape_ZYX, scan.spacing_mm))

    def num_bytes(self, scan: LabelledScan, model: EvaluatedModel) -> int:
        """Bytes of the features of a scan in memory, about."""
        z, y, x = model.grid(scan.shape_ZYX, scan.spacing_mm).shape
        dim = int(getattr(model.named.model, "dim", 1))
        return 4 * z * y * x * dim * len(model.blocks)

    def _again(
        self, scan: LabelledScan, model: EvaluatedModel, key: str, block: int
    ) -> tuple[BlockFeatures, PatchGrid]:
        """Compute one entry that has vanished or is damaged."""
        number = self.models.index(model)
        source = LabelledScan(scan.id, scan.source)  # so that the voxels are freed afterwards
        self.fill([Wanted(source, {number: (block,)})])
        if scan.id in self.unreadable:
            raise Damaged(self.unreadable[scan.id])
        found = self.cache.load(model.key, key, block, self.device)
        if found is None:
            raise UserError(
                f"the features of scan {scan.id} were removed from {self.cache.folder} as soon as "
                "they were written; raise eval.cache.quota_gb, or choose another eval.cache.path"
            )
        return found

    def _make_ready(self, wanted: Wanted) -> Ready:
        try:
            with self.stopwatch.part(READ):
                source = wanted.scan.source
                volume = source.read() if isinstance(source, StoredVolume) else source
        except (Refused, Damaged, OSError) as error:
            return Ready({}, single_line(error))
        inputs: dict[Setting, Prepared] = {}
        with self.stopwatch.part(PREPARE):
            for number in wanted.blocks:
                setting = contract, preprocess, patch = _setting(self.models[number])
                if setting not in inputs:
                    inputs[setting] = prepare(
                        volume.hu_ZYX, contract, preprocess, patch, self.device, volume.spacing_mm
                    )
        return Ready(inputs)

    def _extractor(self, extractors: dict[int, Extractor], number: int) -> Extractor:
        if number not in extractors:
            model = self.models[number]
            self.cache.prepare(model.key, model.name)
            if number not in self._loaded:
                self._loaded[number] = model.named.loaded()
            extractors[number] = Extractor(
                self._loaded[number],
                model.preprocess,
                batch=self.batch,
                stopwatch=self.stopwatch,
            )
        return extractors[number]

    def _sink(self, number: int, scan: LabelledScan, blocks: tuple[int, ...]) -> CacheSink:
        model = self.models[number]
        return CacheSink(
            self.cache,
            model.key,
            self._scan_key(model, scan),
            blocks,
            model.grid(scan.shape_ZYX, scan.spacing_mm),
            f"model {model.name}, scan {scan.id}",
            self.stopwatch,
        )

    @staticmethod
    def _scan_key(model: EvaluatedModel, scan: LabelledScan) -> str:
        return model.key.scan(scan.digest, scan.spacing_mm)


def abandon(sinks: Iterable[CacheSink]) -> None:
    """Remove what these sinks have half written."""
    for sink in sinks:
        sink.abandon()


def _setting(model: EvaluatedModel) -> Setting:
    return model.contract, model.preprocess, model.patch
