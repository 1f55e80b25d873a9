"""What every evaluation task promises: tapct's own, found by their files, and a user's."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryStore
from plugin_cases import cases, examples, user_modules
from tiny_run import own_plugin

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.config.plugins import Plugin
from tapct.eval import runner
from tapct.eval.contract import Task
from tapct.eval.features.dense import BlockFeatures, DenseFeatures, PatchGrid, WindowVectors
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.models.baselines import NamedModel, RawPatches
from tapct.eval.results.json_file import Evaluation, from_json
from tapct.eval.scans.labelled_scan import LabelledScan, TableLabels
from tapct.eval.scans.usable import Labels
from tapct.eval.scores import Headline, TaskResults
from tapct.types import HUContract, LabelMap, Volume

MODELS = ("pretrained", "untrained")
NAMES = ((1, "body"), (2, "liver"), (3, "lungs"))
# landmarks in voxels (z, y, x) of the first scan of a patient
POINTS = {
    "liver": (4.5, 11.5, 13.5), "lungs": (6.5, 21.5, 14.0), "a": (3.0, 8.0, 8.0),
    "b": (8.0, 24.0, 20.0), "c": (5.0, 15.0, 21.0), "d": (9.0, 10.0, 18.0),
}  # fmt: skip
GRID = PatchGrid((2, 4, 4), (12, 32, 32), (12, 32, 32))
WINDOW = (12, 32, 16)  # voxels: two of them cover a scan

# A task on whole scans, as a user writes it: nearest neighbour in the mean class token.
NEAREST = """
from dataclasses import dataclass
import torch
from tapct.extend import Headline, Labels, ScanScore, Task, TaskResults, setting

@dataclass(frozen=True)
class Config:
    label: str = setting("sex", "label to predict")
    power: float = setting(2.0, "exponent of the distance", gt=0)

class Nearest(Task):
    labels = Labels.SCAN

    def __init__(self, config, seed):
        self.config, self.train, self.scores = config, {}, []

    def truth(self, scan, grid, in_play_Z):
        return scan.id, scan.scan_labels[self.config.label]

    def learn(self, model, dense, truth):
        self.train.setdefault(model, []).append((dense.cls_D, truth[1]))

    def fit(self):
        self.known = {m: torch.stack([one[0] for one in rows]) for m, rows in self.train.items()}

    def judge(self, model, dense, truth):
        distance = (self.known[model] - dense.cls_D).abs().pow(self.config.power).sum(1)
        guess = self.train[model][int(distance.argmin())][1]
        value = float(guess == truth[1]) / (1 + float(distance.min()))
        self.scores.append(ScanScore(truth[0], model, value))
        return guess

    def results(self):
        labels = {m: sorted({label for _, label in rows}) for m, rows in self.train.items()}
        return TaskResults({m: {"labels": labels[m]} for m in labels}, tuple(self.scores))

    def headline(self):
        of = {m: [s.value for s in self.scores if s.model == m] for m in self.train}
        values = {m: sum(v) / len(v) for m, v in of.items()}
        return Headline("closeness", values, "higher", "Distance of the nearest.", (0.0, 1.0))

def build(config, *, seed):
    return Nearest(config, seed)
"""
TASKS = (*cases("eval.tasks", "tasks"), "mylab.nearest")


@pytest.fixture(autouse=True)
def users_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example of the docs, and the task above."""
    with user_modules(tmp_path / "examples"):
        own_plugin(monkeypatch, tmp_path, "nearest", NEAREST)
        yield


