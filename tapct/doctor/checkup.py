"""The checks of `tapct doctor`, one line each. Every check has a time-out."""

from __future__ import annotations

import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from tapct.base import console, ending, files, ranks
from tapct.base.exits import UserError
from tapct.base.ranks import Ranks
from tapct.doctor import machine, nodes, verdicts
from tapct.doctor.facts import (
    AllReduce,
    AttentionKernels,
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
from tapct.doctor.probes import PROBE_SECONDS, Probe, Reports

DEVICE, SITE, FOLDERS = "tapct.doctor.device", "tapct.doctor.site", "tapct.doctor.folders"
FOLDER_SECONDS = 10.0
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
INDENT = 19  # columns before the text of a line
NARROWEST = 40  # columns; narrower terminals get longer lines
ROOM = {  # bytes below which a run fails, bytes below which it may fail, remedy
    "shared memory": (128e6, 1e9, "docker run --shm-size=16g or --ipc=host; or empty /dev/shm"),
    "temporary": (100e6, 1e9, "export TMPDIR=/path/to/a/local/folder with more room"),
    "disk": (2e9, 20e9, "free some space, or choose another out="),
}


def findings(
    config: Path | None,
    overrides: Sequence[str],
    store: Path | None,
    seconds: float = PROBE_SECONDS,
) -> Iterator[Finding]:
    """Run all checks; yields each finding as soon as it is known.

    Args:
        config: YAML config whose store, run folder, wandb mode and device are checked.
        overrides: `key=value` for the config.
        store: store to read from instead of the config's.
        seconds: time after which a probe is ended.
    """
    temporary = check_folder("temporary", Path(os.environ.get("TMPDIR") or "/tmp"))
    meeting = "" if temporary.state == "fail" else tempfile.mkdtemp(prefix="tapct-doctor-")
    torch_probe = Probe(DEVICE, "torch", {}, seconds)
    gloo_probes = _all_reduce_probes("gloo", 2, meeting, seconds) if meeting else []
    probes = [torch_probe, *gloo_probes]
    try:
        yield from quick_findings()
        yield temporary
        # before the store is read, which would compete for the CPUs
        gloo = _all_reduce_finding(gloo_probes, "gloo")
        site = Reports([], Broken("not measured"))
        if config or store:
            arguments = {
                "config": str(config or ""),
                "overrides": list(overrides),
                "store": str(store or ""),
            }
            probes.append(Probe(SITE, "site", arguments, seconds))
            site = probes[-1].reports()
        settings, lines = site_findings(site, config, store)
        yield from lines
        cards, lines = device_findings(torch_probe.reports(), settings)
        yield from lines
        yield gloo
        if len(cards) > 1 and meeting:
            nccl_probes = _all_reduce_probes("nccl", len(cards), meeting, seconds)
            probes += nccl_probes
            yield _all_reduce_finding(nccl_probes, "nccl")
    finally:
        for probe in probes:
            probe.stop()
        if meeting:
            shutil.rmtree(meeting, ignore_errors=True)


def of_all_nodes(
    place: Ranks,
    config: Path | None,
    overrides: Sequence[str],
    store: Path | None,
    seconds: float = PROBE_SECONDS,
) -> tuple[list[Finding], int]:
    """The checks of all nodes, started once per rank.

    Args:
        place: place of this process.
        config: as in `findings`.
        overrides: as in `findings`.
        store: as in `findings`.
        seconds: as in `findings`.
    Returns:
        The table, on the first rank, and nothing on the others; and the exit code of all.
    Raises:
        UserError: the ranks cannot meet.
    """
    host, first_port = ranks.rendezvous(os.environ)
    port = first_port + nodes.PORTS_LATER
    try:
        table = nodes.NodeTable(place.world, port) if place.is_first else None
    except OSError as error:
        raise UserError(
            f"{host}: port {port} cannot be used ({error.strerror}); set another MASTER_PORT"
        ) from error
    rank = nodes.Rank(place.rank, ("127.0.0.1" if place.is_first else host, port))
    name, leads = ending.node_name(os.environ), place.local_rank == 0
    met = rank.ask("hello", node=name, leads=leads)
    if leads:
        found: list[Finding] = []
        if not met["missing"] and len(met["leaders"]) > 1:
            backend = "nccl" if machine.has_nvidia() else "gloo"
            found.append(
                nodes.all_reduce_between(
                    met["leaders"], place.rank, host, port + 1, backend, seconds
                )
            )
        found += findings(config, overrides, store, seconds)
    skew_s = rank.skew_s()
    if table is None:
        if not leads:
            return [], 0  # its node's first rank reports
        return [], rank.ask("report", node=name, findings=nodes.as_json(found), skew_s=skew_s)[
            "code"
        ]
    own = nodes.NodeReport(name, tuple(found), skew_s)
    with table.changed:
        table.reports[place.rank] = own
    merged = nodes.merged(table.collect(), table.missing())
    silent = [rank for rank in table.leaders if rank not in table.reports]
    for rank_of_node in silent:
        text = f"{table.nodes[rank_of_node]}: no report within {nodes.REPORT_SECONDS:.0f} s"
        merged.append(Finding("report", "fail", text, "run tapct doctor on this node"))
    code = int(any(finding.state == "fail" for finding in merged))
    table.close(code)
    return merged, code


def quick_findings() -> Iterator[Finding]:
    """The checks that take no time."""
    yield verdicts.packages(machine.packages())
    yield verdicts.cpu(machine.cpu(os.environ))
    yield verdicts.limits(machine.limits())
    yield verdicts.umask(machine.umask())
    yield verdicts.slurm(machine.slurm())
    yield check_folder("shared memory", Path("/dev/shm"))


def check_folder(name: str, path: Path, seconds: float = FOLDER_SECONDS) -> Finding:
    """Check the room in a folder that a run writes to.

    Args:
        name: name of the check, a key of `ROOM`; a run folder ("disk") need not exist yet.
        path: folder.
        seconds: time after which the probe is ended; a dead network disk never responds.
    """
    arguments = {"path": str(path), "must_exist": name != "disk"}
    space = Probe(FOLDERS, "space", arguments, seconds).reports().of("space", Space)
    least, good, remedy = ROOM[name]
    return verdicts.room(name, space, least, good, remedy)


def site_findings(
    site: Reports, config: Path | None, store: Path | None
) -> tuple[Settings, list[Finding]]:
    """What the config sets for its machine, and the findings about config, folder and store.

    Args:
        site: reports of the probe of config and store.
        config: YAML config, if one was given.
        store: store, if one was given.
    """
    settings = Settings()
    lines = []
    if config:
        read = site.of("settings", Settings)
        lines.append(verdicts.config(read, str(config)))
        if isinstance(read, Broken):
            # without a config, its run folder, wandb mode and store are not known
            if store:
                lines.append(verdicts.reads(site.of("reads", Reads)))
            return settings, lines
        settings = read
    lines.append(check_folder("disk", Path(settings.out)))
    has_key = machine.has_wandb_key(os.environ, files.home_folder())
    lines.append(verdicts.wandb(settings.wandb, has_key))
    reads = site.of("reads", Reads) if store or settings.store else None
    lines.append(verdicts.reads(reads))
    return settings, lines


def device_findings(reports: Reports, settings: Settings) -> tuple[tuple[Gpu, ...], list[Finding]]:
    """The GPUs, and the findings about torch and GPUs.

    Args:
        reports: reports of the probe of torch.
        settings: device and precision that the config asks for.
    """
    has_nvidia = machine.has_nvidia()
    build = reports.of("torch", Torch)
    if isinstance(build, Broken):  # then nothing else was measured either
        return (), [verdicts.torch(build, has_nvidia)]
    seen = reports.of("gpus", lambda gpus, nccl: Gpus(tuple(Gpu(**gpu) for gpu in gpus), nccl))
    lines = [verdicts.torch(build, has_nvidia), verdicts.gpus(seen, settings, has_nvidia)]
    cards: tuple[Gpu, ...] = ()
    if not isinstance(seen, Broken):
        cards = seen.gpus
        lines.append(verdicts.nccl(seen))
    if cards:
        lines.append(verdicts.copy(reports.of("copy", Copy)))
    lines.append(verdicts.attention(reports.of("attention", AttentionKernels)))
    return cards, lines


def _all_reduce_probes(backend: str, world: int, meeting: str, seconds: float) -> list[Probe]:
    common = {"backend": backend, "world": world, "meeting": str(Path(meeting) / backend)}
    return [Probe(DEVICE, "all_reduce", {**common, "rank": rank}, seconds) for rank in range(world)]


def _all_reduce_finding(probes: Sequence[Probe], backend: str) -> Finding:
    if not probes:
        reason = Broken("not measured: there is no temporary folder", "correct TMPDIR first")
        return verdicts.all_reduce(reason, backend)
    sums = [probe.reports().of("all_reduce", AllReduce) for probe in probes]
    broken = [each for each in sums if isinstance(each, Broken)]
    return verdicts.all_reduce(broken[0] if broken else sums[0], backend)


def lines(finding: Finding, width: int) -> list[str]:
    """A finding as text: state, name and what was measured; the remedy on lines of its own.

    Args:
        finding: result of a check.
        width: columns of the terminal.
    """
    rest = " " * INDENT
    head = f"{finding.state:<5}{finding.name:<{INDENT - 7}}"
    head += " " * max(1, INDENT - len(head))

    def wrapped(text: str, first: str) -> list[str]:
        return textwrap.wrap(
            " ".join(text.split()),
            max(width, NARROWEST),
            initial_indent=first,
            subsequent_indent=rest,
            break_on_hyphens=False,
            break_long_words=False,
        )

    shown = wrapped(finding.text, head)
    if finding.remedy:
        shown += wrapped(finding.remedy, f"{rest[:-3]}-> ")
    return shown


def show(finding: Finding) -> None:
    """Print a finding, its state in colour on a terminal."""
    out = console.console()
    text = "\n".join(lines(finding, out.width))
    out.print(finding.state, style=COLOURS[finding.state], end="")
    console.say(text.removeprefix(finding.state))
