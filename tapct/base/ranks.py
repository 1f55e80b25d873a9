"""The place of this process among the processes of a run, from the launcher's variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Variables of each launcher for rank, world size and local rank. The first launcher whose first two
# variables are set is used. SLURM_STEP_NUM_TASKS and not SLURM_NTASKS: the latter is also set in a
# batch script outside of srun, where a single process would wait forever for the others.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)

# Beginnings of the variables by which torchrun, srun and `tapct submit` assign a process its place.
PLACE_VARIABLES = (
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

# Variables in which schedulers name the job of a process: SLURM, PBS and Torque, LSF, Grid Engine
# (JOB_ID alone is also set by other programs), HTCondor, OAR and Flux.
JOB_VARIABLES = (
    "SLURM_JOB_ID",
    "PBS_JOBID",
    "LSB_JOBID",
    "SGE_TASK_ID",
    "_CONDOR_SLOT",
    "OAR_JOB_ID",
    "FLUX_JOB_ID",
)

IN_SWEEP = "TAPCT_IN_SWEEP"  # environment variable of the runs of `tapct sweep`


class LauncherError(ValueError):
    """The variables of a launcher do not show the place of this process."""


@dataclass(frozen=True)
class Ranks:
    """Place of one process in a run.

    Args:
        rank: index of this process over all nodes, from 0.
        world: number of processes.
        local_rank: index of this process on its node; picks its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world and 0 <= self.local_rank <= self.rank):
            raise ValueError(
                f"rank {self.rank} and local rank {self.local_rank} do not fit a world of "
                f"{self.world} processes"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for the whole run."""
        return self.rank == 0


def from_environment(environment: Mapping[str, str]) -> Ranks:
    """Read the place of this process from the launcher's variables.

    Those of torchrun take precedence over those of srun; without either, it is a single process.

    Args:
        environment: environment variables, `os.environ`.
    Raises:
        LauncherError: the variables are not integers, or do not fit together.
    """
    for names in LAUNCHERS:
        if names[0] in environment and names[1] in environment:
            try:
                rank, world, local_rank = (int(environment.get(name, "0")) for name in names)
                return Ranks(rank, world, local_rank)
            except ValueError as error:
                values = ", ".join(f"{name}={environment.get(name, '')}" for name in names)
                raise LauncherError(
                    f"the launcher's variables are not valid: {values}; {error}; unset them if "
                    "they are left from another launcher"
                ) from error
    return Ranks()


def for_output(environment: Mapping[str, str]) -> Ranks:
    """The place of this process, which decides what it prints; a single one where the variables are
    not valid, so that this can be printed.

    Args:
        environment: environment variables, `os.environ`.
    """
    try:
        return from_environment(environment)
    except LauncherError:
        return Ranks()


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process that is not one of the ranks.

    SLURM_CONF stays: it names the cluster and not a place.

    Args:
        environment: environment variables of this process.
    """
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(PLACE_VARIABLES) or name == "SLURM_CONF"
    }


def in_batch_job(environment: Mapping[str, str]) -> bool:
    """Whether this process belongs to the job of a scheduler, which ends all processes of the job.

    Args:
        environment: environment variables, `os.environ`.
    """
    return any(name in environment for name in JOB_VARIABLES)


def restarts(environment: Mapping[str, str]) -> int:
    """How often torchrun or SLURM has started this run again.

    Args:
        environment: environment variables, `os.environ`.
    """
    counts = [0]
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        value = environment.get(name, "")
        if value.isdigit():
            counts.append(int(value))
    return max(counts)


def per_node(environment: Mapping[str, str], place: Ranks) -> int:
    """Number of ranks on each node.

    It is torchrun's LOCAL_WORLD_SIZE, or srun's tasks per node if all nodes have the same number.
    Otherwise it is the number of all ranks, which is always a divisor of itself.

    Args:
        environment: environment variables, `os.environ`.
        place: place of this process.
    """
    if environment.get("LOCAL_WORLD_SIZE", "").isdigit():
        return int(environment["LOCAL_WORLD_SIZE"])
    # `4`, or `4(x2)` for two nodes; `4,2` for nodes that differ does not match
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    equal = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    return int(equal[1]) if equal else place.world


def rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port at which the ranks meet.

    They are MASTER_ADDR and MASTER_PORT, or the first node of the SLURM step and a port that is
    computed from the numbers of job and step, so that jobs on the same node use different ports.

    Args:
        environment: environment variables, `os.environ`.
    Raises:
        LauncherError: there is neither MASTER_ADDR nor a SLURM node list, or MASTER_PORT is no
            number.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise LauncherError(
            "no MASTER_ADDR and no SLURM node list: start with torchrun, or with srun inside a "
            "SLURM job; if a single process is meant, unset RANK WORLD_SIZE LOCAL_RANK"
        )
    port = environment.get("MASTER_PORT", "")
    if port.isdigit():
        return host, int(port)
    if port:
        raise LauncherError(f"MASTER_PORT={port} is no number; correct or unset it")
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    # another one after a restart: a port that another program uses was perhaps the reason for it
    number = int(job) * 7 + int(step) + 1009 * restarts(environment)
    return host, 15000 + number % 15000


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[08-11,20],big1` -> `gpu08`."""
    # the name up to a bracket, the first number in the bracket, the rest of the name
    parts = re.match(r"([^,\[]+)(?:\[([^,\]-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in parts.groups()) if parts else ""
