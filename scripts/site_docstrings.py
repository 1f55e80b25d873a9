"""An extension of griffe, which reads docstrings for the reference pages (mkdocs.yml).

Our docstrings have no empty line above `Args:`, `Returns:`, `Raises:` and `Source:`; griffe finds a
section only below one.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<=[^\n])\n(?=(?:Args|Attributes|Returns|Raises|Source|Yields):)")


def separated(text: str) -> str:
    """A docstring with an empty line above every section."""
    return SECTION.sub("\n\n", text)


class SeparateSections(griffe.Extension):
    """Put an empty line above every section of a docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object, after its members were read."""
        if obj.docstring:
            obj.docstring.value = separated(obj.docstring.value)
