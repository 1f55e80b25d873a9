"""The rules for label values: whole numbers from 0 to 65534, and values to ignore."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from tapct.types import IGNORE_LABEL, Refused

MAX_LABEL = IGNORE_LABEL - 1  # the largest uint16 is reserved for voxels to ignore
# how far from a whole number a value may lie: a NIfTI slope turns 3 into 2.99999999
WHOLE_TO = 1e-3


def to_label_values(
    name: str,
    view_ZYX: np.ndarray,
    slope: float = 1.0,
    intercept: float = 0.0,
    ignore: Collection[int] = (),
) -> np.ndarray:
    """Round values to uint16 labels; the values to ignore become IGNORE_LABEL.

    Args:
        name: name of the file, for the error line.
        view_ZYX: values as stored, any real dtype.
        slope: factor to label values.
        intercept: offset in label values.
        ignore: label values of voxels that nobody has labelled, e.g. -1.
    Raises:
        Refused: `not_labels`: NaN, fractions, or values outside 0 to 65534.
    """
    is_plain = view_ZYX.dtype.kind in "bu" and (slope, intercept) == (1.0, 0.0) and not ignore
    if is_plain and view_ZYX.max(initial=0) <= MAX_LABEL:  # the common case, without float64
        return view_ZYX.astype(np.uint16, order="C")
    labels_ZYX = np.empty(view_ZYX.shape, dtype=np.uint16)
    lowest, highest, num_nan = np.inf, -np.inf, 0
    for z, plane_YX in enumerate(view_ZYX):
        values_YX = plane_YX.astype(np.float64) * slope + intercept
        finite_YX = np.isfinite(values_YX)
        if not finite_YX.all():
            num_nan += int(values_YX.size - finite_YX.sum())
            continue
        whole_YX = np.rint(values_YX)
        off = float(np.abs(values_YX - whole_YX).max())
        if off > WHOLE_TO:
            worst = values_YX.flat[int(np.abs(values_YX - whole_YX).argmax())]
            raise Refused(
                "not_labels",
                f"{name} holds {worst:g}; rule: whole numbers, to {WHOLE_TO:g}",
            )
        ignored_YX = np.isin(whole_YX, list(ignore)) if ignore else None
        if ignored_YX is not None:
            whole_YX[ignored_YX] = 0
        lowest, highest = min(lowest, whole_YX.min()), max(highest, whole_YX.max())
        labels_ZYX[z] = whole_YX.clip(0, MAX_LABEL)
        if ignored_YX is not None:
            labels_ZYX[z][ignored_YX] = IGNORE_LABEL
    if num_nan:
        raise Refused(
            "not_labels", f"{name} holds NaN or infinity in {num_nan} voxels; write 0 there"
        )
    if lowest < 0 or highest > MAX_LABEL:
        value = int(lowest if lowest < 0 else highest)
        raise Refused(
            "not_labels",
            f"{name} holds {value}; rule: 0 to {MAX_LABEL}; if these voxels are not labelled, "
            f"index with --ignore-label {value}",
        )
    return labels_ZYX
