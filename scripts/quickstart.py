"""All commands of tapct in one process: a small run from scans to an evaluated and exported model
and a report page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import arguments
from rich.table import Table

from tapct import config as configs
from tapct.base import console, metric_names
from tapct.base.exits import UserError
from tapct.base.files import write_atomically
from tapct.base.ranks import Ranks
from tapct.base.recent import LAST_STEPS
from tapct.data import manifest as manifests
from tapct.data.index.build import build_manifest
from tapct.data.packed import pack, pack_report
from tapct.data.patients import split
from tapct.data.patients.key import KEY_FILE
from tapct.data.phantom import archive as phantom
from tapct.data.phantom.truth_files import LANDMARKS, SCAN_LABELS
from tapct.distributed.device import pick_device, prepare_cpu
from tapct.distributed.world import World
from tapct.doctor import short_run
from tapct.eval.results import saved
from tapct.report import page
from tapct.report.history import read_history
from tapct.run import finished, pretrain
from tapct.run.config import DataConfig, RunConfig
from tapct.run_folder import RunFolder

T = TypeVar("T")
SMOKE = Path("configs/smoke.yaml")
# With the measured rate of this machine, the whole quickstart ends within six minutes. A part of
# them is left for what follows training, in seconds and in training steps of the same duration: a
# slow machine also evaluates slowly.
LIMIT_S = 360.0
AFTER_S, AFTER_STEPS = 15.0, 350
SLOWER = 1.1  # a step beside a loader, saves and logging, over the step that is timed
TIMED_STEPS, WARM_UP_STEPS = 24, 8
FEWEST_STEPS, ROUND_STEPS = 200, 50
NUM_SCANS = 40
# tasks that the phantom has labels for, beside segmentation; each takes a few seconds. Its sex is
# the label whose classes are about equally frequent among the held-out patients.
PHANTOM_TASKS = (
    "eval.tasks.classification={targets: [sex], vectors: [cls_mean], C: [1e-3, 1e-1, 10]}",
    "eval.tasks.matching={blocks: last, radius_mm: 20}",
    "eval.num_pictures=1",
)


class Stopwatch:
    """Runs one step after the other and keeps their wall times in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds of all steps so far."""
        return sum(self.seconds.values())

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - began, 1)
        return result


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder with your scans; default: a synthetic archive"
    )
    parser.add_argument(
        "--labels", type=Path, help="folder with label maps of the same names as the scans"
    )
    parser.add_argument("--config", type=Path, default=SMOKE, help="config, default %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="run folder, default %(default)s"
    )
    work = Path("data/quickstart")
    parser.add_argument(
        "--work", type=Path, default=work, help="folder for archive and store, default %(default)s"
    )
    parser.add_argument(
        "--steps",
        type=arguments.positive,
        metavar="N",
        help="number of training steps; default: those of the config, or as many as fit into six "
        "minutes on this machine",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the config, e.g. train.steps=100",
    )
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    options, timed = options_of(words), Stopwatch()
    work: Path = (
        options.work
        if options.data is None
        else options.work / f"archive_{options.data.resolve().name}"
    )
    archive = work / "phantom" if options.data is None else options.data
    if options.data is None:
        work.mkdir(parents=True, exist_ok=True)
        if not (work / KEY_FILE).exists():
            # the patients are synthetic: a public key makes every machine hold out the same ones
            (work / KEY_FILE).write_bytes(hashlib.blake2b(b"phantom", digest_size=32).digest())
        timed("phantom", lambda: make_phantom(archive))
    cores = os.cpu_count() or 1

    def index() -> manifests.Manifest:
        with console.progress_bar("index") as progress:
            return build_manifest(
                archive,
                work / "manifest.parquet",
                labels=options.labels,
                patient_regex=r"(P\d+)_T\d" if options.data is None else None,
                min_depth=1,
                workers=cores,
                progress=progress,
            )

    found = timed("index", index)
    refused = [row for row in found.rows if row.status == "refused"]
    for row in refused:
        console.say(f"  refused {row.path}: {row.reason}: {row.detail}")

    def packing() -> pack_report.PackReport:
        with console.progress_bar("pack") as progress:
            return pack.pack(found, work / "store", workers=cores, level=1, progress=progress)

    packed = timed("pack", packing)
    for scan in (*packed.refused, *packed.labels_refused):
        console.say(f"  not packed {scan.path}: {scan.reason}: {scan.detail}")
    precision = (
        overrides_without_bf16(Path("/proc/cpuinfo").read_text()) if options.config == SMOKE else []
    )
    tasks = phantom_tasks(archive) if options.data is None else []
    words = [f"out={options.out}", f"data.store={work / 'store'}", *precision, *tasks]
    words += options.overrides
    people = [row.patient for row in found.accepted]
    if options.steps is not None:
        words.append(f"train.steps={options.steps}")
    elif options.config == SMOKE and not sets_steps(options.overrides):
        planned, spent_s = with_both_sides(options.config, words, people), timed.total
        words += timed("rate", lambda: steps_for_this_machine(planned, spent_s))
    resolved = with_both_sides(options.config, words, people)
    stop = timed("train", lambda: pretrain.train(resolved))
    if stop.signal:
        raise UserError(
            f"stopped by {stop.signal} and saved at step {stop.step}; repeat the command to resume"
        )
    labelled = any(row.label_path for row in found.accepted)
    results = timed("eval", lambda: evaluate(options.out, resolved)) if labelled else None
    if results is None:
        console.say(
            "no label maps were found, so no Dice is computed; docs/data.md shows how to name them"
        )
    timed("export", lambda: finished.export(options.out))
    report = timed("report", lambda: page.write(options.out))
    summary = summarise(
        options.out, len(found.accepted), len(refused), results, timed.seconds, report
    )
    write_atomically(options.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    show(summary)


def with_both_sides(config: Path, words: list[str], people: list[str]) -> configs.Resolved:
    """The config of the run; with another data.split_seed where that of a small archive would hold
    out nobody or everybody, and with nobody held out where there is one patient.

    Args:
        config: YAML file.
        words: overrides of the config.
        people: keyed hash of the patient of each scan.
    """
    resolved = configs.load_config(RunConfig, config, words)
    data: DataConfig = resolved.value.data
    problem = split.imbalance(people, data.held_out, data.split_seed)
    if not problem:
        return resolved
    console.say(problem)
    seed = split.seed_with_both_sides(people, data.held_out)
    word = "data.held_out=0" if seed is None else f"data.split_seed={seed}"
    return configs.load_config(RunConfig, config, [*words, word])


def sets_steps(overrides: list[str]) -> bool:
    """Whether an override gives the number of training steps."""
    return any(word.startswith("train.steps=") for word in overrides)


def chosen_steps(step_s: float, spent_s: float, wanted: int) -> int:
    """The number of training steps with which the quickstart ends in time: those of the config, or
    fewer where they would take too long.

    Args:
        step_s: measured seconds of a step.
        spent_s: seconds of the work before training.
        wanted: number of steps of the config.
    """
    left_s = LIMIT_S - spent_s - AFTER_S - AFTER_STEPS * step_s
    fitting = int(left_s / (SLOWER * step_s)) // ROUND_STEPS * ROUND_STEPS
    return min(wanted, max(fitting, FEWEST_STEPS))


def steps_for_this_machine(resolved: configs.Resolved, spent_s: float) -> list[str]:
    """Override of train.steps for this machine; a run that was started keeps its number.

    Args:
        resolved: config of the run.
        spent_s: seconds of the work before training.
    """
    config: RunConfig = resolved.value
    wanted = config.train.steps
    started = RunFolder(config.out).config
    if started.is_file():
        steps = configs.load_config(RunConfig, started, []).value.train.steps
        console.say(f"{config.out} has been started with train.steps={steps}, which is kept")
        return [f"train.steps={steps}"]
    step_s = seconds_of_a_step(config)
    steps = chosen_steps(step_s, spent_s, wanted)
    reason = "as in the config" if steps == wanted else f"to end within {LIMIT_S / 60:.0f} minutes"
    console.say(
        f"{step_s:.3f} s a step on this machine: {steps} training steps, {reason}; "
        f"--steps {steps} repeats this run on another machine"
    )
    return [f"train.steps={steps}"]


def seconds_of_a_step(config: RunConfig) -> float:
    """Typical seconds of a training step here, measured on synthetic scans in memory."""
    prepare_cpu()  # as `tapct train` does
    device = pick_device(config.device)
    rows = short_run.start(config, World(Ranks(), device)).steps(TIMED_STEPS)
    name = metric_names.seconds("step")
    return statistics.median(row[name] for row in rows[WARM_UP_STEPS:])


def phantom_tasks(archive: Path) -> list[str]:
    """Overrides for the tasks whose labels come from tables; none for an archive that an earlier
    version wrote without them.

    Args:
        archive: folder of the phantom.
    """
    tables = {"scan_labels": archive / SCAN_LABELS, "landmarks": archive / LANDMARKS}
    if not all(file.is_file() for file in tables.values()):
        return []
    return [*(f"eval.{name}={file}" for name, file in tables.items()), *PHANTOM_TASKS]


def overrides_without_bf16(cpuinfo: str) -> list[str]:
    """Overrides for a CPU without bf16 arithmetic, where torch emulates it, slower than float32.

    Args:
        cpuinfo: content of /proc/cpuinfo, x86 or Arm.
    """
    if not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpuinfo.split()):
        return []
    console.say("this CPU has no bf16 arithmetic: train in fp32, with fewer steps")
    return ["train.precision=fp32", "train.steps=1350"]


def make_phantom(archive: Path) -> None:
    """Write the archive unless it exists."""
    done, config = archive / "phantom.json", phantom.Config(num=NUM_SCANS)
    if done.is_file() and json.loads(done.read_text()) == {"num": config.num, "seed": config.seed}:
        console.say(f"phantom: {archive} exists already")
        return
    with console.progress_bar("phantom") as progress:
        phantom.write(archive, config, progress)
    write_atomically(done, json.dumps({"num": config.num, "seed": config.seed}))


def evaluate(out: Path, resolved: configs.Resolved) -> dict[str, Any]:
    """Evaluate, unless the run's own results are newer than the last checkpoint."""
    latest = RunFolder(out).checkpoints.latest
    own = saved.pick(saved.find(out))
    if own is not None and own.evaluation is not None and own.is_own:
        results = own.folder.results
        if results.stat().st_mtime > latest.stat().st_mtime:
            console.say(f"eval: {results} is newer than the last checkpoint, so it is kept")
            return own.evaluation.to_json()
    return finished.evaluate(out).to_json()


