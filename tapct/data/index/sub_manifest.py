"""Write the manifest of a selection of scans, which names the manifests that it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data import selection
from tapct.data.manifest import ACCEPTED, ARCHIVE_FILE, Manifest, RowTable, write_table

OPTION = "--select"


def write_selected(file: Path, out: Path, text: str) -> Iterator[str]:
    """Write the accepted rows of a manifest that a selection selects; no scan is read.

    The new manifest names the old one by its digest, in `Manifest.selected_from`, beside the
    selection. Patients, IDs and key stay the same.

    Args:
        file: manifest that `tapct index` wrote, or the folder of one.
        out: .parquet file to write.
        text: selection, see `data/selection.py`.
    Returns:
        Lines about the counts.
    Raises:
        UserError: the selection is wrong or leaves no scan, or `out` is the manifest itself or no
            .parquet file.
    """
    wanted = selection.parse(text, OPTION)
    if (file / ARCHIVE_FILE).is_file():
        file = file / ARCHIVE_FILE
    if not file.is_file():
        raise UserError(
            f"{OPTION} selects from a manifest, and {file} is none; index the folder first, then "
            f"run `tapct index MANIFEST.parquet {OPTION} ... --out OTHER.parquet`"
        )
    if out.suffix != ".parquet" or out.is_dir():
        raise UserError(
            f"{OPTION} writes a manifest, and --out {out} is no .parquet file; give a name such as "
            f"{out / ARCHIVE_FILE if out.is_dir() else out.with_suffix('.parquet')}"
        )
    if out.exists() and out.resolve() == file.resolve():
        raise UserError(
            f"{OPTION}: --out {out} is the manifest that is selected from; give another "
            "file, since the rows that are left out would be lost"
        )
    manifest = Manifest.read(file)
    accepted = manifest.accepted
    assert isinstance(accepted, RowTable), "a manifest that was read has its rows in Arrow"
    mask, counts = wanted.apply_and_count(accepted.table)
    chosen = accepted.where(mask)
    yield f"{len(chosen)} of {len(accepted)} accepted scans of {file} fulfil {wanted.text}"
    yield from counts
    if not len(chosen):
        raise UserError(
            f"{OPTION} {wanted.text} leaves none of the {len(accepted)} accepted scans of {file}; "
            "nothing was written"
        )
    step = {"manifest": manifest.digest, ACCEPTED: len(accepted), "select": wanted.text}
    write_table(replace(manifest, rows=chosen, selected_from=(*manifest.selected_from, step)), out)
    yield f"manifest of the selection: {out}"
