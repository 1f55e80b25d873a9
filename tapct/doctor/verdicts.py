"""From facts to findings: pure, so that each outcome can be shown without the machine that has
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tapct.doctor.facts import (
    INSTALL,
    AllReduce,
    Attention,
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
LEAST_GLOO, LEAST_NCCL = 0.1 * GB, 5 * GB  # a laptop's loopback and PCIe 3 do better
LEAST_INSIDE, LEAST_FROM_HOST = 100 * GB, 4 * GB
LEAST_SLABS = 10.0  # per second; a small model on one GPU takes more


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= power:
            return f"{num_bytes / power:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def _broken(name: str, found: Broken, remedy: str) -> Finding:
    return Finding(name, "fail", found.why, found.remedy or remedy)


def packages(found: tuple[Package, ...] | Broken) -> Finding:
    """Python and packages against what pyproject.toml asks for."""
    if isinstance(found, Broken):
        return Finding("packages", "warn", found.why, INSTALL)
    told = ", ".join(
        f"{one.name} {one.version}"
        for one in found
        if one.name in ("python", "torch", "numpy", "blosc2")
    )
    wrong = [one for one in found if not one.fits]
    if not wrong:
        return Finding("packages", "ok", f"{told}; all {len(found)} requirements are met")
    words = "; ".join(
        f"{one.name} {one.version or 'is missing'}, wanted {one.wanted or 'any'}" for one in wrong
    )
    return Finding("packages", "fail", words, INSTALL)


def torch(found: Torch | Broken, has_nvidia: bool) -> Finding:
    """CUDA of the build against the driver's."""
    if isinstance(found, Broken):
        return _broken("torch", found, f"{INSTALL}; then python -c 'import torch'")
    if not found.cuda:
        if has_nvidia:
            remedy = "install torch with CUDA, see pytorch.org/get-started"
            return Finding(
                "torch",
                "fail",
                f"{found.version} is built for CPUs, but there is an NVIDIA GPU",
                remedy,
            )
        return Finding("torch", "ok", f"{found.version}, built for CPUs")
    words = f"{found.version}, CUDA {found.cuda}"
    if not found.driver:
        if has_nvidia:
            return Finding(
                "torch",
                "fail",
                f"{words}; the driver does not answer",
                "nvidia-smi should list GPUs",
            )
        return Finding("torch", "ok", f"{words}; no NVIDIA driver here")
    words += f", driver serves {found.driver}"
    build, driver = (
        [int(part) for part in text.split(".")[:2]] for text in (found.cuda, found.driver)
    )
    if build[0] > driver[0]:
        remedy = f"a newer NVIDIA driver, or a torch built for CUDA {driver[0]}"
        return Finding("torch", "fail", f"{words}: too old", remedy)
    if build > driver:
        remedy = "a newer driver, should kernels fail to start"
        return Finding(
            "torch", "warn", f"{words}: older than the build, within one major version", remedy
        )
    return Finding("torch", "ok", words)


def gpus(found: Gpus | Broken, settings: Settings, has_nvidia: bool) -> Finding:
    """GPUs that torch sees."""
    if isinstance(found, Broken):
        return _broken(
            "gpu", found, "look at nvidia-smi; a driver that hangs needs an administrator"
        )
    if not found.gpus:
        if has_nvidia:
            remedy = "look at CUDA_VISIBLE_DEVICES and nvidia-smi"
            return Finding("gpu", "fail", "there is one, but torch sees none", remedy)
        if settings.device == "cuda":
            remedy = "device=cpu, or ask for a GPU: srun --gres=gpu:1 tapct doctor"
            return Finding("gpu", "fail", "none, but the config says device=cuda", remedy)
        if settings.device == "cpu":
            return Finding("gpu", "ok", "none, and the config asks for none")
        return Finding(
            "gpu",
            "warn",
            "none: training runs on the CPU",
            "on a cluster: srun --gres=gpu:1 tapct doctor",
        )
    first = found.gpus[0]
    names = {gpu.name for gpu in found.gpus}
    has_bf16 = all(gpu.capability >= (8, 0) for gpu in found.gpus)
    words = (
        f"{len(found.gpus)} x {' / '.join(sorted(names))}, {size(first.memory)} each, compute "
        "capability "
    )
    words += f"{first.capability[0]}.{first.capability[1]}, bf16 {'yes' if has_bf16 else 'no'}"
    if settings.precision == "bf16" and not has_bf16:
        return Finding(
            "gpu", "warn", words, "train.precision=fp32: without bf16 units it is emulated"
        )
    if len(names) > 1:
        return Finding(
            "gpu",
            "warn",
            words,
            "choose equal ones with CUDA_VISIBLE_DEVICES: the slowest sets the pace",
        )
    full = [i for i, gpu in enumerate(found.gpus) if gpu.free < 0.8 * gpu.memory]
    if full:
        words += (
            f"; GPU {', '.join(map(str, full))} is in use: {size(found.gpus[full[0]].free)} free"
        )
        return Finding(
            "gpu",
            "warn",
            words,
            "nvidia-smi shows by whom; choose others with CUDA_VISIBLE_DEVICES",
        )
    return Finding("gpu", "ok", words)


