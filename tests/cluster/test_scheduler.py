"""Another scheduler needs two files: nothing else runs commands of SLURM, and the page shows what
these two offer.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import tapct
from tapct import cluster
from tapct.cluster import script, slurm

PACKAGE = Path(tapct.__file__).parent
COMMANDS = {"sbatch", "squeue", "scancel", "scontrol", "sinfo"}


def runs_commands(file: Path) -> bool:
    """Whether a text of a file is the name of a SLURM command, or a shell line that begins one."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return any(text in COMMANDS or "scontrol requeue" in str(text) for text in texts)


def test_only_two_files_of_the_cluster_run_commands_of_slurm() -> None:
    files = {
        str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if runs_commands(file)
    }
    # the last two are named, with the reason, in the docstring of tapct.cluster
    assert files == {
        "cluster/slurm.py",
        "cluster/script.py",  # shell lines: these two files are the ones that are exchanged
        "cluster/restarts.py",  # shell lines of `cluster/script.py`
        "cluster/site.py",  # these two only name the option --sbatch
        "cli/submitted_resources.py",
        "doctor/machine.py",
        "run/background_eval.py",
    }
    page = cluster.__doc__ or ""
    assert "`doctor/machine.py`" in page and "`run/background_eval.py`" in page


def readers_of_variables() -> set[Path]:
    """Files that read a variable of SLURM."""
    readers = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"SLURM_\w+", text):
                readers.add(file.relative_to(PACKAGE))
    return readers


def importers_of_the_scheduler() -> set[Path]:
    """Files that import `slurm` or `script`."""
    importers = set()
    for file in [*PACKAGE.glob("cluster/*.py"), *PACKAGE.glob("cli/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("tapct."):
                continue
            parts = {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
            if parts & {"tapct.cluster.slurm", "tapct.cluster.script"}:
                importers.add(file.relative_to(PACKAGE))
    return importers


def test_the_page_names_every_file_that_reads_a_variable_of_slurm() -> None:
    readers = readers_of_variables()
    named = set(re.findall(r"`([\w/]+\.py)`", cluster.__doc__ or ""))
    in_cluster = {file.name for file in readers if file.parent.name == "cluster"}
    elsewhere = {str(file) for file in readers if file.parent.name != "cluster"}
    assert in_cluster == {"script.py", "task.py"} and elsewhere == {
        "base/launcher.py",
        "base/lease.py",
        "base/ranks.py",
        "engine/stop.py",
        "run/provenance.py",
    }
    assert in_cluster | elsewhere <= named


def test_the_page_names_every_file_that_imports_a_part_of_the_scheduler() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", cluster.__doc__ or ""))
    for file in importers_of_the_scheduler():
        place = file.name if file.parent.name == "cluster" else str(file)
        assert place in named, place


def test_docs_extending_names_all_of_these_files_too() -> None:
    page = (PACKAGE.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", page[page.index("## Another scheduler") :]))
    files = readers_of_variables() | importers_of_the_scheduler()
    own = {Path("cluster/slurm.py"), Path("cluster/script.py")}  # the two files to replace
    assert {str(file) for file in files - own} <= named


def test_the_page_names_what_a_scheduler_offers_and_who_calls_it() -> None:
    """Every function of the two files that another file calls stands in the table."""
    table = set(
        re.findall(r"^    (slurm|script)\.(?!py )(\w+) ", cluster.__doc__ or "", re.MULTILINE)
    )
    modules = {"slurm": slurm, "script": script}
    for name, function in table:
        assert callable(getattr(modules[name], function))
    called = set()
    for file in [*PACKAGE.glob("cluster/*.py"), *PACKAGE.glob("cli/*.py")]:
        if file.name in ("slurm.py", "script.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id in modules:
                    called.add((owner.id, node.func.attr))
    assert called == table
