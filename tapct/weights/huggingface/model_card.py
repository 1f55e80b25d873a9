"""The model card of an export, README.md, and its metadata.json: made from facts about the run and
from the export itself.

Where a fact is missing, the card reads "not recorded"; nothing is filled in by hand.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from tapct import __version__
from tapct.base.counted import counted
from tapct.base.geometry import times
from tapct.data.packed.trained_on import TrainedOn
from tapct.eval.results.json_file import Evaluation
from tapct.eval.results.task_section import TaskSection
from tapct.eval.results.terminal import between, numbers_of, p_text, shown, title_of, with_sign
from tapct.eval.scores import OWN_MODEL
from tapct.types import HUContract
from tapct.weights.card import FeatureSettings

CITATION = """@article{veenboer2025tapct,
  title   = {{TAP-CT}: {3D} Task-Agnostic Pretraining of Computed Tomography Foundation Models},
  author  = {Veenboer, Tim and Yiasemis, George and Marcus, Eric and Van Veldhuizen, Vivien and
             Snoek, Cees G. M. and Teuwen, Jonas and Groot Lipman, Kevin B. W.},
  journal = {arXiv preprint arXiv:2512.00872},
  year    = {2025}
}"""
# The five lines that docs/export.md shows too; a test runs them without tapct.
USE = """import numpy as np
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)
features = model.embed(**processor(np.load("scan.npy")))"""
READ = """import nibabel as nib
import numpy as np

scan = nib.as_closest_canonical(nib.load("scan.nii.gz"))  # axes (x, y, z) in RAS
hu = scan.get_fdata(dtype=np.float32)[::-1, ::-1].transpose(2, 1, 0)  # (z, y, x) in LPS
np.save("scan.npy", hu)"""
_INTENDED = (
    "Research: features of CT scans for segmentation, classification, retrieval, registration and "
    "the pretraining of other networks. It is not a medical device, and it is not for decisions "
    "about patients."
)
_LIMITS = """\
- The features of scans that differ from the training data (body part, scanner, contrast agent,
  spacing, age) can be worse. Evaluate the model on your own data before you rely on it.
- The input must be HU in the orientation above. The model does not notice a scan that is upside
  down or mirrored, or whose values are not HU.
- The numbers above belong to the data sets that they were measured on. A value without an interval
  comes from few patients.
