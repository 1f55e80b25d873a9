"""Scores of features against prototypes, computed by chunks of rows.

Plain form:

    scores_GBK = features_GBW @ prototypes_KW.T / temperature + bias_K

With 65,536 prototypes this matrix is the largest of a training step, so it never exists as a whole:
a chunk of its rows is computed, used and overwritten by the next. A chunk is large, because a
matrix product reads all prototypes once for each chunk. Softmax and sums pass over the scores a
dozen times: they work on a few rows of the chunk at a time, a piece, which stays in the cache.

Axes: G teacher views, B rows of a view (class tokens or masked patches), C rows of a chunk, P rows
of a piece, N rows of all views of a chunk or piece, W bottleneck width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tapct.nn.fake import is_fake

CHUNK_BYTES = 1 << 26  # 64 MiB of float32 scores in a chunk
PIECE_BYTES = 1 << 20  # 1 MiB of float32 scores in a piece: two pieces fit in the cache of a core
GPU_PIECE_BYTES = 1 << 24  # a GPU has a larger cache, and each operation on a piece is a launch
# Numbers between two rows of a chunk on a CPU. The number of prototypes is often a power of two:
# without a gap, all rows of a column would lie in the same few places of the cache.
ROW_GAP = 16


@dataclass(frozen=True)
class TeacherScores:
    """Scores of the teacher, of which only the factors are kept.

    Args:
        features_GBW: features on the unit sphere.
        prototypes_KW: effective last layer.
        temperature: temperature of the teacher.
        bias_K: bias, added after the temperature.
        valid_B: bool, rows that count in the centre and in statistics of the targets; None: all.
    """

    features_GBW: Tensor
    prototypes_KW: Tensor
    temperature: float
    bias_K: Tensor
    valid_B: Tensor | None = None

    def products(self, rows: slice, chunks: Chunks, into_NK: Tensor) -> Tensor:
        """Products with the prototypes of some rows: (G, C, K), in the memory of `into_NK`.

        `scores_of` makes scores of them.
        """
        features_GCW = self.features_GBW[:, rows]
        features_NW = features_GCW.flatten(0, 1)
        if chunks.wide:
            # the product adds temperature and bias by itself, without a pass of its own
            torch.addmm(
                self.bias_K,
                features_NW,
                self.prototypes_KW.T,
                alpha=1.0 / self.temperature,
                out=into_NK[: len(features_NW)],
            )
        else:
            chunks.product(features_NW, self.prototypes_KW, into_NK)
        return into_NK[: len(features_NW)].unflatten(0, features_GCW.shape[:2])

    def scores_of(self, products_GCK: Tensor, piece: slice, into_NK: Tensor) -> Tensor:
        """Scores of the rows of a piece, from `products`: (G, P, K), in the memory of `into_NK`."""
        scores_GPK = copy_piece(products_GCK, piece, into_NK)
        if products_GCK.dtype == scores_GPK.dtype:
            return scores_GPK
        return scores_GPK.mul_(1.0 / self.temperature).add_(self.bias_K)

    def pieces(self, chunks: Chunks) -> Iterator[tuple[slice, Tensor]]:
        """All scores by pieces: rows, and their scores (G, P, K), which may be overwritten."""
        num_views = len(self.features_GBW)
        products_NK, scores_NK = chunks.memory(num_views), chunks.cache(num_views)
        for rows in chunks.ranges:
            products_GCK = self.products(rows, chunks, products_NK)
            for piece in chunks.pieces(rows):
                place = slice(rows.start + piece.start, rows.start + piece.stop)
                yield place, self.scores_of(products_GCK, piece, scores_NK)

    def narrowed(self) -> TeacherScores:
        """The same scores with features and prototypes rounded to the dtype of the product."""
        dtype = product_dtype(self.features_GBW)
        return replace(
            self,
            features_GBW=self.features_GBW.to(dtype),
            prototypes_KW=self.prototypes_KW.to(dtype),
        )

    def sum_of_scores(self) -> tuple[Tensor, Tensor]:
        """Sum (K,) over valid rows of the scores before temperature and bias, and the number of
        these rows; the centre is their mean.
        """
        # a sum of products with the same prototypes is the product of the sum: O(W K), not O(B W K)
        num_views, num_rows, _ = self.features_GBW.shape
        if self.valid_B is None:
            sum_W = self.features_GBW.sum((0, 1))
            # filled on the device: a copy from the host would wait for it
            count = sum_W.new_full((), float(num_views * num_rows))
        else:
            sum_W = (self.features_GBW * self.valid_B[:, None]).sum((0, 1))
            count = num_views * self.valid_B.sum().to(sum_W.dtype)
        # float32 under autocast too: the centre is a mean over many steps
        with torch.autocast(sum_W.device.type, enabled=False):
            return self.prototypes_KW @ sum_W, count


def product_dtype(like: Tensor) -> torch.dtype:
    """The dtype of autocast where it is enabled, else that of `like`."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def softmax(scores_VCK: Tensor, into_NK: Tensor) -> Tensor:
    """Softmax over the last axis, in the first V * C rows of `into_NK`, which may be the scores."""
    into_VCK = into_NK[: scores_VCK.shape[0] * scores_VCK.shape[1]].view_as(scores_VCK)
    return torch.softmax(scores_VCK, dim=-1, out=into_VCK)


