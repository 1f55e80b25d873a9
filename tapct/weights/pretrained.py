"""Load an export folder, or weights of another origin, and get the features of a scan.

    model.safetensors   the backbone, float32, parameter names of DINOv2
    config.json         its card: all that the features depend on, see `weights/card.py`

Nothing is unpickled, and names, shapes and hash are checked before a weight is used.
Axes: B crops, Z Y X voxels or patches, D channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tapct.base import files
from tapct.base.exits import UserError
from tapct.base.geometry import Size3
from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.eval.extraction import dense_features
from tapct.eval.features import DenseFeatures, Preprocess
from tapct.run_folder import ExportFolder, RunFolder
from tapct.types import HUContract, Tokens, Volume
from tapct.weights.card import CARD_FILE, FeatureSettings, is_own_card, read_card
from tapct.weights.imported import PUBLISHED, ImportOptions, open_source
from tapct.weights.sources import holds_weights, is_hub_id


@dataclass(frozen=True)
class Embedding:
    """Frozen features of one scan as plain arrays.

    Args:
        features_DZYX: features on the patch grid, float32.
        cls_D: class token, mean over windows, float32.
        spacing_mm: distance of patch centres along (z, y, x).
        patch: voxels (z, y, x) of a patch in the resized scan.
        resized: shape of the scan after the in-plane resize.
        original: shape of the scan before it.
    """

    features_DZYX: np.ndarray
    cls_D: np.ndarray
    spacing_mm: tuple[float, float, float]
    patch: tuple[int, int, int]
    resized: tuple[int, int, int]
    original: tuple[int, int, int]

    def write_npz(self, path: Path) -> None:
        """Write all fields under their names as a compressed .npz, whole or not at all.

        Args:
            path: file to write; its folder is made.
        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        arrays = {
            field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)
        }
        path = files.expand_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(f"cannot write {path}: {files.first_cause(error)}") from error


