"""Write files and folders whole or not at all, name their content by a hash, and expand paths.

A new file is written beside its final place under a temporary name, forced to the disk, and
renamed. A reader therefore sees the old content or the new content, never a part of either, and a
crash at any instant leaves the old content in place. A process that is killed while it writes
leaves a hidden `.NAME.*.tmp`, which nothing reads.

Rules:
    permissions   those of a file that `open` creates: 0666, or 0777 for a folder, less the umask;
                  or the mode that is asked for, whatever the umask
    symlinks      followed: the link stays, and what it points to is replaced
    full disk     OSError that names the final path; the temporary file is removed
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tapct.base.exits import UserError

PRIVATE = 0o600  # for files about patients: their owner alone can read them
SHARED = 0o644  # for files that are made to be given to others
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# `$$`, `$NAME` and `${NAME}` in a path
_VARIABLE = re.compile(r"\$(?:(\$)|(?=[A-Za-z_{])(?:(\w+)|\{(\w+)\}))")
TEMPORARY_SUFFIX = ".tmp"
_BLOCK_BYTES = 1 << 20


def expand_path(path: Path | str) -> Path:
    """A path as a person writes it, with `~`, `~user`, `$NAME` and `${NAME}` replaced.

    The shell replaces them only in some places: not in `out=~/runs`, in quotes or in a file. Write
    `$$` for a `$`, and `./~` for a folder that is called `~`. The name of an
    existing file with a `$` in it is not changed.

    Args:
        path: path from a command line, a config or a call.
    Raises:
        UserError: an environment variable is not set, or a user or the home folder is unknown.
    """
    text = str(path)
    if "$" in text and text[0] != "~" and os.path.lexists(text):
        return Path(text)

    def value(match: re.Match[str]) -> str:
        name = match[2] or match[3]
        if match[1]:
            return "$"
        if name not in os.environ:
            raise UserError(
                f"the environment variable {name} of the path {text} is not set; set it, or write "
                "$$ for a $ in the name of a file"
            )
        return os.environ[name]

    tail = _VARIABLE.sub(value, text)
    if not text.startswith("~"):
        return Path(tail)
    home = os.path.expanduser(tail)
    if home == tail:  # what `expanduser` does without HOME, or for a user that does not exist
        user = tail[1:].partition("/")[0]
        problem = f"there is no user {user}" if user else "HOME is not set"
        raise UserError(
            f"{problem}, which the path {text} needs; write the whole path, or ./{text} for a "
            "file of this name"
        )
    return Path(home)


def home_folder() -> Path | None:
    """The home folder of this user; None without HOME and without an entry in /etc/passwd, as in
    some containers.
    """
    home = os.path.expanduser("~")
    return None if home == "~" else Path(home)


def unexpanded(path: Path | str) -> str:
    """Text that `expand_path` reads back to the same path."""
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def check_new_path(path: Path, option: str = "--out") -> None:
    """Refuse a path below something that is no folder, before any work is done for it.

    Args:
        path: file or folder that is written later; its folders are made then.
        option: name of the option that gave the path.
    Raises:
        UserError: one of the folders on the path is a file.
    """
    for folder in path.parents:
        if folder.is_dir():
            return
        if os.path.lexists(folder):
            raise UserError(
                f"{option} {path}: {folder} is not a folder, so nothing can be written in it; "
                "choose another place"
            )


def check_new_file(path: Path, option: str = "--out") -> None:
    """Refuse a path at which no file can be written, before any work is done for it.

    Args:
        path: file that is written later; its folders are made then.
        option: name of the option that gave the path.
    Raises:
        UserError: it is a folder, one of the folders on the path is a file, or its folder is
            read-only, as a store of others or a mounted archive may be.
    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give the file to write")
    check_new_path(path, option)
    folder = next(each for each in path.absolute().parents if each.exists())
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{path} cannot be written, since you may not write in {folder}; give another place "
            f"with {option}"
        )


def write_atomically(path: Path, content: bytes | str, *, mode: int | None = None) -> None:
    """Write a file whole or not at all, and replace the one of that name.

    Args:
        path: file to write, in a folder that exists; a symlink is followed.
        content: new content; text is encoded as UTF-8.
        mode: permissions of the file, such as PRIVATE; None for those of any new file.
    Raises:
        OSError: disk full or folder not writable; the old file is unchanged and nothing is left
            beside it.
    """
    with replacing(path, mode=mode) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """Open a new binary file that replaces `path` when the block ends without an error.

    Args:
        path: file to write, in a folder that exists; a symlink is followed.
        mode: permissions of the file, as in `write_atomically`.
    Yields:
        File object under a temporary name in the same folder.
    Raises:
        OSError: disk full or folder not writable; the old file is unchanged and nothing is left
            beside it.
    """
    final = _behind_links(path)
    aside = _aside(final)
    try:
        with open(aside, "xb") as file:
            if mode is not None:  # while the file is empty
                _set_mode(aside, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, final)
        sync(final.parent)
    except OSError as error:
        _explain(error, aside, path)
        raise
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make a new folder that replaces `path` when the block ends without an error.

    Args:
        path: folder to write; parents are made; a symlink is followed.
    Yields:
        Empty folder under a temporary name beside `path`.
    Raises:
        OSError: disk full or folder not writable; the old folder is unchanged and nothing is left
            beside it.
    """
    final = _behind_links(path)
    aside = _aside(final)
    try:
        aside.mkdir(parents=True)
        yield aside
        put_in_place(aside, final)
    except OSError as error:
        _explain(error, aside, path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(aside: Path, final: Path) -> None:
    """Force a finished folder to the disk and rename it; an older folder of that name is removed.

    No system call that Python offers exchanges two folders. The older folder is renamed first, so
    for an instant `final` does not exist; a crash just then leaves both under temporary names.

    Args:
        aside: complete folder on the same file system.
        final: path that it gets.
    Raises:
        OSError: the disk does not take it; the older folder is in its place.
    """
    for place, _, names in os.walk(aside, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))
    old = _aside(final)
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(aside, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file, or the list of names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network file systems cannot sync a folder; its files have been synced anyway
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def first_cause(error: BaseException) -> str:
    """One line with the innermost reason of a failed write, for the end of an error message."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return "no space left on the disk"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file; some network file systems have none for single files."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise


def _behind_links(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _aside(final: Path) -> Path:
    # random and not the process id: containers on two nodes often have the same ids
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _explain(error: OSError, aside: Path, path: Path) -> None:
    """Name the final path, which people know, in place of the temporary one, and the next step."""
    if error.filename is None or str(error.filename).startswith(str(aside)):
        error.filename, error.filename2 = str(path), None
    if error.errno in NO_SPACE:
        error.strerror = (
            "no space left on the disk, so nothing was written; free some and run the command again"
        )
