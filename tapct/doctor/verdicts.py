"""From facts to findings. The functions are pure, so that a test can show each outcome without a
machine that has it.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence

from tapct.base.counted import counted
from tapct.base.files import NO_SPACE
from tapct.doctor.facts import (
    INSTALL,
    AllReduce,
    AttentionKernels,
    Broken,
    Copy,
    Cpu,
    Finding,
    Gpus,
    Limits,
    Package,
    Reads,
    Settings,
    Slurm,
    Space,
    State,
    Torch,
)

GB, MB = 1e9, 1e6
# What the system answers where space is missing, and where the right to write is missing.
NO_ROOM = tuple(map(os.strerror, NO_SPACE))
NO_PERMISSION = tuple(map(os.strerror, (errno.EACCES, errno.EPERM, errno.EROFS)))
# Bytes per second below which a sum over processes is slow; a laptop's loopback and PCIe 3 are
# faster.
LEAST_GLOO, LEAST_NCCL = 0.1 * GB, 5 * GB
# Bytes per second below which a GPU copies slowly, within its memory and from the host.
LEAST_INSIDE, LEAST_FROM_HOST = 100 * GB, 4 * GB
# Slabs per second below which a store is slow; a small model on one GPU needs more.
LEAST_SLABS = 10.0
ULIMITS = "ulimit -n 65536; ulimit -u 4096 (or edit /etc/security/limits.conf)"


def size(num_bytes: float) -> str:
    """Bytes as text, e.g. 12.3 GB."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= power:
            return f"{num_bytes / power:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def _broken(name: str, facts: Broken, remedy: str) -> Finding:
    return Finding(name, "fail", facts.why, facts.remedy or remedy)


def packages(facts: tuple[Package, ...] | Broken) -> Finding:
    """Python and packages against the requirements in pyproject.toml."""
    if isinstance(facts, Broken):
        return Finding("packages", "warn", facts.why, INSTALL)
    shown = [each for each in facts if each.name in ("python", "torch", "numpy", "blosc2")]
    versions = ", ".join(f"{each.name} {each.version}" for each in shown)
    wrong = [each for each in facts if not each.fits]
    if not wrong:
        return Finding("packages", "ok", f"{versions}; all {len(facts)} requirements are met")
    lines = []
    for each in wrong:
        state = each.version or "is missing"
        lines.append(f"{each.name} {state}, required {each.wanted or 'any version'}")
    return Finding("packages", "fail", "; ".join(lines), INSTALL)


def torch(facts: Torch | Broken, has_nvidia: bool) -> Finding:
    """The CUDA version of torch against the newest that the driver supports."""
    if isinstance(facts, Broken):
        return _broken("torch", facts, f"{INSTALL}; then python -c 'import torch'")
    if not facts.cuda:
        if has_nvidia:
            remedy = "install torch with CUDA, see pytorch.org/get-started"
            return Finding(
                "torch",
                "fail",
                f"{facts.version} is built for CPUs, but this machine has an NVIDIA GPU",
                remedy,
            )
        return Finding("torch", "ok", f"{facts.version}, built for CPUs")
    text = f"{facts.version}, CUDA {facts.cuda}"
    if not facts.driver:
        if has_nvidia:
            return Finding(
                "torch",
                "fail",
                f"{text}; the NVIDIA driver does not respond",
                "check that nvidia-smi lists the GPUs",
            )
        return Finding("torch", "ok", f"{text}; this machine has no NVIDIA driver")
    text += f", driver supports {facts.driver}"
    build, driver = (
        [int(part) for part in text.split(".")[:2]] for text in (facts.cuda, facts.driver)
    )
    if build[0] > driver[0]:
        remedy = f"install a newer NVIDIA driver, or a torch built for CUDA {driver[0]}"
        return Finding("torch", "fail", f"{text}: the driver is too old", remedy)
    if build > driver:
        remedy = "if kernels fail to start, install a newer driver"
        text += ": the driver is older than torch's CUDA, within one major version"
        return Finding("torch", "warn", text, remedy)
    return Finding("torch", "ok", text)