def summarise(
    out: Path,
    accepted: int,
    refused: int,
    results: dict[str, Any] | None,
    seconds: dict[str, float],
    report: Path,
) -> dict[str, Any]:
    """The content of summary.json.

    The numbers at the end are those of the report; gain and information are those of the worse of
    the two prototype losses.
    """
    history = read_history(RunFolder(out).metrics)
    names = [name for name in ("dino", "ibot") if f"health/{name}_information" in history.columns]
    gains = {name: history.recent(f"health/{name}_ln_k_minus_ce") for name in names}
    information = {name: history.recent(f"health/{name}_information") for name in names}
    first_losses = history.column("loss/total")[1][:LAST_STEPS]
    section = results["tasks"]["segmentation"] if results else {}
    dice = section["headline"]["values"] if results else {}
    untrained = [
        value for name, value in dice.items() if name.startswith("untrained") and value is not None
    ]
    return {
        "scans_accepted": accepted,
        "scans_refused": refused,
        "loss_first": float(first_losses.mean()),
        "loss_last": history.recent("loss/total"),
        "ln_k_minus_ce": min(gains.values(), default=math.nan),
        "prototype_information_nats": min(information.values(), default=math.nan),
        "seconds_per_step": history.typical_seconds(),
        "dice_pretrained": dice.get("pretrained"),
        "dice_untrained": max(untrained, default=None),
        "dice_raw_hu": dice.get("raw_hu"),
        "dice_position": dice.get("position"),
        "headlines": headlines(results),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "report": str(report),
        "by_loss": {"ln_k_minus_ce": gains, "prototype_information_nats": information},
        "dice": dice,
        "dice_mean_of": section["headline"]["mean_of"] if results else "",
        "dice_caveat": results["split"]["note"] if results else "",
        "steps": history.last_step,
    }


