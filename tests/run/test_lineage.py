"""What an evaluation claims about its test scans, over stores, starts, sources and exports."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import config_of, make_archive, make_store, own_plugin

import tapct
from tapct.base.exits import UserError
from tapct.config import Resolved
from tapct.data.index.build import build_manifest
from tapct.data.packed import pack, trained_on
from tapct.data.packed.store import Store, labels_digest
from tapct.data.patients.key import KEY_BYTES, KEY_FILE
from tapct.eval.results import saved
from tapct.report import compare, page
from tapct.run import finished, lineage, pretrain
from tapct.run_folder import RunFolder
from tapct.weights.export import scans_of_export

QUICK = ("eval.tasks.segmentation.steps=5", "eval.num_pictures=0", "train.steps=4")


def give_key(folder: Path, letter: str) -> None:
    """A patient key that is the same in every test session, so that the splits are."""
    (folder / KEY_FILE).write_bytes(letter.encode() * KEY_BYTES)


def store_of(archive: Path, folder: Path) -> Path:
    """An archive, indexed in another folder and with another patient key."""
    give_key(folder, "d")
    found = build_manifest(
        archive, folder / "m.parquet", labels=None, patient_regex=None, min_depth=1, workers=0,
        progress=None,
    )  # fmt: skip
    pack.pack(found, folder / "packed", workers=0)
    return folder / "packed"


def split_of(results: Any) -> dict[str, Any]:
    return results.to_json()["split"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    give_key(folder, "a")
    return make_store(folder, num=6)


@pytest.fixture(scope="module")
def renamed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scans under other names and with another patient key, and two more people."""
    folder = tmp_path_factory.mktemp("theirs")
    others = make_archive(folder / "others", num=2, seed=5)
    for archive in (store.parent / "archive", others):
        for image in sorted((archive / "images").glob("*.nii.gz")):
            name = f"{archive.name}_{image.name}".replace("P", "Q")
            for kind in ("images", "labels"):
                (folder / "all" / kind).mkdir(parents=True, exist_ok=True)
                shutil.copy(archive / kind / image.name, folder / "all" / kind / name)
    return store_of(folder / "all", folder)


