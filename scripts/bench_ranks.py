"""Measure several ranks on this machine: samples per second, collectives, saves, stops, restarts.

    python scripts/bench_ranks.py STORE                  # configs/smoke.yaml on 1 and 2 ranks
    python scripts/bench_ranks.py STORE CONFIG key=value --ranks 4 --json out.json

All figures come from real `tapct train` runs with one thread per rank. The ranks share the machine,
so their speed-up is printed beside that of plain matrix products in as many processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import arguments
import torch

from tapct.base import exits
from tapct.base.exits import UserError
from tapct.config import load_config
from tapct.data.packed.store import Store
from tapct.run.config import RunConfig

WARM_UP = 3
GEMM_SECONDS = 2.0


def gemm_count(seconds: float) -> int:
    """Number of matrix products that one thread computes in some seconds."""
    torch.set_num_threads(1)
    a, done = torch.randn(1024, 1024), 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a
        done += 1
    return done


def gemm_gain(processes: int) -> float:
    """Speed-up of matrix products in several processes at once over one process."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(gemm_count, [0.2] * processes)  # imports
        alone = pool.apply(gemm_count, (GEMM_SECONDS,))
        return sum(pool.map(gemm_count, [GEMM_SECONDS] * processes, chunksize=1)) / alone


def command(world: int, words: list[str]) -> list[str]:
    """`tapct train` under torchrun; for one rank too, so that both sides use the same launcher."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world}",
    ]
    return [*start, "-m", "tapct", "train", *words]


def environment() -> dict[str, str]:
    """One thread per rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one per step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def failed(line: list[str], done: subprocess.CompletedProcess[str]) -> UserError:
    """The error for a run that failed; prints what the run has printed."""
    print(done.stdout + done.stderr, file=sys.stderr)
    return UserError(f"{shlex.join(line)} ended with exit code {done.returncode}")


def train(world: int, words: list[str], run: Path) -> list[dict[str, Any]]:
    """Train from start to end.

    Returns:
        The rows of metrics.jsonl.
    """
    line = command(world, [*words, f"out={run}"])
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise failed(line, done)
    return rows_of(run)


def rate(rows: list[dict[str, Any]]) -> float:
    """Samples per second, median over steps."""
    return statistics.median(row["samples_per_second"] for row in rows[WARM_UP:])


