"""Attention back-ends: equal results by different kernels, none of which writes an N x N matrix.

    sdpa      everywhere; the default     one batched call per run of equal lengths, without a mask
    varlen    CUDA from Ampere, bf16 or   one flash call over all crops (torch.nn.attention.varlen)
              fp16
    xformers  CUDA, xformers installed    one call over all crops with a block-diagonal mask
    auto      everywhere                  the first of varlen, xformers and sdpa that device and
                                          dtype allow

Axes: T tokens of all crops of all groups, H heads, C channels per head, S crops; B crops of one
run of equal lengths, N tokens of one of them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tapct.base.exits import UserError
from tapct.base.extras import installing
from tapct.nn import attention_blocks
from tapct.nn.fake import is_fake

HALF = (torch.bfloat16, torch.float16)
AMPERE = (8, 0)  # compute capability
LONG_CROP = 300  # tokens from which torch's CPU kernel is faster in bf16 than in float32


@dataclass(frozen=True)
class Span:
    """A run of crops of equal length in the packed token axis: `crops` times `tokens` rows."""

    crops: int
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of the packed axis that the run takes."""
        return self.crops * self.tokens


Spans = tuple[Span, ...]
Backend = Callable[[Tensor, Tensor, Tensor, Spans], Tensor]


def attend_sdpa(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, spans: Spans) -> Tensor:
    """Attend within each crop: one batched SDPA call per run of equal lengths, on views, without a
    mask.

    Args:
        q_THC: queries, packed as `spans` say.
        k_THC: keys.
        v_THC: values.
        spans: runs of crops in packed order; their rows sum to T.
    Returns:
        (T, H, C), softmax(q k' / sqrt(C)) v of each crop.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    # a user who selects another kernel by `sdpa_kernel` disables flash, on a CPU too
    if q_THC.device.type == "cpu" and not is_traced and torch.backends.cuda.flash_sdp_enabled():
        packed: Tensor = CpuFlash.apply(q_THC, k_THC, v_THC, spans)
        return packed
    out = []
    for q, k, v in crops_of(spans, q_THC, k_THC, v_THC):
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


class CpuFlash(torch.autograd.Function):
    """SDPA on a CPU by torch's own kernels, whose results are written into one packed tensor.

    Plain form, which the other branch of `attend_sdpa` computes: F.scaled_dot_product_attention of
    each run, concatenated. This would keep each result twice, for its own backward pass and for
    that of the next layer.
    Short crops in bf16 or fp16 are computed in float32: torch's kernel takes up to 8 times as long
    backward in bf16, and is no more exact; for long crops it is faster (docs/log.md). On a CPU with
    products in bf16, the backward pass of long crops in bf16 is computed by `attention_blocks`,
    which is faster still.
    """

    @staticmethod
    def forward(ctx: Any, q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, spans: Spans) -> Tensor:
        """Arguments and result as in `attend_sdpa`."""
        out_THC = q_THC.new_empty(q_THC.shape)
        norms = []
        for *qkv, into_BHNC in crops_of(spans, q_THC, k_THC, v_THC, out_THC):
            one_BHNC, norms_BHN = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *map(_wide, qkv)
            )
            into_BHNC.copy_(one_BHNC)
            norms.append(norms_BHN)
        ctx.spans = spans
        ctx.save_for_backward(q_THC, k_THC, v_THC, out_THC, *norms)
        return out_THC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values, in their dtypes."""
        q_THC, k_THC, v_THC, out_THC, *norms = ctx.saved_tensors
        dqkv = tuple(torch.empty_like(x_THC) for x_THC in (q_THC, k_THC, v_THC))
        crops = crops_of(ctx.spans, gradients[0], q_THC, k_THC, v_THC, out_THC, *dqkv)
        for (*inputs, dq, dk, dv), norms_BHN in zip(crops, norms, strict=True):
            if _fits_blocks(dq):
                dout, q, k, v, out = inputs
                attention_blocks.differentiate(dout, q, k, v, out, norms_BHN, (dq, dk, dv))
                continue
            # no dropout, not causal
            computed = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *map(_wide, inputs), norms_BHN, 0.0, False
            )
            for into_BHNC, one_BHNC in zip((dq, dk, dv), computed, strict=True):
                into_BHNC.copy_(one_BHNC)
        return *dqkv, None


