"""Features of scans from a frozen backbone: sliding windows, averaged on the patch grid.

    windows of several scans -> batches -> tokens of several blocks in one pass
    -> sums along z -> rows of patches that no later window covers -> their mean -> a sink

The windows of a scan come in ascending z. Rows of patches are finished as soon as the next window
begins behind them, so only one window's depth of sums is in memory, whatever the depth of the scan.

Axes: Z Y X depth height width (voxels, or patches of the grid where stated), D channels, B windows
of one call, N patches of a window, W windows of a scan, R registers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.base.geometry import Size3, patch_grid
from tapct.eval.features.dense import BlockFeatures, DenseFeatures, PatchGrid, WindowVectors
from tapct.eval.features.prepared import Prepared, prepare
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.stopwatch import FORWARD, Stopwatch
from tapct.eval.features.windows import Windows
from tapct.nn.contracts import encode_blocks, num_blocks_of
from tapct.types import HUContract, Tokens


class Sink(Protocol):
    """What receives the features of one scan, block by block."""

    def rows(self, block: int, first: int, rows_ZYXD: Tensor) -> None:
        """Take finished rows of patches.

        Args:
            block: number of the block.
            first: z index of the first row on the patch grid; rows come in order.
            rows_ZYXD: float32 on the device of the model, whole in y and x.
        """

    def finish(self, block: int, windows: WindowVectors) -> None:
        """Take the vectors of all windows, after the last row of a block."""


class MemorySink:
    """Keeps the features of a scan in memory.

    Args:
        grid: patch grid of the scan.
        device: device of the features.
    """

    def __init__(self, grid: PatchGrid, device: torch.device) -> None:
        self.grid, self.device = grid, device
        self.features_ZYXD: dict[int, Tensor] = {}
        self.windows: dict[int, WindowVectors] = {}

    def rows(self, block: int, first: int, rows_ZYXD: Tensor) -> None:
        """Copy rows into the whole."""
        if block not in self.features_ZYXD:
            shape = (*self.grid.shape, rows_ZYXD.shape[-1])
            self.features_ZYXD[block] = torch.empty(shape, device=self.device)
        self.features_ZYXD[block][first : first + len(rows_ZYXD)] = rows_ZYXD

    def finish(self, block: int, windows: WindowVectors) -> None:
        """Keep the vectors."""
        self.windows[block] = windows

    def dense(self, last: int, window: Size3) -> DenseFeatures:
        """The features of a finished scan.

        Args:
            last: number of the backbone's last block.
            window: voxels of a window.
        """
        blocks = {
            block: BlockFeatures(rows.permute(3, 0, 1, 2), self.windows[block])
            for block, rows in self.features_ZYXD.items()
        }
        return dense_of(blocks, last, self.grid, window)


def dense_of(
    blocks: dict[int, BlockFeatures], last: int, grid: PatchGrid, window: Size3
) -> DenseFeatures:
    """The features of a scan from those of its blocks, the last one among them."""
    of_last = blocks[last]
    cls_D = of_last.windows.cls_WD.mean(0)
    return DenseFeatures(of_last.features_DZYX, cls_D, grid, blocks, window)


class _BlockSums:
    """Weighted sums of the tokens of one block of one scan, for the rows that a window can still
    change; finished rows go to the sink.
    """

    def __init__(self, windows: Windows, block: int, sink: Sink) -> None:
        self.windows, self.block, self.sink = windows, block, sink
        self.sums = windows.sums()
        self.total_ZYXD: Tensor | None = None
        self.first = 0  # row of the padded grid that total_ZYXD begins with
        self.vectors: WindowVectors | None = None
        self.num_windows = 0

    def add(self, corner: Size3, weighted_ZYXD: Tensor, vectors: WindowVectors) -> None:
        """Add the tokens of a window, times their weights, and keep its vectors.

        Args:
            corner: first voxel of the window; z never descends.
            weighted_ZYXD: patch tokens of the window times their weights.
            vectors: vectors of this window alone, without the axis of windows.
        """
        self._keep(vectors)
        row, y, x = (c // side for c, side in zip(corner, self.windows.grid.patch, strict=True))
        if self.total_ZYXD is None:
            shape = (self.windows.rows, *self.windows.padded[1:], weighted_ZYXD.shape[-1])
            self.total_ZYXD = torch.zeros(shape, device=weighted_ZYXD.device)
        if row > self.first:
            self._finish_rows(row)
        (_, height, width), (in_z, in_y, in_x) = self.windows.size, self.windows.refine
        cells_ZYXD = self.total_ZYXD[:, y : y + height * in_y, x : x + width * in_x]
        # every cell of a patch gets its token: patches and the cells in them are axes of a view
        by_patch = cells_ZYXD.unflatten(2, (-1, in_x)).unflatten(1, (-1, in_y))
        by_patch = by_patch.unflatten(0, (-1, in_z))
        by_patch += weighted_ZYXD[:, None, :, None, :, None]

    def _keep(self, vectors: WindowVectors) -> None:
        """Copy the vectors of a window to their place.

        The place is made once for all windows: many small tensors that live until the end of the
        scan, between large ones that do not, would fragment the memory and cost GBs.
        """
        values = {field.name: getattr(vectors, field.name) for field in fields(WindowVectors)}
        if self.vectors is None:
            num = math.prod(len(starts) for starts in self.windows.starts)
            places = {name: value.new_empty(num, *value.shape) for name, value in values.items()}
            self.vectors = WindowVectors(**places)
        for name, value in values.items():
            getattr(self.vectors, name)[self.num_windows] = value
        self.num_windows += 1

    def _finish_rows(self, until: int) -> None:
        """Hand over all rows before `until`, which no later window covers."""
        assert self.total_ZYXD is not None
        num, (_, y, x) = until - self.first, self.windows.grid.shape
        in_scan = min(until, self.windows.grid.shape[0]) - self.first
        if in_scan > 0:
            sum_z, sum_y, sum_x = self.sums
            weight_ZYX = sum_z[self.first : until, None, None] * sum_y[:, None] * sum_x
            mean_ZYXD = self.total_ZYXD[:num] / weight_ZYX[..., None]
            self.sink.rows(self.block, self.first, mean_ZYXD[:in_scan, :y, :x])
        kept_ZYXD = self.total_ZYXD[num:].clone()
        self.total_ZYXD.zero_()
        self.total_ZYXD[: len(kept_ZYXD)] = kept_ZYXD
        self.first = until

    def finish(self) -> None:
        """Hand over the last rows and the vectors of all windows."""
        assert self.vectors is not None and self.num_windows == len(self.vectors.start_W3)
        self._finish_rows(self.first + self.windows.rows)
        self.total_ZYXD = None
        self.sink.finish(self.block, self.vectors)


class _Scan:
    """A scan whose windows are being computed; it does not hold the scan's voxels."""

    def __init__(
        self, prepared: Prepared, windows: Windows, blocks: Sequence[int], sink: Sink
    ) -> None:
        self.spacing_mm = prepared.spacing_mm
        self.left = math.prod(len(starts) for starts in windows.starts)
        self.blocks = {block: _BlockSums(windows, block, sink) for block in blocks}
        self.box: Tensor | None = None  # body box, for a model that works on positions


