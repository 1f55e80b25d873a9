"""The best step of a run: its checkpoint and its weights are kept, and can be evaluated and
exported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from evaluated_steps import DATASET, make_run, write_step
from safetensors.torch import load_file
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import config_of, differences, evaluation_of, make_store

from tapct.base.exits import UserError
from tapct.config import ConfigError
from tapct.data.packed.store import Store
from tapct.data.patients.split import patients_below, two_sides
from tapct.eval.results import best_record, json_file
from tapct.eval.runner import During
from tapct.run import background_eval, best_step, finished, pretrain
from tapct.run.background_eval import Evaluations
from tapct.run.model_source import open_model
from tapct.run.rules import load_run_config, warnings
from tapct.run.start import doubts_about_evaluation
from tapct.run_folder import EvaluationFolder, RunFolder, step_of

QUICK = ("eval.tasks.segmentation.steps=3", "eval.num_pictures=0", "eval.baselines=[untrained]")


def waiting(run: Path, step: int) -> EvaluationFolder:
    """The folder of a step whose evaluation has been started."""
    folder = RunFolder(run).evaluation(DATASET, step)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.meta.write_text("{}")
    folder.teacher.write_text(f"weights of step {step}")
    return folder


def test_weights_of_the_best_step_alone_are_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folders = {step: waiting(run, step) for step in (10, 20, 30, 40)}
    # they end in another order than they began; that of step 30 is killed
    for step, value, kept in ((20, 0.3, 20), (10, 0.2, 20), (40, 0.4, 40)):
        write_step(run, step, value)
        best_step.settle(run, folders[step])
        have = {at for at, folder in folders.items() if folder.teacher.is_file()}
        pending = {at for at, folder in folders.items() if not folder.results.is_file()}
        assert have == {kept} | pending
    assert folders[40].teacher.read_text() == "weights of step 40"
    # step 10 is trained and evaluated again: its new weights are not those of its results
    now = folders[10].results.stat().st_mtime + 10
    waiting(run, 10)
    os.utime(folders[10].teacher, (now, now))
    best_step.settle(run, folders[40])
    assert folders[10].teacher.is_file() and best_step.waits(folders[10], False)
    assert folders[30].teacher.is_file(), "its evaluation can be repeated"


def test_a_step_that_becomes_the_best_later_gets_the_weights_of_its_checkpoint(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run")
    saved = RunFolder(run).checkpoints.step(20)
    saved.path.mkdir(parents=True)
    saved.meta.write_text("{}")
    saved.teacher.write_text("weights")
    write_step(run, 20, 0.5)  # by hand: no weights beside the results
    folder = RunFolder(run).evaluation(DATASET, 20)
    best_step.settle(run, folder)
    assert folder.teacher.read_text() == "weights" and folder.meta.is_file()
    shutil.rmtree(saved.path)
    assert folder.teacher.read_text() == "weights"
    assert not list(folder.path.glob(".*"))


def test_without_evaluations_during_training_no_weights_are_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", every=0)
    folder = waiting(run, 10)
    write_step(run, 10, 0.5)
    best_step.settle(run, folder)
    assert not folder.teacher.exists()
    record = best_record.read(run)
    assert record is not None and record.best == 10


def test_rotation_keeps_the_best_step_and_the_newest_that_wait(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluations = Evaluations(run, During(every=10), DATASET)
    assert evaluations.steps_to_keep() == set()
    for step in (10, 20, 30, 40, 50):
        waiting(run, step)
    for step, value in ((10, 0.4), (20, 0.3)):
        write_step(run, step, value)
        best_step.settle(run, RunFolder(run).evaluation(DATASET, step))
    evaluations.due.append(60)
    assert evaluations.steps_to_keep() == {10, 40, 50, 60}
    RunFolder(run).best.write_text("{")  # damaged: saving does not fail
    assert evaluations.steps_to_keep() == {40, 50, 60}
    assert Evaluations(run, During(), DATASET).steps_to_keep() == set()


def test_a_task_that_cannot_choose_is_refused_with_the_nearest_name(
    tmp_path: Path, tiny_store: Path
) -> None:
    path = config_file(tmp_path, tiny_store)
    words = ["eval.during.every=4", "eval.during.best=segmentaton"]
    with pytest.raises(
        ConfigError,
        match="'segmentaton' is no task of eval.tasks, which has segmentation; did you mean "
        r"segmentation\?",
    ):
        load_run_config(path, words)
    resolved = load_run_config(path, ["eval.during.best=segmentation"])
    assert any("eval.during.best has no effect" in line for line in warnings(resolved))


def config_file(folder: Path, store: Path) -> Path:
    config_of(folder, store)
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"), num=6)


@pytest.fixture
def evaluate_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation runs in this process, and training waits for it."""

    def now(self: Evaluations, step: int, command: list[str], log: Path) -> None:
        finished.evaluate(self.run, [], step=step, on_validation="--validation" in command)

    monkeypatch.setattr(background_eval.Evaluations, "_spawn", now)


def seed_with_test_patients(store: Path, num: int = 2) -> int:
    """A seed whose split has some test patients. Patients are hashed by a key that differs between
    archives, so the split of a seed does too.
    """
    people = {scan.patient for scan in Store(store).scans}
    return next(seed for seed in range(100) if len(two_sides(people, 0.5, seed)[0]) == num)


