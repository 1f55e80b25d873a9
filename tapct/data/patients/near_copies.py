"""Near copies: one scan that was cropped, padded or mirrored and saved again.

A slice is described by its body mass: the sum over its voxels of how far each is above -500 HU.
Air around the body, padding and mirroring do not change it, and it is an exact number with tens of
bits, so two different slices of CT rarely share it. Two scans are near copies where four
neighbouring slices have the same four masses, none of them 0 and no two of them equal. Slices that
were resampled, filtered or cut inside the body are not found.

Not all of a scan's slices are compared: a sketch holds the smallest hashes of its groups of four
slices. The sketch of a part holds all hashes of the whole's sketch that lie in the part, so a part
of one third is missed with a probability of (2/3)^32 = 2e-6.
"""

from __future__ import annotations

import tempfile
from array import array
from pathlib import Path

import numpy as np

_ABOVE_HU = -500  # above the air around the body and its noise
SLICES = 4  # neighbouring slices that must agree
SKETCH = 32  # hashes in a sketch
_BLOCK_VOXELS = 1 << 17
_HASHES_AT_ONCE = 1 << 20  # that are compared at once
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)  # odd constants of SplitMix64, see base/hashing.py


def sketch(hu_ZYX: np.ndarray) -> bytes:
    """The sketch of a scan, the same for its mirror images.

    Args:
        hu_ZYX: int16 voxels.
    Returns:
        At most 32 hashes of 8 bytes.
    """
    masses_Z = np.empty(len(hu_ZYX), np.int64)
    # a few slices at a time stay in the cache of the CPU
    step = max(1, _BLOCK_VOXELS // max(1, hu_ZYX[0].size))
    for z in range(0, len(hu_ZYX), step):
        above_ZYX = np.maximum(hu_ZYX[z : z + step], np.int16(_ABOVE_HU))
        # int32: a column of 65535 voxels at 32767 HU fits
        columns_ZX = above_ZYX.sum(axis=1, dtype=np.int32)
        masses_Z[z : z + step] = columns_ZX.sum(axis=1, dtype=np.int64)
    masses_Z -= _ABOVE_HU * hu_ZYX[0].size
    return _sketch_of(masses_Z).tobytes()


def _sketch_of(masses_Z: np.ndarray) -> np.ndarray:
    """The smallest hashes of all groups of neighbouring masses, uint64, sorted."""
    if len(masses_Z) < SLICES:
        return np.empty(0, np.uint64)
    groups_N4 = np.lib.stride_tricks.sliding_window_view(masses_Z, SLICES)
    ordered_N4 = np.sort(groups_N4, axis=1)
    is_telling = (np.diff(ordered_N4, axis=1) > 0).all(axis=1) & (ordered_N4[:, 0] > 0)
    groups_N4 = groups_N4[is_telling].astype(np.uint64)
    forward, backward = _hashes(groups_N4), _hashes(groups_N4[:, ::-1])
    return np.unique(np.minimum(forward, backward))[:SKETCH]


def _hashes(groups_N4: np.ndarray) -> np.ndarray:
    """A hash of each row, uint64; its order counts."""
    state = np.zeros(len(groups_N4), np.uint64)
    for masses in groups_N4.T:
        state = (state + masses) * np.uint64(_MIX[0])
        state = (state ^ (state >> np.uint64(31))) * np.uint64(_MIX[1])
        state ^= state >> np.uint64(29)
    return state


class Sketches:
    """The sketches of an archive, on disk: 256 bytes a scan are too many for the memory. Its `with`
    block closes the temporary file, which removes it.

    Args:
        folder: folder of the temporary file; None for that of the system.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._counts = array("i")  # of hashes, by scan

    def __enter__(self) -> Sketches:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, content: bytes) -> None:
        """Add the sketch of the next scan; empty for none."""
        self._counts.append(len(content) // 8)
        self._file.write(content)

    def pairs(self) -> np.ndarray:
        """Numbers of near copies, each with the next one that shares a hash with it; int64, two
        columns, sorted.
        """
        self._file.flush()
        ends = np.cumsum(np.frombuffer(self._counts, np.int32), dtype=np.int64)
        num_parts = 1 + int(ends[-1] if len(ends) else 0) // _HASHES_AT_ONCE
        found = [np.empty((0, 2), np.int64)]
        for part in range(num_parts):  # equal hashes are in the same part
            hashes, places = self._part(part, num_parts)
            order = np.argsort(hashes, kind="stable")
            hashes = hashes[order]
            owners = np.searchsorted(ends, places[order], side="right")
            is_shared = hashes[1:] == hashes[:-1]
            found.append(np.stack([owners[:-1][is_shared], owners[1:][is_shared]], axis=1))
        return np.unique(np.concatenate(found), axis=0)

    def _part(self, part: int, num_parts: int) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of one part of all, and their places in the file."""
        self._file.seek(0)
        hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        start = 0
        while content := self._file.read(8 * _HASHES_AT_ONCE):
            block = np.frombuffer(content, np.uint64)
            chosen = np.flatnonzero(block % np.uint64(num_parts) == part)
            hashes.append(block[chosen])
            places.append(chosen + start)
            start += len(block)
        return np.concatenate(hashes), np.concatenate(places)
