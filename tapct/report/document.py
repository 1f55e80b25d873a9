"""A whole page around a body of HTML: style, scripts, and the policy that forbids requests."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

from tapct.base import files
from tapct.base.exits import UserError
from tapct.report.markup import text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLES = ("vendor/uPlot.min.css", "web/page.css")
SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "web/tables.js",
    "web/chart_ink.js",
    "web/charts.js",
    "web/viewer.js",
    "web/page.js",
)
NO_SCRIPT = (
    "JavaScript is off, so this page has no charts, no slices to move through and no sorting. Its "
    "tables, pictures and the last value of each curve are complete. The scripts are part of the "
    "page; it loads nothing."
)
LICENCE = "vendor/uPlot.LICENSE.txt"


def document(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: title of the window, as text.
        body: HTML inside of `main`.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta '
        'http-equiv="Content-Security-Policy"'
        f' content="{POLICY}"><style>{_style()}</style></head>'
        f'<body><div class="light" hidden></div><noscript><p class="no-script">{NO_SCRIPT}</p>'
        f"</noscript><main>{body}</main><script>{_script()}</script></body></html>\n"
    )


def save(html: str, out: Path) -> Path:
    """Write a page, whole or not at all, and return its path. Raises: UserError."""
    try:
        files.write_atomically(out, html)
    except OSError as error:
        raise UserError(
            f"{out} could not be written: {files.first_cause(error)}. Free space or check the "
            "folder's permissions."
        ) from error
    return out


@functools.cache
def _style() -> str:
    return "\n".join(_content(name) for name in STYLES)


@functools.cache
def _script() -> str:
    """All scripts, with the licence of uPlot, which its copies must carry."""
    scripts = "\n".join(_content(name) for name in SCRIPTS)
    return f"/* uPlot\n{_content(LICENCE)}*/\n{scripts}"


def _content(name: str) -> str:
    return resources.files("tapct.report").joinpath(name).read_text(encoding="utf-8")
