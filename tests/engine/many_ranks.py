"""Runs of several ranks on this machine: a config, words, and how they ended.

`launch` starts them as a person would, by torchrun: for tests of what a launcher and its ranks do
to each other.
`train` starts the ranks themselves: for tests of what ranks compute, which are many.
All processes are forked from a Python that has torch loaded, unless a test asks for fresh ones.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from forked import Forked, end_together, python, with_nest
from tiny_run import numbers_of, state_of, write_config

FAULTS = Path(__file__).resolve().parent
GRACE_S = 20.0  # of ranks whose fellow has failed: to end by themselves, and print why
# what makes the samples of W ranks x b the same problem as those of one rank x W b
PLAIN = ("model.drop_path=0.0", "losses.koleo=null", "losses[faults.saboteur]={}")


def arguments(world: int, config: Path, *words: str, torchrun: tuple[str, ...] = ()) -> list[str]:
    """What follows `python` for `tapct train` on `world` ranks."""
    train = ["-m", "tapct", "train", str(config), *words]
    if world == 1 and not torchrun:
        return train
    options = ["--standalone", f"--nproc-per-node={world}", *torchrun]
    return ["-m", "torch.distributed.run", *options, *train]


def environment(fault: str = "") -> dict[str, str]:
    """For the ranks: one thread each, the saboteur within reach, and what it shall do."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    path = os.pathsep.join([str(FAULTS), kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        **({"TAPCT_FAULT": fault} if fault else {}),
    }


def start(
    world: int,
    folder: Path,
    store: Path,
    *words: str,
    fault: str = "",
    torchrun: tuple[str, ...] = (),
    more: dict[str, str] | None = None,
    fresh: Path | None = None,
) -> Forked:
    """A run in FOLDER/run that continues by itself.

    Args:
        torchrun: options of torchrun.
        more: environment variables of all ranks.
        fresh: folder for a program with which torchrun restarts each rank in a Python of its own,
            which hashes strings differently; None restarts all from the nest, as they began.
    """
    line = arguments(world, write_config(folder, store), *words, torchrun=torchrun)
    known = {**environment(fault), **(more or {})}
    known = with_nest(known)
    if fresh is not None:
        known["PYTHON_EXEC"] = fresh_when_restarted(fresh)
    return Forked(line, env=known)


def fresh_when_restarted(folder: Path) -> str:
    """A program that is a Python from the nest at first, and one of its own after a restart."""
    program = folder / "python"
    program.write_text(
        '#!/bin/sh\nif [ "$TORCHELASTIC_RESTART_COUNT" = 0 ]; then\n'
        f'exec {python()} "$@"\nelse\nexec {sys.executable} "$@"\nfi\n'
    )
    program.chmod(0o755)
    return str(program)


def launch(
    world: int, folder: Path, store: Path, *words: str, fault: str = "", timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """A run in FOLDER/run from start to end; the caller tests how it ends."""
    return ended(start(world, folder, store, *words, fault=fault), timeout)


def train(
    world: int,
    folder: Path,
    store: Path,
    *words: str,
    fault: str = "",
    timeout: float = 120.0,
    more: dict[str, str] | None = None,
    each: Sequence[dict[str, str]] = (),
) -> subprocess.CompletedProcess[str]:
    """What `launch` does, without torchrun.

    Args:
        more: environment variables of all ranks.
        each: further environment variables of each rank.
    """
    return all_ended(
        begin(world, folder, store, *words, fault=fault, more=more, each=each), timeout
    )


def begin(
    world: int,
    folder: Path,
    store: Path,
    *words: str,
    fault: str = "",
    more: dict[str, str] | None = None,
    each: Sequence[dict[str, str]] = (),
) -> list[Forked]:
    """Start the ranks of a run; arguments as those of `train`."""
    asked = ["-m", "tapct", "train", str(write_config(folder, store)), *words]
    common = {
        **environment(fault),
        **(more or {}),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(free_ports()))}
    ranks = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting} if world > 1 else {}
        own = each[rank] if rank < len(each) else {}
        ranks.append(Forked(asked, env={**common, **place, **own}))
    return ranks


def all_ended(ranks: Sequence[Forked], timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """How the ranks of a run ended, as one process."""
    codes = end_together(ranks, timeout, GRACE_S)
    out, err = ("".join(output) for output in zip(*(rank.output() for rank in ranks), strict=True))
    if None in codes and not any(codes):
        raise subprocess.TimeoutExpired(ranks[0].args, timeout, out, err)
    code = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess(ranks[0].args, code, out, err)


@functools.cache
def free_ports() -> Iterator[int]:
    """Ports that nobody listens on, below those that the system gives away by itself; processes
    begin far apart.
    """
    first = 30000 + os.getpid() * 101 % 2700

    def unused(port: int) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) != 0

    return filter(unused, itertools.cycle([*range(first, 32700), *range(30000, first)]))


def ended(launcher: Forked, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """What a started run printed by its end; one that does not end is ended with all its ranks."""
    try:
        out, err = launcher.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun ends its ranks, which have sessions of their own, after half a minute by force
        launcher.terminate()
        with suppress(subprocess.TimeoutExpired):
            launcher.communicate(timeout=60)
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(launcher.args, launcher.returncode or 0, out, err)


def good(ended: subprocess.CompletedProcess[str]) -> str:
    """What a run printed, which must have gone well."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def largest_difference(
    run: Path, reference: Path, prefixes: tuple[str, ...], floor: float = 1e-6
) -> float:
    """Over all steps and numbers of metrics.jsonl with these prefixes: |a - b| / max(|b|,
    floor).
    """
    rows, wanted = numbers_of(run), numbers_of(reference)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    worst = 0.0
    for row, other in zip(rows, wanted, strict=True):
        names = [name for name in other if name.startswith(prefixes) and name != "health/rankme"]
        assert names and [name for name in row if name in names] == names
        worst = max(
            worst, *(abs(row[name] - other[name]) / max(abs(other[name]), floor) for name in names)
        )
    return worst


def largest_state_difference(run: Path, reference: Path, scratch: Path) -> float:
    """Over all weights, moments and centres of the newest checkpoints: the largest absolute
    difference.
    """
    states: list[dict[str, Any]] = []
    for number, folder in enumerate((run, reference)):
        newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
        state = state_of(newest, scratch / f"{number}.pt")
        states.append({name: value for name, value in state.items() if not name.startswith(".rng")})
    assert states[0].keys() == states[1].keys() and len(states[0]) > 100
    tensors = [
        (states[0][name], value)
        for name, value in states[1].items()
        if isinstance(value, torch.Tensor)
    ]
    assert len(tensors) > 100
    return max(float((a.double() - b.double()).abs().max()) for a, b in tensors if a.numel())