def gpus(facts: Gpus | Broken, settings: Settings, has_nvidia: bool) -> Finding:
    """The GPUs that torch sees."""
    if isinstance(facts, Broken):
        return _broken("gpu", facts, "check nvidia-smi; a driver that hangs needs an administrator")
    if not facts.gpus:
        if has_nvidia:
            remedy = "check CUDA_VISIBLE_DEVICES and nvidia-smi"
            return Finding("gpu", "fail", "this machine has a GPU, but torch sees none", remedy)
        if settings.device == "cuda":
            remedy = "set device=cpu, or request a GPU: srun --gres=gpu:1 tapct doctor"
            return Finding("gpu", "fail", "no GPU, but the config sets device=cuda", remedy)
        if settings.device == "cpu":
            return Finding("gpu", "ok", "no GPU, and the config sets device=cpu")
        return Finding(
            "gpu",
            "warn",
            "no GPU: training would run on the CPU",
            "on a cluster, request one: srun --gres=gpu:1 tapct doctor",
        )
    return _gpus(facts, settings)


def _gpus(facts: Gpus, settings: Settings) -> Finding:
    """One GPU at least: models, bf16, and whether others use them."""
    first = facts.gpus[0]
    models = sorted({gpu.name for gpu in facts.gpus})
    has_bf16 = all(gpu.capability >= (8, 0) for gpu in facts.gpus)
    text = f"{len(facts.gpus)} x {' / '.join(models)}, {size(first.memory)} each, compute "
    text += f"capability {first.capability[0]}.{first.capability[1]}, "
    text += f"bf16 {'yes' if has_bf16 else 'no'}"
    if settings.precision == "bf16" and not has_bf16:
        remedy = "set train.precision=fp32: these GPUs emulate bf16, which is slow"
        return Finding("gpu", "warn", text, remedy)
    if len(models) > 1:
        remedy = "choose equal GPUs with CUDA_VISIBLE_DEVICES: the slowest sets the pace"
        return Finding("gpu", "warn", text, remedy)
    busy = [i for i, gpu in enumerate(facts.gpus) if gpu.free < 0.8 * gpu.memory]
    if busy:
        numbers = ", ".join(map(str, busy))
        text += f"; GPU {numbers} is in use: {size(facts.gpus[busy[0]].free)} free"
        remedy = "nvidia-smi lists the processes; choose others with CUDA_VISIBLE_DEVICES"
        return Finding("gpu", "warn", text, remedy)
    return Finding("gpu", "ok", text)


def nccl(facts: Gpus) -> Finding:
    """Whether torch can communicate between GPUs."""
    if not facts.gpus:
        return Finding("nccl", "ok", "not needed without GPUs")
    if facts.nccl:
        return Finding("nccl", "ok", facts.nccl)
    state: State = "fail" if len(facts.gpus) > 1 else "warn"
    return Finding(
        "nccl",
        state,
        "torch has no NCCL",
        "install torch with CUDA from pytorch.org, which brings NCCL",
    )


def copy(facts: Copy | Broken) -> Finding:
    """How fast the first GPU copies."""
    if isinstance(facts, Broken):
        return _broken("gpu copy", facts, "check nvidia-smi -q for errors, and ulimit -l")
    text = (
        f"{facts.inside / GB:.0f} GB/s within the GPU, {facts.from_host / GB:.1f} GB/s from "
        "pinned memory"
    )
    if facts.inside < LEAST_INSIDE or facts.from_host < LEAST_FROM_HOST:
        remedy = "slow: is the GPU shared (nvidia-smi), or its slot narrow (nvidia-smi -q -d PCIE)?"
        return Finding("gpu copy", "warn", text, remedy)
    return Finding("gpu copy", "ok", text)


