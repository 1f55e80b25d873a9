"""Configuration: defaults, YAML files and overrides into checked, frozen dataclasses."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tapct.config.fields import setting as setting

if TYPE_CHECKING:
    from tapct.config.resolve import ConfigError as ConfigError
    from tapct.config.resolve import Resolved as Resolved
    from tapct.config.resolve import from_dict as from_dict
    from tapct.config.resolve import load_config as load_config
    from tapct.config.resolve import to_dict as to_dict

_OF_RESOLVE = ("ConfigError", "Resolved", "from_dict", "load_config", "to_dict")


def __getattr__(name: str) -> Any:
    # OmegaConf is loaded on first use, so that modules which only declare settings are light
    if name not in _OF_RESOLVE:
        raise AttributeError(f"module 'tapct.config' has no attribute {name!r}")
    return getattr(importlib.import_module("tapct.config.resolve"), name)