@pytest.fixture(scope="module")
def resolved(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    """A run with held-out patients, trained and evaluated on its own store."""
    resolved = config_of(tmp_path_factory.mktemp("run"), store, "data.held_out=0.4", *QUICK)
    pretrain.train(resolved)
    return resolved


@pytest.fixture(scope="module")
def run(resolved: Resolved) -> Path:
    out: Path = resolved.value.out
    finished.evaluate(out)
    return out


def test_the_list_holds_the_scans_that_the_loader_draws(
    resolved: Resolved, run: Path, store: Path
) -> None:
    packed = Store(store)
    listed = trained_on.read(RunFolder(run).trained_on)
    test = set(split_of(saved.find(run)[0].evaluation)["test"])
    drawn = [scan for scan in packed.scans if scan.id not in test]
    assert {scan.digest for scan in listed.from_step} == {scan.checksum for scan in drawn}
    assert {scan.patient for scan in listed.from_step} == {scan.patient for scan in drawn}
    assert set(listed.from_step.values()) == {0} and listed.unknown == ()


def test_held_out_scans_are_held_out_and_the_results_know_their_data(
    run: Path, store: Path
) -> None:
    (own,) = saved.find(run)
    content = json.loads(own.folder.results.read_text())
    packed, meta = (
        Store(store),
        json.loads((run / "checkpoints" / "step_00000004" / "meta.json").read_text()),
    )
    assert content["schema"] == 4
    assert content["split"]["held_out_from_pretraining"] is True
    assert content["split"]["note"] == ""
    assert content["data"] == {
        "name": own.dataset, "manifest": packed.manifest_digest, "store": packed.digest,
        "labels": labels_digest(packed.scans), "num_scans": len(packed), "tables": "",
    }  # fmt: skip
    files = json.loads((run / "checkpoints" / "step_00000004" / "files.json").read_text())
    assert content["weights"] == {
        "run": "run", "step": 4, "samples": 16, "sha256": files["teacher.safetensors"][1],
        "store": meta["data_digest"], "source": "run",
    }  # fmt: skip
    assert {"tapct", "torch", "python"} <= set(content["versions"])
    assert content["versions"]["tapct"] == tapct.__version__
    assert content["seconds"] > 0 and "git_revision" in content
    assert str(run.parent) not in own.folder.results.read_text()


def test_another_store_is_compared_by_voxels_and_never_replaces_the_own_result(
    run: Path, store: Path, renamed: Path, shell: Shell, tmp_path: Path
) -> None:
    before = saved.find(run)[0].folder.results.read_bytes()
    printed = shell.good("eval", run, f"data.store={renamed}")
    found = saved.find(run)
    own, other = found
    link = RunFolder(run).newest_results
    assert link.is_symlink() and link.resolve() == own.folder.results.resolve()
    assert own.is_own and own.folder.results.read_bytes() == before
    assert not other.is_own and other.dataset.startswith("theirs")

    packed = Store(renamed)
    seen = {scan.digest for scan in trained_on.read(RunFolder(run).trained_on).from_step}
    checksum = {scan.id: scan.checksum for scan in packed.scans}
    split = split_of(other.evaluation)
    expected = sum(checksum[name] in seen for name in split["test"])
    assert expected > 0 and split["test_scans_pretrained_on"] == expected
    assert split["held_out_from_pretraining"] is False
    were = "was" if expected == 1 else "were"
    line = f"at least {expected} of {len(split['test'])} test scans {were} pretrained on"
    assert line in " ".join(printed.split()) and line in split["note"]

    # report and compare show the run's own result, and the other one only when it is asked for
    dice = {one.dataset: one.evaluation.tasks["segmentation"].headline for one in found}
    html = page.write(run).read_text()
    assert f"Evaluated on {own.title}" in html and other.title in html and line in html
    html = page.write(run, "theirs").read_text()
    assert f"Evaluated on {other.title}" in html
    for data, one in (("", own), ("theirs", other)):
        table = compare.read([run], data=data)
        rows = dict(compare.numbers(table))
        shown = f"{dice[one.dataset].values['pretrained']:.3f}"
        assert rows["Segmentation: mean Dice, higher is better"] == [shown]
        assert rows["Evaluated on"] == [one.title]
        assert any(line in note for note in table.notes) == (one is other)
    with pytest.raises(UserError, match=r"--data nowhere: there is no evaluation .* there are: "):
        page.write(run, "nowhere")


def test_a_changed_store_adds_to_the_list_from_its_step_on(
    resolved: Resolved, run: Path, store: Path, renamed: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    words = (*QUICK, "train.steps=6", "data.on_change=rebase")
    longer = config_of(tmp_path, renamed, *words)
    pretrain.train(longer, allow_change=True)
    listed = trained_on.read(RunFolder(copy).trained_on)
    assert set(listed.from_step.values()) == {0, 4}
    assert listed.before(4) == trained_on.read(RunFolder(run).trained_on)
    # the held-out scans of the first store came back under other names
    after = finished.evaluate(copy, [f"data.store={store}"])
    assert after.split.held_out.num_scans == len(after.split.test)


def test_scans_of_abandoned_steps_stay_in_the_list(
    run: Path, store: Path, renamed: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = RunFolder(copy).trained_on
    known = trained_on.read(path).with_store(Store(renamed), range(len(Store(renamed))), 4)
    known.write(path)
    saved_at_2 = RunFolder(copy).checkpoints.step(2).path
    lineage.update(copy, Store(store), [], start=2, saved=saved_at_2, init="")
    assert trained_on.read(path) == known
    assert 4 in known.from_step.values()


def test_a_run_from_another_one_inherits_its_list(run: Path, store: Path, tmp_path: Path) -> None:
    finished.export(run)
    parent = {scan.digest for scan in trained_on.read(RunFolder(run).trained_on).from_step}
    export = RunFolder(run).export
    assert {scan.digest for scan in scans_of_export(export.path).from_step} == parent
    other = store_of(make_archive(tmp_path / "archive", num=2, seed=9), tmp_path)
    for number, init in enumerate((run, export.path)):
        child = config_of(tmp_path / str(number), other, *QUICK, f"train.init={init}")
        pretrain.train(child)
        words = [f"data.store={store}", "eval.test_share=0.8"]
        found = finished.evaluate(child.value.out, words)
        expected = sum(
            scan.checksum in parent for scan in Store(store).scans if scan.id in found.split.test
        )
        assert found.split.held_out.num_scans == expected > 0

    lone = tmp_path / "lone.safetensors"
    shutil.copy(export.weights, lone)
    child = config_of(tmp_path / "lone", other, *QUICK, f"train.init={lone}")
    pretrain.train(child)
    found = finished.evaluate(child.value.out, [f"data.store={store}"])
    assert found.split.held_out.value == "unknown"
    assert "come without a list" in found.split.caveat


def test_a_list_that_is_not_the_one_of_the_card_is_no_evidence(run: Path, tmp_path: Path) -> None:
    finished.export(run, tmp_path / "export")
    trained_on.TrainedOn().write(tmp_path / "export" / RunFolder(run).trained_on.name)
    assert "is not that of its card" in scans_of_export(tmp_path / "export").unknown[0]


def test_a_run_of_an_earlier_version_is_unknown(run: Path, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    RunFolder(copy).trained_on.unlink()
    found = finished.evaluate(copy)
    assert split_of(found)["held_out_from_pretraining"] == "unknown"
    (caveat,) = (line for line in found.lines() if line.startswith("caveat: "))
    assert "kept no list" in caveat
    # resuming it starts a list, which stays incomplete
    pretrain.train(config_of(tmp_path, store, "data.held_out=0.4", *QUICK, "train.steps=6"),
                   allow_change=True)  # fmt: skip
    listed = lineage.scans_of_run(copy, 6)
    assert listed.from_step and "kept no list" in listed.unknown[0]


def test_the_same_data_keeps_its_folder_when_the_store_moves(run: Path, store: Path) -> None:
    own = saved.find(run)[0]
    digest = Store(store).digest
    assert (
        saved.dataset_name(RunFolder(run).evaluations, Path("/elsewhere/Store"), digest)
        == own.dataset
    )
    assert saved.dataset_name(
        RunFolder(run).evaluations, Path("/x/Mine & Yours/store"), "ab" * 16
    ) == ("mine-yours-abababab")
    assert (
        saved.dataset_name(RunFolder(run).evaluations, Path("/store"), "ab" * 16)
        == "store-abababab"
    )


def test_results_of_an_earlier_version_are_not_replaced_by_the_link(
    run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    link = RunFolder(copy).newest_results
    link.unlink()
    link.write_text("earlier")
    saved.link_newest(copy)
    assert link.read_text() == "earlier" and not link.is_symlink()


def test_a_damaged_scan_is_skipped_named_and_counted(
    run: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tapct.eval.scans import labelled_scan
    from tapct.types import Refused

    test = saved.find(run)[0].evaluation.split.test
    real = labelled_scan.read_scan

    def broken(row: Any, root: Path, **options: Any) -> Any:
        if row.id == test[0] and options["with_labels"]:  # without them nothing is read
            raise Refused("truncated", "the file ends early")
        return real(row, root, **options)

    monkeypatch.setattr("tapct.eval.scans.labelled_scan.read_scan", broken)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with pytest.raises(UserError, match=rf"scan {test[0]} cannot be read: truncated"):
        finished.evaluate(copy)
    found = finished.evaluate(copy, ["data.loader.on_error=skip"])
    assert found.split.test == tuple(name for name in test if name != test[0])
    assert [(one.scan, one.side) for one in found.split.unread] == [(test[0], "test")]
    assert f"1 of {len(test)} test scans could not be read" in found.split.caveat
    assert found.tasks["segmentation"].num_test == len(test) - 1
    assert np.isfinite(found.tasks["segmentation"].headline.values["pretrained"])


# A task on whole scans and named points: counts what it was given.
COUNTS = """
from dataclasses import dataclass
from tapct.extend import Headline, Labels, Task, TaskResults

@dataclass(frozen=True)
class Config:
    pass

class Counts(Task):
    labels = Labels.SCAN

    def __init__(self):
        self.given = {}

    def truth(self, scan, grid, in_play_Z):
        self.given[scan.id] = (dict(scan.scan_labels), dict(scan.landmarks_mm), scan.official_side)

    def learn(self, model, dense, truth):
        pass

    def fit(self):
        pass

    def judge(self, model, dense, truth):
        pass

    def results(self):
        given = {scan: list(values) for scan, values in self.given.items()}
        return TaskResults({"pretrained": {"given": given}})

    def headline(self):
        return Headline("scans", {"pretrained": float(len(self.given))}, "higher", "Scans.")

def build(config, *, seed):
    return Counts()
"""


def test_tables_reach_the_tasks_and_the_results_name_no_scan_of_them(
    run: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own_plugin(monkeypatch, tmp_path, "values", COUNTS)
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    archive = store.parent / "archive"
    given = (archive / "scan_labels.csv").read_text().splitlines()
    people = sorted({line.split(",")[1] for line in given[1:]})
    assert len(people) == 4
    side_of = {"patient": "split", **dict(zip(people, ("train", "test", "val", "")))}
    table = [f"{line},{side_of[line.split(',')[1]]}" for line in given]
    (tmp_path / "labels.csv").write_text("\n".join([*table, "gone,,,", ""]))
    num_of = Counter(side_of[line.split(",")[1]] for line in given)
    monkeypatch.setenv("TABLES", str(tmp_path))
    words = ["eval.tasks.segmentation=null", "eval.tasks[mylab.values]={}"]
    words += ["eval.scan_labels=$TABLES/labels.csv", f"eval.landmarks={archive}/landmarks.csv"]
    found = finished.evaluate(copy, words)
    section = found.tasks["mylab.values"]
    assert section.num_test == num_of["test"]
    assert section.num_train == num_of["train"] + num_of["val"]
    of_scan = section.results.models["pretrained"]["given"]
    rows = {row.id: row for row in Store(store).scans}
    for line in csv.DictReader(given):
        (scan_id,) = (row.id for row in rows.values() if row.path == line["path"])
        side = side_of[line["patient"]]
        assert (scan_id in of_scan) == bool(side)
        if not side:
            continue
        values, points, found_side = of_scan[scan_id]
        assert values["phase"] == line["phase"] and values["age_years"] == float(line["age_years"])
        assert points and found_side == side
    printed = capsys.readouterr().out
    assert "scan labels: 6 of 6 scans; unmatched rows: 1 (gone)" in printed
    assert "landmarks: " in printed
    content = saved.find(copy)[0].folder.results.read_text()
    assert len(json.loads(content)["data"]["tables"]) == 32
    assert "gone" not in content and "P0000" not in content and "PHANTOM" not in content
    with pytest.raises(UserError, match="eval.scan_labels: cannot read"):
        finished.evaluate(copy, ["eval.scan_labels=nowhere.csv"])
