"""Weights out and in: an export folder that holds all one needs to get the teacher's features from
a scan.

    model.safetensors   the backbone, float32, DINOv2's parameter names
    config.json         model section, HU contract, preprocessing, orientation, provenance, hash of the weights

Nothing is unpickled, and sizes, names and hash are checked before a weight is used.
Axes: B crops, Z Y X voxels or patches, D channels.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tapct.base.exits import UserError
from tapct.config import from_dict, plugins, to_dict
from tapct.config.plugins import Plugin
from tapct.engine.checkpoint import first_cause, sha256
from tapct.eval.features import DenseFeatures, Preprocess, dense_features
from tapct.types import HUContract, Tokens, Volume
from tapct.weights.export import CONFIG_FILE, FORMAT, FORMAT_VERSION, WEIGHTS_FILE, Recipe


@dataclass(frozen=True)
class Embedding:
    """Frozen features of one scan as plain arrays.

    Args:
        features_DZYX: float32 on the patch grid.
        cls_D: float32, class token, mean over windows.
        spacing_mm: distance of patch centres along (z, y, x).
        patch: voxels (z, y, x) of a patch in the resized scan.
        resized, original: shape of the scan after and before the in-plane resize.
    """

    features_DZYX: np.ndarray
    cls_D: np.ndarray
    spacing_mm: tuple[float, float, float]
    patch: tuple[int, int, int]
    resized: tuple[int, int, int]
    original: tuple[int, int, int]

    def write_npz(self, path: Path) -> None:
        """Write all fields under their names as a compressed .npz, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        arrays = {
            field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)
        }
        try:
            with aside.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            aside.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {first_cause(error)}") from error
        finally:
            aside.unlink(missing_ok=True)


class Pretrained(nn.Module):
    """A frozen backbone with all that its features depend on.

    Args:
        model: the backbone, in eval mode, without gradients.
        recipe: model section, HU contract, preprocessing.
        provenance: run, step, versions, manifest digest; as exported.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, provenance: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.recipe = recipe
        self.provenance = dict(provenance)

    @property
    def section(self) -> Plugin:
        """The backbone's plug-in section."""
        return self.recipe.model

    @property
    def contract(self) -> HUContract:
        """HU to network input."""
        return self.recipe.hu_contract

    @property
    def preprocess(self) -> Preprocess:
        """How a whole scan is brought before the backbone."""
        return self.recipe.preprocess

    def train(self, mode: bool = True) -> Pretrained:
        """Stays in eval mode: frozen features must not depend on a forgotten switch. `.model` can
        be trained.
        """
        del mode
        return super().train(False)

    def forward(self, crops: Tensor, spacing_mm: Sequence[float] | None = None) -> Tokens:
        """Tokens of crops that are already normalised (`contract.normalise`).

        Args:
            crops: float32 (B, Z, Y, X) or (B, 1, Z, Y, X), each side a multiple of the patch.
            spacing_mm: of the crops' voxels along (z, y, x); only a backbone that works in mm needs
                it.
        Raises:
            UserError: another number of axes or channels, or no spacing for a backbone in mm.
        """
        if crops.ndim == 5 and crops.shape[1] == 1:
            crops = crops[:, 0]
        if crops.ndim != 4:
            raise UserError(
                f"crops are {tuple(crops.shape)}; give normalised HU as (B, Z, Y, X) or (B, 1, Z, "
                "Y, X)"
            )
        if spacing_mm is not None and getattr(self.model, "needs_spacing", False):
            told: list[Tokens] = self.model(
                [crops], spacing_mm=[crops.new_tensor(spacing_mm).expand(len(crops), 3)]
            )
            return told[0]
        tokens: Tokens = self.model([crops])[0]
        return tokens

    def dense(self, volume: Volume, *, batch: int = 8) -> DenseFeatures:
        """Dense features of a whole scan by sliding windows, on the model's device."""
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
            volume: from `tapct.read_volume`.
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
    path: str | Path, *, custom_code: bool = False, device: torch.device | str = "cpu"
) -> Pretrained:
    """Load an export folder, or the `export` folder of a run.

    Args:
        path: folder with `config.json` and `model.safetensors`.
        custom_code: allow a backbone from a module outside tapct that the export names; it is
            imported, so it runs.
        device: where the backbone is put.
    Raises:
        UserError: missing folder or file, damaged weights, an unknown or missing setting, weights
            that do not fit.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file() and (folder / "export" / CONFIG_FILE).is_file():
        folder = folder / "export"
    card = _read_card(folder)
    recipe = _read_recipe(card, folder / CONFIG_FILE, custom_code)
    weights = folder / WEIGHTS_FILE
    if sha256(weights) != card["weights"]["sha256"]:
        raise UserError(
            f"{weights} is damaged: its sha256 is not the one in {CONFIG_FILE}. Export or copy "
            "again."
        )
    model: nn.Module = plugins.load("models", recipe.model.name).build(recipe.model.config)
    _check_fit(model, weights)
    model.load_state_dict(load_file(weights))
    return Pretrained(model.to(device), recipe, card["provenance"])


def _read_card(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: give an export folder, or a run folder that `tapct export` was "
            "used on"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}, so it is not an export. Make one with `tapct export RUN`."
            )
    try:
        card = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be read as JSON: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise UserError(
            f"{folder / CONFIG_FILE} is not a tapct export: its `format` must be {FORMAT!r}"
        )
    if card.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / CONFIG_FILE} has format version {card.get('format_version')!r}, this "
            "tapct reads "
            f"{FORMAT_VERSION}. Export again, or install the tapct that wrote it."
        )
    weights = card.get("weights")
    if not isinstance(weights, dict) or not isinstance(weights.get("sha256"), str):
        raise UserError(f"{folder / CONFIG_FILE} lacks weights.sha256. Export again.")
    if not isinstance(card.get("provenance"), dict):
        raise UserError(f"{folder / CONFIG_FILE} lacks the section provenance. Export again.")
    return card


def _read_recipe(card: dict[str, Any], where: Path, custom_code: bool) -> Recipe:
    given = {
        key: card[key]
        for key in card
        if key in {field.name for field in dataclasses.fields(Recipe)}
    }
    known = {"format", "format_version", "orientation", "provenance", "weights", *given}
    if unknown := sorted(set(card) - known):
        raise UserError(
            f"{where} has the unknown key {unknown[0]!r}. Export again, or take it out."
        )
    name = given["model"].get("name") if isinstance(given.get("model"), dict) else None
    if isinstance(name, str) and "." in name and not custom_code:
        raise UserError(
            f"{where} names the backbone {name!r}, which is not tapct's own. "
            "If you trust that code, load with custom_code=True."
        )
    recipe: Recipe = from_dict(Recipe, given, str(where))
    if missing := _missing(to_dict(recipe), given):
        raise UserError(
            f"{where} lacks {missing}, and a default may not be what these weights need. Export "
            "again."
        )
    return recipe


def _missing(full: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> str:
    """Dotted name of the first key that is in `full` and not in `given`; empty when there is
    none.
    """
    for key, value in full.items():
        if key not in given:
            return prefix + key
        if isinstance(value, Mapping) and (found := _missing(value, given[key], f"{prefix}{key}.")):
            return found
    return ""


def _check_fit(model: nn.Module, weights: Path) -> None:
    """Compare names and shapes from the file's header with the model's, before any tensor is
    read.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(weights, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{weights} cannot be read as safetensors: {error}") from error
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{weights} does not fit its {CONFIG_FILE}: {name} is {_shape(found.get(name))} "
                "in the file, "
                f"{_shape(expected.get(name))} in the model"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"