def nccl(found: Gpus) -> Finding:
    """Whether torch can talk between GPUs."""
    if not found.gpus:
        return Finding("nccl", "ok", "not needed without GPUs")
    if found.nccl:
        return Finding("nccl", "ok", found.nccl)
    state: State = "fail" if len(found.gpus) > 1 else "warn"
    return Finding(
        "nccl",
        state,
        "torch has none",
        "install torch with CUDA from pytorch.org, which brings NCCL",
    )


def copy(found: Copy | Broken) -> Finding:
    """Memory of the first GPU."""
    if isinstance(found, Broken):
        return _broken("gpu copy", found, "look at nvidia-smi -q for errors, and at ulimit -l")
    words = (
        f"{found.inside / GB:.0f} GB/s within the GPU, {found.from_host / GB:.1f} GB/s from "
        "pinned memory"
    )
    if found.inside < LEAST_INSIDE or found.from_host < LEAST_FROM_HOST:
        remedy = "slow: is the GPU shared, or its slot narrow? nvidia-smi; nvidia-smi -q -d PCIE"
        return Finding("gpu copy", "warn", words, remedy)
    return Finding("gpu copy", "ok", words)


def all_reduce(found: AllReduce | Broken, backend: str) -> Finding:
    """A real sum over processes."""
    least, remedy = {
        "gloo": (
            LEAST_GLOO,
            "the host name must lead to this machine (/etc/hosts), or export GLOO_SOCKET_IFNAME=lo",
        ),
        "nccl": (
            LEAST_NCCL,
            "run with NCCL_DEBUG=INFO; nvidia-smi topo -m; try NCCL_P2P_DISABLE=1",
        ),
    }[backend]
    name = f"{backend} sum"
    if isinstance(found, Broken):
        return _broken(name, found, remedy)
    words = f"all-reduce over {found.world} processes, {found.rate / GB:.3g} GB/s"
    if not found.right:
        return Finding(name, "fail", f"{words}: the sum is wrong", remedy)
    return (
        Finding(name, "warn", f"{words}: slow", remedy)
        if found.rate < least
        else Finding(name, "ok", words)
    )


def attention(found: Attention | Broken) -> Finding:
    """Back-ends of attention on this device."""
    if isinstance(found, Broken):
        return _broken("attention", found, INSTALL)
    others = (
        f"xformers {found.xformers or 'not installed (optional)'}, varlen "
        f"{'yes' if found.varlen else 'no'}"
    )
    words = f"sdpa on {found.device}: {', '.join(found.kernels) or 'no kernel'}; {others}"
    if not found.kernels:
        return Finding(
            "attention",
            "fail",
            f"{words}; none ran",
            "install a torch that is built for this device",
        )
    if found.kernels == ("math",) and found.device == "cuda":
        remedy = "attention will write N x N matrices: take smaller windows or batches"
        return Finding("attention", "warn", words, remedy)
    return Finding("attention", "ok", words)


def config(found: Settings | Broken, path: str) -> Finding:
    """The config file."""
    if isinstance(found, Broken):
        return _broken("config", found, f"mend {path} or the key=value")
    return Finding("config", "ok", f"{path} is valid")


def reads(found: Reads | Broken | None) -> Finding:
    """How fast slabs come out of the store."""
    if found is None:
        return Finding("store", "ok", "not measured; name a CONFIG or --store DIR")
    if isinstance(found, Broken):
        return _broken(
            "store",
            found,
            "tapct pack makes one; if it is there, mount its disk, or name it: --store DIR",
        )
    words = (
        f"{found.scans} scans; {found.slabs:.0f} slabs of {found.depth} slices a second by "
        f"{found.threads} threads, "
        f"{found.rate / MB:.0f} MB/s: feeds {found.slabs:.0f} samples/s"
    )
    if found.slabs < LEAST_SLABS:
        return Finding(
            "store", "warn", words, "copy it to a local disk, or raise data.loader.workers"
        )
    return Finding("store", "ok", words)


