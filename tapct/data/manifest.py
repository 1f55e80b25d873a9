"""The manifest: a table with one row per scan of an archive, accepted with its facts or refused
with the reason (Parquet).

The manifest holds no patient identifier, only keyed hashes (see `tapct.data.patients`). Paths are
kept as they are: the manifest of an archive whose files are named after patients is not anonymous.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tapct.base import files
from tapct.base.exits import UserError, single_line
from tapct.data.readers.raw import MAX_TEXT

SCHEMA = "2"
ACCEPTED, REFUSED = "accepted", "refused"
UNKNOWN = float("nan")  # a number that no file gives
_ARROW = {
    "str": pyarrow.string(),
    "int": pyarrow.int64(),
    "float": pyarrow.float64(),
    "tuple[str, ...]": pyarrow.list_(pyarrow.string()),
}


@dataclass(frozen=True)
class Row:
    """One scan of the archive.

    Args:
        id: 16 hex digits, hashed from the path below the root; unchanged when the archive moves.
        path: path of the file or DICOM folder below the root; for a series that shares its folder
            with others, path of its first file.
        kind: nifti, nrrd, meta or dicom; unreadable for a folder that cannot be listed.
        status: accepted or refused.
        reason: code of the rule by which it was refused, else empty.
        detail: one line: why it was refused, or why its labels are not used.
        marks: codes of what is unusual about an accepted scan, e.g. `values_windowed`; several are
            separated by commas.
        depth, height, width: voxels along Z, Y, X; 0 where unknown.
        spacing_z_mm, spacing_y_mm, spacing_x_mm: distance of voxel centres in mm; NaN where
            unknown.
        patient: keyed hash of the patient's identifier.
        patient_from: where the identifier is from: header, bids, study, side_car, regex, folder or
            guess; empty where unknown.
        study_date: YYYYMMDD or empty.
        manufacturer, kernel: text from the header.
        sex: M, F, O or empty.
        age_years: age in years, NaN where unknown.
        label_path: path of the label map below the root, or absolute where it lies elsewhere; empty
            where there is none on the scan's grid.
        label_digest: hash of shape and values of the label map on the scan's grid; empty where
            there is none.
        duplicate_of: id of the accepted scan that a refused duplicate repeats, else empty.
        lossy_ratio: ratio of a lossy compression that the header declares; NaN where it declares
            none.
        hu_p005, hu_p50, hu_p995: 0.5, 50 and 99.5 percentile in HU of the body (voxels above -500
            HU), from a strided subsample.
        body_share: share of voxels above -500 HU, from the same subsample.
        bytes: size on disk.
        digest: hash of shape and voxels after reading; equal for one scan in two formats.
        file_paths: paths below the root of all files of a scan of several files, in the order of
            its slices; empty where `path` is the only file.
    """

    id: str
    path: str
    kind: str
    status: str = REFUSED
    reason: str = ""
    detail: str = ""
    marks: str = ""
    depth: int = 0
    height: int = 0
    width: int = 0
    spacing_z_mm: float = UNKNOWN
    spacing_y_mm: float = UNKNOWN
    spacing_x_mm: float = UNKNOWN
    patient: str = ""
    patient_from: str = ""
    study_date: str = ""
    manufacturer: str = ""
    kernel: str = ""
    sex: str = ""
    age_years: float = UNKNOWN
    label_path: str = ""
    label_digest: str = ""
    duplicate_of: str = ""
    lossy_ratio: float = UNKNOWN
    hu_p005: float = UNKNOWN
    hu_p50: float = UNKNOWN
    hu_p995: float = UNKNOWN
    body_share: float = UNKNOWN
    bytes: int = 0
    digest: str = ""
    file_paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """All rows of an archive, in the order of their paths.

    Args:
        rows: accepted and refused scans.
        root: folder of the archive.
        patient_key: name of the key of the patient hashes; empty where unknown.
        passed_over: number of files of each kind that are no scan; only after the index, since the
            file does not hold it.
    """

    rows: tuple[Row, ...]
    root: Path
    patient_key: str = ""
    passed_over: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def accepted(self) -> tuple[Row, ...]:
        """Rows of the scans that `tapct pack` packs."""
        return tuple(row for row in self.rows if row.status == ACCEPTED)

    @functools.cached_property
    def digest(self) -> str:
        """Hash over ids and voxels of the accepted rows; it does not change when the archive
        moves.
        """
        lines = sorted(f"{row.id} {row.digest}\n" for row in self.accepted)
        return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()

    def summary(self) -> dict[str, int]:
        """Number of rows by reason, `accepted` first, then the commonest reason."""
        reasons = Counter(row.reason for row in self.rows if row.status == REFUSED)
        by_count = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        return {ACCEPTED: len(self.accepted), **dict(by_count)}

    @classmethod
    def read(cls, path: Path | str, root: Path | None = None) -> Manifest:
        """Read a manifest.

        Args:
            path: path of the .parquet file.
            root: folder of the archive now. Without it the folder that was indexed is taken, or,
                where that is gone, the folder at the same place relative to the manifest.
        Raises:
            UserError: there is no manifest, it has another version, or it was changed after it was
                written.
        """
        path = files.expand_path(path)
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"manifest {path} {problem}; make one with `tapct index`")
        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{path} is not a Parquet file: {single_line(error, MAX_TEXT)}"
            ) from error
        stored = table.schema.metadata or {}
        metadata = {key.decode(): value.decode() for key, value in stored.items()}
        names = [field.name for field in dataclasses.fields(Row)]
        if metadata.get("tapct.schema") != SCHEMA or table.column_names != names:
            raise UserError(
                f"{path} is not a tapct manifest of version {SCHEMA}; make it again with `tapct "
                "index`"
            )
        rows = tuple(
            Row(**{**row, "file_paths": tuple(row["file_paths"])}) for row in table.to_pylist()
        )
        if root is None:
            root = Path(metadata["tapct.root"])
            beside = path.parent / metadata["tapct.root_relative"]
            if not root.is_dir() and beside.is_dir():  # archive and manifest moved together
                root = beside.resolve()
        manifest = cls(rows, root, metadata.get("tapct.patient_key", ""))
        if manifest.digest != metadata["tapct.digest"]:
            raise UserError(
                f"{path} does not match its own digest, so it was changed or damaged; make it "
                "again with `tapct index`"
            )
        return manifest


def write_table(manifest: Manifest, out: Path) -> None:
    """Write a manifest under another name, flush it to disk and rename it.

    Args:
        manifest: all rows.
        out: .parquet file to write or replace.
    Raises:
        UserError: the disk is full or the folder is not writable; an old manifest is unchanged.
    """
    fields = dataclasses.fields(Row)
    columns: dict[str, list[Any]] = {
        f.name: [getattr(row, f.name) for row in manifest.rows] for f in fields
    }
    metadata = {
        "tapct.schema": SCHEMA,
        "tapct.root": str(manifest.root),
        "tapct.root_relative": os.path.relpath(manifest.root, out.parent.resolve()),
        "tapct.digest": manifest.digest,
        "tapct.patient_key": manifest.patient_key,
    }
    schema = pyarrow.schema([(f.name, _ARROW[str(f.type)]) for f in fields], metadata=metadata)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(out) as file:
            pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), file)
    except OSError as error:
        raise UserError(
            f"cannot write manifest {out}: {files.first_cause(error)}; nothing was changed"
        ) from error
