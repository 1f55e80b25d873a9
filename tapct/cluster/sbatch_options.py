"""Options of sbatch that `tapct submit --sbatch` passes on, and how many GPUs they request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tapct.base.exits import UserError

Value = str | bool  # True for an option without a value

# Options that the batch script of tapct needs as it has set them, and what to use instead.
OWN = {
    "array": "--sweep and --array-limit (of index, pack, embed and eval: --parts, --at-once)",
    "nodes": "--nodes (of index, pack, embed and eval: --parts)",
    "ntasks": "--nodes and --tasks-per-node (of index, pack, embed and eval: --parts)",
    "ntasks-per-node": "--tasks-per-node (of index, pack, embed and eval: --parts)",
    "ntasks-per-gpu": "--tasks-per-node (of index, pack, embed and eval: --parts)",
    "time": "--time",
    "signal": "--grace",
    "job-name": "--job-name",
    "output": "RUN/jobs/<time>, which has the logs",
    "error": "RUN/jobs/<time>, which has the logs",
    "open-mode": "RUN/jobs/<time>, which has the logs",
    "requeue": "--max-restarts",
    "no-requeue": "--max-restarts 0",
    "chdir": "the folder in which you run tapct submit",
    "wrap": "--setup",
    "parsable": "tapct jobs",
    "test-only": "--dry-run",
    "help": "man sbatch",
    "wait": "tapct jobs",
}
# Options that have a form in `tapct submit`, so that both could be given.
NAMED = (
    "gpus-per-node",
    "cpus-per-task",
    "mem",
    "mem-per-cpu",
    "mem-per-gpu",
    "partition",
    "account",
    "qos",
    "constraint",
    "gres",
    "exclude",
    "nodelist",
    "exclusive",
    "dependency",
    "reservation",
    "comment",
)
MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")  # of which a job may have one
LONG_OPTION = re.compile(r"--([a-zA-Z][\w-]*)(?:[= ](.+))?", re.DOTALL)


def parse(texts: Sequence[str]) -> dict[str, Value]:
    """Options of sbatch by name.

    Args:
        texts: options as sbatch reads them, e.g. `--gres=gpu:h100:4` or `--exclusive`.
    Raises:
        UserError: a text is no long option, tapct sets this option itself, or it occurs twice.
    """
    options: dict[str, Value] = {}
    for text in texts:
        found = LONG_OPTION.fullmatch(text.strip())
        if found is None or "\n" in text:
            raise UserError(
                f"--sbatch {text!r} is not an option of sbatch in its long form; write for "
                "example --sbatch '--gres=gpu:h100:4'"
            )
        name, value = found[1], found[2]
        if name in OWN:
            raise UserError(
                f"--sbatch {text!r}: tapct submit sets --{name} itself; use {OWN[name]}"
            )
        if name in options:
            raise UserError(f"--sbatch --{name} is given twice; give it once")
        options[name] = True if value is None else value.strip()
    return options


def without(texts: Sequence[str], name: str) -> tuple[str, ...]:
    """The texts of --sbatch that set another option than the one of this name."""
    return tuple(text for text in texts if name not in parse([text]))


def are_replaced(options: Mapping[str, Value], own: Mapping[str, Value]) -> bool:
    """Whether a default of the cluster gives way to the command line: to the same option, to memory
    in another unit, or to GPUs that are requested in another way.

    Args:
        options: the default, by the name that sbatch has for it.
        own: options of the command line by these names.
    """
    if own.keys() & options.keys():
        return True
    if own.keys() & set(MEMORY) and options.keys() & set(MEMORY):
        return True
    return requests_gpus(options) and ("gpus-per-node" in own or requests_gpus(own))


def combined(named: Mapping[str, Value], passed: Mapping[str, Value]) -> dict[str, Value]:
    """Options of their own in `tapct submit`, and those of --sbatch.

    Args:
        named: options of `tapct submit` by the name that sbatch has for them.
        passed: options of --sbatch.
    Raises:
        UserError: an option is given in both ways, or memory is requested in more than one unit.
    """
    for name in passed:
        if name in named:
            raise UserError(
                f"--{name} is given twice, as --{name} of tapct submit and as --sbatch; give it "
                "once"
            )
    options = {**named, **passed}
    units = [name for name in MEMORY if name in options]
    if len(units) > 1:
        raise UserError(f"--{units[0]} and --{units[1]} exclude each other; give one of them")
    return options


def gpus_of_node(options: Mapping[str, Value]) -> int:
    """Number of GPUs per node that options request by --gpus-per-node or --gres; 0: none, or it is
    not known.
    """
    per_node = options.get("gpus-per-node")
    if per_node:
        return last_number(str(per_node), default=1)
    total = 0
    for part in str(options.get("gres", "")).split(","):
        if re.match(r"(gres/)?gpu\b", part):
            total += last_number(part, default=1)
    return total


def requests_gpus(options: Mapping[str, Value]) -> bool:
    """Whether options request a GPU in any of SLURM's ways."""
    if any(name in options for name in ("gpus", "gpus-per-task", "gpus-per-socket")):
        return True
    per_task = str(options.get("tres-per-task", ""))
    return gpus_of_node(options) > 0 or "gpu" in per_task


def last_number(text: str, default: int) -> int:
    """The count in `gpu:h100:4`, `h100:4` or `4`."""
    found = re.fullmatch(r"(?:.*[:=])?(\d+)(?:\(.*\))?", text)
    return int(found[1]) if found else default
