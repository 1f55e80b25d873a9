"""One entry of the feature cache on disk: the features of one scan after one block, as float16.

    magic
    parts      compressed float16 arrays, one after another: rows of patches in order, then the
               vectors of the windows
    index      JSON: patch grid, and place, shape, exponents and checksum of every part
    footer     length and checksum of the index, magic

A file is written from front to back, so that rows of patches are written as they are finished.
Every byte is covered by a checksum (XXH3, 64 bits), which is compared before blosc2 sees the byte.

float16 ends at 65504 and loses digits below 6e-5. A channel whose largest magnitude within a part
lies above 6e4 or below 1e-2 is therefore divided by a power of two (its exponent is in the index),
which changes no digit. Values that are not finite are refused.

Axes: Z Y X patches, D channels, W windows, R registers.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import blosc2
import numpy as np
import torch
import xxhash
from torch import Tensor

from tapct.base import files
from tapct.base.exits import UserError
from tapct.eval.features.dense import BlockFeatures, PatchGrid, WindowVectors

SCHEMA = 1
LARGEST, SMALLEST = 6e4, 1e-2  # magnitudes between which float16 needs no exponent
_MAGIC = b"tapctfea"
_FOOTER = struct.Struct("<QQ8s")
_ROWS = "rows"
_VECTORS = ("cls_WD", "mean_WD", "std_WD", "max_WD", "registers_WRD")
_THREADS = min(4, os.cpu_count() or 1)
_ONE_THREAD_BYTES = 1 << 20  # below, to start threads takes longer than the work itself


class DamagedFeatures(ValueError):
    """A file that does not hold what was written."""


@dataclass(frozen=True)
class Part:
    """One array in a file.

    Args:
        name: `rows`, or a field of `WindowVectors`.
        first: z index of the first row; 0 for vectors.
        shape: shape of the array; channels last.
        offset: first byte.
        num_bytes: number of bytes.
        checksum: of these bytes.
        exponents: power of two by which each channel was divided; empty where none was.
    """

    name: str
    first: int
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    checksum: int
    exponents: tuple[int, ...] = ()


def to_half(values: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Values as float16 and the exponent of each channel.

    Args:
        values: float32, channels last.
    Returns:
        float16 of the same shape, and the exponents; empty where all are 0.
    Raises:
        ValueError: a value is not finite.
    """
    largest_D = values.abs().reshape(-1, values.shape[-1]).amax(0) if values.numel() else None
    if largest_D is None:
        return values.half(), ()
    if not bool(torch.isfinite(largest_D).all()):
        raise ValueError("a value is not finite")
    needed_D = (largest_D > LARGEST) | ((largest_D < SMALLEST) & (largest_D > 0))
    if not bool(needed_D.any()):
        return values.half(), ()
    exponents_D = torch.where(needed_D, largest_D.log2().ceil().clamp(-100, 126), 0.0).int()
    scaled = torch.ldexp(values, -exponents_D)
    return scaled.half(), tuple(exponents_D.tolist())


