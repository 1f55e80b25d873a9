"""Write a folder that Hugging Face transformers loads without tapct.

    model.safetensors            the teacher's backbone, DINOv2's names after the prefix `model.`
    config.json                  sizes of the network, and which class of which file loads it
    preprocessor_config.json     HU window, normalisation, in-plane size
    modeling_tapct.py            the network and its config
    image_processing_tapct.py    from HU to the input of the network
    README.md                    model card
    metadata.json                versions, inputs and outputs, as in a MONAI bundle

The two Python files lie in this folder. They import torch and transformers only, and tapct never
imports them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from tapct import __version__
from tapct.base import files
from tapct.base.exits import UserError
from tapct.eval.features.extraction import patch_of
from tapct.eval.features.preprocess import RESIZES
from tapct.nn.contracts import Backbone
from tapct.types import AIR_HU
from tapct.weights.card import CARD_FILE, WEIGHTS_FILE, FeatureSettings
from tapct.weights.huggingface.model_card import ModelFacts, metadata_json, model_card

PREFIX = "model."  # of the names of weights, as in the published TAP-CT models
CONFIG_FILE = CARD_FILE
PROCESSOR_FILE = "preprocessor_config.json"
CODE_FILES = ("modeling_tapct.py", "image_processing_tapct.py")
_PROCESSOR_CLASS = "image_processing_tapct.TAPCTImageProcessor"


def save_folder(out: Path, model: nn.Module, settings: FeatureSettings, facts: ModelFacts) -> None:
    """Write the folder whole or not at all; an older export of that name is replaced.

    Args:
        out: folder to write.
        model: backbone of the teacher.
        settings: section that the backbone was built from, HU contract and preprocessing.
        facts: facts for the model card.
    Raises:
        UserError: the backbone is not one that the modeling file computes, `out` is a folder of
            other files, the disk is full or the folder cannot be written.
    """
    config = config_json(model, settings)
    check_target(out)
    state = {
        PREFIX + name: tensor.detach().to("cpu", torch.float32).contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    try:
        with files.replacing_folder(out) as folder:
            save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            _write_json(folder / CONFIG_FILE, config)
            _write_json(folder / PROCESSOR_FILE, processor_json(model, settings))
            for name in CODE_FILES:
                code = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
                files.write_atomically(folder / name, code)
            digest = files.sha256(folder / WEIGHTS_FILE)
            _write_json(folder / "metadata.json", metadata_json(config, settings, facts, digest))
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            card = model_card(config, num_parameters, settings, facts)
            files.write_atomically(folder / "README.md", card)
            folder.chmod(0o755)
            for file in folder.iterdir():
                file.chmod(files.SHARED)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the export {out}: {files.first_cause(error)}") from error


def check_target(out: Path) -> None:
    """Refuse to replace a folder that is not an earlier export of this kind.

    Raises:
        UserError: `out` is a file, or a folder with other content.
    """
    is_export = all((out / name).is_file() for name in (CONFIG_FILE, *CODE_FILES))
    if out.exists() and not is_export and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--hf {out} exists and is no export for transformers; give a new folder")


def config_json(model: nn.Module, settings: FeatureSettings) -> dict[str, Any]:
    """The content of config.json: arguments of `TAPCTConfig`.

    Raises:
        UserError: the modeling file cannot compute this backbone.
    """
    sizes = model.transformers_config() if isinstance(model, Backbone) else None
    if sizes is None:
        raise UserError(
            f"the backbone {settings.model.name} cannot be exported for transformers: it has no "
            "transformers_config; export without --hf"
        )
    preprocess, contract = settings.preprocess, settings.hu_contract
    return {
        "architectures": ["TAPCTModel"],
        "model_type": "tapct",
        "auto_map": {
            "AutoConfig": "modeling_tapct.TAPCTConfig",
            "AutoModel": "modeling_tapct.TAPCTModel",
        },
        **sizes,
        "window_size": list(preprocess.window),
        "window_stride": list(preprocess.stride),
        "window_refine": list(preprocess.refine),
        "window_border_weight": preprocess.border_weight,
        "pad_value": (pad_hu(settings) - contract.mean) / contract.std,
        "torch_dtype": "float32",
        "tapct_version": __version__,
    }


def processor_json(model: nn.Module, settings: FeatureSettings) -> dict[str, Any]:
    """The content of preprocessor_config.json: arguments of `TAPCTImageProcessor`."""
    contract, preprocess = settings.hu_contract, settings.preprocess
    return {
        "image_processor_type": "TAPCTImageProcessor",
        # AutoImageProcessor of newer versions of transformers needs Pillow, AutoProcessor does not
        "auto_map": {"AutoImageProcessor": _PROCESSOR_CLASS, "AutoProcessor": _PROCESSOR_CLASS},
        "clip_hu": [contract.clip_low, contract.clip_high],
        "mean_hu": contract.mean,
        "std_hu": contract.std,
        "size": list(preprocess.size_yx),
        "resize_spacing_mm": list(preprocess.spacing_mm),
        "patch_size": list(patch_of(model)),
        "resample": RESIZES.get(preprocess.resize, preprocess.resize),
        "clip_first": preprocess.clip == "before_resize",
        "pad_hu": pad_hu(settings),
    }


def pad_hu(settings: FeatureSettings) -> float:
    """HU behind the end of a scan."""
    contract = settings.hu_contract
    if settings.preprocess.pad == "raw":
        return float(AIR_HU)
    return min(max(float(AIR_HU), contract.clip_low), contract.clip_high)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    files.write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
