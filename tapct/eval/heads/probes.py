"""Heads on the vectors of scans: a target from frozen features.

    logistic     logistic regression over a grid of C, in float64
    ridge        ridge regression over a grid of C = 1 / alpha, in float64
    adamw_grid   a linear layer for each pair of a learning rate and a weight decay, by AdamW
    abmil        gated attention pooling over windows, by AdamW
    efficient    efficient probing over windows, by AdamW

A head is fitted with all members of its grid; the task chooses one on validation patients.

Axes: N scans, D channels, W windows, C classes, G members of a grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tapct.base.exits import UserError
from tapct.base.extras import installing
from tapct.config import setting
from tapct.eval.heads import probe_training
from tapct.eval.heads.probe_training import (
    Architecture,
    EfficientProbe,
    GatedAttention,
    Linear,
    Recipe,
)

LOGISTIC, RIDGE, ADAMW_GRID, ABMIL, EFFICIENT = (
    "logistic",
    "ridge",
    "adamw_grid",
    "abmil",
    "efficient",
)
SET_HEADS = (ABMIL, EFFICIENT)  # heads on the windows of a scan; the others read one vector
SCALINGS = ("zscore", "raw")
# every fourth of the 45 values 10^linspace(-6, 5, 45) of DINOv2
C_GRID = tuple(float(10.0**power) for power in range(-6, 6))
MAX_ITERATIONS = 1000

Inputs = Sequence[np.ndarray]  # of each scan: float64 (D,), or float32 (W, D) for windows
Settings = Mapping[str, float]
Predict = Callable[[Inputs], np.ndarray]  # probabilities (N, C), or numbers (N,)
ATTENTION_DECAY = 1e-2  # weight decay of `abmil` and `efficient`, the default of torch.optim.AdamW
PREDICTION_BATCH = 256  # scans


@dataclass(frozen=True)
class HeadSettings:
    """Grids of the heads, and how they are trained."""

    C: tuple[float, ...] = setting(
        C_GRID,
        "`logistic`, `ridge`: inverse strengths of the L2 penalty to choose from, as in "
        "scikit-learn; in ridge regression, alpha is 1 / C",
        gt=0,
    )
    attention_lr: tuple[float, ...] = setting(
        (1e-4, 1e-3, 1e-2), "`abmil`, `efficient`: learning rates", gt=0
    )
    epochs: int = setting(
        150,
        "heads trained by AdamW (all but `logistic` and `ridge`): epochs; CVPR 2026 challenge on "
        "general CT diagnosis",
        ge=1,
    )
    warmup_epochs: int = setting(
        5,
        "heads trained by AdamW: number of epochs of warm-up; after them, the learning rate "
        "follows a cosine; CVPR 2026 challenge",
        ge=0,
    )
    batch_size: int = setting(
        128, "heads trained by AdamW: scans per step; CVPR 2026 challenge", ge=1
    )
    hidden: int = setting(128, "`abmil`: channels of the attention", ge=1)
    queries: int = setting(8, "`efficient`: number of queries", ge=1)


@dataclass(frozen=True)
class ClassHeadSettings:
    """Settings of heads that are for classes only."""

    class_weight: str = setting(
        "none",
        "`logistic`: `none`, or `balanced` for weights in inverse proportion to the frequency of "
        "the classes, as in scikit-learn; `adamw_grid` always balances",
        choices=("none", "balanced"),
    )
    lr: tuple[float, ...] = setting(
        tuple(float(10.0 ** (-5 + step / 3)) for step in range(13)),
        "`adamw_grid`: learning rates; CVPR 2026 challenge on general CT diagnosis",
        gt=0,
    )
    weight_decay: tuple[float, ...] = setting(
        (1e-5, 1e-4, 1e-3, 1e-2),
        "`adamw_grid`: weight decays; each of them is combined with each learning rate; CVPR 2026 "
        "challenge",
        ge=0,
    )


@dataclass(frozen=True)
class Target:
    """The target of some scans.

    Args:
        values_N: int64 classes from 0, or float64 numbers.
        num_classes: number of classes; 0 for numbers.
    """

    values_N: np.ndarray
    num_classes: int = 0

    def rows(self, index: np.ndarray) -> Target:
        """The target of some of the scans."""
        return Target(self.values_N[index], self.num_classes)


@dataclass(frozen=True)
class Scaler:
    """Brings the channels of all scans to one scale, and fills in vectors that a scan lacks.

    Args:
        shift_D: float64, subtracted.
        scale_D: float64, divided by.
        fill_D: float64, mean of the training scans, for a vector that is NaN.
    """

    shift_D: np.ndarray
    scale_D: np.ndarray
    fill_D: np.ndarray

    @classmethod
    def of(cls, inputs: Inputs, scaling: str) -> Scaler:
        """Fit to training scans.

        Args:
            inputs: vectors or sets of windows.
            scaling: `zscore` or `raw`.
        """
        dim = np.shape(inputs[0])[-1]
        known = [one for one in inputs if not np.isnan(one).any()]
        num_rows = sum(len(np.atleast_2d(one)) for one in known)
        # scan by scan, because the windows of all scans together may be large
        mean_D = np.zeros(dim)
        for one in known:
            mean_D += np.atleast_2d(one).sum(0, dtype=np.float64) / num_rows
        if scaling == "raw" or not num_rows:
            return cls(np.zeros(dim), np.ones(dim), mean_D)
        variance_D = np.zeros(dim)
        for one in known:
            variance_D += ((np.atleast_2d(one) - mean_D) ** 2).sum(0) / num_rows
        deviation_D = np.sqrt(variance_D)
        # a channel that is constant up to rounding carries nothing
        constant_D = deviation_D <= 1e-12 * np.abs(mean_D)
        return cls(mean_D, np.where(constant_D, np.inf, deviation_D), mean_D)

    def __call__(self, one: np.ndarray) -> np.ndarray:
        """Scale one vector or one set of windows; the result has the precision of the input."""
        filled: np.ndarray = np.where(np.isnan(one), self.fill_D, one)
        scaled: np.ndarray = ((filled - self.shift_D) / self.scale_D).astype(one.dtype)
        return scaled


@dataclass(frozen=True)
class Fitted:
    """One fitted member of a head's grid.

    Args:
        settings: its settings, e.g. C.
        predict: function from scaled vectors, or sets of windows, to probabilities (N, C), or to
            numbers (N,).
    """

    settings: Settings
    predict: Predict


@dataclass(frozen=True)
class FittedProbe:
    """A fitted member with the scaling that it was fitted with."""

    scaler: Scaler
    member: Fitted

    def predict(self, inputs: Inputs) -> np.ndarray:
        """Probabilities (N, C), or numbers (N,), of some scans."""
        return self.member.predict([self.scaler(one) for one in inputs])


def grid(head: str, config: HeadSettings) -> tuple[Settings, ...]:
    """The members of a head."""
    if head in (LOGISTIC, RIDGE):
        return tuple({"C": value} for value in sorted(config.C))
    if head in SET_HEADS:
        return tuple({"lr": lr} for lr in config.attention_lr)
    own = _of_classes(config)
    pairs = [(lr, decay) for lr in own.lr for decay in own.weight_decay]
    return tuple({"lr": lr, "weight_decay": decay} for lr, decay in pairs)


def _of_classes(config: HeadSettings) -> ClassHeadSettings:
    return config if isinstance(config, ClassHeadSettings) else ClassHeadSettings()


def fit(
    head: str,
    inputs: Inputs,
    target: Target,
    members: Sequence[Settings],
    config: HeadSettings,
    seed: int,
) -> list[Fitted]:
    """Fit members of a head's grid.

    Args:
        head: name of the head.
        inputs: scaled vectors, or sets of windows for `SET_HEADS`.
        target: target of the scans.
        members: members, from `grid`.
        config: how heads are trained.
        seed: random seed of heads that are trained by AdamW.
    """
    present = np.unique(target.values_N)
    if target.num_classes and len(present) == 1:  # nothing to learn: always this class
        probability_C = np.eye(target.num_classes)[present[0]]
        return [
            Fitted(settings, lambda some: np.tile(probability_C, (len(some), 1)))
            for settings in members
        ]
    if head == LOGISTIC:
        return _logistic(np.stack(inputs), target, members, _of_classes(config).class_weight)
    if head == RIDGE:
        return _ridge(np.stack(inputs), target, members)
    return _trained(head, inputs, target, members, config, seed)


def _logistic(
    x_ND: np.ndarray, target: Target, members: Sequence[Settings], class_weight: str
) -> list[Fitted]:
    """Logistic regression of scikit-learn by L-BFGS. Each C, ascending, begins at the solution of
    the C before it.

    With more channels than scans, the weights lie in the space that the scans span, because the
    penalty removes everything else. So x is rotated into that space, and the weights back.
    """
    model, warning = _scikit_learn(class_weight)
    rotation_DK: np.ndarray | None = None
    reduced_NK = x_ND
    if x_ND.shape[1] > x_ND.shape[0]:
        rotation_DK, triangle_KN = np.linalg.qr(x_ND.T)
        reduced_NK = triangle_KN.T
    fitted = []
    for settings in members:
        model.set_params(C=settings["C"])
        with warnings.catch_warnings():
            # raw features may be on very different scales
            warnings.simplefilter("ignore", warning)
            model.fit(reduced_NK, target.values_N)
        weight_CK: np.ndarray = model.coef_
        weight_CD = weight_CK if rotation_DK is None else weight_CK @ rotation_DK.T
        linear = _LinearClasses(
            weight_CD.copy(), model.intercept_.copy(), model.classes_, target.num_classes
        )
        fitted.append(Fitted(settings, linear))
    return fitted


def _scikit_learn(class_weight: str) -> tuple[Any, type[Warning]]:
    """The estimator, and the warning that it has not converged.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError(
            "the head `logistic` needs scikit-learn, which is not installed: "
            + installing("eval", "scikit-learn")
        ) from error
    model = LogisticRegression(
        max_iter=MAX_ITERATIONS,
        tol=1e-6,
        warm_start=True,
        class_weight=None if class_weight == "none" else class_weight,
    )
    return model, ConvergenceWarning


