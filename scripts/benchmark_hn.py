"""Pretrain on the scans of a folder and evaluate the frozen features, for several seeds.

The folder is laid out as nnU-Net does: imagesTr, labelsTr, dataset.json. No label is seen in
pretraining. People are divided by a fixed rule: a third of them is held out and tested, or with
--folds 5 each of five groups in turn. The table compares the pretrained network with all baselines
on the held-out people: mean over seeds, 95 % interval over people, paired differences.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import arguments
import numpy as np

from tapct import config as configs
from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import write_atomically
from tapct.base.paths import command_line
from tapct.config.flat import flatten
from tapct.data import manifest as manifests
from tapct.data.index.build import build_manifest
from tapct.data.packed import pack
from tapct.data.packed.store import Store
from tapct.data.patients import split
from tapct.data.patients.key import KEY_FILE
from tapct.data.phantom import archive as phantom
from tapct.eval import saved, statistics
from tapct.eval.contract import OWN_MODEL
from tapct.eval.results import Evaluation, TaskSection
from tapct.run import finished, pretrain
from tapct.run.config import RunConfig
from tapct.run_folder import RunFolder

CONFIG = Path("configs/hn.yaml")
PHANTOM_CONFIG = Path("configs/smoke.yaml")
SHORT_SHARE = 1 / 3  # of the people is tested in the short form
PHANTOM_SCANS = 40


@dataclass(frozen=True)
class Fold:
    """One group of test people.

    Args:
        number: number of the group.
        start: `data.held_out_start`.
        share: `data.held_out`.
    """

    number: int
    start: float
    share: float


@dataclass(frozen=True)
class Trained:
    """One run of the benchmark and what it cost.

    Args:
        seed: random seed of the run.
        fold: group of test people.
        evaluation: its results.
        cpu_s: processor time of pretraining, of all threads.
        wall_s: wall time of pretraining.
    """

    seed: int
    fold: Fold
    evaluation: Evaluation
    cpu_s: float
    wall_s: float


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/benchmark_hn.sh", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with imagesTr, labelsTr, dataset.json")
    parser.add_argument("--phantom", action="store_true", help="a synthetic archive instead")
    parser.add_argument("--config", type=Path, help=f"config, default {CONFIG}")
    parser.add_argument("--out", type=Path, help="folder of all runs, default runs/hn")
    parser.add_argument(
        "--folds", type=int, default=1, help="1: the short form; 5: every person is tested once"
    )
    parser.add_argument(
        "--seeds", type=arguments.whole, nargs="+", default=[0, 1, 2], help="default 0 1 2"
    )
    parser.add_argument("--csv", type=Path, help="file with one row per number")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config")
    options = parser.parse_args(words)
    if (options.data is None) == (not options.phantom):
        parser.error("give --data DIR or --phantom")
    if options.folds < 1:
        parser.error("--folds must be 1 or more")
    options.config = options.config or (PHANTOM_CONFIG if options.phantom else CONFIG)
    options.out = options.out or Path("runs/phantom" if options.phantom else "runs/hn")
    return options


def main(words: list[str]) -> None:
    options = options_of(words)
    work: Path = options.out / "data"
    found, store = prepare(options.data, work)
    people = sorted({row.patient for row in found.accepted})
    share = SHORT_SHARE if options.folds == 1 else 1 / options.folds
    split_seed = seed_of_folds(people, share, options.folds)
    if split_seed is None:
        raise UserError(f"{len(people)} people cannot be divided; the benchmark needs several")
    folds = [Fold(number, number * share, share) for number in range(options.folds)]
    tables = truth_tables(options.data, work, found, store)
    runs = []
    for fold in folds:
        for seed in options.seeds:
            out = options.out / f"fold_{fold.number}_seed_{seed}"
            words = [
                *(f"out={out}", f"seed={seed}", f"data.store={store}"),
                *(f"data.held_out={fold.share!r}", f"data.held_out_start={fold.start!r}"),
                *(f"data.split_seed={split_seed}", f"eval.cache.path={options.out / 'features'}"),
                *(*tables, *options.overrides),
            ]
            runs.append(trained_and_evaluated(options.config, words, seed, fold))
    patient_of = {scan.id: scan.patient for scan in Store(store).scans}
    table = table_of(runs, options.seeds, patient_of)
    text = rendered(table, runs)
    console.say_line(text)
    write_atomically(options.out / "table.txt", text + "\n")
    file = options.csv or options.out / "results.csv"
    write_csv(file, table, runs)
    console.say(f"one row per number: {file}")


def seed_of_folds(people: Sequence[str], share: float, num: int) -> int | None:
    """A seed of the split with which every fold has test people and training people.

    An evaluation without held-out people would test on people of pretraining.

    Args:
        people: patients.
        share: share of the people in one fold.
        num: number of folds.
    Returns:
        None where none of the first hundred seeds has.
    """

    def has_both_sides(seed: int) -> bool:
        counts = [
            len(split.patients_below(people, share, seed, number * share)) for number in range(num)
        ]
        return all(0 < count < len(people) for count in counts)

    nearest = split.seed_with_both_sides(people, share)
    seeds = [] if nearest is None else [nearest, *range(100)]
    return next((seed for seed in seeds if has_both_sides(seed)), None)


def prepare(data: Path | None, work: Path) -> tuple[manifests.Manifest, Path]:
    """Index and pack the folder, or a synthetic archive; what is packed already is kept.

    Args:
        data: nnU-Net folder; None for the phantom.
        work: folder of the manifest and the store.
    Raises:
        UserError: the folder has no images or no labels.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (work / KEY_FILE).exists():
        # a public key makes every machine divide the people of a public data set alike
        key = hashlib.blake2b(b"tapct benchmark", digest_size=32).digest()
        (work / KEY_FILE).write_bytes(key)
    cores = os.cpu_count() or 1
    if data is None:
        images, labels, regex = work / "phantom", None, r"(P\d+)_T\d"
        if not images.is_dir():
            with console.progress_bar("phantom") as progress:
                phantom.write(images, phantom.Config(num=PHANTOM_SCANS), progress)
    else:
        images, labels, regex = data / "imagesTr", data / "labelsTr", None
        for folder in (images, labels):
            if not folder.is_dir():
                raise UserError(f"{folder} is missing; an nnU-Net folder has imagesTr and labelsTr")
    with console.progress_bar("index") as progress:
        found = build_manifest(
            images,
            work / "manifest.parquet",
            labels=labels,
            patient_regex=regex,
            workers=cores,
            progress=progress,
        )
    for row in found.rows:
        if row.status != "accepted":
            console.say_line(f"refused {row.path}: {row.reason}: {row.detail}")
    with console.progress_bar("pack") as progress:
        pack.pack(found, work / "store", workers=cores, level=1, progress=progress)
    return found, work / "store"


