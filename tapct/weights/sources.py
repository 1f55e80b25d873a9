"""Where weights come from: find the file that a user means, and read the backbone in it.

| SOURCE | file |
|---|---|
| run folder | teacher.safetensors of its newest whole checkpoint, else of its export |
| checkpoint folder, or the folder of the best step in RUN/eval | teacher.safetensors |
| folder of `tapct export` | model.safetensors |
| folder in Hugging Face's layout | model.safetensors, its shards, or pytorch_model.bin |
| OWNER/NAME, OWNER/NAME@REVISION | that folder in the local cache of huggingface_hub |
| .safetensors, .pth, .pt or .bin file | the file |

Nothing is unpickled except by torch.load with `weights_only=True`, which builds tensors alone.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tapct.base.exits import UserError, single_line
from tapct.base.extras import installing
from tapct.base.geometry import Grid, Size3, patch_grid
from tapct.base.paths import near_path
from tapct.engine.checkpoint import Checkpoints, read_meta
from tapct.run_folder import CheckpointFolder, ExportFolder, RunFolder, has_step_name
from tapct.weights.architecture import TokenLayout, layout_of, stated_heads, with_cls_row
from tapct.weights.card import FORMAT
from tapct.weights.names import backbone_of, flatten

SAFETENSORS = ".safetensors"
PICKLES = (".pth", ".pt", ".bin")
INDEX = ".index.json"  # end of the name of a list of shards
FOLDER_FILES = (
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
KINDS_OF_SOURCE = (
    "a run folder, a checkpoint, an export, a Hugging Face folder or id, or a .safetensors, .pth, "
    ".pt or .bin file"
)


@dataclass(frozen=True)
class SourceWeights:
    """A backbone's tensors, read from disk, under DINOv2's names.

    Args:
        tensors: by parameter name.
        source: file that they come from.
        grid: patches (z, y, x) that its positions are learned for; None where unknown.
        layout: patches and channels; None without a patch embedding that is known.
        dialect: title of the names that the file has.
        set_aside: number of tensors outside of the backbone, by the beginning of their names.
        facts: config.json beside the file; empty for tapct's own weights, and without one.
        heads: attention heads, where a file beside it states them; None where not.
        is_own: whether tapct wrote the file, with a card or a config beside it.
    """

    tensors: Mapping[str, Tensor]
    source: Path
    grid: Grid | None = None
    layout: TokenLayout | None = None
    dialect: str = "DINOv2"
    set_aside: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    heads: int | None = None
    is_own: bool = False


def is_hub_id(source: Path) -> bool:
    """Whether a source has the form OWNER/NAME of Hugging Face, and is no path that exists."""
    return HUB_ID.fullmatch(str(source)) is not None and not source.exists()


def locate(source: Path, what: str = "train.init=") -> Path:
    """The file with the weights that a source means.

    One rank locates it for all: a run that is training adds checkpoints meanwhile.

    Args:
        source: path or hub id, see the table above.
        what: setting or option that the source is the value of, for error lines.
    Raises:
        UserError: nothing of that kind is there.
    """
    if has_step_name(source) and CheckpointFolder(source).teacher.is_file():
        return CheckpointFolder(source).teacher
    run = RunFolder(source)
    if run.checkpoints.path.is_dir():
        newest, _ = Checkpoints(run.checkpoints.path, keep=1).newest_whole()
        if newest is None:
            raise UserError(f"{what}{source}: that run holds no whole checkpoint yet")
        return CheckpointFolder(newest).teacher
    found = _file_in(source)
    if found is not None:
        return found
    if run.export.weights.is_file():
        return run.export.weights
    if source.is_file() and source.name.endswith((SAFETENSORS, *PICKLES, INDEX)):
        return source
    if is_hub_id(source):
        return _in_hub_cache(source, what)
    raise UserError(f"{what}{source}: give {KINDS_OF_SOURCE}")


def _file_in(folder: Path) -> Path | None:
    """The file with the weights in an export or a folder in Hugging Face's layout."""
    for name in (ExportFolder(folder).weights.name, *FOLDER_FILES):
        if (folder / name).is_file():
            return folder / name
    return None


