"""The digests of a scan's voxels and labels: equal in manifest and store, and for two formats; and
the digest of a whole table, so that damage to a manifest or to the index of a store is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tapct.types import LabelMap

_ROWS_AT_ONCE = 16_384  # of a table that are hashed at once


def voxel_digest(hu_ZYX: np.ndarray) -> str:
    """Hash shape and voxels of a scan.

    Args:
        hu_ZYX: HU that fit int16, any memory order.
    Returns:
        32 hex digits: blake2b over the shape and the little-endian int16 voxels in C order.
    """
    shape = tuple(int(size) for size in hu_ZYX.shape)
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(hu_ZYX, dtype="<i2").data)
    return digest.hexdigest()


def label_digest(labels: LabelMap) -> str:
    """Hash shape, values and names of a label map on the grid of its scan.

    Args:
        labels: label map.
    Returns:
        32 hex digits: blake2b over the shape, the names and the values in C order, as uint8 where
        all are below 256, else as little-endian uint16.
    """
    shape = tuple(int(size) for size in labels.labels_ZYX.shape)
    dtype = "u1" if labels.labels_ZYX.max(initial=0) < 256 else "<u2"
    digest = hashlib.blake2b(repr((shape, dtype, labels.names)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(labels.labels_ZYX, dtype=dtype).data)
    return digest.hexdigest()


def table_digest(columns: Iterable[Sequence[Any]], facts: Mapping[str, Any]) -> str:
    """Hash all values of a table, and facts about it.

    Args:
        columns: values of each column: text, numbers, or lists of text or numbers.
        facts: facts about the whole table that JSON can hold.
    Returns:
        32 hex digits.
    """
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for values in columns:
        if any(isinstance(value, (list, tuple)) for value in values[:1]):
            values = ["\1".join(map(str, value)) for value in values]
        if any(isinstance(value, str) for value in values[:1]):
            content = "\0".join(values).encode()
        else:
            content = np.asarray(values, np.float64).tobytes()
        digest.update(f"{len(values)} {len(content)} ".encode() + content)
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredColumn:
    """A column in Arrow that stays on disk.

    Args:
        type: type of its values.
        num_rows: number of its values.
        read: function that returns its values in their order, some at a time; it is called twice.
    """

    type: pa.DataType
    num_rows: int
    read: Callable[[], Iterable[pa.Array | pa.ChunkedArray]]

    def __len__(self) -> int:
        return self.num_rows


def arrow_digest(
    columns: Iterable[pa.Array | pa.ChunkedArray | StoredColumn], facts: Mapping[str, Any]
) -> str:
    """`table_digest` of columns in Arrow, without a Python object per value.

    Args:
        columns: columns without nulls: text, numbers, or lists of text or numbers. A column of
            text above 2 GiB has several chunks, and is never joined to one.
        facts: as in `table_digest`.
    Returns:
        The 32 hex digits of `table_digest` of the same values.
    Raises:
        ValueError: a column has nulls or another type, so that `table_digest` did not see it.
    """
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for column in columns:
        between = b"" if _is_number(column.type) else b"\0"
        sizes = [_num_bytes(piece) for piece in _pieces(column)]
        num_bytes = sum(sizes) + len(between) * max(0, len(sizes) - 1)
        digest.update(f"{len(column)} {num_bytes} ".encode())
        for number, piece in enumerate(_pieces(column)):
            if number:
                digest.update(between)
            digest.update(_content(piece))
    return digest.hexdigest()


def _pieces(column: pa.Array | pa.ChunkedArray | StoredColumn) -> Iterator[pa.Array]:
    """A column in parts of limited length, none of which is empty."""
    if isinstance(column, StoredColumn):
        for part in column.read():
            yield from _pieces(part)
        return
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        for start in range(0, len(chunk), _ROWS_AT_ONCE):
            piece = chunk.slice(start, _ROWS_AT_ONCE)
            if piece.null_count:
                raise ValueError("a column has missing values")
            yield piece


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _num_bytes(column: pa.Array) -> int:
    """The length of `_content`."""
    if _is_number(column.type):
        return 8 * len(column)
    lengths = pc.binary_length(_texts(column))
    return int(pc.sum(lengths).as_py() or 0) + max(0, len(column) - 1)


def _content(column: pa.Array) -> memoryview | bytes:
    """The bytes of a part of a column that `table_digest` hashes."""
    if _is_number(column.type):
        numbers = column.to_numpy(zero_copy_only=False)
        return np.ascontiguousarray(numbers, np.float64).data.cast("B")
    texts = _texts(column)
    all_rows = pa.LargeListArray.from_arrays(pa.array([0, len(texts)], pa.int64()), texts)
    joined = pc.binary_join(all_rows, pa.scalar("\0", pa.large_string()))
    return memoryview(joined[0].as_buffer())


def _texts(column: pa.Array) -> pa.Array:
    """A part of a column that is no number, as one text per row."""
    if pa.types.is_list(column.type) and pa.types.is_string(column.type.value_type):
        # with the marks between the texts it may need more than 2 GiB
        large = column.cast(pa.large_list(pa.large_string()))
        column = pc.binary_join(large, pa.scalar("\1", pa.large_string()))
    elif pa.types.is_list(column.type):
        # Arrow writes a number in other digits than Python
        lists = column.to_pylist()
        column = pa.array(["\1".join(map(str, one)) for one in lists], pa.large_string())
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise ValueError(f"a column holds {column.type}")
    return column.cast(pa.large_string())
