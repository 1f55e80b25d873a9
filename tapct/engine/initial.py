"""Start from weights that exist already: a run, a checkpoint, an export, or a safetensors file of a
backbone.

What was loaded, missing, resized and unexpected is a table that people see; anything but `loaded`
must be allowed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tapct.base.exits import SharedError, UserError
from tapct.base.geometry import Grid, patch_grid
from tapct.distributed.collectives import local_part, part_of_full
from tapct.engine.checkpoint import Checkpoints, read_meta
from tapct.nn.contracts import Backbone
from tapct.nn.posembed import resize_positions
from tapct.run_folder import CheckpointFolder, ExportFolder, RunFolder, has_step_name
from tapct.ssl.student_teacher import StudentTeacher

KINDS = ("missing", "resized", "unexpected")
MOST_NAMES = 4  # of parameters that one line lists


@dataclass(frozen=True)
class SourceWeights:
    """A backbone's tensors, read from disk.

    Args:
        tensors: by parameter name.
        grid: patches (z, y, x) that its positions are learned for; None where unknown.
        source: file that they come from.
    """

    tensors: Mapping[str, Tensor]
    grid: Grid | None
    source: Path


@dataclass(frozen=True)
class Report:
    """What became of each parameter: names by kind."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    resized: tuple[str, ...]
    unexpected: tuple[str, ...]
    source: Path

    def lines(self) -> list[str]:
        """One line per kind that occurs: its count and some of the names."""
        lines = [f"starting from {self.source}: {len(self.loaded)} parameters loaded"]
        for kind in KINDS:
            names = getattr(self, kind)
            if names:
                lines.append(
                    f"  {kind:<10} {len(names)}: "
                    f"{', '.join(names[:MOST_NAMES])}{', ...' if len(names) > MOST_NAMES else ''}"
                )
        return lines


def locate(path: Path) -> Path:
    """The file with the weights that a path means.

    One rank locates it for all: a run that is training adds checkpoints meanwhile.

    Args:
        path: run folder (newest whole checkpoint), checkpoint folder, export folder, or a
            safetensors file.
    Raises:
        UserError: nothing of that kind is there.
    """
    if has_step_name(path) and CheckpointFolder(path).teacher.is_file():
        return CheckpointFolder(path).teacher
    run = RunFolder(path)
    if run.checkpoints.path.is_dir():
        newest, _ = Checkpoints(run.checkpoints.path, keep=1).newest_whole()
        if newest is None:
            raise UserError(f"train.init={path}: that run holds no whole checkpoint yet")
        return CheckpointFolder(newest).teacher
    for export in (ExportFolder(path), run.export):
        if export.weights.is_file():
            return export.weights
    if path.suffix == ".safetensors" and path.is_file():
        return path
    raise UserError(
        f"train.init={path}: give a run folder, a checkpoint, an export or a .safetensors file"
    )


def read(file: Path) -> SourceWeights:
    """Read a backbone's weights.

    Args:
        file: path from `locate`; a JSON file beside it holds the grid of its positions.
    Raises:
        UserError: it is damaged.
    """
    if CheckpointFolder(file.parent).meta.is_file():
        return _read_file(file, _grid(read_meta(file.parent).config.get("model", {})))
    card_file = ExportFolder(file.parent).card
    if card_file.is_file():
        card = json.loads(card_file.read_text())
        return _read_file(file, _grid(card.get("model", {})))
    return _read_file(file, None)


def _grid(model: Mapping[str, object]) -> Grid | None:
    """Patches of a backbone's window, from its section of a config."""
    section = model.get("config", model)
    if not isinstance(section, Mapping) or "window" not in section or "patch" not in section:
        return None
    return patch_grid(section["window"], section["patch"], "model.window")


def _read_file(file: Path, grid: Grid | None) -> SourceWeights:
    """The tensors of one safetensors file."""
    try:
        return SourceWeights(load_file(file), grid, file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"train.init: {file} cannot be read as safetensors: {error}") from error


