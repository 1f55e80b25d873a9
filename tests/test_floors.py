"""The law of imports, read from the tree in README: strictly down its lines, none sideways, none in
a circle.

Imports inside functions count too.
"""

from __future__ import annotations

import ast
import copy
import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tapct"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = ["tapct", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def tapct_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """(module of tapct that is imported, line), relative imports resolved, `from tapct import x` as
    tapct.x.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                (alias.name, node.lineno)
                for alias in node.names
                if alias.name.split(".")[0] == "tapct"
            )
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = module.split(".")
                base = parts[: len(parts) - node.level + is_package]
                start = ".".join([*base, *([node.module] if node.module else [])])
            if start.split(".")[0] == "tapct":
                for alias in node.names:
                    inner = f"{start}.{alias.name}"
                    yield (inner if is_module(inner) else start), node.lineno


def part(module: str, folder: str = "") -> str:
    """The file or folder that a module is or lies in, of tapct or of one of its folders; empty for
    a module outside the folder, and for the package itself.
    """
    names = module.split(".")[1:]
    if folder:
        names = names[1:] if names[:1] == [folder] else []
    return names[0] if names else ""


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@functools.cache
def imports(file: Path) -> list[tuple[str, int]]:
    return list(tapct_imports(parsed(file), module_name(file), file.name == "__init__.py"))


def floors_of(readme: str, folder: str = "") -> list[list[str]]:
    """The files and folders of tapct, or of one of its folders, in the tree of README: a list per
    line, from the top line down.
    """
    block = below(readme.splitlines(), "    tapct/")
    if folder:
        block = below(block, f"      {folder}/")
    deeper = " " * (9 if folder else 7)  # the inside of a folder, or more description
    floors = []
    for line in block:
        if line.startswith(deeper):
            continue
        words = re.split(r"\s{2,}", line.strip())
        floors.append(
            [word.rstrip("*").rstrip("/").removesuffix(".py") for word in words if is_part(word)]
        )
    return floors


def below(lines: list[str], head: str) -> list[str]:
    """The lines of a tree that are indented below the line with this beginning."""
    start = next(number for number, line in enumerate(lines) if line.startswith(head)) + 1
    inner = " " * (len(head) - len(head.lstrip()) + 2)
    return list(itertools.takewhile(lambda line: line.startswith(inner), lines[start:]))


def is_part(word: str) -> bool:
    return re.fullmatch(r"\w+(/\*?|\.py)", word) is not None


README = (ROOT / "README.md").read_text(encoding="utf-8")
ORDERED = ["", "eval", "data"]  # tapct itself, and the folders whose inside the tree shows


@pytest.mark.parametrize("folder", ORDERED)
def test_the_tree_in_readme_names_every_file_and_folder_once(folder: str) -> None:
    names = [
        path.stem
        for path in (PACKAGE / folder).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]
    assert sorted(itertools.chain(*floors_of(README, folder))) == sorted(
        set(names) - {"__init__", "__main__"}
    )


@pytest.mark.parametrize("folder", ORDERED)
def test_imports_point_strictly_down(folder: str) -> None:
    floors = floors_of(README, folder)
    floor = {name: -number for number, names in enumerate(floors) for name in names}
    wrong = []
    for file in FILES:
        mine = part(module_name(file), folder)
        for target, line in imports(file):
            theirs = part(target, folder)
            if theirs and theirs != mine and mine in floor and floor[theirs] >= floor[mine]:
                wrong.append(f"{module_name(file)}:{line} imports {target}")
    assert wrong == []


# the command line answers --help at once, and a job's task takes signals over before torch is
# loaded
LATE = {"tapct.cluster.task"}


def test_no_tapct_import_hides_in_a_function() -> None:
    hidden = []
    for file in FILES:
        name = module_name(file)
        if part(name) == "cli" or name in LATE:
            continue
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                hidden += [(name, *found) for found in tapct_imports(node, "tapct.x", False)]
    assert hidden == []


def test_a_wrong_import_and_a_missing_folder_would_be_found() -> None:
    lines = [
        "    tapct/",
        "      cli/   commands",
        "             and more of them",
        "      nn/*  models/*   layers",
        "        rope/  heads.py   parts of nn",
        "      types.py   nouns",
        "    docs/   pages",
    ]
    tree = "\n".join(lines)
    assert floors_of(tree) == [["cli"], ["nn", "models"], ["types"]]
    assert floors_of(tree, "nn") == [["rope", "heads"]]


def test_nothing_that_the_loop_imports_leads_to_eval() -> None:
    """run.py hands evaluation in as a hook."""
    graph = import_graph()
    assert not {
        name
        for name in reachable(graph, "tapct.engine.loop")
        if part(name) in ("eval", "run", "report")
    }


def test_imports_have_no_cycles() -> None:
    graph = import_graph()
    circles = [
        name
        for name in graph
        if name in {step for near in graph[name] for step in reachable(graph, near)}
    ]
    assert not circles, circles


def test_a_class_name_has_one_meaning() -> None:
    """`Config` alone is the name of many classes: the settings of the file that it stands in."""
    homes: dict[str, list[str]] = {}
    for file in FILES:
        for node in parsed(file).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module_name(file))
    homes.pop("Config")
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_only_readers_and_the_phantom_import_reader_libraries() -> None:
    libraries, wrong = {"nibabel", "SimpleITK", "pydicom"}, []
    for file in FILES:
        names = set()
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").split(".")[0])
        if (
            names & libraries
            and file.parent != PACKAGE / "data" / "readers"
            and file.parent != PACKAGE / "data" / "phantom"
        ):
            wrong.append((module_name(file), names & libraries))
    assert wrong == []


def test_a_rank_loads_no_reader_and_draws_no_picture() -> None:
    """They cost a fifth of its start."""
    program = "import sys, tapct.run.pretrain, tapct.eval.tasks.segmentation; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "torch" in loaded and not loaded & {"nibabel", "SimpleITK", "pydicom", "matplotlib"}


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Module -> modules of tapct that it imports, inside functions too (TYPE_CHECKING blocks are
    left out).
    """
    graph: dict[str, set[str]] = {}
    for file in FILES:
        tree = WithoutTypeChecking().visit(copy.deepcopy(parsed(file)))
        found = tapct_imports(tree, module_name(file), file.name == "__init__.py")
        graph[module_name(file)] = {name for name, _ in found} - {"tapct"}
    return graph


class WithoutTypeChecking(ast.NodeTransformer):
    """Drops what only the type checker reads."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else node


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph.get(name, ())
    return seen


def test_the_reader_of_imports_sees_every_form() -> None:
    text = (
        "import tapct.eval.runner\nfrom tapct.base import rng, console as p\nfrom tapct.types "
        "import Batch\n"
        "from . import readers\nfrom ..views import ops\nfrom .tables import Table\nimport torch\n"
    )
    found = [name for name, _ in tapct_imports(ast.parse(text), "tapct.data.manifest", False)]
    expected = [
        "eval.runner",
        "base.rng",
        "base.console",
        "types",
        "data.readers",
        "views.ops",
        "data.tables",
    ]
    assert found == [f"tapct.{name}" for name in expected]
    assert [
        name for name, _ in tapct_imports(ast.parse("from . import readers"), "tapct.data", True)
    ] == ["tapct.data.readers"]
