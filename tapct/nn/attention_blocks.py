"""Backward pass of attention on a CPU by large matrix products, a block of scores at a time.

Plain form, for one crop and one head, from norm_N, the log-sum-exp of the scores of each query:

    shares_NN  = exp(q_NC @ k_NC.T / sqrt(C) - norm_N)
    delta_N    = sum_C(dout_NC * out_NC)
    dv_NC      = shares_NN.T @ dout_NC
    dscores_NN = shares_NN * (dout_NC @ v_NC.T - delta_N)
    dq_NC      = dscores_NN @ k_NC / sqrt(C)
    dk_NC      = dscores_NN.T @ q_NC / sqrt(C)

Here a block of the N x N matrices is computed, used and overwritten: it belongs to some keys and
all queries. Each thread has two blocks of bounded size, so memory is linear in N.

torch's own kernel works on smaller blocks, whose products in bf16 do not use the matrix unit of
Intel CPUs (AMX) or the bf16 instructions of other CPUs (AVX512-BF16) well; docs/benchmarks.md
compares the two. Two tricks make the products here fast:

- norm and delta are subtracted by the products themselves, as further channels: the row of scores
  is (q, -norm) @ (k, 1). No pass over the block is needed, and a bf16 result is the rounded
  difference, not a difference of rounded numbers. In bf16 the subtracted number takes two channels,
  its rounded value and the remainder.
- In bf16, tokens and channels are padded with zeros to multiples of a tile, because other sizes
  take up to twice as long. For a padded key or query, dscores is 0.

Axes: B crops of equal length, H heads, N tokens of a crop, C channels of a head, S = B*H sequences,
M sequences at a time, R keys of a block, P tokens with padding, E channels with what is added to
them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 23  # of one block of one sequence: the whole matrix of 2048 tokens in bf16


@functools.cache
def has_amx() -> bool:
    """Whether this CPU multiplies tiles of bf16 numbers."""
    return bool(torch.cpu._is_amx_tile_supported())


@functools.cache
def has_avx512_bf16() -> bool:
    """Whether this CPU multiplies vectors of bf16 numbers."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def is_faster() -> bool:
    """Whether blocks in bf16 are faster than torch's kernel on this CPU: on the kinds on which this
    was measured.
    """
    return has_amx() or has_avx512_bf16()


def tile() -> int:
    """Size in numbers that a bf16 product handles at a time: 32 with AMX, and the 16 float32 sums
    of a vector without it.
    """
    return 32 if has_amx() else 16


