"""Learned positions on a grid, resized one axis at a time.

Axes: N grid points, D channels; O and I (n_out and n_in) points of one axis; R taps of the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.base.geometry import Grid


def axis_matrix(
    n_in: int,
    n_out: int,
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    offset: float = 0.0,
) -> Tensor:
    """Weights that resample one axis from `n_in` to `n_out` points.

    Points sit at (i + 0.5) / n of the axis, the border value continues outside, nothing is low-pass
    filtered. `F.interpolate(size=..., align_corners=False)` does the same, but has no cubic mode in
    3D. With an offset, n_out + offset takes the place of n_out in the position of the points, as
    `F.interpolate(scale_factor=(n_out + offset) / n_in)` does in DINOv2 (0.1).

    Args:
        n_in: points before.
        n_out: points after.
        mode: "cubic" (Keys' kernel with a = -0.75) or "linear".
        device: device of the matrix.
        dtype: dtype of the matrix.
        offset: number added to n_out in the position of the points.
    Returns:
        (n_out, n_in), rows sum to 1.
    """
    index_O = torch.arange(n_out, device=device, dtype=dtype)
    centre_O = (index_O + 0.5) * (n_in / (n_out + offset)) - 0.5
    reach = 2 if mode == "cubic" else 1
    tap_R = torch.arange(1 - reach, reach + 1, device=device)
    index_OR = centre_O.floor().long()[:, None] + tap_R
    distance_OR = (centre_O[:, None] - index_OR).abs()
    weight_OR = _keys_kernel(distance_OR) if mode == "cubic" else (1 - distance_OR).clamp(min=0)
    # taps beyond the border are clamped to it, so one column may receive several of them
    matrix_OI = torch.zeros(n_out, n_in, device=device, dtype=dtype)
    return matrix_OI.scatter_add_(1, index_OR.clamp(0, n_in - 1), weight_OR)


def _keys_kernel(distance: Tensor, a: float = -0.75) -> Tensor:
    """Cubic convolution kernel at distances 0 <= x <= 2.

    Source: Keys 1981; a as in PyTorch's bicubic mode.
    """
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance <= 1, near, far)


def resize_positions(
    pos_ND: Tensor, native: Grid, grid: Grid, mode: str = "cubic", offset: float = 0.0
) -> Tensor:
    """Learned positions resized to another grid, axis by axis; unchanged where the grid is native.

    torch.export may leave the grid free, and a comparison with the native grid would fix it. An
    exported graph therefore always resizes; at the native grid its matrices are the identity.

    Args:
        pos_ND: one vector per point of the native grid, in (z, y, x) raster order.
        native: points of the native grid along (z, y, x), product N.
        grid: points of the result along (z, y, x).
        mode: "cubic" or "linear".
        offset: see `axis_matrix`; with one, both axes of a plane move where one of them changes,
            as in DINOv2.
    Returns:
        (product of `grid`, D), float32 or wider.
    Raises:
        UserError: torch.export of a model with an offset, which must not move the native grid.
    """
    pos = pos_ND.to(torch.promote_types(pos_ND.dtype, torch.float32))
    is_exported = torch.compiler.is_exporting()
    if is_exported and offset:
        raise UserError(
            f"model.pos_offset={offset:g}: torch.export cannot leave the grid free; set it to 0"
        )
    if not is_exported and grid == native:
        return pos
    pos = pos.view(*native, -1)  # (z, y, x, D)
    plane_moves = bool(offset) and native[1:] != grid[1:]
    # float32: autocast would compute these products in bf16, with 7 % error in the positions
    with torch.autocast(pos.device.type, enabled=False):
        for axis, (n_in, n_out) in enumerate(zip(native, grid, strict=True)):
            if is_exported or n_in != n_out or (axis > 0 and plane_moves):
                matrix_OI = axis_matrix(n_in, n_out, mode, pos.device, pos.dtype, offset)
                pos = torch.tensordot(matrix_OI, pos, dims=([1], [axis])).movedim(0, axis)
    return pos.reshape(-1, pos.shape[-1])
