"""The run folder: what is drawn in run_folder.py and in the docs is what a run leaves, and no other
file of tapct knows a name in it.
"""

from __future__ import annotations

import ast
import fnmatch
import itertools
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_run import config_of, evaluation_of, make_store

from tapct import run_folder
from tapct.report import page
from tapct.run import finished, pretrain
from tapct.run_folder import (
    CheckpointFolder,
    CheckpointsFolder,
    EvaluationFolder,
    ExportFolder,
    JobFolder,
    RunFolder,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tapct"
ROOTS = (
    RunFolder(Path()),
    RunFolder(Path()).checkpoints,
    RunFolder(Path()).checkpoints.step(500),
    RunFolder(Path()).evaluation("DATASET", 500),
    RunFolder(Path()).export,
    JobFolder(RunFolder(Path()).jobs / "20260131-120000"),
)


def drawn(text: str) -> set[str]:
    """Files of the tree in a text, as patterns below the run folder."""
    lines = text[text.index("    RUN/\n") :].splitlines()[1:]
    found, folders = set(), [(4, "")]
    for line in itertools.takewhile(lambda line: line.startswith(" " * 6), lines):
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        while folders[-1][0] >= indent:
            folders.pop()
        above = folders[-1][1]
        if names[0].endswith("/"):
            folders.append((indent, above + names[0]))
        else:
            found |= {above + name for name in names}
    return {re.sub(r"\d{8}(-\d{6})?|REVISION|DATASET", "*", name) for name in found}


def paths_of(folder: object) -> dict[str, Path]:
    """Paths that a class of run_folder.py answers with, by the name of the property."""
    names = [name for name, what in vars(type(folder)).items() if isinstance(what, property)]
    values = {name: getattr(folder, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, Path)}


TREES = {
    "run_folder.py": drawn(run_folder.__doc__ or ""),
    "training.md": drawn((ROOT / "docs" / "training.md").read_text(encoding="utf-8")),
}


def test_the_docs_draw_the_same_folder() -> None:
    assert len(TREES["run_folder.py"]) > 25
    assert TREES["training.md"] == TREES["run_folder.py"]


def test_every_path_is_drawn() -> None:
    tree = TREES["run_folder.py"]
    for folder in ROOTS:
        assert [field.name for field in fields(folder)] == ["path"]  # type: ignore[arg-type]
        for name, path in paths_of(folder).items():
            text = re.sub(r"\d{8}(-\d{6})?|DATASET", "*", path.as_posix())
            known = {text, f"{text}/x"} & tree or any(
                fnmatch.fnmatch(text, entry) or entry.startswith(f"{text}/") for entry in tree
            )
            assert known, f"{type(folder).__name__}.{name}: {text}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, evaluated at one step and at the end, exported and reported."""
    folder = tmp_path_factory.mktemp("whole")
    resolved = config_of(
        folder,
        make_store(folder),
        "log.tensorboard=true",
        "log.wandb.mode=disabled",
        "eval.tasks.segmentation.steps=5",
    )
    pretrain.train(resolved)
    out: Path = resolved.value.out
    finished.evaluate(out)
    finished.evaluate(out, step=8)
    finished.export(out)
    store = f"data.store={resolved.value.data.store}"
    finished.evaluate(out / "export", [store, "device=cpu", "eval.tasks.segmentation.steps=5"])
    page.write(out)
    return out


@pytest.mark.parametrize("name", TREES)
def test_a_run_leaves_what_is_drawn(run: Path, name: str) -> None:
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    unknown = {
        path for path in left if not any(fnmatch.fnmatch(path, entry) for entry in TREES[name])
    }
    assert unknown == set()
    # of an evaluation beside training or on a public data set, of a SLURM job, and of wandb: other
    # tests make those
    elsewhere = ("jobs/", "code/", "wandb/", "eval/data/")
    beside = {f"eval/*/step_*/{file}" for file in ("meta.json", "teacher.safetensors", "log.txt")}
    beside.add("eval/*/step_*/validation/*")
    beside.add("lease.json")  # only while the run trains
    beside.add("eval/*/step_*/predictions/TASK/MODEL/*")  # with a setting of the task
    missing = {
        entry
        for entry in TREES[name] - beside
        if not entry.startswith(elsewhere) and not fnmatch.filter(left, entry)
    }
    assert missing == set()


def test_the_paths_of_a_run_exist(run: Path) -> None:
    folder = RunFolder(run)
    whole = [folder, folder.checkpoints, evaluation_of(run, 12), folder.export]
    for place in (*whole, CheckpointFolder(folder.checkpoints.finished()[-1])):
        assert place.path.is_dir()
        for name, path in paths_of(place).items():
            absent = {"wandb", "wandb_run_id", "jobs", "code", "lease", "submitting"}
            if isinstance(place, EvaluationFolder):
                absent |= {"meta", "teacher", "log", "predictions"}
            assert path.exists() == (name not in absent), path
    assert folder.checkpoints.latest.read_text().strip() == folder.checkpoints.finished()[-1].name
    assert {path.name for path in run.iterdir() if path.is_dir()} <= folder.own_folders()


def test_steps_are_ordered_as_numbers_and_strangers_are_skipped(tmp_path: Path) -> None:
    names = ["step_100000000", "step_00000020", "step_00000003", "step_x", ".writing_step_00000004"]
    for name in names:
        (tmp_path / name).mkdir()
    folder = CheckpointsFolder(tmp_path)
    assert [run_folder.step_of(path) for path in folder.finished()] == [3, 20, 100000000]
    assert folder.step(20).path == tmp_path / "step_00000020"
    assert [path.name for path in folder.leftovers()] == [".writing_step_00000004"]


def names_in_a_run_folder() -> set[str]:
    """Every name of a file or folder that run_folder.py knows."""
    parts: set[str] = set()
    for folder in ROOTS:
        for path in paths_of(folder).values():
            parts |= set(path.parts)
    return {name for name in parts if not re.search(r"\d{8}", name)}


def words_in_paths(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Strings of a file that stand where a path is made, or that have the form of a file name."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    calls = ("Path", "joinpath", "with_name", "glob", "rglob", "is_file")
    in_paths: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            in_paths |= {id(part) for part in ast.walk(node)}
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) in calls
        ):
            in_paths |= {id(part) for part in node.args}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if id(node) in docstrings or "RUN/" in node.value:  # prose for people
            continue
        text = node.value
        if id(node) in in_paths or re.fullmatch(r"\w+\.\w+", text):
            yield from ((part, node.lineno) for part in text.split("/"))
        else:  # a path within a longer text, e.g. in a shell command
            for match in re.finditer(r"[\w.]+(?:/[\w.]+)+|(?<=/)(?<!</)[\w.]+|[\w.]+(?=/$)", text):
                yield from ((part, node.lineno) for part in match.group().split("/"))


def test_no_other_file_knows_a_name_in_a_run_folder() -> None:
    names = names_in_a_run_folder()
    assert {"config.yaml", "checkpoints", "latest", "eval", "model.safetensors", "places"} <= names
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file != PACKAGE / "run_folder.py":
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found += [
                f"{file.relative_to(ROOT)}:{line} {word}"
                for word, line in words_in_paths(tree)
                if word in names
            ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "path = run / 'metrics.jsonl'",
        "path = run / f'eval'",
        "path = run / 'eval' / other",
        "FILE = 'results.json'",
        "path = run.joinpath('export')",
        "paths = run.glob('jobs/*')",
        "line = f'{run}/eval/steps/{step}'",
        "line = 'cat $PLACE/../../checkpoints/latest'",
        "file = f'pictures/{name}.png'",
    ],
)
def test_a_name_in_another_file_would_be_found(code: str) -> None:
    words = {word for word, _ in words_in_paths(ast.parse(code))}
    assert words & names_in_a_run_folder()


def test_an_export_has_the_same_names_anywhere(tmp_path: Path) -> None:
    inside = RunFolder(tmp_path).export
    assert ExportFolder(tmp_path).card.name == inside.card.name
    assert ExportFolder(tmp_path).weights.name == inside.weights.name