def all_reduce(facts: AllReduce | Broken, backend: str) -> Finding:
    """A sum over processes."""
    least, remedy = {
        "gloo": (
            LEAST_GLOO,
            "make the host name resolve to this machine (/etc/hosts), or export "
            "GLOO_SOCKET_IFNAME=lo",
        ),
        "nccl": (
            LEAST_NCCL,
            "run with NCCL_DEBUG=INFO; nvidia-smi topo -m; try NCCL_P2P_DISABLE=1",
        ),
    }[backend]
    name = f"{backend} sum"
    if isinstance(facts, Broken):
        return _broken(name, facts, remedy)
    text = f"all-reduce over {facts.world} processes, {facts.rate / GB:.3g} GB/s"
    if not facts.right:
        return Finding(name, "fail", f"{text}: the sum is wrong", remedy)
    if facts.rate < least:
        return Finding(name, "warn", f"{text}: slow", remedy)
    return Finding(name, "ok", text)


def attention(facts: AttentionKernels | Broken) -> Finding:
    """Attention back-ends on this device."""
    if isinstance(facts, Broken):
        return _broken("attention", facts, INSTALL)
    xformers = facts.xformers or "not installed (optional)"
    if facts.xformers and facts.xformers_failure:
        xformers += f" cannot be used ({facts.xformers_failure})"
    others = f"xformers {xformers}, varlen {'yes' if facts.varlen else 'no'}"
    text = f"sdpa on {facts.device}: {', '.join(facts.kernels) or 'no kernel runs'}; {others}"
    if not facts.kernels:
        return Finding(
            "attention",
            "fail",
            text,
            "install a torch that is built for this device",
        )
    if facts.kernels == ("math",) and facts.device == "cuda":
        remedy = "attention will allocate N x N matrices: use smaller windows or batches"
        return Finding("attention", "warn", text, remedy)
    return Finding("attention", "ok", text)


def config(facts: Settings | Broken, path: str) -> Finding:
    """The config file."""
    if isinstance(facts, Broken):
        if facts.why.startswith("override: "):
            why = facts.why.removeprefix("override: ")
            return Finding("config", "fail", why, "correct this key=value on the command line")
        return _broken("config", facts, f"correct {path}")
    return Finding("config", "ok", f"{path} is valid")


def reads(facts: Reads | Broken | None) -> Finding:
    """How fast slabs come out of the store."""
    if facts is None:
        return Finding("store", "ok", "not measured; give a CONFIG or --store FOLDER")
    if isinstance(facts, Broken):
        return _broken(
            "store",
            facts,
            "create it with tapct pack; if it exists, mount its disk or pass --store FOLDER",
        )
    text = (
        f"{facts.scans} scans; {facts.slabs:.0f} slabs of {facts.depth} slices per second "
        f"with {counted(facts.threads, 'thread')}, {facts.rate / MB:.0f} MB/s: enough for "
        f"{facts.slabs:.0f} samples/s"
    )
    if facts.slabs < LEAST_SLABS:
        return Finding(
            "store", "warn", text, "copy it to a local disk, or raise data.loader.workers"
        )
    return Finding("store", "ok", text)


def cpu(facts: Cpu) -> Finding:
    """CPUs that this process may use, and whether torch will start more threads than that."""
    share = math.inf if facts.quota is None else facts.quota
    usable = min(float(facts.allowed), share)
    text = f"{facts.count} CPUs, {facts.allowed} allowed for this process"
    text += f", {share:.3g} allowed by its cgroup" if math.isfinite(share) else ""
    text += f", OMP_NUM_THREADS={facts.threads}" if facts.threads else ""
    if usable < 1:
        return Finding(
            "cpu", "fail", text, "request whole CPUs: --cpus-per-task=8, or the container's --cpus"
        )
    if (facts.threads or facts.allowed) > usable + 0.5:
        return Finding(
            "cpu",
            "warn",
            text,
            f"torch would start too many threads: export OMP_NUM_THREADS={math.floor(usable)}",
        )
    return Finding("cpu", "ok", text)


