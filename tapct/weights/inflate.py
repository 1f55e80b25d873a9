"""Kernels and positions of a backbone for another patch, depth or number of channels.

| change | rule |
|---|---|
| patch size | pseudo-inverse of linear resizing: the answer to a resized patch stays |
| 2D to 3D, `mean` | every slice of the kernel is the 2D kernel divided by the depth |
| 2D to 3D, `centre` | the middle slice of the kernel is the 2D kernel, the others are 0 |
| RGB to one channel | sum of the three kernels: the answer to a grey image |
| positions along z | those of the 2D grid, repeated |

With either rule a patch that is constant along z gives what its slice gave in 2D.

Axes: D channels of a token, C channels of a voxel, Z Y X voxels of a patch, or patches of the grid;
O and I voxels of one axis after and before.
Source: pseudo-inverse rule: FlexiViT, Beyer et al. 2023, arXiv:2212.08013, equation 5; centre:
    Arnab et al. 2021, arXiv:2103.15691.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tapct.base.geometry import Grid, Size3
from tapct.nn.posembed import axis_matrix

RULES = ("mean", "centre")


def resize_kernel(kernel_DCZYX: Tensor, patch: Size3) -> Tensor:
    """A patch embedding's kernel for patches of another size, by FlexiViT's rule.

    Let B be the matrix that resizes a patch linearly to the new size. The new kernel w' is the
    solution of least squares of <w', B patch> = <w, patch>, thus (B^T)^+ w. Where no axis becomes
    shorter, it is exact for every patch. B is a product of one matrix per axis, and so is its
    pseudo-inverse.

    Args:
        kernel_DCZYX: weight of the patch embedding.
        patch: voxels (z, y, x) of the new patch.
    Returns:
        float32 or wider (D, C, *patch); the tensor itself where the size is the same.
    """
    resized = kernel_DCZYX
    for axis, n_out in enumerate(patch):
        n_in = kernel_DCZYX.shape[2 + axis]
        if n_in != n_out:
            matrix_OI = axis_matrix(n_in, n_out, "linear", torch.device("cpu"), torch.float64)
            inverse_OI = torch.linalg.pinv(matrix_OI.T)
            wide = torch.tensordot(inverse_OI, resized.double(), dims=([1], [2 + axis]))
            resized = wide.movedim(0, 2 + axis)
    if resized is kernel_DCZYX:
        return kernel_DCZYX
    return resized.to(torch.promote_types(kernel_DCZYX.dtype, torch.float32))


def spread_kernel(kernel_DC1YX: Tensor, depth: int, rule: str) -> Tensor:
    """A kernel for slices as one for slabs: (D, C, 1, Y, X) -> (D, C, depth, Y, X).

    Args:
        kernel_DC1YX: weight of a 2D patch embedding.
        depth: slices of the new patch.
        rule: `mean` or `centre`.
    """
    if rule == "mean":
        return (kernel_DC1YX / depth).expand(-1, -1, depth, -1, -1).contiguous()
    spread = kernel_DC1YX.new_zeros(*kernel_DC1YX.shape[:2], depth, *kernel_DC1YX.shape[3:])
    spread[:, :, depth // 2] = kernel_DC1YX[:, :, 0]
    return spread


def one_channel(kernel_DCZYX: Tensor) -> Tensor:
    """The sum over the channels of a voxel: (D, C, Z, Y, X) -> (D, 1, Z, Y, X)."""
    return kernel_DCZYX.sum(1, keepdim=True)


def repeat_positions(pos_ND: Tensor, grid: Grid, depth: int) -> Tensor:
    """Positions of a grid of one layer, repeated along z: (Y*X, D) -> (depth*Y*X, D).

    Args:
        pos_ND: positions of a grid of one layer, raster order.
        grid: points (1, y, x) of it.
        depth: layers of the result.
    """
    assert grid[0] == 1, grid
    return pos_ND.repeat(depth, 1)
