"""Configuration: OmegaConf reads, layers are merged, frozen dataclasses hold the result.

    dataclass defaults <- `base:` YAML chain <- YAML <- key=value overrides

Each file, and all overrides together, are a layer: a plain tree with the source of each key
(`yamlfile`). Three passes turn the layers into a frozen dataclass. With the defaults

    model: {name: vit, dim: 384, depth: 12}
    losses: {dino: {weight: 1.0}, ibot: {weight: 1.0}}

the file `mine.yaml` and one override become

    mine.yaml                 model: {dim: 192}
                              losses: {ibot: null}
    override                  losses.dino.weight=${model.depth}

    1. `merge.merge_layers`   model: {dim: 192}
       what was given         losses: {dino: {weight: "${model.depth}"}, ibot: null}
    2. `complete.complete`    model: {name: vit, dim: 192, depth: 12}
       and the defaults       losses: {dino: {weight: "${model.depth}"}, ibot: null}
    3. `convert.convert`      model = Plugin("vit", vit.Config(dim=192, depth=12))
       checked and frozen     losses = (Plugin("dino", dino.Config(weight=12.0)),)

All three walk over the fields of the dataclasses (`schema`) and know the source of each key
(`sources`), that is the line where it was written: errors name it, and `Resolved.sources` keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tapct.config.complete import complete
from tapct.config.convert import convert, interpolated
from tapct.config.fields import dotted
from tapct.config.merge import merge_layers
from tapct.config.schema import leaves
from tapct.config.schema import to_dict as to_dict
from tapct.config.sources import ConfigError as ConfigError
from tapct.config.sources import Sources
from tapct.config.yamlfile import Layer, one_line, read_chain, read_overrides, to_text

# `Resolved.pretty` aligns the sources at the longest line, but at no later column than this.
MAX_ALIGNED_COLUMN = 60


@dataclass(frozen=True)
class Resolved:
    """A config after all merging and checking.

    Args:
        value: frozen dataclass.
        sources: dotted key of each leaf -> "default", "configs/smoke.yaml:12" or "override".
    """

    value: Any
    sources: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The whole config as plain nested dicts and lists; `from_dict` reads it back."""
        return to_dict(self.value)

    def to_yaml(self) -> str:
        """The whole config as YAML that `load_config` reads back to the same value."""
        return to_text(self.to_dict())

    def pretty(self) -> str:
        """One `key: value  # source` line per leaf, aligned.

        With `=` in place of `: `, each line is an override.
        """
        rows = []
        for path, value in leaves(self.to_dict()):
            key = dotted(path)
            rows.append((f"{key}: {one_line(value)}", self.sources[key]))
        width = min(max((len(text) for text, _ in rows), default=0), MAX_ALIGNED_COLUMN)
        return "\n".join(f"{text:<{width}}  # {source}" for text, source in rows)


def load_config(
    cls: type,
    path: Path | None,
    overrides: Sequence[str],
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Resolved:
    """Merge defaults, a YAML file with its `base:` chain, and overrides into a frozen dataclass.

    Args:
        cls: frozen dataclass whose fields are settings, nested dataclasses, and plug-in sections
            and tables.
        path: YAML file or the name of a config that comes with tapct; None for defaults and
            overrides alone.
        overrides: arguments such as `optim.lr=2e-4`; values are YAML; a dotted plug-in name goes
            in brackets, `losses[my.loss].weight=1`.
        upgrade: function for the content of each YAML file, which reads that of earlier versions.
    Raises:
        ConfigError: missing or broken file, unknown key, wrong type, value out of range, or a rule
            between fields.
    """
    try:
        files = [] if path is None else read_chain(path)
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
        cls: frozen dataclass.
        mapping: what `to_dict` gave; missing keys take their defaults; `${...}` is plain text here.
        where: where mapping and overrides come from, for error lines.
        overrides: arguments `key=value`, as in `load_config`.
    Raises:
        ConfigError: as in `load_config`.
    """
    layers = [Layer(dict(mapping), {(): where}, ordered=True)]
    try:
        for layer in read_overrides(overrides):
            layers.append(replace(layer, sources=dict.fromkeys(layer.sources, where)))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return _resolve(cls, layers, interpolate=False).value


def _resolve(cls: type, layers: Sequence[Layer], interpolate: bool = True) -> Resolved:
    """Turn layers into a frozen dataclass by the three passes above.

    Args:
        cls: frozen dataclass.
        layers: layers, the lowest first.
        interpolate: whether to replace `${...}`; a resolved config has it as plain text only.
    """
    sources = Sources()
    full = complete(cls, merge_layers(cls, layers, sources), sources)
    if interpolate:
        full = interpolated(full, sources)
    value = convert(cls, full, (), sources)
    source_of_leaf: dict[str, str] = {}
    for path, _ in leaves(to_dict(value)):
        source_of_leaf[dotted(path)] = sources.by_path.get(path, "default")
    return Resolved(value, source_of_leaf)