def limits(facts: Limits) -> Finding:
    """Limits of the shell (`ulimit`)."""

    def shown(value: float) -> str:
        return f"{value:.0f}" if math.isfinite(value) else "unlimited"

    locked = size(facts.locked_bytes) if math.isfinite(facts.locked_bytes) else "unlimited"
    text = (
        f"{shown(facts.open_files)} open files, {shown(facts.processes)} processes, {locked} "
        "locked memory"
    )
    if facts.open_files < 256 or facts.processes < 64:
        return Finding(
            "limits",
            "fail",
            text,
            ULIMITS,
        )
    if facts.open_files < 1024 or facts.processes < 1024:
        return Finding(
            "limits",
            "warn",
            text,
            ULIMITS,
        )
    if facts.infiniband and facts.locked_bytes < 1 << 30:
        remedy = "InfiniBand needs ulimit -l unlimited; on a cluster, ask its administrator"
        return Finding("limits", "warn", text, remedy)
    return Finding("limits", "ok", text)


def room(name: str, facts: Space | Broken, least: float, good: float, remedy: str) -> Finding:
    """Room in a folder that a run writes to.

    Args:
        name: name of the check.
        facts: room in the folder.
        least: free bytes below which a run fails.
        good: free bytes below which it may fail.
        remedy: what to do when there is too little room.
    """
    if isinstance(facts, Broken):
        return _broken(name, facts, f"is its disk mounted? {remedy}")
    if facts.refusal:
        if facts.refusal in NO_PERMISSION:
            remedy = "you have no permission to write there; choose another folder, or ask for it"
        elif facts.refusal not in NO_ROOM:
            remedy = "it cannot be used as a folder to write to; check the path, or choose another"
        return Finding(name, "fail", f"{facts.path}: {facts.refusal}", remedy)
    text = f"{facts.path}: {size(facts.free)} free of {size(facts.total)}"
    if facts.free < least:
        return Finding(name, "fail", text, remedy)
    if facts.free < good:
        return Finding(name, "warn", text, remedy)
    return Finding(name, "ok", text)


def slurm(facts: Slurm | Broken | None) -> Finding:
    """SLURM, where it is installed."""
    if facts is None:
        return Finding("slurm", "ok", "not installed, and not needed on one machine")
    if isinstance(facts, Broken):
        if "configuration source" in facts.why:
            # the client is installed, but there is no slurm.conf
            remedy = "on a cluster, ask its administrator; on one machine SLURM is not needed"
            return Finding("slurm", "warn", facts.why, remedy)
        remedy = "run scontrol ping; ask the administrator whether slurmctld is down"
        return _broken("slurm", facts, remedy)
    if not facts.up:
        return Finding(
            "slurm",
            "warn",
            f"none of {len(facts.down)} partitions is up",
            "see sinfo --summarize; wait, or ask the administrator",
        )
    shown = ", ".join(facts.up[:6]) + (", ..." if len(facts.up) > 6 else "")
    return Finding("slurm", "ok", f"partitions up: {shown}; your jobs: {facts.jobs}")


def wandb(mode: str, has_key: bool) -> Finding:
    """Whether metrics are sent to wandb, and whether this machine has a key for it."""
    if mode != "online":
        where = "disabled" if mode == "disabled" else "offline, written to RUN/wandb"
        return Finding("wandb", "ok", f"{where}; no internet needed")
    if not has_key:
        return Finding(
            "wandb",
            "fail",
            "online, but there is no key",
            "run wandb login, or set log.wandb.mode=offline",
        )
    return Finding(
        "wandb",
        "ok",
        "online, with a key; if the training node has no internet, set log.wandb.mode=offline",
    )


def umask(facts: int) -> Finding:
    """Who else may read and change the files of a run."""
    if not facts & 0o002:
        text = (
            f"{facts:04o}: everybody may change your runs, and loading a checkpoint trusts it like "
            "code"
        )
        return Finding("umask", "warn", text, "umask 022; umask 077 keeps runs private")
    if facts & 0o004 == 0:
        readers = "everybody"
    elif facts & 0o040 == 0:
        readers = "your group"
    else:
        readers = "only you"
    return Finding("umask", "ok", f"{facts:04o}: {readers} can read new runs")


def summary(findings: Sequence[Finding]) -> str:
    """The last line: how many checks ended in which state."""
    counts = []
    for state in ("ok", "warn", "fail"):
        count = sum(finding.state == state for finding in findings)
        counts.append(f"{count} {state}")
    return f"{len(findings)} checks: {', '.join(counts)}"
