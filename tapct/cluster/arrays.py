"""Work that is divided over the nodes of a SLURM cluster: index, pack, embed and eval.

    array     N elements, each `tapct COMMAND ... --part I/N`
    last job  after all of them, `tapct COMMAND ...`: does what is left, and finishes

The work is divided by hashes of names, so no element needs to know of another. What an element has
done is on disk as soon as it is done; an element that is lost, or done twice, costs time and
nothing else. `index` has two arrays: DICOM series that lie in several folders are known only when
all headers have been read.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

from tapct.base import console
from tapct.base.exits import UserError
from tapct.cluster import slurm
from tapct.cluster.folders import make_new_folder
from tapct.cluster.script import outside_of_jobs
from tapct.cluster.snapshot import copy_package, snapshot_name
from tapct.run_folder import RunFolder

ROUNDS = {"index": 2, "pack": 1, "embed": 1, "eval": 1}  # command -> number of arrays
TRIES = 2  # of an element whose process was killed
_FOLDER = ".jobs"  # behind the name of what the command writes


@dataclass(frozen=True)
class ArrayResources:
    """What each element of an array requests; an empty text or a 0 takes the cluster's default.

    Args:
        minutes: time limit.
        parts: number of elements.
        at_once: largest number of elements that run at the same time; 0 for all.
        cpus_per_task: CPU cores.
        gpus: GPUs.
        mem: memory, e.g. 64G.
        partition, account, qos, constraint: passed to sbatch.
    """

    minutes: int
    parts: int
    at_once: int = 0
    cpus_per_task: int = 0
    gpus: int = 0
    mem: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""


@dataclass(frozen=True)
class SubmittedArrays:
    """The jobs of one command.

    Args:
        arrays: id of each array.
        last: id of the job that finishes.
        logs: folder of their logs.
    """

    arrays: tuple[str, ...]
    last: str
    logs: Path


def check_words(words: Sequence[str]) -> None:
    """Refuse a command that cannot be divided, before it waits in a queue.

    Args:
        words: command of tapct with its arguments.
    Raises:
        UserError: its work is not known, or has no place for its results.
    """
    if not words or words[0] not in ROUNDS:
        raise UserError(f"tapct submit divides {', '.join(ROUNDS)}; got {' '.join(words)!r}")
    if any(word == "--part" or word.startswith("--part=") for word in words):
        raise UserError("tapct submit gives --part to each element; leave it out")
    if words[0] != "eval" and _out_of(words) is None:
        raise UserError(f"tapct submit {words[0]} needs --out, where all elements write")
    if _out_of(words) is None and (len(words) < 2 or words[1].startswith("-")):
        raise UserError(
            "tapct submit eval needs the model behind eval, before its options, e.g. tapct submit "
            "eval runs/mine"
        )
    if "%" in str(job_folder(words)):
        raise UserError(
            f"{job_folder(words)}: SLURM would replace the % in the names of its log files; choose "
            "a folder without %"
        )


def _out_of(words: Sequence[str]) -> str | None:
    """The value of --out in a command; None where it is missing."""
    for word, following in zip(words, [*words[1:], ""]):
        if word == "--out" and following:
            return following
        if word.startswith("--out="):
            return word.removeprefix("--out=")
    return None


def job_folder(words: Sequence[str]) -> Path:
    """Folder of the code and logs of a command: NAME.jobs beside what it writes, or beside the
    evaluated model.
    """
    place = Path(_out_of(words) or words[1]).absolute()
    return place.with_name(place.name + _FOLDER)


class Element:
    """Runs a command of tapct, as one element of an array or as the last job.

    Where SLURM takes the node away or the time is over, submitit submits the element again, and it
    resumes.
    """

    def __call__(self, words: Sequence[str], start_in: str, part: str = "") -> None:
        """Run the command.

        Args:
            words: command with its arguments.
            start_in: folder in which it was submitted.
            part: I/N; empty for the whole.
        Raises:
            SystemExit: the command failed; the log holds the reason.
        """
        command = [sys.executable, "-m", "tapct", *words, *(["--part", part] if part else [])]
        print(shlex.join(command), flush=True)
        # the copy of tapct comes first, and plug-ins of the folder are found behind it
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), start_in]))
        known = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        code = 1
        for _ in range(TRIES):
            code = subprocess.call(command, env=known, cwd=start_in)
            if code >= 0:  # below 0 a signal ended it, as where memory ran out
                break
            print(f"tapct: signal {-code} ended it; what was done is kept", flush=True)
        if code:
            raise SystemExit(code if code > 0 else 128 - code)

    def checkpoint(self, words: Sequence[str], start_in: str, part: str = "") -> DelayedSubmission:
        """What submitit submits again."""
        return DelayedSubmission(self, words, start_in, part)


def submit_arrays(words: Sequence[str], resources: ArrayResources) -> SubmittedArrays:
    """Submit the arrays of a command and the job that finishes.

    Args:
        words: command of tapct with its arguments.
        resources: what each element requests.
    Raises:
        UserError: the command cannot be divided, or sbatch refused.
    """
    check_words(words)
    slurm.require_commands()
    with contextlib.ExitStack() as undo:
        root = job_folder(words)
        code = copy_package(root, undo)
        logs = make_new_folder(root / "logs", time.strftime("%Y-%m-%d_%H-%M-%S"), undo)
        start_in, command = str(Path.cwd()), list(words)
        parts = [f"{number}/{resources.parts}" for number in range(1, resources.parts + 1)]
        arrays: list[str] = []
        # called before the code and pickles are removed, without which the arrays would fail
        undo.callback(_cancel, arrays)
        for _ in range(ROUNDS[words[0]]):
            executor = _executor(SlurmExecutor, words, resources, logs, code, arrays)
            jobs = _submitted(executor, [(command, start_in, part) for part in parts])
            arrays.append(jobs[0].partition("_")[0])
        executor = _executor(SlurmExecutor, words, resources, logs, code, arrays)
        (last,) = _submitted(executor, [(command, start_in, "")])
        undo.pop_all()
    return SubmittedArrays(tuple(arrays), last, logs)


def _cancel(jobs: Sequence[str]) -> None:
    """Cancel arrays whose last job could not be submitted."""
    if jobs:
        try:
            slurm.cancel_ids(jobs)
        except UserError as error:
            console.warn(f"{error}; cancel them by hand: scancel {' '.join(jobs)}")


def preview(words: Sequence[str], resources: ArrayResources) -> str:
    """The batch script of an array; needs no SLURM and writes nothing."""
    check_words(words)
    root = job_folder(words)
    code = RunFolder(root).code / snapshot_name()
    executor = _executor(_WithoutSlurm, words, resources, root / "logs" / "TIME", code, [])
    executor.parameters["map_count"] = resources.parts
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


class _WithoutSlurm(SlurmExecutor):
    """Makes batch scripts on a machine without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _submitted(executor: SlurmExecutor, arguments: Sequence[tuple[Any, ...]]) -> list[str]:
    """Submit an element with each of these arguments; ids of the jobs."""
    try:
        # submitit prints what it raises
        with contextlib.redirect_stderr(io.StringIO()), outside_of_jobs():
            jobs = executor.map_array(Element(), *zip(*arguments, strict=True))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(
            f"sbatch refused: {' '.join(str(error).split())}; sinfo -s lists partitions"
        ) from error
    return [str(job.job_id) for job in jobs]


