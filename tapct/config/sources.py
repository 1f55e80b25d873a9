"""Where every key of a config was written, and the error lines that name the place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tapct.base.exits import UserError
from tapct.config import plugins
from tapct.config.fields import KeyPath, dotted
from tapct.config.schema import ConfigField
from tapct.config.yamlfile import Layer, one_line


class ConfigError(UserError):
    """A config that cannot be used, as one line: source, key, value, rule, and the nearest right
    key.
    """


@dataclass
class Sources:
    """The source of each key.

    Args:
        by_path: path of each key that a layer sets -> "configs/smoke.yaml:12" or "override".
    """

    by_path: dict[KeyPath, str] = field(default_factory=dict)

    def add(self, layer: Layer) -> None:
        """Note the sources of a layer's keys; they replace those of the layers before it."""
        self.by_path.update(layer.sources)

    def forget_below(self, path: KeyPath, layer: Layer) -> None:
        """Drop the sources of the keys below a path, except those that this layer has set."""
        below = [key for key in self.by_path if key[: len(path)] == path and len(key) > len(path)]
        for key in below:
            if key not in layer.sources:
                del self.by_path[key]

    def of(self, path: KeyPath) -> str:
        """The source of a key, or else of the nearest section around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.by_path:
                return self.by_path[path[:length]]
        return "default"

    def of_fields(self, path: KeyPath, names: list[str]) -> str:
        """The sources of some fields of a section, each once, or else that of the section."""
        keys = [(*path, name) for name in names]
        known = [self.by_path[key] for key in keys if key in self.by_path]
        return ", ".join(dict.fromkeys(known)) or self.of(path)

    def error(self, path: KeyPath, value: Any, rule: str) -> ConfigError:
        """An error about the value of one key.

        Args:
            path: path of the key.
            value: value that was given.
            rule: rule that it breaks, e.g. `must be >= 0`.
        """
        return ConfigError(f"{self.of(path)}: {dotted(path)} = {one_line(value)}: {rule}")

    def plugin_config(self, plugin_field: ConfigField, name: Any, path: KeyPath) -> type:
        """The `Config` class of a plug-in.

        Args:
            plugin_field: plug-in section or table that holds the plug-in.
            name: name of the plug-in.
            path: path of the key that names it.
        Raises:
            ConfigError: the plug-in cannot be loaded.
        """
        if not isinstance(name, str):
            raise self.error(path, name, "must be the name of a plug-in")
        try:
            return plugins.load(plugin_field.metadata["plugin_folder"], name).Config
        except UserError as error:
            raise ConfigError(f"{self.of(path)}: {dotted(path)}: {error}") from error
