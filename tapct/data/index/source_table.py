"""Sources of an archive, and their labels, as rows on disk."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow

from tapct.data.index.journal import key_of
from tapct.data.index.label_counts import LabelsFound
from tapct.data.labels.pairing import LabelPairs
from tapct.data.readers import DICOM
from tapct.data.search.discover import Source, StackFiles
from tapct.data.search.file_list import compact

_TEXTS = ("kind", "reason", "detail", "mark", "sop_class", "modality")
# bytes, since a path may not be UTF-8
SOURCE_SCHEMA = pyarrow.schema(
    [
        ("path", pyarrow.binary()),
        *((name, pyarrow.binary()) for name in _TEXTS),
        ("files", pyarrow.binary()),  # compressed; empty where `path` is the only file
        ("frames", pyarrow.list_(pyarrow.int32())),
        ("stamp", pyarrow.binary()),
    ]
)
# a stack of slices; its folders are hashes
PART_SCHEMA = SOURCE_SCHEMA.append(pyarrow.field("folders", pyarrow.list_(pyarrow.uint64())))
# a source that is examined, and what was found of its labels
FOUND_SCHEMA = pyarrow.unify_schemas(
    [
        SOURCE_SCHEMA,
        pyarrow.schema(
            [
                ("label", pyarrow.binary()),
                ("more_labels", pyarrow.list_(pyarrow.binary())),
                ("num_others", pyarrow.int32()),
                ("first_other", pyarrow.binary()),
            ]
        ),
    ]
)


LABEL_COLUMNS = [name for name in FOUND_SCHEMA.names if name not in SOURCE_SCHEMA.names]


def bytes_of(text: str | Path) -> bytes:
    """Text as bytes whose order is that of the text, also where it is no UTF-8."""
    return str(text).encode("utf-8", "surrogatepass")


def text_of(content: bytes) -> str:
    """The text of `bytes_of`."""
    return content.decode("utf-8", "surrogatepass")


def row_of_source(source: Source) -> dict[str, Any]:
    """The row of a source."""
    files = b""
    if len(source.files) != 1 or source.files[0] != source.path:
        files = zlib.compress(bytes_of("\0".join(map(str, source.files))), 1)
    texts = {name: bytes_of(getattr(source, name)) for name in _TEXTS}
    return {
        "path": bytes_of(source.path),
        **texts,
        "files": files,
        "frames": source.frames,
        "stamp": source.stamp,
    }


def source_of_row(row: Mapping[str, Any]) -> Source:
    """The source of a row."""
    path = Path(text_of(row["path"]))
    files: Sequence[Path] = (path,)
    if row["files"]:
        files = compact([Path(name) for name in text_of(zlib.decompress(row["files"])).split("\0")])
    texts: dict[str, Any] = {name: text_of(row[name]) for name in _TEXTS}
    return Source(path, files=files, frames=tuple(row["frames"]), stamp=row["stamp"], **texts)


def row_of_part(part: StackFiles) -> dict[str, Any]:
    """The row of a stack of slices, as a source that is called by its first file."""
    folders = sorted(part.folders)
    source = Source(
        *(part.files[0], DICOM.name, part.files, part.reason, part.detail, part.mark),
        frames=part.frames,
        stamp=part.stamp,
    )
    hashes = [int.from_bytes(key_of(bytes_of(folder))[:8], "little") for folder in folders]
    return {**row_of_source(source), "folders": hashes}


def part_of_row(row: Mapping[str, Any]) -> StackFiles:
    """The stack of slices of a row."""
    source = source_of_row(row)
    return StackFiles(
        source.files,
        frozenset(file.parent for file in source.files),
        *(source.frames, source.reason, source.detail, source.mark, source.stamp),
    )


def row_of_found(source: Source, pairs: LabelPairs) -> dict[str, Any]:
    """The row of a source that is examined, and of its labels."""
    label = pairs.label_of.get(source.path)
    others = pairs.others_of.get(source.path, ())
    return {
        **row_of_source(source),
        "label": b"" if label is None else bytes_of(label),
        "more_labels": [bytes_of(path) for path in pairs.more_of.get(source.path, ())],
        "num_others": len(others),
        "first_other": bytes_of(others[0]) if others else b"",
    }


def labels_of_row(row: Mapping[str, Any]) -> LabelsFound:
    """The labels of the row of a source that is examined."""
    return LabelsFound(
        _path_of(row["label"]),
        tuple(Path(text_of(path)) for path in row["more_labels"]),
        row["num_others"],
        _path_of(row["first_other"]),
    )


def _path_of(content: bytes) -> Path | None:
    return Path(text_of(content)) if content else None
