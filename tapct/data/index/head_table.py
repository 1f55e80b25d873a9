"""Heads of DICOM files as rows of a table, without the identifiers of their headers."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow

from tapct.data.index.journal import KEY, key_of
from tapct.data.patients.key import keyed_hash
from tapct.data.patients.stand_ins import canonical_id
from tapct.data.readers.dicom_head import Head
from tapct.data.scans.plain_facts import without_names
from tapct.data.search.discover import Looked
from tapct.data.search.series import series_key

HEADS = "heads"  # kind of these rows in the journal
HEAD, REFUSAL, NO_DICOM = 0, 1, 2  # what a file is
_WORDS = ("sop_class", "patient_id", "study_uid", "series_uid", "sop_uid", "concatenation")
_PROBLEMS = ("refusal", "misplaced")
SCHEMA = pyarrow.schema(
    [
        ("folder", pyarrow.binary()),  # bytes, since a path may not be UTF-8
        ("name", pyarrow.binary()),
        ("state", pyarrow.uint8()),
        ("series", pyarrow.uint64()),
        *((name, pyarrow.string()) for name in _WORDS),
        ("number", pyarrow.int64()),
        ("rows", pyarrow.int32()),
        ("columns", pyarrow.int32()),
        ("traits", pyarrow.list_(pyarrow.string())),
        ("spacing", pyarrow.list_(pyarrow.float64())),
        ("position", pyarrow.list_(pyarrow.float64())),
        ("axes", pyarrow.list_(pyarrow.float64())),
        ("derived", pyarrow.string()),
        *(
            (f"{name}_{part}", pyarrow.string())
            for name in _PROBLEMS
            for part in ("reason", "line")
        ),
        ("frames", pyarrow.string()),
    ]
)
_EMPTY: dict[str, Any] = {
    **dict.fromkeys((*_WORDS, "derived", "frames"), ""),
    **{f"{name}_{part}": "" for name in _PROBLEMS for part in ("reason", "line")},
    **dict.fromkeys(("series", "number", "rows", "columns"), 0),
    **{name: [] for name in ("traits", "spacing", "position", "axes")},
}
_STANDARD_CLASS = re.compile(r"1\.2\.840\.10008\.[\d.]+")
# what a frame does not have in common with its file
_OF_FRAME = ("frame", "number", "position", "axes", "spacing", "derived", *_PROBLEMS, "traits")


@functools.lru_cache(maxsize=1 << 14)
def _hidden(key: bytes, text: str) -> str:
    """The keyed hash of a text; empty for an empty one."""
    return keyed_hash(key, f"head {text}") if text else ""


def without_identifiers(head: Head, root: Path, key: bytes) -> Head:
    """A head with hashes in place of identifiers and free texts, equal for equal ones.

    Args:
        head: head as it was read.
        root: folder of the archive.
        key: secret of the hashes.
    """

    def plain(problem: tuple[str, str] | None) -> tuple[str, str] | None:
        return problem and (problem[0], without_names(problem[1], root, (head.path,)))

    is_standard = _STANDARD_CLASS.fullmatch(head.sop_class) is not None
    return replace(
        head,
        sop_class=head.sop_class if is_standard else _hidden(key, head.sop_class),
        modality="",
        patient_id=_hidden(key, canonical_id(head.patient_id)),
        study_uid=_hidden(key, head.study_uid),
        series_uid=_hidden(key, head.series_uid),
        sop_uid=_hidden(key, head.sop_uid),
        concatenation=_hidden(key, head.concatenation),
        traits=tuple(_hidden(key, trait) for trait in head.traits),
        number=max(-(2**62), min(2**62, head.number)),
        refusal=plain(head.refusal),
        misplaced=plain(head.misplaced),
        frames=tuple(without_identifiers(frame, root, key) for frame in head.frames),
    )


def row_of(looked: Looked, folder: bytes) -> dict[str, Any]:
    """The row of a file that was read.

    Args:
        looked: what it is, without identifiers.
        folder: its folder below the root.
    """
    row = {**_EMPTY, "folder": folder, "name": os.fsencode(looked.name), "state": NO_DICOM}
    if looked.refusal is not None:
        reason, line = looked.refusal
        return row | {"state": REFUSAL, "refusal_reason": reason, "refusal_line": line}
    head = looked.head
    if head is None:
        return row
    for name in _PROBLEMS:
        reason, line = getattr(head, name) or ("", "")
        row |= {f"{name}_reason": reason, f"{name}_line": line}
    *ids, place = series_key(head)
    return row | {
        **{name: getattr(head, name) for name in (*_WORDS, "number", "derived")},
        "state": HEAD,
        # the folder below the root: the archive may be called by another path later
        "series": int.from_bytes(key_of(*ids, folder if place else b"")[:8], "little"),
        "rows": head.size[0],
        "columns": head.size[1],
        **{name: list(getattr(head, name)) for name in ("traits", "spacing", "position", "axes")},
        "frames": _frames_text(head),
    }


def _frames_text(head: Head) -> str:
    """The frames of a file as JSON; empty where it has none."""
    if not head.frames:
        return ""
    return json.dumps([[getattr(frame, name) for name in _OF_FRAME] for frame in head.frames])


def _with_frames(head: Head, text: str) -> Head:
    """A head with the frames that `_frames_text` wrote."""
    if not text:
        return head
    frames = []
    for values in json.loads(text):
        fields = {name: _frozen(value) for name, value in zip(_OF_FRAME, values)}
        frames.append(replace(head, **fields))
    return replace(head, frames=tuple(replace(frame, num_frames=len(frames)) for frame in frames))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def heads_in(table: pyarrow.Table, root: Path) -> Iterator[tuple[bytes, int, Head]]:
    """Key, state and head of each row, by folders and names in the order of a search; of a file
    that was refused the head has its reason alone.
    """
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    paths = [os.path.join(*pair) for pair in zip(columns["folder"], columns["name"])]
    # a folder comes before the folders in it, whatever signs are in their names
    order = sorted(
        range(len(paths)),
        key=lambda i: (columns["folder"][i].replace(b"/", b"\0"), os.fsdecode(columns["name"][i])),
    )
    shared: dict[Any, Any] = {}  # most slices have equal numbers and texts
    for i in order:
        row = {name: values[i] for name, values in columns.items()}
        problems: dict[str, Any] = {name: _problem(row, name) for name in _PROBLEMS}
        head = Head(
            path=root / os.fsdecode(paths[i]),
            **{name: shared.setdefault(row[name], row[name]) for name in (*_WORDS, "derived")},
            number=row["number"],
            traits=_shared(shared, row["traits"]),
            size=_shared(shared, [row["rows"], row["columns"]]),
            **problems,
        )
        if row["state"] == HEAD:
            head = replace(
                head,
                spacing=_shared(shared, row["spacing"]),
                position=tuple(row["position"]),
                axes=_shared(shared, row["axes"]),
            )
        yield row[KEY], row["state"], _with_frames(head, row["frames"])


def _shared(shared: dict[Any, Any], values: list[Any]) -> Any:
    """A tuple of values, one object for all equal ones."""
    as_tuple = tuple(values)
    if any(isinstance(value, float) and math.isnan(value) for value in as_tuple):
        return as_tuple
    return shared.setdefault(as_tuple, as_tuple)


def _problem(row: dict[str, Any], name: str) -> tuple[str, str] | None:
    reason = row[f"{name}_reason"]
    return (reason, row[f"{name}_line"]) if reason else None