def copy_piece(from_VCK: Tensor, piece: slice, into_NK: Tensor) -> Tensor:
    """Copy the rows of a piece out of a chunk: (V, P, K), in the memory and the dtype of
    `into_NK`.
    """
    part_VPK = from_VCK[:, piece]
    into_VPK = into_NK[: part_VPK.shape[0] * part_VPK.shape[1]].view(part_VPK.shape)
    return into_VPK.copy_(part_VPK)


class Chunks:
    """Ranges of rows whose scores take about `CHUNK_BYTES`, and the memory of one chunk.

    The memory is used again for every chunk: on a CPU, fresh pages from the system cost half as
    much time as the product that is written into them.

    Args:
        num_rows: rows of each view.
        views: views whose scores are computed at a time.
        like_KW: prototypes in the dtype of the products.
        dtype: dtype of the scores.
    """

    def __init__(self, num_rows: int, views: int, like_KW: Tensor, dtype: torch.dtype) -> None:
        num_prototypes = len(like_KW)
        row_bytes = dtype.itemsize * num_prototypes * views
        rows = min(max(1, CHUNK_BYTES // row_bytes), num_rows)
        self.ranges = [
            slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, max(rows, 1))
        ]
        # whether the work is cut for the small cache of a CPU
        self.is_small = like_KW.device.type == "cpu" and not is_fake(like_KW)
        piece_bytes = PIECE_BYTES if self.is_small else GPU_PIECE_BYTES
        self.piece_rows = min(max(1, piece_bytes // row_bytes), max(rows, 1))
        self.row_gap = ROW_GAP if self.is_small else 0
        self.rows, self.dtype, self.like_KW = rows, dtype, like_KW
        # under autocast the products of a chunk are narrow, and the scores of a piece wide
        self.wide = dtype == like_KW.dtype

    def memory(self, views: int) -> Tensor:
        """Memory (N, K) for the products of one chunk of `views` views, in their dtype.

        Plain form: rows without a gap between them.
        """
        num_prototypes = len(self.like_KW)
        wide_NK = self.like_KW.new_empty(self.rows * views, num_prototypes + self.row_gap)
        return wide_NK[:, :num_prototypes]

    def cache(self, views: int) -> Tensor:
        """Memory (N, K) for the scores of one piece of `views` views."""
        rows = min(self.piece_rows, self.rows) * views
        return self.like_KW.new_empty(rows, len(self.like_KW), dtype=self.dtype)

    def pieces(self, rows: slice) -> Iterator[slice]:
        """Ranges of rows within a chunk whose scores take about `PIECE_BYTES`."""
        num_rows = rows.stop - rows.start
        for start in range(0, num_rows, self.piece_rows):
            yield slice(start, min(start + self.piece_rows, num_rows))

    def product(self, features_NW: Tensor, prototypes_KW: Tensor, into_NK: Tensor) -> Tensor:
        """features @ prototypes.T, (N, K), in the first N rows of `into_NK`."""
        return torch.mm(features_NW, prototypes_KW.T, out=into_NK[: len(features_NW)])
