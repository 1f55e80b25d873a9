"""YAML files and command-line overrides as layers of a config: plain trees whose every key knows
its source.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tapct.config.fields import KeyPath


@dataclass(frozen=True)
class Layer:
    """One source of config values.

    Args:
        tree: nested dict of plain values.
        origins: path of each key -> "configs/smoke.yaml:12" or "override"; the empty path stands
            for the whole layer.
        ordered: whether its order of keys may rearrange a plug-in table.
    """

    tree: dict[str, Any]
    origins: dict[KeyPath, str]
    ordered: bool

    def at(self, path: KeyPath) -> Any:
        """The value at a path, or None where the layer says nothing."""
        node: Any = self.tree
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node


def read_chain(path: Path) -> list[Layer]:
    """Read a YAML file and the files that its `base:` key leads to, the deepest base first.

    Args:
        path: YAML file; `base:` is relative to the file that names it.
    Raises:
        ValueError: a file is missing, unreadable or broken YAML, or the chain bites its tail; one
            line with file:line.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    current: Path | None = path
    asked_by = ""
    while current is not None:
        if current.resolve() in seen:
            chain = " -> ".join(map(_shown, [*seen, current]))
            raise ValueError(
                f"{asked_by}: base = {_shown(current)}: the base chain is a circle: {chain}"
            )
        seen.append(current.resolve())
        tree, origins = _read(current, asked_by)
        base = tree.pop("base", None)
        asked_by = origins.pop(("base",), "")
        if not isinstance(base, str | None):
            raise ValueError(f"{asked_by}: base = {base}: must be the path of one YAML file")
        layers.append(Layer(tree, origins, ordered=True))
        current = current.parent / base if base else None
    return layers[::-1]


def read_overrides(overrides: Sequence[str]) -> list[Layer]:
    """Turn `key=value` words into one layer; a later word wins.

    Raises:
        ValueError: a word is not key=value, or its value is not YAML.
    """
    merged = OmegaConf.create()
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"override: {word!r} is not key=value, e.g. optim.lr=2e-4")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([word]))  # type: ignore[assignment]
        except yaml.YAMLError as error:
            raise ValueError(
                f"override: {key}: its value is not valid YAML: {_problem(error)}"
            ) from error
        except (OmegaConfBaseException, ValueError, AttributeError) as error:
            raise ValueError(f"override: {word}: {_first_line(error)}") from error
    tree = _text_keys(OmegaConf.to_container(merged))
    return (
        [Layer(tree, dict.fromkeys(_paths(tree), "override"), ordered=False)] if overrides else []
    )


def _read(path: Path, asked_by: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    shown = _shown(path)
    try:
        content = path.read_text(encoding="utf-8")
        loaded = OmegaConf.load(path)
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            names = sorted(file.name for file in path.parent.glob("*.yaml"))
            near = difflib.get_close_matches(path.with_suffix(".yaml").name, names, n=1)
            there = f"; {_shown(path.parent)} holds {', '.join(names[:8])}" if names else ""
            guess = f"; did you mean {_shown(path.parent / near[0])}?" if near else there
            reason = f"no such config file{guess}"
        else:
            reason = error.strerror or "must be a mapping of keys to values"
        raise ValueError(
            f"{asked_by + ': base = ' if asked_by else ''}{shown}: {reason}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown}: is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(
            f"{shown}:{mark.line + 1 if mark else 1}: not valid YAML: {_problem(error)}"
        ) from error
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{shown}: {getattr(error, 'full_key', '') or ''}: {_first_line(error)}"
        ) from error
    tree = OmegaConf.to_container(loaded)
    if not isinstance(tree, dict):
        raise ValueError(
            f"{shown}: must be a mapping of keys to values, not a {type(tree).__name__}"
        )
    tree = _text_keys(tree)
    lines: dict[KeyPath, int] = {(): 1}
    _collect_lines(root, (), lines)
    return tree, {path: f"{shown}:{_line(lines, path)}" for path in [(), *_paths(tree)] if path}


def _collect_lines(node: yaml.Node | None, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines)


def _line(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    while (
        path not in lines
    ):  # a key that came through a YAML merge (<<) has the line of the section around it
        path = path[:-1]
    return lines[path]


def _paths(tree: Mapping[str, Any], path: KeyPath = ()) -> list[KeyPath]:
    found: list[KeyPath] = []
    for key, value in tree.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += _paths(value, (*path, key))
    return found


def _text_keys(tree: Any) -> Any:
    return (
        {str(key): _text_keys(value) for key, value in tree.items()}
        if isinstance(tree, dict)
        else tree
    )


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shown(path: Path) -> str:
    """A path as a person would write it from the working directory."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith(os.path.join("..", "..")) else str(path.absolute())


def to_text(tree: Mapping[str, Any]) -> str:
    """A config as YAML that reads back to the same."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return text


def one_line(value: Any) -> str:
    """A value as it would be written in YAML, on one line."""
    form: dict[str, Any] = {
        "default_flow_style": True,
        "sort_keys": False,
        "width": 10**9,
        "allow_unicode": True,
    }
    lines = yaml.dump(value, Dumper=_Dumper, **form).splitlines()
    return " ".join(line for line in lines if line != "...")


class _Dumper(yaml.SafeDumper):
    """Block mappings, lists in one line, and quotes around text that OmegaConf would read as a
    number.
    """

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = (
            "'" if re.fullmatch(r"[-+.\d][-+.:\w]*", data) else None if data.isprintable() else '"'
        )
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_str)
