"""A whole page around a body of HTML: style, scripts, and the policy that forbids requests."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

from tapct.base import files
from tapct.base.exits import UserError
from tapct.report.markup import text

STATIC_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
POLICY = f"{STATIC_POLICY}; script-src 'unsafe-inline'"
STYLES = ("vendor/uPlot.min.css", "web/base.css", "web/page.css")
STATIC_STYLES = ("web/base.css", "web/archive.css")
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
    """A whole page about runs.

    Args:
        title: title of the window, as text.
        body: HTML inside of `main`.
    """
    return _page(
        title,
        POLICY,
        _style(STYLES),
        f'<div class="light" hidden></div><noscript><p class="no-script">{NO_SCRIPT}</p></noscript>'
        f"<main>{body}</main><script>{_script()}</script>",
    )


def static_document(title: str, body: str) -> str:
    """A whole page without scripts, in the style of the page about an archive; arguments as in
    `document`.
    """
    return _page(title, STATIC_POLICY, _style(STATIC_STYLES), f"<main>{body}</main>")


def _page(title: str, policy: str, style: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta '
        f'http-equiv="Content-Security-Policy" content="{policy}"><style>{style}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def save(html: str, out: Path, mode: int | None = None) -> Path:
    """Write a page, whole or not at all.

    Args:
        html: the page.
        out: file to write.
        mode: permissions of the file; None: those of other new files.
    Returns:
        `out`.
    Raises:
        UserError: it cannot be written.
    """
    files.check_new_file(out)
    try:
        files.write_atomically(out, html, mode=mode)
    except OSError as error:
        raise UserError(
            f"{out} could not be written: {files.first_cause(error)}. Free space or check the "
            "folder's permissions."
        ) from error
    return out


@functools.cache
def _style(names: tuple[str, ...]) -> str:
    return "\n".join(_content(name) for name in names)


@functools.cache
def _script() -> str:
    """All scripts, with the licence of uPlot, which its copies must carry."""
    scripts = "\n".join(_content(name) for name in SCRIPTS)
    return f"/* uPlot\n{_content(LICENCE)}*/\n{scripts}"


def _content(name: str) -> str:
    return resources.files("tapct.report").joinpath(name).read_text(encoding="utf-8")
