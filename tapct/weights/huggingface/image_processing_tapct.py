"""From a CT scan in Hounsfield units (HU) to the input of the model in `modeling_tapct.py`.

    clip to a window of HU (or after the resize), resize, subtract a mean, divide by a
    standard deviation, pad depth, height and width with air to multiples of the patch

The processor does not reorient, and it changes the depth only where it resizes to a spacing in mm:
a scan is an array (depth, height, width) of axial slices in LPS order. The first slice is the one
nearest the feet, the first row the front of the patient, the first column the patient's right. The
numbers are in `preprocessor_config.json`. This file needs PyTorch, NumPy and transformers only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin

AIR_HU = -1024.0
_NORMALISED = 64.0  # floats within a narrower range than this are no HU


class TAPCTImageProcessor(ImageProcessingMixin):
    """Prepare CT scans for the model.

    Args:
        clip_hu: lowest and highest HU; values outside are set to these.
        mean_hu: mean that is subtracted.
        std_hu: standard deviation that divides.
        size: height and width that every slice is resized to; 0 keeps the size of the scan.
        resize_spacing_mm: voxel spacing (depth, height, width) in mm that a scan is resized to, in
            place of `size`; 0 for an axis that is not resized to a spacing.
        patch_size: voxels (depth, height, width) of a patch of the model.
        resample: "antialias" (see `resize_matrix`), or a mode of torch.nn.functional.interpolate.
        clip_first: whether HU are clipped before the resize; else after it.
        pad_hu: HU that depth, height and width are padded with.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        clip_hu: Sequence[float] = (-1008.0, 822.0),
        mean_hu: float = -86.80862426757812,
        std_hu: float = 322.63470458984375,
        size: Sequence[int] = (224, 224),
        patch_size: Sequence[int] = (4, 8, 8),
        resample: str = "antialias",
        clip_first: bool = True,
        pad_hu: float = -1008.0,
        resize_spacing_mm: Sequence[float] = (0.0, 0.0, 0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.clip_hu = list(clip_hu)
        self.mean_hu = mean_hu
        self.std_hu = std_hu
        self.size = list(size)
        self.patch_size = list(patch_size)
        self.resample = resample
        self.clip_first = clip_first
        self.pad_hu = pad_hu
        self.resize_spacing_mm = list(resize_spacing_mm)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor of a `preprocessor_config.json`; keyword arguments replace its settings."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        settings = copy.deepcopy(image_processor_dict)
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in settings}
        processor = cls(**{**settings, **own})
        return (processor, kwargs) if return_unused else processor

    def __call__(
        self,
        images: Any,
        spacing_mm: Sequence[float] | Tensor | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Scans in HU -> `pixel_values`, float32 (B, 1, D, H, W).

        Args:
            images: array or tensor in HU, one scan (depth, height, width) or scans of one size (B,
                1, depth, height, width).
            spacing_mm: voxel spacing of the scan along (depth, height, width), or one per scan (B,
                3); for models that work in mm, and where scans are resized to a spacing. The
                spacing after resizing is returned.
            return_tensors: "pt" for PyTorch, "np" for NumPy.
        Raises:
            ValueError: another shape, values that cannot be HU, or no spacing where it is needed.
        """
        hu = self._checked(images).to(torch.float32)
        depth, height, width = hu.shape[-3:]
        new_depth, new_height, new_width = self._new_sizes(hu.shape, spacing_mm)
        low, high = self.clip_hu
        if self.clip_first:
            hu = hu.clamp(low, high)
        if (new_height, new_width) != (height, width):
            hu = self._resized(hu, new_height, new_width)
        if new_depth != depth:
            matrix, air = resize_matrix(depth, new_depth).to(hu.device), self._air()
            hu = torch.tensordot(matrix, hu - air, dims=([1], [2])).movedim(0, 2) + air
        values = (hu.clamp(low, high) - self.mean_hu) / self.std_hu
        air = (self.pad_hu - self.mean_hu) / self.std_hu
        far_ends = []
        for length, side in zip(values.shape[:1:-1], self.patch_size[::-1]):
            far_ends += [0, -length % side]
        values = torch.nn.functional.pad(values, far_ends, value=air)
        data = {"pixel_values": values}
        if spacing_mm is not None:
            spacing = torch.as_tensor(spacing_mm, dtype=torch.float32).expand(len(values), 3)
            resized = torch.tensor([depth / new_depth, height / new_height, width / new_width])
            data["spacing_mm"] = spacing * resized
        if return_tensors == "np":
            return BatchFeature({name: value.numpy() for name, value in data.items()})
        if return_tensors not in ("pt", None):
            raise ValueError(f'return_tensors={return_tensors!r}: must be "pt" or "np"')
        return BatchFeature(data)

    def _new_sizes(
        self, shape: Sequence[int], spacing_mm: Sequence[float] | Tensor | None
    ) -> tuple[int, int, int]:
        """Depth, height and width of scans (B, 1, D, H, W) after the resize."""
        depth, height, width = shape[-3:]
        sizes = [depth, self.size[0] or height, self.size[1] or width]
        if any(self.resize_spacing_mm):
            if spacing_mm is None:
                raise ValueError(
                    "this processor resizes scans to a spacing in mm: pass spacing_mm, the voxel "
                    "spacing of the scan along (depth, height, width)"
                )
            given = torch.as_tensor(spacing_mm, dtype=torch.float64).expand(shape[0], 3)
            if not bool((given == given[:1]).all()):
                raise ValueError(
                    "the scans of a batch have different spacings; pass them one by one"
                )
            for axis, wanted in enumerate(self.resize_spacing_mm):
                if wanted:
                    length = shape[2 + axis] * float(given[0, axis])
                    sizes[axis] = max(1, int(length / wanted + 0.5))
        return sizes[0], sizes[1], sizes[2]

    def _air(self) -> float:
        """HU outside of the scan during the resize."""
        return self.clip_hu[0] if self.clip_first else AIR_HU

    def _resized(self, hu: Tensor, new_height: int, new_width: int) -> Tensor:
        """The slices of scans (B, 1, D, H, W) in another size."""
        height, width = hu.shape[-2:]
        if self.resample != "antialias":
            slices = hu.flatten(0, 2)[:, None]
            slices = torch.nn.functional.interpolate(
                slices, size=(new_height, new_width), mode=self.resample
            )
            return slices.unflatten(0, hu.shape[:3])[:, :, :, 0]
        # everything outside the scan is air, which is 0 during the resize
        air = self._air()
        above_air = hu - air
        if new_height != height:
            above_air = resize_matrix(height, new_height).to(hu.device) @ above_air
        if new_width != width:
            above_air = above_air @ resize_matrix(width, new_width).to(hu.device).T
        return above_air + air

    def _checked(self, images: Any) -> Tensor:
        """The scans as a tensor (B, 1, D, H, W), after a check of shape and values."""
        if not isinstance(images, Tensor):
            images = torch.from_numpy(_portable(np.asarray(images)))
        if images.ndim == 3:
            images = images[None, None]
        if images.ndim != 5 or images.shape[1] != 1 or 0 in images.shape:
            raise ValueError(
                f"the scan has the shape {tuple(images.shape)}; give (depth, height, width), or (B,"
                " 1, depth, height, width)"
            )
        if images.is_floating_point():
            if not bool(torch.isfinite(images).all()):
                raise ValueError("the scan has values that are NaN or infinite; give HU")
            lowest, highest = images.min(), images.max()
            if 0 < float(highest - lowest) < _NORMALISED:
                raise ValueError(
                    f"the scan has values from {float(lowest):g} to {float(highest):g}, which are "
                    "no HU; give the scan before any normalisation"
                )
        if float(images.min()) >= 0 and float(images.max()) > 0:
            raise ValueError(
                "the scan has no value below 0, so it is not in HU: air is about -1000 HU. Apply "
                "the rescale slope and intercept of the file first"
            )
        return images


def _portable(array: np.ndarray) -> np.ndarray:
    """A contiguous array of this machine's byte order, of a type that PyTorch has."""
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def resize_matrix(n_in: int, n_out: int) -> Tensor:
    """Matrix (n_out, n_in) that resizes one axis by a triangle filter.

    The filter is as wide as a pixel of the result where the image shrinks, so that nothing aliases,
    and linear interpolation where it grows. Pixels outside the image have weight too, and the value
    0.
    """
    scale = n_in / n_out
    radius = max(scale, 1.0)
    margin = int(radius) + 2
    centre = (torch.arange(n_out) + 0.5) * scale - 0.5
    pixel = torch.arange(-margin, n_in + margin)
    weight = (1 - (pixel - centre[:, None]).abs() / radius).clamp(min=0)
    weight = weight / weight.sum(1, keepdim=True)
    return weight[:, margin:-margin]
