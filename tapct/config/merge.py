"""First pass of `resolve`: the layers of a config become one tree.

OmegaConf merges where a layer has its `${...}`. Two things are arranged before, layer by layer:

- A layer that names another plug-in drops the settings of the one before it: with
  `model: {name: vit, dim: 384}` below, `model: {name: mylab.cnn}` is not a CNN of dim 384.
- The entries of a plug-in table keep an order: defaults first, then in order of appearance. A file
  that names all entries decides their order.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from tapct.config.fields import KeyPath
from tapct.config.plain import is_plain, merge_plain
from tapct.config.schema import ConfigField, fields_of
from tapct.config.sources import Sources
from tapct.config.yamlfile import Layer


def merge_layers(cls: type, layers: Sequence[Layer], sources: Sources) -> dict[str, Any]:
    """Merge layers into one plain tree; a later layer wins.

    Args:
        cls: config dataclass that the tree is for.
        layers: layers, the lowest first.
        sources: sources of the keys; those of the layers are added to it.
    Raises:
        ConfigError: a plug-in cannot be loaded.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        # before the merge, so that a plug-in that fails to load is reported with its line
        sources.add(layer)
        _prepare_section(cls, (), merged, layer, sources)
        if is_plain(merged) and is_plain(layer.tree):
            merge_plain(merged, layer.tree)
        else:
            both = OmegaConf.merge(OmegaConf.create(merged), OmegaConf.create(layer.tree))
            merged = typing.cast("dict[str, Any]", OmegaConf.to_container(both))
    return merged


def _prepare_section(
    cls: type, path: KeyPath, merged: dict[str, Any], layer: Layer, sources: Sources
) -> None:
    """Arrange a section of the tree for the merge with a layer, in place.

    Args:
        cls: config dataclass of the section.
        path: path of the section.
        merged: section as merged from the layers below; changed in place.
        layer: layer that is merged next.
        sources: sources of the keys.
    """
    for field in fields_of(cls):
        here = (*path, field.name)
        given = layer.at(here)
        if isinstance(given, list):
            # The list replaces what is there. None stands in its place until the merge, because
            # OmegaConf refuses to merge a list into a section; where the field holds no list, the
            # third pass reports the mistake.
            merged[field.name] = None
        if not isinstance(given, dict):
            continue  # the layer leaves this field alone, or gives it a plain value
        if not isinstance(merged.get(field.name), dict):
            merged[field.name] = {}  # so that the functions below can change it in place
        if field.is_plugin_section:
            _prepare_plugin_section(field, here, merged[field.name], layer, sources)
        elif field.is_plugin_table:
            merged[field.name] = _ordered_table(field, here, merged[field.name], layer)
            _prepare_plugin_table(field, here, merged[field.name], layer, sources)
        elif field.section is not None:
            _prepare_section(field.section, here, merged[field.name], layer, sources)


def _prepare_plugin_section(
    field: ConfigField, path: KeyPath, merged: dict[str, Any], layer: Layer, sources: Sources
) -> None:
    name_before = merged.get("name", field.metadata["plugin_default"])
    name = layer.at(path).get("name", name_before)
    if name != name_before:
        merged.clear()
        sources.forget_below(path, layer)
    config_class = sources.plugin_config(field, name, (*path, "name"))
    _prepare_section(config_class, path, merged, layer, sources)


def _ordered_table(
    field: ConfigField, path: KeyPath, merged: dict[str, Any], layer: Layer
) -> dict[str, Any]:
    """The table with an entry for every default and every name of the layer, in their order."""
    given = layer.at(path)
    table = dict(merged)
    for name in (*field.metadata["plugin_default"], *given):
        table.setdefault(name, {})
    if layer.ordered and set(given) == set(table):
        return {name: table[name] for name in given}
    return table


def _prepare_plugin_table(
    field: ConfigField, path: KeyPath, merged: dict[str, Any], layer: Layer, sources: Sources
) -> None:
    for name, settings in layer.at(path).items():
        if isinstance(settings, list):
            merged[name] = None  # as in `_prepare_section`
        if not isinstance(settings, dict):
            continue
        if not isinstance(merged[name], dict):
            merged[name] = {}  # a layer below had switched it off
        config_class = sources.plugin_config(field, name, (*path, name))
        _prepare_section(config_class, (*path, name), merged[name], layer, sources)
