"""`tapct eval` of a run, of a checkpoint and of an export: the same numbers, and where they go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import config_of, make_store

from tapct.base.exits import UserError
from tapct.data.packed.store import Store
from tapct.eval.results.json_file import Evaluation
from tapct.run import finished, pretrain
from tapct.run.model_source import open_model
from tapct.run_folder import RunFolder, evaluations_beside

QUICK = ("eval.tasks.segmentation.steps=5", "eval.num_pictures=0")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"), num=5)


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4 and 6, and its export."""
    folder = tmp_path_factory.mktemp("run")
    resolved = config_of(folder, store, "train.steps=6", "seed=3", *QUICK)
    pretrain.train(resolved)
    out: Path = resolved.value.out
    finished.export(out)
    return out


@pytest.fixture(scope="module")
def own(run: Path) -> Evaluation:
    """The evaluation of the run itself."""
    return finished.evaluate(run)


def headline(evaluation: Evaluation) -> dict[str, float]:
    return dict(evaluation.tasks["segmentation"].headline.values)


def words_for(store: Path) -> list[str]:
    """What an export does not know of its run."""
    return [f"data.store={store}", "device=cpu", "seed=3", *QUICK]


def test_an_export_gives_the_numbers_of_its_run(
    run: Path, own: Evaluation, store: Path, tmp_path: Path
) -> None:
    export = tmp_path / "theirs"
    shutil.copytree(RunFolder(run).export.path, export)
    found = finished.evaluate(export, words_for(store))
    assert headline(found) == headline(own)
    weights, expected = found.origin.weights, own.origin.weights
    assert weights is not None and expected is not None and weights.source == "export"
    assert (weights.run, weights.step, weights.samples, weights.store) == (
        expected.run, 6, 24, Store(store).digest
    )  # fmt: skip
    # the export brings the list of the scans of pretraining along
    assert found.split.held_out == own.split.held_out
    (written,) = evaluations_beside(export).glob("*/*/results.json")
    assert written.parent.name == f"weights-{weights.sha256[:8]}"
    assert written.parent.parent.name.endswith(Store(store).digest[:8])
    assert not (export / "eval").exists()


def test_weights_without_a_list_are_unknown(run: Path, store: Path, tmp_path: Path) -> None:
    export = tmp_path / "bare"
    shutil.copytree(RunFolder(run).export.path, export)
    (export / "trained_on.parquet").unlink()
    found = finished.evaluate(export, words_for(store))
    assert found.split.held_out.value == "unknown"
    assert "bare come without a list of the scans of pretraining" in found.split.caveat


def test_a_checkpoint_in_its_run_is_a_step_of_the_run(run: Path, shell: Shell) -> None:
    by_step = finished.evaluate(run, step=4)
    results = next(RunFolder(run).evaluations.glob("*/step_00000004/results.json"))
    results.unlink()
    shell.good("eval", RunFolder(run).checkpoints.step(4).path)
    again = json.loads(results.read_text())
    assert again["weights"]["step"] == 4 and again["weights"]["source"] == "run"
    assert again["tasks"] == by_step.to_json()["tasks"]
    assert again["split"] == by_step.to_json()["split"]


