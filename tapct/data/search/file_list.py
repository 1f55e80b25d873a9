"""The paths of many files in a few bytes each."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload


class FileList(Sequence[Path]):
    """Paths of the files of one scan: about 10 bytes each, where a tuple of paths has 200.

    Args:
        files: paths, at least one.
    """

    __slots__ = ("_base", "_names", "_size")

    def __init__(self, files: Sequence[Path]) -> None:
        texts = [str(file) for file in files]
        parents = {os.path.dirname(text) for text in texts}
        self._base = parents.pop() if len(parents) == 1 else os.path.commonpath(parents)
        start = len(self._base) + 1 if self._base not in ("", "/") else len(self._base)
        names = "\0".join(text[start:] for text in texts)
        self._names = zlib.compress(names.encode("utf-8", "surrogateescape"), 1)
        self._size = len(texts)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Path]:
        names = zlib.decompress(self._names).decode("utf-8", "surrogateescape")
        folder = Path(self._base)
        return (folder / name for name in names.split("\0"))

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        return tuple(self)[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (FileList, tuple)):
            return NotImplemented
        return len(self) == len(other) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"FileList({list(map(str, self))})"


def compact(files: Sequence[Path]) -> Sequence[Path]:
    """Many paths as a `FileList`, few as a tuple."""
    return FileList(files) if len(files) > 2 else tuple(files)
