"""The manifest: a table with one row per scan of an archive, accepted with its facts or refused
with the reason (Parquet).

The manifest holds no patient identifier, only keyed hashes (see `patients.identity`), and no free
text of a header. Paths below the archive are kept as they are in the columns of paths, and nowhere
else: the manifest of an archive whose files are named after patients is not anonymous. Only its
owner can read it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet

from tapct.base import files
from tapct.base.exits import UserError, single_line
from tapct.base.paths import near_path
from tapct.data.digest import StoredColumn, arrow_digest
from tapct.data.labels.report import LabelReport
from tapct.data.lazy_rows import LazyRows
from tapct.data.patients.memory import PatientChanges, PatientMemory
from tapct.data.readers.raw import MAX_TEXT

SCHEMA = "2"
ACCEPTED, REFUSED = "accepted", "refused"
ARCHIVE_FILE = "manifest.parquet"  # in the folder of an archive, see `index.place`
UNKNOWN = float("nan")  # a number that no file gives
_BUFFER_BYTES = 1 << 18  # of a column that is read from a file
_ROWS_AT_ONCE = 4096  # rows that are decoded at once where all are wanted
_MOST_ROWS_OF_GROUP, _GROUP_BYTES = 1 << 16, 1 << 25  # of a file, see `_groups_of_rows`
_ARROW = {
    "str": pyarrow.string(),
    "int": pyarrow.int64(),
    "float": pyarrow.float64(),
    "tuple[str, ...]": pyarrow.list_(pyarrow.string()),
    "tuple[float, ...]": pyarrow.list_(pyarrow.float64()),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One scan of the archive.

    Args:
        id: 16 hex digits, keyed hash of the path below the root; unchanged when the archive moves.
        path: path of the file or DICOM folder below the root; for a series that shares its folder
            with others, path of its first file; for one of several scans in a file, path of the
            file and the numbers of its frames (`scan.dcm#1-40`).
        kind: name of the format, e.g. nifti; unreadable for a folder that cannot be listed.
        status: accepted or refused.
        reason: code of the rule by which it was refused, else empty.
        detail: one line: why it was refused, why its labels are not used, or what was decided
            about them; it names no file.
        marks: codes of what is unusual about an accepted scan, e.g. `values_windowed`; several are
            separated by commas.
        depth, height, width: voxels along Z, Y, X; 0 where unknown.
        spacing_z_mm, spacing_y_mm, spacing_x_mm: distance of voxel centres in mm; NaN where
            unknown.
        patient: keyed hash of the patient's identifier.
        patient_from: rule that identified the patient: column, folder, header, regex, bids,
            side_car, study or guess; kept where the hash is that of an older manifest and these
            rules give another one; empty where unknown.
        study_date: year of the study, or YYYYMMDD with `index --study-dates`; empty where unknown.
        manufacturer: short name of a known maker, `other`, or empty.
        kernel: reconstruction kernel where its text looks like one, `other`, or empty.
        sex: M, F, O or empty.
        age_years: age in years, NaN where unknown.
        label_path: path of the label file, or folder of masks, relative to the root (it begins with
            .. where it lies elsewhere); empty where there is none on the scan's grid.
        label_digest: hash of shape, values and names of the label map on the scan's grid; empty
            where there is none.
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
        merged_labels: paths of the DICOM objects that are merged with the one in `label_path`;
            empty for most.
        origin_mm: LPS position (x, y, z) of voxel (0, 0, 0) of the scan as it is packed; empty
            where the scan could not be read.
        directions: unit vectors in LPS along which the indices x, y and z grow, one after the
            other: 9 numbers; empty where the scan could not be read.
        split: part of the data set as the list of scans gives it, such as `train`; empty without.
        uid: keyed hash of the SeriesInstanceUID; empty where unknown.
        hu_min, hu_max: smallest and largest value in HU, of all voxels.
        air_share: share of voxels below -900 HU, from the subsample of `body_share`.
        model, kvp, thickness_mm, contrast, body_part, stored_type, slope, intercept, orientation,
            step_min_mm, step_max_mm, tilt_deg: as in `types.Technique`.
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
    merged_labels: tuple[str, ...] = ()
    origin_mm: tuple[float, ...] = ()
    directions: tuple[float, ...] = ()
    split: str = ""
    uid: str = ""
    hu_min: float = UNKNOWN
    hu_max: float = UNKNOWN
    air_share: float = UNKNOWN
    model: str = ""
    kvp: float = UNKNOWN
    thickness_mm: float = UNKNOWN
    contrast: str = ""
    body_part: str = ""
    stored_type: str = ""
    slope: float = UNKNOWN
    intercept: float = UNKNOWN
    orientation: str = ""
    step_min_mm: float = UNKNOWN
    step_max_mm: float = UNKNOWN
    tilt_deg: float = UNKNOWN


_FIRST_COLUMNS = 34  # of a manifest of this version; later columns have their defaults where absent


def arrow_type(field: dataclasses.Field[Any]) -> pyarrow.DataType:
    """The type of a column of `Row` in a table."""
    return _ARROW[str(field.type)]


class RowTable(LazyRows[Row]):
    """Rows of a manifest as columns in Arrow, and a row as an object on demand.

    Args:
        table: columns of `Row`, in their order.
    """

    def __init__(self, table: pyarrow.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, i: int) -> Row:
        """Row i as an object."""
        return next(_objects(self.table.slice(i, 1)))

    def __iter__(self) -> Iterator[Row]:
        for table in self.tables():
            yield from _objects(table)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pyarrow.Table]:
        """Some rows at a time.

        Args:
            columns: names of the columns; None for all.
        """
        table = self.table if columns is None else self.table.select(list(columns))
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield table.slice(start, _ROWS_AT_ONCE)

    def columns(self, names: Sequence[str]) -> pyarrow.Table:
        """Some columns of all rows."""
        return self.table.select(list(names))

    def each_column(self) -> Iterator[Any]:
        """The columns, one after the other, for their digest."""
        yield from self.table.itercolumns()

    def where(self, chosen: pyarrow.Array) -> RowTable:
        """The rows at which a mask is true."""
        return RowTable(self.table.filter(chosen))


class RowFile(RowTable):
    """Rows of a manifest that stay in their file, also where it is replaced by another one.

    `tables` and `columns` read what they return; all else reads the whole table, which then stays
    in memory.

    Args:
        file: path of the .parquet file.
    Raises:
        OSError, pyarrow.ArrowException, UnicodeDecodeError: it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self._file = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES)

    @functools.cached_property
    def table(self) -> pyarrow.Table:
        """All columns."""
        return self.columns([one.name for one in dataclasses.fields(Row)])

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def schema(self) -> pyarrow.Schema:
        """The columns of the file, with its metadata."""
        return self._file.schema_arrow

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pyarrow.Table]:
        """Some rows at a time; arguments as in `RowTable.tables`."""
        names = [one.name for one in dataclasses.fields(Row)] if columns is None else list(columns)
        stored = [name for name in names if name in self.schema.names]
        # without a column, iter_batches does not know how many rows there are
        for batch in self._file.iter_batches(_ROWS_AT_ONCE, columns=stored or ["id"]):
            table = pyarrow.Table.from_batches([batch]).replace_schema_metadata(None)
            yield _with_later_columns(table).select(names)

    def columns(self, names: Sequence[str]) -> pyarrow.Table:
        """Some columns of all rows."""
        return pyarrow.concat_tables([_schema().empty_table().select(names), *self.tables(names)])

    def each_column(self) -> Iterator[StoredColumn]:
        """The columns of the file, one after the other."""
        for one in self.schema:
            yield StoredColumn(one.type, len(self), functools.partial(self._column, one.name))

    def _column(self, name: str) -> Iterator[pyarrow.Array]:
        for batch in self._file.iter_batches(_ROWS_AT_ONCE, columns=[name]):
            yield batch.column(0)