def scan_of(number: int, *, with_labels: bool = True) -> LabelledScan:
    """Boxes of two organs in a body; even scans are of women, odd ones of men, two per patient."""
    rng = np.random.default_rng(number)
    labels = np.zeros(GRID.original, np.uint16)
    labels[:, 4:28, 4:28] = 1
    # in the second scan of a patient, the organs lie one patch further to the left
    shift = 4 * (number % 2)
    labels[2:8, 8:16, 8 + shift : 20 + shift] = 2
    labels[4:10, 18:26, 6 + shift + number % 3 : 22 + shift] = 3
    hu = np.choose(labels, [-1000, 0, 150, -700]) + rng.normal(0, 20, labels.shape)
    spacing_mm = (3.0, 1.0, 1.0)
    label_map = LabelMap(labels, spacing_mm, names=NAMES) if with_labels else None
    return LabelledScan(
        f"s{number}",
        Volume(hu.astype(np.int16), spacing_mm),
        label_map,
        f"p{number // 2}",
        {
            "sex": "FM"[number % 2],
            "age": str(number // 2 % 2),
            "volume": float(7 * number % 5),
            "mass": float(7 * number % 5) + 2.0 * (number % 2),
        },
        {name: (3.0 * z, y, x + shift) for name, (z, y, x) in POINTS.items()},
    )


def anatomy_of(number: int) -> torch.Tensor:
    """Where each patch lies in the body, as six smooth channels."""
    shape = GRID.shape
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")).float()
    place[2] -= number % 2
    return 3 * torch.cat([(place * math.pi / 8).sin(), (place * math.pi / 8).cos()])


def features_of(scan: LabelledScan, model: str) -> DenseFeatures:
    """Features that know the anatomy, the second model's less well; class tokens that know the
    labels of a scan.
    """
    noise = 0.3 if model == "pretrained" else 1.0
    rng = np.random.default_rng([int(scan.id[1:]), MODELS.index(model)])
    hu = torch.from_numpy(scan.volume.hu_ZYX.astype(np.float32)) / 300
    cells = hu.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).unflatten(0, (-1, 2)).mean((1, 3, 5))
    hu_channels = torch.stack([cells, cells.square(), cells.abs().sqrt()])
    channels = torch.cat([hu_channels, anatomy_of(int(scan.id[1:]))])
    channels = channels + noise * torch.from_numpy(rng.normal(size=channels.shape)).float()
    sex, age = (float(ord(scan.scan_labels[name][0]) % 5) for name in ("sex", "age"))
    known = torch.tensor([sex, age, scan.scan_labels["volume"] / 2])
    cls_noise = 0.05 if model == "pretrained" else 2.0
    cls_D = known + cls_noise * torch.from_numpy(rng.normal(size=3))
    last = block_of(channels, cls_D.float())
    first = block_of(channels.flip(0) * 0.5 + 1, cls_D.float() / 2)
    return DenseFeatures(channels, cls_D.float(), GRID, {0: first, 1: last}, WINDOW)


def block_of(channels_DZYX: torch.Tensor, cls_D: torch.Tensor) -> BlockFeatures:
    """Features of a block with two windows side by side; their registers are two class tokens."""
    flat_DN = channels_DZYX.flatten(1)
    windows = WindowVectors(
        torch.stack([0.8 * cls_D, 1.2 * cls_D]),
        flat_DN.mean(1).expand(2, -1),
        flat_DN.std(1, correction=0).expand(2, -1),
        flat_DN.amax(1).expand(2, -1),
        cls_D.expand(2, 2, -1),
        torch.tensor([[0, 0, 0], [0, 0, WINDOW[2]]]),
    )
    return BlockFeatures(channels_DZYX, windows)


# task -> settings that spare time in all of these tests
QUICK: dict[str, dict[str, Any]] = {
    "registration": {"max_patches": 100, "max_train_pairs": 2},
    "classification": {"C": (0.01, 1.0)},
}


def run(name: str, seed: int = 0, **settings: Any) -> tuple[Task[Any, Any], TaskResults]:
    """Six training scans and four test scans through a task."""
    task, results, _ = run_and_write(name, seed, **settings)
    return task, results


