"""Texts and numbers as HTML."""

from __future__ import annotations

import html
import math


def text(value: object) -> str:
    """Any value as HTML text, escaped."""
    return html.escape(str(value), quote=True)


def number(value: float, digits: int = 4) -> str:
    """A number for people: `digits` significant ones, short exponents, thin spaces in large counts,
    a real minus.
    """
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or (value == int(value) and 1e4 <= abs(value) < 1e15):
        shown = f"{int(value):,}".replace(",", "\u2009") if abs(value) >= 1e4 else str(value)
    elif value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        shown = f"{mantissa}e{int(exponent)}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value != 0 else 0
        shown = f"{value:.{min(decimals, digits)}f}"
    return shown.replace("-", "\u2212", 1) if value < 0 else shown


def slug(value: str) -> str:
    """A name for an anchor or a file: lower case, words joined by hyphens."""
    kept = "".join(one if one.isalnum() else " " for one in value.lower())
    return "-".join(kept.split())