class TextColumn(LazyRows[str]):
    """A column of text whose values are made on demand."""

    def __init__(self, column: pyarrow.Array | pyarrow.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def row(self, i: int) -> str:
        """Value i."""
        return str(self._column[i].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self._column.slice(start, _ROWS_AT_ONCE).to_pylist()


def _objects(table: pyarrow.Table) -> Iterator[Row]:
    """The rows of a table as objects."""
    columns = [column.to_pylist() for column in table.itercolumns()]
    for values in zip(*columns):
        yield Row(*map(_frozen, values))


@dataclass(frozen=True)
class Manifest:
    """All rows of an archive, in the order of their paths.

    Args:
        rows: accepted and refused scans.
        root: folder of the archive.
        patient_key: name of the key of the patient hashes; empty where unknown.
        passed_over: number of files of each kind that are no scan; only after the index, since the
            file does not hold it.
        ignore_labels: label values of voxels that nobody has labelled, as `tapct index
            --ignore-label` was given them; `tapct pack` reads the labels by the same rule.
        label_names: label values and names of a data set, which replace those of the files.
        selected_from: what the rows were selected from, oldest first: for each selection, the
            digest of the manifest, its number of accepted scans and the expression; empty for a
            manifest of a whole archive.
        label_report: what `tapct index` found about the labels; None for a manifest that was read.
        file: file that holds the manifest; None where there is none.
        memory: what the next index must know of patients beyond the rows.
        patient_changes: what became of the patients of an older manifest; only after the index, and
            None where there was no older manifest.
    """

    rows: Sequence[Row]
    root: Path
    patient_key: str = ""
    passed_over: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    ignore_labels: tuple[int, ...] = ()
    label_names: tuple[tuple[int, str], ...] = ()
    selected_from: tuple[Mapping[str, Any], ...] = ()
    label_report: LabelReport | None = field(default=None, compare=False, repr=False)
    file: Path | None = field(default=None, repr=False, compare=False)
    memory: PatientMemory = field(default_factory=PatientMemory, repr=False)
    patient_changes: PatientChanges | None = field(default=None, compare=False, repr=False)

    @functools.cached_property
    def accepted(self) -> Sequence[Row]:
        """Rows of the scans that `tapct pack` packs."""
        if isinstance(self.rows, RowTable):
            return self.rows.where(pc.equal(self.rows.table.column("status"), ACCEPTED))
        return tuple(row for row in self.rows if row.status == ACCEPTED)

    def table(self) -> pyarrow.Table:
        """All rows as columns."""
        return self.row_table().table

    def row_table(self) -> RowTable:
        """All rows, some columns of which can be read without the others."""
        return self.rows if isinstance(self.rows, RowTable) else RowTable(rows_as_table(self.rows))

    @functools.cached_property
    def digest(self) -> str:
        """Hash over ids and voxels of the accepted rows; it does not change when the archive
        moves.
        """
        lines = [pyarrow.array([], pyarrow.string())]
        for table in self.row_table().tables(("id", "digest", "status")):
            table = table.filter(pc.equal(table.column("status"), ACCEPTED))
            columns = (table.column(name) for name in ("id", "digest"))
            lines += pc.binary_join_element_wise(*columns, " ").chunks
        column = pyarrow.chunked_array(lines)
        order = pc.sort_indices(column)
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(order), _ROWS_AT_ONCE):
            for line in column.take(order.slice(start, _ROWS_AT_ONCE)).to_pylist():
                digest.update(f"{line}\n".encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, int]:
        """Number of rows by reason, `accepted` first, then the commonest reason."""
        table = self.row_table().columns(("status", "reason"))
        is_refused = pc.equal(table.column("status"), REFUSED)
        counted = pc.value_counts(table.filter(is_refused).column("reason")).to_pylist()
        reasons = {one["values"]: one["counts"] for one in counted}
        num_accepted = pc.sum(pc.equal(table.column("status"), ACCEPTED)).as_py() or 0
        by_count = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        return {ACCEPTED: num_accepted, **dict(by_count)}

    @classmethod
    def read(cls, path: Path | str, root: Path | None = None) -> Manifest:
        """Read a manifest; arguments and errors as in `open`."""
        manifest = cls.open(path, root)
        return dataclasses.replace(manifest, rows=RowTable(manifest.row_table().table))

    @classmethod
    def open(cls, path: Path | str, root: Path | None = None) -> Manifest:
        """A manifest whose rows stay on disk, see `RowFile`; its content is checked.

        Args:
            path: path of the .parquet file, or of the folder of an archive.
            root: folder of the archive now; without it, the folder at the same place relative to
                the manifest as when the archive was indexed.
        Raises:
            UserError: there is no manifest, it has another version, or it was changed after it was
                written.
        """
        path = files.expand_path(path)
        if (path / ARCHIVE_FILE).is_file():
            path = path / ARCHIVE_FILE
        rows = _opened(path)
        metadata = _checked(path, rows)
        if root is None:
            root = (path.parent.resolve() / metadata["tapct.root_relative"]).resolve()
        manifest = cls(
            rows,
            root,
            metadata.get("tapct.patient_key", ""),
            ignore_labels=tuple(json.loads(metadata.get("tapct.ignore_labels", "[]"))),
            label_names=_names(metadata.get("tapct.label_names", "[]")),
            selected_from=tuple(json.loads(metadata.get("tapct.selected_from", "[]"))),
            file=path,
            memory=PatientMemory.from_json(metadata.get("tapct.patient_memory", "")),
        )
        return manifest


def root_of(path: Path) -> Path | None:
    """The folder of the archive of a manifest; None where there is no manifest, or a broken one."""
    try:
        stored = pyarrow.parquet.read_schema(path).metadata or {}
        relative = stored[b"tapct.root_relative"].decode()
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError):
        return None
    return (path.parent.resolve() / relative).resolve()


