"""The files that list the scans of a store.

`store.parquet` is the list: a store without it is none, and it is written last. A store of many
scans has the same columns a second time in `.store.arrow`, uncompressed: the processes of a machine
map it into memory and share its pages, and nothing is decoded. That file is only used where it
belongs to this `store.parquet` and its checksum is right; it can be deleted at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from tapct.base.exits import UserError, single_line
from tapct.base.files import PRIVATE, write_atomically
from tapct.base.paths import near_path
from tapct.data.digest import arrow_digest
from tapct.data.manifest import read_columns
from tapct.data.packed.scan_list import (
    ScanList,
    StoredScan,
    columns_of,
    no_paths,
    patient_numbers,
    store_digest,
)

INDEX_NAME = "store.parquet"
MAPPED_NAME = ".store.arrow"
MAPPED_FROM = 20_000  # scans; a shorter list is decoded within 50 ms
# version of store.parquet; version 1 listed the label files of the archive and had no digest of its
# own content
SCHEMA = 2
_MAPPED_SCHEMA = 1
_INDEX_KEY = b"tapct.store"
_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        *((name, pa.int32()) for name in ("depth", "height", "width")),
        *((name, pa.float64()) for name in ("spacing_z_mm", "spacing_y_mm", "spacing_x_mm")),
        *((name, pa.string()) for name in ("patient", "label_digest", "label_names", "checksum")),
    ]
)
# the last column, which stores of earlier versions lack
_PATIENT_FROM = pa.field("patient_from", pa.string())
_CODED = ("label_digest", "label_names", "patient_from")  # many scans have the same text


def index_bytes(
    scans: Iterable[StoredScan],
    manifest_digest: str,
    summary: Mapping[str, int] | None = None,
    patient_key: str = "",
    manifest_file: str = "",
) -> bytes:
    """The content of `store.parquet`.

    Args:
        scans: all scans of the store, in the order of the manifest.
        manifest_digest: digest of the manifest.
        summary: number of rows of the manifest by reason, as `Manifest.summary` counts them.
        patient_key: name of the key of the patient hashes; empty where unknown.
        manifest_file: file of the manifest, relative to the store; empty where there is none.
    """
    schema = _COLUMNS.append(_PATIENT_FROM)
    columns = {name: pa.array(v, schema.field(name).type) for name, v in columns_of(scans).items()}
    about = about_store(columns, manifest_digest, summary, patient_key, manifest_file)
    return index_of_columns(columns, about)


def about_store(
    columns: dict[str, pa.Array],
    manifest_digest: str,
    summary: Mapping[str, int] | None = None,
    patient_key: str = "",
    manifest_file: str = "",
) -> dict[str, Any]:
    """Facts about a store, as its index holds them.

    Args:
        columns: columns of its scans.
        manifest_digest, summary, patient_key, manifest_file: as in `index_bytes`.
    """
    return {
        "manifest_digest": manifest_digest,
        "manifest_file": manifest_file,
        "digest": store_digest(ScanList(columns, no_paths)),
        "summary": dict(summary or {}),
        "patient_key": patient_key,
    }


def index_of_columns(values: Mapping[str, Any], about: Mapping[str, Any]) -> bytes:
    """The content of `store.parquet` from the columns of its scans.

    Args:
        values: values by column, as `columns_of` names them.
        about: facts about the store, see `about_store`.
    """
    columns = _COLUMNS.append(_PATIENT_FROM)
    arrays = []
    for column in columns:
        given = values[column.name]
        arrays.append(given if isinstance(given, pa.Array) else pa.array(given, column.type))
    info: dict[str, Any] = {"schema": SCHEMA, **about}
    info["content"] = arrow_digest(arrays, info)
    schema = columns.with_metadata({_INDEX_KEY: json.dumps(info).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink)
    return sink.getvalue().to_pybytes()


def write_index(folder: Path, content: bytes) -> None:
    """Write the list of a store's scans, which makes them visible.

    Args:
        folder: folder of the store.
        content: bytes from `index_bytes`.
    Raises:
        OSError: the folder cannot be written.
    """
    table = pq.read_table(pa.BufferReader(content))
    mapped = folder / MAPPED_NAME
    if len(table) >= MAPPED_FROM:
        write_atomically(mapped, _mapped_bytes(table), mode=PRIVATE)
    elif mapped.exists():
        mapped.unlink()
    write_atomically(folder / INDEX_NAME, content, mode=PRIVATE)


def _mapped_bytes(table: pa.Table) -> bytes:
    """The columns of a store as an Arrow file, followed by the checksum of all bytes before it."""
    columns: dict[str, pa.Array] = {}
    for name in table.column_names:
        # an array of text may hold at most 2 GiB; the long form has no such limit
        column = table.column(name).combine_chunks()
        if name in _CODED:
            columns[name] = whole_column(column.dictionary_encode())
        else:
            columns[name] = column.cast(pa.large_string()) if column.type == "string" else column
    columns["patient_number"] = patient_numbers(columns["patient"])
    info = json.loads(table.schema.metadata[_INDEX_KEY])
    about = {"schema": _MAPPED_SCHEMA, "content": info["content"]}
    batch = pa.RecordBatch.from_pydict(columns)
    batch = batch.replace_schema_metadata({_INDEX_KEY: json.dumps(about).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content + xxhash.xxh3_64_digest(content)


def whole_column(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    column = column.combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def read_index(folder: Path) -> tuple[ScanList, dict[str, Any]]:
    """Read the list of a store.

    Args:
        folder: folder of the store.
    Returns:
        The scans, and the index's `manifest_digest`, `digest` and `summary`.
    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    file = folder / INDEX_NAME
    if not folder.exists():
        raise UserError(
            f"store {folder} does not exist{near_path(folder)}; make one with `tapct pack`"
        )
    if not file.is_file():
        raise UserError(
            f"{folder} holds no {INDEX_NAME}, so it is not a packed archive; make one with `tapct "
            "pack`."
        )
    try:
        info = json.loads((pq.read_schema(file).metadata or {})[_INDEX_KEY])
        if info["schema"] != SCHEMA:
            age = "an older" if info["schema"] < SCHEMA else "a newer"
            raise ValueError(f"it was packed by {age} version of tapct")
        columns = _map_columns(folder / MAPPED_NAME, info["content"])
        if columns is None:
            columns = _decode_columns(file, info)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is not readable ({single_line(error)}); run `tapct pack` again, it keeps "
            "the scans that it can."
        ) from error
    manifest_file = info.get("manifest_file", "")
    paths: Callable[[pa.Array], pa.Array] = no_paths
    if manifest_file:
        paths = _PathsOfManifest(folder / manifest_file, info["manifest_digest"])
    if len(columns["id"]) < MAPPED_FROM:
        # a short list has its paths at once, so that they do not change with the manifest
        known = paths(columns["id"])
        return ScanList(columns, lambda _: known), info
    return ScanList(columns, paths), info


