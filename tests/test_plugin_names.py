"""Nothing outside of a plug-in folder knows a plug-in by name: what the core must know of one, the
plug-in answers. Only the defaults of the config tables name some.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapct.config import plugins

PACKAGE = Path(__file__).resolve().parent.parent / "tapct"
FOLDERS = ("losses", "models", "views/ops", "eval/tasks")
# Names of ops are ordinary words too (noise, gain): of these only imports and keys are counted.
WORDS = ("views/ops",)
# What holds settings, or plug-ins by their names: an attribute of one of these may name a plug-in.
# Other identifiers may hold any word: a loss called `variance` forbids no variable `variance`.
HOLDERS = ("config", "settings", "losses", "models", "tasks")


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the constants that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def defaults(tree: ast.AST) -> set[int]:
    """Ids of the constants in calls of `plugins.table` and `plugins.section`, and in a constant
    DEFAULT_... that such a call takes.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("DEFAULT_"):
            found |= {id(part) for part in ast.walk(node)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "plugins.table",
            "plugins.section",
        ):
            found |= {id(part) for part in ast.walk(node)}
    return found


def mentions(text: str, folder: str, name: str) -> Iterator[int]:
    """Lines of a module that know a plug-in by name."""
    tree = ast.parse(text)
    ignored = docstrings(tree) | defaults(tree)
    module = f"tapct.{folder.replace('/', '.')}"
    key = re.compile(rf"\b(losses|model|models|ops|task|tasks)[.\[]{name}\b")
    part_of_field = re.compile(rf"(^|_){name}(_|$)")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module == f"{module}.{name}" or f"{module}.{name}" in imported:
                yield node.lineno
        elif isinstance(node, ast.Import):
            if any(alias.name == f"{module}.{name}" for alias in node.names):
                yield node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in ignored:
                continue
            is_name = node.value == name and folder not in WORDS
            if is_name or key.search(node.value):
                yield node.lineno
        elif isinstance(node, ast.Attribute) and folder not in WORDS:
            holder = ast.unparse(node.value).rpartition(".")[2]
            if holder in HOLDERS and part_of_field.search(node.attr):
                yield node.lineno


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_other_module_knows_a_plugin_by_name(folder: str) -> None:
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if PACKAGE / folder in file.parents:
            continue
        text = file.read_text(encoding="utf-8")
        for name in plugins.available(folder):
            if not re.search(rf"(?<![a-z]){name}(?![a-z])", text):
                continue
            # archives have files and folders of this name, which data/ finds
            if name == "segmentation" and PACKAGE / "data" in file.parents:
                continue
            for line in mentions(text, folder, name):
                wrong.append(f"{file.relative_to(PACKAGE)}:{line} knows {name}")
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("from tapct.losses import koleo", [1]),
        ("import tapct.losses.koleo", [1]),
        ("x = loss.name == 'koleo'", [1]),
        ("x = config.share_koleo_head", [1]),
        ("x = self.config.koleo_weight", [1]),
        ("x = resolved.value.losses.koleo", [1]),
        ("x = 'set losses.koleo=null'", [1]),
        ("x = plugins.table('losses', ('koleo',), 'terms')", []),
        ("'''KoLeo, losses.koleo'''", []),
        ("x = 'KoLeo spreads features'", []),
        ("koleo_D = koleo = noise.koleo(koleo=1)", []),
    ],
)
def test_every_way_to_know_a_plugin_is_found(code: str, lines: list[int]) -> None:
    assert list(mentions(code, "losses", "koleo")) == lines
