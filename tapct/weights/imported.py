"""A model made of weights from anywhere: its settings, a backbone of these sizes, and a report of
what became of each tensor.

| source | settings of the model |
|---|---|
| run, checkpoint | those of its training |
| export | those of its card |
| folder of `tapct export --hf` | those that its JSON files state |
| other projects | sizes read off the tensors, HU window of TAP-CT, windows of the native size |

Overrides change them; what then does not fit must be allowed by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tapct.base import files
from tapct.base.exits import UserError
from tapct.base.geometry import Size3
from tapct.config import from_dict, plugins, to_dict
from tapct.engine.checkpoint import damage, read_meta
from tapct.nn.contracts import Backbone
from tapct.run_folder import CheckpointFolder
from tapct.types import FIT_KINDS
from tapct.weights import architecture, fit, inflate, sources
from tapct.weights.card import CARD_FILE, FeatureSettings, check_backbone_name, read_card
from tapct.weights.sources import SourceWeights
from tapct.weights.stated import is_stated, stated_model, stated_preprocess

PUBLISHED = "published_as"  # in the provenance of weights that another project has trained


@dataclass(frozen=True)
class ImportOptions:
    """What a user asks of an import.

    Args:
        settings: key=value, sections `model`, `hu_contract` and `preprocess` of an export's card.
        allow: kinds of mismatch that may occur, of `FIT_KINDS`.
        inflate: how a 2D kernel is spread over depth, `mean` or `centre`.
        window: voxels (z, y, x) that the positions of the source were learned for; None reads it.
        custom_code: whether the source may name a backbone from a module outside tapct.
        what: name of the option or argument for the source, for error lines.
        remedy: text about how kinds are allowed; {kinds} stands for their list.
    """

    settings: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    inflate: str = "mean"
    window: Size3 | None = None
    custom_code: bool = False
    what: str = "weights"
    remedy: str = "pass allow='{kinds}'"

    def __post_init__(self) -> None:
        for kind in self.allow:
            if kind not in FIT_KINDS:
                raise UserError(f"allow: {kind} is none of {', '.join(FIT_KINDS)}")
        if self.inflate not in inflate.RULES:
            raise UserError(f"inflate: {self.inflate} is none of {', '.join(inflate.RULES)}")
        if self.window is not None and (len(self.window) != 3 or min(self.window) < 1):
            raise UserError(f"window: {self.window} is not three numbers of voxels, z, y, x")


@dataclass(frozen=True)
class Imported:
    """A model made of weights from anywhere.

    Args:
        model: backbone with its weights.
        settings: model section, HU contract and preprocessing.
        provenance: JSON values: where the weights come from, and what became of them.
        report: what became of each tensor.
        file: file that the weights were read from.
    """

    model: nn.Module
    settings: FeatureSettings
    provenance: Mapping[str, Any]
    report: fit.Report
    file: Path


def open_source(source: Path, options: ImportOptions) -> Imported:
    """Make a model of the weights that a source means.

    Args:
        source: path or hub id, see `sources.py`.
        options: settings and what may be changed.
    Raises:
        UserError: nothing is there, it is damaged, a setting is wrong, or something does not fit
            and is not allowed.
    """
    file = sources.locate(source, f"{options.what}: ")
    weights = sources.read(file, options.window)
    if weights.is_own:
        given, provenance = _own(file, options)
    else:
        given = _foreign(weights, options)
        provenance = {"names": weights.dialect}
        if not is_stated(weights.facts):
            provenance[PUBLISHED] = _name_of(source)
    settings: FeatureSettings = from_dict(FeatureSettings, given, str(file), options.settings)
    model: Backbone = plugins.load("models", settings.model.name).build(settings.model.config)
    settings.preprocess.cell(model.patch)
    terms = fit.Terms(options.allow, options.inflate, options.what, options.remedy)
    report, tensors = fit.fit(weights, model, terms)
    if report.names("missing"):
        model.init_weights(0)
    _fill(model, tensors, file)
    portable = model.export_config()  # weights do not depend on the attention back-end
    if portable is not None:
        section = dataclasses.replace(settings.model, config=portable)
        settings = dataclasses.replace(settings, model=section)
    changes = {
        "imported_from": _name_of(source),
        "weights_sha256": files.sha256(file),
        "fit": report.summary(),
    }
    return Imported(model, settings, {**provenance, **changes}, report, file)


def _name_of(source: Path) -> str:
    """The name of a source without the folders of this machine."""
    return str(source) if sources.is_hub_id(source) else source.resolve().name


def _own(file: Path, options: ImportOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Card and provenance of weights that tapct has written."""
    folder = file.parent
    if CheckpointFolder(folder).meta.is_file():
        complaint = damage(folder)
        if complaint is not None:
            raise UserError(f"{folder} is damaged: {complaint}")
        meta = read_meta(folder)
        config = meta.config
        preprocess = config.get("eval", {}).get("preprocess", {})
        check_backbone_name(config.get("model"), str(folder), options.custom_code)
        given = {
            "model": config["model"],
            "hu_contract": config["contract"],
            "preprocess": preprocess,
        }
        about = {"step": meta.step, "samples": meta.samples, "data": meta.data_digest}
        return given, {"run": folder.resolve().parent.parent.name, **about}
    card = read_card(folder, custom_code=options.custom_code)
    if files.sha256(file) != card.weights_sha256:
        raise UserError(
            f"{file} is damaged: its sha256 is not the one in {CARD_FILE}. Export or copy again."
        )
    return dict(to_dict(card.settings)), dict(card.provenance)


