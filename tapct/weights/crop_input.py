"""What `Pretrained.forward` takes for crops, and its errors.

Axes: B crops, Z Y X depth height width in voxels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.types import HUContract

# How far beyond the HU window, in standard deviations of the contract, a normalised value may lie:
# interpolation, noise and the padding of other projects leave the window a little, and millions of
# normally distributed numbers, which people probe a network with, reach 5.5.
MAX_BEYOND = 4.0


def checked_crops(crops: Any, contract: HUContract) -> Tensor:
    """Crops (B, Z, Y, X), after a check of their axes, dtype and values.

    Args:
        crops: (B, Z, Y, X) or (B, 1, Z, Y, X).
        contract: HU window and z-score that the crops must have gone through.
    Raises:
        UserError: no tensor, other axes, whole numbers, or values outside of the window.
    """
    if not isinstance(crops, Tensor):
        raise UserError(
            f"crops are a {type(crops).__name__}; give one tensor (B, Z, Y, X). A list of groups "
            "goes to the backbone itself, .model"
        )
    if crops.ndim == 5 and crops.shape[1] == 1:
        crops = crops[:, 0]
    if crops.ndim != 4:
        raise UserError(
            f"crops are {tuple(crops.shape)}; give normalised HU as (B, Z, Y, X) or (B, 1, Z, Y, X)"
        )
    if not crops.is_floating_point():
        raise UserError(
            f"crops are {crops.dtype}, so they are not normalised; give contract.normalise(hu)"
        )
    if not _is_traced(crops):
        _check_values(crops, contract)
    return crops


def _is_traced(crops: Tensor) -> bool:
    """Whether the values cannot be read now: torch.export, torch.compile, a CUDA graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or crops.is_meta:
        return True
    return crops.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_values(crops: Tensor, contract: HUContract) -> None:
    if not crops.numel():
        raise UserError(f"crops are {tuple(crops.shape)}, without a voxel")
    low, high = (float(value) for value in torch.aminmax(crops.detach()))
    bounds = [(hu - contract.mean) / contract.std for hu in (contract.clip_low, contract.clip_high)]
    if bounds[0] - MAX_BEYOND <= low and high <= bounds[1] + MAX_BEYOND:
        return
    raise UserError(
        f"crops have values from {low:.4g} to {high:.4g}; normalised HU lie between "
        f"{bounds[0]:.2f} and {bounds[1]:.2f}. Give contract.normalise(hu), which clips and scales"
    )


def spacing_of_crops(spacing_mm: Any, crops: Tensor) -> Tensor:
    """Spacing of every crop: float32 (B, 3).

    Args:
        spacing_mm: three numbers along (z, y, x), or one row of three per crop.
        crops: (B, Z, Y, X).
    Raises:
        UserError: another shape, or numbers that are not above 0.
    """
    spacing = torch.as_tensor(spacing_mm, dtype=torch.float32, device=crops.device)
    if tuple(spacing.shape) not in ((3,), (1, 3), (len(crops), 3)):
        raise UserError(
            f"spacing_mm is {tuple(spacing.shape)}; give (z, y, x), or one row per crop "
            f"({len(crops)}, 3)"
        )
    if not _is_traced(spacing) and not bool((torch.isfinite(spacing) & (spacing > 0)).all()):
        raise UserError(f"spacing_mm is {spacing.tolist()}; rule: above 0 mm")
    return spacing.expand(len(crops), 3)
