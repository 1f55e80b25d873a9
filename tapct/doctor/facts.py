"""What the probes find, and what is said of it: plain data between the machine and the
judgement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "warn", "fail"]
INSTALL = "pip install -c constraints.txt -e '.[dev]' in tapct's folder"


@dataclass(frozen=True)
class Finding:
    """One line for the user.

    Args:
        name: of the check, one word.
        state: fail means that a run will not work, warn that it may be slow or in the way of
            others.
        words: what was found.
        remedy: what to do; empty where all is well.
    """

    name: str
    state: State
    words: str
    remedy: str = ""


@dataclass(frozen=True)
class Broken:
    """A probe that gave no facts: it failed, or was ended after its time.

    Args:
        remedy: where the reason lies outside of what was probed; empty: the check knows one.
    """

    why: str
    remedy: str = ""


@dataclass(frozen=True)
class Package:
    """A requirement of tapct and what is installed; `version` is empty where nothing is."""

    name: str
    wanted: str
    version: str
    fits: bool


@dataclass(frozen=True)
class Cpu:
    """CPUs of the machine, those this process may run on, the share its cgroup allows (None: all),
    OMP_NUM_THREADS.
    """

    count: int
    allowed: int
    quota: float | None
    threads: int | None


@dataclass(frozen=True)
class Limits:
    """Soft limits (`ulimit`), infinite where there is none; whether there is an InfiniBand card."""

    open_files: float
    processes: float
    locked_bytes: float
    infiniband: bool


@dataclass(frozen=True)
class Space:
    """A folder: bytes in all and free, and why it cannot be written (empty: it can)."""

    path: str
    total: int
    free: int
    refusal: str = ""


@dataclass(frozen=True)
class Slurm:
    """Names of the partitions that are up and of those that are not, and how many jobs the user
    has.
    """

    up: tuple[str, ...]
    down: tuple[str, ...]
    jobs: int


@dataclass(frozen=True)
class Settings:
    """What a config says of its machine."""

    out: str = "."
    store: str = ""
    slab_depth: int = 24
    workers: int = 2
    wandb: str = "disabled"
    device: str = "auto"
    precision: str = "fp32"


@dataclass(frozen=True)
class Torch:
    """Version, CUDA of the build and the newest that the driver serves ("" where there is none)."""

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
    """What torch sees, and the version of its NCCL ("" where it has none)."""

    gpus: tuple[Gpu, ...] = field(default=())
    nccl: str = ""


@dataclass(frozen=True)
class Copy:
    """Bytes per second that one GPU copies within itself (read and written) and takes from pinned
    host memory.
    """

    inside: float
    from_host: float


@dataclass(frozen=True)
class Attention:
    """SDPA kernels that ran on the device, xformers' version ("" without), whether torch has
    `varlen_attn`.
    """

    device: str
    kernels: tuple[str, ...]
    xformers: str
    varlen: bool


@dataclass(frozen=True)
class AllReduce:
    """A sum over processes: whether it was right, and bytes per second of the bus."""

    world: int
    right: bool
    rate: float


@dataclass(frozen=True)
class Reads:
    """Random slabs from a store: how many scans it has, slabs and decoded bytes per second, by how
    many threads.
    """

    scans: int
    slabs: float
    rate: float
    threads: int
    depth: int