def holds_weights(folder: Path) -> bool:
    """Whether a path is a folder with weights: an export, a checkpoint, or of another project."""
    return _file_in(folder) is not None or CheckpointFolder(folder).teacher.is_file()


def _in_hub_cache(source: Path, what: str) -> Path:
    """The file of a model in the local cache of huggingface_hub; nothing is downloaded."""
    name, _, revision = str(source).partition("@")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"{what}{source} does not exist as a path, and for a Hugging Face id the package "
            "huggingface_hub is not installed; give a path, or install it: "
            + installing("hub", "huggingface_hub")
        ) from error
    try:
        folder = snapshot_download(name, revision=revision or None, local_files_only=True)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{what}{source} does not exist as a path{near_path(source)}, and the local cache of "
            "Hugging Face has no model of this name; fetch it with "
            f"`hf download {name}{at}`, or give a path"
        ) from error
    found = _file_in(Path(folder))
    if found is None:
        raise UserError(
            f"{what}{source}: the local cache has no weights of this model, only other files; "
            f"fetch them with `hf download {name}`"
        )
    return found


def read(file: Path, window: Size3 | None = None) -> SourceWeights:
    """Read a backbone's weights.

    Args:
        file: path from `locate`; a JSON file beside it holds the grid of its positions.
        window: voxels that its positions are learned for; None takes them from the JSON file or
            the number of positions.
    Raises:
        UserError: it is damaged, holds no backbone, or does not have positions for this window.
    """
    if CheckpointFolder(file.parent).meta.is_file():
        return _own(file, read_meta(file.parent).config.get("model", {}))
    facts = _facts(file.parent)
    if facts.get("format") == FORMAT:
        return _own(file, facts.get("model", {}))
    named = backbone_of(_tensors(file), str(file))
    layout = layout_of(named.tensors, facts, window, str(file))
    tensors = named.tensors
    grid = None if layout is None else layout.grid
    if grid is not None:
        tensors = with_cls_row(tensors, grid)
    return SourceWeights(
        tensors, file, grid, layout, named.dialect, named.set_aside, facts, stated_heads(facts)
    )


def _own(file: Path, model: Mapping[str, object]) -> SourceWeights:
    """Weights of tapct, with the grid and the heads of their model section."""
    section = model.get("config", model)
    if not isinstance(section, Mapping):
        section = {}
    grid = None
    if "window" in section and "patch" in section:
        grid = patch_grid(section["window"], section["patch"], "model.window")
    heads = section.get("heads")
    return SourceWeights(
        _tensors(file), file, grid, heads=heads if isinstance(heads, int) else None, is_own=True
    )


def _facts(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; empty where it has none.

    Raises:
        UserError: it is not JSON.
    """
    path = ExportFolder(folder).card
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {single_line(error)}") from error
    return facts if isinstance(facts, dict) else {}


def _tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the shards in a list, by dotted name."""
    if file.name.endswith(INDEX):
        return _shards(file)
    if file.suffix == SAFETENSORS:
        try:
            return flatten(load_file(file))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file} cannot be read as safetensors: {single_line(error)}"
            ) from error
    try:
        tree = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds Python objects beside its tensors, which could run code when they are "
            "read; save its tensors alone, best as a .safetensors file"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} cannot be read by torch.load ({type(error).__name__}: "
            f"{single_line(error, 200)}): torch.save has not written it, or it is damaged; get the "
            "file again"
        ) from error
    tensors = flatten(tree)
    if not tensors:
        raise UserError(f"{file} holds no tensor; give a file with weights")
    return tensors


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that a list names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no list of shards: {single_line(error)}") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names the shard {name}, which lies outside of its folder")
        tensors |= _tensors(index.parent / name)
    return tensors
