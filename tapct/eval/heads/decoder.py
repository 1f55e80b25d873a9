"""Decoders from the features of a patch to classes, for tasks on frozen features.

Axes: N patches in (z, y, x) raster order, K training patches, D channels, C classes, O classes of
the Dice term, Z Y X patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Decoder(Protocol):
    """A fitted map from features to class logits."""

    def logits_NC(self, features_ND: Tensor) -> Tensor:
        """Class logits of patches, float32 (N, C).

        Args:
            features_ND: features of the patches, float32.
        """


@dataclass(frozen=True)
class LinearDecoder:
    """The fitted linear map, standardisation folded in: logits = features @ weight_DC + bias_C."""

    weight_DC: Tensor
    bias_C: Tensor

    def logits_NC(self, features_ND: Tensor) -> Tensor:
        """Class logits of patches, float32 (N, C)."""
        return torch.addmm(self.bias_C, features_ND, self.weight_DC)


def fit_decoder(
    features_KD: Tensor,
    target_KC: Tensor,
    *,
    l2: float,
    steps: int,
    class_power: float = 1.0,
    dice_weight: float = 0.0,
    dice_classes: Sequence[int] = (),
) -> LinearDecoder:
    """Fit a linear map by full-batch L-BFGS from zero weights: deterministic, no learning rate.

    Minimises, over the training patches,

        cross-entropy with class weights (n / n_c) ^ class_power
        + dice_weight * (1 - mean soft Dice of `dice_classes`)
        + l2 / 2 * |weights|^2, on standardised features

    where n_c is the mass of class c and n that of all classes. With `class_power` 1 every class
    counts alike however small it is; with 0 every patch does. Without the Dice term the problem is
    convex. Neighbouring voxels and channels are strongly correlated, so the solver works in
    coordinates that whiten the features: the minimum is the same and is reached in fewer steps.

    Args:
        features_KD: float32, any scale; standardised here by their weighted training statistics.
        target_KC: float32 >= 0, share of each class in each patch, times the number of patches
            that it stands for.
        l2: weight of the penalty.
        steps: L-BFGS iterations, the same number for every model.
        class_power: exponent of the class weights.
        dice_weight: weight of the Dice term.
        dice_classes: classes whose soft Dice is maximised; those without mass are left out.
    """
    mass_C = target_KC.sum(0)
    wanted_KC = target_KC * class_weights(target_KC, class_power)
    wanted_KC = wanted_KC / wanted_KC.sum()  # sums to 1: the cross-entropy is a weighted mean
    share_K1 = wanted_KC.sum(1, keepdim=True)
    mean_D, std_D = _mean_and_std(features_KD, share_K1)
    x_KD = (features_KD - mean_D) / std_D
    whiten_DD = _whitening((x_KD * share_K1).T @ x_KD, 10 * l2)
    white_KD = x_KD @ whiten_DD
    # class-major rows and a gradient by hand: four times as fast as autograd over (K, C) on a CPU
    white_DK, wanted_CK, share_1K = (t.T.contiguous() for t in (white_KD, wanted_KC, share_K1))
    dice = SoftDice(target_KC, [c for c in dice_classes if mass_C[c] > 0], dice_weight)
    code_CD = torch.zeros(target_KC.shape[1], x_KD.shape[1], device=x_KD.device)
    bias_C1 = torch.zeros(target_KC.shape[1], 1, device=x_KD.device)
    solver = _solver([code_CD, bias_C1], steps)

    def objective() -> Tensor:
        weight_CD = code_CD @ whiten_DD.T
        log_p_CK = torch.addmm(bias_C1, code_CD, white_DK).log_softmax(0)
        loss = 0.5 * l2 * weight_CD.square().sum() - (wanted_CK * log_p_CK).sum()
        p_CK = log_p_CK.exp_()
        # derivative of the cross-entropy by the logits
        error_CK = p_CK * share_1K - wanted_CK
        if dice:
            loss += dice.add(p_CK, error_CK)
        code_CD.grad = error_CK @ white_KD + l2 * (weight_CD @ whiten_DD)
        bias_C1.grad = error_CK.sum(1, keepdim=True)
        return loss

    with torch.no_grad():
        solver.step(objective)
        weight_DC = (whiten_DD @ code_CD.T) / std_D[:, None]
        return LinearDecoder(weight_DC, bias_C1[:, 0] - mean_D @ weight_DC)


def _mean_and_std(features_KD: Tensor, share_K1: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation of each channel."""
    mean_D = (features_KD * share_K1).sum(0)
    std_D = ((features_KD - mean_D).square() * share_K1).sum(0).sqrt()
    # a constant channel carries no information: keep it near 0
    return mean_D, std_D.clamp_min(1e-6 * max(float(std_D.max()), 1e-30))


