"""Layer norm whose sums are never narrower than float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm whose sums are never narrower than float32; returns the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the last axis, any leading shape."""
        return self.formula(input, self.weight, self.bias)

    def formula(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What `forward` does, as a function of all that has a gradient."""
        wide = torch.promote_types(input.dtype, torch.float32)  # a float64 model stays float64
        normed = F.layer_norm(
            input.to(wide), self.normalized_shape, weight.to(wide), bias.to(wide), self.eps
        )
        return normed.to(weight.dtype)
