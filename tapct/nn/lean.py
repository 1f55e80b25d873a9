"""Linear layers that make their input again in the backward pass instead of keeping it.

    rows = before(inputs)                      cheap: a norm, an activation; T x D
    y    = gain * (rows W' + b)                T x E

Kept for the backward pass: inputs, W, b and gain, of which the norm, the activation before and the
    parameters are kept
or lie somewhere anyhow. Not kept: the rows, nor their copy in the dtype of autocast, nor W in that
dtype, nor the products that the gradient of a gain would be made of; it follows from the gradient
of the weights:

    G = dy' rows,  dW = gain G,  db = gain sum(dy),  dgain = sum_D(W G) + b sum(dy),  drows = dy
    (gain W)

No matrix product is made twice. T rows, D channels in, E channels out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lean_linear(
    linear: nn.Linear, before: Callable[..., Tensor], *inputs: Tensor, gain_E: Tensor | None = None
) -> Tensor:
    """gain * linear(before(*inputs)), at the memory of the inputs alone.

    The plain formula, modules with their hooks, is taken where no gradient is recorded, where
    torch.compile decides itself what to make again, where a graph is traced, and where the layer is
    another than torch's (an adapter, a quantised one).

    Args:
        linear: D -> E.
        before: makes the rows (T, D) from `inputs`; without products of matrices and without draws,
            since it is called again.
        inputs: tensors; all that shall get a gradient.
        gain_E: factor per channel; None: 1.
    Returns:
        (T, E), in the dtype of autocast, else in that of the weights; before a gain in a wider one:
        in that.
    """
    keeps_nothing = not torch.is_grad_enabled() or linear.weight.is_meta
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if keeps_nothing or is_traced or type(linear) is not nn.Linear:
        y_TE: Tensor = linear(before(*inputs))
        return y_TE if gain_E is None else y_TE * gain_E
    kind, dtype = linear.weight.device.type, linear.weight.dtype
    if (
        torch.is_autocast_enabled(kind) and dtype != torch.float64
    ):  # as autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        lean_TE: Tensor = _Lean.apply(before, dtype, linear.weight, linear.bias, gain_E, *inputs)
    return lean_TE


def _effective(weight_ED: Tensor, gain_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights with their gain, as the product takes them."""
    return (weight_ED if gain_E is None else gain_E[:, None] * weight_ED).to(dtype)


class _Lean(torch.autograd.Function):
    """See the top of this file."""

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
        shift_E = (
            None if bias_E is None else (bias_E if gain_E is None else gain_E * bias_E).to(dtype)
        )
        return F.linear(before(*inputs).to(dtype), _effective(weight_ED, gain_E, dtype), shift_E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TE,) = gradients
        weight_ED, bias_E, gain_E, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[5:]
        with torch.enable_grad():
            leaves = [
                each.detach().requires_grad_(need) for each, need in zip(inputs, needs, strict=True)
            ]
            rows_TD = ctx.before(*leaves)
        dparameters: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad[2:5]):
            dparameters = _of_parameters(
                dy_TE, rows_TD.detach().to(ctx.dtype), weight_ED, bias_E, gain_E
            )
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found: list[Tensor] = []
        if wanted:
            drows_TD = (dy_TE @ _effective(weight_ED, gain_E, ctx.dtype)).to(rows_TD.dtype)
            found = list(torch.autograd.grad(rows_TD, wanted, drows_TD))
        return None, None, *dparameters, *(found.pop(0) if need else None for need in needs)


def _of_parameters(
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
