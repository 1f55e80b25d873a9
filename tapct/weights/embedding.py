"""The features of one scan as arrays, with their place in the patient.

Axes: D channels, Z Y X patches of the grid; positions are LPS mm in the order (x, y, z).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tapct.base import files
from tapct.base.exits import UserError
from tapct.data.scans.geometry import voxel_to_mm
from tapct.eval.features.dense import PatchGrid, WindowVectors
from tapct.types import UPRIGHT, Directions, Refused, Volume
from tapct.weights.voxel_features import VoxelFeatures


class BlockArrays:
    """The features of the blocks that were computed, by number; -1 is the last block of the model.

    Args:
        arrays: number of a block, from 0 -> float32 (D, Z, Y, X).
        num_blocks: number of blocks of the model.
    """

    def __init__(self, arrays: Mapping[int, np.ndarray], num_blocks: int) -> None:
        self._arrays, self.num_blocks = dict(sorted(arrays.items())), num_blocks

    def __getitem__(self, block: int) -> np.ndarray:
        """Features of a block.

        Raises:
            UserError: it does not exist, or was not computed.
        """
        number = block + self.num_blocks if block < 0 else block
        if number not in self._arrays:
            known = ", ".join(map(str, self._arrays))
            if not 0 <= number < self.num_blocks:
                raise UserError(
                    f"block {block} does not exist: the model has the blocks 0 to "
                    f"{self.num_blocks - 1}"
                )
            raise UserError(
                f"block {block} was not computed, only {known}; call embed(..., blocks=[{number}])"
            )
        return self._arrays[number]

    def __contains__(self, block: object) -> bool:
        return block in self._arrays

    def __iter__(self) -> Iterator[int]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"BlockArrays({', '.join(map(str, self._arrays))} of {self.num_blocks} blocks)"


@dataclass(frozen=True)
class Embedding:
    """Frozen features of one scan as plain arrays.

    Args:
        features_DZYX: features of the last block on the patch grid, float32.
        cls_D: class token of the last block, mean over windows, float32.
        spacing_mm: distance of patch centres along (z, y, x).
        patch: voxels (z, y, x) of a patch in the resized scan; of a cell, where
            `eval.preprocess.refine` divides patches into cells.
        resized: shape of the scan after the in-plane resize.
        original: shape of the scan before it.
        origin_mm: LPS position (x, y, z) of the centre of the first patch.
        directions: LPS directions of the grid's axes x, y and z.
        block: features of each block that was asked for, e.g. `block[3]` or `block[-1]`.
    """

    features_DZYX: np.ndarray
    cls_D: np.ndarray
    spacing_mm: tuple[float, float, float]
    patch: tuple[int, int, int]
    resized: tuple[int, int, int]
    original: tuple[int, int, int]
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    directions: Directions = UPRIGHT
    block: BlockArrays = field(default_factory=lambda: BlockArrays({}, 0))

    def __repr__(self) -> str:
        """Shapes in place of the features, which would fill a screen or a notebook."""
        spacing = ", ".join(f"{distance:.4g}" for distance in self.spacing_mm)
        return (
            f"Embedding(features_DZYX={self.features_DZYX.shape}, cls_D={self.cls_D.shape}, "
            f"spacing_mm=({spacing}), {self.block!r})"
        )

    @property
    def grid(self) -> PatchGrid:
        """Where the patches lie in the voxels of the scan."""
        return PatchGrid(self.patch, self.resized, self.original)

    @property
    def centres_mm(self) -> np.ndarray:
        """Position of the centre of every patch: float64 (Z, Y, X, 3), LPS mm (x, y, z).

        They are positions in the patient, as DICOM gives them, so a scan that is stored in another
        orientation has the same centres.
        """
        steps_33 = np.asarray(self.directions) * np.asarray(self.spacing_mm[::-1])[:, None]
        z, y, x = (np.arange(size)[:, None] for size in self.features_DZYX.shape[1:])
        centres: np.ndarray = np.asarray(self.origin_mm) + (
            (z * steps_33[2])[:, None, None] + (y * steps_33[1])[:, None] + x * steps_33[0]
        )
        return centres

    def to_voxels(self, block: int | None = None) -> VoxelFeatures:
        """Features on the voxels of the scan, linearly interpolated between the centres of patches.

        Nothing is computed before the result is indexed or read by `slabs()`, and then the memory
        is that of the part that is read plus at most 32 MB.

        Args:
            block: number of the block; None for the last one.
        """
        features_DZYX = self.features_DZYX if block is None else self.block[block]
        return VoxelFeatures(features_DZYX, self.grid)

    def arrays(self) -> dict[str, np.ndarray]:
        """All fields under their names; further blocks as `block_3_DZYX`."""
        found = {}
        for name in self.__dataclass_fields__:
            if name != "block":
                found[name] = np.asarray(getattr(self, name))
        for block in self.block:
            if block != self.block.num_blocks - 1:
                found[f"block_{block}_DZYX"] = self.block[block]
        return found

    def write_npz(self, path: Path) -> None:
        """Write `arrays()` as a compressed .npz, whole or not at all.

        Args:
            path: file to write; its folder is made.
        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        path = files.expand_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as file:
                np.savez_compressed(file, **self.arrays())  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(f"cannot write {path}: {files.first_cause(error)}") from error


