"""One label map from structures that may overlap: the smaller structure is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Overlay:
    """Paint structures one after the other; where two overlap, the one with fewer voxels is kept.

    So a tumour stays visible in its liver, and an organ in the outline of the body, in whatever
    order a file lists them. Of two structures with equal numbers of voxels the first is kept.

    Args:
        shape_ZYX: shape of the label map.
    Attributes:
        labels_ZYX: uint16, the map so far.
        num_overlapping: number of voxels that two structures claimed, counted once per claim.
        claims: label value -> places, in the flat label map, of the voxels of each of its parts,
            whoever has them in the end; filled where `keep_claims` asks for it.
    """

    def __init__(self, shape_ZYX: Sequence[int], *, keep_claims: bool = False) -> None:
        self.claims: dict[int, list[np.ndarray]] = {}
        self._keep_claims = keep_claims
        self.labels_ZYX = np.zeros(tuple(shape_ZYX), dtype=np.uint16)
        self.num_overlapping = 0
        self._size_of = np.zeros(1 << 16, dtype=np.int64)  # label value -> voxels of its structure

    def add(self, value: int, mask_ZYX: np.ndarray) -> None:
        """Paint a whole structure.

        Args:
            value: its label value.
            mask_ZYX: bool, True inside.
        """
        everywhere = tuple(slice(0, size) for size in self.labels_ZYX.shape)
        self.add_part(value, mask_ZYX, everywhere, int(np.count_nonzero(mask_ZYX)))

    def add_part(
        self, value: int, mask_ZYX: np.ndarray, place: tuple[slice, ...], num_voxels: int
    ) -> None:
        """Paint a part of a structure.

        Args:
            value: label value of the structure.
            mask_ZYX: bool, True inside, of the shape of the part.
            place: where the part lies in the label map.
            num_voxels: voxels of the whole structure, the same for all of its parts.
        """
        self._size_of[value] = num_voxels
        present_ZYX = self.labels_ZYX[place]
        claimed_ZYX = mask_ZYX & (present_ZYX != 0) & (present_ZYX != value)
        self.num_overlapping += int(np.count_nonzero(claimed_ZYX))
        wins_ZYX = mask_ZYX & ((present_ZYX == 0) | (self._size_of[present_ZYX] > num_voxels))
        present_ZYX[wins_ZYX] = value
        if self._keep_claims:
            starts = [side.start or 0 for side in place]
            indices = [index + start for index, start in zip(np.nonzero(mask_ZYX), starts)]
            claimed = np.ravel_multi_index(indices, self.labels_ZYX.shape)
            self.claims.setdefault(value, []).append(claimed)

    def note(self) -> str:
        """One line about overlaps; empty where there are none."""
        if not self.num_overlapping:
            return ""
        return f"structures overlap in {self.num_overlapping} voxels; the smaller one is kept"
