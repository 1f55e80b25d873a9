"""The reason codes that the code can give, read from its syntax tree.

A reason is an argument for a parameter or dataclass field called `reason`, or the first element of
a pair that is called `outcome`. A name is followed to the constants that the function assigns to
it, to constants of this name in any module, and to what callers in the same file pass.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tapct

PACKAGE = Path(tapct.__file__).parent
_CODE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*$")


def reasons_in_code(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Reason code -> files that give it."""
    trees = {
        file.relative_to(package).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(package.rglob("*.py"))
    }
    constants: dict[str, list[ast.expr]] = {}
    for tree in trees.values():
        for name, value in _assignments(tree.body):
            if name.isupper():
                constants.setdefault(name, []).append(value)
    positions = {name: at for tree in trees.values() for name, at in _positions(tree)}
    found: dict[str, set[str]] = {}
    for file, tree in trees.items():
        for code in _Reasons(tree, constants, positions).codes():
            found.setdefault(code, set()).add(file)
    return found


def _positions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names of classes and functions with a parameter `reason`, and its position."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.args]
        elif isinstance(node, ast.ClassDef):
            names = [
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            ]
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    names = [argument.arg for argument in item.args.args[1:]]
        if "reason" in names and getattr(node, "name", "") != "__init__":
            yield node.name, names.index("reason")  # type: ignore[attr-defined]


def _assignments(body: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of plain assignments."""
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names, values = [target], [node.value]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    names, values = target.elts, node.value.elts
                for name, value in zip(names, values, strict=True):
                    if isinstance(name, ast.Name):
                        yield name.id, value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


class _Reasons:
    """The reasons of one module.

    Args:
        tree: syntax tree of the module.
        constants: values of the constants of all modules, by name.
        positions: position of the argument `reason` of classes and functions of all modules.
    """

    def __init__(
        self,
        tree: ast.Module,
        constants: dict[str, list[ast.expr]],
        positions: dict[str, int],
    ) -> None:
        self.tree, self.constants, self.positions = tree, constants, positions
        self.calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        self.function_of: dict[int, ast.FunctionDef] = {}
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    self.function_of[id(node)] = function

    def codes(self) -> Iterator[str]:
        """All reason codes; one may occur several times."""
        for call in self.calls:
            given = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
            if _name_of(call) in self.positions:
                position = self.positions[_name_of(call)]
                given += call.args[position : position + 1]
            for value in given:
                yield from self._constants(value, self.function_of.get(id(call)))
        for name, value in _assignments(ast.walk(self.tree)):
            if name == "outcome" and isinstance(value, ast.Tuple):
                yield from self._constants(value.elts[0], None)

    def _constants(self, value: ast.expr, function: ast.FunctionDef | None) -> Iterator[str]:
        """String constants that an expression can be."""
        if isinstance(value, ast.Constant):
            if isinstance(value.value, str) and _CODE.match(value.value):
                yield value.value
        elif isinstance(value, ast.IfExp):
            yield from self._constants(value.body, function)
            yield from self._constants(value.orelse, function)
        elif isinstance(value, ast.Name):
            yield from self._of_name(value.id, function)

    def _of_name(self, name: str, function: ast.FunctionDef | None) -> Iterator[str]:
        for value in self.constants.get(name, []):
            yield from self._constants(value, None)
        if function is None:
            return
        for assigned, value in _assignments(ast.walk(function)):
            if assigned == name:
                yield from self._constants(value, None)
        parameters = [argument.arg for argument in function.args.args]
        if name not in parameters:
            return
        position = parameters.index(name)
        for call in self.calls:
            if _name_of(call) == function.name:
                for value in call.args[position : position + 1]:
                    yield from self._constants(value, None)


def _name_of(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))
