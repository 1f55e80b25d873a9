"""Pretrain on the scans of a folder and evaluate the frozen features, for several seeds.

The folder is laid out as nnU-Net does: imagesTr, labelsTr, dataset.json. No label is seen in
pretraining. People are divided by a fixed rule: a third of them is held out and tested, or with
--folds 5 each of five groups in turn. The table compares the pretrained network with all baselines
on the held-out people: mean over seeds, 95 % interval over people, paired differences.

--validation is for choosing a recipe: the test people of the short form are left out altogether,
and a third of the other people takes their place.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import arguments
import benchmark_data
import benchmark_table
from benchmark_data import Fold
from benchmark_table import Run

from tapct import config as configs
from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import write_atomically
from tapct.config.flat import flatten
from tapct.data.packed.store import Store
from tapct.data.phantom import archive as phantom
from tapct.engine.vitals import FIRST_BAD
from tapct.eval.results import saved
from tapct.eval.results.json_file import Evaluation
from tapct.report import facts, summary
from tapct.report.history import read_history
from tapct.run import finished, pretrain
from tapct.run.config import RunConfig
from tapct.run.model_source import open_model
from tapct.run_folder import RunFolder
from tapct.ssl.health import STATES

CONFIG = Path("configs/hn.yaml")
PHANTOM_CONFIG = Path("configs/phantom_benchmark.yaml")
EVAL = "eval."
VALIDATION_NOTE = "on validation people, for choosing a recipe; the test people were left out"


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/benchmark_hn.sh", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with imagesTr, labelsTr, dataset.json")
    parser.add_argument("--phantom", action="store_true", help="a synthetic archive instead")
    parser.add_argument(
        "--config", type=Path, help=f"config, default {CONFIG}; of the phantom {PHANTOM_CONFIG}"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of all runs, default runs/hn or runs/phantom"
    )
    parser.add_argument(
        "--folds", type=int, default=1, help="1: the short form; 5: every person is tested once"
    )
    parser.add_argument(
        "--validation",
        action="store_true",
        help="choose a recipe: leave out the test people, and hold out a third of the others; the "
        "runs are in OUT/validation",
    )
    parser.add_argument(
        "--scans",
        type=arguments.positive,
        default=benchmark_data.PHANTOM.num,
        help="with --phantom: number of scans, default %(default)s",
    )
    add_options_of_runs(parser)
    options = parser.parse_args(arguments.overrides_first(words))
    if (options.data is None) == (not options.phantom):
        parser.error("give --data DIR or --phantom")
    if options.folds < 1:
        parser.error("--folds must be 1 or more")
    if options.validation and options.folds > 1:
        parser.error("--validation needs --folds 1: with more folds, everyone is a test person")
    options.config = options.config or (PHANTOM_CONFIG if options.phantom else CONFIG)
    options.out = options.out or Path("runs/phantom" if options.phantom else "runs/hn")
    if options.validation:  # with data, runs and features of its own
        options.out = options.out / "validation"
    return options


def add_options_of_runs(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark with several runs: seeds, CSV file and overrides."""
    parser.add_argument(
        "--seeds",
        type=arguments.whole,
        nargs="+",
        default=[0, 1, 2],
        help="default 0 1 2",
    )
    parser.add_argument("--csv", type=Path, help="file with one row per number")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config")


def main(words: list[str]) -> None:
    options = options_of(words)
    data = options.data or replace(benchmark_data.PHANTOM, num=options.scans)
    runs = all_runs(data, options, folds=options.folds, validation=options.validation)
    scans = Store(options.out / "data" / "store").scans
    tables = benchmark_table.tables_of(runs, {scan.id: scan.patient for scan in scans})
    text = benchmark_table.rendered(tables, runs)
    if options.validation:
        text = f"{VALIDATION_NOTE}\n\n{text}"
    console.say(text)
    write_atomically(options.out / "table.txt", text + "\n")
    file = options.csv or options.out / "results.csv"
    benchmark_table.write_csv(file, "scripts/benchmark_hn.sh", tables, runs)
    console.say(f"one row per number: {file}")


def all_runs(
    data: Path | phantom.Config,
    options: argparse.Namespace,
    *,
    folds: int = 1,
    validation: bool = False,
) -> list[Run]:
    """Prepare the data, then pretrain and evaluate each fold and seed; finished parts are kept.

    Args:
        data: nnU-Net folder, or a synthetic archive.
        options: `config`, `out`, `seeds` and `overrides`.
        folds: number of groups of test people.
        validation: whether the test people are left out.
    """
    work: Path = options.out / "data"
    found = benchmark_data.indexed(data, work)
    if validation:
        file = work / "manifest_validation.parquet"
        found = benchmark_data.without_test_people(found, file)
    store = benchmark_data.packed(found, work / "store")
    people = sorted({row.patient for row in found.accepted})
    groups, split_seed = benchmark_data.divided(people, folds)
    shared = [
        f"data.store={store}",
        f"data.split_seed={split_seed}",
        f"eval.cache.path={options.out / 'features'}",
        *benchmark_data.truth_tables(data, work, found, store),
        *options.overrides,
    ]
    runs = []
    for fold in groups:
        for seed in options.seeds:
            out = options.out / f"fold_{fold.number}_seed_{seed}"
            runs.append(trained_and_evaluated(options.config, out, shared, seed, fold))
    return runs


