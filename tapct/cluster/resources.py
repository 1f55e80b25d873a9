"""What a job requests of the scheduler, and how often it may be requeued."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from tapct.base import files
from tapct.base.exits import UserError
from tapct.cluster import sbatch_options
from tapct.cluster.sbatch_options import Value

# Programs that start Python in a container image, as command lines; {mounts} is a list of folders
# with commas.
CONTAINERS = {
    "apptainer": "apptainer exec --nv --bind {mounts} {image} python3",
    "singularity": "singularity exec --nv --bind {mounts} {image} python3",
    "pyxis": "",  # options of srun
}


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")  # docker://, library://, oras:// ...
_LIKE_A_PATH = re.compile(r"[~/.]|.*\.(sif|sqsh|simg|img)$")


def container_image(text: str, program: str) -> str:
    """The image of a container: the absolute path of a file or folder, or its address as given.

    Args:
        text: option --container; empty for none.
        program: option --container-with.
    Raises:
        UserError: the text is the path of a file that is missing.
    """
    if not text or _ADDRESS.match(text):
        return text
    path = files.expand_path(text)
    if program in ("apptainer", "singularity"):
        rule = "give the path of an image, or its address, e.g. docker://lab/tapct:1"
    elif _LIKE_A_PATH.match(text):
        rule = "give the path of an image, or its name in a registry"
    else:
        return text
    if not path.exists():
        raise UserError(f"--container {text}: there is no such file; {rule}")
    return str(path.absolute())  # the tasks start in another folder


def check_shell_words(option: str, text: str) -> None:
    """Refuse text that a shell cannot divide into words.

    Args:
        option: option that has given it.
        text: its value.
    Raises:
        UserError: a quotation has no end.
    """
    try:
        shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option} {text!r}: {str(error).lower()}; correct the quotes") from error


def check_setup(lines: Sequence[str]) -> None:
    """Refuse lines of --setup that are no shell, since the rest of the script could not be read.

    Args:
        lines: lines of --setup, together.
    Raises:
        UserError: bash cannot read them; not where there is no bash here.
    """
    bash = shutil.which("bash")
    if bash is None or not lines:
        return
    text = "\n".join(lines) + "\n"
    read = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True, check=False)
    if read.returncode:
        problem = read.stderr.strip().splitlines() or ["bash cannot read it"]
        raise UserError(f"--setup {' / '.join(lines)}: {problem[0]}; correct the line")


@dataclass(frozen=True)
class Resources:
    """What a job requests.

    An empty text or a 0 leaves an option out, so that the cluster's default applies.

    Args:
        minutes: time limit of one start of the job; a run may need many starts.
        nodes: number of nodes.
        gpus_per_node: number of GPUs on each node; 0 trains on CPUs, unless `gres` or `sbatch`
            request some.
        tasks_per_node: processes per node, one per GPU; 0: as many as GPUs, at least one.
        cpus_per_task: CPU cores of each process.
        mem: memory per node, e.g. 64G.
        mem_per_cpu: memory per CPU core.
        mem_per_gpu: memory per GPU.
        partition: partition, passed to sbatch, as are the next ones.
        account: account that is charged.
        qos: quality of service.
        constraint: required node features.
        gres: generic resources, e.g. gpu:h100:4.
        exclude: nodes that the job must not use.
        nodelist: nodes that the job must use.
        exclusive: whether the job shares its nodes with no other job.
        dependency: jobs that must have ended, e.g. afterok:4711.
        reservation: reservation.
        comment: comment on the job.
        mail: address to which SLURM writes when the job ends or fails.
        job_name: name of the job in the queue; empty: the name of the run folder.
        array_limit: runs of a sweep that may work at the same time; 0: all.
        sbatch: further options of sbatch, e.g. `--licenses=a`.
        setup: shell lines at the beginning of the batch script.
        srun_args: further options of srun.
        container: image of a container in which Python runs; empty: none.
        container_with: program that runs the image, a key of `CONTAINERS`, or a command line with
            {image}.
        grace_seconds: time before the limit at which SLURM signals the job to save.
        max_restarts: total requeues after which the job gives up.
        max_idle_restarts: most requeues in a row without a new checkpoint.
        max_failures: as `max_idle_restarts`, after starts that were lost to a fault of a machine.
    Raises:
        UserError: there is no node or no grace, the grace leaves no time to work, there are more
            tasks than GPUs, a text has several lines or no end of its quotation, a line of setup is
            no shell, or an option is given twice or is not one of sbatch.
    """

    minutes: int
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 0
    cpus_per_task: int = 0
    mem: str = ""
    mem_per_cpu: str = ""
    mem_per_gpu: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gres: str = ""
    exclude: str = ""
    nodelist: str = ""
    exclusive: bool = False
    dependency: str = ""
    reservation: str = ""
    comment: str = ""
    mail: str = ""
    job_name: str = ""
    array_limit: int = 0
    sbatch: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    container: str = ""
    container_with: str = "apptainer"
    grace_seconds: int = 120
    max_restarts: int = 1000
    max_idle_restarts: int = 5
    max_failures: int = 10

    def __post_init__(self) -> None:
        # the command line refuses these; a file of the site can hold them
        for name, value in (("nodes", self.nodes), ("grace", self.grace_seconds)):
            if value < 1:
                raise UserError(f"--{name} {value}: must be 1 or more")
        if self.grace_seconds >= self.minutes * 60:
            raise UserError(
                f"--grace {self.grace_seconds} s is not less than --time, {self.minutes} min: no "
                "time would be left to work; request more time, or less grace"
            )
        if self.gpus and self.tasks > self.gpus:
            raise UserError(
                f"--tasks-per-node {self.tasks} with {self.gpus} GPUs per node: each task needs a "
                "GPU of its own; leave --tasks-per-node out"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and "\n" in value:
                option = field.name.replace("_", "-")
                raise UserError(f"--{option} {value!r} has several lines; write it in one")
        check_setup(self.setup)
        for text in self.srun_args:
            check_shell_words("--srun-args", text)
            if not text.strip().startswith("-"):
                raise UserError(
                    f"--srun-args {text!r} is not an option of srun; write for example --srun-args "
                    "'--cpu-bind=cores'"
                )
        check_shell_words("--container-with", self.container_with)
        if self.container_with not in CONTAINERS and "{image}" not in self.container_with:
            raise UserError(
                f"--container-with {self.container_with!r} is neither one of "
                f"{', '.join(CONTAINERS)} nor a command line that contains {{image}}"
            )

    @property
    def options(self) -> dict[str, Value]:
        """Options of sbatch by the name that sbatch has for them, without those of tapct."""
        named: dict[str, Value] = {}
        for name in sbatch_options.NAMED:
            value = getattr(self, name.replace("-", "_"))
            if value:
                named[name] = True if value is True else str(value)
        if self.mail:
            named |= {"mail-user": self.mail, "mail-type": "END,FAIL"}
        return sbatch_options.combined(named, sbatch_options.parse(self.sbatch))

    @property
    def gpus(self) -> int:
        """GPUs of each node; 0: none, or the number is not known."""
        return sbatch_options.gpus_of_node(self.options)

    @property
    def has_gpus(self) -> bool:
        """Whether the job requests a GPU, in whatever way."""
        return sbatch_options.requests_gpus(self.options)

    @property
    def tasks(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or self.gpus or 1

    @property
    def world(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.tasks