class FeatureWriter:
    """Writes one file; it appears under its name when it is whole.

    Args:
        path: file; its folder exists.
        grid: patch grid of the scan.
        what: model and scan, for error lines.
    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, grid: PatchGrid, what: str) -> None:
        self.grid, self.what = grid, what
        self.parts: list[Part] = []
        self._stack = ExitStack()
        self._file: BinaryIO = self._stack.enter_context(files.replacing(path, mode=files.PRIVATE))
        self._file.write(_MAGIC)

    def rows(self, first: int, rows_ZYXD: Tensor) -> None:
        """Append finished rows of patches, float32."""
        self._append(_ROWS, first, rows_ZYXD)

    def finish(self, windows: WindowVectors) -> None:
        """Append the vectors of the windows and the index, and put the file in its place."""
        for name in _VECTORS:
            self._append(name, 0, getattr(windows, name))
        index = {
            "schema": SCHEMA,
            "grid": asdict(self.grid),
            "starts": windows.start_W3.tolist(),
            "parts": [asdict(part) for part in self.parts],
        }
        content = json.dumps(index).encode()
        self._file.write(content)
        self._file.write(_FOOTER.pack(len(content), xxhash.xxh3_64_intdigest(content), _MAGIC))
        self._stack.close()

    def abandon(self) -> None:
        """Remove what has been written; nothing happens to a finished file."""

        def give_up() -> None:
            raise _Abandoned

        self._stack.callback(give_up)  # leaves `replacing` as an error would
        try:
            self._stack.close()
        except _Abandoned:
            pass

    def _append(self, name: str, first: int, values: Tensor) -> None:
        try:
            half, exponents = to_half(values)
        except ValueError as error:
            raise UserError(
                f"{self.what}: some features are not finite (NaN or infinite), so nothing can be "
                "learned from them; check the weights, and whether the input has the HU window "
                "that the model was trained with"
            ) from error
        array = np.ascontiguousarray(half.cpu().numpy())
        packed = b""
        if array.size:
            packed = blosc2.compress2(
                array,
                codec=blosc2.Codec.ZSTD,  # 15 % smaller; LZ4 finds nothing in float16
                clevel=1,
                filters=[blosc2.Filter.SHUFFLE],
                typesize=array.itemsize,
                nthreads=_threads_for(array),
            )
        part = Part(
            name,
            first,
            tuple(array.shape),
            self._file.tell(),
            len(packed),
            xxhash.xxh3_64_intdigest(packed),
            exponents,
        )
        self._file.write(packed)
        self.parts.append(part)


class _Abandoned(Exception):
    """Ends the block that writes a file, so that the file is removed."""


def read(path: Path, device: torch.device | str = "cpu") -> tuple[BlockFeatures, PatchGrid]:
    """Read a file.

    Args:
        path: file that `FeatureWriter` wrote.
        device: device of the features.
    Returns:
        float32 features and vectors, and the patch grid.
    Raises:
        FileNotFoundError: there is no such file.
        DamagedFeatures: the file is cut short or damaged, or of another version.
    """
    with path.open("rb", buffering=0) as file:
        try:
            index, parts = _read_index(file)
            grid = PatchGrid(*(_size3(index["grid"][key]) for key in asdict(_NO_GRID)))
            features_ZYXD = _read_rows(file, parts[_ROWS], grid, device)
            vectors = {name: _read_part(file, parts[name][0], device).float() for name in _VECTORS}
            starts = torch.tensor(index["starts"], dtype=torch.int64).reshape(-1, 3)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, struct.error) as error:
            raise DamagedFeatures(f"{type(error).__name__}: {error}") from error
    windows = WindowVectors(**vectors, start_W3=starts)
    return BlockFeatures(features_ZYXD.permute(3, 0, 1, 2), windows), grid


_NO_GRID = PatchGrid((1, 1, 1), (1, 1, 1), (1, 1, 1))  # its fields, in order


def _read_index(file: Any) -> tuple[Mapping[str, Any], dict[str, list[Part]]]:
    """The index of a file, and its parts by name; whatever is wrong is a ValueError or the like."""
    size = os.fstat(file.fileno()).st_size
    if size < len(_MAGIC) + _FOOTER.size:
        raise ValueError("the file ends too early")
    length, checksum, magic = _FOOTER.unpack(_bytes(file, size - _FOOTER.size, _FOOTER.size))
    begin = size - _FOOTER.size - length
    if magic != _MAGIC or begin < len(_MAGIC):
        raise ValueError("its end is missing")
    content = _bytes(file, begin, length)
    if xxhash.xxh3_64_intdigest(content) != checksum:
        raise ValueError("the checksum of its index differs")
    index = json.loads(content)
    if index["schema"] != SCHEMA:
        raise ValueError(f"schema is {index['schema']}, this version of tapct reads {SCHEMA}")
    parts: dict[str, list[Part]] = {}
    for one in index["parts"]:
        part = Part(**{**one, "shape": tuple(one["shape"])})
        parts.setdefault(part.name, []).append(part)
    return index, parts


def _read_rows(file: Any, parts: list[Part], grid: PatchGrid, device: torch.device | str) -> Tensor:
    """All rows of patches: float32 (Z, Y, X, D); one part at a time is in memory twice."""
    features_ZYXD = torch.empty((*grid.shape, parts[0].shape[-1]), device=device)
    done = 0
    for part in parts:
        if part.first != done:
            raise ValueError(f"rows {done} to {part.first - 1} are missing")
        done += part.shape[0]
        features_ZYXD[part.first : done] = _read_part(file, part, device)
    if done != grid.shape[0]:
        raise ValueError(f"it has {done} of {grid.shape[0]} rows of patches")
    return features_ZYXD


def _read_part(file: Any, part: Part, device: torch.device | str) -> Tensor:
    """One array, float16, or float32 where it has exponents."""
    array = np.empty(part.shape, np.float16)
    packed = _bytes(file, part.offset, part.num_bytes)
    if xxhash.xxh3_64_intdigest(packed) != part.checksum:
        raise ValueError(f"the checksum of {part.name} {part.first} differs")
    if array.size:
        blosc2.decompress2(packed, dst=array, nthreads=_threads_for(array))
    half = torch.from_numpy(array).to(device)
    if not part.exponents:
        return half
    return torch.ldexp(half.float(), torch.tensor(part.exponents, device=half.device))


def _threads_for(array: np.ndarray) -> int:
    return _THREADS if array.nbytes > _ONE_THREAD_BYTES else 1


def _bytes(file: Any, offset: int, length: int) -> bytes:
    content = os.pread(file.fileno(), length, offset)
    if len(content) != length:
        raise ValueError("the file ends too early")
    return content


def _size3(values: Any) -> tuple[int, int, int]:
    z, y, x = (int(value) for value in values)
    return z, y, x
