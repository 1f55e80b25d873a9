"""The batch script of a SLURM job, and handing it to sbatch through submitit.

submitit writes the script; the shell lines here stand before and after its srun. They give the
tasks what they need and decide whether a job that trains is requeued (`restarts.py`). Every job of
tapct gets the options of `tapct submit` in the same way.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from tapct.base import ending, ranks
from tapct.base.exits import UserError
from tapct.cluster import mounts, restarts
from tapct.cluster.resources import CONTAINERS, Resources
from tapct.run_folder import JobFolder

# variables of SLURM that name the cluster or this user's rights there, and no job
OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


AGAIN = "TAPCT_AGAIN"  # environment variable: path of a file that an element makes to be requeued
_NAME_OF_JOB = (  # 12_3 for an element of an array, whose own number may be that of the whole array
    'export TAPCT_JOB="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
    'export TAPCT_JOB="${TAPCT_JOB:-$SLURM_JOB_ID}"',
)
# --setup 'set -eu' must not end the script after a rank has failed, before the job is requeued
_NO_EXIT = "set +eu +o pipefail"
_KEEP_SHELL = (
    "# this shell is signalled too, and the lines after srun must still run",
    "trap : TERM USR1 USR2",
)
_REQUEUE_ELEMENT = f"""\
code=$?
if [ ! -e "${AGAIN}" ]; then exit "$code"; fi
rm -f "${AGAIN}"
trap '' TERM # SLURM ends all that runs here while it requeues the job
for attempt in 1 2 3; do
    if scontrol requeue "$TAPCT_JOB"; then
        echo "tapct: requeued"
        exit 0
    fi
    sleep 2
done
echo "tapct: could not requeue; submit again to resume"
exit 1
"""


@dataclass(frozen=True)
class JobFolders:
    """Where a job keeps what it needs.

    Args:
        name: name of the job in the queue.
        folder: folder of the batch script, pickles and logs, absolute.
        code: folder with the copy of tapct that the job runs, absolute.
        data: other folders that the job reads or writes, absolute; a container mounts them.
        local: folders on a disk of the node, absolute; a job with a container makes them.
    """

    name: str
    folder: Path
    code: Path
    data: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    @property
    def mount(self) -> Path:
        """Folder that holds the job's files, its code and all its run folders."""
        return self.code.parent.parent


@dataclass(frozen=True)
class ShellLines:
    """What a batch script does around the tasks of a job, beside the options of `tapct submit`.

    Args:
        before: lines before srun, after those of --setup.
        srun: options of srun.
        after: lines after srun.
    """

    before: tuple[str, ...]
    srun: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def make_batch_script(
    job: JobFolders, resources: Resources, lines: ShellLines, num_elements: int
) -> str:
    """The batch script that `submit_tasks` would hand to sbatch; needs no SLURM and writes nothing.

    Args:
        job: folders of the job; they need not exist.
        resources: what the job requests.
        lines: what the script does around the tasks.
        num_elements: number of calls of the function; several become one array.
    """
    executor = _make_executor(job, resources, lines, num_elements, _ExecutorWithoutSlurm)
    if num_elements > 1:  # submitit makes no array of one
        executor.parameters["map_count"] = num_elements
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_tasks(
    job: JobFolders,
    resources: Resources,
    lines: ShellLines,
    work: Callable[..., object],
    arguments: Sequence[tuple[Any, ...]],
) -> list[str]:
    """Submit one job, or one array, whose tasks call a function.

    Args:
        job: folders of the job.
        resources: what the job requests.
        lines: what the batch script does around the tasks.
        work: function that every task of the job calls.
        arguments: positional arguments of `work`, one tuple per element.
    Returns:
        Job ids, one per element; 12_3 for an element of an array.
    Raises:
        UserError: sbatch refused.
    """
    executor = _make_executor(job, resources, lines, len(arguments), SlurmExecutor)
    try:
        # submitit prints what it raises
        with contextlib.redirect_stderr(io.StringIO()), outside_of_jobs():
            submitted = executor.map_array(work, *zip(*arguments, strict=True))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(
            f"sbatch refused: {' '.join(str(error).split())}; sinfo -s lists partitions, and "
            "sacctmgr show associations user=$USER lists accounts and qos"
        ) from error
    return [str(each.job_id) for each in submitted]


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Within this context, the environment has no variables of a job or launcher around this
    process: sbatch and srun would take memory, cores and nodes of that job for those of the new
    one.
    """
    before = dict(os.environ)
    kept = ranks.without_place(before)
    for name in set(before) - set(kept):
        if name not in OF_THE_CLUSTER:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


class _ExecutorWithoutSlurm(SlurmExecutor):
    """Makes batch scripts on a machine without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _make_executor(
    job: JobFolders,
    resources: Resources,
    lines: ShellLines,
    num_elements: int,
    kind: type[SlurmExecutor],
) -> SlurmExecutor:
    """submitit's executor with all parameters of a job."""
    executor = kind(job.folder, python=python_command(job, resources) or None)
    # --chdir, because python -m searches its working directory before PYTHONPATH. --export, because
    # at sites with --export=NONE the tasks would not get what is exported here.
    srun = [*lines.srun, "--export=ALL", f"--chdir={job.code}"]
    options = resources.options
    cpus = options.get("cpus-per-task")
    if cpus:
        # since SLURM 22.05, srun does not inherit this option from sbatch
        srun.append(f"--cpus-per-task={cpus}")
    if resources.container and resources.container_with == "pyxis":
        pairs = ",".join(f"{folder}:{folder}" for folder in mounted_folders(job))
        srun += [f"--container-image={resources.container}", f"--container-mounts={pairs}"]
        srun.append(f"--container-workdir={job.code}")
    for text in resources.srun_args:
        srun += shlex.split(text)
    executor.update_parameters(
        job_name=resources.job_name or job.name,
        time=resources.minutes,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks,
        signal_delay_s=resources.grace_seconds,
        stderr_to_stdout=True,
        wckey=None,
        srun_args=srun,
        additional_parameters={"requeue": True, **options},
        setup=[
            *resources.setup,
            *([_NO_EXIT] if resources.setup else []),
            *lines.before,
            *lines_for_local_folders(job, resources),
        ],
        teardown=list(lines.after),
        array_parallelism=resources.array_limit or num_elements,
    )
    return executor


