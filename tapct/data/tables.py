"""Tables about scans: CSV files as spreadsheets write them, and which scan a row is about."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError
from tapct.data.readers import stem_of

_DELIMITERS = ",;\t"
# nnU-Net writes the number of the channel behind the name of a case
_CHANNEL = "_0000"


@dataclass(frozen=True)
class Table:
    """A table as text.

    Args:
        file: file that it was read from.
        columns: names of the columns, without spaces around them.
        rows: values of each row by column, without spaces around them; rows without any value are
            left out.
        numbers: line of each row in the file, from 1.
        delimiter: character between two values.
    """

    file: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    numbers: tuple[int, ...]
    delimiter: str


def read_table(file: Path, option: str) -> Table:
    """Read a CSV file: UTF-8 with or without a byte order mark, values separated by comma,
    semicolon or tab; a first line such as `sep=;`, which Excel writes, is allowed.

    Args:
        file: file to read.
        option: option or setting that names it, for error lines.
    Raises:
        UserError: the file cannot be read, or is no table: two columns have one name, or a row has
            more values than there are columns.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
        first, _, rest = text.partition("\n")
        skipped = 0
        if first.strip().lower().startswith("sep=") and len(first.strip()) == len("sep=") + 1:
            delimiter, text, skipped = first.strip()[-1], rest, 1
        else:
            delimiter = max(_DELIMITERS, key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = [(reader.line_num + skipped, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not a table in UTF-8"
        raise UserError(f"{option}: cannot read {file}: {problem}") from error
    filled = [(at, [value.strip() for value in row]) for at, row in lines]
    filled = [(at, row) for at, row in filled if any(row)]
    if not filled:
        return Table(file, (), (), (), delimiter)
    (_, head), *body = filled
    while head and not head[-1]:  # a spreadsheet may write empty columns behind the last one
        head.pop()
    twice = sorted({name for name in head if head.count(name) > 1})
    if twice:
        raise UserError(
            f"{option}: {file} has {head.count(twice[0])} columns with the name '{twice[0]}'; "
            "keep one of them, or give them different names"
        )
    for at, row in body:
        if any(row[len(head) :]):
            raise UserError(
                f"{option}: line {at} of {file} has {len(row)} values, but there are {len(head)} "
                "columns; put a value that contains the separator in double quotes"
            )
    rows = tuple(dict(zip(head, [*row, *[""] * len(head)])) for _, row in body)
    return Table(file, tuple(head), rows, tuple(at for at, _ in body), delimiter)


def scan_name(text: str) -> str:
    """The name of a scan in a table as `ScanNames` compares it."""
    return text.replace("\\", "/").removeprefix("./").rstrip("/")


class ScanNames:
    """The names by which a table may call the scans of an archive.

    A name is the scan's path below the archive, with or without its suffix, or else the file name
    alone, with or without suffix and channel (`_0000`), or else a folder that contains the scan and
    no other one.

    Args:
        paths: paths of the scans below the archive.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        whole, files, folders = (defaultdict[str, set[str]](set) for _ in range(3))
        for text in paths:
            path = Path(text)
            for name in (text, (path.parent / stem_of(path)).as_posix()):
                whole[name].add(text)
            for name in file_names(path):
                files[name].add(text)
            for folder in path.parents:
                for name in {folder.as_posix(), folder.name} - {".", ""}:
                    folders[name].add(text)
        self._kinds: Sequence[dict[str, set[str]]] = (whole, files, folders)

    def paths_of(self, name: str) -> Collection[str]:
        """The paths of the scans that a name may mean: one, none, or several."""
        name = scan_name(name)
        for kind in self._kinds:
            if name in kind:
                return sorted(kind[name])
        return ()


def file_names(path: Path) -> set[str]:
    """File name of a scan: with its suffix, without it, and without its channel."""
    stem = stem_of(path)
    return {path.name, stem, stem.removesuffix(_CHANNEL)} - {""}