def run_and_write(
    name: str, seed: int = 0, **settings: Any
) -> tuple[Task[Any, Any], TaskResults, list[str]]:
    """The same with the formats of the label maps that the task hands over to be written."""
    settings = QUICK.get(name, {}) | settings
    module = plugins.load("eval.tasks", name)
    task = module.build(module.Config(**settings), seed=seed)
    in_play_Z = np.ones(GRID.shape[0], dtype=bool)
    task.begin(6)
    rows = [Row(f"s{number}", f"p{number // 2}", "", True) for number in range(10)]
    task.expect_scans(rows[:6], rows[6:])
    for number in range(6):
        scan = scan_of(number)
        truth = task.truth(scan, GRID, in_play_Z)
        for model in MODELS:
            task.learn(model, features_of(scan, model), truth)
    task.fit()
    written = []
    for number in range(6, 10):
        scan = scan_of(number)
        truth = task.truth(scan, GRID, in_play_Z)
        for model in MODELS:
            labels = task.label_map(truth, task.judge(model, features_of(scan, model), truth))
            if labels is not None:
                assert labels.labels_ZYX.shape == scan.shape_ZYX
                written.append(task.prediction_format)
    return task, task.results(), written


@pytest.mark.parametrize("name", TASKS)
def test_a_task_builds_from_its_defaults_and_states_its_labels(name: str) -> None:
    module = plugins.load("eval.tasks", name)
    task = module.build(module.Config(), seed=0)
    assert isinstance(task, Task)
    assert isinstance(task.labels, Labels)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_headline_and_numbers_for_every_model_and_scan(name: str) -> None:
    task, results = run(name)
    headline = task.headline()
    assert isinstance(headline, Headline) and headline.metric and headline.meaning.endswith(".")
    models = (*MODELS, *task.own_baselines)
    assert tuple(headline.values) == tuple(results.models) == models
    assert all(math.isfinite(value) for value in headline.values.values())
    if headline.range is not None:
        low, high = headline.range
        values = [*headline.values.values(), *(score.value for score in results.scans)]
        assert all(low <= value <= high for value in values)
    pairs = [(score.scan, score.model) for score in results.scans]
    assert len(pairs) == len(set(pairs)) == 4 * len(models)
    assert set(pairs) == {(f"s{n}", model) for n in range(6, 10) for model in models}
    for one in results.further:
        assert {(score.scan, score.model) for score in one.scans} == set(pairs)
    if results.breakdown is not None:
        assert results.breakdown.title and results.breakdown.row
        assert all(set(row) <= set(models) for row in results.breakdown.values.values())
    json.dumps(results.models, allow_nan=False)
    lead = headline.lead()
    assert lead.baseline in models[1:] and lead.gain > 0  # features of the other one are noisier


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_results(name: str) -> None:
    (one, first), (two, second) = run(name, seed=3), run(name, seed=3)
    assert first == second
    assert one.headline() == two.headline()


@pytest.mark.parametrize("name", TASKS)
def test_a_task_draws_a_picture_or_declares_that_it_does_not(name: str, tmp_path: Path) -> None:
    task, _ = run(name)
    scan = scan_of(6)
    truth = task.truth(scan, GRID, np.ones(GRID.shape[0], dtype=bool))
    predictions = {m: task.judge(m, features_of(scan, m), truth) for m in MODELS}
    caption = task.draw(tmp_path / "new" / "picture.png", truth, predictions)
    assert (tmp_path / "new" / "picture.png").is_file() == bool(caption)
    at = task.slices_of_interest(truth)
    if at is not None:
        assert 0 <= at[0] < GRID.original[0] and 0 <= at[1] < GRID.original[1]


