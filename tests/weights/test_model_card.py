"""The model card states what the run and its results state, and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import evaluation_of, make_store, write_config
from transformers_cases import CONTRACT, LEARNED, network, settings_of

from tapct.base.files import sha256
from tapct.base.geometry import times
from tapct.data.packed.store import Store
from tapct.data.packed.trained_on import SeenScan, TrainedOn
from tapct.eval.results import json_file, task_statistics
from tapct.eval.results.json_file import Evaluation, SplitRecord, TaskSection
from tapct.eval.results.task_statistics import TaskStatistics
from tapct.eval.scans.held_out import HeldOut
from tapct.eval.scores import Headline, ScanScore, TaskResults
from tapct.weights.huggingface.folder import save_folder
from tapct.weights.huggingface.model_card import ModelFacts

MODELS = ("pretrained", "untrained")


def evaluation(num_patients: int) -> Evaluation:
    """Two scans of every patient."""
    rng = np.random.default_rng(0)
    ids = tuple(f"s{number:02}" for number in range(2 * num_patients))
    rows = [
        ScanScore(scan, model, float(value), {"liver": float(value)})
        for scan in ids
        for model, value in zip(MODELS, rng.uniform((0.5, 0.2), (0.8, 0.5)))
    ]
    values = {m: float(np.mean([row.value for row in rows if row.model == m])) for m in MODELS}
    headline = Headline("mean Dice", values, "higher", "Dice of the organs.", (0, 1), "mean of 1")
    found = TaskResults({model: {} for model in MODELS}, tuple(rows), None, True)
    patients = {scan: f"p{number // 2}" for number, scan in enumerate(ids)}
    statistics = task_statistics.of_task(found, headline, {}, patients, 7)
    section = TaskSection({}, "voxels", 3, len(ids), 0, headline, found, (), statistics)
    split = SplitRecord("patients", HeldOut(len(ids)), ("a",), ids, test_patients=ids)
    return Evaluation({"segmentation": section}, split, {}, (2, 4, 4), 7)


def facts(**changes: object) -> ModelFacts:
    scans = {SeenScan(f"d{n}", f"p{n // 2}" if n else "", "key"): 0 for n in range(7)}
    plain = ModelFacts("mine", 500, 4000, TrainedOn(scans), (("slices per scan", "16"),))
    return replace(plain, **changes)  # type: ignore[arg-type]


def written(folder: Path, about: ModelFacts) -> tuple[str, dict[str, object]]:
    """README.md and metadata.json."""
    save_folder(folder, network(LEARNED), settings_of(LEARNED), about)
    return (folder / "README.md").read_text(), json.loads((folder / "metadata.json").read_text())


def table_below(card: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    lines = card.split(f"{heading}\n", 1)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_results_have_values_intervals_and_numbers_of_patients(tmp_path: Path) -> None:
    found = evaluation(12)
    card, meta = written(tmp_path / "x", facts(evaluations=(("liver-0a1b", found),)))
    statistics = found.tasks["segmentation"].statistics
    assert isinstance(statistics, TaskStatistics)
    whole = statistics.metrics[0].whole
    rows = table_below(card, "### Segmentation, liver-0a1b")
    assert [row[0] for row in rows] == list(MODELS)
    for row, one in zip(rows, whole.models, strict=True):
        interval = one.estimate.interval
        assert interval is not None
        numbers = [float(number) for number in re.findall(r"-?\d\.\d+", " ".join(row[1:3]))]
        want = [one.estimate.value, interval.low, interval.high]
        assert numbers == pytest.approx(want, abs=6e-4)
        assert row[3] == "n = 24 scans of 12 patients"
    lead = whole.differences[0]
    assert f"pretrained minus untrained: +{lead.estimate.value:.3f}" in card
    assert "p = " in card and "Dice of the organs (higher is better)." in card
    metric = meta["eval_metrics"]["liver-0a1b"]["segmentation"]  # type: ignore[index]
    assert metric["value"] == pytest.approx(whole.models[0].estimate.value)
    assert (metric["metric"], metric["num_test"]) == ("mean Dice", 24)


def test_cells_of_patches_are_stated(tmp_path: Path) -> None:
    settings = settings_of(LEARNED)
    preprocess = replace(settings.preprocess, stride=LEARNED.patch, refine=LEARNED.patch)
    save_folder(tmp_path, network(LEARNED), replace(settings, preprocess=preprocess), facts())
    card, patch = (tmp_path / "README.md").read_text(), times(LEARNED.patch)
    assert f"Each patch is divided into {patch} cells of 1x1x1 voxels" in card
    assert "cells of" not in written(tmp_path / "plain", facts())[0]


def test_few_patients_give_no_interval_and_the_reason(tmp_path: Path) -> None:
    card, _ = written(tmp_path / "x", facts(evaluations=(("few", evaluation(3)),)))
    rows = table_below(card, "### Segmentation, few")
    assert [row[2:] for row in rows] == [["none", "n = 6 scans of 3 patients"]] * 2
    assert "No interval: " in card and "minus" not in card.split("## Results")[1].split("## In")[0]


def test_facts_that_are_missing_are_named(tmp_path: Path) -> None:
    card, meta = written(tmp_path / "x", ModelFacts("mine"))
    assert "These weights have not been evaluated." in card
    assert "## Training\n\nNot recorded." in card
    assert "This is incomplete: the scans of pretraining were not recorded." in card
    assert "The licence of the weights was not stated." in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"
    assert meta["licence"] == "not stated"


def test_the_header_and_the_training_data(tmp_path: Path) -> None:
    card, meta = written(tmp_path / "x", facts(licence="cc-by-4.0"))
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["library_name"]) == ("cc-by-4.0", "transformers")
    rows = dict(table_below(card, "## Training data"))
    assert rows == {
        "scans": "7", "patients": "4", "scans of unknown patient": "1", "slices per scan": "16",
    }  # fmt: skip
    size = sum(parameter.numel() for parameter in network(LEARNED).parameters())
    assert dict(table_below(card, "# mine"))["parameters"] == f"{size:,}"
    assert meta["weights_sha256"] == sha256(tmp_path / "x" / "model.safetensors")
    inputs = meta["network_data_format"]["inputs"]["pixel_values"]  # type: ignore[index]
    assert inputs["spatial_shape"] == ["2*n", "4*n", "4*n"]
    low = (CONTRACT.clip_low - CONTRACT.mean) / CONTRACT.std
    high = (CONTRACT.clip_high - CONTRACT.mean) / CONTRACT.std
    assert inputs["value_range"] == pytest.approx([low, high])


def test_the_card_of_a_run(tmp_path: Path, shell: Shell) -> None:
    config = write_config(tmp_path, make_store(tmp_path, num=6))
    shell.good("train", config, "data.held_out=0.4", "train.steps=4")
    run, out = tmp_path / "run", tmp_path / "models" / "mine"
    shell.good("export", run, "--hf", out)
    assert "These weights have not been evaluated." in (out / "README.md").read_text()
    shell.good("eval", run, "eval.tasks.segmentation.steps=3", "eval.baselines=[]")
    assert "exported to" in shell.good("export", run, "--hf", out, "--licence", "cc-by-4.0")
    card = (out / "README.md").read_text()
    found, _ = json_file.read(evaluation_of(run, 4).path)
    assert found is not None and found.origin.data is not None
    rows = table_below(card, f"### Segmentation, {found.origin.data.name}")
    headline = found.tasks["segmentation"].headline
    assert float(rows[0][1]) == pytest.approx(headline.values["pretrained"], abs=6e-4)
    num_scans = int(dict(table_below(card, "## Training data"))["scans"])
    assert num_scans == pq.read_table(run / "trained_on.parquet").num_rows > 0
    trained = set(pq.read_table(run / "trained_on.parquet").column("digest").to_pylist())
    scans = [scan for scan in Store(tmp_path / "store").scans if scan.checksum in trained]
    assert len(scans) == num_scans < 6  # not those of held-out patients
    for name, axis in (("slices per scan", 0), ("rows", 1), ("columns", 2)):
        sizes = sorted(scan.shape_ZYX[axis] for scan in scans)
        found_row = dict(table_below(card, "## Training data"))[name]
        assert found_row.endswith(f"({sizes[0]} to {sizes[-1]})")
    assert dict(table_below(card, "## Training\n"))["steps"] == "4 of 4"
    for file in out.iterdir():  # no path of this machine, no scan ID
        if file.suffix in (".md", ".json"):
            text = file.read_text()
            assert str(tmp_path) not in text
            assert not [scan for scan in found.split.test if scan in text]

    # results of another step are those of other weights
    shell.good("train", config, "data.held_out=0.4", "train.steps=6", "--allow-change")
    shell.good("export", run, "--hf", out)
    assert "These weights have not been evaluated." in (out / "README.md").read_text()

    assert "give --out or --hf" in shell.bad("export", run, "--hf", out, "--out", tmp_path / "o")
    assert "--licence needs --hf" in shell.bad("export", run, "--licence", "mit")
    for wrong in ("my own", "cc-by", "other", "MIT OR Apache-2.0", "LicenseRef-mine"):
        assert "SPDX identifier" in shell.bad("export", run, "--hf", out, "--licence", wrong)
