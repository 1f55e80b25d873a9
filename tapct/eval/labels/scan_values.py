"""Labels of scans as a whole, from the CSV file of `eval.scan_labels`.

One column names the scans (`path`, `case_id` or `id`), a column `split` or columns `fold0`, `fold1`
... may hold an official split, columns that identify a person or a file, such as `PatientID`, are
not read, since the values of targets stand in the results, and every other column is a target. An
empty cell, or one of UNKNOWN such as NaN, NA or NULL, is an unknown value. The type of a target
follows from all of its values, whether or not the archive holds their scans:

- binary, if each value is one of a pair of words such as 0 and 1, or no and yes;
- a number, if each value is a finite number;
- a category otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.base.files import expand_path
from tapct.data.tables import Table, read_table
from tapct.eval.labels.table_rows import KEY_COLUMNS, MatchedRows, match_rows
from tapct.eval.scans.labelled_scan import ScanLabels, ScanValue
from tapct.eval.scans.train_test import TEST, TRAIN, VAL
from tapct.eval.scans.usable import ScanRow

OPTION = "eval.scan_labels"
# columns that identify a person, an examination or a file, in lower case without other characters
IDENTIFYING = frozenset(
    (
        *("patient", "patientid", "patientname", "patientuid", "pid", "subject", "subjectid"),
        *("name", "firstname", "lastname", "surname", "mrn", "medicalrecordnumber", "ssn"),
        *("birthdate", "dateofbirth", "dob", "patientbirthdate", "patientsbirthdate"),
        *("patientsname", "otherpatientids", "accession", "accessionnumber", "studyid"),
        *("studydate", "scandate", "seriesdate", "acquisitiondate", "examdate"),
        *("studyuid", "studyinstanceuid", "seriesuid", "seriesinstanceuid", "sopinstanceuid"),
        *("scan", "scanid", "scanname", "file", "filename", "filepath", "image", "volumename"),
    )
)
SPLIT_COLUMN = "split"
_FOLD = re.compile(r"fold_?\d+")
# what spreadsheets, R, pandas and SQL write for a value that is unknown
UNKNOWN = ("", "nan", "-nan", "na", "n/a", "#n/a", "<na>", "null")
PAIRS = (
    ("0", "1"),
    ("0.0", "1.0"),
    ("no", "yes"),
    ("n", "y"),
    ("false", "true"),
    ("absent", "present"),
    ("negative", "positive"),
)
SIDES = {
    **dict.fromkeys(("train", "training", "tr"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "tune"), VAL),
    **dict.fromkeys(("test", "testing", "ts"), TEST),
}


class Kind(Enum):
    """The type of a target."""

    BINARY = "binary"  # values are bool
    NUMBER = "number"  # values are float
    CATEGORY = "category"  # values are str


@dataclass(frozen=True)
class TargetTable:
    """The labels of an archive's scans as a whole.

    Args:
        values: target -> value by scan ID, without unknown values.
        kinds: target -> its type, in the order of the columns.
        sides: `train`, `val` or `test` by scan ID; empty without an official split.
        split_column: column of the official split; empty without one.
        digest: hash of the values and sides by scan ID.
        summary: one line on what was read.
    """

    values: ScanLabels
    kinds: Mapping[str, Kind]
    sides: Mapping[str, str]
    split_column: str
    digest: str
    summary: str


def read_scan_labels(
    file: Path | str, rows: Sequence[ScanRow], split_column: str = "auto"
) -> TargetTable:
    """Read the labels of scans as a whole.

    Args:
        file: CSV file, see above.
        rows: accepted scans of the store.
        split_column: column of the official split; `auto` takes `split`, or else `fold0`, where
            there is one; `none` takes no column.
    Raises:
        UserError: the table cannot be used, see the error lines below.
    """
    table = read_table(expand_path(file), OPTION)
    matched = match_rows(table, rows, OPTION)
    split = _split_column(table, split_column)
    targets = [
        name
        for name in table.columns
        if name != split and not _is_other(name) and any(_known_texts(table, name))
    ]
    if not targets and not split:
        raise UserError(
            f"{OPTION}: {table.file} has no column with a target that has values; its columns are "
            f"{', '.join(table.columns) or 'none'}"
        )
    texts = _texts(matched, [*targets, *([split] if split else [])])
    decimal_comma = table.delimiter != ","
    kinds = {
        name: kind_of(_known_texts(table, name), decimal_comma=decimal_comma) for name in targets
    }
    values: dict[str, dict[str, ScanValue]] = {}
    sides: dict[str, str] = {}
    for scan_id, row in texts.items():
        given = {name: row[name] for name in targets if name in row}
        values[scan_id] = {
            name: value_of(text, kinds[name], decimal_comma=decimal_comma)
            for name, text in given.items()
        }
        if split and split in row:
            sides[scan_id] = _side(row[split], table, split)
    summary = _summary(matched, texts, kinds, rows)
    for name in targets:
        if kinds[name] is Kind.CATEGORY:
            summary += _stray_texts(name, _known_texts(table, name), decimal_comma)
    return TargetTable(values, kinds, sides, split, _digest(values, sides), summary)


def _stray_texts(name: str, texts: Sequence[str], decimal_comma: bool) -> str:
    """What a person must know about a category most of whose values are numbers; else empty."""
    stray = [text for text in texts if _number(text, decimal_comma) is None]
    if 2 * len(stray) >= len(texts):
        return ""
    return (
        f"; {name} is a category, because {len(stray)} of {counted(len(texts), 'value')} "
        f"{'is no number' if len(stray) == 1 else 'are no numbers'}, e.g. {stray[0]!r}; leave the "
        "cell of an unknown value empty"
    )


def _is_other(name: str) -> bool:
    """Whether a column is no target: it names scans or patients, or is a part of an official
    split.
    """
    lower = name.lower()
    known = (*KEY_COLUMNS, SPLIT_COLUMN, "")
    return lower in known or _FOLD.fullmatch(lower) is not None or _identifies(name)


def _identifies(name: str) -> bool:
    """Whether a column identifies a person, an examination or a file."""
    return re.sub(r"[^a-z0-9]", "", name.lower()) in IDENTIFYING


def _split_column(table: Table, wanted: str) -> str:
    """The column of the official split; empty for none.

    Raises:
        UserError: there is no column with the wanted name.
    """
    if wanted == "none":
        return ""
    by_lower = {name.lower(): name for name in table.columns}
    if wanted != "auto":
        if wanted.lower() not in by_lower:
            raise UserError(
                f"eval.split_column is {wanted!r}, which is no column of {table.file}; it has "
                f"{', '.join(table.columns)}"
            )
        return by_lower[wanted.lower()]
    for name in (SPLIT_COLUMN, "fold0", "fold_0"):
        column = by_lower.get(name, "")
        if column and any(row[column] for row in table.rows):
            return column
    return ""


def _texts(matched: MatchedRows, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Known values by scan ID and column; rows of one scan are merged.

    Raises:
        UserError: two rows give one scan different values.
    """
    texts: dict[str, dict[str, str]] = {}
    for scan_id, row in matched.found:
        known = texts.setdefault(scan_id, {})
        for name in columns:
            text = row[name]
            if text.lower() in UNKNOWN:
                continue
            if known.setdefault(name, text) != text:
                raise UserError(
                    f"{OPTION}: {matched.table.file} gives scan {row[matched.key]} two values of "
                    f"{name}: {known[name]!r} and {text!r}; keep one row per scan"
                )
    return texts


