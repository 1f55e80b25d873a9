"""Folders of the host that a job needs in a container: those that its config or command names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tapct.base import files
from tapct.base.exits import UserError
from tapct.data.manifest import Manifest
from tapct.data.packed.store_before import StoreBefore
from tapct.run_folder import RunFolder, has_step_name


def named_in(tree: Any, may_be_new: bool = False) -> set[str]:
    """Folders of the files and folders that a config or command names, in whatever setting but
    `data.cache`, whose folder is on the disks of the nodes.

    Args:
        tree: config as plain dicts and lists, or words of a command.
        may_be_new: whether a path that does not exist yet stands for the nearest folder above it
            that exists.
    """
    if isinstance(tree, Mapping):
        data = tree.get("data")
        if isinstance(data, Mapping):
            tree = {**tree, "data": {key: data[key] for key in data if key != "cache"}}
        tree = list(tree.values())
    if isinstance(tree, str):
        found = (_folder_of(path, may_be_new) for path in _paths_in(tree))
        return {str(folder) for folder in found if folder is not None}
    folders: set[str] = set()
    if isinstance(tree, list | tuple):
        for item in tree:
            folders |= named_in(item, may_be_new)
    return folders


def named_by(words: Sequence[str]) -> set[str]:
    """Folders that a command of tapct names, the configs of its runs, the archives of its
    manifests and the manifests of its stores included.

    Args:
        words: command with its arguments.
    """
    found = named_in(words[1:], may_be_new=True)
    for folder in sorted(found):
        config = RunFolder(Path(folder)).config
        if config.is_file():
            with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
                found |= named_in(yaml.safe_load(config.read_text(encoding="utf-8")))
    if words[0] == "pack":
        for text in {path for word in words[1:] for path in _paths_in(word)}:
            with contextlib.suppress(UserError, OSError):
                root = Manifest.read(files.expand_path(text)).root.absolute()
                if root.is_dir():  # --root may replace it, and a container needs what it mounts
                    found.add(str(root))
    return found | of_manifests(found)


def of_manifests(folders: Iterable[str]) -> set[str]:
    """Folders of the manifests from which stores were packed; a store does not hold all columns.

    Args:
        folders: absolute paths, some of them of stores.
    """
    found: set[str] = set()
    for folder in folders:
        with contextlib.suppress(OSError):
            file = StoreBefore.read(Path(folder)).manifest_file
            if file is not None and file.is_file():
                real = os.path.realpath(file.parent)
                # a container has no symlinks behind which the `..` of the file would lead elsewhere
                written = os.path.normpath(file.parent)
                found |= {path for path in (real, written) if os.path.realpath(path) == real}
    return found


def _paths_in(text: str) -> list[str]:
    """What may be a path in a word: the word, PATH of NAME=PATH, and FILE of FILE:COLUMN."""
    parts = text.split("=")
    tails = ["=".join(parts[number:]) for number in range(len(parts))]
    return list(filter(None, [*tails, *(tail.rpartition(":")[0] for tail in tails)]))


def _folder_of(text: str, may_be_new: bool) -> Path | None:
    """The folder of a file or folder, or of the files of a pattern; None where the text names none.

    Args:
        text: path, pattern, or file with frames.
        may_be_new: as in `named_in`.
    """
    # most texts are no path: too long for one, or with a variable that is not set
    with contextlib.suppress(UserError, OSError, ValueError):
        path = files.expand_path(text).absolute()
        fixed = re.split(r"[*?[]", text)[0]  # up to a pattern, or to the frames of file.dcm[1-20]
        if "/" in fixed and fixed != text and not path.exists():
            path = files.expand_path(fixed[: fixed.rindex("/") + 1]).absolute()
        if may_be_new and "/" in text:
            path = next(place for place in (path, *path.parents) if place.exists())
        if path.exists():
            folder = path if path.is_dir() else path.parent
            # the files of its run are read with a checkpoint
            folder = folder.parent.parent if has_step_name(folder) else folder
            # the root would cover the files of the image
            return None if folder == folder.parent else folder
    return None


def outermost(folders: Iterable[str], local: Iterable[str] = ()) -> list[str]:
    """What to mount so that some folders can be reached, also by their real paths behind symlinks.

    A folder that lies in another one is left out, because it is mounted with it.

    Args:
        folders: absolute paths.
        local: absolute paths on the disks of the nodes, where a symlink may lead elsewhere than on
            this machine; they are mounted as written.
    Raises:
        UserError: a container cannot mount a folder with such a name.
    """
    wanted = {path for folder in folders for path in (folder, os.path.realpath(folder))}
    wanted |= set(local)
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
