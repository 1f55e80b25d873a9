"""Features on the voxels of a scan, computed where they are read.

384 channels of 192x512x512 voxels are 77 GB, so they are never in memory as a whole unless somebody
asks for all of them. Linear interpolation from the centres of the patches is separable: three small
matrices, of which a box of voxels needs some rows only.

Axes: D channels, Z Y X depth height width in voxels, z y x the same in patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tapct.base.exits import UserError
from tapct.eval.features.dense import PatchGrid

_WORK_BYTES = 8 << 20  # of each temporary while a box is computed
SLAB_BYTES = 64 << 20  # of a slab of `slabs`, by default
_AXES = ("channel", "z", "y", "x")


class VoxelFeatures:
    """The features of a scan, interpolated linearly to its voxels, on demand.

    It is indexed as an array (D, Z, Y, X) with integers and slices: `voxels[:, 40]` is one slice,
    `voxels[:, z, y, x]` one voxel. Each access computes the result again. Its memory is that of the
    result plus at most 32 MB. `numpy.asarray(voxels)` computes everything at once.

    Args:
        features_DZYX: float32 on the patch grid.
        grid: patch grid of the scan.
    """

    dtype = np.dtype(np.float32)
    ndim = 4

    def __init__(self, features_DZYX: np.ndarray, grid: PatchGrid) -> None:
        assert features_DZYX.shape[1:] == grid.shape, (features_DZYX.shape, grid.shape)
        self.features_DZYX, self.grid = features_DZYX, grid
        self._matrices = [grid.matrix(axis).numpy() for axis in range(3)]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels, and voxels of the scan along (z, y, x)."""
        return (len(self.features_DZYX), *self.grid.original)

    @property
    def nbytes(self) -> int:
        """Bytes of all features on all voxels."""
        return 4 * int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"VoxelFeatures(shape={self.shape}, {self.nbytes / 1e9:.3g} GB if read as a whole)"

    def __getitem__(self, index: Any) -> np.ndarray:
        """The features of a box of voxels, float32.

        Args:
            index: integers and slices, at most one per axis; `...` for all axes in between.
        Raises:
            UserError: another kind of index.
            IndexError: outside of the scan.
        """
        items = _one_per_axis(index)
        chosen = []
        for name, item, size in zip(_AXES, items, self.shape, strict=True):
            if isinstance(item, (int, np.integer)) and not -size <= item < size:
                raise IndexError(f"index {item} along {name} is outside of the {size} there are")
            chosen.append(np.atleast_1d(np.arange(size)[item]))
        box = self._box(*chosen)
        kept = tuple(0 if isinstance(item, (int, np.integer)) else slice(None) for item in items)
        found: np.ndarray = box[kept]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the features on voxels are computed, so they are always a copy")
        return self[...] if dtype is None else self[...].astype(dtype)

    def slabs(self, max_bytes: int = SLAB_BYTES) -> Iterator[tuple[int, int, np.ndarray]]:
        """The whole scan, a slab of slices after the other.

        Args:
            max_bytes: size of a slab; at least one slice is computed.
        Yields:
            (first slice, end slice, float32 (D, slices, Y, X)).
        """
        channels, depth, height, width = self.shape
        step = max(1, max_bytes // (4 * channels * height * width))
        for start in range(0, depth, step):
            end = min(depth, start + step)
            yield start, end, self[:, start:end]

    def _box(self, d: np.ndarray, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The features at the voxels of three lists of indices, for a list of channels."""
        mz, my, mx = (matrix[rows] for matrix, rows in zip(self._matrices, (z, y, x), strict=True))
        out = np.empty((len(d), len(z), len(y), len(x)), dtype=np.float32)
        if not out.size:
            return out
        # a temporary holds patches of the rows along z that are needed, or voxels; four are alive
        _, grid_y, grid_x = self.grid.shape
        plane = 4 * max(len(y), grid_y) * max(len(x), grid_x)
        slices = max(1, min(len(z), _WORK_BYTES // plane))
        for start in range(0, len(z), slices):
            some_mz = mz[start : start + slices]
            used = np.flatnonzero(some_mz.any(0))
            rows = slice(used[0], used[-1] + 1)
            channels = max(1, _WORK_BYTES // (plane * max(slices, rows.stop - rows.start)))
            for first in range(0, len(d), channels):
                patches = self.features_DZYX[d[first : first + channels], rows]
                planes = np.einsum("dgyx,zg->dzyx", patches, some_mz[:, rows], optimize=True)
                box = my @ planes @ mx.T
                out[first : first + channels, start : start + slices] = box
        return out


def _one_per_axis(index: Any) -> list[Any]:
    """An index of `[]` as four integers or slices.

    Raises:
        UserError: it has something else, or too many entries.
    """
    given = list(index) if isinstance(index, tuple) else [index]
    rest = 4 - len(given)
    for place, item in enumerate(given):
        if item is Ellipsis:
            given[place : place + 1] = [slice(None)] * (rest + 1)
            break
    given += [slice(None)] * (4 - len(given))
    for item in given:
        is_integer = isinstance(item, (int, np.integer)) and not isinstance(item, bool)
        if not (is_integer or isinstance(item, slice)) or len(given) > 4:
            raise UserError(
                f"features on voxels are indexed by integers and slices along (channel, z, y, x), "
                f"not by {index!r}"
            )
    return given
