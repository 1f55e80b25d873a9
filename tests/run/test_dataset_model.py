"""`tapct eval MODEL --data NAME --root FOLDER`, from the files of a data set to its results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from dataset_layouts import LAYOUTS, lay_out
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_export import tiny_export

from tapct.data.manifest import read_column
from tapct.data.packed.store import INDEX_NAME, Store

QUICK = (
    "eval.baselines=[untrained]", "eval.num_pictures=0", "device=cpu",
    "eval.tasks.segmentation.steps=3",
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_export(tmp_path / "tiny")


def results_in(folder: Path) -> tuple[Path, dict]:
    (file,) = folder.glob("*/*/results.json")
    return file, json.loads(file.read_text())


def test_a_data_set_is_evaluated_from_its_files(model: Path, tmp_path: Path, shell: Shell) -> None:
    root = lay_out(LAYOUTS["word"], tmp_path / "files")
    words = ("eval", model, *QUICK, "--data", "word", "--root", root, "--workers", 1)
    shell.good(*words)
    file, content = results_in(tmp_path / "tiny-eval")
    # results lie in a folder that is called after the data set, so that `report --data word` works
    assert file.parents[1].name.startswith("word-") and content["data"]["name"].startswith("word-")
    store = Store(tmp_path / "tiny-eval" / "data" / "word" / "store")
    path_of = read_column(store.path.parent / "manifest.parquet", store.manifest_digest, "path")
    split = content["split"]
    assert {path_of[scan] for scan in split["test"]} == {"imagesTs/word_0014.nii.gz"}
    assert len(split["train"]) == 3  # the official validation side belongs to the training side
    scores = json.dumps(content["tasks"]["segmentation"])
    assert "intestine" in scores and "right head of femur" in scores
    assert "word_00" not in file.read_text() and str(tmp_path) not in file.read_text()

    index = store.path / INDEX_NAME
    before = index.read_bytes()
    assert "no file has changed" in shell.good(*words, "--out", tmp_path / "again")
    assert index.read_bytes() == before
    assert (tmp_path / "again" / "results.json").is_file()


def test_findings_of_scans_are_classified(model: Path, tmp_path: Path, shell: Shell) -> None:
    layout = LAYOUTS["ct-rate"]
    second = "valid_fixed/valid_2/valid_2_a/valid_2_a_1.nii.gz"
    (valid,) = (name for name in layout.tables if "valid" in name)
    rows = {valid: layout.tables[valid] + "valid_2_a_1.nii.gz,1,1\n"}
    layout = replace(
        layout, scans={**layout.scans, second: ""}, tables={**layout.tables, **rows}, others=()
    )
    root = lay_out(layout, tmp_path / "files")
    shell.good(
        "eval", model, *QUICK[:3], "--data", "ct-rate", "--root", root, "--workers", 1,
        "--work", tmp_path / "work", "eval.tasks.segmentation=null",
        "eval.tasks.classification={heads: [logistic], vectors: [mean], blocks: [last]}",
    )  # fmt: skip
    _, content = results_in(tmp_path / "tiny-eval")
    assert len(content["split"]["test"]) == 2 and len(content["split"]["train"]) == 3
    assert "Emphysema" in json.dumps(content["tasks"]["classification"])


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--data", "amos2", "--root", "x"], "did you mean amos22"),
        (["--data", "amos22"], "needs --root FOLDER"),
        (["--root", "x"], "--root x needs --data NAME"),
        (["--work", "x"], "--work x needs --data NAME"),
        (["--data", "amos22", "--root", "nowhere"], "amos22.grand-challenge.org"),
        (["--data", "amos22", "--root", "x", "data.store=y"], "both name the data"),
    ],
)
def test_wrong_options_are_one_line(
    model: Path, shell: Shell, words: list[str], expected: str
) -> None:
    assert expected in shell.bad("eval", model, "device=cpu", *words)
