"""Tables of the pages: sorted by their headings, saved as CSV, scrolled sideways on narrow screens.

web/tables.js adds the buttons; without it, the tables can still be read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tapct.report.markup import text


def table(
    name: str, heads: Sequence[str], rows: Sequence[str], css: str = "", *, is_sortable: bool = True
) -> str:
    """A table.

    Args:
        name: name of its CSV file, and of the table for screen readers.
        heads: `<th>` elements; of class `n` for numbers, `track-head` for a bar that is neither
            sorted nor saved.
        rows: `<tr>` elements.
        css: further classes.
        is_sortable: whether its rows can be put in another order.
    """
    classes = " ".join(filter(None, (css, "sortable" if is_sortable else "")))
    return (
        f'<div class="scroll"><table class="{classes}" data-csv="{text(name)}">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def head(title: str, *, is_number: bool = False) -> str:
    """A heading of a column."""
    css = ' class="n"' if is_number else ""
    return f'<th scope="col"{css}>{text(title)}</th>'


def row(name: str, cells: Sequence[str], css: str = "") -> str:
    """A row with its name.

    Args:
        name: first cell, as text.
        cells: `<td>` elements.
        css: class of the row.
    """
    shown = f' class="{css}"' if css else ""
    return f'<tr{shown}><th scope="row">{text(name)}</th>{"".join(cells)}</tr>'


def number_cell(shown: str, css: str = "") -> str:
    """A cell with a number or a short text, aligned to the right."""
    return f'<td class="{" ".join(filter(None, ("n", css)))}">{text(with_minus(shown))}</td>'


def with_minus(shown: str) -> str:
    """A number as text with a real minus; other texts are left alone."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", "\u2212", shown)