def truth_tables(
    data: Path | None, work: Path, found: manifests.Manifest, store: Path
) -> list[str]:
    """Overrides that name the truth of whole scans and landmarks.

    The phantom writes both. For other folders, the volume of each organ in the label map is the
    truth of the scan, which a decoder of the whole scan should find without seeing the labels.

    Args:
        data: nnU-Net folder; None for the phantom.
        work: folder of the store.
        found: manifest of the scans.
        store: packed scans and labels.
    """
    if data is None:
        return [
            f"eval.scan_labels={work / 'phantom' / 'scan_labels.csv'}",
            f"eval.landmarks={work / 'phantom' / 'landmarks.csv'}",
        ]
    packed = Store(store)
    volumes: dict[str, dict[str, float]] = {}
    for row in found.accepted:
        index = packed.index_of(row.id)
        scan = packed.scans[index]
        if not scan.has_labels:
            continue
        labels = packed.read_labels(index)
        counts = np.bincount(labels.labels_ZYX.reshape(-1))
        millilitres = float(np.prod(scan.spacing_mm)) / 1000
        volumes[row.path] = {
            f"{name} ml": round(float(counts[value]) * millilitres, 3)
            for value, name in labels.names
            if 0 < value < len(counts) and counts[value]
        }
    columns = sorted({name for row in volumes.values() for name in row})
    file = work / "scan_labels.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, ["path", *columns])
        writer.writeheader()
        for path, values in volumes.items():
            writer.writerow({"path": path, **values})
    return [f"eval.scan_labels={file}"]


