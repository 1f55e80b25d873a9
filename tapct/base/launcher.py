"""What can be wrong with the launcher of a run: srun that was forgotten, variables of another
launcher, torchrun that has ended.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from tapct.base import ranks
from tapct.base.exits import UserError

TORCHRUN = "TORCHELASTIC_RUN_ID"  # environment variable that torchrun sets


def check_launcher(environment: Mapping[str, str]) -> None:
    """Refuse a start whose variables show that it is not what its job was requested for.

    Args:
        environment: environment variables, `os.environ`.
    Raises:
        UserError: a job of several tasks, and no srun; or variables of another launcher that
            contradict those of srun.
    """
    tasks = environment.get("SLURM_NTASKS", "")
    step_tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    names = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]
    if TORCHRUN in environment:
        return
    if step_tasks.isdigit() and int(step_tasks) > 1 and "RANK" in names and "WORLD_SIZE" in names:
        rank = environment.get("SLURM_PROCID", "")
        own = environment["RANK"], environment["WORLD_SIZE"]
        if own != (rank, step_tasks):
            raise UserError(
                f"RANK={own[0]} and WORLD_SIZE={own[1]} are set, but srun has started this process "
                f"as rank {rank} of {step_tasks}; they are left from another launcher: unset "
                f"{' '.join(names)}"
            )
    is_outside = "SLURM_JOB_ID" in environment and not step_tasks and not names
    if is_outside and tasks.isdigit() and int(tasks) > 1:
        raise UserError(
            f"this job has {tasks} tasks, but a single process was started, outside of srun; write "
            "`srun tapct train ...` in the batch script, or SLURM_NTASKS=1 before the command if a "
            "single process is meant"
        )


def check_prints(environment: Mapping[str, str]) -> None:
    """Refuse a command that runs as a single process, where the variables of a launcher show that
    it is a later one of several, which print nothing.

    Args:
        environment: environment variables, `os.environ`.
    Raises:
        UserError: this is not the first process.
        LauncherError: the variables are not valid.
    """
    place = ranks.from_environment(environment)
    if not place.is_first:
        raise UserError(
            f"the variables of a launcher make this process number {place.rank} of {place.world}, "
            "but the command runs as a single process; start it without srun and torchrun, or "
            "unset RANK WORLD_SIZE LOCAL_RANK if they are left from a launcher"
        )


class Torchrun:
    """The torchrun that has started this process, if one has.

    torchrun ends at a signal that it does not handle, such as SIGUSR1, and its ranks stay.

    Args:
        environment: environment variables, `os.environ`.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.process = os.getppid() if TORCHRUN in environment else 0

    def has_ended(self) -> bool:
        """Whether it has ended while this process still runs."""
        return bool(self.process) and os.getppid() != self.process
