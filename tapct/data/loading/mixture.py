"""Which scan a sample shows where a run is trained on several archives, each with its share.

The samples of the run are divided into blocks of `sum(counts)` samples. In every block, archive k
gets exactly `counts[k]` of them, at places that a keyed permutation chooses, and shows its own
scans in passes as a single archive does (see `sampler`). So a sample costs a few hashes wherever in
the run it lies, nothing is remembered, and ranks and world sizes do not matter.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from tapct.base import rng
from tapct.base.exits import UserError
from tapct.data.loading.sampler import permute, scan_of

LARGEST_BLOCK = 10_000  # samples in which the shares hold exactly, at most


class Mixture:
    """Archives and their shares of the samples.

    Args:
        names: name of each archive, by which its order of scans is drawn: it stays the same when
            other archives are added.
        rows: rows of each archive that are drawn from, at least one each.
        weights: weight of each archive; its share is its weight over the sum of all.
    Attributes:
        counts: samples of each archive in a block.
    Raises:
        UserError: a weight is so small that the archive would get no sample.
    """

    def __init__(
        self,
        names: Sequence[str],
        rows: Sequence[Sequence[int] | np.ndarray],
        weights: Sequence[float],
    ) -> None:
        assert len(names) == len(rows) == len(weights) and all(len(some) for some in rows)
        self.names, self.rows = tuple(names), tuple(rows)
        self.counts = counts_of(names, weights)
        self._ends = list(accumulate(self.counts))

    @property
    def block(self) -> int:
        """Number of samples in which the shares hold exactly."""
        return self._ends[-1]

    def place(self, sample: int, seed: int) -> tuple[int, int]:
        """The archive that a sample shows, and the number of the sample among its samples.

        Args:
            sample: its number in the whole run, >= 0.
            seed: random seed of the run.
        """
        number, position = divmod(sample, self.block)
        slot = permute(position, self.block, rng.hash_int(seed, "mixture block", number))
        archive = bisect_right(self._ends, slot)
        first = self._ends[archive] - self.counts[archive]
        return archive, number * self.counts[archive] + slot - first

    def scan_of(self, sample: int, seed: int, replacement: int = 0) -> int:
        """The row that a sample shows.

        Args:
            sample: its number in the whole run, >= 0.
            seed: random seed of the run.
            replacement: number of damaged scans before; the n-th replacement is the scan that the
                same archive shows n samples later.
        """
        archive, number = self.place(sample, seed)
        rows = self.rows[archive]
        own_seed = rng.hash_int(seed, f"archive {self.names[archive]}")
        return int(rows[scan_of(number + replacement, len(rows), own_seed)])


def counts_of(names: Sequence[str], weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each archive in a block: whole numbers in the ratio of the weights, as small as
    the ratio allows.

    Arguments and errors as in `Mixture`.
    """
    total = math.fsum(weights)
    exact = [weight / total * LARGEST_BLOCK for weight in weights]
    counts = [math.floor(share + 1e-9) for share in exact]
    # the largest remainders get what is missing to a whole block
    order = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in order[: LARGEST_BLOCK - sum(counts)]:
        counts[k] += 1
    if 0 in counts:
        k = counts.index(0)
        raise UserError(
            f"data.stores: archive {names[k]} has weight {weights[k]:g} of {total:g}, less than "
            f"one sample in {LARGEST_BLOCK}; raise its weight or leave it out"
        )
    divisor = math.gcd(*counts)
    return tuple(count // divisor for count in counts)
