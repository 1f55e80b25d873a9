"""Second pass of `resolve`: defaults are filled in, and keys that no field has are found.

Afterwards every key is in the tree, so that `${...}` can point at one that was left at its default,
and a misspelt key can be compared with all that exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tapct.config import plugins
from tapct.config.fields import KeyPath, dotted, kind, nearest_keys
from tapct.config.schema import ABSENT, ConfigField, all_paths, fields_of, to_plain
from tapct.config.sources import ConfigError, Sources
from tapct.config.yamlfile import one_line

MOST_KEYS_SHOWN = 12


def complete(cls: type, merged: Mapping[str, Any], sources: Sources) -> dict[str, Any]:
    """Fill in all defaults.

    Args:
        cls: config dataclass.
        merged: plain tree of what was given.
        sources: sources of the keys.
    Raises:
        ConfigError: a key is unknown, or a field without a default is missing.
    """
    completion = _Completion(sources)
    full = completion.section(cls, None, merged, ())
    if completion.unknown:
        raise _unknown_key_error(completion.unknown, full, sources)
    return full


class _Completion:
    """One walk over the fields of a config.

    Args:
        sources: sources of the keys.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.unknown: list[tuple[KeyPath, Any]] = []

    def section(
        self, cls: type, default: Any, given: Mapping[str, Any], path: KeyPath
    ) -> dict[str, Any]:
        """A section with all keys of its dataclass.

        Args:
            cls: dataclass of the section.
            default: instance of `cls` that holds the defaults, or None for those of the class.
            given: keys that were given.
            path: path of the section.
        """
        fields = fields_of(cls)
        unknown = [key for key in given if key not in {field.name for field in fields}]
        renamed: Mapping[str, str] = getattr(cls, "renamed", {})
        for key in unknown:
            if (
                key in renamed
            ):  # a key of an earlier version; `renamed` holds the end of the message
                here = (*path, key)
                raise ConfigError(f"{self.sources.of(here)}: {dotted(here)} {renamed[key]}")
        self.unknown += [((*path, key), given[key]) for key in unknown]
        result: dict[str, Any] = {}
        for field in fields:
            here = (*path, field.name)
            start = field.default() if default is None else getattr(default, field.name)
            if field.name in given:
                result[field.name] = self._given(field, start, given[field.name], here)
            elif start is not ABSENT:
                result[field.name] = to_plain(field.declared, start)
            elif field.section is not None:
                result[field.name] = self.section(field.section, None, {}, here)
            else:
                raise self._missing(field, here, unknown)
        return result

    def _given(self, field: ConfigField, start: Any, given: Any, path: KeyPath) -> Any:
        """A field that was given; `start` is its default, or ABSENT."""
        item_class = field.section_of_list(given)
        if item_class is not None:
            items = []
            for i, item in enumerate(given):
                items.append(self.section(item_class, None, item, (*path, str(i))))
            return items
        if not isinstance(given, Mapping):
            return given  # a plain value; the third pass decides whether it is allowed
        if field.is_plugin_section:
            return self._plugin_section(field, start, given, path)
        if field.is_plugin_table:
            return self._plugin_table(field, start, given, path)
        if field.section is not None:
            default = start if dataclasses.is_dataclass(start) else None
            return self.section(field.section, default, given, path)
        return given

    def _plugin_section(
        self, field: ConfigField, start: plugins.Plugin, given: Mapping[str, Any], path: KeyPath
    ) -> dict[str, Any]:
        name = given.get("name", start.name)
        config_class = self.sources.plugin_config(field, name, (*path, "name"))
        settings = {key: value for key, value in given.items() if key != "name"}
        default = start.config if name == start.name else None
        return {"name": name, **self.section(config_class, default, settings, path)}

    def _plugin_table(
        self,
        field: ConfigField,
        start: tuple[plugins.Plugin, ...],
        given: Mapping[str, Any],
        path: KeyPath,
    ) -> dict[str, Any]:
        defaults = {entry.name: entry.config for entry in start}
        if set(defaults) <= set(given):
            names = list(given)  # with all defaults in it, its own order decides
        else:
            names = list(dict.fromkeys([*defaults, *given]))  # each once, defaults first
        result: dict[str, Any] = {}
        for name in names:
            here = (*path, name)
            config_class = self.sources.plugin_config(field, name, here)
            settings = given.get(name, {})
            if isinstance(settings, Mapping):
                settings = self.section(config_class, defaults.get(name), settings, here)
            result[name] = settings
        return result

    def _missing(self, field: ConfigField, path: KeyPath, unknown: list[str]) -> ConfigError:
        rule = f"is missing: it has no default, set it ({kind(field.hint)})"
        if unknown:  # perhaps it is there, but misspelt
            rule += f"; unknown here: {', '.join(map(str, unknown))}"
        return ConfigError(f"{self.sources.of(path[:-1])}: {dotted(path)} {rule}")


def _unknown_key_error(
    unknown: list[tuple[KeyPath, Any]], full: Mapping[str, Any], sources: Sources
) -> ConfigError:
    """An error about the first unknown key, with the nearest known ones.

    Args:
        unknown: path and value of every unknown key.
        full: tree with all known keys.
        sources: sources of the keys.
    """
    path, value = unknown[0]
    # a misspelt section with one key in it: that key is what was meant to be set
    while isinstance(value, Mapping) and len(value) == 1:
        ((key, value),) = value.items()
        path = (*path, key)
    keys = [dotted(known) for known in all_paths(full)]
    near = nearest_keys(dotted(path), keys)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        section = dotted(path[:-1])
        there = list(full)
        if section:
            there = [key for key in keys if key.startswith(section + ".")]
        hint = f"known here: {', '.join(there[:MOST_KEYS_SHOWN])}"
    others = len(unknown) - 1
    more = f" ({others} more unknown keys)" if others else ""
    return ConfigError(
        f"{sources.of(path)}: {dotted(path)} = {one_line(value)}: unknown key; {hint}{more}"
    )
