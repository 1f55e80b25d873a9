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
import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from tapct.base import console
from tapct.base.exits import UserError
from tapct.cluster import mounts, sbatch_options, script, slurm
from tapct.cluster.folders import make_new_folder
from tapct.cluster.resources import Resources
from tapct.cluster.script import JobFolders
from tapct.cluster.snapshot import copy_package, snapshot_name
from tapct.run_folder import RunFolder

ROUNDS = {"index": 2, "pack": 1, "embed": 1, "eval": 1}  # command -> number of arrays
WHOLE_ONLY = {"index": ("--select",), "pack": ("--verify",)}  # options that leave no parts
LAST_ONLY = {"index": ("--report",)}  # options with a value that the last job alone gets
TRIES = 2  # of an element whose process was killed
_FOLDER = ".jobs"  # behind the name of what the command writes


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
        UserError: its work is not known, cannot be divided, or has no place for its results.
    """
    if not words or words[0] not in ROUNDS:
        raise UserError(f"tapct submit divides {', '.join(ROUNDS)}; got {' '.join(words)!r}")
    if _has_option(words, "--part"):
        raise UserError("tapct submit gives --part to each element; leave it out")
    for option in ("--nodes", "--tasks-per-node"):
        if _has_option(words, option):
            raise UserError(
                f"tapct submit {words[0]} has no option {option}: each element of the array is one "
                "process on one node; set the number of elements with --parts"
            )
    for option in WHOLE_ONLY.get(words[0], ()):
        if _has_option(words, option):
            raise UserError(f"tapct {words[0]} {option} cannot be divided; run it without submit")
    if words[0] != "eval" and _out_of(words) is None:
        raise UserError(f"tapct submit {words[0]} needs --out, where all elements write")
    if words[0] == "embed" and str(_out_of(words)).endswith(".npz"):
        raise UserError(
            f"--out {_out_of(words)} is the file of a single scan; give a folder as --out"
        )
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


def words_of_elements(words: Sequence[str]) -> list[str]:
    """The command of an element that does a part, without the options of the last job."""
    kept: list[str] = []
    is_value = False
    for word in words:
        is_last_only = word.partition("=")[0] in LAST_ONLY.get(words[0], ())
        if not is_last_only and not is_value:
            kept.append(word)
        is_value = is_last_only and "=" not in word
    return kept


def _has_option(words: Sequence[str], option: str) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in words)


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
        if script.AGAIN in os.environ:  # in a container, which has no scontrol
            leave = _leave_to_batch_script
            SlurmJobEnvironment._requeue = leave  # type: ignore[assignment, method-assign]
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


def _leave_to_batch_script(_: SlurmJobEnvironment, countdown: int) -> None:
    """Ask the batch script to requeue this element.

    Args:
        countdown: how often it may still reach its time limit.
    """
    Path(os.environ[script.AGAIN]).touch()
    print(f"tapct: the batch script requeues this ({countdown} remaining timeouts)", flush=True)


def submit_arrays(words: Sequence[str], resources: Resources, num_parts: int) -> SubmittedArrays:
    """Submit the arrays of a command and the job that finishes.

    Args:
        words: command of tapct with its arguments.
        resources: what each element requests.
        num_parts: number of elements of an array.
    Raises:
        UserError: the command cannot be divided, or sbatch refused.
    """
    check_words(words)
    slurm.require_commands()
    with contextlib.ExitStack() as undo:
        root = job_folder(words)
        code = copy_package(root, undo)
        logs = make_new_folder(root / "logs", time.strftime("%Y-%m-%d_%H-%M-%S"), undo)
        job = _job(words, resources, logs, code)
        start_in, command = str(Path.cwd()), words_of_elements(words)
        parts = [f"{number}/{num_parts}" for number in range(1, num_parts + 1)]
        arrays: list[str] = []
        # called before the code and pickles are removed, without which the arrays would fail
        undo.callback(_cancel, arrays)
        for _ in range(ROUNDS[words[0]]):
            arguments = [(command, start_in, part) for part in parts]
            ids = _submitted(job, resources, arguments, arrays)
            arrays.append(ids[0].partition("_")[0])
        (last,) = _submitted(job, resources, [(list(words), start_in, "")], arrays)
        undo.pop_all()
    return SubmittedArrays(tuple(arrays), last, logs)


def _submitted(
    job: JobFolders,
    resources: Resources,
    arguments: Sequence[tuple[Any, ...]],
    earlier: Sequence[str],
) -> list[str]:
    """Submit an element with each of these arguments; ids of the jobs.

    Args:
        job: folders of the job.
        resources: what each element requests.
        arguments: arguments of each element.
        earlier: ids of the arrays that must have ended before, whatever their result.
    """
    if earlier:  # the first array waits for what the user has asked for
        others = sbatch_options.without(resources.sbatch, "dependency")
        after = f"afterany:{earlier[-1]}"
        resources = dataclasses.replace(resources, dependency=after, sbatch=others)
    return script.submit_tasks(
        job, resources, script.element_lines(job, resources), Element(), arguments
    )


def _job(words: Sequence[str], resources: Resources, logs: Path, code: Path) -> JobFolders:
    """Folders of the jobs of a command; a container mounts those that the command names."""
    data = {str(job_folder(words).parent)}
    if resources.container:
        data |= mounts.named_by(words)
    return JobFolders(f"tapct-{words[0]}", logs, code, tuple(sorted(data)))


def _cancel(jobs: Sequence[str]) -> None:
    """Cancel arrays whose last job could not be submitted."""
    if jobs:
        try:
            slurm.cancel_ids(jobs)
        except UserError as error:
            console.warn(f"{error}; cancel them by hand: scancel {' '.join(jobs)}")


def preview(words: Sequence[str], resources: Resources, num_parts: int) -> str:
    """The batch script of an array; needs no SLURM and writes nothing."""
    check_words(words)
    root = job_folder(words)
    code = RunFolder(root).code / snapshot_name()
    job = _job(words, resources, root / "logs" / "TIME", code)
    return script.make_batch_script(job, resources, script.element_lines(job, resources), num_parts)