def _solver(parameters: list[Tensor], steps: int) -> torch.optim.LBFGS:
    """L-BFGS with a line search, so that it needs no learning rate."""
    return torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        max_eval=2 * steps,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )


def class_weights(target_KC: Tensor, power: float) -> Tensor:
    """Weights (n / n_c) ^ power of the classes, float32 (C,); 0 for a class without mass.

    Args:
        target_KC: mass of each class in each patch.
        power: 0: every patch counts alike; 1: every class does.
    """
    mass_C = target_KC.sum(0)
    weight_C = (mass_C.sum() / mass_C.clamp_min(1e-12)) ** power
    return torch.where(mass_C > 0, weight_C, torch.zeros_like(weight_C))


class SoftDice:
    """weight * (1 - mean over classes of 2 sum(m p) / (sum(M p) + sum(m))).

    m is the mass of the class in a patch, M that of all classes, p the predicted probability.

    Args:
        target_KC: mass of each class in each patch.
        classes: classes of the mean.
        weight: factor of the term.
    """

    def __init__(self, target_KC: Tensor, classes: Sequence[int], weight: float) -> None:
        rows = list(classes)
        self.num, self.weight = len(rows), weight
        are_neighbours = bool(rows) and rows == list(range(rows[0], rows[-1] + 1))
        # rows that are chosen by a list are copied at each use, those of a slice are not
        self.rows = slice(rows[0], rows[-1] + 1) if are_neighbours else rows
        self.mass_OK = target_KC.T[self.rows].contiguous()  # O classes of the mean
        self.all_K = target_KC.sum(1)

    def __bool__(self) -> bool:
        return self.num > 0 and self.weight > 0

    def add(self, p_CK: Tensor, error_CK: Tensor) -> Tensor:
        """The value of the term; adds its derivative by the logits to `error_CK`.

        Args:
            p_CK: probabilities of all classes.
            error_CK: derivative of the other terms, changed in place.
        """
        p_OK = p_CK[self.rows]
        hit_O1 = torch.linalg.vecdot(self.mass_OK, p_OK)[:, None]
        both_O1 = (p_OK @ self.all_K + self.mass_OK.sum(1))[:, None]
        factor = self.weight / self.num
        # derivative by the probabilities, then through the softmax: p_j (g_j - sum_i g_i p_i)
        #     g = -2 factor (m / both - M hit / both^2)
        slope_OK = self.mass_OK * (-2 * factor / both_O1)
        slope_OK.addcmul_(2 * factor * hit_O1 / both_O1.square(), self.all_K)
        slope_OK *= p_OK
        error_CK[self.rows] += slope_OK
        error_CK.addcmul_(p_CK, slope_OK.sum(0), value=-1)
        return self.weight - factor * 2 * (hit_O1 / both_O1).sum()


def _whitening(covariance_DD: Tensor, floor: float) -> Tensor:
    """Matrix P with P' (covariance + floor) P = 1; float32."""
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    # balanced cross-entropy curves by about a tenth of the covariance, so 10 * l2 there matches the
    # penalty
    return (vectors_DD * (values_D.clamp_min(0) + max(floor, 1e-6)).rsqrt()).float()