def _known_texts(table: Table, column: str) -> list[str]:
    """The known values of a column, as text."""
    texts = (row[column] for row in table.rows)
    return [text for text in texts if text.lower() not in UNKNOWN]


def kind_of(texts: Iterable[str], *, decimal_comma: bool = False) -> Kind:
    """The type of a target.

    Args:
        texts: all of its known values.
        decimal_comma: whether a comma may be the decimal separator.
    """
    words = {text.lower() for text in texts}
    if any(words <= set(pair) for pair in PAIRS) or words <= {"0", "1", "0.0", "1.0"}:
        return Kind.BINARY
    if all(_number(word, decimal_comma) is not None for word in words):
        return Kind.NUMBER
    return Kind.CATEGORY


def value_of(text: str, kind: Kind, *, decimal_comma: bool = False) -> ScanValue:
    """A known value with the type of its target; arguments as in `kind_of`."""
    if kind is Kind.BINARY:
        return text.lower() in {positive for _, positive in PAIRS}
    if kind is Kind.NUMBER:
        number = _number(text, decimal_comma)
        assert number is not None, f"{text!r} is no number"
        return number
    return text


def _number(text: str, decimal_comma: bool) -> float | None:
    """The finite number that a text means; None where it means none."""
    try:
        number = float(text.replace(",", ".") if decimal_comma else text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _side(text: str, table: Table, column: str) -> str:
    """A side of the official split.

    Raises:
        UserError: the text is no name of a side.
    """
    if text.lower() not in SIDES:
        raise UserError(
            f"{OPTION}: column {column} of {table.file} holds {text!r}; rule: train, val or test. "
            "Set eval.split_column=none if it is no split"
        )
    return SIDES[text.lower()]


def _digest(values: ScanLabels, sides: Mapping[str, str]) -> str:
    """Hash of values and sides: 32 hex digits."""
    content = json.dumps([values, sides], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _summary(
    matched: MatchedRows,
    texts: Mapping[str, Mapping[str, str]],
    kinds: Mapping[str, Kind],
    rows: Sequence[ScanRow],
) -> str:
    """One line on what was read; the names in it are for the terminal, not for results."""
    targets = ", ".join(f"{name} ({kind.value})" for name, kind in kinds.items())
    parts = [f"scan labels: {len(texts)} of {len(rows)} scans", *matched.lines()]
    private = [name for name in matched.table.columns if _identifies(name)]
    if private:
        parts.append(f"columns that identify and are not read: {', '.join(private)}")
    return "; ".join([*parts, f"targets: {targets}"] if targets else parts)
