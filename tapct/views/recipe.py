"""Make the views that student and teacher see from a batch of slabs, all on the device.

Order of work: clip to the HU window, crop, resize and blur by matrices, apply the ops one after the
other, clip again and z-score.

Axes: B batch, V views of one kind (crop-major: all samples of view 0, then view 1), N patch tokens,
Z Y X depth height width in voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.base.exits import UserError
from tapct.base.geometry import Size3, patch_grid
from tapct.config import plugins, setting
from tapct.config.plugins import Plugin
from tapct.types import Batch, HUContract, Views
from tapct.views import boxes, resample
from tapct.views.boxes import Boxes, Kind, Rule
from tapct.views.key import Op, ViewKey

SLIVER = 1e-3  # voxels of scan below which a token counts as padding: float32 rounds by less


@dataclass(frozen=True)
class Config:
    """Number, crops, blur and ops of the views.

    Source: defaults are TAP-CT's public training configs, except where another source is named.
    """

    num_globals: int = setting(2, "number of global views of a scan", ge=1)
    global_window: tuple[int, int, int] = setting(
        (12, 224, 224), "size of a global view in voxels (z, y, x)", ge=1
    )
    global_area: tuple[float, float] = setting(
        (0.32, 1.0),
        "share of the scan's in-plane area in a global view, drawn uniformly between the two "
        "values",
        gt=0,
        le=1,
    )
    num_locals: int = setting(8, "number of local views of a scan; 0: none", ge=0)
    local_window: tuple[int, int, int] = setting(
        (12, 96, 96), "size of a local view in voxels (z, y, x)", ge=1
    )
    local_area: tuple[float, float] = setting(
        (0.05, 0.32),
        "share of the scan's in-plane area in a local view, drawn uniformly between the two values",
        gt=0,
        le=1,
    )
    region_area: tuple[float, float] = setting(
        (1.0, 1.0),
        "all views of a scan lie in one region of the slice; this is the share of the scan's "
        "in-plane area that the region has, drawn uniformly between the two values. The place of "
        "the region is drawn too; [1, 1]: the whole slice. Small views of a whole slice hardly "
        "overlap, so they have little in common; our own choice, not TAP-CT's",
        gt=0,
        le=1,
    )
    aspect: tuple[float, float] = setting(
        (3 / 4, 4 / 3),
        "height / width of a crop in voxels, drawn log-uniformly from the part of this range "
        "in which the crop fits into the scan",
        gt=0,
    )
    z_zoom: tuple[float, float] = setting(
        (1.0, 1.0),
        "slices of the scan per slice of a view, drawn log-uniformly between the two values; "
        "[1, 1]: no resizing along z",
        gt=0,
    )
    body_share_min: float = setting(
        0.25,
        "smallest share of body (lungs included) in a crop; see candidates; 0 accepts every "
        "crop; our own choice, not TAP-CT's",
        ge=0,
        le=1,
    )
    candidates: int = setting(
        4,
        "maximum number of positions that are tried until a crop has enough body; if it has too "
        "little body at all of them, the best position is used; our own choice, not TAP-CT's",
        ge=1,
        le=64,
    )
    flip_p: tuple[float, float, float] = setting(
        (0.0, 0.0, 0.0),
        "probability of a mirror image along (z, y, x); keep 0 along x if left and right must "
        "stay different; our own choice, not TAP-CT's",
        ge=0,
        le=1,
    )
    blur_sigma: tuple[float, float] = setting(
        (0.1, 2.0),
        "standard deviation of the Gaussian blur in pixels of the view, the same along all "
        "three axes, drawn uniformly between the two values",
        ge=0,
    )
    blur_p: tuple[float, float, float] = setting(
        (1.0, 0.1, 0.5),
        "probability of blur: first global view, other global views, local views",
        ge=0,
        le=1,
    )
    ops: tuple[Plugin, ...] = plugins.table(
        "views.ops",
        ("gain",),
        "ops on views in HU, applied in the order in which the config lists them; the "
        "normalisation follows",
    )

    def __post_init__(self) -> None:
        ranges = ("global_area", "local_area", "region_area", "aspect", "z_zoom", "blur_sigma")
        for name in ranges:
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"views.{name} is [{low}, {high}]: the lower end comes first")

    def rule(self, kind: Kind) -> Rule:
        """The crop rule of one kind of view."""
        is_global = kind == "global"
        return Rule(
            self.global_window if is_global else self.local_window,
            self.global_area if is_global else self.local_area,
            self.aspect,
            self.z_zoom,
            self.body_share_min,
            self.candidates,
            self.flip_p,
            self.region_area,
        )

    def slices_needed(self) -> float:
        """Slices that the deepest view reads; a slab with fewer would always be filled up with
        air.
        """
        depths = [self.global_window[0]] + ([self.local_window[0]] if self.num_locals else [])
        return max(depths) * self.z_zoom[1]


@torch.no_grad()
def make_views(
    batch: Batch, config: Config, contract: HUContract, seed: int, patch: Size3
) -> Views:
    """Make all views of a micro-batch. Never waits for the device.

    Every draw is keyed by (seed, sample number, view), so a sample gives the same views in any
    batch and on any rank.

    Args:
        batch: slabs, on the device.
        config: number, crops, blur and ops of the views.
        contract: HU window, mean and standard deviation.
        seed: seed of the run.
        patch: voxels (z, y, x) of a patch token, from which follows which tokens lie in padding.
    Returns:
        The views, and which tokens of the global views hold scan.
    Raises:
        UserError: a global view is not a whole number of patches.
    """
    grid = patch_grid(config.global_window, patch, "views.global_window")
    ops = tuple(plugins.load("views.ops", op.name).build(op.config) for op in config.ops)
    with resample.full_precision(batch.hu_BZYX.device):
        cells = boxes.body_cells(batch.hu_BZYX, contract)
        views_global, crops, global_mm_VB3 = _views_of_kind(
            batch, config, contract, seed, "global", cells, ops
        )
        views_local, _, local_mm_VB3 = _views_of_kind(
            batch, config, contract, seed, "local", cells, ops
        )
    return Views(
        views_global,
        views_local,
        tokens_in_scan(crops, grid, batch.extent_B3),
        global_mm_VB3,
        local_mm_VB3,
    )


def _views_of_kind(
    batch: Batch,
    config: Config,
    contract: HUContract,
    seed: int,
    kind: Kind,
    cells: Tensor,
    ops: tuple[Op, ...],
) -> tuple[Tensor, Boxes, Tensor]:
    """The views (V, B, Z, Y, X) of one kind, normalised; their boxes; and the size of their voxels
    in mm (V, B, 3).
    """
    rule = config.rule(kind)
    num_views = config.num_globals if kind == "global" else config.num_locals
    slab_ZYX = (batch.hu_BZYX.shape[1], batch.hu_BZYX.shape[2], batch.hu_BZYX.shape[3])
    crops = boxes.draw(rule, kind, num_views, cells, batch.extent_B3, batch.sample_B, seed)
    mm_VB3 = mm_per_voxel(crops, rule.window, batch.spacing_mm_B3)
    keys = [
        ViewKey(seed, batch.sample_B, kind, view, contract, mm_VB3[view])
        for view in range(num_views)
    ]
    out = torch.empty((num_views, len(batch.sample_B), *rule.window), device=batch.hu_BZYX.device)
    if not keys:
        return out, crops, mm_VB3
    sigma_VB = torch.stack([_blur_sigma(config, key) for key in keys])
    # the host decides whether there is any blur, so that no draw waits for the device
    is_blurred = any(config.blur_p[key.group] > 0 for key in keys)
    max_sigma = config.blur_sigma[1] if is_blurred else 0.0
    maps = resample.matrices(
        crops,
        rule.window,
        slab_ZYX,
        boxes.max_length(rule, slab_ZYX),
        sigma_VB=sigma_VB,
        max_sigma=max_sigma,
    )
    # one view at a time: the float32 crops of all views at once would be several times as large as
    # the views
    for view, key in enumerate(keys):
        resample.apply(batch.hu_BZYX, maps, view, contract, out[view])
        hu_BZYX = out[view]
        for op in ops:
            hu_BZYX = op(hu_BZYX, key)
        out[view] = contract.normalise(hu_BZYX)
    return out, crops, mm_VB3


def _blur_sigma(config: Config, key: ViewKey) -> Tensor:
    """Width (B,) of the blur of one view in pixels, 0 where there is none."""
    sigma = torch.where(
        key.happens("blur", config.blur_p[key.group]),
        key.uniform("blur sigma", *config.blur_sigma),
        0.0,
    )
    return sigma.flatten()


def mm_per_voxel(crops: Boxes, window: Size3, spacing_mm_B3: Tensor) -> Tensor:
    """Size of the voxels of finished views: (V, B, 3) float32 mm along (z, y, x).

    Args:
        crops: boxes of the views in voxels of the slab.
        window: voxels of a view along (z, y, x).
        spacing_mm_B3: distance of the slabs' voxel centres along (z, y, x).
    """
    length_mm_VB3 = crops.length_VB3 * spacing_mm_B3
    return torch.stack(
        [length_mm_VB3[..., axis] / size for axis, size in enumerate(window)], dim=-1
    )


def tokens_in_scan(crops: Boxes, grid: tuple[int, ...], extent_B3: Tensor) -> Tensor:
    """Which patch tokens hold scan.

    Args:
        crops: boxes of the views.
        grid: tokens along (z, y, x).
        extent_B3: int64, voxels of each slab that are scan.
    Returns:
        (V, B, N) bool in raster order, False where a token lies wholly in padding.
    """
    held = []
    for axis, num in enumerate(grid):
        edge = torch.arange(num + 1, device=extent_B3.device) / num
        flip = crops.flip_VB3[..., axis, None]
        first, last = (torch.where(flip, 1 - e, e) for e in (edge[:-1], edge[1:]))
        start, length = crops.start_VB3[..., axis, None], crops.length_VB3[..., axis, None]
        begin = start + length * torch.minimum(first, last)
        end = start + length * torch.maximum(first, last)
        held.append((begin < extent_B3[:, axis, None] - SLIVER) & (end > SLIVER))
    # (V, B, tokens along one axis) each -> (V, B, z, y, x) -> (V, B, N)
    z, y, x = held
    return (z[..., :, None, None] & y[..., None, :, None] & x[..., None, None, :]).flatten(2)
