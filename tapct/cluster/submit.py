"""Submit runs: check them on this machine, copy the code, write their folders, and hand them to
SLURM.

RUN/jobs/<time>/   files of tapct: config.yaml, submission.json, events.jsonl, `places` and `starts`
                   (see `script`); files of submitit: the batch script, pickles and logs
RUN/code/<rev>/    copy of tapct that the job runs, so that later edits of the source tree do not
                   change it
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.base import console, files, lease
from tapct.base.exits import UserError
from tapct.base.lease import Lease
from tapct.cluster import jobs, mounts, script, slurm, sweep, task
from tapct.cluster.folders import make_new_folder, make_parents
from tapct.cluster.resources import Resources
from tapct.cluster.script import JobFolders
from tapct.cluster.snapshot import copy_package, snapshot_name
from tapct.config import Resolved
from tapct.engine.checkpoint import Checkpoints
from tapct.run.config import RunConfig
from tapct.run.resume import check_resume, with_split_of
from tapct.run.rules import load_run_config, warnings
from tapct.run.start import data_warnings, training_data
from tapct.run.training_data import open_store
from tapct.run_folder import JobFolder, RunFolder, step_of


@dataclass(frozen=True)
class PlannedRuns:
    """The runs of one submission.

    Args:
        runs: config of each run.
        root: folder of the job's code and logs: the run folder, or for a sweep the folder that
            contains all run folders.
    """

    runs: tuple[Resolved, ...]
    root: Path

    @property
    def folders(self) -> list[Path]:
        """Run folders."""
        return [run.value.out for run in self.runs]

    @property
    def data(self) -> tuple[str, ...]:
        """Stores of the runs with the folders of their manifests, and the folders of all other
        files and folders that exist and that their configs name: initial weights, for example.
        """
        found: set[str] = set()
        for run in self.runs:
            found |= {str(store.absolute()) for store in run.value.data.folders}
            found |= mounts.named_in(run.to_dict())
        return tuple(sorted(found | mounts.of_manifests(found)))

    @property
    def local(self) -> tuple[str, ...]:
        """Folders on the disks of the nodes."""
        caches = set()
        for run in self.runs:
            for stage in run.value.resolved_stages():
                caches.add(stage.config.data.cache.dir)
        return tuple(sorted(str(Path(cache).absolute()) for cache in caches if cache))

    @property
    def job_name(self) -> str:
        """Name of the job in the queue."""
        return f"tapct-{self.root.absolute().name}"


def plan_runs(config: Path, overrides: Sequence[str], axes: Sequence[str]) -> PlannedRuns:
    """Read the configs of all runs of a submission: one, or the product of a sweep.

    Args:
        config: YAML file.
        overrides: `key=value` for all runs.
        axes: arguments of --sweep, one `key=value,value` for each swept key; empty for a single
            run.
    Raises:
        UserError: one of the configs is wrong.
    """
    first = load_run_config(config, overrides)
    root: Path = first.value.out
    if not axes:
        return PlannedRuns((first,), root)
    points = sweep.product(axes)
    runs = [load_run_config(config, point.overrides(overrides, root)) for point in points]
    return PlannedRuns(tuple(runs), root)


def check_run(resolved: Resolved, resources: Resources, allow_change: bool = False) -> list[str]:
    """Refuse a run that would fail at its start, now instead of after the wait in the queue.

    Args:
        resolved: config of the run.
        resources: nodes, GPUs, CPU cores and time that the job requests.
        allow_change: whether to resume even though settings that affect training have changed.
    Returns:
        Warnings about the data, one line each.
    Raises:
        UserError: batch, time limit, device, data or run folder do not allow the run.
    """
    config: RunConfig = resolved.value
    for stage in config.resolved_stages():
        stage.config.check_share(resources.world)
    if config.train.save_before_end_s >= 60 * resources.minutes:
        raise UserError(
            f"train.save_before_end_s {config.train.save_before_end_s:g} s is not less than "
            f"--time, {resources.minutes} min: the job would stop as soon as it starts; request "
            "more time, or lower train.save_before_end_s"
        )
    if config.device == "cuda" and not resources.has_gpus:
        raise UserError("device=cuda, but the job requests no GPU; add --gpus-per-node")
    if "%" in str(config.out.absolute()):
        raise UserError(
            f"out={config.out}: SLURM would replace the % in the names of its log files; choose "
            "a folder without %"
        )
    store = open_store(config.data)
    saved = check_resume(resolved, allow_change, console.say)
    if saved is not None:
        config = with_split_of(resolved, saved).value
    data = training_data(config, store, saved)
    return [*data.lines, *data_warnings(config, store, data.rows, saved, data.digest)]


def run_warnings(resolved: Resolved, resources: Resources) -> list[str]:
    """Combinations that work but are probably not intended, one line each."""
    config: RunConfig = resolved.value
    lines, workers = warnings(resolved), config.data.loader.workers
    if config.device == "auto" and not resources.has_gpus:
        lines.append("the job requests no GPU and will train on the CPU; add --gpus-per-node")
    of_job = [name for name in ("gpus", "gpus-per-socket") if name in resources.options]
    if of_job and not resources.gpus and not resources.tasks_per_node:
        lines.append(
            f"--{of_job[0]} does not show how many GPUs a node has, so each node gets one process, "
            "which uses one GPU; add --gpus-per-node or --tasks-per-node"
        )
    if config.device == "cpu" and resources.has_gpus:
        lines.append("device=cpu leaves the GPUs of --gpus-per-node idle; set device=auto")
    cpus = str(resources.options.get("cpus-per-task", ""))
    if cpus.isdigit() and int(cpus) <= workers:
        lines.append(
            f"--cpus-per-task {cpus} leaves no core for training beside data.loader.workers "
            f"{workers}; request {workers + 1}"
        )
    others = ("exclusive", "cpus-per-gpu", "cores-per-socket")
    if not cpus and workers and not any(name in resources.options for name in others):
        lines.append(
            "without --cpus-per-task, most clusters give each process one core, which training "
            f"would share with data.loader.workers {workers}; add --cpus-per-task {workers + 1}"
        )
    saved = _finished_checkpoints(config)
    if saved and max(map(step_of, saved)) >= config.train.steps:
        lines.append(
            f"{config.out} has finished all {config.train.steps} steps; the job will find nothing "
            "to train"
        )
    return lines


def _finished_checkpoints(config: RunConfig) -> list[Path]:
    return Checkpoints(RunFolder(config.out).checkpoints.path, config.checkpoint.keep).finished()


def check_no_active_job(folders: Sequence[Path], warn: Callable[[str], object]) -> None:
    """Refuse run folders that a job or another process is writing or will write: two must not share
    one.

    Args:
        folders: run folders; they need not exist.
        warn: function that is called with one line if SLURM does not respond.
    Raises:
        UserError: a run folder has a job that waits or runs, or a process that trains.
    """
    submitted: dict[Path, str] = {}
    for folder in folders:
        if folder.is_dir():
            submissions = jobs.find_submissions([folder])
            if folder in submissions:  # and not only a run below it
                submitted[folder] = submissions[folder].job
    queue = slurm.read_queue(list(submitted.values())) if submitted else {}
    if queue is None:
        names = ", ".join(map(str, submitted))
        warn(
            f"SLURM does not respond (squeue), so it is unknown whether a job is already working "
            f"on {names}; check with `squeue --me` that no job of this run waits or runs"
        )
    for folder, job in submitted.items():
        if queue and job in queue and queue[job].is_active:
            raise UserError(
                f"{folder} has the job {job}, {queue[job].state.lower()}; cancel it with: tapct "
                f"cancel {folder}"
            )
    # a run of tapct train, or a job of another user on a cluster that hides it
    holders = lease.living_holders([RunFolder(folder).lease for folder in folders])
    for folder, holder in zip(folders, holders, strict=True):
        if holder is not None:
            raise UserError(
                f"{folder} is being written by another process ({holder.described()}); wait for "
                "it, end it, or choose another out="
            )


@contextlib.contextmanager
def only_submission(
    folders: Sequence[Path], undo: contextlib.ExitStack, say: Callable[[str], object]
) -> Iterator[None]:
    """Within this context, no other `tapct submit` submits a job for one of some run folders.

    Args:
        folders: run folders.
        undo: stack that removes folders which are made for it.
        say: function that prints a line.
    Raises:
        UserError: another one does.
    """
    with contextlib.ExitStack() as held:
        for folder in dict.fromkeys(folders):
            path = RunFolder(folder.absolute()).submitting
            make_parents(path.parent, undo)
            what = f"the list of jobs of {folder}"
            own = Lease(path, what, os.environ, say=say)
            own.acquire()
            held.callback(own.release)
        yield


def submit_runs(
    planned: PlannedRuns,
    resources: Resources,
    allow_change: bool = False,
    warn: Callable[[str], object] = console.say,
) -> list[jobs.Submission]:
    """Hand checked runs to SLURM, as one job or one array.

    Args:
        planned: runs, each of which `check_run` has accepted.
        resources: what the job requests.
        allow_change: as in `check_run`; it holds for every start of the job.
        warn: function that is called with a line if a check could not be made.
    Returns:
        One submission per run.
    Raises:
        UserError: SLURM refused; nothing is left behind.
    """
    slurm.require_commands()
    name = time.strftime("%Y%m%d-%H%M%S")
    with (
        contextlib.ExitStack() as undo,
        only_submission([planned.root, *planned.folders], undo, warn),
    ):
        check_no_active_job(planned.folders, warn)
        code = copy_package(planned.root, undo)
        log_folder = make_new_folder(RunFolder(planned.root).jobs, name, undo)
        job_folders: list[Path] = []  # RUN/jobs/<time> of each run
        for run_folder in planned.folders:
            if run_folder == planned.root:
                job_folders.append(log_folder)
            else:
                job_folders.append(make_new_folder(RunFolder(run_folder).jobs, name, undo))
        arguments = []
        for folder, run in zip(job_folders, planned.runs, strict=True):
            config = JobFolder(folder).config
            files.write_atomically(config, run.to_yaml())
            arguments.append((str(config), os.getcwd(), str(code), allow_change))
        places = "".join(f"{folder}\n" for folder in job_folders)
        JobFolder(log_folder).places.write_text(places, encoding="utf-8")
        job = JobFolders(planned.job_name, log_folder, code, planned.data, planned.local)
        lines = script.training_lines(job, resources)
        ids = script.submit_tasks(job, resources, lines, task.run_task, arguments)
        undo.pop_all()  # SLURM has accepted the job: keep all new folders
        submissions = []
        for folder, run, id in zip(job_folders, planned.runs, ids, strict=True):
            submission = jobs.Submission(
                job=id,
                submitted=time.time(),
                steps=run.value.train.steps,
                max_restarts=resources.max_restarts,
                logs=str(log_folder),
            )
            submission.write(folder)
            submissions.append(submission)
    return submissions


def preview_batch_script(planned: PlannedRuns, resources: Resources) -> str:
    """The batch script that `submit_runs` would pass to sbatch, and below it the runs of a sweep.

    The preview needs no SLURM and writes nothing.
    """
    root = RunFolder(planned.root.absolute())
    code, folder = root.code / snapshot_name(), root.jobs / "TIME"
    job = JobFolders(planned.job_name, folder, code, planned.data, planned.local)
    around = script.training_lines(job, resources)
    lines = [script.make_batch_script(job, resources, around, len(planned.runs))]
    for number, out in enumerate(planned.folders):
        if out != planned.root:
            lines.append(f"# run {number}: {out}")
    return "\n".join(lines)
