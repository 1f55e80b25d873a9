"""A nested config as dotted keys: to compare two configs, and to list one in a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of each leaf, in order; lists and empty mappings are leaves.

    Values go through JSON, so that a tuple equals a list and a path equals its text.
    """
    plain: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    flat: dict[str, Any] = {}

    def add(branch: dict[str, Any], prefix: str) -> None:
        for key, value in branch.items():
            if isinstance(value, dict) and value:
                add(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    add(plain, "")
    return flat


def flatten_to_text(tree: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> one line of text for each leaf; items of a list are separated by spaces."""
    texts = {}
    for key, value in flatten(tree).items():
        items = value if isinstance(value, list) else [value]
        texts[key] = " ".join(item if isinstance(item, str) else json.dumps(item) for item in items)
    return texts
