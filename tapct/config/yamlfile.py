"""YAML files and command-line overrides as layers of a config.

A layer is a plain tree of values, with the source of each key: the line where it was written.
"""

from __future__ import annotations

import copy
import difflib
import functools
import io
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tapct.base.files import expand_path
from tapct.config.fields import KeyPath
from tapct.config.plain import is_plain, merge_plain
from tapct.config.repeated_keys import RepeatedKey, parse

_PACKAGE = Path(__file__).resolve().parent.parent
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it
_QUOTED_START = re.compile(r"""\s*('[^']*'|"[^"]*")\s*[^\s]""")  # and more text behind it


@dataclass(frozen=True)
class Layer:
    """One source of config values.

    Args:
        tree: nested dict of plain values.
        sources: path of each key -> "configs/smoke.yaml:12" or "override"; the empty path stands
            for the whole layer.
        ordered: whether the order of its keys may rearrange a plug-in table.
    """

    tree: dict[str, Any]
    sources: dict[KeyPath, str]
    ordered: bool

    def at(self, path: KeyPath) -> Any:
        """The value at a path, or None where the layer has none."""
        node: Any = self.tree
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node


def shipped_folder() -> Path:
    """The folder of the configs that come with tapct.

    A wheel holds them inside of the package; in a source tree they lie beside it.
    """
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def shipped_names() -> list[str]:
    """Names of the configs that come with tapct, without suffix, sorted."""
    return sorted(file.stem for file in shipped_folder().glob("*.yaml"))


def config_file(named: Path) -> Path:
    """The file of a config that a person has named.

    Args:
        named: path of a YAML file, or a bare name such as `smoke`. A bare name that is not a file
            is looked up among the configs that come with tapct.
    """
    named = expand_path(named)
    if named.suffix or named.parent != Path() or named.is_file():
        return named
    shipped = shipped_folder() / f"{named}.yaml"
    return shipped if shipped.is_file() else named


def read_chain(path: Path) -> list[Layer]:
    """Read a YAML file and the files that its `base:` key leads to, the deepest base first.

    Args:
        path: YAML file, or the name of a config that comes with tapct. `base:` is relative to the
            file that contains it, or such a name too.
    Raises:
        ValueError: a file is missing, unreadable or broken YAML, or a file is its own base; one
            line with file:line.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    current: Path | None = config_file(path)
    named_at = ""  # file:line of the `base:` that names the current file
    while current is not None:
        if current.resolve() in seen:
            chain = " -> ".join(map(_shown, [*seen, current]))
            raise ValueError(
                f"{named_at}: base = {_shown(current)}: the base chain is a circle: {chain}"
            )
        seen.append(current.resolve())
        tree, sources = _read(current, named_at)
        base = tree.pop("base", None)
        named_at = sources.pop(("base",), "")
        if not isinstance(base, str | None) or base == "":
            raise ValueError(f"{named_at}: base = {base}: must be the path of one YAML file")
        layers.append(Layer(tree, sources, ordered=True))
        current = _base_file(current, base) if base else None
    return layers[::-1]


def _base_file(file: Path, base: str) -> Path:
    """The file that `base:` names: beside the file that contains it, or a shipped config, with or
    without `.yaml`, so that a copy of a shipped config works in any folder.
    """
    beside = file.parent / expand_path(base)
    shipped = base.removesuffix(".yaml")
    if beside.is_file() or shipped not in shipped_names():
        return beside
    return shipped_folder() / f"{shipped}.yaml"


def read_overrides(overrides: Sequence[str]) -> list[Layer]:
    """Turn `key=value` arguments into one layer; a later argument wins.

    Raises:
        ValueError: an argument is not key=value, or its value is not YAML.
    """
    merged: dict[str, Any] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"override: {override!r} is not key=value, e.g. optim.lr=2e-4")
        try:
            layer = _of_override(override)
            tree = typing.cast("dict[str, Any]", OmegaConf.to_container(layer))
            if is_plain(merged) and is_plain(tree):
                merge_plain(merged, tree)
            else:
                both = OmegaConf.merge(OmegaConf.create(merged), layer)
                merged = typing.cast("dict[str, Any]", OmegaConf.to_container(both))
        except yaml.YAMLError as error:
            raise ValueError(
                f"override: {key}: its value is not valid YAML: {_problem(error)}"
            ) from error
        except (OmegaConfBaseException, ValueError, AttributeError) as error:
            raise ValueError(f"override: {override}: {_first_line(error)}") from error
    if not overrides:
        return []
    tree = _with_text_keys(merged)
    return [Layer(tree, dict.fromkeys(_paths(tree), "override"), ordered=False)]


def _of_override(override: str) -> DictConfig:
    """The tree of one `key=value`.

    A value that begins with text in quotes and continues after it, such as `'B30' in kernel`, is no
    YAML. It is taken as the text that it is.

    Raises:
        yaml.YAMLError: the value is not YAML.
    """
    key, _, value = override.partition("=")
    try:
        if "{" in value:
            parse(value, _LOADER)
        return OmegaConf.from_dotlist([override])
    except yaml.YAMLError:
        if not _QUOTED_START.match(value):
            raise
        return OmegaConf.from_dotlist([f"{key}={json.dumps(value, ensure_ascii=False)}"])


def _read(path: Path, named_at: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The tree of one file, and where each of its keys is written."""
    shown = _shown(path)
    try:
        tree, lines = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        _raise_unreadable(path, named_at, error)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown} is not UTF-8 text; a config is a YAML file, e.g. mine.yaml"
        ) from error
    except RepeatedKey as error:
        raise ValueError(f"{shown}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise ValueError(f"{shown}:{line}: not valid YAML: {_problem(error)}") from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        raise ValueError(f"{shown}: {key}: {_first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"{shown}: must be a mapping of keys to values, not a {type(tree).__name__}"
        )
    tree = _with_text_keys(tree)
    return tree, {path: f"{shown}:{_line(lines, path)}" for path in _paths(tree)}


def _parsed(content: str) -> tuple[Any, Mapping[KeyPath, int]]:
    """The tree of a YAML text, and the line of each key."""
    tree, lines = _parsed_once(content)
    return copy.deepcopy(tree), lines


@functools.lru_cache(maxsize=8)  # a command reads the config of a run several times
def _parsed_once(content: str) -> tuple[Any, Mapping[KeyPath, int]]:
    root = parse(content, _LOADER)  # OmegaConf does not notice a number that is given twice
    tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(content)))
    lines: dict[KeyPath, int] = {(): 1}
    _collect_lines(root, (), lines)
    return tree, lines


