"""Configuration: OmegaConf at the door, frozen dataclasses behind it.

    dataclass defaults <- `base:` YAML chain <- YAML <- key=value overrides

OmegaConf loads, merges and resolves `${...}`; what leaves this file is a frozen dataclass whose
every value was checked against its field's type and range, and whose every leaf knows where it came
from.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.config.fields import KeyPath, checked, dotted, kind, nearest_keys
from tapct.config.fields import setting as setting
from tapct.config.yamlfile import Layer, one_line, read_chain, read_overrides, to_text

_ABSENT: Any = object()
_Field: TypeAlias = "dataclasses.Field[Any]"


class ConfigError(UserError):
    """A config that cannot be used, in one line: source, key, value, rule, and the nearest right
    key.
    """


@dataclass(frozen=True)
class Resolved:
    """A config after all merging and checking.

    Args:
        value: the frozen dataclass.
        origin: dotted key of each leaf -> "default", "configs/smoke.yaml:12" or "override".
    """

    value: Any
    origin: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The whole config as plain nested dicts and lists; `from_dict` reads it back."""
        return to_dict(self.value)

    def to_yaml(self) -> str:
        """The whole config as YAML that `load_config` reads back to the same value."""
        return to_text(self.to_dict())

    def pretty(self) -> str:
        """One `key: value  # origin` line per leaf, aligned; with `=` for `:` each is an
        override.
        """
        leaves = [(dotted(path), value) for path, value in _leaves(self.to_dict())]
        rows = [(f"{key}: {one_line(value)}", self.origin[key]) for key, value in leaves]
        width = min(max((len(text) for text, _ in rows), default=0), 60)
        return "\n".join(f"{text:<{width}}  # {origin}" for text, origin in rows)


