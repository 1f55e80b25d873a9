"""The law of imports: strictly down the floors of tapct, none sideways between folders, none inside functions."""

from __future__ import annotations

import ast
import copy
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "tapct"
FLOORS: tuple[tuple[str, ...], ...] = (
    ("types", "geometry", "config", "settings", "yamlfile", "plugin", "rng", "ranks", "log", "signals", "collectives"),
    ("nn",),
    ("data", "views", "models", "losses"),
    ("ssl",),
    ("engine",),
    ("eval", "report"),
    ("weights",),  # embeds with the features of eval
    ("run", "trained", "resume", "provenance", "during", "plan", "doctor", "cli", "stages")
    + ("footprint", "scale", "scale_tables", "planning")
    + ("slurm", "sweep", "jobs", "worker", "batch", "launch"),
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
FLOORS_OF_FILES = {
    0,
    len(FLOORS) - 1,
}  # their files build on each other as those of a folder do; cycles are no more allowed
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = ["tapct", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def tapct_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """(module of tapct that is imported, line), relative imports resolved, `from tapct import x` as tapct.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "tapct")
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


def part(module: str) -> str:
    """The file or folder of tapct that a module is or lies in; empty for the package itself."""
    return (module.split(".") + [""])[1]


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(file: Path) -> list[tuple[str, int]]:
    return list(tapct_imports(parsed(file), module_name(file), file.name == "__init__.py"))


def test_every_module_stands_on_a_floor() -> None:
    top = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    assert [str(file) for file in FILES if part(module_name(file)) not in FLOOR and file not in top] == []


def test_imports_point_strictly_down() -> None:
    wrong = []
    for file in FILES:
        mine = part(module_name(file))
        for target, line in imports(file):
            theirs = part(target)
            if theirs == mine or mine not in FLOOR or theirs not in FLOOR:
                continue
            beside = FLOOR[theirs] == FLOOR[mine] and FLOOR[mine] in FLOORS_OF_FILES
            if not (FLOOR[theirs] < FLOOR[mine] or beside):
                wrong.append(f"{module_name(file)}:{line} imports {target}")
    assert wrong == []


def test_no_tapct_import_hides_in_a_function() -> None:
    hidden = []
    for file in FILES:
        functions = [
            node for node in ast.walk(parsed(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        if file != PACKAGE / "cli.py":  # its commands import what they need, so that --help is instant
            hidden += [
                (module_name(file), *found) for node in functions for found in tapct_imports(node, "tapct.x", False)
            ]
    assert hidden == []


def test_nothing_that_the_loop_imports_leads_to_eval() -> None:
    """run.py hands evaluation in as a hook."""
    graph = import_graph()
    assert not {name for name in reachable(graph, "tapct.engine.loop") if part(name) in ("eval", "run", "report")}


def test_imports_have_no_cycles() -> None:
    graph = import_graph()
    circles = [name for name in graph if name in {step for near in graph[name] for step in reachable(graph, near)}]
    assert not circles, circles


def test_only_readers_and_the_phantom_import_reader_libraries() -> None:
    libraries, wrong = {"nibabel", "SimpleITK", "pydicom"}, []
    for file in FILES:
        names = set()
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").split(".")[0])
        if names & libraries and file.parent != PACKAGE / "data" / "readers" and not file.name.startswith("phantom"):
            wrong.append((module_name(file), names & libraries))
    assert wrong == []


def test_a_rank_loads_no_reader_and_draws_no_picture() -> None:
    """They cost a fifth of its start."""
    program = "import sys, tapct.run, tapct.eval.tasks.segmentation; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded and not loaded & {"nibabel", "SimpleITK", "pydicom", "matplotlib"}


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of tapct that it imports when it is imported itself (TYPE_CHECKING blocks are not)."""
    graph: dict[str, set[str]] = {}
    for file in FILES:
        tree = Run().visit(copy.deepcopy(parsed(file)))
        found = tapct_imports(tree, module_name(file), file.name == "__init__.py")
        graph[module_name(file)] = {name for name, _ in found} - {"tapct"}
    return graph


class Run(ast.NodeTransformer):
    """Leaves what runs at import: no TYPE_CHECKING blocks, no function bodies."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None


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
        "import tapct.eval.runner\nfrom tapct import rng, plugin as p\nfrom tapct.types import Batch\n"
        "from . import readers\nfrom ..views import ops\nfrom .store import Store\nimport torch\n"
    )
    found = [name for name, _ in tapct_imports(ast.parse(text), "tapct.data.sampler", False)]
    expected = ["eval.runner", "rng", "plugin", "types", "data.readers", "views.ops", "data.store"]
    assert found == [f"tapct.{name}" for name in expected]
    assert [name for name, _ in tapct_imports(ast.parse("from . import readers"), "tapct.data", True)] == [
        "tapct.data.readers"
    ]
