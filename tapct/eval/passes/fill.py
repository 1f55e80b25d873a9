"""Fills the feature cache for the scans of an evaluation, and reads features from it.

A scan is read only if features of it are missing, once for all models; the next scan is read and
prepared in a thread meanwhile.
"""

from __future__ import annotations

from collections import Counter
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
from tapct.eval.cache import CacheNotWritable, CacheSink, FeatureCache
from tapct.eval.features.dense import BlockFeatures, DenseFeatures, PatchGrid
from tapct.eval.features.extraction import Extractor, dense_of
from tapct.eval.features.prepared import Prepared, prepare
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.stopwatch import LOAD, PREPARE, READ, Stopwatch
from tapct.eval.models.evaluated import EvaluatedModel
from tapct.eval.passes.ahead import one_ahead
from tapct.eval.passes.failures import LeftOut, ends_all
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
        inputs: prepared scan by setting, or the error of preparing it.
        unreadable: reason why it cannot be read; empty where it can.
    """

    inputs: Mapping[Setting, Prepared | Exception]
    unreadable: str = ""

    def input_of(self, setting: Setting) -> Prepared:
        """The prepared scan. Raises: the error of preparing it."""
        found = self.inputs[setting]
        if isinstance(found, Exception):
            raise found
        return found


class Features:
    """The features of the scans and models of one evaluation.

    A model that fails is left out, and the features of the others are computed. The first model is
    the one that the evaluation is about: its error is raised.

    Args:
        models: models.
        store: packed scans.
        cache: feature cache.
        batch: windows per call.
        device: device that features are computed on and read to.
    Attributes:
        models: models that have not failed; failed ones are in it until `release`.
        stopwatch: seconds by part.
        unreadable: scan ID -> reason why the scan could not be read.
        failures: models that have failed.
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
        self.failures = LeftOut("model", [model.name for model in models], models[0].name)
        self._num_extracted: Counter[str] = Counter()
        self._loaded: dict[int, nn.Module] = {}

    @property
    def num_extracted(self) -> int:
        """Pairs of scan and model whose features were computed, without models that failed."""
        return self._num_extracted.total()

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
            sinks: dict[int, list[CacheSink]] = {}
            stack.callback(lambda: abandon(sink for some in sinks.values() for sink in some))
            extractors: dict[int, Extractor] = {}
            for one, ready in one_ahead(wanted, self._make_ready):
                if ready.unreadable:
                    self.unreadable[one.scan.id] = ready.unreadable
                    check()
                for number, blocks in one.blocks.items():
                    name = self.models[number].name
                    if not ready.unreadable and name in self.failures.left:
                        try:
                            extractor = self._extractor(extractors, number)
                            sink = self._sink(number, one.scan, blocks)
                            of_model = [sink for sink in sinks.get(number, []) if sink.left]
                            sinks[number] = [*of_model, sink]
                            extractor.add(
                                ready.input_of(_setting(self.models[number])), blocks, sink
                            )
                            self._num_extracted[name] += 1
                        except Exception as error:
                            self._fail(number, f"scan {one.scan.id}", error)
                            abandon(sinks.pop(number, []))
                            extractors.pop(number, None)
                    done(1)
            for number, extractor in extractors.items():
                try:
                    extractor.flush()
                except Exception as error:
                    self._fail(number, "the last scans", error)
                    abandon(sinks.pop(number, []))

    def release(self) -> None:
        """Free the weights that were loaded to compute features, and forget the models that have
        failed.
        """
        self._loaded.clear()
        self.models = tuple(each for each in self.models if each.name in self.failures.left)

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
        grid = model.grid(scan.shape_ZYX, scan.spacing_mm)
        return dense_of(blocks, model.last, grid, model.preprocess.window)

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
        if model.name in self.failures.reasons:  # too late to leave it out: tasks have seen it
            raise UserError(f"model {model.name}: {self.failures.reasons[model.name]}")
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
        inputs: dict[Setting, Prepared | Exception] = {}
        with self.stopwatch.part(PREPARE):
            for number in wanted.blocks:
                setting = contract, preprocess, patch = _setting(self.models[number])
                if setting in inputs:
                    continue
                try:
                    inputs[setting] = prepare(
                        volume.hu_ZYX, contract, preprocess, patch, self.device, volume.spacing_mm
                    )
                except Exception as error:  # raised again when a model with this setting is due
                    inputs[setting] = error
        return Ready(inputs)

    def _fail(self, number: int, scan: str, error: Exception) -> None:
        """Leave out a model that has failed, and those whose features are equal: nobody computes
        them now.

        Raises:
            Exception: the error, if it is no fault of the model, or the first model is among these.
        """
        if isinstance(error, CacheNotWritable) or ends_all(error):
            raise error
        failed = self.models[number]
        equal = [each for each in self.models if each.key.text == failed.key.text]
        for each in sorted(equal, key=lambda each: each.name != self.failures.needed):
            self.failures.leave_out(each.name, f"computing the features of {scan}", error)
            self._num_extracted.pop(each.name, None)
        self._loaded.pop(number, None)

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
