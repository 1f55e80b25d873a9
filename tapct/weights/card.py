"""The card of an export: `config.json` beside the weights, written and read here and nowhere else.

format, format_version          which file this is; another version is refused
model, hu_contract, preprocess  all that the features of a scan depend on (`FeatureSettings`)
orientation                     axes and units of the input, for people
provenance                      run, step, data digest, versions
weights                         name and sha256 of the file with the weights
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tapct import __version__
from tapct.base import files
from tapct.base.exits import UserError
from tapct.config import from_dict, plugins, to_dict
from tapct.config.plugins import Plugin
from tapct.eval.features.preprocess import Preprocess
from tapct.run_folder import ExportFolder
from tapct.types import HUContract

FORMAT, FORMAT_VERSION = "tapct", 1
CARD_FILE = ExportFolder(Path()).card.name
DEFAULT_BACKBONE = "vit"  # DINOv2's architecture, with any number of dimensions
WEIGHTS_FILE = ExportFolder(Path()).weights.name
# Settings that came after the first exports, with the values that cards without them imply. A
# network without rotary positions does not read those of `rope`.
LATER: dict[str, dict[str, Any]] = {
    "model": {
        "pos_offset": 0.0,
        "norm_eps": 1e-6,
        "qk_norm": False,
        "positions": "learned",
        "rope": {},
    },
    "model.rope": {
        "coordinates": "normalised",
        "axes": "zyx",
        "base": 100.0,
        "shortest": None,
        "jitter": 1.0,
        "rescale": 1.0,
    },
    "preprocess": {
        "resize": "antialias",
        "clip": "before_resize",
        "pad": "clipped",
        "refine": [1, 1, 1],
        "spacing_mm": [0.0, 0.0, 0.0],
    },
}
ORIENTATION = (
    "array axes (z, y, x), LPS: z towards the head, y towards the back, x towards the patient's "
    "left; int16 HU; input is (B, Z, Y, X) after clip and z-score, padding is air at the far end "
    "of each axis"
)


@dataclass(frozen=True)
class FeatureSettings:
    """The part of a card that decides the features of a scan."""

    model: Plugin = plugins.section("models", DEFAULT_BACKBONE, "the backbone and its sizes")
    hu_contract: HUContract = dataclasses.field(
        default_factory=HUContract, metadata={"doc": "HU to network input"}
    )
    preprocess: Preprocess = dataclasses.field(
        default_factory=Preprocess,
        metadata={"doc": "how a whole scan is prepared for the backbone"},
    )


@dataclass(frozen=True)
class ExportCard:
    """All that a card holds besides its format.

    Args:
        settings: backbone, HU contract and preprocessing.
        provenance: JSON values, e.g. run name, step, data digest, versions.
        weights_sha256: hex digest of the file with the weights.
    """

    settings: FeatureSettings
    provenance: Mapping[str, Any]
    weights_sha256: str

    def write(self, folder: Path) -> None:
        """Write FOLDER/config.json; versions of tapct and torch are added to the provenance.

        Raises:
            OSError: the disk is full or the folder is not writable.
        """
        card = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **to_dict(self.settings),
            "orientation": ORIENTATION,
            "provenance": {**self.provenance, "tapct": __version__, "torch": torch.__version__},
            "weights": {"file": WEIGHTS_FILE, "sha256": self.weights_sha256},
        }
        text = json.dumps(card, indent=1, allow_nan=False) + "\n"
        files.write_atomically(folder / CARD_FILE, text)


def read_card(folder: Path, *, custom_code: bool = False) -> ExportCard:
    """Read and check the card of an export folder; the weights are not read.

    Args:
        folder: export folder.
        custom_code: whether the card may name a backbone from a module outside tapct, which is then
            imported.
    Raises:
        UserError: a file is missing, the card is damaged or of another format, a setting is unknown
            or missing, or it names code outside tapct without `custom_code`.
    """
    card = _read_json(folder)
    path = folder / CARD_FILE
    weights = card.get("weights")
    if not isinstance(weights, dict) or not isinstance(weights.get("sha256"), str):
        raise UserError(f"{path} lacks weights.sha256. Export again.")
    if not isinstance(card.get("provenance"), dict):
        raise UserError(f"{path} lacks the section provenance. Export again.")
    settings = _read_settings(card, path, custom_code)
    return ExportCard(settings, card["provenance"], weights["sha256"])


def is_own_card(folder: Path) -> bool:
    """Whether the config.json of a folder is a card of tapct, or none that can be read; False for
    that of another project.
    """
    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(card, dict) or "format" in card or "hu_contract" in card


def provenance_of(folder: Path) -> dict[str, Any]:
    """The provenance in the card of a folder, without a check of the rest; empty where there is no
    card.
    """
    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    provenance = card.get("provenance") if isinstance(card, dict) else None
    return provenance if isinstance(provenance, dict) else {}


def _read_json(folder: Path) -> dict[str, Any]:
    """The card as JSON, after a check that it is a card of this format version."""
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: give an export folder, or a run folder that `tapct export` was "
            "used on"
        )
    for name in (CARD_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}, so it is not an export. Make one with `tapct export RUN`."
            )
    path = folder / CARD_FILE
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}. Export again.") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise UserError(f"{path} is not a tapct export: its `format` must be {FORMAT!r}")
    if card.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {card.get('format_version')!r}, this tapct reads "
            f"{FORMAT_VERSION}. Export again, or install the tapct that wrote it."
        )
    return card


def _read_settings(card: dict[str, Any], path: Path, custom_code: bool) -> FeatureSettings:
    names = {field.name for field in dataclasses.fields(FeatureSettings)}
    known = {"format", "format_version", "orientation", "provenance", "weights", *names}
    if unknown := sorted(set(card) - known):
        raise UserError(
            f"{path} has the unknown key {unknown[0]!r}. Export again, or remove the key."
        )
    given = with_later_settings({key: value for key, value in card.items() if key in names})
    check_backbone_name(given.get("model"), str(path), custom_code)
    settings: FeatureSettings = from_dict(FeatureSettings, given, str(path))
    if missing := _first_missing(to_dict(settings), given):
        raise UserError(
            f"{path} lacks {missing}, and a default may not be what these weights need. Export "
            "again."
        )
    return settings


def check_backbone_name(model: Any, where: str, custom_code: bool) -> None:
    """Raise UserError where a model section names a module outside of tapct that is not trusted.

    Args:
        model: model section as JSON.
        where: file that it stands in.
        custom_code: whether such modules are trusted.
    """
    backbone = model.get("name") if isinstance(model, dict) else None
    if isinstance(backbone, str) and "." in backbone and not custom_code:
        raise UserError(
            f"{where} names the backbone {backbone!r}, which is not one of tapct. "
            "If you trust that code, load with custom_code=True, or the option --custom-code."
        )


def with_later_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a card with the settings that earlier versions did not write; a newer card is
    returned unchanged, and so is a backbone that is not `vit`.
    """
    full = copy.deepcopy(dict(given))
    for path, values in LATER.items():
        section: Any = full
        for key in path.split("."):
            section = section.get(key) if isinstance(section, dict) else None
        backbone = full.get("model", {}).get("name")
        is_other = path.startswith("model") and backbone != DEFAULT_BACKBONE
        if isinstance(section, dict) and not is_other:
            for key, value in values.items():
                section.setdefault(key, copy.deepcopy(value))
    return full


def _first_missing(full: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> str:
    """Dotted name of the first key that is in `full` and not in `given`; empty when there is
    none.
    """
    for key, value in full.items():
        if key not in given:
            return prefix + key
        if isinstance(value, Mapping):
            missing = _first_missing(value, given[key], f"{prefix}{key}.")
            if missing:
                return missing
    return ""
