"""Exports are loaded in environments with torch and one version of transformers each, without
tapct. pip installs transformers from PyPI.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch_environment import TorchEnvironment
from transformers_cases import CONFIGS, SHAPES, SPACING_MM, expected, volume, write

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
PROGRAM = Path(__file__).parent / "without_tapct.py"
VERSIONS = {"4.49": "transformers==4.49.0", "newest 4": "transformers<5", "newest": "transformers"}
ONNX = """
import numpy as np, onnx, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
worst = 0.0
for shape in ((1, 2, 2, 2), (2, 2, 4, 6), (3, 5, 2, 7)):
    sizes = [n * side for n, side in zip(shape[1:], model.config.patch_size)]
    crops = torch.randn(shape[0], 1, *sizes)
    with torch.no_grad():
        want = model(crops)
    found = session.run(None, {"pixel_values": crops.numpy()})
    exported = torch.export.load("model.pt2").module()(pixel_values=crops, return_dict=False)
    for one, other, name in zip(found, exported, ("last_hidden_state", "pooler_output")):
        worst = max(worst, float(np.abs(one - want[name].numpy()).max()))
        worst = max(worst, float((other - want[name]).abs().max()))
print("opset", onnx.load("model.onnx").opset_import[0].version, "difference", worst)
"""


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def lay_out(folder: Path) -> None:
    """The folders and expectations that `without_tapct.py` reads."""
    scan = volume()
    for name in CONFIGS:
        own = write(folder / name, name)
        embedding = own.embed(scan)
        want = {
            "hu": scan.hu_ZYX, "hu_spacing_mm": np.array(SPACING_MM),
            "features": embedding.features_DZYX, "cls": embedding.cls_D,
        }  # fmt: skip
        for kind, shape in SHAPES.items():
            one = expected(own.model, shape)
            want[f"{kind}/crops"], want[f"{kind}/cls"] = one.crops.numpy(), one.cls.numpy()
            want[f"{kind}/spacing_mm"] = one.spacing_mm.numpy()
            for block, patches in enumerate(one.patches):
                want[f"{kind}/block{block}"] = patches.numpy()
        np.savez(folder / f"{name}.npz", **want)
    write(folder / "broken", "learned")
    np.save(folder / "scan.npy", scan.hu_ZYX)
    lines = next(block for block in examples() if "processor(np.load" in block)
    (folder / "five_lines.py").write_text(lines.replace("FOLDER", "learned"))
    onnx = next(block for block in examples() if "torch.onnx.export" in block)
    (folder / "onnx_export.py").write_text(onnx.replace("FOLDER", "learned") + ONNX)
    shutil.copy(PROGRAM, folder / PROGRAM.name)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_exports_work_with_torch_and_transformers_only(version: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    lay_out(work)
    environment = TorchEnvironment(tmp_path / "environment", [VERSIONS[version]])
    printed = environment.run([PROGRAM.name, "."], work).splitlines()[-1]
    found = json.loads(printed)
    if path := os.environ.get("TAPCT_PARITY_FILE"):  # where the table of docs/export.md comes from
        with open(path, "a") as file:
            file.write(printed + "\n")
    assert found["transformers"].startswith(version.removeprefix("newest").strip() or "5")
    for name in CONFIGS:
        assert set(found[name]) == {*SHAPES, "embed"}
        assert max(found[name].values()) <= 1e-5, found
    assert found["five_lines"] <= 1e-5
    assert "1 missing tensors, model.blocks.1.mlp.fc1.weight" in found["missing"]
    # AutoImageProcessor of newer versions wants Pillow
    environment.install(["pillow"])
    code = "from transformers import AutoImageProcessor as A; "
    code += "print(type(A.from_pretrained('learned', trust_remote_code=True)).__name__)"
    assert "TAPCTImageProcessor" in environment.run(["-c", code], work)
    if version == "newest":
        environment.install(["onnx", "onnxscript", "onnxruntime"])
        opset, difference = re.search(
            r"opset (\d+) difference (\S+)", environment.run(["onnx_export.py"], work)
        ).groups()  # type: ignore[union-attr]
        assert int(opset) >= 18 and float(difference) <= 1e-5