def trained_and_evaluated(config: Path, out: Path, shared: list[str], seed: int, fold: Fold) -> Run:
    """Pretrain one run and evaluate it; a finished part is not repeated.

    Args:
        config: YAML file.
        out: run folder.
        shared: overrides of all runs.
        seed: random seed of the run.
        fold: its test people.
    """
    words = [
        *(f"out={out}", f"seed={seed}"),
        *(f"data.held_out={fold.share!r}", f"data.held_out_start={fold.start!r}"),
        *shared,
    ]
    resolved = configs.load_config(RunConfig, config, words)
    cost = trained(out, resolved)
    evaluation = evaluated(out, resolved)
    check_held_out(out, evaluation)
    return Run(seed, evaluation, cost["cpu_s"], cost["wall_s"], trouble_of(out))


def trained(out: Path, resolved: configs.Resolved) -> dict[str, float]:
    """Pretrain a run unless it is finished; returns what it cost.

    Args:
        out: run folder.
        resolved: its config.
    Raises:
        UserError: a signal stopped it, or it is finished and had other settings.
    """
    cost_file, cost_so_far = out / "cost.json", out / "cost_so_far.json"
    cost: dict[str, float]
    if cost_file.is_file():
        check_same_settings(out, resolved)
        cost = json.loads(cost_file.read_text())
        return cost
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
    return cost


def evaluated(out: Path, resolved: configs.Resolved) -> Evaluation:
    """Evaluate a finished run, unless it was evaluated with the same settings.

    Args:
        out: run folder.
        resolved: config of this command, whose section `eval` may differ from that of the run.
    """
    wanted, settings_file = json.dumps(settings_of(resolved, EVAL)), out / "evaluated.json"
    known = ""
    if settings_file.is_file():
        known = settings_file.read_text().strip()
    elif own_evaluation(out) is not None:  # evaluated by `tapct eval` with the settings of the run
        known = json.dumps(settings_of(config_of(out), EVAL))
    if known != wanted or own_evaluation(out) is None:
        model = open_model(out)
        config = replace(model.config, eval=resolved.value.eval)
        finished.evaluate_model(replace(model, config=config))
        write_atomically(settings_file, wanted + "\n")
    evaluation = own_evaluation(out)
    assert evaluation is not None, "it was just written"
    return evaluation


def config_of(out: Path) -> configs.Resolved:
    """The config with which a run was pretrained."""
    return configs.load_config(RunConfig, RunFolder(out).config, [])


def settings_of(resolved: configs.Resolved, section: str) -> dict[str, object]:
    """Flat settings whose keys begin in one way, in the order of their keys."""
    found = flatten(resolved.to_dict())
    return {key: found[key] for key in sorted(found) if key.startswith(section)}


def own_evaluation(out: Path) -> Evaluation | None:
    """The newest evaluation of a run on its own data; None where there is none."""
    own = saved.pick(saved.find(out))
    return own.evaluation if own is not None and own.is_own else None


def check_same_settings(out: Path, resolved: configs.Resolved) -> None:
    """Raise UserError where a finished run was pretrained with other settings, so that its results
    are not shown as those of this command. Settings of the evaluation may differ.

    Args:
        out: run folder.
        resolved: config of this command.
    """
    saved, wanted = flatten(config_of(out).to_dict()), flatten(resolved.to_dict())
    for key in {**saved, **wanted}:
        if not key.startswith(EVAL) and saved.get(key) != wanted.get(key):
            raise UserError(
                f"{out} was made with {key}={saved.get(key)}, and this command has "
                f"{wanted.get(key)}; give another --out, or remove this folder"
            )


def trouble_of(out: Path) -> str:
    """The verdict of the report on pretraining, in words; empty where it is a good one.

    Args:
        out: run folder.
    """
    folder = RunFolder(out)
    verdict = summary.verdict_of(
        read_history(folder.metrics), facts.read_config(folder.config) or {}
    )
    bad = STATES[STATES.index(FIRST_BAD) :]
    return f"{verdict.state}. {verdict.words}" if verdict.state in bad else ""


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


if __name__ == "__main__":
    arguments.run(main)
