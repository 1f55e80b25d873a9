"""Third pass of `resolve`: the complete tree becomes frozen dataclasses, every value checked.

`${...}` is replaced first; then each value must have the type of its field and lie in its range,
and each dataclass checks the rules between its own fields in `__post_init__`.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from types import NoneType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tapct.config import plugins
from tapct.config.fields import KeyPath, checked, dotted, kind
from tapct.config.plain import is_plain
from tapct.config.schema import ConfigField, fields_of
from tapct.config.sources import ConfigError, Sources

# `${NAME}`; OmegaConf's own forms hold a dot, a colon or a bracket, or name a key of the config
_ENVIRONMENT = re.compile(r"\$\{([A-Za-z_]\w*)\}")


def interpolated(full: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """The tree with `${...}` replaced by the values that they point at.

    A name that is no key of the config, as in `${HOME}`, is an environment variable.

    Raises:
        ConfigError: one of them points at nothing, or at itself.
    """
    if is_plain(full):
        return full  # OmegaConf needs a quarter of the time of `load_config` for a tree
    full = _with_environment(full, (), full, sources)
    try:
        tree = OmegaConf.to_container(OmegaConf.create(full), resolve=True, throw_on_missing=True)
        return typing.cast("dict[str, Any]", tree)
    except OmegaConfBaseException as error:
        path = tuple(re.findall(r"[^.\[\]]+", str(getattr(error, "full_key", "") or "")))
        rule = (str(getattr(error, "msg", "") or error).splitlines() or ["cannot be resolved"])[0]
        raise ConfigError(f"{sources.of(path)}: {dotted(path)}: {rule}") from error


def _with_environment(node: Any, path: KeyPath, full: Mapping[str, Any], sources: Sources) -> Any:
    """A part of the tree in which `${NAME}` is written as OmegaConf's `${oc.env:NAME}`, unless NAME
    is a key of the config.
    """
    if isinstance(node, dict):
        return {
            key: _with_environment(value, (*path, key), full, sources)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_with_environment(value, path, full, sources) for value in node]
    if not isinstance(node, str):
        return node

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name in full:
            return match[0]
        if name not in os.environ:
            rule = f"{name} is neither a key of the config nor an environment variable that is set"
            raise sources.error(path, node, rule)
        return f"${{oc.env:{name}}}"

    return _ENVIRONMENT.sub(replaced, node)


def convert(cls: type, tree: Mapping[str, Any], path: KeyPath, sources: Sources) -> Any:
    """Build a config dataclass.

    Args:
        cls: config dataclass.
        tree: plain values of all its fields.
        path: path of the section that it stands for.
        sources: sources of the keys.
    Raises:
        ConfigError: a value has the wrong type or is out of range, or a rule between fields is
            broken.
    """
    values: dict[str, Any] = {}
    for field in fields_of(cls):
        values[field.name] = _value(field, tree[field.name], (*path, field.name), sources)
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # a rule between fields, from __post_init__
        named = [name for name in values if re.search(rf"\b{name}\b", str(error))]
        source = sources.of_fields(path, named or list(values))
        raise ConfigError(f"{source}: {dotted(path) or 'config'}: {error}") from error


def _value(field: ConfigField, value: Any, path: KeyPath, sources: Sources) -> Any:
    """The value of one field in its type."""
    if field.is_plugin_section:
        return _plugin_section(field, value, path, sources)
    if field.is_plugin_table:
        return _plugin_table(field, value, path, sources)
    item_class = field.section_of_list(value)
    if item_class is not None:
        items = []
        for i, item in enumerate(value):
            items.append(convert(item_class, item, (*path, str(i)), sources))
        return tuple(items)
    section = field.section
    if section is None:
        try:
            return checked(field.hint, value, field.metadata)
        except ValueError as error:
            raise sources.error(path, value, str(error)) from error
    if isinstance(value, Mapping):
        return convert(section, value, path, sources)
    is_optional = section is not field.hint
    if value is None and is_optional:
        return None
    raise sources.error(path, value, f"must be {kind(section)}")


def _plugin_section(
    field: ConfigField, value: Any, path: KeyPath, sources: Sources
) -> plugins.Plugin:
    if not isinstance(value, Mapping):
        rule = f"must be a section with a name, e.g. {{name: {field.example()}}}"
        raise sources.error(path, value, rule)
    settings = {key: value[key] for key in value if key != "name"}
    return _plugin(field, value["name"], settings, path, sources)


def _plugin_table(
    field: ConfigField, table: Any, path: KeyPath, sources: Sources
) -> tuple[plugins.Plugin, ...]:
    if not isinstance(table, Mapping):
        rule = f"must map plug-in names to fields, e.g. {{{field.example()}: {{}}}}"
        raise sources.error(path, table, rule)
    for name, settings in table.items():
        if not isinstance(settings, Mapping | NoneType):
            rule = "must be a section with its fields, {}, or null for off"
            raise sources.error((*path, name), settings, rule)
    entries = []
    for name, settings in table.items():
        if settings is not None:
            entries.append(_plugin(field, name, settings, (*path, name), sources))
    return tuple(entries)


def _plugin(
    field: ConfigField, name: str, settings: Mapping[str, Any], path: KeyPath, sources: Sources
) -> plugins.Plugin:
    config_class = sources.plugin_config(field, name, path)
    return plugins.Plugin(name, convert(config_class, settings, path, sources))