@dataclass(frozen=True)
class _Window:
    """One window that waits for its batch."""

    scan: _Scan
    corner: Size3
    crop_ZYX: Tensor


class Extractor:
    """Computes the features of scans with one backbone; windows of several scans share a batch.

    Args:
        model: backbone with `patch`. One that `needs_spacing` is given the spacing of the resized
            voxels; one with `body_box`, such as `PositionFeatures`, the place of every patch.
        preprocess: windows.
        batch: windows per call, at least 1.
        stopwatch: where seconds are counted.
    Raises:
        UserError: `batch` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        *,
        batch: int,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        if batch < 1:
            raise UserError(f"batch is {batch}; give at least 1 window per forward call")
        self.model, self.preprocess, self.batch = model, preprocess, batch
        self.stopwatch = stopwatch or Stopwatch()
        self.waiting: list[_Window] = []

    def add(self, prepared: Prepared, blocks: Sequence[int], sink: Sink) -> None:
        """Compute the windows of a scan. The last ones, which fill no batch, wait for the next scan
        or for `flush`.

        Args:
            prepared: scan, on the model's device.
            blocks: blocks of the backbone.
            sink: receiver of the features.
        """
        if self.waiting and set(self.waiting[0].scan.blocks) != set(blocks):
            self.flush()  # one call returns the same blocks of all its windows
        windows = Windows.of(prepared, self.preprocess)
        scan = _Scan(prepared, windows, blocks, sink)
        if hasattr(self.model, "body_box"):
            scan.box = self.model.body_box(prepared)  # type: ignore[operator]
        for corner in windows.corners():
            crop_ZYX = prepared.input_ZYX[_box(corner, self.preprocess.window)]
            self.waiting.append(_Window(scan, corner, crop_ZYX))
            if len(self.waiting) == self.batch:
                self.flush()
        # copies, so that the scan itself can be freed
        self.waiting = [_Window(w.scan, w.corner, w.crop_ZYX.clone()) for w in self.waiting]

    def flush(self) -> None:
        """Compute the windows that wait."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        # `eval` and `train` visit every module, which takes as long as a small network's forward
        # pass; so they are called only where a module is in training mode
        training = self.model.training
        changes = any(module.training for module in self.model.modules())
        if changes:
            self.model.eval()
        try:
            with self.stopwatch.part(FORWARD):
                self._run(waiting)
        finally:
            if changes:
                self.model.train(training)

    def _run(self, batch: list[_Window]) -> None:
        blocks = tuple(batch[0].scan.blocks)
        for block, tokens in self._tokens(batch, blocks).items():
            patches_BND = tokens.patches_BND.float()
            mean_BD = patches_BND.mean(1)
            # ten times as fast on a CPU as `patches_BND.std(1)`
            std_BD = (patches_BND - mean_BD[:, None]).square_().mean(1).sqrt_()
            vectors_B = WindowVectors(
                tokens.cls_BD.float(),
                mean_BD,
                std_BD,
                patches_BND.amax(1),
                tokens.registers_BRD.float(),
                torch.tensor([window.corner for window in batch]),
            )
            taper = batch[0].scan.blocks[block].windows.taper_ZYX1()
            weighted = patches_BND.unflatten(1, tokens.grid) * taper
            for index, window in enumerate(batch):
                vectors = WindowVectors(
                    *(getattr(vectors_B, field.name)[index] for field in fields(WindowVectors))
                )
                window.scan.blocks[block].add(window.corner, weighted[index], vectors)
        for window in batch:
            window.scan.left -= 1
            if not window.scan.left:
                for sums in window.scan.blocks.values():
                    sums.finish()
        if batch[0].crop_ZYX.is_cuda:
            torch.cuda.synchronize()  # else the seconds would count for whoever waits next

    def _tokens(self, batch: list[_Window], blocks: tuple[int, ...]) -> dict[int, Tokens]:
        """Block -> tokens of a batch of windows, without gradient and outside of inference mode, so
        that a decoder can be trained on them.
        """
        crops_BZYX = torch.stack([window.crop_ZYX for window in batch])
        per_window = patch_grid(self.preprocess.window, patch_of(self.model), "preprocess.window")
        spacing_mm = None
        if getattr(self.model, "needs_spacing", False) and batch[0].scan.spacing_mm is not None:
            spacing_mm = [crops_BZYX.new_tensor([window.scan.spacing_mm for window in batch])]
        with torch.no_grad(), autocast_on(crops_BZYX.device):
            if batch[0].scan.box is not None:
                found = {0: self.model([self._places(batch, per_window)])}
            else:
                found = encode_blocks(self.model, [crops_BZYX], blocks, spacing_mm)
        tokens_of = {block: groups[0] for block, groups in found.items()}
        for tokens in tokens_of.values():
            assert tuple(tokens.grid) == per_window, (tokens.grid, per_window)
            assert tokens.patches_BND.shape[1] == math.prod(per_window)
        return tokens_of

    def _places(self, batch: list[_Window], per_window: Size3) -> Tensor:
        """Centre of every patch in the box of the body, -1 and 1 at its faces: (B, Z, Y, X, 3)."""
        patch = torch.tensor(patch_of(self.model), dtype=torch.float32)
        axes = [torch.arange(n, dtype=torch.float32) + 0.5 for n in per_window]
        centre_ZYX3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) * patch
        places = []
        for window in batch:
            assert window.scan.box is not None
            low_3, high_3 = window.scan.box
            voxel_ZYX3 = centre_ZYX3 + torch.tensor(window.corner, dtype=torch.float32)
            places.append(2 * (voxel_ZYX3 - low_3) / (high_3 - low_3) - 1)
        return torch.stack(places).to(batch[0].crop_ZYX.device)


