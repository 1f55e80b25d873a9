"""The reason codes that the code can give, read from its syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import tapct

PACKAGE = Path(tapct.__file__).parent
_CODE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*$")


def reasons_in_code(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Reason code -> files that give it: the first argument of `Refused`, and `reason=` of a row.

    A variable is followed to the constants that the function assigns to it, or that its callers in
    the same file pass.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for code in _codes_of(tree):
            found.setdefault(code, set()).add(file.relative_to(package).as_posix())
    return found


def _codes_of(tree: ast.Module) -> Iterator[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(node): function for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        given: list[ast.expr] = []
        if name == "Refused" and node.args:
            given.append(node.args[0])
        if name in ("replace", "Row"):
            given += [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
        for value in given:
            yield from _constants(value, inside.get(id(node)), tree)


def _constants(value: ast.expr, function: ast.FunctionDef | None, tree: ast.Module) -> list[str]:
    """String constants that an expression can be."""
    if isinstance(value, ast.Constant):
        return [value.value] if isinstance(value.value, str) and _CODE.match(value.value) else []
    if isinstance(value, ast.IfExp):
        return [*_constants(value.body, function, tree), *_constants(value.orelse, function, tree)]
    if not isinstance(value, ast.Name) or function is None:
        return []  # such as `error.reason` of a refusal that is passed on
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == value.id for target in node.targets
        ):
            found += _constants(node.value, None, tree)
    names = [argument.arg for argument in function.args.args]
    if value.id in names:
        position = names.index(value.id)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function.name:
                passed = [k.value for k in node.keywords if k.arg == value.id]
                passed += node.args[position : position + 1]
                for item in passed:
                    found += _constants(item, None, tree)
    return found