def cpu(found: Cpu) -> Finding:
    """CPUs that may be used, and whether torch will start more threads than that."""
    share = math.inf if found.quota is None else found.quota
    usable = min(float(found.allowed), share)
    words = f"{found.count} CPUs, {found.allowed} for this process"
    words += f", {share:.3g} by its cgroup" if math.isfinite(share) else ""
    words += f", OMP_NUM_THREADS={found.threads}" if found.threads else ""
    if usable < 1:
        return Finding(
            "cpu", "fail", words, "ask for whole CPUs: --cpus-per-task=8, or the container's --cpus"
        )
    if (found.threads or found.allowed) > usable + 0.5:
        return Finding(
            "cpu", "warn", words, f"too many threads: export OMP_NUM_THREADS={math.floor(usable)}"
        )
    return Finding("cpu", "ok", words)


def limits(found: Limits) -> Finding:
    """Limits of the shell."""

    def told(value: float) -> str:
        return f"{value:.0f}" if math.isfinite(value) else "unlimited"

    locked = size(found.locked_bytes) if math.isfinite(found.locked_bytes) else "unlimited"
    words = (
        f"{told(found.open_files)} open files, {told(found.processes)} processes, {locked} "
        "locked memory"
    )
    if found.open_files < 256 or found.processes < 64:
        return Finding(
            "limits",
            "fail",
            words,
            "ulimit -n 65536; ulimit -u 4096 (or /etc/security/limits.conf)",
        )
    if found.open_files < 1024 or found.processes < 1024:
        return Finding(
            "limits",
            "warn",
            words,
            "ulimit -n 65536; ulimit -u 4096 (or /etc/security/limits.conf)",
        )
    if found.infiniband and found.locked_bytes < 1 << 30:
        remedy = "InfiniBand wants ulimit -l unlimited (on a cluster: its administrator)"
        return Finding("limits", "warn", words, remedy)
    return Finding("limits", "ok", words)


def room(name: str, found: Space | Broken, least: float, good: float, remedy: str) -> Finding:
    """Room in a folder that has to be written.

    Args:
        least: bytes below which a run fails.
        good: bytes below which it may.
    """
    if isinstance(found, Broken):
        return _broken(name, found, f"is its disk there? {remedy}")
    if found.refusal:
        return Finding(name, "fail", f"{found.path}: {found.refusal}", remedy)
    words = f"{found.path}: {size(found.free)} free of {size(found.total)}"
    state: State = "fail" if found.free < least else "warn" if found.free < good else "ok"
    return Finding(name, state, words, remedy if state != "ok" else "")


def slurm(found: Slurm | Broken | None) -> Finding:
    """The queue, where there is one."""
    if found is None:
        return Finding("slurm", "ok", "not here, and not needed on one machine")
    if isinstance(found, Broken):
        if (
            "configuration source" in found.why
        ):  # the client is installed, but there is no slurm.conf
            return Finding(
                "slurm",
                "warn",
                found.why,
                "on a cluster: its administrator; elsewhere it is not needed",
            )
        return _broken(
            "slurm", found, "scontrol ping; its administrator knows whether slurmctld is down"
        )
    if not found.up:
        return Finding(
            "slurm",
            "warn",
            f"no partition of {len(found.down)} is up",
            "sinfo --summarize; wait, or ask",
        )
    shown = ", ".join(found.up[:6]) + (", ..." if len(found.up) > 6 else "")
    return Finding("slurm", "ok", f"partitions up: {shown}; jobs of yours: {found.jobs}")


def wandb(mode: str, has_key: bool) -> Finding:
    """Whether metrics leave the machine, and whether they can."""
    if mode != "online":
        where = "off" if mode == "disabled" else "offline, written to RUN/wandb"
        return Finding("wandb", "ok", f"{where}; no internet needed")
    if not has_key:
        return Finding(
            "wandb", "fail", "online, but there is no key", "wandb login, or log.wandb.mode=offline"
        )
    return Finding(
        "wandb",
        "ok",
        "online with a key; the training node needs internet, else log.wandb.mode=offline",
    )


def umask(found: int) -> Finding:
    """Who else may write what a run writes."""
    if not found & 0o002:
        words = (
            f"{found:04o}: everybody may change your runs, and a checkpoint is trusted like code"
        )
        return Finding("umask", "warn", words, "umask 022, or 077 for yourself alone")
    readers = (
        "only you" if found & 0o044 == 0o044 else "your group" if found & 0o004 else "everybody"
    )
    return Finding("umask", "ok", f"{found:04o}: {readers} can read new runs")


def summary(findings: Sequence[Finding]) -> str:
    """How many of each."""
    counts = {
        state: sum(one.state == state for one in findings) for state in ("ok", "warn", "fail")
    }
    return f"{len(findings)} checks: " + ", ".join(
        f"{count} {state}" for state, count in counts.items()
    )