def differentiate(
    dout_BHNC: Tensor,
    q_BHNC: Tensor,
    k_BHNC: Tensor,
    v_BHNC: Tensor,
    out_BHNC: Tensor,
    norm_BHN: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of queries, keys and values into three tensors (B, H, N, C).

    Args:
        dout_BHNC: gradient of the result.
        q_BHNC, k_BHNC, v_BHNC: what was attended with.
        out_BHNC: result.
        norm_BHN: log-sum-exp of the scores of each query, float32.
        into: gradients of queries, keys and values; they are overwritten.
    """
    num_tokens, channels = q_BHNC.shape[2:]
    scale = channels**-0.5
    wide = norm_BHN.dtype
    delta_BHN = (dout_BHNC.to(wide) * out_BHNC.to(wide)).sum(-1)
    # The product rounds the exponent of a share, least where it is near 0. Even shares are 1/N, and
    # the share of a token which takes all is 1. Between the two: sqrt(N) times the share, whose
    # exponent is at most log(N)/2 for both.
    enlarged = math.sqrt(num_tokens)
    shift_BHN = (math.log(enlarged) - norm_BHN) / scale
    q_SPE, dout_SPE = _extended(q_BHNC, shift_BHN), _extended(dout_BHNC, -delta_BHN)
    k_SPE, v_SPE = _extended(k_BHNC, None), _extended(v_BHNC, None)
    padded = q_SPE.shape[1]
    # channels of the gradients: without the further ones, where these need no tile of their own
    width = min(_whole_tiles(channels), q_SPE.shape[2])
    dq_SPE, dk_SPE, dv_SPE = (q_SPE.new_empty(*q_SPE.shape[:2], width) for _ in range(3))
    k_SEP = k_SPE[..., :width].mT.contiguous()
    blocks = RowBlocks(len(q_SPE), padded, q_SPE.dtype)
    shares, dscores = blocks.memory(q_SPE), blocks.memory(q_SPE)
    for s in blocks.sequences():
        # float32: a sum over blocks. Transposed: a product whose left matrix is dscores.T would
        # take twice as long.
        dq_MEP = torch.zeros_like(k_SEP[s], dtype=wide)
        for r in blocks.rows():  # of keys
            shares_MRP, dscores_MRP = blocks.part(shares, s, r), blocks.part(dscores, s, r)
            torch.baddbmm(
                shares_MRP, k_SPE[s, r], q_SPE[s].mT, beta=0.0, alpha=scale, out=shares_MRP
            ).exp_()
            torch.bmm(v_SPE[s, r], dout_SPE[s].mT, out=dscores_MRP).mul_(shares_MRP)
            dv_SPE[s, r] = torch.bmm(shares_MRP, dout_SPE[s, :, :width])
            dk_SPE[s, r] = torch.bmm(dscores_MRP, q_SPE[s, :, :width])
            dq_MEP += torch.bmm(k_SEP[s, :, r], dscores_MRP)
        dq_SPE[s] = dq_MEP.mT
    factors = (scale / enlarged, scale / enlarged, 1.0 / enlarged)
    for into_BHNC, found_SPE, factor in zip(into, (dq_SPE, dk_SPE, dv_SPE), factors, strict=True):
        found_BHNC = found_SPE[:, :num_tokens, :channels].unflatten(0, into_BHNC.shape[:2])
        torch.mul(found_BHNC, factor, out=into_BHNC)


def _extended(x_BHNC: Tensor, last_BHN: Tensor | None) -> Tensor:
    """x with one more channel, in bf16 two and padding: (S, P, E).

    Args:
        x_BHNC: any strides.
        last_BHN: numbers of the further channel, float32; None: 1.
    """
    num_crops, num_heads, num_tokens, channels = x_BHNC.shape
    is_narrow = x_BHNC.dtype == torch.bfloat16
    parts = 2 if is_narrow else 1
    padded, width = num_tokens, channels + parts
    if is_narrow:
        padded, width = _whole_tiles(padded), _whole_tiles(width)
    extended = x_BHNC.new_zeros(num_crops, num_heads, padded, width)
    inside = extended[:, :, :num_tokens]
    inside[..., :channels] = x_BHNC
    if last_BHN is None:
        inside[..., channels : channels + parts] = 1.0
    else:
        inside[..., channels] = last_BHN
        if is_narrow:
            inside[..., channels + 1] = last_BHN - inside[..., channels].to(last_BHN.dtype)
    return extended.flatten(0, 1)


def _whole_tiles(size: int) -> int:
    """The size, rounded up to a multiple of the tile."""
    return -(-size // tile()) * tile()


class RowBlocks:
    """How S matrices of N x N numbers are cut into blocks of rows of about equal size.

    Each thread works on a sequence of its own.

    Args:
        num_sequences: number S of matrices.
        num_tokens: rows and columns N of a matrix.
        dtype: type of the numbers.
    """

    def __init__(self, num_sequences: int, num_tokens: int, dtype: torch.dtype) -> None:
        self.num_sequences, self.num_tokens = num_sequences, num_tokens
        fitting = max(1, BLOCK_BYTES // (dtype.itemsize * num_tokens))
        num_blocks = -(-num_tokens // fitting)
        self.num_rows = min(_whole_tiles(-(-num_tokens // num_blocks)), num_tokens)
        self.at_once = min(torch.get_num_threads(), num_sequences)

    def sequences(self) -> Iterator[slice]:
        """Ranges of sequences, one after another."""
        return _ranges(self.num_sequences, self.at_once)

    def rows(self) -> Iterator[slice]:
        """Ranges of rows, one block after another."""
        return _ranges(self.num_tokens, self.num_rows)

    def memory(self, like: Tensor) -> Tensor:
        """Memory of one block of all sequences at a time."""
        return like.new_empty(self.at_once * self.num_rows * self.num_tokens)

    def part(self, memory: Tensor, s: slice, r: slice) -> Tensor:
        """The block of some sequences and rows, (M, R, N), in the memory."""
        shape = (s.stop - s.start, r.stop - r.start, self.num_tokens)
        return memory[: math.prod(shape)].view(shape)


def _ranges(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