def trained_and_evaluated(config: Path, words: list[str], seed: int, fold: Fold) -> Trained:
    """Pretrain one run and evaluate it; a finished part is not repeated."""
    resolved = configs.load_config(RunConfig, config, words)
    out: Path = resolved.value.out
    cost_file, cost_so_far = out / "cost.json", out / "cost_so_far.json"
    if cost_file.is_file():
        check_same_settings(out, resolved)
    else:
        before = {"cpu_s": 0.0, "wall_s": 0.0}
        if cost_so_far.is_file():  # of the part before a signal
            before = json.loads(cost_so_far.read_text())
        began, cpu_before = time.monotonic(), cpu_seconds()
        stop = pretrain.train(resolved)
        cost = {
            "cpu_s": before["cpu_s"] + cpu_seconds() - cpu_before,
            "wall_s": before["wall_s"] + time.monotonic() - began,
        }
        write_atomically(cost_so_far if stop.signal else cost_file, json.dumps(cost) + "\n")
        if stop.signal:
            raise UserError(f"stopped by {stop.signal} and saved; repeat the command to resume")
    cost = json.loads(cost_file.read_text())
    own = saved.pick(saved.find(out))
    evaluation = own.evaluation if own is not None and own.is_own else None
    if evaluation is None:
        evaluation = finished.evaluate(out)
    check_held_out(out, evaluation)
    return Trained(seed, fold, evaluation, cost["cpu_s"], cost["wall_s"])


def check_same_settings(out: Path, resolved: configs.Resolved) -> None:
    """Raise UserError where a finished run had other settings, so that its results are not shown
    as those of this command.

    Args:
        out: run folder.
        resolved: config of this command.
    """
    saved = flatten(configs.load_config(RunConfig, RunFolder(out).config, []).to_dict())
    wanted = flatten(resolved.to_dict())
    for key in {**saved, **wanted}:
        if saved.get(key) != wanted.get(key):
            raise UserError(
                f"{out} was made with {key}={saved.get(key)}, and this command has "
                f"{wanted.get(key)}; give another --out, or remove this folder"
            )


def check_held_out(out: Path, evaluation: Evaluation) -> None:
    """Raise UserError where test people were pretrained on.

    Args:
        out: run folder.
        evaluation: its results.
    """
    held_out = evaluation.split.held_out
    if held_out.value is False:
        raise UserError(f"{out}: {held_out.caveat()}; the table would not hold for new people")


