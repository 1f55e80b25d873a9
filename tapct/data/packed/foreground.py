"""Window and statistics of an archive's own voxels, by nnU-Net's rule: percentiles 0.5 and 99.5,
mean and standard deviation of foreground voxels, the same number from each scan.

Foreground is what is labelled. A store without labels has none, so the body stands in: everything
above -500 HU, with its holes filled slice by slice, so that lungs and bowel gas belong to it.

Axes: Z Y X depth height width in voxels, S drawn voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from tapct.base.exits import UserError
from tapct.data.packed.scan_list import ScanList
from tapct.data.packed.store import Store
from tapct.types import IGNORE_LABEL, HUContract

VOXELS_PER_SCAN = 10_000  # nnU-Net's number
LOW, HIGH = 0.5, 99.5
BODY_HU = -500
_BODY_SLICES = 24  # evenly spaced; filling the holes of every slice would take seconds a scan


class NoForeground(UserError):
    """A store has no foreground, or foreground of one value, so that it has no window."""


@dataclass(frozen=True)
class Foreground:
    """Statistics of the foreground of a store.

    Args:
        low, high: percentiles 0.5 and 99.5 in HU.
        mean, std: mean and standard deviation in HU, of all drawn voxels.
        scans: number of scans that voxels were drawn from.
        empty: number of scans without foreground, which were skipped.
        by_labels: whether labels were the foreground; else it was the body.
    """

    low: float
    high: float
    mean: float
    std: float
    scans: int
    empty: int
    by_labels: bool

    def contract(self) -> HUContract:
        """The HU contract with this window and these statistics, rounded to 0.01 HU."""
        return HUContract(
            round(self.low, 2), round(self.high, 2), round(self.mean, 2), round(self.std, 2)
        )

    def lines(self, of: str) -> list[str]:
        """The contract as lines of a config, with a comment on where it comes from.

        Args:
            of: name of the archive.
        """
        contract, published = self.contract(), HUContract()
        kind = "labelled voxels" if self.by_labels else "voxels of the body (there are no labels)"
        lines = [
            f"# HU contract of {of}: percentiles {LOW} and {HIGH}, mean and standard deviation of",
            f"# {VOXELS_PER_SCAN} {kind} of each of {self.scans} scans",
        ]
        if self.empty:
            lines.append(f"# {self.empty} scans without such voxels were skipped")
        lines += [
            f"# published: {published.clip_low:g} to {published.clip_high:g}, mean "
            f"{published.mean:.2f}, std {published.std:.2f}; weights of another contract do not "
            "fit this one",
            "contract:",
        ]
        names = ("clip_low", "clip_high", "mean", "std")
        return [*lines, *(f"  {name}: {getattr(contract, name)!r}" for name in names)]


def measure(store: Store, most_scans: int = 500, seed: int = 0) -> Foreground:
    """Draw foreground voxels of a store and compute their statistics.

    Args:
        store: packed scans.
        most_scans: number of scans that are read, spread evenly over the store.
        seed: random seed of the drawn voxels.
    Raises:
        NoForeground: the store has no scan with foreground, or all of it has one value.
        Damaged: a scan cannot be read.
    """
    scans: ScanList = store.scans
    labelled = np.flatnonzero([bool(text) for text in scans.column("label_digest").to_pylist()])
    numbers = labelled if len(labelled) else np.arange(len(store))
    if len(numbers) > most_scans:
        numbers = numbers[np.linspace(0, len(numbers) - 1, most_scans).round().astype(int)]
    drawn: list[np.ndarray] = []
    for i in numbers.tolist():
        values = labelled_voxels(store, i) if len(labelled) else body_voxels(store, i)
        if len(values):
            at = np.random.default_rng((seed, i)).integers(0, len(values), VOXELS_PER_SCAN)
            drawn.append(values[at])
    if not drawn:
        raise NoForeground(f"no scan of {store.path} has foreground voxels, so there is no window")
    values_S = np.concatenate(drawn).astype(np.float64)
    low, high = np.percentile(values_S, (LOW, HIGH))
    if not low < high:
        raise NoForeground(f"all foreground voxels of {store.path} have one value, {low:g} HU")
    return Foreground(
        float(low),
        float(high),
        float(values_S.mean()),
        float(values_S.std()),
        len(drawn),
        len(numbers) - len(drawn),
        bool(len(labelled)),
    )


def labelled_voxels(store: Store, i: int) -> np.ndarray:
    """HU of all voxels of a scan with a label other than background."""
    labels_ZYX = store.read_labels(i).labels_ZYX
    hu_ZYX = store.read(i)
    values: np.ndarray = hu_ZYX[(labels_ZYX > 0) & (labels_ZYX != IGNORE_LABEL)]
    return values


def body_voxels(store: Store, i: int) -> np.ndarray:
    """HU of the body in some slices of a scan."""
    depth = store.scans.shape_ZYX(i)[0]
    places = np.linspace(0, depth - 1, min(depth, _BODY_SLICES)).round().astype(int)
    parts = []
    for z in places.tolist():
        hu_YX = store.read_slab(i, z, z + 1)[0]
        parts.append(hu_YX[ndimage.binary_fill_holes(hu_YX > BODY_HU)])
    return np.concatenate(parts)
