"""Submit runs to SLURM: check everything here, copy the code, hand one job or one array to sbatch
through submitit.

RUN/jobs/<time>/   the job's config.yaml, submission.json, events.jsonl, places and starts (`batch`); submitit's
                   script, pickles and logs
RUN/code/<rev>/    the tapct that the job runs, whatever happens to the source tree in the meantime
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from tapct.base.exits import UserError
from tapct.cluster import jobs, slurm, sweep, task
from tapct.cluster import script as batch
from tapct.cluster.snapshot import new_folder, snapshot, snapshot_name
from tapct.config import Resolved, load_config
from tapct.data.store import Store
from tapct.engine import checkpoint
from tapct.engine.checkpoint import Checkpoints
from tapct.run.config import RunConfig
from tapct.run.resume import changed_keys, what_changed, with_new_keys


@dataclass(frozen=True)
class Resources:
    """What a job asks of SLURM.

    Args:
        minutes: time limit of one start; a run may take many.
        nodes: machines.
        gpus_per_node: 0 trains on CPUs.
        tasks_per_node: processes per machine, one per GPU; 0: as many as GPUs, at least one.
        cpus_per_task: cores of each; 0: the cluster's default.
        mem: memory per node, e.g. 64G; empty: the cluster's default, as for all that follow.
        grace_seconds: how long before its end a job is told to save.
        max_restarts: requeues after which it gives up, whatever they brought.
        max_idle_restarts: requeues in a row without a new checkpoint after which it gives up.
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

    def __post_init__(self) -> None:
        if self.grace_seconds >= self.minutes * 60:
            raise UserError(
                f"--grace {self.grace_seconds} s is not less than --time, {self.minutes} min: no "
                "time would be left "
                "to train; ask for more time, or less grace"
            )
        if self.gpus_per_node and self.tasks > self.gpus_per_node:
            raise UserError(
                f"--tasks-per-node {self.tasks} with --gpus-per-node {self.gpus_per_node}: each "
                "task needs a GPU "
                "of its own; leave --tasks-per-node out"
            )

    @property
    def tasks(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.tasks


@dataclass(frozen=True)
class Plan:
    """What a submission is made of.

    Args:
        runs: a config per run.
        home: folder for code and logs: the run folder, or the one around the runs of a sweep.
    """

    runs: tuple[Resolved, ...]
    home: Path


def plan(config: Path, overrides: Sequence[str], grids: Sequence[str]) -> Plan:
    """The configs of all runs of a submission: one, or the product of the sweep.

    Args:
        config: YAML file.
        overrides: key=value.
        grids: words of --sweep, `key=value,value`; none for one run.
    Raises:
        UserError: any of the configs is wrong.
    """
    first = load_config(RunConfig, config, overrides)
    if not grids:
        return Plan((first,), first.value.out)
    home = first.value.out
    points = sweep.product(grids)
    return Plan(
        tuple(load_config(RunConfig, config, point.overrides(overrides, home)) for point in points),
        home,
    )


def check(resolved: Resolved, resources: Resources, allow_change: bool = False) -> None:
    """Find what would end a run as soon as it starts, before it waits in a queue for it.

    Args:
        allow_change: the job goes on although keys differ that shape the curve.
    Raises:
        UserError: batch, device, data or run folder do not allow it.
    """
    config: RunConfig = resolved.value
    for part in config.parts():
        part.config.check_share(resources.world)
    if config.train.save_before_end_s >= 60 * resources.minutes:
        raise UserError(
            f"train.save_before_end_s {config.train.save_before_end_s:g} s is not less than "
            "--time, "
            f"{resources.minutes} min: the job would stop as soon as it starts; ask for more "
            "time, or lower it"
        )
    if config.device == "cuda" and not resources.gpus_per_node:
        raise UserError("device=cuda, but the job asks for no GPU; add --gpus-per-node")
    if "%" in str(config.out.absolute()):
        raise UserError(
            f"out={config.out}: SLURM would replace the % in the names of its log files; choose "
            "another"
        )
    Store(config.data.store)
    saved = Checkpoints(config.out / "checkpoints", config.checkpoint.keep).finished()
    if saved and config.train.resume == "never":
        raise UserError(
            f"{config.out} holds checkpoints and train.resume=never; choose another out= or "
            "remove it"
        )
    if saved and not allow_change:
        newest = max(saved, key=checkpoint.step_of)
        before = with_new_keys(checkpoint.read_meta(newest).config, type(config))
        changed = changed_keys(before, resolved.to_dict())
        if changed:
            raise UserError(what_changed(changed, newest))


def doubts(config: RunConfig, resources: Resources) -> list[str]:
    """What may be meant so, but hardly is: lines for people."""
    found, workers = [], config.data.loader.workers
    if config.device == "auto" and not resources.gpus_per_node:
        found.append(
            "the job asks for no GPU, so it trains on the CPU; --gpus-per-node asks for some"
        )
    if config.device == "cpu" and resources.gpus_per_node:
        found.append("device=cpu leaves the GPUs of --gpus-per-node idle; set device=auto")
    if 0 < resources.cpus_per_task <= workers:
        found.append(
            f"--cpus-per-task {resources.cpus_per_task} leaves data.loader.workers {workers} no "
            "core of their own; "
            f"{workers + 1} would"
        )
    saved = Checkpoints(config.out / "checkpoints", config.checkpoint.keep).finished()
    if saved and max(map(checkpoint.step_of, saved)) >= config.train.steps:
        found.append(
            f"{config.out} has all its {config.train.steps} steps; the job will find nothing to "
            "train"
        )
    return found


def check_idle(outs: Sequence[Path]) -> None:
    """Two jobs must not write one run folder.

    Raises:
        UserError: a run folder has a job that waits or runs.
    """
    known = {
        run: one.job
        for out in outs
        if out.is_dir()
        for run, one in jobs.find([out]).items()
        if run in outs
    }
    queued = slurm.queue() if known else {}
    for run, job in known.items():
        if queued and job in queued and queued[job].alive:
            raise UserError(
                f"{run} has the job {job}, {queued[job].state.lower()}; end it with: tapct cancel "
                f"{run}"
            )


def submit(plan: Plan, resources: Resources, allow_change: bool = False) -> list[jobs.Submission]:
    """Hand checked runs to SLURM, as one job or one array.

    Args:
        allow_change: as in `check`; it holds for every start of the job.
    Returns:
        One submission per run.
    Raises:
        UserError: SLURM refused; nothing is left behind.
    """
    slurm.need_sbatch()
    runs, home = plan.runs, plan.home
    outs = [run.value.out for run in runs]
    check_idle(outs)
    name = time.strftime("%Y%m%d-%H%M%S")
    with contextlib.ExitStack() as undo:
        code = snapshot(home, undo)
        folder = new_folder(home / "jobs", name, undo)
        places = [folder if out == home else new_folder(out / "jobs", name, undo) for out in outs]
        for place, run in zip(places, runs, strict=True):
            checkpoint.replace_text(place / "config.yaml", run.to_yaml())
        (folder / batch.PLACES).write_text(
            "".join(f"{place}\n" for place in places), encoding="utf-8"
        )
        executor = make_executor(folder, code, resources, f"tapct-{home.name}")
        tasks = [
            (str(place / "config.yaml"), os.getcwd(), str(code), allow_change) for place in places
        ]
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
                made = executor.map_array(task.work, *zip(*tasks, strict=True))
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(
                f"sbatch refused: {' '.join(str(error).split())}; sinfo -s lists partitions, and "
                "sacctmgr show associations user=$USER accounts and qos"
            ) from error
        undo.pop_all()
    found = []
    for place, run, job in zip(places, runs, made, strict=True):
        steps = run.value.train.steps
        submission = jobs.Submission(
            job.job_id, time.time(), steps, resources.max_restarts, str(folder)
        )
        submission.write(place)
        found.append(submission)
    return found


def script(plan: Plan, resources: Resources) -> str:
    """The batch script that `submit` would hand to sbatch, below it the runs of a sweep; needs no
    SLURM.
    """
    home = plan.home.absolute()
    executor = make_executor(
        home / "jobs" / "TIME",
        home / "code" / snapshot_name(),
        resources,
        f"tapct-{home.name}",
        executor=_Unsent,
    )
    if len(plan.runs) > 1:  # submitit makes no array of one
        executor.parameters["map_count"] = len(plan.runs)
    outs = [run.value.out for run in plan.runs]
    listed = [f"# run {number}: {out}" for number, out in enumerate(outs) if out != plan.home]
    return "\n".join(
        [executor._make_submission_file_text(executor._submitit_command_str, ""), *listed]
    )


class _Unsent(SlurmExecutor):
    """Makes scripts on a machine without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def make_executor(
    folder: Path,
    code: Path,
    resources: Resources,
    name: str,
    executor: type[SlurmExecutor] = SlurmExecutor,
) -> SlurmExecutor:
    """submitit's executor with all parameters of a job.

    Args:
        folder: RUN/jobs/<time>.
        code: of `snapshot`.
    """
    made = executor(folder)
    asked = {
        "gpus_per_node": resources.gpus_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "mem": resources.mem,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
    }
    # python -m looks into its folder before PYTHONPATH; the first rank may stay for the last
    # evaluation
    srun = ["--kill-on-bad-exit=1", "--wait=0", f"--chdir={code}"]
    if resources.cpus_per_task:
        srun.append(
            f"--cpus-per-task={resources.cpus_per_task}"
        )  # srun no longer takes it over from sbatch
    made.update_parameters(
        job_name=name,
        time=resources.minutes,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks,
        signal_delay_s=resources.grace_seconds,
        stderr_to_stdout=True,
        wckey=None,
        srun_args=srun,
        additional_parameters={"requeue": True},
        setup=batch.setup_lines(folder, code, resources.max_restarts, resources.max_idle_restarts),
        teardown=batch.requeue_lines(),
        **{key: value for key, value in asked.items() if value},
    )
    return made
