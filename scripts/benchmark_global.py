"""Compare vectors and heads on labels of whole scans, on a synthetic archive of many patients.

One table per label: a diffuse one is visible in every part of the scan (subcutaneous fat, phase of
the contrast agent), a focal one in a small part (a lesion in a kidney, the side of the largest
lesion in the lungs). Each row is a vector and a head; its block, scaling and settings are chosen on
validation patients, and the rows are sorted by the value there. Columns: validation, pretrained,
untrained, and their paired difference, with 95 % intervals over patients; mean over seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import arguments
import benchmark_hn
import benchmark_table
import numpy as np
from benchmark_table import MetricTable, Run

from tapct.base import console
from tapct.base.files import write_atomically
from tapct.data.packed.store import Store
from tapct.data.phantom import archive as phantom
from tapct.eval.metrics import prediction_statistics, scan_level
from tapct.eval.metrics.prediction_statistics import PredictedScans
from tapct.eval.results import seed_statistics
from tapct.eval.results.seed_statistics import RunSection
from tapct.eval.results.task_statistics import MetricStatistics
from tapct.eval.scores import OWN_MODEL
from tapct.eval.statistics import ModelValue, Statistics

CONFIG = Path("configs/phantom_global.yaml")
# one small scan per patient
PHANTOM = phantom.Config(
    num=300,
    slices=(32, 48),
    in_plane=(128, 128),
    slice_mm=(4.0, 5.0),
    dicom_share=0.0,
    followup_share=0.0,
)
UNTRAINED = "untrained"
# label -> kind
LABELS = {
    "subcutaneous_fat_mm": "diffuse: habitus",
    "phase": "diffuse: phase of the contrast agent",
    "kidney_lesion": "focal: a small lesion is present",
    "lung_lesion_side": "focal: side of the largest lesion",
}


@dataclass(frozen=True)
class Row:
    """One vector and head on one label.

    Args:
        label: target.
        vector: name of the vector.
        head: name of the head.
        metric: `AUROC` or `R^2`.
        validation: value of the pretrained model on the validation scans, mean over seeds.
        found: statistics over seeds on the test scans; the reference is the pretrained model.
    """

    label: str
    vector: str
    head: str
    metric: str
    validation: float
    found: Statistics


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/benchmark_global.py", description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, help="config, default %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/phantom_global"),
        help="folder of all runs, default %(default)s",
    )
    parser.add_argument(
        "--scans",
        type=arguments.positive,
        default=PHANTOM.num,
        help="scans, each of another patient, default %(default)s; below 100, most labels have no "
        "interval",
    )
    benchmark_hn.add_options_of_runs(parser)
    return parser.parse_args(arguments.overrides_first(words))


def main(words: list[str]) -> None:
    options = options_of(words)
    data = replace(PHANTOM, num=options.scans)
    runs = benchmark_hn.all_runs(data, options)
    patient_of = {scan.id: scan.patient for scan in Store(options.out / "data" / "store").scans}
    rows = rows_of(runs, patient_of)
    text = markdown(rows, runs)
    console.say(text)
    write_atomically(options.out / "table.md", text + "\n")
    file = options.csv or options.out / "results.csv"
    tables = [MetricTable(row.label, _metric_of(row), {}) for row in rows]
    benchmark_table.write_csv(file, "python scripts/benchmark_global.py", tables, runs)
    console.say(f"one row per number: {file}")


def _metric_of(row: Row) -> MetricStatistics:
    return MetricStatistics(f"{row.metric} of {row.vector}, {row.head}", "higher", row.found)


def rows_of(runs: Sequence[Run], patient_of: Mapping[str, str]) -> list[Row]:
    """The rows of all labels, the best one on the validation scans first.

    Args:
        runs: one run per seed.
        patient_of: scan ID -> patient.
    """
    rows = []
    for label in LABELS:
        found = []
        for (vector, head), sections in _chosen(runs, label).items():
            row = _row(label, vector, head, sections, patient_of)
            if row is not None:
                found.append(row)
        rows += sorted(found, key=lambda row: -row.validation)
    return rows


def _chosen(runs: Sequence[Run], label: str) -> dict[tuple[str, str], list[RunSection]]:
    """Vector and head -> results of each run that hold the predictions of that pair alone."""
    pairs: dict[tuple[str, str], list[RunSection]] = {}
    for run in runs:
        for section in run.evaluation.tasks.values():
            best: dict[tuple[str, str], dict[str, Any]] = {}
            for model, numbers in section.results.models.items():
                entry = numbers.get("targets", {}).get(label, {})
                for one in entry.get("table", ()):
                    chosen = best.setdefault((one["vector"], one["head"]), {})
                    if model not in chosen or _validation(one) > _validation(chosen[model]):
                        chosen[model] = {**one, "classes": entry.get("classes", ())}
            for pair, of_model in best.items():
                models = {model: {"targets": {label: one}} for model, one in of_model.items()}
                results = replace(section.results, models=models)
                own = RunSection(run.seed, replace(section, results=results))
                pairs.setdefault(pair, []).append(own)
    return pairs


def _validation(candidate: Mapping[str, Any]) -> float:
    value = candidate["validation"]
    return -math.inf if value is None else float(value)


def _row(
    label: str,
    vector: str,
    head: str,
    sections: Sequence[RunSection],
    patient_of: Mapping[str, str],
) -> Row | None:
    """Statistics of one vector and head; None where the pretrained model has no prediction."""
    entries = [one["targets"][label] for one in sections[0].section.results.models.values()]
    is_number = not any(entry["classes"] for entry in entries)
    metric = scan_level.r_squared if is_number else scan_level.auroc
    predicted: PredictedScans | None = seed_statistics.predicted_scans(sections, metric).get(label)
    if predicted is None or OWN_MODEL not in predicted.predictions.scores:
        return None
    scans = predicted.predictions.scans
    known = replace(
        predicted.predictions, patients=tuple(patient_of.get(scan, "") for scan in scans)
    )
    found = prediction_statistics.metrics(
        known, metric, 0, limits=None if is_number else (0.0, 1.0), num_flips=2000
    )
    own = [one.section.results.models[OWN_MODEL]["targets"][label] for one in sections]
    validation = float(np.mean([_validation(one) for one in own]))
    return Row(label, vector, head, "R^2" if is_number else "AUROC", validation, found)


def markdown(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """One table per label."""
    lines: list[str] = []
    for label, kind in LABELS.items():
        of_label = [row for row in rows if row.label == label]
        if not of_label:
            lines += [f"**{label}** ({kind}): the test scans do not have two different values", ""]
            continue
        first = of_label[0].found.models[0].estimate
        lines += [f"**{label}** ({kind}), {of_label[0].metric}, n = {first.num_scans} test scans"]
        lines[-1] += f" of {first.num_patients} patients, {len(runs)} seeds"
        lines += ["", "| vector | head | validation | pretrained | untrained | difference | p |"]
        lines += ["|---|---|---|---|---|---|---|", *map(_markdown_row, of_label), ""]
    return "\n".join(lines)


def _markdown_row(row: Row) -> str:
    cells = [row.vector, row.head, f"{row.validation:.3f}"]
    for model in (OWN_MODEL, UNTRAINED):
        one = next((one for one in row.found.models if one.model == model), None)
        cells.append("" if one is None else "".join(_shown(one)))
    pair = next((pair for pair in row.found.differences if pair.other == UNTRAINED), None)
    if pair is None:
        return f"| {' | '.join([*cells, '', ''])} |"
    gap = f"{pair.estimate.value:+.3f} {benchmark_table.interval_of(pair.estimate)}"
    p = f"{pair.p:.2g}" if math.isfinite(pair.p) else ""
    return f"| {' | '.join([*cells, gap, p])} |"


def _shown(one: ModelValue) -> Iterator[str]:
    yield f"{one.estimate.value:.3f}"
    if math.isfinite(one.seed_sd):
        yield f" ± {one.seed_sd:.3f}"
    yield f" {benchmark_table.interval_of(one.estimate)}"


if __name__ == "__main__":
    arguments.run(main)
