"""Where an index writes: one Parquet file, or the folder of an archive with its journal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import tapct
from tapct.base import console
from tapct.base.exits import UserError
from tapct.base.files import check_new_path
from tapct.data.index import head_table, scan_table
from tapct.data.index.inputs import IndexInputs
from tapct.data.index.journal import Journal
from tapct.data.manifest import ARCHIVE_FILE, root_of
from tapct.data.patients.key import key_name

_PARTS = "parts"  # folder of the journal in an archive folder
_VERSION = "1"  # of the rows of a journal


@dataclass(frozen=True)
class IndexPlace:
    """Where the manifest and the journal of an index lie.

    Args:
        file: file of the manifest.
        journal: folder of the journal.
        is_archive: whether the journal stays, for a later index.
    """

    file: Path
    journal: Path
    is_archive: bool

    @classmethod
    def of(cls, out: Path) -> IndexPlace:
        """The place that `--out` names.

        Raises:
            UserError: it is neither a .parquet file nor a folder for an archive.
        """
        if out.is_dir():
            others = {path.name for path in out.iterdir() if not path.name.startswith(".")}
            if others and not others & {ARCHIVE_FILE, _PARTS}:
                raise UserError(
                    f"{out} is a folder; give the file to write, such as {out / ARCHIVE_FILE}, or "
                    "a new folder: this one has other files"
                )
            return cls(out / ARCHIVE_FILE, out / _PARTS, True)
        if out.suffix == ".parquet":
            check_new_path(out)
            return cls(out, out.with_name(f".{out.name}.parts"), False)
        if out.suffix or os.path.lexists(out):
            raise UserError(
                f"the manifest is a Parquet file, and {out} does not end in .parquet; give a name "
                f"such as {out.with_suffix('.parquet')}, or a folder"
            )
        check_new_path(out / ARCHIVE_FILE)
        return cls(out / ARCHIVE_FILE, out / _PARTS, True)


def rooted(inputs: IndexInputs, place: IndexPlace, root: Path | None = None) -> IndexInputs:
    """The inputs with paths that start where those of the archive start, so that journal and IDs
    stay the same if less is given now, such as one of two folders.

    Where more is given, the paths start at another folder than before, and a line is printed.

    Args:
        inputs: what is indexed.
        place: where the index writes.
        root: folder at which the paths start; None for that of the archive, or else the nearest
            folder that contains all inputs.
    Raises:
        UserError: `root` does not contain all inputs.
    """
    before = root_of(place.file)
    if root is not None:
        inputs = inputs.at(root)
    elif place.is_archive:
        inputs = inputs.below(before)
    now = inputs.root.resolve()
    if before is None or now == before:
        return inputs
    if root is not None or now in before.parents:
        which = (
            "which --root sets" if root else "the nearest folder that contains all that is given"
        )
        console.warn(
            f"the paths of {place.file} start at {before}, and now at {now}, {which}: all scans "
            "get other IDs, all files are read again, and `tapct pack` packs all scans again; to "
            "add folders without this, index them as another archive and train on both with "
            "data.stores"
        )
    return inputs


def open_journal(place: IndexPlace, key: bytes, name: str = "") -> Journal:
    """The journal of an index; one of another version of tapct, or with another key, is removed.

    Args:
        place: where the index writes.
        key: secret of the hashes.
        name: name of the process, for several that write at once.
    """
    about = {"tapct": tapct.__version__, "version": _VERSION, "key": key_name(key)}
    schemas = {
        head_table.HEADS: head_table.SCHEMA,
        scan_table.SCANS: scan_table.SCAN_SCHEMA,
        scan_table.LABELS: scan_table.LABEL_SCHEMA,
    }
    return Journal(place.journal, about, schemas, name)
