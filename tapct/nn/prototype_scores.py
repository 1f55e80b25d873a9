"""Scores of features against prototypes, computed by chunks of rows.

Plain form:

    scores_GBK = features_GBW @ prototypes_KW.T / temperature + bias_K

With 65,536 prototypes this matrix is the largest of a training step, so it never exists as a whole:
a chunk of its rows is computed, used and overwritten by the next.

Axes: G teacher views, B rows of a view (class tokens or masked patches), C rows of a chunk, N rows
of all views of a chunk, W bottleneck width, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 26  # 64 MiB of float32 scores in a chunk


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

    def chunk(self, rows: slice, chunks: Chunks, into_NK: Tensor) -> Tensor:
        """Scores of some rows after temperature and bias: (G, C, K), in the memory of `into_NK`."""
        features_GCW = self.features_GBW[:, rows]
        features_NW, scale = features_GCW.flatten(0, 1), 1.0 / self.temperature
        scaled_NK = into_NK[: len(features_NW)]
        if chunks.wide:
            # one kernel: a chunk does not fit into the cache, so each pass over it costs
            torch.addmm(self.bias_K, features_NW, self.prototypes_KW.T, alpha=scale, out=scaled_NK)
        else:
            chunks.product(features_NW, self.prototypes_KW, into_NK).mul_(scale).add_(self.bias_K)
        return scaled_NK.unflatten(0, features_GCW.shape[:2])

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
        rows = min(max(1, CHUNK_BYTES // (dtype.itemsize * num_prototypes * views)), num_rows)
        self.ranges = [
            slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, max(rows, 1))
        ]
        self.rows, self.dtype, self.like_KW = rows, dtype, like_KW
        # under autocast the product is written in its narrow dtype first, then widened
        self.wide = dtype == like_KW.dtype
        self.narrow_NK = like_KW.new_empty(0 if self.wide else rows * views, num_prototypes)

    def memory(self, views: int) -> Tensor:
        """Memory (N, K) for the scores of one chunk of `views` views."""
        return self.like_KW.new_empty(self.rows * views, len(self.like_KW), dtype=self.dtype)

    def product(self, features_NW: Tensor, prototypes_KW: Tensor, into_NK: Tensor) -> Tensor:
        """features @ prototypes.T, (N, K), in the first N rows of `into_NK`."""
        into_NK = into_NK[: len(features_NW)]
        if self.wide:
            return torch.mm(features_NW, prototypes_KW.T, out=into_NK)
        narrow_NK = self.narrow_NK[: len(features_NW)]
        return into_NK.copy_(torch.mm(features_NW, prototypes_KW.T, out=narrow_NK))

    def narrowed(self, wide_NK: Tensor) -> Tensor:
        """The same numbers rounded to the dtype of the products."""
        return wide_NK if self.wide else self.narrow_NK[: len(wide_NK)].copy_(wide_NK)
