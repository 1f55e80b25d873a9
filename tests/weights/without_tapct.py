"""Program that loads exports in an environment without tapct; not a test by itself.

    python without_tapct.py FOLDER        prints one JSON object

FOLDER holds one folder NAME per network, NAME.npz with inputs and what tapct computes of them, and
five_lines.py.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor


def difference(one: torch.Tensor, other: np.ndarray) -> float:
    assert tuple(one.shape) == other.shape, (one.shape, other.shape)
    return float(np.abs(one.numpy() - other).max())


def compare(folder: Path, want: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest differences by kind of input."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    found = {}
    for name in [key.removesuffix("/crops") for key in want if key.endswith("/crops")]:
        crops = torch.from_numpy(want[f"{name}/crops"])[:, None]
        spacing_mm = torch.from_numpy(want[f"{name}/spacing_mm"])
        with torch.no_grad():
            output = model(crops, spacing_mm, output_hidden_states=True)
        worst = difference(output.pooler_output, want[f"{name}/cls"])
        last = len(output.hidden_states) - 1
        for block, tokens in enumerate(output.hidden_states):
            worst = max(worst, difference(tokens, want[f"{name}/block{block}"]))
        worst = max(worst, difference(output.last_hidden_state, want[f"{name}/block{last}"]))
        found[name] = worst
    inputs = processor(want["hu"], spacing_mm=want["hu_spacing_mm"].tolist())
    scan = model.embed(**inputs)
    found["embed"] = max(
        difference(scan.feature_map[0], want["features"]),
        difference(scan.pooler_output[0], want["cls"]),
    )
    return found


def refused(folder: Path) -> str:
    """The error for weights of which one is missing."""
    state = load_file(folder / "model.safetensors")
    del state["model.blocks.1.mlp.fc1.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    assert importlib.util.find_spec("tapct") is None, "tapct can be imported here"
    assert importlib.util.find_spec("torchvision") is None
    transformers.logging.disable_progress_bar()
    found = {"transformers": transformers.__version__, "torch": torch.__version__}
    for file in sorted(folder.glob("*.npz")):
        found[file.stem] = compare(folder / file.stem, dict(np.load(file)))
    names: dict[str, object] = {}
    before = time.perf_counter()
    exec((folder / "five_lines.py").read_text(), names)
    found["five_lines_s"] = time.perf_counter() - before
    want = np.load(folder / "learned.npz")
    found["five_lines"] = difference(names["features"].feature_map[0], want["features"])
    found["max_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["missing"] = refused(folder / "broken")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