def _opened(path: Path) -> RowFile:
    """The rows of a file that should be a manifest."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else f"does not exist{near_path(path)}"
        raise UserError(f"manifest {path} {problem}; make one with `tapct index`")
    try:
        return RowFile(path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is not a readable Parquet file: {single_line(error, MAX_TEXT)}; make it again "
        "with `tapct index`"
    )


def _checked(path: Path, rows: RowFile) -> dict[str, str]:
    """Metadata of a manifest of the present version, whose content is as `tapct index` wrote it.

    Raises:
        UserError: the file is no manifest of this version, or its digest shows a change.
    """
    damaged = UserError(
        f"{path} is damaged, or was changed after `tapct index` wrote it; make it again with "
        "`tapct index`"
    )
    stored = rows.schema.metadata or {}
    try:
        metadata = {key.decode(): value.decode() for key, value in stored.items()}
        found = rows.schema.names
    except UnicodeDecodeError as error:
        raise damaged from error
    names = [field.name for field in dataclasses.fields(Row)]
    written = metadata.get("tapct.rows", "")
    num = len(found)
    is_known = num >= _FIRST_COLUMNS and found == names[:num]
    if not written or metadata.get("tapct.schema") != SCHEMA or not is_known:
        raise UserError(
            f"{path} is not a tapct manifest of version {SCHEMA}; make it again with `tapct index`"
        )
    facts = {
        key: value
        for key, value in metadata.items()
        if key.startswith("tapct.") and key != "tapct.rows"
    }
    try:
        # damage may change the type of a column, which the digest of numbers would not show
        is_whole = rows.schema.types == list(_schema().types)[:num] and written == arrow_digest(
            rows.each_column(), facts
        )
    except OSError as error:
        raise _unreadable(path, error) from error
    except (TypeError, ValueError, pyarrow.ArrowException):
        is_whole = False
    if not is_whole:
        raise damaged
    return metadata


def _with_later_columns(table: pyarrow.Table) -> pyarrow.Table:
    """A table of an earlier version, with the defaults of the later columns where it lacks them."""
    schema = _schema()
    for number in range(_FIRST_COLUMNS, len(schema)):
        field, default = schema.field(number), dataclasses.fields(Row)[number].default
        if field.name in table.column_names:
            continue
        column = pyarrow.repeat(pyarrow.scalar(default, type=field.type), table.num_rows)
        table = table.append_column(field, column)
    return table


def _schema(metadata: Mapping[str, str] | None = None) -> pyarrow.Schema:
    """The columns of a manifest."""
    columns = [(one.name, arrow_type(one)) for one in dataclasses.fields(Row)]
    return pyarrow.schema(columns, metadata=None if metadata is None else dict(metadata))


def rows_as_table(rows: Sequence[Row]) -> pyarrow.Table:
    """Rows as columns."""
    names = [one.name for one in dataclasses.fields(Row)]
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    return pyarrow.table(columns, schema=_schema())


def _names(text: str) -> tuple[tuple[int, str], ...]:
    """Label names as a manifest stores them."""
    return tuple((int(value), str(name)) for value, name in json.loads(text))


def _frozen(value: Any) -> Any:
    """A value of a column as a row holds it: lists become tuples."""
    return tuple(value) if isinstance(value, list) else value


def read_columns(file: Path, digest: str, names: Sequence[str]) -> pyarrow.Table | None:
    """Some columns of a manifest, for a store, which has IDs alone.

    Args:
        file: file of the manifest.
        digest: digest of the manifest that was packed.
        names: names of the columns.
    Returns:
        The columns in the order of the manifest; None where the file is gone, is another manifest
        or lacks one of the columns.
    """
    try:
        schema = pyarrow.parquet.read_schema(file)
        stored = schema.metadata or {}
        if stored.get(b"tapct.digest", b"").decode() != digest:
            return None
        if not set(names) <= set(schema.names):
            return None
        table = pyarrow.parquet.read_table(file, columns=list(names), partitioning=None)
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError):
        return None
    return table.combine_chunks()


def columns_in_order(
    file: Path, digest: str, names: Sequence[str], ids: pyarrow.Array
) -> pyarrow.Table | None:
    """Columns of a manifest in the order of a store's scans; nulls for a scan that it lacks.

    A store lists the accepted scans in the order of the manifest. Where it has all of them, nothing
    has to be searched, and only the IDs of the first and the last rows are read and compared.

    Args:
        file, digest, names: as in `read_columns`.
        ids: IDs of the store's scans.
    """
    status = read_columns(file, digest, ("status",))
    if status is None:
        return None
    is_accepted = pc.equal(status.column("status"), ACCEPTED)
    num_accepted = pc.sum(is_accepted).as_py() or 0
    if num_accepted == len(ids) and _ends_are(file, is_accepted, ids):
        table = read_columns(file, digest, names)
        if table is None or num_accepted == len(status):
            return table
        return table.filter(is_accepted)
    table = read_columns(file, digest, ("id", *names))
    if table is None:
        return None
    known = table.column("id").combine_chunks()
    return table.select(list(names)).take(pc.index_in(ids.cast(known.type), value_set=known))


def _ends_are(file: Path, is_accepted: pyarrow.Array, ids: pyarrow.Array) -> bool:
    """Whether the accepted rows in the first and the last group of rows of a manifest have the
    first and the last of these IDs.
    """
    with pyarrow.parquet.ParquetFile(file) as parquet:
        last = parquet.num_row_groups - 1
        groups = [parquet.read_row_group(k, ["id"]).column("id") for k in {0, last} if k >= 0]
    if not groups:
        return True
    first_ids = groups[0].filter(is_accepted.slice(0, len(groups[0]))).combine_chunks()
    start = len(is_accepted) - len(groups[-1])
    last_ids = groups[-1].filter(is_accepted.slice(start)).combine_chunks()
    ids = ids.cast(first_ids.type)
    return bool(
        first_ids.equals(ids.slice(0, len(first_ids)))
        and last_ids.equals(ids.slice(len(ids) - len(last_ids)))
    )


def read_column(file: Path, digest: str, column: str) -> dict[str, Any]:
    """One column of a manifest by ID; empty where it cannot be read; arguments as in
    `read_columns`.
    """
    table = read_columns(file, digest, ("id", column))
    if table is None:
        return {}
    return dict(zip(table.column("id").to_pylist(), table.column(column).to_pylist()))


def _groups_of_rows(tables: Iterable[pyarrow.Table]) -> Iterator[pyarrow.Table]:
    """The rows of each group of rows in a file. pyarrow cannot read a group whose lists of text
    need more than 2 GiB, and the paths of the files of 100,000 DICOM series may.
    """
    waiting: list[pyarrow.Table] = []
    num_rows = num_bytes = 0
    for table in tables:
        step = max(1, _GROUP_BYTES * len(table) // max(1, table.nbytes))
        for start in range(0, len(table), step):
            part = table.slice(start, step)
            is_full = num_rows + len(part) > _MOST_ROWS_OF_GROUP
            if waiting and (is_full or num_bytes + part.nbytes > _GROUP_BYTES):
                yield pyarrow.concat_tables(waiting)
                waiting, num_rows, num_bytes = [], 0, 0
            waiting.append(part)
            num_rows, num_bytes = num_rows + len(part), num_bytes + part.nbytes
    if waiting:
        yield pyarrow.concat_tables(waiting)


def write_rows(
    tables: Iterable[pyarrow.Table], file: Any, schema: pyarrow.Schema | None = None
) -> None:
    """Write rows as Parquet, without what makes the file a manifest; it can be read as `RowFile`.

    Args:
        tables: rows, some at a time.
        file: file to write, or its path.
        schema: columns with the metadata of the file.
    """
    schema = schema or _schema()
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for table in _groups_of_rows(tables):
            writer.write_table(table.cast(schema))


def write_table(manifest: Manifest, out: Path) -> None:
    """Write a manifest under another name, flush it to disk and rename it.

    Args:
        manifest: all rows.
        out: .parquet file to write or replace.
    Raises:
        UserError: the disk is full or the folder is not writable; an old manifest is unchanged.
    """
    rows = manifest.row_table()
    metadata = {
        "tapct.schema": SCHEMA,
        # no absolute path: it may hold the name of a user or of a patient
        "tapct.root_relative": os.path.relpath(manifest.root, out.parent.resolve()),
        "tapct.digest": manifest.digest,
        "tapct.ignore_labels": json.dumps(list(manifest.ignore_labels)),
        "tapct.patient_key": manifest.patient_key,
    }
    if manifest.label_names:
        metadata["tapct.label_names"] = json.dumps(list(manifest.label_names))
    if manifest.selected_from:
        metadata["tapct.selected_from"] = json.dumps(list(manifest.selected_from))
    memory = manifest.memory.to_json()
    if memory:
        metadata["tapct.patient_memory"] = memory
    metadata["tapct.rows"] = arrow_digest(rows.each_column(), metadata)
    schema = _schema(metadata)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(out, mode=files.PRIVATE) as file:
            write_rows(rows.tables(), file, schema)
    except OSError as error:
        raise UserError(
            f"cannot write manifest {out}: {files.first_cause(error)}; nothing was changed"
        ) from error
