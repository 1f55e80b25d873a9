"""Layer norm whose sums are never narrower than float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct.nn.lean import DeferredRows, is_plain


class LayerNorm(nn.LayerNorm):
    """Layer norm whose sums are never narrower than float32; returns the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the last axis, any leading shape."""
        return self.formula(input, self.weight, self.bias)

    def deferred(self, input: Tensor) -> Tensor | DeferredRows:
        """The normed rows, to be computed by the linear layer that takes them (see `lean`); a
        tensor where the plain form is computed.
        """
        if is_plain(self.weight):
            normed: Tensor = self(input)
            return normed
        return DeferredRows(self.formula, (input, self.weight, self.bias))

    def formula(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`forward` as a function of every tensor that has a gradient."""
        # float32: a mean of bf16 numbers has 8 bits. A float64 model stays in float64.
        wide = torch.promote_types(input.dtype, torch.float32)
        normed = F.layer_norm(
            input.to(wide), self.normalized_shape, weight.to(wide), bias.to(wide), self.eps
        )
        return normed.to(weight.dtype)
