"""Folders of the host that a job needs in a container: those that its config or command names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tapct.base import files
from tapct.base.exits import UserError
from tapct.data.manifest import Manifest
from tapct.run_folder import RunFolder, has_step_name


def named_in(tree: Any) -> set[str]:
    """Folders of the files and folders that exist and that a config names, in whatever setting.

    Args:
        tree: config as plain dicts and lists.
    """
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, str):
        return {str(path) for path in _folder_of(tree)}
    found: set[str] = set()
    if isinstance(tree, list | tuple):
        for item in tree:
            found |= named_in(item)
    return found


def named_by(words: Sequence[str]) -> set[str]:
    """Folders that a command of tapct names, the configs of its runs and the archives of its
    manifests included.

    Args:
        words: command with its arguments.
    """
    texts = [*words[1:], *(word.partition("=")[2] for word in words[1:])]
    found = named_in(texts)
    for folder in sorted(found):
        config = RunFolder(Path(folder)).config
        if config.is_file():
            with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
                found |= named_in(yaml.safe_load(config.read_text(encoding="utf-8")))
    if words[0] == "pack":
        for text in filter(None, texts):
            with contextlib.suppress(UserError, OSError):
                found.add(str(Manifest.read(files.expand_path(text)).root.absolute()))
    return found


def _folder_of(text: str) -> list[Path]:
    """The folder of a file or folder, if the text names one."""
    # most texts are no path: too long for one, or with a variable that is not set
    with contextlib.suppress(UserError, OSError, ValueError):
        path = files.expand_path(text).absolute()
        if text and path.exists():
            folder = path if path.is_dir() else path.parent
            # the files of its run are read with a checkpoint
            return [folder.parent.parent if has_step_name(folder) else folder]
    return []


def outermost(folders: Iterable[str]) -> list[str]:
    """What to mount so that some folders can be reached, also by their real paths behind symlinks.

    A folder that lies in another one is left out, because it is mounted with it.

    Args:
        folders: absolute paths.
    Raises:
        UserError: a container cannot mount a folder with such a name.
    """
    wanted = {path for folder in folders for path in (folder, os.path.realpath(folder))}
    chosen: list[str] = []
    for folder in sorted(wanted):  # a folder comes before those that lie in it
        if "," in folder or ":" in folder:
            raise UserError(
                f"{folder}: a container cannot mount a folder with a comma or colon in its path; "
                "rename it, or leave --container out"
            )
        if not any(Path(folder).is_relative_to(other) for other in chosen):
            chosen.append(folder)
    return chosen
