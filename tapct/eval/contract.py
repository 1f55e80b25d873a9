"""The contract of an evaluation task: which labels it needs, how it learns, what it measures.

Axes: D channels, Z Y X depth height width in patches of the grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from tapct.eval.scans.usable import Labels, ScanRow
from tapct.eval.scores import Headline, TaskResults

if TYPE_CHECKING:  # results are read without loading torch
    import numpy as np

    from tapct.eval.features.dense import DenseFeatures, PatchGrid
    from tapct.eval.metrics.prediction_statistics import PredictedScans
    from tapct.eval.pictures.volumes import LabelLayer
    from tapct.eval.scans.labelled_scan import LabelledScan, ScanValue
    from tapct.types import LabelMap

TruthT = TypeVar("TruthT")
PredictionT = TypeVar("PredictionT")

DEFAULT_TASKS = ("segmentation",)  # on unless the config switches them off


class Task(ABC, Generic[TruthT, PredictionT]):
    """One benchmark of frozen features.

    The features of all models are computed once, for all tasks, and kept in the feature cache.
    After `begin`, with the number of training scans, and `expect_scans`, the runner calls

    1. `truth` once per scan for all models of one patch grid; as a rule, all models have the same
       one;
    2. `learn` for every training scan and model, then `fit` once;
    3. `judge` for every test scan and model, and `draw` for the first few test scans;
    4. `results` and `headline` once at the end.

    The voxels of a scan are read when `scan.volume` is first used. Use it only if the task needs
    voxels: `scan.spacing_mm` and `scan.shape_ZYX` need no reading.

    A scan-level task reads `dense.cls_D` and leaves `draw` and `slices_of_interest` as they are.
    """

    labels: Labels
    prediction_format = "nifti"  # of the files with what `label_map` returns; or "dicom_seg"
    # rows of the tables that need no model, such as the identity of a registration
    own_baselines: ClassVar[tuple[str, ...]] = ()

    def named_labels(self) -> Mapping[str, tuple[str, ...]]:
        """Return setting -> label names or values in it. The runner checks before features are
        computed that each occurs in a label map, for `Labels.SCAN` among the targets of the table,
        and for `Labels.LANDMARKS` among the names of points. Words that need not occur are left
        out. A task with labels from a table gets the scans that have at least one of them.
        """
        return {}

    @property
    def needs_label_map(self) -> bool:
        """Whether `truth` reads the label map of a scan. A task with `Labels.SCAN` may read it too,
        and then gets `scan.labels`, which is None for a scan without a label map.
        """
        return self.labels in (Labels.VOXELS, Labels.PAIRS)

    @property
    def needs_training(self) -> bool:
        """Whether the task needs training scans: False where nothing is fitted or chosen."""
        return True

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Return the blocks of the backbone whose features the task reads, counted from 0. The last
        block, the default, is always computed.

        Args:
            num_blocks: number of blocks of the backbone; a model without blocks, such as raw HU,
                counts as one.
        """
        return (num_blocks - 1,)

    def begin(self, num_train: int) -> None:
        """Prepare for the training scans; called once, before the first scan.

        Args:
            num_train: number of training scans, for tasks that keep a share of the patches of each.
        """

    def expect_landmarks(self, names_of: Mapping[str, Collection[str]]) -> None:
        """Learn the names of landmarks, for tasks that need `Labels.LANDMARKS`: a task that
        compares two scans can then leave out pairs that have no point in common.

        Called once, after `begin` and before `expect_scans`.

        Args:
            names_of: scan ID -> names of its landmarks, for the training and the test scans.
        """

    def expect_scans(self, train: Sequence[ScanRow], test: Sequence[ScanRow]) -> None:
        """Learn which scans follow, for tasks that compare two scans; called once, after `begin`.

        A scan that cannot be read does not follow.

        Args:
            train: training scans of the task, in the order in which they are read.
            test: test scans, likewise. The scans of one patient follow one another.
        """

    def expect_values(
        self, train: Sequence[Mapping[str, ScanValue]], test: Sequence[Mapping[str, ScanValue]]
    ) -> None:
        """Check the values of the scans that follow, for tasks that need `Labels.SCAN`.

        Called once, after `expect_scans` and before any features are computed.

        Args:
            train: target -> value of each training scan, in the order in which they are read.
            test: the same of the test scans.
        Raises:
            UserError: no result could come of them.
        """

    @abstractmethod
    def truth(self, scan: LabelledScan, grid: PatchGrid, in_play_Z: np.ndarray) -> TruthT:
        """Compute from one scan what `learn`, `judge` and `draw` need, e.g. labels of patches.

        The result is the same for all models with this patch grid.

        Args:
            scan: the labels that the task declared, and the voxels.
            grid: patch grid of the features.
            in_play_Z: bool, True for the slices of patches that the task may use. Only where the
                same scan is in the training and in the test set are some False: those of the other
                set, and the gap between both.
        """

    @abstractmethod
    def learn(self, model: str, dense: DenseFeatures, truth: TruthT) -> None:
        """Keep what `fit` needs of one training scan and one model, e.g. some patch features."""

    @abstractmethod
    def fit(self) -> None:
        """Fit the task's own classifiers or regressions, one per model; called once, after the last
        training scan.
        """

    @abstractmethod
    def judge(self, model: str, dense: DenseFeatures, truth: TruthT) -> PredictionT:
        """Evaluate one model on one test scan; the prediction is handed to `draw`."""

    @abstractmethod
    def results(self) -> TaskResults:
        """Return all numbers, after the last test scan."""

    @abstractmethod
    def headline(self) -> Headline:
        """Return the number per model that people read, after the last test scan."""

    def predicted_scans(self) -> Mapping[str, PredictedScans]:
        """Return target -> the predictions behind a headline that is no mean over scans, such as
        AUROC, so that its interval can be computed; nothing, the default, where it is a mean.

        The headline is the mean over targets of their metrics. The patients may be left empty: the
        runner knows them.
        """
        return {}

    def label_map(self, truth: TruthT, prediction: PredictionT) -> LabelMap | None:
        """Return the prediction of one model on one test scan as a label map on the scan's grid. It
        is written in the geometry of the original file. None, the default, writes nothing.

        Args:
            truth: what `truth` returned for the scan.
            prediction: what `judge` returned.
        """
        return None

    def draw(self, path: Path, truth: TruthT, predictions: Mapping[str, PredictionT]) -> str:
        """Write a picture of one test scan.

        Args:
            path: PNG file to write; its folder may be missing.
            truth: what `truth` returned for the scan.
            predictions: model name -> what `judge` returned.
        Returns:
            The caption; empty if no picture was written.
        """
        return ""

    def draw_results(self, path: Path) -> str:
        """Write one picture of all test scans, after the last one, e.g. a curve.

        Args:
            path: PNG file to write; its folder may be missing.
        Returns:
            The caption; empty if no picture was written.
        """
        return ""

    def layers(self, truth: TruthT, predictions: Mapping[str, PredictionT]) -> Sequence[LabelLayer]:
        """Return label maps of one test scan for the viewer of the report, on the voxels of the
        scan; none, the default, shows the scan and the features alone.

        Args:
            truth: what `truth` returned for the scan.
            predictions: model name -> what `judge` returned.
        """
        return ()

    def slices_of_interest(self, truth: TruthT) -> tuple[int, int] | None:
        """Axial and coronal slice (voxels) of the feature picture; None takes the middle ones."""
        return None
