"""Who this process is among the processes of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# The variables of each launcher for rank, world, local rank; the first launcher whose first two are
# set wins. SLURM_STEP_NUM_TASKS and not SLURM_NTASKS: the latter is also set in a batch script
# outside of srun, where one process would wait for ever for the others.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


# All that torchrun, srun and `tapct submit` tell a process about its place; SLURM_CONF is the
# cluster's own.
_TOLD = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_",
    "PMI",
    "TAPCT_MARK",
)


@dataclass(frozen=True)
class Ranks:
    """Place of one process in a run.

    Args:
        rank: 0 .. world - 1 over all nodes.
        world: number of processes.
        local_rank: number of this process on its node; picks its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world and 0 <= self.local_rank <= self.rank):
            raise ValueError(
                f"rank {self.rank}, local rank {self.local_rank} do not fit a world of {self.world}"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for the whole run."""
        return self.rank == 0


def from_environment(environment: Mapping[str, str]) -> Ranks:
    """Read the place from the launcher's variables: torchrun's win over srun's, and without either
    it is one process.

    Args:
        environment: `os.environ`.
    Raises:
        ValueError: the variables hold no numbers, or numbers that do not fit.
    """
    for names in _LAUNCHERS:
        if names[0] in environment and names[1] in environment:
            try:
                rank, world, local_rank = (int(environment.get(name, "0")) for name in names)
                return Ranks(rank, world, local_rank)
            except ValueError as error:
                told = ", ".join(f"{name}={environment.get(name, '')}" for name in names)
                raise ValueError(
                    f"the launcher's variables make no sense: {told}; {error}"
                ) from error
    return Ranks()


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child that is a run of its own and must not take itself for one of the
    ranks.
    """
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_TOLD) or name == "SLURM_CONF"
    }


def restarts(environment: Mapping[str, str]) -> int:
    """How often torchrun or SLURM has started this run again."""
    told = [
        environment.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    ]
    return max(int(count) if count.isdigit() else 0 for count in told)


def per_node(environment: Mapping[str, str], place: Ranks) -> int:
    """Ranks on each node: torchrun's LOCAL_WORLD_SIZE, or srun's tasks per node where all nodes
    have as many.

    Where neither tells, or nodes differ, the whole world: it divides itself.
    """
    if environment.get("LOCAL_WORLD_SIZE", "").isdigit():
        return int(environment["LOCAL_WORLD_SIZE"])
    told = re.fullmatch(r"(\d+)(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(told[1]) if told else place.world


def rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port at which the ranks meet: MASTER_ADDR and MASTER_PORT, else the first node of
    the SLURM step.

    The port is made of job and step number, so that jobs that share a node do not meet each other.

    Raises:
        ValueError: neither is told.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise ValueError(
            "no MASTER_ADDR and no SLURM node list: start with torchrun, or with "
            "srun inside a SLURM job"
        )
    if environment.get("MASTER_PORT"):
        return host, int(environment["MASTER_PORT"])
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return host, 15000 + (int(job) * 7 + int(step)) % 15000


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[08-11,20],big1` -> `gpu08`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\]-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""
