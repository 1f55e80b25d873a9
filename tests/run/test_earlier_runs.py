"""Runs that were trained before `eval.task` became the table `eval.tasks` can still be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import config_of, make_store, write_config

from tapct.config import ConfigError, load_config
from tapct.data.packed.store import Store
from tapct.data.patients.split import held_out_patients_v1
from tapct.engine import loop
from tapct.eval.runner import Config
from tapct.run import model_source, pretrain
from tapct.run.config import RunConfig
from tapct.run.resume import with_split_of

OLD_TASK = {
    "name": "segmentation",
    "resolution": "patch",
    "organs": [],
    "outside": ["table"],
    "body": ["body", "body_trunc", "skin"],
    "max_tokens": 24576,
    "l2": 0.0003,
    "steps": 5,
}


def with_one_task(tree: dict) -> dict:
    """The config as the last version with `eval.task` wrote it."""
    section = {key: value for key, value in tree["eval"].items() if key != "tasks"}
    return {**tree, "eval": {"task": OLD_TASK, **section}}


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose config.yaml and checkpoint were written by an earlier version."""
    folder = tmp_path_factory.mktemp("old")
    resolved = config_of(folder, make_store(folder), "train.steps=4")
    assert pretrain.train(resolved) == loop.Stop(4)
    run = folder / "run"
    config = run / "config.yaml"
    config.write_text(yaml.safe_dump(with_one_task(yaml.safe_load(config.read_text()))))
    rewrite_config(run / "checkpoints" / "step_00000004", with_one_task)
    return run


def without_split(tree: dict) -> dict:
    """The config as the last version without `data.split_version` wrote it."""
    data = {key: value for key, value in tree["data"].items() if not key.startswith("split_")}
    return {**tree, "data": data}


def rewrite_config(saved: Path, change: Callable[[dict], dict]) -> None:
    """Change the config in a checkpoint, and the digest of the file that holds it."""
    meta = json.loads((saved / "meta.json").read_text())
    text = json.dumps({**meta, "config": change(meta["config"])})
    (saved / "meta.json").write_text(text)
    files = json.loads((saved / "files.json").read_text())
    files["meta.json"] = [len(text.encode()), sha256(text.encode()).hexdigest()]
    (saved / "files.json").write_text(json.dumps(files))


def test_an_earlier_run_is_evaluated_with_its_own_task(old_run: Path, shell: Shell) -> None:
    (task,) = model_source.open_run(old_run).resolved.value.eval.tasks
    assert (task.name, task.config.resolution, task.config.steps) == ("segmentation", "patch", 5)
    changed = model_source.open_run(old_run, ["eval.tasks.segmentation.steps=3"]).resolved.value
    assert changed.eval.tasks[0].config.steps == 3
    shell.good("eval", old_run, "eval.num_pictures=0")
    shell.good("report", old_run)
    shell.good("compare", old_run, "--out", old_run / "compare.html")


def test_an_earlier_run_is_resumed_without_a_changed_key(old_run: Path) -> None:
    folder, store = old_run.parent, old_run.parent / "store"
    assert pretrain.train(config_of(folder, store, "train.steps=4")) == loop.Stop(4)
    # a setting that affects training is still found
    with pytest.raises(Exception, match=r"optim.lr was 0.01 .* and is 0.02 now"):
        pretrain.train(config_of(folder, store, "train.steps=4", "optim.lr=0.02"))


def test_an_earlier_run_keeps_its_held_out_patients(
    old_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = old_run.parent / "store"
    held_out = ("train.steps=4", "data.held_out=0.5")
    resolved = config_of(tmp_path, store, *held_out, "train.steps=2")
    resolved = replace(
        resolved,
        value=replace(resolved.value, data=replace(resolved.value.data, split_version=1)),
    )
    assert pretrain.train(resolved) == loop.Stop(2)
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    rewrite_config(saved, without_split)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(yaml.safe_dump(without_split(yaml.safe_load(config.read_text()))))

    patients = [scan.patient for scan in Store(store).scans]
    expected = held_out_patients_v1(patients, 0.5, 0)
    old = model_source.open_run(tmp_path / "run").resolved.value
    assert old.data.held_out_patients(patients, old.seed) == expected

    now = config_of(tmp_path, store, *held_out, "train.steps=2")
    assert now.value.data.held_out_patients(patients, 0) != expected
    kept = with_split_of(now, saved)
    assert "keeps rule 1" in capsys.readouterr().out
    assert kept.value.data.held_out_patients(patients, 0) == expected
    assert kept.to_yaml().count("split_version: 1") == 1
    shown = pretrain.check(now)
    assert shown.resolved.value == kept.value and "keeps rule 1" in shown.warnings[0]
    assert pretrain.train(now) == loop.Stop(2)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("eval.task.name=mylab.tasks.depth", "override: eval.task"),
        ("eval.task.steps=5", "override"),
    ],
)
def test_an_earlier_override_is_one_line_that_names_the_new_key(
    tmp_path: Path, override: str, where: str
) -> None:
    with pytest.raises(ConfigError, match=r"is now the table eval.tasks: write") as caught:
        load_config(RunConfig, None, [override])
    line = str(caught.value)
    assert line.startswith(where) and "\n" not in line
    assert "eval.tasks.NAME.key=value" in line and "'eval.tasks[my.module].key=value'" in line


def test_an_earlier_yaml_file_is_one_line_with_its_place(tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path / "store")
    text = path.read_text().replace("eval: {", "eval: {task: {name: segmentation}, ")
    path.write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if row.startswith("eval:"))
    with pytest.raises(ConfigError, match=rf"tiny.yaml:{line}: eval.task is now the table"):
        load_config(RunConfig, path, [])


def test_a_new_key_has_no_name_of_an_earlier_one() -> None:
    assert not set(Config.renamed) & set(Config.__dataclass_fields__)
