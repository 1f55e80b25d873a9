"""Load an export folder, or weights of another origin, and get the features of a scan.

    model.safetensors   the backbone, float32, parameter names of DINOv2
    config.json         its card: all that the features depend on, see `weights/card.py`

Nothing is unpickled, and names, shapes and hash are checked before a weight is used.
Axes: B crops, Z Y X voxels or patches, D channels.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tapct.base import files
from tapct.base.exits import UserError
from tapct.base.geometry import Size3
from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.eval.features.dense import DenseFeatures
from tapct.eval.features.extraction import Extractor, dense_features, patch_of
from tapct.eval.features.prepared import prepare
from tapct.eval.features.preprocess import Preprocess
from tapct.nn.contracts import Backbone, encode_blocks, num_blocks_of
from tapct.run_folder import ExportFolder, RunFolder
from tapct.types import HUContract, Tokens, Volume
from tapct.weights.card import CARD_FILE, FeatureSettings, is_own_card, read_card
from tapct.weights.crop_input import checked_crops, spacing_of_crops
from tapct.weights.embedding import ArraySink, Embedding
from tapct.weights.imported import PUBLISHED, ImportOptions, open_source
from tapct.weights.scan_input import Scan, volume_of
from tapct.weights.sources import holds_weights, is_hub_id


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
            elif isinstance(value, Tensor):  # its device and dtype are those of the backbone then
                self.check_dtype(value.dtype)
        moved: Pretrained = super().to(*args, **kwargs)
        return moved

    def type(self, dst_type: torch.dtype | str) -> Pretrained:
        """Change the dtype of the weights, as in torch."""
        if isinstance(dst_type, str):  # such as "torch.HalfTensor"
            dst_type = torch.empty(0).type(dst_type).dtype
        self.check_dtype(dst_type)
        return super().type(dst_type)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise UserError for float16 and weights of another project."""
        if dtype == torch.float16 and PUBLISHED in self.provenance:
            raise UserError(
                "float16 is refused for published weights: a user of TAP-CT-B has reported NaN "
                "on some windows in float16; use bfloat16 or float32"
            )

    def _check_precision(self, device: torch.device) -> None:
        """Refuse weights, or an autocast around the call, that `check_dtype` refuses."""
        self.check_dtype(next(self.model.parameters()).dtype)
        if torch.is_autocast_enabled(device.type):
            self.check_dtype(torch.get_autocast_dtype(device.type))

    def forward(self, crops: Tensor, spacing_mm: Sequence[float] | None = None) -> Tokens:
        """Tokens of crops that are already normalised (`contract.normalise`).

        Args:
            crops: float32 (B, Z, Y, X) or (B, 1, Z, Y, X), each side a multiple of the patch.
            spacing_mm: voxel spacing of the crops along (z, y, x), or one per crop (B, 3); only a
                backbone that works in mm needs it.
        Raises:
            UserError: wrong number of axes or channels, values that are no normalised HU, or no
                spacing for a backbone in mm.
        """
        last = num_blocks_of(self.model) - 1
        return self._encode(crops, [last], spacing_mm, norm=True)[last]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
        *,
        spacing_mm: Sequence[float] | None = None,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens after several blocks, as `get_intermediate_layers` of DINOv2 returns them.

        Args:
            x: crops, as in `forward`.
            n: number of last blocks, or numbers of blocks counted from 0; the result is in
                ascending order of the blocks in any case, as in DINOv2.
            reshape: whether patch tokens become maps (B, D, z, y, x); else they are (B, N, D).
            return_class_token: whether each entry is a pair of patch tokens and class tokens
                (B, D).
            norm: whether the tokens pass through the final norm.
            spacing_mm: as in `forward`.
        Returns:
            One entry per block; registers are left out.
        Raises:
            UserError: as in `forward`; or a block does not exist.
        """
        blocks = self.block_numbers(n)
        found = self._encode(x, blocks, spacing_mm, norm)
        patches, classes = [], []
        for tokens in (found[block] for block in blocks):
            patches_BND = tokens.patches_BND
            if reshape:
                patches_BND = patches_BND.transpose(1, 2).unflatten(2, tuple(tokens.grid))
                patches_BND = patches_BND.contiguous()
            patches.append(patches_BND)
            classes.append(tokens.cls_BD)
        return tuple(zip(patches, classes, strict=True)) if return_class_token else tuple(patches)

    def block_numbers(self, blocks: int | Sequence[int]) -> list[int]:
        """Numbers of blocks, ascending.

        Args:
            blocks: number of last blocks, or numbers of blocks counted from 0.
        Raises:
            UserError: a block does not exist, or stands twice.
        """
        num = num_blocks_of(self.model)
        if isinstance(blocks, int) and not isinstance(blocks, bool):
            if not 1 <= blocks <= num:
                raise UserError(f"the last {blocks} blocks were asked for; the model has {num}")
            return list(range(num - blocks, num))
        try:
            numbers = sorted(operator.index(block) for block in blocks)  # type: ignore[union-attr]
        except TypeError:
            raise UserError(f"blocks are {blocks!r}; give a number or a list of numbers") from None
        if not numbers or len(set(numbers)) < len(numbers):
            raise UserError(f"blocks are {numbers}; give each block once, and at least one")
        for number in numbers:
            if not 0 <= number < num:
                raise UserError(f"block {number} does not exist: the model has 0 to {num - 1}")
        return numbers

    def _encode(
        self, crops: Tensor, blocks: list[int], spacing_mm: Sequence[float] | None, norm: bool
    ) -> dict[int, Tokens]:
        """Block -> tokens of one batch of crops, after a check of shape and values."""
        crops = checked_crops(crops, self.contract)
        self.check_dtype(crops.dtype)
        self._check_precision(crops.device)
        spacings = None
        if spacing_mm is not None and getattr(self.model, "needs_spacing", False):
            spacings = [spacing_of_crops(spacing_mm, crops)]
        if norm:
            found = encode_blocks(self.model, [crops], blocks, spacings)
        elif isinstance(self.model, Backbone):
            found = self.model.tokens_before_norm([crops], blocks, spacings)
        else:
            raise UserError(f"{type(self.model).__name__} has no final norm; call with norm=True")
        return {block: groups[0] for block, groups in found.items()}

    def dense(self, volume: Volume, *, batch: int = 8) -> DenseFeatures:
        """Dense features of a whole scan by sliding windows, on the model's device.

        Args:
            volume: scan from `tapct.read_volume`.
            batch: windows per forward call, at least 1.
        Raises:
            UserError: float16 and weights of another project, or `batch` is below 1.
        """
        self._check_precision(self.device)
        return dense_features(
            self.model,
            volume.hu_ZYX,
            self.contract,
            self.preprocess,
            batch=batch,
            device=self.device,
            spacing_mm=volume.spacing_mm,
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    def embed(
        self,
        scan: Scan,
        *,
        spacing_mm: Sequence[float] | None = None,
        blocks: int | Sequence[int] = 1,
        batch: int = 8,
    ) -> Embedding:
        """Dense features and the mean class token of a whole scan, by sliding windows.

        The memory is that of the scan in HU (2 bytes per voxel), of the resized scan (4 bytes per
        voxel), of the features of all blocks that are returned, and of one batch of windows.

        Args:
            scan: path of a scan, as for `tapct.read_volume`; a `Volume`; or an array or tensor in
                HU with the axes (Z, Y, X) in LPS order.
            spacing_mm: distance of the voxels of an array along (z, y, x).
            blocks: number of last blocks, or numbers of blocks counted from 0, whose features are
                returned in `block`.
            batch: windows per forward call, at least 1.
        Raises:
            Refused: the scan breaks a rule of docs/ingest.md, or its features are not finite.
            UserError: the array is no scan in HU, a block does not exist, float16 and weights of
                another project, or `batch` is below 1.
        """
        self._check_precision(self.device)
        wanted = self.block_numbers(blocks)
        volume = volume_of(scan, spacing_mm)
        patch, num_blocks = patch_of(self.model), num_blocks_of(self.model)
        prepared = prepare(
            volume.hu_ZYX,
            self.contract,
            self.preprocess,
            patch,
            self.device,
            volume.spacing_mm,
        )
        sink = ArraySink(prepared.grid)
        extractor = Extractor(self.model, self.preprocess, batch=batch)
        extractor.add(prepared, sorted({*wanted, num_blocks - 1}), sink)
        extractor.flush()
        return sink.embedding(volume, num_blocks, wanted)


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
        allow: mismatches that are accepted: missing, resized (inflated too), inflated, unexpected.
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