def _foreign(weights: SourceWeights, options: ImportOptions) -> dict[str, Any]:
    """A card for weights of another project, with the overrides of `model` taken into account."""
    layout = weights.layout
    if layout is None:
        raise UserError(fit.nothing_fits(weights, ("patch_embed.proj.weight",), options.what))
    given: dict[str, Any] = {
        "model": architecture.vit_sizes(weights.tensors, layout, weights.facts, weights.dialect)
    }
    if is_stated(weights.facts):
        given["model"] |= stated_model(weights.facts)
        return given | stated_preprocess(weights.facts, weights.source.parent)
    of_model = [word for word in options.settings if word.partition("=")[0].startswith("model.")]
    given["model"] |= _window_of_patch(layout, of_model)
    settings: FeatureSettings = from_dict(FeatureSettings, given, str(weights.source), of_model)
    given["preprocess"] = native_preprocess(
        settings.model.config.window, settings.model.config.patch
    )
    return given


def _window_of_patch(layout: architecture.TokenLayout, words: Sequence[str]) -> dict[str, Any]:
    """The window with as many patches as there are positions, where the user gives a patch size
    and no window; empty where not.
    """
    values = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if layout.grid is None or "model.patch" not in values or "model.window" in values:
        return {}
    try:
        patch = [int(side) for side in values["model.patch"].strip("[] ").split(",")]
    except ValueError:
        return {}  # the check of the override names the mistake
    if len(patch) != 3:
        return {}
    return {"window": [n * side for n, side in zip(layout.grid, patch, strict=True)]}


def native_preprocess(window: Size3, patch: Size3) -> dict[str, Any]:
    """Keys of `preprocess` for a backbone: windows of its native size, which overlap by about a
    half.
    """
    stride = [
        min(size, -(-size // 2 // side) * side if size >= 2 * side else size)
        for size, side in zip(window, patch, strict=True)
    ]
    return {"size_yx": list(window[1:]), "window": list(window), "stride": stride}


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Put tensors into a model.

    Raises:
        UserError: a number in them is not finite.
    """
    wanted = model.state_dict()  # its tensors share memory with the model's
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{file}: {name} has numbers that are not finite; get the file again")
        wanted[name].copy_(value.to(wanted[name].dtype))
