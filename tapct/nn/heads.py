"""The projection head of DINO and iBOT: MLP, L2 norm, prototypes (weight-normed or plain).

Axes: R rows (class tokens or masked patches), D channels of the backbone, W bottleneck width, K
prototypes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct.config import setting
from tapct.nn import init


@dataclass(frozen=True)
class Config:
    """Sizes of a prototype head. Source: DINOv2's published training config."""

    num_prototypes: int = setting(
        65_536, "number K of prototypes that a token is compared with", ge=2
    )
    hidden: int = setting(2048, "width of the MLP's hidden layers", ge=1)
    bottleneck: int = setting(256, "width of the normalised features before the prototypes", ge=1)
    layers: int = setting(3, "number of linear layers of the MLP", ge=1)
    last_layer: str = setting(
        "weight_norm",
        "weights of the prototypes: weight_norm, a direction times a gain (DINO, DINOv2), or "
        "plain (DINOv3)",
        choices=("weight_norm", "plain"),
    )


class WeightNormed(nn.Module):
    """Weight-normed linear layer without bias: direction `weight_v` (K, W), learned gain `weight_g`
    (K, 1).
    """

    def __init__(self, num_prototypes: int, width: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, width))

    def prototypes(self) -> Tensor:
        """g * v / |v|, (K, W), float32 or wider."""
        # float32: the rounding of a bf16 norm would change every logit
        wide = torch.promote_types(self.weight_v.dtype, torch.float32)
        # the plain form is v * (g / |v|); torch's function needs fewer passes over K x W numbers,
        # most of all backward
        prototypes_KW: Tensor = torch._weight_norm(
            self.weight_v.to(wide), self.weight_g.to(wide), 0
        )
        return prototypes_KW


class Plain(nn.Module):
    """Linear layer without bias, whose `weight` (K, W) is the prototypes; their lengths are learned
    too.
    """

    def __init__(self, num_prototypes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, width))

    def prototypes(self) -> Tensor:
        """The weight, (K, W), float32 or wider; the parameter itself where it is wide enough."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


class PrototypeHead(nn.Module):
    """Logits of tokens over prototypes: prototypes * normalize(MLP(x)).

    A plain last layer is DINOv3's, whose linear layers all start at trunc_normal 0.02. The head
    starts as `init_weights(0)` leaves it; on a meta device it stays without values.

    Args:
        dim: channels D of the tokens.
        config: sizes and form of the last layer.
    Source: DINOv2's DINOHead, with its parameter names; DINOv3, arXiv:2508.10104.
    """

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        widths = [dim, *[config.hidden] * (config.layers - 1), config.bottleneck]
        layers: list[nn.Module] = []
        with torch.device("meta"):  # the layers' own initialisation is skipped
            for fan_in, fan_out in itertools.pairwise(widths):
                layers += [nn.GELU()] if layers else []
                layers.append(nn.Linear(fan_in, fan_out))
            self.mlp = nn.Sequential(*layers)
            kind = WeightNormed if config.last_layer == "weight_norm" else Plain
            self.last_layer = kind(config.num_prototypes, config.bottleneck)
        self.to_empty(device=device)
        if device.type != "meta":
            self.init_weights(0)

    def features(self, x_RD: Tensor) -> Tensor:
        """Features on the unit sphere: (R, D) -> (R, W), float32 or wider."""
        x_RW = self.mlp(x_RD)
        return F.normalize(
            x_RW.to(torch.promote_types(x_RW.dtype, torch.float32)), dim=-1, eps=1e-12
        )

    def prototypes(self) -> Tensor:
        """The effective last layer, (K, W)."""
        return self.last_layer.prototypes()

    def forward(self, x_RD: Tensor, then: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Logits before any temperature, (R, D) -> (R, K), or the result of `then`.

        FSDP gathers sharded weights for the time of this call. A loss that takes features (R, W)
        and the effective last layer (K, W) instead of logits is therefore called here.

        Args:
            x_RD: tokens.
            then: function of features and prototypes, whose result is returned; None: their
                product.
        """
        features_RW, prototypes_KW = self.features(x_RD), self.prototypes()
        if then is not None:
            return then(features_RW, prototypes_KW)
        return F.linear(features_RW, prototypes_KW)

    def init_weights(self, seed: int) -> None:
        """Set every parameter from (seed, name): weights trunc_normal 0.02, directions like
        `nn.Linear`, gains 1.
        """
        for name, parameter in self.named_parameters():
            if name == "last_layer.weight_v":
                init.uniform_fan_in(parameter, self.config.bottleneck, seed, f"head.{name}")
            elif name == "last_layer.weight_g":
                init.constant(parameter, 1.0)
            elif name.endswith("weight"):
                init.trunc_normal(parameter, 0.02, seed, f"head.{name}")
            else:
                init.constant(parameter, 0.0)
