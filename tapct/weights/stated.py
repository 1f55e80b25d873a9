"""What a folder of `tapct export --hf` states about its model, as keys of an export's card.

config.json and preprocessor_config.json of such a folder name all that the features depend on, so
nothing has to be assumed. They have the key `tapct_version`, which folders of other projects lack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapct.base.exits import UserError, single_line
from tapct.eval.features.preprocess import RESIZES

PROCESSOR_FILE = "preprocessor_config.json"
# keys of config.json -> keys of the model section
MODEL_KEYS = {
    "image_size": "window",
    "num_attention_heads": "heads",
    "layer_norm_eps": "norm_eps",
    "positions": "positions",
    "position_resize": "pos_resize",
    "position_offset": "pos_offset",
}
ROPE_KEYS = {
    "rope_coordinates": "coordinates",
    "rope_base": "base",
    "rope_shortest": "shortest",
}
AXIS_NAMES = "zyx"
_RESIZE_OF = {"antialias": "antialias", **{mode: name for name, mode in RESIZES.items()}}


def is_stated(facts: Mapping[str, Any]) -> bool:
    """Whether a config.json is of `tapct export --hf`."""
    return "tapct_version" in facts


def stated_model(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the model section that config.json states."""
    model = {ours: facts[theirs] for theirs, ours in MODEL_KEYS.items() if theirs in facts}
    if model.get("positions", "learned") != "learned":
        model["rope"] = {ours: facts[key] for key, ours in ROPE_KEYS.items() if key in facts}
        if "rope_axes" in facts:
            model["rope"]["axes"] = "".join(AXIS_NAMES[axis] for axis in facts["rope_axes"])
    return model


def stated_preprocess(facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Sections `hu_contract` and `preprocess` that the two files state.

    Raises:
        UserError: preprocessor_config.json is missing or damaged.
    """
    path = folder / PROCESSOR_FILE
    try:
        processor = json.loads(path.read_text(encoding="utf-8"))
        low, high = processor["clip_hu"]
        contract = {
            "clip_low": low,
            "clip_high": high,
            "mean": processor["mean_hu"],
            "std": processor["std_hu"],
        }
        preprocess = {
            "size_yx": processor["size"],
            # exports before it have no such key
            "spacing_mm": processor.get("resize_spacing_mm", (0.0, 0.0, 0.0)),
            "window": facts["window_size"],
            "stride": facts["window_stride"],
            "refine": facts.get("window_refine", (1, 1, 1)),  # exports before it have no such key
            "border_weight": facts["window_border_weight"],
            "resize": _RESIZE_OF[processor["resample"]],
            "clip": "before_resize" if processor["clip_first"] else "after_resize",
            # both are the same where the window of HU begins at -1024
            "pad": "raw" if processor["pad_hu"] < low else "clipped",
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} or config.json beside it lacks what `tapct export --hf` writes "
            f"({type(error).__name__}: {single_line(error)}); export again"
        ) from error
    return {"hu_contract": contract, "preprocess": preprocess}
