"""The one module that a plug-in imports; its names stay when other files of tapct are moved.

    every plug-in   `setting` describes a key of its `Config`; `UserError` is a one-line error
    a loss          inherits from `Loss`; gets `TokenSets`, returns a `LossResult` of `Term`s
    a backbone      inherits from `Backbone`; returns `Tokens`; `init` sets its first weights
    an op on views  is an `Op`: a function of a view and its `ViewKey`
    a task          inherits from `Task`, sets its `Labels`; gets `DenseFeatures` on a `PatchGrid`
                    for every `LabelledScan`; returns `TaskResults` and a `Headline`

| name | what it is for |
|---|---|
| `HeadRows` | what `Loss.prototype_rows` returns: rows that go through a loss's head |
| `LossInputs` | what `Loss.problem` and `Loss.warnings` get: crops and masks of a config |
| `CropCost`, `LayerCost` | what `Backbone.crop_cost` returns: parameters and FLOPs |
| `SnapshotTimes` | at which steps a loss needs a copy of the teacher |
| `TargetStats`, `TargetSums` | statistics of a loss's targets, from which health is logged |
| `PrototypeHead`, `HeadConfig` | the projection head of DINO and iBOT, and its config section |
| `Targets`, `TargetConfig` | a teacher's targets over prototypes: centring or Sinkhorn |
| `prototype_loss`, `PrototypeLoss`, `return_both` | fused cross-entropy over prototypes |
| `gather_with_gradient` | the tensors of all ranks, differentiable |
| `Attention`, `Mlp`, `SwiGLU`, `LayerScale`, `LayerNorm`, `DropKey` | layers of a transformer |
| `ScanScore`, `Breakdown` | a task's result on one scan; its headline metric by class |
| `FurtherMetric` | a metric beside the headline, with a value for each scan |
| `LabelLayer` | what `Task.layers` returns: a label map that the report shows slice by slice |
| `PredictedScans`, `ScanPredictions` | predictions behind a headline that is no mean over scans |
| `pairs_of`, `share_a_name` | pairs of scans, also only those with a common landmark |
| `PairedScans`, `ScanPair` | what is kept of two scans until both were read |
| `ScanRow` | what `Task.expect_scans` gets of each scan |
| `patch_truth`, `PatchTruth` | share of each label in each patch of a scan |
| `fit_decoder`, `Decoder` | a linear decoder from the features of a patch to classes |
| `Masks`, `Volume`, `LabelMap`, `ScanFacts`, `HUContract`, `AIR_HU` | shared data types |
| `Size3`, `Grid`, `patch_grid` | sizes in voxels, in patches, and from one to the other |
"""

from __future__ import annotations

from tapct.base.exits import UserError
from tapct.base.geometry import Grid, Size3, patch_grid
from tapct.config import setting
from tapct.distributed.collectives import gather_with_gradient
from tapct.eval.contract import Task
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.heads.decoder import Decoder, fit_decoder
from tapct.eval.labels.truth import PatchTruth, patch_truth
from tapct.eval.metrics.prediction_statistics import PredictedScans, ScanPredictions
from tapct.eval.pairs.partners import PairedScans, ScanPair, pairs_of, share_a_name
from tapct.eval.pictures.volumes import LabelLayer
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.scans.usable import Labels, ScanRow
from tapct.eval.scores import Breakdown, FurtherMetric, Headline, ScanScore, TaskResults
from tapct.nn import init
from tapct.nn.attention import Attention
from tapct.nn.contracts import (
    Backbone,
    CropCost,
    HeadRows,
    LayerCost,
    Loss,
    LossInputs,
    SnapshotTimes,
)
from tapct.nn.heads import Config as HeadConfig
from tapct.nn.heads import PrototypeHead
from tapct.nn.layers import DropKey, LayerScale, Mlp, SwiGLU
from tapct.nn.norm import LayerNorm
from tapct.nn.prototype_loss import PrototypeLoss, prototype_loss, return_both
from tapct.nn.prototypes import TargetConfig, Targets
from tapct.types import (
    AIR_HU,
    HUContract,
    LabelMap,
    LossResult,
    Masks,
    ScanFacts,
    TargetStats,
    TargetSums,
    Term,
    Tokens,
    TokenSets,
    Volume,
)
from tapct.views.key import Op, ViewKey

__all__ = [
    "AIR_HU",
    "Attention",
    "Backbone",
    "CropCost",
    "Breakdown",
    "Decoder",
    "DenseFeatures",
    "DropKey",
    "FurtherMetric",
    "Grid",
    "HUContract",
    "Headline",
    "HeadConfig",
    "HeadRows",
    "LabelLayer",
    "LabelMap",
    "LabelledScan",
    "LayerCost",
    "Labels",
    "LayerNorm",
    "LayerScale",
    "Loss",
    "LossInputs",
    "LossResult",
    "Masks",
    "Mlp",
    "Op",
    "PairedScans",
    "PatchGrid",
    "PatchTruth",
    "PredictedScans",
    "PrototypeHead",
    "PrototypeLoss",
    "ScanFacts",
    "Size3",
    "ScanPair",
    "ScanPredictions",
    "ScanRow",
    "ScanScore",
    "SnapshotTimes",
    "SwiGLU",
    "TargetConfig",
    "TargetStats",
    "TargetSums",
    "Targets",
    "Task",
    "TaskResults",
    "Term",
    "TokenSets",
    "Tokens",
    "UserError",
    "ViewKey",
    "Volume",
    "fit_decoder",
    "gather_with_gradient",
    "init",
    "pairs_of",
    "patch_grid",
    "patch_truth",
    "prototype_loss",
    "return_both",
    "setting",
    "share_a_name",
]
