"""Which fields of config dataclasses a package reads: a small type inference over its source.

It follows annotations (parameters, variables, fields, returns), assignments, `self`, loops and
calls of constructors, and so distinguishes `config.weight` of one Config from that of another. A
container counts as what it holds. A field that is only looked at by its own `__post_init__` counts
as unread: to be checked is not to be used.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tapct.config.plugins import Plugin

Types = frozenset[type]
NOTHING: Types = frozenset()
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def config_classes(modules: Sequence[ModuleType]) -> list[type]:
    """Every dataclass with a field made by `setting`, `section` or `table`."""
    values = [(value, module) for module in modules for value in vars(module).values()]
    classes = [
        value
        for value, module in values
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    configs = [cls for cls in classes if dataclasses.is_dataclass(cls)]
    return [
        cls for cls in configs if any("doc" in field.metadata for field in dataclasses.fields(cls))
    ]


def unread_fields(modules: Sequence[ModuleType]) -> list[str]:
    """Fields of all config classes that nothing in the modules reads, as "module.Class.field"."""
    classes = config_classes(modules)
    plugin_configs = frozenset(
        cls
        for cls in classes
        if cls.__name__ == "Config" and hasattr(inspect.getmodule(cls), "build")
    )
    attributes: dict[tuple[type, str], Types] = {}
    readers = [_Reader(module, attributes, plugin_configs) for module in modules]
    size = -1
    # until nothing new is learnt about self.x
    while size != (size := sum(map(len, attributes.values()))):
        for reader in readers:
            reader.reads = set()
            reader.visit_module()
    reads = set().union(*(reader.reads for reader in readers)) if readers else set()
    return [
        f"{cls.__module__}.{cls.__qualname__}.{field.name}"
        for cls in classes
        for field in dataclasses.fields(cls)
        if not any(name == field.name and stands_for(owner, cls) for owner, name in reads)
    ]


def stands_for(owner: type, cls: type) -> bool:
    """Whether what is read of `owner` is read of `cls`: its base, its heir, or a protocol that it
    fulfils.
    """
    if getattr(owner, "_is_protocol", False):
        members = {
            name
            for name in [*vars(owner), *inspect.get_annotations(owner)]
            if not name.startswith("_")
        }
        return members <= {field.name for field in dataclasses.fields(cls)}
    return issubclass(cls, owner) or issubclass(owner, cls)


def classes_in(hint: Any) -> Types:
    """The classes that an annotation names, those inside of containers and unions too."""
    if inspect.isclass(hint) and not typing.get_args(hint):
        return frozenset({hint})
    return frozenset().union(*(classes_in(arg) for arg in typing.get_args(hint)))


class _Reader:
    def __init__(
        self,
        module: ModuleType,
        attributes: dict[tuple[type, str], Types],
        plugin_configs: frozenset[type],
    ) -> None:
        self.module, self.attributes, self.plugin_configs = module, attributes, plugin_configs
        self.tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        self.scopes: dict[ast.AST, Scope] = {}
        self.hints: dict[ast.AST, Types] = {}
        self.reads: set[tuple[type, str]] = set()

    def visit_module(self) -> None:
        self._visit(self.tree, {}, None)

    def _visit(self, node: Any, outer: dict[str, Types], owner: type | None) -> None:
        """One function or class, or the module: learn its variables, note its reads, then go into
        what it defines.
        """
        names = dict(outer)
        scope = self.scopes[node] = self.scopes.get(node) or Scope.of(node)
        for _ in range(2):  # a loop may use what is assigned below
            for binding in scope.bindings:
                self._learn(binding, names)
        for read in scope.reads:
            self.reads |= {(cls, read.attr) for cls in self._infer(read.value, names)}
        for inner in scope.inner:
            if isinstance(inner, ast.ClassDef):
                cls = vars(self.module).get(inner.name) if isinstance(node, ast.Module) else None
                self._visit(inner, names, cls if inspect.isclass(cls) else None)
            elif owner is None or getattr(inner, "name", "") != "__post_init__":
                self._visit(inner, {**names, **self._arguments(inner, owner)}, None)

    def _arguments(self, node: Function, owner: type | None) -> dict[str, Types]:
        args = node.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        known = {arg.arg: self._annotation(arg.annotation) for arg in every}
        if owner is not None and every and every[0].arg == "self":
            known["self"] = frozenset({owner})
        return known

    def _learn(self, node: ast.AST, names: dict[str, Types]) -> None:
        pairs: list[tuple[ast.AST, Types]] = []
        if isinstance(node, ast.AnnAssign):
            pairs = [(node.target, self._annotation(node.annotation))]
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    values = [self._infer(value, names) for value in node.value.elts]
                    pairs += zip(target.elts, values, strict=False)
                else:
                    pairs.append((target, self._infer(node.value, names)))
        elif isinstance(node, ast.NamedExpr):
            pairs = [(node.target, self._infer(node.value, names))]
        elif isinstance(node, ast.For | ast.comprehension):
            pairs = [(node.target, self._infer(node.iter, names))]
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            pairs = [(node.optional_vars, self._infer(node.context_expr, names))]
        for target, types in pairs:
            self._bind(target, types, names)

    def _bind(self, target: ast.AST, types: Types, names: dict[str, Types]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = names.get(target.id, NOTHING) | types
        elif isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self._bind(element, types, names)
        elif isinstance(target, ast.Attribute):
            for cls in self._infer(target.value, names):
                key = (cls, target.attr)
                self.attributes[key] = self.attributes.get(key, NOTHING) | types

    def _infer(self, node: ast.AST, names: dict[str, Types]) -> Types:
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.Attribute):
            owners = self._infer(node.value, names)
            return frozenset().union(*(self._attribute(cls, node.attr) for cls in owners))
        if isinstance(node, ast.Call):
            return self._call(node, names)
        if isinstance(node, ast.Subscript | ast.Starred | ast.Await):
            return self._infer(node.value, names)
        if isinstance(node, ast.IfExp):
            return self._infer(node.body, names) | self._infer(node.orelse, names)
        if isinstance(node, ast.BoolOp):
            return frozenset().union(*(self._infer(value, names) for value in node.values))
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return frozenset().union(*(self._infer(value, names) for value in node.elts))
        return NOTHING

    def _attribute(self, cls: type, name: str) -> Types:
        if cls is Plugin and name == "config":
            return self.plugin_configs
        found = self.attributes.get((cls, name), NOTHING)
        for base in cls.__mro__:
            hint = inspect.get_annotations(base).get(name)
            if hint is not None:
                found |= self._evaluate(hint, inspect.getmodule(base))
            member = vars(base).get(name)
            getter = member.fget if isinstance(member, property) else getattr(member, "func", None)
            if getter is not None:
                found |= self._evaluate(
                    getattr(getter, "__annotations__", {}).get("return"), inspect.getmodule(base)
                )
        return found

    def _call(self, node: ast.Call, names: dict[str, Types]) -> Types:
        if ast.unparse(node.func) in (
            "dataclasses.replace",
            "replace",
            "reversed",
            "sorted",
            "list",
            "tuple",
            "zip",
        ):
            return frozenset().union(*(self._infer(arg, names) for arg in node.args))
        if ast.unparse(node.func) == "enumerate":
            return self._infer(node.args[0], names)
        target = self._object(node.func)
        if inspect.isclass(target):
            return frozenset({target})
        if target is None and isinstance(node.func, ast.Attribute):
            methods = [
                getattr(cls, node.func.attr, None) for cls in self._infer(node.func.value, names)
            ]
        else:
            methods = [target]
        returns = [
            (getattr(method, "__annotations__", {}).get("return"), method) for method in methods
        ]
        return frozenset().union(
            *(self._evaluate(hint, inspect.getmodule(method)) for hint, method in returns if hint)
        )

    def _object(self, node: ast.AST) -> Any:
        """What a dotted name stands for in the module, or None."""
        if isinstance(node, ast.Name):
            return vars(self.module).get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._object(node.value)
            return (
                getattr(base, node.attr, None)
                if isinstance(base, ModuleType) or inspect.isclass(base)
                else None
            )
        return None

    def _annotation(self, node: ast.AST | None) -> Types:
        if node is None:
            return NOTHING
        if node not in self.hints:
            self.hints[node] = self._evaluate(ast.unparse(node), self.module)
        return self.hints[node]

    def _evaluate(self, hint: Any, module: ModuleType | None) -> Types:
        if isinstance(hint, str):
            try:
                hint = eval(hint, dict(vars(module)) if module else {})
            except NameError:  # named for type checkers alone
                return NOTHING
            if isinstance(hint, str):
                return self._evaluate(hint, module)
        return classes_in(hint)


BINDINGS = (ast.AnnAssign, ast.Assign, ast.NamedExpr, ast.For, ast.comprehension, ast.withitem)


@dataclasses.dataclass(frozen=True)
class Scope:
    """What stands in a function, class or module itself, and not in a function or class inside of
    it.
    """

    bindings: list[ast.AST]
    reads: list[ast.Attribute]
    inner: list[Any]

    @classmethod
    def of(cls, root: Any) -> Scope:
        scope = cls([], [], [])
        waiting = list(root.body) if isinstance(root.body, list) else [root.body]
        while waiting:
            node = waiting.pop()
            if isinstance(node, BINDINGS):
                scope.bindings.append(node)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                scope.reads.append(node)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
                scope.inner.append(node)
                waiting += list(_outside(node))
            else:
                waiting += list(ast.iter_child_nodes(node))[::-1]
        return scope


def _outside(node: Any) -> Iterator[ast.AST]:
    yield from getattr(node, "decorator_list", [])
    if isinstance(node, ast.ClassDef):
        yield from node.bases
    else:
        yield from [
            value for value in [*node.args.defaults, *node.args.kw_defaults] if value is not None
        ]
