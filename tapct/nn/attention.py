"""Self-attention over packed crops of several lengths.

T tokens of all crops of all groups, B crops of one group, N tokens of one crop, H heads, C channels per head, D = H*C.

The tokens of all crops lie along one axis, group after group, so that norms and linear layers see one matrix. Only the
attention itself needs to know where a crop ends; a back-end gets packed queries, keys and values and the lengths, and
never writes an N x N matrix. What acts on queries and keys alone (a rotation, a norm) belongs between the projection
and the back-end, where they are still packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct.nn.norm import LayerNorm
from tapct.nn.rope import Rotation
from tapct.types import UserError


@dataclass(frozen=True)
class Span:
    """A run of crops of one length in the packed token axis: `crops` sequences of `tokens` rows each."""

    crops: int
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of the packed axis that the run takes."""
        return self.crops * self.tokens


Spans = tuple[Span, ...]
Backend = Callable[[Tensor, Tensor, Tensor, Spans], Tensor]


def attend_sdpa(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, spans: Spans) -> Tensor:
    """Attend within each crop: one batched SDPA call per run of equal lengths, on views, without a mask.

    Args:
        q_THC: queries, packed as `spans` say; keys and values alike.
        spans: runs of crops in packed order; their rows sum to T.
    Returns:
        (T, H, C), softmax(q k' / sqrt(C)) v of each crop.
    """
    rows = [span.rows for span in spans]
    # split, not slices: its backward is one concatenation, where each slice would fill a T-sized gradient with zeros
    parts = zip(q_THC.split(rows), k_THC.split(rows), v_THC.split(rows), spans, strict=True)
    out = []
    for q, k, v, span in parts:
        q, k, v = (part.unflatten(0, (span.crops, span.tokens)).transpose(1, 2) for part in (q, k, v))
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


BACKENDS: Mapping[str, Backend] = MappingProxyType({"sdpa": attend_sdpa})


class Attention(nn.Module):
    """Multi-head self-attention with DINOv2's parameter names (`qkv`, `proj`).

    Args:
        dim: channels D, a multiple of `heads`.
        heads: H.
        qkv_bias: give the joint projection a bias.
        backend: a name in `BACKENDS`.
        qk_norm: normalise each head's queries and keys, before they are turned; arXiv:2302.05442.
    Raises:
        UserError: no such back-end, or D is no multiple of H.
    """

    def __init__(
        self, dim: int, heads: int, qkv_bias: bool = True, backend: str = "sdpa", qk_norm: bool = False
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise UserError(f"attention back-end {backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
        if dim % heads:
            raise UserError(f"dim {dim} is no multiple of heads {heads}; change one of them")
        self.heads = heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, spans: Spans, rotation: Rotation | None = None) -> Tensor:
        """Mix the tokens of each crop: (T, D) packed as `spans` say -> (T, D).

        Args:
            rotation: turns queries and keys by their tokens' places; None for none.
        """
        q_THC, k_THC, v_THC = self.qkv(x_TD).view(x_TD.shape[0], 3, self.heads, -1).unbind(1)
        q_THC, k_THC = self.q_norm(q_THC), self.k_norm(k_THC)
        if rotation is not None:
            q_THC, k_THC = rotation.turn(q_THC), rotation.turn(k_THC)
        q_THC, k_THC = q_THC.to(v_THC.dtype), k_THC.to(v_THC.dtype)  # norm and rotation are float32
        return self.proj(BACKENDS[self.backend](q_THC, k_THC, v_THC, spans).flatten(1))
