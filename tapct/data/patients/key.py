"""The secret key of an archive's hashes, and the hashes that are made with it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from pathlib import Path

from tapct.base import files
from tapct.base.exits import UserError

KEY_FILE = ".patient_key"
KEY_VARIABLE = "TAPCT_PATIENT_KEY"
KEY_BYTES = 16
_WAIT_S = 0.5  # longest time between making and filling a key file on a disk without hard links


def keyed_hash(key: bytes, text: str) -> str:
    """Hash an identifier to 16 hex digits, which cannot be reversed, nor found by trying all
    identifiers, without the key.
    """
    content = text.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(content, key=key[:64], digest_size=8).hexdigest()


def patient_key(folder: Path) -> bytes:
    """The secret of an archive's hashes: from the environment variable TAPCT_PATIENT_KEY, else from
    the file `.patient_key`, which is made at random when it is missing.

    Commands that start at the same time get the same key.

    Args:
        folder: folder of the manifest, where the key file lies.
    Raises:
        UserError: the key cannot be read or written.
    """
    from_environment = os.environ.get(KEY_VARIABLE, "")
    if from_environment:
        return hashlib.blake2b(from_environment.encode(), digest_size=32).digest()
    path = folder / KEY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            _make_key(path)
        key = _read_key(path)
    except OSError as error:
        raise UserError(
            f"cannot read or write the patient key {path}: {error.strerror}; give --out in a "
            "folder that you can write"
        ) from error
    if len(key) < KEY_BYTES:
        raise UserError(
            f"patient key {path} holds {len(key)} bytes, fewer than {KEY_BYTES}; remove the file "
            "and index again (all patient hashes change)"
        )
    return key


def _make_key(path: Path) -> None:
    """Make a key file at random; where another process makes it first, that one is kept."""
    key = secrets.token_bytes(KEY_BYTES)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{files.TEMPORARY_SUFFIX}")
    try:
        _write_new(aside, key)
        try:
            # a link appears with its whole content, and never replaces a file, as a rename would
            os.link(aside, path)
        except FileExistsError:
            return
        except OSError:
            # some disks have no hard links: there a reader waits until the file is filled
            with contextlib.suppress(FileExistsError):
                _write_new(path, key)
        files.sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet, and that its owner alone can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, files.PRIVATE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink()
        raise


def _read_key(path: Path) -> bytes:
    """The content of a key file, which another process may be filling now."""
    until = time.monotonic() + _WAIT_S
    while True:
        key = path.read_bytes()
        if len(key) >= KEY_BYTES or time.monotonic() > until:
            return key
        time.sleep(0.01)


def key_name(key: bytes) -> str:
    """A name for a key, from which the key cannot be found: hashes are comparable where it is
    equal.
    """
    return hashlib.blake2b(b"tapct patient key", key=key[:64], digest_size=8).hexdigest()