@dataclass(frozen=True)
class _LinearClasses:
    """Probabilities of classes from a linear layer.

    Args:
        weight_CD: weights of the classes that were learned; one row for two classes.
        bias_C: biases.
        classes: numbers of these classes.
        num_classes: number of classes of the target; the others have the probability 0.
    """

    weight_CD: np.ndarray
    bias_C: np.ndarray
    classes: np.ndarray
    num_classes: int

    def __call__(self, inputs: Inputs) -> np.ndarray:
        logits_NC = np.stack(inputs) @ self.weight_CD.T + self.bias_C
        if logits_NC.shape[1] == 1:
            logits_NC = np.concatenate([np.zeros_like(logits_NC), logits_NC], axis=1)
        probability_NC = np.zeros((len(inputs), self.num_classes))
        probability_NC[:, self.classes] = softmax(logits_NC)
        return probability_NC


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Probabilities from logits, along the last axis."""
    exponent_NC = np.exp(logits_NC - logits_NC.max(-1, keepdims=True))
    shares_NC: np.ndarray = exponent_NC / exponent_NC.sum(-1, keepdims=True)
    return shares_NC


def _ridge(x_ND: np.ndarray, target: Target, members: Sequence[Settings]) -> list[Fitted]:
    """Ridge regression for all penalties from one decomposition; the bias is not penalised.

    With X centred and X X^T (or X^T X, whichever is smaller) = Q diag(L) Q^T, the weights are
    X^T Q diag(1 / (L + alpha)) Q^T y (or Q diag(1 / (L + alpha)) Q^T X^T y).
    """
    mean_D, mean = x_ND.mean(0), float(target.values_N.mean())
    centred_ND, y_N = x_ND - mean_D, target.values_N - mean
    is_wide = x_ND.shape[1] > x_ND.shape[0]
    inner_KK = centred_ND @ centred_ND.T if is_wide else centred_ND.T @ centred_ND
    level_K, basis_KK = np.linalg.eigh(inner_KK)
    level_K = level_K.clip(min=0)
    along_K = basis_KK.T @ (y_N if is_wide else centred_ND.T @ y_N)
    fitted = []
    for settings in members:
        solution_K = basis_KK @ (along_K / (level_K + 1.0 / settings["C"]))
        weight_D = centred_ND.T @ solution_K if is_wide else solution_K
        fitted.append(Fitted(settings, _LinearNumber(weight_D, mean - float(mean_D @ weight_D))))
    return fitted


@dataclass(frozen=True)
class _LinearNumber:
    """A number from a linear layer."""

    weight_D: np.ndarray
    bias: float

    def __call__(self, inputs: Inputs) -> np.ndarray:
        numbers_N: np.ndarray = np.stack(inputs) @ self.weight_D + self.bias
        return numbers_N


def _trained(
    head: str,
    inputs: Inputs,
    target: Target,
    members: Sequence[Settings],
    config: HeadSettings,
    seed: int,
) -> list[Fitted]:
    """Members that are trained by AdamW. Numbers are standardised for the training."""
    architectures: dict[str, Architecture] = {
        ADAMW_GRID: Linear(),
        ABMIL: GatedAttention(config.hidden),
        EFFICIENT: EfficientProbe(config.queries),
    }
    architecture = architectures[head]
    mean, deviation = 0.0, 1.0
    values_N = torch.from_numpy(target.values_N)
    if not target.num_classes:
        mean = float(target.values_N.mean())
        deviation = float(target.values_N.std()) or 1.0
        values_N = ((values_N - mean) / deviation).float()
    parameters = probe_training.train(
        architecture,
        [_float32(one) for one in inputs],
        values_N,
        target.num_classes or 1,
        [settings["lr"] for settings in members],
        [settings.get("weight_decay", ATTENTION_DECAY) for settings in members],
        Recipe(config.epochs, config.warmup_epochs, config.batch_size, seed=seed),
    )
    fitted = []
    for number, settings in enumerate(members):
        own = {name: values[number : number + 1].clone() for name, values in parameters.items()}
        predict = _TrainedHead(architecture, own, target.num_classes, mean, deviation)
        fitted.append(Fitted(settings, predict))
    return fitted


@dataclass(frozen=True)
class _TrainedHead:
    """Predictions of a member that was trained by AdamW.

    Args:
        architecture: head.
        parameters: parameters of this member alone.
        num_classes: number of classes; 0 for numbers.
        mean, deviation: of the training target, for numbers.
    """

    architecture: Architecture
    parameters: dict[str, torch.Tensor] = field(repr=False)
    num_classes: int
    mean: float
    deviation: float

    def __call__(self, inputs: Inputs) -> np.ndarray:
        pieces = []
        for first in range(0, len(inputs), PREDICTION_BATCH):
            some = [_float32(one) for one in inputs[first : first + PREDICTION_BATCH]]
            with torch.no_grad():
                outputs_GBC = self.architecture.outputs(
                    self.parameters, *probe_training.padded(some)
                )
            pieces.append(outputs_GBC[0].double().numpy())
        outputs_NC = np.concatenate(pieces)
        if self.num_classes:
            return softmax(outputs_NC)
        numbers: np.ndarray = outputs_NC[:, 0] * self.deviation + self.mean
        return numbers


def _float32(one: np.ndarray) -> np.ndarray:
    """Windows of one scan; a vector counts as one window."""
    return np.atleast_2d(np.asarray(one, dtype=np.float32))
