"""Make folders that can be taken away again when a submission fails."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

MOST_PER_SECOND = 1000  # folders of one name: the name is a time in seconds


def make_parents(folder: Path, undo: contextlib.ExitStack) -> None:
    """Make a folder and its parents.

    Args:
        folder: absolute path.
        undo: stack that removes the new folders again, those that are empty then.
    """
    for each in reversed([folder, *folder.parents]):
        if not each.exists():
            # another run of the sweep, or another submission, may make it at the same time
            with contextlib.suppress(FileExistsError):
                each.mkdir()
                undo.callback(remove_if_empty, each)


def make_new_folder(parent: Path, name: str, undo: contextlib.ExitStack) -> Path:
    """Make PARENT/NAME, or PARENT/NAME-2 and so on where that exists.

    Args:
        parent: folder that is made too if it is missing.
        name: name of the new folder.
        undo: stack that removes the new folder with all that it holds, and new parents.
    Returns:
        The new folder, as an absolute path.
    """
    parent = parent.absolute()
    make_parents(parent, undo)
    for number in range(1, MOST_PER_SECOND):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            return folder
    raise AssertionError(f"{MOST_PER_SECOND} submissions in one second in {parent}")


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()
