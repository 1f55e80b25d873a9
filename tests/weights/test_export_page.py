"""The examples of docs/export.md run unchanged; test_transformers_versions.py runs those that
need no tapct.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scan_files import write_nifti
from transformers_cases import LEARNED, network, settings_of

from tapct.weights.export import save_export
from tapct.weights.huggingface import model_card

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def example(name: str) -> str:
    (found,) = (block for block in BLOCKS if block.startswith(f"# {name}\n"))
    return found


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, four scans with labels, and classes."""
    save_export(tmp_path / "models" / "mine", network(LEARNED), settings_of(LEARNED), {})
    rows = ["name,value"]
    for number in range(6):
        draw = np.random.default_rng(number)
        labels = np.zeros((8, 24, 26), np.uint8)
        labels[2:6, 6:18, 4:14] = 1
        hu = draw.normal(-900, 10, labels.shape)
        hu[:, 2:22, 2:24] += 900
        hu[labels > 0] = 60 + 300 * (number % 2)
        for folder, voxels in (("images", hu.astype(np.int16)), ("labels", labels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_nifti(tmp_path / folder / f"p{number}.nii.gz", voxels)
        rows.append(f"p{number},{number % 2}")
    (tmp_path / "classes.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "example", "exec"), names)
    return names


def test_the_unetr_example_trains(work: Path) -> None:
    names = run(example("unetr.py"))
    losses = names["losses"]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert names["logits"].shape == (2, 2, *LEARNED.window)
    gradient = names["encoder"].backbone.patch_embed.proj.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_the_linear_example_learns(work: Path) -> None:
    names = run(example("linear.py"))
    assert 0.02 < float(names["targets"].mean()) < 0.5
    assert names["losses"][-1] < 0.7 * names["losses"][0]


def test_the_scikit_learn_example_distinguishes_two_groups(work: Path) -> None:
    assert run(example("classify.py"))["scores"].mean() > 0.9


def test_the_lines_that_load_a_model_are_those_of_the_card() -> None:
    assert model_card.USE + "\n" in BLOCKS
