"""A selection means what the same words mean in Python, and nothing else is run."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest

from tapct.base.exits import UserError
from tapct.data.selection import parse, selectable

ROWS = [
    {"spacing_z_mm": 1.0, "kernel": "B30f", "marks": "a,bc", "depth": 10, "age_years": 1.0},
    {"spacing_z_mm": 5.0, "kernel": "B70f", "marks": "b", "depth": 20, "age_years": 60.0},
    {"spacing_z_mm": math.nan, "kernel": "", "marks": "", "depth": 30, "age_years": math.nan},
    {"spacing_z_mm": 7.0, "kernel": "B30f", "marks": "bc", "depth": 40, "age_years": 40.0},
]
TABLE = pa.Table.from_pylist(ROWS)


def known(value: float | str) -> bool:
    """`known` of the language, for `eval` below."""
    return value != "" if isinstance(value, str) else not math.isnan(value)


@pytest.mark.parametrize(
    "text",
    [
        "spacing_z_mm <= 5 and kernel not in ['B70f']",
        "not spacing_z_mm <= 5",
        "1 <= spacing_z_mm < 6 or depth in [30, 40]",
        "known(age_years) and depth * spacing_z_mm >= 100",
        "-depth < -15 and depth / 3 != 10",
        "kernel == '' or known(kernel) and kernel != 'B70f'",
        "'30' in kernel",
        "depth in (10, -3) or not (kernel == 'B70f' or depth > 35)",
        "age_years < 50.5 and not age_years < 2",
        "spacing_z_mm != 5",
    ],
)
def test_a_selection_selects_what_python_would(text: str) -> None:
    expected = [eval(text, {"known": known}, dict(row)) for row in ROWS]
    selection = parse(text, "data.select")
    assert selection.apply(TABLE).to_pylist() == expected
    assert set(selection.columns) <= set(ROWS[0])


def test_a_mark_is_one_of_the_codes_and_not_a_part_of_one() -> None:
    assert parse("'b' in marks", "x").apply(TABLE).to_pylist() == [False, True, False, False]
    assert parse("'bc' not in marks", "x").apply(TABLE).to_pylist() == [False, True, True, False]


def test_each_condition_is_counted_alone() -> None:
    selection = parse("spacing_z_mm <= 5 and kernel not in ['B70f']", "data.select")
    mask, lines = selection.apply_and_count(TABLE)
    assert mask.to_pylist() == [True, False, False, False]
    assert lines == ["  2 of 4 fulfil spacing_z_mm <= 5", "  3 of 4 fulfil kernel not in ['B70f']"]
    assert parse("depth > 10", "data.select").apply_and_count(TABLE)[1] == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("spacing <= 5", "did you mean spacing_z_mm"),
        ("path == 'x'", "no column is named path; it cannot be used here"),
        ("kernel == B30f", "no column is named B30f"),
        ("spacing_z_mm <= '5'", "compares a number with text"),
        ("kernel", "is text, not a condition"),
        ("depth and kernel == ''", "is a number, not a condition"),
        ("depth <= 5 & age_years > 3", "write and"),
        ("'a' in depth", "must be text in quotes"),
        ("depth in []", "is an empty list"),
        ("depth in ['a']", "values must be a number"),
        ("depth is 3", "write == or !="),
        ("depth > True", "neither a number nor text"),
        ("depth ** 2 > 3", "it knows + - * /"),
        ("depth > 1e999", "too large a number"),
        ("depth > 1" + 400 * "0", "too large a number"),
        ("depth in [1" + 400 * "0" + "]", "too large a number"),
        ("kernel in [-'B30f']", "values must be text"),
        ("depth > 1 # thick\nand depth < 9", "write it without comments"),
        ("1 < 2", "names no column"),
        ("known('a')", "must name one column"),
        ("", "is not an expression"),
        ("depth <= 5; 1", "is not an expression"),
        ("(" * 500 + "depth" + ")" * 500 + " > 1", "nested"),
        ("depth > 1 and " * 400 + "depth > 1", "characters, more than"),
        ("__import__('os').system('true') == 0", "the only function is known"),
        ("kernel.x == 1", "is not allowed in a selection"),
        ("[x for x in kernel] == 1", "is not allowed in a selection"),
        ("(lambda: 1) == 1", "is not allowed in a selection"),
        ("f'{depth}' == 'a'", "is not allowed in a selection"),
    ],
)
def test_anything_else_is_refused_with_the_part_that_is_wrong(text: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text, "data.select")
    line = str(error.value)
    assert line.startswith("data.select") and part in line and "\n" not in line


def test_a_selection_may_be_written_in_several_lines() -> None:
    lines, line = parse("\ndepth in [+3, -4]\n  and kernel == 'a  b'\n", "x"), "depth in [+3, -4]"
    assert lines.text == f"{line} and kernel == 'a  b'"
    assert [one.text for one in lines.conditions] == [line, "kernel == 'a  b'"]


def test_no_column_with_a_path_can_be_named() -> None:
    assert not {"path", "label_path", "file_paths", "merged_labels"} & set(selectable())
    assert {"spacing_z_mm", "kernel", "manufacturer", "marks", "age_years"} <= set(selectable())
