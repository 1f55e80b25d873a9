"""Configuration: defaults, YAML files and overrides into checked, frozen dataclasses."""

from __future__ import annotations

from tapct.config.fields import setting as setting
from tapct.config.resolve import ConfigError as ConfigError
from tapct.config.resolve import Resolved as Resolved
from tapct.config.resolve import from_dict as from_dict
from tapct.config.resolve import load_config as load_config
from tapct.config.resolve import to_dict as to_dict
