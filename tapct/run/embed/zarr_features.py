"""Dense features of a scan in zarr format, with their place in mm.

    CASE_ID.zarr/
      features    float32 (channel, z, y, x), one chunk per row of patches along z
      cls         float32 (channel), mean class token over the windows
      zarr.json   attributes `tapct`: geometry of the patch grid, what it was made with;
                  `ome`: the axes and the scale in mm as OME-Zarr 0.5 has them

Rows are written as soon as no later window covers them, so the features are never in memory as a
whole.
Source: OME-Zarr, https://ngff.openmicroscopy.org/0.5/
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from tapct.base.exits import UserError
from tapct.base.extras import installing
from tapct.eval.features.dense import PatchGrid, WindowVectors
from tapct.run.embed.one_scan import ScanEncoder
from tapct.types import UPRIGHT, Volume
from tapct.weights.embedding import check_finite, grid_origin_mm

ATTRIBUTES = "tapct"
AXES = ("channel", "z", "y", "x")


def load_zarr() -> ModuleType:
    """The library that writes zarr.

    Raises:
        UserError: it is not installed, or too old.
    """
    try:
        import zarr
    except ImportError as error:
        raise UserError(
            "--format zarr needs the package zarr, which cannot be loaded; install it: "
            + installing("zarr", "zarr")
        ) from error
    if int(zarr.__version__.partition(".")[0]) < 3:
        raise UserError(
            f"--format zarr needs zarr 3 and Python 3.11 or newer, and zarr {zarr.__version__} is "
            f"installed; install zarr 3: {installing('zarr', 'zarr')}"
        )
    return zarr


def write_zarr(folder: Path, encoder: ScanEncoder, volume: Volume, facts: dict[str, Any]) -> None:
    """Compute the features of a scan into an empty folder.

    Args:
        folder: folder to write.
        encoder: model.
        volume: scan.
        facts: further attributes.
    Raises:
        Refused: the features are not finite.
    """
    group = load_zarr().open_group(str(folder), mode="w", zarr_format=3)
    grid = encoder.grid_of(volume)
    group.attrs.update({ATTRIBUTES: {**geometry(volume, grid), **facts}, "ome": ome(volume, grid)})
    encoder.extract(volume, [encoder.num_blocks - 1], lambda found: _ZarrSink(group, found))


class _ZarrSink:
    """Writes rows of patches as they come.

    Args:
        group: zarr group.
        grid: patch grid of the scan.
    """

    def __init__(self, group: Any, grid: PatchGrid) -> None:
        self.group, self.grid = group, grid
        self.array: Any = None

    def rows(self, block: int, first: int, rows_ZYXD: Tensor) -> None:
        """Write rows."""
        rows = rows_ZYXD.permute(3, 0, 1, 2).cpu().numpy()
        if self.array is None:
            _, y, x = self.grid.shape
            self.array = self.group.create_array(
                "features",
                shape=(len(rows), *self.grid.shape),
                chunks=(len(rows), 1, y, x),
                dtype="float32",
                dimension_names=AXES,
            )
        self.array[:, first : first + rows.shape[1]] = rows

    def finish(self, block: int, windows: WindowVectors) -> None:
        """Write the class token."""
        check_finite(windows)
        cls_D = windows.cls_WD.mean(0).cpu().numpy()
        self.group.create_array("cls", data=cls_D, dimension_names=AXES[:1])


def geometry(volume: Volume, grid: PatchGrid) -> dict[str, Any]:
    """Where the patches lie; the names are those of `Embedding`."""
    return {
        "spacing_mm": list(grid.spacing_mm(volume.spacing_mm)),
        "origin_mm": list(grid_origin_mm(volume, grid)),
        "directions": [list(direction) for direction in volume.directions],
        "patch": list(grid.patch),
        "resized": list(grid.resized),
        "original": list(grid.original),
    }


def ome(volume: Volume, grid: PatchGrid) -> dict[str, Any]:
    """Axes and scale as viewers of OME-Zarr read them.

    They know no rotation: the positions of a scan that lies oblique are counted from its first
    patch.
    """
    scale = [1.0, *grid.spacing_mm(volume.spacing_mm)]
    transformations: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
    if volume.directions == UPRIGHT:
        translation = [0.0, *grid_origin_mm(volume, grid)[::-1]]
        transformations.append({"type": "translation", "translation": translation})
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": "features",
                "axes": axes,
                "datasets": [{"path": "features", "coordinateTransformations": transformations}],
            }
        ],
    }
