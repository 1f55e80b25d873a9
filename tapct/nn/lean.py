"""Linear layers that recompute their input in the backward pass instead of keeping it.

Plain form, which gives the same numbers and is computed where no gradient is recorded:

    rows = before(inputs)                      cheap: a norm, an activation; T x D
    y    = gain * (rows W' + b)                T x E

Kept for the backward pass: the inputs, W, b and the gain. Most of them are kept by other parts of
the network in any case: the input of a norm is the residual stream, the input of an activation is
the output of the layer before. Not kept: the rows, their copy in the dtype of autocast, the copy of
W in that dtype, and the output before the gain. The gradient of the gain follows from the gradient
of the weights:

    G     = dy' rows
    dW    = gain G
    db    = gain sum_T(dy)
    dgain = sum_D(W G) + b sum_T(dy)
    drows = dy (gain W)

No matrix product is computed twice. A residual branch reads `scale(mlp(norm(x)))`: the norm returns
`DeferredRows`, the last linear layer returns a `DeferredLinear`, and the scale computes it with its
gain folded into the weights.

T rows, D channels in, E channels out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DeferredRows:
    """Rows (T, D) that are not computed yet: the linear layer that takes them computes them, once
    forward and once backward.

    Args:
        before: function that computes the rows from `inputs`.
        inputs: tensors; every tensor that needs a gradient is among them.
    """

    before: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class DeferredLinear:
    """Output (T, E) of a linear layer that is not computed yet, so that a gain can be folded into
    the weights.

    Args:
        linear: layer D -> E.
        rows: input of the layer.
    """

    linear: nn.Linear
    rows: DeferredRows

    def compute(self, gain_E: Tensor | None = None) -> Tensor:
        """gain * linear(rows), (T, E)."""
        return lean_linear(self.linear, self.rows.before, *self.rows.inputs, gain_E=gain_E)


def linear_of(linear: nn.Linear, x_TD: Tensor | DeferredRows) -> Tensor:
    """linear(x), (T, D) -> (T, E), for rows that are computed and for rows that are not."""
    if isinstance(x_TD, DeferredRows):
        return lean_linear(linear, x_TD.before, *x_TD.inputs)
    y_TE: Tensor = linear(x_TD)
    return y_TE


def is_plain(weight: Tensor) -> bool:
    """Whether the plain form is computed: no gradient is recorded, torch.compile decides what to
    recompute, or a graph is traced.
    """
    keeps_nothing = not torch.is_grad_enabled() or weight.is_meta
    return keeps_nothing or torch.compiler.is_compiling() or torch.jit.is_tracing()


def lean_linear(
    linear: nn.Linear, before: Callable[..., Tensor], *inputs: Tensor, gain_E: Tensor | None = None
) -> Tensor:
    """gain * linear(before(*inputs)), at the memory of the inputs alone.

    The plain form, in which modules run their hooks, is computed where `is_plain` holds, and where
    the layer is another class than torch's (an adapter, a quantised layer).

    Args:
        linear: layer D -> E.
        before: function that computes the rows (T, D) from `inputs`; without matrix products, which
            are expensive, and without random draws, since it is called a second time.
        inputs: tensors; every tensor that needs a gradient is among them.
        gain_E: factor per channel; None: 1.
    Returns:
        (T, E) in the dtype of autocast, else in that of the weights; where the plain form is
        computed, a gain in a wider dtype widens the result.
    """
    if is_plain(linear.weight) or type(linear) is not nn.Linear:
        y_TE: Tensor = linear(before(*inputs))
        return y_TE if gain_E is None else y_TE * gain_E
    kind, dtype = linear.weight.device.type, linear.weight.dtype
    # autocast leaves float64 as it is, and so does this function
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        lean_TE: Tensor = _Lean.apply(before, dtype, linear.weight, linear.bias, gain_E, *inputs)
    return lean_TE


def _with_gain(weight_ED: Tensor, gain_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights with the gain folded in, in the dtype of the product."""
    return (weight_ED if gain_E is None else gain_E[:, None] * weight_ED).to(dtype)


class _Lean(torch.autograd.Function):
    """gain * linear(before(*inputs)), whose backward pass calls `before` again."""

    @staticmethod
    def forward(
        ctx: Any,
        before: Callable[..., Tensor],
        dtype: torch.dtype,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        gain_E: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.before, ctx.dtype = before, dtype
        ctx.save_for_backward(weight_ED, bias_E, gain_E, *inputs)
        shift_E = None
        if bias_E is not None:
            shift_E = (bias_E if gain_E is None else gain_E * bias_E).to(dtype)
        return F.linear(before(*inputs).to(dtype), _with_gain(weight_ED, gain_E, dtype), shift_E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TE,) = gradients
        weight_ED, bias_E, gain_E, *inputs = ctx.saved_tensors
        # `forward` takes five arguments before the inputs
        needs = ctx.needs_input_grad[5:]
        # `before` is differentiated by autograd, in a small graph of its own
        with torch.enable_grad():
            leaves = [
                each.detach().requires_grad_(need) for each, need in zip(inputs, needs, strict=True)
            ]
            rows_TD = ctx.before(*leaves)
        dparameters: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad[2:5]):
            dparameters = _parameter_gradients(
                dy_TE, rows_TD.detach().to(ctx.dtype), weight_ED, bias_E, gain_E
            )
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        dwanted: list[Tensor] = []
        if wanted:
            drows_TD = (dy_TE @ _with_gain(weight_ED, gain_E, ctx.dtype)).to(rows_TD.dtype)
            dwanted = list(torch.autograd.grad(rows_TD, wanted, drows_TD))
        dinputs = [dwanted.pop(0) if need else None for need in needs]
        return None, None, *dparameters, *dinputs


def _parameter_gradients(
    dy_TE: Tensor, rows_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, gain_E: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias and gain."""
    dweight_ED = (dy_TE.T @ rows_TD).to(weight_ED.dtype)
    dbias_E = None if bias_E is None else dy_TE.sum(0).to(bias_E.dtype)
    if gain_E is None:
        return dweight_ED, dbias_E, None
    dgain_E = torch.linalg.vecdot(weight_ED, dweight_ED)
    if bias_E is not None and dbias_E is not None:
        dgain_E += bias_E * dbias_E
        dbias_E *= gain_E
    return dweight_ED.mul_(gain_E[:, None]), dbias_E, dgain_E
