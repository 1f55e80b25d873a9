"""Sizes along (z, y, x), in voxels and in patches, and the way from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from tapct.base.exits import UserError

Size3: TypeAlias = tuple[int, int, int]  # voxels along (z, y, x)
Grid: TypeAlias = tuple[int, int, int]  # patches along (z, y, x)


def times(size: Sequence[int]) -> str:
    """12x224x224, as error lines and tables print a size."""
    return "x".join(map(str, size))


def patch_grid(
    window: Sequence[int], patch: Sequence[int], name: str, remedy: str = "change it or model.patch"
) -> Grid:
    """Patches that cover a window.

    Args:
        window: voxels (z, y, x).
        patch: voxels (z, y, x) of one patch.
        name: setting or thing that the window is, for the error line, e.g. views.global_window.
        remedy: next step, for the error line.
    Raises:
        UserError: the window is no multiple of the patch, or empty, along an axis.
    """
    for axis, size, side in zip("zyx", window, patch, strict=True):
        if size < side or size % side:
            raise UserError(
                f"{name} {times(window)} is no multiple of the patch {times(patch)} along {axis}; "
                f"{remedy}"
            )
    z, y, x = (size // side for size, side in zip(window, patch, strict=True))
    return z, y, x
