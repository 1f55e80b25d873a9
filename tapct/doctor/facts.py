"""What the probes measure, and the line of a check: plain data between probes and verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "warn", "fail"]
INSTALL = "pip install -c constraints.txt -e '.[dev]' in tapct's folder"


@dataclass(frozen=True)
class Finding:
    """The result of a check: one line for the user.

    Args:
        name: name of the check, one or two words.
        state: fail: a run will not work; warn: it may be slow, or disturb others.
        text: what was measured.
        remedy: what to do; empty when the state is ok.
    """

    name: str
    state: State
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Broken:
    """A probe without facts: it failed, or was ended after its time.

    Args:
        why: reason, as one line.
        remedy: what to do, if the cause lies outside of what was measured; empty: the check's own
            remedy applies.
    """

    why: str
    remedy: str = ""


@dataclass(frozen=True)
class Package:
    """A requirement of tapct and the installed version (empty: it is not installed)."""

    name: str
    wanted: str
    version: str
    fits: bool


@dataclass(frozen=True)
class Cpu:
    """CPUs of this machine.

    Args:
        count: CPUs of the machine.
        allowed: CPUs that this process may run on.
        quota: CPUs that its control group allows; None: no limit.
        threads: OMP_NUM_THREADS; None: not set.
    """

    count: int
    allowed: int
    quota: float | None
    threads: int | None


@dataclass(frozen=True)
class Limits:
    """Soft limits (`ulimit`), infinite where there is none; whether an InfiniBand card exists."""

    open_files: float
    processes: float
    locked_bytes: float
    infiniband: bool


@dataclass(frozen=True)
class Space:
    """A folder: its disk's total and free bytes, and why it cannot be written (empty: it can)."""

    path: str
    total: int
    free: int
    refusal: str = ""


@dataclass(frozen=True)
class Slurm:
    """Partitions that are up, partitions that are not, and the number of the user's jobs."""

    up: tuple[str, ...]
    down: tuple[str, ...]
    jobs: int


@dataclass(frozen=True)
class Settings:
    """What a config asks of its machine."""

    out: str = "."
    store: str = ""
    slab_depth: int = 24
    workers: int = 2
    wandb: str = "disabled"
    device: str = "auto"
    precision: str = "fp32"


@dataclass(frozen=True)
class Torch:
    """Version of torch, its CUDA version, and the newest that the driver supports ("": none)."""

    version: str
    cuda: str
    driver: str


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in bytes."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Gpus:
    """The GPUs that torch sees, and the version of its NCCL ("": none)."""

    gpus: tuple[Gpu, ...] = field(default=())
    nccl: str = ""


@dataclass(frozen=True)
class Copy:
    """Bytes per second that a GPU copies within its memory (read and written), and from pinned
    host memory.
    """

    inside: float
    from_host: float


@dataclass(frozen=True)
class AttentionKernels:
    """SDPA kernels that ran on the device, version of xformers ("": not installed), whether torch
    has `varlen_attn`, and why the kernels of xformers cannot be used ("": they can).
    """

    device: str
    kernels: tuple[str, ...]
    xformers: str
    varlen: bool
    xformers_failure: str = ""


@dataclass(frozen=True)
class AllReduce:
    """A sum over processes: their number, whether it was right, bus bandwidth in bytes/s."""

    world: int
    right: bool
    rate: float


@dataclass(frozen=True)
class Reads:
    """Reading random slabs from a store.

    Args:
        scans: number of scans in the store.
        slabs: slabs per second.
        rate: decoded bytes per second.
        threads: threads that read.
        depth: slices of a slab.
    """

    scans: int
    slabs: float
    rate: float
    threads: int
    depth: int