class Pretrained(nn.Module):
    """A frozen backbone with all that its features depend on.

    Args:
        model: backbone; it is put into eval mode and its gradients are switched off.
        settings: model section, HU contract, preprocessing.
        provenance: run, step, versions, data digest; as exported.
    """

    def __init__(
        self, model: nn.Module, settings: FeatureSettings, provenance: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.settings = settings
        self.provenance = dict(provenance)

    @property
    def section(self) -> Plugin:
        """Plug-in section of the backbone: its name and sizes."""
        return self.settings.model

    @property
    def contract(self) -> HUContract:
        """HU to network input."""
        return self.settings.hu_contract

    @property
    def preprocess(self) -> Preprocess:
        """How a whole scan is prepared for the backbone."""
        return self.settings.preprocess

    def train(self, mode: bool = True) -> Pretrained:
        """Stay in eval mode: frozen features must not depend on a forgotten switch.

        `.model.train()` makes the backbone itself trainable.
        """
        del mode
        return super().train(False)

    def half(self) -> Pretrained:
        """Weights in float16; refused for weights of other projects, see `check_dtype`."""
        self.check_dtype(torch.float16)
        return super().half()

    def to(self, *args: Any, **kwargs: Any) -> Pretrained:
        """Move the backbone, or change its dtype, as in torch."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                self.check_dtype(value)
        moved: Pretrained = super().to(*args, **kwargs)
        return moved

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise UserError for float16 and weights of another project."""
        if dtype == torch.float16 and PUBLISHED in self.provenance:
            raise UserError(
                "float16 is refused for published weights: a user of TAP-CT-B has reported NaN "
                "on some windows in float16; use bfloat16 or float32"
            )

    def forward(self, crops: Tensor, spacing_mm: Sequence[float] | None = None) -> Tokens:
        """Tokens of crops that are already normalised (`contract.normalise`).

        Args:
            crops: float32 (B, Z, Y, X) or (B, 1, Z, Y, X), each side a multiple of the patch.
            spacing_mm: voxel spacing of the crops along (z, y, x); only a backbone that works in
                mm needs it.
        Raises:
            UserError: wrong number of axes or channels, or no spacing for a backbone in mm.
        """
        self.check_dtype(crops.dtype)
        if torch.is_autocast_enabled(crops.device.type):
            self.check_dtype(torch.get_autocast_dtype(crops.device.type))
        if crops.ndim == 5 and crops.shape[1] == 1:
            crops = crops[:, 0]
        if crops.ndim != 4:
            raise UserError(
                f"crops are {tuple(crops.shape)}; give normalised HU as (B, Z, Y, X) or (B, 1, Z, "
                "Y, X)"
            )
        if spacing_mm is not None and getattr(self.model, "needs_spacing", False):
            spacing_B3 = crops.new_tensor(spacing_mm).expand(len(crops), 3)
            outputs: list[Tokens] = self.model([crops], spacing_mm=[spacing_B3])
        else:
            outputs = self.model([crops])
        return outputs[0]

    def dense(self, volume: Volume, *, batch: int = 8) -> DenseFeatures:
        """Dense features of a whole scan by sliding windows, on the model's device.

        Args:
            volume: scan from `tapct.read_volume`.
            batch: windows per forward call.
        """
        device = next(self.model.parameters()).device
        return dense_features(
            self.model,
            volume.hu_ZYX,
            self.contract,
            self.preprocess,
            batch=batch,
            device=device,
            spacing_mm=volume.spacing_mm,
        )

    def embed(self, volume: Volume, *, batch: int = 8) -> Embedding:
        """Dense features and the mean class token of a whole scan as arrays.

        Args:
            volume: scan from `tapct.read_volume`.
            batch: windows per forward call.
        """
        dense = self.dense(volume, batch=batch)
        return Embedding(
            np.ascontiguousarray(dense.features_DZYX.cpu().numpy()),
            dense.cls_D.cpu().numpy(),
            dense.grid.spacing_mm(volume.spacing_mm),
            dense.grid.patch,
            dense.grid.resized,
            dense.grid.original,
        )


def load_pretrained(
    source: str | Path,
    settings: Sequence[str] = (),
    *,
    allow: str | Sequence[str] = (),
    inflate: str = "mean",
    window: Size3 | None = None,
    custom_code: bool = False,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """Load weights from anywhere: an export, a run, a checkpoint, or those of another project.

    Args:
        source: export folder, run folder (its export, else its newest checkpoint), checkpoint,
            folder in Hugging Face's layout, id OWNER/NAME in the local cache of huggingface_hub, or
            .safetensors, .pth, .pt or .bin file; docs/weights.md has a table.
        settings: key=value of `model`, `hu_contract` and `preprocess` that replace those of the
            weights, e.g. `preprocess.window=[12,224,224]`.
        allow: mismatches that are accepted: missing, resized, inflated, unexpected.
        inflate: how a 2D kernel is spread over depth: mean or centre.
        window: voxels (z, y, x) that the positions were learned for, where no file states it.
        custom_code: whether the weights may name a backbone from a module outside tapct, which is
            then imported.
        device: device of the backbone.
    Raises:
        UserError: missing folder or file, damaged weights, an unknown or missing setting, weights
            that do not fit.
    """
    path = files.expand_path(source)
    export = _export_of(path)
    if isinstance(allow, str):
        allow = [kind.strip() for kind in allow.split(",") if kind.strip()]
    options = ImportOptions(tuple(settings), tuple(allow), inflate, window, custom_code)
    if export is None or settings:
        found = open_source(path, options)
        return Pretrained(found.model.to(device), found.settings, found.provenance)
    card = read_card(export.path, custom_code=custom_code)
    weights = export.weights
    if files.sha256(weights) != card.weights_sha256:
        raise UserError(
            f"{weights} is damaged: its sha256 is not the one in {CARD_FILE}. Export or copy again."
        )
    section = card.settings.model
    model: nn.Module = plugins.load("models", section.name).build(section.config)
    _check_fit(model, weights)
    model.load_state_dict(load_file(weights))
    return Pretrained(model.to(device), card.settings, card.provenance)


def _export_of(path: Path) -> ExportFolder | None:
    """The export that a path means; None for weights of another kind.

    A folder without weights of any kind counts as an export, whose error names what is missing.
    """
    own = ExportFolder(path)
    of_run = RunFolder(path).export
    if own.card.is_file():
        return own if is_own_card(own.path) else None
    if of_run.card.is_file():
        return of_run
    if path.is_file() or is_hub_id(path) or RunFolder(path).checkpoints.path.is_dir():
        return None
    return own if not holds_weights(path) else None


def _check_fit(model: nn.Module, weights: Path) -> None:
    """Compare names and shapes in the header of the file with the model, before a tensor is read.

    Raises:
        UserError: a tensor is missing, is too many or has another shape, or the file is damaged.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(weights, framework="pt") as file:
            names = list(file.keys())
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise UserError(f"{weights} cannot be read as safetensors: {error}") from error
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise UserError(
                f"{weights} does not fit its {CARD_FILE}: {name} is {_shape(stored.get(name))} in "
                f"the file, {_shape(expected.get(name))} in the model. Export again."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"
