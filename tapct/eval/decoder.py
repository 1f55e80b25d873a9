"""A linear decoder from the features of a patch to classes, for tasks on frozen features.

Axes: N patches in (z, y, x) raster order, K training patches, D channels, C classes, Z Y X patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.eval.features import DenseFeatures


@dataclass(frozen=True)
class Decoder:
    """The fitted linear map, standardisation folded in: logits = features @ weight_DC + bias_C."""

    weight_DC: Tensor
    bias_C: Tensor

    def logits_CZYX(self, dense: DenseFeatures) -> Tensor:
        """Class logits on the patch grid, float32."""
        logits_NC = torch.addmm(self.bias_C, dense.tokens_ND(), self.weight_DC)
        return logits_NC.T.unflatten(1, dense.grid.shape)


def fit_decoder(features_KD: Tensor, target_KC: Tensor, *, l2: float, steps: int) -> Decoder:
    """Fit a class-balanced multinomial regression by full-batch L-BFGS: convex and deterministic.

    Minimises the mean over classes of the mean cross-entropy of that class, plus
    l2 / 2 * |weights|^2 on standardised features. Neighbouring voxels and channels are strongly
    correlated, so the solver works in coordinates that whiten the features: the minimum is the
    same, and raw HU reach it in a quarter of the steps.

    Args:
        features_KD: float32, any scale; standardised here by the class-balanced training
            statistics.
        target_KC: float32 >= 0, share of each class in each patch, times the number of patches
            that it stands for.
        l2: weight of the penalty.
        steps: L-BFGS iterations, the same number for every model.
    """
    mass_C = target_KC.sum(0)
    balanced_KC = target_KC / (mass_C.clamp_min(1e-12) * int((mass_C > 0).sum()))
    share_K1 = balanced_KC.sum(1, keepdim=True)
    mean_D = (features_KD * share_K1).sum(0)
    std_D = ((features_KD - mean_D).square() * share_K1).sum(0).sqrt()
    # a constant channel carries no information: keep it near 0
    std_D = std_D.clamp_min(1e-6 * max(float(std_D.max()), 1e-30))
    x_KD = (features_KD - mean_D) / std_D
    whiten_DD = _whitening((x_KD * share_K1).T @ x_KD, 10 * l2)
    white_KD = x_KD @ whiten_DD
    # class-major rows and a gradient by hand: four times as fast as autograd over (K, C) on a CPU
    white_DK, balanced_CK, share_1K = (t.T.contiguous() for t in (white_KD, balanced_KC, share_K1))
    code_CD = torch.zeros(target_KC.shape[1], x_KD.shape[1], device=x_KD.device)
    bias_C1 = torch.zeros(target_KC.shape[1], 1, device=x_KD.device)
    solver = torch.optim.LBFGS(
        [code_CD, bias_C1],
        max_iter=steps,
        max_eval=2 * steps,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        weight_CD = code_CD @ whiten_DD.T
        log_p_CK = torch.addmm(bias_C1, code_CD, white_DK).log_softmax(0)
        loss = 0.5 * l2 * weight_CD.square().sum() - (balanced_CK * log_p_CK).sum()
        error_CK = log_p_CK.exp_().mul_(share_1K).sub_(balanced_CK)
        code_CD.grad = error_CK @ white_KD + l2 * (weight_CD @ whiten_DD)
        bias_C1.grad = error_CK.sum(1, keepdim=True)
        return loss

    with torch.no_grad():
        solver.step(objective)
        weight_DC = (whiten_DD @ code_CD.T) / std_D[:, None]
        return Decoder(weight_DC, bias_C1[:, 0] - mean_D @ weight_DC)


def _whitening(covariance_DD: Tensor, floor: float) -> Tensor:
    """Matrix P with P' (covariance + floor) P = 1; float32."""
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    # balanced cross-entropy curves by about a tenth of the covariance, so 10 * l2 there matches the
    # penalty
    return (vectors_DD * (values_D.clamp_min(0) + max(floor, 1e-6)).rsqrt()).float()