def other_values(field: dataclasses.Field[Any]) -> list[Any]:
    """Values of a setting that are not its default, the likeliest to matter first."""
    default, choices = field.default, field.metadata.get("choices")
    if field.name == "C":
        return [(10.0,)]
    if field.name == "tolerances":
        return [("liver=0",)]
    if field.name == "vectors":
        return [("registers",), ("mask:liver",)]
    if choices and isinstance(default, tuple):
        return [(choice,) for choice in choices if (choice,) != default]
    if choices:
        return [choice for choice in choices if choice != default]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [max(1, default // 400), default * 10]
    if isinstance(default, float):
        limits = (field.metadata.get(key) for key in ("ge", "le"))
        at_limits = [value for value in limits if value not in (None, default)]
        return [*at_limits, default * 1000, default / 1000]
    if isinstance(default, tuple) and "float" in str(field.type):
        return [tuple(value * 100 for value in default)]
    if isinstance(default, tuple) and "int" in str(field.type):
        return [(1, 2)]
    words = [name for _, name in NAMES] + ["age", "volume"]
    return [(word,) for word in words] if isinstance(default, tuple) else words


def setting_names() -> list[tuple[str, str]]:
    """Task and field of all settings, found without importing a user's file."""
    pairs = []
    for name in TASKS:
        if "." in name:
            text = NEAREST if name == "mylab.nearest" else examples()[name]
            pairs += [
                (name, field) for field in re.findall(r"^    (\w+): .* = setting", text, re.M)
            ]
        else:
            fields = dataclasses.fields(plugins.load("eval.tasks", name).Config)
            pairs += [(name, field.name) for field in fields]
    return pairs


SETTINGS = setting_names()
# task -> other settings that make it quick, for all of its settings
QUICK_FITS: dict[str, dict[str, Any]] = {
    "classification": {"C": (0.1,), "vectors": ("cls",), "epochs": 6},
    "regression": {"C": (0.1,), "vectors": ("cls",), "epochs": 6},
}
ONE_MEMBER = {"heads": ("adamw_grid",), "lr": (0.1,), "weight_decay": (0.01,)}
ABMIL = {"heads": ("abmil",), "attention_lr": (0.1,)}
MLP = {"head": "mlp", "steps": 2}
# task -> setting -> other settings without which it has no effect
NEEDED: dict[str, dict[str, dict[str, Any]]] = {
    "segmentation": {
        "lr": MLP,
        "hidden": MLP,
        "head": {"steps": 2},
        "fractions": {"steps": 5},
        "draws": {"fractions": (1,), "steps": 5},
        "prediction_format": {"predictions": True},
        "tolerances": {"surface": True},
    },
    "classification": {
        **dict.fromkeys(
            ("lr", "weight_decay", "batch_size", "warmup_epochs", "epochs"), ONE_MEMBER
        ),
        "heads": ONE_MEMBER,
        **dict.fromkeys(("attention_lr", "hidden", "max_windows"), ABMIL),
        "queries": {"heads": ("efficient",)},
    },
    "regression": {
        **dict.fromkeys(
            ("attention_lr", "hidden", "max_windows", "batch_size", "warmup_epochs", "epochs"),
            ABMIL,
        ),
        "queries": {"heads": ("efficient",)},
    },
    "matching": {"pairs": {"names": ("liver",)}},
}


@functools.cache
def results_with(name: str, settings: tuple[tuple[str, Any], ...]) -> tuple[TaskResults, list[str]]:
    """Results and formats of label maps that many tests compare with."""
    return run_and_write(name, **dict(settings))[1:]


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_every_setting_changes_something(name: str, setting: str) -> None:
    config = plugins.load("eval.tasks", name).Config
    field = next(field for field in dataclasses.fields(config) if field.name == setting)
    needed = {**QUICK_FITS.get(name, {}), **NEEDED.get(name, {}).get(setting, {})}
    base = results_with(name, tuple(needed.items()))
    for value in other_values(field):
        try:
            changed = run_and_write(name, **needed | {setting: value})[1:]
        except (KeyError, UserError):  # a label that no scan has
            continue
        if changed != base:
            return
    pytest.fail(f"{setting} of {name} changes nothing")


# --- through the runner: labels that scans have or lack ---


@dataclasses.dataclass(frozen=True)
class Row:
    id: str
    patient: str
    path: str
    has_labels: bool = False


class Recorder(Task[str, None]):
    """Notes what a task is given."""

    def __init__(self, labels: Labels, log: list[tuple[str, str]]) -> None:
        self.labels = labels
        self.log = log

    def begin(self, num_train: int) -> None:
        self.log.append(("begin", str(num_train)))

    def truth(self, scan: LabelledScan, grid: PatchGrid, in_play_Z: np.ndarray) -> str:
        needs_map = self.labels in (Labels.VOXELS, Labels.PAIRS)
        assert scan.labels is not None or not needs_map
        self.log.append(("truth", scan.id))
        return scan.id

    def learn(self, model: str, dense: DenseFeatures, truth: str) -> None:
        self.log.append((f"learn {model}", truth))

    def fit(self) -> None:
        self.log.append(("fit", ""))

    def judge(self, model: str, dense: DenseFeatures, truth: str) -> None:
        self.log.append((f"judge {model}", truth))

    def results(self) -> TaskResults:
        return TaskResults({})

    def headline(self) -> Headline:
        return Headline("n", {"raw_hu": float(len(self.log))}, "higher", "Calls.")


class Archive:
    """Twelve scans of six patients; four have label maps, three have scan labels."""

    rows = tuple(Row(f"s{n}", f"p{n // 2}", str(n), n in (0, 1, 4, 7)) for n in range(12))
    scan_labels: Mapping[str, Mapping[str, str]] = {
        f"s{n}": {"sex": "FM"[n % 2]} for n in (2, 3, 9)
    }

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.monkeypatch, self.out = monkeypatch, out
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.store = MemoryStore(self.rows, lambda row: scan_of(int(row.path)))

    def evaluate(self, *labels: Labels, **settings: Any) -> Evaluation:
        """One recorder per kind of labels, in one pass."""
        for kind in labels:
            self.logs[kind.value] = []
        tasks = [Plugin(f"mylab_{kind.value}", NoSettings()) for kind in labels]
        logs, real = self.logs, plugins.load

        def load(folder: str, name: str) -> Any:
            if not name.startswith("mylab_"):
                return real(folder, name)
            kind = Labels(name.removeprefix("mylab_"))

            class Module:
                @staticmethod
                def build(config: Any, *, seed: int) -> Recorder:
                    return Recorder(kind, logs[kind.value])

            return Module

        self.monkeypatch.setattr(plugins, "load", load)
        config = runner.Config(tasks=tuple(tasks), num_pictures=1, **settings)
        return runner.evaluate(
            [NamedModel("raw_hu", RawPatches((2, 4, 4)))], self.rows, self.store, config,
            contract=HUContract(), out=self.out, tables=TableLabels(self.scan_labels),
            preprocess=Preprocess((32, 32), (4, 16, 16), (4, 16, 16)),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """A task without settings."""


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Archive:
    return Archive(monkeypatch, tmp_path / "out")


def test_several_tasks_share_one_pass_and_get_the_scans_that_have_their_labels(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = (Labels.VOXELS, Labels.SCAN, Labels.NONE)
    evaluation = archive.evaluate(*kinds)
    seen = {kind: {scan for call, scan in archive.logs[kind] if call == "truth"} for kind in
            ("voxels", "scan", "none")}  # fmt: skip
    assert seen["voxels"] == {"s0", "s1", "s4", "s7"}
    assert seen["scan"] == {"s2", "s3", "s9"}
    assert seen["none"] == {f"s{n}" for n in range(12)}
    # each scan once for its features, and one for its picture
    picture = evaluation.pca[0].scan
    assert sorted(archive.store.reads) == sorted([*(f"s{n}" for n in range(12)), picture])
    assert sorted(archive.store.label_reads) == sorted(seen["voxels"])
    for kind in kinds:
        log, section = archive.logs[kind.value], evaluation.tasks[f"mylab_{kind.value}"]
        calls = [call for call, _ in log]
        fitted = calls.index("fit")
        assert calls[0] == "begin" and log[0][1] == str(section.num_train)
        assert calls[1:fitted].count("learn raw_hu") == section.num_train
        assert calls[fitted:].count("judge raw_hu") == section.num_test
        assert "judge raw_hu" not in calls[:fitted] and "learn raw_hu" not in calls[fitted:]
        assert section.skipped == 12 - len(seen[kind.value])
        assert section.pictures == ()  # a recorder draws none
    sides: dict[str, set[str]] = defaultdict(set)
    for side in ("train", "test"):
        for scan in getattr(evaluation.split, side):
            sides[archive.rows[int(scan[1:])].patient].add(side)
    assert all(len(one) == 1 for one in sides.values())
    assert from_json(json.loads((archive.out / "results.json").read_text())) == evaluation
    printed = capsys.readouterr().out
    assert "mylab_voxels: 8 of 12 scans have no label map and are skipped" in printed
    assert "mylab_scan: 9 of 12 scans have no scan-level label and are skipped" in printed
    assert "mylab_none" not in printed
    assert len(evaluation.pca) == 1 and (archive.out / evaluation.pca[0].file).is_file()


def test_a_task_without_any_scan_is_reported_and_is_an_error_alone(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.monkeypatch.setattr(archive, "scan_labels", {})
    assert list(archive.evaluate(Labels.SCAN, Labels.NONE).tasks) == ["mylab_none"]
    assert "mylab_scan: none of the 12 accepted scans has" in capsys.readouterr().out
    with pytest.raises(
        UserError,
        match=r"mylab_scan: none of the 12 accepted scans has a scan-level label: give a CSV file "
        r"with eval.scan_labels=FILE.csv",
    ):
        archive.evaluate(Labels.SCAN)
    archive.monkeypatch.setattr(archive, "rows", archive.rows[8:])
    with pytest.raises(
        UserError, match=r"none of the 4 accepted.*label map.*NAME_seg.nii.gz.*--labels DIR"
    ):
        archive.evaluate(Labels.VOXELS)


def test_pairs_are_label_maps_of_one_patient_on_one_side(archive: Archive) -> None:
    evaluation = archive.evaluate(Labels.NONE, Labels.VOXELS, seed=1)
    assert list(evaluation.tasks) == ["mylab_none", "mylab_voxels"]
    pairs = {scan for call, scan in archive.logs["voxels"] if call == "truth"}
    assert {"s0", "s1"} <= pairs
    with pytest.raises(UserError, match="its scans are of one patient"):
        archive.evaluate(Labels.PAIRS)  # s0 and s1 alone have a second scan with a label map
    assert archive.logs["pairs"] == []


def test_a_task_with_one_side_only_is_one_line(archive: Archive) -> None:
    with pytest.raises(UserError, match=r"task mylab_voxels has \d training and \d test scans"):
        archive.evaluate(Labels.NONE, Labels.VOXELS, max_scans=2, seed=1)


def test_what_is_no_task_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = NEAREST.replace("class Nearest(Task):", "class Nearest:")
    own_plugin(monkeypatch, tmp_path / "other", "nearest", text)
    plugin = Plugin("mylab.nearest", plugins.load("eval.tasks", "mylab.nearest").Config())
    models = [NamedModel("raw_hu", RawPatches((2, 4, 4)))]
    config = runner.Config(
        tasks=(plugin,), preprocess=Preprocess((32, 32), (4, 16, 16), (4, 16, 16))
    )
    with pytest.raises(
        UserError, match=r"mylab.nearest: build\(\) returned a Nearest.*tapct.extend.Task"
    ):
        runner.evaluate(
            models, Archive.rows, Path("."), config, contract=HUContract(), out=tmp_path
        )
    with pytest.raises(UserError, match="eval.tasks has no task"):
        runner.evaluate(
            models, Archive.rows, Path("."), dataclasses.replace(config, tasks=()),
            contract=HUContract(), out=tmp_path,
        )  # fmt: skip


def test_tasks_on_pairs_of_scans_get_them_through_the_runner(tmp_path: Path) -> None:
    """Scans of one patient follow one another, so that pictures of the first pair are drawn."""
    rows = tuple(Row(f"s{n}", f"p{n // 2}", str(n), True) for n in range(10))
    store = MemoryStore(rows, lambda row: scan_of(int(row.path)))
    landmarks = {row.id: scan_of(int(row.path)).landmarks_mm for row in rows}
    names = ("matching", "registration")
    tasks = tuple(Plugin(name, plugins.load("eval.tasks", name).Config()) for name in names)
    evaluation = runner.evaluate(
        [NamedModel("raw_hu", RawPatches((2, 4, 4)))], rows, store,
        runner.Config(tasks=tasks, num_pictures=2), contract=HUContract(), out=tmp_path,
        tables=TableLabels(landmarks=landmarks),
        preprocess=Preprocess((32, 32), (4, 16, 16), (4, 16, 16)),
    )  # fmt: skip
    test = evaluation.split.test
    assert [int(scan[1:]) // 2 for scan in test[::2]] == [int(s[1:]) // 2 for s in test[1::2]]
    for name, models in zip(names, (["raw_hu"], ["raw_hu", "identity"]), strict=True):
        section = evaluation.tasks[name]
        assert list(section.headline.values) == list(section.results.models) == models
        assert {score.scan for score in section.results.scans} == set(test)
        assert [picture.scan for picture in section.pictures] == [test[1]]
        assert (tmp_path / section.pictures[0].file).is_file()
    assert from_json(json.loads((tmp_path / "results.json").read_text())) == evaluation
    with pytest.raises(UserError, match="identity is a baseline of its own"):
        runner.evaluate(
            [NamedModel("identity", RawPatches((2, 4, 4)))], rows, store,
            runner.Config(tasks=tasks[1:]), contract=HUContract(), out=tmp_path,
            preprocess=Preprocess((32, 32), (4, 16, 16), (4, 16, 16)),
        )  # fmt: skip


def test_a_task_without_a_result_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tuple(Row(f"s{n}", f"p{n}", str(n), True) for n in range(6))
    store = MemoryStore(rows, lambda row: scan_of(int(row.path)))
    why = "no two test scans of a pair have an organ in common"

    def fail(self: Any) -> Any:
        raise UserError(f"task patch_knn: {why}")

    module: Any = plugins.load("eval.tasks", "patch_knn")
    monkeypatch.setattr(module.PatchKnn, "results", fail)
    names = ("patch_knn", "segmentation")
    tasks = tuple(Plugin(name, plugins.load("eval.tasks", name).Config()) for name in names)

    def evaluate(*tasks: Plugin) -> Evaluation:
        return runner.evaluate(
            [NamedModel("raw_hu", RawPatches((2, 4, 4)))], rows, store,
            runner.Config(tasks=tasks), contract=HUContract(), out=tmp_path,
            preprocess=Preprocess((32, 32), (4, 16, 16), (4, 16, 16)),
        )  # fmt: skip

    evaluation = evaluate(*tasks)
    assert list(evaluation.tasks) == ["segmentation"]
    assert evaluation.without_result == {"patch_knn": why}
    assert f"no result of patch_knn: {why}" in evaluation.lines()
    assert from_json(json.loads((tmp_path / "results.json").read_text())) == evaluation
    with pytest.raises(UserError, match="have an organ in common"):
        evaluate(tasks[0])


@pytest.mark.parametrize("name", ["matching", "registration"])
def test_the_page_names_every_number_of_a_task_on_pairs(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.split(f"### Numbers of {name}\n")[1].split("\n## ")[0].split("\n### ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    numbers = results_with(name, ())[0].models
    assert named == set(numbers["pretrained"])
    if name == "registration":
        last_four = {"num_correspondences", "num_failed", "transform", "block", "choice"}
        assert set(numbers["identity"]) == named - last_four