def _map_columns(file: Path, content: str) -> dict[str, pa.Array] | None:
    """The columns of `.store.arrow`, mapped into memory; None where there is no such file, or it
    belongs to another `store.parquet`, or is damaged, since it can be replaced by decoding.
    """
    if not file.is_file():
        return None
    try:
        with pa.memory_map(str(file)) as source:
            whole = source.read_buffer()
        inner = memoryview(whole)[:-8]
        if xxhash.xxh3_64_digest(inner) != bytes(memoryview(whole)[-8:]):
            return None
        with pa.ipc.open_file(whole.slice(0, len(inner))) as reader:
            batch = reader.get_batch(0)
        about = json.loads((batch.schema.metadata or {})[_INDEX_KEY])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
    if about != {"schema": _MAPPED_SCHEMA, "content": content}:
        return None
    return {name: batch.column(name) for name in batch.schema.names}


def _decode_columns(file: Path, info: Mapping[str, Any]) -> dict[str, pa.Array]:
    """The columns of `store.parquet`.

    Raises:
        ValueError: its content differs from its digest.
    """
    table = pq.read_table(file, partitioning=None)
    has_rule = _PATIENT_FROM.name in table.column_names
    fields = [*_COLUMNS, _PATIENT_FROM] if has_rule else list(_COLUMNS)
    columns = {one.name: whole_column(table.column(one.name).cast(one.type)) for one in fields}
    facts = {key: value for key, value in info.items() if key != "content"}
    if info["content"] != arrow_digest(columns.values(), facts):
        raise ValueError("its content differs from its digest, so it is damaged")
    if not has_rule:
        columns[_PATIENT_FROM.name] = no_paths(columns["id"])
    return columns


class _PathsOfManifest:
    """Finds the paths of scans in the manifest that was packed, when they are first needed.

    Args:
        file: file of the manifest.
        digest: digest of the manifest that was packed.
    """

    def __init__(self, file: Path, digest: str) -> None:
        self.file, self.digest = file, digest

    def __call__(self, ids: pa.Array) -> pa.Array:
        table = read_columns(self.file, self.digest, ("id", "path"))
        if table is None:
            return no_paths(ids)
        places = pc.index_in(ids.cast(pa.string()), value_set=table.column("id"))
        return whole_column(pc.fill_null(table.column("path").take(places), ""))