def crops_of(spans: Spans, *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views (B, H, N, C) of packed tensors (T, H, C), for each run of equal lengths."""
    rows = [span.rows for span in spans]
    # split, not slices: its backward pass is one concatenation, while the backward pass of each
    # slice would fill a gradient of T rows with zeros
    for span, *parts in zip(spans, *(x_THC.split(rows) for x_THC in packed), strict=True):
        yield tuple(part.unflatten(0, (span.crops, span.tokens)).transpose(1, 2) for part in parts)


def _wide(x_BHNC: Tensor) -> Tensor:
    """x in float32 where it is a half type and its crops are short, else x."""
    return x_BHNC.float() if x_BHNC.dtype in HALF and x_BHNC.shape[2] < LONG_CROP else x_BHNC


def _fits_blocks(x_BHNC: Tensor) -> bool:
    """Whether the backward pass is computed by `attention_blocks`: long crops in bf16, on a CPU on
    which they are faster.
    """
    if is_fake(x_BHNC) or x_BHNC.shape[2] < LONG_CROP:
        return False
    return x_BHNC.dtype == torch.bfloat16 and attention_blocks.is_faster()


def crop_starts(spans: Spans, device: torch.device) -> Tensor:
    """First packed row of every crop, and T: (S + 1,) int32, computed on the device, so that
    nothing waits for it.
    """
    parts, start = [torch.zeros(1, dtype=torch.int32, device=device)], 0
    for span in spans:
        parts.append(
            torch.arange(1, span.crops + 1, dtype=torch.int32, device=device) * span.tokens + start
        )
        start += span.rows
    return torch.cat(parts)


def crop_lengths(spans: Spans) -> tuple[int, ...]:
    """Tokens of every crop, in packed order."""
    return tuple(span.tokens for span in spans for _ in range(span.crops))


def attend_varlen(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, spans: Spans) -> Tensor:
    """Attend within each crop by torch's variable-length flash kernel; arguments as in
    `attend_sdpa`.

    Raises:
        UserError: no CUDA device from Ampere on, another dtype than bf16 or fp16, or torch has no
            such kernel.
    """
    check_varlen(q_THC)
    starts = crop_starts(spans, q_THC.device)
    longest = max(span.tokens for span in spans)
    out: Tensor = varlen_kernel()(q_THC, k_THC, v_THC, starts, starts, longest, longest)
    return out


def attend_xformers(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, spans: Spans) -> Tensor:
    """Attend within each crop by xformers under a block-diagonal mask; arguments as in
    `attend_sdpa`.

    Raises:
        UserError: no CUDA device, or xformers is not installed.
    """
    check_xformers(q_THC)
    mask = block_mask(crop_lengths(spans), q_THC.device)
    out: Tensor = xformers_ops().memory_efficient_attention(
        q_THC[None], k_THC[None], v_THC[None], attn_bias=mask
    )
    return out.squeeze(0)


@functools.lru_cache(maxsize=256)
def block_mask(lengths: tuple[int, ...], device: torch.device) -> Any:
    """xformers' mask for crops of these lengths; cached, because making it waits for the device."""
    return xformers_ops().fmha.BlockDiagonalMask.from_seqlens(list(lengths), device=device)


def attend_auto(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, spans: Spans) -> Tensor:
    """Attend by the back-end that `choose` names for these tensors; arguments as in
    `attend_sdpa`.
    """
    return BACKENDS[choose(q_THC.device, q_THC.dtype)](q_THC, k_THC, v_THC, spans)


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the back-end that `auto` selects: varlen, xformers or sdpa."""
    if device.type == "cuda" and dtype in HALF:
        if varlen_kernel() is not None and torch.cuda.get_device_capability(device) >= AMPERE:
            return "varlen"
        if xformers_ops() is not None:
            return "xformers"
    return "sdpa"


def check_varlen(q_THC: Tensor) -> None:
    """Raise UserError where `varlen` cannot run."""
    if q_THC.device.type != "cuda" or torch.cuda.get_device_capability(q_THC.device) < AMPERE:
        raise UserError(
            f"model.attention=varlen needs a GPU from Ampere on, not this {_name(q_THC)}; {_REMEDY}"
        )
    if q_THC.dtype not in HALF:
        raise UserError(
            f"model.attention=varlen computes in bf16 or fp16, not in {q_THC.dtype}; {_REMEDY}"
        )
    if varlen_kernel() is None:
        raise UserError(
            f"model.attention=varlen: torch {torch.__version__} has no such attention; {_REMEDY}"
        )


def check_xformers(q_THC: Tensor) -> None:
    """Raise UserError where `xformers` cannot run."""
    if q_THC.device.type != "cuda":
        raise UserError(f"model.attention=xformers needs a GPU, not this {_name(q_THC)}; {_REMEDY}")
    if xformers_ops() is None:
        raise UserError(
            f"model.attention=xformers: {xformers_failure() or 'not installed'}; {_REMEDY}, or "
            f"install it: {installing('gpu', 'xformers')}"
        )


_REMEDY = "set model.attention=auto or sdpa"


def _name(tensor: Tensor) -> str:
    """Name of the device that holds the tensor."""
    if tensor.device.type == "cuda":
        return torch.cuda.get_device_name(tensor.device)
    return tensor.device.type.upper()


def varlen_kernel() -> Any:
    """`varlen_attn` of torch, or None."""
    # An import statement, and here: torch.compile traces through it, while `importlib` would break
    # the graph, and the module takes seconds to load, which only a GPU needs.
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def xformers_ops() -> Any:
    """The module `xformers.ops`, or None where it cannot be imported or its kernels do not load."""
    return _find_xformers()[0]


# This is what the decorator torch.compiler.assume_constant_result does. The decorator itself loads
# the compiler, which would add seconds to the start of every process.
xformers_ops._dynamo_marked_constant = True  # type: ignore[attr-defined]


def xformers_failure() -> str:
    """Why `xformers_ops` is None, in a few words; empty where it is not."""
    return _find_xformers()[1]


@functools.cache
def _find_xformers() -> tuple[Any, str]:
    try:
        ops = importlib.import_module("xformers.ops")
        # without its kernels, which were built for one version of torch, it can be imported, but
        # fails when it is called
        library = importlib.import_module("xformers._cpp_lib")
    except ModuleNotFoundError as error:
        installed = error.name is None or not error.name.startswith("xformers")
        return None, f"{type(error).__name__}: {error}" if installed else "not installed"
    except (ImportError, OSError, RuntimeError) as error:  # OSError: built for another torch
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    failure = getattr(library, "_cpp_library_load_exception", None)
    if failure is not None:
        return None, f"its kernels do not load with torch {torch.__version__}"
    return ops, ""


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {"sdpa": attend_sdpa, "varlen": attend_varlen, "xformers": attend_xformers, "auto": attend_auto}
)
GPU_ONLY = ("varlen", "xformers")