def test_a_checkpoint_without_its_run_knows_its_settings_but_not_its_scans(
    run: Path, own: Evaluation, tmp_path: Path
) -> None:
    lone = tmp_path / "step_00000006"
    shutil.copytree(RunFolder(run).checkpoints.step(6).path, lone)
    found = finished.evaluate(lone)
    assert headline(found) == headline(own)
    assert found.origin.weights is not None and found.origin.weights.source == "checkpoint"
    assert found.split.held_out.value == "unknown"
    assert "lies outside of its run folder" in found.split.caveat
    assert list(evaluations_beside(lone).glob("*/weights-*/results.json"))
    (lone / "teacher.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="step_00000006 is damaged"):
        open_model(lone)


def test_out_is_one_folder_for_one_data_set_and_one_model(
    run: Path, own: Evaluation, store: Path, shell: Shell, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    before = sorted(path for path in run.rglob("*") if path.is_file())
    text = shell.good("eval", run, "--out", out)
    assert str(out) in "".join(text.split())
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before
    written = json.loads((out / "results.json").read_text())
    assert written["tasks"] == own.to_json()["tasks"]
    shell.good("eval", run, "--out", out)  # the same again is no other result
    line = shell.bad("eval", RunFolder(run).export.path, *words_for(store), "--out", out)
    assert "holds the results of other weights" in line
    other = make_store(tmp_path / "other", num=3, seed=4)
    line = shell.bad("eval", run, f"data.store={other}", "--out", out)
    assert "holds the results of other data" in line
    line = shell.bad("eval", run, "--out", out / "results.json")
    assert "is a file" in line


@pytest.mark.parametrize(
    ("path", "words", "expected"),
    [
        ("nowhere", [], "does not exist; give a run folder"),
        ("empty", [], "neither a run folder, a checkpoint nor an export"),
        ("export/model.safetensors", [], "does not hold all that the features depend on"),
        ("export", ["--step", "4"], "only a run folder holds the weights of several steps"),
        ("export", ["model.dim=32"], "model.dim=32: the weights were trained with 16"),
        ("export", ["contract.std=5"], "contract.std=5"),
        ("export", ["views.num_locals=1"], "views"),
        ("foreign", [], "is not a tapct export"),
    ],
)
def test_what_is_no_model_is_one_line(
    run: Path, shell: Shell, tmp_path: Path, path: str, words: list[str], expected: str
) -> None:
    shutil.copytree(RunFolder(run).export.path, tmp_path / "export")
    shutil.copytree(RunFolder(run).export.path, tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "empty").mkdir()
    assert expected in shell.bad("eval", tmp_path / path, *words)


def test_an_export_can_change_its_attention_but_not_its_features(run: Path) -> None:
    folder = RunFolder(run).export.path
    plain = open_model(folder, ["device=cpu"])
    other = open_model(folder, ["device=cpu", "model.attention=sdpa"])
    assert other.backbone.attention == "sdpa"
    crop_BZYX = torch.randn(2, 4, 16, 16)
    assert torch.allclose(
        plain.backbone([crop_BZYX])[0].patches_BND,
        other.backbone([crop_BZYX])[0].patches_BND,
        atol=1e-5,
    )


def test_further_models_stand_in_the_same_table(
    run: Path, own: Evaluation, store: Path, tmp_path: Path, shell: Shell
) -> None:
    export, bare = tmp_path / "theirs", tmp_path / "bare"
    for folder in (export, bare):
        shutil.copytree(RunFolder(run).export.path, folder)
    (bare / "trained_on.parquet").unlink()
    printed = shell.good(
        "eval", run, "--models", f"theirs={export}", "--models", f"bare={bare}",
        "--out", tmp_path / "out",
    )  # fmt: skip
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    values = written["tasks"]["segmentation"]["headline"]["values"]
    assert list(values)[:3] == ["pretrained", "theirs", "bare"]
    assert values["theirs"] == values["bare"] == values["pretrained"] == headline(own)["pretrained"]
    about = written["backbones"]
    assert about["theirs"]["held_out"] == written["split"]["held_out_from_pretraining"]
    assert about["bare"]["held_out"] == "unknown" and about["raw_hu"]["held_out"] is None
    assert "caveat: whether bare was pretrained on the test scans is unknown" in printed
    # the weights are those of the run, whose features are in its cache
    assert written["cost"]["num_computed"] == 0 and "0 computed" in printed
    for text, problem in (
        ("theirs", "write NAME=PATH"),
        ("pretrained=x", "the name pretrained is taken"),
        ("raw_hu=x", "the name raw_hu is taken"),
        (f"x={tmp_path / 'none'}", "does not exist"),
    ):
        assert problem in shell.bad("eval", run, "--models", text)
