"""Start-up of the command line: what `tapct --help` imports, and how long it takes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# what a command may load once it runs; help needs none of it
LIBRARIES = """
    torch numpy rich yaml omegaconf wandb tensorboard fvcore submitit matplotlib pyarrow blosc2
    nibabel SimpleITK pydicom safetensors PIL packaging multiprocessing
"""
HEAVY = LIBRARIES.split()
MOST_STARTS = 10.0  # of a bare Python, in CPU time; 4 to 5 on an idle machine


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def loaded_by(program: str) -> set[str]:
    """Names of the heavy libraries that are loaded after a program."""
    report = f"import json, sys; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{report}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def cpu_seconds(*words: str) -> float:
    """CPU time of a Python process: it depends less on what else runs than its duration."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], env=environment(), stdout=subprocess.PIPE, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


HELP = """
import sys
from tapct.cli import main
sys.argv = ["tapct", *{words!r}]
try:
    main()
except SystemExit as leave:
    assert not leave.code
"""


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["train", "-h"]])
def test_help_loads_no_library_but_typer(words: list[str]) -> None:
    assert loaded_by(HELP.format(words=words)) == set()


@pytest.mark.parametrize("module", ["tapct.doctor.checkup", "tapct.cluster.jobs", "tapct.config"])
def test_commands_without_tensors_do_not_load_torch(module: str) -> None:
    heavy = loaded_by(f"import {module}")
    assert not heavy & {"torch", "matplotlib", "wandb", "tensorboard", "fvcore", "submitit", "rich"}


def test_help_takes_a_few_bare_starts_of_python() -> None:
    bare = min(cpu_seconds("-c", "pass") for _ in range(5))
    helped = min(cpu_seconds("-m", "tapct", "--help") for _ in range(5))
    assert helped < MOST_STARTS * bare, (helped, bare)
