"""Self-attention over packed crops of several lengths.

T tokens of all crops of all groups, B crops of one group, N tokens of one crop, H heads, C channels
per head, D = H*C.

The tokens of all crops lie along one axis, group after group, so that norms and linear layers
compute one matrix. Only attention itself depends on where a crop ends: a back-end takes packed
queries, keys and values with the lengths of the crops, and never writes an N x N matrix. A rotation
or norm of queries and keys comes between the projection and the back-end, where they are still
packed.
"""

from __future__ import annotations

from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.nn.backends import BACKENDS, Spans
from tapct.nn.lean import DeferredLinear, DeferredRows, linear_of
from tapct.nn.norm import LayerNorm
from tapct.nn.rope import Rotation


class Attention(nn.Module):
    """Multi-head self-attention with DINOv2's parameter names (`qkv`, `proj`).

    Args:
        dim: channels D, a multiple of `heads`.
        heads: attention heads H.
        qkv_bias: True for a bias of the joint projection.
        backend: name of a back-end in `BACKENDS`.
        qk_norm: True for a layer norm of each head's queries and keys, before they are rotated;
            arXiv:2302.05442.
    Raises:
        UserError: no such back-end, or D is no multiple of H.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        qkv_bias: bool = True,
        backend: str = "sdpa",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise UserError(
                f"attention back-end {backend!r} does not exist; choose one of "
                f"{', '.join(BACKENDS)}"
            )
        if dim % heads:
            raise UserError(f"dim {dim} is no multiple of heads {heads}; change one of them")
        self.heads = heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(
        self, x_TD: Tensor | DeferredRows, spans: Spans, rotation: Rotation | None = None
    ) -> Tensor | DeferredLinear:
        """proj(softmax(q k' / sqrt(C)) v) with (q, k, v) = qkv(x), within each crop.

        Args:
            x_TD: tokens, packed as `spans` say.
            spans: runs of crops of equal length.
            rotation: turns queries and keys by the positions of their tokens; None: not turned.
        Returns:
            (T, D), deferred if the input is.
        """
        qkv_TE = linear_of(self.qkv, x_TD)  # E = 3 * H * C
        q_THC, k_THC, v_THC = qkv_TE.view(qkv_TE.shape[0], 3, self.heads, -1).unbind(1)
        q_THC, k_THC = self.q_norm(q_THC), self.k_norm(k_THC)
        if rotation is not None:
            q_THC, k_THC = rotation.turn(q_THC), rotation.turn(k_THC)
        # norm and rotation give float32; kernels want queries, keys and values of one dtype
        q_THC, k_THC = q_THC.to(v_THC.dtype), k_THC.to(v_THC.dtype)
        mixed_THC = BACKENDS[self.backend](q_THC, k_THC, v_THC, spans)
        y_TD = DeferredLinear(self.proj, DeferredRows(_join_heads, (mixed_THC,)))
        return y_TD if isinstance(x_TD, DeferredRows) else y_TD.compute()


def _join_heads(x_THC: Tensor) -> Tensor:
    """(T, H, C) -> (T, D)."""
    return x_THC.flatten(1)