- The weights can reflect biases of the training data, which were not analysed.
- The features were compared with those of tapct in float32. Other precisions were not tested."""


@dataclass(frozen=True)
class ModelFacts:
    """What a model card states about a run.

    Args:
        name: name of the model.
        step: finished steps; None where unknown.
        samples: scans drawn in training, repetitions included; None where unknown.
        trained_on: scans of pretraining; incomplete where they are unknown.
        data: what is known about the training data, as rows of name and value.
        recipe: settings of the training, as rows of name and value.
        evaluations: name of a data set and the results of exactly these weights on it.
        licence: SPDX identifier of the licence of the weights; empty where it was not stated.
        git_revision: revision of tapct that trained the model; empty where unknown.
    """

    name: str
    step: int | None = None
    samples: int | None = None
    trained_on: TrainedOn = TrainedOn(unknown=("the scans of pretraining were not recorded",))
    data: tuple[tuple[str, str], ...] = ()
    recipe: tuple[tuple[str, str], ...] = ()
    evaluations: tuple[tuple[str, Evaluation], ...] = ()
    licence: str = ""
    git_revision: str = ""


def model_card(
    config: Mapping[str, Any], num_parameters: int, settings: FeatureSettings, facts: ModelFacts
) -> str:
    """README.md of the folder.

    Args:
        config: content of config.json.
        num_parameters: parameters of the network.
        settings: HU contract and preprocessing.
        facts: facts about the run.
    """
    window, patch = times(config["window_size"]), times(config["patch_size"])
    refine, cells = config["window_refine"], ""
    if max(refine) > 1:
        cell = times([side // n for side, n in zip(config["patch_size"], refine, strict=True)])
        cells = (
            f" Each patch is divided into {times(refine)} cells of {cell} voxels, and the grid is "
            "that of the cells."
        )
    parts = [
        _front_matter(facts),
        f"# {facts.name}",
        "A vision transformer for 3D computed tomography, pretrained without labels by a volumetric"
        " DINOv2 (the method of [TAP-CT](https://arxiv.org/abs/2512.00872)) with "
        f"tapct {__version__}. It turns a scan into one feature vector per patch of "
        f"{patch} voxels (depth × height × width) and one vector for the scan.",
        _table(
            ("network", "value"),
            [
                ("parameters", f"{num_parameters:,}"),
                ("blocks, channels, heads", _sizes(config)),
                ("patch, window (voxels)", f"{patch}, {window}"),
                ("registers", str(config["num_register_tokens"])),
                ("positions", str(config["positions"])),
            ],
        ),
        "## Use",
        "You need `torch` and `transformers` (4.49 or newer). `trust_remote_code=True` runs the two"
        " Python files of this folder; read them first.",
        _code(USE),
        "`features.feature_map` is (1, channels, depth, height, width) on the grid of patches, and "
        f"`features.pooler_output` the mean CLS token.{cells} `embed` slides the window over the "
        "scan, as the evaluation below does.",
        "`model(**processor(hu))` computes the whole scan in one pass: `last_hidden_state` holds "
        "its patch tokens in row-major order along depth, height and width, `pooler_output` the "
        "CLS token, and with `output_hidden_states=True` `hidden_states` the patch tokens of every "
        "block.",
        "## Input",
        "\n".join(_input_lines(config, settings)),
        "With nibabel, which needs `pip install nibabel`:",
        _code(READ),
        "## Training data",
        _data_text(facts),
        "## Training",
        _table(("setting", "value"), facts.recipe) if facts.recipe else "Not recorded.",
        "## Results",
        _results_text(facts),
        "## Intended use and limits",
        _INTENDED,
        _LIMITS,
        "## Licence",
        _licence_text(facts),
        "## Citation",
        "Please cite the method:",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def metadata_json(
    config: Mapping[str, Any], settings: FeatureSettings, facts: ModelFacts, sha256: str
) -> dict[str, Any]:
    """metadata.json with the keys of a MONAI bundle.

    Args:
        config: content of config.json.
        settings: HU contract and preprocessing.
        facts: facts about the run.
        sha256: hash of the file with the weights.
    """
    contract = settings.hu_contract
    shape = [f"{side}*n" for side in config["patch_size"]]
    lowest, highest = (
        float(contract.normalise(torch.tensor(hu)))
        for hu in (contract.clip_low, contract.clip_high)
    )
    channels = config["hidden_size"]
    return {
        "version": __version__,
        "name": facts.name,
        "task": "self-supervised features of CT scans",
        "description": "Vision transformer for 3D CT, pretrained without labels by tapct",
        "pytorch_version": torch.__version__,
        "numpy_version": metadata.version("numpy"),
        "required_packages_version": {"transformers": ">=4.49"},
        "tapct_version": __version__,
        "python_version": platform.python_version(),
        "git_revision": facts.git_revision,
        "weights_sha256": sha256,
        "training": {"step": facts.step, "samples": facts.samples, **dict(facts.recipe)},
        "data_source": dict(facts.data),
        "data_type": "CT in Hounsfield units",
        "eval_metrics": _metrics_json(facts),
        "intended_use": _INTENDED,
        "licence": facts.licence or "not stated",
        "references": ["arXiv:2512.00872", "arXiv:2304.07193"],
        "network_data_format": {
            "inputs": {
                "pixel_values": {
                    "type": "image",
                    "format": "hounsfield",
                    "modality": "CT",
                    "num_channels": config["num_channels"],
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [lowest, highest],
                    "is_patch_data": False,
                    "channel_def": {"0": "HU after clip and z-score"},
                    "orientation": "LPS, axes (z, y, x)",
                }
            },
            "outputs": {
                "last_hidden_state": {
                    "type": "feature",
                    "format": "patch tokens, (batch, patches, channels), row-major (z, y, x)",
                    "num_channels": channels,
                    "spatial_shape": ["n", "n", "n"],
                    "dtype": "float32",
                },
                "pooler_output": {
                    "type": "feature",
                    "format": "CLS token, (batch, channels)",
                    "num_channels": channels,
                    "spatial_shape": [],
                    "dtype": "float32",
                },
            },
        },
    }


def _front_matter(facts: ModelFacts) -> str:
    """The header that the hub reads."""
    lines = ["---", f"license: {facts.licence or 'other'}"]
    if not facts.licence:
        lines.append("license_name: not-stated")
    tags = ("ct", "medical-imaging", "3d", "vision-transformer", "self-supervised", "dinov2")
    lines += ["library_name: transformers", "pipeline_tag: image-feature-extraction", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _sizes(config: Mapping[str, Any]) -> str:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    return ", ".join(str(config[name]) for name in names)


def _input_lines(config: Mapping[str, Any], settings: FeatureSettings) -> list[str]:
    """How a scan must look, and what the processor does with it."""
    contract: HUContract = settings.hu_contract
    size_y, size_x = settings.preprocess.size_yx
    size = f"{size_y}×{size_x} voxels" if size_y and size_x else "not resized where the size is 0"
    lines = [
        "- One scan in Hounsfield units, as an array (depth, height, width): axial slices in LPS "
        "order. The first slice is the one nearest the feet, the first row the front of the "
        "patient, the first column the patient's right.",
        f"- The processor clips to [{contract.clip_low:g}, {contract.clip_high:g}] HU "
        f"({settings.preprocess.clip.replace('_', ' ')}), resizes every slice ({size}, "
        f"{settings.preprocess.resize}), subtracts {contract.mean:g} HU, divides by "
        f"{contract.std:g} HU and pads with air to multiples of the patch. The depth is not "
        "resampled.",
    ]
    if settings.preprocess.needs_spacing:
        wanted = " × ".join(f"{mm:g}" if mm else "own" for mm in settings.preprocess.spacing_mm)
        lines.append(
            "- The processor resizes the scan to a spacing (depth × height × width) of "
            f"{wanted} mm, in place of the size: give it `spacing_mm`, the voxel spacing of the "
            "scan along these axes."
        )
    if config["positions"] != "learned" and config["rope_coordinates"] == "mm":
        lines.append(
            "- This model works in mm: give the processor `spacing_mm`, the voxel spacing along "
            "(depth, height, width)."
        )
    return lines


def _data_text(facts: ModelFacts) -> str:
    """How many scans and patients, and what is known about them."""
    scans = facts.trained_on.from_step
    known = {(scan.patient_key, scan.patient) for scan in scans if scan.patient}
    unknown = sum(not scan.patient for scan in scans)
    rows = []
    if scans:
        rows.append(("scans", f"{len(scans):,}"))
        rows.append(("patients", f"{len(known):,}"))
        if unknown:
            rows.append(("scans of unknown patient", f"{unknown:,}"))
    rows += facts.data
    parts = [_table(("training data", "value"), rows)] if rows else []
    parts += [f"This is incomplete: {reason}." for reason in facts.trained_on.unknown]
    return "\n\n".join(parts) or "Not recorded."


def _results_text(facts: ModelFacts) -> str:
    """All evaluations of these weights, or that there are none."""
    if not facts.evaluations:
        return "These weights have not been evaluated."
    parts = [
        f"`{OWN_MODEL}` is this model; the other rows are baselines. Intervals are 95 % intervals "
        "over patients."
    ]
    for dataset, evaluation in facts.evaluations:
        for name, section in evaluation.tasks.items():
            parts.append(f"### {title_of(name)}, {dataset}")
            parts.append(_task_text(section))
        if evaluation.split.caveat:
            parts.append(f"Caveat: {evaluation.split.caveat}")
    return "\n\n".join(parts)


def _task_text(section: TaskSection) -> str:
    """One task as a table, with what its number means."""
    headline, statistics = section.headline, section.statistics
    found = statistics.of(headline.metric) if statistics is not None else None
    scans = f"n = {counted(section.num_test, 'scan')}"
    rows = [(model, shown(value), "", scans) for model, value in headline.values.items()]
    notes = [f"{headline.meaning.rstrip('.')} ({headline.direction} is better)."]
    if headline.mean_of:
        notes.append(f"{headline.mean_of[:1].upper()}{headline.mean_of[1:].rstrip('.')}.")
    if found is None:
        if statistics is not None and statistics.why_none:
            notes.append(f"No interval: {statistics.why_none}.")
    else:
        rows = []
        for one in found.whole.models:
            estimate = one.estimate
            interval = between(estimate.interval) or "none"
            rows.append((one.model, shown(estimate.value), interval, numbers_of(estimate)))
        reasons = sorted({one.estimate.why_none for one in found.whole.models} - {""})
        notes += [f"No interval: {reason}." for reason in reasons]
        for pair in found.whole.differences:
            if pair.estimate.interval is None:
                continue
            line = f"{pair.reference} minus {pair.other}: {with_sign(pair.estimate.value)} "
            line += between(pair.estimate.interval, sign=True)
            line += f", p = {p_text(pair.p)}" if math.isfinite(pair.p) else ""
            notes.append(f"{line}.")
    table = _table(("model", headline.metric, "95 % interval", "n"), rows)
    return table + "\n\n" + "\n".join(notes)


def _metrics_json(facts: ModelFacts) -> dict[str, Any]:
    """Headline of this model by data set and task."""
    found: dict[str, Any] = {}
    for dataset, evaluation in facts.evaluations:
        tasks = found.setdefault(dataset, {})
        for name, section in evaluation.tasks.items():
            value = section.headline.values.get(OWN_MODEL, math.nan)
            tasks[name] = {
                "metric": section.headline.metric,
                "value": value if math.isfinite(value) else None,
                "num_test": section.num_test,
            }
    return found


def _licence_text(facts: ModelFacts) -> str:
    code = "The two Python files of this folder are part of tapct, under Apache-2.0."
    if facts.licence:
        return f"Weights: {facts.licence}. {code}"
    return (
        "The licence of the weights was not stated. Ask the people who gave you this folder before "
        f"you use or share them. {code}"
    )


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in lines
    )