def python_command(job: JobFolders, resources: Resources) -> str:
    """Shell words that start the Python of a container; empty for the Python of this process.

    Args:
        job: folders of the job.
        resources: image, and the program that runs it.
    """
    if not resources.container:
        return ""
    template = CONTAINERS.get(resources.container_with, resources.container_with)
    if not template:  # srun starts the container
        return "python3"
    if not resources.has_gpus:
        template = template.replace(" --nv ", " ")
    words = template.replace("{mounts}", shlex.quote(",".join(mounted_folders(job))))
    return words.replace("{image}", shlex.quote(resources.container))


def mounted_folders(job: JobFolders) -> list[str]:
    """Folders of the host that a job needs in a container: its files, what its config or command
    names, and the working directory from which relative paths start.
    """
    return mounts.outermost({str(job.mount), os.getcwd(), *job.data}, job.local)


def lines_for_local_folders(job: JobFolders, resources: Resources) -> list[str]:
    """Shell lines that make folders on the disk of every node, since a container mounts only what
    exists.
    """
    if not (resources.container and job.local):
        return []
    folders = " ".join(shlex.quote(folder) for folder in job.local)
    on_each_node = 'command srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
    return [f"{on_each_node} mkdir -p {folders}"]


def training_lines(job: JobFolders, resources: Resources) -> ShellLines:
    """What the batch script of a job that trains does around its ranks.

    The lines give the ranks the place where they meet and the tapct that they import, and they end
    a job that has been started too often.

    Args:
        job: folders of the job, whose `folder` is RUN/jobs/<time> with the file `places`.
        resources: bounds on requeues.
    """
    own = f'{shlex.quote(str(job.folder))}/"$TAPCT_JOB"'
    places = shlex.quote(str(JobFolder(job.folder).places))
    before = [
        *_NAME_OF_JOB,
        f"export {ending.MARK}={own}.end",
        f'rm -f "${ending.MARK}"',
        f'TAPCT_PLACE="$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {places})"',
        f"TAPCT_FILES={own}",
        *restarts.lines_before(resources),
        *_lines_about_code(job),
        'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        "MASTER_PORT=$((20000 + (SLURM_JOB_ID + 17 * ${SLURM_RESTART_COUNT:-0}) % 10000))",
        "# this shell runs on that node; another program may listen at the port",
        'while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do',
        "    MASTER_PORT=$((MASTER_PORT + 1))",
        "done",
        "export MASTER_ADDR MASTER_PORT",
        *_KEEP_SHELL,
    ]
    # --wait=0, because the first rank may stay for the last evaluation after the others have ended
    srun = ("--kill-on-bad-exit=1", "--wait=0")
    return ShellLines(tuple(before), srun, tuple(restarts.lines_after()))


def element_lines(job: JobFolders, resources: Resources) -> ShellLines:
    """What the batch script does around an element that needs no other one.

    An element requeues itself with scontrol. An image has no scontrol, so that in a container the
    element leaves a file, and the batch script requeues it.

    Args:
        job: folders of the job.
        resources: what the element requests.
    """
    code = _lines_about_code(job)
    if not resources.container:
        return ShellLines(tuple(code))
    file = f'export {AGAIN}={shlex.quote(str(job.folder))}/"$TAPCT_JOB".again'
    before = [*_NAME_OF_JOB, file, f'rm -f "${AGAIN}"', *code, *_KEEP_SHELL]
    return ShellLines(tuple(before), after=tuple(_REQUEUE_ELEMENT.splitlines()))


def _lines_about_code(job: JobFolders) -> list[str]:
    """Shell lines that make Python import the copy of tapct.

    RANK and WORLD_SIZE are unset: those of the submitting shell would take precedence over SLURM's
    variables.
    """
    return [
        f'export PYTHONPATH={shlex.quote(str(job.code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        "unset RANK WORLD_SIZE LOCAL_RANK",
    ]