def _raise_unreadable(path: Path, named_at: str, error: OSError) -> NoReturn:
    """Raise ValueError for a config file that could not be read, with the `base:` that names it."""
    named_by = f"{named_at}: base = " if named_at else ""
    if isinstance(error, FileNotFoundError):
        reason = f"no such config file{_near_files(path)}"
    elif error.strerror:
        reason = error.strerror
    else:
        # not from the system: OmegaConf raises a bare OSError for a file that is a single value
        reason = "must be a mapping of keys to values"
    raise ValueError(f"{named_by}{_shown(path)}: {reason}") from error


def _near_files(path: Path) -> str:
    """What a person may have meant by a file that does not exist, as the end of an error line."""
    if not path.suffix and path.parent == Path():
        names = shipped_names()
        near = difflib.get_close_matches(path.name, names, n=2)
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        return f"; {guess}tapct comes with {', '.join(names) or 'no configs here'}"
    files = sorted(file.name for file in path.parent.glob("*.yaml"))
    near = difflib.get_close_matches(path.with_suffix(".yaml").name, files, n=1)
    if near:
        return f"; did you mean {_shown(path.parent / near[0])}?"
    near = difflib.get_close_matches(path.stem, shipped_names(), n=1)
    if near:  # e.g. configs/smok.yaml in a folder without configs/
        return f"; did you mean {near[0]}? It comes with tapct"
    return f"; {_shown(path.parent)} holds {', '.join(files[:8])}" if files else ""


def _collect_lines(node: yaml.Node | None, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines)


def _line(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    # a key that came through a YAML merge (<<) has the line of the section around it
    while path not in lines:
        path = path[:-1]
    return lines[path]


def _paths(tree: Mapping[str, Any], path: KeyPath = ()) -> list[KeyPath]:
    """The paths of all keys, sections included."""
    paths: list[KeyPath] = []
    for key, value in tree.items():
        paths.append((*path, key))
        if isinstance(value, dict):
            paths += _paths(value, (*path, key))
    return paths


def _with_text_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _with_text_keys(value) for key, value in tree.items()}


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shown(path: Path) -> str:
    """A path as a person would write it in the working directory."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith(os.path.join("..", "..")) else str(path.absolute())


def from_text(text: str) -> Any:
    """The value of a YAML text that tapct wrote.

    Raises:
        yaml.YAMLError: the text is broken.
    """
    return yaml.load(text, Loader=_LOADER)


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
    return " ".join(line for line in lines if line != "...")  # yaml ends a bare value with ...


class _Dumper(yaml.SafeDumper):
    """Block mappings, lists on one line, and quotes around text that looks like a number."""

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None
        if re.fullmatch(r"[-+.\d][-+.:\w]*", data):
            style = "'"  # OmegaConf would read it as a number
        elif not data.isprintable():
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_str)