def grid_origin_mm(volume: Volume, grid: PatchGrid) -> tuple[float, float, float]:
    """LPS position (x, y, z) of the centre of the first patch of a scan."""
    spacing_mm = volume.spacing_mm
    along_zyx = grid.centre_mm((0, 0, 0), spacing_mm)
    voxel_zyx = [mm / spacing for mm, spacing in zip(along_zyx, spacing_mm, strict=True)]
    x, y, z, _ = (voxel_to_mm(volume) @ [*voxel_zyx[::-1], 1.0]).tolist()
    return x, y, z


class ArraySink:
    """Receives the features of one scan as arrays; each row is copied once, to its place.

    Args:
        grid: patch grid of the scan.
    """

    def __init__(self, grid: PatchGrid) -> None:
        self.grid = grid
        self.features_DZYX: dict[int, np.ndarray] = {}
        self.cls_D: dict[int, np.ndarray] = {}

    def rows(self, block: int, first: int, rows_ZYXD: Tensor) -> None:
        """Copy rows of patches."""
        rows = rows_ZYXD.permute(3, 0, 1, 2).cpu().numpy()
        if block not in self.features_DZYX:
            self.features_DZYX[block] = np.empty((len(rows), *self.grid.shape), dtype=np.float32)
        self.features_DZYX[block][:, first : first + rows.shape[1]] = rows

    def finish(self, block: int, windows: WindowVectors) -> None:
        """Keep the mean class token.

        Raises:
            Refused: features are not finite.
        """
        check_finite(windows)
        self.cls_D[block] = windows.cls_WD.mean(0).cpu().numpy()

    def embedding(self, volume: Volume, num_blocks: int, wanted: Sequence[int]) -> Embedding:
        """The features of a finished scan.

        Args:
            volume: the scan.
            num_blocks: blocks of the model.
            wanted: numbers of the blocks to keep beside the last one.
        """
        last, grid = num_blocks - 1, self.grid
        kept = {block: self.features_DZYX[block] for block in {*wanted, last}}
        return Embedding(
            self.features_DZYX[last],
            self.cls_D[last],
            grid.spacing_mm(volume.spacing_mm),
            grid.patch,
            grid.resized,
            grid.original,
            grid_origin_mm(volume, grid),
            volume.directions,
            BlockArrays(kept, num_blocks),
        )


def check_finite(windows: WindowVectors) -> None:
    """Refuse a scan with features that are NaN or infinite.

    Raises:
        Refused: not_finite.
    """
    if not bool(torch.isfinite(windows.cls_WD).all() & torch.isfinite(windows.std_WD).all()):
        raise Refused(
            "not_finite",
            "its features are not finite: the weights are damaged, or their dtype is too narrow; "
            "use float32 or bfloat16",
        )
