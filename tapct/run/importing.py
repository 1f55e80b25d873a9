"""Write an export of weights from elsewhere: `tapct import`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tapct.base import files
from tapct.base.exits import UserError
from tapct.base.geometry import Size3
from tapct.run import lineage
from tapct.run_folder import ExportFolder
from tapct.weights.export import save_export
from tapct.weights.imported import ImportOptions, open_source


def import_weights(
    source: Path,
    out: Path,
    *,
    settings: Sequence[str] = (),
    allow: str = "",
    inflate: str = "mean",
    window: str = "",
    custom_code: bool = False,
) -> list[str]:
    """Write an export of the weights that a source means.

    Args:
        source: path or hub id, see `weights/sources.py`.
        out: export folder to write; an earlier export there is replaced.
        settings: key=value of `model`, `hu_contract` and `preprocess`.
        allow: kinds of mismatch that may occur, separated by commas.
        inflate: how a 2D kernel is spread over depth, `mean` or `centre`.
        window: voxels Z,Y,X that the positions were learned for; empty reads them.
        custom_code: whether the source may name a backbone from a module outside tapct.
    Returns:
        Lines of the report.
    Raises:
        UserError: the weights cannot be read or do not fit, or the folder cannot be written.
    """
    check_target(source, out)
    options = ImportOptions(
        tuple(settings),
        tuple(kind.strip() for kind in allow.split(",") if kind.strip()),
        inflate,
        window_of(window),
        custom_code,
        what="import",
        remedy="add --allow {kinds}",
    )
    found = open_source(source, options)
    scans = lineage.scans_of_weights(found.file)
    save_export(out, found.model, found.settings, found.provenance, scans)
    return found.report.lines()


def check_target(source: Path, out: Path) -> None:
    """Refuse to write over the source, or over a folder that is no export.

    Raises:
        UserError: `out` is the source or a folder around it, a file, or a folder of other files.
    """
    files.check_new_path(out)
    if not out.exists():
        return
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--out {out} holds the source {source}; give another folder")
    export = ExportFolder(out)
    is_export = export.card.is_file() and export.weights.is_file()
    if not out.is_dir() or (any(out.iterdir()) and not is_export):
        raise UserError(f"--out {out} exists and is no export; give a new folder")


def window_of(text: str) -> Size3 | None:
    """The window of a text Z,Y,X; None for an empty one."""
    if not text:
        return None
    parts = text.strip("[]").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise UserError(f"--window {text}: give three numbers of voxels as Z,Y,X, e.g. 12,224,224")
    z, y, x = (int(part) for part in parts)
    return z, y, x
