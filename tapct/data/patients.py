"""Identity and privacy: which patient a scan belongs to, and how that is kept secret.

A patient is identified by the PatientID of the header, else by a regular expression on the path,
else by a guess from the names on the path. The identifier never leaves this file: what is stored is
a hash, keyed with a secret, so that nobody without the secret can test whether a known identifier
is among the hashes.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data.discover import stem_of

KEY_FILE = ".patient_key"
KEY_VARIABLE = "TAPCT_PATIENT_KEY"
KEY_BYTES = 16

# what a PatientID holds, in lower case, where it identifies nobody
PLACEHOLDERS = frozenset(
    ("", "0", "none", "unknown", "anonymous", "anonymized", "anonymised", "anon", "n/a", "na")
)


@dataclass(frozen=True)
class PatientRules:
    """How the patients of one archive are identified.

    Args:
        root: folder of the archive.
        key: secret of the keyed hashes, see `patient_key`.
        regex: regular expression whose group 1, searched in the path below the root, is the
            identifier; None to guess from the names on the path.
    """

    root: Path
    key: bytes
    regex: str | None

    def patient_of(self, scan: Path, from_header: str) -> str:
        """The keyed hash of a scan's patient.

        Args:
            scan: path of the scan, below the root.
            from_header: hash that `hash_of_header` gave for its header; empty where there is none.
        """
        if from_header:
            return from_header
        return keyed_hash(self.key, identifier_from_path(scan, self.root, self.regex))


def hash_of_header(patient_id: str, key: bytes | None) -> str:
    """The keyed hash of a header's PatientID.

    Args:
        patient_id: identifier as the header holds it.
        key: secret of the keyed hashes; None where no hash is wanted.
    Returns:
        16 hex digits; empty without a key, and where the header holds no identifier or only a
        placeholder such as ANONYMOUS.
    """
    cleaned = patient_id.strip()
    if not key or cleaned.lower() in PLACEHOLDERS:
        return ""
    return keyed_hash(key, cleaned)


def identifier_from_path(scan: Path, root: Path, regex: str | None) -> str:
    """Guess the identifier of a scan's patient from its path.

    The identifier is group 1 of the regex where it matches, else the stem of the file or DICOM
    folder. A stem without a digit (`s0001/ct.nii.gz`) identifies no patient, so the nearest folder
    whose name has a digit is taken, else the whole path.

    Args:
        scan: path of the scan, below `root`.
        root: folder of the archive.
        regex: regular expression with a group, searched in the path below the root, or None.
    """
    relative = scan.relative_to(root)
    if regex is not None:
        match = re.search(regex, relative.as_posix())
        if match and match[1]:
            return match[1]
    stem = stem_of(relative) or root.resolve().name
    for name in (stem, *(folder.name for folder in relative.parents)):
        if re.search(r"\d", name):
            return name
    return (relative.parent / stem).as_posix()


def keyed_hash(key: bytes, text: str) -> str:
    """Hash an identifier to 16 hex digits, which cannot be reversed, nor found by trying all
    identifiers, without the key.
    """
    content = text.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(content, key=key[:64], digest_size=8).hexdigest()


def patient_key(folder: Path) -> bytes:
    """The secret of an archive's hashes: from the environment variable TAPCT_PATIENT_KEY, else from
    the file `.patient_key`, which is made at random when it is missing.

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
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes()
        else:
            key = secrets.token_bytes(KEY_BYTES)
            with os.fdopen(descriptor, "wb") as file:
                file.write(key)
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


def key_name(key: bytes) -> str:
    """A name for a key, from which the key cannot be found: hashes are comparable where it is
    equal.
    """
    return hashlib.blake2b(b"tapct patient key", key=key[:64], digest_size=8).hexdigest()


def check_regex(regex: str | None) -> None:
    """Raise UserError where a patient regex is not a regular expression or has no group."""
    if regex is None:
        return
    try:
        num_groups = re.compile(regex).groups
    except re.error as error:
        raise UserError(f"patient regex '{regex}' is not valid: {error}") from error
    if num_groups < 1:
        raise UserError(
            f"patient regex '{regex}' has no group; put parentheses around the part that "
            "identifies the patient"
        )