def headlines(results: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Task -> name of its metric and value by model."""
    if results is None:
        return {}
    sections: dict[str, Any] = results["tasks"]
    return {
        task: {"metric": section["headline"]["metric"], **section["headline"]["values"]}
        for task, section in sections.items()
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table at the end."""
    table = Table(title="quickstart", show_header=False, title_justify="left")
    number = lambda value: "-" if value is None else f"{value:.3f}"  # noqa: E731
    table.add_row(
        "scans accepted / refused", f"{summary['scans_accepted']} / {summary['scans_refused']}"
    )
    table.add_row(
        "loss, first / last steps", f"{summary['loss_first']:.2f} / {summary['loss_last']:.2f}"
    )
    for name, gain in summary["by_loss"]["ln_k_minus_ce"].items():
        information = summary["by_loss"]["prototype_information_nats"][name]
        table.add_row(f"{name}: ln K - CE, information", f"{gain:.2f}, {information:.2f} nats")
    table.add_row("seconds per step", f"{summary['seconds_per_step']:.3f}")
    table.add_row("Dice pretrained", number(summary["dice_pretrained"]))
    table.add_row("Dice untrained (better of two)", number(summary["dice_untrained"]))
    table.add_row("Dice position alone", number(summary["dice_position"]))
    table.add_row("Dice raw HU", number(summary["dice_raw_hu"]))
    for task, values in summary["headlines"].items():
        if task != "segmentation":
            both = f"{number(values.get('pretrained'))} / {number(values.get('untrained'))}"
            table.add_row(f"{task}: {values['metric']}, pretrained / untrained", both)
    table.add_row(
        "wall time",
        "  ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items()),
    )
    console.console().print(table)
    for line in (summary["dice_mean_of"], summary["dice_caveat"]):
        if line:
            console.say(f"Dice: {line}")
    console.say(f"report: {summary['report']}")


if __name__ == "__main__":
    arguments.run(main)
