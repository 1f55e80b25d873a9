"""NSD and HD95 of the segmentation task are those of the predictions that it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
from memory_store import MemoryStore
from torso_scans import PREPROCESS, VIT, Row, segmentation, torso, torso_of

from tapct.config.plugins import Plugin, load
from tapct.eval import runner
from tapct.eval.metrics.surface import surface_score
from tapct.eval.metrics.tolerances import tolerance_of
from tapct.eval.models.baselines import with_baselines
from tapct.eval.organs.surface_scores import Surfaces
from tapct.eval.results.json_file import Evaluation
from tapct.types import IGNORE_LABEL, HUContract

LABELS = {"liver": 2, "lungs": 3}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    out = tmp_path_factory.mktemp("surfaces")
    models = with_baselines(load("models", "vit").build(VIT), Plugin("vit", VIT), 0, ("raw_hu",))
    store = MemoryStore([Row(f"s{n}", f"p{n}", str(n)) for n in range(4)], torso_of)
    config = runner.Config(
        num_pictures=0, baselines=("raw_hu",), tasks=segmentation(surface=True, predictions=True)
    )
    evaluation = runner.evaluate(
        models, store.scans, store, config, contract=HUContract(), out=out, preprocess=PREPROCESS
    )
    return evaluation, out


def test_the_written_predictions_have_the_scores_of_the_results(
    found: tuple[Evaluation, Path],
) -> None:
    evaluation, out = found
    section = evaluation.tasks["segmentation"]
    nsd, hd95 = section.results.further
    assert (nsd.metric, hd95.metric) == ("mean NSD", "mean HD95")
    assert "lungs 2.42 mm (Nikolov" in nsd.meaning and "liver 5 mm (FLARE22)" in nsd.meaning
    checked = 0
    for dice_row, nsd_row, hd95_row in zip(
        section.results.scans, sorted_like(section.results.scans, nsd.scans),
        sorted_like(section.results.scans, hd95.scans), strict=True,
    ):  # fmt: skip
        scan, model = dice_row.scan, dice_row.model
        place = out / "predictions" / "segmentation" / model
        image = nibabel.load(place / f"{scan}.nii.gz")
        predicted_ZYX = np.asarray(image.dataobj).transpose(2, 1, 0)
        truth = torso(int(scan[1:]))
        truth_ZYX = truth.label_map.labels_ZYX
        assert np.allclose(np.abs(image.affine).sum(0)[:3], truth.spacing_mm[::-1])
        names = json.loads((place / "labels.json").read_text())
        assert names == {"1": "body", "2": "liver", "3": "lungs"}
        for organ, label in LABELS.items():
            mask, true = predicted_ZYX == label, truth_ZYX == label
            assert dice_row.parts[organ] == pytest.approx(
                2 * (mask & true).sum() / (mask.sum() + true.sum())
            )
            score = surface_score(
                truth_ZYX, predicted_ZYX, label, truth.spacing_mm, tolerance_of(organ).mm
            )
            assert nsd_row.parts[organ] == pytest.approx(score.nsd)
            assert hd95_row.parts[organ] == pytest.approx(score.hd95_mm)
            checked += 1
        assert nsd_row.value == pytest.approx(np.mean(list(nsd_row.parts.values())))
    assert checked == 2 * 2 * len(evaluation.split.test)


def sorted_like(order, rows):
    """The rows in the order of others."""
    by_key = {(row.scan, row.model): row for row in rows}
    return [by_key[row.scan, row.model] for row in order]


def test_they_are_in_the_statistics_and_in_the_table(found: tuple[Evaluation, Path]) -> None:
    evaluation, out = found
    text = (out / "results.csv").read_text()
    assert ",lungs,mean NSD,all," in text and ",liver,mean HD95,s" in text
    lines = "\n".join(evaluation.lines())
    assert "mean HD95 (lower is better): 95th percentile" in lines


def test_the_rule_for_empty_organs() -> None:
    truth_ZYX = np.zeros((4, 10, 12), np.uint16)
    truth_ZYX[1:3, 2:6, 2:6] = 2
    truth_ZYX[:, :, 9:] = IGNORE_LABEL
    prediction_ZYX = np.zeros_like(truth_ZYX)
    prediction_ZYX[1, 7, 3] = 3
    prediction_ZYX[1, 3, 10] = 4  # where nobody has labelled
    surfaces = Surfaces()
    classes = {"missed": 2, "invented": 3, "unseen": 4}
    surfaces.add("a", "s0", truth_ZYX, prediction_ZYX, classes, (3.0, 1.0, 1.0))
    nsd, hd95 = surfaces.metrics()
    assert nsd.scans[0].parts == {"missed": 0.0}
    assert hd95.scans[0].parts == {"missed": pytest.approx(math.hypot(12, 10, 12))}
    assert surfaces.invented == {"a": {"invented": 1}}
    surfaces.add("a", "s1", np.zeros_like(truth_ZYX), prediction_ZYX, classes, (3.0, 1.0, 1.0))
    assert math.isnan(surfaces.metrics()[0].scans[1].value)
    assert surfaces.invented == {"a": {"invented": 2, "unseen": 1}}
