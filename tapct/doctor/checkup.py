"""`tapct doctor`: looks whether this machine can train, one line per check. Nothing here waits
without an end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from tapct.base import console
from tapct.doctor import machine, verdicts
from tapct.doctor.answers import CHILD_SECONDS, Answers, Child
from tapct.doctor.facts import (
    AllReduce,
    Attention,
    Broken,
    Copy,
    Finding,
    Gpu,
    Gpus,
    Reads,
    Settings,
    Space,
    Torch,
)

DEVICE, SITE, FOLDERS = "tapct.doctor.device", "tapct.doctor.site", "tapct.doctor.folders"
FOLDER_SECONDS = 10.0
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
INDENT = 19


def findings(
    config: Path | None,
    overrides: Sequence[str],
    store: Path | None,
    seconds: float = CHILD_SECONDS,
) -> Iterator[Finding]:
    """All checks, each as soon as it is done.

    Args:
        config: a YAML config; its store, run folder, wandb and device are looked at.
        overrides: `key=value` for it.
        store: to read from instead of the config's.
        seconds: after which a probe that runs in a process of its own is ended.
    """
    temporary = folder("temporary", Path(os.environ.get("TMPDIR") or "/tmp"))
    meeting = "" if temporary.state == "fail" else tempfile.mkdtemp(prefix="tapct-doctor-")
    children = [Child(DEVICE, "torch", {}, seconds)]
    children += _all_reducers("gloo", 2, meeting, seconds) if meeting else []
    try:
        yield from quick()
        yield temporary
        gloo = _all_reduce(
            children[1:], "gloo"
        )  # before the store is read, which would share the CPUs with it
        told = Answers([], Broken("not asked"))
        if config or store:
            asked = {
                "config": str(config or ""),
                "overrides": list(overrides),
                "store": str(store or ""),
            }
            children.append(Child(SITE, "site", asked, seconds))
            told = children[-1].answers()
        settings, found = site(told, config, store)
        yield from found
        cards, found = device(children[0].answers(), settings)
        yield from found
        yield gloo
        if len(cards) > 1 and meeting:
            peers = _all_reducers("nccl", len(cards), meeting, seconds)
            children += peers
            yield _all_reduce(peers, "nccl")
    finally:
        for child in children:
            child.stop()
        if meeting:
            shutil.rmtree(meeting, ignore_errors=True)


def quick() -> Iterator[Finding]:
    """What is soon known."""
    yield verdicts.packages(machine.packages())
    yield verdicts.cpu(machine.cpu(os.environ))
    yield verdicts.limits(machine.limits())
    yield verdicts.umask(machine.umask())
    yield verdicts.slurm(machine.slurm())
    yield folder("shared memory", Path("/dev/shm"))


ROOM = {  # bytes below which a run fails, and below which it may; remedy
    "shared memory": (128e6, 1e9, "docker run --shm-size=16g or --ipc=host; or empty /dev/shm"),
    "temporary": (100e6, 1e9, "export TMPDIR=/a/local/folder with room"),
    "disk": (2e9, 20e9, "free some, or choose another out="),
}


def folder(name: str, path: Path, seconds: float = FOLDER_SECONDS) -> Finding:
    """Whether there is room in a folder that has to be written; a run folder need not be there
    yet.
    """
    asked = {"path": str(path), "must_exist": name != "disk"}
    return verdicts.room(
        name, Child(FOLDERS, "space", asked, seconds).answers().of("space", Space), *ROOM[name]
    )


def site(told: Answers, config: Path | None, store: Path | None) -> tuple[Settings, list[Finding]]:
    """What the config says of its machine, and the findings on it, its folders and its store."""
    found = told.of("settings", Settings) if config else Settings()
    settings = Settings() if isinstance(found, Broken) else found
    findings = [verdicts.config(found, str(config))] if config else []
    findings.append(folder("disk", Path(settings.out)))
    findings.append(verdicts.wandb(settings.wandb, machine.has_wandb_key(os.environ, Path.home())))
    place = str(store or settings.store)
    findings.append(verdicts.reads(told.of("reads", Reads) if place else None))
    return settings, findings


def device(told: Answers, settings: Settings) -> tuple[tuple[Gpu, ...], list[Finding]]:
    """The GPUs, and the findings on torch and them."""
    has_nvidia = machine.has_nvidia()
    build = told.of("torch", Torch)
    if isinstance(build, Broken):  # then nothing else is known either
        return (), [verdicts.torch(build, has_nvidia)]
    seen = told.of("gpus", lambda gpus, nccl: Gpus(tuple(Gpu(**gpu) for gpu in gpus), nccl))
    found = [verdicts.torch(build, has_nvidia), verdicts.gpus(seen, settings, has_nvidia)]
    cards: tuple[Gpu, ...] = () if isinstance(seen, Broken) else seen.gpus
    if not isinstance(seen, Broken):
        found.append(verdicts.nccl(seen))
    if cards:
        found.append(verdicts.copy(told.of("copy", Copy)))
    found.append(verdicts.attention(told.of("attention", Attention)))
    return cards, found


def _all_reducers(backend: str, world: int, meeting: str, seconds: float) -> list[Child]:
    common = {"backend": backend, "world": world, "meeting": str(Path(meeting) / backend)}
    return [Child(DEVICE, "all_reduce", {**common, "rank": rank}, seconds) for rank in range(world)]


def _all_reduce(peers: Sequence[Child], backend: str) -> Finding:
    if not peers:
        return verdicts.all_reduce(
            Broken("not tried without a temporary folder", "mend TMPDIR first"), backend
        )
    found = [peer.answers().of("all_reduce", AllReduce) for peer in peers]
    broken = [one for one in found if isinstance(one, Broken)]
    return verdicts.all_reduce(broken[0] if broken else found[0], backend)


def lines(finding: Finding, width: int) -> list[str]:
    """A finding as text: state, name and words, and the remedy on lines of its own."""
    rest = " " * INDENT
    head = f"{finding.state:<5}{finding.name:<{INDENT - 7}}"
    head += " " * max(1, INDENT - len(head))

    def wrapped(text: str, first: str) -> list[str]:
        return textwrap.wrap(
            " ".join(text.split()),
            max(width, 40),
            initial_indent=first,
            subsequent_indent=rest,
            break_on_hyphens=False,
            break_long_words=False,
        )

    return wrapped(finding.words, head) + (
        wrapped(finding.remedy, f"{rest[:-3]}-> ") if finding.remedy else []
    )


def show(finding: Finding) -> None:
    """Print a finding, its state in colour on a terminal."""
    out = console.console()
    text = "\n".join(lines(finding, out.width))
    out.print(finding.state, style=COLOURS[finding.state], end="")
    console.say(text.removeprefix(finding.state))
