"""Heads that are trained by AdamW: all members of a grid of settings at once.

Each parameter has a leading axis over the members, so a grid costs little more than one member. The
members see the same batches in the same order.

Axes: G members, N scans, B scans of a batch, W windows (1 for heads on vectors), D channels,
H hidden channels, M queries, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tapct.base import rng

BETAS, EPS = (0.9, 0.999), 1e-8  # the defaults of torch.optim.AdamW

Parameters = dict[str, Tensor]


class Architecture(Protocol):
    """A head, as a function of its parameters."""

    def start(
        self, num_members: int, dim: int, num_outputs: int, draw: torch.Generator
    ) -> Parameters:
        """First parameters: equal for all members."""

    def outputs(self, parameters: Parameters, x_BWD: Tensor, is_window_BW: Tensor) -> Tensor:
        """Logits or numbers: float32 (G, B, C).

        Args:
            parameters: parameters of G members.
            x_BWD: vectors of the windows, with zeros behind the last window of a scan.
            is_window_BW: False behind the last window.
        """


def _linear_start(num_members: int, dim: int, num_outputs: int) -> Parameters:
    zeros = torch.zeros
    return {"weight": zeros(num_members, dim, num_outputs), "bias": zeros(num_members, num_outputs)}


def _linear(parameters: Parameters, pooled_GBD: Tensor) -> Tensor:
    return pooled_GBD @ parameters["weight"] + parameters["bias"][:, None]


@dataclass(frozen=True)
class Linear:
    """One linear layer on one vector."""

    def start(
        self, num_members: int, dim: int, num_outputs: int, draw: torch.Generator
    ) -> Parameters:
        """Zeros: the loss is convex."""
        return _linear_start(num_members, dim, num_outputs)

    def outputs(self, parameters: Parameters, x_BWD: Tensor, is_window_BW: Tensor) -> Tensor:
        """Outputs of the single vector of each scan, as one product for all members."""
        logits_GBC = torch.einsum("bd,gdc->gbc", x_BWD[:, 0], parameters["weight"])
        return logits_GBC + parameters["bias"][:, None]


@dataclass(frozen=True)
class GatedAttention:
    """Gated attention pooling over windows, then a linear layer.

    The weight of a window h is softmax over windows of w . (tanh(V h) * sigmoid(U h)).

    Args:
        hidden: channels of V and U.
    Source: Ilse et al. 2018, arXiv:1802.04712.
    """

    hidden: int = 128

    def start(
        self, num_members: int, dim: int, num_outputs: int, draw: torch.Generator
    ) -> Parameters:
        """V, U and w at random, the linear layer at zero."""

        def normal(*shape: int, scale: float) -> Tensor:
            one = torch.randn(*shape, generator=draw) * scale
            return one.expand(num_members, *shape).clone()

        return {
            "tanh": normal(dim, self.hidden, scale=dim**-0.5),
            "gate": normal(dim, self.hidden, scale=dim**-0.5),
            "score": normal(self.hidden, scale=self.hidden**-0.5),
            **_linear_start(num_members, dim, num_outputs),
        }

    def outputs(self, parameters: Parameters, x_BWD: Tensor, is_window_BW: Tensor) -> Tensor:
        """Outputs of the weighted mean of the windows."""
        tanh_GBWH = torch.einsum("bwd,gdh->gbwh", x_BWD, parameters["tanh"]).tanh()
        gate_GBWH = torch.einsum("bwd,gdh->gbwh", x_BWD, parameters["gate"]).sigmoid()
        score_GBW = torch.einsum("gbwh,gh->gbw", tanh_GBWH * gate_GBWH, parameters["score"])
        share_GBW = score_GBW.masked_fill(~is_window_BW, -math.inf).softmax(-1)
        return _linear(parameters, torch.einsum("gbw,bwd->gbd", share_GBW, x_BWD))


@dataclass(frozen=True)
class EfficientProbe:
    """Efficient probing: learned queries attend to the windows, without projections of keys and
    values; each query pools its own part of the channels. Then a linear layer.

    Args:
        queries: number of queries; at most one per channel is used.
    Source: Psomas et al. 2025, arXiv:2506.10178, without its projection of values.
    """

    queries: int = 8

    def start(
        self, num_members: int, dim: int, num_outputs: int, draw: torch.Generator
    ) -> Parameters:
        """Small random queries, so that the first weights are nearly equal."""
        query_MD = torch.randn(min(self.queries, dim), dim, generator=draw) * 0.02
        query_GMD = query_MD.expand(num_members, *query_MD.shape).clone()
        return {"query": query_GMD, **_linear_start(num_members, dim, num_outputs)}

    def outputs(self, parameters: Parameters, x_BWD: Tensor, is_window_BW: Tensor) -> Tensor:
        """Outputs of the pooled channels."""
        query_GMD = parameters["query"]
        num_queries, dim = query_GMD.shape[1:]
        score_GBMW = torch.einsum("bwd,gmd->gbmw", x_BWD, query_GMD) / math.sqrt(dim)
        score_GBMW = score_GBMW.masked_fill(~is_window_BW[:, None], -math.inf)
        query_of_D = torch.arange(dim, device=x_BWD.device) * num_queries // dim
        share_GBDW = score_GBMW.softmax(-1)[:, :, query_of_D]
        return _linear(parameters, torch.einsum("gbdw,bwd->gbd", share_GBDW, x_BWD))


@dataclass(frozen=True)
class Recipe:
    """How the members are trained.

    Args:
        epochs: passes over the training scans.
        warmup_epochs: epochs of linear warm-up, before the cosine.
        batch_size: scans per step.
        balanced: whether scans are drawn with replacement, each class equally often; else each scan
            comes once per epoch.
        seed: random seed of the first parameters and of the batches.
    """

    epochs: int = 150
    warmup_epochs: int = 5
    batch_size: int = 128
    balanced: bool = True
    seed: int = 0


def train(
    architecture: Architecture,
    x_NWD: Sequence[np.ndarray],
    target_N: Tensor,
    num_outputs: int,
    lr_G: Sequence[float],
    weight_decay_G: Sequence[float],
    recipe: Recipe,
) -> Parameters:
    """Train all members of a grid, with cross-entropy for classes and squared error for numbers.

    Args:
        architecture: head.
        x_NWD: float32 (W, D) of each scan; W may differ.
        target_N: int64 classes, or float32 numbers.
        num_outputs: number of classes; 1 for numbers.
        lr_G: learning rate of each member.
        weight_decay_G: weight decay of each member; all parameters decay, as in torch.optim.AdamW.
        recipe: schedule and batches.
    Returns:
        Parameters of all members.
    """
    draw = torch.Generator().manual_seed(rng.hash_int(recipe.seed, "probe training"))
    parameters = architecture.start(len(lr_G), x_NWD[0].shape[1], num_outputs, draw)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    steps_per_epoch = math.ceil(len(x_NWD) / recipe.batch_size)
    batches = _Batches(x_NWD)
    optimizer = _AdamW(parameters, torch.tensor(lr_G), torch.tensor(weight_decay_G))
    step = 0
    for _ in range(recipe.epochs):
        order_N = _order(target_N, recipe.balanced, draw)
        for rows in order_N.split(recipe.batch_size):
            outputs_GBC = architecture.outputs(parameters, *batches.of(rows))
            loss = _loss(outputs_GBC, target_N[rows])
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            optimizer.step(gradients, factor(step, steps_per_epoch, recipe))
            step += 1
    return {name: parameter.detach() for name, parameter in parameters.items()}


def factor(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Share of the learning rate at a step: linear warm-up, then half a cosine to 0."""
    warmup = min(recipe.warmup_epochs, recipe.epochs - 1) * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    total = recipe.epochs * steps_per_epoch
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def padded(sets: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Sets of windows as one tensor (B, W, D), and which of its rows are windows: bool (B, W)."""
    most = max(len(one) for one in sets)
    x_BWD = torch.zeros(len(sets), most, sets[0].shape[1])
    is_window_BW = torch.zeros(len(sets), most, dtype=torch.bool)
    for i, one in enumerate(sets):
        x_BWD[i, : len(one)] = torch.from_numpy(one)
        is_window_BW[i, : len(one)] = True
    return x_BWD, is_window_BW


class _Batches:
    """Batches of sets. Vectors, which are sets of one, are kept as one tensor, so that a batch is
    cheap; windows are not copied, because they may be large.
    """

    def __init__(self, x_NWD: Sequence[np.ndarray]) -> None:
        self.sets = x_NWD
        are_vectors = all(len(one) == 1 for one in x_NWD)
        self.whole_NWD = torch.from_numpy(np.stack(x_NWD)) if are_vectors else None

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Windows of some scans, and which rows are windows."""
        if self.whole_NWD is None:
            return padded([self.sets[i] for i in rows.tolist()])
        x_BWD = self.whole_NWD[rows]
        return x_BWD, torch.ones(x_BWD.shape[:2], dtype=torch.bool)


def _order(target_N: Tensor, balanced: bool, draw: torch.Generator) -> Tensor:
    """Scans of one epoch, in order."""
    if not balanced or target_N.is_floating_point():
        return torch.randperm(len(target_N), generator=draw)
    count_C = torch.bincount(target_N).clamp(min=1)
    weight_N = 1.0 / count_C[target_N].double()
    return torch.multinomial(weight_N, len(target_N), replacement=True, generator=draw)


def _loss(outputs_GBC: Tensor, target_B: Tensor) -> Tensor:
    """Sum over members of their mean loss, so that the members do not influence each other."""
    if target_B.is_floating_point():
        return (outputs_GBC[..., 0] - target_B).square().mean(1).sum()
    num_members = len(outputs_GBC)
    losses = F.cross_entropy(
        outputs_GBC.flatten(0, 1), target_B.repeat(num_members), reduction="none"
    )
    return losses.view(num_members, -1).mean(1).sum()


class _AdamW:
    """AdamW with a learning rate and a weight decay per member (leading axis).

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    def __init__(self, parameters: Mapping[str, Tensor], lr_G: Tensor, decay_G: Tensor) -> None:
        self.parameters = list(parameters.values())
        self.lr_G, self.decay_G = lr_G, decay_G
        self.means = [torch.zeros_like(one) for one in self.parameters]
        self.squares = [torch.zeros_like(one) for one in self.parameters]
        self.num_steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr_factor: float) -> None:
        """Update all parameters in place."""
        self.num_steps += 1
        first, second = (1 - beta**self.num_steps for beta in BETAS)
        entries = zip(self.parameters, self.means, self.squares, gradients, strict=True)
        for parameter, mean, square, gradient in entries:
            by_member = (-1, *[1] * (parameter.ndim - 1))
            lr = (self.lr_G * lr_factor).view(by_member)
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            parameter.mul_(1 - lr * self.decay_G.view(by_member))
            parameter.sub_(lr / first * mean / ((square / second).sqrt() + EPS))