def load_config(
    cls: type,
    path: Path | None,
    overrides: Sequence[str],
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Resolved:
    """Merge defaults, a YAML file with its `base:` chain, and overrides into a frozen dataclass.

    Args:
        cls: a frozen dataclass whose fields are settings, nested dataclasses, and plug-in sections
            and tables.
        path: YAML file, or None for defaults and overrides alone.
        overrides: `optim.lr=2e-4`; values are YAML; a dotted plug-in name goes in brackets,
            `losses[my.loss].weight=1`.
        upgrade: applied to the content of each YAML file, to read those of earlier versions.
    Raises:
        ConfigError: missing or broken file, unknown key, wrong type, value out of range, or a rule
            between fields.
    """
    try:
        files = read_chain(path) if path is not None else []
        if upgrade is not None:
            files = [replace(layer, tree=upgrade(layer.tree)) for layer in files]
        layers = [*files, *read_overrides(overrides)]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _resolve(cls, layers)


def from_dict(
    cls: type, mapping: Mapping[str, Any], where: str, overrides: Sequence[str] = ()
) -> Any:
    """Rebuild a dataclass from the dict of a run's own config or an export, with the same checks.

    Args:
        cls: the frozen dataclass.
        mapping: what `to_dict` gave; missing keys take their defaults; `${...}` is plain text here.
        where: what mapping and overrides came from, for error lines.
        overrides: key=value, as in `load_config`.
    Raises:
        ConfigError: as in `load_config`.
    """
    try:
        above = [
            replace(layer, origins=dict.fromkeys(layer.origins, where))
            for layer in read_overrides(overrides)
        ]
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return _resolve(
        cls, [Layer(dict(mapping), {(): where}, ordered=True), *above], interpolate=False
    ).value


def to_dict(value: Any) -> dict[str, Any]:
    """A config dataclass as plain dicts, lists, numbers and text.

    A plug-in section becomes {"name": ..., **fields}; a table {name: fields}, with None for a
    default that is off.
    """
    return {
        item.name: _plain(item, getattr(value, item.name)) for item in dataclasses.fields(value)
    }


def _resolve(cls: type, layers: Sequence[Layer], interpolate: bool = True) -> Resolved:
    merged: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    scope = _Scope(origins)
    for layer in layers:
        origins.update(
            layer.origins
        )  # first, so that a plug-in that fails to load is told with its line
        _make_way(cls, (), merged, layer, scope)
        merged = _merge(merged, layer.tree)
    full = _complete(cls, None, merged, (), scope)
    if scope.unknown:
        raise scope.unknown_key_error(full)
    value = _build(cls, _interpolated(full, scope) if interpolate else full, (), scope)
    leaves = {path: scope.origins.get(path, "default") for path, _ in _leaves(to_dict(value))}
    return Resolved(value, {dotted(path): origin for path, origin in leaves.items()})


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = OmegaConf.merge(OmegaConf.create(below), OmegaConf.create(above))
    return typing.cast("dict[str, Any]", OmegaConf.to_container(merged))


@dataclass
class _Scope:
    """What error lines need: where each key was set, and which keys nobody knows."""

    origins: dict[KeyPath, str]
    unknown: list[tuple[KeyPath, Any]] = field(default_factory=list)

    def source(self, path: KeyPath) -> str:
        """Where a key was set, or else the section around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return "default"

    def error(self, path: KeyPath, value: Any, rule: str) -> ConfigError:
        return ConfigError(f"{self.source(path)}: {dotted(path)} = {one_line(value)}: {rule}")

    def unknown_key_error(self, full: Mapping[str, Any]) -> ConfigError:
        path, value = self.unknown[0]
        while (
            isinstance(value, Mapping) and len(value) == 1
        ):  # a misspelt section with one key in it
            (key, value), *_ = value.items()
            path = (*path, key)
        keys = [dotted(key) for key in _all_paths(full)]
        near = nearest_keys(dotted(path), keys)
        section = dotted(path[:-1])
        there = [key for key in keys if key.startswith(section + ".")] if section else list(full)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(there[:12])}"
        )
        more = f" ({len(self.unknown) - 1} more unknown keys)" if len(self.unknown) > 1 else ""
        return ConfigError(
            f"{self.source(path)}: {dotted(path)} = {one_line(value)}: unknown key; {hint}{more}"
        )

    def load(self, item: _Field, name: Any, path: KeyPath) -> type:
        """The `Config` class of a plug-in; its failure is told with the key and the source."""
        if not isinstance(name, str):
            raise self.error(path, name, "must be the name of a plug-in")
        try:
            return plugins.load(item.metadata["plugin_folder"], name).Config
        except UserError as error:
            raise ConfigError(f"{self.source(path)}: {dotted(path)}: {error}") from error


def _make_way(
    cls: type, path: KeyPath, merged: dict[str, Any], layer: Layer, scope: _Scope
) -> None:
    """Before a layer is merged: drop the fields of a plug-in that it replaces, take over the order
    of its tables.
    """
    for item, hint in _fields(cls):
        here = (*path, item.name)
        new, old = layer.at(here), merged.get(item.name)
        if not isinstance(new, dict):
            continue
        old = merged[item.name] = old if isinstance(old, dict) else {}
        match item.metadata.get("plugin_kind"):
            case "section":
                before = old.get("name", item.metadata["plugin_default"])
                name = new.get("name", before)
                if name != before:
                    old.clear()
                    _forget(scope.origins, here, layer)
                _make_way(scope.load(item, name, (*here, "name")), here, old, layer, scope)
            case "table":
                for name in [*item.metadata["plugin_default"], *new]:
                    old.setdefault(name, {})
                if layer.ordered and set(new) == set(old):
                    merged[item.name] = old = {name: old[name] for name in new}
                for name, fields in new.items():
                    if isinstance(fields, dict):
                        old[name] = old[name] or {}
                        _make_way(
                            scope.load(item, name, (*here, name)),
                            (*here, name),
                            old[name],
                            layer,
                            scope,
                        )
            case _:
                if (inner := _dataclass_in(hint)) is not None:
                    _make_way(inner, here, old, layer, scope)


def _forget(origins: dict[KeyPath, str], path: KeyPath, layer: Layer) -> None:
    for key in [key for key in origins if key[: len(path)] == path and len(key) > len(path)]:
        if key not in layer.origins:
            del origins[key]


def _complete(
    cls: type, default: Any, user: Mapping[str, Any], path: KeyPath, scope: _Scope
) -> dict[str, Any]:
    """Fill in defaults, so that `${...}` can point at them, and note unknown keys.

    Args:
        default: instance of `cls` that holds the defaults, or None for the defaults of the class
            itself.
    """
    known = {item.name for item, _ in _fields(cls)}
    renamed: Mapping[str, str] = getattr(cls, "renamed", {})
    for key in user:
        if key in renamed and key not in known:
            raise ConfigError(
                f"{scope.source((*path, key))}: {dotted((*path, key))} {renamed[key]}"
            )
    scope.unknown += [((*path, key), value) for key, value in user.items() if key not in known]
    result: dict[str, Any] = {}
    for item, hint in _fields(cls):
        here, given = (*path, item.name), user.get(item.name, _ABSENT)
        start = getattr(default, item.name) if default is not None else _default(item)
        inner = _dataclass_in(hint)
        if given is _ABSENT and start is _ABSENT and inner is None:
            rule = f"is missing: it has no default, set it ({kind(hint)})"
            if strange := [str(key) for key in user if key not in known]:
                rule += f"; unknown here: {', '.join(strange)}"
            raise ConfigError(f"{scope.source(path)}: {dotted(here)} {rule}")
        if (each := _dataclass_of_sections(hint, given)) is not None:
            result[item.name] = [
                _complete(each, None, one, (*here, str(i)), scope) for i, one in enumerate(given)
            ]
        elif not isinstance(given, Mapping | NoneType) and given is not _ABSENT:
            result[item.name] = given
        elif item.metadata.get("plugin_kind") == "section" and given is not None:
            result[item.name] = _complete_section(
                item, start, {} if given is _ABSENT else given, here, scope
            )
        elif item.metadata.get("plugin_kind") == "table" and given is not None:
            result[item.name] = _complete_table(
                item, start, {} if given is _ABSENT else given, here, scope
            )
        elif (
            inner is not None
            and (isinstance(given, Mapping) or start is _ABSENT)
            and given is not None
        ):
            base = start if dataclasses.is_dataclass(start) else None
            result[item.name] = _complete(
                inner, base, {} if given is _ABSENT else given, here, scope
            )
        else:
            result[item.name] = _plain(item, start) if given is _ABSENT else given
    return result


def _complete_section(
    item: _Field, start: plugins.Plugin, given: Mapping[str, Any], path: KeyPath, scope: _Scope
) -> dict[str, Any]:
    name = given.get("name", start.name)
    config = scope.load(item, name, (*path, "name"))
    rest = {key: value for key, value in given.items() if key != "name"}
    return {
        "name": name,
        **_complete(config, start.config if name == start.name else None, rest, path, scope),
    }


def _complete_table(
    item: _Field,
    start: tuple[plugins.Plugin, ...],
    given: Mapping[str, Any],
    path: KeyPath,
    scope: _Scope,
) -> dict[str, Any]:
    defaults = {entry.name: entry.config for entry in start}
    result: dict[str, Any] = {}
    for name in given if set(defaults) <= set(given) else dict.fromkeys([*defaults, *given]):
        config, fields = scope.load(item, name, (*path, name)), given.get(name, {})
        is_section = isinstance(fields, Mapping)
        result[name] = (
            _complete(config, defaults.get(name), fields, (*path, name), scope)
            if is_section
            else fields
        )
    return result


def _interpolated(full: dict[str, Any], scope: _Scope) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.create(full), resolve=True, throw_on_missing=True)
        return typing.cast("dict[str, Any]", tree)
    except OmegaConfBaseException as error:
        path = tuple(re.findall(r"[^.\[\]]+", str(getattr(error, "full_key", "") or "")))
        rule = (str(getattr(error, "msg", "") or error).splitlines() or ["cannot be resolved"])[0]
        raise ConfigError(f"{scope.source(path)}: {dotted(path)}: {rule}") from error


def _build(cls: type, tree: Mapping[str, Any], path: KeyPath, scope: _Scope) -> Any:
    values = {
        item.name: _convert(item, hint, tree[item.name], (*path, item.name), scope)
        for item, hint in _fields(cls)
    }
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # a rule between fields, from __post_init__
        named = [name for name in values if re.search(rf"\b{name}\b", str(error))]
        origins = [scope.origins.get((*path, name)) for name in named or values]
        source = ", ".join(dict.fromkeys(origin for origin in origins if origin)) or scope.source(
            path
        )
        raise ConfigError(f"{source}: {dotted(path) or 'config'}: {error}") from error


def _convert(item: _Field, hint: Any, value: Any, path: KeyPath, scope: _Scope) -> Any:
    match item.metadata.get("plugin_kind"):
        case "section":
            if not isinstance(value, Mapping):
                raise scope.error(
                    path, value, f"must be a section with a name, e.g. {{name: {_example(item)}}}"
                )
            return _plugin(
                item,
                value["name"],
                {key: value[key] for key in value if key != "name"},
                path,
                scope,
            )
        case "table":
            if not isinstance(value, Mapping):
                raise scope.error(
                    path,
                    value,
                    f"must map plug-in names to fields, e.g. {{{_example(item)}: {{}}}}",
                )
            return _entries(item, value, path, scope)
    inner = _dataclass_in(hint)
    if inner is not None and isinstance(value, Mapping):
        return _build(inner, value, path, scope)
    if (each := _dataclass_of_sections(hint, value)) is not None:
        return tuple(_build(each, one, (*path, str(i)), scope) for i, one in enumerate(value))
    try:
        if inner is not None and not (value is None and inner is not hint):
            raise ValueError(f"must be {kind(inner)}")
        return None if inner is not None else checked(hint, value, item.metadata)
    except ValueError as error:
        raise scope.error(path, value, str(error)) from error


def _entries(
    item: _Field, table: Mapping[str, Any], path: KeyPath, scope: _Scope
) -> tuple[plugins.Plugin, ...]:
    for name, fields in table.items():
        if not isinstance(fields, Mapping | NoneType):
            raise scope.error(
                (*path, name), fields, "must be a section with its fields, {}, or null for off"
            )
    on = {name: fields for name, fields in table.items() if fields is not None}
    return tuple(_plugin(item, name, fields, (*path, name), scope) for name, fields in on.items())


def _plugin(
    item: _Field, name: str, fields: Mapping[str, Any], path: KeyPath, scope: _Scope
) -> plugins.Plugin:
    return plugins.Plugin(name, _build(scope.load(item, name, path), fields, path, scope))


def _example(item: _Field) -> str:
    names = item.metadata["plugin_default"]
    return (
        names
        if isinstance(names, str)
        else (*names, *plugins.available(item.metadata["plugin_folder"]), "foo")[0]
    )


def _fields(cls: type) -> list[tuple[_Field, Any]]:
    hints = typing.get_type_hints(cls)
    return [(item, hints[item.name]) for item in dataclasses.fields(cls) if item.init]


def _default(item: _Field) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else _ABSENT


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of `SomeConfig` or `SomeConfig | None`; None for every other annotation."""
    for candidate in (
        hint,
        *(typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()),
    ):
        if (
            isinstance(candidate, type)
            and dataclasses.is_dataclass(candidate)
            and candidate is not plugins.Plugin
        ):
            return candidate
    return None


def _dataclass_of_sections(hint: Any, value: Any) -> type | None:
    """The dataclass of `tuple[SomeConfig, ...]`, where the value is a list of sections; else
    None.
    """
    listed = isinstance(value, list) and all(isinstance(one, Mapping) for one in value)
    return (
        _dataclass_in(typing.get_args(hint)[0])
        if listed and typing.get_origin(hint) is tuple
        else None
    )


def _plain(item: _Field, value: Any) -> Any:
    match item.metadata.get("plugin_kind"):
        case "section":
            return {"name": value.name, **to_dict(value.config)}
        case "table":
            on = {entry.name: to_dict(entry.config) for entry in value}
            off = dict.fromkeys(name for name in item.metadata["plugin_default"] if name not in on)
            return {**on, **off}
    return _listed(value)


def _listed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_listed(element) for element in value]
    return str(value) if isinstance(value, Path) else value


def _leaves(
    tree: Mapping[str, Any], path: KeyPath = (), into_lists: bool = False
) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in tree.items():
        if into_lists and isinstance(value, list):
            value = {
                str(i): one for i, one in enumerate(value) if isinstance(one, Mapping)
            } or value
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key), into_lists)
        else:
            yield (*path, key), value


def _all_paths(tree: Mapping[str, Any]) -> list[KeyPath]:
    paths = [path for path, _ in _leaves(tree, into_lists=True)]
    return list(
        dict.fromkeys(path[:length] for path in paths for length in range(1, len(path) + 1))
    )
