"""Invisible marks around what a message takes from outside: names of files, and texts of headers.

A refusal is shown to the person who reads the file, with the name; the manifest has the same line
without it. The marks say where the names are, so that no other word of the line is touched.
"""

from __future__ import annotations

import re
from pathlib import Path

_BEGIN, _END = "\x02", "\x03"
# a line that was cut may lack the end of its last mark
_MARKED = re.compile(f"{_BEGIN}[^{_END}]*(?:{_END}|$)")
HIDDEN = "<file>"


def file_name(path: Path | str) -> str:
    """The name of a file or folder for a refusal, marked as such.

    Args:
        path: its path, of which the last part is shown; or the text to show.
    """
    return f"{_BEGIN}{unmarked(path.name if isinstance(path, Path) else path)}{_END}"


def quoted(text: object) -> str:
    """A text of a header for a refusal, in single quotes; those inside it become double quotes, so
    that its end is always found.
    """
    return "'" + unmarked(str(text)).replace("'", '"') + "'"


def unmarked(text: str) -> str:
    """A line for the person who reads the file: without marks, with the names."""
    return text.replace(_BEGIN, "").replace(_END, "")


def without_marked(text: str) -> str:
    """A line for the manifest: `<file>` in place of every marked name."""
    return _MARKED.sub(HIDDEN, text)
