"""Paths in what people read: without absolute ones in records, with a guess after a typo."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# an absolute path at the start of a text, or after a sign that ends a key or begins a list
_ABSOLUTE = re.compile(r"(?P<before>^|[=\[,:'\"\s])(?P<path>[/~][^\[\],'\"=]*)")
# names that are compared with a mistyped one; a folder can hold a million scans
_MOST_NAMES = 10_000
_DIGITS = re.compile(r"\d+")


def relative_or_hashed(path: str, below: Path) -> str:
    """A path relative to a folder where it lies below it, else the hash of it."""
    if path.startswith("/"):
        try:
            return Path(path).relative_to(below).as_posix()
        except ValueError:
            pass
    content = path.encode("utf-8", "surrogateescape")
    return f"path-{hashlib.blake2b(content, digest_size=4).hexdigest()}"


def without_absolute_paths(value: Any) -> Any:
    """Texts with each absolute path replaced by a relative one or its hash; mappings and sequences
    by their values; anything else unchanged.
    """
    if isinstance(value, Mapping):
        return {key: without_absolute_paths(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_absolute_paths(one) for one in value)
    if not isinstance(value, str):
        return value
    here = Path.cwd()

    def replaced(found: re.Match[str]) -> str:
        return found["before"] + relative_or_hashed(found["path"], here)

    return _ABSOLUTE.sub(replaced, value)


def command_line(words: Sequence[str]) -> str:
    """A command as one line without absolute paths; the program by its name alone.

    Args:
        words: program and arguments, as sys.argv holds them.
    """
    if not words:
        return ""
    program = Path(words[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *(without_absolute_paths(word) for word in words[1:])])


def near_path(path: Path) -> str:
    """What a person may have meant by a path that does not exist, for an error line.

    Args:
        path: path that does not exist; one of its folders, or its last name, may be mistyped.
    Returns:
        " (did you mean PATH?)" with a path that exists, or an empty text.
    """
    missing = path
    while missing != missing.parent and not missing.parent.is_dir():
        missing = missing.parent
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
    except OSError:
        return ""
    for name in difflib.get_close_matches(missing.name, sorted(names), n=3, cutoff=0.6):
        if _DIGITS.sub("", name) == _DIGITS.sub("", missing.name):
            continue  # another number is another scan, patient or run, not a typing error
        meant = missing.parent / name / path.relative_to(missing)
        if meant.exists():
            return f" (did you mean {meant}?)"
    return ""
