"""The one vector of a scan that `tapct embed` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tapct.base.exits import UserError
from tapct.data.labels.reading import read_labels_of
from tapct.eval.labels.organ_classes import is_called
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.eval.targets.vectors import BLOCKS, PARTS, blocks_to_read, organ_shares, scan_vectors
from tapct.run.embed.named_scans import NamedScan
from tapct.run.embed.one_scan import ScanEncoder
from tapct.run.embed.pooled import PoolingSink
from tapct.types import IGNORE_LABEL, LabelMap, Refused, Volume

MASK = "mask"
DEFAULT_VECTOR = "cls_mean"
_ORGAN = "organ"  # name of the label into which the chosen labels of a mask are joined


@dataclass(frozen=True)
class VectorChoice:
    """What is computed of each scan.

    Args:
        vector: one of `vectors.PARTS`, or `mask`, the mean of the patches in a mask.
        block: one of `vectors.BLOCKS`.
        organs: labels, by name or value, that make the mask; empty for all labels.
    """

    vector: str = DEFAULT_VECTOR
    block: str = "last"
    organs: tuple[str, ...] = ()

    @classmethod
    def of(cls, vector: str, block: str, organs: Sequence[str], has_masks: bool) -> VectorChoice:
        """Check the options.

        Args:
            vector: option --vector; empty for the default.
            block: option --block.
            organs: option --organ.
            has_masks: whether --masks is given.
        Raises:
            UserError: a name is unknown, or options contradict each other.
        """
        vector = vector or (MASK if has_masks else DEFAULT_VECTOR)
        known = ", ".join((*PARTS, MASK))
        if vector not in (*PARTS, MASK):
            raise UserError(f"--vector {vector}: must be one of {known}")
        if block not in BLOCKS:
            raise UserError(f"--block {block}: must be one of {', '.join(BLOCKS)}")
        if (vector == MASK) != has_masks:
            raise UserError(
                f"--vector {vector} and --masks do not fit: with --masks DIR, the patches in a "
                "mask are pooled (--vector mask); without it, choose another vector"
            )
        if organs and not has_masks:
            raise UserError(f"--organ {organs[0]} names a label of the masks; give --masks DIR")
        return cls(vector, block, tuple(organs))


def vector_of(
    encoder: ScanEncoder, case: NamedScan, volume: Volume, wanted: VectorChoice
) -> np.ndarray:
    """The vector of one scan: float32 (channels,).

    Without a cache it is pooled while the features are computed, and these are not kept.

    Args:
        encoder: model.
        case: scan and mask.
        volume: voxels of the scan.
        wanted: vector.
    Raises:
        Refused: the mask cannot be used, or the vector is not finite.
        UserError: the model has no such vector.
    """
    blocks = blocks_to_read([wanted.block], encoder.num_blocks)
    name, shares = wanted.vector, {}
    if name == MASK:
        name, mask = f"{MASK}:{_ORGAN}", mask_of(case, volume, wanted.organs)
        scan = LabelledScan(case.id, volume, mask)
        shares = organ_shares(scan, encoder.grid_of(volume), [name])
        if not shares:
            raise Refused("not_labels", "its mask covers no patch of the scan")
    if encoder.cache is None:
        num_blocks = encoder.num_blocks
        sink = encoder.extract(
            volume, blocks, lambda grid: PoolingSink(grid, [name], shares, num_blocks)
        )
        vectors = sink.vectors()
    else:
        dense = encoder.features(volume, blocks)
        vectors = scan_vectors(dense, [name], [wanted.block], shares=shares)
    vector_D = vectors.vector(name, wanted.block)
    if vector_D is None:
        raise UserError(
            f"--vector {wanted.vector}: this model has no registers; choose another one"
        )
    if not np.isfinite(vector_D).all():
        raise Refused("not_finite", "its vector is not finite; check the weights")
    vector: np.ndarray = vector_D.astype(np.float32)
    return vector


def mask_of(case: NamedScan, volume: Volume, organs: Sequence[str]) -> LabelMap:
    """The mask of a scan: its chosen labels, joined into one.

    Args:
        case: scan and mask.
        volume: the scan.
        organs: names or values of labels; empty for all.
    Raises:
        Refused: there is no mask, it does not lie on the grid of the scan, or it is empty.
    """
    if case.mask is None:
        raise Refused("not_labels", "no label map in the folder of --masks has its name")
    labels = read_labels_of(volume, case.mask).label_map
    names = dict(labels.names)
    present = [int(value) for value in np.unique(labels.labels_ZYX) if 0 < value < IGNORE_LABEL]
    chosen = [
        value
        for value in present
        if not organs or is_called(value, names.get(value, f"label {value}"), organs)
    ]
    if not chosen:
        words = " or ".join(organs) if organs else "label"
        raise Refused("not_labels", f"its label map has no voxel of {words}")
    joined_ZYX = np.isin(labels.labels_ZYX, chosen).astype(np.uint16)
    return replace(labels, labels_ZYX=joined_ZYX, names=((1, _ORGAN),))