@torch.no_grad()
def apply(weights: SourceWeights, pair: StudentTeacher, allow: tuple[str, ...]) -> Report:
    """Put weights into the backbone of student and teacher, sharded or whole; heads keep their
    first values.

    Positions of another grid are resized like those of a crop of that size; no other shape may
    differ.

    Args:
        weights: read from disk, on every rank.
        pair: gets them.
        allow: kinds that may occur: `missing`, `resized`, `unexpected`.
    Raises:
        UserError: no parameter is there, a kind occurs that is not allowed, or a shape cannot be
            brought to fit; nothing was changed.
    """
    wanted = dict(pair.student.backbone.named_parameters())
    report, full = compare(weights, pair.student.backbone, allow)
    teacher = dict(pair.teacher.backbone.named_parameters())
    for name, value in full.items():
        for parameter in (wanted[name], teacher[name]):
            local_part(parameter).copy_(part_of_full(value.to(parameter.dtype), parameter))
    return report


@torch.no_grad()
def compare(
    weights: SourceWeights, backbone: Backbone, allow: tuple[str, ...]
) -> tuple[Report, dict[str, Tensor]]:
    """What would become of each parameter, and the tensors in the shapes of the backbone.

    Args:
        weights: read from disk.
        backbone: gives names and shapes; it may have no values.
        allow: kinds that may occur, as in `apply`.
    Raises:
        UserError: as in `apply`.
    """
    wanted = dict(backbone.named_parameters())
    full, resized, unfit = {}, [], []
    for name in wanted.keys() & weights.tensors.keys():
        value, shape = weights.tensors[name], tuple(wanted[name].shape)
        if tuple(value.shape) != shape and name == "pos_embed" and weights.grid is not None:
            grid = backbone.position_grid
            value = value if grid is None else _resize(value, weights.grid, grid)
            resized.append(name)
        if tuple(value.shape) != shape:
            unfit.append(f"{name} is {tuple(value.shape)} there and {shape} here")
        full[name] = value
    if unfit:
        raise SharedError(
            f"train.init: {weights.source} does not fit this model: {sorted(unfit)[0]}"
        )
    if not full:
        raise SharedError(nothing_fits(weights, wanted))
    report = Report(
        loaded=tuple(sorted(full.keys() - set(resized))),
        missing=tuple(sorted(wanted.keys() - full.keys())),
        resized=tuple(resized),
        unexpected=tuple(sorted(weights.tensors.keys() - wanted.keys())),
        source=weights.source,
    )
    for kind in KINDS:
        names = getattr(report, kind)
        if names and kind not in allow:
            raise SharedError(
                f"train.init: {len(names)} parameters of {weights.source} are {kind}, e.g. "
                f"{names[0]}; if that is intended, set "
                f"train.init_allow=[{','.join([*allow, kind])}]"
            )
    return report, full


def nothing_fits(weights: SourceWeights, wanted: Collection[str]) -> str:
    """The line about a file that has no parameter of the model, with the first names on both sides.

    Args:
        weights: content of the file.
        wanted: names of the model's parameters.
    """

    def first(names: Collection[str]) -> str:
        some = sorted(names)[:MOST_NAMES]
        return ", ".join(some) + (", ..." if len(names) > len(some) else "") if some else "nothing"

    return (
        f"train.init: none of the {len(weights.tensors)} tensors of {weights.source} has the name "
        f"of a parameter of this model; the file has {first(weights.tensors)}; the model has "
        f"{first(wanted)}. Rename the tensors, or give other weights"
    )


def _resize(pos_1ND: Tensor, native: Grid, grid: Grid) -> Tensor:
    """Positions for another grid; the class token's own stays."""
    patches_ND = resize_positions(pos_1ND[0, 1:], native, grid)
    return torch.cat([pos_1ND[:, :1].to(patches_ND.dtype), patches_ND[None]], dim=1)
