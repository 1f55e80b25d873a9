"""What the fields of a config dataclass can hold, as the passes of `resolve` see it.

A field is one of

    plug-in section   `name` and the settings of that plug-in     model: {name: vit, dim: 384}
    plug-in table     plug-in names, each with settings           losses: {dino: {}, koleo: null}
    section           another config dataclass, or None           optim: {lr: 1e-3}
    list of sections  a tuple of config dataclasses               stages: [{start: 100}]
    value             everything else; see `fields.checked`       seed: 3
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapct.base.files import unexpanded
from tapct.config import plugins
from tapct.config.fields import KeyPath

ABSENT: Any = object()  # stands for a value that nobody has given; None is a value


@dataclass(frozen=True)
class ConfigField:
    """One field of a config dataclass.

    Args:
        declared: field as the dataclass declares it.
        hint: annotation, resolved to types.
    """

    declared: dataclasses.Field[Any]
    hint: Any

    @property
    def name(self) -> str:
        """Name of the field and of its key in YAML."""
        return self.declared.name

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What `setting`, `plugins.section` or `plugins.table` has noted."""
        return self.declared.metadata

    @property
    def is_plugin_section(self) -> bool:
        """Whether it holds one `Plugin`."""
        return self.metadata.get("plugin_kind") == "section"

    @property
    def is_plugin_table(self) -> bool:
        """Whether it holds a tuple of `Plugin`."""
        return self.metadata.get("plugin_kind") == "table"

    @property
    def section(self) -> type | None:
        """The dataclass of `SomeConfig` or `SomeConfig | None`; None for other annotations."""
        return _dataclass_in(self.hint)

    def section_of_list(self, value: Any) -> type | None:
        """The dataclass of `tuple[SomeConfig, ...]`, if `value` is a list of sections."""
        is_list = isinstance(value, list) and all(isinstance(one, Mapping) for one in value)
        if not is_list or typing.get_origin(self.hint) is not tuple:
            return None
        return _dataclass_in(typing.get_args(self.hint)[0])

    def default(self) -> Any:
        """The default value, or ABSENT."""
        if self.declared.default is not dataclasses.MISSING:
            return self.declared.default
        if self.declared.default_factory is not dataclasses.MISSING:
            return self.declared.default_factory()
        return ABSENT

    def example(self) -> str:
        """The name of a plug-in that this field can hold, for error lines."""
        default: str | tuple[str, ...] = self.metadata["plugin_default"]
        if isinstance(default, str):
            return default
        names = [*default, *plugins.available(self.metadata["plugin_folder"])]
        return names[0] if names else "mylab.foo"


@functools.cache  # reading the annotations of a class takes long
def fields_of(cls: type) -> tuple[ConfigField, ...]:
    """The fields of a config dataclass that a config can set."""
    hints = typing.get_type_hints(cls)
    return tuple(ConfigField(one, hints[one.name]) for one in dataclasses.fields(cls) if one.init)


def _dataclass_in(hint: Any) -> type | None:
    if typing.get_origin(hint) is tuple:
        return None
    for candidate in (hint, *typing.get_args(hint)):
        is_dataclass = isinstance(candidate, type) and dataclasses.is_dataclass(candidate)
        if is_dataclass and candidate is not plugins.Plugin:
            return typing.cast(type, candidate)
    return None


def to_dict(value: Any) -> dict[str, Any]:
    """A config dataclass as plain dicts, lists, numbers and text.

    A plug-in section becomes {"name": ..., **settings}; a plug-in table {name: settings}, with
    None for a default that is off.
    """
    plain: dict[str, Any] = {}
    for declared in dataclasses.fields(value):
        plain[declared.name] = to_plain(declared, getattr(value, declared.name))
    return plain


def to_plain(declared: dataclasses.Field[Any], value: Any) -> Any:
    """The value of one field as plain dicts, lists, numbers and text."""
    plugin_kind = declared.metadata.get("plugin_kind")
    if plugin_kind == "section":
        return {"name": value.name, **to_dict(value.config)}
    if plugin_kind == "table":
        on = {entry.name: to_dict(entry.config) for entry in value}
        off = [name for name in declared.metadata["plugin_default"] if name not in on]
        return {**on, **dict.fromkeys(off)}
    if declared.metadata.get("is_path") and value:
        return unexpanded(value)
    return _plain_value(value)


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain_value(one) for one in value]
    return unexpanded(value) if isinstance(value, Path) else value


def leaves(
    tree: Mapping[str, Any], path: KeyPath = (), into_lists: bool = False
) -> Iterator[tuple[KeyPath, Any]]:
    """The path and value of every leaf of a plain tree; an empty section is a leaf.

    Args:
        tree: nested dicts.
        path: path of the tree itself.
        into_lists: whether the sections in a list are part of the tree, as `stages[0].start`.
    """
    for key, value in tree.items():
        inner = value
        if into_lists and isinstance(value, list):
            sections = {str(i): one for i, one in enumerate(value) if isinstance(one, Mapping)}
            inner = sections or value
        if isinstance(inner, Mapping) and inner:
            yield from leaves(inner, (*path, key), into_lists)
        else:
            yield (*path, key), inner


def all_paths(tree: Mapping[str, Any]) -> list[KeyPath]:
    """The paths of all keys of a plain tree, sections included, each once."""
    paths: dict[KeyPath, None] = {}
    for path, _ in leaves(tree, into_lists=True):
        for length in range(1, len(path) + 1):
            paths[path[:length]] = None
    return list(paths)