def autocast_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast on a GPU; float32 elsewhere."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16)


def patch_of(model: nn.Module) -> Size3:
    """Voxels (z, y, x) of a patch of a backbone."""
    z, y, x = model.patch  # type: ignore[misc]
    return int(z), int(y), int(x)


def features_of(
    model: nn.Module,
    prepared: Prepared,
    preprocess: Preprocess,
    *,
    batch: int = 8,
    blocks: Sequence[int] = (),
) -> DenseFeatures:
    """Slide the window over a prepared scan and average the tokens of overlapping windows.

    Args:
        model: backbone, as in `Extractor`.
        batch: windows per call.
        blocks: blocks beside the last one, whose features are returned too.
    Returns:
        `DenseFeatures` on the model's device.
    """
    last = num_blocks_of(model) - 1
    sink = MemorySink(prepared.grid, prepared.input_ZYX.device)
    extractor = Extractor(model, preprocess, batch=batch)
    extractor.add(prepared, sorted({*blocks, last}), sink)
    extractor.flush()
    return sink.dense(last, preprocess.window)


def dense_features(
    model: nn.Module,
    hu_ZYX: np.ndarray,
    contract: HUContract,
    preprocess: Preprocess,
    *,
    batch: int = 8,
    device: torch.device | str = "cpu",
    spacing_mm: Sequence[float] | None = None,
    blocks: Sequence[int] = (),
) -> DenseFeatures:
    """Dense features of a whole scan: `prepare`, then `features_of`.

    Args:
        model: backbone on `device` with `patch` and `dim`.
        hu_ZYX: int16 HU, LPS, axial slices first.
        batch: windows per forward call.
        spacing_mm: see `prepare`.
        blocks: blocks beside the last one, whose features are returned too.
    Raises:
        UserError: window or stride off the model's patch grid, or no spacing for a model in mm.
    Source: sliding-window use of the released model, arXiv:2512.00872.
    """
    prepared = prepare(hu_ZYX, contract, preprocess, patch_of(model), device, spacing_mm)
    return features_of(model, prepared, preprocess, batch=batch, blocks=blocks)


def _box(corner: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """Slices of `size` voxels from a corner."""
    return tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
