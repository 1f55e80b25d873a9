"""Configuration: OmegaConf at the door, frozen dataclasses behind it."""

from __future__ import annotations

import dataclasses
from typing import Any


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """One field of a frozen config dataclass: its default, its meaning with unit and source, and its range.

    Bounds hold for every element of a tuple field. Rules between fields belong into `__post_init__`, as `UserError`.
    """
    return dataclasses.field(
        default=default, metadata={"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    )