def cpu_seconds() -> float:
    """Processor time of this process and its finished children, all threads, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@dataclass(frozen=True)
class TaskTable:
    """The numbers of one task over all seeds and folds.

    Args:
        task: name of the task.
        metric: name of its headline metric.
        whole: statistics of the headline.
        parts: statistics by organ or class.
    """

    task: str
    metric: str
    whole: statistics.Statistics
    parts: Mapping[str, statistics.Statistics]


def table_of(
    runs: Sequence[Trained], seeds: Sequence[int], patient_of: Mapping[str, str]
) -> list[TaskTable]:
    """The statistics of all tasks whose headline is a mean over scans.

    Args:
        runs: runs of all seeds and folds.
        seeds: seeds in order.
        patient_of: scan ID -> patient.
    """
    tables = []
    for task, section in runs[0].evaluation.tasks.items():
        by_seed = []
        for seed in seeds:
            of_seed = [run.evaluation.tasks[task] for run in runs if run.seed == seed]
            by_seed.append([score for one in of_seed for score in one.results.scans])
        if not any(by_seed):
            continue
        by_part = mean_over_parts(section)
        if by_part is None:
            # AUROC or R^2 are no means over scans, so rows of scans show nothing about them
            console.say(f"{task}: {section.headline.metric} is no mean over scans; left out")
            continue
        rows = statistics.table_of(by_seed, patient_of, by_part=by_part)
        limits = section.headline.range
        whole = statistics.means(rows, 0, limits=limits)
        parts = {}
        if by_part:
            parts = {
                part: statistics.means(rows.of_part(part), 0, limits=limits) for part in rows.parts
            }
        tables.append(TaskTable(task, section.headline.metric, whole, parts))
    return tables


def mean_over_parts(section: TaskSection) -> bool | None:
    """Whether the headline of a task is the mean over parts of the mean over scans (True) or the
    mean over scans (False); None where it is neither.

    Args:
        section: results of one evaluation.
    """
    scans, values = section.results.scans, section.headline.values
    for by_part in (True, False):
        if by_part and not any(score.parts for score in scans):
            continue
        found = statistics.means(
            statistics.table_of([scans], {}, by_part=by_part), 0, num_resamples=1
        )
        own = {one.model: one.estimate.value for one in found.models}
        if all(np.isclose(own.get(model, np.nan), values[model], rtol=1e-6) for model in values):
            return by_part
    return None


def rendered(tables: Sequence[TaskTable], runs: Sequence[Trained]) -> str:
    """The tables as text: values, then what the pretrained network is better by."""
    lines = []
    for table in tables:
        names = list(table.parts)
        lines.append(f"{table.task}: {table.metric}")
        header = f"{'model':<24}{'mean':>7}  {'95 % interval':<16}{'sd of seeds':>12}"
        lines.append(header + "".join(f"{name[:13]:>14}" for name in names))
        of_part = {
            name: {one.model: one.estimate.value for one in part.models}
            for name, part in table.parts.items()
        }
        for one in table.whole.models:
            parts = "".join(f"{of_part[name].get(one.model, np.nan):>14.3f}" for name in names)
            lines.append(
                f"{one.model:<24}{one.estimate.value:>7.3f}  {interval_of(one.estimate):<16}"
                f"{one.seed_sd:>12.3f}{parts}"
            )
        for pair in table.whole.differences:
            lines.append(
                f"{OWN_MODEL} - {pair.other:<20} {pair.estimate.value:+.3f} "
                f"{interval_of(pair.estimate)}  p = {pair.p:.2g}, Holm {pair.p_holm:.2g}"
            )
        first = table.whole.models[0].estimate
        lines.append(f"n = {first.num_scans} scans of {first.num_patients} people")
        lines.append("")
    cpu = [run.cpu_s / 60 for run in runs]
    wall = [run.wall_s / 60 for run in runs]
    lines.append(
        f"pretraining: {len(runs)} runs, {np.mean(cpu):.1f} CPU minutes each (most "
        f"{max(cpu):.1f}), {np.mean(wall):.1f} minutes of wall time; {processor()}"
    )
    return "\n".join(lines)


def interval_of(estimate: statistics.PatientEstimate) -> str:
    """An interval as text, or why there is none."""
    if estimate.interval is None:
        return "no interval"
    return f"[{estimate.interval.low:.3f}, {estimate.interval.high:.3f}]"


def write_csv(file: Path, tables: Sequence[TaskTable], runs: Sequence[Trained]) -> None:
    """One row per number: task, model, part, seed (or `all`), value, interval, n, origin."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = [
        *("task", "metric", "part", "model", "seed", "value", "low", "high", "p", "p_holm"),
        *("n_scans", "n_people", "commit", "machine", "command", "cpu_seconds"),
    ]
    # the revisions that evaluated: a finished run may be of an earlier one
    revision = " ".join(sorted({run.evaluation.origin.git_revision for run in runs}))
    machine, command = processor(), command_line(["scripts/benchmark_hn.sh", *sys.argv[1:]])
    cpu = round(float(np.mean([run.cpu_s for run in runs])), 1)
    seeds = list(dict.fromkeys(run.seed for run in runs))
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        for table in tables:
            for part, found in {"all": table.whole, **table.parts}.items():
                for row in csv_rows(found, seeds):
                    writer.writerow(
                        {
                            "task": table.task,
                            "metric": table.metric,
                            "part": part,
                            **row,
                            "commit": revision,
                            "machine": machine,
                            "command": command,
                            "cpu_seconds": cpu,
                        }
                    )


def csv_rows(found: statistics.Statistics, seeds: Sequence[int]) -> list[dict[str, object]]:
    """Rows of one metric: each model over all seeds and by seed, and the paired differences."""
    rows: list[dict[str, object]] = []
    for one in found.models:
        rows.append(csv_row(one.model, "all", one.estimate))
        for seed, value in zip(seeds, one.by_seed):
            rows.append({"model": one.model, "seed": seed, "value": f"{value:.6g}"})
    for pair in found.differences:
        row = csv_row(f"{pair.reference} - {pair.other}", "all", pair.estimate)
        rows.append({**row, "p": f"{pair.p:.4g}", "p_holm": f"{pair.p_holm:.4g}"})
    return rows


def csv_row(model: str, seed: str, estimate: statistics.PatientEstimate) -> dict[str, object]:
    interval = estimate.interval
    return {
        "model": model,
        "seed": seed,
        "value": f"{estimate.value:.6g}",
        "low": "" if interval is None else f"{interval.low:.6g}",
        "high": "" if interval is None else f"{interval.high:.6g}",
        "n_scans": estimate.num_scans,
        "n_people": estimate.num_patients,
    }


def processor() -> str:
    """Name of the processor and number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    name = platform.machine()
    if cpuinfo.is_file():
        facts = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()]
        keys = [line.partition(":")[0].strip() for line in cpuinfo.read_text().splitlines()]
        found = dict(zip(reversed(keys), reversed(facts)))
        name = f"{found.get('model name', name)} model {found.get('model', '?')}"
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        console.error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        console.error("interrupted; repeat the command to resume")
        sys.exit(130)
