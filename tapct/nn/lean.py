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

No matrix product is computed twice. On a CPU, many rows are computed by parts: fresh pages from
the system take longer than an activation, and a part of a few MB gets memory that is used again.

A residual branch reads `scale(mlp(norm(x)))`: the norm returns `DeferredRows`, the last linear
layer returns a `DeferredLinear`, and the scale computes it with its gain folded into the weights.

T rows, R rows of a part, D channels in, E channels out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct.nn.fake import is_fake

# Rows of more than `WHOLE_BYTES` are computed by parts of about `PART_BYTES` on a CPU. The C
# library returns a block above 32 MB to the system when it is freed, and keeps a smaller one.
WHOLE_BYTES, PART_BYTES = 1 << 25, 1 << 22


@dataclass(frozen=True)
class DeferredRows:
    """Rows (T, D) that are not computed yet: the linear layer that takes them computes them, once
    forward and once backward.

    Args:
        before: function that computes the rows from `inputs`, each row by itself.
        inputs: tensors with T rows, and vectors that all rows share; every tensor that needs a
            gradient is among them.
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
        before: function that computes the rows (T, D) from `inputs`, each row by itself; without
            matrix products, which are expensive, and without random draws, since it is called a
            second time.
        inputs: tensors with T rows, and vectors that all rows share; every tensor that needs a
            gradient is among them.
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
        scaled_ED = _with_gain(weight_ED, gain_E, dtype)
        parts = _parts(inputs, weight_ED, dtype)
        if len(parts) == 1:
            return F.linear(before(*inputs).to(dtype), scaled_ED, shift_E)
        y_TE = scaled_ED.new_empty(len(inputs[0]), len(scaled_ED))
        for part in parts:
            rows_RD = before(*_cut(inputs, part)).to(dtype)
            if shift_E is None:
                torch.mm(rows_RD, scaled_ED.T, out=y_TE[part])
            else:
                torch.addmm(shift_E, rows_RD, scaled_ED.T, out=y_TE[part])
        return y_TE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TE,) = gradients
        weight_ED, bias_E, gain_E, *inputs = ctx.saved_tensors
        # `forward` takes five arguments before the inputs
        needs = ctx.needs_input_grad[5:]
        scaled_ED = _with_gain(weight_ED, gain_E, ctx.dtype) if any(needs) else None
        dweight_ED: Tensor | None = None
        dinputs: list[Tensor | None] = [None] * len(inputs)
        parts = _parts(inputs, weight_ED, ctx.dtype)
        for part in parts:
            whole = len(parts) == 1
            pieces, dy_RE = (inputs, dy_TE) if whole else (_cut(inputs, part), dy_TE[part])
            # `before` is differentiated by autograd, in a small graph of its own
            with torch.enable_grad():
                leaves = [
                    each.detach().requires_grad_(need)
                    for each, need in zip(pieces, needs, strict=True)
                ]
                rows_RD = ctx.before(*leaves)
            if any(ctx.needs_input_grad[2:5]):
                product_ED = (dy_RE.T @ rows_RD.detach().to(ctx.dtype)).to(weight_ED.dtype)
                dweight_ED = product_ED if dweight_ED is None else dweight_ED.add_(product_ED)
            if scaled_ED is None:
                continue
            drows_RD = (dy_RE @ scaled_ED).to(rows_RD.dtype)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = list(torch.autograd.grad(rows_RD, wanted, drows_RD))
            for i, need in enumerate(needs):
                if not need:
                    continue
                if whole:
                    dinputs[i] = found.pop(0)
                else:
                    dinputs[i] = _join(dinputs[i], inputs[i], part, found.pop(0))
        dparameters: tuple[Tensor | None, ...] = (None, None, None)
        if dweight_ED is not None:
            dparameters = _parameter_gradients(dy_TE, dweight_ED, weight_ED, bias_E, gain_E)
        return None, None, *dparameters, *dinputs


def _parts(inputs: Sequence[Tensor], weight_ED: Tensor, dtype: torch.dtype) -> list[slice]:
    """Ranges of rows that are computed one after another; a single one where the rows are few."""
    num_rows, row_bytes = len(inputs[0]), dtype.itemsize * weight_ED.shape[1]
    on_cpu = weight_ED.device.type == "cpu" and not is_fake(inputs[0])
    if not on_cpu or num_rows * row_bytes <= WHOLE_BYTES:
        return [slice(0, num_rows)]
    num_parts = -(-num_rows * row_bytes // PART_BYTES)
    size = -(-num_rows // num_parts)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _cut(inputs: Sequence[Tensor], part: slice) -> list[Tensor]:
    """Some rows of each input; a vector is shared by all rows."""
    return [each if each.ndim == 1 else each[part] for each in inputs]


def _join(sum_: Tensor | None, whole: Tensor, part: slice, found: Tensor) -> Tensor:
    """Write the gradient of some rows into that of all rows; the gradients of a vector are added.

    Args:
        sum_: gradient so far; None: no part is there yet.
        whole: input that the gradient belongs to.
        part: rows of this part.
        found: gradient of this part.
    """
    if whole.ndim == 1:
        return found if sum_ is None else sum_ + found
    if sum_ is None:
        sum_ = torch.empty_like(whole)
    sum_[part] = found
    return sum_


def _parameter_gradients(
    dy_TE: Tensor,
    dweight_ED: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    gain_E: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias and gain.

    Args:
        dweight_ED: gradient of the weight without the gain, dy' rows; it is overwritten.
    """
    dbias_E = None if bias_E is None else dy_TE.sum(0).to(bias_E.dtype)
    if gain_E is None:
        return dweight_ED, dbias_E, None
    dgain_E = torch.linalg.vecdot(weight_ED, dweight_ED)
    if bias_E is not None and dbias_E is not None:
        dgain_E += bias_E * dbias_E
        dbias_E *= gain_E
    return dweight_ED.mul_(gain_E[:, None]), dbias_E, dgain_E
