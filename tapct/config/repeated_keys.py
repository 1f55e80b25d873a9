"""Keys that a YAML file gives twice: YAML forbids them, and its libraries keep the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # --help is instant
    import yaml

_MERGE = "tag:yaml.org,2002:merge"  # of the key <<, of which a mapping may have several


class RepeatedKey(ValueError):
    """A key that stands twice in one mapping; the text names it and its lines."""


def parse(
    text: str, loader: type[Any], same: Callable[[str], str] = lambda key: key
) -> yaml.Node | None:
    """The nodes of a YAML text, without a mapping in which a key is given twice.

    Args:
        text: YAML.
        loader: class of PyYAML that reads it.
        same: function that gives the same text for keys that mean the same.
    Raises:
        RepeatedKey: a key is given twice.
        yaml.YAMLError: the text is no YAML.
    """
    import yaml

    root = yaml.compose(text, Loader=loader)
    _check(root, (), same, set())
    return root


def _check(node: Any, path: tuple[str, ...], same: Callable[[str], str], seen: set[int]) -> None:
    """Raise RepeatedKey for a node, or one in it, that has a key twice.

    Args:
        node: node of PyYAML, or None.
        path: keys that lead to it.
        same: as in `parse`.
        seen: identities of the nodes that have been checked; an alias leads to one of them.
    """
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if node.id == "sequence":
        for number, item in enumerate(node.value):
            _check(item, (*path, str(number)), same, seen)
    if node.id != "mapping":
        return
    line_of: dict[str, int] = {}
    for key, value in node.value:
        if key.id != "scalar" or key.tag == _MERGE:
            continue  # a key that is no text is refused by whoever reads the values
        line, name = key.start_mark.line + 1, same(key.value)
        if name in line_of:
            before = line_of[name]
            lines = f"line {line}" if before == line else f"lines {before} and {line}"
            raise RepeatedKey(
                f"{'.'.join((*path, key.value))} is given twice, in {lines}; keep one of them"
            )
        line_of[name] = line
        _check(value, (*path, key.value), same, seen)
