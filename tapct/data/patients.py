"""Who the patient of a scan is: identifiers, keyed hashes, guesses from names, and who is held out.

Identifiers never leave this file: what is stored is a keyed hash.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from tapct.base.exits import UserError
from tapct.base.hashing import hash_int
from tapct.data import discover


def held_out_patients(patients: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """Choose whole patients, the same ones for the same seed whatever the order of the scans.

    Args:
        patients: keyed hashes, one per scan; repeated for several scans of one patient.
        share: of the patients, in [0, 1); rounded, but at least one where share > 0 and there are
            two patients.
        seed: of the run.
    Returns:
        The chosen patients; empty for share 0.
    """
    names = sorted(set(patients), key=lambda name: (hash_int(seed, f"held_out/{name}"), name))
    if share <= 0 or len(names) < 2:
        return frozenset()
    return frozenset(names[: min(max(round(share * len(names)), 1), len(names) - 1)])


_NOT_AN_ID = {
    "",
    "0",
    "none",
    "unknown",
    "anonymous",
    "anonymized",
    "anonymised",
    "anon",
    "n/a",
    "na",
}


def keyed_hash(key: bytes, text: str) -> str:
    """16 hex digits that cannot be turned back, nor found by trying all identifiers, without the
    key.
    """
    return hashlib.blake2b(
        text.encode("utf-8", "surrogateescape"), key=key[:64], digest_size=8
    ).hexdigest()


def patient_id_of(header_id: str) -> str:
    """The identifier, or empty where the header holds only a stand-in such as ANONYMOUS."""
    cleaned = header_id.strip()
    return "" if cleaned.lower() in _NOT_AN_ID else cleaned


KEY_FILE = ".patient_key"
KEY_VARIABLE = "TAPCT_PATIENT_KEY"


def patient_key(folder: Path) -> bytes:
    """The secret of this archive's hashes: from the environment, else the folder's `.patient_key`,
    made when missing.

    Raises:
        UserError: the key cannot be read or written.
    """
    told = os.environ.get(KEY_VARIABLE, "")
    if told:
        return hashlib.blake2b(told.encode(), digest_size=32).digest()
    path = folder / KEY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes()
        else:
            key = secrets.token_bytes(16)
            with os.fdopen(descriptor, "wb") as file:
                file.write(key)
    except OSError as error:
        raise UserError(
            f"patient key {path}: {error.strerror}; set {KEY_VARIABLE} or choose another folder"
        ) from error
    if len(key) < 16:
        raise UserError(
            f"patient key {path} holds {len(key)} bytes, rule: 16; remove it (all patient hashes "
            "change)"
        )
    return key


def check_regex(patient_regex: str | None) -> None:
    """Raise UserError where a patient regex is no regular expression or has no group."""
    if patient_regex is None:
        return
    try:
        num_groups = re.compile(patient_regex).groups
    except re.error as error:
        raise UserError(f"patient regex '{patient_regex}' is not valid: {error}") from error
    if num_groups < 1:
        raise UserError(
            f"patient regex '{patient_regex}' has no group; put the patient's part into "
            "(parentheses)"
        )


def name_of_patient(path: Path, root: Path, patient_regex: str | None) -> str:
    """Guess who the patient of a scan is from its path, where no header says so.

    Args:
        path: the scan, below `root`.
        root: folder of the archive.
        patient_regex: regular expression; group 1, matched on the relative path, is the patient.
    """
    relative = path.relative_to(root)
    if patient_regex is not None:
        match = re.search(patient_regex, relative.as_posix())
        if match and match[1]:
            return match[1]
    names = [
        discover.stem_of(relative) or root.resolve().name,
        *(folder.name for folder in relative.parents),
    ]
    return next(
        (name for name in names if re.search(r"\d", name)), (relative.parent / names[0]).as_posix()
    )
