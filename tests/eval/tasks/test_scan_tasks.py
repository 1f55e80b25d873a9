"""Classification, regression and kNN of whole scans: what is chosen, measured and reported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryStore

from tapct.base.exits import UserError
from tapct.config.plugins import Plugin
from tapct.eval import runner
from tapct.eval.contract import Task
from tapct.eval.features.dense import BlockFeatures, DenseFeatures, PatchGrid, WindowVectors
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.heads import neighbours
from tapct.eval.metrics.prediction_statistics import ScanPredictions
from tapct.eval.models.baselines import RawPatches
from tapct.eval.models.evaluated import NamedModel
from tapct.eval.results.json_file import from_json
from tapct.eval.scans.labelled_scan import LabelledScan, TableLabels
from tapct.eval.tasks import classification, knn, regression
from tapct.types import HUContract, LabelMap, Volume

GRID = PatchGrid((2, 4, 4), (4, 16, 16), (4, 16, 16))  # 2 x 4 x 4 patches
NAMES = ((1, "liver"),)


@dataclass(frozen=True)
class Case:
    """One synthetic scan.

    Args:
        number: number of the scan; two scans per patient.
        labels: values for the scan as a whole.
        features: changed features, (channel, patch) -> value that is added.
        cls: added to the class token.
        side: official side.
        has_liver: whether it has a label map with a liver, in the first patch.
    """

    number: int
    labels: Mapping[str, Any]
    features: Mapping[tuple[int, int], float] | None = None
    cls: float = 0.0
    side: str = ""
    has_liver: bool = False

    def scan(self) -> LabelledScan:
        labels = np.zeros(GRID.original, np.uint16)
        labels[:2, :4, :4] = 1
        spacing_mm = (1.0, 1.0, 1.0)
        return LabelledScan(
            f"s{self.number:02}",
            Volume(np.zeros(GRID.original, np.int16), spacing_mm),
            LabelMap(labels, spacing_mm, names=NAMES) if self.has_liver else None,
            f"p{self.number // 2}",
            self.labels,
            official_side=self.side,
        )

    def dense(self) -> DenseFeatures:
        rng = np.random.default_rng(self.number)
        patches_DN = rng.normal(0, 0.5, size=(3, 32))
        for (channel, patch), value in (self.features or {}).items():
            patches_DN[channel, patch] += value
        features_DZYX = torch.from_numpy(patches_DN).float().unflatten(1, GRID.shape)
        cls_D = torch.from_numpy(rng.normal(size=3) + [self.cls, 0, 0]).float()
        windows = WindowVectors(
            cls_D[None],
            features_DZYX.flatten(1).mean(1)[None],
            features_DZYX.flatten(1).std(1, correction=0)[None],
            features_DZYX.flatten(1).amax(1)[None],
            torch.zeros(1, 0, 3),
            torch.zeros(1, 3, dtype=torch.int64),
        )
        return DenseFeatures(features_DZYX, cls_D, GRID, {0: BlockFeatures(features_DZYX, windows)})


def run(task: Task[Any, Any], train: Sequence[Case], test: Sequence[Case]) -> dict[str, Any]:
    """One model through a task; returns what results.json holds of it."""
    in_play_Z = np.ones(GRID.shape[0], dtype=bool)
    task.begin(len(train))
    for case in train:
        task.learn("pretrained", case.dense(), task.truth(case.scan(), GRID, in_play_Z))
    task.fit()
    for case in test:
        task.judge("pretrained", case.dense(), task.truth(case.scan(), GRID, in_play_Z))
    entry = dict(task.results().models["pretrained"])
    json.dumps(entry, allow_nan=False)
    return entry


def lesions(numbers: range) -> list[Case]:
    """A lesion lights up one channel in one patch: its mean over the scan is within the noise, its
    maximum is not. The habitus moves the class token.
    """
    cases = []
    for number in numbers:
        rng = np.random.default_rng([1, number])
        has_lesion, is_obese = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
        where = {(1, int(rng.integers(32))): 4.0} if has_lesion else {}
        labels = {"lesion": has_lesion, "obese": is_obese}
        cases.append(Case(number, labels, where, 4.0 * is_obese))
    return cases


FEW_C = {"C": (0.1, 10.0)}


def test_a_focal_target_chooses_the_maximum_and_a_diffuse_one_the_class_token() -> None:
    config = classification.Config(vectors=("cls", "mean", "mean_std_max"), **FEW_C)
    entry = run(classification.build(config, seed=0), lesions(range(40)), lesions(range(40, 60)))
    focal, diffuse = entry["targets"]["lesion"], entry["targets"]["obese"]
    assert focal["chosen"]["vector"] == "mean_std_max" and diffuse["chosen"]["vector"] == "cls"
    assert focal["auroc"] > 0.95 and diffuse["auroc"] > 0.95
    assert entry["auroc"] == pytest.approx((focal["auroc"] + diffuse["auroc"]) / 2)
    assert [row["vector"] for row in focal["table"]] == ["cls", "mean", "mean_std_max"]
    assert [row["chosen"] for row in focal["table"]] == [False, False, True]
    assert focal["table"][2]["auroc"] == focal["auroc"] > focal["table"][1]["auroc"]
    assert focal["num_train"] == 40 and focal["num_test"] == 20


def test_metrics_equal_scikit_learn_on_the_predictions_in_the_results(tmp_path: Path) -> None:
    from sklearn import metrics

    task = classification.build(classification.Config(vectors=("cls",), **FEW_C), seed=0)
    entry = run(task, lesions(range(40)), lesions(range(40, 60)))
    section = entry["targets"]["obese"]
    rows = list(section["predictions"].values())
    truth = [row["truth"] == "yes" for row in rows]
    score = [row["probabilities"][1] for row in rows]
    assert section["classes"] == ["no", "yes"]
    assert section["auroc"] == pytest.approx(metrics.roc_auc_score(truth, score))
    assert section["auprc"] == pytest.approx(metrics.average_precision_score(truth, score))
    assert section["brier"] == pytest.approx(metrics.brier_score_loss(truth, score), abs=1e-5)
    predicted = np.array(score) >= 0.5
    balanced = metrics.balanced_accuracy_score(truth, predicted)
    assert section["balanced_accuracy"] == pytest.approx(balanced)
    assert sum(section["calibration"]["count"]) == 20
    of_scan = {row.scan: row for row in task.results().scans}
    for scan, row in section["predictions"].items():
        own = row["probabilities"][row["truth"] == "yes"]
        assert of_scan[scan].parts["obese"] == pytest.approx(own, abs=1e-5)
    given = task.scan_predictions("obese")
    assert isinstance(given, ScanPredictions) and given.are_classes
    assert given.scores["pretrained"].shape == (1, 20)
    assert task.draw_results(tmp_path / "new" / "all.png").startswith("calibration")
    assert (tmp_path / "new" / "all.png").stat().st_size > 1000


def test_unknown_values_and_unseen_classes_are_left_out_and_counted() -> None:
    train = [
        Case(n, {"phase": "ab"[n % 2]} if n < 16 else {}, cls=3.0 * (n % 2)) for n in range(20)
    ]
    test = [Case(n, {"phase": "ab"[n % 2]}, cls=3.0 * (n % 2)) for n in range(20, 28)]
    test += [Case(28, {"phase": "c"}), Case(29, {})]
    task = classification.build(classification.Config(vectors=("cls",), **FEW_C), seed=0)
    section = run(task, train, test)["targets"]["phase"]
    assert (section["num_train"], section["num_test"], section["num_unseen"]) == (16, 8, 1)
    rows = {row.scan: row for row in task.results().scans}
    assert set(rows) == {f"s{n}" for n in range(20, 30)}
    assert np.isnan(rows["s29"].value) and rows["s29"].parts == {}


def test_a_target_without_a_test_scan_has_no_metric() -> None:
    train = [Case(n, {"a": "xy"[n % 2], "b": "xy"[n % 2]}, cls=3.0 * (n % 2)) for n in range(16)]
    test = [Case(n, {"a": "xy"[n % 2]}, cls=3.0 * (n % 2)) for n in range(16, 24)]
    task = classification.build(classification.Config(vectors=("cls",), **FEW_C), seed=0)
    sections = run(task, train, test)["targets"]
    assert (sections["b"]["auroc"], sections["b"]["num_test"]) == (None, 0)
    assert task.headline().values == {"pretrained": sections["a"]["auroc"]}
    assert "left out: b (fewer than two values in the test scans)" in task.headline().mean_of


def test_several_classes_have_probabilities_that_add_up() -> None:
    cases = [Case(n, {"phase": "abc"[n % 3]}, cls=4.0 * (n % 3)) for n in range(36)]
    task = classification.build(classification.Config(vectors=("cls",), **FEW_C), seed=0)
    section = run(task, cases[:24], cases[24:])["targets"]["phase"]
    assert section["classes"] == ["a", "b", "c"]
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
               for row in section["predictions"].values())  # fmt: skip
    assert section["auroc"] > 0.8


def test_official_validation_scans_make_the_choice() -> None:
    cases = [
        Case(n, {"x": bool(n % 2)}, cls=3.0 * (n % 2), side="val" if n < 8 else "train")
        for n in range(24)
    ]
    task = classification.build(classification.Config(vectors=("cls",), **FEW_C), seed=0)
    section = run(task, cases, [Case(n, {"x": bool(n % 2)}) for n in range(24, 28)])["targets"]["x"]
    assert section["chosen_by"] == "8 validation scans of the official split"


def test_a_vector_inside_an_organ_sees_what_is_in_it() -> None:
    def cases(numbers: range) -> list[Case]:
        return [
            Case(
                n,
                {"fat": bool(n // 2 % 2)},
                {(2, 0): 3.0 * (n // 2 % 2), (2, 9): 8.0 * np.sin(n)},
                has_liver=n != 5,
            )
            for n in numbers
        ]

    config = classification.Config(vectors=("mean", "registers", "mask:liver"), **FEW_C)
    task = classification.build(config, seed=0)
    assert task.needs_label_map
    section = run(task, cases(range(24)), cases(range(24, 36)))["targets"]["fat"]
    assert section["chosen"]["vector"] == "mask:liver" and section["chosen"]["num_filled"] == 1
    assert section["left_out"] == ["registers of last"]
    assert section["auroc"] > 0.9
    wrong = classification.build(classification.Config(vectors=("mask:spleen",)), seed=0)
    with pytest.raises(UserError, match="names 'mask:spleen', but no training scan has"):
        run(wrong, cases(range(4)), [])


def test_numbers_are_predicted_and_measured_as_by_scikit_learn() -> None:
    from sklearn.metrics import mean_absolute_error, r2_score

    rng = np.random.default_rng(3)
    cases = [Case(n, {"age": 60 + 10 * x, "sex": "F"}, cls=3 * x)
             for n, x in enumerate(rng.normal(size=50).tolist())]  # fmt: skip
    task = regression.build(regression.Config(C=(1e-3, 0.1, 10.0)), seed=0)
    entry = run(task, cases[:36], cases[36:])
    section = entry["targets"]["age"]
    truth, predicted = np.array(
        [(row["truth"], row["predicted"]) for row in section["predictions"].values()]
    ).T
    assert section["r2"] == pytest.approx(r2_score(truth, predicted), abs=1e-4)
    assert section["mae"] == pytest.approx(mean_absolute_error(truth, predicted), abs=1e-3)
    assert section["r2"] > 0.6 and section["chosen"]["vector"] in ("cls", "cls_mean")
    assert "left out: sex (is a category" in task.headline().mean_of
    assert list(entry["targets"]) == ["age"]


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (regression, {"targets": ("phase",)}, "targets: phase is a category"),
        (regression, {}, "task regression has no suitable target.*phase is a category"),
        (classification, {"targets": ("same",)}, "targets: same has one class in the training"),
        (classification, {"C": ()}, "eval.tasks.classification.C is empty"),
        (classification, {"vectors": ("largest",)}, "vectors has 'largest', which is none of"),
        (classification, {"vectors": ("registers",)}, "model pretrained has none of registers"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(module, settings, message) -> None:
    cases = [Case(n, {"phase": "ab"[n % 2], "same": True}) for n in range(6)]
    with pytest.raises(UserError, match=message):
        run(module.build(module.Config(**settings), seed=0), cases, [])


@pytest.mark.parametrize(
    ("module", "settings", "train", "test", "message"),
    [
        (classification, {}, ["a", "b", "a"], ["a", "a"], "(finding)"),
        # an unseen class is not learned, so one class is left
        (classification, {}, ["a", "b", "a"], ["a", "c"], "(finding)"),
        (knn, {}, ["a", "b", "a"], ["b"], "(finding)"),
        (regression, {"targets": ("finding",)}, [1.0, 2.0, 3.0], [2.0, 2.0], "(finding)"),
        (classification, {}, ["a", "b", "a"], ["a", "b"], ""),
        (regression, {"targets": ("finding",)}, [1.0, 2.0, 3.0], [2.0, 2.5], ""),
    ],
)
def test_test_scans_of_one_value_are_refused_before_features_are_computed(
    module: Any, settings: dict[str, Any], train: list[Any], test: list[Any], message: str
) -> None:
    task = module.build(module.Config(**settings), seed=0)
    values = [[{"finding": value} for value in side] for side in (train, test)]
    if not message:
        task.expect_values(*values)
        return
    with pytest.raises(UserError, match="fewer than two different values in the test scans") as it:
        task.expect_values(*values)
    assert message in str(it.value) and f"eval.tasks.{task.name}=null" in str(it.value)


@pytest.mark.parametrize(
    ("module", "settings", "train", "message"),
    [
        (classification, {}, ["a", "a", "a"], "no suitable target.*finding has one class"),
        (classification, {}, [1.0, 2.0, 3.0], "finding is a number, for the task regression"),
        (knn, {"targets": ("finding",)}, ["a", "a", "a"], "targets: finding has one class"),
        (regression, {}, [True, False, True], "finding is true or false"),
        (regression, {}, [2.0, 2.0, 2.0], "finding has fewer than 3 different values"),
    ],
)
def test_training_scans_without_a_suitable_target_are_refused_before_features_are_computed(
    module: Any, settings: dict[str, Any], train: list[Any], message: str
) -> None:
    task = module.build(module.Config(**settings), seed=0)
    values = [{"finding": value} for value in train]
    with pytest.raises(UserError, match=message):
        task.expect_values(values, values)


def test_knn_votes_and_retrieves_as_a_loop_does() -> None:
    cases = [Case(n, {"x": bool(n % 2)}, cls=2.5 * (n % 2)) for n in range(30)]
    config = knn.Config(vectors=("cls",), scaling=("raw",), k=(3, 200))
    section = run(knn.build(config, seed=0), cases[:20], cases[20:])["targets"]["x"]
    known = np.stack([case.dense().cls_D.numpy() for case in cases[:20]])
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    label = np.arange(20) % 2
    k = int(section["chosen"]["settings"]["k"])
    precisions = []
    for case in cases[20:]:
        query = case.dense().cls_D.numpy()
        cosine = known @ (query / np.linalg.norm(query))
        order = np.argsort(-cosine)
        weight = np.exp(cosine[order[:k]] / 0.07)
        expected = (weight * label[order[:k]]).sum() / weight.sum()
        own = section["predictions"][f"s{case.number}"]["probabilities"][1]
        assert own == pytest.approx(expected, abs=1e-4)
        precisions.append(neighbours.average_precision(label[order] == case.number % 2))
    retrieval = section["retrieval"]
    assert retrieval["mean_average_precision"] == pytest.approx(np.mean(precisions))
    assert retrieval["precision_at"]["200"] == retrieval["by_chance"] == 0.5
    assert [row["settings"]["k"] for row in section["table"]] == [3, 200]


def test_neighbours_of_the_same_patient_do_not_choose_k() -> None:
    # both scans of a patient are alike and of one class; other patients know nothing of it
    rng = np.random.default_rng(0)
    cases = [Case(n, {"x": bool(x)}) for n, x in enumerate(np.repeat(rng.permutation(16) % 2, 2))]
    twins = {case.number: Case(case.number // 2 * 2, {}).dense() for case in cases}
    task = knn.build(knn.Config(vectors=("mean",), k=(1,)), seed=0)
    in_play_Z = np.ones(GRID.shape[0], dtype=bool)
    for case in cases:
        task.learn("m", twins[case.number], task.truth(case.scan(), GRID, in_play_Z))
    task.fit()
    assert task.choices["m"]["x"].chosen.validation < 0.8  # 1.0 with the twin as a neighbour


@dataclass(frozen=True)
class Row:
    id: str
    patient: str
    path: str
    has_labels: bool = True


def test_an_evaluation_with_scan_labels_and_a_mask(tmp_path: Path) -> None:
    def scan_of(row: Row) -> LabelledScan:
        number = int(row.path)
        rng = np.random.default_rng(number)
        hu_ZYX = rng.normal(0, 30, GRID.original) + 200 * (number % 2)
        case = Case(number, {}, has_liver=True).scan()
        return LabelledScan(row.id, Volume(hu_ZYX.astype(np.int16), (1.0, 1.0, 1.0)), case.labels,
                            row.patient)  # fmt: skip

    rows = [Row(f"s{n:02}", f"p{n}", str(n), n % 5 != 0) for n in range(16)]
    store = MemoryStore(rows, scan_of)
    values = {f"s{n:02}": {"dense": bool(n % 2), "hu": 200.0 * (n % 2) + n} for n in range(16)}
    tasks = (
        Plugin("classification", classification.Config(vectors=("mean", "mask:liver"), **FEW_C)),
        Plugin("regression", regression.Config(vectors=("mean",))),
        Plugin("knn", knn.Config(vectors=("mean",), k=(3,))),
    )
    evaluation = runner.evaluate(
        [NamedModel("raw_hu", RawPatches((2, 4, 4)))], store.scans, store,
        runner.Config(tasks=tasks, num_pictures=1), contract=HUContract(), out=tmp_path / "out",
        tables=TableLabels(values), preprocess=Preprocess((16, 16), (4, 16, 16), (4, 16, 16)),
    )  # fmt: skip
    for name in ("classification", "regression", "knn"):
        assert evaluation.tasks[name].headline.values["raw_hu"] > 0.9
    assert set(store.label_reads) == {row.id for row in rows if row.has_labels}
    (picture,) = evaluation.tasks["classification"].pictures
    assert picture.scan == "" and (tmp_path / "out" / picture.file).is_file()
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert from_json(content).tasks["knn"] == evaluation.tasks["knn"]
