"""Quick facts of this machine, read without torch. External commands get a time-out."""

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
END_SECONDS = 2.0  # what a killed process gets to vanish; one that waits for a dead disk does not


def start(
    words: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """A process that leads its own session, so that it can be ended with all that it starts."""
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[str, str, bool]:
    """Wait for a process and end its whole group after its time.

    Returns:
        Standard output and error, and whether it ended by itself.
    """
    try:
        out, err = process.communicate(timeout=max(seconds, 0.0))
        return out, err, True
    except subprocess.TimeoutExpired:
        kill(process)
    try:
        out, err = process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:  # it cannot be killed, so it is left alone
        out, err = "", ""
    return out, err, False


def kill(process: subprocess.Popen[str]) -> None:
    """End a process of `start` with all that it started; one that is gone, or another's by now, is
    left alone.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def ask(words: Sequence[str], seconds: float = COMMAND_SECONDS) -> str | Broken:
    """Standard output of an external command, or why there is none."""
    try:
        process = start(words)
    except OSError as error:
        return Broken(f"{words[0]}: {error.strerror}")
    out, err, by_itself = ended(process, seconds)
    if not by_itself:
        return Broken(f"{words[0]} gave no answer within {seconds:g} s")
    if process.returncode:
        why = last_line(err) or f"exit code {process.returncode}"
        return Broken(why if why.startswith(words[0]) else f"{words[0]}: {why}")
    return out


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def packages(distribution: str = "tapct") -> tuple[Package, ...] | Broken:
    """Python and every package that the installed tapct requires, extras left out."""
    try:
        about = metadata.metadata(distribution)
        wanted = [Requirement(line) for line in metadata.requires(distribution) or ()]
    except metadata.PackageNotFoundError:
        return Broken(f"{distribution} is not installed, only found on the path")
    found = [
        _package(Requirement(f"python{about['Requires-Python'] or ''}"), platform.python_version())
    ]
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found.append(_package(requirement, metadata.version(requirement.name)))
        except metadata.PackageNotFoundError:
            found.append(_package(requirement, ""))
    return tuple(found)


def _package(wanted: Requirement, version: str) -> Package:
    fits = bool(version) and wanted.specifier.contains(version, prereleases=True)
    return Package(wanted.name, str(wanted.specifier), version, fits)


def cpu(environment: Mapping[str, str]) -> Cpu:
    """CPUs, and how many of them this process gets."""
    threads = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    quota = cgroup_cpus(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    count = os.cpu_count() or 1
    return Cpu(
        count, len(os.sched_getaffinity(0)), quota, int(threads) if threads.isdigit() else None
    )


def cgroup_cpus(membership: Path, root: Path) -> float | None:
    """CPUs that the control group of this process allows, versions 2 and 1; None without a limit.

    Args:
        membership: /proc/self/cgroup.
        root: where the groups are mounted.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, group in (line for line in lines if len(line) == 3):
        base = (
            root if not controllers else root / "cpu" if "cpu" in controllers.split(",") else None
        )
        if base is None:
            continue
        inner = base / group.lstrip("/")
        for folder in [
            inner,
            *inner.parents,
            base,
        ]:  # within a container the group's own path may not be mounted
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
        found = resource.getrlimit(kind)[0]
        return math.inf if found == resource.RLIM_INFINITY else float(found)

    fast = Path("/sys/class/infiniband")
    return Limits(
        soft(resource.RLIMIT_NOFILE),
        soft(resource.RLIMIT_NPROC),
        soft(resource.RLIMIT_MEMLOCK),
        fast.is_dir() and any(fast.iterdir()),
    )


def umask() -> int:
    """Bits that are taken from new files."""
    found = os.umask(0o077)
    os.umask(found)
    return found


def slurm(seconds: float = COMMAND_SECONDS) -> Slurm | Broken | None:
    """Partitions and own jobs; None where SLURM is not installed."""
    if shutil.which("sinfo") is None:
        return None
    partitions = ask(["sinfo", "--noheader", "--format=%R %a"], seconds)
    if isinstance(partitions, Broken):
        return partitions
    jobs = ask(["squeue", "--noheader", "--format=%i", "--me"], seconds)
    if isinstance(jobs, Broken):
        return jobs
    states = dict(line.split()[:2] for line in partitions.splitlines() if len(line.split()) >= 2)
    up = tuple(name for name, state in states.items() if state == "up")
    return Slurm(up, tuple(name for name in states if name not in up), len(jobs.split()))


def has_wandb_key(environment: Mapping[str, str], home: Path) -> bool:
    """Whether wandb could log in; the key itself is not read."""
    netrc = Path(environment.get("NETRC", home / ".netrc"))
    try:
        return bool(environment.get("WANDB_API_KEY")) or "wandb" in netrc.read_text(
            errors="replace"
        )
    except OSError:
        return False


def has_nvidia() -> bool:
    """Whether the kernel shows an NVIDIA GPU, whatever torch says."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
