"""Keys that a YAML file gives twice: YAML forbids them, and its libraries keep the last one."""

from __future__ import annotations

from collections.abc import Callable

import yaml


class RepeatedKey(yaml.YAMLError):
    """A key that stands twice in one mapping; the text names it and its lines."""


def parse(
    text: str, loader: type, same: Callable[[str], str] = lambda key: key
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
    root = yaml.compose(text, Loader=loader)
    _check(root, (), same, set())
    return root


def _check(
    node: yaml.Node | None, path: tuple[str, ...], same: Callable[[str], str], seen: set[int]
) -> None:
    if id(node) in seen:  # an alias of what has been checked
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check(item, (*path, str(number)), same, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    line_of: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue  # several << may stand in a mapping; a key of another kind is refused later
        line, name = key.start_mark.line + 1, same(key.value)
        if name in line_of:
            lines = f"lines {line_of[name]} and {line}"
            if line_of[name] == line:
                lines = f"line {line}"
            raise RepeatedKey(
                f"{'.'.join((*path, key.value))} is given twice, in {lines}; keep one of them"
            )
        line_of[name] = line
        _check(value, (*path, key.value), same, seen)