def stop_and_resume(world: int, words: list[str], run: Path) -> dict[str, float]:
    """Time a stop and a resume.

    Returns:
        Seconds from a signal to one rank until the checkpoint is saved, and from the start of a
        resumed run until its next step.
    """
    line = command(
        world,
        [*words, f"out={run}", "train.steps=100000", "log.every=1", "checkpoint.every=100000"],
    )
    launcher = subprocess.Popen(
        line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (run / "metrics.jsonl").is_file() or len(rows_of(run)) < WARM_UP:
        time.sleep(0.05)
    ranks = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    began = time.time()
    os.kill(int(ranks[-1]), signal.SIGUSR1)
    while not (run / "checkpoints" / "latest").is_file():
        time.sleep(0.005)
    saved = time.time() - began
    launcher.wait()
    steps, began = len(rows_of(run)), time.time()
    resumed_run = subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert resumed_run.stdout is not None
    read = next(text for text in resumed_run.stdout if "read in" in text)
    while len(rows_of(run)) <= steps:
        time.sleep(0.05)
    resumed = time.time() - began
    resumed_run.terminate()
    resumed_run.wait()
    return {
        "signal_to_saved_s": saved,
        "start_to_step_s": resumed,
        "read_s": float(read.split("read in ")[1].split()[0]),
    }


def collectives(world: int, words: list[str], run: Path) -> dict[str, int]:
    """Count the collectives of one step, and the numbers that its packet sums in one of them."""
    program = run.parent / "count.py"
    program.write_text(COUNT)
    start = command(world, [])[:-3]
    line = [
        *start,
        str(program),
        *words,
        f"out={run}",
        "train.steps=1",
    ]  # the counter's hooks serve one step only
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    counts = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if not counts:
        raise failed(line, done)
    return dict(json.loads(counts[-1]))


COUNT = """
import json, pathlib, sys
from torch.distributed.tensor.debug import CommDebugMode
from tapct.config import load_config
from tapct.distributed import collectives
from tapct.engine import loop
from tapct.run import pretrain
from tapct.run.config import RunConfig

step, entries = loop.Trainer.optimizer_step, []
reduce = collectives.Packet.reduce

def counted_reduce(self):
    entries.append(len(self.parts))
    reduce(self)

def counted(self, index, batches):
    with CommDebugMode() as mode:
        step(self, index, batches)
    counts = {}
    for name, count in mode.get_comm_counts().items():
        counts[str(name).split(".")[-1]] = count
    if collectives.rank() == 0:
        row = {"all": sum(counts.values()), "packet_entries": entries[-1], **counts}
        print(json.dumps(row), flush=True)

collectives.Packet.reduce = counted_reduce
loop.Trainer.optimizer_step = counted
pretrain.train(load_config(RunConfig, pathlib.Path(sys.argv[1]), sys.argv[2:]))
"""


def measure(options: argparse.Namespace, words: list[str], folder: Path) -> dict[str, Any]:
    """All figures."""
    ranks = options.ranks
    words = [
        *words,
        f"data.store={options.store}",
        f"train.steps={options.steps}",
        "log.tensorboard=false",
    ]
    alone, together = (train(world, words, folder / f"ranks_{world}") for world in (1, ranks))
    saves = {}
    for name, value in (("asynchronous", "true"), ("synchronous", "false")):
        every = [*words, "checkpoint.every=5", f"checkpoint.asynchronous={value}"]
        rows = train(ranks, every, folder / name)
        saves[name] = statistics.median(
            row["seconds/save"] for row in rows if row["seconds/save"] > 0
        )
    return {
        "ranks": ranks,
        "samples_per_second": {"1": rate(alone), str(ranks): rate(together)},
        "gain": rate(together) / rate(alone),
        "gemm_gain": gemm_gain(ranks),
        "save_stall_s": saves,
        **stop_and_resume(ranks, words, folder / "stopped"),
        "collectives_per_step": collectives(ranks, words, folder / "counted"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="folder written by tapct pack")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG key=value",
        help="config and overrides, default configs/smoke.yaml",
    )
    parser.add_argument(
        "--ranks", type=arguments.positive, default=2, help="number of ranks, default 2"
    )
    parser.add_argument(
        "--steps", type=arguments.positive, default=30, help="steps per run, default 30"
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args()
    words = (
        options.words
        if options.words and "=" not in options.words[0]
        else ["configs/smoke.yaml", *options.words]
    )
    load_config(
        RunConfig, Path(words[0]), words[1:]
    )  # a wrong config is refused before ranks are started
    Store(options.store)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, words, Path(folder))
    one, many = found["samples_per_second"].values()
    saves, counts = found["save_stall_s"], found["collectives_per_step"]
    lines = {
        "samples/s": f"{one:.1f} and {many:.1f}: {found['gain']:.2f} times; GEMM "
        f"{found['gemm_gain']:.2f} times",
        "save": f"training waits {saves['asynchronous']:.3f} s; with checkpoint.asynchronous=false "
        f"{saves['synchronous']:.3f} s",
        "stop": f"{found['signal_to_saved_s']:.2f} s from a signal to one rank until the "
        "checkpoint is saved",
        "resume": f"{found['start_to_step_s']:.1f} s from start to the next step, "
        f"{found['read_s']:.1f} s of it reading",
        "collectives": f"{counts['all']} per step, one of them for {counts['packet_entries']} "
        "numbers and vectors",
    }
    print(f"{words[0]}: 1 and {options.ranks} ranks, one thread each, torch {torch.__version__}")
    for name, line in lines.items():
        print(f"{name:<12}  {line}")
    print(
        ", ".join(
            f"{name} {count}"
            for name, count in counts.items()
            if name not in ("all", "packet_entries")
        )
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
