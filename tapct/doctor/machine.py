"""Facts that are read without torch and at once. External commands have a time-out."""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tapct.doctor.facts import Broken, Cpu, Limits, Package, Slurm

COMMAND_SECONDS = 8.0
END_SECONDS = 2.0  # for a killed process to end; one that waits for a dead disk does not end


def start(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a process in a session of its own, so that it can be ended with all its children."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[str, str, bool]:
    """Wait for a process, and end it with its children when its time is over.

    Args:
        process: process from `start`.
        seconds: longest time to wait.
    Returns:
        Standard output, standard error, and whether the process ended by itself.
    """
    try:
        out, err = process.communicate(timeout=max(seconds, 0.0))
        return out, err, True
    except subprocess.TimeoutExpired:
        kill(process)
    try:
        out, err = process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:  # it cannot be killed
        out, err = "", ""
    return out, err, False


def kill(process: subprocess.Popen[str]) -> None:
    """End a process from `start` with its children; one that has ended already is no error."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run(command: Sequence[str], seconds: float = COMMAND_SECONDS) -> str | Broken:
    """Standard output of an external command, or the reason why there is none."""
    try:
        process = start(command)
    except OSError as error:
        return Broken(f"{command[0]}: {error.strerror}")
    out, err, by_itself = ended(process, seconds)
    if not by_itself:
        return Broken(f"{command[0]} did not respond within {seconds:g} s")
    if process.returncode:
        why = last_line(err) or f"exit code {process.returncode}"
        return Broken(why if why.startswith(command[0]) else f"{command[0]}: {why}")
    return out


def last_line(text: str) -> str:
    """The last line of a text that is not blank; empty without one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def packages(distribution: str = "tapct") -> tuple[Package, ...] | Broken:
    """Python and every package that the installed tapct requires, extras left out."""
    try:
        about = metadata.metadata(distribution)
        wanted = [Requirement(line) for line in metadata.requires(distribution) or ()]
    except metadata.PackageNotFoundError:
        return Broken(f"{distribution} is not installed; Python imports it from PYTHONPATH")
    facts = [
        _package(Requirement(f"python{about['Requires-Python'] or ''}"), platform.python_version())
    ]
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            facts.append(_package(requirement, metadata.version(requirement.name)))
        except metadata.PackageNotFoundError:
            facts.append(_package(requirement, ""))
    return tuple(facts)


def _package(wanted: Requirement, version: str) -> Package:
    fits = bool(version) and wanted.specifier.contains(version, prereleases=True)
    return Package(wanted.name, str(wanted.specifier), version, fits)


def cpu(environment: Mapping[str, str]) -> Cpu:
    """CPUs, and how many of them this process may use."""
    threads = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    quota = cgroup_cpus(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    count = os.cpu_count() or 1
    return Cpu(
        count, len(os.sched_getaffinity(0)), quota, int(threads) if threads.isdigit() else None
    )


def cgroup_cpus(membership: Path, root: Path) -> float | None:
    """CPUs that the control group of this process allows, for cgroups versions 2 and 1.

    Args:
        membership: file that names the group, /proc/self/cgroup.
        root: folder at which the groups are mounted.
    Returns:
        None without a limit.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for line in lines:
        if len(line) != 3:
            continue
        _, controllers, group = line
        if not controllers:  # version 2 has one hierarchy
            base = root
        elif "cpu" in controllers.split(","):
            base = root / "cpu"
        else:
            continue
        inner = base / group.lstrip("/")
        # the limits of all parents hold too; in a container the group's own path may be missing
        for folder in [inner, *inner.parents, base]:
            if folder == base or base in folder.parents:
                limits.append(_cpu_limit(folder))
    return min((limit for limit in limits if limit), default=None)


def _cpu_limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def limits() -> Limits:
    """Limits of this process, which its children inherit."""

    def soft(kind: int) -> float:
        limit = resource.getrlimit(kind)[0]
        return math.inf if limit == resource.RLIM_INFINITY else float(limit)

    cards = Path("/sys/class/infiniband")
    return Limits(
        soft(resource.RLIMIT_NOFILE),
        soft(resource.RLIMIT_NPROC),
        soft(resource.RLIMIT_MEMLOCK),
        cards.is_dir() and any(cards.iterdir()),
    )


def umask() -> int:
    """Permission bits that new files lack."""
    bits = os.umask(0o077)  # it can only be read by setting it
    os.umask(bits)
    return bits


def slurm(seconds: float = COMMAND_SECONDS) -> Slurm | Broken | None:
    """Partitions and the user's jobs; None where SLURM is not installed."""
    if shutil.which("sinfo") is None:
        return None
    partitions = run(["sinfo", "--noheader", "--format=%R %a"], seconds)
    if isinstance(partitions, Broken):
        return partitions
    jobs = run(["squeue", "--noheader", "--format=%i", "--me"], seconds)
    if isinstance(jobs, Broken):
        return jobs
    states = dict(line.split()[:2] for line in partitions.splitlines() if len(line.split()) >= 2)
    up = tuple(name for name, state in states.items() if state == "up")
    return Slurm(up, tuple(name for name in states if name not in up), len(jobs.split()))


def has_wandb_key(environment: Mapping[str, str], home: Path | None) -> bool:
    """Whether wandb has a key to log in; the key itself is not read."""
    if environment.get("WANDB_API_KEY"):
        return True
    netrc = Path(environment["NETRC"]) if "NETRC" in environment else None
    if netrc is None and home is not None:
        netrc = home / ".netrc"
    try:
        return netrc is not None and "wandb" in netrc.read_text(errors="replace")
    except OSError:
        return False


def has_nvidia() -> bool:
    """Whether the kernel has an NVIDIA GPU, independently of torch."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
