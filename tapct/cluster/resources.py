"""What a job requests of the scheduler, and how often it may be requeued."""

from __future__ import annotations

from dataclasses import dataclass

from tapct.base.exits import UserError


@dataclass(frozen=True)
class Resources:
    """What a job requests.

    An empty text or a 0 leaves an option out, so that the cluster's default applies.

    Args:
        minutes: time limit of one start of the job; a run may need many starts.
        nodes: number of nodes.
        gpus_per_node: number of GPUs on each node; 0 trains on CPUs.
        tasks_per_node: processes per node, one per GPU; 0: as many as GPUs, at least one.
        cpus_per_task: CPU cores of each process.
        mem: memory per node, e.g. 64G.
        partition: partition, passed to sbatch.
        account: account that is charged, passed to sbatch.
        qos: quality of service, passed to sbatch.
        constraint: required node features, passed to sbatch.
        grace_seconds: time before the limit at which SLURM signals the job to save.
        max_restarts: total requeues after which the job gives up.
        max_idle_restarts: requeues in a row without a new checkpoint after which it gives up.
        max_failures: as `max_idle_restarts`, for starts that were lost to a fault of a machine.
    Raises:
        UserError: the grace leaves no time to train, or there are more tasks than GPUs.
    """

    minutes: int
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 0
    cpus_per_task: int = 0
    mem: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    grace_seconds: int = 120
    max_restarts: int = 1000
    max_idle_restarts: int = 5
    max_failures: int = 10

    def __post_init__(self) -> None:
        if self.grace_seconds >= self.minutes * 60:
            raise UserError(
                f"--grace {self.grace_seconds} s is not less than --time, {self.minutes} min: no "
                "time would be left to train; request more time, or less grace"
            )
        if self.gpus_per_node and self.tasks > self.gpus_per_node:
            raise UserError(
                f"--tasks-per-node {self.tasks} with --gpus-per-node {self.gpus_per_node}: each "
                "task needs a GPU of its own; leave --tasks-per-node out"
            )

    @property
    def tasks(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.tasks
