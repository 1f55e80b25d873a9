"""Heads that are trained in minibatches on patch features, beside the linear map of `decoder.py`.

    bn_linear   batch normalisation, then a linear layer: the protocol of DINOv2 (arXiv:2304.07193)
    mlp         standardisation, a hidden layer with GELU, then a linear layer

Axes: K training patches, D channels, H hidden channels, N patches of a
scan, C classes, B patches of a minibatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapct.base import rng
from tapct.eval.heads.decoder import class_weights

HEADS = ("linear", "bn_linear", "mlp")
_BATCH = 4096  # patches of a minibatch
_ROWS = 1 << 16  # patches whose hidden layer is in memory at once


@dataclass(frozen=True)
class HeadDecoder:
    """A trained head.

    Args:
        head: maps features (K, D) to logits (K, C); in eval mode.
    """

    head: nn.Module

    def logits_NC(self, features_ND: Tensor) -> Tensor:
        """Class logits of patches, float32 (N, C)."""
        with torch.inference_mode():
            return torch.cat([self.head(part) for part in features_ND.split(_ROWS)])


def fit_head(
    kind: str,
    features_KD: Tensor,
    target_KC: Tensor,
    *,
    lr: float,
    steps: int,
    weight_decay: float,
    class_power: float,
    dice_weight: float,
    dice_classes: Sequence[int],
    hidden: int,
    seed: int,
) -> HeadDecoder:
    """Train a head with AdamW and a cosine schedule.

    Patches are drawn with replacement in proportion to their class weights, so that the mean over a
    minibatch is the weighted cross-entropy of `decoder.fit_decoder`; the soft Dice is that of the
    minibatch.

    Args:
        kind: `bn_linear` or `mlp`.
        features_KD, target_KC, class_power, dice_weight, dice_classes: as in `fit_decoder`.
        lr: first learning rate.
        steps: minibatches.
        weight_decay: decoupled weight decay.
        hidden: channels of the hidden layer of `mlp`.
        seed: random seed of initial weights and minibatches.
    """
    num_patches, dim = features_KD.shape
    num_classes = target_KC.shape[1]
    generator = torch.Generator().manual_seed(rng.hash_int(seed, "decoder head") % 2**63)
    head = _new_head(kind, dim, num_classes, hidden, features_KD, generator)
    weighted_KC = target_KC * class_weights(target_KC, class_power)
    chance_K = weighted_KC.sum(1)
    # what a drawn patch stands for: its class shares, and its mass for the Dice, in which a patch
    # that is drawn twice as often counts half
    share_KC = weighted_KC / chance_K.clamp_min(1e-12)[:, None]
    mass_KC = target_KC / chance_K.clamp_min(1e-12)[:, None]
    present = [c for c in dice_classes if float(target_KC[:, c].sum()) > 0]
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    head.train()
    # batch normalisation needs two rows, so a single patch is drawn twice
    num_drawn = max(2, min(_BATCH, num_patches))
    for _ in range(steps):
        drawn_B = torch.multinomial(
            chance_K.cpu(), num_drawn, replacement=True, generator=generator
        ).to(features_KD.device)
        log_p_BC = head(features_KD[drawn_B]).log_softmax(1)
        loss = -(share_KC[drawn_B] * log_p_BC).sum(1).mean()
        if dice_weight and present:
            loss = loss + dice_weight * (1 - _soft_dice(log_p_BC.exp(), mass_KC[drawn_B], present))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return HeadDecoder(head.eval().requires_grad_(False))


def _soft_dice(p_BC: Tensor, mass_BC: Tensor, classes: list[int]) -> Tensor:
    """Mean over classes of 2 sum(m p) / (sum(M p) + sum(m)), as in `decoder.py`."""
    hit_O = (p_BC * mass_BC).sum(0)[classes]
    both_O = (p_BC * mass_BC.sum(1, keepdim=True)).sum(0)[classes] + mass_BC.sum(0)[classes]
    return (2 * hit_O / both_O.clamp_min(1e-12)).mean()


def _new_head(
    kind: str,
    dim: int,
    num_classes: int,
    hidden: int,
    features_KD: Tensor,
    generator: torch.Generator,
) -> nn.Module:
    """The untrained head on the device of the features, with keyed initial weights."""
    if kind == "bn_linear":
        layers: list[nn.Module] = [nn.BatchNorm1d(dim), nn.Linear(dim, num_classes)]
    else:
        layers = [
            _Standardise(features_KD),
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, num_classes),
        ]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight.normal_(0, 0.01, generator=generator)
                layer.bias.zero_()
    return nn.Sequential(*layers).to(features_KD.device)


class _Standardise(nn.Module):
    """Features minus their training mean, by their training standard deviation."""

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, features_KD: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_D", features_KD.mean(0))
        std_D = features_KD.std(0, correction=0)
        # a constant channel carries no information: keep it near 0
        floor = 1e-6 * max(float(std_D.max()), 1e-30)
        self.register_buffer("std_D", std_D.clamp_min(floor))

    def forward(self, features_KD: Tensor) -> Tensor:
        """Features (K, D) -> standardised features (K, D)."""
        return (features_KD - self.mean_D) / self.std_D
