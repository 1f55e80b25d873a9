"""A folder becomes a table: one row per series, accepted with facts or refused with the reason
(Parquet).

The manifest holds no patient identifier, only hashes keyed with a secret that stays beside it
(`.patient_key`, mode 0600, or the environment's TAPCT_PATIENT_KEY). Paths are kept as they are: an
archive that names its files after patients is not made anonymous by this.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tapct.base import files
from tapct.base.exits import UserError
from tapct.data.readers.raw import one_line

SCHEMA = "1"
ACCEPTED, REFUSED = "accepted", "refused"
_NAN = float("nan")
_ARROW = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64()}


@dataclass(frozen=True)
class Row:
    """One series of the archive.

    Args:
        id: 16 hex digits from the path below the root; unchanged when the archive moves.
        path: file or DICOM folder below the root (the first file of a series that shares its folder
            with others).
        kind: nifti, nrrd, meta, dicom.
        status: accepted or refused.
        reason: code of the rule that refused it, else empty.
        detail: one line: why it was refused, or why its labels are not used.
        depth, height, width: voxels along Z, Y, X; 0 where unknown.
        spacing_z_mm, spacing_y_mm, spacing_x_mm: mm; NaN where unknown.
        patient: keyed hash.
        study_date: YYYYMMDD or empty.
        manufacturer, kernel: as the header says.
        sex: M, F, O or empty.
        age_years: years, NaN where unknown.
        label_path: below the root, or absolute where it lies elsewhere; empty where there is none
            on the scan's grid.
        hu_p005, hu_p50, hu_p995: 0.5, 50 and 99.5 percentile in HU of the body (voxels above -500
            HU).
        body_share: share of voxels above -500 HU; like the percentiles from a strided subsample.
        bytes: size on disk.
        digest: of shape and voxels after reading; equal for one scan in two formats.
    """

    id: str
    path: str
    kind: str
    status: str = REFUSED
    reason: str = ""
    detail: str = ""
    depth: int = 0
    height: int = 0
    width: int = 0
    spacing_z_mm: float = _NAN
    spacing_y_mm: float = _NAN
    spacing_x_mm: float = _NAN
    patient: str = ""
    study_date: str = ""
    manufacturer: str = ""
    kernel: str = ""
    sex: str = ""
    age_years: float = _NAN
    label_path: str = ""
    hu_p005: float = _NAN
    hu_p50: float = _NAN
    hu_p995: float = _NAN
    body_share: float = _NAN
    bytes: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Manifest:
    """All rows of an archive, in the order of their paths."""

    rows: tuple[Row, ...]
    root: Path

    @property
    def accepted(self) -> tuple[Row, ...]:
        """Rows that tapct trains on."""
        return tuple(row for row in self.rows if row.status == ACCEPTED)

    @functools.cached_property
    def digest(self) -> str:
        """Hash over id and voxels of the accepted rows; it does not change when the archive
        moves.
        """
        lines = sorted(f"{row.id} {row.digest}\n" for row in self.accepted)
        return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()

    def summary(self) -> dict[str, int]:
        """Number of rows by reason, `accepted` first, then the commonest reason."""
        reasons = Counter(row.reason for row in self.rows if row.status == REFUSED)
        return {
            ACCEPTED: len(self.accepted),
            **dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        }

    @classmethod
    def read(cls, path: Path | str, root: Path | None = None) -> Manifest:
        """Read a manifest.

        Args:
            path: the .parquet file.
            root: where the archive lies now; without it where it lay, or where it lay relative to
                the manifest.
        Raises:
            UserError: no manifest, or one of another version, or changed since it was written.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"manifest {path} does not exist; make one with `tapct index`")
        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a Parquet file: {one_line(error)}") from error
        told = {
            key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()
        }
        names = [field.name for field in dataclasses.fields(Row)]
        if told.get("tapct.schema") != SCHEMA or table.column_names != names:
            raise UserError(
                f"{path} is no tapct manifest of version {SCHEMA}; make it again with `tapct index`"
            )
        rows = tuple(Row(**row) for row in table.to_pylist())
        if root is None:
            root, beside = Path(told["tapct.root"]), path.parent / told["tapct.root_relative"]
            root = beside.resolve() if not root.is_dir() and beside.is_dir() else root
        manifest = cls(rows, root)
        if manifest.digest != told["tapct.digest"]:
            raise UserError(
                f"{path} does not match its own digest; it was changed or damaged: index again"
            )
        return manifest


def write_table(manifest: Manifest, out: Path) -> None:
    """Write aside, flush to disk, rename.

    Raises:
        UserError: the disk is full or the place is not writable.
    """
    fields = dataclasses.fields(Row)
    columns: dict[str, list[Any]] = {
        f.name: [getattr(row, f.name) for row in manifest.rows] for f in fields
    }
    told = {
        "tapct.schema": SCHEMA,
        "tapct.root": str(manifest.root),
        "tapct.root_relative": os.path.relpath(manifest.root, out.parent.resolve()),
        "tapct.digest": manifest.digest,
    }
    schema = pyarrow.schema([(f.name, _ARROW[str(f.type)]) for f in fields], metadata=told)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(out) as file:
            pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), file)
    except OSError as error:
        raise UserError(
            f"cannot write manifest {out}: {files.first_cause(error)}; nothing was changed"
        ) from error
