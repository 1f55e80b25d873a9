"""Vectors of whole scans, pooled from the features of a frozen backbone.

    cls            mean class token over the windows
    mean           mean of the patches
    cls_mean       cls, then mean
    mean_std_max   mean, standard deviation and largest value of the patches, channel by channel
    registers      mean register tokens over the windows, one after the other
    mask:ORGAN     mean of the patches in an organ, weighted by the organ's share of each patch

    last           the last block
    middle         the block in the middle: half of the blocks are up to it
    last4          the vectors of the last four blocks, one after the other

Axes: D channels, N patches of the grid in raster order, R registers, V label values, W windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from torch import Tensor

from tapct.base.exits import UserError
from tapct.eval.features.dense import BlockFeatures, DenseFeatures, PatchGrid
from tapct.eval.labels.organ_classes import is_called
from tapct.eval.labels.truth import patch_truth
from tapct.eval.scans.labelled_scan import LabelledScan

CLS, MEAN, STD, MAX, REGISTERS = "cls", "mean", "std", "max", "registers"
# vector -> pooled parts that it consists of
PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cls": (CLS,),
        "mean": (MEAN,),
        "cls_mean": (CLS, MEAN),
        "mean_std_max": (MEAN, STD, MAX),
        "registers": (REGISTERS,),
    }
)
MASK = "mask:"
WINDOWS = "windows"
BLOCKS = ("last", "middle", "last4")
VECTOR_WORDS = f"{', '.join(PARTS)} or {MASK}ORGAN"


def check_vectors(names: Sequence[str], where: str) -> None:
    """Check the names of vectors.

    Args:
        names: names from a config.
        where: setting that holds them.
    Raises:
        UserError: a name is unknown, or there is none.
    """
    if not names:
        raise UserError(f"{where} is empty; give at least one of {VECTOR_WORDS}")
    for name in names:
        if name not in PARTS and not organ_of(name):
            raise UserError(f"{where} has {name!r}, which is none of {VECTOR_WORDS}")


def organ_of(vector: str) -> str:
    """The organ of a vector `mask:ORGAN`; empty for other vectors."""
    return vector.removeprefix(MASK) if vector.startswith(MASK) else ""


def block_numbers(name: str, num_blocks: int) -> tuple[int, ...]:
    """The blocks of a backbone that a name stands for, counted from 0.

    Args:
        name: one of `BLOCKS`.
        num_blocks: number of blocks of the backbone.
    """
    if name == "last4":
        return tuple(range(max(0, num_blocks - 4), num_blocks))
    return ((num_blocks - 1) // 2,) if name == "middle" else (num_blocks - 1,)


def blocks_to_read(names: Sequence[str], num_blocks: int) -> tuple[int, ...]:
    """All blocks that some names stand for, ascending, without doubles."""
    return tuple(sorted({block for name in names for block in block_numbers(name, num_blocks)}))


@dataclass(frozen=True)
class ScanVectors:
    """What is kept of one scan and one model.

    Args:
        num_blocks: number of blocks of the backbone.
        pooled: block -> part -> float32 vector; `registers` is missing where there are none, and
            `mask:ORGAN` is all NaN where the scan has no label map with this organ.
        windows: block -> float32 (W, 2 D), the class token and the mean patch of each window; empty
            where they were not asked for.
    """

    num_blocks: int
    pooled: Mapping[int, Mapping[str, np.ndarray]]
    windows: Mapping[int, np.ndarray] = field(default_factory=dict)

    def vector(self, name: str, block: str) -> np.ndarray | None:
        """One vector in float64; None where the backbone has no registers.

        Args:
            name: one of `PARTS`, or `mask:ORGAN`.
            block: one of `BLOCKS`.
        """
        pieces: list[np.ndarray] = []
        for number in block_numbers(block, self.num_blocks):
            parts = self.pooled[number]
            for part in PARTS.get(name, (name,)):
                if part not in parts:
                    return None
                pieces.append(parts[part])
        return np.concatenate(pieces).astype(np.float64)

    def window_set(self, block: str) -> np.ndarray:
        """Vectors of the windows: float32 (W, channels)."""
        numbers = block_numbers(block, self.num_blocks)
        return np.concatenate([self.windows[number] for number in numbers], axis=1)


def organ_shares(
    scan: LabelledScan, grid: PatchGrid, vectors: Sequence[str]
) -> dict[str, np.ndarray]:
    """Share of each organ in each patch, for the vectors that are pooled in a mask.

    Args:
        scan: scan, with its label map if it has one.
        grid: patch grid of the features.
        vectors: names of vectors.
    Returns:
        Vector -> float32 (N,), for the organs that the label map has.
    """
    wanted = [name for name in vectors if organ_of(name)]
    if not wanted or scan.labels is None:
        return {}
    in_play_Z = np.ones(grid.shape[0], dtype=bool)
    truth = patch_truth(scan, grid, body_labelled=True, in_play_Z=in_play_Z)
    names, shares = truth.names(), {}
    for vector in wanted:
        is_organ_V = [
            value > 0 and is_called(value, names.get(value, f"label {value}"), [organ_of(vector)])
            for value in truth.values
        ]
        share_N = truth.shares_NV[:, is_organ_V].sum(1)
        if share_N.sum() > 0:
            shares[vector] = share_N
    return shares


def scan_vectors(
    dense: DenseFeatures,
    vectors: Sequence[str],
    blocks: Sequence[str],
    *,
    shares: Mapping[str, np.ndarray] | None = None,
    max_windows: int = 0,
) -> ScanVectors:
    """Pool the features of one scan.

    Args:
        dense: features of the scan.
        vectors: names of vectors.
        blocks: names of blocks.
        shares: what `organ_shares` returned.
        max_windows: number of windows to keep, evenly spaced where the scan has more; 0: none.
    Returns:
        The vectors on the CPU.
    """
    num_blocks = 1 + max(dense.blocks, default=0)
    parts = list(dict.fromkeys(part for name in vectors for part in PARTS.get(name, (name,))))
    pooled: dict[int, dict[str, np.ndarray]] = {}
    windows: dict[int, np.ndarray] = {}
    for number in blocks_to_read(blocks, num_blocks):
        block = dense.blocks.get(number)
        pooled[number] = _pooled(dense, block, parts, shares or {})
        if max_windows:
            windows[number] = _windows(dense, block, max_windows)
    return ScanVectors(num_blocks, pooled, windows)


def _pooled(
    dense: DenseFeatures,
    block: BlockFeatures | None,
    parts: Sequence[str],
    shares: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The parts of one block; None stands for features that know no blocks."""
    features_DZYX = dense.features_DZYX if block is None else block.features_DZYX
    features_DN = features_DZYX.flatten(1)
    cls_D = dense.cls_D if block is None else block.windows.cls_WD.mean(0)
    found: dict[str, np.ndarray] = {}
    for part in parts:
        if part == CLS:
            found[part] = _numpy(cls_D)
        elif part == MEAN:
            found[part] = _numpy(features_DN.mean(1))
        elif part == STD:
            found[part] = _numpy(features_DN.std(1, correction=0))
        elif part == MAX:
            found[part] = _numpy(features_DN.amax(1))
        elif part == REGISTERS:
            if block is not None and block.windows.registers_WRD.shape[1]:
                found[part] = _numpy(block.windows.registers_WRD.mean(0).flatten())
        elif part in shares:
            share_N = features_DN.new_tensor(shares[part])
            found[part] = _numpy(features_DN @ (share_N / share_N.sum()))
        else:
            found[part] = np.full(len(features_DN), np.nan, dtype=np.float32)
    return found


def _windows(dense: DenseFeatures, block: BlockFeatures | None, most: int) -> np.ndarray:
    """Class token and mean patch of evenly spaced windows: float32 (W, 2 D)."""
    if block is None:
        mean_D = dense.features_DZYX.flatten(1).mean(1)
        return np.concatenate([_numpy(dense.cls_D), _numpy(mean_D)])[None]
    both_WD = np.concatenate([_numpy(block.windows.cls_WD), _numpy(block.windows.mean_WD)], axis=1)
    if len(both_WD) > most:
        both_WD = both_WD[np.linspace(0, len(both_WD) - 1, most).round().astype(np.int64)]
    return both_WD


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array