def _executor(
    kind: type[SlurmExecutor],
    words: Sequence[str],
    resources: ArrayResources,
    logs: Path,
    code: Path,
    after: Sequence[str],
) -> SlurmExecutor:
    """submitit's executor for one array.

    Args:
        kind: class of the executor.
        words: command.
        resources: what each element requests.
        logs: folder of logs and pickles.
        code: folder with the copy of tapct that the job runs.
        after: ids of the arrays that must have ended before, whatever their result.
    """
    more: dict[str, object] = {"requeue": True}  # a node that fails is no fault of the element
    if after:
        more["dependency"] = f"afterany:{after[-1]}"
    options = {
        **{"cpus_per_task": resources.cpus_per_task, "gpus_per_node": resources.gpus},
        **{"mem": resources.mem, "partition": resources.partition, "account": resources.account},
        **{"qos": resources.qos, "constraint": resources.constraint},
    }
    executor = kind(logs)
    # at sites with --export=NONE the elements would not get the PYTHONPATH that is exported here
    srun = ["--export=ALL", f"--chdir={code}"]
    if resources.cpus_per_task:
        srun.append(f"--cpus-per-task={resources.cpus_per_task}")
    executor.update_parameters(
        job_name=f"tapct-{words[0]}",
        time=resources.minutes,
        nodes=1,
        ntasks_per_node=1,
        array_parallelism=resources.at_once or resources.parts,
        stderr_to_stdout=True,
        wckey=None,
        srun_args=srun,
        additional_parameters=more,
        setup=[
            f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            "unset RANK WORLD_SIZE LOCAL_RANK",
        ],
        **{key: value for key, value in options.items() if value},
    )
    return executor
