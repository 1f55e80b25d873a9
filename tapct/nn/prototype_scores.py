"""Scores of features against prototypes, in chunks of rows, so that the whole matrix never
exists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 26  # of one chunk of float32 scores


class Chunks:
    """Row ranges whose scores take about `CHUNK_BYTES`, and memory for those of one of them.

    It is used again for every range: fresh pages from the system cost a CPU half as much as the
        product in them.
    """

    def __init__(self, num_rows: int, views: int, like_KW: Tensor, dtype: torch.dtype) -> None:
        """
        Args:
            num_rows: of each of the views.
            like_KW: prototypes in the dtype of the products.
            dtype: of the scores.
        """
        num_prototypes = len(like_KW)
        rows = min(max(1, CHUNK_BYTES // (dtype.itemsize * num_prototypes * views)), num_rows)
        self.ranges = [
            slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, max(rows, 1))
        ]
        self.rows, self.dtype, self.like_KW = rows, dtype, like_KW
        self.wide = dtype == like_KW.dtype
        self.narrow_NK = like_KW.new_empty(0 if self.wide else rows * views, num_prototypes)

    def memory(self, views: int) -> Tensor:
        """For the scores of so many views of one range: (N, K)."""
        return self.like_KW.new_empty(self.rows * views, len(self.like_KW), dtype=self.dtype)

    def product(self, features_NW: Tensor, prototypes_KW: Tensor, into_NK: Tensor) -> Tensor:
        """features @ prototypes.T in the first N rows of that memory."""
        into_NK = into_NK[: len(features_NW)]
        if self.wide:
            return torch.mm(features_NW, prototypes_KW.T, out=into_NK)
        return into_NK.copy_(
            torch.mm(features_NW, prototypes_KW.T, out=self.narrow_NK[: len(features_NW)])
        )

    def narrowed(self, wide_NK: Tensor) -> Tensor:
        """The same numbers in the dtype of the products."""
        return wide_NK if self.wide else self.narrow_NK[: len(wide_NK)].copy_(wide_NK)


@dataclass(frozen=True)
class TeacherScores:
    """Teacher scores that are never written out: features times prototypes.

    Args:
        features_GBW: on the unit sphere.
        prototypes_KW: the effective last layer.
        temperature: of the teacher.
        bias_K: added to the scores after the temperature.
        valid_B: bool, rows that count in targets' statistics and centre; None: all.
    """

    features_GBW: Tensor
    prototypes_KW: Tensor
    temperature: float
    bias_K: Tensor
    valid_B: Tensor | None = None

    def chunk(self, rows: slice, chunks: Chunks, into_NK: Tensor) -> Tensor:
        """Scores after temperature and bias: (G, C, K), in that memory."""
        features_GCW = self.features_GBW[:, rows]
        features_NW, scale = features_GCW.flatten(0, 1), 1.0 / self.temperature
        scaled_NK = into_NK[: len(features_NW)]
        if chunks.wide:
            torch.addmm(self.bias_K, features_NW, self.prototypes_KW.T, alpha=scale, out=scaled_NK)
        else:
            chunks.product(features_NW, self.prototypes_KW, into_NK).mul_(scale).add_(self.bias_K)
        return scaled_NK.unflatten(0, features_GCW.shape[:2])

    def narrowed(self) -> TeacherScores:
        """The same with features and prototypes rounded to the dtype in which the product is to be
        made.
        """
        dtype = product_dtype(self.features_GBW)
        return replace(
            self,
            features_GBW=self.features_GBW.to(dtype),
            prototypes_KW=self.prototypes_KW.to(dtype),
        )

    def sum_of_scores(self) -> tuple[Tensor, Tensor]:
        """Sum over valid rows of the plain scores, (K,), and the number of these rows: what the
        centre is made of.
        """
        num_views, num_rows, _ = self.features_GBW.shape
        if self.valid_B is None:
            sum_W, count = (
                self.features_GBW.sum((0, 1)),
                self.features_GBW.new_tensor(float(num_views * num_rows)),
            )
        else:
            sum_W = (self.features_GBW * self.valid_B[:, None]).sum((0, 1))
            count = num_views * self.valid_B.sum().to(sum_W.dtype)
        return self.prototypes_KW @ sum_W, count


def product_dtype(like: Tensor) -> torch.dtype:
    """That of autocast where it is on, else that of the features."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
