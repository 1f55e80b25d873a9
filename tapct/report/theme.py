"""Style sheet and script of the report pages, read from the files beside this one."""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def style() -> str:
    """The content of theme.css."""
    return _content("theme.css")


@functools.cache
def script() -> str:
    """The content of theme.js."""
    return _content("theme.js")


def _content(name: str) -> str:
    return resources.files("tapct.report").joinpath(name).read_text(encoding="utf-8")