def change_value(folder: EvaluationFolder, value: float) -> None:
    """Give the pretrained model of an evaluation another headline."""
    content = json.loads(folder.results.read_text())
    content["tasks"]["segmentation"]["headline"]["values"]["pretrained"] = value
    folder.results.write_text(json.dumps(content))


def test_a_run_keeps_its_best_checkpoint_on_validation_patients(
    tmp_path: Path, tiny_store: Path, evaluate_at_once: None, shell: Shell
) -> None:
    words = (
        "eval.during.every=4",
        "eval.validation_share=0.5",
        f"eval.seed={seed_with_test_patients(tiny_store)}",
        "checkpoint.keep=1",
        "checkpoint.asynchronous=false",
        *QUICK,
    )
    pretrain.train(config_of(tmp_path, tiny_store, *words, "train.steps=8"))
    run = RunFolder(tmp_path / "run")
    first = evaluation_of(run.path, 4)
    assert not first.results.exists(), "the test patients have no part in the choice"
    change_value(first.validation, 0.9)
    best_record.update(run.path)
    # it is kept while the run is resumed, though only one checkpoint is
    pretrain.train(config_of(tmp_path, tiny_store, *words, "train.steps=16", "optim.warmup_share=0",
                             ), allow_change=True)  # fmt: skip
    assert [step_of(path) for path in run.checkpoints.finished()] == [4, 16]
    record = best_record.read(run.path)
    assert record is not None and record.best == 4 and list(record.values) == [4, 8, 12, 16]
    assert record.people == "validation patients"
    kept = {at for at in (4, 8, 12, 16) if evaluation_of(run.path, at).teacher.is_file()}
    assert kept == {4}

    # the best step is evaluated on the other test patients
    shell.good("eval", run.path, "--step", "best")
    on_test, _ = json_file.read(first.path)
    on_validation, _ = json_file.read(first.validation.path)
    assert on_test is not None and on_validation is not None
    assert on_validation.origin.weights is not None
    assert not set(on_test.split.test) & set(on_validation.split.test)
    assert set(on_test.split.train) == set(on_validation.split.train)
    assert on_test.split.test and on_validation.split.test
    assert len({*on_test.split.test_patients, *on_validation.split.test_patients}) == 2
    assert "optimistic" not in on_test.split.caveat
    assert on_validation.split.on_validation and not on_test.split.on_validation
    assert best_record.read(run.path) == record, "it has no part in the choice"

    shell.good("export", run.path, "--step", "best", "--out", tmp_path / "export")
    card = json.loads((tmp_path / "export" / "config.json").read_text())
    assert card["provenance"]["step"] == 4
    assert "best mean Dice of segmentation on the validation" in card["provenance"]["chosen_by"]
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert differences(exported, load_file(first.teacher)) == []
    assert open_model(first.path).weights.sha256 == on_validation.origin.weights.sha256


def test_one_test_patient_cannot_be_divided_which_is_printed_before_training(
    tmp_path: Path, tiny_store: Path
) -> None:
    store = Store(tiny_store)
    people = {scan.patient for scan in store.scans}
    seed = next(seed for seed in range(500) if len(patients_below(people, 0.3, seed)) == 1)
    words = ("eval.during.every=4", "data.held_out=0.3", f"data.split_seed={seed}")
    for share, has_warning in ((0.5, True), (0.0, False)):
        config = config_of(tmp_path, tiny_store, *words, f"eval.validation_share={share}").value
        lines = [line for line in doubts_about_evaluation(config, store) if "validation" in line]
        assert [("has 1 test patient, who cannot" in line) for line in lines] == [
            True
        ] * has_warning


def test_choosing_on_the_test_patients_is_a_caveat(
    tmp_path: Path, tiny_store: Path, evaluate_at_once: None, shell: Shell
) -> None:
    words = ("eval.during.every=4", "checkpoint.keep=1", "checkpoint.asynchronous=false", *QUICK)
    pretrain.train(config_of(tmp_path, tiny_store, *words, "train.steps=8"))
    run = tmp_path / "run"
    change_value(evaluation_of(run, 4), 0.9)
    lines = " ".join(shell.good("eval", run, "--step", "best").split())
    assert f"best step 4 of {run}: segmentation, mean Dice 0.900 on the test patients" in lines
    found = re.search(r"the best one on (\d) of (\d) test scans?, so the result is optimis", lines)
    assert found is not None and found[1] == found[2]
    finished.export(run, step="best")
    words = [f"data.store={tiny_store}", "device=cpu", *QUICK]
    exported = finished.evaluate(RunFolder(run).export.path, words)
    assert "so the result is optimistic" in exported.split.caveat
    plain = " ".join(shell.good("eval", run, "--step", "4").split())
    assert "optimistic" not in plain, "the user named the step"
    assert "needs validation patients" in shell.bad("eval", run, "--validation")
    assert "no evaluation of" in shell.bad("eval", run, "--step", "best", "eval.during.best=knn")
    assert "give the step of a checkpoint, e.g. 500, or best" in shell.bad(
        "export", run, "--step", "bst"
    )
    # other weights than those that were evaluated
    folder = evaluation_of(run, step_of(evaluation_of(run, 8).path))
    change_value(folder, 0.95)
    source = RunFolder(run).checkpoints.step(8)
    best_step.keep_weights(run, folder)
    content = json.loads(folder.results.read_text())
    content["weights"]["sha256"] = "0" * 64
    folder.results.write_text(json.dumps(content))
    assert source.teacher.is_file()
    with pytest.raises(UserError, match="are not those that were evaluated; run `tapct eval"):
        finished.evaluate(run, step="best")
