"""Write the teacher as safetensors with a JSON card, for `tapct.load_pretrained`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from tapct import __version__
from tapct.base.exits import UserError
from tapct.config import plugins, to_dict
from tapct.config.plugins import Plugin
from tapct.engine.checkpoint import first_cause, sha256
from tapct.eval.features import Preprocess
from tapct.types import HUContract

FORMAT, FORMAT_VERSION = "tapct", 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
ORIENTATION = (
    "array axes (z, y, x), LPS: z towards the head, y towards the back, x towards the patient's "
    "left; "
    "int16 HU; input is (B, Z, Y, X) after clip and z-score, padding is air at the far end of "
    "each axis"
)


@dataclass(frozen=True)
class Recipe:
    """The part of `config.json` that decides the features."""

    model: Plugin = plugins.section("models", "vit", "the backbone and its sizes")
    hu_contract: HUContract = dataclasses.field(
        default_factory=HUContract, metadata={"doc": "HU to network input"}
    )
    preprocess: Preprocess = dataclasses.field(
        default_factory=Preprocess,
        metadata={"doc": "how a whole scan is brought before the backbone"},
    )


def save_export(
    out: Path,
    model: nn.Module,
    model_section: Plugin,
    contract: HUContract,
    preprocess: Preprocess,
    provenance: Mapping[str, Any],
) -> None:
    """Write an export folder; a folder of that name is replaced in one step once the new one is
    complete.

    Args:
        model: the teacher's backbone.
        model_section: what it was built from.
        provenance: JSON values, e.g. run name, step, manifest digest; versions of tapct and torch
            are added.
    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    aside, old = (out.with_name(f".{out.name}.{what}.{os.getpid()}") for what in ("new", "old"))
    try:
        aside.mkdir(parents=True)
        state = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in model.state_dict().items()
        }
        save_file(state, aside / WEIGHTS_FILE, metadata={"format": "pt"})
        card = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **to_dict(Recipe(model_section, contract, preprocess)),
            "orientation": ORIENTATION,
            "provenance": {**provenance, "tapct": __version__, "torch": torch.__version__},
            "weights": {"file": WEIGHTS_FILE, "sha256": sha256(aside / WEIGHTS_FILE)},
        }
        (aside / CONFIG_FILE).write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")
        if out.exists():
            out.replace(old)
        aside.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the export {out}: {first_cause(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
